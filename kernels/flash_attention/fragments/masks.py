"""The numbers of an additive mask, as the tensor cores' kernels add them to scores in registers."""

from __future__ import annotations

from typing import Any

import numpy as np

from ...gpu.runtime import NEGATIVE_INFINITY
from ...gpu.traced import f32, float_of, select, u32

INFINITY, LARGEST = float("inf"), float(np.finfo(np.float32).max)


def mask_number(name: str, number: Any) -> Any:
    """Within traced functions: an additive mask's number as float32; a finite one that float32 has
    no room for becomes its largest.
    """
    if name == "bfloat16":
        return float_of(u32(number) << 16)
    x = f32(number)
    if name == "float64":
        x = select((x == INFINITY) & (number < INFINITY), LARGEST, x)
        x = select((x == NEGATIVE_INFINITY) & (number > NEGATIVE_INFINITY), -LARGEST, x)
    return x


__all__ = ["mask_number"]
