"""The few calls of the CUDA driver that storage needs: memory, copies, fills, events.

Addresses and streams are plain numbers. In the simulator an address is that of host memory and all
work is done at once, so everything above this file is the same with and without a GPU.
"""

from __future__ import annotations

import ctypes
import threading
from typing import Any

import numpy as np
import numpy.typing as npt

from ..kernels.gpu.bindings import DriverError as DriverError
from ..kernels.gpu.bindings import bindings as bindings
from ..kernels.gpu.bindings import check as check
from ..kernels.gpu.runtime import SIMULATED, cuda, current_stream, is_available

_simulated_memory: dict[int, npt.NDArray[np.uint8]] = {}
_this_thread = threading.local()


def use_context() -> None:
    """Make numba's context current on this thread: a driver call needs one.

    Raises:
        RuntimeError: there is no GPU.

    """
    if not getattr(_this_thread, "has_context", False):
        if not is_available():
            raise RuntimeError("there is no GPU with a CUDA driver here: use a backend of the CPU")
        cuda.current_context()
        _this_thread.has_context = True


def stream_handle(stream: Any = None) -> int:
    """The number of a numba stream, of the current one if None; 0 is the default stream."""
    stream = current_stream() if stream is None else stream
    if isinstance(stream, int):
        return stream
    handle = getattr(stream, "handle", 0)
    return int(getattr(handle, "value", handle) or 0)


# ----- memory -----


