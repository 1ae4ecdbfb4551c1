"""Two exercises of the course, each in one block's shared memory: a sum, and a small product.

They are the first step towards `fold_cuda` and `matmul_cuda`.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any

from .gpu.runtime import Instance, ceil_div, cuda, kernel, launch, precision, types

THREADS_PER_BLOCK = 32


@cache
def sum_kernel(dtype: str) -> Any:
    """The kernel out[block] = the sum of the block's 32 elements of x."""
    of = precision(dtype)
    real, load, store = of.real, of.load, of.store

    @kernel(THREADS_PER_BLOCK)
    def block_sum(out, x, size):
        partial = cuda.shared.array(THREADS_PER_BLOCK, real)
        thread = cuda.threadIdx.x
        i = cuda.blockIdx.x * THREADS_PER_BLOCK + thread
        partial[thread] = load(x[i]) if i < size else real(0)
        cuda.syncthreads()
        apart = 1
        while apart < THREADS_PER_BLOCK:  # each sum takes in the one next to it: 1, 2, 4... apart
            if thread % (2 * apart) == 0:
                partial[thread] += partial[thread + apart]
            cuda.syncthreads()
            apart *= 2
        if thread == 0:
            out[cuda.blockIdx.x] = store(partial[0])

    return block_sum


def sum_blocks(out: Any, x: Any, dtype: str, size: int) -> None:
    """The sums of blocks of 32 elements of x (size,) into out."""
    if size > 0:
        launch(
            sum_kernel(dtype), ceil_div(size, THREADS_PER_BLOCK), THREADS_PER_BLOCK, out, x, size
        )


@cache
def small_matmul_kernel(dtype: str) -> Any:
    """The kernel out = a @ b of (size, size) matrices, size <= 32, one thread for each element."""
    of = precision(dtype)
    real, load, store = of.real, of.load, of.store

    @kernel(THREADS_PER_BLOCK * THREADS_PER_BLOCK)
    def small_matmul(out, a, b, size):
        a_shared = cuda.shared.array((THREADS_PER_BLOCK, THREADS_PER_BLOCK), real)
        b_shared = cuda.shared.array((THREADS_PER_BLOCK, THREADS_PER_BLOCK), real)
        row, column = cuda.threadIdx.y, cuda.threadIdx.x
        inside = row < size and column < size
        if inside:
            a_shared[row, column] = load(a[row * size + column])
            b_shared[row, column] = load(b[row * size + column])
        cuda.syncthreads()
        if inside:
            total = real(0)
            for k in range(size):
                total += a_shared[row, k] * b_shared[k, column]
            out[row * size + column] = store(total)

    return small_matmul


def small_matmul_into(out: Any, a: Any, b: Any, dtype: str, size: int) -> None:
    """a @ b of contiguous (size, size) matrices into out."""
    side = THREADS_PER_BLOCK
    if size > 0:
        launch(small_matmul_kernel(dtype), 1, (side, side), out, a, b, size)


def instances() -> Iterator[Instance]:
    """Kernels for the compile tests."""
    for dtype in ("float32", "float64"):
        array = precision(dtype).array
        yield Instance(f"sum_practice[{dtype}]", sum_kernel(dtype), (array, array, types.int64), 40)
        yield Instance(
            f"mm_practice[{dtype}]",
            small_matmul_kernel(dtype),
            (array, array, array, types.int64),
            64,
        )
