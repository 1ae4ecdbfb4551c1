"""Cross entropy of rows of logits with one class each, forward and backward.

    loss = logsumexp(x) - x[target],     dx = dloss (softmax(x) - one_hot(target))

Only the logsumexp of each row is kept for the backward pass.
"""

from __future__ import annotations

import numpy as np

from .cpu.rows import Array
from .softmax import logsumexp_backward, logsumexp_forward


def forward(logits: Array, target: Array) -> tuple[Array, Array]:
    """(loss, logsumexp), both (N,), of logits (N, C) and whole numbers target (N,); NaN where a
    logit is inf.
    """
    logsumexp = logsumexp_forward(logits)
    logsumexp[np.isposinf(logsumexp)] = np.nan
    with np.errstate(all="ignore"):  # infinities and NaN as they come
        loss = logsumexp - logits[np.arange(len(target)), target]
    return loss, logsumexp


def backward(dloss: Array, logits: Array, target: Array, logsumexp: Array) -> Array:
    """dlogits (N, C); dloss (N,)."""
    dlogits = logsumexp_backward(dloss, logits, logsumexp)
    dlogits[np.arange(len(target)), target] -= dloss
    return dlogits
