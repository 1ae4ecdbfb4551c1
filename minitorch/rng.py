"""Random numbers: one call seeds them all, and their state can be saved for a run that is resumed.

Three generators are in use, because MiniTorch's API fixes two of them: `random` (factory `rand` and
`dropout`), numpy's global one (`Dropout`, `Embedding`), and one of our own that gives each call of
fused attention its seed, and each dropout of a step that a CUDA graph can repeat.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import numpy as np

from .allocator import is_capturing
from .device_array import DeviceArray, permanent

_attention_seeds = np.random.Generator(np.random.PCG64(0))


def manual_seed(seed: int) -> None:
    """Seed every random number that the library draws.

    Args:
        seed: a whole number, 0 <= seed < 2**32.

    Raises:
        ValueError: `seed` is outside that range.

    """
    if not 0 <= int(seed) < 2**32:
        raise ValueError(f"seed must be in [0, 2**32), got {seed}")
    global _attention_seeds
    random.seed(int(seed))
    np.random.seed(int(seed))
    _attention_seeds = np.random.Generator(np.random.PCG64(int(seed)))


def next_seed() -> int:
    """Draw the 64-bit seed of the next dropout mask that a kernel makes."""
    return int(_attention_seeds.integers(0, 2**64, dtype=np.uint64))


class _Steps(threading.local):
    """How many `repeatable_step` blocks this thread is in."""

    depth = 0


_steps = _Steps()


@contextmanager
def repeatable_step(seed: int) -> Iterator[None]:
    """A block that a CUDA graph can repeat: what it computes on the GPU draws nothing on the host.

    `next_seed` begins anew, as after `manual_seed`, so that each step draws the same seeds as the
    one that was recorded; the other generators are left alone. `Dropout` and `dropout` on the GPU
    make their masks from these seeds, there, which also is faster than numpy's generator. Let
    `device_offset` tell the steps apart.
    """
    global _attention_seeds
    _attention_seeds = np.random.Generator(np.random.PCG64(int(seed)))
    _steps.depth += 1
    try:
        yield
    finally:
        _steps.depth -= 1


def masks_come_from_seeds() -> bool:
    """Whether dropout on the GPU makes its masks there: in `repeatable_step`, and while a CUDA
    graph is captured, which would repeat numbers of the host for ever.
    """
    return _steps.depth > 0 or is_capturing()


@cache
def device_offset() -> DeviceArray:
    """A number (uint64, one element) on the GPU that kernels add to the seed of a dropout mask.

    It is 0, unless a CUDA graph that is replayed changes it: its seeds are built in, and without
    this every step would drop the same elements.
    """
    return permanent(np.uint64)


def get_rng_state() -> dict[str, Any]:
    """The state of all three generators, as values that JSON can hold; `set_rng_state` takes it
    back.
    """
    version, internal, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    return {
        "python": [version, list(internal), gauss],
        "numpy": [name, np.asarray(keys).tolist(), position, has_gauss, cached],
        "attention": _attention_seeds.bit_generator.state,
    }


def set_rng_state(state: dict[str, Any]) -> None:
    """Put all three generators back into a state that `get_rng_state` returned."""
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    name, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), position, has_gauss, cached))
    _attention_seeds.bit_generator.state = state["attention"]
