"""Matrix products and linear layers on the GPU.

`MATMULS` lists what can compute a product, best first; the first that takes the factors does it.
"""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import TYPE_CHECKING, NamedTuple

from . import cublas, cublas_lt, operators
from .cuda_elementwise import CudaElementwiseOps, fold
from .cuda_views import contiguous_data, device_storage, view_of
from .device_array import DeviceArray
from .dtypes import promote
from .kernels import matmul_cuda
from .kernels.copy_cuda import copy_into
from .kernels.elementwise_cuda import merge_dimensions, zip_into
from .tensor_data import TensorData
from .tensor_ops import check_matmul

if TYPE_CHECKING:
    from .tensor import Tensor


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
        cublas.matmul_into(device_storage(out).pointer, left, right, product)
        return True
    return False  # sizes beyond 2**31


def _by_tiles(out: TensorData, a: TensorData, b: TensorData) -> bool:
    matmul_cuda.matmul_into(device_storage(out).array, view_of(a), view_of(b))
    return True


MATMULS = [MatMul("cuBLAS", _by_cublas), MatMul("the tiled kernel", _by_tiles)]


def matmul_into(out: TensorData, a: TensorData, b: TensorData) -> None:
    """a @ b by the first of `MATMULS` that can, into contiguous `out`; all of one dtype."""
    if out.size == 0:
        return
    if a.shape[-1] == 0:
        device_storage(out).fill(0)
        return
    for candidate in MATMULS:
        if candidate.run(out, a, b):
            return


def contiguous(data: TensorData) -> TensorData:
    """`data` itself if it is row-major, else a copy that is."""
    if data.is_contiguous():
        return data
    copy = contiguous_data(DeviceArray.empty(data.size, data.dtype), data.shape)
    copy_into(view_of(copy), view_of(data))
    return copy


def as_rows(data: TensorData) -> TensorData:
    """(..., D) as a matrix (rows, D): the same storage where its strides allow."""
    rows, columns = prod(data.shape[:-1]), data.shape[-1]
    shape, (steps,) = merge_dimensions(data.shape[:-1], data.strides[:-1])
    if len(shape) == 1:
        return TensorData._of(data._storage, (rows, columns), (steps[0], data.strides[-1]))
    return contiguous_data(device_storage(contiguous(data)), (rows, columns))


# ----- the operations of the backend -----


class CudaMatMulOps(CudaElementwiseOps):
    """Matrix products and linear layers."""

    @classmethod
    def matrix_multiply(cls, a: Tensor, b: Tensor) -> Tensor:
        """See `TensorOps.matrix_multiply`. 16-bit numbers are summed in float32."""
        shape = check_matmul(a, b)
        dtype = promote(a.dtype, b.dtype)
        left, right = cls._in_dtype(a, dtype), cls._in_dtype(b, dtype)
        out = cls.empty(shape, dtype)
        batch = shape[:-2]
        matmul_into(
            out,
            left.broadcast_to((*batch, *left.shape[-2:])),
            right.broadcast_to((*batch, *right.shape[-2:])),
        )
        return a._new(out)

    @classmethod
    def linear_forward(cls, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """See `FusedOps.linear_forward`: one product of all rows, the bias added as it is written.

        Raises:
            ValueError: the sizes of x, weight and bias do not fit.

        """
        _check_linear(x, weight, bias)
        dtype = promote(x.dtype, weight.dtype)
        out = cls.empty((*x.shape[:-1], weight.shape[1]), dtype)
        rows = as_rows(cls._in_dtype(x, dtype))
        factor = cls._in_dtype(weight, dtype)
        result = contiguous_data(device_storage(out), (rows.shape[0], weight.shape[1]))
        if bias is None:
            matmul_into(result, rows, factor)
        else:
            _linear_into(result, rows, factor, contiguous(cls._in_dtype(bias, dtype)))
        return x._new(out)

    @classmethod
    def linear_backward(
        cls, grad: Tensor, x: Tensor, weight: Tensor, needs: tuple[bool, bool, bool]
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """See `FusedOps.linear_backward`; each gradient has the dtype of what it is for."""
        dtype = promote(promote(grad.dtype, x.dtype), weight.dtype)
        rows = as_rows(cls._in_dtype(grad, dtype))  # (rows, out)
        dx = dweight = dbias = None
        if needs[0]:
            data = cls.empty(x.shape, dtype)
            flat = contiguous_data(device_storage(data), (rows.shape[0], weight.shape[0]))
            matmul_into(flat, rows, cls._in_dtype(weight, dtype).permute(1, 0))
            dx = cls._as_dtype(x._new(data), x.dtype)
        if needs[1]:
            data = cls.empty(weight.shape, dtype)
            matmul_into(data, as_rows(cls._in_dtype(x, dtype)).permute(1, 0), rows)
            dweight = cls._as_dtype(weight._new(data), weight.dtype)
        if needs[2]:
            total = fold(operators.add, 0.0, rows, 0)  # (1, out)
            data = contiguous_data(device_storage(total), (weight.shape[1],))
            dbias = cls._as_dtype(weight._new(data), weight.dtype)
        return dx, dweight, dbias

    @classmethod
    def _in_dtype(cls, t: Tensor, dtype: object) -> TensorData:
        return cls._as_dtype(t, dtype)._tensor

    @classmethod
    def _as_dtype(cls, t: Tensor, dtype: object) -> Tensor:
        return t if t.dtype == dtype else cls.cast(t, dtype)  # type: ignore[arg-type]


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


def _check_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    if weight.dims != 2 or x.dims < 1 or x.shape[-1] != weight.shape[0]:
        raise ValueError(
            f"linear: x must be (..., in) and weight (in, out), got {x.shape} and {weight.shape}"
        )
    if bias is not None and bias.shape != (weight.shape[1],):
        raise ValueError(f"linear: bias must be ({weight.shape[1]},), got {bias.shape}")


__all__ = ["MATMULS", "CudaMatMulOps", "MatMul", "matmul_into"]
