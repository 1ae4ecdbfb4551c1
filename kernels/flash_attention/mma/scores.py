"""What FlashAttention does with a tile of scores in a warp's registers: softmax, gradients.

Masks are in fragments/scores.py, dropout in fragments/dropout.py, and what any tile in registers
goes through in gpu/register_tile.py. A lane has two rows of a row block, 8 apart, whose other
columns are with its three neighbours.
"""

from __future__ import annotations

from functools import cache
from typing import Any

from ...gpu.ptx import ld_global_f32, ld_shared_v2_f32, mul_rn_f32
from ...gpu.register_tile import RegisterTile, shift_of
from ...gpu.runtime import device_function, types
from ...gpu.traced import i64, select, traced, u64
from ..fragments.dropout import WORDS, kept_of_keys, kept_of_queries
from ..fragments.scores import exponential, least, mask_scores, modify_scores
from ..schedule_cuda import is_whole
from .tiles import Kind

WHOLE = types.int32

# ----- the rule -----


@cache
def tile_checker(kind: Kind, block_m: int, block_n: int) -> Any:
    """Device function `(row0, key0, full, sizes)`: whether all scores of a tile count; `full` is
    what a list says of it. Queries past the end count, but where a score function reads arrays for
    them.
    """
    is_sparse, has_mask_mod = kind.is_sparse, kind.functions.mask is not None
    no_query_past_the_end = kind.functions.score is not None

    @device_function
    def all_count(row0, key0, full, sizes):
        if is_sparse:
            return full
        if has_mask_mod:
            return False
        if no_query_past_the_end:
            fits = row0 + block_m <= sizes.seqlen_q
            return fits and is_whole(row0, block_m, key0, block_n, sizes)
        return is_whole(row0, block_m, key0, block_n, sizes)

    return all_count


@cache
def score_rule(
    kind: Kind,
    tile: RegisterTile,
    block: tuple[int, int],
    keys_are_rows: bool = False,
    derives: bool = False,
) -> Any:
    """Device function `(s, query, key, row0, key0, full, sizes, band, mask, place, scale, words)`:
    scores as the rule of scores.py leaves them; with `derives` and a score function its slopes come
    after them, see `mask_scores`. (query, key) is the lane's first score, (row0, key0) the tile's.
    """
    functions, has_score = kind.functions, kind.functions.score is not None
    options = functions, derives and has_score, kind.approximate
    masked = mask_scores(kind.mask, tile, kind.scaled_first, keys_are_rows, True, *options)
    modified = modify_scores(tile, functions, keys_are_rows, *options[1:]) if has_score else None
    always = kind.mask != "none" or (kind.scaled_first and not has_score)
    all_count = tile_checker(kind, *block)

    @device_function
    def rule(s, query, key, row0, key0, full, sizes, band, mask, place, scale, words):
        if always or not all_count(row0, key0, full, sizes):
            return masked(s, query, key, band, mask, place, scale, words)
        if has_score:
            return modified(s, query, key, band, place, scale, words)
        return s

    return rule


# ----- rows -----


@cache
def reciprocal_rows(tile: RegisterTile) -> Any:
    """Traced `(l, numerator)`: numerator / l; 0 for a row that saw no key, NaN for one with an
    infinite score, which has no softmax.
    """
    return tile.each_row(
        lambda l, numerator: select(l == 0.0, 0.0, numerator / l + (l - l)),
        tile.rows_type, types.float32,
    )  # fmt: skip


@cache
def pick_row(tile: RegisterTile) -> Any:
    """Traced `(rows, n)`: the n-th of a lane's rows; the last one if there are not so many."""

    @traced(types.float32, tile.rows_type, WHOLE)
    def run(rows, n):
        out = rows[-1]
        for number, x in enumerate(rows[:-1]):
            out = select(n == number, x, out)
        return out

    return run


@cache
def any_changes(tile: RegisterTile) -> Any:
    """Traced `(factor)`: whether the factor of any of the lane's rows is not 1."""

    @traced(types.boolean, tile.rows_type)
    def run(factor):
        changes = [x != 1.0 for x in factor]
        out = changes[0]
        for x in changes[1:]:
            out = out | x
        return out

    return run


