"""From a Python function of one attention score to a graph (kernels/score_graph.py).

    def soft_cap(score, b, h, q_idx, kv_idx):
        return 30 * np.tanh(score / 30)

The function is run once, with symbols in place of numbers; Python's operators and numpy's functions
work on symbols, and note what they would compute. What the function closes over, by its closure,
globals, defaults, `functools.partial`, or other functions that it calls, is exchanged beforehand:
arrays for something whose elements are loaded by index, numbers for parameters. Both are given to
the kernel when it is launched, so another table or another 30 needs no other kernel. Where Python
itself needs a number's value, in `range(n)` or `if n`, the function is run again with that value.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple, NoReturn

import numpy as np

from .kernels.score_graph import (
    ARITHMETIC,
    COMPARISONS,
    OF_REALS,
    OF_TRUTHS,
    OF_WHOLE,
    Builder,
    CapturedArray,
    Graph,
    Kind,
)

Role = Literal["score_mod", "mask_mod"]
ARGUMENTS = {"score_mod": "score, b, h, q_idx, kv_idx", "mask_mod": "b, h, q_idx, kv_idx"}
INPUT_NAMES = {"score_mod": ("score", "b", "h", "q", "k"), "mask_mod": ("b", "h", "q", "k")}
IN_WORDS = {"real": "a number", "whole": "a whole number", "truth": "a truth value"}
LARGEST_POWER = 8
LIBRARIES = ("numpy", "math", "builtins", "functools", "operator", "cmath")


class Traced(NamedTuple):
    """A function as a graph, and what it closes over.

    Args:
        graph: what it computes: its kernel's key.
        arrays: captured arrays and Tensors, in the graph's order.
        parameters: numbers, likewise.
        names: of the arrays, as the function knows them.
        name: of the function.

    """

    graph: Graph
    arrays: tuple[Any, ...]
    parameters: tuple[float | int, ...]
    names: tuple[str, ...]
    name: str


class _Refused(Exception):
    """The function asks for something that is known only inside the kernel.

    It is no TypeError, which numpy would turn into an error of its own.
    """


class _ValueNeeded(BaseException):
    """Python itself needs the value of a number: the function is run again with it."""

    def __init__(self, parameter: str) -> None:
        self.parameter = parameter


def trace(function: Callable[..., Any], role: Role) -> Traced:
    """The graph of a score function or of a mask function.

    Args:
        function: (score, b, h, q_idx, kv_idx) -> score, or (b, h, q_idx, kv_idx) -> truth value.
            `score` is one score, scale * query . key; `b` and `h` number the batch and the query's
            head, `q_idx` and `kv_idx` the query and the key.
        role: which of the two.

    Raises:
        TypeError: it is no function, takes other arguments, returns something else, or does what
            only Python can do with a number: the message names the line, and what to write instead.

    """
    if not callable(function):
        raise TypeError(
            f"{role} must be a function ({ARGUMENTS[role]}), got {type(function).__name__}"
        )
    name = name_of(function)
    known: set[str] = set()  # parameters whose value Python needs
    while True:
        tracer = _Tracer(known)
        rebuilt = tracer.exchanged(function, "")
        _check_arguments(rebuilt, role, name)
        try:
            result = rebuilt(*(Symbol(tracer, tracer.builder.input(x)) for x in INPUT_NAMES[role]))
        except _ValueNeeded as needed:
            known.add(needed.parameter)
            continue
        except Exception as error:
            raise _located(tracer.refused or error, error.__traceback__, role) from None
        return tracer.traced(result, role, name)


def name_of(function: Callable[..., Any]) -> str:
    """What a function is called in messages."""
    while isinstance(function, functools.partial):
        function = function.func
    return getattr(function, "__qualname__", type(function).__name__).replace("<locals>.", "")


def _check_arguments(function: Any, role: Role, name: str) -> None:
    """A function of another number of arguments is told, be it the other role's."""
    while isinstance(function, functools.partial):
        if function.keywords:
            return
        function = function.func
    if not isinstance(function, types.FunctionType) or function.__code__.co_flags & 0x04:  # *args
        return
    taken = function.__code__.co_argcount
    least = taken - len(function.__defaults__ or ())
    wanted = len(INPUT_NAMES[role])
    if not least <= wanted <= taken:
        other: Role = "mask_mod" if role == "score_mod" else "score_mod"
        hint = ""
        if least <= len(INPUT_NAMES[other]) <= taken:
            hint = f"; one like this is a {other}"
        raise TypeError(
            f"{role} `{name}` takes {least} arguments, wanted ({ARGUMENTS[role]}){hint}"
        )


