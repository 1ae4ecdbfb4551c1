"""Which parameters decay: those of matrices, as in nanoGPT; biases and norms are spared."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any


def decays(parameter: Any) -> bool:
    """Whether a parameter, of minitorch or of PyTorch, has two dimensions or more."""
    return len(getattr(parameter, "value", parameter).shape) >= 2


def decay_groups(parameters: Iterable[Any], weight_decay: float) -> list[dict[str, Any]]:
    """Parameter groups for AdamW, minitorch's or PyTorch's: those that decay, then the others."""
    given = list(parameters)
    return [
        {"params": [p for p in given if decays(p)], "weight_decay": weight_decay},
        {"params": [p for p in given if not decays(p)], "weight_decay": 0.0},
    ]
