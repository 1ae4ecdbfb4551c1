"""How much memory this process has used at most, since a moment of one's choice."""

from __future__ import annotations

import sys
from pathlib import Path

STATUS = Path("/proc/self/status")
CLEAR = Path("/proc/self/clear_refs")


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


def _status(name: str) -> int:
    for line in STATUS.read_text().splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1]) * 1024
    return 0
