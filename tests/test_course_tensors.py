"""What MiniTorch's API promises of TensorData and Tensor, beyond values and gradients."""

from __future__ import annotations

import random
import re
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import minitorch
from minitorch import IndexingError, TensorBackend, TensorData
from minitorch.testing import arrays, shapes, tensors

BACKENDS = {
    "simple": TensorBackend(minitorch.SimpleOps),
    "fast": TensorBackend(minitorch.FastOps),
}
each_backend = pytest.mark.parametrize("backend", BACKENDS)

# ----- TensorData -----


@given(arrays(shapes(min_dims=0, min_size=0)))
def test_indices_and_positions(array: Any) -> None:
    data = TensorData.from_array(array)
    indices = list(data.indices())
    assert indices == list(np.ndindex(array.shape))
    assert [data.get(index) for index in indices] == [float(array[i]) for i in indices]
    storage, shape, strides = data.tuple()
    out = np.zeros(data.dims, np.int32)
    for ordinal, index in enumerate(indices):
        minitorch.to_index(ordinal, shape, out)
        assert tuple(out) == index
        position = minitorch.index_to_position(out, strides)
        assert position == data.index(index) and storage[position] == array[index]


@given(st.data(), arrays(shapes(max_dims=4)))
def test_permute_keeps_the_storage(data: st.DataObject, array: Any) -> None:
    original = TensorData.from_array(array)
    order = data.draw(st.permutations(range(array.ndim)))
    permuted = original.permute(*order)
    assert permuted._storage is original._storage
    assert np.array_equal(permuted.array, array.transpose(order))


@pytest.mark.parametrize("index", [(0,), (0, 0, 0), (2, 0), (-1, 0), (0, 3)])
def test_bad_indices(index: tuple[int, ...]) -> None:
    with pytest.raises(IndexingError, match="index"):
        TensorData([0.0] * 6, (2, 3)).index(index)


@pytest.mark.parametrize(
    "make",
    [
        lambda: TensorData([0.0] * 15, (3, 5), (6,)),
        lambda: TensorData([0.0] * 14, (3, 5)),
        lambda: TensorData([0.0] * 15, [3, 5]),
        lambda: TensorData([0.0] * 15, (3, 5), [5, 1]),
        lambda: TensorData([0.0] * 15, (3, 5), (5, 2)),
        lambda: TensorData([0.0], (-1,)),
        lambda: TensorData([0.0] * 6, (2, 3)).permute(0, 0),
        lambda: minitorch.shape_broadcast((5, 2), (5,)),
    ],
)
def test_bad_layouts(make: Any) -> None:
    with pytest.raises((IndexingError, ValueError, TypeError)):
        make()


@pytest.mark.parametrize(
    ("a", "b", "out"),
    [((1,), (5, 5), (5, 5)), ((5, 1, 5, 1), (1, 5, 1, 5), (5, 5, 5, 5)), ((), (2,), (2,))],
)
def test_broadcast(a: tuple[int, ...], b: tuple[int, ...], out: tuple[int, ...]) -> None:
    assert minitorch.shape_broadcast(a, b) == out == TensorData.shape_broadcast(b, a)
    index = np.zeros(len(a), np.int32)
    big = np.array([n - 1 for n in out], np.int32)
    minitorch.broadcast_index(big, np.array(out), np.array(a, np.int64), index)
    assert tuple(index) == tuple(n - 1 for n in a)


def test_contiguous() -> None:
    data = TensorData(list(range(15)), (3, 5))
    assert data.strides == (5, 1) and data.is_contiguous()
    assert not TensorData(list(range(15)), (5, 3), (1, 5)).is_contiguous()
    random.seed(0)
    index = data.sample()
    data.set(index, 9.0)
    assert data.get(index) == 9.0 and "9" in data.to_string()


# ----- making tensors -----


@each_backend
@given(values=st.lists(st.floats(-100, 100), min_size=1))
def test_lists_keep_their_values_exactly(backend: str, values: list[float]) -> None:
    x = minitorch.tensor(values, backend=BACKENDS[backend])
    assert [x[i] for i in range(len(values))] == values


def test_dtypes() -> None:
    assert minitorch.tensor([1, 2]).dtype == np.float64
    assert minitorch.tensor(np.zeros(2, np.float32)).dtype == np.float32
    assert minitorch.tensor_from_numpy(np.arange(3)).dtype == np.float64
    x = minitorch.tensor(np.ones(2, np.float32))
    assert (x * 2 + 1).dtype == np.float32 == (1 / x).sum().dtype
    assert (x + minitorch.ones((2,))).dtype == np.float64


