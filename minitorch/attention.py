"""Attention of a query over keys and values: fused in tiles, and standard with every step in sight.

`flash_attention` and `standard_attention` take the same arguments and give the same result; as
methods of a tensor they are `query.flash_attention(...)` and `query.attention(...)`. The standard
one is the baseline that the fused kernel is measured against, and the text to read before it.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import numpy.typing as npt

from .arguments import check_tensor, type_name
from .attention_variants import ApplyScoreMod, Variant, dense_mask
from .block_mask import BlockMask
from .captured_arrays import is_torch
from .cuda.precision import fp32_precision
from .fused_functions import LogSumExp, Softmax
from .kernels.flash_attention.problem import (
    AttentionProblem,
    Causal,
    Window,
    checked_dropout_p,
    checked_flag,
    checked_seed,
)
from .kernels.flash_attention.scores import mask_numbers
from .kernels.philox import attention_dropout_mask as philox_mask
from .mask_functions import MaskMod
from .rng import next_seed
from .score_mods import ScoreMod
from .tensor_data import TensorData
from .tensor_functions import BandFill, FlashAttention, MaskedFill

if TYPE_CHECKING:
    from .tensor import Tensor

Mask: TypeAlias = "Tensor | npt.NDArray[Any] | None"


def flash_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    attn_mask: Mask = None,
    is_causal: Causal = False,
    dropout_p: float = 0.0,
    scale: float | None = None,
    window: Window | None = None,
    enable_gqa: bool = False,
    return_lse: bool = False,
    seed: int | None = None,
    score_mod: ScoreMod | None = None,
    block_mask: BlockMask | MaskMod | None = None,
) -> Any:
    """softmax(query @ key^T * scale + attn_mask) @ value in tiles: memory grows with N, not N^2.

    Names and meanings are those of PyTorch's `scaled_dot_product_attention`. Source: Dao 2023
    (FlashAttention-2), algorithms 1 and 2; the loops are in `kernels/flash_attention/`.

    Args:
        query: (..., H, Nq, D), float32 or float64; on the GPU float16 or bfloat16 too.
        key: (..., Hk, Nk, D), of the same dtype; leading dimensions broadcast.
        value: (..., Hk, Nk, Dv), likewise.
        attn_mask: broadcastable to (..., H, Nq, Nk). A bool numpy array: True takes part. A float
            array or Tensor: added to the scores; a Tensor that requires a gradient gets one.
            Comparisons of tensors give floats, 1.0 and 0.0, which would be added: pass
            `mask.to_numpy() > 0`. On the GPU an array is copied there in each call, a Tensor is
            there already.
        is_causal: True or "top-left": row i sees keys up to i, as in PyTorch. "bottom-right": row i
            sees keys up to i + Nk - Nq, for a cache of keys.
        dropout_p: probability that a weight is dropped; the others are scaled by
            1 / (1 - dropout_p).
        scale: factor of the scores; 1 / sqrt(D) if not given.
        window: (left, right): a row sees that many keys before and after its own position; None or
            -1 is unbounded.
        enable_gqa: H may be a multiple of Hk; each key head serves H / Hk query heads.
        return_lse: also return the logsumexp of the scores, which has a gradient.
        seed: of the dropout mask (see `attention_dropout_mask`); drawn from `manual_seed`'s
            sequence if not given.
        score_mod: a function (score, b, h, q_idx, kv_idx) -> score, of Python's operators and
            numpy's functions on one score, scale * query . key (`minitorch.score_mods` has some).
            It may read numbers of arrays and Tensors that it closes over; a Tensor that requires a
            gradient gets one. It is traced once, and compiled into the kernel.
        block_mask: a `BlockMask`, whose empty blocks are skipped, or a function
            (b, h, q_idx, kv_idx) -> truth value, of which one is made for this call: whether the
            query sees the key (`minitorch.attention_masks` has some). `b` is the index over all
            leading dimensions but the last, `h` the query's head.

    Scores are scaled, then go through `score_mod`; the mask is added or applied, the band and
    `block_mask` are; then come the softmax and dropout.

    Returns:
        Output (..., H, Nq, Dv) in the query's dtype, or (output, logsumexp (..., H, Nq), natural
        logarithm, float32 if the query has 16 bits). A row with no allowed key gives output 0,
        logsumexp -inf and zero gradients.

    Raises:
        ValueError: shapes, mask or options that do not fit together.
        TypeError: not tensors, or dtypes that differ, or a mask neither bool nor floating point.

    """
    _check_tensors(query, key, value)
    checked_flag("return_lse", return_lse)
    problem = describe(
        query, key, value, attn_mask, is_causal, dropout_p, scale, window, enable_gqa, seed
    )
    variant = Variant.of(score_mod, block_mask, problem)
    _check_captured(variant)
    problem, given = variant.fused(with_seed(problem, seed))
    attn_mask = _native(attn_mask, query.dtype)
    tracked_mask: Any = attn_mask if hasattr(attn_mask, "requires_grad") else None
    needs_mask_grad = tracked_mask is not None and tracked_mask.requires_grad()
    out = FlashAttention.apply(
        query, key, value, attn_mask, problem, needs_mask_grad, return_lse, given, *variant.tensors
    )
    return (out[..., :-1].to(query.dtype), out[..., -1]) if return_lse else out


def standard_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    attn_mask: Mask = None,
    is_causal: Causal = False,
    dropout_p: float = 0.0,
    scale: float | None = None,
    window: Window | None = None,
    enable_gqa: bool = False,
    return_lse: bool = False,
    seed: int | None = None,
    score_mod: ScoreMod | None = None,
    block_mask: BlockMask | MaskMod | None = None,
) -> Any:
    """The same with the whole score matrix in memory (Vaswani et al. 2017, equation 1).

    Arguments, result and errors are those of `flash_attention`.
    """
    _check_tensors(query, key, value)
    checked_flag("return_lse", return_lse)
    problem = describe(
        query, key, value, attn_mask, is_causal, dropout_p, scale, window, enable_gqa, seed
    )
    variant = Variant.of(score_mod, block_mask, problem)
    _check_captured(variant)
    problem = with_seed(problem, seed)
    scores = _matmul_heads(query, key.transpose(-2, -1)) * problem.scale  # (..., H, Nq, Nk)
    full = (*problem.leading, problem.seqlen_q, problem.seqlen_k)
    if scores.shape != full:  # value alone has some of the leading dimensions
        scores = scores + scores.zeros(full)
    if variant.score is not None:
        scores = ApplyScoreMod.apply(scores, variant.score, *variant.tensors)
    if attn_mask is not None and attn_mask.dtype == np.bool_:
        scores = MaskedFill.apply(scores, ~np.asarray(attn_mask))
    elif attn_mask is not None:
        scores = scores + _as_tensor(attn_mask, scores)
    if problem.left is not None or problem.right is not None:
        scores = BandFill.apply(scores, problem.lower, problem.upper)
    if variant.block_mask is not None:
        scores = MaskedFill.apply(scores, ~dense_mask(variant.block_mask, problem.leading))
    weights = Softmax.apply(scores, -1)
    if problem.dropout_p > 0:
        weights = weights * _dropout_factors(weights, problem)
    out = _matmul_heads(weights, value)
    if not return_lse:
        return out
    logsumexp = LogSumExp.apply(scores, -1)[..., 0]
    if logsumexp.shape != problem.logsumexp_shape:  # value alone has more leading dimensions
        logsumexp = logsumexp + logsumexp.zeros(problem.logsumexp_shape)
    return out, logsumexp


def describe(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Any = None,
    is_causal: Causal = False,
    dropout_p: float = 0.0,
    scale: float | None = None,
    window: Window | None = None,
    enable_gqa: bool = False,
    seed: int | None = None,
) -> AttentionProblem:
    """The validated description of a call, of which shapes and dtypes of the arrays are enough;
    without a dropout seed unless it was given.
    """
    if len({query.dtype, key.dtype, value.dtype}) > 1:
        names = ", ".join(x.dtype.name for x in (query, key, value))
        raise TypeError(f"query, key and value must have one dtype, got {names}: use .to(dtype)")
    return AttentionProblem.of(
        query.shape,
        key.shape,
        value.shape,
        query.dtype,
        attn_mask=_checked_mask(attn_mask),
        is_causal=is_causal,
        dropout_p=dropout_p,
        scale=scale,
        window=window,
        enable_gqa=enable_gqa,
        seed=0 if seed is None else seed,
        fp32_precision=fp32_precision(),
    )


def with_seed(problem: AttentionProblem, seed: int | None) -> AttentionProblem:
    """The problem with a dropout seed, which is drawn if none was given: bad input draws none."""
    if seed is None and problem.dropout_p > 0:
        return replace(problem, seed=next_seed())
    return problem


def _check_tensors(query: Any, key: Any, value: Any) -> None:
    for name, given in (("query", query), ("key", key), ("value", value)):
        check_tensor(given, name)


def _check_captured(variant: Variant) -> None:
    """Raise TypeError for a tensor of PyTorch's, whose gradient nobody would find."""
    for name, array in zip(variant.names, variant.arrays, strict=True):
        if is_torch(array):
            raise TypeError(
                f"score_mod reads `{name}`, a torch.Tensor, beside minitorch tensors: "
                f"minitorch.as_tensor({name}.detach()) shares its memory"
            )


