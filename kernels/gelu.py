"""GELU in its tanh form (Hendrycks & Gimpel 2016, section 2), forward and backward.

    y = x/2 (1 + tanh(u)),     u = sqrt(2/pi) (x + 0.044715 x^3)

1 + tanh(u) = 2 s with the logistic function s = 1 / (1 + exp(-2u)), which loses no digits where u
is negative:

    y = x s,     dy/dx = s + x s (1 - s) 2 du/dx
"""

from __future__ import annotations

import math

import numpy as np

from .cpu.compiler import njit
from .cpu.rows import KEY, Array, run_over_rows, writeable
from .cpu.threads import fetch_add
from .cpu.vector_math import exp

TWO_SQRT_2_OVER_PI = 2 * math.sqrt(2 / math.pi)
CUBIC = 0.044715


def forward(x: Array) -> Array:
    """gelu(x), any shape."""
    flat = writeable(x).reshape(-1)
    y = np.empty_like(flat)
    run_over_rows(len(flat), 1, gelu_worker, flat, y)
    return y.reshape(x.shape)


def backward(dy: Array, x: Array) -> Array:
    """dx, of the shape of both."""
    flat = writeable(x).reshape(-1)
    dx = np.empty_like(flat)
    run_over_rows(len(flat), 1, gelu_backward_worker, writeable(dy).reshape(-1), flat, dx)
    return dx.reshape(x.shape)


@njit(nogil=True, cache=True, error_model="numpy")
def gelu_worker(x, y, next_row, block, key=KEY):
    """x, y (n,)."""
    one = x.dtype.type(1)
    cubic, scale = x.dtype.type(CUBIC), x.dtype.type(TWO_SQRT_2_OVER_PI)
    while True:
        first = fetch_add(next_row, 0, block)
        if first >= len(x):
            return
        source, out = x[first : first + block], y[first : first + block]
        for j in range(len(out)):
            v = source[j]
            z = scale * (v + cubic * v * v * v)  # 2u
            t = exp(-abs(z))  # of a number <= 0: never overflows
            out[j] = v * (one if z > 0 else t) / (one + t)


@njit(nogil=True, cache=True, error_model="numpy")
def gelu_backward_worker(dy, x, dx, next_row, block, key=KEY):
    """dy, x, dx (n,)."""
    one, three, most = x.dtype.type(1), x.dtype.type(3), x.dtype.type(1000)
    cubic, scale = x.dtype.type(CUBIC), x.dtype.type(TWO_SQRT_2_OVER_PI)
    while True:
        first = fetch_add(next_row, 0, block)
        if first >= len(x):
            return
        source, grad = x[first : first + block], dy[first : first + block]
        out = dx[first : first + block]
        for j in range(len(out)):
            v = source[j]
            square = cubic * min(v * v, most)  # where t is 0 all factors beside it are finite
            z = scale * v * (one + square)
            t = exp(-abs(z))
            r = one / (one + t)
            s = (one if z > 0 else t) * r
            dz = scale * (one + three * square)  # 2 du/dx
            out[j] = grad[j] * (s + (v * t) * (dz * (r * r)))  # s (1 - s) = t / (1 + t)^2
