"""exp(x) and 1 / x for kernels, as precise as what is stored is worth.

A GPU has instructions for 2**x and 1 / x that are right to about 22 bits. Where elements have 16
bits that is plenty, and what libraries do beyond it would take longer than the memory does.
"""

from __future__ import annotations

import math
from functools import cache
from typing import Any

from .runtime import SIMULATED, cuda, device_function, precision


@cache
def exponential(precision_name: str) -> Any:
    """Device function x -> exp(x), in the arithmetic type of the precision."""
    real = precision(precision_name).real
    if precision_name in ("float16", "bfloat16") and not SIMULATED:
        approximate = cuda.libdevice.fast_expf

        @device_function
        def fast(x):
            return approximate(x)

        return fast

    @device_function
    def exact(x):
        return real(math.exp(x))

    return exact


@cache
def reciprocal(precision_name: str) -> Any:
    """Device function x -> 1 / x, of x from 1 to 2."""
    one = precision(precision_name).real(1.0)
    if precision_name in ("float16", "bfloat16") and not SIMULATED:
        approximate = cuda.libdevice.fast_fdividef

        @device_function
        def fast(x):
            return approximate(one, x)

        return fast

    @device_function
    def exact(x):
        return one / x

    return exact
