"""What the pieces of a long list gave, put together in the order of the list (pieces.py).

The forward pass leaves of each part O, not yet divided by l, with m and l of its rows:

    m = max(m_i),  l = sum(2**(m_i - m) l_i),  O = sum(2**(m_i - m) O_i) / l

The backward pass leaves sums of gradients, which are added up. A warp computes a row.
"""

from __future__ import annotations

import math
from functools import cache
from typing import Any, NamedTuple

from ...gpu.ptx import ex2_approx_ftz_f32, ld_global_nc_b32
from ...gpu.runtime import (
    NEGATIVE_INFINITY,
    cuda,
    device_function,
    kernel,
    precision,
    types,
)
from ..scores import LOG2_E
from .tiles import Kind

THREADS = 128
WARPS = THREADS // 32  # rows of a block


class Splits(NamedTuple):
    """Which lines are cut, and where their parts are.

    Args:
        table: address of the line, the first part and the number of parts of each, int32.
        parts: in the workspace, in float32 from its beginning: of the first part.
        rows: likewise, of m and l.
        size: float32 of a part.
        of_head: tiles of a head.

    """

    table: int
    parts: int
    rows: int
    size: int
    of_head: int


@device_function
def split_at(splits, number):
    """Line, first part and number of parts."""
    address = types.uint64(splits.table + 12 * types.int64(number))
    return (
        types.int64(ld_global_nc_b32(address)),
        types.int64(ld_global_nc_b32(address + types.uint64(4))),
        types.int64(ld_global_nc_b32(address + types.uint64(8))),
    )


@cache
def merge_kernel(kind: Kind, block_m: int) -> Any:
    """Output, logsumexp, m and l of tiles of `block_m` queries whose lists were cut."""
    to_storage, warps = precision(kind.precision).store, WARPS
    exponent_unit = LOG2_E if kind.additive else 1.0
    of_m, f32, nothing = 1.0 / kind.unit, types.float32, NEGATIVE_INFINITY
    blocks_of_tile = -(-block_m // WARPS)

    @kernel(THREADS)
    def hopper_merge(
        workspace, splits, out, logsumexp, rows_of, out_steps, heads, seqlen_q, value_dim, keep
    ):  # fmt: skip
        number, block = cuda.blockIdx.x // blocks_of_tile, cuda.blockIdx.x % blocks_of_tile
        line, first, parts = split_at(splits, number)
        batch_head, tile = line // splits.of_head, line % splits.of_head
        own, lane = block * warps + cuda.threadIdx.x // 32, cuda.threadIdx.x % 32
        row = tile * block_m + own
        if own >= block_m or row >= seqlen_q:
            return
        place = splits.rows + 2 * (first * block_m + own)
        m = f32(nothing)
        for n in range(parts):
            m = max(m, workspace[place + 2 * n * block_m])
        shift = f32(0.0) if m == f32(nothing) else m
        l = f32(0.0)
        for n in range(parts):
            at = place + 2 * n * block_m
            weight = ex2_approx_ftz_f32((workspace[at] - shift) * f32(exponent_unit))
            l += weight * workspace[at + 1]
        factor = f32(0.0) if l == f32(0.0) else f32(keep) / l + (l - l)
        start = splits.parts + first * splits.size + own * value_dim
        target = (
            batch_head // heads * out_steps.batch + batch_head % heads * out_steps.head
            + row * out_steps.row
        )  # fmt: skip
        for column in range(lane, value_dim, 32):
            total = f32(0.0)
            for n in range(parts):
                change = (workspace[place + 2 * n * block_m] - shift) * f32(exponent_unit)
                weight = ex2_approx_ftz_f32(change)
                total += weight * workspace[start + n * splits.size + column]
            out[target + column] = to_storage(total * factor)
        if lane == 0:
            at = batch_head * seqlen_q + row
            rows_of[2 * at], rows_of[2 * at + 1] = m, l
            logarithm = f32(nothing) if l == f32(0.0) else f32(math.log(l))
            logsumexp[at] = m * f32(of_m) + logarithm

    return hopper_merge


@cache
def sum_kernel(precision_name: str, rows: int) -> Any:
    """Gradients of tiles of `rows` rows whose lists were cut."""
    to_storage, warps = precision(precision_name).store, WARPS
    blocks_of_tile, f32 = -(-rows // WARPS), types.float32

    @kernel(THREADS)
    def hopper_sum(workspace, splits, out, out_steps, slots, length, width, factor):
        number, block = cuda.blockIdx.x // blocks_of_tile, cuda.blockIdx.x % blocks_of_tile
        line, first, parts = split_at(splits, number)
        slot, tile = line // splits.of_head, line % splits.of_head
        own, lane = block * warps + cuda.threadIdx.x // 32, cuda.threadIdx.x % 32
        row = tile * rows + own
        if own >= rows or row >= length:
            return
        start = splits.parts + first * splits.size + own * width
        target = (
            slot // slots * out_steps.batch + slot % slots * out_steps.head + row * out_steps.row
        )
        for column in range(lane, width, 32):
            total = f32(0.0)
            for n in range(parts):
                total += workspace[start + n * splits.size + column]
            out[target + column] = to_storage(total * f32(factor))

    return hopper_sum


__all__ = ["THREADS", "WARPS", "Splits", "merge_kernel", "sum_kernel"]
