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

from .fast_fused import FastFusedOps
from .jit import compiled, specialise
from .tensor_data import TensorData, shape_broadcast
from .tensor_ops import MapFn, MapProto, ZipFn, check_matmul, empty_output

if TYPE_CHECKING:
    from .tensor import Tensor

    Array = npt.NDArray[Any]

# Below this many elements one core is quicker than waking another (about 10 microseconds).
SERIAL = 1 << 16
# Elements that one iteration of a parallel loop handles.
CHUNK = 1 << 14
# Sums that a reduction carries along side by side.
LANES = 64


class FastOps(FastFusedOps):
    """Compiled, parallel loops; results do not depend on the number of threads."""

    @staticmethod
    def map(fn: MapFn) -> MapProto:
        """See `TensorOps.map`."""
        kernel = tensor_map(fn, keep=True)

        def apply(a: Tensor, out: Tensor | None = None, /) -> Tensor:
            target = empty_output(a, a.shape) if out is None else out
            kernel(*target.tuple(), *a.tuple())
            return target

        return apply

    @staticmethod
    def cmap(fn: MapFn) -> Callable[[Tensor, Tensor], Tensor]:
        """See `TensorOps.cmap`."""
        return FastOps.map(fn)

    @staticmethod
    def zip(fn: ZipFn) -> Callable[[Tensor, Tensor], Tensor]:
        """See `TensorOps.zip`. Tensors of two dtypes are computed in the larger one."""
        kernel = tensor_zip(fn, keep=True)

        def apply(a: Tensor, b: Tensor) -> Tensor:
            if a.dtype == b.dtype:
                dtype = a.dtype
            else:
                dtype = np.promote_types(a.dtype, b.dtype)
                a, b = _cast(a, dtype), _cast(b, dtype)
            out = empty_output(a, shape_broadcast(a.shape, b.shape), dtype)
            kernel(*out.tuple(), *a.tuple(), *b.tuple())
            return out

        return apply

    @staticmethod
    def reduce(fn: ZipFn, start: float = 0.0) -> Callable[[Tensor, int], Tensor]:
        """See `TensorOps.reduce`. Folds in float64, in the order of the elements."""
        kernel = tensor_reduce(fn, keep=True)

        def apply(a: Tensor, dim: int) -> Tensor:
            shape = list(a.shape)
            shape[dim] = 1
            out = empty_output(a, tuple(shape))
            out._tensor._storage.fill(start)
            kernel(*out.tuple(), *a.tuple(), dim)
            return out

        return apply

    @staticmethod
    def matrix_multiply(a: Tensor, b: Tensor) -> Tensor:
        """See `TensorOps.matrix_multiply`; by BLAS."""
        check_matmul(a, b)
        return a._new(TensorData.from_array(matmul(a._tensor.array, b._tensor.array)))


def _cast(a: Tensor, dtype: np.dtype[Any]) -> Tensor:
    if a.dtype == dtype:
        return a
    return a._new(TensorData.from_array(a._tensor.array.astype(dtype)))


# ----- matrix product -----


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
            return (a.reshape(rows, a.shape[-1]) @ b).reshape(*a.shape[:-1], b.shape[-1])
    return np.matmul(a, b)


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
    a = TensorData(a_storage, tuple(a_shape.tolist()), tuple(a_strides.tolist()))
    b = TensorData(b_storage, tuple(b_shape.tolist()), tuple(b_strides.tolist()))
    step = out.itemsize
    target = np.ndarray(
        tuple(out_shape.tolist()), out.dtype, out, strides=tuple(int(s) * step for s in out_strides)
    )
    target[...] = matmul(a.array, b.array)


# ----- map: out[i] = fn(a[i]) -----


def tensor_map(fn: MapFn, keep: bool = False) -> Any:
    """The compiled loop of `FastOps.map`.

    Args:
        fn: float -> float; compiled by numba or plain.
        keep: on disk, for other processes; numba's `parallel_diagnostics` then knows it no more.

    Returns:
        A numba dispatcher: (out, out_shape, out_strides, in_storage, in_shape, in_strides) -> None.

    """
    segment = specialise(_map_segment, fn=compiled(fn))
    return specialise(_map_kernel, parallel=True, source=fn if keep else None, segment=segment)


