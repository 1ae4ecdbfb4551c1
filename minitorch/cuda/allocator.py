"""A caching allocator: freed device memory is kept, by size, for the next tensor that wants it.

The driver takes tens of microseconds to allocate and waits for the GPU to free; a list takes one.
Sizes are rounded up to buckets (at most an eighth is lost), and a bucket hands out what was last
given back. All kernels that use a block are on the stream it was allocated on, so a block that goes
back is ready at once for the next tensor of that stream: whatever the GPU has still to do with the
old contents comes first. `record_stream` tells of another stream that uses a block: it is then not
handed out until that stream's work is done.

The scheme is PyTorch's (its CUDACachingAllocator), without splitting of blocks.
"""

from __future__ import annotations

import atexit
import gc
import threading
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from ..kernels.gpu.runtime import SIMULATED
from . import driver

SMALLEST = 512
# numba arrays that a block keeps for kernels: one for each dtype and size it was used with
MOST_ARRAYS = 16
_POISON = np.full(1, 0xFF, np.uint8)


class OutOfMemoryError(MemoryError):
    """The GPU has not enough memory; all tensors made before are as they were."""


class Block:
    """A piece of device memory, of a bucket's size, for one tensor after another.

    Args:
        pointer: its address.
        nbytes: its size.
        stream: number of the stream on which it is used.
        pool: where it goes back to.

    """

    __slots__ = ("arrays", "nbytes", "pointer", "pool", "stream", "streams")

    def __init__(self, pointer: int, nbytes: int, stream: int, pool: Pool) -> None:
        self.pointer = pointer
        self.nbytes = nbytes
        self.stream = stream
        self.pool = pool
        self.streams: set[int] = set()  # other streams that use it now
        self.arrays: dict[Any, Any] = {}  # what numba_array made of it


class Memory:
    """A block in use: it goes back to its pool when nobody holds this object any more."""

    __slots__ = ("arrays", "block", "pointer")

    def __init__(self, block: Block) -> None:
        self.block = block
        self.pointer = block.pointer
        self.arrays = block.arrays

    def __del__(self) -> None:
        _give_back(self.block)

    def record_stream(self, stream: Any) -> None:
        """Say that `stream` (of `cuda.stream()`) uses this memory too."""
        handle = driver.stream_handle(stream)
        if handle != self.block.stream:
            self.block.streams.add(handle)


class BorrowedMemory:
    """Memory that another library owns and keeps for as long as `owner` lives."""

    __slots__ = ("arrays", "owner", "pointer")

    def __init__(self, pointer: int, owner: Any) -> None:
        self.pointer = pointer
        self.owner = owner
        self.arrays: dict[Any, Any] = {}

    def record_stream(self, stream: Any) -> None:
        """Nothing: the owner knows no streams of ours."""


class Pool:
    """Free blocks, by stream and size. The ordinary pool, or the private one of a CUDA graph.

    A graph's kernels have the addresses of their blocks built in, so these must not be handed to
    anyone else for as long as the graph lives.
    """

    def __init__(self) -> None:
        self.free: defaultdict[tuple[int, int], list[Block]] = defaultdict(list)
        self.closed = False  # the graph is gone: blocks that come back are not kept

    def release(self) -> None:
        """Give all free blocks back to the driver."""
        for blocks in list(self.free.values()):
            while blocks:
                _free(blocks.pop())

    def close(self) -> None:
        """The graph is gone: give back what is free, and each other block as it comes back."""
        self.closed = True
        self.release()


class Statistics:
    """Bytes of blocks in tensors, the most there ever were, and bytes taken from the driver."""

    allocated = 0
    most_allocated = 0
    reserved = 0


statistics = Statistics()
ordinary = Pool()


class _Pools(threading.local):
    """Where each thread allocates: another thread is not captured with this one."""

    def __init__(self) -> None:
        self.stack = [ordinary]


_pools = _Pools()
_pending: list[tuple[Block, list[Any]]] = []  # blocks that other streams still use


