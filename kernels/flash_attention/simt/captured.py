"""Gradients of the arrays that a score function captured, on any CUDA GPU.

    S and dS' = P * (Z dP - delta), of what the score function gave, as in `simt/backward.py`
    gradient[index] += dS' * d score_mod(S) / d array[index]        for every score

These sums come from scores all over the matrix, and from many blocks. They are sums of whole
numbers of 64 bits, so that their order changes no bit: what is added is multiplied by a unit, a
power of two with which no sum can overflow, and rounded. The kernel runs twice. First it measures:
the largest sum of absolute values of some rows bounds all sums. Then it adds, and what a thread
adds to one element in succession it adds at once.

The kernels are launched after the backward pass of any family, whose rows (m, l) they take.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from typing import Any, NamedTuple

from ...gpu.runtime import (
    Instance,
    ceil_div,
    cuda,
    device_function,
    kernel,
    launch,
    precision,
    types,
)
from ...gpu.traced import traced
from ...gpu.traced_math import as_kind, constant, whole
from ...score_bands import of_difference
from ..fixed_point import BITS
from ..launch import (
    Architecture,
    Heads,
    Inputs,
    Ints,
    Matrices,
    argument_types,
    example_functions,
    scalars_of,
    sizes_of,
    tile_lists,
)
from ..problem import AttentionProblem
from ..schedule import Band
from ..schedule_cuda import walk
from ..score_values import Evaluation, words_type
from ..scores import Functions, Where
from ..scores_cuda import head_place
from ..variant import derivative_of, wanted_gradients
from .backward import backward_memory, row_loader, score_gradients, tile_pair
from .dropout import keep_maker
from .forward import row_reductions
from .launch import backward_blocks, backward_bytes, has_whole_vectors, kind_of, launch_delta
from .tiles import Blocks, Kind, Scores, own_place, place_asker

THREADS = 128


class CapturedSums(NamedTuple):
    """Where gradients of captured arrays are added up, for those of `wanted_gradients`.

    Args:
        largest: of each array, zero at first, float32 (float64 for float64).
        units: of each array, float64.
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
def load_function(kind: Kind) -> Any:
    """Device function `(score, asked)`: of each load from an array whose gradient is wanted
    d score_mod(score) / d number, and the number's place in the array.
    """
    functions = kind.functions
    assert functions.score is not None
    derivative, real = derivative_of(functions.score), precision(kind.precision).real
    graph, loads, far, near = derivative.graph, derivative.loads, types.int64, types.int32
    first_word, count = [], 0
    for array in graph.captured:
        first_word.append(count)
        count += 1 + array.dims
    found_types = types.UniTuple(real, len(loads)), types.UniTuple(far, len(loads))

    @traced(types.Tuple(found_types), real, *[near] * 4, words_type(functions))
    def run(score, batch, head, query, key, words):
        evaluation = Evaluation(graph, words, real, approximate=False)
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


def _array_of_loads(kind: Kind) -> tuple[int, ...]:
    """Of each load its array, as a number of `wanted_gradients`."""
    assert kind.functions.score is not None
    wanted = wanted_gradients(kind.functions.score)
    return tuple(wanted.index(x.captured) for x in derivative_of(kind.functions.score).loads)


def _order(kind: Kind) -> str:
    """In which order scores follow each other to the same places most often: by "rows", "keys" or
    "diagonals".
    """
    assert kind.functions.score is not None
    derivative = derivative_of(kind.functions.score)
    graph, loads = derivative.graph, derivative.loads
    outputs = {graph.outputs[n] for load in loads for n in load.indices}
    varies = {name: graph.depends_on(name, "score") for name in ("q", "k")}
    of_query, of_key = (any(varies[name][n] for n in outputs) for name in ("q", "k"))
    same = of_difference(graph)
    if of_query and of_key and all(same[n] for n in outputs):
        return "diagonals"
    return "keys" if of_key and not of_query else "rows"


