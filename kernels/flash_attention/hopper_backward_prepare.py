"""What the Hopper backward pass does first: delta, and the list of work of the other kernels.

    delta = rowsum(dO * O) - dL

It reads the output and its gradient once, 16 bytes to a thread at a time, and is as fast as memory.
"""

from __future__ import annotations

from functools import cache
from typing import Any

from ..ptx import global_address, st_global_b32, st_global_f32, st_global_v4_b32
from ..runtime import (
    NEGATIVE_INFINITY,
    cuda,
    device_function,
    kernel,
    precision,
    shuffle_xor,
    types,
)
from ..vectors_cuda import vector_access
from .cuda_tiles import tile_range
from .hopper_backward_pipeline import COUNTER_BYTES, WORK_BYTES

THREADS = 256
COUNTERS = 4  # of items taken, one for each launch
PIECE = 8  # 16-bit numbers in 16 bytes


@cache
def row_threads(value_dim: int) -> int:
    """How many threads share a row: 8 or 16, each of which has one piece or a few."""
    return 8 if value_dim <= 64 else 16


@device_function
def put_work(item, table, own, passing, sizes, together, keys_are_own):
    """Write what an item of work is, a `Work`, to its place in the table.

    Items go through the tiles of `together` heads, whose passing tiles the L2 cache holds at once:
    first the longest tiles of all of these, and so on.
    """
    batch, heads, seqlen_q, seqlen_k, lower, upper, k_group, v_group, group = sizes
    length, other_length = (seqlen_k, seqlen_q) if keys_are_own else (seqlen_q, seqlen_k)
    if not keys_are_own:
        group = 1
    tiles, slots = (length + own - 1) // own, heads // group
    first_slot = item // (tiles * together) * together
    wide = min(together, batch * slots - first_slot)
    rest = item - first_slot * tiles
    tile, slot = rest // wide, first_slot + rest % wide
    b, slot = slot // slots, slot % slots
    if keys_are_own:
        # Query i sees key j iff i + lower <= j < i + upper: j - upper + 1 <= i <= j - lower.
        lower, upper = 1 - upper, 1 - lower
    else:
        tile = tiles - 1 - tile  # late queries see the most keys
    row0 = tile * own
    last = min(row0 + own, length) - 1
    first, end = tile_range(row0, last, lower, upper, other_length, passing)
    h, u32 = slot * group, types.uint32
    entry = table + types.uint64(item * WORK_BYTES)
    st_global_v4_b32(entry, (u32(b), u32(h), u32(row0), u32(first)))
    st_global_v4_b32(
        entry + types.uint64(16), (u32(end), u32(slot), u32(h // k_group), u32(h // v_group))
    )


@cache
def prepare_kernel(precision_name: str, value_dim: int, vectors: bool, has_grad: bool) -> Any:
    """Delta of all queries and their logsumexp in units of log 2; work of both other kernels.

    A row that saw no key, and those that the workspace has past the last, get L = +inf, with which
    all their P are 0. `vectors`: rows come in whole pieces of 16 bytes.
    """
    numbers, threads = precision(precision_name), row_threads(value_dim)
    storage, load = getattr(types, numbers.storage.name), numbers.load
    at_once = PIECE if vectors else 1
    read, _ = vector_access(at_once)
    nothing, infinity, log2_e = NEGATIVE_INFINITY, float("inf"), 1.4426950408889634
    f32, own_step, all_threads = types.float32, at_once * threads, THREADS

    @kernel(THREADS)
    def flash_backward_prepare_hopper(
        out, grad_out, logsumexp, grad_logsumexp, out_steps, grad_steps, sizes, workspace, rows,
        apart, padded_q, value_dim, tables, blocks, together,
    ):  # fmt: skip
        thread = types.int64(cuda.blockIdx.x) * all_threads + cuda.threadIdx.x
        batch, heads, seqlen_q = sizes[0], sizes[1], sizes[2]
        space = global_address(workspace)
        if thread < COUNTERS:
            st_global_b32(space + types.uint64(COUNTER_BYTES * thread), 0)
        count = types.int64(cuda.gridDim.x) * all_threads
        for item in range(thread, tables[1], count):
            put_work(
                item,
                space + types.uint64(tables[0]),
                blocks[0],
                blocks[1],
                sizes,
                together[0],
                True,
            )
        for item in range(thread, tables[3], count):
            put_work(
                item,
                space + types.uint64(tables[2]),
                blocks[2],
                blocks[3],
                sizes,
                together[1],
                False,
            )
        place = thread // threads
        batch_head, row = place // padded_q, place % padded_q
        inside = batch_head < batch * heads and row < seqlen_q
        total = f32(0.0)
        if inside:
            b, h = batch_head // heads, batch_head % heads
            x = b * out_steps[0] + h * out_steps[1] + row * out_steps[2]
            y = b * grad_steps[0] + h * grad_steps[1] + row * grad_steps[2]
            mine, other = cuda.local.array(at_once, storage), cuda.local.array(at_once, storage)
            for c in range(thread % threads * at_once, value_dim, own_step):
                read(out, x + c, mine)
                read(grad_out, y + c, other)
                for n in range(at_once):
                    total += load(mine[n]) * load(other[n])
        lane_mask = threads // 2
        while lane_mask:
            total += shuffle_xor(total, lane_mask)
            lane_mask //= 2
        if thread % threads == 0 and batch_head < batch * heads:
            shift = f32(infinity)
            number = batch_head * seqlen_q + row
            if inside and logsumexp[number] != nothing:
                if has_grad:
                    total -= grad_logsumexp[number]
                shift = logsumexp[number] * f32(log2_e)
            else:
                total = f32(0.0)
            target = space + types.uint64(rows + 4 * place)
            st_global_f32(target, f32(shift))
            st_global_f32(target + types.uint64(apart), f32(total))

    return flash_backward_prepare_hopper


__all__ = ["COUNTERS", "THREADS", "prepare_kernel", "row_threads"]
