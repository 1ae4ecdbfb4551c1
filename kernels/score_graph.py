"""A score function or a mask function as a graph of operations on numbers, and its derivative.

The function of one attention score, f(score, b, h, q, k), or of its place alone, is written in
Python by the user (`minitorch.score_trace` runs it once) and is here a list of nodes, in an order
in which each comes after those that it takes. The graph is a value: two functions that do the same
have equal graphs, with equal hashes, and so one kernel. The numbers and arrays that a function
closes over are not in it: they are what a kernel is given when it is launched.

Everything that is done with a graph is one walk over its nodes, `evaluate`, with a set of
operations of one's choice: numpy's (below) for whole matrices of scores, others for the registers
of a kernel, or for intervals. Names of operations are numpy's.

The derivative is reverse mode on the graph (Griewank & Walther, "Evaluating Derivatives", 2008,
chapter 3): nodes are added, in one graph with the value, which it shares what it can with.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

Kind = Literal["real", "whole", "truth"]  # floating point as the scores, int32, bool
INPUTS: dict[str, Kind] = {"score": "real", "b": "whole", "h": "whole", "q": "whole", "k": "whole"}

# Operations by what they take and give; every name is a function of numpy.
ARITHMETIC = ("add", "subtract", "multiply", "minimum", "maximum")  # of two of a kind
OF_WHOLE = ("floor_divide", "remainder", "bitwise_and", "bitwise_or", "bitwise_xor")
OF_TRUTHS = ("logical_and", "logical_or", "logical_xor")
COMPARISONS = ("less", "less_equal", "equal", "not_equal")
OF_REALS = ("exp", "exp2", "log", "log2", "tanh", "sqrt", "floor")  # of one
SYMMETRIC = (
    "add", "multiply", "bitwise_and", "bitwise_or", "bitwise_xor", "equal", "not_equal", *OF_TRUTHS,
)  # fmt: skip


class Node(NamedTuple):
    """One operation.

    Args:
        name: of INPUTS, of numpy, or one of "constant", "parameter", "load", "cast", "where".
        kind: of the number that it gives.
        operands: numbers of the nodes that it takes; those of a load are the indices.
        number: of the parameter, or of the captured array that is loaded from.
        value: a constant, as text: so -0.0 is not 0.0, and NaN is NaN.

    """

    name: str
    kind: Kind
    operands: tuple[int, ...] = ()
    number: int = 0
    value: str = ""


class CapturedArray(NamedTuple):
    """What a graph says of an array that it loads from.

    Args:
        kind: of its numbers.
        dims: how many indices it takes.
        wants_gradient: whether derivatives by its numbers are asked for.

    """

    kind: Kind
    dims: int
    wants_gradient: bool = False


@dataclass(frozen=True)
class Graph:
    """Nodes in order; the last but for what a derivative adds is the function's result.

    Args:
        nodes: each after those that it takes.
        outputs: numbers of nodes.
        captured: arrays that nodes load from.
        parameters: kinds of the numbers that are given with each launch.

    """

    nodes: tuple[Node, ...]
    outputs: tuple[int, ...]
    captured: tuple[CapturedArray, ...] = ()
    parameters: tuple[Kind, ...] = ()
    _hash: int = field(default=0, init=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        known = hash((self.nodes, self.outputs, self.captured, self.parameters))
        object.__setattr__(self, "_hash", known)

    def __hash__(self) -> int:
        return self._hash

    def depends_on(self, *inputs: str) -> tuple[bool, ...]:
        """Of each node, whether one of these inputs has a part in it."""
        found: list[bool] = []
        for node in self.nodes:
            found.append(node.name in inputs or any(found[n] for n in node.operands))
        return tuple(found)


class Builder:
    """A graph that grows. Equal nodes are one, constants are computed, and 0 and 1 vanish from sums
    and products: derivatives bring many of them.
    """

    def __init__(
        self, captured: Sequence[CapturedArray] = (), parameters: Sequence[Kind] = ()
    ) -> None:
        self.nodes: list[Node] = []
        self.captured, self.parameters = list(captured), list(parameters)
        self._number: dict[Node, int] = {}

    @staticmethod
    def of(graph: Graph) -> Builder:
        """A builder whose nodes have the numbers that they have in a graph."""
        builder = Builder(graph.captured, graph.parameters)
        for node in graph.nodes:
            builder.node(node)
        return builder

    def node(self, node: Node) -> int:
        """The number of a node."""
        if node not in self._number:
            self._number[node] = len(self.nodes)
            self.nodes.append(node)
        return self._number[node]

    def input(self, name: str) -> int:
        """The score or an index."""
        return self.node(Node(name, INPUTS[name]))

    def constant(self, value: Any, kind: Kind) -> int:
        """A number that is known."""
        exact = {"real": float, "whole": int, "truth": bool}[kind](value)
        return self.node(Node("constant", kind, value=repr(exact)))

    def parameter(self, number: int) -> int:
        """A number that is given with each launch."""
        return self.node(Node("parameter", self.parameters[number], number=number))

    def load(self, captured: int, indices: Sequence[int]) -> int:
        """A number of a captured array."""
        kind = self.captured[captured].kind
        return self.node(Node("load", kind, tuple(indices), captured))

    def kind(self, n: int) -> Kind:
        """Of a node."""
        return self.nodes[n].kind

    def value(self, n: int) -> float | int | bool | None:
        """A constant's value; None of any other node."""
        return constant_value(self.nodes[n]) if self.nodes[n].name == "constant" else None

    def cast(self, n: int, kind: Kind) -> int:
        """The same number as another kind; real to whole numbers towards 0."""
        if self.kind(n) == kind:
            return n
        known = self.value(n)
        return (
            self.node(Node("cast", kind, (n,)))
            if known is None
            else self.constant(known, kind)
        )  # fmt: skip

    def apply(self, name: str, *operands: int) -> int:
        """An operation of numpy's on nodes that are of the right kinds already."""
        kind = result_kind(name, self.kind(operands[0]))
        values = [self.value(n) for n in operands]
        if all(x is not None for x in values) and not (name in OF_WHOLE and values[-1] == 0):
            with np.errstate(all="ignore"):
                return self.constant(getattr(np, name)(*values), kind)
        shorter = self._shorter(name, operands, values)
        if shorter is not None:
            return shorter
        if name in SYMMETRIC:
            operands = tuple(sorted(operands))
        return self.node(Node(name, kind, operands))

    def _shorter(self, name: str, operands: tuple[int, ...], values: list[Any]) -> int | None:
        """A node that is the same without the operation, if there is one."""
        if len(operands) == 1:
            return None
        (a, b), (x, y) = operands, values
        if name == "add" and (_is(x, 0) or _is(y, 0)):
            return b if _is(x, 0) else a
        if name in ("subtract", "floor_divide", "divide") and _is(
            y, 0 if name == "subtract" else 1
        ):
            return a
        if name == "multiply" and (_is(x, 1) or _is(y, 1)):
            return b if _is(x, 1) else a
        if name == "logical_and" and True in (x, y):
            return b if x is True else a
        if name == "logical_or" and False in (x, y):
            return b if x is False else a
        return None

    def product(self, factor: int, other: int) -> int:
        """A product of a derivative: 0 times anything is 0, as what does not depend on a number has
        no gradient, be it infinite.
        """
        for n in (factor, other):
            if _is(self.value(n), 0):
                return self.constant(0.0, "real")
        return self.apply("multiply", factor, other)

    def where(self, condition: int, a: int, b: int) -> int:
        """a if the condition, else b."""
        known = self.value(condition)
        if a == b or known is not None:
            return a if known or a == b else b
        return self.node(Node("where", self.kind(a), (condition, a, b)))

    def finished(self, outputs: Sequence[int]) -> Graph:
        """What the outputs need, in the order in which it was made."""
        needed, pending = set[int](), list(outputs)
        while pending:
            n = pending.pop()
            if n not in needed:
                needed.add(n)
                pending += self.nodes[n].operands
        number = {n: i for i, n in enumerate(sorted(needed))}
        nodes = tuple(
            self.nodes[n]._replace(operands=tuple(number[x] for x in self.nodes[n].operands))
            for n in sorted(needed)
        )
        return Graph(
            nodes, tuple(number[n] for n in outputs), tuple(self.captured), tuple(self.parameters)
        )


