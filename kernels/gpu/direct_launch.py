"""Launching compiled kernels by the driver, without numba, which takes 20 to 60 us for it.

`runtime.launch` says what is launched where; here is how its arguments become words, where a
kernel's machine code comes from, and the driver's call.
"""

from __future__ import annotations

import ctypes
import threading
from typing import Any

import numpy as np

from . import compile_cache
from .bindings import bindings

MOST_VALUES = 256  # of a kernel's arguments, an array being seven

_parameters = threading.local()
_WHOLE_NUMBERS = (np.int32, np.uint32, np.int64)


def pack(arguments: tuple[Any, ...]) -> tuple[list[int], tuple[Any, ...]] | None:
    """The arguments as 64-bit words, as numba's kernels take them, and what types they have.

    None where there is one of a kind that is left to numba.
    """
    values: list[int] = []
    kinds: list[Any] = []
    for x in arguments:
        kind: Any = type(x)
        if kind is int:
            values.append(x)
            if not -(1 << 63) <= x < 1 << 63:
                return None
        elif kind is tuple:
            values += x
            kind = len(x)
        elif kind is np.float32:
            values.append(int(x.view(np.uint32)))
        elif kind is float or kind is np.float64:
            values.append(int(np.float64(x).view(np.int64)))
        elif kind is np.uint64:
            values.append(int(x.view(np.int64)))
        elif kind in _WHOLE_NUMBERS:
            values.append(int(x))
        else:
            words = getattr(x, "_words", None) or _words_of(x)
            if words is None:
                return None
            values += words
            kind = x.dtype
        kinds.append(kind)
    return values, tuple(kinds)


def _words_of(array: Any) -> tuple[int, ...] | None:
    """A device array as a kernel gets it; kept on the array. None if it is none of ours."""
    interface = getattr(array, "__cuda_array_interface__", None)
    if interface is None or len(interface["shape"]) != 1 or interface.get("strides"):
        return None
    (size,), itemsize = interface["shape"], array.dtype.itemsize
    # its owner and parent (none), size, itemsize, address, shape, strides in bytes
    array._words = (0, 0, size, itemsize, interface["data"][0], size, itemsize)
    return array._words  # type: ignore[no-any-return]


def machine_code(kernel: Any, arguments: tuple[Any, ...], architecture: str) -> int:
    """The handle of the kernel for arguments of these types: from the disk, or compiled now."""
    signature = tuple(kernel.typeof_pyval(x) for x in arguments)
    name = compile_cache.key(kernel, signature, architecture)
    code = compile_cache.read(name)
    handle = None if code is None else compile_cache.loaded(code)
    if handle is None:
        compiled = kernel.compile(signature)._codelibrary
        compile_cache.write(name, bytes(compiled.get_cubin().code))
        handle = int(compiled.get_cufunc().handle)
    return handle


class Function:
    """A compiled kernel in the driver's hands.

    Args:
        handle: the driver's (CUkernel).

    """

    def __init__(self, handle: int) -> None:
        self.handle = handle
        self.shared_bytes = 0  # of dynamic shared memory that was asked for

    def allow(self, shared_bytes: int, device: int) -> None:
        """Let a block have so many: more than 48 KiB, static ones included, must be asked for."""
        driver = bindings()
        attribute = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        handle = driver.CUkernel(self.handle)
        (status,) = driver.cuKernelSetAttribute(attribute, shared_bytes, handle, device)
        if int(status) != 0:
            raise RuntimeError(f"the GPU gives no block {shared_bytes} bytes of shared memory")
        self.shared_bytes = shared_bytes

    def launch(
        self,
        grid: int | tuple[int, ...],
        threads: int | tuple[int, ...],
        shared_bytes: int,
        stream: Any,
        values: list[int],
    ) -> None:
        """Launch it on a stream with the words of its arguments."""
        if not hasattr(_parameters, "words"):  # of this thread: a launch lets other threads run
            words = (ctypes.c_int64 * MOST_VALUES)()
            first = ctypes.addressof(words)
            _parameters.words = words
            _parameters.addresses = (ctypes.c_void_p * MOST_VALUES)(
                *(first + 8 * i for i in range(MOST_VALUES))
            )
        _parameters.words[: len(values)] = values
        driver = bindings()
        if not isinstance(stream, int):
            stream = getattr(stream.handle, "value", stream.handle)
        (status,) = driver.cuLaunchKernel(
            driver.CUfunction(self.handle),
            *_three(grid),
            *_three(threads),
            shared_bytes,
            driver.CUstream(int(stream or 0)),
            ctypes.addressof(_parameters.addresses),
            0,
        )
        if int(status) != 0:
            raise RuntimeError(f"the kernel could not be launched: {status.name} ({int(status)})")


def _three(sizes: int | tuple[int, ...]) -> tuple[int, ...]:
    return (sizes, 1, 1) if isinstance(sizes, int) else (*sizes, 1, 1)[:3]
