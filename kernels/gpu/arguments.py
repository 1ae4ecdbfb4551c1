"""A kernel's arguments as 64-bit words, which is how the driver takes them; numba takes longer."""

from __future__ import annotations

from typing import Any

import numpy as np

_WHOLE_NUMBERS = (np.int32, np.uint32, np.int64)
_tuples: set[type] = {tuple}  # and the named ones that have been met


def pack(arguments: tuple[Any, ...]) -> tuple[list[int], tuple[Any, ...]] | None:
    """The arguments as 64-bit words, as numba's kernels take them, and what types they have.

    None where there is one of a kind that is left to numba.
    """
    values: list[int] = []
    kinds: list[Any] = []
    for x in arguments:
        kind: Any = type(x)
        if kind is int:
            values.append(x)
            if not -(1 << 63) <= x < 1 << 63:
                return None
        elif kind in _tuples:
            values += x
            if kind is tuple:
                kind = len(x)
        elif kind is np.float32:
            values.append(int(x.view(np.uint32)))
        elif kind is float or kind is np.float64:
            values.append(int(np.float64(x).view(np.int64)))
        elif kind is np.uint64:
            values.append(int(x.view(np.int64)))
        elif kind in _WHOLE_NUMBERS:
            values.append(int(x))
        else:
            words = getattr(x, "_words", None) or _words_of(x)
            if words is not None:
                values += words
                kind = x.dtype
            elif isinstance(x, tuple):
                values += x
                _tuples.add(kind)
            else:
                return None
        kinds.append(kind)
    return values, tuple(kinds)


def _words_of(array: Any) -> tuple[int, ...] | None:
    """A device array as a kernel gets it; kept on the array. None if it is none of ours."""
    interface = getattr(array, "__cuda_array_interface__", None)
    if interface is None or len(interface["shape"]) != 1 or interface.get("strides"):
        return None
    (size,), itemsize = interface["shape"], array.dtype.itemsize
    # its owner and parent (none), size, itemsize, address, shape, strides in bytes
    array._words = (0, 0, size, itemsize, interface["data"][0], size, itemsize)
    return array._words  # type: ignore[no-any-return]


__all__ = ["pack"]
