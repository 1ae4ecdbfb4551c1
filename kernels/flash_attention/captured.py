"""Gradients of the arrays that a score function captured, on a GPU: what kernels for them share.

    dS' = P * (Z dP - delta), of what the score function gave
    gradient[index] += dS' * d score_mod(S) / d array[index]        for every score

These sums come from scores all over the matrix, and from many blocks. They are sums of whole
numbers of 64 bits, so that their order changes no bit: what is added is multiplied by a unit, a
power of two with which no sum can overflow, and rounded. The kernel runs twice. First it measures:
the largest sum of absolute values of a thread bounds all sums. Then it adds, and what a thread adds
to one element in succession it adds at once.

S and dS' of a tile are in shared memory; they are computed by simt/captured.py, or on tensor cores
by mma/captured.py, from the rows (m, l) of the forward pass of any family.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any, NamedTuple

from ..gpu.runtime import (
    Instance,
    ceil_div,
    cuda,
    device_function,
    kernel,
    launch,
    precision,
    types,
)
from ..gpu.traced import traced
from ..gpu.traced_math import as_kind, constant, whole
from ..score_bands import of_difference
from .fixed_point import BITS
from .launch import ArgumentTypes, Ints, argument_types
from .score_values import Evaluation, words_type
from .scores import Functions, Where
from .scores_cuda import Asked
from .variant import derivative_of, wanted_gradients

THREADS = 128
MOST_EXPONENT = 120  # of a unit: float32 has it


class CapturedSums(NamedTuple):
    """Where gradients of captured arrays are added up, for those of `wanted_gradients`.

    Args:
        largest: of each array, zero at first, float32 (float64 for float64).
        units: likewise.
        sums: of all arrays one after another, zero at first, int64.
        starts: where each array's begin.
        owner: of the memory, kept until the launch.

    """

    largest: Any
    units: Any
    sums: Any
    starts: Ints
    owner: Any = None


# ----- what a score adds -----


@cache
def load_function(functions: Functions, real: Any, approximate: bool) -> Any:
    """Device function `(score, asked)`: of each load from an array whose gradient is wanted
    d score_mod(score) / d number, and the number's place in the array.
    """
    assert functions.score is not None
    derivative = derivative_of(functions.score)
    graph, loads, far, near = derivative.graph, derivative.loads, types.int64, types.int32
    first_word, count = [], 0
    for array in graph.captured:
        first_word.append(count)
        count += 1 + array.dims
    found_types = types.UniTuple(real, len(loads)), types.UniTuple(far, len(loads))

    @traced(types.Tuple(found_types), real, *[near] * 4, words_type(functions))
    def run(score, batch, head, query, key, words):
        evaluation = Evaluation(graph, words, real, approximate)
        found = evaluation.at(score, Where(batch, head, query, key))

        def place_of(load: Any) -> Any:
            place = constant(far, 0, words[0])
            for n, output in enumerate(load.indices):
                index = as_kind(far, evaluation.number(found[output]))
                step = words[first_word[load.captured] + 1 + n]
                place = whole("add", place, whole("mul", index, step))
            return place

        return (
            tuple(found[load.partial] for load in loads), tuple(place_of(load) for load in loads),
        )  # fmt: skip

    @device_function
    def loads_of(score, asked):
        return run(
            real(score), near(asked.batch), near(asked.head), near(asked.query), near(asked.key),
            asked.words,
        )  # fmt: skip

    return loads_of


def array_of_loads(functions: Functions) -> tuple[int, ...]:
    """Of each load its array, as a number of `wanted_gradients`."""
    assert functions.score is not None
    wanted = wanted_gradients(functions.score)
    return tuple(wanted.index(x.captured) for x in derivative_of(functions.score).loads)


def order_of(functions: Functions) -> str:
    """In which order scores follow each other to the same places most often: by "rows", "keys" or
    "diagonals".
    """
    assert functions.score is not None
    derivative = derivative_of(functions.score)
    graph, loads = derivative.graph, derivative.loads
    outputs = {graph.outputs[n] for load in loads for n in load.indices}
    varies = {name: graph.depends_on(name, "score") for name in ("q", "k")}
    of_query, of_key = (any(varies[name][n] for n in outputs) for name in ("q", "k"))
    same = of_difference(graph)
    if of_query and of_key and all(same[n] for n in outputs):
        return "diagonals"
    return "keys" if of_key and not of_query else "rows"


@cache
def score_walk(block: tuple[int, int], threads: int, order: str) -> tuple[int, Any]:
    """How many scores of a tile a thread takes; and a device function `(number)`, their rows and
    columns in the tile, beyond which they may lie.

    A thread takes a part of a row, of a column, or whole diagonals, in which threads beside each
    other read numbers beside each other.
    """
    block_m, block_n = block
    diagonals, by_keys = order == "diagonals", order == "keys"
    lines, length = (block_n, block_m) if by_keys else (block_m, block_n)
    parts = max(threads // lines, 1)  # of a line
    of_part = ceil_div(length, parts)
    count = of_part * ceil_div(lines * parts, threads)
    if diagonals:
        count = ceil_div(block_m + block_n - 1, threads) * block_m

    @device_function
    def score_at(number):
        thread = types.int32(cuda.threadIdx.x)
        if diagonals:
            row = types.int32(number % block_m)
            diagonal = types.int32(number // block_m * threads) + thread - (block_n - 1)
            return row, row - diagonal
        line = types.int32(number // of_part * threads) + thread
        along = line // lines * of_part + types.int32(number % of_part)
        line = line % lines
        if by_keys:
            return along, line
        return line, along

    return count, score_at


# ----- what a kernel does with a tile -----


class Place(NamedTuple):
    """Which scores a tile has: batch and head, lengths, and its first query and key."""

    batch: Any
    head: Any
    seqlen_q: Any
    seqlen_k: Any
    row0: Any
    key0: Any


class Adder(NamedTuple):
    """Device functions of a kernel.

    Args:
        begin: `(state)`, sums of nothing; `state` are three local arrays of as many elements as
            there are loads: two of whole numbers of 64 bits, one of the scores' type.
        add: `(state, memory, gradients_at, scores_at, step, tile, scale, words, units, sums,
            starts)`: of a tile in `memory`, whose rows lie `step` apart; scores are multiplied by
            the scale.
        end: `(state, largest, sums)`.
        loads: how many there are.

    """

    begin: Any
    add: Any
    end: Any
    loads: int


@cache
def adder(
    functions: Functions,
    real_name: str,
    block: tuple[int, int],
    threads: int,
    measures: bool,
    approximate: bool = False,
) -> Adder:
    """What measures, or adds up, what scores of tiles of `block` add."""
    real = precision(real_name).real
    loads_of, array_of = load_function(functions, real, approximate), array_of_loads(functions)
    (count, score_at), loads = score_walk(block, threads, order_of(functions)), len(array_of)
    (block_m, block_n), infinity = block, float("inf")

    @device_function
    def begin(state):
        run, place, size = state
        for n in range(loads):
            run[n], place[n], size[n] = types.int64(0), types.int64(0), real(0.0)

    @device_function
    def flush(run, place, n, sums):
        if run[n] != types.int64(0):
            cuda.atomic.add(sums, place[n], run[n])

    @device_function
    def add(state, memory, gradients_at, scores_at, step, tile, scale, words, units, sums, starts):
        run, place, size = state
        for number in range(count):
            r, c = score_at(number)
            inside = r >= 0 and r < block_m and c >= 0 and c < block_n
            inside = inside and tile.row0 + r < tile.seqlen_q and tile.key0 + c < tile.seqlen_k
            ds = memory[gradients_at + r * step + c] if inside else real(0.0)
            if ds != real(0.0):
                asked = Asked(tile.batch, tile.head, tile.row0 + r, tile.key0 + c, words)
                partials, found = loads_of(memory[scores_at + r * step + c] * scale, asked)
                for n in range(loads):
                    part = ds * partials[n]
                    if measures:
                        size[n] += abs(part)
                    elif units[array_of[n]] > real(0.0):
                        to = starts[array_of[n]] + found[n]
                        if to != place[n]:
                            flush(run, place, n, sums)
                            run[n], place[n] = types.int64(0), to
                        # The unit is a power of two: no rounding here.
                        exact = real(part * units[array_of[n]])
                        run[n] += types.int64(math.floor(exact + real(0.5)))

    @device_function
    def end(state, largest, sums):
        run, place, size = state
        for n in range(loads):
            if measures:
                total = size[n] if size[n] < infinity else real(infinity)  # NaN, too
                if total > largest[array_of[n]]:  # which others make larger, never smaller
                    cuda.atomic.max(largest, array_of[n], total)
            else:
                flush(run, place, n, sums)

    return Adder(begin, add, end, loads)


# ----- units and results -----


@cache
def unit_kernel(real_name: str) -> Any:
    """A thread computes an array's unit from the largest of `parts` sums; 0 if that is infinite."""
    infinity, bits, most = float("inf"), BITS, MOST_EXPONENT

    real = precision(real_name).real

    @kernel(THREADS)
    def flash_captured_units(largest, units, count, parts):
        n = types.int64(cuda.blockIdx.x) * cuda.blockDim.x + cuda.threadIdx.x
        if n < count:
            bound = types.float64(largest[n]) * parts
            if bound < infinity:
                exponent = bits - math.frexp(bound)[1] if bound > 0.0 else 0
                units[n] = real(math.ldexp(1.0, max(min(exponent, most), -most)))
            else:
                units[n] = real(0.0)

    return flash_captured_units


