"""What the CPU's kernels are given of a call's score function, mask function and lists of tiles.

The functions are machine code at addresses, which are numbers, as what they are given is (see
score_rows.py): a kernel is compiled once for all of them.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ...score_graph import Graph
from ..block_lists import BlockLists, TileLists
from ..fixed_point import units
from ..problem import AttentionProblem
from ..variant import Captured, VariantInputs, derivative_of, wanted_gradients
from .score_rows import captured_array, gradient_row, score_row, words_of
from .tiles import Functions, Lists

Array = NDArray[Any]
MOST_ROWS = 512  # of a list's tile of queries
MOST_KEYS = 256
NOTHING, NO_ENTRIES = np.zeros(0, np.int64), np.zeros(0, np.int32)


class Bounds(NamedTuple):
    """What `fixed_point.units` wants to know: the largest |score|, and the sum of all gradients."""

    score: float
    gradients: float


class PreparedFunctions(NamedTuple):
    """Arguments of the kernels, and what they read from.

    Args:
        arguments: `Functions`, as a plain tuple.
        starts: where each captured array's sums begin in a table, then the length of a table.
        units: of each captured array.
        kept: the arrays, whose addresses are among the arguments.

    """

    arguments: tuple[Any, ...]
    starts: list[int]
    units: list[float]
    kept: tuple[list[Array], list[Array]]


NO_WORDS = words_of((), ())
NO_FUNCTIONS = PreparedFunctions(tuple(Functions(0, 0, 0, NO_WORDS, NO_WORDS)), [0], [], ([], []))


def prepared_functions(
    problem: AttentionProblem, variant: VariantInputs, bounds: Bounds | None = None
) -> PreparedFunctions:
    """The functions of a forward pass, or of a backward pass with its bounds."""
    if not problem.has_functions:
        return NO_FUNCTIONS
    dtype, score = problem.dtype, problem.score_mod
    arrays = [captured_array(x, dtype) for x in variant.score.arrays]
    wanted, starts, of_arrays = wanted_gradients(score), [0], [1.0] * len(arrays)
    for n, array in enumerate(arrays):
        starts.append(starts[-1] + (array.size if n in wanted else 0))
    of_score = of_gradient = 0
    if score is not None:
        of_score = score_row(score, dtype).address
    if score is not None and bounds is not None:
        derivative = derivative_of(score)
        of_gradient = gradient_row(derivative, dtype).address
        if wanted:
            of_arrays = units(problem, derivative, variant.score, *bounds)
    words = words_of(arrays, variant.score.parameters, starts, of_arrays)
    of_mask, mask_words, mask_arrays = _mask_function(problem.mask_mod, variant.mask, dtype)
    arguments = tuple(Functions(of_score, of_gradient, of_mask, words, mask_words))
    return PreparedFunctions(arguments, starts, of_arrays, (arrays, mask_arrays))


def _mask_function(
    graph: Graph | None, given: Captured, dtype: np.dtype[Any]
) -> tuple[int, Array, list[Array]]:
    """The address of a mask function, its words and arrays."""
    arrays = [captured_array(x, dtype) for x in given.arrays]
    address = 0 if graph is None else score_row(graph, dtype).address
    return address, words_of(arrays, given.parameters), arrays


def captured_sums(
    problem: AttentionProblem, variant: VariantInputs, prepared: PreparedFunctions, tables: Array
) -> list[Array]:
    """Gradients of the captured arrays that want one, float64, from the tables of all threads."""
    total, found = tables.sum(axis=0), []
    for n in wanted_gradients(problem.score_mod):
        unit, array = prepared.units[n], variant.score.arrays[n]
        numbers = total[prepared.starts[n] : prepared.starts[n + 1]].reshape(array.shape)
        found.append(numbers / unit if unit else np.full(array.shape, np.nan))
    return found


# ----- lists -----


def size_of_tiles(block: int, least: int, most: int) -> int:
    """Of tiles for blocks of some size: one that divides it, up to `most`, if there is one."""
    if block % least == 0:
        return max(n for n in range(least, min(block, most) + 1, least) if block % n == 0)
    return 2 * least if block > least else least


def list_rows(lists: TileLists | None, tile_q: int) -> int:
    """Queries of a list's tile: a number of whole tiles."""
    if lists is None or lists.block[0] % tile_q:
        return tile_q
    return size_of_tiles(lists.block[0], tile_q, MOST_ROWS)


