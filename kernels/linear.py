"""A linear layer, forward and backward: matrix products by BLAS, the bias added in place.

y = x W + b,     dx = dy W^T,     dW = x^T dy,     db = sum over rows of dy
"""

from __future__ import annotations

import numpy as np
from numba import njit

from .rows import KEY, Array, as_rows, run_over_rows, writeable
from .threads import fetch_add


def forward(x: Array, weight: Array, bias: Array | None) -> Array:
    """x (..., in), weight (in, out), bias (out,) or None -> (..., out)."""
    y = as_rows(x) @ weight
    if bias is not None:
        run_over_rows(*y.shape, add_bias_worker, y, writeable(bias))
    return y.reshape(*x.shape[:-1], weight.shape[1])


def backward(
    dy: Array, x: Array, weight: Array, needs: tuple[bool, bool, bool]
) -> tuple[Array | None, Array | None, Array | None]:
    """(dx, dweight, dbias), None for each that is not needed."""
    rows = as_rows(dy)
    return (
        (rows @ weight.T).reshape(x.shape) if needs[0] else None,
        as_rows(x).T @ rows if needs[1] else None,
        np.ones(len(rows), rows.dtype) @ rows if needs[2] else None,
    )


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
