"""Rows of scores through a user's function, on the CPU: machine code for a graph, and its address.

Kernels call it by the address, once for each row of a tile, and are compiled once for all
functions: a new function costs its own compilation, some hundredths of a second, and none of
theirs.

Two kinds of row functions are made of a graph: `score_row` for what a score or a mask function
gives, and `gradient_row` for what its derivative adds to the backward pass. Gradients of captured
arrays are added up as whole numbers, in fixed point: they are the same bits in any order.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import numpy as np
from llvmlite import ir
from numba.core import cgutils, types
from numba.core.compiler_lock import global_compiler_lock
from numba.core.registry import cpu_target
from numpy.typing import NDArray

from ...cpu import plain, simd
from ...cpu.compiler import COMPILES, intrinsic
from ...cpu.vector_target import TARGET
from ...score_graph import Derivative, Graph, NumpyOperations, clamped, evaluate, node_value
from .score_vectors import ADDRESS, I32, I64, SIZES, TABLE, UNIT, VectorOperations

Array = NDArray[Any]
POSITIONS = ("b", "h", "q")
_numbers = itertools.count()


@dataclass(frozen=True, eq=False)
class RowFunction:
    """Machine code that kernels call by its address; without compilation, Python.

    Args:
        address: of the code.
        owner: of the code; it is kept as long as this.

    """

    address: int
    owner: Any = field(repr=False)


def words_of(
    arrays: Sequence[Array], parameters: Sequence[Any], tables: Sequence[int] = (),
    units: Sequence[float] = (),
) -> NDArray[np.int64]:  # fmt: skip
    """What a row function is given.

    Args:
        arrays: captured ones, contiguous.
        parameters: numbers.
        tables: where in the table of sums those of each array begin.
        units: of each array, by which its sums are multiplied to become whole.

    Returns:
        Of each array its address, table, unit and sizes; then the parameters. Real numbers are the
        bits of a float64.

    """
    words: list[int] = []
    for n, array in enumerate(arrays):
        unit = np.float64(units[n] if units else 1.0)
        table = tables[n] if tables else 0
        words += [
            array.__array_interface__["data"][0],
            table,
            int(unit.view(np.int64)),
            *array.shape,
        ]
    for number in parameters:
        exact = np.float64(number).view(np.int64) if isinstance(number, float) else number
        words.append(int(exact))
    return np.array(words or [0], np.int64)


def captured_array(array: Array, dtype: np.dtype[Any]) -> Array:
    """An array as row functions read it: contiguous, in the scores' dtype, int32, or bytes.

    Raises:
        ValueError: whole numbers of more than 32 bits.

    """
    if array.dtype.kind == "b":
        return np.asarray(array, order="C").view(np.uint8)
    if array.dtype.kind in "iu":
        whole = np.asarray(array, np.int32, order="C")
        if array.dtype.itemsize >= 4 and not np.array_equal(whole, array):
            raise ValueError("a captured array has whole numbers of more than 32 bits")
        return whole
    return np.asarray(array, dtype, order="C")


# ----- machine code -----


class _Row:
    """A function that is being written: a loop over a row of scores.

    Args:
        arguments: names of its arguments: pointers "w", "words" and "table", reals "factor", and
            whole numbers.
        real: numba's type of the scores.

    """

    def __init__(self, graph: Graph, arguments: str, real: Any) -> None:
        context = cpu_target.target_context
        self.real = context.get_value_type(real)
        pointer = {
            "w": self.real.as_pointer(),
            "words": I64.as_pointer(),
            "table": I64.as_pointer(),
        }
        names = arguments.split()
        kinds = [pointer.get(name, self.real if name == "factor" else I64) for name in names]
        number = next(_numbers)
        self.library = context.codegen().create_library(f"score_row_{number}")
        self.module = self.library.create_ir_module(f"score_row_{number}")
        self.function = ir.Function(
            self.module, ir.FunctionType(ir.VoidType(), kinds), f"minitorch_score_row_{number}"
        )
        self.b = ir.IRBuilder(self.function.append_basic_block())
        self.given = dict(zip(names, self.function.args, strict=True))
        self.graph = graph
        self.operations = VectorOperations(self.b, graph, self.given["words"], self.real)
        self.inputs = {n: self.b.trunc(self.given[n], I32) for n in POSITIONS}
        # Before the loop: what is the same for the whole row.
        self.varies = graph.depends_on("score", "k")
        self.known: dict[int, Any] = {}
        for n, varies in enumerate(self.varies):
            if not varies:
                self.known[n] = self._value(n, self.known)

    def _value(self, n: int, values: dict[int, Any]) -> Any:
        return node_value(self.graph, n, values, self.operations, self.inputs)

    def values(self, scores: Any, step: Any) -> dict[int, Any]:
        """Of all nodes, for a vector of scores that is `step` elements from the row's first."""
        b, lanes = self.b, self.operations.lanes
        first = b.trunc(b.add(self.given["k0"], step), I32)
        along = ir.Constant(ir.VectorType(I32, lanes), list(range(lanes)))
        self.inputs |= {"score": scores, "k": b.add(self.operations.vector(first), along)}
        values = dict(self.known)
        for n, varies in enumerate(self.varies):
            if varies:
                values[n] = self._value(n, values)
        return values

    def loop(self, length: Any) -> Any:
        """A loop over whole vectors."""
        step = ir.Constant(I64, self.operations.lanes)
        return cgutils.for_range_slice(self.b, ir.Constant(I64, 0), length, step, inc=True)

    def pointer(self, place: Any) -> Any:
        """To a vector of the workspace."""
        kind = ir.VectorType(self.real, self.operations.lanes).as_pointer()
        return self.b.bitcast(self.b.gep(self.given["w"], [place]), kind)

    def read(self, place: Any) -> Any:
        return self.b.load(self.pointer(place), align=self._alignment)

    def write(self, value: Any, place: Any) -> None:
        self.b.store(self.operations.vector(value), self.pointer(place), align=self._alignment)

    @property
    def _alignment(self) -> int:
        return 8 if self.real == ir.DoubleType() else 4

    def finished(self) -> RowFunction:
        self.b.ret_void()
        with global_compiler_lock:
            self.library.add_ir_module(self.module)
            self.library.finalize()
        address = self.library.get_pointer_to_function(self.function.name)
        return RowFunction(address, self.library)


