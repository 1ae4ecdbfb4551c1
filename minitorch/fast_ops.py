"""FastOps, the backend people train with: loops compiled by numba for all cores, and BLAS.

`tensor_map`, `tensor_zip` and `tensor_reduce` build the loop of one scalar function, with
MiniTorch's signatures. Fused operations are in `fast_fused` and `kernels/`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numba
import numpy as np
import numpy.typing as npt
from numba import prange
from numba.core.errors import NumbaError, UnsupportedBytecodeError

from . import operators
from .fast_fused import FastFusedOps
from .ieee import quiet
from .kernels.cpu import simd, threads
from .kernels.cpu.blas import product
from .kernels.cpu.compiler import njit
from .kernels.cpu.jit import compiled, specialise
from .kernels.cpu.threads import fetch_add, run_on_threads, thread_count
from .tensor_data import TensorData, numpy_view, shape_broadcast
from .tensor_ops import (
    MapFn,
    MapProto,
    ZipFn,
    check_matmul,
    empty_output,
    folded_shape,
    map_output,
)

if TYPE_CHECKING:
    from .tensor import Tensor

    Array = npt.NDArray[Any]

# Below this many elements one core is done before a second one has woken up.
SERIAL = 1 << 17
# Elements that a thread takes at a time.
CHUNK = 1 << 14
# Sums that a reduction carries along side by side.
LANES = 64


class FastOps(FastFusedOps):
    """Compiled, parallel loops; results do not depend on the number of threads."""

    @staticmethod
    def map(fn: MapFn) -> MapProto:
        """See `TensorOps.map`. A mere copy is left to numpy, which has loops for every layout."""
        if fn is operators.id:
            return _copy
        worker = _worker(_map_worker, fn, keep=True)

        def apply(a: Tensor, out: Tensor | None = None, /) -> Tensor:
            target = map_output(a, out)
            _run(worker, target.size, *target.tuple(), *a.tuple())
            return target

        return apply

    @staticmethod
    def zip(fn: ZipFn) -> Callable[[Tensor, Tensor], Tensor]:
        """See `TensorOps.zip`. Tensors of two dtypes are computed in the larger one."""
        worker = _worker(_zip_worker, fn, keep=True)

        def apply(a: Tensor, b: Tensor) -> Tensor:
            if a.dtype == b.dtype:
                dtype = a.dtype
            else:
                dtype = np.promote_types(a.dtype, b.dtype)
                a, b = (x if x.dtype == dtype else FastOps.cast(x, dtype) for x in (a, b))
            out = empty_output(a, shape_broadcast(a.shape, b.shape), dtype)
            _run(worker, out.size, *out.tuple(), *a.tuple(), *b.tuple())
            return out

        return apply

    @staticmethod
    def reduce(fn: ZipFn, start: float = 0.0) -> Callable[[Tensor, int], Tensor]:
        """See `TensorOps.reduce`. Folds in float64, in the order of the elements."""
        worker = _worker(_reduce_worker, fn, keep=True)

        def apply(a: Tensor, dim: int) -> Tensor:
            dim, shape = folded_shape(a, dim)
            out = empty_output(a, shape)
            out._tensor._storage.fill(start)
            _run(worker, a.size, *out.tuple(), *a.tuple(), dim)
            return out

        return apply

    @staticmethod
    def matrix_multiply(a: Tensor, b: Tensor) -> Tensor:
        """See `TensorOps.matrix_multiply`; by BLAS."""
        check_matmul(a, b)
        return a._new(TensorData.from_array(matmul(a._tensor.array, b._tensor.array)))


def _worker(template: Callable[..., Any], fn: Callable[..., float], keep: bool) -> Any:
    """The loop of `template` with the scalar function `fn` in it."""
    if not keep:
        return specialise(template, fn=compiled(fn))
    return specialise(template, source=fn, files=(simd.__file__, threads.__file__), fn=compiled(fn))


def _run(worker: Any, size: int, *arguments: Any) -> None:
    """Call a worker on as many threads as `size` elements are worth.

    Raises:
        TypeError: numba cannot compile its scalar function.

    """
    next_chunk = np.zeros(1, np.int64)
    try:
        if size < SERIAL:
            worker(*arguments, next_chunk)
        else:
            run_on_threads(thread_count(), worker, *arguments, next_chunk)
    except (NumbaError, UnsupportedBytecodeError) as error:
        fn = worker.py_func.__globals__["fn"]
        raise TypeError(
            f"numba cannot compile {fn.__name__}, which must take floats and return one: {error}"
        ) from error


def _copy(a: Tensor, out: Tensor | None = None, /) -> Tensor:
    """The identity, into a contiguous tensor."""
    target = map_output(a, out)
    np.copyto(target._tensor.array, a._tensor.array)
    return target


# ----- matrix product -----


@quiet
def matmul(a: Array, b: Array) -> Array:
    """a @ b of numpy arrays (..., n, k) and (..., k, m), always by BLAS.

    numpy leaves BLAS for a slow loop where dtypes or strides do not fit, so they are mended first.
    A batch of `a` with a single matrix `b` is one product of all its rows.
    """
    dtype = np.promote_types(a.dtype, b.dtype)
    a, b = _for_blas(a, dtype), _for_blas(b, dtype)
    if b.ndim == 2 and a.ndim > 2 and a.flags.c_contiguous:
        rows = a.size // a.shape[-1] if a.shape[-1] else 0
        if rows:
            return product(a.reshape(rows, a.shape[-1]), b).reshape(*a.shape[:-1], b.shape[-1])
    if a.ndim == b.ndim == 2:
        return product(a, b)
    # numpy may order the batch of its result as that of an input; a new tensor is row-major.
    return np.asarray(np.matmul(a, b), order="C")


def _for_blas(a: Array, dtype: np.dtype[Any]) -> Array:
    """`a` in `dtype` with rows or columns that are contiguous, as BLAS reads them."""
    if a.dtype != dtype:
        return a.astype(dtype, order="C")
    step, (row, column) = a.itemsize, a.strides[-2:]
    n, m = a.shape[-2:]
    by_rows = column == step and row >= m * step
    by_columns = row == step and column >= n * step
    return a if by_rows or by_columns else np.ascontiguousarray(a)


def tensor_matrix_multiply(
    out: Array,
    out_shape: Array,
    out_strides: Array,
    a_storage: Array,
    a_shape: Array,
    a_strides: Array,
    b_storage: Array,
    b_shape: Array,
    b_strides: Array,
) -> None:
    """out = a @ b for storages with shapes and strides; leading dimensions broadcast."""
    a = numpy_view(a_storage, a_shape, a_strides)
    b = numpy_view(b_storage, b_shape, b_strides)
    numpy_view(out, out_shape, out_strides)[...] = matmul(a, b)


# ----- loops -----
#
# A worker takes chunks of the output from a shared counter until none is left. FastOps calls it on
# the library's threads; `tensor_map` and its like wrap it in a parallel loop of numba's. In it the
# name `fn` stands for the scalar function, see `jit`.


def tensor_map(fn: MapFn) -> Any:
    """The compiled parallel loop out[i] = fn(a[i]), where `a` broadcasts to `out`.

    Args:
        fn: float -> float; compiled by numba or plain.

    Returns:
        A numba dispatcher: (out, out_shape, out_strides, in_storage, in_shape, in_strides) -> None.

    """
    worker = _worker(_map_worker, fn, keep=False)
    return specialise(_map_kernel, parallel=True, worker=worker)


def _map_kernel(out, out_shape, out_strides, a, a_shape, a_strides):  # type: ignore[no-untyped-def]
    check_storage(out, out_shape, out_strides)
    check_input(a, a_shape, a_strides, out_shape)
    next_chunk = np.zeros(1, np.int64)
    for _ in prange(1 if count(out_shape) < SERIAL else numba.get_num_threads()):
        worker(out, out_shape, out_strides, a, a_shape, a_strides, next_chunk)  # type: ignore[name-defined]  # noqa: F821


def _map_worker(out, shape, out_steps, a, a_shape, a_strides, next_chunk):  # type: ignore[no-untyped-def]
    size, last = count(shape), len(shape) - 1
    a_steps = steps(shape, a_shape, a_strides)
    # Contiguous: one long row. Else rows along the last dimension.
    flat = is_flat(shape, out_steps) and is_flat(shape, a_steps)
    width = max(size, 1) if flat else shape[last]
    out_step = 1 if flat else out_steps[last]
    a_step = 1 if flat else a_steps[last]
    while True:
        i = fetch_add(next_chunk, 0, 1) * CHUNK
        if i >= size:
            return
        end = min(size, i + CHUNK)
        while i < end:  # the piece of a row from element i on
            column, row = i % width, i // width
            n = min(width - column, end - i)
            p = column * out_step + row_offset(row, shape, out_steps, last)
            q = column * a_step + row_offset(row, shape, a_steps, last)
            if out_step == 1 and a_step == 1:  # slices: LLVM knows their bounds, and vectorises
                to, x = out[p : p + n], a[q : q + n]
                for j in range(n):
                    to[j] = fn(x[j])  # type: ignore[name-defined]  # noqa: F821
            else:
                for j in range(n):
                    out[p + j * out_step] = fn(a[q + j * a_step])  # type: ignore[name-defined]  # noqa: F821
            i += n


def tensor_zip(fn: ZipFn) -> Any:
    """The compiled parallel loop out[i] = fn(a[i], b[i]), where `a` and `b` broadcast to `out`.

    Args:
        fn: (float, float) -> float; compiled by numba or plain.

    Returns:
        A numba dispatcher: storage, shape and strides of out, of a, and of b -> None.

    """
    worker = _worker(_zip_worker, fn, keep=False)
    return specialise(_zip_kernel, parallel=True, worker=worker)


def _zip_kernel(  # type: ignore[no-untyped-def]
    out, out_shape, out_strides, a, a_shape, a_strides, b, b_shape, b_strides
):
    check_storage(out, out_shape, out_strides)
    check_input(a, a_shape, a_strides, out_shape)
    check_input(b, b_shape, b_strides, out_shape)
    next_chunk = np.zeros(1, np.int64)
    for _ in prange(1 if count(out_shape) < SERIAL else numba.get_num_threads()):
        worker(  # type: ignore[name-defined]  # noqa: F821
            out, out_shape, out_strides, a, a_shape, a_strides, b, b_shape, b_strides, next_chunk
        )


def _zip_worker(  # type: ignore[no-untyped-def]
    out, shape, out_steps, a, a_shape, a_strides, b, b_shape, b_strides, next_chunk
):
    """As `_map_worker`, with two inputs."""
    size, last = count(shape), len(shape) - 1
    a_steps, b_steps = steps(shape, a_shape, a_strides), steps(shape, b_shape, b_strides)
    flat = is_flat(shape, out_steps) and is_flat(shape, a_steps) and is_flat(shape, b_steps)
    width = max(size, 1) if flat else shape[last]
    out_step = 1 if flat else out_steps[last]
    a_step = 1 if flat else a_steps[last]
    b_step = 1 if flat else b_steps[last]
    while True:
        i = fetch_add(next_chunk, 0, 1) * CHUNK
        if i >= size:
            return
        end = min(size, i + CHUNK)
        while i < end:
            column, row = i % width, i // width
            n = min(width - column, end - i)
            p = column * out_step + row_offset(row, shape, out_steps, last)
            q = column * a_step + row_offset(row, shape, a_steps, last)
            r = column * b_step + row_offset(row, shape, b_steps, last)
            if out_step == 1 and a_step == 1 and b_step == 1:
                to, x, y = out[p : p + n], a[q : q + n], b[r : r + n]
                for j in range(n):
                    to[j] = fn(x[j], y[j])  # type: ignore[name-defined]  # noqa: F821
            else:
                for j in range(n):
                    out[p + j * out_step] = fn(a[q + j * a_step], b[r + j * b_step])  # type: ignore[name-defined]  # noqa: F821
            i += n


def tensor_reduce(fn: ZipFn) -> Any:
    """The compiled parallel loop out[i] = fn(...fn(fn(out[i], a[i, 0]), a[i, 1])...).

    Args:
        fn: (float, float) -> float; compiled by numba or plain.

    Returns:
        A numba dispatcher: storage, shape and strides of out (which holds the start of each fold),
        of a, and the dimension that is folded -> None.

    """
    worker = _worker(_reduce_worker, fn, keep=False)
    return specialise(_reduce_kernel, parallel=True, worker=worker)


def _reduce_kernel(out, out_shape, out_strides, a, a_shape, a_strides, reduce_dim):  # type: ignore[no-untyped-def]
    check_storage(out, out_shape, out_strides)
    check_storage(a, a_shape, a_strides)
    check_fold(out_shape, a_shape, reduce_dim)
    next_chunk = np.zeros(1, np.int64)
    for _ in prange(1 if count(a_shape) < SERIAL else numba.get_num_threads()):
        worker(out, out_shape, out_strides, a, a_shape, a_strides, reduce_dim, next_chunk)  # type: ignore[name-defined]  # noqa: F821


def _reduce_worker(  # type: ignore[no-untyped-def]
    out, shape, out_steps, a, a_shape, a_steps, reduce_dim, next_chunk
):
    """Folds LANES outputs at once, in float64: memory is read in order, no sum waits for itself."""
    size, length = count(shape), a_shape[reduce_dim]
    side = len(shape) - 1  # along which folds lie side by side: the last that is not folded
    if side == reduce_dim:
        side -= 1
    width = 1 if side < 0 else shape[side]
    out_step = 0 if side < 0 else out_steps[side]
    a_side = 0 if side < 0 else a_steps[side]
    a_step = a_steps[reduce_dim]
    per_chunk = max(LANES, CHUNK // max(length, 1))
    total = np.empty(LANES, np.float64)
    while True:
        i = fetch_add(next_chunk, 0, 1) * per_chunk
        if i >= size:
            return
        end = min(size, i + per_chunk)
        while i < end:
            column, row = i % width, i // width
            n = min(width - column, end - i, LANES)
            p = column * out_step + row_offset(row, shape, out_steps, side)
            q = column * a_side + row_offset(row, shape, a_steps, side)
            for j in range(n):
                total[j] = out[p + j * out_step]
            for _ in range(length):
                if a_side == 1:
                    x = a[q : q + n]
                    for j in range(n):
                        total[j] = fn(total[j], x[j])  # type: ignore[name-defined]  # noqa: F821
                else:
                    for j in range(n):
                        total[j] = fn(total[j], a[q + j * a_side])  # type: ignore[name-defined]  # noqa: F821
                q += a_step
            for j in range(n):
                out[p + j * out_step] = total[j]
            i += n


# ----- index arithmetic inside the loops -----


@njit(error_model="numpy")
def count(shape):  # type: ignore[no-untyped-def]
    """Number of elements."""
    size = np.int64(1)
    for n in shape:
        size *= n
    return size


@njit(error_model="numpy")
def check_storage(storage, shape, strides):  # type: ignore[no-untyped-def]
    """Raise ValueError unless all elements lie in the storage."""
    last = np.int64(0)
    for d in range(len(shape)):
        if strides[d] < 0:
            raise ValueError("strides must not be negative")
        last += (shape[d] - 1) * strides[d]
    if count(shape) > 0 and last >= len(storage):
        raise ValueError("a storage does not hold its shape with its strides")


@njit(error_model="numpy")
def check_input(a, a_shape, a_strides, shape):  # type: ignore[no-untyped-def]
    """`check_storage`, and raise ValueError unless `a_shape` broadcasts to `shape`."""
    check_storage(a, a_shape, a_strides)
    offset = len(shape) - len(a_shape)
    fits = offset >= 0
    for d in range(len(a_shape)):
        fits = fits and (a_shape[d] == 1 or a_shape[d] == shape[d + offset])
    if not fits:
        raise ValueError("an input does not broadcast to the shape of out")


@njit(error_model="numpy")
def check_fold(shape, a_shape, reduce_dim):  # type: ignore[no-untyped-def]
    """Raise ValueError unless `shape` is `a_shape` with size 1 in dimension `reduce_dim`."""
    fits = len(shape) == len(a_shape) and 0 <= reduce_dim < len(shape)
    for d in range(len(shape)):
        fits = fits and shape[d] == (1 if d == reduce_dim else a_shape[d])
    if not fits:
        raise ValueError("out must have the shape of a, but size 1 in the dimension reduced")


@njit(error_model="numpy")
def steps(shape, a_shape, a_strides):  # type: ignore[no-untyped-def]
    """Strides of `a` when it is broadcast to `shape`: 0 where it is repeated."""
    out = np.zeros(len(shape), np.int64)
    offset = len(shape) - len(a_shape)
    for d in range(len(a_shape)):
        if a_shape[d] != 1:
            out[d + offset] = a_strides[d]
    return out


@njit(error_model="numpy")
def is_flat(shape, strides):  # type: ignore[no-untyped-def]
    """Whether these strides are those of a contiguous tensor (a size of 1 fits any stride)."""
    expected = np.int64(1)
    for d in range(len(shape) - 1, -1, -1):
        if shape[d] != 1 and strides[d] != expected:
            return False
        expected *= shape[d]
    return True


@njit(error_model="numpy")
def row_offset(row, shape, strides, skipped):  # type: ignore[no-untyped-def]
    """Where row number `row` begins; dimension `skipped` runs along the row and does not count."""
    offset = np.int64(0)
    rest = row
    for d in range(len(shape) - 1, -1, -1):
        if rest == 0:
            break
        if d != skipped:
            offset += rest % shape[d] * strides[d]
            rest //= shape[d]
    return offset
