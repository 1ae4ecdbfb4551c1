"""Dropout of tiles of scores in registers, as the tensor cores leave them (gpu/register_tile.py).

Of each 16 x 16 block a lane has eight weights. If rows are queries they are those that one call of
the generator decides (philox.py): the lane makes the call, and needs no other's. If rows are keys,
a lane's eight are four of one call and four of another, and the lane 4 further on has the others of
both: each makes one of the two calls, and tells the other what it found.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any

from ...gpu.ptx import opaque, shfl_sync_bfly_b32
from ...gpu.register_tile import RegisterTile
from ...gpu.runtime import device_function, types
from ...gpu.traced import select, traced, u32, u64

MULTIPLIERS = 0xD2511F53, 0xCD9E8D57
KEY_STEPS = 0x9E3779B9, 0xBB67AE85
AT_ONCE = 4  # calls of the generator, which share their keys
WORDS = types.UniTuple(types.uint32, 4)  # what `dropout_words` gives


@device_function
def dropout_words(seed, batch_head, threshold):
    """The generator's key, low word and high word, batch_head, and the threshold. One of 2**32
    wraps around to 0: there `keep`, the factor of all weights, is 0.
    """
    return (
        types.uint32(seed & types.uint64(0xFFFFFFFF)), types.uint32(seed >> types.uint64(32)),
        types.uint32(batch_head), types.uint32(threshold & 0xFFFFFFFF),
    )  # fmt: skip


def _philox(places: list[tuple[Any, Any]], dropout: Any) -> list[list[Any]]:
    """Four words for each counter (c0, c1, batch_head, 0), in 32-bit arithmetic."""
    low, high, batch_head, _ = dropout
    low, high = opaque(low), opaque(high)
    calls: list[list[Any]] = [[c0, c1, batch_head, 0] for c0, c1 in places]
    for _ in range(10):
        for n, (c0, c1, c2, c3) in enumerate(calls):
            p0, p1 = u64(c0) * MULTIPLIERS[0], u64(c2) * MULTIPLIERS[1]
            calls[n] = [u32(p1 >> 32) ^ c1 ^ low, u32(p1), u32(p0 >> 32) ^ c3 ^ high, u32(p0)]
        low, high = low + KEY_STEPS[0], high + KEY_STEPS[1]
    return calls


def _exchanged(word: Any) -> Any:
    """The halves of a word, exchanged."""
    return (word << 16) | (word >> 16)


def _blocks(tile: RegisterTile) -> list[list[tuple[int, int]]]:
    """The 16 x 16 blocks (down, across) of a tile, AT_ONCE at a time."""
    found = [(i, j) for i in range(tile.row_blocks) for j in range(tile.columns // 16)]
    return [found[n : n + AT_ONCE] for n in range(0, len(found), AT_ONCE)]


def kept_of_queries(
    tile: RegisterTile, row: Any, key: Any, dropout: Any
) -> Iterator[tuple[int, Any]]:
    """For each weight of a tile whose rows are queries its register, and whether it is kept.

    `row` and `key` are the lane's first query and key. What is to be done with a few weights is
    done before the next few are decided on.
    """
    threshold = dropout[3]
    across = ((key >> 4) << 2) + ((key >> 1) & 3)
    down = ((row >> 4) << 3) + (row & 7)
    for blocks in _blocks(tile):
        found = _philox([(across + 4 * j, down + 8 * i) for i, j in blocks], dropout)
        for words, (i, j) in zip(found, blocks, strict=True):
            for n, word in enumerate(words):
                half, r = divmod(n, 2)
                for c, number in enumerate((_exchanged(word), word)):
                    yield tile.register_at(2 * i + r, 16 * j + 8 * half + c), number >= threshold


def kept_of_keys(tile: RegisterTile, row: Any, key: Any, dropout: Any) -> Iterator[tuple[int, Any]]:
    """`kept_of_queries` for a tile whose rows are keys, and whose columns are queries."""
    for blocks in _blocks(tile):
        bits = _bits_of_keys(blocks, row, key, dropout)
        for n, (i, j) in enumerate(blocks):
            for m in range(8):
                r, half, c = m // 4, m // 2 % 2, m % 2
                bit = 1 << 16 * c + 4 * n + 2 * r + half
                yield tile.register_at(2 * i + r, 16 * j + 8 * half + c), (bits & bit) != 0


def _bits_of_keys(blocks: list[tuple[int, int]], row: Any, key: Any, dropout: Any) -> Any:
    """A bit for each of a lane's weights of up to four blocks whose rows are keys, 1 if it is kept.

    Bit 16 c + 4 n + 2 r + half: of block n the key 8 r and the query 8 half + c, counted from the
    lane's first. A call decides on keys of both parities and on queries of one. The lane with the
    even key makes the call for the even queries.
    """
    threshold = dropout[3]
    odd = key & 1
    is_odd = odd != 0
    down = ((key >> 4) << 2) + ((key >> 1) & 3)
    across = ((row >> 4) << 3) + (row & 7) + odd
    found = _philox([(down + 4 * i, across + 8 * j) for i, j in blocks], dropout)
    zero = odd & 0
    mine = theirs = zero
    for n, words in enumerate(found):
        for m, word in enumerate(words):
            other, bit = _exchanged(word), 1 << 4 * n + m
            mine = select(select(is_odd, word, other) >= threshold, mine | bit, mine)
            theirs = select(select(is_odd, other, word) >= threshold, theirs | bit, theirs)
    received = shfl_sync_bfly_b32(theirs, 4)
    return select(is_odd, received | mine << 16, mine | received << 16)


@cache
def drop(tile: RegisterTile) -> Any:
    """Traced `(weights, row, key, dropout)`: P with 0 where a weight is dropped; rows are queries.

    `row` and `key` are the lane's first query and key, `dropout` is of `dropout_words`.
    """

    @traced(tile.type, tile.type, types.uint32, types.uint32, WORDS)
    def run(weights, row, key, dropout):
        out = list(weights)
        for place, kept in kept_of_queries(tile, row, key, dropout):
            out[place] = select(kept, weights[place], 0.0)
        return out

    return run


# ----- where a tile is used twice: bits, which take fewer registers -----


def bits_type(tile: RegisterTile) -> Any:
    """numba type of `keep_bits_of_keys`."""
    return types.UniTuple(types.uint32, len(_blocks(tile)))


@cache
def keep_bits_of_keys(tile: RegisterTile) -> Any:
    """Traced `(row, key, dropout)`: a bit for each weight of a tile whose 16 rows are keys, for
    `drop_by_bits`.
    """

    @traced(bits_type(tile), types.uint32, types.uint32, WORDS)
    def run(row, key, dropout):
        return [_bits_of_keys(blocks, row, key, dropout) for blocks in _blocks(tile)]

    return run


@cache
def drop_by_bits(tile: RegisterTile) -> Any:
    """Traced `(weights, bits)`: the tile with 0 where `keep_bits_of_keys` has no bit."""

    @traced(tile.type, tile.type, bits_type(tile))
    def run(weights, bits):
        out = []
        for p in tile.places():
            half_block, c = divmod(p.column, 8)
            j, half = divmod(half_block, 2)
            bit = 1 << 16 * c + 4 * (j % AT_ONCE) + 2 * p.own_row + half
            out.append(select((bits[j // AT_ONCE] & bit) != 0, weights[p.register], 0.0))
        return out

    return run


__all__ = [
    "bits_type",
    "drop",
    "drop_by_bits",
    "dropout_words",
    "keep_bits_of_keys",
    "kept_of_keys",
    "kept_of_queries",
]
