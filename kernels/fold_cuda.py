"""Folding one dimension of a tensor on the GPU: out[i] = fn(start, fn(x[i, 0], fn(x[i, 1], ...))).

`fn` must be associative and commutative, as for every parallel fold (sum, product, maximum). The
order in which it is applied depends on the shape alone, so a second run gives the same bits.

A block holds `fold_lanes` threads for each of `THREADS // fold_lanes` outputs (or groups of them,
where those lie side by side). They step through their fold together, 16 bytes at a time where that
is possible, `AHEAD` times that before the first is waited for. What they found meets in a tree of
shuffles within a warp, then in shared memory. Where folds are few and long they are cut into
chunks, one block each, and a second launch folds what the chunks gave.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import cache, lru_cache
from math import prod
from typing import Any, NamedTuple

import numba
import numpy as np

from .elementwise_cuda import Ints, View, group_offset, merge_dimensions
from .gpu.runtime import (
    SIMULATED,
    WARP,
    Instance,
    ceil_div,
    cuda,
    device_function,
    kernel,
    launch,
    precision,
    shuffle_xor,
    types,
)
from .gpu.scalar import scalar_function
from .gpu.vectors import BYTES, longest_vector, vector_load_or

THREADS = 32 if SIMULATED else 256
TREE = 8 if SIMULATED else WARP  # threads that meet by shuffles
AHEAD = 2 if SIMULATED else 4  # groups that a thread reads at once
WANTED_BLOCKS = 2 if SIMULATED else 512  # enough to occupy a large GPU
LEAST_STEPS = 16  # that a thread takes before its fold is worth cutting into more chunks


class FoldPlan(NamedTuple):
    """How a fold is cut up.

    Args:
        shape: of the dimensions that are kept, merged.
        strides: of x along them.
        length: of the fold, in groups if `along_row`.
        step: from one element, or group, of the fold to the next.
        along_row: whether neighbouring threads read neighbours of one fold, or of the outputs.
        lanes: neighbours that a thread reads at once, a group: of its fold if `along_row`, else of
            its outputs.
        fold_lanes: threads for each output, or group of outputs.
        per_chunk: of `length`, what a block takes.
        chunks: of each fold.

    """

    shape: Ints
    strides: Ints
    length: int
    step: int
    along_row: bool
    lanes: int
    fold_lanes: int
    per_chunk: int
    chunks: int

    @property
    def outputs(self) -> int:
        """Number of folds."""
        return prod(self.shape)


def make_plan(x: View, dim: int) -> FoldPlan:
    """The plan of a fold over dimension `dim` of x, which is not empty."""
    itemsize = precision(x.dtype).storage.itemsize
    return _plan(x.shape, x.strides, dim, itemsize, x.address % BYTES)


@lru_cache(4096)
def _plan(shape: Ints, strides: Ints, dim: int, itemsize: int, address: int) -> FoldPlan:
    length, step = shape[dim], strides[dim]
    kept = tuple(d for d in range(len(shape)) if d != dim)
    merged, (steps,) = merge_dimensions(
        tuple(shape[d] for d in kept), tuple(strides[d] for d in kept)
    )
    # Along which dimension do neighbouring threads find neighbours in memory?
    along_row = prod(merged) == 1 or step < min(s for s in steps if s or len(steps) == 1)
    lanes = BYTES // itemsize
    unit, size = (step, length) if along_row else (steps[-1], merged[-1])
    others = steps if along_row else (*steps[:-1], step)
    if prod(merged) == 1 and along_row:
        others = ()
    while lanes > 1 and (
        unit != 1
        or address % (lanes * itemsize) != 0
        or any(n % lanes != 0 for n in (size, *others))
    ):
        lanes //= 2
    if along_row:
        length, step = length // lanes, step * lanes
    return _cut(merged, steps, length, step, along_row, lanes)


def _cut(
    shape: Ints, strides: Ints, length: int, step: int, along_row: bool, lanes: int
) -> FoldPlan:
    """Choose the number of threads for each output, and of chunks."""
    if along_row:
        fold_lanes = 1 if length <= 4 else 8 if length <= 32 else 32 if length <= 512 else THREADS
    else:
        fold_lanes = 1 if length <= 32 else 8
    fold_lanes = min(fold_lanes, THREADS)
    outputs = prod(shape) if along_row else prod(shape) // lanes
    blocks = max(ceil_div(outputs, THREADS // fold_lanes), 1)
    chunks = min(ceil_div(WANTED_BLOCKS, blocks), ceil_div(length, fold_lanes * LEAST_STEPS))
    per_chunk = ceil_div(length, chunks)
    chunks = ceil_div(length, per_chunk)
    return FoldPlan(shape, strides, length, step, along_row, lanes, fold_lanes, per_chunk, chunks)


@cache
def fold_kernel(
    fn: Callable[[float, float], float],
    out_dtype: str,
    x_dtype: str,
    dims: int,
    lanes: int,
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
        lanes: neighbours that a thread reads at once, see `FoldPlan`.
        fold_lanes: threads for each output, a power of two.
        along_row: whether the threads of one output are neighbours.
        final: whether `start` is to be folded in.
        wide: whether there are 2**31 outputs or more.

    """
    to, of = precision(out_dtype), precision(x_dtype)
    real, load, store = of.real, of.load, to.store
    storage, storage_of_x = numba.from_dtype(of.storage), of.store
    scalar = scalar_function(fn, real)
    width = 1 if along_row else lanes  # outputs of a thread
    offset = group_offset(dims, width, types.uint64 if wide else types.uint32)
    load_group = vector_load_or(lanes, of.storage.itemsize)
    slots = THREADS // fold_lanes
    tree = min(fold_lanes, TREE) if along_row else 1
    meeting = fold_lanes // tree  # threads of one output that meet in shared memory
    shared_size, held = THREADS * width, AHEAD * lanes
    # Enough to number a chunk's groups, in half the instructions of 64 bits; to each sum anew,
    # since numba would go on in 64.
    short = types.uint32

    @device_function
    def read(x, p, step, groups, values):
        """The first AHEAD of so many groups, a step apart."""
        one = cuda.local.array(lanes, storage)
        for n in range(AHEAD):
            load_group(x, p + n * step, n < groups, storage_of_x(real(0)), one)
            for k in range(lanes):
                values[n * lanes + k] = one[k]

    @kernel(THREADS)
    def fold(out, x, shape, strides, outputs, length, step, per_chunk, start):
        partial = cuda.shared.array(shared_size, real)
        totals = cuda.local.array(lanes, real)
        values = cuda.local.array(held, storage)
        thread = short(cuda.threadIdx.x)
        if along_row:
            slot, lane = short(thread // fold_lanes), short(thread % fold_lanes)
        else:
            slot, lane = short(thread % slots), short(thread // slots)
        output = types.int64(cuda.blockIdx.x) * slots + slot  # or group of outputs
        chunk = types.int64(cuda.blockIdx.y)
        first = chunk * per_chunk
        present = short(min(per_chunk, length - first))  # groups, of all threads

        if output * width < outputs:
            p = offset(output, shape, strides) + (first + lane) * step
            step *= fold_lanes
            groups = short(short(present - lane + fold_lanes - 1) // fold_lanes)  # of this thread
            read(x, p, step, groups, values)
            for k in range(lanes):
                totals[k] = load(values[k])
            for n in range(1, AHEAD):
                if n < groups:
                    for k in range(lanes):
                        totals[k] = real(scalar(totals[k], load(values[n * lanes + k])))
            while groups > AHEAD:
                groups = short(groups - AHEAD)
                p += AHEAD * step
                read(x, p, step, groups, values)
                for n in range(AHEAD):
                    if n < groups:
                        for k in range(lanes):
                            totals[k] = real(scalar(totals[k], load(values[n * lanes + k])))
            if along_row:  # the lanes are of one fold
                for k in range(1, lanes):
                    totals[0] = real(scalar(totals[0], totals[k]))

        # The tree: lane 0 takes lane 1's, both having taken those further up. Lanes beyond the end
        # of the chunk have nothing to give.
        half = tree // 2
        while half > 0:
            theirs = real(shuffle_xor(totals[0], half))
            if lane % tree < half and short(lane + half) < present:
                totals[0] = real(scalar(totals[0], theirs))
            half //= 2
        if meeting > 1:
            if lane % tree == 0:
                for k in range(width):
                    partial[k * THREADS + thread] = totals[k]
            cuda.syncthreads()
            if lane == 0:
                for n in range(1, meeting):
                    if n * tree < present:
                        other = thread + n * (tree if along_row else slots)
                        for k in range(width):
                            totals[k] = real(scalar(totals[k], partial[k * THREADS + other]))

        if lane == 0 and output * width < outputs:
            for k in range(width):
                total = totals[k]
                if final:
                    total = real(scalar(start, total))
                out[chunk * outputs + output * width + k] = store(total)

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
        plan: `make_plan(x, dim)`.
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
    rest = make_plan(View(workspace, 0, partial, (plan.chunks, plan.outputs), (plan.outputs, 1)), 0)
    rest = rest._replace(per_chunk=rest.length, chunks=1)
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
        fn,
        out_dtype,
        dtype,
        len(plan.shape),
        plan.lanes,
        plan.fold_lanes,
        plan.along_row,
        final,
        wide,
    )
    width = 1 if plan.along_row else plan.lanes
    grid = ceil_div(outputs // width, THREADS // plan.fold_lanes), plan.chunks
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
            partial, lanes = workspace_dtype(dtype), longest_vector(dtype)
            yield _instance(fn, dtype, dtype, 1, lanes, 8, along_row=False, final=True)
            yield _instance(fn, partial, dtype, 2, lanes, 32, along_row=True, final=False)
    yield _instance(fn, "float32", "float32", 3, 1, 1, along_row=False, final=True)
    yield _instance(fn, "float32", "float32", 1, 1, 256, along_row=True, final=True)


def _instance(
    fn: Any,
    out_dtype: str,
    dtype: str,
    dims: int,
    lanes: int,
    fold_lanes: int,
    along_row: bool,
    final: bool,
) -> Instance:
    ints = types.UniTuple(types.int64, dims)
    return Instance(
        f"fold[{fn.__name__}, {dtype}, {dims=}, {lanes=}, {fold_lanes=}, {along_row=}, {final=}]",
        fold_kernel(fn, out_dtype, dtype, dims, lanes, fold_lanes, along_row, final),
        (precision(out_dtype).array, precision(dtype).array, ints, ints)
        + (types.int64,) * 4
        + (precision(dtype).real,),
        most_registers=128,
    )