SCORE_ROW = "w words start length b h q k0"
GRADIENT_ROW = "w words table scores gradients length b h q k0 factor"


@cache
def score_row(graph: Graph, dtype: np.dtype[Any]) -> RowFunction:
    """w[start : start + length] become what the graph gives for them; of a mask function's graph
    -inf where it is false. Whole vectors are read and written.
    """
    if not COMPILES:
        return _plain_function(lambda *given: _plain_score_row(graph, *given))
    row = _Row(graph, SCORE_ROW, types.float64 if dtype == np.float64 else types.float32)
    b = row.b
    with row.loop(row.given["length"]) as (step, _):
        place = b.add(row.given["start"], step)
        scores = row.read(place)
        found = row.operations.vector(row.values(scores, step)[graph.outputs[0]])
        if graph.nodes[graph.outputs[0]].kind == "truth":
            found = b.select(found, scores, row.operations.number(scores, float("-inf")))
        row.write(found, place)
    return row.finished()


@cache
def gradient_row(derivative: Derivative, dtype: np.dtype[Any]) -> RowFunction:
    """The gradients of what a score function gave become those of the scores, times a factor; those
    of captured arrays are added to the table.

    A gradient of 0 stays 0, whatever the derivative is: a weight of 0 has no part in anything.
    """
    if not COMPILES:
        return _plain_function(lambda *given: _plain_gradient_row(derivative, *given))
    graph = derivative.graph
    row = _Row(graph, GRADIENT_ROW, types.float64 if dtype == np.float64 else types.float32)
    b, ops = row.b, row.operations
    zeros = ir.Constant(ir.VectorType(ops.real, ops.lanes), [0.0] * ops.lanes)
    # The sum over a row of what all of it adds to one element.
    sums = {
        n: cgutils.alloca_once_value(b, zeros)
        for n, load in enumerate(derivative.loads)
        if not any(row.varies[graph.outputs[i]] for i in load.indices)
    }
    with row.loop(row.given["length"]) as (step, _):
        place = b.add(row.given["gradients"], step)
        gradient = row.read(place)
        values = row.values(row.read(b.add(row.given["scores"], step)), step)
        outputs = [values[n] for n in graph.outputs]
        nothing = ops.equal(gradient, zeros)

        def times(x: Any) -> Any:
            return ops.where(nothing, zeros, ops.multiply(gradient, x))

        row.write(ops.multiply(times(outputs[1]), row.given["factor"]), place)
        for n, load in enumerate(derivative.loads):
            part = times(outputs[load.partial])
            if n in sums:
                b.store(b.fadd(b.load(sums[n]), part), sums[n])
            else:
                places = ops.vector(ops.place(load.captured, [outputs[i] for i in load.indices]))
                _add_each(row, load.captured, places, part)
    for n, total in sums.items():
        load = derivative.loads[n]
        at = ops.place(load.captured, [row.known[graph.outputs[i]] for i in load.indices])
        _add(row, load.captured, at, simd._reduce(b, b.load(total), b.fadd))
    return row.finished()


