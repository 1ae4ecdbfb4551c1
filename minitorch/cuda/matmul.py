"""Matrix products and linear layers on the GPU.

`MATMULS` lists what can compute a product, best first; the first that takes the factors does it.
"""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from .. import operators
from ..dtypes import HALF_DTYPES, layer_dtype, promote
from ..kernels import matmul_cuda, reduce_cuda
from ..kernels.elementwise_cuda import merge_dimensions, zip_into
from ..kernels.gpu.vectors import BYTES
from ..tensor_data import TensorData
from ..tensor_ops import check_matmul
from . import cublas, cublas_lt
from .device_array import DeviceArray
from .storage import contiguous, copied, empty, in_dtype
from .views import (
    contiguous_data,
    device_storage,
    dtype_name,
    gradient_memory,
    view_of,
)

if TYPE_CHECKING:
    from ..tensor import Tensor


# ----- products: (..., m, k) @ (..., k, n), batch dimensions equal -----


class MatMul(NamedTuple):
    """A way to compute a product.

    Args:
        name: in words.
        run: computes a @ b into `out` and returns True; returns False where it cannot.

    """

    name: str
    run: Callable[[TensorData, TensorData, TensorData], bool]


def _by_cublas(out: TensorData, a: TensorData, b: TensorData) -> bool:
    if not cublas.is_available():
        return False
    left, right = view_of(a), view_of(b)
    product = cublas.plan(left, right)
    if product is None:  # a layout that it cannot read in one call: copies are cheap beside it
        a, b = contiguous(a), contiguous(b)
        left, right = view_of(a), view_of(b)
        product = cublas.plan(left, right)
    if product is not None:
        pointer = device_storage(out).pointer
        cublas.matmul_into(pointer, left, right, product, dtype_name(out.dtype))
        return True
    return False  # sizes beyond 2**31


def _by_tiles(out: TensorData, a: TensorData, b: TensorData) -> bool:
    a, b = in_dtype(a, out.dtype), in_dtype(b, out.dtype)
    matmul_cuda.matmul_into(device_storage(out).array, view_of(a), view_of(b))
    return True


MATMULS = [MatMul("cuBLAS", _by_cublas), MatMul("the tiled kernel", _by_tiles)]


def matmul_into(out: TensorData, a: TensorData, b: TensorData) -> None:
    """a @ b by the first of `MATMULS` that can, into contiguous `out`.

    All are of one dtype, or `out` is float32 and the factors are of 16 bits.
    """
    if out.size == 0:
        return
    if a.shape[-1] == 0:
        device_storage(out).fill(0)
        return
    for candidate in MATMULS:
        if candidate.run(out, a, b):
            return


def as_rows(data: TensorData) -> TensorData:
    """(..., D) as a matrix (rows, D): the same storage where its strides allow."""
    rows, columns = prod(data.shape[:-1]), data.shape[-1]
    shape, (steps,) = merge_dimensions(data.shape[:-1], data.strides[:-1])
    if len(shape) == 1:
        return TensorData._of(data._storage, (rows, columns), (steps[0], data.strides[-1]))
    return contiguous_data(device_storage(contiguous(data)), (rows, columns))


# ----- the operations of the backend -----


def matrix_multiply(a: Tensor, b: Tensor) -> Tensor:
    """See `TensorOps.matrix_multiply`. 16-bit numbers are summed in float32."""
    shape = check_matmul(a, b)
    dtype = promote(a.dtype, b.dtype)
    left, right = in_dtype(a._tensor, dtype), in_dtype(b._tensor, dtype)
    out = empty(shape, dtype)
    batch = shape[:-2]
    matmul_into(
        out,
        left.broadcast_to((*batch, *left.shape[-2:])),
        right.broadcast_to((*batch, *right.shape[-2:])),
    )
    return a._new(out)