def _is(value: Any, number: float) -> bool:
    """Whether a constant is this number, and 0 not -0."""
    return (
        value is not None
        and value == number
        and not (value == 0 and math.copysign(1.0, value) < 0)
    )  # fmt: skip


def constant_value(node: Node) -> float | int | bool:
    """The value of a node that is a constant."""
    if node.kind == "truth":
        return node.value == "True"
    return int(node.value) if node.kind == "whole" else float(node.value)


def result_kind(name: str, kind: Kind) -> Kind:
    """Of an operation's result, by the kind of what it takes."""
    return "truth" if name in COMPARISONS else "real" if name == "divide" else kind


# ----- walks over a graph -----


def evaluate(graph: Graph, operations: Any, inputs: Mapping[str, Any]) -> list[Any]:
    """Values of the outputs.

    Args:
        graph: what is computed.
        operations: an object with a method for each of numpy's names, and these:
            `constant(value, kind)`, `parameter(number, kind)`, `load(captured, indices)`,
            `cast(x, have, kind)`, `where(condition, a, b)`.
        inputs: a value for each of INPUTS that the graph has.

    """
    values: list[Any] = []
    for n in range(len(graph.nodes)):
        values.append(node_value(graph, n, values, operations, inputs))
    return [values[n] for n in graph.outputs]


