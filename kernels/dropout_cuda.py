"""Dropout on a GPU: y = x / (1 - p) where kept, else 0, by a mask that is never stored.

Element i is kept iff word i % 4 of Philox with counter (i // 4, 0, 0, 0) is at least
round(p * 2**32): `philox.vector_dropout_mask`, so that the CPU's mask is the same. The backward
pass is the same kernel, on the gradient.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any

import numpy as np

from .gpu.flat import COUNT, THREADS, flat_access, flat_blocks, flat_first
from .gpu.runtime import (
    Instance,
    cuda,
    device_function,
    kernel,
    launch,
    precision,
    types,
)
from .philox import LOW_WORD, WORD_BITS, dropout_threshold, philox4x32

philox = device_function(philox4x32)


def forward(
    precision_name: str, x: Any, y: Any, size: int, dropout_p: float, seed: int, offset: Any
) -> None:
    """y = x / (1 - p) where kept, else 0.

    Args:
        precision_name: of x and y.
        x: (size,), as y.
        y: the output.
        size: number of elements.
        dropout_p: probability of an element to be dropped.
        seed: 64 bits.
        offset: uint64 (1,) in device memory, added to the seed: a CUDA graph that is replayed
            takes another mask each time.

    """
    if size:
        launch(
            forward_kernel(precision_name), flat_blocks(size), THREADS,
            x, y, size, dropout_threshold(dropout_p),
            0.0 if dropout_p == 1 else 1 / (1 - dropout_p), np.uint64(seed % 2**64), offset,
        )  # fmt: skip


@cache
def forward_kernel(precision_name: str) -> Any:
    """Each group of four elements by itself."""
    real = precision(precision_name).real
    load, store = flat_access(precision_name)

    @kernel(THREADS)
    def dropout(x, y, size, threshold, factor, seed, offset):
        values = cuda.local.array(COUNT, real)
        first = flat_first()
        if first < size:
            low, high, zero = types.uint64(0), types.uint64(0), types.uint64(0)
            added = types.uint64(offset[0])
            low = (seed & LOW_WORD) + (added & LOW_WORD)  # 64-bit sum, word by word
            high = (seed >> WORD_BITS) + (added >> WORD_BITS) + (low >> WORD_BITS)
            low, high = low & LOW_WORD, high & LOW_WORD
            load(x, first, size, values)
            for k in range(0, COUNT, 4):
                group = types.uint64((first + k) // 4)
                words = philox(group, zero, zero, zero, low, high)
                scale = real(factor)
                limit = types.uint64(threshold)
                values[k] = values[k] * scale if words[0] >= limit else real(0.0)
                values[k + 1] = values[k + 1] * scale if words[1] >= limit else real(0.0)
                values[k + 2] = values[k + 2] * scale if words[2] >= limit else real(0.0)
                values[k + 3] = values[k + 3] * scale if words[3] >= limit else real(0.0)
            store(y, first, size, values)

    return dropout


def instances() -> Iterator[Instance]:
    """Every precision."""
    offset = types.Array(types.uint64, 1, "C")
    for name in ("float32", "float64", "float16", "bfloat16"):
        array = precision(name).array
        yield Instance(
            f"dropout[{name}]",
            forward_kernel(name),
            (array, array, types.int64, types.int64, types.float64, types.uint64, offset),
        )
