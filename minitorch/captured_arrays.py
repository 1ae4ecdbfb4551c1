"""Arrays that a score or mask function closes over: numpy's, Tensors, PyTorch's, Parameters."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from .kernels.score_graph import Kind

Array = npt.NDArray[Any]


def unwrapped(value: Any) -> Any:
    """A Parameter's value, which training replaces; anything else as it is."""
    if hasattr(type(value), "zero_grad") and hasattr(type(value), "update"):
        return value.value
    return value


def is_array(value: Any) -> bool:
    """Whether it is an array of numbers that functions may read."""
    return isinstance(value, np.ndarray) or hasattr(value, "requires_grad")


def is_torch(array: Any) -> bool:
    """Whether it is a tensor of PyTorch's, whose `requires_grad` is no method."""
    return isinstance(getattr(array, "requires_grad", None), bool)


def wants_gradient(array: Any) -> bool:
    """Whether a gradient of it is asked for."""
    wants = getattr(array, "requires_grad", False)
    return bool(wants() if callable(wants) else wants)


def dtype_name(array: Any) -> str:
    """Numpy's name of an array's dtype."""
    dtype = array.dtype
    return str(getattr(dtype, "name", dtype)).removeprefix("torch.")


def kind_of(array: Any) -> Kind | None:
    """What a graph calls its numbers; None if there is no name for them."""
    name = dtype_name(array)
    if name.startswith(("float", "bfloat")):
        return "real"
    if name.startswith(("int", "uint")):
        return "whole"
    return "truth" if name == "bool" else None


def has_32_bits(array: Any) -> bool:
    """Whether its numbers, if they are whole, are those of an int32."""
    return dtype_name(array) not in ("int64", "uint64", "uint32")


def numbers_of(array: Any) -> Array:
    """A copy, in memory."""
    if hasattr(array, "to_numpy"):
        array = array.to_numpy()
    elif is_torch(array):
        array = array.detach().cpu()
        array = (array.float() if dtype_name(array) == "bfloat16" else array).numpy()
    return np.array(array, order="C")


__all__ = [
    "dtype_name", "has_32_bits", "is_array", "is_torch", "kind_of", "numbers_of", "unwrapped",
    "wants_gradient",
]  # fmt: skip
