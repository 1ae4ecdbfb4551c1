"""Share the rows of a matrix among threads.

A worker is called with its arrays, `next_row` and `block`; it takes blocks of rows from the shared
counter until none is left::

    while True:
        first = fetch_add(next_row, 0, block)
        if first >= len(x):
            return
        for r in range(first, min(first + block, len(x))):
            ...

Blocks depend on the shape alone, so a sum over rows that is kept for each block is the same for any
number of threads.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from . import threads, vector_math
from .simd import cache_key
from .threads import run_on_threads, thread_count

Array = NDArray[Any]

# Below this many elements one core is done before a second one has woken up.
SERIAL = 1 << 16
# Elements of a block.
BLOCK = 1 << 14

KEY = cache_key(vector_math.__file__, threads.__file__, __file__)


def block_rows(row_length: int) -> int:
    """Rows that a thread takes at a time."""
    return max(1, BLOCK // max(row_length, 1))


def run_over_rows(rows: int, row_length: int, worker: Callable[..., Any], *arguments: Any) -> None:
    """Call worker(*arguments, next_row, block) on as many threads as the work is worth."""
    block = block_rows(row_length)
    next_row = np.zeros(1, np.int64)
    if rows * row_length < SERIAL:
        worker(*arguments, next_row, block)
        return
    count = min(thread_count(), (rows + block - 1) // block)
    run_on_threads(count, worker, *arguments, next_row, block)


def as_rows(x: Array) -> Array:
    """(..., D) -> (rows, D), contiguous; a copy only if `x` is not."""
    rows = 1
    for n in x.shape[:-1]:
        rows *= n
    return writeable(x).reshape(rows, x.shape[-1])


def writeable(x: Array) -> Array:
    """`x`, contiguous and writeable (which is part of numba's types); a copy only if it is not."""
    return np.require(x, requirements=["C", "W"])
