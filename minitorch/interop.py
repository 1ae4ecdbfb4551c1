"""Tensors and the arrays of other libraries (PyTorch, CuPy, numba, JAX) share memory, both ways.

Out: `Tensor.__cuda_array_interface__` and `Tensor.__dlpack__` are what other libraries look for.
In: `import_array`, which `foreign` makes tensors of. Nothing is copied; work is ordered on the
streams of both sides.
"""

from __future__ import annotations

import ctypes
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np

from . import cuda_driver as driver
from . import dlpack
from .allocator import BorrowedMemory
from .cuda_kernel_ops import CudaKernelOps
from .device_array import DeviceArray
from .dtypes import FLOAT_DTYPES, HALF_DTYPES
from .fast_ops import FastOps
from .kernels.runtime import SIMULATED, cuda
from .tensor_data import TensorData, strides_from_shape
from .tensor_ops import TensorBackend

if TYPE_CHECKING:
    from .tensor import Tensor

LEGACY_STREAM = 1  # both protocols' number for the default stream


@cache
def default_backend(on_device: bool) -> TensorBackend:
    """The backend that arrays of other libraries get if none is named."""
    return TensorBackend(CudaKernelOps if on_device else FastOps)


# ----- out -----


def cuda_array_interface(tensor: Tensor) -> dict[str, Any]:
    """`Tensor.__cuda_array_interface__`, version 3. bfloat16 shows as two bytes without a meaning,
    as PyTorch has it: DLPack is the better way for it.

    Raises:
        AttributeError: the tensor is not on the GPU.

    """
    data = tensor._tensor
    if not data.on_device:
        raise AttributeError("a tensor on the CPU has no __cuda_array_interface__")
    size = data.dtype.itemsize
    return {
        "shape": data.shape,
        "strides": None if data.is_contiguous() else tuple(n * size for n in data.strides),
        "typestr": data.dtype.str,
        "data": (data._storage.pointer, False),
        "version": 3,
        "stream": driver.stream_handle() or LEGACY_STREAM,
    }


def dlpack_device(tensor: Tensor) -> tuple[int, int]:
    """`Tensor.__dlpack_device__`: (2, number) on a GPU, (1, 0) on the CPU and in the simulator."""
    if not tensor._tensor.on_device or SIMULATED:
        return dlpack.CPU, 0
    return dlpack.CUDA, int(cuda.get_current_device().id)


def to_dlpack(
    tensor: Tensor,
    *,
    stream: int | None = None,
    max_version: tuple[int, int] | None = None,
    dl_device: tuple[int, int] | None = None,
    copy: bool | None = None,
) -> Any:
    """`Tensor.__dlpack__`: a capsule that shares this tensor's memory. The graph stays behind.

    Args:
        stream: on which the taker will read (the array API standard has the numbers); it waits for
            what this tensor's stream has to do. -1: no waiting.
        max_version: ignored: the capsule has no version, which all takers know.
        dl_device: if given, must be this tensor's device.
        copy: True is refused.

    Raises:
        BufferError: another device, or a copy, is asked for.

    """
    device = dlpack_device(tensor)
    if dl_device not in (None, device) or copy:
        raise BufferError("a tensor is given where it is, without a copy: use .to(backend) before")
    data = tensor._tensor
    if not data.on_device:
        address = data._storage.ctypes.data
    else:
        address = data._storage.pointer
        if stream != -1 and not SIMULATED:
            _let_wait(stream)
    memory = dlpack.Memory(address, data.shape, data.strides, data.dtype, device, data._storage)
    return dlpack.export(memory)


def _let_wait(stream: int | None) -> None:
    """Let another library's stream wait for what the current stream has to do."""
    theirs = 0 if stream in (None, LEGACY_STREAM) else int(stream or 0)
    driver.wait_for_stream(driver.stream_handle(), waiting=theirs)


# ----- in -----