@cache
def score_walk(blocks: Blocks, order: str) -> Any:
    """How many scores of a tile a thread takes; and a device function `(number)`, their rows and
    columns in the tile, of which the column may lie outside.

    By rows or by keys a thread takes its own scores, which no other has written; by diagonals it
    takes whole ones, in which threads beside each other read numbers beside each other.
    """
    rows, keys, threads_m, threads_n = blocks.rows, blocks.keys, blocks.threads_m, blocks.threads_n
    block_m, block_n, threads, place_of = (
        blocks.block_m, blocks.block_n, blocks.threads, own_place(blocks.threads_n),
    )  # fmt: skip
    diagonals, by_keys = order == "diagonals", order == "keys"
    count = rows * keys
    if diagonals:
        count = ceil_div(block_m + block_n - 1, threads) * block_m

    @device_function
    def score_at(number):
        if diagonals:
            row = number % block_m
            diagonal = number // block_m * threads + cuda.threadIdx.x - (block_n - 1)
            return types.int64(row), types.int64(row - diagonal)
        my_row, my_key = place_of()
        i = number % rows if by_keys else number // keys
        j = number // rows if by_keys else number % keys
        return my_row + i * threads_m, my_key + j * threads_n

    return count, score_at


# ----- kernels -----


@cache
def captured_kernel(kind: Kind, blocks: Blocks, measures: bool) -> Any:
    """A block goes through block_m queries' scores, and measures, or adds, what they add."""
    real = precision(kind.precision).real
    plan, block_m, block_n = backward_memory(kind, blocks, True), blocks.block_m, blocks.block_n
    rows, keys, threads_n = blocks.rows, blocks.keys, blocks.threads_n
    q_tile, do_tile, k_tile, v_tile, p_tile, ds_tile = plan[:6]
    p_step, place_of, order = plan.p_step, own_place(threads_n), _order(kind)
    (count, score_at), crosses_threads = score_walk(blocks, order), order == "diagonals"
    load_queries = tile_pair(kind, blocks, plan, block_m)
    load_keys = tile_pair(kind, blocks, plan, block_n)
    load_rows = row_loader(kind.precision, block_m, blocks.threads, plan)
    to_ds, dropout = score_gradients(kind, blocks, plan, "score"), kind.dropout
    make_keep, unit = keep_maker(kind, blocks, plan.keep), kind.unit_of_products
    places, tile_at = walk(kind.is_sparse, block_m, block_n)
    asked_at, loads_of, array_of = place_asker(kind), load_function(kind), _array_of_loads(kind)
    _, row_sum = row_reductions(real.name, threads_n)
    loads, infinity = len(array_of), float("inf")

    @kernel(blocks.threads, blocks=blocks.at_once)
    def flash_captured(
        q, k, v, mask, offset, grad_out, shift, inverse, delta, largest, units, sums_of, q_steps,
        k_steps, v_steps, mask_steps, grad_steps, sizes, scale, seed, threshold, keep, words, lists,
        starts,
    ):  # fmt: skip
        heads, seqlen_q, seqlen_k, lower, upper, k_group, v_group = sizes
        memory = cuda.shared.array(0, real)
        sums = cuda.local.array((rows, keys), real)
        sizes_of_own = cuda.local.array(loads, real)
        run, place = cuda.local.array(loads, types.int64), cuda.local.array(loads, types.int64)
        _, my_key = place_of()
        tiles = (seqlen_q + block_m - 1) // block_m
        batch_head = types.int64(cuda.blockIdx.x // tiles)
        tile = tiles - 1 - cuda.blockIdx.x % tiles
        row0 = tile * block_m
        b, h = batch_head // heads, batch_head % heads
        k_start = b * k_steps.batch + h // k_group * k_steps.head
        v_start = b * v_steps.batch + h // v_group * v_steps.head
        q_start = b * q_steps.batch + h * q_steps.head + row0 * q_steps.row
        do_start = b * grad_steps.batch + h * grad_steps.head + row0 * grad_steps.row
        load_queries(
            memory, (q_tile, q, q_start, q_steps.row, q_steps.column),
            (do_tile, grad_out, do_start, grad_steps.row, grad_steps.column), seqlen_q - row0,
            real(scale * unit),
        )  # fmt: skip
        rows_of = shift, inverse, delta
        load_rows(memory, rows_of, batch_head * seqlen_q + row0, seqlen_q - row0)
        band = Band(lower, upper, seqlen_q, seqlen_k)
        of_head = Scores(band, mask, head_place(b, h, mask_steps), words)
        dropout_of = (seed + offset[0], types.uint64(threshold), real(keep))
        for n in range(loads):
            sizes_of_own[n], run[n], place[n] = real(0.0), types.int64(0), types.int64(0)
        first, end = places(lists, b, h, tile, sizes)
        for number in range(first, end):
            key0, full = tile_at(lists, number)
            load_keys(
                memory, (k_tile, k, k_start + key0 * k_steps.row, k_steps.row, k_steps.column),
                (v_tile, v, v_start + key0 * v_steps.row, v_steps.row, v_steps.column),
                seqlen_k - key0, real(1.0),
            )  # fmt: skip
            if dropout:
                make_keep(memory, row0, key0, batch_head, dropout_of)
            cuda.syncthreads()
            to_ds(memory, sums, row0, key0, full, of_head, dropout_of[2])
            if crosses_threads:
                cuda.syncthreads()
            for n_score in range(count):
                r, c = score_at(n_score)
                inside = c >= 0 and c < block_n and row0 + r < seqlen_q and key0 + c < seqlen_k
                ds = memory[p_tile + r * p_step + c] if inside else real(0.0)
                if ds != real(0.0):
                    score = memory[ds_tile + r * p_step + c]
                    partials, found = loads_of(score, asked_at(row0 + r, key0 + c, of_head))
                    for n in range(loads):
                        part = ds * partials[n]
                        if measures:
                            sizes_of_own[n] += abs(part)
                        elif units[array_of[n]] > 0.0:
                            to = starts[array_of[n]] + found[n]
                            if to != place[n]:
                                if run[n] != 0:
                                    cuda.atomic.add(sums_of, place[n], run[n])
                                run[n], place[n] = types.int64(0), to
                            exact = types.float64(part) * units[array_of[n]]
                            run[n] += types.int64(math.floor(exact + 0.5))

        for n in range(loads):
            if measures:
                total = row_sum(sizes_of_own[n])
                total = total if total < infinity else real(infinity)  # NaN, too
                if my_key == 0:
                    cuda.atomic.max(largest, array_of[n], total)
            elif run[n] != 0:
                cuda.atomic.add(sums_of, place[n], run[n])

    return flash_captured


@cache
def unit_kernel(real_name: str) -> Any:
    """A thread computes an array's unit from the largest of `parts` sums; 0 if that is infinite."""
    infinity, bits = float("inf"), BITS

    @kernel(THREADS)
    def flash_captured_units(largest, units, count, parts):
        n = types.int64(cuda.blockIdx.x) * cuda.blockDim.x + cuda.threadIdx.x
        if n < count:
            bound = types.float64(largest[n]) * parts
            if bound < infinity:
                exponent = bits - math.frexp(bound)[1] if bound > 0.0 else 0
                units[n] = math.ldexp(1.0, max(min(exponent, 1000), -1000))
            else:
                units[n] = 0.0

    return flash_captured_units


@cache
def result_kernel(name: str) -> Any:
    """A thread makes a sum a number of the gradient; NaN without a unit."""
    numbers = precision(name)
    real, store, nan = numbers.real, numbers.store, float("nan")

    @kernel(THREADS)
    def flash_captured_result(sums_of, start, units, array, out, count):
        n = types.int64(cuda.blockIdx.x) * cuda.blockDim.x + cuda.threadIdx.x
        if n < count:
            unit = units[array]
            number = types.float64(sums_of[start + n]) / unit if unit > 0.0 else nan
            out[n] = store(real(number))

    return flash_captured_result


# ----- launches -----


def captured_gradients(
    problem: AttentionProblem,
    heads: Heads,
    inputs: Inputs,
    out: Matrices,
    rows: Any,
    grad_out: Matrices,
    grad_logsumexp: Any,
    workspace: tuple[Any, Any, Any],
    sums: CapturedSums,
    gradients: list[tuple[Any, int, str]],
    architecture: Architecture,
) -> None:
    """Write the gradients of what the score function captured; arguments as in launch.py.

    Args:
        problem, heads, inputs, out, rows, grad_out, grad_logsumexp, architecture: of the pass.
        workspace: as in `Gradients`.
        sums: where they are added up.
        gradients: of each array of `wanted_gradients` a flat array, its size and its dtype's name.

    """
    kind = kind_of(problem, inputs.mask_kind, has_whole_vectors(problem, inputs, grad_out))
    # Other kernels do not know which gradients are wanted; this one must.
    kind = replace(kind, functions=Functions(problem.score_mod, problem.mask_mod))
    _, blocks = backward_blocks(kind, architecture)
    launch_delta(problem, heads, out, rows, grad_out, grad_logsumexp, workspace)
    delta, shift, inverse = workspace
    grid = ceil_div(problem.seqlen_q, blocks.block_m) * problem.batch_heads
    count = len(gradients)
    arguments = (
        *inputs.arrays, inputs.offset, grad_out.array, shift, inverse, delta, *sums[:3],
        *inputs.strides, grad_out.strides, sizes_of(problem, heads), *scalars_of(problem),
        inputs.words, tile_lists(problem, inputs, (blocks.block_m, blocks.block_n)), sums.starts,
    )  # fmt: skip
    shared = backward_bytes(kind, blocks, True)
    launch(
        captured_kernel(kind, blocks, True), grid, blocks.threads, *arguments, shared_bytes=shared
    )
    launch(
        unit_kernel(precision(kind.precision).real.name), ceil_div(count, THREADS), THREADS,
        sums.largest, sums.units, count, grid * blocks.threads_m,
    )  # fmt: skip
    launch(
        captured_kernel(kind, blocks, False), grid, blocks.threads, *arguments, shared_bytes=shared
    )
    for n, (array, size, dtype) in enumerate(gradients):
        if size:
            launch(
                result_kernel(dtype), ceil_div(size, THREADS), THREADS,
                sums.sums, sums.starts[n], sums.units, n, array, size,
            )  # fmt: skip


# ----- for the compile tests -----


def instances() -> Iterator[Instance]:
    """With dropout and lists, and without; a double precision of each."""
    functions = example_functions()
    doubles, wholes = types.Array(types.float64, 1, "C"), types.Array(types.int64, 1, "C")
    for kind in (
        Kind("float16", 64, 64, "none", True, True, functions, is_sparse=True),
        Kind("float32", 128, 128, "none", False, True, functions),
        Kind("float64", 64, 64, "float64", False, False, functions),
    ):
        of = argument_types(kind.precision, kind.mask, functions)
        signature = (
            *of.inputs, of.array, *[of.rows] * 4, doubles, wholes, *[of.strides] * 5, of.sizes,
            *of.scalars, of.words, of.lists, types.UniTuple(types.int64, 1),
        )  # fmt: skip
        for measures in (True, False):
            name = f"{kind.precision}, {kind.head_dim}, {'measures' if measures else 'adds'}"
            _, blocks = backward_blocks(kind, (8, 0))
            yield Instance(
                f"flash_captured[{name}]", captured_kernel(kind, blocks, measures), signature
            )
    whole_number = types.int64
    for name in ("float32", "float64"):
        of = argument_types(name, "none")
        yield Instance(
            f"flash_captured_units[{name}]", unit_kernel(name),
            (of.rows, doubles, whole_number, whole_number),
        )  # fmt: skip
    for name in ("float16", "bfloat16", "float32", "float64"):
        of = argument_types(name, "none")
        yield Instance(
            f"flash_captured_result[{name}]", result_kernel(name),
            (wholes, whole_number, doubles, whole_number, of.array, whole_number),
        )  # fmt: skip


__all__ = ["CapturedSums", "captured_gradients", "instances"]
