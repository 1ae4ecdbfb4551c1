"""What figures depend on: processor, GPU, versions, date."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from project.transformer.memory import gpu_memory

CPU_INFO = Path("/proc/cpuinfo")
# What is told of a machine in a line: Python, packages, libraries.
VERSIONS = ("python", "numpy", "numba", "numba-cuda", "nvmath-python", "torch", "cuDNN")
SETTINGS = ("OMP_", "GOMP_", "OPENBLAS_", "MKL_", "NUMBA_", "KMP_", "ATEN_")


def machine(*packages: str) -> dict[str, Any]:
    """Where, when and with what something is measured; nothing of it is imported.

    Args:
        packages: distributions whose versions count; "none" stands for one that is not installed.

    """
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "processor": processor(),
        "cores": os.cpu_count(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        **{name: installed_version(name) for name in packages},
        "environment": thread_settings(),
    }


def gpu_machine(*packages: str) -> dict[str, Any]:
    """The same with the GPU, and with what computes its matrix products."""
    import minitorch

    found, config = machine(*packages), minitorch.cuda.config()
    found |= {name: config[name] for name in ("gpu", "driver", "matmul")}
    found["memory_gib"] = round(gpu_memory() / 2**30)
    if "torch" in packages:
        import torch

        found["cuDNN"] = str(torch.backends.cudnn.version())
    return found


def processor() -> str:
    """Its maker and model; virtual machines often tell a name without a number."""
    lines = CPU_INFO.read_text(encoding="utf-8").splitlines() if CPU_INFO.is_file() else []
    told = {name.strip(): value.strip() for name, _, value in (x.partition(":") for x in lines)}
    name = told.get("model name") or platform.processor() or platform.machine()
    if "cpu family" in told:
        name += f" (family {told['cpu family']}, model {told['model']})"
    return name


def installed_version(package: str) -> str:
    """Of a distribution; "none" where it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "none"


def thread_settings() -> dict[str, str]:
    """What this process's environment says to pools of threads, BLAS and compilers."""
    return {name: value for name, value in sorted(os.environ.items()) if name.startswith(SETTINGS)}


def about(found: Mapping[str, Any]) -> str:
    """Machine, versions and date in a line, from what `machine` or `gpu_machine` has found."""
    where = f"{found['processor']}, {found['cores']} cores" if "gpu" not in found else found["gpu"]
    if "memory_gib" in found:
        where += f", {found['memory_gib']} GiB, driver for CUDA {found['driver']}"
    versions = ", ".join(f"{name} {found[name]}" for name in VERSIONS if name in found)
    return f"{found['date']}; {where}; {versions}"


def told_settings(environment: Mapping[str, str]) -> str:
    """`thread_settings` as a sentence's end."""
    return ", ".join(f"`{name}={value}`" for name, value in environment.items()) or "none"
