"""What FlashAttention's backward pass does first: delta, and what makes P of a score.

    delta = rowsum(dO * O) - dL                             dL, the gradient of the logsumexp
    P = exp(S - m) / l = rest * exp(S - L)                  L = m + log(l)

("FlashAttention-2", Dao, 2023, algorithm 2, line 4.) With L alone P costs one instruction less for
each score. But L is rounded: where scores are large it has no room for log(l), and P of a row with
one key that counts would not be 1. `rest` puts that right. It is 1 in all rows but those, which
hardly anyone has, and the products that it takes are only made if there is such a row.

A few threads share a row and read 16 bytes at a time: it is as fast as memory.
"""

from __future__ import annotations

import itertools
import math
from functools import cache
from typing import Any

from ..ptx import global_address, st_global_f32
from ..runtime import WARP, cuda, device_function, kernel, precision, shuffle_xor, types
from ..vectors_cuda import vector_access
from .cuda_registers import exp2_function
from .cuda_tiles import LOG2_E
from .mma_tiles import Kind

DELTA_THREADS = 128
# The L up to which its rounding, of 2**-24 L, is less than that of P, by the bytes of an element.
LARGE = {2: 1024.0, 4: 16.0}


# ----- P from one number of a row -----

_calls = itertools.count(1)


def next_call() -> int:
    """A number that says of which backward pass something in the workspace is: that it has a row
    with a rest. What an earlier pass left there, or chance, does no harm: a rest of 1 changes no
    bit.
    """
    return next(_calls) % (1 << 24)  # exact as a float32


@cache
def shift_and_rest(additive: bool, itemsize: int) -> Any:
    """Device function `(m, l)`: L and rest, both in units of log 2 but with an additive mask.

    A row that saw no key gets L = +inf, with which all its P are 0, one with an infinite score NaN.
    """
    exp2, f32 = exp2_function("float32"), types.float32
    unit, large, infinity = (1.0 if additive else LOG2_E), LARGE[itemsize], float("inf")

    @device_function
    def of_row(m, l):
        if l == f32(0.0):
            return f32(infinity), f32(1.0)
        if not l < f32(infinity):
            return l - l, f32(1.0)
        shift = m + f32(f32(math.log(l)) * f32(unit))
        if abs(shift) < f32(large):
            return shift, f32(1.0)
        return shift, exp2((shift - m) * f32(LOG2_E / unit)) / l

    return of_row


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
        out_place = b * out_steps[0] + h * out_steps[1] + r * out_steps[2]
        grad_place = b * grad_steps[0] + h * grad_steps[1] + r * grad_steps[2]
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


__all__ = ["DELTA_THREADS", "delta_kernel", "delta_team", "next_call", "shift_and_rest"]
