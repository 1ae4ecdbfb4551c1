"""Units of the sums in which gradients of captured arrays are added up as whole numbers of 64 bits.

Whole numbers give the same sum in any order. A number is multiplied by its array's unit and rounded
before it is added; the unit is the largest power of two with which no sum can overflow. For that
the sum of the absolute values of all that is added is bounded: by what reaches the scores, of which
a row of P, whose sum is 1, leaves no more than its largest number, times the largest derivative
that interval arithmetic finds for any score at any position.
"""

from __future__ import annotations

import math
from functools import cache

import numpy as np

from ..score_graph import Builder, Derivative, Graph
from ..score_intervals import Interval, IntervalOperations, intervals_of
from .problem import AttentionProblem
from .variant import Captured

BITS = 61  # of a sum, besides its sign and one for what rounding adds to the bound


def units(
    problem: AttentionProblem,
    derivative: Derivative,
    given: Captured,
    largest_score: float,
    gradients: float,
) -> list[float]:
    """For each captured array its unit; 0.0 where nothing bounds the sum, whose gradient is NaN.

    Args:
        problem: of the call.
        derivative: of its score function.
        given: to it, arrays of numpy.
        largest_score: no score's absolute value, before the score function, is larger.
        gradients: a bound of the sum of the absolute values of all scores' gradients.

    """
    partials = _largest_partials(problem, derivative, given, largest_score)
    found = []
    for partial in partials:
        bound = partial * gradients if partial else 0.0
        if not math.isfinite(bound):
            found.append(0.0)
            continue
        exponent = BITS - math.frexp(bound)[1] if bound else 0
        found.append(math.ldexp(1.0, max(min(exponent, 1000), -1000)))
    return found


def _largest_partials(
    problem: AttentionProblem, derivative: Derivative, given: Captured, largest_score: float
) -> list[float]:
    """For each captured array a bound of |d result / d load|, summed over all loads from it."""
    sizes = {
        "b": problem.batch, "h": problem.heads, "q": problem.seqlen_q, "k": problem.seqlen_k,
    }  # fmt: skip
    inputs: dict[str, Interval] = {
        name: (np.int64(0), np.int64(max(size - 1, 0))) for name, size in sizes.items()
    }
    inputs["score"] = np.float64(-largest_score), np.float64(largest_score)
    operations = IntervalOperations(given.arrays, given.parameters)
    outputs = intervals_of(_partials(derivative), operations, inputs)
    found = [0.0] * len(given.arrays)
    for load, partial in zip(derivative.loads, outputs, strict=True):
        ends = [float(np.abs(np.asarray(end)).max()) for end in partial]
        found[load.captured] += max(ends) if not any(map(math.isnan, ends)) else math.inf
    return found


@cache
def _partials(derivative: Derivative) -> Graph:
    """What is derived by each load, without the function's own result: large arrays that only that
    one reads are not looked through.
    """
    outputs = [derivative.graph.outputs[load.partial] for load in derivative.loads]
    return Builder.of(derivative.graph).finished(outputs)


__all__ = ["BITS", "units"]
