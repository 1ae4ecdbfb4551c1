"""P and dS of one tile in registers: what both kernels of the Hopper backward pass do with it.

    P  = exp2(scale S - L)             0 where the query may not see the key
    dS = P * (Z dP - delta)            Z = 1 / (1 - p) where dropout keeps the weight, else 0

How a warpgroup's tile of 64 rows lies in registers is told in hopper_tiles.py. In the kernel for dQ
its rows are queries and its columns keys. In the kernel for dK and dV it is the other way round:
there the tile is S^T, which makes P^T and dS^T, as they lie, the first factors of P^T dO and dS^T Q.
Functions take either, and `keys_are_rows` says which. The numbers of a query, its logsumexp L and
delta = rowsum(dO * O), are two of a lane's registers if queries are rows; if they are columns, they
are read from shared memory where they are needed: 16 numbers L, then 16 of delta, and so on.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np

from ..ptx import (
    ld_shared_v2_f32,
    mov_b32_halves,
    pack_pair,
    shfl_sync_idx_b32,
    st_global_b16_if,
    st_global_f32_if,
    st_global_v4_b32_if,
)
from ..runtime import device_function, types
from ..traced import exp2, fma, i64, select, traced, u32, u64
from .hopper_store import _transposed as transposed
from .hopper_scores import LOG2_E, bits_type, loaded, places
from .hopper_tiles import PAIR, Kind, tile_type
from .mma_scores import philox_words

WORD, WHOLE = types.uint32, types.int32
FAR = types.UniTuple(types.int64, 3)


def _of_queries(keys_are_rows: bool, given: Any) -> Any:
    """A function of j, r and c: the number of that place's query."""
    if not keys_are_rows:
        return lambda j, r, c: given[r]
    pairs: dict[int, Any] = {}

    def number(j: int, r: int, c: int) -> Any:
        if j not in pairs:
            pairs[j] = ld_shared_v2_f32(given + (j // 2 * 128 + j % 2 * 32))
        return pairs[j][c]

    return number


@cache
def zeros(columns: int) -> Any:
    """Traced `()`: a tile of zeros."""

    @traced(tile_type(columns))
    def run():
        return [np.float32(0)] * (columns // 2)

    return run


def _given(keys_are_rows: bool) -> Any:
    return WORD if keys_are_rows else PAIR


# ----- P -----


@cache
def probabilities(columns: int, keys_are_rows: bool) -> Any:
    """Traced `(scores, scale, logsumexp)`: exp2(scale * scores - logsumexp)."""
    tile = tile_type(columns)

    @traced(tile, tile, types.float32, _given(keys_are_rows))
    def run(scores, scale, logsumexp):
        shift, out = _of_queries(keys_are_rows, logsumexp), list(scores)
        for place, j, r, c in places(columns):
            out[place] = exp2(fma(scores[place], scale, -shift(j, r, c)))
        return out

    return run


def _bounds(keys_are_rows: bool, row: Any, column: Any, band: Any) -> tuple[list[Any], list[Any]]:
    """For each of a lane's rows, the first of the lane's columns in the band, and one past the last.

    `row` and `column` are the lane's first ones: column 8 j + c of the tile is number 8 j + c here.
    """
    lower, upper, seqlen_q, seqlen_k = band
    rows = [row - column, row - column + 8]
    if keys_are_rows:  # query i sees key j iff j - upper < i <= j - lower
        return [x - upper + 1 for x in rows], [x - lower + 1 for x in rows]
    last = seqlen_k - column
    ends = [x + upper for x in rows]
    return [x + lower for x in rows], [select(x < last, x, last) for x in ends]


@cache
def hide(mask: str, columns: int, keys_are_rows: bool) -> Any:
    """Traced `(p, row, column, band, mask, mask_place)`: P with 0 where the band, a bool mask, or
    the end of the keys hides a key from a query.

    `row` and `column` are the lane's first ones. `band` is (lower, upper, seqlen_q, seqlen_k):
    query i sees keys i + lower ... i + upper - 1. `mask_place` is where the head's mask begins,
    and its strides.
    """
    tile, band = tile_type(columns), types.UniTuple(WHOLE, 4)
    is_bool = mask == "bool"

    @traced(tile, tile, WHOLE, WHOLE, band, None, FAR)
    def run(p, row, column, band, mask, mask_place):
        first, end = _bounds(keys_are_rows, row, column, band)
        number = _mask_reader(keys_are_rows, row, column, band, mask, mask_place)
        out = list(p)
        for place, j, r, c in places(columns):
            visible = (first[r] <= 8 * j + c) & (end[r] > 8 * j + c)
            if is_bool:
                visible = visible & (number(j, r, c) != 0)
            out[place] = select(visible, p[place], 0.0)
        return out

    return run


@cache
def add_mask(mask: str, columns: int, keys_are_rows: bool) -> Any:
    """Traced `(scores, scale, row, column, band, mask, mask_place)`: scale * scores plus an additive
    mask, in units of log 2.
    """
    tile, band, kind = tile_type(columns), types.UniTuple(WHOLE, 4), mask

    @traced(tile, tile, types.float32, WHOLE, WHOLE, band, None, FAR)
    def run(scores, scale, row, column, band, mask, mask_place):
        number = _mask_reader(keys_are_rows, row, column, band, mask, mask_place)
        out = list(scores)
        for place, j, r, c in places(columns):
            out[place] = fma(scores[place], scale, loaded(kind, number(j, r, c)) * LOG2_E)
        return out

    return run


def _mask_reader(
    keys_are_rows: bool, row: Any, column: Any, band: Any, mask: Any, mask_place: Any
) -> Any:
    """A function of j, r and c: the mask's number there.

    Where there is none another is read, to no effect: no branch.
    """
    start, query_step, key_step = mask_place
    last_query, last_key = band[2] - 1, band[3] - 1
    row_end, column_end = (last_key, last_query) if keys_are_rows else (last_query, last_key)
    row_step, column_step = (key_step, query_step) if keys_are_rows else (query_step, key_step)
    found: dict[tuple[str, int], Any] = {}

    def offset(name: str, n: int, x: Any, end: Any, step: Any) -> Any:
        if (name, n) not in found:
            place = x + n
            found[name, n] = i64(select(place < end, place, end)) * step
        return found[name, n]

    def number(j: int, r: int, c: int) -> Any:
        across = offset("column", 8 * j + c, column, column_end, column_step)
        return mask[start + offset("row", 8 * r, row, row_end, row_step) + across]

    return number


@cache
def weigher(kind: Kind, columns: int, keys_are_rows: bool) -> Any:
    """Device function: P of a tile of scores; `whole` says that the band hides no key of it."""
    additive, is_bool = kind.mask not in ("none", "bool"), kind.mask == "bool"
    add = add_mask(kind.mask if additive else "float32", columns, keys_are_rows)
    exponentials = probabilities(columns, keys_are_rows)
    hide_from = hide(kind.mask, columns, keys_are_rows)
    # What is computed for keys past the end is not written, where keys are rows.
    hides = is_bool or kind.banded or not keys_are_rows

    @device_function
    def weigh(scores, scale, logsumexp, whole, row, column, band, mask, mask_place):
        if additive:
            scores = add(scores, scale, row, column, band, mask, mask_place)
            p = exponentials(scores, types.float32(1.0), logsumexp)
        else:
            p = exponentials(scores, scale, logsumexp)
        if hides:
            if is_bool or not whole:
                p = hide_from(p, row, column, band, mask, mask_place)
        return p

    return weigh


# ----- dS -----


@cache
def score_gradients(columns: int, keys_are_rows: bool) -> Any:
    """Traced `(p, dp, keep, delta)`: P * (keep * dP - delta); `keep` is 1 without dropout."""
    tile = tile_type(columns)

    @traced(tile, tile, tile, types.float32, _given(keys_are_rows))
    def run(p, dp, keep, delta):
        shift, out = _of_queries(keys_are_rows, delta), list(p)
        for place, j, r, c in places(columns):
            out[place] = p[place] * fma(dp[place], keep, -shift(j, r, c))
        return out

    return run


@cache
def as_factor(precision: str, columns: int) -> Any:
    """Traced `(tile)`: rounded to 16 bits, in pairs, as the first factor of a product.

    The factor's registers of a step of 16 along k are those of 16 columns, in the same order
    (`wgmma_rs`).
    """
    pack = pack_pair(precision)

    @traced(types.UniTuple(WORD, columns // 4), tile_type(columns))
    def run(tile):
        return [pack(tile[n], tile[n + 1]) for n in range(0, columns // 2, 2)]

    return run


# ----- dropout of S^T -----


@cache
def keep_bits_of_keys(columns: int) -> Any:
    """Traced `(query, key, lane, seed, batch_head, threshold)`: `hopper_scores.keep_bits` for a
    tile whose rows are keys. `query` and `key` are those of the lane's first place.

    The generator's four words are for four neighbouring keys: those of the four lanes that have one
    column. Each calls it for one of four places (r, c), and they exchange what they found.
    """

    @traced(bits_type(columns), WORD, WORD, WORD, types.UniTuple(WORD, 2), WORD, WORD)
    def run(query, key, lane, seed, batch_head, threshold):
        mine = (lane >> 2) & 3  # this lane's place is r = mine // 2, c = mine % 2
        group, row = (key >> 2) + (mine >> 1) * 2, query + (mine & 1)
        rows: list[list[Any]] = [[], []]
        for first in range(0, columns // 8, 8):
            bits = lane & 0
            for j in range(first, min(first + 8, columns // 8)):
                for n, number in enumerate(
                    philox_words(group, row + 8 * j, batch_head, seed[0], seed[1])
                ):
                    bits = bits | (u32(number >= threshold) << 4 * (j - first) + n)
            # Bit 4 (j % 8) of these is for this lane's key, its row r and column c.
            others = lane & 0x13
            found = [shfl_sync_idx_b32(bits, others | 4 * n) >> mine for n in range(4)]
            for r in range(2):
                one, other = (x & 0x11111111 for x in found[2 * r : 2 * r + 2])
                rows[r].append(one | (other << 1))
        return rows[0] + rows[1]

    return run


# ----- results -----


@cache
def write_rows(precision: str, columns: int, vectors: bool) -> Any:
    """Traced `(tile, factor, address, row_step, rows, columns)`: a warpgroup's tile times a factor,
    rounded to 16 bits, to global memory.

    `address` is that of the lane's row, `row_step` counts bytes. Of the rows from the lane's first
    one on, and of all columns, `rows` and `columns` are to be written. With `vectors` rows begin at
    multiples of 16 bytes and are as long: then each lane of a quad writes eight neighbours.
    """
    pack = pack_pair(precision)
    arguments = (tile_type(columns), types.float32, types.uint64, types.uint64, WHOLE, WHOLE, WHOLE)

    @traced(types.void, *arguments)
    def run(tile, factor, address, row_step, rows, wanted, lane):
        quarter = lane & 3
        odd, high = (lane & 1) != 0, (lane & 2) != 0
        for r, start in enumerate((address, address + row_step * 8)):
            inside = rows > 8 * r
            words = [
                pack(*(tile[4 * j + 2 * r + c] * factor for c in range(2)))
                for j in range(columns // 8)
            ]
            if vectors:
                left = wanted - quarter * 8
                for j in range(0, columns // 8, 4):
                    own = transposed(words[j : j + 4], odd, high)
                    place = start + u64(quarter) * 16 + 16 * j
                    st_global_v4_b32_if(u32(inside & (left > 8 * j)), place, own)
                continue
            left = wanted - quarter * 2
            for j, word in enumerate(words):
                for c, half in enumerate(mov_b32_halves(word)):
                    place = start + u64(quarter) * 4 + (16 * j + 2 * c)
                    st_global_b16_if(u32(inside & (left > 8 * j + c)), place, half)

    return run


@cache
def write_scores(columns: int) -> Any:
    """Traced `(tile, address, row_step, rows, columns)`: a tile of float32, as `write_rows` does."""

    @traced(types.void, tile_type(columns), types.uint64, types.uint64, WHOLE, WHOLE)
    def run(tile, address, row_step, rows, wanted):
        starts = [address, address + row_step * 8]
        inside = [rows > 8 * r for r in range(2)]
        for place, j, r, c in places(columns):
            there = starts[r] + 4 * (8 * j + c)
            st_global_f32_if(u32(inside[r] & (wanted > 8 * j + c)), there, tile[place])

    return run


__all__ = [
    "as_factor",
    "keep_bits_of_keys",
    "score_gradients",
    "weigher",
    "write_rows",
    "write_scores",
    "zeros",
]
