"""From a Python function of one attention score to a graph (kernels/score_graph.py).

    def soft_cap(score, b, h, q_idx, kv_idx):
        return 30 * np.tanh(score / 30)

The function is run once, with symbols in place of numbers; Python's operators and numpy's functions
work on symbols, and note what they would compute. What the function closes over, by its closure,
globals, defaults, `functools.partial`, or other functions that it calls, is exchanged beforehand:
arrays for something whose elements are loaded by index, numbers for parameters. Both are given to
the kernel when it is launched, so another table or another 30 needs no other kernel. Where Python
itself needs a number's value, in `range(n)` or `if n`, the function is run again with that value.

The graph is remembered by the code and by all that decided it. A call with a function that was seen
before reads anew what it closes over, and does not run it.
"""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, NoReturn

import numpy as np

from .captured_arrays import (
    has_32_bits,
    is_array,
    is_torch,
    kind_of,
    numbers_of,
    unwrapped,
    wants_gradient,
)
from .kernels.score_graph import (
    OF_REALS,
    OF_TRUTHS,
    OF_WHOLE,
    Builder,
    CapturedArray,
    Graph,
    Kind,
)
from .kernels.score_intervals import complaint, complaint_of_shapes, reads_values
from .score_symbols import IN_WORDS, Captured, Symbol, ValueNeeded, in_words

Role = Literal["score_mod", "mask_mod"]
ARGUMENTS = {"score_mod": "score, b, h, q_idx, kv_idx", "mask_mod": "b, h, q_idx, kv_idx"}
INPUT_NAMES = {"score_mod": ("score", "b", "h", "q", "k"), "mask_mod": ("b", "h", "q", "k")}
OWN_FOLDER = Path(__file__).parent  # whose files are no user's, but those with functions of a score
WITH_FUNCTIONS = ("score_mods.py", "attention_masks.py", "mask_functions.py")
LIBRARIES = ("numpy", "math", "builtins", "functools", "operator", "cmath", "torch")
UNCHANGING = (bool, int, float, complex, str, bytes, type(None), type(...))
LIBRARY_TYPES = (types.FunctionType, types.BuiltinFunctionType, type, np.ufunc)
MOST_GRAPHS = 1000  # that are remembered

_graphs: dict[Any, Graph] = {}  # by role, code, and what decided them
_values_needed: dict[Any, frozenset[str]] = {}  # by code: parameters whose value Python needs


class Traced(NamedTuple):
    """A function as a graph, and what it closes over.

    Args:
        graph: what it computes: its kernel's key.
        arrays: captured arrays and Tensors, in the graph's order.
        parameters: numbers, likewise.
        names: of the arrays, as the function knows them.
        name: of the function.
        place: where it is, for messages.

    """

    graph: Graph
    arrays: tuple[Any, ...]
    parameters: tuple[float | int, ...]
    names: tuple[str, ...]
    name: str = ""
    place: str = ""


class _Refused(Exception):
    """The function asks for something that is known only inside the kernel.

    It is no TypeError, which numpy would turn into an error of its own.
    """


class _WrongArguments(Exception):
    """The function does not take the role's arguments."""


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
    code = getattr(_innermost(function), "__code__", None)
    known = set(_values_needed.get(code, ()))
    while True:
        tracer = Tracer(known)
        try:
            rebuilt = tracer.exchanged(function, "")
            key = None if tracer.changes else (role, *tracer.key)
            graph = _graphs.get(key)
            if graph is None:
                _check_arguments(function, role)
                inputs = (Symbol(tracer, tracer.builder.input(x)) for x in INPUT_NAMES[role])
                graph = tracer.graph(rebuilt(*inputs), role)
            if key is not None:
                _remember(key, graph)
            return Traced(
                graph, tuple(tracer.arrays), tuple(tracer.numbers), tuple(tracer.array_names),
                name_of(function), place_of(function),
            )  # fmt: skip
        except ValueNeeded as needed:
            known.add(needed.parameter)
            if code is not None:
                _values_needed[code] = frozenset(known)
        except _WrongArguments as error:
            raise TypeError(str(error)) from None
        except Exception as error:
            raise _located(tracer.refused or error, error.__traceback__, role, function) from None


def _remember(key: Any, graph: Graph) -> None:
    if len(_graphs) >= MOST_GRAPHS:
        _graphs.clear()
    _graphs[key] = graph


