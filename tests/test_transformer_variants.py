"""Layers whose attention has score functions and block masks: training, and text token by token."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import minitorch
from minitorch import (
    DecoderLM,
    FastOps,
    MultiHeadAttention,
    TensorBackend,
    attention_masks,
    score_mods,
)

FAST = TensorBackend(FastOps)
LENGTH, HEADS, WIDTH, WORDS = 12, 2, 8, 5
RNG = np.random.default_rng(2)
IDS = attention_masks.document_ids([5, 4, 3])


def by_position(score: Any, b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
    """It tells all positions apart, not only distances."""
    return score * (1 + 0.1 * q_idx) - 0.05 * kv_idx * (h + 1) + 0.2 * b


def tokens(length: int = LENGTH) -> minitorch.Tensor:
    numbers = RNG.integers(WORDS, size=(2, length)).astype(float)
    return minitorch.tensor(numbers.tolist(), backend=FAST).detach()


def language_model(**options: Any) -> DecoderLM:
    minitorch.manual_seed(1)
    options = {"use_flash_attention": True, "n_layer": 2, "p_dropout": 0.0} | options
    return DecoderLM(WORDS, WIDTH, HEADS, LENGTH, backend=FAST, middle_dim=8, **options)


VARIANTS: dict[str, dict[str, Any]] = {
    "positions": {"score_mod": by_position},
    "soft-cap": {"score_mod": score_mods.softcap(0.5)},
    "window": {"block_mask": attention_masks.sliding_window(2)},
    "documents": {"block_mask": attention_masks.document(IDS)},
    "bigbird": {"block_mask": attention_masks.bigbird(LENGTH, 2, 1, 1, 1, heads=HEADS)},
    "blocks": {
        "block_mask": minitorch.create_block_mask(
            attention_masks.document(IDS), None, None, LENGTH, LENGTH, 4
        )
    },
    "local and global": {
        "block_mask": [attention_masks.sliding_window(2), None],
        "score_mod": (None, by_position),
    },
}


@pytest.mark.parametrize("flash", [True, False])
@pytest.mark.parametrize("name", VARIANTS)
def test_token_by_token_is_as_all_at_once(name: str, flash: bool) -> None:
    model = language_model(use_flash_attention=flash, **VARIANTS[name])
    model.eval()
    idx = tokens()
    whole = model(idx).to_numpy()
    plain = language_model(use_flash_attention=flash)
    plain.eval()
    assert np.abs(plain(idx).to_numpy() - whole).max() > 1e-4  # it makes a difference
    cache, parts = model.init_cache(2), []
    for start, end in ((0, 3), (3, 4), (4, 5), (5, 9), (9, 12)):
        parts.append(model(idx[:, start:end], cache).to_numpy())
    np.testing.assert_allclose(np.concatenate(parts, 1), whole, atol=2e-6)
    np.testing.assert_allclose(model(idx[:, :7]).to_numpy(), whole[:, :7], atol=2e-6)


@pytest.mark.parametrize("name", VARIANTS)
def test_fused_and_dense_layers_agree(name: str) -> None:
    idx, gradients = tokens(), []
    for flash in (True, False):
        model = language_model(use_flash_attention=flash, **VARIANTS[name])
        (model(idx) ** 2).sum().backward()
        gradients.append([p.value.grad.to_numpy() for p in model.parameters()])
    for fused, dense in zip(*gradients, strict=True):
        np.testing.assert_allclose(fused, dense, atol=1e-4, rtol=1e-4)


class Biased(minitorch.Module):
    """The example of MultiHeadAttention's docstring."""

    def __init__(self, n_embd: int, n_head: int, reach: int, flash: bool) -> None:
        super().__init__()
        self.bias: Any = minitorch.Parameter(minitorch.zeros((n_head, reach + 1), FAST))
        bias: Any = self.bias

        def mod(score: Any, b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
            return score + bias[h, np.clip(q_idx - kv_idx, 0, reach)]

        self.attention = MultiHeadAttention(
            n_embd, n_head, causal=True, p_dropout=0.0, backend=FAST, use_flash_attention=flash,
            score_mod=mod,
        )  # fmt: skip

    def forward(self, x: minitorch.Tensor) -> minitorch.Tensor:
        out: minitorch.Tensor = self.attention(x)
        return out


@pytest.mark.parametrize("flash", [True, False])
def test_a_learned_bias_is_trained(flash: bool) -> None:
    minitorch.manual_seed(3)
    model = Biased(WIDTH, HEADS, 3, flash)
    x = minitorch.rand((2, 6, WIDTH), FAST).detach()
    names = [name for name, _ in model.named_parameters()]
    assert "bias" in names

    def loss() -> Any:
        return (model(x) ** 2).sum()

    loss().backward()
    gradient = model.bias.value.grad.to_numpy()
    place, step, values = (1, 2), 1e-2, []
    for sign in (1, -1):
        bias = np.zeros((HEADS, 4))
        bias[place] = sign * step
        model.bias.load(bias.astype(np.float32))
        values.append(float(loss().to_numpy().sum()))
    slope = (values[0] - values[1]) / (2 * step)
    assert abs(gradient[place]) > 1e-4
    np.testing.assert_allclose(gradient[place], slope, rtol=0.05)
    optimizer = minitorch.SGD(model.parameters(), lr=1e-3)
    before = loss()
    before.backward()
    optimizer.step()
    assert float(loss().to_numpy().sum()) < float(before.to_numpy().sum())
    assert model.bias.value.to_numpy()[0, 0] != 0


@pytest.mark.parametrize(
    ("options", "error", "told"),
    [
        ({"score_mod": 3}, TypeError, "score_mod must be a function .*, got int"),
        (
            {"block_mask": np.ones((2, 2))},
            TypeError,
            "block_mask must be a BlockMask or a function",
        ),
        ({"score_mod": [by_position]}, ValueError, "a sequence of 1, the model has 2 layers"),
        ({"block_mask": attention_masks.bigbird(16, 2)}, ValueError, "n_positions = 12"),
    ],
)
def test_what_is_wrong_is_told_when_the_model_is_made(options: Any, error: Any, told: str) -> None:
    with pytest.raises(error, match=told):
        language_model(**options)


def data_dependent(score: Any, b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
    return score if q_idx > kv_idx else 0


def test_what_is_wrong_in_a_function_is_told_with_its_line_and_draws_no_seed() -> None:
    model, seeds = language_model(score_mod=data_dependent, p_dropout=0.5), []
    for layer in model.layers():  # the layers before attention draw none
        layer.ln_1.train()
    model.dropout.p_dropout = 0.0
    for attempt in (True, False):
        minitorch.manual_seed(5)
        if attempt:
            with pytest.raises(TypeError, match=r"test_transformer_variants.py:\d+, in `data_dep"):
                model(tokens())
        seeds.append(minitorch.rng.next_seed())
    assert seeds[0] == seeds[1]
