"""GELU in its tanh form (Hendrycks & Gimpel 2016, section 2) on a GPU, forward and backward.

    y = x/2 (1 + tanh(u)),     u = sqrt(2/pi) (x + 0.044715 x^3)

1 + tanh(u) = 2 s with the logistic function s = 1 / (1 + exp(-2u)), which loses no digits where u
is negative:

    y = x s,     dy/dx = s + x s (1 - s) 2 du/dx
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import cache
from typing import Any

from .approximate_cuda import exponential, reciprocal
from .flat_cuda import COUNT, THREADS, flat_access, flat_blocks, flat_first
from .runtime import Instance, cuda, device_function, kernel, launch, precision, types

TWO_SQRT_2_OVER_PI = 2 * math.sqrt(2 / math.pi)
CUBIC = 0.044715


def forward(precision_name: str, x: Any, y: Any, size: int) -> None:
    """y = gelu(x), both (size,)."""
    if size:
        launch(forward_kernel(precision_name), flat_blocks(size), THREADS, x, y, size)


def backward(precision_name: str, dy: Any, x: Any, dx: Any, size: int) -> None:
    """dx, given the gradient dy of gelu(x), all (size,)."""
    if size:
        launch(backward_kernel(precision_name), flat_blocks(size), THREADS, dy, x, dx, size)


@cache
def _logistic(precision_name: str) -> Any:
    """Device function x -> t, r, s: t = exp(-|2u|), r = 1 / (1 + t), s = r or t r."""
    real = precision(precision_name).real
    exp, invert = exponential(precision_name), reciprocal(precision_name)
    cubic, scale, one = real(CUBIC), real(TWO_SQRT_2_OVER_PI), real(1.0)

    @device_function
    def logistic(x):
        z = scale * (x + cubic * x * x * x)  # 2u
        t = exp(-abs(z))  # of a number <= 0: never overflows
        r = invert(one + t)
        return t, r, t * r if z < real(0.0) else r

    return logistic


@cache
def forward_kernel(precision_name: str) -> Any:
    """Each element by itself."""
    real = precision(precision_name).real
    load, store = flat_access(precision_name)
    logistic = _logistic(precision_name)

    @kernel(THREADS)
    def gelu_forward(x, y, size):
        values = cuda.local.array(COUNT, real)
        first = flat_first()
        if first < size:
            load(x, first, size, values)
            for k in range(COUNT):
                values[k] *= logistic(values[k])[2]
            store(y, first, size, values)

    return gelu_forward


@cache
def backward_kernel(precision_name: str) -> Any:
    """Each element by itself."""
    real = precision(precision_name).real
    load, store = flat_access(precision_name)
    logistic = _logistic(precision_name)
    scale, three_cubic, one = real(TWO_SQRT_2_OVER_PI), real(3 * CUBIC), real(1.0)

    @kernel(THREADS)
    def gelu_backward(dy, x, dx, size):
        grad = cuda.local.array(COUNT, real)
        values = cuda.local.array(COUNT, real)
        first = flat_first()
        if first < size:
            load(dy, first, size, grad)
            load(x, first, size, values)
            for k in range(COUNT):
                v = values[k]
                t, r, s = logistic(v)
                dz = scale * (one + three_cubic * v * v)  # 2 du/dx
                grad[k] *= s + v * (t * r * r) * dz  # s (1 - s) = t / (1 + t)^2
            store(dx, first, size, grad)

    return gelu_backward


def instances() -> Iterator[Instance]:
    """Every precision."""
    for name in ("float32", "float64", "float16", "bfloat16"):
        array, size = precision(name).array, types.int64
        yield Instance(f"gelu_forward[{name}]", forward_kernel(name), (array, array, size))
        yield Instance(f"gelu_backward[{name}]", backward_kernel(name), (array,) * 3 + (size,))
