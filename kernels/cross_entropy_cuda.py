"""Cross entropy of rows of logits with one class each on a GPU, forward and backward.

    loss = log(sum(exp(x - max))) + (max - x[target]),     dx = dloss (softmax(x) - one_hot(target))

The maximum and the logarithm are not added first: a large maximum has no room for the logarithm.
The logits are read once each way, but for the backward pass of long rows whose logsumexp is large;
only the logsumexp of each row is kept for the backward pass.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import cache
from typing import Any

from .gpu.approximate import exponential
from .gpu.rows import RowShape, block_row, row_blocks, row_shape, tile_access
from .gpu.runtime import (
    NEGATIVE_INFINITY,
    Instance,
    cuda,
    kernel,
    launch,
    precision,
    types,
)
from .softmax_cuda import FORWARD_BYTES, exponentials, row_total, softmax_factor

EXACT_BELOW = 64.0  # in a logsumexp below, rounding leaves room enough for the logarithm
ERROR_BIT = 2  # of the device's word of errors: a target that is no class


def forward(
    precision_name: str,
    target_name: str,
    logits: Any,
    target: Any,
    loss: Any,
    logsumexp: Any,
    error: Any,
    rows: int,
    classes: int,
) -> None:
    """Loss and logsumexp of each row.

    Args:
        precision_name: of the logits; loss and logsumexp are of its arithmetic type, float32 for
            16 bits.
        target_name: precision of the targets.
        logits: (rows, classes), flat and contiguous.
        target: (rows,), whole numbers.
        loss: (rows,), NaN where the target is no class, a logit inf, or all are -inf.
        logsumexp: (rows,), NaN where a logit is inf or all are -inf.
        error: int32 (1,), gets `ERROR_BIT` if a target is no class.
        rows: number of rows.
        classes: length of a row.

    """
    if not rows or not classes:
        return
    shape = row_shape(precision_name, classes, FORWARD_BYTES)
    launch(
        forward_kernel(precision_name, target_name, shape),
        row_blocks(rows, shape), shape.block, logits, target, loss, logsumexp, error, rows, classes,
    )  # fmt: skip


@cache
def forward_kernel(precision_name: str, target_name: str, shape: RowShape) -> Any:
    """One row to a team."""
    number, of_target = precision(precision_name), precision(target_name)
    real, to_real, to_number = number.real, number.load, of_target.load
    load, _ = tile_access(precision_name, shape)
    take = exponentials(precision_name, shape.values)
    combine = row_total(precision_name, shape.threads)
    count, width, rows_of_block = shape.values, shape.tile, shape.rows
    nothing = NEGATIVE_INFINITY

    @kernel(shape.threads * shape.rows)
    def cross_entropy_forward(logits, target, loss, logsumexp, error, rows, classes):
        values = cuda.local.array(count, real)
        row = block_row(rows_of_block)
        limit = classes if row < rows else 0
        top, total = real(nothing), real(0.0)
        for tile in range((classes + width - 1) // width):
            load(logits, row * classes, tile, limit, values, nothing)
            top, total = take(values, top, total)
        row_top, total, _ = combine(top, total)
        if row < rows and cuda.threadIdx.x == 0:
            log_sum = real(math.nan) if total == real(0.0) else real(math.log(total))
            logsumexp[row] = row_top + log_sum
            number = to_number(target[row])
            if number >= 0 and number < classes and math.floor(number) == number:
                chosen = to_real(logits[row * classes + types.int64(number)])
                loss[row] = log_sum + (row_top - chosen)
            else:
                cuda.atomic.or_(error, 0, ERROR_BIT)
                loss[row] = real(math.nan)

    return cross_entropy_forward


def backward(
    precision_name: str,
    target_name: str,
    dloss: Any,
    logits: Any,
    target: Any,
    logsumexp: Any,
    dlogits: Any,
    rows: int,
    classes: int,
) -> None:
    """dlogits, given what `forward` took and gave and the gradient dloss (rows,) of the loss."""
    if not rows or not classes:
        return
    shape = row_shape(precision_name, classes, FORWARD_BYTES)
    launch(
        backward_kernel(precision_name, target_name, shape),
        row_blocks(rows, shape), shape.block,
        dloss, logits, target, logsumexp, dlogits, rows, classes,
    )  # fmt: skip


@cache
def backward_kernel(precision_name: str, target_name: str, shape: RowShape) -> Any:
    """One row to a team."""
    number, of_target = precision(precision_name), precision(target_name)
    real, to_number, exp = number.real, of_target.load, exponential(precision_name)
    load, store = tile_access(precision_name, shape)
    factor_of = softmax_factor(precision_name, shape, EXACT_BELOW)
    count, width, rows_of_block, tiled = shape.values, shape.tile, shape.rows, shape.tiled
    vector, step = shape.vector, shape.threads * shape.vector
    nothing = NEGATIVE_INFINITY

    @kernel(shape.threads * shape.rows)
    def cross_entropy_backward(dloss, logits, target, logsumexp, dlogits, rows, classes):
        values = cuda.local.array(count, real)
        row = block_row(rows_of_block)
        if row < rows:
            grad, shift = dloss[row], logsumexp[row]
            factor = factor_of(logits, row * classes, classes, values, shift)
            number = to_number(target[row])
            valid = number >= 0 and number < classes
            correct = types.int64(number) if valid else types.int64(-1)
            for tile in range((classes + width - 1) // width if tiled else 1):
                if tiled:
                    load(logits, row * classes, tile, classes, values, nothing)
                    for i in range(count):
                        values[i] = exp(values[i] - shift)
                first = tile * width + cuda.threadIdx.x * vector
                for i in range(count):
                    column = first + (i // vector) * step + i % vector
                    share = values[i] * factor
                    values[i] = grad * (share - real(1.0) if column == correct else share)
                store(dlogits, row * classes, tile, classes, values)

    return cross_entropy_backward


def instances() -> Iterator[Instance]:
    """Few classes, a vocabulary of an odd size, and of an even one."""
    size, target = types.int64, precision("float32").array
    error = types.Array(types.int32, 1, "C")
    for name in ("float32", "float64", "float16", "bfloat16"):
        array, real = precision(name).array, precision(name).real_array
        for classes in (65, 10_000, 50_257) if name == "float32" else (50_257,):
            shape = row_shape(name, classes, FORWARD_BYTES)
            yield Instance(
                f"cross_entropy_forward[{name}, {classes}]",
                forward_kernel(name, "float32", shape),
                (array, target, real, real, error, size, size),
            )
            yield Instance(
                f"cross_entropy_backward[{name}, {classes}]",
                backward_kernel(name, "float32", shape),
                (real, array, target, real, array, size, size),
            )
