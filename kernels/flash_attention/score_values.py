"""A user's functions on the registers of a GPU: graphs (score_graph.py) in `traced` functions.

All families of the GPU make their code of a graph here, a score at a time; what is the same for a
row or a column of scores the compiler computes once. (The CPU's are rows of scores,
cpu/score_rows.py.)

What a call gives to the functions is in the kernel's argument `words`, whole numbers of 64 bits:

    for the score function     of each captured array its address, and the steps of its dimensions;
                               then its parameters, real numbers by their bits
    for the mask function      likewise

Products that are added to something are rounded once (fma), wherever they stand in a graph: so a
score has the same bits in each kernel that computes it, the backward pass's included.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..gpu import traced_math
from ..gpu.runtime import types
from ..gpu.traced import select
from ..gpu.traced_math import as_kind, constant, fused, load, real_of
from ..score_graph import Graph, Kind, node_value
from .scores import Functions, Where
from .variant import Captured

WORD = types.int64
STORED: dict[str, np.dtype[Any]] = {
    "whole": np.dtype(np.int32),
    "truth": np.dtype(np.uint8),
}


def stored_dtype(kind: Kind, real: np.dtype[Any]) -> np.dtype[Any]:
    """In which dtype kernels read a captured array; `real` is the scores'."""
    return STORED.get(kind, real)


def word_count(graph: Graph | None) -> int:
    """How many words a function is given."""
    if graph is None:
        return 0
    return sum(1 + array.dims for array in graph.captured) + len(graph.parameters)


def words_type(functions: Functions) -> Any:
    """numba type of a kernel's argument `words`, which is never empty."""
    count = word_count(functions.score) + word_count(functions.mask)
    return types.UniTuple(WORD, max(count, 1))


def words_of(
    functions: Functions,
    given: Sequence[Captured],
    real: np.dtype[Any],
    address: Callable[[Any], int],
) -> tuple[int, ...]:
    """What a kernel is given as `words`.

    Args:
        functions: of the kernel.
        given: what belongs to the score function, and to the mask function; arrays are contiguous,
            in their `stored_dtype`.
        real: dtype of the scores.
        address: of an array.

    """
    words: list[int] = []
    for graph, captured in zip((functions.score, functions.mask), given, strict=True):
        if graph is None:
            continue
        for array in captured.arrays:
            sizes = list(array.shape)
            steps = [int(np.prod(sizes[n + 1 :], dtype=np.int64)) for n in range(len(sizes))]
            words += [address(array), *steps]
        for kind, number in zip(graph.parameters, captured.parameters, strict=True):
            words.append(_bits(number, real) if kind == "real" else int(number))
    return tuple(words) or (0,)


def _bits(number: float, real: np.dtype[Any]) -> int:
    with np.errstate(over="ignore"):
        exact: NDArray[Any] = np.array(number, real)
    whole = np.int64 if real.itemsize == 8 else np.int32
    return int(exact.view(whole)[()])


class Shifted(NamedTuple):
    """A whole number, base + plus. Of what differs between neighbouring scores by a number that is
    known, sums and addresses need no instructions.

    Args:
        base: int32; None is 0.
        plus: is known.

    """

    base: Any
    plus: int

    def number(self, beside: Any) -> Any:
        """The number itself; `beside` is any one of the kernel."""
        if self.base is not None and not self.plus:
            return self.base
        known = constant(types.int32, self.plus, beside)
        return known if self.base is None else traced_math.whole("add", self.base, known)


def _sum(name: str, a: Shifted, b: Shifted) -> Shifted:
    """The sum "add" or the difference "sub"."""
    plus = a.plus + b.plus if name == "add" else a.plus - b.plus
    if b.base is None:
        return Shifted(a.base, plus)
    if a.base is None:
        return Shifted(b.base if name == "add" else -b.base, plus)
    return Shifted(traced_math.whole(name, a.base, b.base), plus)


