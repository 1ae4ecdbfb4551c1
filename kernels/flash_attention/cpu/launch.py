"""FlashAttention on the CPU: numpy arrays in, numpy arrays out, on all of numba's threads.

`forward` and `backward` here prepare what the kernels read; the algorithm is in `cpu/forward.py`
and `cpu/backward.py`. Inputs are read where they lie, whatever their (non-negative) strides, and a
broadcast dimension is never expanded: each matrix of a stack is found through a table of offsets.

The results do not depend on the number of threads: a row's sums run over the keys in an order that
the shape alone decides.
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ...cpu.threads import run_on_threads, thread_count
from ...philox import dropout_threshold
from ..problem import AttentionProblem, Shape
from ..scores import mask_numbers
from ..variant import NO_VARIANT, VariantInputs, wanted_gradients
from .backward import backward_worker, delta_worker, mask_gradient_worker
from .forward import forward_worker
from .functions import (
    Bounds,
    PreparedFunctions,
    captured_sums,
    list_keys,
    list_rows,
    lists_of_keys,
    lists_of_queries,
    longest_first,
    prepared_functions,
)
from .tiles import ADDITIVE_MASK, BOOL_MASK, NO_MASK, Sizes, Strides

Array = NDArray[Any]

MASK_NUMBERS = {"none": NO_MASK, "bool": BOOL_MASK}  # all others are additive


class TileSizes(NamedTuple):
    """Rows and columns of the tiles of scores; multiples of 32.

    They decide the speed, and the order in which sums are formed; not the dropout mask. A tile of
    scores should fit into the level-1 or level-2 cache beside what it is computed from.
    """

    forward_q: int = 32
    forward_k: int = 256
    backward_q: int = 32
    backward_k: int = 256


def default_tiles(problem: AttentionProblem, variant: VariantInputs = NO_VARIANT) -> TileSizes:
    """Narrower tiles of keys, the backward pass's unit of work, where there are few heads; with
    lists of blocks, tiles that divide these.

    The shape alone decides, not the number of threads, so that results do not depend on it.
    """
    wide = TileSizes()
    if variant.lists is not None:
        keys = list_keys(variant.lists)
        return wide._replace(forward_k=keys, backward_k=keys)
    tasks = problem.batch_heads * math.ceil(problem.seqlen_k / wide.backward_k)
    return wide if tasks >= 16 else wide._replace(backward_k=128 if tasks >= 8 else 64)


class Result(NamedTuple):
    """What a forward pass gives.

    Args:
        out: (..., Nq, Dv).
        logsumexp: (..., Nq), natural.
        rows: (..., Nq, 2), each row's maximum m and sum l of exp(score - m), for `backward`.
        tiles: the number of tiles of scores that were computed.

    """

    out: Array
    logsumexp: Array
    rows: Array
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
    """A flat array over the array's memory and the strides in elements; seldom a copy."""
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
    return np.array(np.broadcast_to(offset, leading), order="C").reshape(
        -1
    )  # writable: see _FlatView


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
    additive = problem.additive_mask
    typed = mask_numbers(attn_mask, problem.dtype) if additive else attn_mask.view(np.uint8)
    data, strides = _flatten(typed)
    strides = tuple(0 if n == 1 else s for n, s in zip(attn_mask.shape, strides, strict=True))
    offset = _head_offsets(attn_mask.shape[:-2], strides[:-2], problem.leading, False)
    stack = Stack(data, offset, strides[-2], strides[-1])
    return (bools, data, stack) if additive else (data, bias, stack)


def _block_q(problem: AttentionProblem, tile_q: int, threads: int) -> int:
    """Queries of a task, in whole tiles (of a list, too): many, to use a packed tile of keys often;
    not so many that threads idle.

    Rows are independent of each other, so this changes no result.
    """
    rows_in_cache = 32768 // max(problem.head_dim, problem.value_dim, 64)
    rows_to_share = math.ceil(problem.batch_heads * problem.seqlen_q / (4 * threads))
    rows = min(rows_in_cache, rows_to_share, problem.seqlen_q)
    return max(1, math.ceil(rows / tile_q)) * tile_q


