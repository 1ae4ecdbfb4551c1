"""What numba's simulator runs in place of Hopper's instructions (see ptx_simulated.py).

Copies and products are done at once, by the thread that begins the copy, or once for the warpgroup.
So a kernel that forgets to wait for one of its own may compute the right numbers here. One that
waits for what never comes, or for the wrong phase, does not; nor does one whose maps, descriptors,
steps or swizzles are wrong: operands are read byte by byte from where a descriptor says.
"""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np

from .ptx_simulated import area_of, block, numbers, ordered, plain_array, together, until
from .shared_layout import PANEL, swizzle
from .tensor_map import SIZES, map_at

WARPGROUP = 128


def _bytes(address: int, size: int) -> Any:
    """Shared memory, as an array of bytes to read or write; races are not looked for."""
    area, first = area_of(address, size)
    return plain_array(area.array).reshape(-1).view(np.uint8)[first : first + size]


# ----- barriers -----


class _Barrier:
    """An mbarrier."""

    def __init__(self, count: int) -> None:
        self.count = self.pending = count
        self.bytes = 0  # still to come
        self.phase = 0

    def change(self, arrivals: int, size: int) -> None:
        self.pending -= arrivals
        self.bytes += size
        assert self.pending >= 0, "more threads arrive at a barrier than it expects"
        if self.pending == 0 and self.bytes == 0:
            self.phase, self.pending = self.phase + 1, self.count


def _barrier(address: Any) -> _Barrier:
    found = block().barriers.get(int(address))
    if found is None:
        raise ValueError(f"no barrier was initialised at {int(address)}")
    return found  # type: ignore[no-any-return]


def _change(address: Any, arrivals: int, size: int) -> None:
    with block().lock:
        _barrier(address).change(arrivals, size)


def mbarrier_init(address: Any, count: Any) -> None:
    """mbarrier.init."""
    assert int(address) % 8 == 0, "a barrier has 8 bytes at a multiple of 8"
    _bytes(int(address), 8)
    block().barriers[int(address)] = _Barrier(int(count))


def mbarrier_arrive(address: Any) -> None:
    """mbarrier.arrive."""
    ordered()
    _change(address, 1, 0)


def mbarrier_arrive_expect_tx(address: Any, size: Any) -> None:
    """mbarrier.arrive.expect_tx."""
    ordered()
    _change(address, 1, int(size))


def mbarrier_try_wait(address: Any, parity: Any) -> Any:
    """mbarrier.try_wait.parity, which gives up at once."""
    return np.uint32(_barrier(address).phase % 2 != int(parity))


def mbarrier_wait(address: Any, parity: Any) -> None:
    """mbarrier.try_wait.parity until it succeeds."""
    until(lambda: bool(mbarrier_try_wait(address, parity)))
    ordered()


def nothing(*arguments: Any) -> None:
    """Fences, hints, registers; to wait for what is done already."""


def first(accumulator: Any, x: Any) -> Any:
    """A wait for the accumulator that begins with x."""
    return accumulator


def same(*accumulators: Any) -> Any:
    """The accumulators that a fence or a wait takes and returns."""
    return accumulators if len(accumulators) > 1 else next(iter(accumulators), None)


# ----- copies -----


def _box(kind: Any, corner: tuple[int, ...]) -> tuple[Any, Any]:
    """The part of a tensor that a box covers, as an array of bytes (..., size), the innermost
    dimension last; and where it lies in the box.
    """
    size = SIZES[kind.dtype]
    first = [max(x, 0) for x in corner]
    end = [min(x + b, n) for x, b, n in zip(corner, kind.box, kind.shape, strict=True)]
    counts = [max(e - f, 0) for e, f in zip(end, first, strict=True)]
    inside = tuple(slice(f - x, f - x + n) for f, x, n in zip(first, corner, counts, strict=True))[
        ::-1
    ]
    strides = (size, *kind.strides)
    if not all(counts):
        return np.zeros((*counts[::-1], size), np.uint8), inside
    start = kind.address + sum(f * s for f, s in zip(first, strides, strict=True))
    length = sum((n - 1) * s for n, s in zip(counts, strides, strict=True)) + size
    memory = np.frombuffer((ctypes.c_char * length).from_address(start), np.uint8)
    view = np.lib.stride_tricks.as_strided(memory, (*counts[::-1], size), (*strides[::-1], 1))
    return view, inside


def _places(kind: Any, address: int) -> Any:
    """Where the bytes of a box are in the piece of shared memory that it is copied to."""
    offsets: Any = np.arange(kind.box_bytes)
    if not kind.swizzle:
        return offsets
    assert address % (8 * kind.swizzle) == 0, "a swizzled box begins at a multiple of its period"
    return swizzle(offsets, kind.swizzle)


