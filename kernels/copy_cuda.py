"""Copies on the GPU from any strides to any strides, with a change of dtype if need be.

Most layouts are read and written in order by the elementwise kernel. In a transposed copy one side
would be read a row apart from thread to thread: there a tile goes through shared memory, which is
written along the rows of one side and read along those of the other.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache, lru_cache
from math import prod
from typing import Any, NamedTuple

import numba

from .elementwise_cuda import (
    Ints,
    View,
    broadcast_strides,
    group_offset,
    map_into,
    map_kernel,
    merge_dimensions,
)
from .runtime import SIMULATED, Instance, ceil_div, cuda, kernel, launch, precision, types

THREADS = 8 if SIMULATED else 256


def identity(x: float) -> float:
    """$f(x) = x$, the elementwise operation that a copy is."""
    return x


def copy_into(out: View, x: View) -> None:
    """out[i] = x[i], where x broadcasts to out; rounded to the dtype of out."""
    strides = broadcast_strides(out.shape, x.shape, x.strides)
    plan = _transposition(out.shape, out.strides, strides) if out.dtype == x.dtype else None
    if plan is None:
        map_into(identity, out, x)
        return
    tile = tile_size(out.dtype)
    tiles = ceil_div(plan.rows, tile) * ceil_div(plan.columns, tile) * prod(plan.rest)
    launch(
        transpose_kernel(out.dtype, len(plan.rest)),
        tiles,
        (tile, THREADS // tile),
        out.array,
        x.array,
        *plan,
    )


class Transposition(NamedTuple):
    """A copy as the transposition of many matrices.

    Args:
        rest: sizes of the dimensions that number the matrices.
        out_rest: strides of out along them.
        x_rest: strides of x along them.
        rows: of out's matrices, the dimension along which x has stride 1.
        columns: of out's matrices, along which out has stride 1.
        out_row: stride of out from row to row.
        x_column: stride of x from column to column.

    """

    rest: Ints
    out_rest: Ints
    x_rest: Ints
    rows: int
    columns: int
    out_row: int
    x_column: int


@lru_cache(4096)
def _transposition(shape: Ints, out_strides: Ints, x_strides: Ints) -> Transposition | None:
    """None where the elementwise kernel does as well."""
    least = 4 if SIMULATED else 16
    if prod(shape) == 0:
        return None
    shape, (out_strides, x_strides) = merge_dimensions(shape, out_strides, x_strides)
    last = len(shape) - 1
    along = [d for d in range(last) if x_strides[d] == 1 and shape[d] >= least]
    if out_strides[last] != 1 or x_strides[last] in (0, 1) or shape[last] < least or not along:
        return None
    row = along[0]
    others = [d for d in range(last) if d != row]
    rest, out_rest, x_rest = (
        tuple(values[d] for d in others) or (fill,)
        for values, fill in ((shape, 1), (out_strides, 0), (x_strides, 0))
    )
    return Transposition(
        rest, out_rest, x_rest, shape[row], shape[last], out_strides[row], x_strides[last]
    )


def tile_size(dtype: str) -> int:
    """Side of a tile: 128 bytes, so that each row of it is whole memory transactions."""
    if SIMULATED:
        return 4
    return 64 if precision(dtype).storage.itemsize == 2 else 32


@cache
def transpose_kernel(dtype: str, rest_dims: int) -> Any:
    """The kernel that transposes matrices tile by tile.

    Args:
        dtype: of both sides.
        rest_dims: number of dimensions that number the matrices.

    """
    tile_side = tile_size(dtype)
    width = tile_side + 1  # odd: the numbers of a column lie in different banks
    lines = THREADS // tile_side  # rows of a tile that the block moves at a time
    steps = tile_side // lines  # numbers of a thread
    storage = numba.from_dtype(precision(dtype).storage)
    offset = group_offset(rest_dims, 1, types.uint32)

    @kernel(THREADS)
    def transpose(out, x, rest, out_rest, x_rest, rows, columns, out_row, x_column):
        tile = cuda.shared.array((tile_side, width), storage)
        values = cuda.local.array(steps, storage)
        # 32 bits are enough to number tiles, and quick to divide.
        across = types.uint32((columns - 1) // tile_side + 1)
        down = types.uint32((rows - 1) // tile_side + 1)
        block = types.uint32(cuda.blockIdx.x)
        matrix, number = block // (across * down), block % (across * down)
        row0 = types.int64(number // across) * tile_side
        column0 = types.int64(number % across) * tile_side
        p = offset(matrix, rest, out_rest)
        q = offset(matrix, rest, x_rest)
        i, line = cuda.threadIdx.x, cuda.threadIdx.y

        # Neighbouring threads along a row of x. All numbers are read before the first is needed;
        # beyond an edge the edge's is read, since a branch would hold up those after it.
        row = min(row0 + i, rows - 1)
        for step in range(steps):
            column = min(column0 + line + step * lines, columns - 1)
            values[step] = x[q + row + column * x_column]
        for step in range(steps):
            tile[line + step * lines, i] = values[step]
        cuda.syncthreads()
        for step in range(steps):  # and along a row of out
            r = line + step * lines
            if row0 + r < rows and column0 + i < columns:
                out[p + (row0 + r) * out_row + column0 + i] = tile[i, r]

    return transpose


def instances() -> Iterator[Instance]:
    """Kernels for the compile tests: transpositions, and casts from and to float32."""
    for dtype in ("float32", "float64", "float16", "bfloat16"):
        array = precision(dtype).array
        for dims in (1, 2) if dtype == "float32" else (1,):
            ints = types.UniTuple(types.int64, dims)
            yield Instance(
                f"transpose[{dtype}, rest_dims={dims}]",
                transpose_kernel(dtype, dims),
                (array, array, ints, ints, ints) + (types.int64,) * 4,
                most_registers=96,
            )
    ints = types.UniTuple(types.int64, 1)
    single = precision("float32").array
    for dtype in ("float64", "float16", "bfloat16"):
        array = precision(dtype).array
        lanes = 2 if dtype == "float64" else 4
        for to, of, name in ((array, single, dtype), (single, array, "float32")):
            source = "float32" if of is single else dtype
            yield Instance(
                f"cast[{source} to {name}]",
                map_kernel(identity, name, source, 1, lanes, (False, False)),
                (to, of, ints, ints, ints, types.int64),
                most_registers=64,
            )
