"""What FlashAttention does with a tile of scores in a warp's registers: masks, softmax, dropout.

How a tile of sums lies is told in mma/tiles.py. A lane has two rows of a row block, 8 apart, whose
other columns are with its three neighbours.
"""

from __future__ import annotations

from functools import cache
from typing import Any

from ...gpu.ptx import (
    ld_global_f32,
    ld_shared_v2_f32,
    mul_rn_f32,
    opaque,
    shfl_sync_bfly_f32,
    st_global_f32_if,
)
from ...gpu.runtime import NEGATIVE_INFINITY, types
from ...gpu.traced import exp2, fma, i32, i64, maximum, select, traced, u32, u64
from ..fragments.dropout import WORDS, kept_of_keys, kept_of_queries
from ..fragments.masks import mask_number
from ..softmax import (
    LOG2_E,
)
from .tiles import Kind, rows_type, sums_type

NEIGHBOURS = (1, 2)  # of a lane in its row: exclusive or of their numbers


def _places(row_blocks: int, columns: int) -> list[tuple[int, int, int]]:
    """For each sum of a tile: its place, which of the lane's rows it is in, and how far its column
    is from the lane's first.
    """
    blocks = columns // 8
    return [
        (4 * (i * blocks + j) + 2 * r + c, 2 * i + r, 8 * j + c)
        for i in range(row_blocks)
        for r in range(2)
        for j in range(blocks)
        for c in range(2)
    ]


def _distances(row_blocks: int, columns: int, keys_are_rows: bool) -> list[tuple[int, int, int]]:
    """For each sum of a tile of scores: its place, and how far its query and its key are from the
    lane's first ones, which are row t // 4 and column 2 (t % 4).
    """
    return [
        (place, column, 8 * row) if keys_are_rows else (place, 8 * row, column)
        for place, row, column in _places(row_blocks, columns)
    ]


# ----- rows -----


@cache
def constant_rows(row_blocks: int, columns: int) -> Any:
    """Traced `(x)`: a tile of sums full of x; with 0 columns a number for each of a lane's rows."""
    kind = sums_type(row_blocks, columns) if columns else rows_type(row_blocks)

    @traced(kind, types.float32)
    def fill(x):
        return [x] * len(kind)

    return fill


@cache
def row_max(row_blocks: int, columns: int) -> Any:
    """Traced `(tile, m)`: the largest of each row and of m."""
    kind = rows_type(row_blocks)

    @traced(kind, sums_type(row_blocks, columns), kind)
    def largest(tile, m):
        out = list(m)
        for place, row, *_ in _places(row_blocks, columns):
            out[row] = maximum(out[row], tile[place])
        for lane in NEIGHBOURS:
            out = [maximum(x, shfl_sync_bfly_f32(x, lane)) for x in out]
        return out

    return largest


@cache
def row_total(row_blocks: int) -> Any:
    """Traced `(l)`: the sum over the lanes of a row."""

    @traced(rows_type(row_blocks), rows_type(row_blocks))
    def total(l):
        for lane in NEIGHBOURS:
            l = [x + shfl_sync_bfly_f32(x, lane) for x in l]
        return l

    return total


@cache
def reciprocal_rows(row_blocks: int) -> Any:
    """Traced `(l, numerator)`: numerator / l; 0 for a row that saw no key, NaN for one with an
    infinite score, which has no softmax.
    """

    @traced(rows_type(row_blocks), rows_type(row_blocks), types.float32)
    def run(l, numerator):
        return [select(x == 0.0, 0.0, numerator / x + (x - x)) for x in l]

    return run


@cache
def pick_row(row_blocks: int) -> Any:
    """Traced `(rows, n)`: the n-th of a lane's rows; the last one if there are not so many."""

    @traced(types.float32, rows_type(row_blocks), types.int32)
    def run(rows, n):
        out = rows[-1]
        for number, x in enumerate(rows[:-1]):
            out = select(n == number, x, out)
        return out

    return run


def exponential(kind: Kind) -> Any:
    """Within traced functions `(score, scale, shift)`: exp2(scale * score - shift), or where there
    is an additive mask exp(score - shift).
    """

    def power(score: Any, scale: Any, shift: Any) -> Any:
        if kind.additive:
            return exp2((score - shift) * LOG2_E)
        return exp2(fma(score, scale, -shift))

    return power


