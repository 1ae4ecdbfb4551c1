"""What is remembered of functions of a score: graphs, and nothing that may be another next time."""

from __future__ import annotations

import types
from typing import Any

import numpy as np
import pytest

import minitorch
from minitorch import attention_masks, score_symbols
from minitorch.kernels.flash_attention.block_lists import lists_of_mask
from minitorch.score_trace import trace

STRETCH = 3.0


def test_a_function_that_was_seen_is_not_run_again_and_its_values_are_read_anew(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    table, cap, power = np.zeros(4), 30.0, 2

    def mod(score: Any, b: Any, h: Any, q_idx: Any, kv_idx: Any, shift: float = 1.0) -> Any:
        return cap * np.tanh(score / cap) ** power + table[h] + shift + STRETCH

    sums: list[Any] = []
    original: Any = score_symbols.Symbol.__add__

    def add(x: Any, y: Any) -> Any:
        sums.append(y)
        return original(x, y)

    monkeypatch.setattr(score_symbols.Symbol, "__add__", add)
    first = trace(mod, "score_mod")
    assert len(sums) >= 3
    sums.clear()
    cap, table = 50.0, np.ones(4)
    second = trace(mod, "score_mod")
    mod.__defaults__ = (7.0,)
    third = trace(mod, "score_mod")
    monkeypatch.setitem(globals(), "STRETCH", 4.0)
    fourth = trace(mod, "score_mod")
    assert not sums
    assert first.graph is second.graph is third.graph is fourth.graph
    assert sorted(first.parameters) == [1.0, 3.0, 30.0]
    assert sorted(second.parameters) == [1.0, 3.0, 50.0] and second.arrays[0] is table
    assert sorted(third.parameters) == [3.0, 7.0, 50.0]
    assert sorted(fourth.parameters) == [4.0, 7.0, 50.0]
    power = 3  # a number that Python needs: another graph
    assert trace(mod, "score_mod").graph != first.graph and sums


@pytest.mark.parametrize("change", ["shape", "kind", "gradient", "whole number", "function"])
def test_what_decides_the_graph_has_a_part_in_what_is_remembered(change: str) -> None:
    table: Any = np.zeros((4, 5), np.float32)
    size: Any = 2.0

    def helper(x: Any) -> Any:
        return x + 1.0

    def mod(score: Any, b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        return helper(score) * table[h, np.minimum(q_idx, table.shape[1] - 1)] * size

    first = trace(mod, "score_mod").graph
    assert trace(mod, "score_mod").graph is first
    if change == "shape":
        table = np.zeros((4, 6), np.float32)
    elif change == "kind":
        table = np.zeros((4, 5), np.int32)
    elif change == "gradient":
        table = minitorch.zeros((4, 5))
        table.requires_grad_(True)
    elif change == "whole number":
        size = 2
    else:
        helper = lambda x: x - 1.0  # noqa: E731
    assert trace(mod, "score_mod").graph != first


@pytest.mark.parametrize("holder", [types.SimpleNamespace, types.ModuleType])
def test_a_function_that_reads_attributes_is_run_in_each_call(holder: Any) -> None:
    settings: Any = holder("settings") if holder is types.ModuleType else holder()
    for factor in (2.0, 3.0):
        settings.factor = factor

        def mod(score: Any, b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
            return score * settings.factor

        graph = trace(mod, "score_mod").graph
        assert [node.value for node in graph.nodes if node.name == "constant"] == [repr(factor)]


def test_a_parameter_is_read_by_its_value_of_now() -> None:
    bias: Any = minitorch.Parameter(minitorch.zeros((3,)))

    def mod(score: Any, b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        return score + bias[h] + bias.value[h]

    for _ in range(2):
        bias.update(minitorch.zeros((3,)) + 1.0)
        traced = trace(mod, "score_mod")
        assert len(traced.arrays) == 1 and traced.arrays[0] is bias.value
        assert traced.graph.captured[0].wants_gradient


def test_blocks_of_a_mask_function_are_made_once_and_anew_when_an_array_changes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made: list[Any] = []

    def noted(*arguments: Any) -> Any:
        made.append(arguments)
        return lists_of_mask(*arguments)

    monkeypatch.setattr(minitorch.block_mask, "lists_of_mask", noted)
    q = minitorch.rand((2, 2, 8, 4), minitorch.TensorBackend(minitorch.FastOps))
    ids = np.array([0, 0, 0, 1, 1, 1, 2, 2])

    def out() -> Any:
        return q.flash_attention(q, q, block_mask=attention_masks.document(ids)).to_numpy()

    first = out()
    np.testing.assert_array_equal(out(), first)
    assert len(made) == 1
    ids[2] = 1
    wanted = q.attention(q, q, attn_mask=ids[:, None] == ids).to_numpy()
    np.testing.assert_allclose(out(), wanted, atol=1e-6)
    assert len(made) == 2
    for _ in range(2):  # the band of the problem needs no blocks
        q.flash_attention(q, q, block_mask=attention_masks.causal())
    assert len(made) == 2
