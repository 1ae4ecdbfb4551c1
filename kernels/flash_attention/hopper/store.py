"""How the Hopper forward kernel writes its output: registers, to rows of global memory."""

from __future__ import annotations

from functools import cache
from typing import Any

from ...gpu.ptx import pack_pair, shfl_sync_bfly_b32, st_global_v4_b32_if
from ...gpu.register_tile import RegisterTile
from ...gpu.runtime import device_function, types
from ...gpu.traced import select, traced, u32, u64
from .tiles import Kind


@cache
def store_rows(kind: Kind) -> Any:
    """Function `(tile, addresses, valid, columns, lane)`: a tile (64, value_dim) to rows of memory.

    `addresses` are those of the two rows' first elements, `valid` says for each row whether it is
    written, and of the columns the first `columns` are (int32).

    A lane has two neighbours of every eight columns, 4 bytes. The four lanes of a row exchange
    theirs, so that each has all eight of every fourth group, and write 16 bytes at a time. Rows
    that do not come in such pieces are written number by number.
    """
    tile = RegisterTile(kind.value_dim)
    if not kind.vectors:
        return _store_each(kind)
    pack = pack_pair(kind.precision)

    @traced(
        types.void, tile.type, types.UniTuple(types.uint64, 2), types.UniTuple(types.boolean, 2),
        types.int32, types.int32,
    )  # fmt: skip
    def store(sums, addresses, valid, columns, lane):
        quarter = lane & 3
        left = columns - quarter * 8
        odd, high = (lane & 1) != 0, (lane & 2) != 0
        for r in range(2):
            for first in range(0, kind.value_dim // 8, 4):
                words = [
                    pack(sums[4 * j + 2 * r], sums[4 * j + 2 * r + 1])
                    for j in range(first, first + 4)
                ]
                words = transposed(words, odd, high)
                inside = u32(valid[r] & (left > 8 * first))
                address = addresses[r] + u64(quarter) * 16
                st_global_v4_b32_if(inside, address + 16 * first, words)

    return store


def _store_each(kind: Kind) -> Any:
    put, u64 = RegisterTile(kind.value_dim).store(kind.precision, pairs=False), types.uint64

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


__all__ = ["store_rows", "transposed"]