def linear_forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """See `FusedOps.linear_forward`: one product of all rows, the bias added as it is written.

    With x of 16 bits and a float32 weight (mixed precision) the weight is rounded to x's dtype,
    in which the result is; gradients of weight and bias are float32 all the way.
    """
    dtype = layer_dtype(x.dtype, weight.dtype, *(() if bias is None else (bias.dtype,)))
    out = empty((*x.shape[:-1], weight.shape[1]), dtype)
    rows = as_rows(in_dtype(x._tensor, dtype))
    factor = _rounded(weight, dtype)
    result = contiguous_data(device_storage(out), (rows.shape[0], weight.shape[1]))
    if bias is None:
        matmul_into(result, rows, factor)
    else:
        added = device_storage(contiguous(_rounded(bias, dtype)))[: bias.size]
        _linear_into(result, rows, factor, contiguous_data(added, (bias.size,)))
    return x._new(out)


def linear_backward(
    grad: Tensor, x: Tensor, weight: Tensor, needs: tuple[bool, bool, bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """See `FusedOps.linear_backward`; each gradient has the dtype of what it is for."""
    dtype = layer_dtype(x.dtype, weight.dtype)
    rows = as_rows(in_dtype(grad._tensor, dtype))  # (rows, out)
    dx = dweight = dbias = None
    if needs[0]:
        data = empty(x.shape, dtype)
        flat = contiguous_data(device_storage(data), (rows.shape[0], weight.shape[0]))
        matmul_into(flat, rows, _rounded(weight, dtype).permute(1, 0))
        dx = x._new(in_dtype(data, x.dtype))
    if needs[1]:
        out_dtype = dtype if dtype.itemsize > 2 else weight.dtype
        data = gradient_memory(weight, out_dtype)
        matmul_into(data, as_rows(in_dtype(x._tensor, dtype)).permute(1, 0), rows)
        dweight = weight._new(in_dtype(data, weight.dtype))
    if needs[2]:
        dbias = weight._new(_column_sums(contiguous(rows), weight.dtype))
    return dx, dweight, dbias


def _rounded(parameter: Tensor, dtype: np.dtype[Any]) -> TensorData:
    """A weight or bias in the dtype of a product."""
    data = parameter._tensor
    if data.slot is not None and data.dtype != dtype and dtype in HALF_DTYPES:
        kept: TensorData = data.slot.rounded(dtype)  # up to date, made by one kernel for all
        return kept
    return in_dtype(data, dtype)


def _column_sums(rows: TensorData, dtype: np.dtype[Any]) -> TensorData:
    """The sum of contiguous rows (rows, columns), (columns,) in a dtype."""
    if device_storage(rows).pointer % BYTES:
        rows = copied(rows)  # the kernel reads vectors
    count, columns = rows.shape
    name = dtype_name(rows.dtype)
    total: np.dtype[Any] = np.dtype(np.float64 if name == "float64" else np.float32)
    out_dtype = dtype if dtype in (rows.dtype, total) else total
    out = DeviceArray.empty(columns, out_dtype)
    parts = reduce_cuda.column_parts(name, count, columns)
    partials = DeviceArray.empty(parts * columns, total)
    reduce_cuda.column_sums(
        name, out_dtype.name, device_storage(rows).array, partials.array, out.array, count, columns
    )
    return in_dtype(contiguous_data(out, (columns,)), dtype)


def _linear_into(out: TensorData, x: TensorData, weight: TensorData, bias: TensorData) -> None:
    """x (rows, in) @ weight (in, out) + bias (out,), all of one dtype, into contiguous `out`."""
    if out.size and x.shape[1] and cublas.is_available():
        views = view_of(x), view_of(weight)
        product = cublas.plan(*views)
        pointer = device_storage(out).pointer
        if product and cublas_lt.linear_into(pointer, *views, view_of(bias), product):
            return
    matmul_into(out, x, weight)
    zip_into(operators.add, view_of(out), view_of(out), view_of(bias))
