"""Measurements in processes of their own: what sets threads and instructions is read at the start.

A program runs itself with `--child` and a job in JSON, and prints the result as its last line.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
from collections.abc import Mapping
from typing import Any

from project.arguments import POSITIVE, THREADS, real, whole

# Both held to AVX2, as on most laptops.
AVX2 = {
    "ATEN_CPU_CAPABILITY": "avx2",
    "MKL_ENABLE_INSTRUCTIONS": "AVX2",
    "OPENBLAS_CORETYPE": "Haswell",
    "NUMBA_CPU_NAME": "haswell",
    "NUMBA_CPU_FEATURES": "",
}


def add_options(parser: argparse.ArgumentParser, seconds: float, what: str) -> None:
    """How a program measures in processes of its own: threads, seconds, a command before each.

    Args:
        parser: gets the options.
        seconds: that are spent by default,
        what: on what.

    """
    add = parser.add_argument
    add("--threads", type=whole(THREADS), default=2, help="of each; default: %(default)s")
    add("--seconds", type=real(POSITIVE), default=seconds, help=f"of {what}; default: %(default)s")
    add("--prefix", default="", help="command before each measuring process (taskset -c 0,1, say)")
    add("--child", type=json.loads, help=argparse.SUPPRESS)


def in_child(
    program: str, job: Any, environment: Mapping[str, str | None], prefix: str = ""
) -> Any:
    """Run a job in a process of its own, and return its result.

    Args:
        program: the file, which gets the job after `--child`.
        job: anything that JSON can hold.
        environment: changes of this process's; None takes a variable away.
        prefix: a command before it.

    Raises:
        SystemExit: it failed.

    """
    changed = {**os.environ, **environment}
    result = subprocess.run(
        [*shlex.split(prefix), sys.executable, program, "--child", json.dumps(job)],
        env={name: value for name, value in changed.items() if value is not None},
        capture_output=True,
        text=True,
    )
    if result.returncode:
        raise SystemExit(f"A measurement failed: {job}\n{result.stderr}")
    return json.loads(result.stdout.splitlines()[-1])