@cache
def softmax_rows(kind: Kind, row_blocks: int, columns: int) -> Any:
    """Traced `(scores, m, m_new, l, scale)`: P = exp2(scale * S - scale * m_new), the lane's part
    of l = alpha l + rowsum(P), and alpha = exp2(scale * m - scale * m_new). With an additive mask
    the scale is 1, and the difference is times log2(e).
    """
    tile, rows, power = sums_type(row_blocks, columns), rows_type(row_blocks), exponential(kind)

    @traced(types.Tuple((tile, rows, rows)), tile, rows, rows, rows, types.float32)
    def run(scores, m, m_new, l, scale):
        # No key yet: 2**(-inf - 0) = 0, not NaN. With an infinite score the sum is infinite.
        shift = [select(x - x == 0.0, x * scale, 0.0) for x in m_new]
        # Weights before this tile are relative to scale * m as it was rounded.
        alpha = [power(mul_rn_f32(x, scale), 1.0, s) for x, s in zip(m, shift, strict=True)]
        weights, sums = list(scores), [x * a for x, a in zip(l, alpha, strict=True)]
        for place, row, *_ in _places(row_blocks, columns):
            weights[place] = power(scores[place], scale, shift[row])
            sums[row] = sums[row] + weights[place]
        return weights, sums, alpha

    return run


@cache
def any_changes(row_blocks: int) -> Any:
    """Traced `(factor)`: whether the factor of any of the lane's rows is not 1."""

    @traced(types.boolean, rows_type(row_blocks))
    def run(factor):
        changes = [x != 1.0 for x in factor]
        out = changes[0]
        for x in changes[1:]:
            out = out | x
        return out

    return run


@cache
def scale_rows(row_blocks: int, columns: int) -> Any:
    """Traced `(tile, factor)`: each row times its factor."""
    tile = sums_type(row_blocks, columns)

    @traced(tile, tile, rows_type(row_blocks))
    def run(sums, factor):
        out = list(sums)
        for place, row, *_ in _places(row_blocks, columns):
            out[place] = sums[place] * factor[row]
        return out

    return run


@cache
def scale_all(row_blocks: int) -> Any:
    """Traced `(rows, factor)`: a number for each of a lane's rows, times the factor."""

    @traced(rows_type(row_blocks), rows_type(row_blocks), types.float32)
    def run(rows, factor):
        return [x * factor for x in rows]

    return run


# ----- masks -----


@cache
def mask_scores(kind: Kind, row_blocks: int, columns: int, keys_are_rows: bool = False) -> Any:
    """Traced `(scores, row, key, band, mask, mask_place, scale)`: scores as the mask leaves them,
    times the scale if the kind says so. -inf where the query may not see the key.

    `row` and `key` are the lane's first query and key (see `_distances`), `band` is (lower, upper,
    seqlen_q, seqlen_k), and `mask_place` where the head's mask begins, and its strides.
    """
    tile, whole = sums_type(row_blocks, columns), types.int32
    arguments = (tile, whole, whole, types.UniTuple(whole, 4), None)
    no_mask, is_bool = kind.mask == "none", kind.mask == "bool"
    scaled = kind.scaled_first
    # Column by column: few places in the mask are kept at a time.
    distances = sorted(
        _distances(row_blocks, columns, keys_are_rows), key=lambda x: x[1 if keys_are_rows else 2]
    )
    queries, keys = (tuple(sorted({place[n] for place in distances})) for n in (1, 2))

    @traced(tile, *arguments, types.UniTuple(types.int64, 3), types.float32)
    def run(scores, row, key, band, mask, mask_place, scale):
        lower, upper, seqlen_q, seqlen_k = band
        start, row_step, column_step = mask_place
        row, key, out = i32(opaque(u32(row))), i32(opaque(u32(key))), list(scores)
        if keys_are_rows:  # bounds of the queries of a key
            first = {n: key + (n + 1) - upper - row for n in keys}
            end = {n: _least(key + (n + 1) - lower, seqlen_q) - row for n in keys}
        else:  # bounds of the keys of a query
            first = {n: row + n + lower - key for n in queries}
            end = {n: _least(row + n + upper, seqlen_k) - key for n in queries}
        # Where there is no number of the mask another is read, to no effect: no branch.
        rows = {n: start + i64(_least(row + n, seqlen_q - 1)) * row_step for n in queries}
        key_places = {}
        for place, query_n, key_n in distances:
            own, other = (key_n, query_n) if keys_are_rows else (query_n, key_n)
            visible = (first[own] < other + 1) & (end[own] > other)
            score = scores[place]
            if scaled and not kind.additive:
                score = mul_rn_f32(score, scale)
            if not no_mask:
                if key_n not in key_places:
                    key_places[key_n] = i64(_least(key + key_n, seqlen_k - 1)) * column_step
                number = mask[rows[query_n] + key_places[key_n]]
                if is_bool:
                    visible = visible & (number != 0)
                else:
                    score = fma(score, scale, mask_number(kind.mask, number))
            out[place] = select(visible, score, NEGATIVE_INFINITY)
        return out

    return run


