"""How a backend of the GPU makes and moves elements.

The functions with the names of `StorageOps`, which says what each means, are operations: `CudaOps`
lists them. No arithmetic here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache, reduce
from math import prod
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from ..dtypes import promote, storage_dtype
from ..kernels import band_cuda
from ..kernels.copy_cuda import copy_into as copy_elements
from ..kernels.elementwise_cuda import zip_into
from ..kernels.gpu.runtime import precision
from ..tensor_data import TensorData
from ..tensor_ops import empty_output
from . import allocator
from .device_array import DeviceArray
from .views import contiguous_data, device_storage, dtype_name, view_of

if TYPE_CHECKING:
    from ..tensor import Tensor

    Array = npt.NDArray[Any]
    DType = np.dtype[Any]

# Numbers that programs compute with, kept on the GPU. None is ever dropped: the kernels of a CUDA
# graph may hold its address.
MOST_CONSTANTS = 4096
_constants: dict[tuple[float, str, np.dtype[Any]], TensorData] = {}

# ----- new storage, by the allocator and the driver -----


def from_numpy(array: Array) -> TensorData:
    """See `StorageOps.from_numpy`; a copy. float16 and bfloat16 keep their dtype too."""
    host = np.asarray(array, storage_dtype(array.dtype, on_gpu=True))
    return contiguous_data(DeviceArray.from_host(host), array.shape)


def placed(data: TensorData) -> TensorData:
    """See `StorageOps.placed`."""
    return from_numpy(data.array)


def empty(shape: tuple[int, ...], dtype: DType) -> TensorData:
    """See `StorageOps.empty`."""
    return contiguous_data(DeviceArray.empty(prod(shape), dtype), shape)


def full(shape: tuple[int, ...], value: float, dtype: DType) -> TensorData:
    """See `StorageOps.full`; by the driver, without a kernel."""
    out = empty(shape, dtype)
    device_storage(out).fill(value)
    return out


def constant(value: float, dtype: DType) -> TensorData:
    """See `StorageOps.constant`; written once, used ever after."""
    value = float(value)
    key = (value, value.hex(), dtype)  # hex tells -0.0 from 0.0
    data = _constants.get(key)
    if data is None:
        data = full((1,), value, dtype)
        data.number = value
        if len(_constants) < MOST_CONSTANTS and not allocator.is_capturing():
            _constants[key] = data
    return data


# ----- copies -----


def copied(data: TensorData, dtype: DType | None = None) -> TensorData:
    """A contiguous copy, in another dtype if one is given."""
    out = empty(data.shape, data.dtype if dtype is None else dtype)
    copy_elements(view_of(out), view_of(data))
    return out


def contiguous(data: TensorData) -> TensorData:
    """`data` itself if it is row-major, else a copy that is."""
    return data if data.is_contiguous() else copied(data)


def in_dtype(data: TensorData, dtype: DType) -> TensorData:
    """`data` itself if it has that dtype, else a contiguous copy that has."""
    return data if data.dtype == dtype else copied(data, dtype)


def cast(a: Tensor, dtype: DType) -> Tensor:
    """See `StorageOps.cast`."""
    return a._new(copied(a._tensor, dtype))


def copy_into(target: Tensor, source: Tensor) -> None:
    """See `StorageOps.copy_into`."""
    copy_elements(view_of(target._tensor), view_of(source._tensor))


def slice_backward(grad: Tensor, key: Any, shape: tuple[int, ...]) -> Tensor:
    """See `StorageOps.slice_backward`; a key with a negative step goes through the host."""
    keys = key if isinstance(key, tuple) else (key,)
    if any(isinstance(part, slice) and (part.step or 1) < 0 for part in keys):
        host = np.zeros(shape, grad.dtype)
        host[key] = grad.to_numpy()
        return grad._from_numpy(host)
    out = full(shape, 0.0, grad.dtype)
    copy_elements(view_of(out.slice(key)), view_of(grad._tensor))
    return grad._new(out)


def concatenate(parts: Sequence[Tensor], dim: int) -> Tensor:
    """See `StorageOps.concatenate`; parts of several dtypes become the widest."""
    first = parts[0]
    dim %= first.dims
    length = sum(part.shape[dim] for part in parts)
    dtype = reduce(promote, (part.dtype for part in parts))
    out = empty((*first.shape[:dim], length, *first.shape[dim + 1 :]), dtype)
    start = 0
    for part in parts:
        place = (slice(None),) * dim + (slice(start, start + part.shape[dim]),)
        copy_elements(view_of(out.slice(place)), view_of(part._tensor))
        start += part.shape[dim]
    return first._new(out)


# ----- masks -----


def attention_mask(mask: Any) -> Any:
    """See `StorageOps.attention_mask`; a numpy array is copied to the GPU."""
    if mask is None or isinstance(mask, TensorData):
        return mask
    if hasattr(mask, "_tensor"):
        return mask._tensor
    host = np.asarray(mask)
    return contiguous_data(DeviceArray.from_host(host), host.shape)


def masked_fill(a: Tensor, mask: Any, value: float) -> Tensor:
    """See `StorageOps.masked_fill`."""
    out = empty(a.shape, a.dtype)
    fill = _fill_function(float(value), dtype_name(a.dtype))
    zip_into(fill, view_of(out), view_of(a._tensor), view_of(attention_mask(mask)))
    return a._new(out)


@cache
def _fill_function(value: float, dtype: str) -> Callable[[Any, Any], Any]:
    """The scalar function that gives `value` where the mask is not 0."""
    number = precision(dtype).real(value)

    def fill(x: Any, masked: Any) -> Any:
        return number if masked else x

    return fill


def band_fill(a: Tensor, lower: int, upper: int, value: float) -> Tensor:
    """See `StorageOps.band_fill`."""
    a = a.contiguous()
    out = empty_output(a, a.shape)
    x, y = a._tensor._storage.array, out._tensor._storage.array
    rows, columns = a.shape[-2:]
    band_cuda.fill(y, x, rows, columns, lower, upper, value, a.dtype.name)
    return out
