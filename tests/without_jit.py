"""Values and gradients of every operation of FastOps, of small tensors that are always the same.

    python -m tests.without_jit FILE

writes them to a file of numpy's; `test_without_jit.py` runs that without compilation and compares.
"""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import numpy.typing as npt

import minitorch
from minitorch import Tensor
from minitorch.fused_functions import DropoutFun

FAST = minitorch.TensorBackend(minitorch.FastOps)
ATTENTION: dict[str, dict[str, Any]] = {
    "plain": {},
    "causal": {"is_causal": True},
    "dropout": {"dropout_p": 0.3, "seed": 3},
    "window": {"window": (3, 2)},
    "bool mask": {"attn_mask": np.random.default_rng(1).random((37, 40)) < 0.7},
}


class Results:
    """What has been computed, by name; leaves are drawn from one generator."""

    def __init__(self, dtype: npt.DTypeLike) -> None:
        self.dtype = np.dtype(dtype)
        self.rng = np.random.default_rng(0)
        self.arrays: dict[str, npt.NDArray[Any]] = {}

    def leaf(self, *shape: int) -> Tensor:
        """Normal numbers that want a gradient."""
        return minitorch.tensor(self.rng.normal(size=shape).astype(self.dtype), FAST)

    def keep(self, name: str, out: Tensor, *leaves: Tensor) -> None:
        """A result, and the gradients that it gives the leaves."""
        name = f"{self.dtype.name} {name}"
        (out * self.leaf(*out.shape).detach()).sum().backward()
        self.arrays[name] = out.to_numpy()
        for number, leaf in enumerate(leaves):
            assert leaf.grad is not None
            self.arrays[f"{name}, gradient {number}"] = leaf.grad.to_numpy()
            leaf.grad = None


def elementwise(results: Results) -> None:
    """Maps, zips, folds, products."""
    x, y = results.leaf(3, 21), results.leaf(3, 21)
    for name in ("exp", "sigmoid", "tanh", "relu"):
        results.keep(name, getattr(x, name)(), x)
    results.keep("zip", x * y.permute(0, 1) + (x < y) + x / (y * y + 1.0), x, y)
    results.keep("log and power", (x * x + 1.0).log() + (y * y + 1.0) ** 1.5, x, y)
    results.keep("sums", x.sum(0) + x.permute(1, 0).contiguous().sum(0).sum(1), x)
    results.keep("max", minitorch.max(x, 1), x)
    results.keep("matmul", x @ y.permute(1, 0), x, y)


def fused(results: Results) -> None:
    """Softmax, layer norm, GELU, dropout, convolutions, layers, losses, AdamW."""
    x, y = results.leaf(3, 21), results.leaf(3, 21)
    gamma, beta = results.leaf(21), results.leaf(21)
    results.keep("softmax", minitorch.softmax(x, 1) + minitorch.softmax(x, 0), x)
    results.keep("logsumexp", minitorch.logsumexp(x, 1), x)
    results.keep("attn_softmax", x.attn_softmax(y), x)
    results.keep("layernorm", x.layernorm(gamma, beta, 1e-5), x, gamma, beta)
    results.keep("gelu", minitorch.GELU(x), x)
    results.keep("dropout", DropoutFun.apply(x, 0.3, 7), x)
    image, kernel = results.leaf(2, 3, 5, 6), results.leaf(2, 3, 2, 3)
    results.keep("conv2d", minitorch.conv2d(image, kernel), image, kernel)
    signal, weights = results.leaf(2, 3, 9), results.leaf(2, 3, 4)
    results.keep("conv1d", minitorch.conv1d(signal, weights), signal, weights)
    linear, embedding = minitorch.Linear(5, 4, backend=FAST), minitorch.Embedding(6, 5, FAST)
    parameters = [*linear.parameters(), *embedding.parameters()]
    for parameter in parameters:
        parameter.update(results.leaf(*parameter.value.shape))
    ids = minitorch.tensor([0.0, 3.0, 3.0, 5.0], FAST, requires_grad=False)
    logits = linear(embedding(ids))
    targets = minitorch.tensor([0.0, 3.0, 1.0, 1.0], FAST, requires_grad=False)
    loss = minitorch.softmax_loss(logits, targets)
    results.keep("layers", loss, *(parameter.value for parameter in parameters))
    for parameter in parameters:
        parameter.value.grad = results.leaf(*parameter.value.shape).detach()
    optimizer = minitorch.AdamW(parameters, lr=0.1)
    optimizer.step()
    results.arrays |= {
        f"{results.dtype.name} adamw {number}": parameter.value.to_numpy()
        for number, parameter in enumerate(parameters)
    }


def attention_functions(results: Results) -> None:
    """A score function whose table gets a gradient, another block mask for each head, dropout."""
    table, bias = results.leaf(2, 7), results.leaf(37, 40)
    q, k, v = results.leaf(2, 37, 9), results.leaf(2, 40, 9), results.leaf(2, 40, 11)
    flags = np.random.default_rng(2).random(40) < 0.7

    def score(s: Any, b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        near = table[h, np.clip(q_idx - kv_idx, -3, 3) + 3]
        return np.tanh(s) * near + near

    def mask(b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        return (abs(q_idx - kv_idx) < 9 + 3 * h) & flags[kv_idx]

    out = q.flash_attention(
        k, v, score_mod=score, block_mask=mask, attn_mask=bias, dropout_p=0.2, seed=4
    )
    results.keep("attention functions", out, q, k, v, table, bias)


def attention(results: Results) -> None:
    """Both passes, with every kind of mask, and dropout."""
    bias = results.leaf(37, 40)
    for name, options in {**ATTENTION, "additive mask": {"attn_mask": bias}}.items():
        leaves = [results.leaf(2, 37, 9), results.leaf(2, 40, 9), results.leaf(2, 40, 11)]
        q, k, v = leaves
        out = q.flash_attention(k, v, **options)
        results.keep(f"attention, {name}", out, *leaves, *([bias] if name[0] == "a" else []))


def not_finite(results: Results) -> None:
    """Infinity and NaN go through as in compiled code, without a warning."""
    x = minitorch.tensor([[np.inf, -np.inf, np.nan, 0.0], [-np.inf] * 4], FAST).to(results.dtype)
    for name, out in (
        ("exp", x.exp()),
        ("inverse", 1.0 / x),
        ("softmax", minitorch.softmax(x, 1)),
        ("logsumexp", minitorch.logsumexp(x, 1)),
        ("gelu", minitorch.GELU(x)),
    ):
        results.arrays[f"{results.dtype.name} {name} of infinity"] = out.to_numpy()


def results() -> dict[str, npt.NDArray[Any]]:
    """All of them, in both dtypes."""
    arrays: dict[str, npt.NDArray[Any]] = {}
    for dtype in ("float32", "float64"):
        of_dtype = Results(dtype)
        for part in (elementwise, fused, attention, attention_functions, not_finite):
            part(of_dtype)
        arrays |= of_dtype.arrays
    return arrays


if __name__ == "__main__":
    np.savez(sys.argv[1], **results())  # type: ignore[arg-type]
