"""The softmax's arithmetic that GPU families share: powers of two, and what is kept of a row.

Scores are in units of log 2, for which a GPU has an instruction; with an additive mask, whose
numbers may be as large as numbers get, they stay in natural units until the exponential.

    P = exp(S - m) / l = rest * exp(S - L)                  L = m + log(l)

("FlashAttention-2", Dao, 2023, algorithms 1 and 2.) With L alone P costs one instruction less for
each score. But L is rounded: where scores are large it has no room for log(l), and P of a row with
one key that counts would not be 1. `rest` puts that right. It is 1 in all rows but those, which
hardly anyone has, and the products that it takes are only made if there is such a row.
"""

from __future__ import annotations

import itertools
import math
from functools import cache
from typing import Any

import numpy as np
from llvmlite import ir

from ..gpu.runtime import SIMULATED, device_function, precision, types
from .scores import LOG2_E, unit_of

if not SIMULATED:
    from ..gpu.runtime import intrinsic

# The L up to which its rounding, of 2**-24 L, is less than that of P, by the bytes of an element.
LARGE = {2: 1024.0, 4: 16.0}


# ----- powers of two -----


def _exp2(x):
    return np.exp2(x) if SIMULATED else math.exp2(x)


@cache
def exp2_function(real_name: str) -> Any:
    """Device function x -> 2**x.

    For float32 one instruction, right to 2 ulp, with 0 where the result is below the normal
    numbers.
    """
    if SIMULATED or real_name != "float32":
        return device_function(_exp2)
    return _exp2_float32


if not SIMULATED:

    @intrinsic
    def _exp2_float32(typingctx, x):
        def codegen(context, builder, signature, args):
            kind = ir.FunctionType(ir.FloatType(), [ir.FloatType()])
            return builder.call(ir.InlineAsm(kind, "ex2.approx.ftz.f32 $0, $1;", "=f,f"), args)

        return types.float32(types.float32), codegen


# ----- rows -----


@cache
def reciprocal_of(precision_name: str) -> Any:
    """Device function `(l)`: 1 / l; 0 for a row that saw no key, NaN for one with an infinite
    score, which has no softmax.
    """
    real = precision(precision_name).real

    @device_function
    def reciprocal(l):
        return real(0.0) if l == real(0.0) else real(1.0) / l + (l - l)

    return reciprocal


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
    unit, large, infinity = unit_of(additive), LARGE[itemsize], float("inf")

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


__all__ = ["exp2_function", "next_call", "reciprocal_of", "shift_and_rest"]