def _located(error: Exception, traceback: Any, role: Role) -> TypeError:
    """An error with the line of the user's function where it comes from."""
    place = ""
    while traceback is not None:
        code = traceback.tb_frame.f_code
        path = Path(code.co_filename)
        if path != Path(__file__) and "numpy" not in path.parts:
            place = f"{code.co_filename}:{traceback.tb_lineno}, in `{code.co_name}`: "
        traceback = traceback.tb_next
    own = "" if isinstance(error, _Refused) else f"{type(error).__name__}: "
    return TypeError(f"{role}: {place}{own}{error}")


# ----- what a function closes over -----


class _Tracer:
    """One run of a function: the graph so far, and what was exchanged."""

    def __init__(self, known: set[str]) -> None:
        self.builder, self.known = Builder(), known
        self.refused: _Refused | None = None
        self.arrays: list[Any] = []
        self.array_names: list[str] = []
        self.numbers: list[float | int] = []
        self.number_names: list[str] = []
        self._functions: dict[int, Any] = {}

    def refuse(self, message: str) -> NoReturn:
        """Say what cannot be. It is noted, as numpy may put an error of its own in its place."""
        self.refused = _Refused(message)
        raise self.refused

    def exchanged(self, value: Any, name: str) -> Any:
        """What stands for a value that the function closes over, under this name."""
        if isinstance(value, np.ndarray) and value.ndim == 0:
            value = value[()]
        if isinstance(value, np.generic) and value.dtype.kind in "biuf":
            value = value.item()
        if _is_array(value):
            return self._array(value, name)
        if isinstance(value, int | float) and not isinstance(value, bool):
            return self._number(value, name)
        if isinstance(value, types.FunctionType):
            return value if _is_library(value) else self._function(value, name)
        if isinstance(value, types.MethodType):
            return types.MethodType(self.exchanged(value.__func__, name), value.__self__)
        if isinstance(value, functools.partial):
            return self._partial(value, name)
        if type(value) in (tuple, list) and any(callable(x) or _is_array(x) for x in value):
            return type(value)(self.exchanged(x, f"{name}[{n}]") for n, x in enumerate(value))
        return value

    def _array(self, array: Any, name: str) -> Captured:
        for number, known in enumerate(self.arrays):
            if known is array:
                return Captured(self, number)
        dtype = np.dtype(array.dtype)
        kinds: dict[str, Kind] = {"f": "real", "i": "whole", "u": "whole", "b": "truth"}
        kind: Kind | None = "real" if dtype.name == "bfloat16" else kinds.get(dtype.kind)
        if kind is None:
            self.refuse(f"`{name}` has dtype {dtype}; wanted floating point, whole numbers or bool")
        wants = hasattr(array, "requires_grad") and kind == "real" and array.requires_grad()
        self.builder.captured.append(CapturedArray(kind, len(array.shape), bool(wants)))
        self.arrays.append(array)
        self.array_names.append(name)
        return Captured(self, len(self.arrays) - 1)

    def _number(self, value: float, name: str) -> Any:
        """A parameter; numbers that are known, or not of 32 bits, stay what they are."""
        whole = isinstance(value, int)
        if name in self.known or (whole and not -(2**31) <= value < 2**31):
            return value
        if name not in self.number_names:
            self.numbers.append(value)
            self.number_names.append(name)
            self.builder.parameters.append("whole" if whole else "real")
        number = self.number_names.index(name)
        return Symbol(self, self.builder.parameter(number), name)

    def _function(self, function: types.FunctionType, name: str) -> Any:
        """The same code over exchanged values."""
        if id(function) in self._functions:
            return self._functions[id(function)]
        inside = f"{name}." if name else ""
        scope = dict(function.__globals__)
        cells = tuple(types.CellType() for _ in function.__closure__ or ())
        rebuilt = types.FunctionType(function.__code__, scope, function.__name__, None, cells)
        self._functions[id(function)] = rebuilt  # before its values: it may call itself
        for n, cell in enumerate(function.__closure__ or ()):
            try:
                value = cell.cell_contents
            except ValueError:  # not bound yet
                continue
            cells[n].cell_contents = self.exchanged(
                value, inside + function.__code__.co_freevars[n]
            )
        for used in _names(function.__code__) & scope.keys():
            if not isinstance(scope[used], types.ModuleType):
                scope[used] = self.exchanged(scope[used], inside + used)
        parameters = function.__code__.co_varnames
        given = function.__defaults__ or ()
        first = function.__code__.co_argcount - len(given)
        rebuilt.__defaults__ = tuple(
            self.exchanged(x, inside + parameters[first + n]) for n, x in enumerate(given)
        )
        rebuilt.__kwdefaults__ = {
            k: self.exchanged(x, inside + k) for k, x in (function.__kwdefaults__ or {}).items()
        }
        return rebuilt

    def _partial(self, partial: functools.partial[Any], name: str) -> Any:
        inside = f"{name}." if name else ""
        arguments = [self.exchanged(x, f"{inside}{n}") for n, x in enumerate(partial.args)]
        named = {k: self.exchanged(x, inside + k) for k, x in partial.keywords.items()}
        return functools.partial(self.exchanged(partial.func, name), *arguments, **named)

    # ----- nodes -----

    def lifted(self, x: Any) -> int:
        """An operand as a node."""
        if isinstance(x, Symbol):
            return x.node
        if isinstance(x, np.ndarray) and x.ndim == 0:
            x = x[()]
        if isinstance(x, bool | np.bool_):
            return self.builder.constant(x, "truth")
        if isinstance(x, int | np.integer):
            if not -(2**31) <= x < 2**31:
                self.refuse(f"{x} has more than the 32 bits of a whole number in a kernel")
            return self.builder.constant(x, "whole")
        if isinstance(x, float | np.floating):
            return self.builder.constant(x, "real")
        self.refuse(
            f"{_text(x)} beside a score or an index; wanted a number, or an array that is indexed "
            "by whole numbers"
        )

    def operation(self, name: str, *operands: Any) -> Symbol:
        """What one of numpy's functions gives for these operands."""
        b = self.builder
        nodes = [self.lifted(x) for x in operands]
        kinds = [b.kind(n) for n in nodes]
        widest: Kind = "real" if "real" in kinds else "whole"
        if name in OF_REALS or name == "divide":
            kind: Kind = "real"
        elif name in OF_TRUTHS or name == "logical_not":
            return Symbol(self, b.apply(name, *(self.truth(n) for n in nodes)))
        elif name in OF_WHOLE and "real" in kinds:
            self.refuse(
                f"np.{name} is of whole numbers here, got {', '.join(map(_text, operands))}"
            )
        else:
            kind = widest
        return Symbol(self, b.apply(name, *(b.cast(n, kind) for n in nodes)))

    def truth(self, n: int) -> int:
        """A node as a truth value: other numbers are true if they are not 0."""
        kind = self.builder.kind(n)
        if kind == "truth":
            return n
        return self.builder.apply("not_equal", n, self.builder.constant(0, kind))

    def where(self, condition: Any, x: Any, y: Any) -> Symbol:
        """np.where."""
        b = self.builder
        nodes = self.lifted(x), self.lifted(y)
        kinds = {b.kind(n) for n in nodes}
        kind: Kind = kinds.pop() if len(kinds) == 1 else "real" if "real" in kinds else "whole"
        chosen = b.where(self.truth(self.lifted(condition)), *(b.cast(n, kind) for n in nodes))
        return Symbol(self, chosen)

    def traced(self, result: Any, role: Role, name: str) -> Traced:
        """The graph, once the function has returned."""
        if not isinstance(result, Symbol | bool | int | float | np.generic):
            wanted = "a score" if role == "score_mod" else "a truth value, as q_idx >= kv_idx gives"
            raise TypeError(f"{role} `{name}` returned {_text(result)}; wanted {wanted}")
        n = self.lifted(result)
        if role == "mask_mod" and self.builder.kind(n) != "truth":
            raise TypeError(
                f"mask_mod `{name}` returned {IN_WORDS[self.builder.kind(n)]}; wanted a truth "
                "value, as q_idx >= kv_idx gives"
            )
        if role == "score_mod":
            n = self.builder.cast(n, "real")
        graph = self.builder.finished([n])
        return Traced(graph, tuple(self.arrays), tuple(self.numbers), tuple(self.array_names), name)


