"""A tile of scores in the registers of tensor cores: masks (scores.py) and exponentials.

The tile is a `RegisterTile`; mma and wgmma leave their sums alike. Its rows are queries, or keys
where S^T is computed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import cache
from operator import itemgetter
from typing import Any

import numpy as np

from ...gpu.ptx import mul_rn_f32, opaque
from ...gpu.register_tile import Place, RegisterTile
from ...gpu.runtime import NEGATIVE_INFINITY, types
from ...gpu.traced import exp2, f32, float_of, fma, i32, i64, select, traced, u32
from ..score_values import Evaluation, Shifted, word_count, words_type
from ..scores import (
    LOG2_E,
    NO_FUNCTIONS,
    Functions,
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
from ..variant import derivative_of

WHOLE = types.int32
BAND = types.UniTuple(WHOLE, 4)  # lower, upper, seqlen_q, seqlen_k
PLACE = types.UniTuple(types.int64, 5)  # of `head_place`
LARGEST = float(np.finfo(np.float32).max)
NO_WORDS = (0,)  # where there are no functions


def mask_number(name: str, number: Any) -> Any:
    """Within traced functions: an additive mask's number as float32."""
    if name == "bfloat16":
        return float_of(u32(number) << 16)
    x = f32(number)
    return nearest(number, x, LARGEST, select) if name == "float64" else x


def least(a: Any, b: Any) -> Any:
    """Within traced functions: the smaller one."""
    return select(a < b, a, b)


class _Tile:
    """Where the scores of a lane are, while a traced function is unrolled."""

    def __init__(self, query: Any, key: Any, band: Any, keys_are_rows: bool) -> None:
        self.query, self.key = i32(opaque(u32(query))), i32(opaque(u32(key)))
        self.lower, self.upper, self.seqlen_q, self.seqlen_k = band
        self.keys_are_rows = keys_are_rows
        self.known: dict[tuple[bool, int], Any] = {}

    def steps(self, place: Place) -> tuple[int, int]:
        """From the lane's first query, and first key, to those of a place."""
        return (
            (place.column, place.row)
            if self.keys_are_rows
            else (place.row, place.column)
        )  # fmt: skip

    def limits(self, rows: Iterable[int], begins: bool) -> dict[int, tuple[Any, Any]]:
        """Of each row the first column that counts, and one past the last."""
        row, column, columns = self.query, self.key, self.seqlen_k
        seen: Callable[[Any, Any, Any], tuple[Any, Any]] = keys_of
        if self.keys_are_rows:
            row, column, columns, seen = self.key, self.query, self.seqlen_q, queries_of
        found: dict[int, tuple[Any, Any]] = {}
        for n in rows:
            if n not in found:
                first, end = seen(row + n, self.lower, self.upper)
                found[n] = first - column if begins else 0, least(end, columns) - column
        return found

    def inside(self, is_query: bool, n: int) -> Any:
        """The n-th query, or key, from the first one; the last that there is if it is beyond."""
        if (is_query, n) not in self.known:
            first, end = (
                (self.query, self.seqlen_q) if is_query else (self.key, self.seqlen_k)
            )  # fmt: skip
            self.known[is_query, n] = least(first + n, end - 1)
        return self.known[is_query, n]

    def exactly(self, is_query: bool, n: int) -> Any:
        """The same where it is known to be inside."""
        return Shifted(self.query if is_query else self.key, n)


class _User:
    """A user's functions, evaluated at places of a tile.

    Args:
        functions: the graphs.
        derives: whether slopes are wanted, too.
        words: what the functions are given.
        tile: of the scores.
        head: batch and head.
        scale: of the scores.
        is_whole: all scores count, and have a query and a key.

    """

    def __init__(
        self,
        functions: Functions,
        derives: bool,
        words: Any,
        tile: _Tile,
        head: tuple[Any, Any],
        scale: Any,
        approximate: bool,
        is_whole: bool = False,
    ) -> None:
        self.tile, self.scale, self.is_whole = tile, scale, is_whole
        self.head = i32(head[0]), i32(head[1])
        self.slopes: list[Any] = []
        self.score_mod = self.mask_mod = None
        if functions.score is not None:
            graph = derivative_of(functions.score).graph if derives else functions.score
            self.score = Evaluation(graph, words, types.float32, approximate)
            self.score_mod = self._modified
        if functions.mask is not None:
            own = words[word_count(functions.score) :] or words  # if it has none
            self.mask = Evaluation(functions.mask, own, types.float32, approximate)
            self.mask_mod = lambda where: self.mask.at(None, where)[0]

    def where(self, place: Place) -> Where:
        """Of a score. What is past the end counts as the last one: functions read inside arrays."""
        query, key = self.tile.steps(place)
        find = self.tile.exactly if self.is_whole else self.tile.inside
        return Where(*self.head, find(True, query), find(False, key))

    def _modified(self, score: Any, where: Where) -> Any:
        natural = mul_rn_f32(score, self.scale)
        found = self.score.at(natural, where, len(self.slopes))
        self.slopes.append(found[1] if len(found) > 1 else None)
        return found[0]