def _add_each(row: _Row, captured: int, places: Any, parts: Any) -> None:
    """Add the lanes of a vector to the table, one after another."""
    for lane in range(row.operations.lanes):
        number = ir.Constant(I32, lane)
        place, part = (row.b.extract_element(x, number) for x in (places, parts))
        _add(row, captured, place, part)


def _add(row: _Row, captured: int, place: Any, part: Any) -> None:
    """Add a number, in units of the array, to the table."""
    b, first = row.b, row.operations.first_word[captured]
    unit = b.bitcast(row.operations.word(first + UNIT), ir.DoubleType())
    wide = part if part.type == ir.DoubleType() else b.fpext(part, ir.DoubleType())
    whole = b.fptosi(b.fmul(wide, unit), I64)
    at = b.gep(row.given["table"], [b.add(row.operations.word(first + TABLE), place)])
    b.store(b.add(b.load(at), whole), at)


# ----- calls from kernels -----


def _call(address: Any, *given: Any) -> Any:
    """What numba wants of an intrinsic that calls the code at an address with these arguments."""

    def generate(context: Any, b: ir.IRBuilder, sig: Any, args: Any) -> Any:
        passed = [
            context.make_array(kind)(context, b, x).data if isinstance(kind, types.Array) else x
            for kind, x in zip(sig.args[1:], args[1:], strict=True)
        ]
        function = ir.FunctionType(ir.VoidType(), [x.type for x in passed])
        b.call(b.inttoptr(args[0], function.as_pointer()), passed)
        return context.get_dummy_value()

    kinds = [x if isinstance(x, types.Array | types.Float) else types.int64 for x in given]
    return types.void(types.int64, *kinds), generate


_plain_functions: list[Callable[..., None]] = []


def _plain_function(function: Callable[..., None]) -> RowFunction:
    """Where nothing is compiled the address is a number, from 1, in a list."""
    _plain_functions.append(function)
    return RowFunction(len(_plain_functions), function)


def _plain_call(address: Any, *given: Any) -> None:
    with np.errstate(all="ignore"):
        _plain_functions[int(address) - 1](*given)


@intrinsic(_plain_call)
def call_score_row(
    typing_context: Any, address: Any, w: Any, words: Any, start: Any, length: Any, b: Any, h: Any,
    q: Any, k0: Any,
) -> Any:  # fmt: skip
    """The code of `score_row`, for query q of head h of batch b, and keys from k0 on."""
    return _call(address, w, words, start, length, b, h, q, k0)


