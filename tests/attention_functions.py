"""Calls of attention with score functions, mask functions and block masks, for the table of rules.

The truth is standard attention in numpy in float64 (`standard.py`), whose functions have tests
against plain numpy of their own (test_attention_variants.py, test_score_graph.py).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

import minitorch
from minitorch import FastOps, TensorBackend
from minitorch.kernels.flash_attention.standard import (
    standard_attention,
    standard_attention_backward,
)
from tests.attention_calls import Array, Call, random, real_dtype

BACKEND = TensorBackend(FastOps)
BATCHES = HEADS = 2
PAIR = ((BATCHES, HEADS),) * 2
SHARED = {"leading": ((BATCHES, HEADS), (BATCHES, 1)), "enable_gqa": True}
BIAS: dict[str, Any] = {"mask": ("additive", "q", "k")}

Make = Callable[[int, int], dict[str, Any]]  # of seqlen_q and seqlen_k: arguments of attention


def leaf(*shape: int, seed: int = 0) -> Any:
    """A tensor that wants a gradient, of numbers that float32 has."""
    numbers = random(*shape, seed=seed).astype(np.float32)
    tensor = minitorch.tensor(numbers.astype(np.float64), BACKEND).detach()
    tensor.requires_grad_(True)
    return tensor


# ----- score functions -----


def soft_cap(nq: int, nk: int) -> dict[str, Any]:
    """No array."""
    return {"score_mod": minitorch.score_mods.softcap(1.5)}


def slopes(nq: int, nk: int) -> dict[str, Any]:
    """One number for a row."""
    table = leaf(HEADS, seed=1)
    return {"score_mod": lambda s, b, h, q, k: s - 0.1 * table[h] * abs(q - k)}


def neighbours(nq: int, nk: int) -> dict[str, Any]:
    """Numbers beside each other, and the last one of the table is reached."""
    table = leaf(HEADS, nq + nk - 1, seed=2)
    return {"score_mod": lambda s, b, h, q, k: s * table[h, q - k + (nk - 1)]}


def scattered(nq: int, nk: int) -> dict[str, Any]:
    """Several scores of a row add to one number, and the derivative is one of scores, too."""
    table, key_bias = leaf(HEADS, 7, seed=3), leaf(nk, seed=4)

    def mod(s: Any, b: Any, h: Any, q: Any, k: Any) -> Any:
        near = table[h, np.clip(q - k, -3, 3) + 3]
        return np.tanh(s) * (1 + near) + near * near + key_bias[k] * s + b

    return {"score_mod": mod}


def pairs(nq: int, nk: int) -> dict[str, Any]:
    """A number for each score, and one that another array names."""
    bias, near = leaf(nq, nk, seed=5), leaf(5, seed=6)
    distance = np.random.default_rng(0).integers(0, 5, (BATCHES, nq, nk))
    return {"score_mod": lambda s, b, h, q, k: s + bias[q, k] * near[distance[b, q, k]]}


def hiding(nq: int, nk: int) -> dict[str, Any]:
    """What a score function makes -inf has no gradient, though the derivative is infinite."""
    return {"score_mod": lambda s, b, h, q, k: np.where((q + k) % 3 > 0, s, np.log(s * 0))}


# ----- masks -----


def documents(nq: int, nk: int) -> dict[str, Any]:
    """Others for each batch."""
    rng = np.random.default_rng(1)
    ids = np.sort(rng.integers(0, 4, (BATCHES, max(nq, nk))), -1)
    return {"block_mask": _made(minitorch.attention_masks.document(ids), BATCHES, None, nq, nk, 16)}


def per_head(nq: int, nk: int) -> dict[str, Any]:
    """Others for each head, in blocks that no tile divides; some rows see no key."""

    def mask(b: Any, h: Any, q: Any, k: Any) -> Any:
        return ((q + 5 * h) // 9 % 3 != 1) & ((k // 8 + h) % 2 == 0) & (q + k > 9)

    return {"block_mask": _made(mask, None, HEADS, nq, nk, (24, 20))}


def blocks(nq: int, nk: int, full: bool = True) -> dict[str, Any]:
    """Empty, full and partial blocks in any order, and lists without a block."""
    rng = np.random.default_rng(2)
    kinds = rng.random((BATCHES, HEADS, -(-nq // 8), -(-nk // 8)))
    kinds[:, 0, 1:5] = 1.0

    def mask(b: Any, h: Any, q: Any, k: Any) -> Any:
        kind = kinds[b, h, q // 8, k // 8]
        return (kind < 0.3) | ((kind < 0.5) & ((q + k) % 3 == 0))

    return {"block_mask": _made(mask, BATCHES, HEADS, nq, nk, 8)}


def wide_blocks(nq: int, nk: int) -> dict[str, Any]:
    """One block, larger than the sequences, of a mask that is no band."""
    return {"block_mask": _made(lambda b, h, q, k: (q ^ k) % 4 < 3, None, None, nq, nk, 100)}


def _made(mask: Any, b: Any, h: Any, nq: int, nk: int, block: Any) -> minitorch.BlockMask:
    return minitorch.create_block_mask(mask, b, h, nq, nk, block)


def both(score: Make, mask: Make) -> Make:
    """A score function and a mask."""
    return lambda nq, nk: {**score(nq, nk), **mask(nq, nk)}


# What is asked for, and the other arguments of a small call, as in `tests.attention.FEATURES`.
FUNCTION_FEATURES: dict[str, tuple[Make, dict[str, Any]]] = {
    "soft cap": (soft_cap, {"is_causal": True}),
    "soft cap before a mask is added, dropout": (soft_cap, {**BIAS, "dropout_p": 0.3, "seed": 3}),
    "slopes": (slopes, {**SHARED, "is_causal": "bottom-right"}),
    "neighbours": (neighbours, {"window": (9, 3)}),
    "scattered": (scattered, {"mask": ("bool", "q", "k"), "dropout_p": 0.3, "seed": 4}),
    "scattered, a mask is added": (scattered, {**BIAS, **SHARED}),
    "pairs": (pairs, {"scale": -0.3}),
    "hiding": (hiding, {}),
    "documents": (documents, {"is_causal": True}),
    "documents, dropout": (documents, {**SHARED, "dropout_p": 0.3, "seed": 5}),
    "heads of their own": (per_head, {**BIAS}),
    "heads of their own, window": (per_head, {**SHARED, "window": (20, 9)}),
    "blocks": (blocks, {}),
    "blocks, a boolean mask": (blocks, {"mask": ("bool", BATCHES, 1, "q", "k")}),
    "wide blocks": (wide_blocks, {"is_causal": True}),
    "slopes and blocks": (both(slopes, blocks), {"is_causal": True}),
    "scattered and heads of their own": (
        both(scattered, per_head), {**SHARED, **BIAS, "dropout_p": 0.2, "seed": 6},
    ),
    "layouts": (
        both(neighbours, documents), {"layouts": ("heads", "part", "transposed", "heads")},
    ),
}  # fmt: skip
# Each thing that these do is done in one of the others, too; in the simulator they take long.
COMBINATIONS = (
    "soft cap",
    "scattered, a mask is added",
    "documents, dropout",
    "heads of their own",
    "blocks, a boolean mask",
    "scattered and heads of their own",
    "layouts",
)


def reference_with_functions(call: Call) -> tuple[Array, ...]:
    """What `Results` are, in float64."""
    problem = replace(call.problem, dtype=np.dtype(np.float64), fp32_precision="ieee")
    q, k, v, do = (_exact(x) for x in call.tensors)
    mask: Any = call.mask
    variant = call.variant.each(lambda x: _exact(x) if _is_real(x) else x)
    if call.wants_mask:
        mask = mask.astype(real_dtype(call.dtype)).astype(np.float64)
    out, lse, rows = standard_attention(problem, q, k, v, mask, variant)
    dl = None if call.grad_logsumexp is None else call.grad_logsumexp.astype(np.float64)
    gradients: Any = standard_attention_backward(
        problem, q, k, v, mask, out, rows, do, dl, call.wants_mask, variant
    )
    return out, lse, *gradients


def _is_real(x: Any) -> bool:
    return hasattr(x, "to_numpy") or np.asarray(x).dtype.kind not in "iub"


def _exact(x: Any) -> Array:
    return np.asarray(x.to_numpy() if hasattr(x, "to_numpy") else x).astype(np.float64)
