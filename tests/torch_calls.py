"""Arguments of attention as PyTorch tensors, its own attention, and gradients, for tests."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

import minitorch

torch = pytest.importorskip("torch")

flash_attention = minitorch.flash_attention
NOT_TWICE = "a first derivative and no second"
NOT_FORWARD = "no forward-mode derivative"


def draw(*shape: int, seed: int = 0, grad: bool = True, dtype: Any = torch.float64) -> Any:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=dtype).requires_grad_(grad)


def inputs(*batch: int, grad: bool = True) -> list[Any]:
    """Query, key and value (..., 2, length, 4)."""
    return [draw(*batch, 2, n, 4, seed=s, grad=grad) for s, n in enumerate((3, 5, 5))]


def reference(q: Any, k: Any, v: Any, attn_mask: Any = None, **options: Any) -> Any:
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=attn_mask, **options)


def gradients(f: Callable[..., Any], *leaves: Any) -> Any:
    out = f(*leaves)
    return torch.autograd.grad(
        (out * torch.linspace(-1, 2, out.numel()).view(out.shape)).sum(), leaves
    )
