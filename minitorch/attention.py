"""Standard attention, written with tensor operations: the whole score matrix, every step in sight.

It takes what `Tensor.flash_attention` takes and gives the same result. It is the baseline that the fused kernel is measured
against, and the text to read before it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from .kernels.philox import attention_dropout_mask as philox_mask
from .rng import next_seed
from .tensor_data import TensorData
from .tensor_functions import LogSumExp, MaskedFill, Softmax

if TYPE_CHECKING:
    import numpy.typing as npt

    from .kernels.flash_attention.problem import AttentionProblem
    from .tensor import Tensor


def standard_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | npt.NDArray[Any] | None,
    problem: AttentionProblem,
    return_lse: bool = False,
) -> Any:
    """softmax(query @ key^T * scale + mask) @ value, with the score matrix in memory.

    Args:
        query: (..., H, Nq, D)
        key: (..., Hk, Nk, D)
        value: (..., Hk, Nk, Dv)
        attn_mask: bool array or additive floats, broadcastable to (..., H, Nq, Nk), or None.
        problem: the validated description of this call.
        return_lse: also return the logsumexp of the scores.

    Returns:
        Output (..., H, Nq, Dv), and if asked for logsumexp (..., H, Nq).

    """
    scores = _matmul_heads(query, key.transpose(-2, -1)) * problem.scale  # (..., H, Nq, Nk)
    full = (*problem.leading, problem.seqlen_q, problem.seqlen_k)
    if scores.shape != full:  # value alone has some of the leading dimensions
        scores = scores + scores.zeros(full)
    allowed = problem.allowed_positions()  # (Nq, Nk)
    if attn_mask is not None and attn_mask.dtype == np.bool_:
        allowed = allowed & np.asarray(attn_mask)
    elif attn_mask is not None:
        scores = scores + _as_tensor(attn_mask, scores)
    scores = MaskedFill.apply(scores, ~allowed)
    weights = Softmax.apply(scores, -1)
    if problem.dropout_p > 0:
        weights = weights * _dropout_factors(weights, problem)
    out = _matmul_heads(weights, value)
    if not return_lse:
        return out
    return out, LogSumExp.apply(scores, -1)[..., 0]


def _matmul_heads(a: Tensor, b: Tensor) -> Tensor:
    """a @ b, where each head of `b` serves as many neighbouring heads of `a` as their numbers ask for."""
    if a.dims < 3 or b.dims < 3 or b.shape[-3] in (1, a.shape[-3]) or a.shape[-3] == 1:
        return a @ b
    heads, kv_heads = a.shape[-3], b.shape[-3]
    grouped = a.contiguous().view(*a.shape[:-3], kv_heads, heads // kv_heads, *a.shape[-2:])
    out = grouped @ b[..., None, :, :]  # (..., Hk, H / Hk, Nq, columns of b)
    return out.view(*out.shape[:-4], heads, *out.shape[-2:])


def _as_tensor(mask: Any, like: Tensor) -> Tensor:
    """An additive mask as a tensor in the dtype of the scores."""
    if hasattr(mask, "_tensor"):
        return mask if mask.dtype == like.dtype else mask.to(like.dtype)  # type: ignore[no-any-return]
    return like._new(TensorData.from_array(np.asarray(mask, like.dtype)))


def _dropout_factors(weights: Tensor, problem: AttentionProblem) -> Tensor:
    """0 for a dropped weight, 1 / (1 - dropout_p) for a kept one."""
    kept = attention_dropout_mask(weights.shape, problem.dropout_p, problem.seed)
    factor = 0.0 if problem.dropout_p == 1 else 1 / (1 - problem.dropout_p)
    return weights._new(TensorData.from_array(kept.astype(weights.dtype) * factor))


def attention_dropout_mask(
    shape: tuple[int, ...], dropout_p: float, seed: int | None = None
) -> npt.NDArray[np.bool_]:
    """The mask that attention with dropout uses: True where a weight is kept.

    It is a function of seed, batch * head, row and column alone (Philox 4x32-10, Salmon et al. 2011), so it does not depend on
    tile sizes or on the device, and is the same in the backward pass.

    Args:
        shape: of the attention weights, (..., Nq, Nk).
        dropout_p: probability that a weight is dropped, from 0 to 1.
        seed: as given to attention; if None the next one of `manual_seed`'s sequence is drawn, as attention would.

    Returns:
        Array of bool, of `shape`.

    Raises:
        ValueError: `shape` has fewer than two sizes, or `dropout_p` is out of range.

    """
    if len(shape) < 2:
        raise ValueError(f"shape must be (..., seqlen_q, seqlen_k), got {shape}")
    if not 0.0 <= dropout_p <= 1.0:
        raise ValueError(f"dropout_p must be in [0, 1], got {dropout_p}")
    *batch, seqlen_q, seqlen_k = shape
    batch_heads = int(np.prod(batch, dtype=np.int64))
    mask = philox_mask(
        batch_heads, seqlen_q, seqlen_k, dropout_p, next_seed() if seed is None else seed
    )
    return mask.reshape(shape)