def test_default_dtype() -> None:
    try:
        minitorch.set_default_dtype(np.float32)
        assert minitorch.tensor([1.0]).dtype == np.float32 == minitorch.rand((2,)).dtype
        assert minitorch.zeros((2,)).dtype == np.float32
    finally:
        minitorch.set_default_dtype(np.float64)
    with pytest.raises(TypeError, match="float16"):
        minitorch.set_default_dtype(np.float16)


@pytest.mark.parametrize("target", ["cuda", "cuda:0", "cpu", None])
def test_to_says_that_it_takes_no_device(target: Any) -> None:
    with pytest.raises(TypeError, match=f"TensorBackend or a dtype, got {target!r}"):
        minitorch.ones((2,)).to(target)


@pytest.mark.parametrize("target", ["float31", 3, minitorch.FastOps])
def test_to_names_what_it_was_given(target: Any) -> None:
    with pytest.raises(TypeError, match=re.escape(f"float32 or float64, got {target!r}")):
        minitorch.ones((2,)).to(target)


def test_factories_check_backend_and_shape() -> None:
    for make in (minitorch.rand, minitorch.zeros, minitorch.ones):
        with pytest.raises(TypeError, match="backend must be a TensorBackend, got 'cuda'"):
            make((2,), "cuda")  # type: ignore[arg-type]
        with pytest.raises(ValueError, match=r"no negative size, got \(2, -1\)"):
            make((2, -1))
    with pytest.raises(TypeError, match="backend must be a TensorBackend"):
        minitorch.tensor(np.ones(2), "cuda")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="subclass of TensorOps"):
        TensorBackend(int)  # type: ignore[arg-type]


def test_rand_draws_in_row_major_order() -> None:
    random.seed(3)
    expected = [random.random() for _ in range(6)]
    random.seed(3)
    assert minitorch.rand((2, 3)).to_numpy().reshape(-1).tolist() == expected
    minitorch.manual_seed(5)
    first = minitorch.rand((2,)).to_numpy()
    minitorch.manual_seed(5)
    assert np.array_equal(minitorch.rand((2,)).to_numpy(), first)


def test_a_transposed_array_is_taken_as_it_is_read() -> None:
    array = np.arange(6.0).reshape(2, 3).T
    for make in (minitorch.tensor, minitorch.tensor_from_numpy):
        x = make(array)
        assert x._tensor.is_contiguous() and np.array_equal(x.to_numpy(), array)


def test_which_tensors_require_a_gradient() -> None:
    assert minitorch.tensor([1.0]).is_leaf() and minitorch.rand((1,)).is_leaf()
    assert minitorch.tensor([1.0], requires_grad=False).is_constant()
    assert minitorch.zeros((1,)).is_constant() and minitorch.ones((1,)).is_constant()
    assert minitorch.tensor_from_numpy(np.ones(1)).is_constant()
    x = minitorch.tensor([1.0])
    x.requires_grad_(False)
    assert not x.requires_grad()
    assert x.detach().is_constant()


# ----- reading and writing -----


def test_indexing() -> None:
    x = minitorch.tensor([[2, 3, 4], [4, 5, 7]])
    assert x[1, 2] == 7.0 and isinstance(x[1, 2], float)
    assert x[-1, -1] == 7.0
    assert x[0].shape == (3,) and x[:, 1:].to_numpy().tolist() == [[3, 4], [5, 7]]
    x[0, 0] = 9.0
    assert x[0, 0] == 9.0
    for bad in [(50, 2), (0, 3), (0, 0, 0)]:
        with pytest.raises(IndexingError):
            x[bad]


def test_repr_and_numpy() -> None:
    x = minitorch.tensor([[1.0, 2.5]])
    assert "2.5" in repr(x) and "grad_fn=Mul" in repr(x * 2)
    assert np.asarray(x).tolist() == x.numpy().tolist() == [[1.0, 2.5]]
    copy = x.to_numpy()
    copy[:] = 0
    assert x[0, 1] == 2.5
    x.numpy()[0, 0] = 7.0
    assert x[0, 0] == 7.0


@given(tensors(shapes(min_dims=2), layouts=["transposed", "sliced", "expanded"]))
def test_view_wants_a_contiguous_tensor(x: Any) -> None:
    if x._tensor.is_contiguous():
        return
    with pytest.raises(AssertionError, match="contiguous"):
        x.view(x.size)
    assert x.contiguous().view(x.size).shape == (x.size,)