def _native(mask: Any, dtype: np.dtype[Any]) -> Any:
    """A mask as kernels read it: numpy's floats that they do not know in the scores' dtype."""
    if isinstance(mask, np.ndarray):
        known = mask.dtype.isnative and mask.dtype.kind in "bf" and mask.dtype.itemsize <= 8
        return mask if known else mask.astype(dtype)
    return mask


def _checked_mask(mask: Any) -> Any:
    """The mask itself; TypeError if it is neither a Tensor nor an array."""
    if isinstance(mask, np.ma.MaskedArray):
        raise TypeError(
            "attn_mask is a masked array of numpy: fill it first, attn_mask.filled(...)"
        )
    if mask is None or isinstance(mask, np.ndarray | TensorData) or hasattr(mask, "_tensor"):
        return mask
    raise TypeError(
        f"attn_mask must be a minitorch.Tensor or a numpy array, got {type_name(mask)}: "
        "np.asarray makes an array, minitorch.as_tensor a Tensor"
    )


def _matmul_heads(a: Tensor, b: Tensor) -> Tensor:
    """a @ b, where each head of `b` serves as many neighbouring heads of `a` as there are."""
    if a.dims < 3 or b.dims < 3 or b.shape[-3] in (1, a.shape[-3]) or a.shape[-3] == 1:
        return a @ b
    heads, kv_heads = a.shape[-3], b.shape[-3]
    grouped = a.contiguous().view(*a.shape[:-3], kv_heads, heads // kv_heads, *a.shape[-2:])
    out: Tensor = grouped @ b[..., None, :, :]  # (..., Hk, H / Hk, Nq, columns of b)
    return out.view(*out.shape[:-4], heads, *out.shape[-2:])


def _as_tensor(mask: Any, like: Tensor) -> Tensor:
    """An additive mask as a tensor in the dtype of the scores."""
    if hasattr(mask, "_tensor"):
        return mask if mask.dtype == like.dtype else mask.to(like.dtype)  # type: ignore[no-any-return]
    return like._from_numpy(mask_numbers(np.asarray(mask), like.dtype))


def _dropout_factors(weights: Tensor, problem: AttentionProblem) -> Tensor:
    """0 for a dropped weight, 1 / (1 - dropout_p) for a kept one; made on the host."""
    kept = attention_dropout_mask(weights.shape, problem.dropout_p, problem.seed)
    return weights._from_numpy((kept * problem.keep_scale).astype(weights.dtype))


def attention_dropout_mask(
    shape: tuple[int, ...], dropout_p: float, seed: int | None = None
) -> npt.NDArray[np.bool_]:
    """The mask that attention with dropout uses: True where a weight is kept.

    It is a function of seed, batch * head, row and column alone (Philox 4x32-10, Salmon et al.
    2011), so it does not depend on tile sizes or on the device, and is the same in the backward
    pass.

    Args:
        shape: of the attention weights, (..., Nq, Nk).
        dropout_p: probability that a weight is dropped, from 0 to 1.
        seed: as given to attention; if None the next one of `manual_seed`'s sequence is drawn, as
            attention would.

    Returns:
        Array of bool, of `shape`.

    Raises:
        ValueError: `shape` is not two or more sizes, `dropout_p` is no probability, or `seed` no
            integer in [0, 2**64).

    """
    sizes = isinstance(shape, tuple | list) and all(
        isinstance(n, int | np.integer) and not isinstance(n, bool) and n >= 0 for n in shape
    )
    if not sizes or len(shape) < 2:
        raise ValueError(f"shape must be sizes (..., seqlen_q, seqlen_k), got {shape!r}")
    dropout_p = checked_dropout_p(dropout_p)
    seed = None if seed is None else checked_seed(seed)
    *batch, seqlen_q, seqlen_k = shape
    batch_heads = int(np.prod(batch, dtype=np.int64))
    mask = philox_mask(
        batch_heads, seqlen_q, seqlen_k, dropout_p, next_seed() if seed is None else seed
    )
    return mask.reshape(shape)