class ScoreValues:
    """The operations of a graph on numbers of a `traced` function. Whole numbers are `Shifted`.

    Args:
        graph: of the function.
        words: what it is given.
        real: numba type of the scores.
        beside: any number of the kernel.
        approximate: whether results of 11 bits are enough for tanh, and 22 for others: of what is
            stored in 16 bits.

    """

    def __init__(
        self, graph: Graph, words: Sequence[Any], real: Any, beside: Any, approximate: bool
    ) -> None:
        self.graph, self.words, self.beside, self.approximate = graph, words, beside, approximate
        self.types = {"real": real, "whole": types.int32, "truth": types.boolean}
        self.first_word, place = [], 0
        for array in graph.captured:
            self.first_word.append(place)
            place += 1 + array.dims
        self.parameters = place

    def constant(self, value: Any, kind: Kind) -> Any:
        """A number that is known."""
        if kind == "whole":
            return Shifted(None, int(value))
        return constant(self.types[kind], value, self.beside)

    def parameter(self, number: int, kind: Kind) -> Any:
        """A number that is given with each launch."""
        word = self.words[self.parameters + number]
        if kind == "real":
            return real_of(self.types[kind], word)
        number = as_kind(types.int32, word)
        return Shifted(number, 0) if kind == "whole" else as_kind(types.boolean, number)

    def load(self, captured: int, indices: Sequence[Any]) -> Any:
        """A number of a captured array. The indices have been checked: they lie inside."""
        kind = self.graph.captured[captured].kind
        stored = types.uint8 if kind == "truth" else self.types[kind]
        size = np.dtype(str(stored)).itemsize
        first = self.first_word[captured]
        address, offset = self.words[first], 0
        for n, index in enumerate(indices):
            is_last = n == len(indices) - 1  # its step is 1
            if is_last:
                offset, index = index.plus * size, Shifted(index.base, 0)
            if index.base is not None or index.plus:  # `==` of symbols is an instruction
                far = as_kind(WORD, index.number(self.beside))
                if not is_last:
                    far = traced_math.whole("mul", far, self.words[first + 1 + n])
                far = traced_math.whole("mul", far, constant(WORD, size, self.beside))
                address = traced_math.whole("add", address, far)
        number = load(stored, address, offset)
        return Shifted(number, 0) if kind == "whole" else as_kind(self.types[kind], number)

    def cast(self, x: Any, have: Kind, kind: Kind) -> Any:
        """As another kind. Whole numbers below 2^24 are exact, so base and plus may be added as
        real numbers: converting takes a GPU as long as four sums.
        """
        if have == "whole" and kind == "real" and x.base is not None:
            real = as_kind(self.types[kind], x.base)
            return real + constant(self.types[kind], float(x.plus), real) if x.plus else real
        number = as_kind(self.types[kind], x.number(self.beside) if have == "whole" else x)
        return Shifted(number, 0) if kind == "whole" else number

    def where(self, condition: Any, a: Any, b: Any) -> Any:
        """A choice."""
        return self._each(lambda x, y: select(condition, x, y), a, b)

    def add(self, a: Any, b: Any) -> Any:
        """The sum."""
        return _sum("add", a, b) if isinstance(a, Shifted) else a + b

    def subtract(self, a: Any, b: Any) -> Any:
        """The difference."""
        return _sum("sub", a, b) if isinstance(a, Shifted) else a - b

    def _each(self, operation: Callable[..., Any], *operands: Any) -> Any:
        """An operation on the numbers; the result is whole if they are."""
        if not isinstance(operands[0], Shifted):
            return operation(*operands)
        found = operation(*(x.number(self.beside) for x in operands))
        is_truth = getattr(found, "kind", None) == types.boolean or isinstance(found, np.bool_)
        return found if is_truth else Shifted(found, 0)

    def __getattr__(self, name: str) -> Callable[..., Any]:
        if name in traced_math.FUNCTIONS:
            return lambda x: traced_math.function(name, x, self.approximate)
        return lambda *operands: self._each(OPERATIONS[name], *operands)


def _multiply(a: Any, b: Any) -> Any:
    is_whole = getattr(a, "kind", None) == types.int32 or isinstance(a, np.int32)
    return traced_math.whole("mul", a, b) if is_whole else a * b


