"""Whole rows of scores on a GPU: what lies between the matrix products of attention.

    forward     S = Q K^T         ->  P = softmax(scale S),  logsumexp                  ->  O = P V
    backward    S, dP = dO V^T    ->  P = exp(scale S - logsumexp),
                                      dS = scale P (dP - sum(P dP) + dlogsumexp)  ->  dQ, dK, dV

S and dP are float32, P and dS 16 bits, as the tensor cores' products give and want them. A row is
read once and kept in registers, and what comes after the keys that its query may see is not read.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import cache
from typing import Any

from ..rows_cuda import RowShape, block_row, row_blocks, row_shape, team_max, team_sum, tile_access
from ..runtime import (
    NEGATIVE_INFINITY,
    Instance,
    cuda,
    device_function,
    kernel,
    launch,
    precision,
    types,
)

FORWARD_BYTES = 128  # of a row that a thread keeps, in its registers
BACKWARD_BYTES = 64  # of each of two rows
MOST_COLUMNS = 8192  # the longest row that is kept whole

Band = tuple[int, int, int]  # Nq, and the first key and one past the last that query 0 may see


def forward(
    precision_name: str,
    scores: Any,
    weights: Any,
    logsumexp: Any,
    first_row: int,
    rows: int,
    columns: int,
    band: Band,
    scale: float,
) -> None:
    """The weights P of some rows, and their logsumexp.

    Args:
        precision_name: of the weights, 16 bits.
        scores: S (rows, columns) float32.
        weights: P (rows, columns), written.
        logsumexp: float32, of all rows; written from `first_row` on.
        first_row: see there; the first row of a head.
        rows: number of rows.
        columns: Nk, a multiple of 8, at most `MOST_COLUMNS`.
        band: Nq, lower, upper: query i sees keys i + lower ... i + upper - 1.
        scale: of the scores.

    """
    if not rows or not columns:
        return
    shape = row_shape("float32", columns, FORWARD_BYTES)
    launch(
        forward_kernel(precision_name, shape), row_blocks(rows, shape), shape.block,
        scores, weights, logsumexp, first_row, rows, columns, *band, float(scale),
    )  # fmt: skip


def backward(
    precision_name: str,
    scores: Any,
    dweights: Any,
    logsumexp: Any,
    dlogsumexp: Any,
    weights: Any,
    dscores: Any,
    first_row: int,
    rows: int,
    columns: int,
    band: Band,
    scale: float,
) -> None:
    """P again, and dS. `dweights` is dP (rows, columns) float32, `dlogsumexp` is like logsumexp or
    None; the other arguments are as in `forward`.
    """
    if not rows or not columns:
        return
    shape = row_shape("float32", columns, BACKWARD_BYTES)
    has_rows = dlogsumexp is not None
    launch(
        backward_kernel(precision_name, shape, has_rows), row_blocks(rows, shape), shape.block,
        scores, dweights, logsumexp, dlogsumexp if has_rows else logsumexp, weights, dscores,
        first_row, rows, columns, *band, float(scale),
    )  # fmt: skip


@cache
def _visible(shape: RowShape) -> Any:
    """Device function: whether element j of a thread is a key that the row's query may see."""
    vector, step = shape.vector, shape.threads * shape.vector

    @device_function
    def visible(j, first_key, stop):
        column = cuda.threadIdx.x * vector + (j // vector) * step + j % vector
        return column >= first_key and column < stop

    return visible


@cache
def forward_kernel(precision_name: str, shape: RowShape) -> Any:
    """One row to a team."""
    load, _ = tile_access("float32", shape)
    _, store = tile_access(precision_name, shape)
    maximum, add = team_max("float32", shape.threads), team_sum("float32", shape.threads)
    visible = _visible(shape)
    count, rows_of_block, real = shape.values, shape.rows, types.float32
    nothing = NEGATIVE_INFINITY

    @kernel(shape.threads * shape.rows)
    def score_rows_forward(
        scores, weights, logsumexp, first_row, rows, columns, queries, lower, upper, scale
    ):
        values = cuda.local.array(count, real)
        row = block_row(rows_of_block)
        query = row % queries
        factor = real(scale)
        stop = min(columns, query + upper) if row < rows else 0
        load(scores, row * columns, 0, stop, values, real(0.0))
        top = real(nothing)
        for j in range(count):
            if visible(j, query + lower, stop):
                values[j] *= factor
            else:
                values[j] = real(nothing)
            top = max(top, values[j])
        top = maximum(top)
        shift = real(0.0) if top == nothing else top
        total = real(0.0)
        for j in range(count):
            values[j] = real(math.exp(values[j] - shift))
            total += values[j]
        total = add(total)
        if row < rows:
            inverse = real(1.0) / total if total > real(0.0) else real(0.0)
            for j in range(count):
                values[j] *= inverse
            store(weights, row * columns, 0, columns, values)
            if cuda.threadIdx.x == 0:
                if total > real(0.0):
                    logsumexp[first_row + row] = top + real(math.log(total))
                else:
                    logsumexp[first_row + row] = real(nothing)

    return score_rows_forward


@cache
def backward_kernel(precision_name: str, shape: RowShape, has_rows: bool) -> Any:
    """One row to a team; `has_rows` says that the logsumexp has a gradient too."""
    load, _ = tile_access("float32", shape)
    _, store = tile_access(precision_name, shape)
    add = team_sum("float32", shape.threads)
    visible = _visible(shape)
    count, rows_of_block, real = shape.values, shape.rows, types.float32

    @kernel(shape.threads * shape.rows)
    def score_rows_backward(
        scores, dweights, logsumexp, dlogsumexp, weights, dscores,
        first_row, rows, columns, queries, lower, upper, scale,
    ):  # fmt: skip
        p = cuda.local.array(count, real)
        dp = cuda.local.array(count, real)
        row = block_row(rows_of_block)
        query = row % queries
        factor = real(scale)
        stop = min(columns, query + upper) if row < rows else 0
        load(scores, row * columns, 0, stop, p, real(0.0))
        load(dweights, row * columns, 0, stop, dp, real(0.0))
        shift = logsumexp[first_row + row] if row < rows else real(0.0)
        delta = real(0.0)
        for j in range(count):
            if visible(j, query + lower, stop):
                p[j] = real(math.exp(factor * p[j] - shift))
                delta += p[j] * dp[j]
            else:
                p[j] = real(0.0)
        delta = add(delta)
        if row < rows:
            if has_rows:
                delta -= dlogsumexp[first_row + row]
            store(weights, row * columns, 0, columns, p)
            for j in range(count):
                dp[j] = factor * p[j] * (dp[j] - delta)
            store(dscores, row * columns, 0, columns, dp)

    return score_rows_backward


def instances() -> Iterator[Instance]:
    """Short rows and the longest, in both types of 16 bits."""
    scores, size, real = precision("float32").array, types.int64, types.float64
    sizes = (*(size,) * 6, real)
    for name in ("float16", "bfloat16"):
        half = precision(name).array
        for columns in (256, 2048, MOST_COLUMNS):
            shape = row_shape("float32", columns, FORWARD_BYTES)
            yield Instance(
                f"score_rows_forward[{name}, {columns}]",
                forward_kernel(name, shape),
                (scores, half, scores, *sizes),
            )
            shape = row_shape("float32", columns, BACKWARD_BYTES)
            yield Instance(
                f"score_rows_backward[{name}, {columns}]",
                backward_kernel(name, shape, columns == 256),
                (scores, scores, scores, scores, half, half, *sizes),
            )
