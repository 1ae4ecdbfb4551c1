"""The floating-point types of tensors, and the default one."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

FLOAT_DTYPES = (np.dtype(np.float32), np.dtype(np.float64))
BFLOAT16: np.dtype[Any] = np.dtype(ml_dtypes.bfloat16)
HALF_DTYPES = (np.dtype(np.float16), BFLOAT16)  # on the GPU alone

_LARGEST_HALF = 65504.0  # what every dtype holds

_default_dtype = np.dtype(np.float64)  # MiniTorch computes in float64


def check_dtype(dtype: npt.DTypeLike, on_gpu: bool = False) -> np.dtype[Any]:
    """The numpy dtype that `dtype` names.

    Args:
        dtype: a dtype, a type or a name, "bfloat16" too.
        on_gpu: whether it is for a tensor on the GPU, where there are float16 and bfloat16 as well.

    Raises:
        TypeError: it is none of ours.

    """
    wanted = "float32, float64, float16 or bfloat16 on the GPU" if on_gpu else "float32 or float64"
    try:
        given = BFLOAT16 if isinstance(dtype, str) and dtype == "bfloat16" else np.dtype(dtype)
    except (TypeError, ValueError):
        raise TypeError(f"dtype must be {wanted}, got {dtype!r}") from None
    if given in FLOAT_DTYPES or (on_gpu and given in HALF_DTYPES):
        return given
    hint = " (only a tensor on the GPU can have that)" if given in HALF_DTYPES else ""
    name = repr(dtype) if given == np.dtype(object) else given.name  # numpy takes any class for it
    raise TypeError(f"dtype must be {wanted}, got {name}{hint}")


def promote(a: np.dtype[Any], b: np.dtype[Any]) -> np.dtype[Any]:
    """The dtype of an operation on two: the wider one; float16 with bfloat16 gives float32."""
    if a == b:
        return a
    if a in HALF_DTYPES and b in HALF_DTYPES:
        return np.dtype(np.float32)
    return a if a.itemsize > b.itemsize else b


def layer_dtype(given: np.dtype[Any], *parameters: np.dtype[Any]) -> np.dtype[Any]:
    """The dtype in which a layer computes its output, of its input's and its parameters' dtypes:
    the widest, but float32 parameters do not widen an input of 16 bits (mixed precision).
    """
    for dtype in parameters:
        if not (given in HALF_DTYPES and dtype == np.float32):
            given = promote(given, dtype)
    return given


def arithmetic_dtype(dtype: np.dtype[Any]) -> np.dtype[Any]:
    """The dtype of a Python number beside elements of `dtype`, in which they are computed with:
    float32 for 16 bits, as in PyTorch.
    """
    return FLOAT_DTYPES[0] if dtype.itemsize == 2 else dtype


def rounded(value: float, dtype: np.dtype[Any]) -> float:
    """A number as an element of `dtype` holds it: infinite if it is too large, without numpy's
    warning.
    """
    if dtype.itemsize == 8 or -_LARGEST_HALF <= value <= _LARGEST_HALF:
        return float(dtype.type(value))
    with np.errstate(over="ignore"):
        return float(dtype.type(value))


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


def storage_dtype(given: np.dtype[Any], on_gpu: bool = False) -> np.dtype[Any]:
    """The dtype in which an array of dtype `given` is stored: its own, in the byte order of this
    machine, if it is a float of ours, else the default.
    """
    if not given.isnative:
        given = given.newbyteorder("=")
    ours = given in FLOAT_DTYPES or (on_gpu and given in HALF_DTYPES)
    return given if ours else _default_dtype
