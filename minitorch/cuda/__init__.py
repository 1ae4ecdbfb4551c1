"""`minitorch.cuda`: the GPU as a program sees it. Is there one, what computes, how much memory.

Example:
    >>> import minitorch
    >>> if minitorch.cuda.is_available():
    ...     backend = minitorch.TensorBackend(minitorch.CudaKernelOps)
    ... else:
    ...     backend = minitorch.TensorBackend(minitorch.FastOps)
"""

from __future__ import annotations

import importlib
import importlib.metadata
from typing import TYPE_CHECKING, Any

from ..kernels.gpu import compile_cache, runtime
from . import allocator, cublas, driver
from .allocator import OutOfMemoryError
from .cublas import get_float32_matmul_precision, set_float32_matmul_precision
from .device_array import raise_deferred_errors
from .precision import fp32_precision

if TYPE_CHECKING:
    from .explanation import Explanation, explain
    from .graph import Graph

__all__ = [
    "Explanation",
    "Graph",
    "OutOfMemoryError",
    "config",
    "device_name",
    "empty_cache",
    "explain",
    "fp32_precision",
    "get_float32_matmul_precision",
    "is_available",
    "max_memory_allocated",
    "memory_allocated",
    "memory_reserved",
    "reset_peak_memory_stats",
    "set_float32_matmul_precision",
    "synchronize",
]

# These need tensors, which need this package: they are found when asked for.
_FOUND_LATER = {"Explanation": "explanation", "explain": "explanation", "Graph": "graph"}


def __getattr__(name: str) -> Any:
    if name not in _FOUND_LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_FOUND_LATER[name]}", __name__), name)


def is_available() -> bool:
    """Whether tensors can be on the GPU: there is one with a driver, or numba's simulator is on."""
    return runtime.is_available()


def device_name() -> str:
    """The name of the GPU, such as "NVIDIA H200".

    Raises:
        RuntimeError: there is none.

    """
    _require_gpu()
    if runtime.SIMULATED:
        return "numba's CUDA simulator"
    name = runtime.cuda.get_current_device().name
    return name.decode() if isinstance(name, bytes) else str(name)


def synchronize() -> None:
    """Wait until the GPU has done everything.

    Raises:
        ValueError: a kernel has found bad input: an embedding or a class that does not exist.

    """
    if is_available():
        driver.synchronize()
        raise_deferred_errors()


# ----- memory, in bytes -----


def memory_allocated() -> int:
    """What tensors hold now, each rounded up to the size of its block."""
    return allocator.statistics.allocated


def max_memory_allocated() -> int:
    """The most that tensors have held since the start, or since `reset_peak_memory_stats`."""
    return allocator.statistics.most_allocated


def reset_peak_memory_stats() -> None:
    """Let `max_memory_allocated` begin again, at what tensors hold now."""
    allocator.statistics.most_allocated = allocator.statistics.allocated


def memory_reserved() -> int:
    """What was taken from the driver: in tensors, and kept for the next ones."""
    return allocator.statistics.reserved


def empty_cache() -> None:
    """Give memory that no tensor holds back to the driver, for other programs."""
    allocator.empty_cache()


# ----- what computes -----


def config() -> dict[str, Any]:
    """What computes here, for bug reports and beside measurements.

    Returns:
        "available"; and if it is: "simulator" (bool), "gpu", "compute_capability", "driver" (the
        CUDA version it supports), "numba-cuda", "matmul" (cuBLAS with its version, or our tiled
        kernel) and "compiled kernels" (the folder that keeps their machine code).

    """
    if not is_available():
        return {"available": False}
    return {
        "available": True,
        "simulator": runtime.SIMULATED,
        "gpu": device_name(),
        "compute_capability": ".".join(map(str, runtime.compute_capability())),
        "driver": _driver_version(),
        "numba-cuda": version_of("numba-cuda"),
        "matmul": cublas.description(),
        "compiled kernels": str(compile_cache.folder() or "not kept"),
    }


def _driver_version() -> str | None:
    if runtime.SIMULATED:
        return None
    number = int(driver.check(driver.bindings().cuDriverGetVersion()))
    return f"{number // 1000}.{number % 1000 // 10}"


def version_of(package: str) -> str | None:
    """The installed version of a package, or None."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _require_gpu() -> None:
    if not is_available():
        raise RuntimeError(
            "there is no GPU with a CUDA driver here (minitorch.cuda.is_available())"
        )
