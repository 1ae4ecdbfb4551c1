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

from .gpu.approximate import exponential, reciprocal
from .gpu.flat import COUNT, THREADS, flat_blocks, flat_first, whole_access
from .gpu.runtime import (
    Instance,
    cuda,
    device_function,
    kernel,
    launch,
    precision,
    types,
)

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
def _gelu(precision_name: str) -> Any:
    """Device function x -> gelu(x), in the arithmetic type of the precision."""
    real = precision(precision_name).real
    exp, invert = exponential(precision_name), reciprocal(precision_name)
    linear, cubic, one = real(TWO_SQRT_2_OVER_PI), real(TWO_SQRT_2_OVER_PI * CUBIC), real(1.0)

    @device_function
    def gelu(x):
        z = x * (linear + cubic * (x * x))  # 2u
        return x * invert(one + exp(-z))  # 0 where the exponential is infinite

    return gelu


@cache
def _derivative(precision_name: str) -> Any:
    """Device function x -> the derivative of gelu at x."""
    real = precision(precision_name).real
    exp, invert = exponential(precision_name), reciprocal(precision_name)
    linear, cubic, one = real(TWO_SQRT_2_OVER_PI), real(TWO_SQRT_2_OVER_PI * CUBIC), real(1.0)
    three, zero, most = real(3.0), real(0.0), real(1000.0)

    @device_function
    def derivative(x):
        square = cubic * min(x * x, most)  # where t is 0 all factors beside it are finite
        z, dz = x * (linear + square), linear + three * square  # 2u and 2 du/dx
        t = exp(-abs(z))  # of a number <= 0: never infinite, s (1 - s) needs it
        r = invert(one + t)
        s = t * r if z < zero else r
        return s + (x * t) * (dz * (r * r))  # s (1 - s) = t / (1 + t)^2

    return derivative


@cache
def forward_kernel(precision_name: str) -> Any:
    """Each element by itself."""
    number = precision(precision_name)
    real, to_real, to_storage = number.real, number.load, number.store
    load, store = whole_access(precision_name)
    gelu = _gelu(precision_name)

    @kernel(THREADS)
    def gelu_forward(x, y, size):
        values = cuda.local.array(COUNT, real)
        first = flat_first()
        if first + COUNT <= size:
            load(x, first, values)
            for k in range(COUNT):
                values[k] = gelu(values[k])
            store(y, first, values)
        else:
            for i in range(first, size):
                y[i] = to_storage(gelu(to_real(x[i])))

    return gelu_forward


@cache
def backward_kernel(precision_name: str) -> Any:
    """Each element by itself."""
    number = precision(precision_name)
    real, to_real, to_storage = number.real, number.load, number.store
    load, store = whole_access(precision_name)
    derivative = _derivative(precision_name)

    @kernel(THREADS)
    def gelu_backward(dy, x, dx, size):
        grad = cuda.local.array(COUNT, real)
        values = cuda.local.array(COUNT, real)
        first = flat_first()
        if first + COUNT <= size:
            load(dy, first, grad)
            load(x, first, values)
            for k in range(COUNT):
                grad[k] *= derivative(values[k])
            store(dx, first, grad)
        else:
            for i in range(first, size):
                dx[i] = to_storage(to_real(dy[i]) * derivative(to_real(x[i])))

    return gelu_backward


def instances() -> Iterator[Instance]:
    """Every precision."""
    for name in ("float32", "float64", "float16", "bfloat16"):
        array, size = precision(name).array, types.int64
        yield Instance(f"gelu_forward[{name}]", forward_kernel(name), (array, array, size))
        yield Instance(f"gelu_backward[{name}]", backward_kernel(name), (array,) * 3 + (size,))
