"""Folding one dimension of a tensor on the GPU: out[i] = fn(start, fn(x[i, 0], fn(x[i, 1], ...))).

`fn` must be associative and commutative, as for every parallel fold (sum, product, maximum). The
order in which it is applied depends on the shape alone, so a second run gives the same bits.

A block holds `fold_lanes` threads for each of `THREADS // fold_lanes` outputs. They step through
their fold side by side, and meet in a tree in shared memory. Where folds are few and long they are
cut into chunks, one block each, and a second launch folds what the chunks gave.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import cache, lru_cache
from math import prod
from typing import Any, NamedTuple

import numpy as np

from .elementwise_cuda import Ints, View, group_offset, merge_dimensions
from .runtime import SIMULATED, Instance, ceil_div, cuda, kernel, launch, precision, types
from .scalar_cuda import scalar_function

THREADS = 32 if SIMULATED else 256
WANTED_BLOCKS = 2 if SIMULATED else 512  # enough to occupy a large GPU
LEAST_STEPS = 16  # that a thread takes before its fold is worth cutting into more chunks


class FoldPlan(NamedTuple):
    """How a fold is cut up.

    Args:
        shape: of the dimensions that are kept, merged.
        strides: of x along them.
        length: of the fold.
        step: between neighbours of the fold.
        along_row: whether neighbouring threads read neighbours of one fold, or of the outputs.
        fold_lanes: threads for each output.
        per_chunk: elements of a fold that a block takes.
        chunks: of each fold.

    """

    shape: Ints
    strides: Ints
    length: int
    step: int
    along_row: bool
    fold_lanes: int
    per_chunk: int
    chunks: int

    @property
    def outputs(self) -> int:
        """Number of folds."""
        return prod(self.shape)


@lru_cache(4096)
def make_plan(shape: Ints, strides: Ints, dim: int) -> FoldPlan:
    """The plan of a fold over dimension `dim`, which is not empty."""
    length, step = shape[dim], strides[dim]
    kept = tuple(d for d in range(len(shape)) if d != dim)
    merged, (steps,) = merge_dimensions(
        tuple(shape[d] for d in kept), tuple(strides[d] for d in kept)
    )
    outputs = prod(merged)
    # Along which dimension do neighbouring threads find neighbours in memory?
    along_row = outputs == 1 or step < min(s for s in steps if s or len(steps) == 1)
    if along_row:
        fold_lanes = 1 if length <= 8 else 8 if length <= 64 else 32 if length <= 1024 else THREADS
    else:
        fold_lanes = 1 if length <= 32 else 8
    fold_lanes = min(fold_lanes, THREADS)
    blocks = max(ceil_div(outputs, THREADS // fold_lanes), 1)
    chunks = min(ceil_div(WANTED_BLOCKS, blocks), ceil_div(length, fold_lanes * LEAST_STEPS))
    per_chunk = ceil_div(length, chunks)
    return FoldPlan(
        merged, steps, length, step, along_row, fold_lanes, per_chunk, ceil_div(length, per_chunk)
    )


@cache
def fold_kernel(
    fn: Callable[[float, float], float],
    out_dtype: str,
    x_dtype: str,
    dims: int,
    fold_lanes: int,
    along_row: bool,
    final: bool,
    wide: bool = False,
) -> Any:
    """The kernel that folds one chunk of each output.

    Args:
        fn: two numbers -> number, computed in float32 for the 16-bit types.
        out_dtype: of the output, or of what the chunks give.
        x_dtype: of the input.
        dims: number of dimensions that are kept.
        fold_lanes: threads for each output, a power of two.
        along_row: whether the threads of one output are neighbours.
        final: whether `start` is to be folded in.
        wide: whether there are 2**31 outputs or more.

    """
    to, of = precision(out_dtype), precision(x_dtype)
    real, store, load = of.real, to.store, of.load
    scalar = scalar_function(fn, real)
    offset = group_offset(dims, 1, types.uint64 if wide else types.uint32)
    outputs_of_block = THREADS // fold_lanes

    @kernel(THREADS)
    def fold(out, x, shape, strides, outputs, length, step, per_chunk, start):
        partial = cuda.shared.array(THREADS, real)
        thread = cuda.threadIdx.x
        if along_row:
            slot, lane = thread // fold_lanes, thread % fold_lanes
        else:
            slot, lane = thread % outputs_of_block, thread // outputs_of_block
        output = types.int64(cuda.blockIdx.x) * outputs_of_block + slot
        chunk = types.int64(cuda.blockIdx.y)
        first = chunk * per_chunk
        end = min(first + per_chunk, length)

        total = real(0)
        if output < outputs and first + lane < end:
            p = offset(output, shape, strides) + (first + lane) * step
            stride = fold_lanes * step
            total = load(x[p])
            mine = (end - first - lane + fold_lanes - 1) // fold_lanes  # elements of this thread
            for _ in range(1, mine):
                p += stride
                total = real(scalar(total, load(x[p])))

        # The tree: lane 0 takes lane 1's, both having taken those further up. Lanes beyond the end
        # of the chunk have nothing to give.
        half = fold_lanes // 2
        while half > 0:
            partial[slot * fold_lanes + lane] = total
            cuda.syncthreads()
            if lane < half and first + lane + half < end:
                total = real(scalar(total, partial[slot * fold_lanes + lane + half]))
            cuda.syncthreads()
            half //= 2

        if lane == 0 and output < outputs:
            if final:
                total = real(scalar(start, total))
            out[chunk * outputs + output] = store(total)

    return fold


def fold_into(
    fn: Callable[[float, float], float],
    start: float,
    out: Any,
    x: View,
    plan: FoldPlan,
    workspace: Any,
) -> None:
    """Fold dimension `dim` of x into `out`, contiguous and of the dtype of x.

    Args:
        fn: two numbers -> number.
        start: folded in once.
        out: numba array of `plan.outputs` elements.
        x: the input.
        plan: `make_plan(x.shape, x.strides, dim)`.
        workspace: None if there is one chunk, else a numba array of `plan.chunks * plan.outputs`
            elements of `workspace_dtype(x.dtype)`.

    """
    if plan.outputs == 0:
        return
    if plan.chunks == 1:
        _launch(fn, start, out, x.dtype, x.array, x.dtype, plan, final=True)
        return
    partial = workspace_dtype(x.dtype)
    _launch(fn, start, workspace, partial, x.array, x.dtype, plan, final=False)
    rest = FoldPlan(
        shape=(plan.outputs,),
        strides=(1,),
        length=plan.chunks,
        step=plan.outputs,
        along_row=plan.outputs == 1,
        fold_lanes=min(32, THREADS),
        per_chunk=plan.chunks,
        chunks=1,
    )
    _launch(fn, start, out, x.dtype, workspace, partial, rest, final=True)


def workspace_dtype(dtype: str) -> str:
    """In which the chunks' results wait for the second launch."""
    return "float64" if dtype == "float64" else "float32"


