"""FlashAttention on the CPU: numpy arrays in, numpy arrays out, on all of numba's threads.

`forward` and `backward` here prepare what the kernels read; the algorithm is in `cpu_forward.py` and
`cpu_backward.py`. Inputs are read where they lie, whatever their (non-negative) strides, and a
broadcast dimension is never expanded: each matrix of a stack is found through a table of offsets.

The results do not depend on the number of threads: a row's sums run over the keys in an order that the
shape alone decides.
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import numba
import numpy as np
from numpy.typing import NDArray

from ..philox import dropout_threshold
from .cpu_backward import backward_kernel, mask_gradient_kernel
from .cpu_forward import forward_kernel
from .cpu_tiles import ADDITIVE_MASK, BOOL_MASK, LOG2_E, NO_MASK, Sizes
from .problem import AttentionProblem, Shape

Array = NDArray[Any]

MASK_KINDS = {"none": NO_MASK, "bool": BOOL_MASK, "additive": ADDITIVE_MASK}


class TileSizes(NamedTuple):
    """Rows and columns of the tiles of scores; multiples of 32.

    They decide the speed, and the order in which gradients of queries are summed; not the dropout mask.
    """

    forward_q: int = 64
    forward_k: int = 128
    backward_q: int = 64
    backward_k: int = 128


DEFAULT_TILES = TileSizes()


class Result(NamedTuple):
    """What a forward pass gives; tiles is the number of tiles of scores it computed."""

    out: Array
    logsumexp: Array
    tiles: int


# --------------------------------------------------------------------------- how inputs are read


class Stack(NamedTuple):
    """An array (..., rows, columns) as the kernels read it."""

    data: Array  # flat, over all of the memory that the array spans
    offset: Array  # (batch_heads,) where each head's matrix begins
    row: int  # strides, in elements
    column: int


class _FlatView:
    """Lets numpy make a flat, nominally writable view; writability is part of numba's types."""

    def __init__(self, array: Array, length: int) -> None:
        self.array = array  # keeps the memory alive
        self.__array_interface__ = {
            "data": (array.__array_interface__["data"][0], False),
            "shape": (length,),
            "typestr": array.dtype.str,
            "version": 3,
        }


