"""Mask functions that are a band: query i sees keys i + lower ... i + upper - 1, and no others.

Such a function, as a causal one or a window, needs no lists of blocks and no look at single scores:
kernels have the band in their loops. A band is found on the function's graph, as comparisons of
q - k with a number, joined by "and"; the numbers may be parameters.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from .score_graph import Graph, Node, constant_value

Band = tuple[int | None, int | None]  # lower, upper; None is no bound


class _Line(NamedTuple):
    """The number of_q * q + of_k * k + constant."""

    of_q: int
    of_k: int
    constant: int

    def plus(self, other: _Line, factor: int = 1) -> _Line:
        return _Line(*(x + factor * y for x, y in zip(self, other, strict=True)))


def band_of(graph: Graph, parameters: Sequence[Any]) -> Band | None:
    """(lower, upper) if the function is a band, else None.

    Args:
        graph: of a mask function.
        parameters: its numbers.

    """
    found = _Bands(graph, parameters).of(graph.outputs[0])
    return None if found is None else found


class _Bands:
    """The bands that nodes of a graph are."""

    def __init__(self, graph: Graph, parameters: Sequence[Any]) -> None:
        self.graph, self.parameters = graph, parameters

    def of(self, n: int) -> Band | None:
        """Of a truth value."""
        node = self.graph.nodes[n]
        if node.name == "constant":
            return (None, None) if constant_value(node) else None
        if node.name == "logical_and":
            first, second = (self.of(x) for x in node.operands)
            return None if first is None or second is None else _both(first, second)
        if node.name in ("less", "less_equal", "equal"):
            return self._comparison(node)
        return None

    def _comparison(self, node: Node) -> Band | None:
        a, b = node.operands
        room = 0 if node.name == "less" else 1  # difference < room, as all are whole numbers
        absolute = self.graph.nodes[a]
        if absolute.name == "absolute" and node.name != "equal":
            inside, limit = self.line(absolute.operands[0]), self.line(b)
            if inside is None or limit is None:
                return None
            below = _below(inside.plus(limit, -1), room)
            above = _below(_Line(0, 0, 0).plus(inside, -1).plus(limit, -1), room)
        else:
            first, second = self.line(a), self.line(b)
            if first is None or second is None:
                return None
            below = _below(first.plus(second, -1), room)
            above = below if node.name != "equal" else _below(second.plus(first, -1), room)
        return None if below is None or above is None else _both(below, above)

    def line(self, n: int) -> _Line | None:
        """Of a whole number."""
        node = self.graph.nodes[n]
        if node.kind != "whole":
            return None
        if node.name in ("q", "k"):
            return _Line(int(node.name == "q"), int(node.name == "k"), 0)
        if node.name == "constant":
            return _Line(0, 0, int(constant_value(node)))
        if node.name == "parameter":
            return _Line(0, 0, int(self.parameters[node.number]))
        if node.name not in ("add", "subtract", "negative", "multiply"):
            return None
        lines = [self.line(x) for x in node.operands]
        known = [x for x in lines if x is not None]
        if len(known) < len(lines):
            return None
        if node.name == "negative":
            return _Line(0, 0, 0).plus(known[0], -1)
        if node.name == "multiply":
            numbers = [x for x in known if x[:2] == (0, 0)]
            other = known[1] if known[0][:2] == (0, 0) else known[0]
            return _Line(0, 0, 0).plus(other, numbers[0].constant) if numbers else None
        return known[0].plus(known[1], -1 if node.name == "subtract" else 1)


def of_difference(graph: Graph) -> tuple[bool, ...]:
    """Of each node, whether it is the same for all scores of a head with one q - k."""
    slopes: list[tuple[int, int] | None] = []  # of whole numbers that are a line in q and k
    found: list[bool] = []
    for node in graph.nodes:
        lines = [slopes[n] for n in node.operands]
        line: tuple[int, int] | None = None
        if node.name in ("q", "k"):
            line = (int(node.name == "q"), int(node.name == "k"))
        elif node.name in ("add", "subtract", "negative") and None not in lines:
            signs = {"add": (1, 1), "subtract": (1, -1), "negative": (-1,)}[node.name]
            line = tuple(  # type: ignore[assignment]
                sum(sign * x[axis] for sign, x in zip(signs, lines, strict=True) if x)
                for axis in range(2)
            )
        elif node.name != "score" and all(x == (0, 0) for x in lines):
            line = (0, 0)
        slopes.append(line)
        same = node.name not in ("q", "k", "score") and all(found[n] for n in node.operands)
        found.append(same or (line is not None and sum(line) == 0))
    return tuple(found)


def _below(line: _Line, room: int) -> Band | None:
    """The band in which a line is less than `room`."""
    of_q, of_k, constant = line
    if (of_q, of_k) == (-1, 1):  # k - q < room - constant
        return None, room - constant
    if (of_q, of_k) == (1, -1):  # k - q > constant - room
        return constant - room + 1, None
    if (of_q, of_k) == (0, 0) and constant < room:
        return None, None
    return None


def _both(first: Band, second: Band) -> Band:
    lower = [x for x in (first[0], second[0]) if x is not None]
    upper = [x for x in (first[1], second[1]) if x is not None]
    return max(lower, default=None), min(upper, default=None)


def hides_by_position(graph: Graph) -> bool:
    """Whether a score function makes scores -inf by their position alone, in a `where`."""
    of_score = graph.depends_on("score")
    return any(
        node.name == "where"
        and not of_score[node.operands[0]]
        and any(graph.nodes[n].value == "-inf" for n in node.operands[1:])
        for node in graph.nodes
    )


def reads_scattered(graph: Graph) -> bool:
    """Whether an index of an array depends on the key by more than sums: then neighbours among the
    keys do not read neighbours in the array.
    """
    of_key, sums = graph.depends_on("k"), list[bool]()
    for n, node in enumerate(graph.nodes):
        is_sum = node.name in ("add", "subtract") and all(sums[x] for x in node.operands)
        sums.append(node.name == "k" or is_sum or not of_key[n])
    loads = (node for node in graph.nodes if node.name == "load")
    return not all(sums[index] for node in loads for index in node.operands)


__all__ = ["Band", "band_of", "hides_by_position", "of_difference", "reads_scattered"]