def _launch(
    fn: Any, start: float, out: Any, out_dtype: str, x: Any, dtype: str, plan: FoldPlan, final: bool
) -> None:
    outputs = plan.outputs
    wide = outputs >= 1 << 31
    compiled = fold_kernel(
        fn, out_dtype, dtype, len(plan.shape), plan.fold_lanes, plan.along_row, final, wide
    )
    grid = ceil_div(outputs, THREADS // plan.fold_lanes), plan.chunks
    launch(
        compiled,
        grid,
        THREADS,
        *(out, x, plan.shape, plan.strides, outputs, plan.length, plan.step, plan.per_chunk),
        np.dtype(workspace_dtype(dtype)).type(start),
    )


# ----- instances for the compile tests -----


def instances(folds: Iterable[Callable[[float, float], float]]) -> Iterator[Instance]:
    """Kernels of these functions: the first in every layout and dtype, the others in float32."""
    for number, fn in enumerate(folds):
        for dtype in ("float32", "float64", "float16", "bfloat16") if number == 0 else ("float32",):
            yield _instance(fn, dtype, dtype, 1, 8, along_row=False, final=True)
            yield _instance(fn, workspace_dtype(dtype), dtype, 2, 32, along_row=True, final=False)
    yield _instance(fn, "float32", "float32", 3, 1, along_row=False, final=True)
    yield _instance(fn, "float32", "float32", 1, 256, along_row=True, final=True)


def _instance(
    fn: Any, out_dtype: str, dtype: str, dims: int, lanes: int, along_row: bool, final: bool
) -> Instance:
    ints = types.UniTuple(types.int64, dims)
    return Instance(
        f"fold[{fn.__name__}, {dtype}, dims={dims}, lanes={lanes}, row={along_row}, {final=}]",
        fold_kernel(fn, out_dtype, dtype, dims, lanes, along_row, final),
        (precision(out_dtype).array, precision(dtype).array, ints, ints)
        + (types.int64,) * 4
        + (precision(dtype).real,),
        most_registers=128,
    )