def _flatten(array: Array) -> tuple[Array, Shape]:
    """A flat array over the array's memory, and the strides in elements; a copy only where it must."""
    size = array.itemsize
    if any(stride < 0 or stride % size for stride in array.strides):
        array = np.ascontiguousarray(array)
    strides = tuple(stride // size for stride in array.strides)
    if array.flags.c_contiguous and array.flags.writeable:
        return array.reshape(-1), strides
    if array.size == 0:
        return np.empty(0, array.dtype), strides
    length = 1 + sum((n - 1) * stride for n, stride in zip(array.shape, strides, strict=True))
    return np.asarray(_FlatView(array, length)), strides


@functools.lru_cache(maxsize=512)
def _head_offsets(shape: Shape, strides: Shape, leading: Shape, gqa: bool) -> Array:
    """For each head of `leading`, in C order, where its matrix begins. (batch_heads,) int64."""
    offset = np.zeros((1,) * len(leading), np.int64)
    for axis, (n, stride) in enumerate(zip(shape, strides, strict=True), len(leading) - len(shape)):
        index = np.arange(n, dtype=np.int64) * stride
        if gqa and axis == len(leading) - 1 and n not in (0, leading[-1]):
            index = np.repeat(index, leading[-1] // n)  # heads of queries that share a head of keys
        offset = offset + index.reshape(-1, *(1,) * (len(leading) - 1 - axis))
    return np.ascontiguousarray(np.broadcast_to(offset, leading)).reshape(-1)


def _stack(array: Array, problem: AttentionProblem, gqa: bool = False) -> Stack:
    data, strides = _flatten(np.asarray(array, problem.dtype))
    offset = _head_offsets(array.shape[:-2], strides[:-2], problem.leading, gqa)
    return Stack(data, offset, strides[-2], strides[-1])


def _mask_stack(attn_mask: Array | None, problem: AttentionProblem) -> tuple[Array, Array, Stack]:
    """(bools, bias, stack): the mask's flat data in one of the first two, by its kind."""
    bools, bias = np.empty(0, np.uint8), np.empty(0, problem.dtype)
    if attn_mask is None:
        return bools, bias, Stack(bias, _head_offsets((), (), problem.leading, False), 0, 0)
    while attn_mask.ndim < 2:
        attn_mask = attn_mask[None]
    # One element stands for a dimension that was broadcast before it came here.
    attn_mask = attn_mask[tuple(slice(0, 1) if s == 0 else slice(None) for s in attn_mask.strides)]
    additive = problem.mask_kind == "additive"
    typed = attn_mask.astype(problem.dtype, copy=False) if additive else attn_mask.view(np.uint8)
    data, strides = _flatten(typed)
    strides = tuple(0 if n == 1 else s for n, s in zip(attn_mask.shape, strides, strict=True))
    offset = _head_offsets(attn_mask.shape[:-2], strides[:-2], problem.leading, False)
    stack = Stack(data, offset, strides[-2], strides[-1])
    return (bools, data, stack) if additive else (data, bias, stack)


def _block_q(problem: AttentionProblem, tile_q: int, threads: int) -> int:
    """Queries of a task: many, to use a packed tile of keys often; not so many that threads idle.

    Rows are independent of each other, so this changes no result.
    """
    rows_in_cache = 32768 // max(problem.head_dim, problem.value_dim, 64)
    rows_to_share = math.ceil(problem.batch_heads * problem.seqlen_q / (4 * threads))
    rows = min(rows_in_cache, rows_to_share, problem.seqlen_q)
    return max(1, math.ceil(rows / tile_q)) * tile_q


def _dropout_arguments(problem: AttentionProblem) -> tuple[int, np.uint64, np.floating[Any]]:
    """threshold, seed and factor of the weights that are kept."""
    p = problem.dropout_p
    keep_scale = 1.0 / (1.0 - p) if p < 1.0 else 0.0
    return dropout_threshold(p), np.uint64(problem.seed), problem.dtype.type(keep_scale)


def _sizes(problem: AttentionProblem, tile_q: int, tile_k: int, block_q: int) -> Sizes:
    return Sizes(
        problem.batch_heads, problem.seqlen_q, problem.seqlen_k, problem.head_dim,
        problem.value_dim, problem.lower, problem.upper, tile_q, tile_k, block_q,
    )  # fmt: skip


# --------------------------------------------------------------------------- forward


def forward(
    problem: AttentionProblem, q: Array, k: Array, v: Array, attn_mask: Array | None = None
) -> tuple[Array, Array]:
    """(out, logsumexp) of (..., Nq, Dv) and (..., Nq), contiguous; logsumexp in natural units."""
    result = forward_with_count(problem, q, k, v, attn_mask)
    return result.out, result.logsumexp


def forward_with_count(
    problem: AttentionProblem,
    q: Array,
    k: Array,
    v: Array,
    attn_mask: Array | None = None,
    tiles: TileSizes = DEFAULT_TILES,
) -> Result:
    """`forward` with tile sizes of one's choice, which also counts the tiles that it computed."""
    out = np.empty(problem.out_shape, problem.dtype)
    logsumexp = np.empty(problem.logsumexp_shape, problem.dtype)
    q_stack, k_stack = _stack(q, problem), _stack(k, problem, problem.enable_gqa)
    v_stack = _stack(v, problem, problem.enable_gqa)
    bools, bias, mask = _mask_stack(attn_mask, problem)
    threads = numba.get_num_threads()
    block_q = _block_q(problem, tiles.forward_q, threads)
    tasks = problem.batch_heads * math.ceil(problem.seqlen_q / block_q)
    tile_counts = np.zeros(min(threads, tasks), np.int64)
    if tasks:
        forward_kernel(
            q_stack.data, k_stack.data, v_stack.data, bools, bias,
            out.reshape(-1), logsumexp.reshape(-1),
            q_stack.offset, k_stack.offset, v_stack.offset, mask.offset,
            (*q_stack[2:], *k_stack[2:], *v_stack[2:], *mask[2:]), MASK_KINDS[problem.mask_kind],
            tuple(_sizes(problem, tiles.forward_q, tiles.forward_k, block_q)),
            problem.dtype.type(problem.scale * LOG2_E), *_dropout_arguments(problem),
            np.zeros(1, np.int64), tile_counts,
        )  # fmt: skip
    return Result(out, logsumexp, int(tile_counts.sum()))