def _in_columns(tile: RegisterTile) -> list[Place]:
    """Column by column: few places in a mask are kept at a time."""
    return sorted(tile.places(), key=lambda p: (p.column, p.row))


def _by_register(places: Sequence[Place], numbers: Sequence[Any]) -> list[Any]:
    return [
        x
        for _, x in sorted(
            zip((p.register for p in places), numbers, strict=True), key=itemgetter(0)
        )
    ]


@cache
def mask_scores(
    mask: str,
    tile: RegisterTile,
    scales: bool = False,
    keys_are_rows: bool = False,
    begins: bool = True,
    functions: Functions = NO_FUNCTIONS,
    derives: bool = False,
    approximate: bool = False,
) -> Any:
    """Traced `(scores, query, key, band, mask, place, scale, words)`: scores as the rule leaves
    them.

    `query` and `key` are those of the lane's first score, `band` is (lower, upper, seqlen_q,
    seqlen_k), `place` of `head_place`, and `words` what the functions are given. Rows past the end,
    of which nothing is ever written, get any score.

    Args:
        mask: "none", "bool", or an additive mask's dtype.
        tile: of the scores.
        scales: whether scores are also multiplied by the scale, as always with an additive mask and
            with a score function.
        keys_are_rows: whether the tile is S^T.
        begins: whether some row's band may begin within the tile; not so under a causal mask.
        functions: the user's.
        derives: behind the scores come the slopes of the score function, derivatives of what it
            gave by what it got.
        approximate: see `score_values.ScoreValues`.

    """
    places, registers = _in_columns(tile), tile.registers * (1 + derives)
    has_score = functions.score is not None
    given = (tile.type, WHOLE, WHOLE, BAND, None, PLACE, types.float32, words_type(functions))

    @traced(types.UniTuple(types.float32, registers), *given)
    def run(scores, query, key, band, numbers, place, scale, words):
        batch, head, start, query_step, key_step = place
        at = _Tile(query, key, band, keys_are_rows)
        user = _User(functions, derives, words, at, (batch, head), scale, approximate)
        scale_of_sum = 1.0 if has_score else scale  # which a score function has had already
        tools = Tools(
            select, lambda s, x: fma(s, scale_of_sum, mask_number(mask, x)), NEGATIVE_INFINITY,
            user.score_mod, user.mask_mod,
        )  # fmt: skip
        masked, limits = masked_score(mask, tools), at.limits((p.row for p in places), begins)
        # Where there is no number of the mask another is read, to no effect: no branch.
        far = {}

        def offset(is_query: bool, n: int) -> Any:
            if (is_query, n) not in far:
                step = query_step if is_query else key_step
                far[is_query, n] = i64(at.inside(is_query, n)) * step
            return far[is_query, n]

        out = []
        for p in places:
            (query_n, key_n), score, number = at.steps(p), scores[p.register], None
            if scales and not is_additive(mask) and not has_score:
                score = mul_rn_f32(score, scale)
            if mask != "none":
                number = numbers[start + offset(True, query_n) + offset(False, key_n)]
            where = user.where(p) if functions else None
            out.append(masked(score, counts(True, p.column, *limits[p.row]), number, where))
        return _by_register(places, out) + (_by_register(places, user.slopes) if derives else [])

    return run


@cache
def modify_scores(
    tile: RegisterTile,
    functions: Functions,
    keys_are_rows: bool = False,
    derives: bool = False,
    approximate: bool = False,
) -> Any:
    """Traced `(scores, query, key, band, place, scale, words)`: what the score function makes of
    scores of which all count, and have a query and a key. Arguments are those of `mask_scores`.
    """
    places, registers = _in_columns(tile), tile.registers * (1 + derives)
    given = (tile.type, WHOLE, WHOLE, BAND, PLACE, types.float32, words_type(functions))

    @traced(types.UniTuple(types.float32, registers), *given)
    def run(scores, query, key, band, place, scale, words):
        at = _Tile(query, key, band, keys_are_rows)
        user = _User(functions, derives, words, at, place[:2], scale, approximate, is_whole=True)
        out = [user.score_mod(scores[p.register], user.where(p)) for p in places]
        return _by_register(places, out) + (_by_register(places, user.slopes) if derives else [])

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


__all__ = ["NO_WORDS", "exponential", "least", "mask_number", "mask_scores", "modify_scores"]
