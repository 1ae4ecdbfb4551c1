"""One step of AdamW (Loshchilov & Hutter 2019, algorithm 2), in one pass over the memory.

p = p (1 - lr decay),   m = b1 m + (1 - b1) g,   v = b2 v + (1 - b2) g^2
p = p - lr m / (1 - b1^t) / (sqrt(v / (1 - b2^t)) + eps)
"""

from __future__ import annotations

import math

import numpy as np

from .cpu.compiler import njit
from .cpu.rows import KEY, Array, run_over_rows
from .cpu.threads import fetch_add


def step(
    param: Array,
    grad: Array,
    exp_avg: Array,
    exp_avg_sq: Array,
    *,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    step: int,
) -> None:
    """Update param, exp_avg and exp_avg_sq (n,) in place with grad (n,); `step` counts from 1."""
    real = param.dtype.type
    root_correction = math.sqrt(1 - beta2**step)
    run_over_rows(
        len(param), 1, adamw_worker, param, grad, exp_avg, exp_avg_sq,
        real(1 - lr * weight_decay), real(beta1), real(1 - beta1), real(beta2), real(1 - beta2),
        real(lr * root_correction / (1 - beta1**step)), real(eps * root_correction),
    )  # fmt: skip


@njit(nogil=True, cache=True, error_model="numpy")
def adamw_worker(
    param, grad, exp_avg, exp_avg_sq, keep, beta1, rest1, beta2, rest2, rate, eps,
    next_row, block, key=KEY,
):  # fmt: skip
    """All (n,); rate and eps carry the corrections: both are times sqrt(1 - b2^t)."""
    while True:
        first = fetch_add(next_row, 0, block)
        if first >= len(param):
            return
        end = first + block
        p, g, m, v = param[first:end], grad[first:end], exp_avg[first:end], exp_avg_sq[first:end]
        for j in range(len(p)):
            m[j] = beta1 * m[j] + rest1 * g[j]
            v[j] = beta2 * v[j] + rest2 * g[j] * g[j]
            p[j] = keep * p[j] - rate * m[j] / (np.sqrt(v[j]) + eps)
