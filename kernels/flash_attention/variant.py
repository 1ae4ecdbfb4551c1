"""What a call gives to a user's score function and mask function: arrays, numbers, lists of tiles.

`AttentionProblem` has the functions' graphs, which decide the kernels; here is what may be another
one in each call, and needs no other kernel.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..score_graph import Derivative, Graph, NumpyOperations, clamped, differentiate, evaluate
from .block_lists import TileLists

Array = NDArray[Any]


class Captured(NamedTuple):
    """What a graph is given.

    Args:
        arrays: in the graph's order: numpy's, or tensors of the backend's.
        parameters: numbers.

    """

    arrays: tuple[Any, ...] = ()
    parameters: tuple[float | int, ...] = ()

    def each(self, convert: Callable[[Any], Any]) -> Captured:
        """The same with converted arrays."""
        return Captured(tuple(map(convert, self.arrays)), self.parameters)


class VariantInputs(NamedTuple):
    """What belongs to a problem's `score_mod`, `mask_mod` and `is_sparse`.

    Args:
        score: for the score function.
        mask: for the mask function.
        lists: the tiles that are visited; None if the band says it.

    """

    score: Captured = Captured()
    mask: Captured = Captured()
    lists: TileLists | None = None

    def each(self, convert: Callable[[Any], Any]) -> VariantInputs:
        """The same with converted arrays."""
        return VariantInputs(self.score.each(convert), self.mask.each(convert), self.lists)


NO_VARIANT = VariantInputs()


def wanted_gradients(graph: Graph | None) -> tuple[int, ...]:
    """Numbers of the captured arrays whose gradients the backward pass gives, in this order."""
    captured = () if graph is None else graph.captured
    return tuple(n for n, array in enumerate(captured) if array.wants_gradient)


def gradients_of_tensors(graph: Graph | None, given: Captured, found: Sequence[Any]) -> list[Any]:
    """Of each tensor among the captured arrays its gradient, 0.0 if it wants none; `found` has
    those of `wanted_gradients`.
    """
    of_array = dict(zip(wanted_gradients(graph), found, strict=True))
    tensors = (n for n, array in enumerate(given.arrays) if hasattr(array, "requires_grad"))
    return [of_array.get(n, 0.0) for n in tensors]


@cache
def derivative_of(graph: Graph) -> Derivative:
    """The derivative, which is remembered: kernels are compiled for it."""
    return differentiate(graph)


# ----- dense, in numpy -----


def positions(shape: Sequence[int]) -> dict[str, Array]:
    """b, h, q and k of each score of (..., H, Nq, Nk), that broadcast to this shape."""
    *leading, seqlen_q, seqlen_k = shape
    batches, heads = leading[:-1], leading[-1:]
    return {
        "b": np.arange(math.prod(batches)).reshape(*batches, *[1] * len(heads), 1, 1),
        "h": np.arange(math.prod(heads)).reshape(*heads, 1, 1),
        "q": np.arange(seqlen_q)[:, None], "k": np.arange(seqlen_k),
    }  # fmt: skip


def evaluated(graph: Graph, given: Captured, scores: Array) -> list[Any]:
    """The graph's outputs for a matrix of scores (..., H, Nq, Nk), whose places count."""
    real = scores.dtype if scores.dtype == np.float64 else np.float32
    inputs = {**positions(scores.shape), "score": scores.astype(real)}
    with np.errstate(all="ignore"):
        return evaluate(graph, NumpyOperations(given.arrays, given.parameters, real), inputs)


def captured_gradients(
    graph: Graph, given: Captured, scores: Array, gradient: Array
) -> tuple[Array, list[Array]]:
    """Gradients of the scores that the function got, and of each captured array that wants one.

    What has gradient 0 passes none on, whatever the derivative is there.

    Args:
        graph: of the score function.
        given: to it.
        scores: before it, (..., H, Nq, Nk).
        gradient: of what it gave.

    """
    derivative = derivative_of(graph)
    found = evaluated(derivative.graph, given, scores)

    def times(x: Any) -> Array:
        return np.where(gradient == 0, 0, gradient * x)

    sums = {n: np.zeros(given.arrays[n].shape) for n in wanted_gradients(graph)}
    with np.errstate(invalid="ignore", over="ignore"):
        for load in derivative.loads:
            total, part = sums[load.captured], times(found[load.partial])
            places = clamped([found[i] for i in load.indices], total.shape)
            np.add.at(total, tuple(np.broadcast_to(x, part.shape) for x in places), part)
        return times(found[1]), list(sums.values())


__all__ = [
    "NO_VARIANT", "Captured", "VariantInputs", "captured_gradients", "derivative_of", "evaluated",
    "gradients_of_tensors", "positions", "wanted_gradients",
]  # fmt: skip
