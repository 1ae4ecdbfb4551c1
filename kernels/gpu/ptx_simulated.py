"""What numba's simulator runs in place of PTX instructions: slow, and as they are defined.

A warp's instructions let each lane see what the others gave: all its threads meet. What a fragment
holds is `shared_layout`'s to say; the product is numpy's. Copies are done at once, so that waiting
for one is nothing.

Shared memory has addresses here as well: the arrays of a block that `shared_address` is asked about
begin at multiples of 1024, the first at 0.
"""

from __future__ import annotations

import ctypes
import itertools
import threading
import time
from collections.abc import Callable, Sequence
from math import prod
from typing import Any, NamedTuple

import numpy as np

WARP = 32
PATIENCE = 20.0  # seconds that all threads wait for each other
_atomic = threading.Lock()
_moments = itertools.count()

# ----- a block's threads -----


class _Meeting:
    """Of threads that wait for each other: what they gave, and what each gets."""

    def __init__(self) -> None:
        self.given: dict[int, Any] = {}
        self.results: Sequence[Any] | None = None


class Block:
    """What the threads of a block share beside its arrays, under the simulator."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.areas: list[_Area] = []
        self.meetings: dict[tuple[int, int], _Meeting] = {}
        self.barriers: dict[Any, Any] = {}  # named ones, and those of ptx_hopper_simulated.py
        self.moves = 0  # how often a thread has got what it waited for


def block() -> Block:
    """That of the calling thread."""
    thread: Any = threading.current_thread()
    owner = getattr(thread, "turns", None) or getattr(thread, "_manager", None) or thread
    found: Block = owner.__dict__.setdefault("_ptx_block", Block())
    return found


def lane() -> int:
    """The number of the calling thread in its warp."""
    thread: Any = threading.current_thread()
    return int(thread.thread_id) % WARP


def exchange(value: Any) -> list[Any]:
    """What each lane of the warp gives, in all of them."""
    found: list[Any] = together(value, lambda values: [values] * WARP)
    return found


def together(value: Any, make: Callable[[list[Any]], Sequence[Any]], size: int = WARP) -> Any:
    """What `make` makes, once for a warp, of what each lane gives: each gets its own.

    Args:
        value: what this lane gives.
        make: from as many values to as many results.
        size: threads that meet, those of a warp or, 128, of a warpgroup; fewer if the block ends.

    """
    thread: Any = threading.current_thread()
    number, here = int(thread.thread_id), block()
    first = number - number % size
    size = min(size, prod(thread._manager._block_dim) - first)
    with here.lock:
        meeting = here.meetings.setdefault((first, size), _Meeting())
        meeting.given[number] = value
        if len(meeting.given) == size:
            del here.meetings[first, size]
            meeting.results = make([meeting.given[first + n] for n in range(size)])
    until(lambda: meeting.results is not None)
    assert meeting.results is not None
    return meeting.results[number - first]


def until(condition: Callable[[], bool]) -> None:
    """Let other threads run until the condition holds.

    Raises:
        TimeoutError: it does not come to hold: the threads wait for each other.

    """
    thread: Any = threading.current_thread()
    if hasattr(thread, "sleep_until"):  # where threads take turns: tests/cuda/simulator.py
        thread.sleep_until(condition)
        return
    here, last = block(), time.monotonic()
    moves = here.moves
    while not condition():
        if getattr(thread, "abort", False):
            raise RuntimeError("another thread of the block has failed")
        if here.moves != moves:
            moves, last = here.moves, time.monotonic()
        elif time.monotonic() - last > PATIENCE:
            raise TimeoutError("a thread waits for what no other thread does")
        time.sleep(0)
    here.moves += 1


def ordered(since: Any = None) -> None:
    """What the threads that were waited for have done comes before what this one does: no race.

    Threads with the same `since` go on side by side: between them there can be one.
    """
    thread: Any = threading.current_thread()
    thread.interval = since or ("after", next(_moments))


def _named(number: Any, threads: Any) -> tuple[list[int], int]:
    """Arrive at a named barrier: its state, arrivals and turns, and the turn it was."""
    ordered()
    here = block()
    with here.lock:
        state: list[int] = here.barriers.setdefault(("named", int(number)), [0, 0])
        turn = state[1]
        state[0] += 1
        if state[0] == int(threads):
            state[:] = [0, turn + 1]
        return state, turn


def bar_sync(number: Any, threads: Any) -> None:
    """bar.sync."""
    state, turn = _named(number, threads)
    until(lambda: state[1] != turn)
    ordered(("named", int(number), turn))


def bar_arrive(number: Any, threads: Any) -> None:
    """bar.arrive."""
    _named(number, threads)


def shuffle_xor(x: Any, lane_mask: Any) -> Any:
    """shfl.sync.bfly."""
    return exchange(x)[lane() ^ int(lane_mask)]


def shuffle_index(x: Any, source: Any) -> Any:
    """shfl.sync.idx."""
    return exchange(x)[int(source) % WARP]


# ----- numbers -----


def ex2(x: Any) -> Any:
    """2**x; what is below the normal numbers is 0, as with ftz."""
    y = np.exp2(np.float32(x))
    return np.float32(0) if y < np.finfo(np.float32).tiny else y


def exponential(x: Any) -> Any:
    """exp(x), infinite where Python's raises an error."""
    with np.errstate(over="ignore"):
        return np.exp(x)