def _threads(problem: AttentionProblem) -> int:
    """How many threads may share the work; one where waking another would take longer than it."""
    products = problem.seqlen_q * problem.seqlen_k * (problem.head_dim + problem.value_dim)
    return 1 if problem.batch_heads * products < 1_000_000 else thread_count()


def _dropout_arguments(problem: AttentionProblem) -> tuple[int, np.uint64, np.floating[Any]]:
    """threshold, seed and factor of the weights that are kept."""
    threshold, keep_scale = dropout_threshold(problem.dropout_p), problem.keep_scale
    return threshold, np.uint64(problem.seed), problem.dtype.type(keep_scale)


def _mask_number(problem: AttentionProblem) -> int:
    return MASK_NUMBERS.get(problem.mask_kind, ADDITIVE_MASK)


def _strides(q: Stack, k: Stack, v: Stack, mask: Stack, *more: Stack) -> tuple[int, ...]:
    """`Strides` as a plain tuple, which numba's CPU dispatcher knows faster than a named one."""
    return tuple(Strides(*(n for x in (q, k, v, mask, *more) for n in (x.row, x.column))))


def _sizes(problem: AttentionProblem, tile_q: int, tile_k: int, block_q: int) -> Sizes:
    return Sizes(
        problem.batch_heads, problem.seqlen_q, problem.seqlen_k, problem.head_dim,
        problem.value_dim, problem.lower, problem.upper, tile_q, tile_k, block_q,
        problem.heads,
    )  # fmt: skip


# --------------------------------------------------------------------------- forward


def forward(
    problem: AttentionProblem,
    q: Array,
    k: Array,
    v: Array,
    attn_mask: Array | None = None,
    variant: VariantInputs = NO_VARIANT,
) -> tuple[Array, Array, Array]:
    """out, logsumexp and rows of a `Result`, contiguous."""
    return forward_with_count(problem, q, k, v, attn_mask, variant=variant)[:3]


def forward_with_count(
    problem: AttentionProblem,
    q: Array,
    k: Array,
    v: Array,
    attn_mask: Array | None = None,
    tiles: TileSizes | None = None,
    variant: VariantInputs = NO_VARIANT,
) -> Result:
    """`forward` with tile sizes of one's choice, which also counts the tiles that it computed.

    Raises:
        TypeError: the problem is one of 16-bit numbers, which only a GPU computes with.
    """
    if problem.dtype.name not in ("float32", "float64"):
        raise TypeError(f"attention on the CPU takes float32 or float64, not {problem.dtype}.")
    tiles = tiles or default_tiles(problem, variant)
    out = np.empty(problem.out_shape, problem.dtype)
    logsumexp = np.empty(problem.logsumexp_shape, problem.dtype)
    rows = np.empty((*problem.logsumexp_shape, 2), problem.dtype)
    q_stack, k_stack = _stack(q, problem), _stack(k, problem, problem.enable_gqa)
    v_stack = _stack(v, problem, problem.enable_gqa)
    bools, bias, mask = _mask_stack(attn_mask, problem)
    threads = _threads(problem)
    sizes = tiles.forward_q, tiles.forward_k
    block_q = _block_q(problem, list_rows(variant.lists, tiles.forward_q), threads)
    functions = prepared_functions(problem, variant)
    tasks = problem.batch_heads * math.ceil(problem.seqlen_q / block_q)
    tile_count = np.zeros(1, np.int64)
    if tasks:
        run_on_threads(
            min(threads, tasks), forward_worker,
            q_stack.data, k_stack.data, v_stack.data, bools, bias,
            out.reshape(-1), logsumexp.reshape(-1), rows.reshape(-1),
            q_stack.offset, k_stack.offset, v_stack.offset, mask.offset,
            _strides(q_stack, k_stack, v_stack, mask), _mask_number(problem),
            tuple(_sizes(problem, *sizes, block_q)),
            problem.dtype.type(problem.scale), *_dropout_arguments(problem),
            functions.arguments, lists_of_queries(problem, variant.lists, *sizes),
            longest_first(problem, variant.lists, *sizes, block_q),
            np.zeros(1, np.int64), tile_count,
        )  # fmt: skip
    return Result(out, logsumexp, rows, int(tile_count[0]))


# --------------------------------------------------------------------------- backward


class Slots(NamedTuple):
    """Which heads add to which gradient: slot s is the sum of heads[start[s] : start[s + 1]]."""

    start: Array
    heads: Array


