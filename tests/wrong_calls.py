"""Calls of fused operations with shapes that do not fit, and what every backend answers.

`CALLS` are run by `tests/test_fused_checks.py` on the backends of the CPU and by
`tests/cuda/test_kernel_ops.py` on those of the GPU.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

import minitorch
from minitorch.kernels.flash_attention.problem import AttentionProblem

Call = Callable[[Any, Callable[..., Any]], Any]  # of a class of operations, and a maker of tensors

ADAMW: dict[str, Any] = {
    "lr": 0.1, "beta1": 0.9, "beta2": 0.99, "eps": 1e-8, "weight_decay": 0.0, "step": 1,
}  # fmt: skip
PROBLEM = AttentionProblem.of((2, 3, 4), (2, 5, 4), (2, 5, 4), "float64")

# What to call, and what the error must say; several calls that get the same answer in one line.
CALLS: list[tuple[Call, str]] = [
    (lambda ops, t: ops.softmax_forward(t(2, 3), 2), "dim must be in [-2, 1]"),
    (lambda ops, t: ops.softmax_forward(t(2, 3), -3), "dim must be in [-2, 1]"),
    (lambda ops, t: ops.softmax_backward(t(3), t(2, 3), 1), "grad must have the shape of y"),
    (lambda ops, t: ops.softmax_backward(t(2, 3), t(2, 3), 5), "dim must be in"),
    (lambda ops, t: ops.logsumexp_forward(t(2, 3), 2), "dim must be in"),
    (lambda ops, t: ops.logsumexp_backward(t(2, 1), t(3, 3), t(2, 1)), "logsumexp must have"),
    (lambda ops, t: ops.logsumexp_backward(t(2, 3), t(2, 3), t(2, 3)), "logsumexp must have"),
    (lambda ops, t: ops.logsumexp_backward(t(1), t(2, 3), t(2, 1)), "grad must have the shape"),
    (lambda ops, t: ops.attn_softmax_fw(t(1, 2, 3, 4), t(3)), "mask must broadcast to inp"),
    (lambda ops, t: ops.attn_softmax_fw(t(1, 2, 3, 4), t(2, 2, 3, 4)), "mask must broadcast"),
    (lambda ops, t: ops.attn_softmax_fw(t(3, 4), t(1, 3, 4)), "mask must broadcast to inp"),
    (lambda ops, t: ops.attn_softmax_bw(t(4), t(1, 2, 3, 4)), "out_grad must have the shape"),
    (lambda ops, t: ops.layernorm_fw(t(2, 6), t(1), t(6)), "gamma must have shape (6,) or (1, 6)"),
    (lambda ops, t: ops.layernorm_fw(t(2, 6), t(7), t(6)), "gamma must have shape (6,)"),
    (lambda ops, t: ops.layernorm_fw(t(2, 6), t(2, 6), t(6)), "gamma must have shape (6,)"),
    (lambda ops, t: ops.layernorm_fw(t(2, 6), t(1, 1, 6), t(6)), "gamma must have shape (6,)"),
    (lambda ops, t: ops.layernorm_fw(t(2, 6), t(6), t(3, 2)), "beta must have shape (6,)"),
    (lambda ops, t: ops.layernorm_fw(t(2, 6), t(6), t(0)), "beta must have shape (6,)"),
    (
        lambda ops, t: ops.layernorm_bw(t(6), t(2, 6), t(6), t(6), t(2), t(2)),
        "out_grad must have the shape of inp",
    ),
    (
        lambda ops, t: ops.layernorm_bw(t(2, 6), t(2, 6), t(3), t(6), t(2), t(2)),
        "gamma must have shape (6,)",
    ),
    (
        lambda ops, t: ops.layernorm_bw(t(2, 6), t(2, 6), t(6), t(6), t(1), t(2)),
        "var must have the shape",
    ),
    (
        lambda ops, t: ops.layernorm_bw(t(2, 6), t(2, 6), t(6), t(6), t(2), t(2, 1)),
        "mean must have the shape",
    ),
    (lambda ops, t: ops.gelu_backward(t(3), t(4)), "grad must have the shape of x, (4,), got (3,)"),
    (lambda ops, t: ops.linear_forward(t(2, 3), t(4, 5), None), "x must be (..., in)"),
    (lambda ops, t: ops.linear_forward(t(2, 3), t(3), None), "x must be (..., in)"),
    (lambda ops, t: ops.linear_forward(t(2, 3), t(3, 6), t(1)), "bias must have shape (6,)"),
    (lambda ops, t: ops.linear_forward(t(2, 3), t(3, 6), t(2, 6)), "bias must have shape (6,)"),
    (lambda ops, t: ops.linear_forward(t(2, 3), t(3, 1), t(6)), "bias must have shape (1,)"),
    (
        lambda ops, t: ops.linear_backward(t(2, 5), t(2, 3), t(3, 6), (True, True, True)),
        "grad must have the shape of x @ weight",
    ),
    (
        lambda ops, t: ops.linear_backward(t(2, 6), t(2, 4), t(3, 6), (True, True, True)),
        "x must be (..., in)",
    ),
    (lambda ops, t: ops.embedding_forward(t(2), t(3)), "weight must be (num_embeddings"),
    (lambda ops, t: ops.embedding_backward(t(3, 4), t(2), 5), "grad must have the shape of the"),
    (lambda ops, t: ops.embedding_backward(t(2), t(2, 3), 5), "grad must have the shape of the"),
    (lambda ops, t: ops.cross_entropy_forward(t(2, 3), t(3)), "needs logits (batch, C)"),
    (lambda ops, t: ops.cross_entropy_forward(t(6), t(6)), "needs logits (batch, C)"),
    (lambda ops, t: ops.cross_entropy_forward(t(2, 0), t(2)), "at least one class"),
    (
        lambda ops, t: ops.cross_entropy_backward(t(3), t(2, 3), t(2), t(2)),
        "grad must have the shape of target",
    ),
    (
        lambda ops, t: ops.cross_entropy_backward(t(2), t(2, 3), t(2), t(1)),
        "logsumexp must have the shape of target",
    ),
    (lambda ops, t: ops.dropout_forward(t(3), 2.0, 1), "p must be in [0, 1], got 2.0"),
    (lambda ops, t: ops.dropout_forward(t(3), float("nan"), 1), "p must be in [0, 1], got nan"),
    (lambda ops, t: ops.dropout_backward(t(3), -0.1, 1), "p must be in [0, 1], got -0.1"),
    (lambda ops, t: ops.adamw_step(t(50), t(3), t(50), t(50), **ADAMW), "grad must have the shape"),
    (lambda ops, t: ops.adamw_step(t(5), t(1), t(5), t(5), **ADAMW), "grad must have the shape"),
    (lambda ops, t: ops.adamw_step(t(5), t(5), t(3), t(5), **ADAMW), "exp_avg must have the shape"),
    (lambda ops, t: ops.adamw_step(t(5), t(5), t(5), t(5, 1), **ADAMW), "exp_avg_sq must have the"),
    (
        lambda ops, t: ops.adamw_step(t(5), t(5), t(5).to("float32"), t(5), **ADAMW),
        "exp_avg must have the dtype of param, float64, got float32",
    ),
    (
        lambda ops, t: ops.adamw_step(t(2, 3), t(2, 3), t(3, 2).permute(1, 0), t(2, 3), **ADAMW),
        "exp_avg, which is changed in place, must be contiguous",
    ),
    (
        lambda ops, t: ops.adamw_step(t(5), t(5), t(5), t(5), **(ADAMW | {"step": 0})),
        "step counts from 1, got 0",
    ),
    (
        lambda ops, t: ops.flash_attention_forward(
            t(2, 3, 4), t(2, 4, 4), t(2, 5, 4), None, PROBLEM
        ),
        "key must have the shape of the problem's key",
    ),
    (
        lambda ops, t: ops.flash_attention_backward(
            t(2, 3, 4), None, t(2, 3, 4), t(2, 5, 4), t(2, 5, 4), None, t(2, 3, 4), t(2, 4), PROBLEM
        ),
        "rows must have the shape",
    ),
    (lambda ops, t: ops.map(minitorch.operators.exp)(t(3), t(6)), "out must have a shape"),
    (lambda ops, t: ops.map(minitorch.operators.id)(t(2, 3), t(3)), "out must have a shape"),
    (lambda ops, t: ops.reduce(minitorch.operators.add)(t(2, 3), 2), "dim must be in [-2, 1]"),
]


def answers(ops: Any) -> list[str]:
    """What each call is answered, after a look that its numbers have not been changed."""
    found = []
    for call, _ in CALLS:
        made: list[Any] = []

        def make(*shape: int, made: list[Any] = made) -> Any:
            ones = np.ones(shape)
            made.append(minitorch.tensor(ones, minitorch.TensorBackend(ops), requires_grad=False))
            return made[-1]

        try:
            call(ops, make)
        except (ValueError, TypeError, IndexError) as error:
            found.append(f"{type(error).__name__}: {error}")
        else:
            found.append("no error")
        assert all((t.to_numpy() == 1).all() for t in made)
    return found
