"""The exponential function and sums over a row, as LLVM vectorises them on every machine.

numba calls the C library for `exp`, one element at a time, and adds up rows likewise. This `exp` is
a polynomial without branches, so that a loop over it becomes vector code; the sums of a row are
written with vectors, in a fixed order: the same input gives the same bits.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir

from . import plain, simd
from .compiler import intrinsic, njit
from .simd import lanes, load, max_of, maximum, splat, sum_of
from .vector_target import TARGET, VectorTarget

# log2(e) in two parts: the number nearest to it, and what is missing.
_LOG2_E = {
    32: (1.44269502162933349609375, 1.92596299112661746887e-8),
    64: (1.442695040888963387004650940070860087871551513671875, 2.03552737409310331e-17),
}
_LN_2 = 0.693147180559945309


def _exp(b: ir.IRBuilder, x: Any, target: VectorTarget) -> Any:
    """e**x = 2**n * 2**f, where n is the integer nearest to x * log2(e) and f the rest."""
    value_type = x.type
    double = isinstance(simd.element_of(value_type), ir.DoubleType)
    bits, mantissa_bits, bias = (64, 52, 1023) if double else (32, 23, 127)
    bits_type: ir.Type = ir.IntType(bits)
    if isinstance(value_type, ir.VectorType):
        bits_type = ir.VectorType(bits_type, value_type.count)
    # Where n is -bias, 2**n is encoded as 0. (A NaN is not below: it stays.)
    smallest = simd.constant_of(value_type, -bias * _LN_2)
    x = b.select(b.fcmp_ordered("<", x, smallest), smallest, x)
    high, low = (simd.constant_of(value_type, part) for part in _LOG2_E[bits])
    # Adding 1.5 * 2**mantissa_bits rounds to an integer, which is then in the lowest bits; with the
    # bias added they are 2**n's exponent.
    magic = simd.constant_of(value_type, 1.5 * 2.0**mantissa_bits + bias)
    shifted = b.fadd(b.fmul(x, high), magic)
    minus_n = b.fsub(magic, shifted)
    # f = x * log2(e) - n, without the rounding error of the product, which grows with x
    f = simd.fma(b, x, low, simd.fma(b, x, high, minus_n, target), target)
    exponent = b.shl(b.bitcast(shifted, bits_type), simd.constant_of(bits_type, mantissa_bits))
    coefficients = simd.EXP2_FLOAT64 if double else simd.EXP2_FLOAT32
    power = simd.constant_of(value_type, coefficients[-1])
    for coefficient in reversed(coefficients[:-1]):
        power = simd.fma(b, power, f, simd.constant_of(value_type, coefficient), target)
    return b.fmul(power, b.bitcast(exponent, value_type))


@intrinsic(plain.exp)
def exp(typing_context: Any, x: Any) -> Any:
    """`exp(x)`: e**x for x <= 0 (a little above is accurate too), of a vector or a scalar.

    Exact at 0; 0 where the result is below the normal numbers, so at -inf; NaN stays NaN.
    """
    return x(x), lambda context, b, sig, args: _exp(b, args[0], TARGET)


# --------------------------------------------------------------------------- a row, (D,)


@njit(error_model="numpy")
def row_max(row):
    """The largest element, NaN passed over; -inf for an empty row."""
    width = lanes(row)
    stop = len(row) // width * width
    largest = row.dtype.type(-np.inf)
    if stop:
        m = splat(row, largest)
        for j in range(0, stop, width):
            m = maximum(load(row, j), m)
        largest = max_of(m)
    for j in range(stop, len(row)):
        largest = maximum(row[j], largest)
    return largest


@njit(error_model="numpy")
def row_sum(row):
    """The sum of a row."""
    width = lanes(row)
    stop = len(row) // width * width
    total = splat(row, row.dtype.type(0))
    for j in range(0, stop, width):
        total = total + load(row, j)
    result = sum_of(total)
    for j in range(stop, len(row)):
        result += row[j]
    return result


@njit(error_model="numpy")
def row_dot(x, y):
    """The sum of the products of two rows."""
    width = lanes(x)
    stop = len(x) // width * width
    total = splat(x, x.dtype.type(0))
    for j in range(0, stop, width):
        total = total + load(x, j) * load(y, j)
    result = sum_of(total)
    for j in range(stop, len(x)):
        result += x[j] * y[j]
    return result


@njit(error_model="numpy")
def row_square_distance(row, centre):
    """The sum of the squared distances to `centre`."""
    width = lanes(row)
    stop = len(row) // width * width
    total = splat(row, row.dtype.type(0))
    for j in range(0, stop, width):
        d = load(row, j) - centre
        total = total + d * d
    result = sum_of(total)
    for j in range(stop, len(row)):
        result += (row[j] - centre) * (row[j] - centre)
    return result
