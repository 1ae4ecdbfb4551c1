"""What the Hopper backward pass does first: delta, what makes P of a score, and the list of work of
the other kernels.

    delta = rowsum(dO * O) - dL
    P = exp(S - m) / l = rest * exp(S - L)          L and rest: see mma/delta.py

It reads the output and its gradient once, 16 bytes to a thread at a time, and is as fast as memory.
"""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

from ...gpu.ptx import (
    global_address,
    st_global_b32,
    st_global_f32,
    st_global_v4_b32,
)
from ...gpu.runtime import cuda, device_function, kernel, precision, shuffle_xor, types
from ...gpu.vectors import vector_access
from ..schedule_cuda import key_tiles, query_tiles
from ..softmax import shift_and_rest
from .backward_pipeline import COUNTER_BYTES, ROW_BYTES, WORK_BYTES, Work
from .schedule import piece_at

THREADS = 256
COUNTERS = 3  # of items taken, one for each launch
INCOMPLETE = COUNTERS * COUNTER_BYTES  # in the workspace: the number of the last call with a rest
PIECE = 8  # 16-bit numbers in 16 bytes


class PrepareSizes(NamedTuple):
    """What is told of a problem; a `band` of schedule.py, too."""

    batch: int
    heads: int  # of queries, in a batch
    seqlen_q: int
    seqlen_k: int
    lower: int  # query i sees keys i + lower ... i + upper - 1
    upper: int
    k_group: int  # heads of queries to one of the tensor map's
    v_group: int
    group: int  # and to one of dK and dV
    k_each: int  # 1 if the tensor map has a matrix for each batch, 0 if one for all
    v_each: int
    q_each: int
    do_each: int


class Table(NamedTuple):
    """A list of work, and the tiles that it is about.

    Args:
        start: of the list, in bytes from the workspace's beginning.
        items: how many it has.
        own: rows of the block's own tiles.
        passing: rows of those that pass by.
        together: heads whose passing tiles the L2 cache holds at once.
        pieces: address of the pieces (pieces.py) of lists, of which an item is one; 0 if there are
            no lists.

    """

    start: int
    items: int
    own: int
    passing: int
    together: int
    pieces: int


@cache
def row_threads(value_dim: int) -> int:
    """How many threads share a row: 8 or 16, each of which has one piece or a few."""
    return 8 if value_dim <= 64 else 16


