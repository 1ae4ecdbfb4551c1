"""What cannot be in a score function, a mask function or a block mask is told in one sentence, by
every way into attention, before any work.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import minitorch
from minitorch import (
    FastOps,
    MultiHeadAttention,
    SimpleOps,
    TensorBackend,
    attention_masks,
    score_mods,
)

N, HEADS, SIZE = 6, 2, 4
TABLE = np.zeros((HEADS, N), np.float32)
WIDE = np.full(N, 2**40)
HOLDER = type("Holder", (), {"table": TABLE})()

BOX = type("Box", (), {"t": minitorch.zeros((HEADS, N))})()

Function = Callable[..., Any]
SCORES: dict[str, tuple[Function, str]] = {
    "if": (lambda s, b, h, q, k: s if s > 0 else 0, "`if`, `and`, .* write np.where"),
    "and": (lambda s, b, h, q, k: np.where((q > 1) and (k > 1), s, 0), r"&, \|, ~"),
    "min": (lambda s, b, h, q, k: min(s, 3), "np.minimum"),
    "chain": (lambda s, b, h, q, k: np.where(1 < k < q, s, 0), r"\(a < b\) & \(b < c\)"),
    "math": (lambda s, b, h, q, k: math.tanh(s), "numpy's function: np.exp, np.tanh"),
    "unknown function": (lambda s, b, h, q, k: np.sin(s), "np.sin is not known .* known are"),
    "out of bounds": (lambda s, b, h, q, k: s + TABLE[h, q + k], "from 0 to 10, its size is 6"),
    "float index": (lambda s, b, h, q, k: s + TABLE[h, q / 2], "wanted a whole number, as .astype"),
    "missing index": (lambda s, b, h, q, k: s + TABLE[h], "gets 1 index; wanted 2"),
    "slice": (lambda s, b, h, q, k: s + TABLE[h, :], "indexed by a slice"),
    "whole array": (lambda s, b, h, q, k: s + TABLE, "reads numbers of it, as in TABLE"),
    "method": (lambda s, b, h, q, k: s + TABLE.sum(), "compute it outside of the function"),
    "tensor by an attribute": (lambda s, b, h, q, k: s + BOX.t[h, q], "table = self.table"),
    "attribute": (lambda s, b, h, q, k: s + HOLDER.table[h, q], "table = self.table"),
    "method of a score": (lambda s, b, h, q, k: s.clip(0, 1), "numpy's functions take it"),
    "nothing": (lambda s, b, h, q, k: None, "it returned NoneType None; wanted a score"),
    "arguments": (lambda s, q, k: s, "it takes 3 arguments, wanted .score, b, h, q_idx, kv_idx"),
    "the other role": (lambda b, h, q, k: q >= k, "one like this is a mask_mod"),
}
MASKS: dict[str, tuple[Function, str]] = {
    "no truth value": (
        lambda b, h, q, k: q - k,
        "it returned a whole number; wanted a truth value",
    ),
    "if in a mask": (lambda b, h, q, k: q > k if h > 0 else q > 3, "write np.where"),
    "too wide": (lambda b, h, q, k: WIDE[q] == WIDE[k], "more than the 32 bits"),
    "mask out of bounds": (lambda b, h, q, k: TABLE[h, q + 1] > k, "from 1 to 6, its size is 6"),
    "mask's arguments": (lambda q, k: q >= k, "it takes 2 arguments, wanted .b, h, q_idx, kv_idx"),
    "a score function": (lambda s, b, h, q, k: s, "one like this is a score_mod"),
}


def tensors(ops: Any) -> list[minitorch.Tensor]:
    return [minitorch.rand((1, HEADS, N, SIZE), TensorBackend(ops)) for _ in range(3)]


def by_tensors(ops: Any, name: str) -> Callable[..., Any]:
    def call(**options: Any) -> Any:
        q, k, v = tensors(ops)
        return getattr(q, name)(k, v, dropout_p=0.5, **options)

    return call


def by_torch(**options: Any) -> Any:
    torch = pytest.importorskip("torch")
    q, k, v = (torch.ones(1, HEADS, N, SIZE) for _ in range(3))
    return minitorch.flash_attention(q, k, v, dropout_p=0.5, **options)


def by_numpy(**options: Any) -> Any:
    q = np.ones((1, HEADS, N, SIZE), np.float32)
    return minitorch.flash_attention(q, q, q, dropout_p=0.5, **options)


def by_layer(**options: Any) -> Any:
    backend = TensorBackend(FastOps)
    layer = MultiHeadAttention(
        HEADS * SIZE, HEADS, backend=backend, use_flash_attention=True, p_dropout=0.5, **options
    )
    return layer(minitorch.rand((1, N, HEADS * SIZE), backend))


WAYS: dict[str, Callable[..., Any]] = {
    "FastOps": by_tensors(FastOps, "flash_attention"),
    "SimpleOps": by_tensors(SimpleOps, "flash_attention"),
    "dense": by_tensors(FastOps, "attention"),
    "torch": by_torch,
    "numpy": by_numpy,
    "layer": by_layer,
}
CASES = {name: ("score_mod", *case) for name, case in SCORES.items()} | {
    name: ("block_mask", *case) for name, case in MASKS.items()
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", CASES)
def test_one_sentence_with_file_line_and_function(
    name: str, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    role, function, told = CASES[name]
    forbid_work(monkeypatch)
    with pytest.raises((TypeError, ValueError)) as raised:
        WAYS[way](**{role: function})
    message = str(raised.value)
    line = function.__code__.co_firstlineno
    place = rf"{role.replace('block_mask', 'mask_mod')}: \S*test_attention_errors.py:{line}, in "
    assert re.match(place + r"`[\w<>.]+`: ", message), message
    assert re.search(told, message), message
    assert "\n" not in message


def forbid_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither a seed is drawn, nor a kernel called."""

    def refuse(*_: Any, **__: Any) -> Any:
        raise AssertionError("work was done")

    monkeypatch.setattr("minitorch.attention.next_seed", refuse)
    for ops in (FastOps, SimpleOps):
        monkeypatch.setattr(ops, "flash_attention_forward", refuse)
    torch_attention = pytest.importorskip("minitorch.interop.torch_attention")
    monkeypatch.setattr(torch_attention, "_draw_seed", refuse)