def data_from_dlpack(x: Any) -> TensorData:
    """The elements of an object with `__dlpack__`, where they are.

    Raises:
        TypeError: `x` has no DLPack.
        ValueError: it is on a device that we do not compute on, or its strides are negative.

    """
    if not hasattr(x, "__dlpack__") or not hasattr(x, "__dlpack_device__"):
        raise TypeError(f"x must have __dlpack__, as arrays do, got {type(x).__name__}")
    kind, number = x.__dlpack_device__()
    if int(kind) == dlpack.CPU:
        return _data(dlpack.take(x.__dlpack__()), on_device=False)
    here = -1 if SIMULATED else int(cuda.get_current_device().id)
    if int(kind) not in (dlpack.CUDA, dlpack.CUDA_MANAGED) or number != here:
        raise ValueError(
            f"x must be on the CPU or on the current GPU, got DLPack device ({int(kind)}, {number})"
        )
    stream = driver.stream_handle() or LEGACY_STREAM
    return _data(dlpack.take(x.__dlpack__(stream=stream)), on_device=True)


def data_from_cuda_array(x: Any) -> TensorData:
    """The elements of an object with `__cuda_array_interface__`, on the GPU; the current stream
    waits for the stream that the object names.

    Raises:
        TypeError: elements of a kind that DLPack alone can name, or a mask.
        ValueError: its strides are negative, or parts of elements.

    """
    given = x.__cuda_array_interface__
    dtype = np.dtype(given["typestr"])
    if dtype.kind not in "biuf" or given.get("mask") is not None:
        raise TypeError(f"cannot use a __cuda_array_interface__ of {dtype} or with a mask")
    stream = given.get("stream")
    if stream is not None:
        driver.wait_for_stream(0 if stream == LEGACY_STREAM else int(stream))
    shape, strides = tuple(given["shape"]), given.get("strides")
    if strides is None:
        steps = strides_from_shape(shape)
    elif any(step % dtype.itemsize for step in strides):
        raise ValueError(f"strides must be whole elements of {dtype}, got {strides} bytes")
    else:
        steps = tuple(step // dtype.itemsize for step in strides)
    pointer = int(given["data"][0] or 0)
    device = (dlpack.CUDA, 0)
    return _data(dlpack.Memory(pointer, shape, steps, dtype, device, x), on_device=True)


def _data(memory: dlpack.Memory, on_device: bool) -> TensorData:
    """Borrowed memory as the elements of a tensor."""
    if min(memory.strides, default=0) < 0:
        raise ValueError(f"strides must not be negative, got {memory.strides}: copy the array")
    dtype, empty = memory.dtype, 0 in memory.shape
    span = 1 + sum((n - 1) * s for n, s in zip(memory.shape, memory.strides, strict=True))
    span = 0 if empty else span
    storage: Any
    if on_device:
        borrowed = BorrowedMemory(memory.pointer, memory.owner)
        storage = DeviceArray(borrowed, memory.pointer, span, dtype)
    else:
        buffer: Any = (ctypes.c_byte * (span * dtype.itemsize)).from_address(memory.pointer)
        buffer.owner = memory.owner  # the array keeps the buffer, the buffer the owner
        storage = np.ndarray((span,), dtype, buffer)
    return TensorData._of(storage, memory.shape, memory.strides)


def import_array(x: Any, dtypes: tuple[np.dtype[Any], ...] | None = None) -> TensorData:
    """The elements of an array of any library, by DLPack if it has that, without a copy.

    Args:
        x: has `__dlpack__` or `__cuda_array_interface__`.
        dtypes: those allowed; the floats of tensors if not given.

    Raises:
        TypeError: `x` has neither, or its dtype is none of ours.
        ValueError: it is on a device that we do not compute on, or its strides are negative.

    """
    if hasattr(x, "__dlpack__"):
        data = data_from_dlpack(x)
    elif hasattr(x, "__cuda_array_interface__"):
        data = data_from_cuda_array(x)
    else:
        raise TypeError(
            f"x must be an array, with __dlpack__ or __cuda_array_interface__, got "
            f"{type(x).__name__}: minitorch.tensor takes numbers and lists"
        )
    floats = (*FLOAT_DTYPES, *HALF_DTYPES) if data.on_device else FLOAT_DTYPES
    allowed = floats if dtypes is None else dtypes
    if data.dtype not in allowed:
        names = ", ".join(dtype.name for dtype in allowed)
        where = "GPU" if data.on_device else "CPU"
        raise TypeError(f"x on the {where} must have a dtype of {names}, got {data.dtype.name}")
    return data


__all__ = [
    "cuda_array_interface",
    "data_from_cuda_array",
    "data_from_dlpack",
    "default_backend",
    "dlpack_device",
    "import_array",
    "to_dlpack",
]
