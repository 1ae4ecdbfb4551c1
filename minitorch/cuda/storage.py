"""The part of a GPU backend that makes storage, by the allocator and the driver; and masks."""

from __future__ import annotations

from math import prod
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from ..dtypes import storage_dtype
from ..kernels import band_cuda
from ..tensor_data import TensorData, strides_from_shape
from ..tensor_ops import TensorOps, empty_output
from . import allocator
from .device_array import DeviceArray

if TYPE_CHECKING:
    from ..tensor import Tensor

    Array = npt.NDArray[Any]

# Numbers that programs compute with, kept on the GPU. None is ever dropped: the kernels of a CUDA
# graph may hold its address.
MOST_CONSTANTS = 4096
_constants: dict[tuple[float, str, np.dtype[Any]], TensorData] = {}


def _contiguous(storage: DeviceArray, shape: tuple[int, ...]) -> TensorData:
    return TensorData._of(storage, shape, strides_from_shape(shape))


class CudaStorageOps(TensorOps):
    """Storage in device memory."""

    cuda = True

    @staticmethod
    def from_numpy(array: Array) -> TensorData:
        """See `StorageOps.from_numpy`; a copy. float16 and bfloat16 keep their dtype too."""
        dtype = storage_dtype(array.dtype, on_gpu=True)
        host = np.asarray(array, dtype)
        return _contiguous(DeviceArray.from_host(host), array.shape)

    @classmethod
    def placed(cls, data: TensorData) -> TensorData:
        """See `StorageOps.placed`."""
        return cls.from_numpy(data.array)

    @staticmethod
    def empty(shape: tuple[int, ...], dtype: np.dtype[Any]) -> TensorData:
        """See `StorageOps.empty`."""
        return _contiguous(DeviceArray.empty(prod(shape), dtype), shape)

    @staticmethod
    def full(shape: tuple[int, ...], value: float, dtype: np.dtype[Any]) -> TensorData:
        """See `StorageOps.full`; by the driver, without a kernel."""
        storage = DeviceArray.empty(prod(shape), dtype)
        storage.fill(value)
        return _contiguous(storage, shape)

    @classmethod
    def constant(cls, value: float, dtype: np.dtype[Any]) -> TensorData:
        """See `StorageOps.constant`; written once, used ever after."""
        value = float(value)
        key = (value, value.hex(), dtype)  # hex tells -0.0 from 0.0
        data = _constants.get(key)
        if data is None:
            data = cls.full((1,), value, dtype)
            data.number = value
            if len(_constants) < MOST_CONSTANTS and not allocator.is_capturing():
                _constants[key] = data
        return data

    @staticmethod
    def attention_mask(mask: Any) -> Any:
        """See `StorageOps.attention_mask`; a numpy array is copied to the GPU."""
        if mask is None or isinstance(mask, TensorData):
            return mask
        if hasattr(mask, "_tensor"):
            return mask._tensor
        host = np.asarray(mask)
        return _contiguous(DeviceArray.from_host(host), host.shape)

    @staticmethod
    def band_fill(a: Tensor, lower: int, upper: int, value: float) -> Tensor:
        """See `StorageOps.band_fill`."""
        a = a.contiguous()
        out = empty_output(a, a.shape)
        x, y = a._tensor._storage.array, out._tensor._storage.array
        rows, columns = a.shape[-2:]
        band_cuda.fill(y, x, rows, columns, lower, upper, value, a.dtype.name)
        return out

    @staticmethod
    def check_class_numbers(ids: Tensor, num_classes: int, name: str) -> None:
        """Nothing is read here: the kernels that use the numbers report bad ones
        (`device_array.error_word`).
        """


__all__ = ["CudaStorageOps"]
