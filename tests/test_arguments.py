"""Arguments: what is read, and the one sentence that wrong ones get."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import minitorch
from minitorch import Parameter, Scalar, Tensor, TensorBackend, TensorData
from minitorch.autodiff import Context
from minitorch.function import Function

FAST = TensorBackend(minitorch.FastOps)


def matrix() -> Tensor:
    return minitorch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]], FAST)


# ----- shapes and dimensions -----


def test_tuples_and_lists_are_shapes() -> None:
    x = matrix()
    shape: Any
    for shape in ((3, 2), [3, 2], np.array([3, 2]), minitorch.tensor([3, 2]), (-1, 2)):
        assert x.view(shape).shape == (3, 2)
        assert x.view(*shape).shape == (3, 2) if isinstance(shape, tuple | list) else True
    assert x.view(6).shape == x.view((6,)).shape == x.view(-1).shape == (6,)
    for order in ((1, 0), [1, 0], (-1, -2)):
        assert x.permute(order).shape == x.permute(*order).shape == (3, 2)
    assert x.broadcast_to((4, 2, 3)).shape == x.broadcast_to(4, 2, 3).shape == (4, 2, 3)
    for shape in ([2, 3], np.array([2, 3]), minitorch.tensor([2, 3])):
        assert minitorch.zeros(shape).shape == (2, 3)
    for shape in (2, np.int64(2)):
        assert minitorch.ones(shape).shape == (2,)
    assert Tensor.make([1.0, 2.0], [2, 1], [1, 1]).shape == (2, 1)
    assert minitorch.maxpool2d(minitorch.rand((1, 1, 4, 4)), 2).shape == (1, 1, 2, 2)


def test_several_dimensions_are_reduced() -> None:
    array = np.arange(24.0).reshape(2, 3, 4)
    x = minitorch.tensor(array, FAST)
    dims: Any
    for dims in ((0, 1), [1, -1], (0, 1, 2), np.array([2, 0]), (1,)):
        axes = tuple(int(d) for d in dims)
        for name in ("sum", "mean", "var"):
            expected = getattr(array, name)(axes, keepdims=True)
            np.testing.assert_allclose(getattr(x, name)(dims).to_numpy(), expected)
        expected = np.log(np.exp(array).sum(axes, keepdims=True))
        np.testing.assert_allclose(minitorch.logsumexp(x, dims).to_numpy(), expected)
        assert (x + 1.0 > 0.0).all(dims).shape == expected.shape
    assert x.sum(()).item() == x.sum().item()  # as in PyTorch


@pytest.mark.parametrize("wrong", [1.5, 1.0, True, "0", None, float("nan"), 1j, np.float64(1)])
def test_whole_numbers_are_wanted(wrong: Any) -> None:
    """Nothing is cut off to a whole number, wherever one is wanted."""
    x = matrix()
    image = minitorch.rand((1, 1, 4, 4), FAST)
    calls: list[Callable[[], Any]] = [
        lambda: x.sum((0, wrong)),
        lambda: x.permute(0, wrong),
        lambda: x.view(wrong, 3),
        lambda: x.view(wrong),
        lambda: x.transpose(0, wrong),
        lambda: x.broadcast_to((wrong, 3)),
        lambda: x.zeros((wrong,)),
        lambda: x.__setitem__((0, wrong), 1.0),
        lambda: x._tensor.index((0, wrong)),
        lambda: x._tensor.permute(1, wrong),
        lambda: TensorData([1.0], (wrong,)),
        lambda: TensorData([1.0], (1,), (wrong,)),
        lambda: minitorch.zeros((wrong, 2)),
        lambda: minitorch.ones(wrong),
        lambda: minitorch.rand([wrong]),
        lambda: minitorch._tensor([1.0], (wrong,)),
        lambda: minitorch.shape_broadcast((wrong,), (3,)),
        lambda: minitorch.softmax(x, wrong),
        lambda: minitorch.max(x, wrong),
        lambda: minitorch.argmax(x, wrong),
        lambda: minitorch.Sum.apply(x, wrong),
        lambda: minitorch.Concatenate.apply(wrong, x, x),
        lambda: minitorch.avgpool2d(image, (2, wrong)),
        lambda: minitorch.one_hot(x[0], wrong),
        lambda: minitorch.Linear(wrong, 2),
        lambda: minitorch.Linear(2, wrong),
        lambda: minitorch.Embedding(wrong, 2),
        lambda: minitorch.LayerNorm1d(wrong),
        lambda: minitorch.MultiHeadAttention(4, wrong),
        lambda: minitorch.DecoderLM(5, 4, 2, 3, n_layer=wrong),
    ]
    if wrong is not None:  # no dimension means all of them
        calls += [lambda: x.sum(wrong), lambda: x.mean(wrong), lambda: x.all(wrong)]
        calls += [lambda: x[wrong], lambda: x[0, wrong], lambda: x[0:wrong], lambda: x[::wrong]]
    for number, call in enumerate(calls):
        with pytest.raises(TypeError, match=r"whole numbers?,"):
            raise AssertionError(f"call {number} gave {call()}")


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda x: x.sum((0, 0)), ValueError, r"dim must name a dimension once, got \(0, 0\)"),
        (lambda x: x.sum(2), IndexError, r"dim must be in \[-2, 1\] for 2 dimensions, got 2"),
        (lambda x: x.transpose(0, 5), IndexError, "dim1 must be in"),
        (lambda x: x.permute(0, 0), IndexError, "must name each of the 2 dimensions once"),
        (lambda x: x.view(-1, -1), ValueError, "view: shape"),
        (lambda x: x[0:2:0], ValueError, "the step of a slice must not be 0"),
        (lambda x: x[5], IndexError, "does not fit shape"),
        (lambda x: minitorch.zeros((2, -1)), ValueError, "no negative size"),
        (lambda x: minitorch.zeros((10**9, 10**10)), ValueError, "than any memory holds"),
        (lambda x: minitorch.Linear(-1, 2), ValueError, "Linear: in_size must be at least 0"),
        (lambda x: minitorch.tile(x, (1, 1)), ValueError, "input must be"),
        (
            lambda x: minitorch.avgpool2d(x.view(1, 1, 2, 3), (0, 1)),
            ValueError,
            r"kernel must be \(height, width\), 1 or more, got \(0, 1\)",
        ),
        (lambda x: x.sum(minitorch.tensor([0.5])), TypeError, "whole number, got a Tensor of 0.5"),
    ],
)
def test_whole_numbers_that_do_not_fit(
    call: Callable[[Tensor], Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        call(matrix())


# ----- where a Tensor is wanted -----


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (np.ones((2, 3)), r"numpy.ndarray: write minitorch\.tensor\({0}, backend=\.\.\.\)"),
        ([[1.0]], r"list: write minitorch\.tensor\({0}, backend=\.\.\.\)"),
        (2.5, r"2\.5: write minitorch\.tensor\({0}, backend=\.\.\.\)"),
        ("abc", "'abc'$"),
        (None, "None$"),
        (Parameter(minitorch.rand((2, 3))), r"minitorch.Parameter: write {0}\.value"),
        (minitorch.Linear(2, 3), "minitorch.Linear$"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_tensor_is_wanted(wrong: Any, said: str) -> None:
    x = matrix()
    layer = minitorch.MultiHeadAttention(4, 2, backend=FAST)
    calls: dict[str, list[Callable[[], Any]]] = {
        "t2": [lambda: x @ wrong],
        "mask": [lambda: x.attn_softmax(wrong)],
        "gamma": [lambda: x.layernorm(wrong, x[0])],
        "x": [
            lambda: minitorch.Linear(3, 2, backend=FAST)(wrong),
            lambda: minitorch.Embedding(3, 2, FAST)(wrong),
            lambda: minitorch.LayerNorm1d(3)(wrong),
            lambda: minitorch.Dropout(0.0)(wrong),
            lambda: layer(wrong),
        ],
        "input": [
            lambda: minitorch.softmax(wrong, 0),
            lambda: minitorch.logsumexp(wrong, 0),
            lambda: minitorch.GELU(wrong),
            lambda: minitorch.max(wrong, 0),
            lambda: minitorch.argmax(wrong, 0),
            lambda: minitorch.dropout(wrong, 0.5, ignore=True),
            lambda: minitorch.maxpool2d(wrong, (1, 1)),
            lambda: minitorch.layer_norm(wrong),
            lambda: minitorch.one_hot(wrong, 3),
            lambda: minitorch.conv1d(wrong, x),
        ],
        "weight": [lambda: minitorch.conv2d(x, wrong)],
        "logits": [lambda: minitorch.softmax_loss(wrong, x)],
        "target": [lambda: minitorch.softmax_loss(x, wrong)],
        "idx": [lambda: minitorch.DecoderLM(5, 4, 2, 3, n_layer=1)(wrong)],
    }
    if wrong is not None:  # the gradient of 1
        calls["grad_output"] = [lambda: x.backward(wrong)]
    for name, several in calls.items():
        for call in several:
            with pytest.raises(
                TypeError, match=f"{name} must be a Tensor, got {said.format(name)}"
            ):
                call()


@pytest.mark.parametrize("wrong", ["a", None, [1.0], object(), Parameter(2.0)])
def test_an_operand_is_wanted(wrong: Any) -> None:
    x = matrix()
    calls: list[Callable[[], Any]] = [
        lambda: x + wrong,
        lambda: wrong - x,
        lambda: x / wrong,
        lambda: x**wrong,
        lambda: x < wrong,
        lambda: x == wrong,
        lambda: x.is_close(wrong),
    ]
    for call in calls:
        with pytest.raises(TypeError, match=f"got .*{type(wrong).__name__}|got 'a'|got None"):
            call()


def test_functions_check_their_annotations() -> None:
    class Scaled(Function):
        @staticmethod
        def forward(ctx: Context, x: Tensor, factor: float, times: int) -> Tensor:
            return x * factor**times

        @staticmethod
        def backward(ctx: Context, grad: Tensor) -> Tensor:
            return grad

    class Returned(Function):
        @staticmethod
        def forward(ctx: Context, x: Any) -> Any:
            return x.item()

    x = minitorch.tensor([3.0])
    assert Scaled.apply(x, 2, 2).item() == 12.0
    wrong: list[tuple[tuple[Any, ...], str]] = [
        (([3.0], 2.0, 2), "Scaled: x must be a Tensor, got list"),
        ((x, "2", 2), "Scaled: factor must be a number, got '2'"),
        ((x, 2.0, 2.5), r"Scaled: times must be a whole number, got 2\.5"),
        ((x,), "Scaled takes x, factor, times; 1 inputs were given"),
    ]
    for inputs, message in wrong:
        with pytest.raises(TypeError, match=message):
            Scaled.apply(*inputs)
    with pytest.raises(TypeError, match=r"Returned\.forward must return a Tensor, got float"):
        Returned.apply(x)
    with pytest.raises(TypeError, match=r"Function defines no forward"):
        Function.apply(x)


# ----- numbers and arrays -----


@pytest.mark.parametrize("make", [minitorch.tensor, minitorch.tensor_from_numpy])
@pytest.mark.parametrize(
    ("wrong", "error"),
    [
        ([1.0, None], "an element must be a number, got None"),
        (["1.0"], "must hold real numbers, got str"),
        ("1.5", "must hold real numbers"),
        ([1j], "must hold real numbers, got complex128"),
        (np.ones(2, np.complex64), "must hold real numbers, got complex64"),
        (np.array(["2020-01-01"], "datetime64[D]"), "must hold real numbers"),
        ({1: 2}, "an element must be a number, got dict"),
        ([[1.0], [2.0, 3.0]], "nested lists must all have the same length"),
        ([10**400], "must fit into a float, got a huge int"),
        (np.ma.masked_array([1.0, 2.0], [True, False]), "has masked elements"),
    ],
    ids=str,
)
def test_elements_that_are_no_numbers(
    make: Callable[[Any], Tensor], wrong: Any, error: str
) -> None:
    with warnings.catch_warnings(), pytest.raises((TypeError, ValueError), match=error):
        warnings.simplefilter("error")
        make(wrong)


def test_elements_that_are_numbers() -> None:
    assert minitorch.tensor([10**30, 1]).to_numpy().tolist() == [1e30, 1.0]
    assert minitorch.tensor([True, False]).to_numpy().tolist() == [1.0, 0.0]
    assert minitorch.tensor([]).shape == (0,) and minitorch.tensor(range(3)).shape == (3,)
    assert minitorch.tensor([Scalar(1.0).data, np.float32(2)]).shape == (2,)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_arrays_of_every_kind_are_read(tmp_path: Path, dtype: Any) -> None:
    values = np.arange(6, dtype=dtype).reshape(2, 3)
    np.save(tmp_path / "values.npy", values)
    read_only = values.copy()
    read_only.flags.writeable = False
    swapped = values.astype(values.dtype.newbyteorder())
    arrays = [
        read_only,
        swapped,
        np.broadcast_to(swapped[:1], (2, 3)),
        np.load(tmp_path / "values.npy", mmap_mode="r"),
        np.frombuffer(values.tobytes(), dtype).reshape(2, 3),
        values[::-1, ::-1],
    ]
    for array in arrays:
        made = [
            minitorch.tensor(array, FAST),
            minitorch.tensor_from_numpy(array, FAST),
            Tensor(TensorData.from_array(array), backend=FAST),
            Tensor.make(array, array.shape, backend=FAST),
        ]
        for x in made:
            assert x.dtype == dtype and x.dtype.isnative
            np.testing.assert_array_equal((x + 0.0).to_numpy(), array)
            x[0, 0] = x[0, 0] + 1.0


@pytest.mark.parametrize("wrong", ["1.5", None, 1j, np.ones(2), [1.0], np.complex64(1)])
def test_a_number_is_wanted(wrong: Any) -> None:
    x, s = matrix(), Scalar(2.0)
    calls: list[Callable[[], Any]] = [
        lambda: Scalar(wrong),
        lambda: s + wrong,
        lambda: s < wrong,
        lambda: x.__setitem__((0, 0), wrong),
        lambda: x._tensor.set((0, 0), wrong),
        lambda: x.layernorm(x[0], x[1], wrong),
        lambda: minitorch.LayerNorm1d(3, wrong),
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for call in calls:
            with pytest.raises(TypeError, match="must be a number, got"):
                call()


# ----- scalar functions -----


def test_functions_that_numba_cannot_compile() -> None:
    def speaks(x: float) -> float:
        return {x: "x"}  # type: ignore[return-value]

    def formats(x: float) -> float:
        return f"{x!r}"  # type: ignore[return-value]

    for function in (speaks, formats):
        with pytest.raises(TypeError, match=f"numba cannot compile {function.__name__}"):
            minitorch.FastOps.map(function)(matrix())


# ----- exponents -----


@pytest.mark.parametrize("backend", [FAST, minitorch.SimpleBackend], ids=str)
def test_gradients_of_powers_at_their_edges(backend: TensorBackend) -> None:
    """As in PyTorch: 0 where the exponent is 0, and at base 0 the limit of a^b log(a)."""
    base = np.array([0.0, 0.0, 0.0, 2.0, 0.5, 3.0, 1e-8, -2.0])
    exponent = np.array([0.0, 2.0, 0.5, -1.5, 0.0, 1.0, 2.0, 3.0])
    of_base = [0.0, 0.0, np.inf, -1.5 * 2**-2.5, 0.0, 1.0, 2e-8, 12.0]
    of_exponent = [0.0, 0.0, 0.0, 2**-1.5 * np.log(2), np.log(0.5), 3 * np.log(3), 0, np.nan]
    of_exponent[6] = 1e-16 * np.log(1e-8)
    x, y = (minitorch.tensor(array, backend) for array in (base, exponent))
    (x**y).sum().backward()
    assert x.grad is not None and y.grad is not None
    np.testing.assert_allclose(x.grad.to_numpy(), of_base, rtol=1e-12)
    np.testing.assert_allclose(y.grad.to_numpy(), of_exponent, rtol=1e-12)


def test_only_the_exponent_wants_a_gradient() -> None:
    base, exponent = matrix().detach(), minitorch.tensor([2.0], FAST)
    (base**exponent).sum().backward()
    array = base.to_numpy()
    assert exponent.grad is not None
    np.testing.assert_allclose(exponent.grad.item(), (array**2 * np.log(array)).sum())


@pytest.mark.parametrize("values", [lambda t: t, lambda t: [t, t], lambda t: [[1.0], (t * 2.0,)]])
def test_copies_of_values_do_not_lose_a_graph(values: Callable[[Tensor], Any]) -> None:
    t = minitorch.tensor([1.0], FAST)
    with pytest.raises(TypeError, match="ls holds a Tensor that wants a gradient"):
        minitorch.tensor(values(t), FAST)
    assert minitorch.tensor(t.detach(), FAST).to_numpy().tolist() == [1.0]
    with minitorch.no_grad():
        assert minitorch.tensor([t], FAST).to_numpy().tolist() == [[1.0]]


def test_an_element_that_is_set_loses_no_graph() -> None:
    t: Any = minitorch.tensor([3.0], FAST)
    out = minitorch.zeros((2,), FAST)
    with pytest.raises(TypeError, match="val is a Tensor that wants a gradient"):
        out[0] = t * 2.0
    out[0] = t.detach()
    assert out.to_numpy().tolist() == [3.0, 0.0]
