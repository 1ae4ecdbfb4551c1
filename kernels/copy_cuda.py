"""Copies on the GPU from any strides to any strides, with a change of dtype if need be.

Most layouts are read and written in order by the elementwise kernel. In a transposed copy one side
would be read a row apart from thread to thread: there a tile goes through shared memory, which is
written along the rows of one side and read along those of the other. Where addresses and strides
allow, both sides are moved 16 bytes at a time: a thread reads as many such vectors, one from each
of neighbouring rows of x, as a vector has elements, and so holds a square, which it turns in its
registers.
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
from .gpu.runtime import (
    SIMULATED,
    Instance,
    ceil_div,
    cuda,
    device_function,
    kernel,
    launch,
    precision,
    types,
)
from .gpu.vectors import BYTES, longest_vector, vector_access

MOST_THREADS = 8 if SIMULATED else 256
BAND = 2 if SIMULATED else 16  # tiles


def identity(x: float) -> float:
    """$f(x) = x$, the elementwise operation that a copy is."""
    return x


def copy_into(out: View, x: View) -> None:
    """out[i] = x[i], where x broadcasts to out; rounded to the dtype of out."""
    plan = make_plan(out, x) if out.dtype == x.dtype != "mask" else None
    if plan is None:
        map_into(identity, out, x)
        return
    side = tile_side(out.dtype, plan.lanes)
    launch(
        transpose_kernel(out.dtype, len(plan.rest), plan.lanes),
        ceil_div(plan.rows, side) * ceil_div(plan.columns, side) * prod(plan.rest),
        block_shape(out.dtype, plan.lanes),
        out.array,
        x.array,
        *plan[1:],
        shared_bytes=side * side * precision(out.dtype).storage.itemsize,
    )


class Transposition(NamedTuple):
    """A copy as the transposition of many matrices.

    Args:
        lanes: elements that are moved at once, on both sides.
        rest: sizes of the dimensions that number the matrices.
        out_rest: strides of out along them.
        x_rest: strides of x along them.
        rows: of out's matrices, the dimension along which x has stride 1.
        columns: of out's matrices, along which out has stride 1.
        out_row: stride of out from row to row.
        x_column: stride of x from column to column.

    """

    lanes: int
    rest: Ints
    out_rest: Ints
    x_rest: Ints
    rows: int
    columns: int
    out_row: int
    x_column: int


def make_plan(out: View, x: View) -> Transposition | None:
    """None where the elementwise kernel does as well."""
    strides = broadcast_strides(out.shape, x.shape, x.strides)
    itemsize = precision(out.dtype).storage.itemsize
    # Of an address only its alignment counts, so that one plan serves many.
    return _plan(out.shape, out.strides, strides, itemsize, (out.address | x.address) % BYTES)


@lru_cache(4096)
def _plan(
    shape: Ints, out_strides: Ints, x_strides: Ints, itemsize: int, addresses: int
) -> Transposition | None:
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
    rows, columns, out_row, x_column = shape[row], shape[last], out_strides[row], x_strides[last]
    lanes = BYTES // itemsize
    while lanes > 1 and (
        addresses % (lanes * itemsize) != 0
        or any(n % lanes != 0 for n in (rows, columns, out_row, x_column, *out_rest, *x_rest))
    ):
        lanes //= 2
    return Transposition(lanes, rest, out_rest, x_rest, rows, columns, out_row, x_column)


def tile_side(dtype: str, lanes: int) -> int:
    """Rows of a tile, and columns: 128 bytes or more, whole memory transactions."""
    if SIMULATED:
        return max(4, 2 * lanes)
    return 32 if dtype == "float64" else 64


def block_shape(dtype: str, lanes: int) -> tuple[int, int]:
    """Threads of a block: as many as a tile's row has vectors, and lines of them."""
    vectors = tile_side(dtype, lanes) // lanes
    return vectors, min(vectors, MOST_THREADS // vectors)


@cache
def transpose_kernel(dtype: str, rest_dims: int, lanes: int) -> Any:
    """The kernel that transposes matrices tile by tile.

    Args:
        dtype: of both sides.
        rest_dims: number of dimensions that number the matrices.
        lanes: elements of a vector.

    """
    side = tile_side(dtype, lanes)
    vectors, lines = block_shape(dtype, lanes)
    squares = vectors // lines  # of lanes x lanes elements, that a thread reads
    held = squares * lanes * lanes
    storage = numba.from_dtype(precision(dtype).storage)
    load, store = vector_access(lanes)
    find_tile, offset = tile_place(side), group_offset(rest_dims, 1, types.uint32)
    short = types.uint32

    @device_function
    def in_tile(row, vector):
        """Where a vector of a row begins in shared memory; the order of a row's vectors changes
        from row to row, so that those of a column, too, lie in different banks."""
        return (row * vectors + (vector ^ (row // lanes))) * lanes

    @kernel(vectors * lines)
    def transpose(out, x, rest, out_rest, x_rest, rows, columns, out_row, x_column):
        tile = cuda.shared.array(0, storage)  # (side, side); a static one may not be aligned
        values = cuda.local.array(held, storage)
        one = cuda.local.array(lanes, storage)
        matrix, row0, column0 = find_tile(rows, columns)
        p = offset(matrix, rest, out_rest) + row0 * out_row + column0
        q = offset(matrix, rest, x_rest) + column0 * x_column + row0
        # Of the tile; 32 bits are enough within it, and 64 would double the instructions.
        rows, columns = short(min(rows - row0, side)), short(min(columns - column0, side))
        i, line = short(cuda.threadIdx.x), short(cuda.threadIdx.y)

        # Neighbouring threads along a row of x. All vectors are read before the first is needed;
        # beyond an edge the edge's is read, since a branch would hold up those after it.
        q += min(short(i * lanes), short(rows - lanes))
        for square in range(squares):
            column = min(short((line + square * lines) * lanes), short(columns - lanes))
            for k in range(lanes):
                load(x, q + short(column + k) * x_column, one)
                for j in range(lanes):
                    values[(square * lanes + k) * lanes + j] = one[j]
        for square in range(squares):
            for j in range(lanes):
                for k in range(lanes):
                    one[k] = values[(square * lanes + k) * lanes + j]
                store(tile, in_tile(short(i * lanes + j), short(line + square * lines)), one)
        cuda.syncthreads()
        column = short(i * lanes)
        for step in range(squares * lanes):  # and along a row of out
            row = short(line + step * lines)
            if row < rows and column < columns:
                load(tile, in_tile(row, i), one)
                store(out, p + row * out_row + column, one)

    return transpose


@cache
def tile_place(side: int) -> Any:
    """Device function `(rows, columns)`: the matrix of a block, its tile's first row and column.

    A band is `BAND` tiles high, and its tiles are numbered from the top down. So blocks that are at
    work at one time read pieces of x that follow one another in memory, and write such of out.
    """
    number_type = types.uint32  # enough to number tiles, and quick to divide

    @device_function
    def find_tile(rows, columns):
        # uint32() each time: numba would go on in 64 bits.
        down = number_type((rows - 1) // side + 1)
        across = number_type((columns - 1) // side + 1)
        tiles, tiles_of_band = number_type(down * across), number_type(BAND * across)
        block = number_type(cuda.blockIdx.x)
        matrix = number_type(block // tiles)
        number = number_type(block - matrix * tiles)
        first = number_type(number // tiles_of_band * BAND)
        height = min(number_type(down - first), number_type(BAND))
        number = number_type(number - first * across)
        column = number_type(number // height)
        row = number_type(first + number - column * height)
        return matrix, types.int64(row) * side, types.int64(column) * side

    return find_tile


def instances() -> Iterator[Instance]:
    """Kernels for the compile tests: transpositions, and casts from and to float32."""
    for dtype in ("float32", "float64", "float16", "bfloat16"):
        array = precision(dtype).array
        most = longest_vector(dtype)
        for dims, lanes in ((1, 1), (1, most), (2, most)) if dtype == "float32" else ((1, most),):
            ints = types.UniTuple(types.int64, dims)
            yield Instance(
                f"transpose[{dtype}, rest_dims={dims}, {lanes=}]",
                transpose_kernel(dtype, dims, lanes),
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
