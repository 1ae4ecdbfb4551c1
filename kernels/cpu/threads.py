"""Run a compiled worker on several threads at once.

A kernel here is one `njit(nogil=True)` function that every thread calls with the same arguments;
the threads take tasks from a shared counter (`fetch_add`) until none is left, so work of
unequal length is balanced. Against numba's `prange`: no static division of the work; a third of the
compile time, since a parallel loop is compiled at four nested levels; and threads that sleep, never
spin, between calls.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable
from queue import SimpleQueue
from typing import Any

import numba
import numba.np.ufunc.parallel
from llvmlite import ir
from numba.core import cgutils, types

from . import plain
from .compiler import COMPILES, intrinsic
from .simd import INT32, element_pointer
from .vector_target import TARGET, VectorTarget

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


def thread_count() -> int:
    """How many threads a kernel may use: numba's number, which `numba.set_num_threads` changes; one
    where nothing is compiled, so that a debugger sees what happens.

    Asking numba starts its own pool, which is not needed, and beside which PyTorch's OpenMP threads
    in the same process were ten times slower. While it has not been started the number is the one
    that numba would start with.
    """
    if not COMPILES:
        return 1
    started = getattr(numba.np.ufunc.parallel, "_is_initialized", True)
    return int(numba.get_num_threads() if started else numba.config.NUMBA_NUM_THREADS)


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


# --------------------------------------------------------------------------- inside kernels


@intrinsic(plain.fetch_add)
def fetch_add(typing_context: Any, array: Any, index: Any, value: Any) -> Any:
    """`fetch_add(array, index, value) -> int`: add to an int64 atomically, return the old value."""

    def generate(context: Any, b: ir.IRBuilder, sig: Any, args: Any) -> Any:
        pointer = element_pointer(context, b, sig.args[0], args[0], args[1])
        return b.atomic_rmw("add", pointer, args[2], "seq_cst")

    return types.int64(array, types.intp, types.int64), generate


@intrinsic(plain.store_release)
def store_release(typing_context: Any, array: Any, index: Any, value: Any) -> Any:
    """`store_release(array, index, value)`: write an int64 after all earlier writes."""

    def generate(context: Any, b: ir.IRBuilder, sig: Any, args: Any) -> Any:
        b.store_atomic(
            args[2], element_pointer(context, b, sig.args[0], args[0], args[1]), "release", 8
        )
        return context.get_dummy_value()

    return types.void(array, types.intp, types.int64), generate


def _pause(b: ir.IRBuilder, target: VectorTarget) -> None:
    """The instruction that tells the processor that this is a waiting loop."""
    if target.architecture == "other":
        return
    arm = target.architecture == "arm"
    arguments = [ir.Constant(INT32, 1)] if arm else []
    name = "llvm.aarch64.hint" if arm else "llvm.x86.sse2.pause"
    function = ir.FunctionType(ir.VoidType(), [argument.type for argument in arguments])
    b.call(cgutils.get_or_insert_function(b.module, function, name), arguments)


SPINS = 256  # looks at the value before the waiting thread offers its core to others


@intrinsic(plain.wait_until)
def wait_until(typing_context: Any, array: Any, index: Any, value: Any) -> Any:
    """`wait_until(array, index, value)`: return when others have set the int64 there to value.

    The wait is short as a rule; but on a busy machine the thread that is waited for may have no
    core, and the one that waits must not be what keeps it from one.
    """

    def generate(context: Any, b: ir.IRBuilder, sig: Any, args: Any) -> Any:
        pointer = element_pointer(context, b, sig.args[0], args[0], args[1])
        entry = b.block
        check, again = b.append_basic_block("wait.check"), b.append_basic_block("wait.again")
        done = b.append_basic_block("wait.done")
        b.branch(check)
        b.position_at_end(check)
        spins = b.phi(INT32)
        spins.add_incoming(ir.Constant(INT32, 1), entry)
        b.cbranch(b.icmp_signed("==", b.load_atomic(pointer, "acquire", 8), args[2]), done, again)
        b.position_at_end(again)
        _pause(b, TARGET)
        if sys.platform != "win32":
            long = b.icmp_unsigned("==", b.urem(spins, ir.Constant(INT32, SPINS)), spins.type(0))
            with b.if_then(long, likely=False):
                system_yield = ir.FunctionType(INT32, [])
                b.call(cgutils.get_or_insert_function(b.module, system_yield, "sched_yield"), [])
        spins.add_incoming(b.add(spins, ir.Constant(INT32, 1)), b.block)
        b.branch(check)
        b.position_at_end(done)
        return context.get_dummy_value()

    return types.void(array, types.intp, types.int64), generate
