"""numpy on either side of a tensor: the graph is kept, or an error says why not."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import minitorch
from minitorch import Tensor, TensorBackend, grad_check

BACKENDS = [TensorBackend(minitorch.SimpleOps), TensorBackend(minitorch.FastOps)]


def as_any(value: Any) -> Any:
    """The same; the type checker believes numpy's annotations, which know of arrays alone."""
    return value


OPERATORS: list[Callable[[Any, Any], Any]] = [
    operator.add,
    operator.sub,
    operator.mul,
    operator.truediv,
    operator.pow,
    operator.lt,
    operator.le,
    operator.gt,
    operator.ge,
    operator.eq,
    operator.ne,
]
BESIDE: list[Any] = [
    np.float64(2.0),
    np.float32(0.5),
    np.int64(3),
    np.uint8(2),
    np.bool_(True),
    np.array(1.5),
    np.array([0.5, 2.0, 1.5]),
    np.array([[1.0], [2.0]], np.float32),
    np.array([[1, 2, 1], [2, 1, 1]]),
]
VALUES = np.array([[0.5, 1.0, 2.0], [3.0, 1.5, 0.25]])


@pytest.mark.parametrize("operation", OPERATORS)
@pytest.mark.parametrize("other", BESIDE, ids=repr)
def test_operators(operation: Callable[[Any, Any], Any], other: Any) -> None:
    """On the left and on the right: value as numpy computes it, gradient, dtype of the tensor."""
    backend = BACKENDS[1]
    x = minitorch.tensor(VALUES, backend)
    plain = np.asarray(other, np.float64)
    pairs: list[tuple[Callable[[Any], Any], Any]] = [
        (lambda t: operation(other, t), operation(plain, VALUES)),
        (lambda t: operation(t, other), operation(VALUES, plain)),
    ]
    for function, expected in pairs:
        out = function(x)
        assert isinstance(out, Tensor) and out.requires_grad() and out.backend is backend
        assert out.dtype == np.float64
        np.testing.assert_allclose(out.to_numpy(), expected, rtol=1e-12)
        grad_check(function, x)


@pytest.mark.parametrize("backend", BACKENDS, ids=str)
def test_matrix_product_with_an_array_on_the_left(backend: TensorBackend) -> None:
    x, array = minitorch.tensor(VALUES, backend), as_any(np.arange(8.0).reshape(4, 2))
    np.testing.assert_allclose((array @ x).to_numpy(), array @ VALUES)
    grad_check(lambda t: array @ t, x)
    grad_check(lambda t: np.matmul(t, np.ones((3, 2))), x)
    with pytest.raises(
        TypeError, match=r"t2 must be a Tensor, got numpy.ndarray: write minitorch\.tensor"
    ):
        _ = x @ array


def test_dtypes_beside_float32() -> None:
    x = minitorch.tensor(VALUES.astype(np.float32))
    for other in (np.float64(2), np.array(2.0), np.ones(3, np.float32), np.ones(3, int)):
        assert (other * x).dtype == np.float32, other
    assert (np.ones(3) * x).dtype == np.float64  # as a float64 tensor would


def test_an_unsigned_number_is_subtracted() -> None:
    x = minitorch.tensor([1.0])
    assert (x - np.uint8(3)).item() == -2.0
    assert (x - np.array([3], np.uint8)).item() == -2.0


def test_the_graph_keeps_a_copy() -> None:
    x, array = minitorch.tensor([1.0, 2.0]), np.array([3.0, 4.0])
    out = (array * x).sum()
    array[:] = 0.0
    out.backward()
    assert x.grad is not None and x.grad.to_numpy().tolist() == [3.0, 4.0]


