"""Cross entropy of rows of logits with one class each, forward and backward.

    loss = log(sum(exp(x - max))) + (max - x[target]),     dx = dloss (softmax(x) - one_hot(target))

The maximum and the logarithm are not added first: a large maximum has no room for the logarithm.
Only the logsumexp of each row is kept for the backward pass.
"""

from __future__ import annotations

import numpy as np

from .cpu.rows import Array
from .softmax import logsumexp_backward, logsumexp_parts


def forward(logits: Array, target: Array) -> tuple[Array, Array]:
    """(loss, logsumexp), both (N,), of logits (N, C) and whole numbers target (N,); NaN where a
    logit is inf, or all are -inf.
    """
    top, log_sum = logsumexp_parts(logits)
    log_sum[np.isinf(top) | np.isinf(log_sum)] = np.nan
    with np.errstate(all="ignore"):  # infinities and NaN as they come
        loss = log_sum + (top - logits[np.arange(len(target)), target])
    return loss, top + log_sum


def backward(dloss: Array, logits: Array, target: Array, logsumexp: Array) -> Array:
    """dlogits (N, C); dloss (N,)."""
    dlogits = logsumexp_backward(dloss, logits, logsumexp)
    dlogits[np.arange(len(target)), target] -= dloss
    return dlogits