@cache
def result_kernel(name: str) -> Any:
    """A thread makes a sum a number of the gradient, of a dtype; NaN without a unit."""
    numbers = precision(name)
    real, store, nan = numbers.real, numbers.store, float("nan")

    @kernel(THREADS)
    def flash_captured_result(sums_of, start, units, array, out, count):
        n = types.int64(cuda.blockIdx.x) * cuda.blockDim.x + cuda.threadIdx.x
        if n < count:
            unit = types.float64(units[array])
            number = types.float64(sums_of[start + n]) / unit if unit > 0.0 else nan
            out[n] = store(real(number))

    return flash_captured_result


# ----- launches -----


def add_up(
    kernel_of: Callable[[bool], Any],
    grid: int,
    threads: int,
    arguments: tuple[Any, ...],
    shared_bytes: int,
    real_name: str,
    sums: CapturedSums,
    gradients: list[tuple[Any, int, str]],
) -> None:
    """Write the gradients.

    Args:
        kernel_of: the kernel that measures, or that adds.
        grid: blocks of either.
        threads: of a block.
        arguments: of either.
        shared_bytes: of a block of either.
        real_name: the scores' type.
        sums: where they are added up.
        gradients: of each array of `wanted_gradients` a flat array, its size and its dtype's name.

    """
    count = len(gradients)
    launch(kernel_of(True), grid, threads, *arguments, shared_bytes=shared_bytes)
    launch(
        unit_kernel(real_name), ceil_div(count, THREADS), THREADS, sums.largest, sums.units, count,
        grid * threads,
    )  # fmt: skip
    launch(kernel_of(False), grid, threads, *arguments, shared_bytes=shared_bytes)
    for n, (array, size, dtype) in enumerate(gradients):
        if size:
            launch(
                result_kernel(dtype), ceil_div(size, THREADS), THREADS,
                sums.sums, sums.starts[n], sums.units, n, array, size,
            )  # fmt: skip


