"""Tensors and the arrays of other libraries (PyTorch, CuPy, numba, JAX) share memory, both ways.

Out: `Tensor.__cuda_array_interface__` and `Tensor.__dlpack__` are what other libraries look for.
In: `import_array`, which `foreign` makes tensors of. Nothing is copied that can be read where it
is; work is ordered on the streams of both sides.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from ..arguments import type_name
from ..cuda import driver
from ..cuda.allocator import BorrowedMemory
from ..cuda.device_array import DeviceArray
from ..cuda_kernel_ops import CudaKernelOps
from ..dtypes import FLOAT_DTYPES, HALF_DTYPES
from ..fast_ops import FastOps
from ..kernels.gpu.runtime import SIMULATED, cuda, is_available
from ..tensor_data import TensorData, strides_from_shape
from ..tensor_ops import TensorBackend
from . import dlpack

if TYPE_CHECKING:
    from ..tensor import Tensor

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


def data_from_dlpack(x: Any, name: str = "x") -> TensorData:
    """The elements of an object with `__dlpack__`, where they are.

    Args:
        x: the object.
        name: what errors call it.

    Raises:
        TypeError: `x` has no DLPack, or elements that numpy has no dtype for.
        ValueError: it is on a device that we do not compute on, its strides are negative, or its
            library refuses.

    """
    if not hasattr(x, "__dlpack__") or not hasattr(x, "__dlpack_device__"):
        raise TypeError(f"{name} must have __dlpack__, as arrays do, got {type_name(x)}")
    if hasattr(x, "resolve_neg"):  # PyTorch keeps the signs of some views aside
        x = x.resolve_conj().resolve_neg()
    with _naming(name, x):
        kind, number = x.__dlpack_device__()
    if int(kind) == dlpack.CPU:
        with _naming(name, x):
            memory = dlpack.take(x.__dlpack__())
        return _data(memory, on_device=False, name=name)
    here = -1 if SIMULATED or not is_available() else int(cuda.get_current_device().id)
    if int(kind) not in (dlpack.CUDA, dlpack.CUDA_MANAGED) or number != here:
        raise ValueError(
            f"{name} must be on the CPU or on the current GPU, got DLPack device "
            f"({int(kind)}, {number})"
        )
    stream = driver.stream_handle() or LEGACY_STREAM
    with _naming(name, x):
        memory = dlpack.take(x.__dlpack__(stream=stream))
    return _data(memory, on_device=True, name=name)


@contextmanager
def _naming(name: str, x: Any) -> Iterator[None]:
    """What a library says when it refuses to give elements, with the argument's name."""
    try:
        yield
    except TypeError as error:
        raise TypeError(f"{name} is {_kind(x)}: {error}") from error
    except (BufferError, NotImplementedError, RuntimeError, ValueError) as error:
        raise ValueError(f"{name} is {_kind(x)}, whose memory cannot be read: {error}") from error


def _kind(x: Any) -> str:
    """The type and, where it has one, the dtype of an array."""
    dtype = getattr(x, "dtype", None)
    return type_name(x) if dtype is None else f"a {type_name(x)} of {_dtype_name(dtype)}"


def _dtype_name(dtype: Any) -> str:
    return str(dtype).removeprefix("torch.")


def data_from_numpy(x: npt.NDArray[Any], name: str = "x") -> TensorData:
    """The elements of a numpy array: where they are, also if nobody may write there; copied if they
    are in another byte order, run backwards or are not aligned.

    Raises:
        TypeError: `x` is a masked array.

    """
    if isinstance(x, np.ma.MaskedArray):
        raise TypeError(f"{name} is a masked array of numpy: fill it first, {name}.filled(...)")
    size = x.dtype.itemsize
    if not x.dtype.isnative or not x.flags.aligned or any(n < 0 or n % size for n in x.strides):
        x = np.array(x, x.dtype.newbyteorder("="), order="C", subok=False)
    strides = tuple(n // size for n in x.strides)
    memory = dlpack.Memory(x.ctypes.data, x.shape, strides, x.dtype, (dlpack.CPU, 0), x)
    return _data(memory, on_device=False, name=name)


def data_from_cuda_array(x: Any, name: str = "x") -> TensorData:
    """The elements of an object with `__cuda_array_interface__`, on the GPU; the current stream
    waits for the stream that the object names.

    Args:
        x: the object.
        name: what errors call it.

    Raises:
        TypeError: elements of a kind that DLPack alone can name, or a mask.
        ValueError: its strides are negative, or parts of elements.

    """
    given = x.__cuda_array_interface__
    dtype = np.dtype(given["typestr"])
    if dtype.kind not in "biuf" or given.get("mask") is not None:
        raise TypeError(f"{name}: cannot use a __cuda_array_interface__ of {dtype} or with a mask")
    stream = given.get("stream")
    if stream is not None:
        driver.wait_for_stream(0 if stream == LEGACY_STREAM else int(stream))
    shape, strides = tuple(given["shape"]), given.get("strides")
    if strides is None:
        steps = strides_from_shape(shape)
    elif any(step % dtype.itemsize for step in strides):
        raise ValueError(f"{name}: strides must be whole elements of {dtype}, got {strides} bytes")
    else:
        steps = tuple(step // dtype.itemsize for step in strides)
    pointer = int(given["data"][0] or 0)
    device = (dlpack.CUDA, 0)
    return _data(dlpack.Memory(pointer, shape, steps, dtype, device, x), on_device=True, name=name)


def _data(memory: dlpack.Memory, on_device: bool, name: str) -> TensorData:
    """Borrowed memory as the elements of a tensor."""
    dtype, empty = memory.dtype, 0 in memory.shape
    if min(memory.strides, default=0) < 0:
        raise ValueError(
            f"{name}: strides must not be negative, got {memory.strides}: copy the array"
        )
    if not memory.pointer and not empty:
        raise ValueError(f"{name} has no elements in memory, as a fake tensor: its address is 0")
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


def import_array(
    x: Any, dtypes: tuple[np.dtype[Any], ...] | None = None, name: str = "x"
) -> TensorData:
    """The elements of an array of any library, without a copy where that can be.

    Args:
        x: a numpy array, or an object with `__dlpack__` or `__cuda_array_interface__`.
        dtypes: those allowed; the floats of tensors if not given.
        name: what errors call it.

    Raises:
        TypeError: `x` is no array, or its dtype is none of ours.
        ValueError: it is on a device that we do not compute on, its strides are negative, or its
            library refuses to give its elements.

    """
    if isinstance(x, np.ndarray):
        data = data_from_numpy(x, name)
    elif hasattr(x, "__dlpack__"):
        data = data_from_dlpack(x, name)
    elif hasattr(x, "__cuda_array_interface__"):
        data = data_from_cuda_array(x, name)
    else:
        raise TypeError(
            f"{name} must be an array, with __dlpack__ or __cuda_array_interface__, got "
            f"{type_name(x)}: minitorch.tensor takes numbers and lists"
        )
    floats = (*FLOAT_DTYPES, *HALF_DTYPES) if data.on_device else FLOAT_DTYPES
    allowed = floats if dtypes is None else dtypes
    if data.dtype not in allowed:
        names = ", ".join(dtype.name for dtype in allowed)
        where = "GPU" if data.on_device else "CPU"
        raise TypeError(
            f"{name} on the {where} must have a dtype of {names}, got {data.dtype.name}"
        )
    return data