def allocate(nbytes: int) -> int | None:
    """The address of new memory, not set; None if there is not enough."""
    if SIMULATED:
        memory = np.empty(nbytes + 512, np.uint8)
        address = -(-memory.ctypes.data // 512) * 512  # aligned as the driver's
        _simulated_memory[address] = memory
        return address
    use_context()
    driver = bindings()
    relaxed = driver.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_RELAXED
    # A stream that is being captured must not make allocation an error: it is not captured.
    before = check(driver.cuThreadExchangeStreamCaptureMode(relaxed))
    status, address = driver.cuMemAlloc(nbytes)
    check(driver.cuThreadExchangeStreamCaptureMode(before))
    if status == driver.CUresult.CUDA_ERROR_OUT_OF_MEMORY:
        return None
    return int(check((status, address)))


def free(address: int) -> None:
    """Give memory back to the driver, which waits until the GPU has done its work."""
    if SIMULATED:
        del _simulated_memory[address]
    else:
        check(bindings().cuMemFree(address))


def memory_info() -> tuple[int, int]:
    """Bytes of the GPU's memory that are free, and all of them; (0, 0) in the simulator."""
    if SIMULATED:
        return 0, 0
    use_context()
    free_bytes, total = check(bindings().cuMemGetInfo())
    return int(free_bytes), int(total)


# ----- copies and fills, in order on the current stream -----


def copy_to_device(address: int, array: npt.NDArray[Any]) -> None:
    """Copy a contiguous array; it may be changed as soon as this returns."""
    if SIMULATED:
        ctypes.memmove(address, array.ctypes.data, array.nbytes)
    elif array.nbytes:
        use_context()
        check(
            bindings().cuMemcpyHtoDAsync(address, array.ctypes.data, array.nbytes, stream_handle())
        )


def copy_to_host(array: npt.NDArray[Any], address: int) -> None:
    """Start filling a contiguous array; its values are there after `synchronize_stream`."""
    if SIMULATED:
        ctypes.memmove(array.ctypes.data, address, array.nbytes)
    elif array.nbytes:
        use_context()
        check(
            bindings().cuMemcpyDtoHAsync(array.ctypes.data, address, array.nbytes, stream_handle())
        )


def copy_on_device(to: int, source: int, nbytes: int) -> None:
    """Copy from one place on the device to another."""
    if SIMULATED:
        ctypes.memmove(to, source, nbytes)
    elif nbytes:
        use_context()
        check(bindings().cuMemcpyDtoDAsync(to, source, nbytes, stream_handle()))


def fill(address: int, size: int, pattern: npt.NDArray[Any]) -> None:
    """Repeat one element, given as an array of one, `size` times."""
    if size == 0:
        return
    itemsize = pattern.itemsize
    if SIMULATED:
        simulated_array(address, size, pattern.dtype)[:] = pattern
        return
    use_context()
    driver, stream = bindings(), stream_handle()
    if itemsize == 8:
        low, high = (int(half) for half in pattern.view(np.uint32))
        if low == high:
            check(driver.cuMemsetD32Async(address, low, 2 * size, stream))
            return
        check(driver.cuMemsetD32Async(address, low, 1, stream))
        check(driver.cuMemsetD32Async(address + 4, high, 1, stream))
        done = 1
        while done < size:  # what is there is copied behind itself: twice as much each time
            more = min(done, size - done)
            copy_on_device(address + 8 * done, address, 8 * more)
            done += more
        return
    bits = int(pattern.view(f"u{itemsize}")[0])
    calls = {1: "cuMemsetD8Async", 2: "cuMemsetD16Async", 4: "cuMemsetD32Async"}
    check(getattr(driver, calls[itemsize])(address, bits, size, stream))


# ----- arrays for kernels -----


def simulated_array(address: int, size: int, dtype: np.dtype[Any]) -> npt.NDArray[Any]:
    """The simulator's device memory as a numpy array."""
    buffer: Any = (ctypes.c_byte * (size * dtype.itemsize)).from_address(address)
    return np.ndarray((size,), dtype, buffer)


def numba_array(address: int, size: int, dtype: np.dtype[Any]) -> Any:
    """The one-dimensional array at an address, as numba's kernels take it; owns no memory."""
    if SIMULATED:
        buffer = (ctypes.c_byte * (size * dtype.itemsize)).from_address(address)
        return cuda.device_array((size,), dtype=dtype, buffer=buffer)
    use_context()
    description = {
        "shape": (size,),
        "typestr": dtype.str,
        "data": (address, False),
        "strides": None,
        "version": 3,
    }
    return cuda.from_cuda_array_interface(description, sync=False)


# ----- waiting -----


def synchronize_stream() -> None:
    """Wait for the current stream."""
    if not SIMULATED:
        use_context()
        check(bindings().cuStreamSynchronize(stream_handle()))


def synchronize() -> None:
    """Wait for all work of the GPU."""
    if not SIMULATED:
        use_context()
        check(bindings().cuCtxSynchronize())


def record_event(stream: int) -> Any:
    """An event that happens when the work that `stream` has so far is done."""
    if SIMULATED:
        return None
    use_context()
    driver = bindings()
    event = check(driver.cuEventCreate(driver.CUevent_flags.CU_EVENT_DISABLE_TIMING))
    check(driver.cuEventRecord(event, stream))
    return event


def has_happened(event: Any) -> bool:
    """Whether the work before an event is done; a finished event is destroyed."""
    if event is None:
        return True
    driver = bindings()
    (status,) = driver.cuEventQuery(event)
    if status == driver.CUresult.CUDA_ERROR_NOT_READY:
        return False
    check((status, None))
    check(driver.cuEventDestroy(event))
    return True


def wait_for(event: Any) -> None:
    """Let the host wait until the work before an event is done, and destroy the event."""
    if event is not None:
        check(bindings().cuEventSynchronize(event))
        check(bindings().cuEventDestroy(event))


def wait_for_stream(stream: int, waiting: int | None = None) -> None:
    """Let later work of the stream `waiting` (the current one) wait for what `stream` has now."""
    here = stream_handle() if waiting is None else waiting
    if SIMULATED or stream == here:
        return
    event = record_event(stream)
    check(bindings().cuStreamWaitEvent(here, event, 0))
    check(bindings().cuEventDestroy(event))