def _head_index(shape: Shape, problem: AttentionProblem, gqa: bool = False) -> Array:
    """For each head, which matrix of an array with these leading dimensions it uses."""
    strides = tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))
    return _head_offsets(shape, strides, problem.leading, gqa)


def _slots(index: Array, count: int) -> Slots:
    """The slots for heads whose gradients belong to matrix index[head], of `count` matrices."""
    start = np.searchsorted(np.sort(index), np.arange(count + 1))
    return Slots(start.astype(np.int64), np.argsort(index, kind="stable").astype(np.int64))


def _sum_over_heads(gradient: Array, index: Array, shape: Shape) -> Array:
    """Sum the gradients (heads, rows, columns) of heads that used the same matrix."""
    count = math.prod(shape[:-2])
    if len(index) == count and np.array_equal(index, np.arange(count)):
        return gradient.reshape(shape)
    summed = np.zeros((count, *gradient.shape[1:]), gradient.dtype)
    np.add.at(summed, index, gradient)
    return summed.reshape(shape)


def backward(
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
    tiles: TileSizes | None = None,
) -> tuple[Array | None, ...]:
    """(dq, dk, dv, dmask) in the shapes of the inputs, and the gradients of what the score function
    captured; dmask is None unless it is asked for.

    Args:
        out, rows: what `forward` gave for the same problem and inputs.
        grad_out, grad_logsumexp: gradients of out and logsumexp; the second may be None.
        needs_mask_grad: also give the gradient of an additive `attn_mask`.
        tiles: of one's choice.
    """
    dtype, heads = problem.dtype, problem.batch_heads
    tiles = tiles or default_tiles(problem, variant)
    k_index = _head_index(problem.key_shape[:-2], problem, problem.enable_gqa)
    v_index = _head_index(problem.value_shape[:-2], problem, problem.enable_gqa)
    # Keys and values that are shared in the same way are the common case: dK and dV are summed in
    # the tile. Where they are not, the kernel gives them for each head.
    shared = k_index if np.array_equal(k_index, v_index) else np.arange(heads, dtype=np.int64)
    slot_count = int(np.max(shared)) + 1 if heads else 0
    slots = _slots(shared, slot_count)
    slot_head = slots.heads[slots.start[:-1]] if heads else slots.heads
    dq = np.zeros((heads, problem.seqlen_q, problem.head_dim), dtype)
    dk = np.zeros((slot_count, problem.seqlen_k, problem.head_dim), dtype)
    dv = np.zeros((slot_count, problem.seqlen_k, problem.value_dim), dtype)
    dmask = np.zeros(attn_mask.shape, dtype) if needs_mask_grad and attn_mask is not None else None
    wanted = wanted_gradients(problem.score_mod)
    captured = [np.zeros(variant.score.arrays[n].shape) for n in wanted]
    if dq.shape[1] and dk.shape[1] and heads:
        common = _common_arguments(
            problem, q, k, v, attn_mask, out, rows, grad_out, grad_logsumexp, tiles, variant
        )
        query_tiles = math.ceil(problem.seqlen_q / tiles.backward_q)
        tasks = slot_count * math.ceil(problem.seqlen_k / tiles.backward_k)
        threads = min(_threads(problem), tasks)
        tables = np.zeros((threads, common.functions.starts[-1]), np.int64)
        run_on_threads(
            threads, backward_worker, *common.matrices,
            dq.reshape(-1), dk.reshape(-1), dv.reshape(-1), *common.settings,
            slots.start, slots.heads, np.zeros(heads * query_tiles, np.int64),
            tables, np.zeros(1, np.int64), np.zeros(1, np.int64),
        )  # fmt: skip
        if wanted:
            captured = captured_sums(problem, variant, common.functions, tables)
        if dmask is not None:
            _mask_gradient(problem, dmask, common)
    dq = _sum_over_heads(dq, _head_index(problem.query_shape[:-2], problem), problem.query_shape)
    dk = _sum_over_heads(dk, k_index[slot_head], problem.key_shape)
    dv = _sum_over_heads(dv, v_index[slot_head], problem.value_shape)
    return dq, dk, dv, dmask, *captured


