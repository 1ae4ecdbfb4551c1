"""The rule of scores.py in device functions, for families that handle one score at a time."""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import numpy as np

from ..gpu.runtime import NEGATIVE_INFINITY, device_function, precision, types
from ..gpu.traced import traced
from ..score_graph import Graph
from . import scores
from .score_values import Evaluation, word_count, words_type
from .scores import NO_FUNCTIONS, Functions, Tools, Where, is_additive, nearest
from .variant import derivative_of

keys_of, counts = device_function(scores.keys_of), device_function(scores.counts)


@device_function
def head_place(batch, head, mask_steps):
    """Batch, head, where in the mask's array the head's begins, and the steps to the next query and
    to the next key: what a score's place is counted from.
    """
    start = batch * mask_steps.batch + head * mask_steps.head
    return (
        types.int64(batch), types.int64(head), types.int64(start), types.int64(mask_steps.row),
        types.int64(mask_steps.column),
    )  # fmt: skip


@device_function
def _select(condition, yes, no):
    return yes if condition else no


@cache
def mask_number(mask: str, precision_name: str) -> Any:
    """Device function: an additive mask's number, as it is in the array, in the scores' type."""
    load, real = precision(mask).load, precision(precision_name).real
    if mask != "float64" or real != types.float32:
        return device_function(lambda number: real(load(number)))
    largest, near = real(np.finfo(np.float32).max), device_function(nearest)
    return device_function(lambda number: near(number, real(number), largest, _select))


class Asked(NamedTuple):
    """`Where` a score is, and what the user's functions are given. There must be such a score."""

    batch: Any
    head: Any
    query: Any
    key: Any
    words: Any


@cache
def graph_function(
    graph: Graph, outputs: tuple[int, ...], functions: Functions, precision_name: str
) -> Any:
    """Device function `(score, asked)`: outputs of the graph of a user's function, as a tuple. The
    score is in natural units; a mask function takes any number.

    Args:
        graph: of one of the functions, or of a derivative.
        outputs: which.
        functions: of the kernel, which say what `asked.words` are.
        precision_name: of the inputs.

    """
    real, whole, first = precision(precision_name).real, types.int32, 0
    if graph is functions.mask:
        first = word_count(functions.score)
    number = {"real": real, "whole": whole, "truth": types.boolean}
    kinds = [number[graph.nodes[graph.outputs[n]].kind] for n in outputs]

    @traced(types.Tuple(kinds), real, *[whole] * 4, words_type(functions))
    def run(score, batch, head, query, key, words):
        evaluation = Evaluation(graph, words[first:] or words, real, approximate=False)
        found = evaluation.at(score, Where(batch, head, query, key))
        return tuple(evaluation.number(found[n]) for n in outputs)

    @device_function
    def evaluate(score, asked):
        return run(
            real(score), whole(asked.batch), whole(asked.head), whole(asked.query),
            whole(asked.key), asked.words,
        )  # fmt: skip

    return evaluate


@cache
def slope_function(functions: Functions, precision_name: str) -> Any:
    """Device function `(score, asked)`: d score_mod(score) / d score."""
    assert functions.score is not None
    graph = derivative_of(functions.score).graph
    evaluate = graph_function(graph, (1,), functions, precision_name)

    @device_function
    def slope_of(score, asked):
        return evaluate(score, asked)[0]

    return slope_of


@cache
def masked_score(
    mask: str, precision_name: str, functions: Functions = NO_FUNCTIONS, unit: float = 1.0
) -> Any:
    """Device function: `scores.masked_score` for a kind of mask, inputs of a dtype, and functions,
    with which a place is `Asked`; what a score function gives is multiplied by `unit`.
    """
    real = precision(precision_name).real
    nothing, score_mod, mask_mod = real(NEGATIVE_INFINITY), None, None
    load = mask_number(mask if is_additive(mask) else "float32", precision_name)

    @device_function
    def add(score, number):
        return score + load(number)

    if functions.score is not None:
        modified = graph_function(functions.score, (0,), functions, precision_name)
        factor = real(unit)
        score_mod = device_function(lambda score, asked: modified(score, asked)[0] * factor)
    if functions.mask is not None:
        sees = graph_function(functions.mask, (0,), functions, precision_name)
        any_score = real(0.0)
        mask_mod = device_function(lambda asked: sees(any_score, asked)[0])
    tools = Tools(_select, add, nothing, score_mod, mask_mod)
    return device_function(scores.masked_score(mask, tools))


__all__ = [
    "Asked", "counts", "graph_function", "head_place", "keys_of", "masked_score", "slope_function",
]  # fmt: skip