def _is_array(value: Any) -> bool:
    return isinstance(value, np.ndarray) or hasattr(value, "requires_grad")


def _is_library(function: types.FunctionType) -> bool:
    return (function.__module__ or "").split(".")[0] in LIBRARIES


def _names(code: types.CodeType) -> set[str]:
    """Global names that a function, and those within it, may use."""
    inner = (_names(c) for c in code.co_consts if isinstance(c, types.CodeType))
    return set(code.co_names).union(*inner)


def _text(x: Any) -> str:
    """A value, for messages."""
    if isinstance(x, Symbol):
        return x.in_words
    shape = getattr(x, "shape", ())
    return f"an array of shape {tuple(shape)}" if shape else f"{type(x).__name__} {x!r}"[:80]


# ----- symbols -----


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

    def __init__(self, tracer: _Tracer, node: int, parameter: str | None = None) -> None:
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
            raise _ValueNeeded(divisor.parameter)  # to divide by a constant is many times faster
        if name in ("greater", "greater_equal"):
            return self.two({"greater": "less", "greater_equal": "less_equal"}[name], y, x)
        truths = {"bitwise_and": "logical_and", "bitwise_or": "logical_or"}
        truths["bitwise_xor"] = "logical_xor"
        if name in truths:
            kinds = [self.tracer.builder.kind(self.tracer.lifted(z)) for z in (x, y)]
            if "truth" in kinds and kinds[0] != kinds[1]:
                self.tracer.refuse(
                    f"&, | and ^ are of two truth values or two whole numbers, got {_text(x)} and "
                    f"{_text(y)}: compare first, as in (q_idx >= kv_idx) & (kv_idx > 3)"
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
            raise _ValueNeeded(power.parameter)
        if power == 0.5:
            return self.tracer.operation("sqrt", self)
        whole = isinstance(power, int | float) and float(power).is_integer()
        if isinstance(power, Symbol) or not whole or not 0 <= power <= LARGEST_POWER:
            self.tracer.refuse(
                f"a power must be 0.5 or a whole number from 0 to {LARGEST_POWER}, got "
                f"{_text(power)}: np.exp(y * np.log(x)) is any power of a positive number"
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
            raise _ValueNeeded(self.parameter)
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

    def __array_function__(self, function: Any, kinds: Any, given: Any, named: Any) -> Any:
        name = function.__name__
        if name == "where" and len(given) == 3 and not named:
            return self.tracer.where(*given)
        if name == "clip":
            return _clip(*given, **named)
        self.tracer.refuse(f"np.{name} is not known in a score function, or not like this")


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

    def __init__(self, tracer: _Tracer, number: int) -> None:
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
                    f"`{self.name}` is indexed by {_text(i)}; wanted a whole number, as "
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
        self.tracer.refuse(
            f"`{self.name}` is an array of shape {self.shape}: a function of one score reads "
            f"numbers of it, as in {self.name}[{', '.join(['q_idx', 'kv_idx', 'h', 'b'][: self.ndim])}]"
        )

    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = __truediv__ = _no_number
    __rtruediv__ = __floordiv__ = __mod__ = __and__ = __rand__ = __or__ = __ror__ = _no_number
    __lt__ = __le__ = __gt__ = __ge__ = __bool__ = __float__ = __neg__ = __abs__ = _no_number
    __eq__ = __ne__ = _no_number  # type: ignore[assignment]
    __iter__ = __array__ = __array_ufunc__ = __array_function__ = _no_number


__all__ = ["ARGUMENTS", "Role", "Traced", "name_of", "trace"]
