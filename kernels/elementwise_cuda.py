"""Elementwise operations on the GPU: out[i] = fn(x[i]) and out[i] = fn(x[i], y[i]), broadcast.

All operands share one shape; strides say where each keeps its elements, 0 where it repeats one. The
host first merges dimensions that lie one after the other in memory (`merge_dimensions`), so that a
contiguous tensor of any shape is one long row, and a bias added to a batch is two dimensions.
Then a thread takes `lanes` neighbours along the last dimension, 16 bytes where that is possible.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import cache, lru_cache
from math import prod
from typing import Any, NamedTuple

import numba
import numpy as np

from .gpu.ptx import SIXTEEN_BITS
from .gpu.runtime import (
    SIMULATED,
    Instance,
    Precision,
    ceil_div,
    cuda,
    device_function,
    kernel,
    launch,
    precision,
    types,
)
from .gpu.scalar import scalar_function
from .gpu.vectors import BYTES, vector_access

THREADS = 32 if SIMULATED else 256
# A thread reads this many groups before it computes: they are on their way together.
AT_ONCE = 2
# A thread that has done its share goes on with the next: the grid may be smaller than the work.
MOST_BLOCKS = 2 if SIMULATED else 1 << 20

Ints = tuple[int, ...]


class View(NamedTuple):
    """Elements in device memory, as an operand.

    Args:
        array: one-dimensional numba array.
        address: of its first element.
        dtype: name of a `Precision`, or "mask" for bytes that are 0 or not.
        shape: sizes.
        strides: in elements, 0 or more.

    """

    array: Any
    address: int
    dtype: str
    shape: Ints
    strides: Ints


@cache
def operand_precision(dtype: str) -> Precision:
    """The `Precision` of an operand; masks are bytes."""
    if dtype != "mask":
        return precision(dtype)

    @device_function
    def same(x):
        return x

    return Precision("mask", np.dtype(np.uint8), types.uint8, same, same)


# ----- shapes, on the host -----


def merge_dimensions(shape: Ints, *strides: Ints) -> tuple[Ints, list[Ints]]:
    """The same elements in the same order, with as few dimensions as possible.

    Args:
        shape: of all operands.
        strides: of each operand.

    Returns:
        A shape of one dimension or more and the strides in it. (B, N, D) contiguous becomes
        (B N D,); with a second operand of strides (0, 0, 1), (B N, D).

    """
    sizes: list[int] = []
    steps: list[list[int]] = [[] for _ in strides]
    for d, size in enumerate(shape):
        if size == 1:
            continue
        if sizes and all(
            s[-1] == size * stride[d] for s, stride in zip(steps, strides, strict=True)
        ):
            sizes[-1] *= size
            for s, stride in zip(steps, strides, strict=True):
                s[-1] = stride[d]
        else:
            sizes.append(size)
            for s, stride in zip(steps, strides, strict=True):
                s.append(stride[d])
    if not sizes:
        return (1,), [(1,) for _ in strides]
    return tuple(sizes), [tuple(s) for s in steps]


def broadcast_strides(shape: Ints, x_shape: Ints, x_strides: Ints) -> Ints:
    """Strides of x as a tensor of `shape`, to which it broadcasts: 0 where it is repeated."""
    missing = len(shape) - len(x_shape)
    steps = [0 if n == 1 else step for n, step in zip(x_shape, x_strides, strict=True)]
    return (0,) * missing + tuple(steps)


class Plan(NamedTuple):
    """How a launch goes through its operands.

    Args:
        shape: with dimensions merged.
        strides: of each operand in it, the output's first.
        lanes: neighbours along the last dimension that a thread takes at once.
        repeats: for each operand, whether these neighbours are one number, repeated.
        groups: how many times `lanes` neighbours there are.

    """

    shape: Ints
    strides: tuple[Ints, ...]
    lanes: int
    repeats: tuple[bool, ...]
    groups: int


def make_plan(out: View, *inputs: View) -> Plan:
    """The plan for inputs that broadcast to `out`."""
    strides = [broadcast_strides(out.shape, x.shape, x.strides) for x in inputs]
    sizes = [operand_precision(x.dtype).storage.itemsize for x in (out, *inputs)]
    # Of an address only its alignment counts, so that one plan serves many.
    offsets = [x.address % BYTES for x in (out, *inputs)]
    return _plan(out.shape, (out.strides, *strides), tuple(sizes), tuple(offsets))


@lru_cache(4096)
def _plan(shape: Ints, strides: tuple[Ints, ...], sizes: Ints, offsets: Ints) -> Plan:
    shape, merged = merge_dimensions(shape, *strides)
    strides = tuple(merged)
    # An operand that repeats one number is not read as a vector: its size does not matter.
    lanes = BYTES // max(n for n, steps in zip(sizes, strides, strict=True) if steps[-1] != 0)
    while lanes > 1 and not all(
        _allows(lanes, shape, *operand) for operand in zip(strides, sizes, offsets, strict=True)
    ):
        lanes //= 2
    repeats = tuple(lanes > 1 and steps[-1] == 0 for steps in strides)
    groups = ceil_div(shape[-1], lanes) * prod(shape[:-1])
    return Plan(shape, strides, lanes, repeats, groups)


def _allows(lanes: int, shape: Ints, strides: Ints, itemsize: int, offset: int) -> bool:
    """Whether each group of `lanes` neighbours is one number, or lies together and aligned."""
    if len(shape) > 1 and shape[-1] % lanes != 0:  # the end of one long row is seen to
        return False
    if strides[-1] == 0:
        return True
    aligned = offset % (lanes * itemsize) == 0 and all(step % lanes == 0 for step in strides[:-1])
    return aligned and strides[-1] == 1


# ----- inside kernels -----


@cache
def group_place(dims: int, lanes: int, index: Any) -> Any:
    """Device function: the index of the first element of group number `group`, into `place`.

    Args:
        dims: number of dimensions.
        lanes: neighbours along the last dimension that make a group.
        index: numba type of the divisions: 64-bit ones take four times as long.

    """

    @device_function
    def find_place(group, shape, place):
        rest = index(group)
        for back in range(dims - 1):  # from the last dimension to the second
            d = dims - 1 - back
            size = index(shape[d]) // index(lanes) if back == 0 else index(shape[d])
            quotient = rest // size
            place[d] = types.int64(rest - quotient * size) * (lanes if back == 0 else 1)
            rest = quotient
        place[0] = types.int64(rest) * (lanes if dims == 1 else 1)

    return find_place


@cache
def place_offset(dims: int) -> Any:
    """Device function: where the element at an index lies in an operand."""

    @device_function
    def find_offset(place, strides):
        position = place[0] * strides[0]
        for d in range(1, dims):
            position += place[d] * strides[d]
        return position

    return find_offset


@cache
def group_offset(dims: int, lanes: int, index: Any) -> Any:
    """Device function: where group number `group` begins in an operand; see `group_place`."""
    find_place, find_offset = group_place(dims, lanes, index), place_offset(dims)

    @device_function
    def offset(group, shape, strides):
        place = cuda.local.array(dims, types.int64)
        find_place(group, shape, place)
        return find_offset(place, strides)

    return offset


@cache
def group_load(source: Precision, lanes: int, repeat: bool) -> Any:
    """Device function: `values[at + k]` = element k of a group, or `repeat` its one number."""
    load_vector, _ = vector_access(lanes)
    storage = numba.from_dtype(source.storage)
    load = source.load

    @device_function
    def load_group(x, first, values, at):
        stored = cuda.local.array(lanes, storage)
        load_vector(x, first, stored)
        for k in range(lanes):
            values[at + k] = load(stored[k])

    @device_function
    def load_repeated(x, first, values, at):
        number = load(x[first])
        for k in range(lanes):
            values[at + k] = number

    return load_repeated if repeat else load_group


# ----- out = fn(x) -----


@cache
def map_kernel(
    fn: Callable[[float], float],
    out_dtype: str,
    x_dtype: str,
    dims: int,
    lanes: int,
    repeats: tuple[bool, ...],
    wide: bool = False,
) -> Any:
    """The kernel out[i] = fn(x[i]).

    Args:
        fn: number -> number, computed in the precision of x.
        out_dtype: of the output, which may differ: a cast is the map of the identity.
        x_dtype: of the input.
        dims: number of dimensions.
        lanes: neighbours that a thread takes at once.
        repeats: whether they are one number, for out (never) and x.
        wide: whether there are 2**31 groups or more.

    """
    to, of = operand_precision(out_dtype), operand_precision(x_dtype)
    real, out_real, store, load = of.real, to.real, to.store, of.load
    storage = numba.from_dtype(to.storage)
    scalar = scalar_function(fn, real, approximate=to.name in SIXTEEN_BITS)
    find_place = group_place(dims, lanes, types.uint64 if wide else types.uint32)
    offset = place_offset(dims)
    load_group = group_load(of, lanes, repeats[1])
    _, store_vector = vector_access(lanes)
    held = AT_ONCE * lanes

    @kernel(THREADS)
    def map_elements(out, x, shape, out_strides, x_strides, groups):
        values = cuda.local.array(held, real)
        results = cuda.local.array(lanes, storage)
        place = cuda.local.array(dims, types.int64)
        targets = cuda.local.array(AT_ONCE, types.int64)
        threads = cuda.gridsize(1)
        whole = shape[0] // lanes if dims == 1 else groups
        group0 = cuda.grid(1)
        while group0 < whole:
            for u in range(AT_ONCE):
                # Past the end the own first group is read again, to no effect: a branch would hold
                # up the reads after it, and another thread's group may be written at this time.
                group = group0 + u * threads
                find_place(group if group < whole else group0, shape, place)
                targets[u] = offset(place, out_strides)
                load_group(x, offset(place, x_strides), values, u * lanes)
            for u in range(AT_ONCE):
                if group0 + u * threads < whole:
                    for k in range(lanes):
                        results[k] = store(out_real(scalar(values[u * lanes + k])))
                    store_vector(out, targets[u], results)
            group0 += AT_ONCE * threads
        # The end of one long row, shorter than a group.
        i = whole * lanes + cuda.grid(1)
        if dims == 1 and i < shape[0]:
            out[i * out_strides[0]] = store(out_real(scalar(load(x[i * x_strides[0]]))))

    return map_elements


def map_into(fn: Callable[[float], float], out: View, x: View) -> None:
    """out[i] = fn(x[i]), where x broadcasts to out."""
    plan = make_plan(out, x)
    if plan.groups == 0:
        return
    compiled = map_kernel(
        fn, out.dtype, x.dtype, len(plan.shape), plan.lanes, plan.repeats, plan.groups >= 1 << 31
    )
    launch(
        compiled, _blocks(plan), THREADS, out.array, x.array, plan.shape, *plan.strides, plan.groups
    )


# ----- out = fn(x, y) -----


@cache
def zip_kernel(
    fn: Callable[[float, float], float],
    out_dtype: str,
    x_dtype: str,
    y_dtype: str,
    dims: int,
    lanes: int,
    repeats: tuple[bool, ...],
    wide: bool = False,
) -> Any:
    """The kernel out[i] = fn(x[i], y[i]); see `map_kernel`. Computes in the precision of out."""
    to = operand_precision(out_dtype)
    of_x, of_y = operand_precision(x_dtype), operand_precision(y_dtype)
    real, store, load_x, load_y = to.real, to.store, of_x.load, of_y.load
    storage = numba.from_dtype(to.storage)
    scalar = scalar_function(fn, real, approximate=to.name in SIXTEEN_BITS)
    find_place = group_place(dims, lanes, types.uint64 if wide else types.uint32)
    offset = place_offset(dims)
    load_x_group = group_load(of_x, lanes, repeats[1])
    load_y_group = group_load(of_y, lanes, repeats[2])
    _, store_vector = vector_access(lanes)
    held = AT_ONCE * lanes

    @kernel(THREADS)
    def zip_elements(out, x, y, shape, out_strides, x_strides, y_strides, groups):
        x_values = cuda.local.array(held, real)
        y_values = cuda.local.array(held, real)
        results = cuda.local.array(lanes, storage)
        place = cuda.local.array(dims, types.int64)
        targets = cuda.local.array(AT_ONCE, types.int64)
        threads = cuda.gridsize(1)
        whole = shape[0] // lanes if dims == 1 else groups
        group0 = cuda.grid(1)
        while group0 < whole:
            for u in range(AT_ONCE):
                group = group0 + u * threads
                find_place(group if group < whole else group0, shape, place)
                targets[u] = offset(place, out_strides)
                load_x_group(x, offset(place, x_strides), x_values, u * lanes)
                load_y_group(y, offset(place, y_strides), y_values, u * lanes)
            for u in range(AT_ONCE):
                if group0 + u * threads < whole:
                    for k in range(lanes):
                        at = u * lanes + k
                        results[k] = store(real(scalar(x_values[at], y_values[at])))
                    store_vector(out, targets[u], results)
            group0 += AT_ONCE * threads
        # The end of one long row, shorter than a group.
        i = whole * lanes + cuda.grid(1)
        if dims == 1 and i < shape[0]:
            x_value, y_value = real(load_x(x[i * x_strides[0]])), real(load_y(y[i * y_strides[0]]))
            out[i * out_strides[0]] = store(real(scalar(x_value, y_value)))

    return zip_elements


def zip_into(fn: Callable[[float, float], float], out: View, x: View, y: View) -> None:
    """out[i] = fn(x[i], y[i]), where x and y broadcast to out."""
    plan = make_plan(out, x, y)
    if plan.groups == 0:
        return
    compiled = zip_kernel(
        fn,
        out.dtype,
        x.dtype,
        y.dtype,
        len(plan.shape),
        plan.lanes,
        plan.repeats,
        plan.groups >= 1 << 31,
    )
    arrays = out.array, x.array, y.array
    launch(compiled, _blocks(plan), THREADS, *arrays, plan.shape, *plan.strides, plan.groups)


def _blocks(plan: Plan) -> int:
    return min(ceil_div(plan.groups, AT_ONCE * THREADS), MOST_BLOCKS)


# ----- instances for the compile tests -----


def instances(
    maps: Iterable[Callable[[float], float]], zips: Iterable[Callable[[float, float], float]]
) -> Iterator[Instance]:
    """Kernels of these functions: the first in every layout and dtype, the others in float32."""
    for number, fn in enumerate(maps):
        for dtype, dims, lanes in _layouts(every=number == 0):
            yield _map_instance(fn, dtype, dims, lanes)
    for number, function in enumerate(zips):
        for dtype, dims, lanes in _layouts(every=number == 0):
            yield _zip_instance(function, dtype, dtype, dims, lanes, False)
            if number == 0 and lanes > 1:
                yield _zip_instance(function, dtype, dtype, dims, lanes, True)
            if number == 0 and dtype in ("float16", "bfloat16"):  # beside a Python number
                yield _zip_instance(function, dtype, "float32", dims, lanes, True)


def _layouts(every: bool) -> Iterator[tuple[str, int, int]]:
    """Dtypes, numbers of dimensions and lanes."""
    yield "float32", 1, 4
    if every:
        yield from (("float32", 2, 4), ("float32", 3, 2), ("float32", 4, 1))
        yield from (("float64", 1, 2), ("float16", 2, 8), ("bfloat16", 1, 8))


def _map_instance(fn: Any, dtype: str, dims: int, lanes: int) -> Instance:
    array, ints = precision(dtype).array, types.UniTuple(types.int64, dims)
    return Instance(
        f"map[{fn.__name__}, {dtype}, dims={dims}, lanes={lanes}]",
        map_kernel(fn, dtype, dtype, dims, lanes, (False, False)),
        (array, array, ints, ints, ints, types.int64),
        most_registers=64,
    )


def _zip_instance(
    fn: Any, dtype: str, y_dtype: str, dims: int, lanes: int, repeat: bool
) -> Instance:
    array, ints = precision(dtype).array, types.UniTuple(types.int64, dims)
    return Instance(
        f"zip[{fn.__name__}, {dtype}, {y_dtype}, dims={dims}, lanes={lanes}, repeat={repeat}]",
        zip_kernel(fn, dtype, dtype, y_dtype, dims, lanes, (False, False, repeat)),
        (array, array, precision(y_dtype).array, ints, ints, ints, ints, types.int64),
        most_registers=64,
    )
