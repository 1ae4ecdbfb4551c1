"""Matrix products on the GPU, in tiles through shared memory: (..., m, k) @ (..., k, n).

Each element of the product reads a row and a column: without tiles every number would come from
memory n or m times. A block computes block_m x block_n elements; it walks along k in steps of
block_k, copies the two tiles of a step to shared memory, and multiplies them there. Each thread
keeps thread_m x thread_n sums in registers, so that a number read from shared memory is used
several times too.

This is the kernel to read, and what products fall back to without cuBLAS (`minitorch.cuda.cublas`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from math import prod
from typing import Any

from .elementwise_cuda import View, group_offset, merge_dimensions
from .gpu.runtime import (
    SIMULATED,
    Instance,
    ceil_div,
    cuda,
    kernel,
    launch,
    precision,
    types,
)

MOST_GRID_Y = 65535


@dataclass(frozen=True)
class Tiles:
    """Sizes of the tiles; the block's must be multiples of the thread's."""

    block_m: int
    block_n: int
    block_k: int
    thread_m: int
    thread_n: int

    @property
    def threads(self) -> int:
        """Of a block, one for each thread tile."""
        return (self.block_m // self.thread_m) * (self.block_n // self.thread_n)


SMALL = Tiles(8, 8, 4, 2, 2) if SIMULATED else Tiles(32, 32, 16, 2, 2)
LARGE = Tiles(16, 16, 4, 4, 4) if SIMULATED else Tiles(128, 64, 8, 8, 4)


@cache
def matmul_kernel(
    dtype: str, batch_dims: int, a_by_rows: bool, b_by_rows: bool, tiles: Tiles
) -> Any:
    """The kernel out[batch] = a[batch] @ b[batch].

    Args:
        dtype: of a, b and out; sums are float32 for the 16-bit types.
        batch_dims: number of batch dimensions, merged.
        a_by_rows: whether neighbours of a row of a lie closer together than those of a column.
        b_by_rows: likewise for b.
        tiles: their sizes.

    """
    block_m, block_n, block_k = tiles.block_m, tiles.block_n, tiles.block_k
    thread_m, thread_n, threads = tiles.thread_m, tiles.thread_n, tiles.threads
    apart_m, apart_n = block_m // thread_m, block_n // thread_n
    width_m, width_n = block_m + 1, block_n + 1  # an odd width spreads a column over the banks
    of = precision(dtype)
    real, load, store = of.real, of.load, of.store
    offset = group_offset(batch_dims, 1, types.uint64)

    @kernel(threads)
    def matmul(
        out, a, b, batch_shape, a_batch, b_batch, batches, m, n, k, a_row, a_column, b_row, b_column
    ):
        a_tile = cuda.shared.array((block_k, width_m), real)
        b_tile = cuda.shared.array((block_k, width_n), real)
        sums = cuda.local.array((thread_m, thread_n), real)
        a_values = cuda.local.array(thread_m, real)
        b_values = cuda.local.array(thread_n, real)
        thread = cuda.threadIdx.x
        # A thread's rows lie `apart_m` apart, its columns `apart_n`: neighbouring threads read and
        # write neighbouring numbers.
        my_row, my_column = thread // apart_n, thread % apart_n
        across = (n + block_n - 1) // block_n
        row0 = types.int64(cuda.blockIdx.x // across) * block_m
        column0 = types.int64(cuda.blockIdx.x % across) * block_n

        for batch in range(cuda.blockIdx.y, batches, cuda.gridDim.y):
            a_start = offset(batch, batch_shape, a_batch)
            b_start = offset(batch, batch_shape, b_batch)
            for i in range(thread_m):
                for j in range(thread_n):
                    sums[i, j] = real(0)

            for k0 in range(0, k, block_k):
                # The tile of a, (k, m), and that of b, (k, n). Beyond an edge the edge's number is
                # read and 0 taken: a branch would hold up the reads after it.
                for step in range(block_m * block_k // threads):
                    e = thread + step * threads
                    r, c = (e // block_k, e % block_k) if a_by_rows else (e % block_m, e // block_m)
                    row, column = row0 + r, k0 + c
                    p = a_start + min(row, m - 1) * a_row + min(column, k - 1) * a_column
                    number = load(a[p])
                    a_tile[c, r] = number if row < m and column < k else real(0)
                for step in range(block_n * block_k // threads):
                    e = thread + step * threads
                    r, c = (e // block_n, e % block_n) if b_by_rows else (e % block_k, e // block_k)
                    row, column = k0 + r, column0 + c
                    p = b_start + min(row, k - 1) * b_row + min(column, n - 1) * b_column
                    number = load(b[p])
                    b_tile[r, c] = number if row < k and column < n else real(0)
                cuda.syncthreads()

                for kk in range(block_k):
                    for i in range(thread_m):
                        a_values[i] = a_tile[kk, my_row + i * apart_m]
                    for j in range(thread_n):
                        b_values[j] = b_tile[kk, my_column + j * apart_n]
                    for i in range(thread_m):
                        for j in range(thread_n):
                            sums[i, j] += a_values[i] * b_values[j]
                cuda.syncthreads()

            for i in range(thread_m):
                for j in range(thread_n):
                    r, c = row0 + my_row + i * apart_m, column0 + my_column + j * apart_n
                    if r < m and c < n:
                        out[(batch * m + r) * n + c] = store(sums[i, j])

    return matmul


def matmul_into(out: Any, a: View, b: View) -> None:
    """a (..., m, k) @ b (..., k, n), batch dimensions equal (repeated ones have strides of 0).

    Args:
        out: numba array, contiguous, of the dtype of a and b.
        a: left factor, any strides.
        b: right factor.

    """
    (m, k), n = a.shape[-2:], b.shape[-1]
    batch = a.shape[:-2]
    batches = prod(batch)
    if batches * m * n == 0:
        return
    shape, (a_batch, b_batch) = merge_dimensions(batch, a.strides[:-2], b.strides[:-2])
    # The sums of a large tile in float64 would not fit the registers.
    tiles = LARGE if min(m, n) >= 256 and a.dtype != "float64" else SMALL
    a_by_rows, b_by_rows = a.strides[-1] <= a.strides[-2], b.strides[-1] <= b.strides[-2]
    grid = ceil_div(m, tiles.block_m) * ceil_div(n, tiles.block_n), min(batches, MOST_GRID_Y)
    launch(
        matmul_kernel(a.dtype, len(shape), a_by_rows, b_by_rows, tiles),
        grid,
        tiles.threads,
        *(out, a.array, b.array, shape, a_batch, b_batch, batches, m, n, k),
        *(*a.strides[-2:], *b.strides[-2:]),
    )


def instances() -> Iterator[Instance]:
    """Kernels for the compile tests."""
    for dtype, tiles, a_by_rows, b_by_rows in (
        ("float32", LARGE, True, True),
        ("float32", LARGE, True, False),
        ("float32", LARGE, False, True),
        ("float32", SMALL, True, True),
        ("float64", SMALL, True, True),
        ("float16", LARGE, True, True),
        ("bfloat16", LARGE, True, True),
    ):
        array, ints = precision(dtype).array, types.UniTuple(types.int64, 1)
        yield Instance(
            f"matmul[{dtype}, {tiles.block_m}x{tiles.block_n}, {a_by_rows=}, {b_by_rows=}]",
            matmul_kernel(dtype, 1, a_by_rows, b_by_rows, tiles),
            (array, array, array, ints, ints, ints) + (types.int64,) * 8,
            most_registers=128 if tiles is LARGE else 64,
        )
