"""exp(x), 1 / x and 1 / sqrt(x) for kernels, as precise as what is stored is worth.

A GPU has instructions for 2**x and 1 / x that are right to about 22 bits. Where elements have 16
bits that is plenty, and what libraries do beyond it would take longer than the memory does.
"""

from __future__ import annotations

import math
from functools import cache
from typing import Any

from . import ptx_simulated
from .ptx import SIXTEEN_BITS
from .runtime import SIMULATED, cuda, device_function, precision, types


@cache
def exponential(precision_name: str) -> Any:
    """Device function x -> exp(x), in the arithmetic type of the precision."""
    real = precision(precision_name).real
    if SIMULATED:
        return ptx_simulated.exponential
    if precision_name in SIXTEEN_BITS:
        return cuda.libdevice.fast_expf

    @device_function
    def exact(x):
        return real(math.exp(x))

    return exact


@cache
def reciprocal(precision_name: str) -> Any:
    """Device function x -> 1 / x, of x from 1 on; 0 for one that is infinite or nearly so."""
    one = precision(precision_name).real(1.0)
    if precision_name in SIXTEEN_BITS and not SIMULATED:
        approximate = cuda.libdevice.fast_fdividef

        @device_function
        def fast(x):
            return approximate(one, x)

        return fast

    @device_function
    def exact(x):
        return one / x

    return exact


@cache
def inverse_root(precision_name: str) -> Any:
    """Device function x -> 1 / sqrt(x), to within 2 units in the last place."""
    real = precision(precision_name).real
    if real is types.float32 and not SIMULATED:
        return cuda.libdevice.rsqrtf  # without a branch, which would hold up reads

    @device_function
    def exact(x):
        return real(1.0) / real(math.sqrt(x))

    return exact