def node_value(
    graph: Graph, n: int, values: Any, operations: Any, inputs: Mapping[str, Any]
) -> Any:
    """The value of one node, from those of the nodes that it takes: a step of `evaluate`."""
    node = graph.nodes[n]
    given = [values[x] for x in node.operands]
    if node.name in INPUTS:
        return inputs[node.name]
    if node.name == "constant":
        return operations.constant(constant_value(node), node.kind)
    if node.name == "parameter":
        return operations.parameter(node.number, node.kind)
    if node.name == "load":
        return operations.load(node.number, given)
    if node.name == "cast":
        return operations.cast(*given, graph.nodes[node.operands[0]].kind, node.kind)
    return getattr(operations, node.name)(*given)


class NumpyOperations:
    """Whole matrices of scores at once: the reference of all other sets of operations.

    Args:
        arrays: that the graph loads from. An index beyond the end reads the last element, one below
            0 the first.
        parameters: numbers.
        dtype: of real numbers.

    """

    def __init__(
        self, arrays: Sequence[NDArray[Any]], parameters: Sequence[Any], dtype: Any = np.float64
    ) -> None:
        self.arrays, self.parameters = arrays, parameters
        self.types = {"real": np.dtype(dtype), "whole": np.dtype(np.int64), "truth": np.dtype(bool)}

    def __getattr__(self, name: str) -> Callable[..., Any]:
        function: Callable[..., Any] = getattr(np, name)
        return function

    def constant(self, value: Any, kind: Kind) -> Any:
        """A scalar."""
        return self.types[kind].type(value)

    def parameter(self, number: int, kind: Kind) -> Any:
        """A scalar."""
        return self.constant(self.parameters[number], kind)

    def load(self, captured: int, indices: Sequence[Any]) -> NDArray[Any]:
        """Numbers of an array."""
        array = self.arrays[captured]
        found = array[clamped(indices, array.shape)]
        kind = {"f": "real", "V": "real", "b": "truth"}.get(found.dtype.kind, "whole")
        return np.asarray(found, self.types[kind])

    def cast(self, x: Any, have: Kind, kind: Kind) -> Any:
        """As another kind."""
        return np.asarray(x).astype(self.types[kind])


def clamped(indices: Sequence[Any], shape: tuple[int, ...]) -> tuple[Any, ...]:
    """Indices within an array."""
    return tuple(np.clip(i, 0, n - 1) for i, n in zip(indices, shape, strict=True))


# ----- derivatives -----


class Load(NamedTuple):
    """A number that is loaded from an array which wants a gradient.

    Args:
        captured: which array.
        partial: output of the derivative's graph: d result / d number.
        indices: outputs: where in the array it is.

    """

    captured: int
    partial: int
    indices: tuple[int, ...]


@dataclass(frozen=True)
class Derivative:
    """A function with its derivatives, in one graph.

    Args:
        graph: its first output is the result, the second d result / d score.
        loads: what else is derived by.

    """

    graph: Graph
    loads: tuple[Load, ...]


def differentiate(graph: Graph) -> Derivative:
    """The graph of a score function, and of its derivatives.

    At a tie minimum and maximum pass the gradient on to the second of the two; the derivative of
    |x| at 0 is 0. What is not chosen by `where` gets 0.
    """
    builder = Builder.of(graph)
    adjoints = _adjoints(builder, graph)
    zero = builder.constant(0.0, "real")
    result = graph.outputs[0]
    scores = [n for n, node in enumerate(graph.nodes) if node.name == "score"]
    outputs = [result, adjoints.get(scores[0], zero) if scores else zero]
    loads = []
    for n, node in enumerate(graph.nodes):
        wanted = node.name == "load" and graph.captured[node.number].wants_gradient
        if wanted and n in adjoints:
            places = tuple(range(len(outputs) + 1, len(outputs) + 1 + len(node.operands)))
            loads.append(Load(node.number, len(outputs), places))
            outputs += [adjoints[n], *node.operands]
    return Derivative(builder.finished(outputs), tuple(loads))