def test_bad_views() -> None:
    x = minitorch.zeros((2, 3))
    assert x.view(3, -1).shape == (3, 2)
    for shape in [(7,), (-2, -3), (-1, 4), (-1, -1)]:
        with pytest.raises(ValueError, match="view"):
            x.view(*shape)


@each_backend
def test_reductions_keep_the_dimension(backend: str) -> None:
    x = minitorch.tensor([[2, 3], [4, 6], [5, 7]], backend=BACKENDS[backend])
    assert x.sum(0).shape == (1, 2) and x.mean(1).shape == (3, 1)
    assert x.sum().shape == x.mean().shape == x.all().shape == (1,)
    assert minitorch.max(x, minitorch.tensor([1])).shape == (3, 1)
    assert x.var(0).to_numpy() == pytest.approx(np.var(x.to_numpy(), 0, keepdims=True))
    with pytest.raises(IndexError, match="dim must be in"):
        x.sum(2)


@each_backend
def test_matmul_shapes(backend: str) -> None:
    f = BACKENDS[backend]
    a, b = minitorch.rand((2, 1, 3, 4), f), minitorch.rand((5, 4, 2), f)
    assert (a @ b).shape == (2, 5, 3, 2)
    with pytest.raises(ValueError, match="matmul"):
        a @ minitorch.rand((3, 4), f)
    with pytest.raises(ValueError, match="two dimensions"):
        a @ minitorch.rand((4,), f)


# ----- the graph -----


@each_backend
def test_gradients_accumulate_over_uses_and_calls(backend: str) -> None:
    x = minitorch.tensor([1.0, 2.0], backend=BACKENDS[backend])
    (x * x + x).sum().backward()
    (x * 3).sum().backward()
    assert x.grad is not None and x.grad.to_numpy().tolist() == [6.0, 8.0]
    x.zero_grad_()
    assert x.grad is None


def test_a_freed_graph_says_what_to_do() -> None:
    x = minitorch.tensor([2.0])
    y = x * x
    y.backward(retain_graph=True)
    y.backward()
    with pytest.raises(RuntimeError, match="retain_graph"):
        y.backward()
    assert x.grad is not None and x.grad.item() == 8.0


def test_backward_of_many_elements_wants_a_gradient() -> None:
    x = minitorch.tensor([1.0, 2.0])
    with pytest.raises(ValueError, match="grad_output"):
        (x * 2).backward()
    with pytest.raises(ValueError, match="shape"):
        (x * 2).backward(minitorch.ones((3,)))
    (x * 2).backward(minitorch.ones((2,)))
    with pytest.raises(RuntimeError, match="does not require"):
        x.detach().backward()


def test_no_grad() -> None:
    x = minitorch.tensor([1.0])
    with minitorch.no_grad():
        assert (x * 2).is_constant()

    @minitorch.no_grad()
    def double(value: Any) -> Any:
        return value * 2

    assert double(x).is_constant() and not (x * 2).is_constant()


def test_gradients_do_not_share_memory() -> None:
    x, y = minitorch.tensor([1.0, 2.0]), minitorch.tensor([3.0, 4.0])
    (x + y).sum().backward()
    assert x.grad is not None and y.grad is not None
    x.grad.numpy()[:] = 7.0
    assert y.grad.to_numpy().tolist() == [1.0, 1.0]


def test_a_view_passes_on_a_gradient_of_any_strides() -> None:
    x = minitorch.tensor(np.arange(6.0))
    weights = minitorch.tensor(np.arange(6.0).reshape(3, 2), requires_grad=False)
    (x.view(2, 3).permute(1, 0) * weights).sum().backward()
    assert x.grad is not None
    assert x.grad.to_numpy().tolist() == [0.0, 2.0, 4.0, 1.0, 3.0, 5.0]


def test_a_function_written_by_a_student() -> None:
    """Extra arguments may be tensors without a derivative, with 0.0 as their gradient."""

    class Scale(minitorch.Function):
        @staticmethod
        def forward(ctx: Any, a: Any, factor: Any) -> Any:
            ctx.save_for_backward(factor)
            return a.f.mul_zip(a, factor)

        @staticmethod
        def backward(ctx: Any, grad: Any) -> Any:
            (factor,) = ctx.saved_tensors
            return grad.f.mul_zip(grad, factor), 0.0

    x = minitorch.rand((2, 3))
    factor = minitorch.tensor([4.0])
    Scale.apply(x, factor).sum().backward()
    assert x.grad is not None and np.all(x.grad.to_numpy() == 4.0)
    assert factor.grad is not None and factor.grad.item() == 0.0