# ----- for the compile tests -----


def pair_of_instances(
    name: str,
    kernel_of: Callable[[bool], Any],
    of: ArgumentTypes,
    architectures: tuple[str, ...] = (),
) -> Iterator[Instance]:
    """The kernels that measure and that add, of a family; `of` are the types of its arguments."""
    wholes = types.Array(types.int64, 1, "C")
    signature = (
        *of.inputs, of.array, *[of.rows] * 5, wholes, *[of.strides] * 5, of.sizes, *of.scalars,
        of.words, of.lists, types.UniTuple(types.int64, 1),
    )  # fmt: skip
    for measures, does in ((True, "measures"), (False, "adds")):
        yield Instance(
            name.format(does), kernel_of(measures), signature, architectures=architectures
        )


def instances() -> Iterator[Instance]:
    """Units, and results of all dtypes."""
    wholes, whole_number = types.Array(types.int64, 1, "C"), types.int64
    for name in ("float32", "float64"):
        of = argument_types(name, "none")
        yield Instance(
            f"flash_captured_units[{name}]", unit_kernel(name),
            (of.rows, of.rows, whole_number, whole_number),
        )  # fmt: skip
    for name in ("float16", "bfloat16", "float32", "float64"):
        of = argument_types(name, "none")
        yield Instance(
            f"flash_captured_result[{name}]", result_kernel(name),
            (wholes, whole_number, of.rows, whole_number, of.array, whole_number),
        )  # fmt: skip


__all__ = [
    "Adder", "CapturedSums", "Place", "add_up", "adder", "instances", "order_of",
    "pair_of_instances",
]  # fmt: skip
