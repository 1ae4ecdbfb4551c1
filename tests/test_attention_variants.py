"""Attention with score functions and block masks: against float64, and against other arguments."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest

import minitorch
from minitorch import FastOps, SimpleOps, TensorBackend, attention_masks, score_mods

BACKENDS = [TensorBackend(SimpleOps), TensorBackend(FastOps)]
RNG = np.random.default_rng(7)
B, H, NQ, NK, D = 2, 4, 5, 6, 3
Q, K, V = (RNG.normal(size=(B, H, n, D)) for n in (NQ, NK, NK))
SLOPES, TABLE = RNG.normal(size=H), RNG.normal(size=(H, 7))
LENGTHS = np.array([3, 6])
LARGE = np.full(NQ, 2**64 - 1, np.uint64)

each_backend = pytest.mark.parametrize("backend", BACKENDS)


def leaves(backend: TensorBackend, *arrays: Any) -> list[minitorch.Tensor]:
    tensors = [minitorch.tensor(x, backend=backend).detach() for x in arrays]
    for tensor in tensors:
        tensor.requires_grad_(True)
    return tensors


def softmax(s: Any) -> Any:
    with np.errstate(invalid="ignore"):
        p = np.exp(s - s.max(-1, keepdims=True))
        return np.nan_to_num(p / p.sum(-1, keepdims=True))


@each_backend
def test_the_order_of_all_that_is_done_to_a_score(backend: TensorBackend) -> None:
    """Scale, score function, additive mask; then -inf of the band and the block mask."""
    q, k, v = leaves(backend, Q, K, V)
    bias = RNG.normal(size=(NQ, NK))

    def mod(score: Any, b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        return 2 * np.tanh(score / 2) - SLOPES[h] * abs(q_idx - kv_idx) + b

    def mask(b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        return kv_idx < LENGTHS[b]

    out, lse = q.attention(
        k, v, score_mod=mod, block_mask=mask, attn_mask=bias, is_causal=True, scale=0.3,
        return_lse=True,
    )  # fmt: skip
    i, j = np.arange(NQ)[:, None], np.arange(NK)
    s = 2 * np.tanh(0.3 * Q @ K.swapaxes(-1, -2) / 2)
    s += np.arange(B)[:, None, None, None] - SLOPES[:, None, None] * abs(i - j) + bias
    s = np.where((j <= i) & (j < LENGTHS[:, None, None, None]), s, -np.inf)
    np.testing.assert_allclose(out.to_numpy(), softmax(s) @ V, atol=1e-12)
    np.testing.assert_allclose(lse.to_numpy(), np.log(np.exp(s).sum(-1)), atol=1e-12)


@each_backend
def test_gradients_of_inputs_and_of_what_the_function_closes_over(backend: TensorBackend) -> None:
    weights = RNG.normal(size=(B, H, NQ, D))
    arrays = [Q, K, V, SLOPES, TABLE]

    def loss_of(*tensors: Any) -> Any:
        q, k, v, slopes, table = tensors

        def mod(score: Any, b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
            near = table[h, np.clip(q_idx - kv_idx, -3, 3) + 3]
            return score * (1 + near) - slopes[h] * abs(q_idx - kv_idx) * score + near * near

        out = q.attention(k, v, score_mod=mod, block_mask=attention_masks.sliding_window(3, 1))
        return (out * minitorch.tensor(weights, backend=backend)).sum()

    tensors = leaves(backend, *arrays)
    loss_of(*tensors).backward()
    for n, tensor in enumerate(tensors):
        gradient, step = tensor.grad.to_numpy(), 1e-6  # type: ignore[union-attr]
        for place in [tuple(RNG.integers(size) for size in arrays[n].shape) for _ in range(4)]:
            values = []
            for sign in (1, -1):
                moved = [x.copy() for x in arrays]
                moved[n][place] += sign * step
                with minitorch.no_grad():
                    values.append(loss_of(*leaves(backend, *moved)).item())
            assert gradient[place] == pytest.approx((values[0] - values[1]) / (2 * step), abs=1e-7)


@pytest.mark.parametrize("dropout_p", [0.0, 0.4])
def test_a_mask_function_is_the_argument_that_says_the_same(dropout_p: float) -> None:
    q, k, v = leaves(BACKENDS[1], Q, K, V)
    options: dict[str, Any] = {"dropout_p": dropout_p, "seed": 5}
    pairs: list[tuple[dict[str, Any], Any]] = [
        ({"is_causal": True}, attention_masks.causal()),
        ({"is_causal": "bottom-right"}, attention_masks.causal(NK - NQ)),
        ({"window": (2, 1)}, attention_masks.sliding_window(2, 1)),
    ]
    for arguments, function in pairs:
        wanted = q.attention(k, v, **arguments, **options).to_numpy()
        for mask in (function, minitorch.create_block_mask(function, None, None, NQ, NK, 4)):
            found = q.attention(k, v, block_mask=mask, **options).to_numpy()
            np.testing.assert_array_equal(found, wanted)
        hides = minitorch.create_mask(function, None, None, NQ, NK)[0, 0]

        def hiding(score: Any, b: Any, h: Any, q_idx: Any, kv_idx: Any, hides: Any = hides) -> Any:
            return np.where(hides[q_idx, kv_idx], score, -np.inf)

        found = q.attention(k, v, score_mod=hiding, **options).to_numpy()
        np.testing.assert_array_equal(found, wanted)


def test_masks_per_head_and_given_blocks() -> None:
    q, k, v = leaves(BACKENDS[1], *(RNG.normal(size=(2, 3, 40, 8)) for _ in range(3)))
    mask = attention_masks.bigbird(40, 4, heads=3, seed=2)
    wanted = q.attention(k, v, attn_mask=mask.to_mask()).to_numpy()
    np.testing.assert_array_equal(q.attention(k, v, block_mask=mask).to_numpy(), wanted)


def test_rows_that_see_nothing_and_leading_dimensions() -> None:
    q, k, v = leaves(BACKENDS[1], *(RNG.normal(size=(2, 3, 2, 4, 3)) for _ in range(3)))

    def mask(b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        return (q_idx > 0) & ((b * 2 + h + kv_idx) % 3 > 0)

    out = q.attention(k, v, block_mask=mask)
    out.sum().backward()
    assert (out.to_numpy()[..., 0, :] == 0).all()
    assert (q.grad.to_numpy()[..., 0, :] == 0).all()  # type: ignore[union-attr]
    i, j = np.arange(4)[:, None], np.arange(4)
    head = np.arange(12).reshape(2, 3, 2)[..., None, None]
    s = q.to_numpy() @ k.to_numpy().swapaxes(-1, -2) / 3**0.5
    s = np.where((i > 0) & ((head + j) % 3 > 0), s, -np.inf)
    np.testing.assert_allclose(out.to_numpy(), softmax(s) @ v.to_numpy(), atol=1e-12)
    one = q[0, 0, 0].detach()
    assert one.attention(one, one, block_mask=attention_masks.causal()).shape == (4, 3)


def test_heads_that_share_keys() -> None:
    q, k, v = leaves(BACKENDS[1], Q, K[:, :2], V[:, :2])
    found = q.attention(k, v, enable_gqa=True, score_mod=score_mods.alibi(SLOPES))
    i, j = np.arange(NQ)[:, None], np.arange(NK)
    s = Q @ np.repeat(K[:, :2], 2, 1).swapaxes(-1, -2) / D**0.5
    weights = softmax(s - SLOPES[:, None, None] * abs(i - j))
    np.testing.assert_allclose(found.to_numpy(), weights @ np.repeat(V[:, :2], 2, 1), atol=1e-12)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"block_mask": np.ones((NQ, NK), bool)}, TypeError, "block_mask must be a BlockMask or"),
        ({"block_mask": score_mods.softcap(2.0)}, TypeError, "one like this is a score_mod"),
        ({"score_mod": attention_masks.causal()}, TypeError, "one like this is a mask_mod"),
        ({"score_mod": 3}, TypeError, "score_mod must be a function"),
        (
            {"block_mask": minitorch.create_block_mask(minitorch.noop_mask, None, None, 9, NK)},
            ValueError,
            "block_mask has shape",
        ),
        ({"score_mod": score_mods.alibi(2)}, ValueError, "index of `of_head` runs from 0 to 3"),
        ({"block_mask": attention_masks.document([0] * 5)}, ValueError, "its size is 5"),
        ({"score_mod": lambda s, b, h, q, k: s + LARGE[q]}, ValueError, "more than the 32 bits"),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], error: Any, message: str) -> None:
    q, k, v = leaves(BACKENDS[1], Q, K, V)
    with pytest.raises(error, match=message):
        q.attention(k, v, **arguments)


def test_no_batch_no_head_and_no_other_dimension() -> None:
    """Both functions go along; scores of two dimensions, too, have b and h, which are 0."""

    def mod(score: Any, b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        return score * table[b, h, q_idx - kv_idx + 5]

    def mask(b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        return (q_idx + h) % 3 != kv_idx % 3

    for leading in ((0, 2), (2, 0), ()):
        arrays = [RNG.normal(size=(*leading, n, D)) for n in (NQ, NK, NK)]
        found = []
        for name in ("attention", "flash_attention"):
            *given, table = leaves(BACKENDS[1], *arrays, np.full((2, 2, 11), 0.5))
            q, k, v = given
            out = getattr(q, name)(k, v, score_mod=mod, block_mask=mask)
            out.sum().backward()
            assert out.shape == (*leading, NQ, D)
            gradients = [x.grad.to_numpy() for x in (*given, table)]  # type: ignore[union-attr]
            found.append([out.to_numpy(), *gradients])
        for dense, fused in zip(*found, strict=True):
            np.testing.assert_allclose(dense, fused, atol=1e-12)


@pytest.mark.parametrize("number", [np.inf, -np.inf, np.nan])
def test_numbers_without_end(number: float) -> None:
    """In a table and in the inputs: the same output, and no warning on the way."""
    table = np.array([0.5, number, -1.0, 0.0, 2.0, 0.1])
    for place in range(4):
        arrays = [Q, K, V]
        if place < 3:
            arrays[place] = arrays[place].copy()
            arrays[place][0, 1, 2, 1] = number
        q, k, v, bias = leaves(BACKENDS[1], *arrays, table if place == 3 else np.ones(6))

        def mod(score: Any, b: Any, h: Any, q_idx: Any, kv_idx: Any, bias: Any = bias) -> Any:
            return score + bias[kv_idx] + np.log(abs(bias[q_idx])) * np.inf

        def finite(score: Any, b: Any, h: Any, q_idx: Any, kv_idx: Any, bias: Any = bias) -> Any:
            return score + bias[kv_idx]

        for function in (mod, finite):
            dense, fused = (
                f(k, v, score_mod=function, block_mask=attention_masks.causal(1))
                for f in (q.attention, q.flash_attention)
            )
            (dense.sum() + fused.sum()).backward()
            np.testing.assert_allclose(fused.to_numpy(), dense.to_numpy(), atol=1e-12)


def test_an_array_that_is_written_to_after_the_forward_pass() -> None:
    """Gradients are those of the numbers that the output was computed with."""
    table, found = TABLE.copy(), []
    for writes in (False, True):
        q, k, v = leaves(BACKENDS[1], Q, K, V)
        out = q.flash_attention(k, v, score_mod=lambda s, b, h, i, j: s * table[h, (i + j) % 7])
        table[...] = np.nan if writes else table
        out.sum().backward()
        found.append([x.grad.to_numpy() for x in (q, k, v)])  # type: ignore[union-attr]
    for kept, written in zip(*found, strict=True):
        np.testing.assert_array_equal(kept, written)


def test_threads_that_call_with_functions_of_their_own() -> None:
    def call(number: int) -> Any:
        q, k, v, bias = leaves(BACKENDS[1], Q, K, V, TABLE[0] * number)
        out = q.flash_attention(
            k, v, score_mod=lambda s, b, h, i, j: np.tanh(s / number) + bias[(i + number * j) % 7],
            block_mask=lambda b, h, i, j: (i + j) % (number + 2) > 0,
        )  # fmt: skip
        out.sum().backward()
        return out.to_numpy(), bias.grad.to_numpy()  # type: ignore[union-attr]

    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(call, [1, 2, 3, 4] * 8))
    for n, results in enumerate(found):
        for mine, alone in zip(results, call(n % 4 + 1), strict=True):
            np.testing.assert_array_equal(mine, alone)