@intrinsic(_plain_call)
def call_gradient_row(
    typing_context: Any, address: Any, w: Any, words: Any, table: Any, scores: Any, gradients: Any,
    length: Any, b: Any, h: Any, q: Any, k0: Any, factor: Any,
) -> Any:  # fmt: skip
    """The code of `gradient_row`: scores and gradients are the first places of the row's."""
    return _call(address, w, words, table, scores, gradients, length, b, h, q, k0, factor)


# ----- without compilation -----


def _plain_values(
    graph: Graph, w: Array, words: Array, scores: Array, b: Any, h: Any, q: Any, k0: Any
) -> list[Any]:
    """Values of the outputs, from what a row function is given."""
    arrays, at = [], 0
    kinds = {"real": w.dtype, "whole": np.dtype(np.int32), "truth": np.dtype(np.uint8)}
    for captured in graph.captured:
        sizes = tuple(int(n) for n in words[at + SIZES : at + SIZES + captured.dims])
        kind = np.ctypeslib.as_ctypes_type(kinds[captured.kind])
        length = int(np.prod(sizes))
        data = (kind * length).from_address(int(words[at + ADDRESS]))
        array = np.ctypeslib.as_array(data).reshape(sizes)
        arrays.append(array != 0 if captured.kind == "truth" else array)
        at += SIZES + captured.dims
    parameters = [
        words[at + n : at + n + 1].view(np.float64)[0] if kind == "real" else int(words[at + n])
        for n, kind in enumerate(graph.parameters)
    ]
    inputs = {"score": scores, "b": b, "h": h, "q": q, "k": k0 + np.arange(len(scores))}
    return evaluate(graph, NumpyOperations(arrays, parameters, w.dtype), inputs)


def _plain_score_row(
    graph: Graph, w: Any, words: Any, start: Any, length: Any, b: Any, h: Any, q: Any, k0: Any
) -> None:
    row = w[start : start + length]
    (found,) = _plain_values(graph, w, words, row.copy(), b, h, q, k0)
    is_mask = graph.nodes[graph.outputs[0]].kind == "truth"
    row[:] = np.where(found, row, -np.inf) if is_mask else found


def _plain_gradient_row(
    derivative: Derivative, w: Any, words: Any, table: Any, scores: Any, gradients: Any,
    length: Any, b: Any, h: Any, q: Any, k0: Any, factor: Any,
) -> None:  # fmt: skip
    graph = derivative.graph
    found = _plain_values(graph, w, words, w[scores : scores + length], b, h, q, k0)
    row = w[gradients : gradients + length]
    gradient = row.copy()
    row[:] = np.where(gradient == 0, 0, gradient * found[1]) * factor
    for load in derivative.loads:
        at = sum(SIZES + captured.dims for captured in graph.captured[: load.captured])
        sizes = words[at + SIZES : at + SIZES + graph.captured[load.captured].dims]
        part = np.where(gradient == 0, 0, gradient * found[load.partial])
        indices = [np.broadcast_to(found[i], part.shape) for i in load.indices]
        place = np.ravel_multi_index(clamped(indices, tuple(sizes)), tuple(sizes))
        if all(np.ndim(found[i]) == 0 for i in load.indices):
            part, place = plain.sum_of(_lane_sums(w, part))[None], place[:1]
        unit = words[at + UNIT : at + UNIT + 1].view(np.float64)[0]
        np.add.at(
            table, words[at + TABLE] + place, (part.astype(np.float64) * unit).astype(np.int64)
        )


def _lane_sums(w: Array, part: Array) -> Array:
    """The sums that the lanes of a register hold in the end."""
    total = np.zeros(TARGET.lanes(8 * w.itemsize), w.dtype)
    for start in range(0, len(part), len(total)):
        total = total + part[start : start + len(total)]
    return total


__all__ = [
    "RowFunction", "call_gradient_row", "call_score_row", "captured_array", "gradient_row",
    "score_row", "words_of",
]  # fmt: skip
