"""Attention of short sequences in 16 bits by whole rows of scores, a few heads at a time.

cuBLAS computes the products on tensor cores, `kernels/flash_attention/cuda_score_rows.py` what lies
between them. The scores of a few heads are in memory at once, never those of all, and the backward
pass computes them anew from the logsumexp: the scheme of FlashAttention, with tiles that are as
long as a row. Up to two thousand keys this is faster than kernels without tensor cores, though it
also computes what a causal mask leaves out; beyond that a head's scores become too large.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from . import cublas
from .cuda_matmul import matmul_into
from .cuda_views import contiguous_data, device_storage, view_of
from .device_array import DeviceArray
from .dtypes import HALF_DTYPES
from .kernels.copy_cuda import copy_into
from .kernels.flash_attention import cuda_score_rows
from .kernels.flash_attention.cuda import Gradients, Heads, Inputs, Matrices
from .kernels.flash_attention.problem import AttentionProblem
from .tensor_data import TensorData

NAME = "rows"
SCORES_BYTES = 32 << 20  # of float32 scores in memory at once; two thirds of an H200's L2 cache
MOST_SCORES = 2048 * 2048  # of one head
MULTIPLE = 8  # of head sizes and keys: 16 bytes, what tensor cores read


def why_not(problem: AttentionProblem, architecture: tuple[int, int]) -> str | None:
    """None if this computes it, on a GPU of this compute capability, and is the faster way; else
    why not.
    """
    tensor_cores = (8, 0) if problem.dtype.name == "bfloat16" else (7, 0)
    sizes = problem.head_dim, problem.value_dim, problem.seqlen_k
    scores = problem.seqlen_q * problem.seqlen_k
    reasons = {
        "it is for float16 and bfloat16": problem.dtype not in HALF_DTYPES,
        "this GPU has no tensor cores for the dtype": architecture < tensor_cores,
        "there is no cuBLAS": not cublas.is_available(),
        "it has no mask": problem.mask_kind != "none",
        "it has no dropout": problem.dropout_p > 0,
        "it has no shared key heads": problem.enable_gqa,
        f"sizes must be multiples of {MULTIPLE}": not all(n and n % MULTIPLE == 0 for n in sizes),
        "a head's scores are too many": scores > MOST_SCORES
        or problem.seqlen_k > cuda_score_rows.MOST_COLUMNS,
        "one query reads each key once: no work for tensor cores": problem.seqlen_q <= 1,
    }
    return next((reason for reason, holds in reasons.items() if holds), None)


def forward(
    problem: AttentionProblem,
    heads: Heads,
    inputs: Inputs,
    out: Matrices,
    logsumexp: Any,
    architecture: tuple[int, int],
) -> None:
    """See `kernels.flash_attention.cuda.forward`."""
    q, k, v = _packed_inputs(problem, heads, inputs)
    count, queries, keys = _count(heads), problem.seqlen_q, problem.seqlen_k
    result = _empty((count, queries, problem.value_dim), problem.dtype)
    step = _heads_at_once(problem)
    scores = _empty((step, queries, keys), np.dtype(np.float32))
    weights = _empty((step, queries, keys), problem.dtype)
    for part, size in _parts(count, step):
        s, p = (data.slice(np.s_[:size]) for data in (scores, weights))
        matmul_into(s, q.slice(part), k.slice(part).permute(0, 2, 1))
        cuda_score_rows.forward(
            problem.dtype.name, _array(s), _array(p), logsumexp, part.start * queries,
            size * queries, keys, _band(problem), problem.scale,
        )  # fmt: skip
        matmul_into(result.slice(part), p, v.slice(part))
    _unpack(result, heads, out)


def backward(
    problem: AttentionProblem,
    heads: Heads,
    inputs: Inputs,
    out: Matrices,
    logsumexp: Any,
    grad_out: Matrices,
    grad_logsumexp: Any,
    gradients: Gradients,
    architecture: tuple[int, int],
) -> None:
    """See `kernels.flash_attention.cuda.backward`."""
    q, k, v = _packed_inputs(problem, heads, inputs)
    do = _packed(grad_out, heads, problem.seqlen_q, problem.value_dim, problem.dtype)
    count, queries, keys = _count(heads), problem.seqlen_q, problem.seqlen_k
    dq, dk, dv = (_empty(data.shape, problem.dtype) for data in (q, k, v))
    step = _heads_at_once(problem)
    scores, dweights = (_empty((step, queries, keys), np.dtype(np.float32)) for _ in range(2))
    weights, dscores = (_empty((step, queries, keys), problem.dtype) for _ in range(2))
    for part, size in _parts(count, step):
        s, dp, p, ds = (data.slice(np.s_[:size]) for data in (scores, dweights, weights, dscores))
        matmul_into(s, q.slice(part), k.slice(part).permute(0, 2, 1))
        matmul_into(dp, do.slice(part), v.slice(part).permute(0, 2, 1))
        cuda_score_rows.backward(
            problem.dtype.name, _array(s), _array(dp), logsumexp, grad_logsumexp, _array(p),
            _array(ds), part.start * queries, size * queries, keys, _band(problem), problem.scale,
        )  # fmt: skip
        matmul_into(dv.slice(part), p.permute(0, 2, 1), do.slice(part))
        matmul_into(dq.slice(part), ds, k.slice(part))
        matmul_into(dk.slice(part), ds.permute(0, 2, 1), q.slice(part))
    for data, target in zip((dq, dk, dv), gradients[:3], strict=True):
        _unpack(data, heads, target)


# ----- heads one after the other -----


def _count(heads: Heads) -> int:
    """Heads of all sequences of the batch."""
    return heads.batch * heads.heads


def _heads_at_once(problem: AttentionProblem) -> int:
    """Heads whose scores are in memory together."""
    most = SCORES_BYTES // (4 * problem.seqlen_q * problem.seqlen_k)
    return min(max(most, 1), problem.batch_heads)


def _parts(count: int, step: int) -> Iterator[tuple[slice, int]]:
    for start in range(0, count, step):
        stop = min(start + step, count)
        yield slice(start, stop), stop - start


def _packed_inputs(problem: AttentionProblem, heads: Heads, inputs: Inputs) -> list[TensorData]:
    sizes = (
        (problem.seqlen_q, problem.head_dim),
        (problem.seqlen_k, problem.head_dim),
        (problem.seqlen_k, problem.value_dim),
    )
    matrices = (inputs.q, inputs.k, inputs.v)
    return [
        _packed(m, heads, *size, problem.dtype) for m, size in zip(matrices, sizes, strict=True)
    ]


def _strided(matrices: Matrices, heads: Heads, rows: int, columns: int) -> TensorData:
    shape = (heads.batch, heads.heads, rows, columns)
    return TensorData._of(matrices.owner, shape, matrices.strides)


def _packed(
    matrices: Matrices, heads: Heads, rows: int, columns: int, dtype: np.dtype[Any]
) -> TensorData:
    """(heads of all sequences, rows, columns), contiguous; copied unless they lie so already."""
    data = _strided(matrices, heads, rows, columns)
    shape = (_count(heads), rows, columns)
    if data.is_contiguous():
        return contiguous_data(device_storage(data), shape)
    packed = _empty(shape, dtype)
    copy_into(view_of(contiguous_data(device_storage(packed), data.shape)), view_of(data))
    return packed


def _unpack(data: TensorData, heads: Heads, target: Matrices) -> None:
    """Copy what `_packed` might have made to where it is wanted."""
    _, rows, columns = data.shape
    strided = _strided(target, heads, rows, columns)
    copy_into(view_of(strided), view_of(contiguous_data(device_storage(data), strided.shape)))


def _empty(shape: tuple[int, ...], dtype: np.dtype[Any]) -> TensorData:
    return contiguous_data(DeviceArray.empty(int(np.prod(shape)), dtype), shape)


def _array(data: TensorData) -> Any:
    return device_storage(data).array


def _band(problem: AttentionProblem) -> tuple[int, int, int]:
    return problem.seqlen_q, problem.lower, problem.upper
