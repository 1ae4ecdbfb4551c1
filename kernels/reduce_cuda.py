"""Sums over rows, and over everything, on a GPU: gradients of biases, and the gradient's norm.

A sum over many blocks has two stages, the blocks' own sums and then the sum of those, each in one
fixed order: floats added by atomic operations would come out differently in each run.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import cache
from typing import Any

from .gpu.rows import team_sum
from .gpu.runtime import (
    SIMULATED,
    WARP,
    Instance,
    ceil_div,
    cuda,
    device_function,
    kernel,
    launch,
    precision,
    types,
)
from .gpu.vectors import longest_vector, vector_access

FOLD_COLUMNS = WARP  # threads of a block along the columns
FOLD_THREADS = 2 if SIMULATED else 16  # along the rows
FOLD_SIZE = FOLD_COLUMNS * FOLD_THREADS
THREADS = WARP if SIMULATED else 256
AHEAD = 2 if SIMULATED else 4  # rows that a thread reads at once
MOST_PARTS = 128  # of the rows: the second stage is by few blocks
MOST_BLOCKS = 2 if SIMULATED else 1056  # 8 for each of 132 multiprocessors


# ----- the sums of columns -----


@cache
def fold(real: Any, width: int) -> Any:
    """Device function `(shared, values)`: adds up `values` over threadIdx.y, for threadIdx.y = 0.

    Args:
        real: numba type of the values.
        width: values of a thread.

    """
    along = FOLD_COLUMNS

    @device_function
    def add(shared, values):
        for k in range(width):  # neighbouring threads use neighbouring words
            shared[(cuda.threadIdx.y * width + k) * along + cuda.threadIdx.x] = values[k]
        cuda.syncthreads()
        if cuda.threadIdx.y == 0:
            for k in range(width):
                total = real(0.0)
                for other in range(FOLD_THREADS):
                    total += shared[(other * width + k) * along + cuda.threadIdx.x]
                values[k] = total

    return add


def column_parts(precision_name: str, rows: int, columns: int) -> int:
    """How many parts of the rows `column_sums` adds up by themselves, at least 1."""
    across = ceil_div(columns, FOLD_COLUMNS * longest_vector(precision_name, columns))
    return max(1, min(ceil_div(rows, AHEAD * FOLD_THREADS), MOST_BLOCKS // across, MOST_PARTS))


def column_sums(
    precision_name: str,
    out_name: str,
    x: Any,
    partials: Any,
    out: Any,
    rows: int,
    columns: int,
) -> None:
    """out[c] = sum over r of x[r, c].

    Args:
        precision_name: of x; partials are of its arithmetic type, float32 for 16 bits.
        out_name: precision of out.
        x: (rows, columns), flat and contiguous.
        partials: workspace of (column_parts(...), columns); not used where that is one part.
        out: (columns,).
        rows: number of rows.
        columns: length of a row.

    """
    if not columns:
        return
    parts = column_parts(precision_name, rows, columns)
    real = precision(precision_name).real.name
    if parts == 1:
        _column_sums(precision_name, out_name, x, out, rows, columns, 1)
    else:
        _column_sums(precision_name, real, x, partials, rows, columns, parts)
        _column_sums(real, out_name, partials, out, parts, columns, 1)


def _column_sums(
    precision_name: str, out_name: str, x: Any, out: Any, rows: int, columns: int, parts: int
) -> None:
    vector = longest_vector(precision_name, columns)
    launch(
        column_sums_kernel(precision_name, out_name, vector),
        (ceil_div(columns, FOLD_COLUMNS * vector), parts), (FOLD_COLUMNS, FOLD_THREADS),
        x, out, rows, columns,
    )  # fmt: skip


@cache
def column_sums_kernel(precision_name: str, out_name: str, vector: int) -> Any:
    """out[part, c]: the sum of the rows part, part + parts, ... in groups of FOLD_THREADS."""
    number = precision(precision_name)
    real, to_real, storage = number.real, number.load, number.storage
    to_storage = precision(out_name).store
    load_vector, _ = vector_access(vector)
    add = fold(real, vector)
    shared_size, read_size = FOLD_SIZE * vector, AHEAD * vector
    to_storage_of_x = number.store

    @kernel(FOLD_SIZE)
    def column_sums(x, out, rows, columns):
        shared = cuda.shared.array(shared_size, real)
        one = cuda.local.array(vector, storage)
        read = cuda.local.array(read_size, storage)
        totals = cuda.local.array(vector, real)
        for k in range(vector):
            totals[k] = real(0.0)
        column = (types.int64(cuda.blockIdx.x) * FOLD_COLUMNS + cuda.threadIdx.x) * vector
        if column < columns:
            first = types.int64(cuda.blockIdx.y) * FOLD_THREADS + cuda.threadIdx.y
            step = types.int64(cuda.gridDim.y) * FOLD_THREADS
            for row in range(first, rows, step * AHEAD):
                for n in range(AHEAD):  # all reads first: none waits for another
                    if row + n * step < rows:
                        load_vector(x, (row + n * step) * columns + column, one)
                    else:
                        for k in range(vector):
                            one[k] = to_storage_of_x(real(0.0))
                    for k in range(vector):
                        read[n * vector + k] = one[k]
                for n in range(AHEAD):
                    for k in range(vector):
                        totals[k] += to_real(read[n * vector + k])
        add(shared, totals)
        if cuda.threadIdx.y == 0 and column < columns:
            for k in range(vector):
                out[cuda.blockIdx.y * columns + column + k] = to_storage(totals[k])

    return column_sums


# ----- sums of everything -----


def square_blocks(size: int) -> int:
    """Sums that `sum_of_squares` leaves for an array of this size."""
    return min(ceil_div(size, 16 * THREADS), MOST_BLOCKS)


def sum_of_squares(
    precision_name: str, x: Any, size: int, partials: Any, position: int, found: Any
) -> None:
    """Sums of x^2 of parts of an array, and whether it holds an infinity or a NaN.

    Args:
        precision_name: of x; partials are of its arithmetic type, float32 for 16 bits.
        x: (size,).
        size: number of elements.
        partials: `square_blocks(size)` sums are written from `position` on.
        position: see there.
        found: float32 (1,), becomes 1 if an element is not finite, else stays as it is.

    """
    if size:
        launch(
            sum_of_squares_kernel(precision_name), square_blocks(size), THREADS,
            x, size, partials, position, found,
        )  # fmt: skip


@cache
def sum_of_squares_kernel(precision_name: str) -> Any:
    """One sum a block."""
    number = precision(precision_name)
    real, to_real, storage = number.real, number.load, number.storage
    vector = longest_vector(precision_name)
    load_vector, _ = vector_access(vector)
    add = team_sum(precision_name, THREADS)

    @kernel(THREADS)
    def sum_of_squares(x, size, partials, position, found):
        one = cuda.local.array(vector, storage)
        total = real(0.0)
        finite = True
        start = (types.int64(cuda.blockIdx.x) * THREADS + cuda.threadIdx.x) * vector
        for first in range(start, size, cuda.gridDim.x * THREADS * vector):
            if first + vector <= size:
                load_vector(x, first, one)
            else:
                for k in range(vector):
                    one[k] = x[first + k] if first + k < size else x[first]
            for k in range(vector):
                value = to_real(one[k])
                if first + k < size:
                    total += value * value
                    finite = finite and (math.isfinite(value))
        if not finite:
            cuda.atomic.max(found, 0, types.float32(1.0))
        total = add(total)
        if cuda.threadIdx.x == 0:
            partials[position + cuda.blockIdx.x] = total

    return sum_of_squares


def total(precision_name: str, x: Any, size: int, out: Any) -> None:
    """out[0] = the sum of x (size,), both float32 or float64; by one block, for short arrays."""
    launch(total_kernel(precision_name), 1, THREADS, x, size, out)


@cache
def total_kernel(precision_name: str) -> Any:
    """The sum of an array by one block."""
    real = precision(precision_name).real
    add = team_sum(precision_name, THREADS)

    @kernel(THREADS)
    def total_of(x, size, out):
        own = real(0.0)
        for i in range(cuda.threadIdx.x, size, THREADS):
            own += x[i]
        own = add(own)
        if cuda.threadIdx.x == 0:
            out[0] = own

    return total_of


def instances() -> Iterator[Instance]:
    """Every precision, into its own and into float32."""
    size = types.int64
    for name in ("float32", "float64", "float16", "bfloat16"):
        number = precision(name)
        real = number.real.name
        for out_name in sorted({name, real}):
            for vector in (1, 4) if name == "float32" else (longest_vector(name),):
                yield Instance(
                    f"column_sums[{name} to {out_name}, {vector}]",
                    column_sums_kernel(name, out_name, vector),
                    (number.array, precision(out_name).array, size, size),
                )
        yield Instance(
            f"sum_of_squares[{name}]",
            sum_of_squares_kernel(name),
            (number.array, size, number.real_array, size, precision("float32").array),
        )
    for name in ("float32", "float64"):
        array = precision(name).array
        yield Instance(f"total[{name}]", total_kernel(name), (array, size, array))
