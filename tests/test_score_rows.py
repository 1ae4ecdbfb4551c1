"""Rows of scores through a user's function: machine code, and Python without compilation."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

import minitorch
from minitorch.kernels.cpu.compiler import COMPILES, njit
from minitorch.kernels.flash_attention.cpu import score_rows
from minitorch.kernels.flash_attention.cpu.score_rows import (
    call_gradient_row,
    call_score_row,
    captured_array,
    gradient_row,
    score_row,
    words_of,
)
from minitorch.kernels.score_graph import NumpyOperations, differentiate, evaluate
from minitorch.score_trace import trace

RNG = np.random.default_rng(4)
N, HEADS = 300, 4
TABLE, SLOPES, BUCKETS = (RNG.normal(size=(HEADS, n)) for n in (2 * N - 1, 1, 33))
IDS = np.repeat(np.arange(10), 30).astype(np.int64)
FLAGS = RNG.random(N) < 0.5
CAP = 3.0
ROWS, COLUMNS, BATCH, HEAD, QUERY, KEY = 12, 96, 1, 2, 100, 64

FUNCTIONS: dict[str, Any] = {
    "soft cap": lambda s, b, h, q, k: CAP * np.tanh(s / CAP),
    "near 0": lambda s, b, h, q, k: np.tanh(s * 1e-3),
    "slopes": lambda s, b, h, q, k: s - SLOPES[h, 0] * abs(q - k),
    "neighbours": lambda s, b, h, q, k: s + TABLE[h, k - q + N - 1],
    "turned neighbours": lambda s, b, h, q, k: s + TABLE[h, q - k + N - 1],
    "scattered": lambda s, b, h, q, k: s + BUCKETS[h, np.clip((q - k) * 3, -16, 16) + 16],
    "powers": lambda s, b, h, q, k: np.exp(s) + np.exp2(-s),
    "logarithms": lambda s, b, h, q, k: np.log(abs(s)) - np.log2(s * s + 1),
    "roots": lambda s, b, h, q, k: np.sqrt(abs(s)) + np.floor(s) + np.square(s) / (2 + s * s),
    "whole numbers": lambda s, b, h, q, k: np.where(
        (q - 150) // 7 % 5 == (k - 150) % -4, s, (k ^ q) + (k & 3) - (q | 5)
    ),
    "division by 0": lambda s, b, h, q, k: s + q // (k - 70) + q % (k - 70),
    "casts": lambda s, b, h, q, k: s + np.floor(s * 3).astype(int) % 4 + (q > k),
    "truths": lambda s, b, h, q, k: np.where(FLAGS[k] | ~FLAGS[q], s, 1.0 * h + b),
    "extremes": lambda s, b, h, q, k: np.minimum(np.maximum(s, -1), 1.5),
    "documents": lambda b, h, q, k: (IDS[q] == IDS[k]) & (q >= k),
}


@njit
def through(address, w, words, rows, columns, b, h, q0, k0):  # type: ignore[no-untyped-def]
    for r in range(rows):
        call_score_row(address, w, words, r * columns, columns, b, h, q0 + r, k0)


def traced_of(function: Any) -> Any:
    return trace(function, "mask_mod" if function is FUNCTIONS["documents"] else "score_mod")


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_rows_are_what_numpy_computes(name: str, dtype: str) -> None:
    traced, kind = traced_of(FUNCTIONS[name]), np.dtype(dtype)
    scores = (RNG.normal(size=(ROWS, COLUMNS)) * 4).astype(kind)
    arrays = [captured_array(np.asarray(x), kind) for x in traced.arrays]
    words = words_of(arrays, traced.parameters)
    positions = {"b": BATCH, "h": HEAD, "q": QUERY + np.arange(ROWS)[:, None]}
    positions["k"] = KEY + np.arange(COLUMNS)
    with np.errstate(all="ignore"):
        (wanted,) = evaluate(
            traced.graph,
            NumpyOperations(traced.arrays, traced.parameters),
            {**positions, "score": scores.astype(np.float64)},
        )
    if wanted.dtype == bool:
        wanted = np.where(wanted, scores, -np.inf)
    w = scores.ravel().copy()
    function = score_row(traced.graph, kind)
    through(function.address, w, words, ROWS, COLUMNS, BATCH, HEAD, QUERY, KEY)
    tolerance = 1e-6 if dtype == "float32" else 1e-14
    np.testing.assert_allclose(w.reshape(scores.shape), wanted, rtol=tolerance, atol=tolerance)
    row = scores[3].copy()
    given_row = 0, COLUMNS, BATCH, HEAD, QUERY + 3, KEY
    with np.errstate(all="ignore"):
        score_rows._plain_score_row(traced.graph, row, words, *given_row)
    np.testing.assert_allclose(row, wanted[3], rtol=tolerance, atol=tolerance)


@pytest.mark.skipif(not COMPILES, reason="numpy's own functions")
@pytest.mark.parametrize("name", ["exp", "exp2", "log", "log2", "tanh", "sqrt"])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@settings(max_examples=30, deadline=None)
@given(numbers=st.lists(st.floats(width=32), min_size=1, max_size=16))
@example(numbers=[1.1754943508222875e-38, -1.2662593744094464e-38])  # next to the smallest normal
def test_functions_over_their_whole_range(name: str, dtype: str, numbers: list[float]) -> None:
    """Where the result is no normal number it may be 0."""
    kind = np.dtype(dtype)
    w = np.zeros(64, kind)
    w[: len(numbers)] = numbers
    function = getattr(np, name)
    traced = trace(lambda s, b, h, q, k: function(s), "score_mod")
    with np.errstate(all="ignore"):
        wanted = function(w)
    through(score_row(traced.graph, kind).address, w, words_of([], ()), 1, 64, 0, 0, 0, 0)
    least = np.finfo(kind).tiny
    small = abs(wanted) < 1.001 * least
    assert (abs(w[small]) < 1.002 * least).all()
    np.testing.assert_allclose(
        w[~small], wanted[~small], rtol=2e-6 if dtype == "float32" else 1e-13
    )


@njit
def gradients_through(address, w, words, table, columns, h, q, k0, factor):  # type: ignore[no-untyped-def]
    call_gradient_row(address, w, words, table, 0, columns, columns, 0, h, q, k0, factor)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_gradients_of_a_row(dtype: str) -> None:
    kind = np.dtype(dtype)
    slopes, table = (
        minitorch.tensor(x, requires_grad=True).detach() for x in (SLOPES[:, 0], BUCKETS)
    )
    for tensor in (slopes, table):
        tensor.requires_grad_(True)

    def mod(s: Any, b: Any, h: Any, q: Any, k: Any) -> Any:
        return np.tanh(s) * slopes[h] + s * table[h, np.clip(q - k, -16, 16) + 16]

    traced = trace(mod, "score_mod")
    derivative = differentiate(traced.graph)
    scores, upstream = RNG.normal(size=(2, COLUMNS)).astype(kind)
    upstream[5] = 0
    arrays = [captured_array(x.to_numpy(), kind) for x in traced.arrays]
    unit, starts = 2.0**40, [0, arrays[0].size]
    words = words_of(arrays, traced.parameters, starts, [unit, unit])
    found = evaluate(
        derivative.graph, NumpyOperations(arrays, ()),
        {"score": scores.astype(np.float64), "b": 0, "h": HEAD, "q": QUERY,
         "k": KEY + np.arange(COLUMNS)},
    )  # fmt: skip
    wanted = np.zeros(sum(x.size for x in arrays))
    for load in derivative.loads:
        place = np.ravel_multi_index([found[i] for i in load.indices], arrays[load.captured].shape)
        part = upstream * found[load.partial]
        np.add.at(wanted, np.broadcast_to(starts[load.captured] + place, part.shape), part)
    function, plain = gradient_row(derivative, kind), score_rows._plain_gradient_row
    for compiled in (True, False):
        w, sums = np.concatenate([scores, upstream]), np.zeros(len(wanted), np.int64)
        given_row = HEAD, QUERY, KEY, kind.type(0.5)
        if compiled:
            gradients_through(function.address, w, words, sums, COLUMNS, *given_row)
        else:
            plain(derivative, w, words, sums, 0, COLUMNS, COLUMNS, 0, *given_row)
        tolerance = 1e-5 if dtype == "float32" else 1e-11
        np.testing.assert_allclose(w[COLUMNS:], 0.5 * upstream * found[1], rtol=tolerance)
        np.testing.assert_allclose(sums / unit, wanted, atol=tolerance)


def test_whole_numbers_of_more_than_32_bits_are_refused() -> None:
    with pytest.raises(ValueError, match="32 bits"):
        captured_array(np.array([1, 2**40]), np.dtype("float32"))
