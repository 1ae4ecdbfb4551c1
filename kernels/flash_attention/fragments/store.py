"""From the registers of a warp or a warpgroup to rows of global memory: outputs and gradients."""

from __future__ import annotations

from functools import cache
from typing import Any

from ...gpu.ptx import pack_pair, shfl_sync_bfly_b32, st_global_f32_if, st_global_v4_b32_if
from ...gpu.register_tile import RegisterTile
from ...gpu.runtime import device_function, types
from ...gpu.traced import i64, select, traced, u32, u64

WHOLE = types.int32


@cache
def store_rows(precision: str, columns: int, vectors: bool) -> Any:
    """Function `(tile, addresses, valid, columns, lane)`: a tile of 16 rows of a warp, rounded to
    16 bits, to rows of memory.

    `addresses` are those of the two rows' first elements, `valid` says for each row whether it is
    written, and of the columns the first `columns` are (int32).

    A lane has two neighbours of every eight columns, 4 bytes. With `vectors`, where rows begin at
    multiples of 16 bytes and are as long, the four lanes of a row exchange theirs, so that each has
    all eight of every fourth group, and write 16 bytes at a time. Other rows are written number by
    number.
    """
    tile = RegisterTile(columns)
    if not vectors:
        return _store_each(precision, tile)
    pack = pack_pair(precision)

    @traced(
        types.void, tile.type, types.UniTuple(types.uint64, 2), types.UniTuple(types.boolean, 2),
        WHOLE, WHOLE,
    )  # fmt: skip
    def store(sums, addresses, valid, wanted, lane):
        quarter = lane & 3
        left = wanted - quarter * 8
        odd, high = (lane & 1) != 0, (lane & 2) != 0
        for r in range(2):
            for first in range(0, columns // 8, 4):
                words = [
                    pack(sums[4 * j + 2 * r], sums[4 * j + 2 * r + 1])
                    for j in range(first, first + 4)
                ]
                words = transposed(words, odd, high)
                inside = u32(valid[r] & (left > 8 * first))
                address = addresses[r] + u64(quarter) * 16
                st_global_v4_b32_if(inside, address + 16 * first, words)

    return store


def _store_each(precision: str, tile: RegisterTile) -> Any:
    put, u64 = tile.store(precision, pairs=False), types.uint64

    @device_function
    def store(sums, addresses, valid, columns, lane):
        first = (lane & 3) * 2
        own = u64(addresses[0] + u64(2 * first)), u64(addresses[1] + u64(2 * first))
        put(sums, own, valid, columns - first)

    return store


def transposed(words: list[Any], odd: Any, high: Any) -> list[Any]:
    """Word n of the quad's lane m becomes word m of lane n: each exchange of two words in two lanes
    swaps one bit of m with one of n.
    """
    a, b, c, d = words
    a, b = _exchange(a, b, odd, 1)
    c, d = _exchange(c, d, odd, 1)
    a, c = _exchange(a, c, high, 2)
    b, d = _exchange(b, d, high, 2)
    return [a, b, c, d]


def _exchange(a: Any, b: Any, second: Any, lane_mask: int) -> tuple[Any, Any]:
    """The first lane's b against the second lane's a."""
    other = shfl_sync_bfly_b32(select(second, a, b), lane_mask)
    return select(second, other, a), select(second, b, other)


@cache
def write_scores(tile: RegisterTile) -> Any:
    """Traced `(tile, address, row, column, rows, columns)`: a tile to a matrix (rows, columns) of
    float32, contiguous, that begins at the address. `row` and `column` are the lane's first ones.
    """

    @traced(types.void, tile.type, types.uint64, WHOLE, WHOLE, WHOLE, WHOLE)
    def run(sums, address, row, column, rows, columns):
        starts = {}
        for p in tile.places():
            if p.own_row not in starts:
                place = i64(row + p.row) * i64(columns) + i64(column)
                starts[p.own_row] = address + u64(place) * 4
            inside = (row + p.row < rows) & (column + p.column < columns)
            st_global_f32_if(inside, starts[p.own_row] + 4 * p.column, sums[p.register])

    return run


__all__ = ["store_rows", "write_scores"]