def list_keys(lists: TileLists) -> int:
    """Keys of a tile."""
    return size_of_tiles(lists.block[1], 32, MOST_KEYS)


def _arguments(lists: TileLists, found: BlockLists, ranks: Array, rows: int) -> tuple[Any, ...]:
    return tuple(Lists(found.offsets, found.entries, ranks, rows, found.rows, *lists.head_steps()))


def lists_of_queries(
    problem: AttentionProblem, lists: TileLists | None, tile_q: int, tile_k: int
) -> tuple[Any, ...]:
    """`Lists` of a forward pass, as a plain tuple."""
    if lists is None:
        return NOTHING, NO_ENTRIES, NOTHING, tile_q, 0, 0, 0
    rows = list_rows(lists, tile_q)
    found = lists.of((rows, tile_k), problem.lower, problem.upper)
    return _arguments(lists, found, NOTHING, rows)


def lists_of_keys(
    problem: AttentionProblem, lists: TileLists | None, tile_q: int, tile_k: int
) -> tuple[Any, ...]:
    """`Lists` of a backward pass."""
    if lists is None:
        return lists_of_queries(problem, None, tile_q, tile_k)
    rows = list_rows(lists, tile_q)
    tile, band = (rows, tile_k), (problem.lower, problem.upper)
    found = lists.transposed(tile, *band)
    key = "ranks", tile, *band
    if key not in lists.kept:
        lists.kept[key] = _ranks(lists.of(tile, *band), found)
    return _arguments(lists, found, lists.kept[key], rows)


def _ranks(of_queries: BlockLists, of_keys: BlockLists) -> Array:
    """Of each entry of the lists of keys, its place in the list of its queries."""
    head, _, column, _ = of_queries.places
    place = np.arange(len(of_queries.entries))
    rank = place - np.repeat(of_queries.offsets[:-1], np.diff(of_queries.offsets))
    # The lists of keys have the same tiles in the order of heads, columns, rows.
    order = np.argsort(head * of_keys.rows + column, kind="stable")
    ranks: Array = rank[order]
    return ranks


def longest_first(
    problem: AttentionProblem, lists: TileLists | None, tile_q: int, tile_k: int, block_q: int
) -> Array:
    """Tasks (head * blocks + block) of a forward pass with lists, those with most tiles first."""
    if lists is None:
        return NOTHING
    rows, band = list_rows(lists, tile_q), (problem.lower, problem.upper)
    key = "order", rows, tile_k, *band, block_q, problem.batch, problem.heads
    if key not in lists.kept:
        found = lists.of((rows, tile_k), *band)
        lengths = np.diff(found.offsets).reshape(found.heads, found.rows)
        blocks = math.ceil(problem.seqlen_q / block_q)
        costs = np.add.reduceat(lengths, np.arange(blocks) * (block_q // rows), axis=1)
        batch_step, head_step = lists.head_steps()
        head = np.arange(problem.batch)[:, None] * batch_step
        costs = costs[(head + np.arange(problem.heads) * head_step).ravel()]
        lists.kept[key] = np.argsort(-costs.ravel(), kind="stable")
    order: Array = lists.kept[key]
    return order


__all__ = [
    "Bounds", "PreparedFunctions", "captured_sums", "list_keys", "list_rows", "lists_of_keys",
    "lists_of_queries", "longest_first", "prepared_functions",
]  # fmt: skip
