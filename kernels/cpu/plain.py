"""What the intrinsics of the CPU's kernels do, in numpy: they run so where nothing is compiled.

`NUMBA_DISABLE_JIT=1` leaves every kernel the Python function that it was written as, which a
debugger can step through. A vector is then an array of as many elements as a register has, and sums
are formed in the order of the compiled code. Each function is described beside the intrinsic that
has its name: in `simd.py`, `simd_matrix.py`, `vector_math.py` and `threads.py`.
"""

from __future__ import annotations

import threading
import time
from typing import Any

import numpy as np

from .vector_target import TARGET

_one_at_a_time = threading.Lock()


# ----- sizes -----


def lanes(array: Any) -> int:
    return TARGET.lanes(8 * array.itemsize)


def word_lanes() -> int:
    return TARGET.lanes(64)


def block_rows() -> int:
    return TARGET.block_rows


def block_columns(array: Any) -> int:
    return TARGET.block_vectors * lanes(array)


# ----- vectors -----


def load(array: Any, index: Any) -> Any:
    return array[index : index + lanes(array)].copy()


def store(array: Any, index: Any, vector: Any) -> None:
    array[index : index + len(vector)] = vector


def splat(array: Any, scalar: Any) -> Any:
    return np.full(lanes(array), scalar, array.dtype)


def maximum(x: Any, y: Any) -> Any:
    return np.where(x > y, x, y)[()]  # a scalar of two scalars


def max_of(x: Any) -> Any:
    while len(x) > 1:
        x = maximum(x[: len(x) // 2], x[len(x) // 2 :])
    return x[0]


def sum_of(x: Any) -> Any:
    while len(x) > 1:
        x = x[: len(x) // 2] + x[len(x) // 2 :]
    return x[0]


def select_bytes(array: Any, index: Any, x: Any, y: Any) -> Any:
    return np.where(array[index : index + len(x)] != 0, x, y)


def count_from(first: Any) -> Any:
    return np.uint64(first) + np.arange(word_lanes(), dtype=np.uint64)


def store_thresholds(
    array: Any, index: Any, x: Any, y: Any, threshold: Any, above: Any, below: Any
) -> None:
    fours = [(of[lane : lane + 4]) for lane in range(0, len(x), 4) for of in (x, y)]
    words = np.concatenate(fours)
    half, low_word = np.uint64(16), np.uint64(2**32 - 1)
    exchanged = (words >> half) | (words << half & low_word)
    row = np.where(np.stack([exchanged, words], axis=1).reshape(-1) >= threshold, above, below)
    numbers = 2 * len(x)
    for start, part in ((0, row[:numbers]), (max(numbers, 8), row[numbers:])):
        array[index + start : index + start + numbers] = part


# ----- exponentials: 0 where the result is below the normal numbers -----


def exp2(x: Any) -> Any:
    return _normal(np.exp2(x))


def exp(x: Any) -> Any:
    return _normal(np.exp(x))


def _normal(y: Any) -> Any:
    return np.where(y < np.finfo(y.dtype).tiny, y.dtype.type(0), y)[()]


# ----- matrices -----


def transpose_block(
    source: Any, i: Any, i_row: Any, target: Any, j: Any, j_row: Any, scale: Any
) -> None:
    n = np.arange(lanes(source))
    target[j + n[:, None] * j_row + n] = source[i + n[:, None] * i_row + n].T * scale


def matrix_product_block(
    array: Any, a: Any, a_row: Any, a_column: Any, b: Any, b_row: Any, c: Any, c_row: Any,
    depth: Any, accumulate: Any,
) -> None:  # fmt: skip
    rows, columns = np.arange(block_rows())[:, None], np.arange(block_columns(array))
    k = np.arange(depth)
    product = array[a + rows * a_row + k * a_column] @ array[b + k[:, None] * b_row + columns]
    place = c + rows * c_row + columns
    array[place] = product + array[place] if accumulate else product


# ----- threads -----


def fetch_add(array: Any, index: Any, value: Any) -> int:
    with _one_at_a_time:
        old = int(array[index])
        array[index] = old + value
    return old


def store_release(array: Any, index: Any, value: Any) -> None:
    array[index] = value


def wait_until(array: Any, index: Any, value: Any) -> None:
    while array[index] != value:
        time.sleep(0)