@device_function
def put_work(item, space, table, sizes, keys_are_own):
    """Write what an item of work is, a `Work`, to its place in the table.

    Items go through the tiles of `together` heads: first the longest tiles of all of these, and so
    on.
    """
    own, together = table.own, table.together
    length = sizes.seqlen_k if keys_are_own else sizes.seqlen_q
    group = sizes.group if keys_are_own else 1
    tiles, slots = (length + own - 1) // own, sizes.heads // group
    first_slot = item // (tiles * together) * together
    wide = min(together, sizes.batch * slots - first_slot)
    rest = item - first_slot * tiles
    tile, slot = rest // wide, first_slot + rest % wide
    head, item_heads, part = types.int64(0), types.int64(group), types.int64(-1)
    piece_first, piece_end = types.int64(0), types.int64(0)
    if table.pieces:
        piece = piece_at(table.pieces, item)
        tile, slot = types.int64(piece.line) % tiles, types.int64(piece.line) // tiles
        head, item_heads = types.int64(piece.head), types.int64(piece.heads)
        piece_first, piece_end = types.int64(piece.first), types.int64(piece.end)
        part = types.int64(piece.part)
    b, slot = slot // slots, slot % slots
    if keys_are_own:
        row0 = tile * own
        first, end = query_tiles(row0, sizes, table.passing, own)
    else:
        row0 = (tile if table.pieces else tiles - 1 - tile) * own  # late queries see most keys
        first, end = key_tiles(row0, sizes, own, table.passing)
    if table.pieces:
        first, end = piece_first, piece_end
    h, u32 = slot * group + head, types.uint32
    work = Work(
        u32(b), u32(h), u32(row0), u32(first), u32(end), u32(slot), u32(h // sizes.k_group),
        u32(h // sizes.v_group), u32(b * sizes.k_each), u32(b * sizes.v_each),
        u32(b * sizes.q_each), u32(b * sizes.do_each), u32(item_heads), u32(part + 1), u32(0),
        u32(0),
    )  # fmt: skip
    entry = space + types.uint64(table.start) + types.uint64(item * WORK_BYTES)
    st_global_v4_b32(entry, work[0:4])
    st_global_v4_b32(entry + types.uint64(16), work[4:8])
    st_global_v4_b32(entry + types.uint64(32), work[8:12])
    st_global_v4_b32(entry + types.uint64(48), work[12:16])


@cache
def prepare_kernel(
    precision_name: str, value_dim: int, vectors: bool, additive: bool, has_grad: bool
) -> Any:
    """Numbers of all queries, and the work of both other kernels.

    The numbers lie in the workspace from `rows` on, for each head `padded_q` queries: 16 of L, 16
    of delta, then 16 rests, and so on; at `INCOMPLETE` is the number of this call if a rest is not
    1. A query that saw no key, and those past the last, get L = +inf, with which all their P are 0.
    `vectors`: rows come in whole pieces of 16 bytes.
    """
    numbers, threads = precision(precision_name), row_threads(value_dim)
    storage, load = getattr(types, numbers.storage.name), numbers.load
    at_once = PIECE if vectors else 1
    read, _ = vector_access(at_once)
    of_row, infinity, row_bytes = shift_and_rest(additive, 2), float("inf"), ROW_BYTES
    f32, i64, u32, u64 = types.float32, types.int64, types.uint32, types.uint64
    own_step, own_rows, all_threads = at_once * threads, THREADS // threads, THREADS

    @kernel(THREADS)
    def flash_backward_prepare_hopper(
        out, grad_out, rows_of, grad_logsumexp, out_steps, grad_steps, sizes, workspace, rows,
        call, padded_q, value_dim, key_table, query_table,
    ):  # fmt: skip
        heads, seqlen_q = sizes.heads, sizes.seqlen_q
        space = global_address(workspace)
        # All rows of a block are of one head.
        blocks_of_head = u32(padded_q) // u32(own_rows)
        batch_head = u32(u32(cuda.blockIdx.x) // u32(blocks_of_head))
        first_row = u32(u32(cuda.blockIdx.x) - batch_head * blocks_of_head) * u32(own_rows)
        b = u32(batch_head // u32(heads))
        h = u32(batch_head - b * u32(heads))
        row = i64(first_row) + cuda.threadIdx.x // threads
        lane = cuda.threadIdx.x % threads
        total = f32(0.0)
        if row < seqlen_q:
            x = b * out_steps.batch + h * out_steps.head + row * out_steps.row
            y = b * grad_steps.batch + h * grad_steps.head + row * grad_steps.row
            mine, other = cuda.local.array(at_once, storage), cuda.local.array(at_once, storage)
            for c in range(lane * at_once, value_dim, own_step):
                read(out, x + c, mine)
                read(grad_out, y + c, other)
                for n in range(at_once):
                    total += load(mine[n]) * load(other[n])
        lane_mask = threads // 2
        while lane_mask:
            total += shuffle_xor(total, lane_mask)
            lane_mask //= 2
        if lane == 0:
            shift, rest, number = f32(infinity), f32(1.0), i64(batch_head) * seqlen_q + row
            if row < seqlen_q:
                l = rows_of[2 * number + 1]
                shift, rest = of_row(rows_of[2 * number], l)
                if has_grad:
                    total -= grad_logsumexp[number]
                if l == f32(0.0):
                    total = f32(0.0)
            of_head = space + u64(rows) + u64(batch_head) * u64(row_bytes * padded_q)
            target = of_head + u64(row // 16 * (16 * row_bytes) + row % 16 * 4)
            st_global_f32(target, f32(shift))
            st_global_f32(target + u64(64), f32(total))
            st_global_f32(target + u64(128), f32(rest))
            if rest != f32(1.0):
                st_global_f32(space + u64(INCOMPLETE), f32(call))

        thread, count = (
            i64(cuda.blockIdx.x) * all_threads + cuda.threadIdx.x,
            i64(cuda.gridDim.x) * all_threads,
        )  # fmt: skip
        if thread < COUNTERS:
            st_global_b32(space + u64(COUNTER_BYTES * thread), 0)
        for item in range(thread, key_table.items, count):
            put_work(item, space, key_table, sizes, True)
        for item in range(thread, query_table.items, count):
            put_work(item, space, query_table, sizes, False)

    return flash_backward_prepare_hopper


__all__ = [
    "COUNTERS", "INCOMPLETE", "THREADS", "PrepareSizes", "Table", "prepare_kernel", "row_threads",
]  # fmt: skip
