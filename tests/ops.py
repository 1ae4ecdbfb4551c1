"""The table of operations: each with a float64 reference in numpy and the shapes it takes.

A new operation is a new row here; `test_functions_grad.py` then checks its value and its gradient
on every backend, for random shapes, memory layouts and dtypes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy

import minitorch
from minitorch import Tensor, fused_functions, tensor_functions
from minitorch.kernels.philox import vector_dropout_mask
from minitorch.testing import broadcastable_shapes, shapes

Array = Any  # numpy's own annotations lose track of most of these
Shapes = SearchStrategy[tuple[tuple[int, ...], ...]]


@dataclass(frozen=True)
class Op:
    """One operation.

    Args:
        name: of the test case.
        function: of tensors.
        reference: the same of float64 arrays.
        shapes: one shape for each input.
        low: smallest element.
        high: largest element.
        mixed: whether inputs may differ in dtype.
        expanded: whether inputs may have stride 0 (their elements are then repeated).
        shares: whether the result shares the input's memory; others are contiguous.
        posed: of the inputs, whether float32 is enough to tell the gradient there.

    """

    name: str
    function: Callable[..., Tensor]
    reference: Callable[..., Array]
    shapes: Shapes
    low: float = -2.0
    high: float = 2.0
    mixed: bool = False
    expanded: bool = True
    shares: bool = False
    posed: Callable[..., bool] = lambda *inputs: True


# ----- shapes -----


def one(shape: SearchStrategy[tuple[int, ...]]) -> Shapes:
    """A single input."""
    return shape.map(lambda s: (s,))


def sizes(*limits: int, low: int = 1) -> SearchStrategy[tuple[int, ...]]:
    """Shapes of a fixed number of dimensions, each up to its limit."""
    return st.tuples(*(st.integers(low, limit) for limit in limits))


ANY = one(shapes(max_dims=3, min_size=0, max_size=3))
FULL = one(shapes(max_dims=3, max_size=3))  # at least one element
DEEP = one(shapes(min_dims=2, max_dims=3, max_size=3))  # two dimensions or more
PAIR = broadcastable_shapes(2, max_dims=3, min_size=0, max_size=3)
MATRICES = st.tuples(
    broadcastable_shapes(2, min_dims=0, max_dims=2, max_size=2), sizes(3, 3, 3, low=0)
).map(lambda d: ((*d[0][0], d[1][0], d[1][1]), (*d[0][1], d[1][1], d[1][2])))
LINEAR = st.tuples(shapes(max_dims=2, min_size=0, max_size=3), sizes(4, 4)).map(
    lambda d: ((*d[0], d[1][0]), d[1], d[1][1:])
)
LAYERNORM = st.tuples(shapes(max_dims=2, max_size=3), sizes(5)).map(
    lambda d: ((*d[0], *d[1]), d[1], d[1])
)
ATTENTION = sizes(2, 2, 3, 3).map(lambda s: (s, (s[0], 1, 1, s[3])))
IMAGES = one(sizes(2, 2, 2, 2).map(lambda s: (s[0], s[1], 2 * s[2], 3 * s[3])))
CONV1D = sizes(2, 2, 4, 2, 3).map(lambda s: (s[:3], (s[3], s[1], s[4])))
CONV2D = sizes(2, 2, 4, 3, 2, 3).map(lambda s: (s[:4], (s[4], s[1], 2, s[5])))


# ----- references -----


def softmax(x: Array, axis: int = -1) -> Array:
    """exp(x) / sum(exp(x))"""
    e = np.exp(x)
    return e / e.sum(axis, keepdims=True)


def layernorm(x: Array, gamma: Array, beta: Array) -> Array:
    """Over the last dimension, eps 1e-8."""
    centred = x - x.mean(-1, keepdims=True)
    return gamma * centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-8) + beta


def rows_differ(x: Array, gamma: Array, beta: Array) -> bool:
    """Whether layer norm is not the quotient of two rounding errors in any row."""
    return x.shape[-1] == 1 or bool((x.std(-1) > 0.1).all())


def gelu(x: Array) -> Array:
    """Hendrycks & Gimpel 2016, the approximation with tanh."""
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def convolution(x: Array, weight: Array) -> Array:
    """out[b, o, i] = sum over c and k of x[b, c, i + k] * weight[o, c, k]; 0 past the end of x."""
    kernel = weight.shape[2:]
    padded = np.pad(x, [(0, 0), (0, 0), *((0, k - 1) for k in kernel)])
    out = np.zeros((x.shape[0], weight.shape[0], *x.shape[2:]))
    for offset in np.ndindex(*kernel):
        window = tuple(slice(o, o + n) for o, n in zip(offset, x.shape[2:], strict=True))
        part = padded[(slice(None), slice(None), *window)]
        out += np.einsum("bc...,oc->bo...", part, weight[(slice(None), slice(None), *offset)])
    return out


def tiles(x: Array) -> Array:
    """(B, C, H, W) -> (B, C, H / 2, W / 3, 2, 3)"""
    b, c, h, w = x.shape
    return x.reshape(b, c, h // 2, 2, w // 3, 3).swapaxes(3, 4)


def ids_for(weight: Any) -> Array:
    """Row numbers (2, 3) within a table."""
    return np.arange(6).reshape(2, 3) * 5 % weight.shape[0]


def targets_for(logits: Any) -> Array:
    """A class number for each row of logits."""
    return np.arange(logits.shape[0]) * 7 % logits.shape[1]


def cross_entropy(logits: Array) -> Array:
    """-log softmax(logits)[target] for each row."""
    rows = np.arange(len(logits))
    return -np.log(softmax(logits)[rows, targets_for(logits)])


def constant(like: Tensor, array: Array) -> Tensor:
    """A tensor without gradient on the backend of another."""
    return minitorch.tensor(array, backend=like.backend, requires_grad=False, dtype=like.dtype)


# ----- the table -----

ELEMENTWISE = [
    Op("neg", lambda x: -x, np.negative, ANY),
    Op("inv", lambda x: 1.0 / x, np.reciprocal, ANY, low=0.5),
    Op("sigmoid", lambda x: x.sigmoid(), lambda x: 1 / (1 + np.exp(-x)), ANY, -9.0, 9.0),
    Op("tanh", lambda x: x.tanh(), np.tanh, ANY),
    Op("relu", lambda x: x.relu(), lambda x: np.maximum(x, 0), ANY),
    Op("log", lambda x: x.log(), lambda x: np.log(x + 1e-6), ANY, low=0.5),
    Op("exp", lambda x: x.exp(), np.exp, ANY),
    Op("gelu", lambda x: minitorch.GELU(x), gelu, ANY, -4.0, 4.0),
    Op("pow 0", lambda x: x**0, lambda x: x**0, ANY),
    Op("pow 2", lambda x: x**2, lambda x: x**2, ANY),
    Op("pow 3", lambda x: x**3, lambda x: x**3, ANY),
    Op("pow 0.5", lambda x: x**0.5, np.sqrt, ANY, low=0.5),
    Op("pow -1", lambda x: x**-1.0, np.reciprocal, ANY, low=0.5),
    Op("power", lambda a, b: a**b, np.power, PAIR, low=0.5, mixed=True),
    Op("power of a number", lambda x: 2**x, lambda x: 2**x, ANY),
    Op("add", lambda a, b: a + b, np.add, PAIR, mixed=True),
    Op("sub", lambda a, b: a - b, np.subtract, PAIR, mixed=True),
    Op("mul", lambda a, b: a * b, np.multiply, PAIR, mixed=True),
    Op("div", lambda a, b: a / b, np.divide, PAIR, low=0.5, mixed=True),
    Op("lt", lambda a, b: a < b, np.less, PAIR, mixed=True),
    Op("gt", lambda a, b: a > b, np.greater, PAIR, mixed=True),
    Op("eq", lambda a, b: a == b, np.equal, PAIR, mixed=True),
    Op("le", lambda a, b: a <= b, np.less_equal, PAIR, mixed=True),
    Op("ge", lambda a, b: a >= b, np.greater_equal, PAIR, mixed=True),
    Op("ne", lambda a, b: a != b, np.not_equal, PAIR, mixed=True),
    Op("is_close", lambda a, b: a.is_close(b), lambda a, b: abs(a - b) < 0.01, PAIR),
    Op("numbers", lambda x: 2 - 3 * x / 2 + x, lambda x: 2 - 0.5 * x, ANY),
    Op("used twice", lambda x: x * x + x, lambda x: x * x + x, ANY),
]

REDUCTIONS = [
    Op("sum 0", lambda x: x.sum(0), lambda x: x.sum(0, keepdims=True), ANY),
    Op("sum -1", lambda x: x.sum(-1), lambda x: x.sum(-1, keepdims=True), ANY),
    Op("sum", lambda x: x.sum(), lambda x: x.sum().reshape(1), ANY),
    Op("mean 0", lambda x: x.mean(0), lambda x: x.mean(0, keepdims=True), FULL),
    Op("mean", lambda x: x.mean(), lambda x: x.mean().reshape(1), FULL),
    Op("sum 1 0", lambda x: x.sum((1, 0)), lambda x: x.sum((1, 0), keepdims=True), DEEP),
    Op("var 0 -1", lambda x: x.var([0, -1]), lambda x: x.var((0, -1), keepdims=True), DEEP),
    Op("var -1", lambda x: x.var(-1), lambda x: x.var(-1, keepdims=True), FULL),
    Op("all 0", lambda x: (x > 0).all(0), lambda x: (x > 0).all(0, keepdims=True), ANY),
    Op("max 0", lambda x: minitorch.max(x, 0), lambda x: x.max(0, keepdims=True), FULL),
    Op("max -1", lambda x: minitorch.max(x, -1), lambda x: x.max(-1, keepdims=True), FULL),
    Op(
        "logsumexp",
        lambda x: minitorch.logsumexp(x, 0),
        lambda x: np.log(np.exp(x).sum(0, keepdims=True)),
        FULL,
    ),
]

MOVEMENT = [
    Op("permute", lambda x: x.permute(*reversed(range(x.dims))), np.transpose, ANY, shares=True),
    Op("transpose", lambda x: x.transpose(0, -1), lambda x: x.swapaxes(0, -1), ANY, shares=True),
    Op("view", lambda x: x.contiguous().view(1, x.size), lambda x: x.reshape(1, -1), ANY),
    Op("contiguous", lambda x: x.contiguous(), np.array, ANY),
    Op(
        "copy",
        lambda x: x.transpose(0, 1).contiguous(),
        lambda x: x.swapaxes(0, 1),
        one(st.tuples(st.just(2), st.just(3))),
    ),
    Op("slice", lambda x: x[..., 1::2], lambda x: x[..., 1::2], ANY, shares=True),
    Op("index", lambda x: x[None, 0:2], lambda x: x[None, 0:2], ANY, shares=True),
    Op(
        "broadcast_to",
        lambda x: x.broadcast_to((2, *x.shape)),
        lambda x: np.broadcast_to(x, (2, *x.shape)),
        ANY,
        shares=True,
    ),
    Op(
        "cat",
        lambda a, b: minitorch.Concatenate.apply(0, a, b),
        lambda a, b: np.concatenate([a, b], 0),
        sizes(3, 3, 2, low=0).map(lambda s: ((s[0], s[2]), (s[1], s[2]))),
    ),
    Op(
        "masked fill",
        lambda x: tensor_functions.MaskedFill.apply(x, np.arange(x.shape[-1]) % 2 == 1).exp(),
        lambda x: np.where(np.arange(x.shape[-1]) % 2 == 1, 0.0, np.exp(x)),
        ANY,
    ),
    Op(
        "band fill",
        lambda x: tensor_functions.BandFill.apply(x, -1, 2).exp(),
        lambda x: np.where(np.triu(np.tril(np.ones_like(x), 1), -1) > 0, np.exp(x), 0.0),
        st.tuples(st.integers(1, 3), st.integers(1, 5), st.integers(1, 5)).map(lambda s: (s,)),
    ),
    Op(
        "dropout",
        lambda x: fused_functions.DropoutFun.apply(x, 0.25, 7),
        lambda x: x / 0.75 * vector_dropout_mask(x.size, 0.25, 7).reshape(x.shape),
        ANY,
    ),
    Op("move", lambda x: x.to(minitorch.TensorBackend(minitorch.FastOps)).exp(), np.exp, ANY),
]

NETWORKS = [
    Op("matmul", lambda a, b: a @ b, np.matmul, MATRICES),
    Op("softmax 0", lambda x: minitorch.softmax(x, 0), lambda x: softmax(x, 0), ANY),
    Op("softmax -1", lambda x: minitorch.softmax(x, -1), softmax, ANY),
    Op("logsoftmax", lambda x: minitorch.logsoftmax(x, -1), lambda x: np.log(softmax(x)), FULL),
    Op("attn_softmax", lambda x, m: x.attn_softmax(m), lambda x, m: softmax(x + m), ATTENTION),
    Op(
        "layernorm",
        lambda x, g, b: x.layernorm(g, b),
        layernorm,
        LAYERNORM,
        expanded=False,
        posed=rows_differ,
    ),
    Op(
        "linear",
        lambda x, w, b: fused_functions.LinearFun.apply(x, w, b),
        lambda x, w, b: x @ w + b,
        LINEAR,
    ),
    Op(
        "linear without bias",
        lambda x, w: fused_functions.LinearFun.apply(x, w, None),
        lambda x, w: x @ w,
        LINEAR.map(lambda s: s[:2]),
    ),
    Op(
        "embedding",
        lambda w: fused_functions.EmbeddingFun.apply(constant(w, ids_for(w)), w),
        lambda w: w[ids_for(w)],
        one(sizes(7, 4)),
    ),
    Op(
        "softmax_loss",
        lambda x: minitorch.softmax_loss(x, constant(x, targets_for(x))),
        cross_entropy,
        one(sizes(4, 6)),
    ),
    Op(
        "avgpool2d",
        lambda x: minitorch.avgpool2d(x, (2, 3)),
        lambda x: tiles(x).mean((4, 5)),
        IMAGES,
    ),
    Op(
        "maxpool2d",
        lambda x: minitorch.maxpool2d(x, (2, 3)),
        lambda x: tiles(x).max((4, 5)),
        IMAGES,
        expanded=False,  # ties: no derivative along a random direction
    ),
    Op("conv1d", lambda x, w: minitorch.conv1d(x, w), convolution, CONV1D),
    Op("conv2d", lambda x, w: minitorch.conv2d(x, w), convolution, CONV2D),
]

OPS = [*ELEMENTWISE, *REDUCTIONS, *MOVEMENT, *NETWORKS]
