"""Attention by whole rows of scores, forward and backward, beside a reference in float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import minitorch
from minitorch import CudaKernelOps, TensorBackend, cuda_attention_products
from minitorch import cuda_attention as dispatch
from minitorch.kernels import runtime
from minitorch.kernels.flash_attention.problem import AttentionProblem
from minitorch.kernels.flash_attention.standard import (
    standard_attention,
    standard_attention_backward,
)

GPU = TensorBackend(CudaKernelOps)
SIZES = (2, 2, 8, 8) if runtime.SIMULATED else (3, 4, 64, 32)  # batch, heads, keys, head size


def arrays(dtype: str, batch: int, heads: int, queries: int, keys: int, size: int) -> Any:
    """Query, key, value and the output's gradient, as the GPU has them."""
    rng = np.random.default_rng(0)
    lengths = (queries, keys, keys, queries)
    made = [rng.normal(size=(batch, n, heads, size)).astype(np.float32) for n in lengths]
    return [minitorch.tensor(a, GPU).to(dtype).detach().permute(0, 2, 1, 3) for a in made]


@pytest.mark.parametrize(
    ("dtype", "settings"),
    [
        ("float16", {}),
        ("bfloat16", {"is_causal": True}),
        ("bfloat16", {"is_causal": "bottom-right"}),
        ("bfloat16", {"window": (2, 1), "scale": 0.3}),
    ],
)
def test_like_the_reference(
    monkeypatch: pytest.MonkeyPatch, dtype: str, settings: dict[str, Any]
) -> None:
    batch, heads, keys, size = SIZES
    queries = keys - 3
    q, k, v, do = arrays(dtype, batch, heads, queries, keys, size)
    monkeypatch.setattr(cuda_attention_products, "SCORES_BYTES", 3 * 4 * queries * keys)
    monkeypatch.setattr(dispatch, "FLASH_ATTENTION", (cuda_attention_products,))
    monkeypatch.setattr(cuda_attention_products, "why_not", lambda *_: None)
    problem = AttentionProblem.of(q.shape, k.shape, v.shape, np.float64, **settings)
    q64, k64, v64, do64 = (x.to_numpy().astype(np.float64) for x in (q, k, v, do))
    wanted, logsumexp = standard_attention(problem, q64, k64, v64, None)
    dlse = np.random.default_rng(1).normal(size=logsumexp.shape)
    dlse = np.where(np.isneginf(logsumexp), 0, dlse)
    gradients = standard_attention_backward(
        problem, q64, k64, v64, None, wanted, logsumexp, do64, dlse
    )[:3]

    for x in (q, k, v):
        x.requires_grad_(True)
    out, lse = q.flash_attention(k, v, return_lse=True, **settings)
    tolerance = 0.03 if dtype == "bfloat16" else 0.004
    np.testing.assert_allclose(out.to_numpy().astype(float), wanted, atol=tolerance)
    np.testing.assert_allclose(lse.to_numpy().astype(float), logsumexp, atol=tolerance, rtol=1e-3)
    if np.isfinite(logsumexp).all():
        from_rows = lse.to("float32") * minitorch.tensor(dlse.astype(np.float32), GPU).detach()
        ((out * do).to("float32").sum() + from_rows.sum()).backward()
        for x, gradient in zip((q, k, v), gradients, strict=True):
            np.testing.assert_allclose(
                x.grad.to_numpy().astype(float), gradient, atol=4 * tolerance, rtol=0.05
            )


def test_what_is_left_to_the_other_kernels() -> None:
    shape = (2, 4, 64, 32)

    def supported(dtype: str = "float16", **settings: Any) -> bool:
        given = np.dtype(dtype)
        problem = AttentionProblem.of(shape, shape, shape, given, **settings)
        return cuda_attention_products.why_not(problem, (9, 0)) is None

    assert supported(is_causal=True) is not runtime.SIMULATED
    for settings in ({"dropout_p": 0.1}, {"dtype": "float32"}, {"attn_mask": np.ones((64, 64))}):
        assert not supported(**settings)
