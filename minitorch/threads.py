"""How the thread pools of numba and numpy wait. Imported first, for they read this when they load.

A process that trains has several pools: the library's own (`kernels/cpu/threads.py`, which sleeps
when it has nothing to do), numpy's BLAS, numba's parallel loops (OpenMP), and PyTorch's if that is
imported too. A thread that waits by spinning keeps a core from a thread of another pool that has
work: on two cores that made a training step several times slower. So:

- `OMP_WAIT_POLICY=passive`: threads of OpenMP sleep while they wait.
- `OPENBLAS_THREAD_TIMEOUT=10`: threads of OpenBLAS spin for 2**10 cycles, not 2**26, then sleep.

What the user has set in the environment is left as it is. A library that is loaded already has read
the environment and keeps what it read: import minitorch before numpy, or set the variables outside.
"""

from __future__ import annotations

import os
from collections.abc import MutableMapping

SETTINGS = {"OMP_WAIT_POLICY": "passive", "OPENBLAS_THREAD_TIMEOUT": "10"}


def set_defaults(environment: MutableMapping[str, str] = os.environ) -> None:
    """Set each of `SETTINGS` that the user has not set.

    Args:
        environment: changed in place; the process's own if not given.

    """
    for name, value in SETTINGS.items():
        environment.setdefault(name, value)


set_defaults()
