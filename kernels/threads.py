"""Run a compiled worker on several threads at once.

A kernel here is one `njit(nogil=True)` function that every thread calls with the same arguments; the
threads take tasks from a shared counter (`simd.fetch_add`) until none is left, so work of unequal length
is balanced. Against numba's `prange`: no static division of the work; a third of the compile time,
since a parallel loop is compiled at four nested levels; and threads that sleep, never spin, between
calls.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from queue import SimpleQueue
from typing import Any

Job = tuple[Callable[..., Any], tuple[Any, ...], "SimpleQueue[BaseException | None]"]

_jobs: SimpleQueue[Job] = SimpleQueue()
_helpers: list[threading.Thread] = []
_start = threading.Lock()


def _serve(jobs: SimpleQueue[Job]) -> None:
    while True:
        worker, arguments, done = jobs.get()
        try:
            worker(*arguments)
        except BaseException as error:
            done.put(error)
        else:
            done.put(None)


def _forget_helpers() -> None:
    """In a forked child: threads do not survive a fork, and the queue's state may be anything."""
    global _jobs, _start
    _jobs, _start = SimpleQueue(), threading.Lock()
    _helpers.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_helpers)


def run_on_threads(count: int, worker: Callable[..., Any], *arguments: Any) -> None:
    """Call worker(*arguments) on `count` threads, this one among them; return when all are done.

    An exception of any of them is raised here, after all have ended.
    """
    with _start:
        while len(_helpers) < count - 1:
            helper = threading.Thread(target=_serve, args=(_jobs,), daemon=True)
            helper.start()
            _helpers.append(helper)
    done: SimpleQueue[BaseException | None] = SimpleQueue()
    for _ in range(count - 1):
        _jobs.put((worker, arguments, done))
    try:
        worker(*arguments)
    finally:
        errors = [done.get() for _ in range(count - 1)]
    for error in errors:
        if error is not None:
            raise error