class _Common(NamedTuple):
    """Arguments of both workers of the backward pass: before and after what they write."""

    matrices: tuple[Any, ...]
    settings: tuple[Any, ...]
    functions: PreparedFunctions


def _common_arguments(
    problem: AttentionProblem,
    q: Array,
    k: Array,
    v: Array,
    attn_mask: Array | None,
    out: Array,
    rows: Array,
    grad_out: Array,
    grad_logsumexp: Array | None,
    tiles: TileSizes,
    variant: VariantInputs,
) -> _Common:
    """Prepare the inputs; compute delta, and what makes P of a score."""
    dtype = problem.dtype
    q_stack, k_stack = _stack(q, problem), _stack(k, problem, problem.enable_gqa)
    v_stack = _stack(v, problem, problem.enable_gqa)
    bools, bias, mask = _mask_stack(attn_mask, problem)
    grad_stack = _stack(np.broadcast_to(grad_out, problem.out_shape), problem)
    rows, _ = _flatten(np.ascontiguousarray(rows, dtype))
    grad_lse = np.empty(0, dtype)
    if grad_logsumexp is not None:
        grad_lse = (
            np.broadcast_to(grad_logsumexp, problem.logsumexp_shape).astype(dtype).reshape(-1)
        )
    count = problem.batch_heads * problem.seqlen_q
    delta, shift, inverse = (np.empty(count, dtype) for _ in range(3))
    run_on_threads(
        min(_threads(problem), problem.batch_heads), delta_worker,
        _flatten(np.ascontiguousarray(out, dtype))[0], grad_stack.data, grad_stack.offset,
        grad_stack.row, grad_stack.column, rows, grad_lse, problem.seqlen_q, problem.value_dim,
        delta, shift, inverse, np.zeros(1, np.int64),
    )  # fmt: skip
    bounds = _bounds(problem, q, k, v, grad_out, delta)
    functions = prepared_functions(problem, variant, bounds)
    sizes = tiles.backward_q, tiles.backward_k
    settings = (
        q_stack.offset, k_stack.offset, v_stack.offset, mask.offset, grad_stack.offset,
        _strides(q_stack, k_stack, v_stack, mask, grad_stack), _mask_number(problem),
        tuple(_sizes(problem, *sizes, 0)), dtype.type(problem.scale),
        *_dropout_arguments(problem), functions.arguments,
        lists_of_keys(problem, variant.lists, *sizes), shift, inverse, delta,
    )  # fmt: skip
    matrices = (q_stack.data, k_stack.data, v_stack.data, bools, bias, grad_stack.data)
    return _Common(matrices, settings, functions)


def _bounds(
    problem: AttentionProblem, q: Array, k: Array, v: Array, grad_out: Array, delta: Array
) -> Bounds:
    """Of scores, and of the sum of the absolute values of their gradients P (Z dP - delta)."""
    if not wanted_gradients(problem.score_mod):
        return Bounds(0.0, 0.0)
    (largest_q, _), (largest_k, _), (largest_v, _) = (_norms(x) for x in (q, k, v))
    _, of_rows = _norms(np.broadcast_to(grad_out, problem.out_shape))
    of_dp = problem.keep_scale * largest_v * of_rows
    of_delta = float(np.abs(delta).sum(dtype=np.float64))
    return Bounds(abs(problem.scale) * largest_q * largest_k, of_dp + of_delta)


def _norms(x: Array) -> tuple[float, float]:
    """Of the rows: the largest, and their sum."""
    norms = np.sqrt(np.einsum("...d,...d->...", x, x, dtype=np.float64))
    return float(norms.max(initial=0.0)), float(norms.sum())


def _mask_gradient(problem: AttentionProblem, dmask: Array, common: _Common) -> None:
    """Add the gradient of an additive mask to dmask, which has the mask's own shape."""
    shape = (1,) * (2 - dmask.ndim) + dmask.shape
    rows, columns = shape[-2:]
    index = _head_index(shape[:-2], problem)
    slots = _slots(index, math.prod(shape[:-2]))
    run_on_threads(
        _threads(problem), mask_gradient_worker, *common.matrices, dmask.reshape(-1),
        *common.settings, slots.start, slots.heads, rows * columns,
        columns if rows > 1 else 0, 1 if columns > 1 else 0, np.zeros(1, np.int64),
    )  # fmt: skip
