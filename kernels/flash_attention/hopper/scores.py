"""What FlashAttention does with a warpgroup's tile of scores in registers: masks.

How a tile lies is told in hopper/tiles.py: a lane has two rows, 8 apart, and of every 8 columns two
neighbours, the other six being with the three lanes beside it.
"""

from __future__ import annotations

from functools import cache
from typing import Any

from ...gpu.runtime import NEGATIVE_INFINITY, types
from ...gpu.traced import fma, i64, select, traced
from ..fragments.masks import mask_number
from .tiles import Kind, tile_type


def places(columns: int) -> list[tuple[int, int, int, int]]:
    """For each number of a tile: its place, j, r and c (see hopper/tiles.py)."""
    return [
        (4 * j + 2 * r + c, j, r, c)
        for j in range(columns // 8)
        for r in range(2)
        for c in range(2)
    ]


# ----- masks -----


@cache
def mask_scores(kind: Kind, columns: int) -> Any:
    """Traced `(scores, row, key, band, mask, mask_place, scale)`: -inf where the query may not see
    the key; an additive mask is added to scale * scores.

    `row` and `key` are those of the lane's first score. `band` is (lower, upper, seqlen_q,
    seqlen_k): query i sees keys i + lower ... i + upper - 1. `mask_place` is where the head's mask
    begins, and its strides.
    """
    tile, whole = tile_type(columns), types.int32
    no_mask, is_bool = kind.mask == "none", kind.mask == "bool"

    @traced(
        tile, tile, whole, whole, types.UniTuple(whole, 4), None, types.UniTuple(types.int64, 3),
        types.float32,
    )  # fmt: skip
    def run(scores, row, key, band, mask, mask_place, scale):
        lower, upper, seqlen_q, seqlen_k = band
        start, row_step, column_step = mask_place
        rows = [row, row + 8]
        first = [x + lower - key for x in rows]
        end = [_least(x + upper, seqlen_k) - key for x in rows]
        # Where there is no number of the mask another is read, to no effect: no branch.
        starts = [start + i64(_least(x, seqlen_q - 1)) * row_step for x in rows]
        out, keys = list(scores), {}
        for place, j, r, c in places(columns):
            column = 8 * j + c
            visible = (first[r] <= column) & (end[r] > column)
            score = scores[place]
            if not no_mask:
                if column not in keys:
                    keys[column] = i64(_least(key + column, seqlen_k - 1)) * column_step
                number = mask[starts[r] + keys[column]]
                if is_bool:
                    visible = visible & (number != 0)
                else:
                    score = fma(score, scale, mask_number(kind.mask, number))
            out[place] = select(visible, score, NEGATIVE_INFINITY)
        return out

    return run


@cache
def end_scores(columns: int) -> Any:
    """Traced `(scores, row, key, upper, seqlen_k)`: `mask_scores` where no row's band begins within
    the tile, and there is no mask.
    """
    tile, whole = tile_type(columns), types.int32

    @traced(tile, tile, whole, whole, whole, whole)
    def run(scores, row, key, upper, seqlen_k):
        end = [_least(x + upper, seqlen_k) - key for x in (row, row + 8)]
        out = list(scores)
        for place, j, r, c in places(columns):
            out[place] = select(end[r] > 8 * j + c, scores[place], NEGATIVE_INFINITY)
        return out

    return run


def _least(a: Any, b: Any) -> Any:
    return select(a < b, a, b)


__all__ = ["end_scores", "mask_scores"]
