"""What FlashAttention does with a warpgroup's tile of scores in registers: masks and dropout.

How a tile lies is told in hopper_tiles.py: a lane has two rows, 8 apart, and of every 8 columns two
neighbours, the other six being with the three lanes beside it.
"""

from __future__ import annotations

from functools import cache
from typing import Any

from ..ptx import shfl_sync_bfly_b32
from ..runtime import NEGATIVE_INFINITY, types
from ..traced import f32, float_of, fma, i64, select, traced, u32
from .hopper_tiles import Kind, tile_type
from .mma_scores import philox_words

LOG2_E = 1.4426950408889634


def places(columns: int) -> list[tuple[int, int, int, int]]:
    """For each number of a tile: its place, j, r and c (see hopper_tiles.py)."""
    return [
        (4 * j + 2 * r + c, j, r, c)
        for j in range(columns // 8)
        for r in range(2)
        for c in range(2)
    ]


# ----- masks -----


@cache
def mask_scores(kind: Kind, columns: int) -> Any:
    """Traced `(scores, row, key, band, mask, mask_place)`: -inf where the query may not see the
    key; an additive mask is added, in units of log 2.

    `row` and `key` are those of the lane's first score. `band` is (lower, upper, seqlen_q,
    seqlen_k): query i sees keys i + lower ... i + upper - 1. `mask_place` is where the head's mask
    begins, and its strides.
    """
    tile, whole = tile_type(columns), types.int32
    no_mask, is_bool = kind.mask == "none", kind.mask == "bool"

    @traced(
        tile, tile, whole, whole, types.UniTuple(whole, 4), None, types.UniTuple(types.int64, 3)
    )
    def run(scores, row, key, band, mask, mask_place):
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
                    score = fma(loaded(kind.mask, number), LOG2_E, score)
            out[place] = select(visible, score, NEGATIVE_INFINITY)
        return out

    return run


def _least(a: Any, b: Any) -> Any:
    return select(a < b, a, b)


def loaded(name: str, number: Any) -> Any:
    """An additive mask's number as float32."""
    if name == "bfloat16":
        return float_of(u32(number) << 16)
    return f32(number)


# ----- dropout -----
#
# The generator gives four words at a time, for four neighbouring columns of a row: those of the
# lanes 2n and 2n + 1. Each of the two lanes calls it for one of their two rows, and they exchange
# what they found: a bit for each weight, 1 if it is kept.

BITS = 32  # of a word: of 8 groups of 4 columns


def bits_type(columns: int) -> Any:
    """numba type of `keep_bits`: the words of the lane's first row, then those of its second."""
    return types.UniTuple(types.uint32, 2 * -(-columns // 64))


@cache
def keep_bits(columns: int) -> Any:
    """Traced `(row, key, lane, seed, batch_head, threshold)`: which weights of a tile are kept.

    `row` and `key` are those of the lane's first score, `seed` has a low and a high word. Of a word
    bit 4 (j % 8) + c belongs to column 8 j + c.
    """
    words = -(-columns // 64)
    word = types.uint32

    @traced(bits_type(columns), word, word, word, types.UniTuple(word, 2), word, word)
    def run(row, key, lane, seed, batch_head, threshold):
        odd = lane & 1
        mine = row + odd * 8
        found = []
        for first in range(0, columns // 8, 8):
            bits = lane & 0
            for j in range(first, min(first + 8, columns // 8)):
                numbers = philox_words((key >> 2) + 2 * j, mine, batch_head, *seed)
                for n, number in enumerate(numbers):
                    bits = bits | u32(number >= threshold) << 4 * (j - first) + n
            found.append(bits)
        others = [shfl_sync_bfly_b32(bits, 1) for bits in found]
        is_odd = odd != 0
        rows = [
            [select(is_odd, b, a) for a, b in zip(found, others, strict=True)],
            [select(is_odd, a, b) for a, b in zip(found, others, strict=True)],
        ]
        # An odd lane has the columns 2 and 3 of the four.
        return [bits >> (odd * 2) for row_bits in rows for bits in row_bits]

    assert len(bits_type(columns)) == 2 * words
    return run


@cache
def drop(columns: int) -> Any:
    """Traced `(tile, bits)`: the tile with 0 where `keep_bits` has no bit."""
    words = -(-columns // 64)

    @traced(tile_type(columns), tile_type(columns), bits_type(columns))
    def run(weights, bits):
        out = list(weights)
        for place, j, r, c in places(columns):
            bit = bits[r * words + j // 8] & (1 << 4 * (j % 8) + c)
            out[place] = select(bit != 0, weights[place], 0.0)
        return out

    return run


__all__ = ["bits_type", "drop", "keep_bits", "loaded", "mask_scores", "places"]
