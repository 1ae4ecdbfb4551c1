"""Elements of flat arrays on a GPU, a few neighbours to a thread: for elementwise kernels."""

from __future__ import annotations

from functools import cache
from typing import Any

from .runtime import SIMULATED, ceil_div, cuda, device_function, precision, types
from .vectors import longest_vector, vector_access

THREADS = 32 if SIMULATED else 256
COUNT = 8  # neighbours of a thread: one 16-byte vector or more, of every precision
MOST_BLOCKS = 2**31 - 1


def flat_blocks(size: int) -> int:
    """Blocks whose threads take `COUNT` elements each."""
    return min(ceil_div(size, THREADS * COUNT), MOST_BLOCKS)


@device_function
def flat_first():
    """The first element of this thread."""
    return (types.int64(cuda.blockIdx.x) * THREADS + cuda.threadIdx.x) * COUNT


@cache
def whole_access(precision_name: str) -> tuple[Any, Any]:
    """Device functions that move `COUNT` elements which the array has.

    `load(x, first, values)`: values[k] = x[first + k]. `store(y, first, values)` writes them back.
    """
    number = precision(precision_name)
    to_real, to_storage, storage = number.load, number.store, number.storage
    vector = longest_vector(precision_name)
    load_vector, store_vector = vector_access(vector)

    @device_function
    def load(x, first, values):
        one = cuda.local.array(vector, storage)
        for piece in range(0, COUNT, vector):
            load_vector(x, first + piece, one)
            for lane in range(vector):
                values[piece + lane] = to_real(one[lane])

    @device_function
    def store(y, first, values):
        one = cuda.local.array(vector, storage)
        for piece in range(0, COUNT, vector):
            for lane in range(vector):
                one[lane] = to_storage(values[piece + lane])
            store_vector(y, first + piece, one)

    return load, store


@cache
def flat_access(precision_name: str) -> tuple[Any, Any]:
    """Device functions that move `COUNT` elements, as many of them as an array has.

    `load(x, first, size, values)`: values[k] = x[first + k], 0 past the end.
    `store(y, first, size, values)` writes them back.
    """
    number = precision(precision_name)
    real, to_real, to_storage = number.real, number.load, number.store
    load_whole, store_whole = whole_access(precision_name)

    @device_function
    def load(x, first, size, values):
        if first + COUNT <= size:
            load_whole(x, first, values)
        else:
            for k in range(COUNT):
                values[k] = to_real(x[first + k]) if first + k < size else real(0.0)

    @device_function
    def store(y, first, size, values):
        if first + COUNT <= size:
            store_whole(y, first, values)
        else:
            for k in range(COUNT):
                if first + k < size:
                    y[first + k] = to_storage(values[k])

    return load, store
