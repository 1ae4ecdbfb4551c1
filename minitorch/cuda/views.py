"""From tensors to what kernels take: device memory with a dtype's name, a shape and strides."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np

from ..kernels.elementwise_cuda import Ints, View
from ..kernels.gpu.runtime import SIMULATED
from ..tensor_data import TensorData, strides_from_shape
from .device_array import DeviceArray

if TYPE_CHECKING:
    from ..tensor import Tensor


@cache
def dtype_name(dtype: np.dtype[Any]) -> str:
    """The name by which kernels know a dtype: that of a `Precision`, "mask" for bool."""
    return "mask" if dtype.kind == "b" else dtype.name


def view_of(data: TensorData) -> View:
    """The elements of `data` as an operand. They must be held until the kernel is launched."""
    storage, name = device_storage(data), dtype_name(data.dtype)
    if name == "mask":
        storage = storage.view(np.uint8)
    return View(storage.array, storage.pointer, name, data.shape, data.strides)


def device_storage(data: TensorData) -> DeviceArray:
    """The storage of a tensor on the GPU.

    Raises:
        TypeError: the tensor is in host memory.

    """
    storage = data._storage
    if not isinstance(storage, DeviceArray):
        raise TypeError("an operation on the GPU got a tensor in host memory: move it by .to()")
    return storage


def numba_view(array: Any, shape: Any, strides: Any) -> View:
    """A numba device array, as MiniTorch's kernels take it, as an operand."""
    address = 0 if SIMULATED else array.__cuda_array_interface__["data"][0]
    name = np.dtype(array.dtype).name
    return View(
        array,
        address,
        "bfloat16" if name == "uint16" else name,  # numba has no bfloat16: its bits travel
        tuple(int(n) for n in shape),
        tuple(int(step) for step in strides),
    )


def contiguous_data(storage: DeviceArray, shape: Ints) -> TensorData:
    """`storage` as a tensor of `shape`, row-major."""
    return TensorData._of(storage, shape, strides_from_shape(shape))


def gradient_memory(parameter: Tensor, dtype: np.dtype[Any]) -> TensorData:
    """Where the gradient of `parameter` may be written, contiguous: new memory, or, if it is one
    that is optimised inside CUDA graphs, where its optimiser wants it.
    """
    slot = parameter._tensor.slot
    if slot is not None and dtype == parameter.dtype:
        claimed: TensorData | None = slot.claim_gradient()
        if claimed is not None:
            return claimed
    return contiguous_data(DeviceArray.empty(parameter.size, dtype), parameter.shape)
