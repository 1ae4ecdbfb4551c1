"""`map`, `zip` and `reduce` on the GPU, for any scalar function (`kernels/elementwise_cuda`,
`kernels/fold_cuda`), and MiniTorch's `tensor_map`, `tensor_zip` and `tensor_reduce`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from .. import operators
from ..dtypes import promote
from ..kernels import fold_cuda
from ..kernels.copy_cuda import copy_into
from ..kernels.elementwise_cuda import View, map_into, zip_into
from ..tensor_data import TensorData, shape_broadcast
from ..tensor_ops import MapFn, MapProto, ZipFn, folded_shape, map_output
from .device_array import DeviceArray
from .storage import empty
from .views import device_storage, numba_view, view_of

if TYPE_CHECKING:
    from ..tensor import Tensor


# ----- the operations of the backend, of scalar functions; 16-bit numbers are computed with in
# float32 -----


def map_op(fn: MapFn) -> MapProto:
    """See `TensorOps.map`."""
    if fn is operators.id:
        run = copy_into
    else:

        def run(out: View, x: View) -> None:
            map_into(fn, out, x)

    def apply(a: Tensor, out: Tensor | None = None, /) -> Tensor:
        target = map_output(a, out)
        run(view_of(target._tensor), view_of(a._tensor))
        return target

    return apply


def zip_op(fn: ZipFn) -> Callable[[Tensor, Tensor], Tensor]:
    """See `TensorOps.zip`. Tensors of two dtypes are computed in the wider one; a number has no say
    in that.
    """

    def apply(a: Tensor, b: Tensor) -> Tensor:
        out = empty(shape_broadcast(a.shape, b.shape), _zip_dtype(a._tensor, b._tensor))
        zip_into(fn, view_of(out), view_of(a._tensor), view_of(b._tensor))
        return a._new(out)

    return apply


def reduce_op(fn: ZipFn, start: float = 0.0) -> Callable[[Tensor, int], Tensor]:
    """See `TensorOps.reduce`. `fn` must be associative and commutative: it is applied in an order
    of its own, always the same for a shape. Folds in float32 (float64 for float64).
    """

    def apply(a: Tensor, dim: int) -> Tensor:
        return a._new(fold(fn, start, a._tensor, folded_shape(a, dim)[0]))

    return apply


def _zip_dtype(a: TensorData, b: TensorData) -> np.dtype[Any]:
    if (a.number is None) == (b.number is None):
        return promote(a.dtype, b.dtype)
    return a.dtype if a.number is None else b.dtype


def fold(fn: ZipFn, start: float, data: TensorData, dim: int) -> TensorData:
    """`data` with dimension `dim` folded to size 1."""
    out = empty((*data.shape[:dim], 1, *data.shape[dim + 1 :]), data.dtype)
    storage = device_storage(out)
    if data.shape[dim] == 0:
        storage.fill(start)
    else:
        _fold_into(fn, start, storage.array, view_of(data), dim)
    return out


def _fold_into(fn: ZipFn, start: float, out: Any, x: View, dim: int) -> None:
    """Dimension `dim` of x folded into the array `out`."""
    plan = fold_cuda.make_plan(x, dim)
    workspace = None
    if plan.chunks > 1:
        dtype = fold_cuda.workspace_dtype(x.dtype)
        workspace = DeviceArray.empty(plan.chunks * plan.outputs, dtype)
    partial = None if workspace is None else workspace.array
    fold_cuda.fold_into(fn, start, out, x, plan, partial)


# ----- MiniTorch's names: kernels of storages, shapes and strides -----


def tensor_map(fn: MapFn) -> Callable[..., None]:
    """The kernel out[i] = fn(a[i]), where `a` broadcasts to `out`.

    Args:
        fn: float -> float; plain, or compiled by numba for the CPU or the GPU.

    Returns:
        A function: (out, out_shape, out_strides, in_storage, in_shape, in_strides) -> None, where
        storages are numba device arrays (`Tensor.tuple()`).

    """

    def run(out: Any, out_shape: Any, out_strides: Any, x: Any, shape: Any, strides: Any) -> None:
        map_into(fn, numba_view(out, out_shape, out_strides), numba_view(x, shape, strides))

    return run


def tensor_zip(fn: ZipFn) -> Callable[..., None]:
    """The kernel out[i] = fn(a[i], b[i]), where `a` and `b` broadcast to `out`.

    Args:
        fn: (float, float) -> float.

    Returns:
        A function: storage, shape and strides of out, of a, and of b -> None.

    """

    def run(*operands: Any) -> None:
        out, a, b = (numba_view(*operands[i : i + 3]) for i in (0, 3, 6))
        zip_into(fn, out, a, b)

    return run


def tensor_reduce(fn: ZipFn) -> Callable[..., None]:
    """The kernel out[i] = fn(start, fn(a[i, 0], fn(a[i, 1], ...))).

    Args:
        fn: (float, float) -> float, associative and commutative.

    Returns:
        A function: storage, shape and strides of out (contiguous) and of a, the dimension that is
        folded, and the start of each fold (0 if not given) -> None.

    """

    def run(
        out: Any,
        out_shape: Any,
        out_strides: Any,
        a: Any,
        a_shape: Any,
        a_strides: Any,
        reduce_dim: int,
        reduce_value: float = 0.0,
    ) -> None:
        _fold_into(fn, reduce_value, out, numba_view(a, a_shape, a_strides), reduce_dim)

    return run
