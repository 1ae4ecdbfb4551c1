"""Rows of a matrix on a GPU: which threads read which columns, and sums over the threads of a row.

The team of a row is one warp, or several where the row is long: a whole block, unless teams meet
by `team_sums`, which has a barrier for each. A thread reads vectors of up to 16 bytes and keeps
what it read in registers, so that a kernel that needs a row twice (the sum, then the quotients)
reads it from memory once:

    columns   0 1 2 3 | 4 5 6 7 | ...      with vectors of 4
    thread       0    |    1    | ... thread 31, then thread 0 again with its second vector

A row too long for that is read tile by tile, each time that it is needed.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

from .ptx import bar_sync
from .runtime import (
    SIMULATED,
    WARP,
    ceil_div,
    cuda,
    device_function,
    is_available,
    precision,
    shuffle_xor,
    types,
    warp_max,
    warp_sum,
)
from .vectors import longest_vector, vector_access, vector_load_or

MOST_VECTORS = 16  # that a thread keeps
TILED_THREADS = 512  # of the team of a row that is read in tiles


@dataclass(frozen=True)
class RowShape:
    """How a block reads rows.

    Args:
        threads: of a row's team: a multiple of 32.
        rows: rows that a block works on at once, one team each; 1 if they are tiled.
        vector: elements that a thread reads at once.
        vectors: vectors that a thread keeps.
        tiled: a row is longer than its team keeps.

    """

    threads: int
    rows: int
    vector: int
    vectors: int
    tiled: bool

    @property
    def values(self) -> int:
        """Elements that a thread keeps."""
        return self.vector * self.vectors

    @property
    def tile(self) -> int:
        """Columns that a team keeps."""
        return self.threads * self.values

    @property
    def block(self) -> tuple[int, int]:
        """Threads of a block: a team along x, rows along y."""
        return self.threads, self.rows


@cache
def row_shape(
    precision_name: str,
    columns: int,
    bytes_kept: int,
    rows: int = 4,
    most_threads: int = 1024,
) -> RowShape:
    """The shape for rows of this length.

    Args:
        precision_name: of the elements.
        columns: length of a row.
        bytes_kept: of registers, for what a thread keeps of one row.
        rows: rows of a block where a warp is enough for a row.
        most_threads: of a row's team.

    """
    most_values = bytes_kept // (8 if precision_name == "float64" else 4)
    vector = _vector_size(precision_name, columns)
    most = max(1, min(most_values // vector, MOST_VECTORS))
    threads = WARP
    while threads < most_threads and threads * vector * most < columns:
        threads *= 2
    if threads * vector * most < columns:
        # Beside its values a thread then keeps its place in the row: more registers for each.
        return RowShape(min(threads, TILED_THREADS), 1, vector, most, True)
    vectors = ceil_div(ceil_div(columns, vector), threads)
    if vectors > 4:  # few different kernels, though some threads then have nothing to read
        vectors = min(most, 1 << (vectors - 1).bit_length())
    return RowShape(threads, rows if threads == WARP else 1, vector, vectors, False)


def _vector_size(precision_name: str, columns: int) -> int:
    """The longest vector that divides a row; a shorter one if that gives all threads the same."""
    largest = longest_vector(precision_name, columns)
    half = largest // 2
    wide = 2 * half >= longest_vector(precision_name)
    return half if wide and columns % (WARP * largest) and not columns % (WARP * half) else largest


@cache
def tile_access(precision_name: str, shape: RowShape) -> tuple[Any, Any]:
    """Device functions that move a thread's part of a row's tile.

    `load(x, start, tile, columns, values, fill)`: values[...] = x[start + column], `fill` where a
    column is not below `columns`. `store(y, start, tile, columns, values)` writes them back.
    `start` is the index of the row's first element.
    """
    number = precision(precision_name)
    to_real, to_storage, storage = number.load, number.store, number.storage
    load_vector = vector_load_or(shape.vector, storage.itemsize)
    _, store_vector = vector_access(shape.vector)
    vector, vectors, count = shape.vector, shape.vectors, shape.values
    step, width = shape.threads * shape.vector, shape.tile

    @device_function
    def load(x, start, tile, columns, values, fill):
        stored = cuda.local.array(count, storage)
        one = cuda.local.array(vector, storage)
        first = tile * width + cuda.threadIdx.x * vector
        filling = to_storage(fill)
        for k in range(vectors):  # all reads first: none waits for another
            inside = first + k * step < columns
            load_vector(x, start + first + k * step, inside, filling, one)
            for lane in range(vector):
                stored[k * vector + lane] = one[lane]
        for i in range(count):
            values[i] = to_real(stored[i])

    @device_function
    def store(y, start, tile, columns, values):
        one = cuda.local.array(vector, storage)
        first = tile * width + cuda.threadIdx.x * vector
        for k in range(vectors):
            if first + k * step < columns:
                for lane in range(vector):
                    one[lane] = to_storage(values[k * vector + lane])
                store_vector(y, start + first + k * step, one)

    return load, store


@cache
def weights_access(precision_name: str, shape: RowShape) -> Any:
    """Device function `load(x, tile, k, columns, values)`: what all rows share, a vector at a time.

    values[...] = x[column] for the columns of a thread's vector number k; 0 past the end.
    """
    number = precision(precision_name)
    real, to_real, to_storage = number.real, number.load, number.store
    storage = number.storage
    piece = min(shape.vector, longest_vector(precision_name))  # the rows' elements may be shorter
    load_vector = vector_load_or(piece, storage.itemsize)
    vector, step, width = shape.vector, shape.threads * shape.vector, shape.tile

    @device_function
    def load(x, tile, k, columns, values):
        one = cuda.local.array(piece, storage)
        first = tile * width + cuda.threadIdx.x * vector + k * step
        zero = to_storage(real(0.0))
        for part in range(0, vector, piece):
            load_vector(x, first + part, first < columns, zero, one)
            for lane in range(piece):
                values[part + lane] = to_real(one[lane])

    return load


@cache
def team_sum(precision_name: str, threads: int) -> Any:
    """Device function: the sum of x over the threads of a row, in each of them; a warp's, or else a
    whole block's.
    """
    return _over_team(precision_name, threads, warp_sum, 0.0)


@cache
def team_max(precision_name: str, threads: int) -> Any:
    """Device function: the largest x of the threads of a row, in each of them; a warp's, or else a
    whole block's.
    """
    return _over_team(precision_name, threads, warp_max, float("-inf"))


def _over_team(precision_name: str, threads: int, over_warp: Any, nothing: float) -> Any:
    if threads == WARP:
        return over_warp
    real = precision(precision_name).real
    warps = threads // WARP

    @device_function
    def over_block(x):
        of_warp = cuda.shared.array(warps, real)
        x = over_warp(x)
        lane = cuda.threadIdx.x % WARP
        if lane == 0:
            of_warp[cuda.threadIdx.x // WARP] = x
        cuda.syncthreads()
        x = over_warp(of_warp[lane] if lane < warps else real(nothing))
        cuda.syncthreads()  # all have read before the next call writes
        return x

    return over_block


@cache
def team_sums(precision_name: str, threads: int, rows: int) -> Any:
    """Device function `(x, y)`: the sums of both over the threads of a row, in each of them.

    The teams of a block do not wait for each other: each has a barrier of its own.
    """
    real = precision(precision_name).real
    warps = threads // WARP
    places, steps = 2 * warps, warps.bit_length() - 1
    all_places = places * rows

    @device_function
    def over_warp(x, y):
        return warp_sum(x), warp_sum(y)

    @device_function
    def over_team(x, y):
        of_warp = cuda.shared.array(all_places, real)
        x, y = warp_sum(x), warp_sum(y)
        lane, warp = cuda.threadIdx.x % WARP, cuda.threadIdx.x // WARP
        first, barrier = cuda.threadIdx.y * places, types.uint32(cuda.threadIdx.y + 1)
        if lane == 0:
            of_warp[first + warp] = x
            of_warp[first + warps + warp] = y
        bar_sync(barrier, types.uint32(threads))
        x, y = of_warp[first + lane % warps], of_warp[first + warps + lane % warps]
        bar_sync(barrier, types.uint32(threads))  # all have read before the next call writes
        for step in range(steps):
            x += shuffle_xor(x, 1 << step)
            y += shuffle_xor(y, 1 << step)
        return x, y

    return over_warp if threads == WARP else over_team


@cache
def most_shared_bytes() -> int:
    """Shared memory that a block can have, 1 KB being left for what kernels declare themselves."""
    if SIMULATED or not is_available():
        return 47 * 1024  # what any GPU has
    return int(cuda.get_current_device().MAX_SHARED_MEMORY_PER_BLOCK_OPTIN) - 1024


def row_blocks(rows: int, shape: RowShape) -> int:
    """Blocks that cover all rows."""
    return ceil_div(rows, shape.rows)


@device_function
def block_row(rows_of_block):
    """The row of this thread's team, if each team has one."""
    return types.int64(cuda.blockIdx.x) * rows_of_block + cuda.threadIdx.y
