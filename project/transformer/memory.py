"""How much memory this process has used at most, and how much the machine and its GPU have."""

from __future__ import annotations

import os
import sys
from pathlib import Path

STATUS = Path("/proc/self/status")
CLEAR = Path("/proc/self/clear_refs")
CONTAINER = Path("/sys/fs/cgroup/memory.max")
UNKNOWN = 2**47  # more than a process can address


def restart_peak() -> int:
    """Forget the peak so far, where the system can.

    Returns:
        The bytes in use now.

    """
    try:
        CLEAR.write_text("5")  # Linux: resets VmHWM to VmRSS (man 5 proc)
    except OSError:
        return peak()
    return _status("VmRSS")


def peak() -> int:
    """Bytes at the peak since `restart_peak`, or since the process began where that cannot be."""
    if STATUS.is_file():
        return _status("VmHWM")
    try:
        import resource
    except ImportError:  # Windows
        return 0
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def installed() -> int:
    """Bytes of memory of this machine, or the container's share if that is less."""
    try:
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # Windows
        total = UNKNOWN
    try:
        return min(total, int(CONTAINER.read_text()))
    except (OSError, ValueError):  # no container, or one without a limit
        return total


def gpu_memory() -> int:
    """Bytes of memory of the GPU."""
    from minitorch.cuda.driver import memory_info

    return memory_info()[1]


def _status(name: str) -> int:
    for line in STATUS.read_text().splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1]) * 1024
    return 0
