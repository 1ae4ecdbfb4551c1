"""What stands for a number, and for an array, while a score or mask function is traced.

Python's operators and numpy's functions take a `Symbol`, and note in the graph what they would
compute. What only Python could do with a number's value is refused, with what to write instead.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np

from .kernels.score_graph import ARITHMETIC, COMPARISONS, OF_REALS, OF_TRUTHS, OF_WHOLE, Kind

if TYPE_CHECKING:
    from .score_trace import Tracer

IN_WORDS = {"real": "a number", "whole": "a whole number", "truth": "a truth value"}
LARGEST_POWER = 8


class ValueNeeded(BaseException):
    """Python itself needs the value of a number: the function is run again with it."""

    def __init__(self, parameter: str) -> None:
        self.parameter = parameter


def in_words(x: Any) -> str:
    """A value, for messages."""
    if isinstance(x, Symbol):
        return x.in_words
    shape = getattr(x, "shape", ())
    return f"an array of shape {tuple(shape)}" if shape else f"{type(x).__name__} {x!r}"[:80]


def _binary(name: str) -> tuple[Any, Any]:
    def method(self: Symbol, other: Any) -> Any:
        return self.two(name, self, other)

    def reflected(self: Symbol, other: Any) -> Any:
        return self.two(name, other, self)

    return method, reflected


class Symbol:
    """A number that the kernel will have. Python's operators and numpy's functions take it."""

    __slots__ = ("node", "parameter", "tracer")
    __array_priority__ = 1000

    def __init__(self, tracer: Tracer, node: int, parameter: str | None = None) -> None:
        self.tracer, self.node, self.parameter = tracer, node, parameter

    @property
    def kind(self) -> Kind:
        """Of the number."""
        return self.tracer.builder.kind(self.node)

    @property
    def in_words(self) -> str:
        """For messages."""
        return f"{IN_WORDS[self.kind]} of the kernel"

    def __repr__(self) -> str:
        return f"<{self.in_words}>"

    def two(self, name: str, x: Any, y: Any) -> Any:
        """An operation of two numbers."""
        for operand in (x, y):
            if isinstance(operand, Captured):
                operand._no_number()
        divisor = y if name in ("floor_divide", "remainder") else None
        if isinstance(divisor, Symbol) and divisor.parameter is not None:
            raise ValueNeeded(divisor.parameter)  # to divide by a constant is many times faster
        if name in ("greater", "greater_equal"):
            return self.two({"greater": "less", "greater_equal": "less_equal"}[name], y, x)
        truths = {"bitwise_and": "logical_and", "bitwise_or": "logical_or"}
        truths["bitwise_xor"] = "logical_xor"
        if name in truths:
            kinds = [self.tracer.builder.kind(self.tracer.lifted(z)) for z in (x, y)]
            if "truth" in kinds and kinds[0] != kinds[1]:
                self.tracer.refuse(
                    "&, | and ^ are of two truth values or of two whole numbers, got "
                    f"{in_words(x)} and {in_words(y)}: compare first, as in "
                    "(q_idx >= kv_idx) & (kv_idx > 3)"
                )
            if kinds[0] == "truth":
                name = truths[name]
        return self.tracer.operation(name, x, y)

    __add__, __radd__ = _binary("add")
    __sub__, __rsub__ = _binary("subtract")
    __mul__, __rmul__ = _binary("multiply")
    __truediv__, __rtruediv__ = _binary("divide")
    __floordiv__, __rfloordiv__ = _binary("floor_divide")
    __mod__, __rmod__ = _binary("remainder")
    __and__, __rand__ = _binary("bitwise_and")
    __or__, __ror__ = _binary("bitwise_or")
    __xor__, __rxor__ = _binary("bitwise_xor")
    __lt__, _ = _binary("less")
    __le__, _ = _binary("less_equal")
    __gt__, _ = _binary("greater")
    __ge__, _ = _binary("greater_equal")
    __eq__, _ = _binary("equal")
    __ne__, _ = _binary("not_equal")
    __hash__ = None  # type: ignore[assignment]

    def __neg__(self) -> Symbol:
        return self.tracer.operation("negative", self)

    def __pos__(self) -> Symbol:
        return self

    def __abs__(self) -> Symbol:
        return self.tracer.operation("absolute", self)

    def __invert__(self) -> Symbol:
        if self.kind != "truth":
            self.tracer.refuse(f"~ is of a truth value, got {self.in_words}")
        return self.tracer.operation("logical_not", self)

    def __pow__(self, power: Any) -> Symbol:
        if isinstance(power, Symbol) and power.parameter is not None:
            raise ValueNeeded(power.parameter)
        if not isinstance(power, Symbol) and power == 0.5:
            return self.tracer.operation("sqrt", self)
        whole = isinstance(power, int | float) and float(power).is_integer()
        if isinstance(power, Symbol) or not whole or not 0 <= power <= LARGEST_POWER:
            self.tracer.refuse(
                f"a power must be 0.5 or a whole number from 0 to {LARGEST_POWER}, got "
                f"{in_words(power)}: np.exp(y * np.log(x)) is any power of a positive number"
            )
        result = Symbol(self.tracer, self.tracer.builder.constant(1, self.kind))
        for _ in range(int(power)):
            result = result * self
        return result

    def astype(self, dtype: Any) -> Symbol:
        """The number as float, int or bool; towards 0 if it becomes whole."""
        kinds: dict[str, Kind] = {"f": "real", "i": "whole", "u": "whole", "b": "truth"}
        kind = kinds.get(np.dtype(dtype).kind)
        if kind is None:
            self.tracer.refuse(f"astype({dtype!r}): wanted float, int or bool")
        n = self.tracer.truth(self.node) if kind == "truth" else self.node
        return Symbol(self.tracer, self.tracer.builder.cast(n, kind))

    # ----- what only Python can do -----

    def _only_python(self, what: str, instead: str) -> NoReturn:
        if self.parameter is not None:
            raise ValueNeeded(self.parameter)
        self.tracer.refuse(f"{what} needs a value that is known only in the kernel: {instead}")

    def __bool__(self) -> bool:
        self._only_python(
            "`if`, `and`, `or`, `not`, `min`, `max` or a chain like a < b < c",
            "write np.where(condition, a, b), &, |, ~, np.minimum, np.maximum, (a < b) & (b < c)",
        )

    def __index__(self) -> int:
        self._only_python(
            "range(), or the index of a list or of an array that is reached through an attribute,",
            "bind the array to a name outside of the function, table = self.table, and index that",
        )

    def __float__(self) -> float:
        self._only_python(
            "float(), or a function of `math`,", "use numpy's function: np.exp, np.tanh, ..."
        )

    def __int__(self) -> int:
        self._only_python("int()", "whole numbers stay whole, and others have .astype(int)")

    def __iter__(self) -> NoReturn:
        self.tracer.refuse(f"{self.in_words} cannot be iterated over or unpacked")

    def __getitem__(self, index: Any) -> NoReturn:
        self.tracer.refuse(f"{self.in_words} has no index")

    def __getattr__(self, name: str) -> NoReturn:
        if name.startswith("__"):
            raise AttributeError(name)
        self.tracer.refuse(
            f"`.{name}`: {self.in_words} has no such attribute, numpy's functions take it: "
            "np.tanh(score)"
        )

    # ----- numpy's functions -----

    def __array_ufunc__(self, ufunc: np.ufunc, method: str, *inputs: Any, **options: Any) -> Any:
        name = {"true_divide": "divide", "fabs": "absolute"}.get(ufunc.__name__, ufunc.__name__)
        name = {"fmin": "minimum", "fmax": "maximum", "mod": "remainder"}.get(name, name)
        if method != "__call__" or options:
            self.tracer.refuse(f"np.{name} has no options here, and no .{method}")
        for x in inputs:
            if isinstance(x, Captured):
                x._no_number()
        if name in SHORTHANDS:
            return SHORTHANDS[name](*inputs)
        if name in ("greater", "greater_equal", "floor_divide", "remainder") or name in OF_WHOLE:
            return self.two(name, *inputs)
        if name not in KNOWN:
            self.tracer.refuse(
                f"np.{name} is not known in a score or mask function; known are "
                f"{', '.join(sorted({*KNOWN, *SHORTHANDS, 'where', 'clip'}))}"
            )
        return self.tracer.operation(name, *inputs)

    @classmethod
    def __torch_function__(
        cls, function: Any, kinds: Any, given: Any = (), named: Any = None
    ) -> Any:
        """PyTorch's functions on a symbol: told to be numpy's."""
        symbol = next(x for x in _flat((given, named)) if isinstance(x, cls))
        name = getattr(function, "__name__", str(function))
        if name == "__getitem__":  # a tensor that is reached through an attribute
            symbol.__index__()
        numpys = {"clamp": "clip", "pow": "power", "logical_not": "logical_not"}.get(name, name)
        instead = f"np.{numpys}" if hasattr(np, numpys) else "a function of numpy"
        symbol.tracer.refuse(
            f"torch.{name} is of whole tensors, and this is {symbol.in_words}: write {instead}"
        )

    def __array_function__(self, function: Any, kinds: Any, given: Any, named: Any) -> Any:
        name = function.__name__
        if name == "where" and len(given) == 3 and not named:
            return self.tracer.where(*given)
        if name == "clip":
            return _clip(*given, **named)
        if name == "ndim":  # a Tensor's index is looked at, which is reached through an attribute
            self.__index__()
        self.tracer.refuse(f"np.{name} is not known in a score function, or not like this")


def _flat(x: Any) -> Iterator[Any]:
    """All that is in nested tuples, lists and dictionaries."""
    if isinstance(x, dict):
        x = tuple(x.values())
    if isinstance(x, tuple | list):
        for part in x:
            yield from _flat(part)
    else:
        yield x


def _clip(x: Any, a_min: Any = None, a_max: Any = None, **named: Any) -> Any:
    low, high = named.get("min", a_min), named.get("max", a_max)
    raised = x if low is None else np.maximum(x, low)
    return raised if high is None else np.minimum(raised, high)


SHORTHANDS: dict[str, Callable[..., Any]] = {
    "positive": lambda x: x,
    "square": lambda x: x * x,
    "reciprocal": lambda x: 1.0 / x,
    "sign": lambda x: np.where(x > 0, 1, np.where(x < 0, -1, 0)),
    "power": lambda x, power: x**power,
    "float_power": lambda x, power: x.astype(float) ** power,
    "invert": lambda x: ~x,
    "bitwise_not": lambda x: ~x,
}
KNOWN = {
    *ARITHMETIC, *COMPARISONS, *OF_REALS, *OF_TRUTHS, *OF_WHOLE, "divide", "negative", "absolute",
    "logical_not", "greater", "greater_equal",
}  # fmt: skip


class Captured:
    """An array that a function closes over: it is indexed, by a whole number for each dimension."""

    __slots__ = ("number", "tracer")
    __hash__ = None  # type: ignore[assignment]

    def __init__(self, tracer: Tracer, number: int) -> None:
        self.tracer, self.number = tracer, number

    @property
    def name(self) -> str:
        """As the function knows it."""
        return self.tracer.array_names[self.number]

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the array."""
        return tuple(self.tracer.arrays[self.number].shape)

    @property
    def ndim(self) -> int:
        """Number of dimensions."""
        return len(self.shape)

    @property
    def value(self) -> Captured:
        """Itself, as the value of a Parameter."""
        return self

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index: Any) -> Symbol:
        indices = index if isinstance(index, tuple) else (index,)
        refuse = self.tracer.refuse
        if any(isinstance(i, slice) or i is None or i is Ellipsis for i in indices):
            refuse(f"`{self.name}` is indexed by a slice, which gives an array; wanted numbers")
        if len(indices) != len(self.shape):
            refuse(
                f"`{self.name}` has shape {self.shape} and gets {len(indices)} "
                f"{'index' if len(indices) == 1 else 'indices'}; wanted {len(self.shape)}, which "
                "give one number"
            )
        nodes = [self.tracer.lifted(i) for i in indices]
        for n, i in zip(nodes, indices, strict=True):
            if self.tracer.builder.kind(n) != "whole":
                refuse(
                    f"`{self.name}` is indexed by {in_words(i)}; wanted a whole number, as "
                    ".astype(int) gives"
                )
        nodes = [self._from_start(n, size) for n, size in zip(nodes, self.shape, strict=True)]
        return Symbol(self.tracer, self.tracer.builder.load(self.number, nodes))

    def _from_start(self, n: int, size: int) -> int:
        """A constant below 0 counts from the end, as in numpy."""
        known = self.tracer.builder.value(n)
        if known is None or known >= 0:
            return n
        return self.tracer.builder.constant(known + size, "whole")

    def __getattr__(self, name: str) -> NoReturn:
        if name.startswith("__"):
            raise AttributeError(name)
        self.tracer.refuse(
            f"`{self.name}.{name}`: numbers of a captured array are read by index; compute it "
            "outside of the function"
        )

    def _no_number(self, *_: Any) -> NoReturn:
        indices = ", ".join(["q_idx", "kv_idx", "h", "b"][: self.ndim])
        self.tracer.refuse(
            f"`{self.name}` is an array of shape {self.shape}: a function of one score reads "
            f"numbers of it, as in {self.name}[{indices}]"
        )

    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = __truediv__ = _no_number
    __rtruediv__ = __floordiv__ = __mod__ = __and__ = __rand__ = __or__ = __ror__ = _no_number
    __lt__ = __le__ = __gt__ = __ge__ = __bool__ = __float__ = __neg__ = __abs__ = _no_number
    __eq__ = __ne__ = _no_number
    __iter__ = __array__ = __array_ufunc__ = __array_function__ = _no_number


__all__ = ["IN_WORDS", "Captured", "Symbol", "ValueNeeded", "in_words"]
