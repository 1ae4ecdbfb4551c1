"""Softmax and logsumexp of the rows of a matrix on a GPU, forward and backward.

    softmax:    y = exp(x - max) / sum(exp(x - max)),     dx = y (dy - sum(dy y))
    logsumexp:  l = max + log(sum(exp(x - max))),         dx = dl exp(x - l) / sum(exp(x - l))

The last sum would be 1 but for the rounding of l, which has no room for the logarithm where the
maximum is large.

A row is read once: each thread keeps the exponentials under the maximum that it has seen itself,
and one factor a thread brings them to the row's maximum (the online softmax; Milakov &
Gimelshein 2018, algorithm 3). A row that is -inf throughout has softmax 0 and logsumexp -inf, one
with inf in it softmax NaN and logsumexp inf.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import cache
from typing import Any

import numpy as np

from .gpu.approximate import exponential
from .gpu.rows import (
    RowShape,
    block_row,
    row_blocks,
    row_shape,
    team_max,
    team_sum,
    tile_access,
)
from .gpu.runtime import (
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


def forward(
    precision_name: str,
    x: Any,
    y: Any,
    rows: int,
    columns: int,
    mask: Any = None,
    mask_sizes: tuple[int, int] = (1, 1),
    mask_strides: tuple[int, int, int] = (0, 0, 0),
) -> None:
    """y = softmax(x + mask) along the rows.

    Args:
        precision_name: of x, y and mask.
        x: (rows, columns), flat and contiguous, as y.
        y: the output.
        rows: number of rows.
        columns: length of a row.
        mask: its rows are contiguous; None for none.
        mask_sizes: (H, Q) with x being (B, H, Q, columns).
        mask_strides: of the mask's dimensions B, H and Q, 0 where it broadcasts.

    """
    if not rows or not columns:
        return
    shape = row_shape(precision_name, columns, FORWARD_BYTES)
    launch(
        forward_kernel(precision_name, shape, mask is not None),
        row_blocks(rows, shape), shape.block,
        x, x if mask is None else mask, *mask_sizes, *mask_strides, y, rows, columns,
    )  # fmt: skip


def backward(precision_name: str, dy: Any, y: Any, dx: Any, rows: int, columns: int) -> None:
    """dx, given y = softmax(x); all (rows, columns), flat and contiguous."""
    if not rows or not columns:
        return
    shape = row_shape(precision_name, columns, BACKWARD_BYTES)
    launch(
        backward_kernel(precision_name, shape),
        row_blocks(rows, shape), shape.block, dy, y, dx, rows, columns,
    )  # fmt: skip


def logsumexp_forward(precision_name: str, x: Any, out: Any, rows: int, columns: int) -> None:
    """out (rows,) of x (rows, columns), both of one precision."""
    if not rows:
        return
    shape = row_shape(precision_name, max(columns, 1), FORWARD_BYTES)
    launch(
        logsumexp_kernel(precision_name, shape),
        row_blocks(rows, shape), shape.block, x, out, rows, columns,
    )  # fmt: skip


def logsumexp_backward(
    precision_name: str, dl: Any, x: Any, logsumexp: Any, dx: Any, rows: int, columns: int
) -> None:
    """dx (rows, columns) of x, and of l = logsumexp(x) and its gradient dl, both (rows,)."""
    if not rows or not columns:
        return
    shape = row_shape(precision_name, columns, FORWARD_BYTES)
    launch(
        logsumexp_backward_kernel(precision_name, shape),
        row_blocks(rows, shape), shape.block, dl, x, logsumexp, dx, rows, columns,
    )  # fmt: skip


# ----- the online softmax, a tile at a time -----


@cache
def shift_of(precision_name: str, finite: bool) -> Any:
    """Device function: what to subtract where the largest value is x, namely x; 0 if x is -inf.

    If `finite`, the largest finite number instead of inf: then inf has the exponential inf, and
    other numbers 0. Else it has NaN.
    """
    real = precision(precision_name).real
    nothing, most = NEGATIVE_INFINITY, float(np.finfo(real.name).max)

    @device_function
    def shift(x):
        return real(0.0) if x == nothing else x

    @device_function
    def finite_shift(x):
        return real(0.0) if x == nothing else min(x, real(most))

    return finite_shift if finite else shift


@cache
def exponentials(precision_name: str, count: int, finite: bool = False) -> Any:
    """Device function `(values, top, total) -> (top, total)`: values become exp(values - top).

    `top` is the largest value that the thread has seen, `shift_of` it what is subtracted; `total`
    the sum of its exponentials. Both take in the thread's `count` values.
    """
    exp, shift_for = exponential(precision_name), shift_of(precision_name, finite)

    @device_function
    def take(values, top, total):
        largest = top
        for i in range(count):
            largest = max(largest, values[i])
        shift = shift_for(largest)
        total *= exp(top - shift)
        for i in range(count):
            values[i] = exp(values[i] - shift)
            total += values[i]
        return largest, total

    return take


@cache
def row_total(precision_name: str, threads: int, finite: bool = False) -> Any:
    """Device function `(top, total) -> (row's top, row's total, own factor)` over a row's team.

    The factor is exp(own top - row's top): what takes the thread's exponentials to the row's top,
    `shift_of` the row's largest value.
    """
    exp, shift_for = exponential(precision_name), shift_of(precision_name, finite)
    maximum, add = team_max(precision_name, threads), team_sum(precision_name, threads)

    @device_function
    def combine(top, total):
        row_top = shift_for(maximum(top))
        factor = exp(top - row_top)
        return row_top, add(total * factor), factor

    return combine


# ----- softmax -----


@cache
def forward_kernel(precision_name: str, shape: RowShape, masked: bool) -> Any:
    """y = softmax(x + mask), one row to a team."""
    real, exp = precision(precision_name).real, exponential(precision_name)
    load, store = tile_access(precision_name, shape)
    take = exponentials(precision_name, shape.values)
    combine = row_total(precision_name, shape.threads)
    count, width, rows_of_block, tiled = shape.values, shape.tile, shape.rows, shape.tiled
    nothing = NEGATIVE_INFINITY

    @kernel(shape.threads * shape.rows)
    def softmax_forward(
        x, mask, mask_heads, mask_queries, stride_b, stride_h, stride_q, y, rows, columns
    ):
        values = cuda.local.array(count, real)
        added = cuda.local.array(count, real)
        row = block_row(rows_of_block)
        start = row * columns
        mask_start = types.int64(0)
        if masked:
            batch_head = types.uint32(row) // types.uint32(mask_queries)
            query = types.uint32(row) % types.uint32(mask_queries)
            batch = types.uint32(batch_head) // types.uint32(mask_heads)
            head = types.uint32(batch_head) % types.uint32(mask_heads)
            mask_start = batch * stride_b + head * stride_h + query * stride_q
        limit = columns if row < rows else 0  # a team without a row reads and writes nothing
        tiles = (columns + width - 1) // width if tiled else 1
        top, total = real(nothing), real(0.0)
        for tile in range(tiles):
            load(x, start, tile, limit, values, nothing)
            if masked:
                load(mask, mask_start, tile, limit, added, real(0.0))
                for i in range(count):
                    values[i] += added[i]
            top, total = take(values, top, total)
        row_top, total, factor = combine(top, total)
        scale = real(0.0) if total == real(0.0) else real(1.0) / total
        for tile in range(tiles):
            if tiled:  # read again
                load(x, start, tile, limit, values, nothing)
                if masked:
                    load(mask, mask_start, tile, limit, added, real(0.0))
                for i in range(count):
                    if masked:
                        values[i] += added[i]
                    values[i] = exp(values[i] - row_top) * scale
            else:
                for i in range(count):
                    values[i] *= factor * scale
            store(y, start, tile, limit, values)

    return softmax_forward


@cache
def backward_kernel(precision_name: str, shape: RowShape) -> Any:
    """dx = y (dy - sum(dy y)), one row to a team."""
    real = precision(precision_name).real
    load, store = tile_access(precision_name, shape)
    add = team_sum(precision_name, shape.threads)
    count, width, rows_of_block, tiled = shape.values, shape.tile, shape.rows, shape.tiled

    @kernel(shape.threads * shape.rows)
    def softmax_backward(dy, y, dx, rows, columns):
        grad = cuda.local.array(count, real)
        value = cuda.local.array(count, real)
        row = block_row(rows_of_block)
        start = row * columns
        limit = columns if row < rows else 0
        tiles = (columns + width - 1) // width if tiled else 1
        dot = real(0.0)
        for tile in range(tiles):
            load(dy, start, tile, limit, grad, real(0.0))
            load(y, start, tile, limit, value, real(0.0))
            for i in range(count):
                dot += grad[i] * value[i]
        dot = add(dot)
        for tile in range(tiles):
            if tiled:
                load(dy, start, tile, limit, grad, real(0.0))
                load(y, start, tile, limit, value, real(0.0))
            for i in range(count):
                value[i] *= grad[i] - dot
            store(dx, start, tile, limit, value)

    return softmax_backward


# ----- logsumexp -----


@cache
def softmax_factor(precision_name: str, shape: RowShape, exact_below: float = 0.0) -> Any:
    """Device function `(x, start, columns, values, l) -> 1 / sum(exp(x - l))` of a team's row.

    The values become exp(x - l), those of the last tile if the row has several. The factor is 1
    where l is not finite. A row of several tiles is not read for it where abs(l) < `exact_below`:
    the factor is 1. All threads of a team call it, with the same numbers.
    """
    real, exp = precision(precision_name).real, exponential(precision_name)
    load, _ = tile_access(precision_name, shape)
    add = team_sum(precision_name, shape.threads)
    count, width, tiled = shape.values, shape.tile, shape.tiled
    nothing, most = NEGATIVE_INFINITY, float(np.finfo(real.name).max)

    @device_function
    def factor(x, start, columns, values, l):
        if tiled and abs(l) < real(exact_below):
            return real(1.0)
        shift = real(0.0) if l == nothing else l
        total = real(0.0)
        for tile in range((columns + width - 1) // width if tiled else 1):
            load(x, start, tile, columns, values, nothing)
            for i in range(count):
                values[i] = exp(values[i] - shift)
                total += values[i]
        total = add(total)
        return real(1.0) / total if abs(l) <= real(most) else real(1.0)

    return factor


@cache
def logsumexp_kernel(precision_name: str, shape: RowShape) -> Any:
    """l = max + log(sum(exp(x - max))), one row to a team."""
    number = precision(precision_name)
    real, to_storage = number.real, number.store
    load, _ = tile_access(precision_name, shape)
    take = exponentials(precision_name, shape.values, finite=True)
    combine = row_total(precision_name, shape.threads, finite=True)
    count, width, rows_of_block = shape.values, shape.tile, shape.rows
    nothing = NEGATIVE_INFINITY

    @kernel(shape.threads * shape.rows)
    def logsumexp_forward(x, out, rows, columns):
        values = cuda.local.array(count, real)
        row = block_row(rows_of_block)
        limit = columns if row < rows else 0
        top, total = real(nothing), real(0.0)
        for tile in range((columns + width - 1) // width):
            load(x, row * columns, tile, limit, values, nothing)
            top, total = take(values, top, total)
        row_top, total, _ = combine(top, total)
        if row < rows and cuda.threadIdx.x == 0:
            if total == real(0.0):
                out[row] = to_storage(real(nothing))
            else:
                out[row] = to_storage(row_top + real(math.log(total)))

    return logsumexp_forward


@cache
def logsumexp_backward_kernel(precision_name: str, shape: RowShape) -> Any:
    """dx = dl exp(x - l) / sum(exp(x - l)), one row to a team; a row of l = -inf has gradient 0."""
    number = precision(precision_name)
    real, to_real, exp = number.real, number.load, exponential(precision_name)
    load, store = tile_access(precision_name, shape)
    factor_of = softmax_factor(precision_name, shape)
    count, width, rows_of_block, tiled = shape.values, shape.tile, shape.rows, shape.tiled
    nothing = NEGATIVE_INFINITY

    @kernel(shape.threads * shape.rows)
    def logsumexp_backward(dl, x, logsumexp, dx, rows, columns):
        values = cuda.local.array(count, real)
        row = block_row(rows_of_block)
        if row < rows:
            grad, shift = to_real(dl[row]), to_real(logsumexp[row])
            factor = factor_of(x, row * columns, columns, values, shift)
            shift = real(0.0) if shift == nothing else shift
            for tile in range((columns + width - 1) // width if tiled else 1):
                if tiled:
                    load(x, row * columns, tile, columns, values, nothing)
                    for i in range(count):
                        values[i] = exp(values[i] - shift)
                for i in range(count):
                    values[i] = grad * (values[i] * factor)
                store(dx, row * columns, tile, columns, values)

    return logsumexp_backward


def instances() -> Iterator[Instance]:
    """Rows for one warp, a block, and several tiles; every precision."""
    lengths = {"float32": (63, 1024, 100_000), "float64": (1024, 100_000)}
    size = types.int64
    for name in ("float32", "float64", "float16", "bfloat16"):
        array = precision(name).array
        for columns in lengths.get(name, (4096,)):
            label = f"[{name}, {columns}]"
            shape = row_shape(name, columns, FORWARD_BYTES)
            arguments = (array, array, *[size] * 5, array, size, size)
            yield Instance("masked" + label, forward_kernel(name, shape, True), arguments)
            back = backward_kernel(name, row_shape(name, columns, BACKWARD_BYTES))
            yield Instance("softmax_backward" + label, back, (array,) * 3 + (size, size))
            if name not in lengths:  # 16 bits differ by what they read and write alone
                continue
            yield Instance("softmax" + label, forward_kernel(name, shape, False), arguments)
            total = logsumexp_kernel(name, shape)
            yield Instance("logsumexp" + label, total, (array, array, size, size))
            back = logsumexp_backward_kernel(name, shape)
            yield Instance("logsumexp_backward" + label, back, (array,) * 4 + (size, size))
