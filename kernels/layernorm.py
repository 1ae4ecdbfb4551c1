"""Layer norm of the rows of a matrix (Ba, Kiros & Hinton 2016, equation 4), forward and backward.

xhat = (x - mean) / sqrt(var + eps),     y = gamma xhat + beta
dx = (g - mean(g) - xhat mean(g xhat)) / sqrt(var + eps),     g = gamma dy
dgamma = sum over rows of dy xhat,     dbeta = sum over rows of dy
"""

from __future__ import annotations

import math

import numpy as np

from .cpu.compiler import njit
from .cpu.rows import KEY, Array, as_rows, block_rows, run_over_rows, writeable
from .cpu.threads import fetch_add
from .cpu.vector_math import row_dot, row_square_distance, row_sum


def forward(x: Array, gamma: Array, beta: Array, eps: float) -> tuple[Array, Array, Array]:
    """(y, var, mean) of x (..., D), gamma and beta (D,); var and mean (rows,)."""
    rows = as_rows(x)
    y = np.empty_like(rows)
    var, mean = np.empty(len(rows), x.dtype), np.empty(len(rows), x.dtype)
    run_over_rows(
        *rows.shape, layernorm_worker,
        rows, writeable(gamma), writeable(beta), x.dtype.type(eps), y, var, mean,
    )  # fmt: skip
    return y.reshape(x.shape), var, mean


def backward(
    dy: Array, x: Array, gamma: Array, var: Array, mean: Array, eps: float
) -> tuple[Array, Array, Array]:
    """(dx, dgamma, dbeta), given what `forward` took and gave."""
    rows = as_rows(x)
    dx = np.empty_like(rows)
    blocks = math.ceil(len(rows) / block_rows(rows.shape[1]))
    sums = np.zeros((blocks, 2, rows.shape[1]), x.dtype)  # of each block: dgamma, dbeta
    run_over_rows(
        *rows.shape, layernorm_backward_worker,
        as_rows(dy), rows, writeable(gamma), writeable(var), writeable(mean), x.dtype.type(eps),
        dx, sums,
    )  # fmt: skip
    dgamma, dbeta = sums.sum(0)
    return dx.reshape(x.shape), dgamma, dbeta


@njit(nogil=True, cache=True, error_model="numpy")
def layernorm_worker(x, gamma, beta, eps, y, var, mean, next_row, block, key=KEY):
    """x, y (rows, D); gamma, beta (D,); var, mean (rows,)."""
    one = x.dtype.type(1)
    size = x.dtype.type(x.shape[1])
    while True:
        first = fetch_add(next_row, 0, block)
        if first >= len(x):
            return
        for r in range(first, min(first + block, len(x))):
            row, out = x[r], y[r]
            mean[r] = centre = row_sum(row) / size
            var[r] = variance = row_square_distance(row, centre) / size
            rstd = one / np.sqrt(variance + eps)
            for j in range(len(out)):
                out[j] = (row[j] - centre) * rstd * gamma[j] + beta[j]


@njit(nogil=True, cache=True, error_model="numpy")
def layernorm_backward_worker(dy, x, gamma, var, mean, eps, dx, sums, next_row, block, key=KEY):
    """dy, x, dx (rows, D); gamma (D,); var, mean (rows,); sums (blocks, 2, D)."""
    one = x.dtype.type(1)
    size = x.dtype.type(x.shape[1])
    g = np.empty(x.shape[1], x.dtype)
    xhat = np.empty(x.shape[1], x.dtype)
    while True:
        first = fetch_add(next_row, 0, block)
        if first >= len(x):
            return
        dgamma, dbeta = sums[first // block, 0], sums[first // block, 1]
        for r in range(first, min(first + block, len(x))):
            row, grad, out = x[r], dy[r], dx[r]
            centre, rstd = mean[r], one / np.sqrt(var[r] + eps)
            for j in range(len(g)):
                g[j] = gamma[j] * grad[j]
                xhat[j] = (row[j] - centre) * rstd
            for j in range(len(g)):
                dgamma[j] += grad[j] * xhat[j]
                dbeta[j] += grad[j]
            mean_g, mean_g_xhat = row_sum(g) / size, row_dot(g, xhat) / size
            for j in range(len(g)):
                out[j] = (g[j] - mean_g - xhat[j] * mean_g_xhat) * rstd