def lg2(x: Any) -> Any:
    """log2(x)."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.log2(np.float32(x))


def product(x: Any, y: Any) -> Any:
    """mul.rn.f32."""
    with np.errstate(over="ignore", invalid="ignore"):
        return np.float32(x) * np.float32(y)


def quotient(x: Any, y: Any) -> Any:
    """div.full.f32."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.float32(x) / np.float32(y)


def tf32(x: Any) -> Any:
    """cvt.rna.tf32.f32: infinity and NaN stay."""
    x = np.float32(x)
    bits = int(x.view(np.uint32))
    return np.uint32(bits if not np.isfinite(x) else (bits + 0x1000) & 0xFFFFE000)


def bfloat16_bits(x: Any) -> int:
    """Rounded to the nearest, ties to even."""
    x = np.float32(x)
    bits = int(x.view(np.uint32))
    return 0x7FFF if np.isnan(x) else (bits + 0x7FFF + (bits >> 16 & 1)) >> 16


def float16_bits(x: Any) -> int:
    """Rounded to the nearest, ties to even."""
    with np.errstate(over="ignore"):
        return int(np.float16(np.float32(x)).view(np.uint16))


def pack(dtype: str) -> Callable[[Any, Any], Any]:
    """cvt.rn.f16x2.f32 or cvt.rn.bf16x2.f32."""
    bits = float16_bits if dtype == "float16" else bfloat16_bits
    return lambda low, high: np.uint32(bits(low) | bits(high) << 16)


def halves(x: Any) -> tuple[Any, Any]:
    """mov.b32 {low, high}, x."""
    return np.uint16(int(x) & 0xFFFF), np.uint16(int(x) >> 16)


def mad_wide(x: Any, y: Any, z: Any) -> Any:
    """mad.wide.u32."""
    return np.uint64((int(x) * int(y) + int(z)) % 2**64)


def same(x: Any) -> Any:
    """mov."""
    return x


def nothing() -> None:
    """To wait for what is done already."""


# ----- memory -----


class _Area(NamedTuple):
    """An array in shared memory: where it begins here, and in the computer."""

    first: int
    pointer: int
    size: int
    array: Any


def plain_array(array: Any) -> Any:
    """numpy's array under the simulator's."""
    item = getattr(array, "_item", array)
    return getattr(item, "_ary", item)