def _least(a: Any, b: Any) -> Any:
    return select(a < b, a, b)


# ----- gradients -----


@cache
def read_own_rows(row_blocks: int) -> Any:
    """Traced `(x, start, row, length, beyond)`: of the lane's rows the numbers x[start + row] and
    on, and `beyond` for rows past `length`.
    """
    whole = types.int32

    @traced(rows_type(row_blocks), None, types.int64, whole, whole, types.float32)
    def run(x, start, row, length, beyond):
        rows = [row + 8 * n for n in range(2 * row_blocks)]
        found = [x[start + i64(_least(r, length - 1))] for r in rows]
        return [select(r < length, y, beyond) for r, y in zip(rows, found, strict=True)]

    return run


@cache
def score_gradients(kind: Kind, row_blocks: int, columns: int, keys_are_rows: bool) -> Any:
    """Traced `(scores, dp, shift, delta, scale, row, key, dropout, keep)`: P with 0 where the
    weight is dropped, and dS = P * (Z dP - delta), from S and dP = dO V^T.

    P is exp2(scale * S - shift), see `exponential`. With queries as rows shift and delta are
    numbers for the lane's rows; with keys as rows they are the places in shared memory of those of
    the lane's first query.
    """
    tile, number = sums_type(row_blocks, columns), types.float32
    of_rows = types.uint32 if keys_are_rows else rows_type(row_blocks)
    blocks, kept_of = columns // 8, kept_of_keys if keys_are_rows else kept_of_queries
    power = exponential(kind)

    @traced(
        types.Tuple((tile, tile)), tile, tile, of_rows, of_rows, number, types.uint32,
        types.uint32, WORDS, number,
    )  # fmt: skip
    def run(scores, dp, shifts, delta, scale, row, key, dropout, keep):
        weights, gradients = list(scores), list(scores)
        if keys_are_rows:
            pairs = [[ld_shared_v2_f32(x + 32 * j) for j in range(blocks)] for x in (shifts, delta)]
        rows_of = {place: own for place, own, _ in _places(row_blocks, columns)}
        keeps = ((place, None) for place in rows_of)
        if kind.dropout:
            keeps = kept_of(row_blocks, columns, row, key, dropout)
        for place, kept in keeps:
            if keys_are_rows:
                shift, less = (p[place // 4 % blocks][place % 2] for p in pairs)
            else:
                shift, less = shifts[rows_of[place]], delta[rows_of[place]]
            p, upstream = power(scores[place], scale, shift), dp[place]
            weights[place] = p
            if kind.dropout:
                weights[place] = select(kept, p, 0.0)
                upstream = select(kept, upstream * keep, 0.0)
            gradients[place] = p * (upstream - less)
        return weights, gradients

    return run


@cache
def scale_columns(row_blocks: int, columns: int) -> Any:
    """Traced `(tile, other, address, column, length)`: both tiles, each column times a factor of
    `length` float32 at the address. `column` is the lane's first; those past the end get the last
    factor, to no effect.
    """
    tile, whole = sums_type(row_blocks, columns), types.int32

    @traced(types.Tuple((tile, tile)), tile, tile, types.uint64, whole, whole)
    def run(sums, other, address, column, length):
        factors = {}
        results = list(sums), list(other)
        for place, _, distance in _places(row_blocks, columns):
            if distance not in factors:
                at = _least(column + distance, length - 1)
                factors[distance] = ld_global_f32(address + u64(i64(at)) * 4)
            for result in results:
                result[place] = result[place] * factors[distance]
        return results

    return run


@cache
def write_scores(row_blocks: int, columns: int) -> Any:
    """Traced `(tile, address, row, key, seqlen_q, seqlen_k)`: a tile to a matrix of float32 with
    contiguous rows of seqlen_k numbers that begins at the address. Queries are rows.
    """
    whole = types.int32

    @traced(types.void, sums_type(row_blocks, columns), types.uint64, whole, whole, whole, whole)
    def run(tile, address, row, key, seqlen_q, seqlen_k):
        for place, query_n, key_n in _distances(row_blocks, columns, False):
            query, column = row + query_n, key + key_n
            inside = (query < seqlen_q) & (column < seqlen_k)
            place_there = i64(query) * i64(seqlen_k) + i64(column)
            st_global_f32_if(inside, address + u64(place_there) * 4, tile[place])

    return run


__all__ = [
    "any_changes",
    "constant_rows",
    "mask_scores",
    "pick_row",
    "read_own_rows",
    "reciprocal_rows",
    "row_max",
    "row_total",
    "scale_all",
    "scale_columns",
    "scale_rows",
    "score_gradients",
    "softmax_rows",
    "write_scores",
]
