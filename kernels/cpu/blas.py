"""Matrix products of two dimensions: numpy's BLAS computes the blocks, our threads share them.

OpenBLAS has threads of its own, which wait for each other by spinning. On a machine that does
anything else at the same time the slowest of them decides, and between two products they keep a
core from whoever has work. So a product is cut into blocks, each is computed by OpenBLAS with one
thread, and whoever is free takes the next. The blocks depend on the shapes alone, and so does the
result.

Where numpy has another BLAS, it is called as it is.
"""

from __future__ import annotations

import ctypes
import functools
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from .threads import run_on_threads, thread_count

Array = NDArray[Any]

# Multiplications of a block: enough that packing the matrices does not count.
BLOCK = 1 << 23
MOST_BLOCKS = 64


class ThreadControl(NamedTuple):
    """OpenBLAS's functions for the number of its threads."""

    get: Callable[[], int]
    set: Callable[[int], Any]


@functools.cache
def openblas() -> ThreadControl | None:
    """The OpenBLAS that came with numpy; None if numpy was built with another BLAS."""
    package = Path(np.__file__).parent
    for folder in (package.with_name("numpy.libs"), package / ".dylibs"):
        for file in sorted(folder.glob("*openblas*")):
            library = ctypes.CDLL(str(file))
            for name in ("scipy_openblas_{}_num_threads64_", "scipy_openblas_{}_num_threads"):
                get = getattr(library, name.format("get"), None)
                put = getattr(library, name.format("set"), None)
                if get is not None and put is not None:
                    return ThreadControl(get, put)
    return None


def product(a: Array, b: Array) -> Array:
    """a (n, k) @ b (k, m) -> (n, m), of one dtype."""
    n, k = a.shape
    m = b.shape[1]
    blocks = max(1, min(MOST_BLOCKS, n * k * m // BLOCK))
    control = openblas()
    if control is None:
        with np.errstate(all="ignore"):  # infinities and NaN as they come
            return a @ b
    out = np.empty((n, m), a.dtype)
    length = max(n, m)  # the longer side of the result is cut
    step = max(1, -(-length // (16 * blocks)) * 16)
    tasks = itertools.count()  # `next` of it is atomic

    def work() -> None:
        with np.errstate(all="ignore"):  # of this thread
            while (begin := next(tasks) * step) < length:
                part = slice(begin, begin + step)
                if n >= m:
                    np.matmul(a[part], b, out=out[part])
                else:
                    np.matmul(a, b[:, part], out=out[:, part])

    before = control.get()
    control.set(1)
    try:
        run_on_threads(min(thread_count(), blocks), work)
    finally:
        control.set(before)
    return out