WHOLE: dict[str, tuple[dict[str, Any], str]] = {
    "no function": ({"score_mod": 3.0}, r"score_mod must be a function \(score, b, h"),
    "an array": ({"block_mask": np.ones((N, N), bool)}, "block_mask must be a BlockMask or a func"),
    "other lengths": (
        {"block_mask": attention_masks.bigbird(N + 2, 2)},
        r"block_mask has shape \(1, 1, 8, 8\) .* block_mask.rows\(0, 6, 6\) is its beginning",
    ),
    "other heads": (
        {"block_mask": attention_masks.bigbird(N, 2, heads=3)},
        r"block_mask has shape \(1, 3, 6, 6\) \(B, H, Q_LEN, KV_LEN\); wanted \(1, 2, 6, 6\)",
    ),
    "a built-in": ({"score_mod": math.tanh}, "must be written in Python|takes 1 arguments"),
    "heads of a table": (
        {"score_mod": score_mods.alibi(np.ones(1))},
        "the index of `of_head` runs from 0 to 1, its size is 1",
    ),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", WHOLE)
def test_what_has_no_line_is_told_too(name: str, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    options, told = WHOLE[name]
    if (name, way) == ("other lengths", "layer"):
        pytest.skip("a layer takes shorter sequences")
    forbid_work(monkeypatch)
    with pytest.raises((TypeError, ValueError), match=told):
        WAYS[way](**options)