def copy_in(target: Any, tensor_map: Any, barrier: Any, *corner: Any) -> None:
    """cp.async.bulk.tensor from global to shared memory."""
    kind, target = map_at(int(tensor_map)), int(target)
    box = np.zeros((*kind.box[::-1], SIZES[kind.dtype]), np.uint8)
    part, inside = _box(kind, tuple(int(x) for x in corner))
    box[inside] = part
    _bytes(target, kind.box_bytes)[_places(kind, target)] = box.reshape(-1)
    _change(barrier, 0, -kind.box_bytes)


def copy_flat(target: Any, source: Any, size: Any, barrier: Any) -> None:
    """cp.async.bulk."""
    target, source, size = int(target), int(source), int(size)
    assert target % 16 == source % 16 == size % 16 == 0, "addresses and sizes are multiples of 16"
    _bytes(target, size)[:] = np.frombuffer(ctypes.string_at(source, size), np.uint8)
    _change(barrier, 0, -size)


# ----- products -----


def _matrix(descriptor: int, rows: int, trans: bool, dtype: str) -> Any:
    """The operand (rows, 16) of one step along k, float64, as its descriptor describes it.

    `rows` are A's rows, or B's columns. With `trans` these lie along the rows of panels.
    """
    assert descriptor >> 62 == 1, "the simulator knows the swizzle of 128 bytes"
    start = (descriptor & 0x3FFF) << 4
    leading, stride = (descriptor >> 16 & 0x3FFF) << 4, (descriptor >> 32 & 0x3FFF) << 4
    row, k = np.indices((rows, 16), dtype=np.int64)
    across, along = (k, row) if trans else (row, k)
    places: Any = start + along // 64 * leading * trans + across // 8 * stride
    places = swizzle(places + across % 8 * PANEL + along % 64 * 2)
    first = int(places.min())
    memory = _bytes(first, int(places.max()) + 2 - first)
    low, high = memory[places - first], memory[places + 1 - first]
    return numbers(low.astype(np.uint32) | high.astype(np.uint32) << 8, dtype)[..., 0]


def wgmma(
    n: int,
    dtype: str,
    steps: list[tuple[int, ...]],
    trans: tuple[bool, bool],
    accumulate: bool | None,
) -> Any:
    """wgmma.mma_async of all steps: a function like that of ptx_hopper.py. `steps` are the offsets
    of A and B, or of B alone if A is in registers.
    """

    def product(lanes: list[Any]) -> Any:
        *before, a, b = lanes[0]
        sums = np.zeros((64, n))
        if before:
            sums += _rows([lane[0] for lane in lanes], n)
        words = None if len(steps) == 2 else _rows_of_a([lane[-2] for lane in lanes], dtype)
        for step, offsets in enumerate(zip(*steps, strict=True)):
            right = _matrix(int(b) + (offsets[-1] >> 4), n, trans[1], dtype)
            left = (
                _matrix(int(a) + (offsets[0] >> 4), 64, trans[0], dtype)
                if words is None
                else words[:, 16 * step : 16 * step + 16]
            )
            sums += left @ right.T
        parts = sums.astype(np.float32).reshape(4, 2, 8, n // 8, 4, 2)  # w, r, g, j, q, c
        return [tuple(x) for x in parts.transpose(0, 2, 4, 3, 1, 5).reshape(WARPGROUP, n // 2)]

    def multiply(*arguments: Any) -> Any:
        if accumulate is None:
            *arguments, keep = arguments  # type: ignore[assignment]
            arguments = arguments if keep else arguments[1:]
        return together(arguments, product, WARPGROUP)

    return multiply


def _rows(accumulators: list[Any], n: int) -> Any:
    """(64, n) of the lanes' sums: `shared_layout.sums_place` for each of the four warps."""
    parts = np.array(accumulators, np.float64).reshape(4, 8, 4, n // 8, 2, 2)  # w, g, q, j, r, c
    return parts.transpose(0, 4, 1, 3, 2, 5).reshape(64, n)


def _rows_of_a(words: list[Any], dtype: str) -> Any:
    """(64, k) of the lanes' registers: `shared_layout.a_place` for each of the four warps."""
    found = numbers([[int(w) for w in lane] for lane in words], dtype)
    parts = found.reshape(4, 8, 4, -1, 2, 2, 2)  # w, g, q, step, upper half of k, r, element
    return parts.transpose(0, 5, 1, 3, 4, 2, 6).reshape(64, -1)
