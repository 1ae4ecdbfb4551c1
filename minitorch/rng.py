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
import numpy.typing as npt

from .cuda.allocator import is_capturing
from .cuda.device_array import DeviceArray, permanent

_attention_seeds = np.random.Generator(np.random.PCG64(0))

FEW = 1 << 10  # numbers that cost less than a generator's state
CHUNK = 1 << 18  # numbers drawn at once, in float64
_drawing = threading.Lock()


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
    """Whether dropout on the GPU makes its masks there: in `repeatable_step`.

    Raises:
        RuntimeError: a CUDA graph is captured outside of it: each replay would repeat one mask.

    """
    if _steps.depth == 0 and is_capturing():
        raise RuntimeError(
            "dropout in a CUDA graph takes masks that a kernel makes: put the step, also where it "
            "runs before the capture, into `with minitorch.rng.repeatable_step(seed):`"
        )
    return _steps.depth > 0


def uniform(size: int, dtype: npt.DTypeLike = np.float64) -> npt.NDArray[Any]:
    """`size` uniform numbers in [0, 1): those that as many calls of `random.random` would give.

    Python's generator is the one that numpy calls `RandomState` (MT19937, 53 bits a number), so
    numpy draws them, 20 times as fast, and Python's goes on where it stopped.
    """
    if size < FEW:
        return np.array([random.random() for _ in range(size)], dtype)
    out = np.empty(size, dtype)
    with _drawing:
        version, internal, gauss = random.getstate()
        *keys, position = internal
        twin = np.random.RandomState(0)
        twin.set_state(("MT19937", np.array(keys, np.uint32), position, 0, 0.0))
        for start in range(0, size, CHUNK):
            part = out[start : start + CHUNK]
            part[...] = twin.random_sample(part.size)
        _, keys, position, *_ = twin.get_state(legacy=True)
        random.setstate((version, (*np.asarray(keys).tolist(), position), gauss))
    return out


@cache
def device_offset() -> DeviceArray:
    """A number (uint64, one element) on the GPU that kernels add to the seed of a dropout mask.

    It is 0, unless a CUDA graph that is replayed changes it: its seeds are built in, and without
    this every step would drop the same elements.
    """
    return permanent(np.uint64)


def _states() -> tuple[Any, Any, Any]:
    """The states of the three generators, as they give them."""
    numpys = np.random.get_state(legacy=True)
    return random.getstate(), numpys, dict(_attention_seeds.bit_generator.state)


def _set_states(python: Any, numpys: Any, ours: Any) -> None:
    """Put the three generators into states that `_states` gave."""
    random.setstate(python)
    np.random.set_state(numpys)
    _attention_seeds.bit_generator.state = ours


def fingerprint() -> tuple[Any, ...]:
    """What differs after any number has been drawn."""
    python, (_, keys, *rest), ours = _states()
    return python, np.asarray(keys).tobytes(), rest, ours


@contextmanager
def random_state_kept() -> Iterator[None]:
    """Leave all three generators afterwards as they are before."""
    python, numpys, ours = _states()
    try:
        yield
    finally:
        _set_states(python, numpys, ours)


def get_rng_state() -> dict[str, Any]:
    """The state of all three generators, as values that JSON can hold; `set_rng_state` takes it
    back.
    """
    (version, internal, gauss), numpys, ours = _states()
    name, keys, position, has_gauss, cached = numpys
    return {
        "python": [version, list(internal), gauss],
        "numpy": [name, np.asarray(keys).tolist(), position, has_gauss, cached],
        "attention": ours,
    }


def set_rng_state(state: dict[str, Any]) -> None:
    """Put all three generators back into a state that `get_rng_state` returned.

    Raises:
        ValueError: `state` is none; nothing has been changed.

    """
    before = _states()
    try:
        version, internal, gauss = state["python"]
        name, keys, position, has_gauss, cached = state["numpy"]
        if not 0 <= position <= len(keys):  # numpy would read outside the keys
            raise ValueError(f"position {position}")
        if not isinstance(gauss, float | None):
            raise TypeError("the second number of a pair")
        numpys = (name, np.array(keys, dtype=np.uint32), position, has_gauss, cached)
        _set_states((version, tuple(internal), gauss), numpys, state["attention"])
    except (AttributeError, LookupError, TypeError, ValueError, OverflowError) as error:
        _set_states(*before)
        raise ValueError(
            "the state of the random numbers is damaged: it is none that get_rng_state returned"
        ) from error