def bucket_size(nbytes: int) -> int:
    """The size of the block for `nbytes`: a multiple of 512 bytes with four leading bits."""
    if nbytes <= 16 * SMALLEST:
        return max(-(-nbytes // SMALLEST), 1) * SMALLEST
    shift = (nbytes - 1).bit_length() - 4
    return ((nbytes + (1 << shift) - 1) >> shift) << shift


def allocate(nbytes: int) -> Memory:
    """Memory for at least `nbytes` on the current stream, its contents not set.

    Raises:
        OutOfMemoryError: there is not enough, even without what is cached.

    """
    size = bucket_size(nbytes)
    stream, pool = driver.stream_handle(), _pools.stack[-1]
    if _pending:
        _collect_pending()
    try:
        block = pool.free[stream, size].pop()
    except IndexError:
        block = Block(_from_driver(size), size, stream, pool)
    if SIMULATED:  # what a kernel reads before it is written is NaN
        driver.fill(block.pointer, size, _POISON)
    statistics.allocated += size
    if statistics.allocated > statistics.most_allocated:
        statistics.most_allocated = statistics.allocated
    return Memory(block)


def _give_back(block: Block) -> None:
    """Called when the last user of a block is gone."""
    statistics.allocated -= block.nbytes
    if len(block.arrays) > MOST_ARRAYS:
        block.arrays.clear()
    if block.streams:
        _pending.append((block, [driver.record_event(stream) for stream in block.streams]))
        block.streams.clear()
    else:
        _keep(block)


def _keep(block: Block) -> None:
    if block.pool.closed:
        _free(block)
    else:
        block.pool.free[block.stream, block.nbytes].append(block)


def _collect_pending() -> None:
    """Take back the blocks whose other streams are done."""
    if _pools.stack[-1] is not ordinary:
        return  # a stream that is being captured may not be asked
    for _ in range(len(_pending)):  # more may come meanwhile, at the end
        block, events = _pending.pop(0)
        left = [event for event in events if not driver.has_happened(event)]
        if left:
            _pending.append((block, left))
        else:
            _keep(block)


def _from_driver(size: int) -> int:
    """New memory; where there is none, the cache is emptied for it."""
    address = driver.allocate(size)
    for attempt in range(2):
        if address is not None:
            break
        if attempt == 1:
            gc.collect()  # tensors in circles of references
        empty_cache()
        address = driver.allocate(size)
    if address is None:
        raise OutOfMemoryError(_message(size))
    statistics.reserved += size
    return address


def _free(block: Block) -> None:
    driver.free(block.pointer)
    statistics.reserved -= block.nbytes


def _message(wanted: int) -> str:
    free, total = driver.memory_info()
    return (
        f"the GPU is out of memory: wanted {_readable(wanted)}, free {_readable(free)} of "
        f"{_readable(total)}; minitorch's tensors hold {_readable(statistics.allocated)}, and its "
        f"cache, which has been emptied, keeps {_readable(statistics.reserved)} with them"
    )


def _readable(nbytes: int) -> str:
    for unit, size in (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if nbytes >= size:
            return f"{nbytes / size:.2f} {unit}"
    return f"{nbytes} bytes"


def empty_cache() -> None:
    """Give the blocks that no tensor uses back to the driver, for other programs."""
    if _pending and _pools.stack[-1] is ordinary:
        driver.synchronize()
        _collect_pending()
    ordinary.release()


def is_capturing() -> bool:
    """Whether memory comes from the private pool of a CUDA graph, which is being captured."""
    return _pools.stack[-1] is not ordinary


@contextmanager
def use_pool(pool: Pool) -> Iterator[None]:
    """Allocate from `pool` inside the block: a CUDA graph's private one while it is captured."""
    _pools.stack.append(pool)
    try:
        yield
    finally:
        _pools.stack.pop()


@atexit.register
def _stop() -> None:
    """At the end of the program memory goes back by itself, and modules are taken apart."""
    del Memory.__del__
