"""Functions of a score as graphs: what they compute, their derivatives, and their intervals."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import minitorch
from minitorch.kernels.score_graph import (
    Builder,
    Graph,
    NumpyOperations,
    differentiate,
    evaluate,
)
from minitorch.kernels.score_intervals import IntervalOperations, complaint
from minitorch.score_trace import trace

RNG = np.random.default_rng(3)
TABLE = RNG.normal(size=(4, 79))
WHOLE = RNG.integers(-9, 9, 40).astype(np.int32)
LETTERS = np.array(["a"] * 40)
CAP = 20.0


def soft_cap(cap: float) -> Callable[..., Any]:
    def mod(score: Any, b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        return cap * np.tanh(score / cap)

    return mod


def window(reach: int) -> Callable[..., Any]:
    return lambda b, h, q_idx, kv_idx: (q_idx - kv_idx <= reach) & (q_idx >= kv_idx)


def everything(score: Any, b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
    """A bit of all operations."""
    capped = CAP * np.tanh(score / CAP) + TABLE[h, np.clip(q_idx - kv_idx, -5, 5) + 5]
    decayed = capped * np.exp(-abs(score)) - np.log(score**2 + 1.5) / np.sqrt(abs(score) + 2)
    picked = np.where(q_idx % 3 == 0, np.exp2(score * 0.25), np.maximum(decayed, -score))
    odd = (kv_idx & 1) == 1
    return np.where(odd | ~(h > 1), picked, np.minimum(decayed, np.log2(score * score + 3))) * b


# ----- one graph for one thing to do -----


@pytest.mark.parametrize(
    ("first", "second", "role"),
    [
        (soft_cap(30.0), soft_cap(50.0), "score_mod"),
        (window(5), window(512), "mask_mod"),
        (
            functools.partial(lambda s, score, b, h, q, k: score * s, 2.0),
            functools.partial(lambda s, score, b, h, q, k: score * s, 3.0),
            "score_mod",
        ),
    ],
)
def test_numbers_are_not_in_the_graph(first: Any, second: Any, role: Any) -> None:
    one, other = trace(first, role), trace(second, role)
    assert one.graph == other.graph
    assert hash(one.graph) == hash(other.graph)
    assert one.parameters != other.parameters


def test_what_python_needs_is_in_the_graph() -> None:
    def repeated(times: int) -> Callable[..., Any]:
        def mod(score: Any, b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
            for _ in range(times):
                score = np.tanh(score)
            return score

        return mod

    assert [n.name for n in trace(repeated(3), "score_mod").graph.nodes].count("tanh") == 3
    assert trace(repeated(2), "score_mod").graph != trace(repeated(3), "score_mod").graph


def test_equal_parts_are_computed_once() -> None:
    def mod(score: Any, b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        return np.tanh(score) + np.tanh(score) * (q_idx + kv_idx) + (kv_idx + q_idx)

    names = [node.name for node in trace(mod, "score_mod").graph.nodes]
    assert (names.count("tanh"), names.count("add")) == (1, 3)


def test_captured_arrays_by_every_way() -> None:
    table = TABLE

    def helper(h: Any, d: Any, scale: float = 2.0, *, extra: Any = WHOLE) -> Any:
        return scale * table[h, d] + extra[d]

    class Model:
        def mod(self, score: Any, b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
            return score + sum(f(h, abs(q_idx - kv_idx)) for f in (helper,))

    traced = trace(Model().mod, "score_mod")
    assert [a is b for a, b in zip(traced.arrays, (TABLE, WHOLE), strict=True)] == [True, True]
    assert traced.parameters == (2.0,)


# ----- values and derivatives -----

POSITIONS = {"b": np.int64(1), "h": np.int64(2), "q": np.arange(12)[:, None], "k": np.arange(15)}


def value_of(function: Any, scores: Any) -> Any:
    traced = trace(function, "score_mod")
    arrays = [x.to_numpy() if hasattr(x, "to_numpy") else x for x in traced.arrays]
    operations = NumpyOperations(arrays, traced.parameters)
    (found,) = evaluate(traced.graph, operations, {**POSITIONS, "score": scores})
    return np.broadcast_to(found, scores.shape)


def test_a_graph_computes_what_numpy_computes() -> None:
    scores = RNG.normal(size=(12, 15)) * 3
    directly = everything(scores, *(POSITIONS[n] for n in ("b", "h", "q", "k")))
    np.testing.assert_allclose(value_of(everything, scores), directly, rtol=1e-14)


@pytest.mark.parametrize("function", [soft_cap(3.0), everything])
def test_derivative_by_the_score(function: Any) -> None:
    scores, step = RNG.normal(size=(12, 15)) * 2, 1e-6
    traced = trace(function, "score_mod")
    derivative = differentiate(traced.graph)
    operations = NumpyOperations(traced.arrays, traced.parameters)
    found = evaluate(derivative.graph, operations, {**POSITIONS, "score": scores})
    np.testing.assert_allclose(np.broadcast_to(found[0], scores.shape), value_of(function, scores))
    slope = (value_of(function, scores + step) - value_of(function, scores - step)) / (2 * step)
    np.testing.assert_allclose(np.broadcast_to(found[1], scores.shape), slope, atol=1e-7, rtol=1e-6)


def test_derivative_by_a_captured_tensor() -> None:
    table = minitorch.tensor(RNG.normal(size=(4, 9)), requires_grad=True)
    table.requires_grad_(True)
    scores, step = RNG.normal(size=(12, 15)), 1e-6

    def mod(score: Any, b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        number = table[h, np.clip(q_idx - kv_idx, -4, 4) + 4]
        return np.tanh(score * number) + number * number

    traced = trace(mod, "score_mod")
    derivative = differentiate(traced.graph)
    (load,) = derivative.loads
    numbers = table.to_numpy()
    found = evaluate(
        derivative.graph, NumpyOperations([numbers], ()), {**POSITIONS, "score": scores}
    )
    gradient = np.zeros_like(numbers)
    places = tuple(np.broadcast_to(found[n], scores.shape) for n in load.indices)
    np.add.at(gradient, places, np.broadcast_to(found[load.partial], scores.shape))
    for place in np.ndindex(numbers.shape):
        sums = []
        for sign in (1, -1):
            moved = numbers.copy()
            moved[place] += sign * step
            operations = NumpyOperations([moved], ())
            sums.append(evaluate(traced.graph, operations, {**POSITIONS, "score": scores})[0].sum())
        assert gradient[place] == pytest.approx((sums[0] - sums[1]) / (2 * step), abs=1e-6)


def test_derivatives_where_there_are_two() -> None:
    def mod(score: Any, b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        return abs(score) + np.maximum(score, 0.0) + 0.0 * np.log(score)

    derivative = differentiate(trace(mod, "score_mod").graph)
    with np.errstate(all="ignore"):
        found = evaluate(derivative.graph, NumpyOperations([], ()), {"score": np.float64(0.0)})
    assert found[1] == 0  # of |x|; at a tie the second has it, a constant; 0 * infinity is 0


# ----- random graphs -----

REALS = ("add", "subtract", "multiply", "minimum", "maximum")


@st.composite
def graphs(draw: Any) -> Graph:
    """Graphs of whole numbers and truths over positions, with a loaded one among them."""
    builder = Builder([minitorch.kernels.score_graph.CapturedArray("whole", 1)], ["whole"])
    nodes = [builder.input(name) for name in ("h", "q", "k")]
    nodes += [builder.constant(draw(st.integers(-4, 9)), "whole"), builder.parameter(0)]
    for _ in range(draw(st.integers(2, 9))):
        name = draw(st.sampled_from([*REALS, "floor_divide", "remainder", "absolute", "load"]))
        x, y = (nodes[draw(st.integers(0, len(nodes) - 1))] for _ in range(2))
        if name == "load":
            nodes.append(builder.load(0, [x]))
        else:
            nodes.append(builder.apply(name, *([x] if name == "absolute" else [x, y])))
    truths = []
    for _ in range(draw(st.integers(1, 3))):
        x, y = (nodes[draw(st.integers(0, len(nodes) - 1))] for _ in range(2))
        name = draw(st.sampled_from(["less", "less_equal", "equal", "not_equal"]))
        truths.append(builder.apply(name, x, y))
    result = truths[0]
    for other in truths[1:]:
        name = draw(st.sampled_from(["logical_and", "logical_or", "logical_xor"]))
        result = builder.apply(name, result, builder.apply("logical_not", other))
    chosen = builder.where(result, nodes[-1], nodes[draw(st.integers(0, len(nodes) - 1))])
    return builder.finished([result, chosen])


@settings(max_examples=150, deadline=None)
@given(graphs(), st.integers(0, 11), st.integers(0, 14), st.integers(0, 6), st.integers(0, 6))
def test_intervals_contain_every_value(
    graph: Graph, q0: int, k0: int, rows: int, columns: int
) -> None:
    q, k = np.arange(q0, q0 + rows + 1), np.arange(k0, k0 + columns + 1)
    with np.errstate(all="ignore"):
        values = evaluate(
            graph, NumpyOperations([WHOLE], [3]), {"h": 2, "q": q[:, None], "k": k, "b": 0}
        )
        bounds = evaluate(
            graph,
            IntervalOperations([WHOLE], [3]),
            {"h": (2, 2), "q": (q[0], q[-1]), "k": (k[0], k[-1])},
        )
    surely, possibly = bounds[0]
    assert not surely or np.all(values[0])
    assert possibly or not np.any(values[0])
    low, high = bounds[1]
    assert np.all(low <= values[1])
    assert np.all(values[1] <= high)
    if rows == columns == 0:
        assert (bool(surely), bool(possibly)) == (bool(np.all(values[0])),) * 2


# ----- what cannot be -----


def test_positions_that_leave_an_array_are_told() -> None:
    def mod(score: Any, b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        return score + TABLE[h, q_idx - kv_idx + 39]

    traced = trace(mod, "score_mod")
    given_sizes = {"b": 1, "h": 4, "q": 40, "k": 40}
    arguments = traced.graph, traced.arrays, traced.parameters, traced.names
    assert complaint(*arguments, given_sizes) == ""
    told = complaint(*arguments, {**given_sizes, "q": 64})
    assert "index 1 of `TABLE` runs from 0 to 102, its size is 79" in told
    assert "index 0 of `TABLE`" in complaint(*arguments, {**given_sizes, "h": 5})


def test_an_array_without_numbers_is_told() -> None:
    empty = np.zeros((4, 0))
    traced = trace(lambda s, b, h, q, k: s + empty[h, WHOLE[q]], "score_mod")
    sizes = {"b": 1, "h": 4, "q": 40, "k": 9}
    told = complaint(traced.graph, traced.arrays, traced.parameters, traced.names, sizes)
    assert "`empty` has shape (4, 0)" in told


def test_whole_numbers_beyond_32_bits_are_told() -> None:
    traced = trace(lambda b, h, q, k: (q * 100000 + k) % 3 == 0, "mask_mod")
    sizes = {"b": 1, "h": 1, "q": 96000, "k": 9}
    assert "32 bits" in complaint(traced.graph, (), traced.parameters, (), sizes)


class Attribute:
    bias = TABLE


HOLDER = Attribute()


@pytest.mark.parametrize(
    ("role", "function", "wanted"),
    [
        ("score_mod", lambda s, b, h, q, k: s if q >= k else -s, "np.where(condition, a, b)"),
        ("score_mod", lambda s, b, h, q, k: s + min(q, k), "np.minimum"),
        ("score_mod", lambda s, b, h, q, k: math.tanh(s), "np.tanh"),
        ("score_mod", lambda s, b, h, q, k: np.arctan(s), "np.arctan is not known"),
        ("score_mod", lambda s, b, h, q, k: np.sum(s), "np.sum is not known"),
        ("score_mod", lambda s, b, h, q, k: s + HOLDER.bias[h, k], "table = self.table"),
        ("score_mod", lambda s, b, h, q, k: s + TABLE[h], "gets 1 index; wanted 2"),
        ("score_mod", lambda s, b, h, q, k: s + TABLE[h, :], "a slice"),
        ("score_mod", lambda s, b, h, q, k: s + TABLE[h, s], "wanted a whole number"),
        ("score_mod", lambda s, b, h, q, k: s + WHOLE, "is an array of shape (40,)"),
        ("score_mod", lambda s, b, h, q, k: np.add(WHOLE, s), "is an array of shape (40,)"),
        ("score_mod", lambda s, b, h, q, k: s + WHOLE.sum(), "compute it outside"),
        ("score_mod", lambda s, b, h, q, k: s.tanh(), "np.tanh(score)"),
        ("score_mod", lambda s, b, h, q, k: s**q, "a power must be"),
        ("score_mod", lambda s, b, h, q, k: s // 2, "of whole numbers"),
        ("score_mod", lambda s, b, h, q, k: s + "x", "wanted a number"),
        ("score_mod", lambda s, b, h, q, k: s + (q << 2), "unsupported operand"),
        ("score_mod", lambda s, b, h, q, k: None, "returned NoneType None; wanted a score"),
        ("score_mod", lambda b, h, q, k: q >= k, "one like this is a mask_mod"),
        ("mask_mod", lambda b, h, q, k: (q >= k) and (k > 3), "(a < b) & (b < c)"),
        ("mask_mod", lambda b, h, q, k: 0 <= q - k < 5, "(a < b) & (b < c)"),
        ("mask_mod", lambda b, h, q, k: q & (k > 3), "compare first"),
        ("mask_mod", lambda b, h, q, k: q - k, "wanted a truth value"),
        ("mask_mod", lambda b, h, q: q, "takes 3 arguments, wanted (b, h, q_idx, kv_idx)"),
        ("mask_mod", 3, "must be a function"),
        ("score_mod", max, "must be written in Python"),
        ("score_mod", lambda s, b, h, q, k: 2**40, "32 bits"),
        ("score_mod", lambda s, b, h, q, k: s + LETTERS[q], "has dtype <U1; wanted"),
    ],
)
def test_messages_say_where_and_what_instead(role: Any, function: Any, wanted: str) -> None:
    with pytest.raises(TypeError) as caught:
        trace(function, role)
    message = str(caught.value)
    assert wanted in message
    assert role in message
    unlocated = ("returned", "arguments", "must be", "LETTERS", "has more than")
    if not any(words in message for words in unlocated):
        assert f"{__file__}:{function.__code__.co_firstlineno}" in message
