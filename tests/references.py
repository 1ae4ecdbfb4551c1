"""Independent truths for tests: plain numpy in float64, importing nothing of minitorch."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]


@dataclass(frozen=True)
class AttentionReference:
    """Attention's outputs, and its gradients with respect to every input, in float64."""

    out: Array
    logsumexp: Array
    grad_query: Array
    grad_key: Array
    grad_value: Array
    grad_mask: Array | None


def band(
    seqlen_q: int,
    seqlen_k: int,
    is_causal: bool | str,
    window: tuple[int | None, int | None] | None,
) -> Array:
    """(Nq, Nk): True where causality and the window let a query see a key."""
    offset = seqlen_k - seqlen_q if is_causal == "bottom-right" else 0
    diagonal = np.arange(seqlen_q)[:, None] + offset
    keys = np.arange(seqlen_k)[None]
    left, right = window if window is not None else (None, None)
    allowed = np.ones((seqlen_q, seqlen_k), bool)
    if is_causal:
        allowed &= keys <= diagonal
    if left is not None and left != -1:
        allowed &= keys >= diagonal - left
    if right is not None and right != -1:
        allowed &= keys <= diagonal + right
    return allowed


def sum_to_shape(gradient: Array, shape: tuple[int, ...]) -> Array:
    """Undo broadcasting: sum over the dimensions that `shape` lacks or has as 1."""
    gradient = np.sum(gradient, axis=tuple(range(gradient.ndim - len(shape))))
    ones = tuple(a for a, n in enumerate(shape) if n == 1 and gradient.shape[a] != 1)
    return np.asarray(gradient.sum(axis=ones, keepdims=True))


def attention(
    query: Array,
    key: Array,
    value: Array,
    grad_out: Array | None = None,
    grad_logsumexp: Array | None = None,
    *,
    attn_mask: Array | None = None,
    is_causal: bool | str = False,
    kept: Array | None = None,
    dropout_p: float = 0.0,
    scale: float | None = None,
    window: tuple[int | None, int | None] | None = None,
    enable_gqa: bool = False,
    scores: Any = np.float64,
) -> AttentionReference:
    """Standard attention and its gradients; `kept` is the dropout mask, (batch * heads, Nq, Nk).
    Scores and an additive mask are added in the dtype `scores`: a small one is lost in a large one.
    """
    scale = 1 / math.sqrt(max(query.shape[-1], 1)) if scale is None else scale
    q, k, v = (x.astype(np.float64) for x in (query, key, value))
    if enable_gqa:
        k = np.repeat(k, q.shape[-3] // k.shape[-3], axis=-3)
        v = np.repeat(v, q.shape[-3] // v.shape[-3], axis=-3)
    leading = np.broadcast_shapes(q.shape[:-2], k.shape[:-2], v.shape[:-2])
    q, k, v = (np.broadcast_to(x, (*leading, *x.shape[-2:])) for x in (q, k, v))
    s = scale * (q @ np.swapaxes(k, -1, -2))
    s = np.where(band(q.shape[-2], k.shape[-2], is_causal, window), s, -np.inf)
    if attn_mask is not None and attn_mask.dtype == bool:
        s = np.where(attn_mask, s, -np.inf)
    elif attn_mask is not None:
        s = (s.astype(scores) + attn_mask.astype(scores)).astype(np.float64)

    m = s.max(axis=-1, keepdims=True, initial=-np.inf)
    m = np.where(np.isneginf(m), 0.0, m)
    with np.errstate(over="ignore"):  # the difference of numbers as large as they get
        e = np.exp(s - m)
    l = e.sum(axis=-1, keepdims=True)  # noqa: E741
    with np.errstate(divide="ignore", invalid="ignore"):
        p = np.where(l == 0, 0.0, e / l)
        logsumexp = (m + np.log(l))[..., 0]
    z = np.ones(s.shape)
    if kept is not None:
        factor = 1 / (1 - dropout_p) if dropout_p < 1 else 0.0
        z = np.where(kept.reshape(s.shape), factor, 0.0)
    out = (p * z) @ v

    do = np.zeros(out.shape) if grad_out is None else grad_out.astype(np.float64)
    dl = np.zeros(logsumexp.shape) if grad_logsumexp is None else grad_logsumexp.astype(np.float64)
    dp = z * (do @ np.swapaxes(v, -1, -2))
    # Softmax's gradient; a row that saw no key has p = 0, and so no gradient.
    ds = p * (dp - (p * dp).sum(axis=-1, keepdims=True) + dl[..., None])
    dq, dk, dv = (
        scale * (ds @ k),
        scale * (np.swapaxes(ds, -1, -2) @ q),
        np.swapaxes(p * z, -1, -2) @ do,
    )
    if enable_gqa:
        dk, dv = (
            g.reshape(*g.shape[:-3], x.shape[-3], q.shape[-3] // x.shape[-3], *g.shape[-2:]).sum(-3)
            for g, x in ((dk, key), (dv, value))
        )
    return AttentionReference(
        out,
        logsumexp,
        sum_to_shape(dq, query.shape),
        sum_to_shape(dk, key.shape),
        sum_to_shape(dv, value.shape),
        None if attn_mask is None else sum_to_shape(ds, attn_mask.shape),
    )
