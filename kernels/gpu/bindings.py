"""The CUDA driver, by NVIDIA's bindings: for what numba has no words for, or is slow at."""

from __future__ import annotations

import importlib
from functools import cache
from typing import Any


class DriverError(RuntimeError):
    """The CUDA driver refused a call, or a kernel that ran before it has failed."""


@cache
def bindings() -> Any:
    """NVIDIA's bindings of the driver (package cuda-bindings, which numba-cuda needs too).

    They publish types that differ from release to release: they are Any here.
    """
    return importlib.import_module("cuda.bindings.driver")


def check(result: tuple[Any, ...]) -> Any:
    """What a driver call returned beside its status.

    Raises:
        DriverError: the status is not success.

    """
    status = result[0]
    if int(status) != 0:
        raise DriverError(f"the CUDA driver answered {status.name} ({int(status)})")
    return result[1] if len(result) == 2 else result[1:]