OPERATIONS: dict[str, Callable[..., Any]] = {
    "multiply": _multiply,
    "divide": lambda a, b: a / b,
    "negative": lambda x: -x,
    "absolute": traced_math.absolute,
    "minimum": lambda a, b: select(a < b, a, b),
    "maximum": lambda a, b: select(b < a, a, b),
    "floor_divide": traced_math.floor_divide,
    "remainder": traced_math.remainder,
    "bitwise_and": lambda a, b: a & b,
    "bitwise_or": lambda a, b: a | b,
    "bitwise_xor": lambda a, b: a ^ b,
    "logical_and": lambda a, b: a & b,
    "logical_or": lambda a, b: a | b,
    "logical_xor": lambda a, b: a ^ b,
    "logical_not": lambda x: x ^ constant(types.boolean, True, x),
    "less": lambda a, b: a < b,
    "less_equal": lambda a, b: a <= b,
    "equal": lambda a, b: a == b,
    "not_equal": lambda a, b: a != b,
}


class Evaluation:
    """A graph's values at places of a tile of scores: what does not depend on the key is computed
    once for a row, and so on.

    Args:
        graph: of the function.
        words: what it is given.
        real: numba type of the scores.
        approximate: see `ScoreValues`.

    """

    def __init__(self, graph: Graph, words: Sequence[Any], real: Any, approximate: bool) -> None:
        self.graph, self.words, self.real, self.approximate = graph, words, real, approximate
        self.known: dict[Any, Any] = {}
        varies = {name: graph.depends_on(name) for name in ("score", "q", "k")}
        self.names = [
            tuple(name for name, of in varies.items() if of[n]) for n in range(len(graph.nodes))
        ]

    def at(self, score: Any, where: Where, score_key: Any = 0) -> list[Any]:
        """The outputs, each a number.

        Args:
            score: in natural units; of a mask function any number.
            where: which score it is; places are int32, or `Shifted`.
            score_key: another one for another score.

        """
        beside = self.words[0]
        operations = ScoreValues(self.graph, self.words, self.real, beside, self.approximate)
        b, h, q, k = (x if isinstance(x, Shifted) else Shifted(x, 0) for x in where)
        inputs = {"score": score, "b": b, "h": h, "q": q, "k": k}
        keys = {"score": score_key, "q": _name(q), "k": _name(k)}
        values: list[Any] = []
        for n, names in enumerate(self.names):
            key = (n, *(keys[name] for name in names))
            if key not in self.known:
                self.known[key] = self._value(n, values, operations, inputs)
            values.append(self.known[key])
        return [values[n] for n in self.graph.outputs]

    def number(self, x: Any) -> Any:
        """An output as a number of the kernel."""
        return x.number(self.words[0]) if isinstance(x, Shifted) else x

    def _value(self, n: int, values: list[Any], operations: ScoreValues, inputs: Any) -> Any:
        """Of a node: sums of products are rounded once, and quotients of what is the same for many
        scores are products.
        """
        node, nodes = self.graph.nodes[n], self.graph.nodes
        if node.kind == "real" and node.name in ("add", "subtract"):
            minus = node.name == "subtract"
            for place, operand in enumerate(node.operands):
                if nodes[operand].name == "multiply":
                    a, b = (values[x] for x in nodes[operand].operands)
                    other = values[node.operands[1 - place]]
                    if minus:
                        a, other = (a, -other) if place == 0 else (-a, other)
                    return fused(a, b, other)
        if node.name == "cast" and node.kind == "real":
            inner = nodes[node.operands[0]]
            if inner.name == "absolute" and inner.kind == "whole":  # |x| as a real number is free
                x = values[inner.operands[0]]
                return traced_math.absolute(operations.cast(x, "whole", "real"))
        if node.name == "divide" and self.approximate and not self.names[node.operands[1]]:
            x, y = (values[operand] for operand in node.operands)
            return x * (constant(self.real, 1.0, y) / y)
        return node_value(self.graph, n, values, operations, inputs)


def _name(x: Shifted) -> Any:
    """What tells a number from another."""
    return (id(x.base.code) if hasattr(x.base, "code") else int(x.base)), x.plus


__all__ = [
    "Evaluation", "ScoreValues", "Shifted", "stored_dtype", "word_count", "words_of", "words_type",
]  # fmt: skip