def shared_address(array: Any) -> Any:
    """The address of an array in shared memory."""
    plain = plain_array(array)
    pointer = int(plain.__array_interface__["data"][0])
    here = block()
    with here.lock:
        for area in here.areas:
            if area.pointer <= pointer < area.pointer + area.size:
                return np.uint32(area.first + pointer - area.pointer)
        last = here.areas[-1].first + here.areas[-1].size if here.areas else 0
        first = -(-last // 1024) * 1024
        here.areas.append(_Area(first, pointer, plain.nbytes, array))
        return np.uint32(first)


def area_of(address: int, size: int) -> tuple[_Area, int]:
    """The array that has these bytes, and where in it they begin."""
    for area in block().areas:
        if area.first <= address and address + size <= area.first + area.size:
            return area, address - area.first
    raise IndexError(f"{size} bytes at {address} are in no array of shared memory")


def _check(address: int, size: int) -> None:
    if address % size:
        raise ValueError(f"{size} bytes at {address}, which is no multiple of {size}")


def read_shared(address: int, size: int) -> bytes:
    """Bytes of shared memory, element by element, so that a race is seen."""
    area, first = area_of(address, size)
    step = area.array.dtype.itemsize
    items = [
        np.asarray(_item(area.array, n)).tobytes()
        for n in range(first // step, -(-(first + size) // step))
    ]
    return b"".join(items)[first % step :][:size]


def _item(array: Any, n: int) -> Any:
    return array[n] if array.ndim == 1 else array[np.unravel_index(n, array.shape)]


def write_shared(address: int, data: bytes) -> None:
    """Whole elements of shared memory."""
    area, first = area_of(address, len(data))
    array, step = area.array, area.array.dtype.itemsize
    if first % step or len(data) % step:
        raise ValueError(f"{len(data)} bytes at {address} are no whole elements of {step} bytes")
    for n, item in enumerate(np.frombuffer(data, array.dtype)):
        place = first // step + n
        array[place if array.ndim == 1 else np.unravel_index(place, array.shape)] = item


def _bytes(x: Any) -> bytes:
    items = x if isinstance(x, (tuple, list)) else [x]
    return b"".join(np.asarray(item).tobytes() for item in items)


def _load(read: Callable[[int, int], bytes], count: int, dtype: str) -> Callable[[Any], Any]:
    def load(address: Any) -> Any:
        _check(int(address), 4 * count)
        found = np.frombuffer(read(int(address), 4 * count), dtype)
        return found[0] if count == 1 else tuple(found)

    return load


def load_shared(count: int, dtype: str = "uint32") -> Callable[[Any], Any]:
    """ld.shared of one word, or of several."""
    return _load(read_shared, count, dtype)


def store_shared(address: Any, x: Any) -> None:
    """st.shared."""
    data = _bytes(x)
    _check(int(address), len(data))
    write_shared(int(address), data)


def global_address(array: Any) -> Any:
    """The address of an array in global memory: the computer's own."""
    return np.uint64(plain_array(array).__array_interface__["data"][0])


def store_global(address: Any, x: Any) -> None:
    """st.global."""
    data = _bytes(x)
    _check(int(address), len(data))
    ctypes.memmove(int(address), data, len(data))


def load_global(count: int, dtype: str = "uint32") -> Callable[[Any], Any]:
    """ld.global of one word, or of several."""
    return _load(ctypes.string_at, count, dtype)


def atomic_add(address: Any, x: Any) -> Any:
    """atom.global.add.u32."""
    with _atomic:
        before = load_global(1)(address)
        store_global(address, np.uint32((int(before) + int(x)) & 0xFFFFFFFF))
    return before


def store_global_if(valid: Any, address: Any, x: Any) -> None:
    """st.global under a predicate."""
    if valid:
        store_global(address, x)


def cp_async(target: Any, source: Any, size: Any) -> None:
    """cp.async of 16 bytes, done at once."""
    _check(int(target), 16)
    _check(int(source), 16)
    data = ctypes.string_at(int(source), int(size)) if size else b""
    write_shared(int(target), data.ljust(16, b"\0"))


# ----- matrices -----


def ldmatrix(offsets: tuple[int, ...], count: int, trans: bool) -> Callable[[Any], Any]:
    """ldmatrix: each lane reads its own elements at the rows' addresses."""

    def load(address: Any) -> Any:
        rows, (g, q) = exchange(int(address)), divmod(lane(), 4)
        words = []
        for offset in offsets:
            for m in range(count):
                places = [rows[8 * m + n] + offset for n in range(8)]
                _check(places[g], 16)
                if trans:
                    data = [read_shared(places[2 * q + c] + 2 * g, 2) for c in range(2)]
                else:
                    data = [read_shared(places[g] + 4 * q, 4)]
                words.append(np.frombuffer(b"".join(data), np.uint32)[0])
        return tuple(words)

    return load


def numbers(words: Any, dtype: str) -> Any:
    """The float64 numbers in registers: (..., 2) of 16 bits each, (..., 1) of tf32."""
    array = np.array(words, np.uint32)
    if dtype == "tf32":
        return array.view(np.float32).astype(np.float64)[..., None]
    if dtype == "float16":
        return array.view(np.float16).astype(np.float64).reshape(*array.shape, 2)
    bits = np.stack([array << np.uint32(16), array & np.uint32(0xFFFF0000)], -1)
    return bits.view(np.float32).astype(np.float64)


def mma(dtype: str) -> Callable[[Any, Any, Any], Any]:
    """mma.sync.m16n8k16 or m16n8k8: the operands' lengths say which. Sums are rounded once."""

    def product(lanes: list[Any]) -> Any:
        c = np.array([list(x[0]) for x in lanes], np.float32).reshape(8, 4, 2, 2)  # g, q, r, c
        a = numbers([[int(w) for w in x[1]] for x in lanes], dtype)  # (32, words, elements)
        b = numbers([[int(w) for w in x[2]] for x in lanes], dtype)
        parts, each = b.shape[1:]
        a = a.reshape(8, 4, parts, 2, each)  # g, q, part of k, r, element
        a = a.transpose(3, 0, 2, 1, 4).reshape(16, parts * 4 * each)
        b = b.reshape(8, 4, parts, each).transpose(2, 1, 3, 0).reshape(parts * 4 * each, 8)
        sums = c.transpose(2, 0, 1, 3).reshape(16, 8).astype(np.float64) + a @ b
        sums = sums.astype(np.float32).reshape(2, 8, 4, 2).transpose(1, 2, 0, 3).reshape(WARP, 4)
        return [tuple(x) for x in sums]

    def multiply(sums: Any, a: Any, b: Any) -> Any:
        words = [list(x) if isinstance(x, (tuple, list)) else [x] for x in (sums, a, b)]
        return together(words, product)

    return multiply
