"""Tiles between global and shared memory, and from registers back."""

from __future__ import annotations

from functools import cache
from typing import Any

from ...gpu.ptx import (
    cp_async_cg_16,
    cp_async_commit_group,
    cp_async_wait_group,
    global_address,
    mad_wide_u32,
    pack_pair,
    st_shared_b32,
)
from ...gpu.register_tile import RegisterTile
from ...gpu.runtime import (
    cuda,
    device_function,
    precision,
    types,
    warp_barrier,
)
from ...gpu.traced import i32, select, traced, u32, word_of
from ...gpu.vectors import vector_access
from .tiles import Kind, Tiles, thread_number


def copy_team(kind: Kind, width: int) -> int:
    """How many threads copy a row of a tile, a power of two."""
    return 1 << (width // kind.lanes - 1).bit_length()


@cache
def tile_copier(kind: Kind, threads: int, rows: int, columns: int, width: int) -> Any:
    """Device function `(memory, base, place, x, start, row_step, count)` that begins to copy rows
    of a matrix to a tile, filled up with zeros.

    The tile is `place` bytes from the beginning `base` of `memory`; the matrix begins at x[start],
    has `count` rows and `columns` columns, in rows that begin at multiples of 16 bytes, less than
    2**32 bytes apart.

    Args:
        kind: says the dtype, and whether the copy goes on while the threads do (`cp.async`).
        threads: of the block.
        rows: of the tile, a multiple of 16 that the rows of one turn divide.
        columns: of the matrix; what stands in a row's last 16 bytes behind them is not read.
        width: columns of the tile.

    """
    step, lanes, itemsize, turing = kind.step(width), kind.lanes, kind.itemsize, kind.turing
    of_row = width // lanes  # pieces
    team = copy_team(kind, width)  # some of them idle
    apart, exact = threads // team, columns == width
    turns = -(-rows // apart)
    storage = getattr(types, precision(kind.precision).storage.name)
    (read, write), uint = vector_access(lanes), types.uint32
    copy_pieces = _piece_copier(turns, apart, step)

    @device_function
    def copy(memory, base, place, x, start, row_step, count):
        thread = thread_number()
        row, column = thread // team, thread % team * lanes
        size = 16 if exact else min(max((columns - column) * itemsize, 0), 16)
        if (team == of_row or column < width) and (apart <= rows or row < rows):
            target = place + row * step + column * itemsize
            if not turing:
                source = global_address(x) + types.uint64((start + column) * itemsize)
                copy_pieces(
                    uint(base + target), source, uint(row_step * itemsize), uint(row), count, size
                )
            else:
                found = cuda.local.array(lanes, storage)
                for turn in range(turns):
                    here = row + turn * apart
                    if size == 16 and here < count:
                        read(x, start + types.int64(here) * row_step + column, found)
                    else:
                        for n in range(lanes):
                            found[n] = storage(0)
                            if here < count and n * itemsize < size:
                                found[n] = x[start + types.int64(here) * row_step + column + n]
                    write(memory, (target + turn * apart * step) // itemsize, found)

    return copy


def _piece_copier(turns: int, apart: int, step: int) -> Any:
    """Traced `(target, source, row_bytes, row, count, size)`: a thread's pieces of a tile, in the
    rows row, row + apart, ..., whose first is copied to `target`. `source` is where row 0 of the
    matrix has the piece; `size` bytes of it are read, none in rows past `count`.
    """
    word = types.uint32

    @traced(types.void, word, types.uint64, word, word, types.int32, types.int32)
    def copy(target, source, row_bytes, row, count, size):
        for turn in range(turns):
            inside = i32(row) < count - turn * apart
            there = mad_wide_u32(row + turn * apart, row_bytes, source)
            cp_async_cg_16(target + (turn * apart * step), there, u32(select(inside, size, 0)))

    return copy


@cache
def copy_barriers(kind: Kind) -> Any:
    """Device functions: `commit()` closes a group of copies, `wait()` waits for all of them."""

    @device_function
    def commit():
        if not turing:
            cp_async_commit_group()

    @device_function
    def wait():
        if not turing:
            wait_group()

    turing, wait_group = kind.turing, cp_async_wait_group(0)
    return commit, wait


@cache
def pair_copier(kind: Kind, tiles: Tiles, rows: int, places: tuple[int, int]) -> Any:
    """Device function `(memory, base, at, first, second, row, length)` that begins to copy two
    tiles of the same rows, `row` and on, of matrices of `length` rows, D and Dv columns, each given
    as (array, start, row_step). They go `at` bytes behind their places.
    """
    place, place_2 = places
    copy = tile_copier(kind, tiles.threads, rows, kind.head_dim, kind.width)
    copy_2 = tile_copier(kind, tiles.threads, rows, kind.value_dim, kind.value_width)

    @device_function
    def copy_pair(memory, base, at, first, second, row, length):
        x, start, row_step = first
        copy(memory, base, place + at, x, start + row * row_step, row_step, length - row)
        y, start_2, row_step_2 = second
        copy_2(memory, base, place_2 + at, y, start_2 + row * row_step_2, row_step_2, length - row)

    return copy_pair


@cache
def put_rows(kind: Kind, row_blocks: int, width: int, step: int) -> Any:
    """Traced `(tile, place)`: a tile of sums to shared memory, rounded to the kind's dtype.
    `place` is that of the lane's first two numbers.
    """
    sums = RegisterTile(width, row_blocks)
    pack = pack_pair(kind.precision, kind.turing) if kind.itemsize == 2 else None

    @traced(types.void, sums.type, types.uint32)
    def put(tile, place):
        for p in list(sums.places())[::2]:
            pair = tile[p.register : p.register + 2]
            to = place + (p.row * step + p.column * kind.itemsize)
            if kind.itemsize == 2:
                st_shared_b32(to, pack(*pair))
            else:
                st_shared_b32(to, word_of(pair[0]))
                st_shared_b32(to + 4, word_of(pair[1]))

    return put


@cache
def row_writer(kind: Kind, row_blocks: int, columns: int, width: int) -> Any:
    """Device function `(memory, base, place, tile, out, start, row_step, count, first)` that writes
    a warp's tile of sums to the columns `first` and on of a matrix, by way of its own part of
    shared memory.

    That part is `place` bytes from `base`, 16 * row_blocks rows of `kind.step(width)` bytes; the
    matrix's first row of this warp is at out[start], and `count` are left of it.

    Args:
        kind: says the dtype.
        row_blocks: of the tile.
        columns: of the matrix.
        width: columns of the tile; what is beyond those of the matrix is left out.

    """
    step, itemsize, rows = kind.step(width), kind.itemsize, 16 * row_blocks
    at_once = kind.lanes if columns % kind.lanes == 0 else 1
    of_row = width // at_once
    pieces = rows * of_row
    storage = getattr(types, precision(kind.precision).storage.name)
    read, write = vector_access(at_once)
    put, uint = put_rows(kind, row_blocks, width, step), types.uint32

    @device_function
    def write_rows(memory, base, place, tile, out, start, row_step, count, first):
        lane = thread_number() % 32
        put(tile, uint(base + place + lane // 4 * step + lane % 4 * 2 * itemsize))
        warp_barrier()
        found = cuda.local.array(at_once, storage)
        for piece in range(lane, pieces, 32):
            row, column = piece // of_row, piece % of_row * at_once
            if row < count and first + column < columns:
                read(memory, (place + row * step) // itemsize + column, found)
                write(out, start + types.int64(row) * row_step + first + column, found)

    return write_rows


__all__ = [
    "copy_barriers",
    "pair_copier",
    "row_writer",
    "tile_copier",
]
