"""What a graph of a score or a mask (score_graph.py) gives for whole ranges of positions at once.

A number is (least, largest), over all positions of a range; a truth value is (surely true, possibly
true). So a mask function says of a block of 128 x 128 scores, without looking at one of them, that
it is empty, that it is full, or that it must be looked at more closely (Moore, "Interval Analysis",
1966). Both bounds are arrays: of as many ranges as one likes at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache, lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .score_graph import Graph, Kind, evaluate

Array = NDArray[Any]
Interval = tuple[Any, Any]
INT32 = np.iinfo(np.int32)


class IntervalOperations:
    """Operations for `score_graph.evaluate`.

    Args:
        arrays: that the graph loads from; an index beyond the end reads the last element, one below
            0 the first.
        parameters: numbers.

    """

    def __init__(self, arrays: Sequence[Array], parameters: Sequence[Any]) -> None:
        self.arrays, self.parameters = arrays, parameters
        self._tables: dict[tuple[int, int], tuple[Array, Array]] = {}

    def constant(self, value: Any, kind: Kind) -> Interval:
        """A number that is known."""
        x: Array = np.asarray(
            value, {"real": np.float64, "whole": np.int64, "truth": np.bool_}[kind]
        )
        return x, x

    def parameter(self, number: int, kind: Kind) -> Interval:
        """A number that is given."""
        return self.constant(self.parameters[number], kind)

    def cast(self, x: Interval, have: Kind, kind: Kind) -> Interval:
        """As another kind. What is real is cut off towards 0, and to what int32 holds."""
        if kind == "whole" and have == "real":
            low, high = (np.trunc(np.clip(end, INT32.min, INT32.max)) for end in x)
            return low.astype(np.int64), high.astype(np.int64)
        dtype = {"real": np.float64, "whole": np.int64, "truth": np.bool_}[kind]
        return np.asarray(x[0]).astype(dtype), np.asarray(x[1]).astype(dtype)

    # ----- captured arrays -----

    def load(self, captured: int, indices: Sequence[Interval]) -> Interval:
        """The least and the largest number of a part of an array."""
        array = self.arrays[captured]
        bounds = [
            tuple(np.clip(end, 0, size - 1) for end in index)
            for index, size in zip(indices, array.shape, strict=True)
        ]
        wide = [axis for axis, (low, high) in enumerate(bounds) if np.any(low != high)]
        if not wide:
            found = _numbers(array[tuple(low for low, _ in bounds)])
            return _without_nan(found, found)
        if len(wide) > 1:
            return _without_nan(_numbers(array).min(), _numbers(array).max())
        axis = wide[0]
        rest = tuple(low for n, (low, _) in enumerate(bounds) if n != axis)
        return self._part(captured, axis, rest, *bounds[axis])

    def _part(
        self, captured: int, axis: int, rest: tuple[Any, ...], low: Any, high: Any
    ) -> Interval:
        """Bounds of array[..., low : high + 1, ...], from those of two parts whose length is a
        power of two, and which overlap.
        """
        level = np.frexp((high - low + 1).astype(np.float64))[1] - 1
        least, largest = self._table(captured, axis, int(np.max(level, initial=0)))
        second = high - (1 << level) + 1
        first_place, second_place = (level, *rest, low), (level, *rest, second)
        return (
            _numbers(np.minimum(least[first_place], least[second_place])),
            _numbers(np.maximum(largest[first_place], largest[second_place])),
        )

    def _table(self, captured: int, axis: int, level: int) -> tuple[Array, Array]:
        """least[level, ..., i] and largest: of array[..., i : i + 2**level], up to a level."""
        known = self._tables.get((captured, axis))
        if known is None or len(known[0]) <= level:
            along = np.moveaxis(self.arrays[captured], axis, -1)
            known = self._tables[captured, axis] = _table(along, level)
        return known

    # ----- arithmetic -----

    def add(self, x: Interval, y: Interval) -> Interval:
        """x + y."""
        return _without_nan(x[0] + y[0], x[1] + y[1])

    def subtract(self, x: Interval, y: Interval) -> Interval:
        """x - y."""
        return _without_nan(x[0] - y[1], x[1] - y[0])

    def multiply(self, x: Interval, y: Interval) -> Interval:
        """x * y."""
        return _of_corners(np.multiply, x, y)

    def divide(self, x: Interval, y: Interval) -> Interval:
        """x / y: anything, where y may be 0."""
        low, high = _of_corners(np.divide, x, y)
        through_zero = (np.asarray(y[0]) <= 0) & (np.asarray(y[1]) >= 0)
        return np.where(through_zero, -np.inf, low), np.where(through_zero, np.inf, high)

    def negative(self, x: Interval) -> Interval:
        """-x."""
        return -x[1], -x[0]

    def absolute(self, x: Interval) -> Interval:
        """|x|."""
        ends = np.abs(x[0]), np.abs(x[1])
        through_zero = (x[0] <= 0) & (x[1] >= 0)
        return np.where(through_zero, 0, np.minimum(*ends)), np.maximum(*ends)

    def minimum(self, x: Interval, y: Interval) -> Interval:
        """The smaller one."""
        return np.minimum(x[0], y[0]), np.minimum(x[1], y[1])

    def maximum(self, x: Interval, y: Interval) -> Interval:
        """The larger one."""
        return np.maximum(x[0], y[0]), np.maximum(x[1], y[1])

    def floor_divide(self, x: Interval, y: Interval) -> Interval:
        """x // y of whole numbers; x // 0 is 0."""
        low, high = _of_corners(_floor_divide, x, y)
        through_zero = (y[0] <= 0) & (y[1] >= 0)
        far = np.maximum(np.abs(x[0]), np.abs(x[1]))
        return np.where(through_zero, -far, low), np.where(through_zero, far, high)

    def remainder(self, x: Interval, y: Interval) -> Interval:
        """x % y of whole numbers, with the sign of y; x % 0 is 0."""
        one_divisor = (y[0] == y[1]) & (y[0] != 0)
        divisor = np.where(one_divisor, y[0], 1)
        same = one_divisor & (x[0] // divisor == x[1] // divisor)
        low, high = np.minimum(y[0] + 1, 0), np.maximum(y[1] - 1, 0)
        return np.where(same, x[0] % divisor, low), np.where(same, x[1] % divisor, high)

    def bitwise_and(self, x: Interval, y: Interval) -> Interval:
        """x & y of whole numbers."""
        return self._of_bits(np.bitwise_and, x, y)

    def bitwise_or(self, x: Interval, y: Interval) -> Interval:
        """x | y of whole numbers."""
        return self._of_bits(np.bitwise_or, x, y)

    def bitwise_xor(self, x: Interval, y: Interval) -> Interval:
        """x ^ y of whole numbers."""
        return self._of_bits(np.bitwise_xor, x, y)

    def _of_bits(self, function: Any, x: Interval, y: Interval) -> Interval:
        """Exact for single numbers; else what as many bits can hold."""
        ends = [np.asarray(e) for e in (*x, *y)]
        largest = np.maximum.reduce(np.broadcast_arrays(*(np.where(e < 0, ~e, e) for e in ends)))
        all_bits = (1 << np.frexp(largest.astype(np.float64))[1]) - 1
        negative = (ends[0] < 0) | (ends[2] < 0)
        single = (ends[0] == ends[1]) & (ends[2] == ends[3])
        exact = function(ends[0], ends[2])
        low = np.where(negative, -all_bits - 1, 0)
        return np.where(single, exact, low), np.where(single, exact, all_bits)

    # ----- functions that grow -----

    def exp(self, x: Interval) -> Interval:
        """e to the x."""
        return np.exp(x[0]), np.exp(x[1])

    def exp2(self, x: Interval) -> Interval:
        """2 to the x."""
        return np.exp2(x[0]), np.exp2(x[1])

    def tanh(self, x: Interval) -> Interval:
        """The hyperbolic tangent."""
        return np.tanh(x[0]), np.tanh(x[1])

    def floor(self, x: Interval) -> Interval:
        """The next smaller whole number."""
        return np.floor(x[0]), np.floor(x[1])

    def log(self, x: Interval) -> Interval:
        """The natural logarithm."""
        return _from_zero(np.log, x)

    def log2(self, x: Interval) -> Interval:
        """The logarithm to base 2."""
        return _from_zero(np.log2, x)

    def sqrt(self, x: Interval) -> Interval:
        """The root."""
        return _from_zero(np.sqrt, x)

    # ----- truth -----

    def less(self, x: Interval, y: Interval) -> Interval:
        """x < y."""
        return x[1] < y[0], x[0] < y[1]

    def less_equal(self, x: Interval, y: Interval) -> Interval:
        """x <= y."""
        return x[1] <= y[0], x[0] <= y[1]

    def equal(self, x: Interval, y: Interval) -> Interval:
        """x == y."""
        single = (x[0] == x[1]) & (y[0] == y[1])
        return single & (x[0] == y[0]), (x[0] <= y[1]) & (y[0] <= x[1])

    def not_equal(self, x: Interval, y: Interval) -> Interval:
        """x != y."""
        return self.logical_not(self.equal(x, y))

    def logical_and(self, x: Interval, y: Interval) -> Interval:
        """Both."""
        return x[0] & y[0], x[1] & y[1]

    def logical_or(self, x: Interval, y: Interval) -> Interval:
        """One or both."""
        return x[0] | y[0], x[1] | y[1]

    def logical_xor(self, x: Interval, y: Interval) -> Interval:
        """One of the two."""
        return (x[0] & ~y[1]) | (~x[1] & y[0]), (x[1] & ~y[0]) | (~x[0] & y[1])

    def logical_not(self, x: Interval) -> Interval:
        """The opposite."""
        return ~np.asarray(x[1]), ~np.asarray(x[0])

    def where(self, condition: Interval, x: Interval, y: Interval) -> Interval:
        """x if the condition, else y."""
        surely, possibly = condition
        low = np.where(surely, x[0], np.where(possibly, np.minimum(x[0], y[0]), y[0]))
        return low, np.where(surely, x[1], np.where(possibly, np.maximum(x[1], y[1]), y[1]))


def _numbers(x: Array) -> Array:
    """As the walk computes with them: float64, int64 or bool."""
    if x.dtype.kind == "b":
        return x
    if x.dtype == np.uint64:  # the largest of which would become negative
        x = np.minimum(x, np.uint64(np.iinfo(np.int64).max))
    return x.astype(np.int64 if x.dtype.kind in "iu" else np.float64)


def _without_nan(low: Any, high: Any) -> Interval:
    """A bound that is no number bounds nothing."""
    if np.asarray(low).dtype.kind != "f":
        return low, high
    return np.where(np.isnan(low), -np.inf, low), np.where(np.isnan(high), np.inf, high)


def _of_corners(function: Any, x: Interval, y: Interval) -> Interval:
    """Bounds of a function that is monotone in each of its arguments."""
    with np.errstate(all="ignore"):
        corners = [function(a, b) for a in x for b in y]
    low, high = corners[0], corners[0]
    for corner in corners[1:]:
        low, high = np.minimum(low, corner), np.maximum(high, corner)
    return _without_nan(low, high)


def _floor_divide(x: Any, y: Any) -> Any:
    return np.where(y == 0, 0, x // np.where(y == 0, 1, y))


def _from_zero(function: Any, x: Interval) -> Interval:
    """Bounds of a growing function that is no number below 0."""
    with np.errstate(all="ignore"):
        low, high = function(x[0]), function(x[1])
    below = np.asarray(x[0]) < 0
    return _without_nan(np.where(below, -np.inf, low), np.where(below, np.inf, high))


def _table(array: Array, most: int) -> tuple[Array, Array]:
    """Least and largest numbers of all parts of an array whose lengths are powers of two."""
    length = array.shape[-1]
    numbers = array if array.dtype.kind in "biu" else _numbers(array)
    tables = []
    for bound, pick in zip(_without_nan(numbers, numbers), (np.minimum, np.maximum), strict=True):
        table = np.empty((most + 1, *array.shape), bound.dtype)
        table[0] = bound
        for level in range(1, most + 1):
            half, before, longer = min(1 << (level - 1), length), table[level - 1], table[level]
            pick(before[..., :-half], before[..., half:], out=longer[..., :-half])
            longer[..., length - half :] = before[..., length - half :]
        tables.append(table)
    return tables[0], tables[1]


def intervals_of(
    graph: Graph, operations: IntervalOperations, inputs: dict[str, Interval]
) -> list[Any]:
    """The outputs of a graph for ranges of its inputs. Ends that are infinite, or no numbers, are
    nothing to warn of.
    """
    with np.errstate(all="ignore"):
        return evaluate(graph, operations, inputs)


# ----- what could go wrong in a kernel -----


def complaint(
    graph: Graph,
    arrays: Sequence[Array],
    parameters: Sequence[Any],
    names: Sequence[str],
    sizes: dict[str, int],
) -> str:
    """What is wrong with a graph for positions 0 ... sizes - 1, "" if nothing.

    An index that is made of positions may leave its array, or a whole number have more than 32
    bits.

    Args:
        graph: of a score or mask function.
        arrays, parameters: that it is given.
        names: of the arrays, for the message.
        sizes: of "b", "h", "q" and "k".

    """
    for array, name in zip(arrays, names, strict=True):
        if array.size == 0:
            return f"`{name}` has shape {array.shape}, and no number that could be read"
    operations = IntervalOperations(arrays, parameters)
    inputs: dict[str, Interval] = {
        name: (np.int64(0), np.int64(max(size - 1, 0))) for name, size in sizes.items()
    }
    inputs["score"] = np.float64(-np.inf), np.float64(np.inf)
    every = Graph(graph.nodes, tuple(range(len(graph.nodes))), graph.captured, graph.parameters)
    found = [
        (float(np.min(low)), float(np.max(high)))
        for low, high in intervals_of(every, operations, inputs)
    ]
    for node, (low, high) in zip(graph.nodes, found, strict=True):
        if node.kind == "whole" and not INT32.min <= low <= high <= INT32.max:
            return (
                f"a whole number may be {int(low)} to {int(high)}, which is more than the 32 bits "
                "that a kernel has for it"
            )
        if node.name != "load":
            continue
        for axis, operand in enumerate(node.operands):
            least, largest = found[operand]
            size = arrays[node.number].shape[axis]
            exact = _of_positions(graph, operand)
            if exact and not 0 <= least <= largest < size:
                where = (
                    f"index {axis} of `{names[node.number]}`"
                    if len(node.operands) > 1
                    else f"the index of `{names[node.number]}`"
                )
                return (
                    f"{where} runs from {int(least)} to {int(largest)}, its size is {size}: "
                    "np.clip keeps it inside"
                )
    return ""


@cache
def reads_values(graph: Graph) -> bool:
    """Whether `complaint` depends on the numbers of captured arrays, which fit into 32 bits: whole
    numbers are computed from them.
    """
    of_arrays: list[bool] = []
    for node in graph.nodes:
        mixed = any(of_arrays[n] for n in node.operands)
        if mixed and node.kind == "whole" and node.name != "load":
            return True
        of_arrays.append(mixed or node.name == "load")
    return False


@lru_cache(1000)
def complaint_of_shapes(
    graph: Graph,
    shapes: tuple[tuple[int, ...], ...],
    parameters: tuple[Any, ...],
    names: tuple[str, ...],
    sizes: tuple[int, ...],
) -> str:
    """`complaint` of a graph that does not read values: it is remembered.

    Args:
        graph: of a score or mask function.
        shapes: of the arrays.
        parameters: that it is given.
        names: of the arrays.
        sizes: of b, h, q and k.

    """
    dtypes = {"real": np.float64, "whole": np.int32, "truth": np.bool_}
    arrays: list[Array] = [
        np.broadcast_to(np.zeros((), dtypes[array.kind]), shape)
        for array, shape in zip(graph.captured, shapes, strict=True)
    ]
    return complaint(graph, arrays, parameters, names, dict(zip("bhqk", sizes, strict=True)))


def _of_positions(graph: Graph, n: int) -> bool:
    """Whether a number is made of positions and known numbers alone, each once: then its bounds are
    reached.
    """
    used: list[str] = []
    pending = [n]
    while pending:
        node = graph.nodes[pending.pop()]
        if node.name in ("load", "score", "where", "cast"):
            return False
        used += [node.name] * (node.name in ("b", "h", "q", "k"))
        pending += node.operands
    return len(used) == len(set(used))


__all__ = [
    "Interval", "IntervalOperations", "complaint", "complaint_of_shapes", "intervals_of",
    "reads_values",
]  # fmt: skip
