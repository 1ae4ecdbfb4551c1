"""Softmax and logsumexp of the rows of a matrix, forward and backward.

    softmax:    y = exp(x - max) / sum(exp(x - max)),     dx = y (dy - sum(dy y))
    logsumexp:  l = max + log(sum(exp(x - max))),         dx = dl exp(x - l) / sum(exp(x - l))

The last sum would be 1 but for the rounding of l, which has no room for the logarithm where the
maximum is large.
A row that is -inf throughout has softmax 0 and logsumexp -inf. A mask is added on the way.
"""

from __future__ import annotations

import numpy as np

from .cpu.compiler import njit
from .cpu.rows import KEY, Array, as_rows, run_over_rows
from .cpu.threads import fetch_add
from .cpu.vector_math import exp, row_dot, row_max, row_sum


def forward(x: Array, mask: Array | None = None) -> Array:
    """Softmax along the last dimension of x (..., D), plus mask, which broadcasts to x."""
    rows = as_rows(x)
    out = np.empty_like(rows)
    mask_rows, mask_index = _mask_rows(x, mask)
    run_over_rows(*rows.shape, softmax_worker, rows, mask_rows, mask_index, out)
    return out.reshape(x.shape)


def backward(dy: Array, y: Array) -> Array:
    """dx, given y = softmax(x); all (..., D)."""
    dy_rows, y_rows = as_rows(dy), as_rows(y)
    out = np.empty_like(y_rows)
    run_over_rows(*y_rows.shape, softmax_backward_worker, dy_rows, y_rows, out)
    return out.reshape(y.shape)


def logsumexp_forward(x: Array) -> Array:
    """logsumexp along the last dimension: (..., D) -> (...); inf where an element is, NaN where one
    is NaN.
    """
    top, log_sum = logsumexp_parts(x)
    total: Array = np.add(top, log_sum, out=top)
    return total


def logsumexp_parts(x: Array) -> tuple[Array, Array]:
    """What logsumexp is the sum of, both (...): the maximum, and log(sum(exp(x - max))).

    They are 0 and -inf where all elements are -inf; inf or NaN, and 0, where one is inf.
    """
    rows = as_rows(x)
    top, log_sum = np.empty(len(rows), x.dtype), np.empty(len(rows), x.dtype)
    run_over_rows(*rows.shape, logsumexp_worker, rows, top, log_sum)
    return top.reshape(x.shape[:-1]), log_sum.reshape(x.shape[:-1])


def logsumexp_backward(dl: Array, x: Array, logsumexp: Array) -> Array:
    """dx (..., D), given l = logsumexp(x) and its gradient dl, both (...)."""
    rows = as_rows(x)
    out = np.empty_like(rows)
    dl, logsumexp = (np.array(a, order="C").reshape(-1) for a in (dl, logsumexp))
    run_over_rows(*rows.shape, logsumexp_backward_worker, dl, rows, logsumexp, out)
    return out.reshape(x.shape)


def _mask_rows(x: Array, mask: Array | None) -> tuple[Array, Array]:
    """The different rows of a mask (rows, D), and for each row of x the number of its mask row."""
    if mask is None:
        return np.empty((0, 0), x.dtype), np.empty(0, np.int64)
    last = np.broadcast_to(mask, (*mask.shape[:-1], x.shape[-1]))
    rows = as_rows(last.astype(x.dtype, copy=False))
    numbers = np.arange(len(rows)).reshape(mask.shape[:-1])
    return rows, np.array(np.broadcast_to(numbers, x.shape[:-1]), order="C").reshape(-1)


@njit(nogil=True, cache=True, error_model="numpy")
def softmax_worker(x, mask, mask_index, out, next_row, block, key=KEY):
    """x, out (rows, D); mask (mask rows, D) with mask_index (rows,), or both empty."""
    zero, one = x.dtype.type(0), x.dtype.type(1)
    while True:
        first = fetch_add(next_row, 0, block)
        if first >= len(x):
            return
        for r in range(first, min(first + block, len(x))):
            row, y = x[r], out[r]
            if len(mask_index):
                added = mask[mask_index[r]]
                for j in range(len(y)):
                    y[j] = row[j] + added[j]
                row = y
            m = row_max(row)
            m = m if m > x.dtype.type(-np.inf) else zero  # all -inf: exp(-inf - 0) = 0, not NaN
            for j in range(len(y)):
                y[j] = exp(row[j] - m)
            total = row_sum(y)
            scale = one / total if total != zero else zero
            for j in range(len(y)):
                y[j] *= scale


@njit(nogil=True, cache=True, error_model="numpy")
def softmax_backward_worker(dy, y, out, next_row, block, key=KEY):
    """dx = y (dy - sum(dy y)); all (rows, D)."""
    while True:
        first = fetch_add(next_row, 0, block)
        if first >= len(y):
            return
        for r in range(first, min(first + block, len(y))):
            g, p, dx = dy[r], y[r], out[r]
            dot = row_dot(g, p)
            for j in range(len(dx)):
                dx[j] = p[j] * (g[j] - dot)


@njit(nogil=True, cache=True, error_model="numpy")
def logsumexp_worker(x, top, log_sum, next_row, block, key=KEY):
    """x (rows, D); top and log_sum (rows,), see `logsumexp_parts`."""
    zero = x.dtype.type(0)
    buffer = np.empty(x.shape[1], x.dtype)
    while True:
        first = fetch_add(next_row, 0, block)
        if first >= len(x):
            return
        for r in range(first, min(first + block, len(x))):
            row = x[r]
            m = row_max(row)
            if m == x.dtype.type(np.inf):  # inf - inf is NaN, exp is for numbers up to 0
                top[r], log_sum[r] = infinity_or_nan(row), zero
                continue
            m = m if m > x.dtype.type(-np.inf) else zero
            for j in range(len(buffer)):
                buffer[j] = exp(row[j] - m)
            top[r], log_sum[r] = m, np.log(row_sum(buffer))


@njit(error_model="numpy")
def infinity_or_nan(row):
    """The logsumexp of a row that holds inf: NaN if it holds NaN as well."""
    for x in row:
        if x != x:
            return x
    return row.dtype.type(np.inf)


@njit(nogil=True, cache=True, error_model="numpy")
def logsumexp_backward_worker(dl, x, logsumexp, out, next_row, block, key=KEY):
    """dx = dl exp(x - l) / sum(exp(x - l)); x, out (rows, D), dl and l (rows,). A row of l = -inf
    has gradient 0; where l is inf nothing is divided.
    """
    zero, one = x.dtype.type(0), x.dtype.type(1)
    while True:
        first = fetch_add(next_row, 0, block)
        if first >= len(x):
            return
        for r in range(first, min(first + block, len(x))):
            row, dx, g, l = x[r], out[r], dl[r], logsumexp[r]
            finite = np.isfinite(l)
            l = zero if l == x.dtype.type(-np.inf) else l
            for j in range(len(dx)):
                dx[j] = exp(row[j] - l)
            inverse = one / row_sum(dx) if finite else one
            for j in range(len(dx)):
                dx[j] = g * (dx[j] * inverse)
