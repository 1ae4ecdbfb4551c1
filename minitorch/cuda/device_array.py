"""`DeviceArray`: the storage of a tensor on the GPU, as a numpy array is that of one on the CPU.

It knows its memory, dtype and size. Shapes and strides are `TensorData`'s business, arithmetic the
kernels'.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt

from ..dtypes import BFLOAT16
from . import allocator, driver

_BITS = np.dtype(np.uint16)  # in which bfloat16 travels to kernels, numba has no such type

Memory = allocator.Memory | allocator.BorrowedMemory


class DeviceArray:
    """A one-dimensional, contiguous array in device memory.

    Copies, fills and kernels are in order on the current stream (`runtime.current_stream`).

    Args:
        memory: keeps the memory; shared by views.
        pointer: address of the first element.
        size: number of elements.
        dtype: their dtype.

    """

    __slots__ = ("_array", "_memory", "dtype", "pointer", "size")

    def __init__(self, memory: Memory, pointer: int, size: int, dtype: np.dtype[Any]) -> None:
        self._memory = memory
        self.pointer = pointer
        self.size = size
        self.dtype = dtype
        self._array: Any = None

    # ----- making -----

    @staticmethod
    def empty(size: int, dtype: npt.DTypeLike) -> DeviceArray:
        """An array whose elements are not set.

        Raises:
            OutOfMemoryError: the GPU has no room for it.

        """
        dtype = np.dtype(dtype)
        memory = allocator.allocate(size * dtype.itemsize)
        return DeviceArray(memory, memory.pointer, size, dtype)

    @staticmethod
    def from_host(array: npt.NDArray[Any]) -> DeviceArray:
        """A copy of all elements of a numpy array, in row-major order."""
        out = DeviceArray.empty(array.size, array.dtype)
        out.copy_from_host(array)
        return out

    # ----- what it is -----

    @property
    def itemsize(self) -> int:
        """Bytes of an element."""
        return self.dtype.itemsize

    @property
    def nbytes(self) -> int:
        """Bytes of all elements."""
        return self.size * self.dtype.itemsize

    def __len__(self) -> int:
        return self.size

    @property
    def array(self) -> Any:
        """The elements as a numba array for kernels; bfloat16 as uint16.

        It does not keep the memory: hold this object until the kernel has been launched.
        """
        if self._array is None:
            # numba takes 20 us to make one, and a block is often used again for the same.
            made = self._memory.arrays
            key = (self.pointer, self.size, self.dtype)
            self._array = made.get(key)
            if self._array is None:
                dtype = _BITS if self.dtype == BFLOAT16 else self.dtype
                self._array = made[key] = driver.numba_array(self.pointer, self.size, dtype)
        return self._array

    def record_stream(self, stream: Any) -> None:
        """Say that `stream` uses this array too, which was made on another stream.

        Without it the memory could be handed to the next tensor while `stream` still reads.
        """
        self._memory.record_stream(stream)

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        """How other libraries, and kernels of plain `numba.cuda`, see this memory."""
        return {
            "shape": (self.size,),
            "typestr": self.dtype.str,
            "data": (self.pointer, False),
            "strides": None,
            "version": 3,
            "stream": driver.stream_handle() or 1,  # 1: the legacy default stream
        }

    # ----- copies -----

    def copy_to_host(self) -> npt.NDArray[Any]:
        """A numpy copy; waits for the current stream.

        Raises:
            ValueError: a kernel found bad input since the last time anyone asked.

        """
        out: npt.NDArray[Any] = np.empty(self.size, self.dtype)
        driver.copy_to_host(out, self.pointer)
        raise_deferred_errors()
        return out

    def copy_from_host(self, array: npt.NDArray[Any]) -> None:
        """Overwrite all elements by those of a numpy array of as many, in row-major order.

        Raises:
            ValueError: it has another number of elements.

        """
        if array.size != self.size:
            raise ValueError(f"array must have {self.size} elements, got {array.size}")
        driver.copy_to_device(self.pointer, np.ascontiguousarray(array, self.dtype))

    def copy_from_device(self, other: DeviceArray) -> None:
        """Overwrite all elements by those of an array of the same size and dtype on the device.

        Raises:
            ValueError: it has another size or dtype.

        """
        if (other.size, other.dtype) != (self.size, self.dtype):
            raise ValueError(
                f"other must have {self.size} elements of {self.dtype}, got {other.size} of "
                f"{other.dtype}"
            )
        driver.copy_on_device(self.pointer, other.pointer, self.nbytes)

    def fill(self, value: float) -> None:
        """Set every element to a number."""
        driver.fill(self.pointer, self.size, _pattern(value, self.dtype))

    def __array__(
        self, dtype: npt.DTypeLike | None = None, copy: bool | None = None
    ) -> npt.NDArray[Any]:
        """For `numpy.asarray`: one copy to the host."""
        if copy is False:
            raise ValueError("an array on the GPU becomes a numpy array by a copy only")
        return np.asarray(self.copy_to_host(), dtype)

    def __deepcopy__(self, memo: dict[int, Any]) -> DeviceArray:
        out = DeviceArray.empty(self.size, self.dtype)
        out.copy_from_device(self)
        return out

    def __reduce__(self) -> tuple[Any, ...]:
        """For pickle: the elements, by way of the host."""
        return DeviceArray.from_host, (self.copy_to_host(),)

    # ----- elements and views -----

    def __getitem__(self, key: int | slice) -> Any:
        """One element as a numpy scalar (a copy to the host), or a view of a range."""
        if isinstance(key, slice):
            start, stop, step = key.indices(self.size)
            if step != 1:
                raise ValueError(f"a range of device memory must have step 1, got {step}")
            size = max(stop - start, 0)
            if size == self.size:
                return self
            pointer = self.pointer + start * self.itemsize
            return DeviceArray(self._memory, pointer, size, self.dtype)
        position = self._position(key)
        return self[position : position + 1].copy_to_host()[0]

    def __setitem__(self, key: int, value: float) -> None:
        """Set one element."""
        position = self._position(key)
        self[position : position + 1].fill(value)

    def _position(self, key: int) -> int:
        if not -self.size <= key < self.size:
            raise IndexError(f"position {key} is outside an array of {self.size} elements")
        return int(key) % self.size

    def view(self, dtype: npt.DTypeLike) -> DeviceArray:
        """The same memory seen as another dtype."""
        dtype = np.dtype(dtype)
        return DeviceArray(self._memory, self.pointer, self.nbytes // dtype.itemsize, dtype)

    def __repr__(self) -> str:
        return f"DeviceArray({self.size}, {self.dtype.name})"


def _pattern(value: float, dtype: np.dtype[Any]) -> npt.NDArray[Any]:
    with np.errstate(over="ignore"):  # infinity, as in a kernel
        return np.array([value]).astype(dtype)


# ----- errors that kernels find -----
#
# A kernel cannot raise. It stays in bounds, sets its bit in a word of device memory, and whoever
# next copies something to the host hears of it.

EMBEDDING_ERROR = 1
TARGET_ERROR = 2

_messages: dict[int, str] = {
    EMBEDDING_ERROR: "Embedding: x must hold whole numbers from 0 to num_embeddings - 1",
    TARGET_ERROR: "softmax_loss: target must hold whole numbers from 0 to the classes' number - 1",
}


@cache
def error_word() -> DeviceArray:
    """The word (int32, one element) in which kernels set the bits of what went wrong."""
    return permanent(np.int32)


def permanent(dtype: npt.DTypeLike) -> DeviceArray:
    """One element, zero, outside the pools of CUDA graphs: make it before one that uses it is
    captured.
    """
    with allocator.use_pool(allocator.ordinary):
        word = DeviceArray.empty(1, dtype)
    word.fill(0)
    return word


def raise_deferred_errors() -> None:
    """Wait for the current stream, and raise what its kernels have found, once.

    Raises:
        ValueError: naming the operation and what it wanted.

    """
    if error_word.cache_info().currsize == 0:
        driver.synchronize_stream()
        return
    word = error_word()
    bits = np.zeros(1, np.int32)
    driver.copy_to_host(bits, word.pointer)
    driver.synchronize_stream()
    if bits[0]:
        word.fill(0)
        raise ValueError("; ".join(text for bit, text in _messages.items() if bits[0] & bit))