def check(traced: Traced, role: Role, sizes: Sequence[int]) -> None:
    """Raise ValueError if an index leaves its array, or a whole number has more than 32 bits.

    Numbers of arrays are read only where they decide: elsewhere their shapes do.

    Args:
        traced: the function.
        role: of it.
        sizes: of b, h, q and k.

    """
    if reads_values(traced.graph) or not all(map(has_32_bits, traced.arrays)):
        arrays = [numbers_of(x) for x in traced.arrays]
        of_name = dict(zip("bhqk", sizes, strict=True))
        wrong = complaint(traced.graph, arrays, traced.parameters, traced.names, of_name)
    else:
        shapes = tuple(tuple(x.shape) for x in traced.arrays)
        wrong = complaint_of_shapes(
            traced.graph, shapes, traced.parameters, traced.names, tuple(sizes)
        )
    if wrong:
        raise ValueError(f"{role}: {traced.place}{wrong}")


def _innermost(function: Any) -> Any:
    while isinstance(function, functools.partial):
        function = function.func
    return function


def name_of(function: Callable[..., Any]) -> str:
    """What a function is called in messages."""
    inner = _innermost(function)
    return getattr(inner, "__qualname__", type(inner).__name__).replace("<locals>.", "")


def _check_arguments(function: Callable[..., Any], role: Role) -> None:
    """A function of another number of arguments is told, be it the other role's."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except ValueError:
        raise _WrongArguments(
            f"{role} must be written in Python ({ARGUMENTS[role]}), got the built-in "
            f"`{name_of(function)}`"
        ) from None
    if _takes(function, role):
        return
    least = sum(
        p.default is p.empty and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)
        for p in parameters
    )
    other: Role = "mask_mod" if role == "score_mod" else "score_mod"
    hint = f"; one like this is a {other}" if _takes(function, other) else ""
    raise _WrongArguments(
        f"{role}: {place_of(function)}it takes {least} arguments, wanted ({ARGUMENTS[role]}){hint}"
    )


def place_of(function: Callable[..., Any]) -> str:
    """Where a function is, for messages: file, line and name."""
    code = getattr(_innermost(function), "__code__", None)
    where = "" if code is None else f"{code.co_filename}:{code.co_firstlineno}, in "
    return f"{where}`{name_of(function)}`: "


def _takes(function: Callable[..., Any], role: Role) -> bool:
    try:
        inspect.signature(function).bind(*INPUT_NAMES[role])
    except TypeError:
        return False
    return True


def _located(
    error: Exception, traceback: Any, role: Role, function: Callable[..., Any]
) -> TypeError:
    """An error with the line of the user's function where it comes from, or where that begins."""
    place = place_of(function)
    while traceback is not None:
        code = traceback.tb_frame.f_code
        path = Path(code.co_filename)
        own = OWN_FOLDER in path.parents and path.name not in WITH_FUNCTIONS
        if not own and "numpy" not in path.parts:
            place = f"{code.co_filename}:{traceback.tb_lineno}, in `{code.co_name}`: "
        traceback = traceback.tb_next
    kind = "" if isinstance(error, _Refused) else f"{type(error).__name__}: "
    return TypeError(f"{role}: {place}{kind}{error}")


# ----- what a function closes over -----