@pytest.mark.parametrize("backend", BACKENDS, ids=str)
@pytest.mark.parametrize(
    "function",
    [np.exp, np.tanh, np.sqrt, np.square, np.negative, np.positive, np.reciprocal],
)
def test_functions_of_elements(backend: TensorBackend, function: Callable[[Any], Any]) -> None:
    x = minitorch.tensor(VALUES, backend)
    np.testing.assert_allclose(function(x).to_numpy(), function(VALUES), rtol=1e-12)
    grad_check(function, x)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (np.sin, "numpy.sin has no counterpart here that keeps the graph"),
        (np.log, r"numpy.log has no counterpart .* \(Tensor.log\(\) is log\(x \+ 1e-6\)"),
        (np.isnan, "numpy.isnan has no counterpart"),
        (np.add.reduce, "numpy.add.reduce has no counterpart"),
        (lambda t: np.maximum(t, 0.0), "numpy.maximum has no counterpart"),
        (lambda t: np.exp(t, where=np.ones(2, bool)), "numpy.exp with where has no counterpart"),
        (lambda t: np.add(1.0, t, out=np.zeros(2)), "numpy.add cannot write into an array"),
        (
            lambda t: as_any(operator.iadd)(np.zeros(2), t),
            r"add cannot write .*: write a = a \+ t",
        ),
        (lambda t: np.float64(7) // t, "numpy.floor_divide has no counterpart"),
        (lambda t: np.array([1j, 2]) * t, "b must hold real numbers, got complex128"),
        (lambda t: t + 1j, "b must be a number, an array or a Tensor, got 1j"),
        (lambda t: t * np.complex64(1), "b must be a number, an array or a Tensor"),
        (np.sum, "numpy.sum would lose the graph of a Tensor that wants a gradient"),
        (np.mean, "numpy.mean would lose"),
        (lambda t: np.concatenate([t, t]), "numpy.concatenate would lose"),
        (lambda t: np.where([True, False], t, 0.0), "numpy.where would lose"),
        (lambda t: np.linalg.norm(x=t), "numpy.linalg.norm would lose"),
    ],
)
def test_what_has_no_graph_is_refused(call: Callable[[Tensor], Any], message: str) -> None:
    with pytest.raises(TypeError, match=message):
        call(minitorch.tensor([1.0, 2.0]))


def test_functions_that_lose_nothing() -> None:
    t = minitorch.tensor([1.0, 2.0])
    assert np.allclose(t, [1.0, 2.0]) and np.array_equal(t, t) and np.argmax(t) == 1
    assert np.shape(t) == (2,) and np.zeros_like(t).tolist() == [0.0, 0.0]
    assert np.sum(t.detach()) == 3.0
    with minitorch.no_grad():
        assert np.concatenate([t, t]).tolist() == [1.0, 2.0, 1.0, 2.0]


def test_arrays_of_tensors() -> None:
    t = minitorch.tensor([1.0, 2.0])
    assert np.asarray(t) is not None and np.shares_memory(np.asarray(t), t.numpy())
    assert np.array(t, np.float32).dtype == np.float32
    np.testing.assert_array_equal(t, [1.0, 2.0])


def test_every_public_method_has_a_gradient_or_is_listed() -> None:
    public = {name for name in dir(Tensor) if not name.startswith("_")}
    assert public == set(METHODS) | WITHOUT_GRADIENT


METHODS: dict[str, Callable[[Tensor], Tensor]] = {
    "all": lambda x: (x > 0.7).all(0),
    "attention": lambda x: x.attention(x + 1.0, x * 2.0),
    "attn_softmax": lambda x: x.view(1, 1, 2, 3).attn_softmax(x.view(1, 1, 2, 3) * 0.5),
    "broadcast_to": lambda x: x.broadcast_to(2, 2, 3) * x,
    "contiguous": lambda x: x.permute(1, 0).contiguous(),
    "exp": lambda x: x.exp(),
    "flash_attention": lambda x: x.flash_attention(x + 1.0, x * 2.0),
    "flash_attention_causal": lambda x: x.flash_attention_causal(x + 1.0, x * 2.0),
    "is_close": lambda x: x.is_close(x + 1.0),
    "layernorm": lambda x: x.layernorm(x[0], x[1]),
    "log": lambda x: x.log(),
    "mean": lambda x: x.mean((0, 1)) + x.mean(-1),
    "permute": lambda x: x.permute(-1, 0) * 2.0,
    "relu": lambda x: (x - 1.1).relu(),
    "sigmoid": lambda x: x.sigmoid(),
    "sum": lambda x: x.sum([1]) + x.sum(()),
    "tanh": lambda x: x.tanh(),
    "to": lambda x: x.to(BACKENDS[0]).to("float64").exp(),
    "transpose": lambda x: x.transpose(0, 1) * 3.0,
    "var": lambda x: x.var((1, 0)) + x.var(),
    "view": lambda x: x.view((3, -1)) * x.view([3, 2]),
}
# Values that have left the graph, as the docstring of Tensor says, and what is no operation.
WITHOUT_GRADIENT = set("detach expand item numpy to_numpy zeros".split()) | set(
    """accumulate_derivative backward chain_rule dims dtype f is_constant is_leaf make parents
    release_graph requires_grad requires_grad_ shape size tuple zero_grad_""".split()
)


@pytest.mark.parametrize("backend", BACKENDS, ids=str)
@pytest.mark.parametrize("name", METHODS)
def test_gradient_of_every_method(backend: TensorBackend, name: str) -> None:
    x = minitorch.tensor(VALUES + 0.1, backend)
    assert METHODS[name](x).requires_grad()
    grad_check(METHODS[name], x)
