"""Rows of a table by number: y[i] = weight[ids[i]], and backward dweight[ids[i]] += dy[i]."""

from __future__ import annotations

import numpy as np

from .cpu.compiler import njit
from .cpu.rows import KEY, Array, as_rows, run_over_rows
from .cpu.threads import fetch_add


def forward(ids: Array, weight: Array) -> Array:
    """ids (...) of an integer type, weight (num_embeddings, E) -> (..., E)."""
    return np.take(weight, ids, axis=0)


def backward(dy: Array, ids: Array, num_embeddings: int) -> Array:
    """dweight (num_embeddings, E), of dy (..., E).

    Threads share the columns, not the rows: no two write to one place, and sums run in the order
    of `ids`.
    """
    rows = as_rows(dy)
    dweight = np.zeros((num_embeddings, rows.shape[1]), dy.dtype)
    flat_ids = np.array(ids, np.int64, order="C").reshape(-1)
    run_over_rows(*rows.shape[::-1], embedding_backward_worker, rows, flat_ids, dweight)
    return dweight


@njit(nogil=True, cache=True, error_model="numpy")
def embedding_backward_worker(dy, ids, dweight, next_row, block, key=KEY):
    """dy (rows, E), ids (rows,), dweight (num_embeddings, E); `next_row` counts columns."""
    block = max(block, 32)  # columns: a few cache lines
    while True:
        first = fetch_add(next_row, 0, block)
        if first >= dy.shape[1]:
            return
        for r in range(len(ids)):
            g = dy[r][first : first + block]
            to = dweight[ids[r]][first : first + block]
            for j in range(len(to)):
                to[j] += g[j]
