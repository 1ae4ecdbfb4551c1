"""P and dS of one tile in registers: what both kernels of the Hopper backward pass do with it.

    P  = exp2(scale S - L)             0 where the query may not see the key; with an additive mask
                                       exp(scale S + mask - L)
    dS = P * (Z dP - delta)            Z = 1 / (1 - p) where dropout keeps the weight, else 0

How a warpgroup's tile of 64 rows lies in registers is told in register_tile.py. In the kernel for
dQ its rows are queries and its columns keys. In the kernel for dK and dV it is the other way round:
there the tile is S^T, which makes P^T and dS^T, as they lie, first factors of P^T dO and dS^T Q.
Functions take either, and `keys_are_rows` says which. The numbers of a query, its logsumexp L and
delta = rowsum(dO * O), are two of a lane's registers if queries are rows; if they are columns, they
are read from shared memory where they are needed: 16 numbers L, 16 of delta, 16 rests, and so on.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

from ...gpu.ptx import (
    ld_shared_v2_f32,
    mov_b32_halves,
    mul_rn_f32,
    pack_pair,
    st_global_b16_if,
    st_global_f32_if,
    st_global_v4_b32_if,
)
from ...gpu.register_tile import Place, RegisterTile
from ...gpu.runtime import device_function, types
from ...gpu.traced import exp2, fma, i64, select, traced, u32, u64
from ..fragments.masks import mask_number
from ..softmax import (
    LOG2_E,
)
from .backward_pipeline import ROW_BYTES
from .store import transposed
from .tiles import Kind

WORD, WHOLE = types.uint32, types.int32
BAND = types.UniTuple(WHOLE, 4)
FAR = types.UniTuple(types.int64, 3)


def _of_queries(keys_are_rows: bool, given: Any) -> Callable[[Place], Any]:
    """A function of a place: the number of its query."""
    if not keys_are_rows:
        return lambda place: given[place.own_row]
    pairs: dict[int, Any] = {}

    def number(place: Place) -> Any:
        j, c = divmod(place.column, 8)
        if j not in pairs:
            pairs[j] = ld_shared_v2_f32(given + (j // 2 * (16 * ROW_BYTES) + j % 2 * 32))
        return pairs[j][c]

    return number


def _given(keys_are_rows: bool) -> Any:
    return WORD if keys_are_rows else types.UniTuple(types.float32, 2)


# ----- P -----


@cache
def probabilities(columns: int, keys_are_rows: bool, additive: bool) -> Any:
    """Traced `(scores, scale, shifts)`: exp2(scale * scores - L); with an additive mask, where the
    scores are scaled already, exp(scores - L).
    """
    tile = RegisterTile(columns)

    @traced(tile.type, tile.type, types.float32, _given(keys_are_rows))
    def run(scores, scale, shifts):
        shift = _of_queries(keys_are_rows, shifts)
        if additive:
            return [exp2((scores[p.register] - shift(p)) * LOG2_E) for p in tile.places()]
        return [exp2(fma(scores[p.register], scale, -shift(p))) for p in tile.places()]

    return run


def _bounds(keys_are_rows: bool, row: Any, column: Any, band: Any) -> tuple[list[Any], list[Any]]:
    """For each of a lane's rows the first of its columns in the band, and one past the last.

    `row` and `column` are the lane's first ones; columns count from there.
    """
    lower, upper, _, seqlen_k = band
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
    tile, is_bool = RegisterTile(columns), mask == "bool"

    @traced(tile.type, tile.type, WHOLE, WHOLE, BAND, None, FAR)
    def run(weights, row, column, band, mask, mask_place):
        first, end = _bounds(keys_are_rows, row, column, band)
        number = _mask_reader(keys_are_rows, row, column, band, mask, mask_place)
        out = []
        for p in tile.places():
            visible = (first[p.own_row] <= p.column) & (end[p.own_row] > p.column)
            if is_bool:
                visible = visible & (number(p) != 0)
            out.append(select(visible, weights[p.register], 0.0))
        return out

    return run


@cache
def add_mask(mask: str, columns: int, keys_are_rows: bool) -> Any:
    """Traced `(scores, scale, row, column, band, mask, mask_place)`: scale * scores plus a mask."""
    tile, kind = RegisterTile(columns), mask

    @traced(tile.type, tile.type, types.float32, WHOLE, WHOLE, BAND, None, FAR)
    def run(scores, scale, row, column, band, mask, mask_place):
        number = _mask_reader(keys_are_rows, row, column, band, mask, mask_place)
        return [fma(scores[p.register], scale, mask_number(kind, number(p))) for p in tile.places()]

    return run


def _mask_reader(
    keys_are_rows: bool, row: Any, column: Any, band: Any, mask: Any, mask_place: Any
) -> Callable[[Place], Any]:
    """A function of a place: the mask's number there.

    Where there is none another is read, to no effect: no branch.
    """
    start, query_step, key_step = mask_place
    last_query, last_key = band[2] - 1, band[3] - 1
    row_end, column_end = (last_key, last_query) if keys_are_rows else (last_query, last_key)
    row_step, column_step = (key_step, query_step) if keys_are_rows else (query_step, key_step)
    known: dict[tuple[bool, int], Any] = {}

    def offset(is_row: bool, n: int, first: Any, end: Any, step: Any) -> Any:
        if (is_row, n) not in known:
            place = first + n
            known[is_row, n] = i64(select(place < end, place, end)) * step
        return known[is_row, n]

    def number(place: Place) -> Any:
        down = offset(True, place.row, row, row_end, row_step)
        across = offset(False, place.column, column, column_end, column_step)
        return mask[start + down + across]

    return number


@cache
def weigher(kind: Kind, columns: int, keys_are_rows: bool) -> Any:
    """Device function: P of a tile of scores; `whole` says that the band hides no key of it."""
    additive, is_bool = kind.additive, kind.mask == "bool"
    add = add_mask(kind.mask if additive else "float32", columns, keys_are_rows)
    exponentials = probabilities(columns, keys_are_rows, additive)
    tile, scaled_first = RegisterTile(columns), kind.scaled_first
    scale_all = tile.each(mul_rn_f32, tile.type, types.float32)
    hide_from = hide(kind.mask, columns, keys_are_rows)
    # What is computed for keys past the end is not written, where keys are rows.
    hides = is_bool or kind.banded or not keys_are_rows

    @device_function
    def weigh(scores, scale, shifts, whole, row, column, band, mask, mask_place):
        if additive:
            scores = add(scores, scale, row, column, band, mask, mask_place)
            p = exponentials(scores, types.float32(1.0), shifts)
        elif scaled_first:  # as in the forward pass, to the last bit
            p = exponentials(scale_all(scores, scale), types.float32(1.0), shifts)
        else:
            p = exponentials(scores, scale, shifts)
        if hides:
            if is_bool or not whole:
                p = hide_from(p, row, column, band, mask, mask_place)
        return p

    return weigh


@cache
def complete(columns: int) -> Any:
    """Traced `(p, rests)`: P times the rest of its query; keys are rows, and `rests` is the place
    of that of the lane's first query.
    """
    tile = RegisterTile(columns)

    @traced(tile.type, tile.type, WORD)
    def run(weights, rests):
        rest = _of_queries(True, rests)
        return [weights[p.register] * rest(p) for p in tile.places()]

    return run


# ----- dS -----


@cache
def score_gradients(columns: int, keys_are_rows: bool) -> Any:
    """Traced `(p, dp, keep, delta)`: P * (keep * dP - delta); `keep` is 1 without dropout."""
    tile = RegisterTile(columns)

    @traced(tile.type, tile.type, tile.type, types.float32, _given(keys_are_rows))
    def run(weights, dp, keep, delta):
        shift = _of_queries(keys_are_rows, delta)
        return [weights[p.register] * fma(dp[p.register], keep, -shift(p)) for p in tile.places()]

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
    arguments = (
        RegisterTile(columns).type,
        types.float32,
        types.uint64,
        types.uint64,
        WHOLE,
        WHOLE,
        WHOLE,
    )

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
    """Traced `(tile, address, row_step, rows, columns)`: a tile of float32 to global memory.

    `address` is that of the lane's first number; `rows` and `columns` count from there.
    """
    tile = RegisterTile(columns)

    @traced(types.void, tile.type, types.uint64, types.uint64, WHOLE, WHOLE)
    def run(scores, address, row_step, rows, wanted):
        starts = [address, address + row_step * 8]
        for p in tile.places():
            inside = u32((rows > p.row) & (wanted > p.column))
            st_global_f32_if(inside, starts[p.own_row] + 4 * p.column, scores[p.register])

    return run


__all__ = [
    "complete",
    "score_gradients",
    "weigher",
    "write_rows",
    "write_scores",
]
