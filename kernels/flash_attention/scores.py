"""Which scores count, and what is added to them: one rule, of which every family makes its code.

    S = scale Q K^T
    S = score_mod(S)      a user's function, if there is one
    S = S + mask          if the mask is additive
    S = -inf              where the band, the end of the keys, a bool mask or a user's mask function
                          hides a key

The band: query i sees keys i + lower ... i + upper - 1; so key j is seen by queries j + 1 - upper
... j - lower. Keys end at seqlen_k, and queries at seqlen_q.

The functions consist of arithmetic, comparisons and `&`, and can be made into any family's code:

    compiled by numba, a score at a time           scores_cuda.py (SIMT and decode)
    compiled by numba, row by row                  cpu/tiles.py
    traced over a tile in registers                fragments/scores.py (mma and Hopper)
    called as they are, on numpy's arrays          `mask_numbers`, and tests

What these do in their own way, as to choose without a branch, they say in `Tools`.

A user's functions are graphs (score_graph.py), which become instructions for a score in
score_values.py, on GPUs, and loops over a row in cpu/score_rows.py, on CPUs. Which tiles have a
score that counts follows from the band (schedule.py) or from lists (block_lists.py).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..score_graph import Graph

LOG2_E = math.log2(math.e)


class Masked:
    """What a kernel's kind says of its scores; `mask` is "none", "bool", or an additive mask's
    dtype, `functions` are the user's.
    """

    mask: str
    functions: Functions

    @property
    def additive(self) -> bool:
        """Whether the mask is added to the scores."""
        return is_additive(self.mask)

    @property
    def unit(self) -> float:
        """Factor of scores on a GPU: see `unit_of`."""
        return unit_of(self.additive)

    @property
    def unit_of_products(self) -> float:
        """Factor of scale Q K^T: a score function wants it as it is."""
        return self.unit if self.functions.score is None else 1.0

    @property
    def unit_of_results(self) -> float:
        """Factor of what a score function gives."""
        return 1.0 if self.functions.score is None else self.unit


@dataclass(frozen=True)
class Functions:
    """A user's functions, for which a kernel is compiled.

    Args:
        score: graph of the score function, or None.
        mask: of the mask function.

    """

    score: Graph | None = None
    mask: Graph | None = None

    def __bool__(self) -> bool:
        return self != NO_FUNCTIONS


NO_FUNCTIONS = Functions()


def is_additive(mask: str) -> bool:
    """Whether a mask, given as in `Masked`, is added to the scores."""
    return mask not in ("none", "bool")


def unit_of(additive: bool) -> float:
    """Factor of scores on a GPU, log2(e): their exponentials are powers of two. With an additive
    mask it is 1, as a number of the mask may be as large as numbers are.
    """
    return 1.0 if additive else LOG2_E


# ----- the band -----


def keys_of(query: Any, lower: Any, upper: Any) -> tuple[Any, Any]:
    """The first key that the band lets a query see, and one past the last: they may lie before the
    first key there is, or past the last.
    """
    return query + lower, query + upper


def queries_of(key: Any, lower: Any, upper: Any) -> tuple[Any, Any]:
    """The first query that sees a key, and one past the last."""
    return key + 1 - upper, key + 1 - lower


def counts(inside: Any, place: Any, first: Any, end: Any) -> Any:
    """Whether a key, or a query, is one of these. `inside` says whether it exists: whoever has
    bounds at hand may lower `end` instead.
    """
    return inside & (place >= first) & (place < end)


# ----- a score -----


class Where(NamedTuple):
    """Which score it is."""

    batch: Any
    head: Any  # of the queries
    query: Any
    key: Any


class Tools(NamedTuple):
    """What a family does in its own way.

    Args:
        select: function `(condition, yes, no)`.
        add: function `(score, number)`: the score plus the mask's number.
        nothing: -inf in the scores' type.
        score_mod: `(score, where)`: what the user's score function makes of a score.
        mask_mod: `(where)`: whether the user's mask function counts it.

    """

    select: Callable[[Any, Any, Any], Any]
    add: Callable[[Any, Any], Any]
    nothing: Any = -math.inf
    score_mod: Callable[[Any, Where], Any] | None = None
    mask_mod: Callable[[Where], Any] | None = None


def masked_score(mask: str, tools: Tools) -> Callable[[Any, Any, Any, Where], Any]:
    """What the softmax gets for a score: a function, in the form that the tools make.

    Its arguments are the score, whether it `counts`, the mask's number (anything if there is none),
    and where the score is. `mask` is as in `Masked`.
    """
    select, add, nothing, score_mod, mask_mod = tools
    is_bool, additive = mask == "bool", is_additive(mask)
    has_score, has_mask = score_mod is not None, mask_mod is not None

    def masked(score, sees, number, where):
        if has_score:
            score = score_mod(score, where)
        if has_mask:
            sees = sees & mask_mod(where)
        if is_bool:
            sees = sees & (number != 0)
        if additive:
            score = add(score, number)
        return select(sees, score, nothing)

    return masked


def nearest(number: Any, rounded: Any, largest: float, select: Callable[..., Any]) -> Any:
    """An additive mask's number in the scores' type: `rounded`, which that type makes of it, or if
    this is infinite and the number is not, the type's largest number.
    """
    infinity = math.inf
    x = select((rounded == infinity) & (number < infinity), largest, rounded)
    return select((x == -infinity) & (number > -infinity), -largest, x)


def mask_numbers(attn_mask: NDArray[Any], dtype: np.dtype[Any]) -> NDArray[Any]:
    """An additive mask in the dtype of the scores (see `nearest`)."""
    with np.errstate(over="ignore"):
        rounded = attn_mask.astype(dtype, copy=False)
    if attn_mask.dtype.itemsize <= dtype.itemsize:
        return rounded
    found: NDArray[Any] = nearest(attn_mask, rounded, np.finfo(dtype).max, np.where)
    return found


__all__ = [
    "LOG2_E",
    "NO_FUNCTIONS",
    "Functions",
    "Masked",
    "Tools",
    "Where",
    "counts",
    "is_additive",
    "keys_of",
    "mask_numbers",
    "masked_score",
    "nearest",
    "queries_of",
    "unit_of",
]
