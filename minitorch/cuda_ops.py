"""`CudaOps`, the backend of MiniTorch's GPU module: map, zip, reduce and matrix products on the
GPU, and the module's two exercises. Fused operations have no kernel here, but for linear layers:
they are those of `FusedOps`, on the host; `cuda_kernel_ops` has kernels for them.

The class is a table: which operation is which function of `minitorch/cuda/`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from . import operators
from .cuda import elementwise, matmul, storage
from .cuda.device_array import DeviceArray
from .cuda.elementwise import tensor_map, tensor_reduce, tensor_zip
from .cuda.views import contiguous_data, device_storage, dtype_name
from .fast_ops import FastOps
from .kernels import elementwise_cuda, fold_cuda, practice_cuda
from .kernels.gpu import runtime
from .kernels.practice_cuda import THREADS_PER_BLOCK
from .tensor_data import TensorData
from .tensor_ops import TensorOps

if TYPE_CHECKING:
    from .tensor import Tensor


class CudaOps(TensorOps):
    """Tensors on the GPU: float32, float64, float16 and bfloat16, of any strides.

    Without a GPU `TensorBackend(CudaOps)` computes with `FastOps`, so that programs and tests that
    make it run anywhere.
    """

    cuda = True

    @classmethod
    def on_this_machine(cls) -> type[TensorOps]:
        """See `TensorOps.on_this_machine`."""
        return cls if runtime.is_available() else FastOps

    # New storage, copies, masks

    from_numpy = staticmethod(storage.from_numpy)
    placed = staticmethod(storage.placed)
    empty = staticmethod(storage.empty)
    full = staticmethod(storage.full)
    constant = staticmethod(storage.constant)
    cast = staticmethod(storage.cast)
    copy_into = staticmethod(storage.copy_into)
    slice_backward = staticmethod(storage.slice_backward)
    concatenate = staticmethod(storage.concatenate)
    attention_mask = staticmethod(storage.attention_mask)
    masked_fill = staticmethod(storage.masked_fill)
    band_fill = staticmethod(storage.band_fill)

    # Scalar functions, matrix products, linear layers

    map = staticmethod(elementwise.map_op)
    zip = staticmethod(elementwise.zip_op)
    reduce = staticmethod(elementwise.reduce_op)
    matrix_multiply = staticmethod(matmul.matrix_multiply)
    linear_forward = staticmethod(matmul.linear_forward)
    linear_backward = staticmethod(matmul.linear_backward)


# ----- MiniTorch's names -----


def device_jit(fn: Callable[..., Any], **options: Any) -> Any:
    """`fn` compiled as a function that kernels call (numba's `cuda.jit(device=True)`)."""
    return runtime.cuda.jit(fn, device=True, **options)


def jit(fn: Callable[..., Any], **options: Any) -> Any:
    """`fn` compiled as a kernel (numba's `cuda.jit`)."""
    return runtime.cuda.jit(fn, **options)


def sum_practice(a: Tensor) -> TensorData:
    """The sums of blocks of 32 elements of a tensor (n,).

    Returns:
        One number for each block, two at least (0 for a block that is not there).

    Raises:
        ValueError: the tensor has not one dimension.

    """
    if a.dims != 1:
        raise ValueError(f"sum_practice takes a tensor of one dimension, got shape {a.shape}")
    x = a.contiguous()._tensor
    blocks = max(runtime.ceil_div(x.size, THREADS_PER_BLOCK), 2)
    out = DeviceArray.empty(blocks, x.dtype)
    out.fill(0)
    practice_cuda.sum_blocks(out.array, device_storage(x).array, dtype_name(x.dtype), x.size)
    return contiguous_data(out, (blocks,))


def mm_practice(a: Tensor, b: Tensor) -> TensorData:
    """a @ b of (n, n) matrices, n up to 32, by one block.

    Returns:
        The product, (n, n).

    Raises:
        ValueError: other shapes, or two dtypes.

    """
    size = a.shape[0] if a.dims else 0
    if a.shape != (size, size) or b.shape != a.shape or size > THREADS_PER_BLOCK:
        raise ValueError(
            f"mm_practice takes two (n, n) matrices with n <= {THREADS_PER_BLOCK}, "
            f"got {a.shape} and {b.shape}"
        )
    if a.dtype != b.dtype:
        raise ValueError(f"mm_practice takes one dtype, got {a.dtype.name} and {b.dtype.name}")
    left, right = a.contiguous()._tensor, b.contiguous()._tensor
    out = contiguous_data(DeviceArray.empty(size * size, a.dtype), (size, size))
    arrays = [device_storage(data).array for data in (out, left, right)]
    practice_cuda.small_matmul_into(arrays[0], arrays[1], arrays[2], dtype_name(a.dtype), size)
    return out


# ----- for the compile tests -----

# Those with the most arithmetic; the first of each is compiled for every layout and dtype.
MAPS = (operators.sigmoid, operators.log, operators.exp, operators.tanh)
ZIPS = (operators.add, operators.is_close, operators.inv_back, operators.pow)
FOLDS = (operators.add, operators.max)


def instances() -> Iterator[runtime.Instance]:
    """The kernels of the backend's own scalar functions."""
    yield from elementwise_cuda.instances(MAPS, ZIPS)
    yield from fold_cuda.instances(FOLDS)


__all__ = [
    "THREADS_PER_BLOCK",
    "CudaOps",
    "device_jit",
    "instances",
    "jit",
    "mm_practice",
    "sum_practice",
    "tensor_map",
    "tensor_reduce",
    "tensor_zip",
]
