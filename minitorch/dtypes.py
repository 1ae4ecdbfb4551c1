"""The floating-point types of tensors, and the default one."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

FLOAT_DTYPES = (np.dtype(np.float32), np.dtype(np.float64))

_default_dtype = np.dtype(np.float64)  # MiniTorch computes in float64


def check_dtype(dtype: npt.DTypeLike) -> np.dtype[Any]:
    """The numpy dtype that `dtype` names.

    Raises:
        TypeError: it is neither float32 nor float64.

    """
    given = np.dtype(dtype)
    if given not in FLOAT_DTYPES:
        raise TypeError(f"dtype must be float32 or float64, got {given.name}")
    return given


def get_default_dtype() -> np.dtype[Any]:
    """The dtype that Python numbers, lists and the factories get: float64 unless it was changed."""
    return _default_dtype


def set_default_dtype(dtype: npt.DTypeLike) -> None:
    """Choose the dtype that Python numbers, lists and the factories get from now on.

    Args:
        dtype: `np.float32`, `np.float64` or one of their names.

    Raises:
        TypeError: `dtype` is something else.

    """
    global _default_dtype
    _default_dtype = check_dtype(dtype)


def storage_dtype(given: np.dtype[Any]) -> np.dtype[Any]:
    """The dtype in which an array of dtype `given` is stored: its own if it is a float of ours,
    else the default.
    """
    return given if given in FLOAT_DTYPES else _default_dtype
