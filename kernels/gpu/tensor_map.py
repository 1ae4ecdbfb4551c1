"""Tensor maps: what the copy engine (TMA) of Hopper GPUs is told about a tensor.

A map says where a tensor lies in global memory and which boxes of it are copied, so that a kernel
only names a box's first element. A `TensorMap` is the description; the driver encodes it in 128
bytes (`cuTensorMapEncodeTiled`), and `on_device` puts these in GPU memory, once: a call with the
same tensors finds them there. They are never moved or changed, since a CUDA graph may hold their
address.

The copy that puts them there is made on a stream of its own, and is no part of a graph that is
being captured meanwhile.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from .bindings import bindings, check
from .runtime import SIMULATED, cuda

BYTES = 128  # of an encoded map, and what its address is a multiple of
SLAB_BYTES = 64 * 1024  # of GPU memory, taken at a time
MOST_ELEMENTS = 256  # of a box, along each dimension
PIECE = 16  # bytes: strides, and rows of a box, are multiples
SIZES = {"float16": 2, "bfloat16": 2, "float32": 4}
SWIZZLES = {0: "NONE", 32: "32B", 64: "64B", 128: "128B"}


class TensorMap(NamedTuple):
    """A tensor of up to 5 dimensions in global memory, and the box that is copied at once.

    Args:
        dtype: "float16", "bfloat16" or "float32".
        address: of the tensor's first element, a multiple of 16.
        shape: the innermost dimension first, whose elements are neighbours.
        strides: of the other dimensions, in bytes; multiples of 16.
        box: how many elements along each dimension are copied; zeros where the tensor ends.
        swizzle: bytes of a row of the box in shared memory, 128, 64 or 32 (`shared_layout`), or 0
            for no swizzle.

    """

    dtype: str
    address: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    box: tuple[int, ...]
    swizzle: int = 128

    @property
    def box_bytes(self) -> int:
        """What one copy counts at its barrier, whether or not all of it is within the tensor."""
        return int(np.prod(self.box)) * SIZES[self.dtype]

    def check(self) -> TensorMap:
        """Itself.

        Raises:
            TypeError: another dtype.
            ValueError: what the copy engine cannot do, with the number that is wrong.

        """
        _size_of(self.dtype)
        if not 1 <= len(self.shape) <= 5 or len(self.box) != len(self.shape):
            raise ValueError(f"1 to 5 dimensions, got shape {self.shape} and box {self.box}")
        if len(self.strides) != len(self.shape) - 1:
            raise ValueError(f"a stride for each dimension but the first, got {self.strides}")
        if self.address % PIECE or self.address < 0:
            raise ValueError(f"the address is a multiple of 16, got {self.address}")
        if any(not 1 <= size <= 1 << 32 for size in self.shape):
            raise ValueError(f"each dimension has 1 to 2**32 elements, got {self.shape}")
        if any(x % PIECE or not 0 <= x < 1 << 40 for x in self.strides):
            raise ValueError(f"strides are multiples of 16 bytes below 2**40, got {self.strides}")
        if any(not 1 <= size <= MOST_ELEMENTS for size in self.box):
            raise ValueError(f"a box has 1 to 256 elements along a dimension, got {self.box}")
        row = self.box[0] * SIZES[self.dtype]
        if self.swizzle not in SWIZZLES or row % PIECE or (self.swizzle and row > self.swizzle):
            raise ValueError(
                f"rows of a box are multiples of 16 bytes, up to the swizzle's 128, 64 or 32: got "
                f"{row} with a swizzle of {self.swizzle}"
            )
        return self


def _size_of(dtype: str) -> int:
    """The bytes of an element.

    Raises:
        TypeError: another dtype.

    """
    if dtype not in SIZES:
        raise TypeError(f"tensor maps are of {', '.join(SIZES)}, got {dtype}")
    return SIZES[dtype]


def matrices_map(
    dtype: str,
    address: int,
    shape: tuple[int, ...],
    strides: tuple[int, ...],
    rows: int,
) -> TensorMap:
    """Of (batch, heads, length, columns) of 16-bit numbers, by boxes of `rows` rows and 64 columns.

    A kernel names a box by (column, row, head, batch). `tile_offset` of shared_layout.py says where
    its elements are in shared memory.

    Args:
        dtype: "float16" or "bfloat16".
        address: of the first element.
        shape: of the tensor.
        strides: of the tensor, in elements; the last is 1.
        rows: of a box.

    Raises:
        TypeError: another dtype.
        ValueError: not four dimensions; rows are not contiguous, or begin at addresses that are no
            multiples of 16.

    """
    size_of_one = _size_of(dtype)
    if len(shape) != 4 or len(strides) != 4:
        raise ValueError(f"four dimensions, got shape {shape} and strides {strides}")
    if strides[3] != 1:
        raise ValueError(f"elements of a row are neighbours, got strides {strides}")
    batch, heads, length, columns = shape
    outer = (length, heads, batch)
    # Of a dimension of one element the stride may be anything.
    steps = [
        x * size_of_one if size > 1 else PIECE
        for size, x in zip(outer, (strides[2], strides[1], strides[0]), strict=True)
    ]
    box = (128 // size_of_one, rows, 1, 1)
    return TensorMap(dtype, address, (columns, *outer), tuple(steps), box).check()


# ----- for the copy engine -----


def encoded(tensor_map: TensorMap) -> bytes:
    """The 128 bytes that the copy engine reads.

    Raises:
        RuntimeError: there is no driver that knows tensor maps, or it refuses this one.

    """
    driver, kind = bindings(), tensor_map.check()
    dimensions = len(kind.shape)
    dtype = getattr(driver.CUtensorMapDataType, f"CU_TENSOR_MAP_DATA_TYPE_{kind.dtype.upper()}")
    swizzle = getattr(driver.CUtensorMapSwizzle, f"CU_TENSOR_MAP_SWIZZLE_{SWIZZLES[kind.swizzle]}")
    found = check(
        driver.cuTensorMapEncodeTiled(
            dtype,
            dimensions,
            kind.address,
            [driver.cuuint64_t(size) for size in kind.shape],
            [driver.cuuint64_t(stride) for stride in kind.strides],
            [driver.cuuint32_t(size) for size in kind.box],
            [driver.cuuint32_t(1)] * dimensions,
            driver.CUtensorMapInterleave.CU_TENSOR_MAP_INTERLEAVE_NONE,
            swizzle,
            driver.CUtensorMapL2promotion.CU_TENSOR_MAP_L2_PROMOTION_L2_128B,
            driver.CUtensorMapFloatOOBfill.CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
        )
    )
    return b"".join(int(word).to_bytes(8, "little") for word in found.opaque)


class _Slab:
    """GPU memory of one device that maps are put in, one after the other, for good."""

    def __init__(self) -> None:
        self.next = self.end = 0
        self.stream: Any = None

    def put(self, data: bytes) -> int:
        """The address of a copy of `data`. Harmless to a graph that is being captured."""
        driver = bindings()
        relaxed = driver.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_RELAXED
        before = check(driver.cuThreadExchangeStreamCaptureMode(relaxed))
        try:
            if self.stream is None:
                flag = driver.CUstream_flags.CU_STREAM_NON_BLOCKING
                self.stream = check(driver.cuStreamCreate(flag))
            if self.next + len(data) > self.end:
                size = max(SLAB_BYTES, len(data))
                self.next = int(check(driver.cuMemAlloc(size)))
                self.end = self.next + size
            address = self.next
            host = np.frombuffer(data, np.uint8)
            check(driver.cuMemcpyHtoDAsync(address, host.ctypes.data, len(data), self.stream))
            check(driver.cuStreamSynchronize(self.stream))
        finally:
            check(driver.cuThreadExchangeStreamCaptureMode(before))
        self.next += len(data)
        return address


class _SimulatedSlab:
    """Host memory in its place, in the simulator."""

    def __init__(self) -> None:
        self.copies: list[Any] = []

    def put(self, data: bytes) -> int:
        """The address of a copy of `data`, a multiple of 128."""
        memory = np.zeros(len(data) + BYTES, np.uint8)
        address = -(-memory.ctypes.data // BYTES) * BYTES
        first = address - memory.ctypes.data
        memory[first : first + len(data)] = np.frombuffer(data, np.uint8)
        self.copies.append(memory)
        return int(address)


_slabs: dict[int, Any] = {}
_known: dict[tuple[Any, ...], np.uint64] = {}
_described: dict[int, TensorMap] = {}  # in the simulator, whose copy engine reads this
_lock = threading.Lock()


def on_device(*maps: TensorMap) -> np.uint64:
    """The address of the encoded maps in the current device's memory: the n-th at 128 n from it.

    Those that were asked for before, together, are there already: no copy, no call of the driver.

    Raises:
        TypeError: as `TensorMap.check`.
        ValueError: likewise.
        RuntimeError: there is no GPU, or it knows no tensor maps.

    """
    if not SIMULATED:
        return _kept(maps, lambda: b"".join(encoded(m) for m in maps))
    address = _kept(maps, lambda: bytes(BYTES * len(maps)))
    for n, each in enumerate(maps):
        _described[int(address) + BYTES * n] = each.check()
    return address


def map_at(address: int) -> TensorMap:
    """What was described at an address of `on_device`, in the simulator."""
    if address not in _described:
        raise ValueError(f"no tensor map is at {address:#x}")
    return _described[address]


def constant(data: bytes) -> np.uint64:
    """The address of a copy of `data` in the current device's memory, a multiple of 128, for good:
    for tables that many calls read.
    """
    return _kept(data, lambda: data)


def _kept(what: Any, make: Callable[[], bytes]) -> np.uint64:
    device = 0 if SIMULATED else int(cuda.get_current_device().id)
    key = (device, what)
    address = _known.get(key)
    if address is not None:
        return address
    with _lock:
        address = _known.get(key)
        if address is None:
            slab = _slabs.setdefault(device, _SimulatedSlab() if SIMULATED else _Slab())
            data = make()
            address = np.uint64(slab.put(data + bytes(-len(data) % BYTES)))
            _known[key] = address
    return address
