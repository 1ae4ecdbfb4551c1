"""What the tests add to numba's simulator: order, poison, and a search for races.

The simulator runs all threads of a block at once, polls for those at a barrier, and keeps shared
arrays from block to block. So it is slow, and a kernel that reads what it never wrote, or lacks a
barrier, computes the right numbers there. `strict_blocks` replaces its way of running a block:

- threads take turns, each running to its next barrier, always in one order;
- shared arrays begin as NaN (integers as 0xA5A5...) in every block;
- threads that wait at different barriers are an error.

Under `race_checker` it is an error, too, that two threads use one cell without a barrier in
between, one of them writing. All of this reaches for private names of the simulator, so
`test_simulator.py` plants the faults that it must find.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import numpy as np
from numba.cuda.simulator import kernel, kernelapi
from numba.cuda.simulator.cudadrv.devicearray import FakeCUDAArray, FakeWithinKernelCUDAArray


class Race(AssertionError):
    """Two threads use one cell, one of them writes, and no barrier stands between."""


class DivergentBarrier(AssertionError):
    """Threads of a block wait at different barriers."""


class Deadlock(AssertionError):
    """All threads of a block wait, and none is left that could do what they wait for."""


class Stopped(BaseException):
    """Ends the other threads of a block after one has failed."""


# ----- a block of threads that take turns -----


class Turns:
    """The threads of a block that still run, in order; exactly one of them is awake."""

    def __init__(self) -> None:
        self.threads: list[TurnThread] = []
        self.awake = 0
        self.barrier: Any = None
        self.barriers_passed = 0
        self.failure: BaseException | None = None
        self.finished = threading.Lock()
        self.finished.acquire()

    def run(self, threads: list[TurnThread]) -> None:
        """Run them all to their ends; raises what one of them raised."""
        self.threads = threads
        threads[0].go.release()
        self.finished.acquire()
        if self.failure is not None:
            raise self.failure

    def wait(self, thread: TurnThread, barrier: Any) -> None:
        """Called by the awake thread at a barrier: wake the next, sleep until all have come."""
        if not any(other.waits for other in self.threads):
            self.barrier = barrier
        elif barrier != self.barrier and self.failure is None:
            self.failure = DivergentBarrier(f"{barrier[0]}: threads wait at different barriers")
        thread.waits = True
        self._wake_after(self.awake, thread)
        thread.interval = self.barriers_passed

    def sleep(self, thread: TurnThread, condition: Callable[[], bool]) -> None:
        """Called by the awake thread where it waits for what others do: wake the next."""
        thread.condition = condition
        self._wake_after(self.awake, thread)
        thread.condition = None

    def _can_go_on(self, thread: TurnThread) -> bool:
        if self.failure is not None:
            return True
        return not thread.waits and (thread.condition is None or thread.condition())

    def _wake_after(self, place: int, thread: TurnThread | None) -> None:
        """Wake the first thread after a place that waits for nothing; let `thread` sleep."""
        count = len(self.threads)
        order = (n % count for n in range(place + 1, place + 1 + count))
        free = next((n for n in order if self._can_go_on(self.threads[n])), None)
        if free is None and all(other.waits for other in self.threads):  # all have come
            for other in self.threads:
                other.waits = False
            self.barriers_passed += 1
            free = 0
        if free is None:
            self.failure = Deadlock("every thread waits for what another would have to do")
            free = (place + 1) % count
        self.awake = free
        if self.threads[free] is not thread:
            self.threads[free].go.release()
            if thread is not None:
                thread.go.acquire()
        if thread is not None and self.failure is not None:
            raise Stopped

    def leave(self) -> None:
        """Called by the awake thread at its end: wake the next."""
        del self.threads[self.awake]
        if not self.threads:
            self.finished.release()
            return
        self._wake_after(self.awake - 1, None)


class TurnThread(threading.Thread):
    """One GPU thread, with the attributes and methods of the simulator's own `BlockThread`; then
    another: making threads takes longer than what most of them do.
    """

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.go = threading.Lock()  # released by whoever wakes this thread
        self.go.acquire()
        self.start()

    def prepare(self, turns: Turns, manager: Any, block: Any, point: Any, args: Any) -> TurnThread:
        """Be the thread `point` of a block, from the next waking on."""
        self.turns, self._manager, self.args = turns, manager, args
        self.blockIdx, self.threadIdx = kernelapi.Dim3(*block), kernelapi.Dim3(*point)
        x, y, _ = manager._block_dim
        self.thread_id = point[0] + x * (point[1] + y * point[2])
        self.interval: Any = 0  # between two barriers, of the block or others
        self.waits = False  # at a barrier of the block
        self.condition: Callable[[], bool] | None = None  # what else it waits for
        self.atomic = False
        return self

    def run(self) -> None:
        while True:
            self.go.acquire()
            try:
                if self.turns.failure is None:
                    with np.errstate(all="ignore"):  # integers wrap around, as on a GPU
                        self._manager._f(*self.args)
            except BaseException as error:
                if self.turns.failure is None:
                    error.add_note(f"in thread {self.threadIdx} of block {self.blockIdx}")
                    self.turns.failure = error
            finally:
                self.turns.leave()

    def syncthreads(self, depth: int = 2) -> None:
        caller = sys._getframe(depth)
        self.turns.wait(self, (caller.f_code.co_qualname, caller.f_lasti))

    def sleep_until(self, condition: Callable[[], bool]) -> None:
        """Let other threads run until the condition holds."""
        if not condition():
            self.turns.sleep(self, condition)

    def _vote(self, value: Any, answer: Any) -> int:
        self._manager.block_state[tuple(self.threadIdx)] = value
        self.syncthreads(4)
        result = int(answer(self._manager.block_state))
        self.syncthreads(4)
        return result

    def syncthreads_count(self, value: Any) -> int:
        return self._vote(value, np.count_nonzero)

    def syncthreads_and(self, value: Any) -> int:
        return self._vote(value, np.all)

    def syncthreads_or(self, value: Any) -> int:
        return self._vote(value, np.any)


_threads: list[TurnThread] = []


def _run_block(manager: Any, block: Any, *args: Any) -> None:
    """In place of `BlockManager.run`."""
    context = kernel._get_kernel_context()
    context.shared._allocations = {}
    context.shared._dynshared = np.full(context.shared._dynshared_size, -1, np.byte)  # NaN
    if _checker is not None:
        _checker.begin_block(context)
    turns = Turns()
    points = [point[::-1] for point in np.ndindex(*manager._block_dim[::-1])]
    while len(_threads) < len(points):
        _threads.append(TurnThread())
    turns.run(
        [
            thread.prepare(turns, manager, block, point, args)
            for thread, point in zip(_threads, points, strict=False)
        ]
    )


def _shared_array(shared: Any, shape: Any, dtype: Any, alignment: Any = None) -> Any:
    """In place of `FakeCUDAShared.array`: one array for each call in the code, NaN at first.

    `alignment` promises something about the address, which no simulated kernel sees.
    """
    if not isinstance(dtype, type | np.dtype):
        dtype = kernelapi.numpy_support.as_dtype(dtype)
    caller = sys._getframe(1)
    place = (caller.f_code, caller.f_lasti)
    array = shared._allocations.get(place)
    if array is None:
        if shape == 0:
            count = shared._dynshared_size // np.dtype(dtype).itemsize
            array = np.frombuffer(shared._dynshared.data, dtype, count)
        else:
            array = np.full(np.prod(shape) * np.dtype(dtype).itemsize, 0xA5, np.uint8).view(dtype)
            array = array.reshape(shape)
            if array.dtype.kind == "f":
                array.fill(np.nan)
        if _checker is not None:
            array = FakeWithinKernelCUDAArray(FakeCUDAArray(array))
        shared._allocations[place] = array
    return array


@contextmanager
def strict_blocks() -> Iterator[None]:
    """Run blocks as the text above says."""
    with (
        mock.patch.object(kernel.BlockManager, "run", _run_block),
        mock.patch.object(kernelapi.FakeCUDAShared, "array", _shared_array),
    ):
        yield


# ----- races -----

Access = tuple[Any, int, int]  # block, interval, thread
MANY = -1


class RaceChecker:
    """Of every cell of this launch: who read and who wrote it last.

    A cell is an address. Barriers put the accesses of a block in order; nothing does between blocks
    of a launch. Atomic operations are trusted.
    """

    def __init__(self) -> None:
        self.launch: Any = None
        self.arrays: list[Any] = []
        self.reads: dict[int, Access] = {}
        self.writes: dict[int, Access] = {}

    def begin_block(self, context: Any) -> None:
        """Shared arrays are kept until the launch ends, so that no address is used twice."""
        if context is not self.launch:
            self.launch = context
            self.reads, self.writes, self.arrays = {}, {}, []
        self.arrays.append((context.shared._allocations, context.shared._dynshared))

    def access(self, array: Any, index: Any, write: bool) -> None:
        """Remember an access, or raise `Race`."""
        thread = threading.current_thread()
        if not isinstance(thread, TurnThread) or thread.atomic:
            return
        me: Access = (tuple(thread.blockIdx), thread.interval, thread.thread_id)
        indices = index if isinstance(index, tuple) else (index,)
        cell = array.__array_interface__["data"][0]
        for i, stride, size in zip(indices, array.strides, array.shape, strict=True):
            cell += int(i if i >= 0 else i + size) * stride
        self._no_race(self.writes.get(cell), me, "writes" if write else "reads")
        if write:
            self._no_race(self.reads.get(cell), me, "writes")
            self.writes[cell] = me
            return
        before = self.reads.get(cell)
        if before is not None and before != me:
            block = me[0] if before[0] == me[0] else MANY
            alone = block != MANY and before[1] != me[1]
            me = (block, me[1], me[2] if alone else MANY)
        self.reads[cell] = me

    @staticmethod
    def _no_race(other: Access | None, me: Access, verb: str) -> None:
        if other is None or (other[0] == me[0] and (other[1] != me[1] or other[2] == me[2])):
            return
        before = "other threads" if other[2] == MANY else f"thread {other[2]} of block {other[0]}"
        raise Race(f"thread {me[2]} of block {me[0]} {verb} a cell that {before} used before it")


_checker: RaceChecker | None = None


@contextmanager
def race_checker() -> Iterator[None]:
    """Within `strict_blocks`: raise `Race` if two threads use one cell and one of them writes."""
    global _checker
    checker = _checker = RaceChecker()
    array = FakeWithinKernelCUDAArray
    get, put = array.__getitem__, array.__setitem__

    def getitem(self: Any, index: Any) -> Any:
        value = get(self, index)
        if not isinstance(value, array):  # a cell, not a view
            checker.access(self._item._ary, index, write=False)
        return value

    def setitem(self: Any, index: Any, value: Any) -> None:
        checker.access(self._item._ary, index, write=True)
        put(self, index, value)

    def trusted(method: Any) -> Any:
        def atomic(*args: Any) -> Any:
            thread: Any = threading.current_thread()
            thread.atomic = True
            try:
                return method(*args)
            finally:
                thread.atomic = False

        return atomic

    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(array, "__getitem__", getitem))
        stack.enter_context(mock.patch.object(array, "__setitem__", setitem))
        for name, method in list(vars(kernelapi.FakeCUDAAtomic).items()):
            if callable(method):
                patch = mock.patch.object(kernelapi.FakeCUDAAtomic, name, trusted(method))
                stack.enter_context(patch)
        try:
            yield
        finally:
            _checker = None