def _adjoints(builder: Builder, graph: Graph) -> dict[int, int]:
    """Of each node that the result depends on, the node d result / d node."""
    found = {graph.outputs[0]: builder.constant(1.0, "real")}
    for n in range(len(graph.nodes) - 1, -1, -1):
        node = graph.nodes[n]
        if n not in found or node.kind != "real" or node.name not in RULES:
            continue
        if _is(builder.value(found[n]), 0):  # nothing depends on it: not even 0 * infinity
            continue
        for operand, gradient in RULES[node.name](builder, found[n], n, *node.operands):
            known = found.get(operand)
            found[operand] = gradient if known is None else builder.apply("add", known, gradient)
    return found


# What a rule gives: (operand, d result / d operand) of each operand, from g = d result / d node.
Rule = Callable[..., list[tuple[int, int]]]


def _add(b: Builder, g: int, n: int, x: int, y: int) -> list[tuple[int, int]]:
    return [(x, g), (y, g)]


def _subtract(b: Builder, g: int, n: int, x: int, y: int) -> list[tuple[int, int]]:
    return [(x, g), (y, b.apply("negative", g))]


def _multiply(b: Builder, g: int, n: int, x: int, y: int) -> list[tuple[int, int]]:
    return [(x, b.product(g, y)), (y, b.product(g, x))]


def _divide(b: Builder, g: int, n: int, x: int, y: int) -> list[tuple[int, int]]:
    by_x = b.apply("divide", g, y)
    return [(x, by_x), (y, b.apply("negative", b.product(by_x, n)))]


def _negative(b: Builder, g: int, n: int, x: int) -> list[tuple[int, int]]:
    return [(x, b.apply("negative", g))]


def _absolute(b: Builder, g: int, n: int, x: int) -> list[tuple[int, int]]:
    zero = b.constant(0.0, "real")
    below = b.where(b.apply("less", x, zero), b.apply("negative", g), zero)
    return [(x, b.where(b.apply("less", zero, x), g, below))]


def _where(b: Builder, g: int, n: int, condition: int, x: int, y: int) -> list[tuple[int, int]]:
    zero = b.constant(0.0, "real")
    return [(x, b.where(condition, g, zero)), (y, b.where(condition, zero, g))]


def _minimum(b: Builder, g: int, n: int, x: int, y: int) -> list[tuple[int, int]]:
    return _where(b, g, n, b.apply("less", x, y), x, y)


def _maximum(b: Builder, g: int, n: int, x: int, y: int) -> list[tuple[int, int]]:
    return _where(b, g, n, b.apply("less", y, x), x, y)


def _tanh(b: Builder, g: int, n: int, x: int) -> list[tuple[int, int]]:
    one = b.constant(1.0, "real")
    return [(x, b.product(g, b.apply("subtract", one, b.apply("multiply", n, n))))]


def _exp(b: Builder, g: int, n: int, x: int) -> list[tuple[int, int]]:
    return [(x, b.product(g, n))]


def _exp2(b: Builder, g: int, n: int, x: int) -> list[tuple[int, int]]:
    return [(x, b.product(g, b.apply("multiply", n, b.constant(math.log(2), "real"))))]


def _log(b: Builder, g: int, n: int, x: int) -> list[tuple[int, int]]:
    return [(x, b.apply("divide", g, x))]


def _log2(b: Builder, g: int, n: int, x: int) -> list[tuple[int, int]]:
    return [(x, b.apply("divide", b.product(g, b.constant(1 / math.log(2), "real")), x))]


def _sqrt(b: Builder, g: int, n: int, x: int) -> list[tuple[int, int]]:
    return [(x, b.apply("divide", b.product(g, b.constant(0.5, "real")), n))]


# Without a rule: what has no derivative, or one that is 0, such as `floor` and casts.
RULES: dict[str, Rule] = {
    "add": _add, "subtract": _subtract, "multiply": _multiply, "divide": _divide,
    "negative": _negative, "absolute": _absolute, "where": _where, "minimum": _minimum,
    "maximum": _maximum, "tanh": _tanh, "exp": _exp, "exp2": _exp2, "log": _log, "log2": _log2,
    "sqrt": _sqrt,
}  # fmt: skip


__all__ = [
    "ARITHMETIC", "COMPARISONS", "INPUTS", "OF_REALS", "OF_TRUTHS", "OF_WHOLE", "Builder",
    "CapturedArray", "Derivative", "Graph", "Kind", "Load", "Node", "NumpyOperations", "clamped",
    "constant_value", "differentiate", "evaluate", "node_value",
]  # fmt: skip