@cache
def softmax_rows(kind: Kind, tile: RegisterTile) -> Any:
    """Traced `(scores, m, m_new, l, scale)`: P = exp2(scale * S - scale * m_new), the lane's part
    of l = alpha l + rowsum(P), and alpha = exp2(scale * m - scale * m_new). With an additive mask
    the scale is 1, and the difference is times log2(e).

    Weights are added to l one by one, not to each other first as in `RegisterTile.own_row_sum`: so
    they need no register of their own.
    """
    rows, power = tile.rows_type, exponential(kind)

    @traced(types.Tuple((tile.type, rows, rows)), tile.type, rows, rows, rows, types.float32)
    def run(scores, m, m_new, l, scale):
        # With an infinite score the sum is infinite.
        shift = [shift_of(x, scale) for x in m_new]
        # Weights before this tile are relative to scale * m as it was rounded.
        alpha = [power(mul_rn_f32(x, scale), 1.0, s) for x, s in zip(m, shift, strict=True)]
        weights, sums = list(scores), [x * a for x, a in zip(l, alpha, strict=True)]
        for p in tile.places():
            weights[p.register] = power(scores[p.register], scale, shift[p.own_row])
            sums[p.own_row] = sums[p.own_row] + weights[p.register]
        return weights, sums, alpha

    return run


# ----- gradients -----


@cache
def read_own_rows(tile: RegisterTile) -> Any:
    """Traced `(x, start, row, length, beyond)`: of the lane's rows the numbers x[start + row] and
    on, and `beyond` for rows past `length`.
    """

    @traced(tile.rows_type, None, types.int64, WHOLE, WHOLE, types.float32)
    def run(x, start, row, length, beyond):
        rows = [row + 8 * n for n in range(len(tile.rows_type))]
        found = [x[start + i64(least(r, length - 1))] for r in rows]
        return [select(r < length, y, beyond) for r, y in zip(rows, found, strict=True)]

    return run


@cache
def score_gradients(
    kind: Kind, tile: RegisterTile, keys_are_rows: bool, derives: bool = True
) -> Any:
    """Traced `(scores, dp, shift, delta, scale, row, key, dropout, keep)`: P with 0 where the
    weight is dropped; dS = P * (Z dP - delta), from S and dP = dO V^T; and the same before a score
    function's derivative, whose slopes come after the scores.

    P is exp2(scale * S - shift), see `exponential`. With queries as rows shift and delta are
    numbers for the lane's rows; with keys as rows they are the places in shared memory of those of
    the lane's first query.
    """
    sums, number = tile.type, types.float32
    derives = derives and kind.functions.score is not None
    of_rows = types.uint32 if keys_are_rows else tile.rows_type
    blocks, kept_of = tile.columns // 8, kept_of_keys if keys_are_rows else kept_of_queries
    power, count = exponential(kind), tile.registers
    given = types.UniTuple(number, count * (1 + derives))

    @traced(
        types.Tuple((sums, sums, sums)), given, sums, of_rows, of_rows, number, types.uint32,
        types.uint32, WORDS, number,
    )  # fmt: skip
    def run(scores, dp, shifts, delta, scale, row, key, dropout, keep):
        weights, gradients = list(scores[:count]), list(scores[:count])
        if keys_are_rows:
            pairs = [[ld_shared_v2_f32(x + 32 * j) for j in range(blocks)] for x in (shifts, delta)]
        places = list(tile.places())
        keeps = ((p.register, None) for p in places)
        if kind.dropout:
            keeps = kept_of(tile, row, key, dropout)
        for place, kept in keeps:
            if keys_are_rows:
                j, c = divmod(places[place].column, 8)
                shift, less = (pair[j][c] for pair in pairs)
            else:
                own_row = places[place].own_row
                shift, less = shifts[own_row], delta[own_row]
            p, upstream = power(scores[place], scale, shift), dp[place]
            weights[place] = p
            if kind.dropout:
                weights[place] = select(kept, p, 0.0)
                upstream = select(kept, upstream * keep, 0.0)
            gradients[place] = p * (upstream - less)
        if not derives:
            return weights, gradients, gradients
        # 0 times an infinite slope is 0.
        slopes = scores[count:]
        before = [select(g == 0.0, 0.0, g * x) for g, x in zip(gradients, slopes, strict=True)]
        return weights, before, gradients

    return run


@cache
def scale_columns(tile: RegisterTile) -> Any:
    """Traced `(tile, other, address, column, length)`: both tiles, each column times a factor of
    `length` float32 at the address. `column` is the lane's first; those past the end get the last
    factor, to no effect.
    """

    @traced(types.Tuple((tile.type, tile.type)), tile.type, tile.type, types.uint64, WHOLE, WHOLE)
    def run(sums, other, address, column, length):
        factors = {}
        for p in tile.places():
            if p.column not in factors:
                at = least(column + p.column, length - 1)
                factors[p.column] = ld_global_f32(address + u64(i64(at)) * 4)
        return [[x[p.register] * factors[p.column] for p in tile.places()] for x in (sums, other)]

    return run


__all__ = [
    "any_changes",
    "pick_row",
    "read_own_rows",
    "reciprocal_rows",
    "scale_columns",
    "score_gradients",
    "score_rule",
    "softmax_rows",
]