class Tracer:
    """One run of a function: the graph so far, and what was exchanged.

    Args:
        known: names of the parameters whose value Python needs.

    """

    def __init__(self, known: set[str]) -> None:
        self.builder, self.known = Builder(), known
        self.refused: _Refused | None = None
        self.arrays: list[Any] = []
        self.array_names: list[str] = []
        self.numbers: list[float | int] = []
        self.number_names: list[str] = []
        self.key: list[Any] = []  # what decides the graph
        self.changes = False  # something may change, and nobody would notice
        self._functions: dict[int, Any] = {}
        self._captured: dict[int, Any] = {}

    def refuse(self, message: str) -> NoReturn:
        """Say what cannot be. It is noted, as numpy may put an error of its own in its place."""
        self.refused = _Refused(message)
        raise self.refused

    def exchanged(self, value: Any, name: str) -> Any:
        """What stands for a value that the function closes over, under this name."""
        value = unwrapped(value)
        if isinstance(value, np.ndarray) and value.ndim == 0:
            value = value[()]
        if isinstance(value, np.generic) and value.dtype.kind in "biuf":
            value = value.item()
        if is_array(value):
            return self._array(value, name)
        if isinstance(value, int | float) and not isinstance(value, bool):
            return self._number(value, name)
        if isinstance(value, types.FunctionType) and not _is_library(value):
            return self._function(value, name)
        if isinstance(value, types.MethodType):
            self.changes = True
            return types.MethodType(self.exchanged(value.__func__, name), value.__self__)
        if isinstance(value, functools.partial):
            return self._partial(value, name)
        if type(value) in (tuple, list) and any(callable(x) or is_array(x) for x in value):
            self.key.append((type(value), len(value)))
            return type(value)(self.exchanged(x, f"{name}[{n}]") for n, x in enumerate(value))
        self._note(value)
        return value

    def _note(self, value: Any) -> None:
        """Anything else is remembered if it cannot change."""
        simple = value if type(value) in (tuple, list) else (value,)
        if all(type(x) in UNCHANGING for x in simple):
            self.key.append((type(value), repr(value)))
        elif _is_library(value):
            self.key.append(id(value))
        else:
            self.changes = True

    def _array(self, array: Any, name: str) -> Any:
        if id(array) in self._captured:
            self.key.append(("array", self.arrays.index(self._captured[id(array)])))
            return self._loaded(self.arrays.index(self._captured[id(array)]), array)
        kind = kind_of(array)
        if kind is None:
            self.refuse(
                f"`{name}` has dtype {array.dtype}; wanted floating point, whole numbers or bool"
            )
        if is_torch(array) and array.dim() == 0 and not wants_gradient(array):
            return self.exchanged(array.item(), name)
        shape = tuple(array.shape)
        described = CapturedArray(
            kind, max(len(shape), 1), kind == "real" and wants_gradient(array)
        )
        self.key.append((described, shape))
        self.builder.captured.append(described)
        self.arrays.append(array if shape else array.reshape(1))
        self.array_names.append(name)
        self._captured[id(array)] = self.arrays[-1]
        return self._loaded(len(self.arrays) - 1, array)

    def _loaded(self, number: int, array: Any) -> Any:
        """An array, or the only number of one without dimensions."""
        captured = Captured(self, number)
        return captured if len(array.shape) else captured[0]

    def _number(self, value: float, name: str) -> Any:
        """A parameter; numbers that are known, or not of 32 bits, stay what they are."""
        whole = isinstance(value, int)
        if name in self.known or (whole and not -(2**31) <= value < 2**31):
            self._note(value)
            return value
        self.key.append(whole)
        if name not in self.number_names:
            self.numbers.append(value)
            self.number_names.append(name)
            self.builder.parameters.append("whole" if whole else "real")
        number = self.number_names.index(name)
        return Symbol(self, self.builder.parameter(number), name)

    def _function(self, function: types.FunctionType, name: str) -> Any:
        """The same code over exchanged values."""
        if id(function) in self._functions:
            self.key.append(list(self._functions).index(id(function)))
            return self._functions[id(function)]
        given = function.__defaults__ or ()
        self.key += [function.__code__, len(given), len(function.__kwdefaults__ or ())]
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
        for used in _names(function.__code__):
            if used in scope:
                self.key.append(used)
                scope[used] = self.exchanged(scope[used], inside + used)
        parameters = function.__code__.co_varnames
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
        self.key += [len(partial.args), *partial.keywords]
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
            f"{in_words(x)} beside a score or an index; wanted a number, or an array that is "
            "indexed by whole numbers"
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
                f"np.{name} is of whole numbers here, got {', '.join(map(in_words, operands))}"
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

    def graph(self, result: Any, role: Role) -> Graph:
        """The graph, once the function has returned."""
        wanted = "a score" if role == "score_mod" else "a truth value, as q_idx >= kv_idx gives"
        if not isinstance(result, Symbol | bool | int | float | np.generic):
            self.refuse(f"it returned {in_words(result)}; wanted {wanted}")
        n = self.lifted(result)
        if role == "mask_mod" and self.builder.kind(n) != "truth":
            self.refuse(f"it returned {IN_WORDS[self.builder.kind(n)]}; wanted {wanted}")
        if role == "score_mod":
            n = self.builder.cast(n, "real")
        return self.builder.finished([n])


def _is_library(value: Any) -> bool:
    """Whether it is a module, a function or a class of a library."""
    if isinstance(value, types.ModuleType):
        return value.__name__.split(".")[0] in LIBRARIES
    if not isinstance(value, LIBRARY_TYPES):
        return False
    return (getattr(value, "__module__", "numpy") or "").split(".")[0] in LIBRARIES


@functools.cache
def _names(code: types.CodeType) -> tuple[str, ...]:
    """Global names that a function, and those within it, may use."""
    inner = (_names(c) for c in code.co_consts if isinstance(c, types.CodeType))
    return tuple(sorted(set(code.co_names).union(*inner)))


__all__ = ["ARGUMENTS", "Role", "Traced", "check", "name_of", "trace"]
