"""A tile of scores in the registers of tensor cores: masks (scores.py) and exponentials.

The tile is a `RegisterTile`; mma and wgmma leave their sums alike. Its rows are queries, or keys
where S^T is computed.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np

from ...gpu.ptx import mul_rn_f32, opaque
from ...gpu.register_tile import RegisterTile
from ...gpu.runtime import NEGATIVE_INFINITY, types
from ...gpu.traced import exp2, f32, float_of, fma, i32, i64, select, traced, u32
from ..scores import (
    LOG2_E,
    Masked,
    Tools,
    Where,
    counts,
    is_additive,
    keys_of,
    masked_score,
    nearest,
    queries_of,
)

WHOLE = types.int32
BAND = types.UniTuple(WHOLE, 4)  # lower, upper, seqlen_q, seqlen_k
PLACE = types.UniTuple(types.int64, 5)  # of `head_place`
LARGEST = float(np.finfo(np.float32).max)


def mask_number(name: str, number: Any) -> Any:
    """Within traced functions: an additive mask's number as float32."""
    if name == "bfloat16":
        return float_of(u32(number) << 16)
    x = f32(number)
    return nearest(number, x, LARGEST, select) if name == "float64" else x


def least(a: Any, b: Any) -> Any:
    """Within traced functions: the smaller one."""
    return select(a < b, a, b)


@cache
def mask_scores(
    mask: str,
    tile: RegisterTile,
    scales: bool = False,
    keys_are_rows: bool = False,
    begins: bool = True,
) -> Any:
    """Traced `(scores, query, key, band, mask, place, scale)`: scores as the rule leaves them.

    `query` and `key` are those of the lane's first score, `band` is (lower, upper, seqlen_q,
    seqlen_k), and `place` of `head_place`. Rows past the end, of which nothing is ever written, get
    any score.

    Args:
        mask: "none", "bool", or an additive mask's dtype.
        tile: of the scores.
        scales: whether scores are also multiplied by the scale, as always with an additive mask.
        keys_are_rows: whether the tile is S^T.
        begins: whether some row's band may begin within the tile; not so under a causal mask.

    """
    # Column by column: few places in the mask are kept at a time.
    places = sorted(tile.places(), key=lambda p: (p.column, p.row))

    @traced(tile.type, tile.type, WHOLE, WHOLE, BAND, None, PLACE, types.float32)
    def run(scores, query, key, band, numbers, place, scale):
        lower, upper, seqlen_q, seqlen_k = band
        batch, head, start, query_step, key_step = place
        tools = Tools(select, lambda s, x: fma(s, scale, mask_number(mask, x)), NEGATIVE_INFINITY)
        masked = masked_score(mask, tools)
        query, key = i32(opaque(u32(query))), i32(opaque(u32(key)))
        row, column, columns, seen = query, key, seqlen_k, keys_of
        if keys_are_rows:
            row, column, columns, seen = key, query, seqlen_q, queries_of
        limits = {}
        for p in places:
            if p.row not in limits:
                first, end = seen(row + p.row, lower, upper)
                limits[p.row] = first - column if begins else 0, least(end, columns) - column
        # Where there is no number of the mask another is read, to no effect: no branch.
        far = {}

        def offset(is_query: bool, n: int) -> Any:
            if (is_query, n) not in far:
                first, end, step = (
                    (query, seqlen_q, query_step) if is_query else (key, seqlen_k, key_step)
                )
                far[is_query, n] = i64(least(first + n, end - 1)) * step
            return far[is_query, n]

        out = list(scores)
        for p in places:
            query_n, key_n = (p.column, p.row) if keys_are_rows else (p.row, p.column)
            score, number = scores[p.register], None
            if scales and not is_additive(mask):
                score = mul_rn_f32(score, scale)
            if mask != "none":
                number = numbers[start + offset(True, query_n) + offset(False, key_n)]
            where = Where(batch, head, query + query_n, key + key_n)
            out[p.register] = masked(score, counts(True, p.column, *limits[p.row]), number, where)
        return out

    return run


def exponential(kind: Masked) -> Callable[..., Any]:
    """Within traced functions `(score, scale, shift)`: exp2(scale * score - shift), or where there
    is an additive mask, and the score is scaled, exp(score - shift).
    """

    def power(score: Any, scale: Any, shift: Any) -> Any:
        if kind.additive:
            return exp2((score - shift) * LOG2_E)
        return exp2(fma(score, scale, -shift))

    return power


__all__ = ["exponential", "least", "mask_number", "mask_scores"]
