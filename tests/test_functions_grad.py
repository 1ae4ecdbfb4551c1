"""Every operation of the table on every backend: value, dtype, gradient; FlashAttention too."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import Phase, find, given, settings
from hypothesis import strategies as st

import minitorch
from minitorch import Tensor, TensorBackend, grad_check
from minitorch.autodiff import Context, topological_sort
from minitorch.function import Function
from minitorch.testing import DTYPES, LAYOUTS, AttentionInputs, attention_inputs, tensors

from .ops import OPS, Op

BACKENDS = {
    "simple": TensorBackend(minitorch.SimpleOps),
    "fast": TensorBackend(minitorch.FastOps),
}
Array = npt.NDArray[Any]
TOLERANCE = {np.dtype(np.float32): 2e-5, np.dtype(np.float64): 1e-10}


def draw_inputs(data: st.DataObject, op: Op, backend: TensorBackend) -> list[Tensor]:
    """One tensor for each input of `op`, of random layouts and dtypes."""
    dtypes = list(DTYPES) if op.mixed else [data.draw(st.sampled_from(DTYPES))]
    layouts = LAYOUTS if op.expanded else [name for name in LAYOUTS if name != "expanded"]
    return [
        data.draw(tensors(shape, backend, dtypes, layouts, op.low, op.high))
        for shape in data.draw(op.shapes)
    ]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
@settings(max_examples=15)
@given(data=st.data())
def test_value_and_gradient(op: Op, backend: str, data: st.DataObject) -> None:
    inputs = draw_inputs(data, op, BACKENDS[backend])
    out = op.function(*inputs)
    exact = [x.to_numpy().astype(np.float64) for x in inputs]
    expected = op.reference(*exact)
    tolerance = TOLERANCE[min((x.dtype for x in inputs), key=lambda dtype: dtype.itemsize)]
    assert out.shape == expected.shape
    assert out.dtype == np.result_type(*(x.dtype for x in inputs))
    np.testing.assert_allclose(out.to_numpy(), expected, rtol=tolerance, atol=tolerance)
    assert op.shares or out._tensor.is_contiguous()

    if out.dtype == np.float64 or op.posed(*exact):
        grad_check(op.function, *inputs)
    assert all(x.grad is None for x in inputs)
    out.backward(out.zeros())
    for x in inputs:
        assert x.grad is not None and x.grad._tensor.is_contiguous()
        assert (x.grad.shape, x.grad.dtype) == (x.shape, x.dtype)


def test_the_table_covers_every_function() -> None:
    """Each class with a derivative is reached by a row, or by the tests below."""
    reached = {"ApplyScoreMod", "Cast", "FlashAttention"}
    for op in OPS:
        example = settings(phases=[Phase.generate], database=None, max_examples=1)
        shapes = find(op.shapes, lambda _: True, settings=example)
        out = op.function(*(minitorch.tensor(np.full(s, op.high)) for s in shapes))
        graph: list[Any] = list(topological_sort(out))
        reached |= {v.history.last_fn.__name__ for v in graph if not v.is_leaf()}
    known = [c for c in subclasses(Function) if hasattr(c, "forward")]  # a common base has none
    ours = {c.__name__ for c in known if c.__module__.startswith("minitorch.")}
    assert ours - reached == set()


def subclasses(cls: type) -> set[type]:
    """All classes below `cls`."""
    children: list[type] = cls.__subclasses__()
    return {c for child in children for c in (child, *subclasses(child))}


@pytest.mark.parametrize("backend", BACKENDS)
def test_cast(backend: str) -> None:
    x = minitorch.tensor([[0.1, 2.0]], backend=BACKENDS[backend])
    y = x.to(np.float32)
    assert y.dtype == np.float32
    assert minitorch.zeros((2, 3)).permute(1, 0).to(np.float32)._tensor.is_contiguous()
    (y * y).sum().backward()
    assert x.grad is not None and x.grad.dtype == np.float64
    np.testing.assert_allclose(x.grad.to_numpy(), [[0.2, 4.0]], rtol=1e-6)


def test_grad_check_can_fail() -> None:
    class Wrong(Function):
        """2 x, with the gradient of 3 x in its second element."""

        @staticmethod
        def forward(ctx: Context, x: Tensor) -> Tensor:
            return x * 2.0

        @staticmethod
        def backward(ctx: Context, grad: Tensor) -> Tensor:
            factors = minitorch.tensor([2.0, 3.0, 2.0], requires_grad=False)
            return grad * factors

    with pytest.raises(AssertionError, match=r"argument 1 at index \(1,\).*relative error 0\.33"):
        grad_check(lambda a, b: a + Wrong.apply(b), minitorch.rand((3,)), minitorch.rand((3,)))


# ----- attention -----


def attend(inputs: AttentionInputs, method: str, dtype: npt.DTypeLike) -> list[Array]:
    """Output, logsumexp and gradients of query, key and value, by a method of Tensor."""
    leaves = [x.detach().to(dtype) for x in (inputs.query, inputs.key, inputs.value)]
    for x in leaves:
        x.requires_grad_(True)
    query, key, value = leaves
    out, logsumexp = getattr(query, method)(key, value, **inputs.options, return_lse=True)
    rng = np.random.default_rng(0)
    for result, retain_graph in ((out, True), (logsumexp, False)):
        weights = minitorch.tensor(rng.normal(size=result.shape), out.backend, False, dtype)
        result.backward(weights, retain_graph)
    gradients = [np.zeros(x.shape) if x.grad is None else x.grad.to_numpy() for x in leaves]
    return [out.to_numpy(), logsumexp.to_numpy(), *gradients]


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=30)
@given(data=st.data())
def test_flash_attention_is_standard_attention(backend: str, data: st.DataObject) -> None:
    inputs = data.draw(attention_inputs(BACKENDS[backend]))
    dtype = inputs.query.dtype
    tolerance = 1e-3 if dtype == np.float32 else 1e-9
    flash = attend(inputs, "flash_attention", dtype)
    for ours, expected in zip(flash, attend(inputs, "attention", np.float64), strict=True):
        assert ours.shape == expected.shape
        np.testing.assert_allclose(ours, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=30)
@given(data=st.data())
def test_gradients_of_flash_attention(backend: str, data: st.DataObject) -> None:
    inputs = data.draw(attention_inputs(BACKENDS[backend], max_seqlen=12, max_head_dim=4))

    def attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        out: Tensor = query.flash_attention(key, value, **inputs.options)
        return out

    grad_check(attention, inputs.query, inputs.key, inputs.value)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(5, 7), (2, 1, 5, 7), (1, 7), (5, 1), (3, 5, 7)])
def test_gradient_of_an_additive_mask(backend: str, shape: tuple[int, ...]) -> None:
    rng = np.random.default_rng(0)
    f = BACKENDS[backend]
    query, key, value, mask = (
        minitorch.tensor(rng.normal(size=s), f)
        for s in ((2, 3, 5, 4), (2, 3, 7, 4), (2, 3, 7, 2), shape)
    )
    grad_check(lambda q, m: q.flash_attention(key, value, attn_mask=m), query, mask)
