"""A linear layer, forward and backward: matrix products by BLAS, the bias added in place.

y = x W + b,     dx = dy W^T,     dW = x^T dy,     db = sum over rows of dy
"""

from __future__ import annotations

import math

import numpy as np

from .cpu.blas import product
from .cpu.compiler import njit
from .cpu.rows import KEY, Array, as_rows, block_rows, run_over_rows, writeable
from .cpu.threads import fetch_add


def forward(x: Array, weight: Array, bias: Array | None) -> Array:
    """x (..., in), weight (in, out), bias (out,) or None -> (..., out)."""
    y = product(as_rows(x), weight)
    if bias is not None:
        run_over_rows(*y.shape, add_bias_worker, y, writeable(bias))
    return y.reshape(*x.shape[:-1], weight.shape[1])


def backward(
    dy: Array, x: Array, weight: Array, needs: tuple[bool, bool, bool]
) -> tuple[Array | None, Array | None, Array | None]:
    """(dx, dweight, dbias), None for each that is not needed."""
    rows = as_rows(dy)
    return (
        product(rows, weight.T).reshape(x.shape) if needs[0] else None,
        product(as_rows(x).T, rows) if needs[1] else None,
        column_sums(rows) if needs[2] else None,
    )


def column_sums(rows: Array) -> Array:
    """(rows, D) -> (D,): a sum for each block of rows, then the sum of those."""
    blocks = math.ceil(len(rows) / block_rows(rows.shape[1]))
    sums = np.zeros((blocks, rows.shape[1]), rows.dtype)
    run_over_rows(*rows.shape, column_sums_worker, rows, sums)
    total: Array = sums.sum(0)
    return total


@njit(nogil=True, cache=True, error_model="numpy")
def column_sums_worker(x, sums, next_row, block, key=KEY):
    """x (rows, D), sums (blocks, D)."""
    while True:
        first = fetch_add(next_row, 0, block)
        if first >= len(x):
            return
        total = sums[first // block]
        for r in range(first, min(first + block, len(x))):
            row = x[r]
            for j in range(len(total)):
                total[j] += row[j]


@njit(nogil=True, cache=True, error_model="numpy")
def add_bias_worker(y, bias, next_row, block, key=KEY):
    """y (rows, out) += bias (out,)."""
    while True:
        first = fetch_add(next_row, 0, block)
        if first >= len(y):
            return
        for r in range(first, min(first + block, len(y))):
            row = y[r]
            for j in range(len(row)):
                row[j] += bias[j]
