"""What FlashAttention's backward pass does first: delta, and what makes P of a score.

    delta = rowsum(dO * O) - dL                             dL, the gradient of the logsumexp

("FlashAttention-2", Dao, 2023, algorithm 2, line 4.) L and rest of a row, which make P, are told in
softmax.py.

A few threads share a row and read 16 bytes at a time: it is as fast as memory.
"""

from __future__ import annotations

from functools import cache
from typing import Any

from ...gpu.ptx import global_address, st_global_f32
from ...gpu.runtime import (
    WARP,
    cuda,
    kernel,
    precision,
    shuffle_xor,
    types,
)
from ...gpu.vectors import vector_access
from ..softmax import (
    shift_and_rest,
)
from .tiles import Kind

DELTA_THREADS = 128
# ----- the kernel -----


def delta_team(kind: Kind) -> tuple[int, int]:
    """How many threads share a row of the output, a power of two, and how many of its numbers each
    reads at once.
    """
    at_once = kind.lanes if kind.value_dim % kind.lanes == 0 else 1
    pieces = max(-(-kind.value_dim // at_once), 1)
    return min(1 << (pieces - 1).bit_length(), WARP), at_once


@cache
def delta_kernel(kind: Kind, has_grad_logsumexp: bool) -> Any:
    """Of each row L, delta and rest: see `shift_and_rest`. The first element of `rest` is no row's:
    it becomes the number of this call if one of them is not 1.
    """
    team, at_once = delta_team(kind)
    load, storage = precision(kind.precision).load, precision(kind.precision).storage.name
    element, value_dim = getattr(types, storage), kind.value_dim
    rows_of_block, step = DELTA_THREADS // team, team * at_once
    halvings = team.bit_length() - 1  # 0 where a thread has a row: numba takes no empty tuple
    (read, _), of_row = vector_access(at_once), shift_and_rest(kind.additive, kind.itemsize)

    @kernel(DELTA_THREADS)
    def flash_delta_mma(
        out, grad_out, rows_of, grad_logsumexp, delta, shift, rest, call, out_steps, grad_steps,
        heads, seqlen_q, count,
    ):  # fmt: skip
        x, y = cuda.local.array(at_once, element), cuda.local.array(at_once, element)
        member = cuda.threadIdx.x % team
        number = types.int64(cuda.blockIdx.x) * rows_of_block + cuda.threadIdx.x // team
        row = min(number, count - 1)  # all threads take part in the sums
        batch_head = row // seqlen_q
        b, h, r = batch_head // heads, batch_head % heads, row % seqlen_q
        out_place = b * out_steps.batch + h * out_steps.head + r * out_steps.row
        grad_place = b * grad_steps.batch + h * grad_steps.head + r * grad_steps.row
        total = types.float32(0.0)
        for first in range(0, value_dim, step):
            column = first + member * at_once
            if column < value_dim:
                read(out, out_place + column, x)
                read(grad_out, grad_place + column, y)
                for n in range(at_once):
                    total += load(x[n]) * load(y[n])
        for bit in range(halvings):
            total += shuffle_xor(total, 1 << bit)
        if number == row and member == 0:
            if has_grad_logsumexp:
                total -= grad_logsumexp[row]
            l = rows_of[2 * row + 1]
            delta[row] = types.float32(0.0) if l == types.float32(0.0) else total
            shift[row], own = of_row(rows_of[2 * row], l)
            rest[row + 1] = own
            if own != types.float32(1.0):
                st_global_f32(global_address(rest), types.float32(call))

    return flash_delta_mma


__all__ = ["DELTA_THREADS", "delta_kernel", "delta_team"]