def _map_kernel(out, out_shape, out_strides, a, a_shape, a_strides):  # type: ignore[no-untyped-def]
    size = np.int64(1)
    for n in out_shape:
        size *= n
    a_steps = steps(out_shape, a_shape, a_strides)
    flat = is_flat(out_shape, out_strides) and is_flat(out_shape, a_steps)
    if size < SERIAL:
        segment(out, out_shape, out_strides, a, a_steps, flat, 0, size)  # type: ignore[name-defined]  # noqa: F821
    else:
        for chunk in prange((size + CHUNK - 1) // CHUNK):
            begin = chunk * CHUNK
            end = min(size, begin + CHUNK)
            segment(out, out_shape, out_strides, a, a_steps, flat, begin, end)  # type: ignore[name-defined]  # noqa: F821


def _map_segment(out, shape, out_steps, a, a_steps, flat, begin, end):  # type: ignore[no-untyped-def]
    """Elements begin ... end in row-major order: pieces of rows, which are evenly spaced."""
    last = len(shape) - 1
    width = end if flat or last < 0 else shape[last]
    out_step = 1 if flat or last < 0 else out_steps[last]
    a_step = 1 if flat or last < 0 else a_steps[last]
    i = begin
    while i < end:
        column = i % width if width else 0
        n = min(width - column, end - i)
        p = column * out_step + row_offset(i // width, shape, out_steps, last)
        q = column * a_step + row_offset(i // width, shape, a_steps, last)
        if out_step == 1 and a_step == 1:  # slices: their bounds are known, so LLVM vectorises
            to, x = out[p : p + n], a[q : q + n]
            for j in range(n):
                to[j] = fn(x[j])  # type: ignore[name-defined]  # noqa: F821
        else:
            for j in range(n):
                out[p + j * out_step] = fn(a[q + j * a_step])  # type: ignore[name-defined]  # noqa: F821
        i += n


# ----- zip: out[i] = fn(a[i], b[i]) -----


def tensor_zip(fn: ZipFn, keep: bool = False) -> Any:
    """The compiled loop of `FastOps.zip`.

    Args:
        fn: (float, float) -> float; compiled by numba or plain.
        keep: as for `tensor_map`.

    Returns:
        A numba dispatcher: storage, shape and strides of out, of a, and of b -> None.

    """
    segment = specialise(_zip_segment, fn=compiled(fn))
    return specialise(_zip_kernel, parallel=True, source=fn if keep else None, segment=segment)


def _zip_kernel(  # type: ignore[no-untyped-def]
    out, out_shape, out_strides, a, a_shape, a_strides, b, b_shape, b_strides
):
    size = np.int64(1)
    for n in out_shape:
        size *= n
    a_steps = steps(out_shape, a_shape, a_strides)
    b_steps = steps(out_shape, b_shape, b_strides)
    flat = is_flat(out_shape, out_strides) and is_flat(out_shape, a_steps)
    flat = flat and is_flat(out_shape, b_steps)
    if size < SERIAL:
        segment(out, out_shape, out_strides, a, a_steps, b, b_steps, flat, 0, size)  # type: ignore[name-defined]  # noqa: F821
    else:
        for chunk in prange((size + CHUNK - 1) // CHUNK):
            begin = chunk * CHUNK
            end = min(size, begin + CHUNK)
            segment(out, out_shape, out_strides, a, a_steps, b, b_steps, flat, begin, end)  # type: ignore[name-defined]  # noqa: F821


def _zip_segment(out, shape, out_steps, a, a_steps, b, b_steps, flat, begin, end):  # type: ignore[no-untyped-def]
    """Elements begin ... end in row-major order, see `_map_segment`."""
    last = len(shape) - 1
    width = end if flat or last < 0 else shape[last]
    out_step = 1 if flat or last < 0 else out_steps[last]
    a_step = 1 if flat or last < 0 else a_steps[last]
    b_step = 1 if flat or last < 0 else b_steps[last]
    i = begin
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


# ----- reduce: out[i] = fn(...fn(fn(out[i], a[i, 0]), a[i, 1])...) -----


def tensor_reduce(fn: ZipFn, keep: bool = False) -> Any:
    """The compiled loop of `FastOps.reduce`; `out` holds the start of each fold.

    Args:
        fn: (float, float) -> float; compiled by numba or plain.
        keep: as for `tensor_map`.

    Returns:
        A numba dispatcher: storage, shape and strides of out, of a, and the dimension -> None.

    """
    segment = specialise(_reduce_segment, fn=compiled(fn))
    return specialise(_reduce_kernel, parallel=True, source=fn if keep else None, segment=segment)


def _reduce_kernel(out, out_shape, out_strides, a, a_shape, a_strides, reduce_dim):  # type: ignore[no-untyped-def]
    size = np.int64(1)
    for n in out_shape:
        size *= n
    # The dimension along which folds run side by side: the last that is not folded.
    side = len(out_shape) - 1
    if side == reduce_dim:
        side -= 1
    length = a_shape[reduce_dim]
    per_chunk = max(LANES, CHUNK // max(length, 1))
    if size * length < SERIAL:
        segment(out, out_shape, out_strides, a, a_strides, length, reduce_dim, side, 0, size)  # type: ignore[name-defined]  # noqa: F821
    else:
        for chunk in prange((size + per_chunk - 1) // per_chunk):
            begin = chunk * per_chunk
            end = min(size, begin + per_chunk)
            segment(out, out_shape, out_strides, a, a_strides, length, reduce_dim, side, begin, end)  # type: ignore[name-defined]  # noqa: F821


def _reduce_segment(  # type: ignore[no-untyped-def]
    out, shape, out_steps, a, a_steps, length, reduce_dim, side, begin, end
):
    """Outputs begin ... end, LANES at once: memory is read in order, no sum waits for itself."""
    total = np.empty(LANES, np.float64)
    width = np.int64(1) if side < 0 else shape[side]
    out_step = np.int64(0) if side < 0 else out_steps[side]
    a_side = np.int64(0) if side < 0 else a_steps[side]
    a_step = a_steps[reduce_dim]
    i = begin
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


@numba.njit(error_model="numpy")  # type: ignore[untyped-decorator]
def steps(shape, a_shape, a_strides):  # type: ignore[no-untyped-def]
    """Strides of `a` when it is broadcast to `shape`: 0 where it is repeated."""
    out = np.zeros(len(shape), np.int64)
    offset = len(shape) - len(a_shape)
    for d in range(len(a_shape)):
        if a_shape[d] != 1:
            out[d + offset] = a_strides[d]
    return out


@numba.njit(error_model="numpy")  # type: ignore[untyped-decorator]
def is_flat(shape, strides):  # type: ignore[no-untyped-def]
    """Whether these strides are those of a contiguous tensor (a size of 1 fits any stride)."""
    expected = np.int64(1)
    for d in range(len(shape) - 1, -1, -1):
        if shape[d] != 1 and strides[d] != expected:
            return False
        expected *= shape[d]
    return True


@numba.njit(error_model="numpy")  # type: ignore[untyped-decorator]
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


__all__ = [
    "FastOps",
    "tensor_map",
    "tensor_matrix_multiply",
    "tensor_reduce",
    "tensor_zip",
]
