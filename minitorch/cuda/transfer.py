"""Copies between host and GPU that the host does not wait for: batches ahead, losses behind.

The GPU copies by itself only from and to pinned memory, which the system may not move. A copy from
other memory makes the host wait until the stream has done all that came before.
"""

from __future__ import annotations

from typing import Any

import numpy.typing as npt

from ..kernels.gpu import runtime
from . import driver
from .device_array import DeviceArray

Array = npt.NDArray[Any]


class Upload:
    """Sends arrays to one place on the GPU, each while the GPU still works on the one before.

    Args:
        target: where to.
        slots: how many arrays may be on their way at once.

    """

    def __init__(self, target: DeviceArray, slots: int = 2) -> None:
        self.target = target
        self._pinned = [_pinned(target) for _ in range(slots)]
        self._events: list[Any] = [None] * slots
        self._next = 0

    def send(self, array: Array) -> None:
        """Copy an array, in order on the current stream; it may be changed at once.

        Raises:
            ValueError: it has another number of elements than the target.

        """
        if array.size != self.target.size:
            raise ValueError(f"array must have {self.target.size} elements, got {array.size}")
        slot = self._next
        self._next = (slot + 1) % len(self._pinned)
        driver.wait_for(self._events[slot])
        self._pinned[slot][:] = array.reshape(-1)
        driver.copy_to_device(self.target.pointer, self._pinned[slot])
        self._events[slot] = driver.record_event(driver.stream_handle())


class Pending:
    """A number that the GPU has yet to compute.

    Args:
        array: pinned, one element, into which it is copied.
        event: after the copy.

    """

    def __init__(self, array: Array, event: Any) -> None:
        self._array = array
        self._event = event
        self._value: float | None = None

    def value(self) -> float:
        """The number; waits for the work that leads to it, not for what was launched after it."""
        if self._value is None:
            driver.wait_for(self._event)
            self._value = float(self._array[0])
        return self._value


class Download:
    """Fetches one number again and again, while the GPU goes on with what comes next.

    Args:
        source: the number's place on the GPU, one element.
        slots: how many may be on their way at once.

    """

    def __init__(self, source: DeviceArray, slots: int = 4) -> None:
        self.source = source
        self._pinned = [_pinned(source) for _ in range(slots)]
        self._pending: list[Pending | None] = [None] * slots
        self._next = 0

    def fetch(self) -> Pending:
        """Begin to copy the number, in order on the current stream."""
        slot = self._next
        self._next = (slot + 1) % len(self._pinned)
        earlier, array = self._pending[slot], self._pinned[slot]
        if earlier is not None:
            earlier.value()  # read it before its memory is used again
        driver.copy_to_host(array, self.source.pointer)
        pending = Pending(array, driver.record_event(driver.stream_handle()))
        self._pending[slot] = pending
        return pending


def _pinned(like: DeviceArray) -> Array:
    array: Array = runtime.cuda.pinned_array(like.size, dtype=like.dtype)
    return array
