"""A band of a matrix on the GPU: what lies outside gets another value, as in a causal mask."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any

from .gpu.runtime import Instance, cuda, kernel, launch, precision, types

THREADS = 128
MOST_BLOCKS = 1 << 20


@cache
def fill_kernel(dtype: str) -> Any:
    """A block takes one row after another, its threads the columns."""
    numbers = precision(dtype)
    real, load, store = numbers.real, numbers.load, numbers.store

    @kernel(THREADS)
    def fill(out, x, matrix_rows, columns, lower, upper, value):
        outside = real(value)
        row = types.int64(cuda.blockIdx.x)
        while row * columns < x.size:
            row_of_matrix = row % matrix_rows
            first = row * columns
            for column in range(cuda.threadIdx.x, columns, THREADS):
                inside = row_of_matrix + lower <= column < row_of_matrix + upper
                out[first + column] = store(load(x[first + column]) if inside else outside)
            row += cuda.gridDim.x

    return fill


def fill(
    out: Any, x: Any, rows: int, columns: int, lower: int, upper: int, value: float, dtype: str
) -> None:
    """out[..., i, j] = x[..., i, j] where i + lower <= j < i + upper, else `value`.

    Args:
        out: contiguous matrices (..., rows, columns) as a flat array.
        x: likewise.
        rows: of a matrix.
        columns: of a matrix.
        lower: the band begins at this column of row 0.
        upper: it ends before this one.
        value: for what is outside the band.
        dtype: name of a `Precision`.

    """
    if x.size:
        grid = min(x.size // columns, MOST_BLOCKS)
        launch(fill_kernel(dtype), grid, THREADS, out, x, rows, columns, lower, upper, float(value))


def instances() -> Iterator[Instance]:
    """See `Instance`."""
    for dtype in ("float32", "float64", "float16", "bfloat16"):
        array = precision(dtype).array
        whole = (types.int64,) * 4
        signature = (array, array, *whole, types.float64)
        yield Instance(f"band_fill[{dtype}]", fill_kernel(dtype), signature, 64)
