"""Standard attention in numpy, with the whole score matrix in memory.

The baseline of FlashAttention, in memory and in speed, and the text to read before it: the same
arguments and results as `cpu.forward` and `cpu.backward`, in a page. (Algorithms 0 and 3 of
"FlashAttention", Dao et al. 2022.)
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..philox import attention_dropout_mask
from .problem import AttentionProblem, Shape
from .scores import mask_numbers
from .variant import NO_VARIANT, VariantInputs, captured_gradients, evaluated

Array = NDArray[Any]


def standard_attention(
    problem: AttentionProblem,
    q: Array,
    k: Array,
    v: Array,
    attn_mask: Array | None = None,
    variant: VariantInputs = NO_VARIANT,
) -> tuple[Array, Array, Array]:
    """Of shapes (..., Nq, Dv), (..., Nq) and (..., Nq, 2): out; logsumexp, natural; and each row's
    maximum m and sum l of exp(score - m).
    """
    k, v = _repeat_heads(problem, k), _repeat_heads(problem, v)
    s = _masked(problem, _scores(problem, q, k, variant), attn_mask, variant)  # (..., Nq, Nk)
    m = s.max(axis=-1, keepdims=True, initial=-np.inf)
    m = np.where(np.isinf(m), 0, m)  # a row that sees no key, or has an infinite score
    with np.errstate(divide="ignore", over="ignore", invalid="ignore"):
        l = np.exp(s - m).sum(axis=-1, keepdims=True)
        logsumexp = (m + np.log(l))[..., 0]
        out = (_weights(s, m, l) * _dropout_factors(problem)) @ v
    rows = np.concatenate((m, l), -1)
    return (
        _as_leading(problem, out),
        _as_leading(problem, logsumexp, dims=1),
        _as_leading(problem, rows),
    )


def _weights(s: Array, m: Array, l: Array) -> Array:
    """P = exp(S - m) / l; 0 in a row that sees no key, NaN in one with an infinite score."""
    p = np.where(l == 0, 0, np.exp(s - m) / l)
    return np.where(np.isinf(l), l.dtype.type(np.nan), p)


def standard_attention_backward(
    problem: AttentionProblem,
    q: Array,
    k: Array,
    v: Array,
    attn_mask: Array | None,
    out: Array,
    rows: Array,
    grad_out: Array,
    grad_logsumexp: Array | None = None,
    needs_mask_grad: bool = False,
    variant: VariantInputs = NO_VARIANT,
) -> tuple[Array | None, ...]:
    """(dq, dk, dv, dmask) in the shapes of the inputs, and the gradients of what the score function
    captured; dmask is None unless it is asked for.
    """
    key, value = _repeat_heads(problem, k), _repeat_heads(problem, v)
    s = _masked(problem, _scores(problem, q, key, variant), attn_mask, variant)
    m, l = rows[..., :1], rows[..., 1:]
    empty = l == 0  # rows that see no key
    with np.errstate(divide="ignore", over="ignore", invalid="ignore"):
        p = _weights(s, m, l)
    do = np.where(empty, 0, grad_out)
    z = _dropout_factors(problem)
    delta = (do * out).sum(axis=-1, keepdims=True)
    if grad_logsumexp is not None:
        delta = delta - np.where(empty, 0, grad_logsumexp[..., None])
    ds = p * (z * (do @ _transpose(value)) - delta)  # (..., Nq, Nk)
    dmask = sum_to_shape(ds, attn_mask.shape) if needs_mask_grad and attn_mask is not None else None
    captured: list[Array] = []
    if problem.score_mod is not None:
        before = _products(problem, q, key)
        ds, captured = captured_gradients(problem.score_mod, variant.score, before, ds)
    dq = problem.scale * (ds @ key)
    dk = problem.scale * (_transpose(ds) @ q)
    dv = _transpose(p * z) @ do
    return (
        sum_to_shape(dq, q.shape),
        sum_to_shape(_sum_heads(problem, dk, k.shape), k.shape),
        sum_to_shape(_sum_heads(problem, dv, v.shape), v.shape),
        dmask,
        *captured,
    )


def _products(problem: AttentionProblem, q: Array, k: Array) -> Array:
    """scale * Q K^T, (..., Nq, Nk); with a score function, to which its place matters, of all
    leading dimensions.
    """
    s = problem.dtype.type(problem.scale) * (q @ _transpose(k))
    if problem.has_functions:
        s = np.broadcast_to(s, (*problem.leading, problem.seqlen_q, problem.seqlen_k))
    return np.asarray(s)


def _scores(problem: AttentionProblem, q: Array, k: Array, variant: VariantInputs) -> Array:
    """What the score function makes of scale * Q K^T."""
    s = _products(problem, q, k)
    if problem.score_mod is not None:
        (found,) = evaluated(problem.score_mod, variant.score, s)
        s = np.broadcast_to(found, s.shape).astype(s.dtype)
    return s


def _masked(
    problem: AttentionProblem, s: Array, attn_mask: Array | None, variant: VariantInputs
) -> Array:
    """The scores with the mask, and -inf where a query does not see a key."""
    allowed = problem.allowed_positions()
    if problem.mask_mod is not None:
        (sees,) = evaluated(problem.mask_mod, variant.mask, s)
        allowed = allowed & sees
    if attn_mask is not None and problem.additive_mask:
        with np.errstate(over="ignore", invalid="ignore"):
            s = s + mask_numbers(attn_mask, problem.dtype)
    elif attn_mask is not None:
        allowed = allowed & attn_mask
    masked: Array = np.where(allowed, s, problem.dtype.type(-np.inf))
    return masked


def _dropout_factors(problem: AttentionProblem) -> Array:
    """What the weights are multiplied by: 1 / (1 - dropout_p) where kept, 0 where dropped."""
    p, dtype = problem.dropout_p, problem.dtype
    if p == 0:
        return np.ones((), dtype)
    lengths = problem.seqlen_q, problem.seqlen_k
    kept = attention_dropout_mask(problem.batch_heads, *lengths, p, problem.seed)
    factors: Array = np.where(kept, dtype.type(problem.keep_scale), dtype.type(0))
    return factors.reshape(*problem.leading, *lengths)


def _transpose(x: Array) -> Array:
    return np.swapaxes(x, -1, -2)


def _repeat_heads(problem: AttentionProblem, x: Array) -> Array:
    """With enable_gqa: each head of keys or values, as often as there are queries' heads for it."""
    if not problem.enable_gqa:
        return x
    return np.repeat(x, problem.query_shape[-3] // x.shape[-3], axis=-3)


def _sum_heads(problem: AttentionProblem, gradient: Array, shape: Shape) -> Array:
    """Undo `_repeat_heads`."""
    if not problem.enable_gqa:
        return gradient
    group = problem.query_shape[-3] // shape[-3]
    grouped = gradient.reshape(*gradient.shape[:-3], shape[-3], group, *gradient.shape[-2:])
    return np.asarray(grouped.sum(axis=-3))


def _as_leading(problem: AttentionProblem, x: Array, dims: int = 2) -> Array:
    """With all of the problem's leading dimensions, also one that only V has."""
    shape = (*problem.leading, *x.shape[x.ndim - dims :])
    return x if x.shape == shape else np.broadcast_to(x, shape).copy()


def sum_to_shape(gradient: Array, shape: Shape) -> Array:
    """Undo broadcasting: sum over the dimensions that `shape` lacks or has as 1."""
    gradient = gradient.sum(axis=tuple(range(gradient.ndim - len(shape))))
    ones = tuple(a for a, n in enumerate(shape) if n == 1 and gradient.shape[a] != 1)
    summed: Array = gradient.sum(axis=ones, keepdims=True)
    if math.prod(summed.shape) == math.prod(shape):
        return summed.reshape(shape)
    return np.broadcast_to(summed, shape).copy()  # a size that another input alone has
