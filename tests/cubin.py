"""Compile GPU kernels to machine code without a GPU, and read what they need of one.

The same way that numba-cuda goes when a kernel is first launched: numba lowers the Python function
to LTO-IR, NVIDIA's nvJitLink makes machine code of it for one architecture. The first step takes
five times as long as the second. It is made once, for the oldest architecture, unless what it makes
depends on the architecture, as storing bfloat16 does (kernels/gpu/runtime.py) and nothing else.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache

from cuda.bindings import nvjitlink

from minitorch.kernels.gpu.runtime import Instance, cuda, precision, types

ARCHITECTURES = ("sm_75", "sm_80", "sm_86", "sm_89", "sm_90a")
OLDEST = (7, 5)
OLDEST_WITH_BFLOAT16 = (8, 0)


@dataclass(frozen=True)
class Usage:
    """What a thread of a kernel needs; bytes of local memory are spills or arrays without a place.

    Args:
        registers: number of registers.
        stack: bytes of local memory, spills included.
        spills: bytes that are stored to local memory and loaded again for lack of registers.
        shared: bytes of static shared memory, of a block.
        remarks: the assembler's, on wgmma products that it makes wait for one another, and on
            `setmaxnreg` that it leaves out.

    """

    registers: int
    stack: int
    spills: int
    shared: int
    remarks: tuple[str, ...] = ()


@lru_cache(maxsize=4)  # the next test may want the same for other architectures
def intermediate(instance: Instance, capability: tuple[int | str, ...] = OLDEST) -> bytes:
    """A kernel's LTO-IR, with the options it was declared with."""
    options = instance.kernel.targetoptions
    code, _ = cuda.compile(
        instance.kernel.py_func,
        types.void(*instance.signature),
        cc=capability,
        device=False,
        abi="numba",
        fastmath=options["fastmath"],
        opt=options["opt"],
        launch_bounds=options.get("launch_bounds"),
        output="ltoir",
    )
    return bytes(code)


def architectures_of(instance: Instance) -> tuple[str, ...]:
    """Those that a kernel is for, from the oldest to the newest."""
    return instance.architectures or ARCHITECTURES


def stores_bfloat16(instance: Instance) -> bool:
    """Whether a kernel's code is another one on Turing."""
    return precision("bfloat16").array in instance.signature


def usages(instance: Instance, architectures: Iterable[str] = ()) -> dict[str, Usage]:
    """What a kernel needs on some of its architectures, unless told on all."""
    found = {}
    for architecture in architectures or architectures_of(instance):
        newer = stores_bfloat16(instance) and architecture != "sm_75"
        code = intermediate(instance, OLDEST_WITH_BFLOAT16 if newer else OLDEST)
        found[architecture] = assembled(instance, code, architecture)
    return found


def assembled(instance: Instance, code: bytes, architecture: str) -> Usage:
    """Make machine code for an architecture; what it needs."""
    flags = [f"-arch={architecture}", "-lto", "-verbose"]
    if instance.kernel.targetoptions.get("max_registers"):
        flags.append(f"-maxrregcount={instance.kernel.targetoptions['max_registers']}")
    linker = nvjitlink.create(len(flags), flags)
    try:
        nvjitlink.add_data(linker, nvjitlink.InputType.LTOIR, code, len(code), instance.name)
        nvjitlink.complete(linker)
        log = bytearray(nvjitlink.get_info_log_size(linker))
        nvjitlink.get_info_log(linker, log)
    except nvjitlink.nvJitLinkError as error:
        log = bytearray(nvjitlink.get_error_log_size(linker))
        nvjitlink.get_error_log(linker, log)
        raise ValueError(f"{instance.name} for {architecture}: {log.decode()}") from error
    finally:
        nvjitlink.destroy(linker)
    return parsed(log.decode())


def parsed(log: str) -> Usage:
    """The largest figures of an assembler's log, which has an entry for each function."""

    def largest(pattern: str, missing: int | None = None) -> int:
        found = [int(number) for number in re.findall(pattern, log)]
        if not found and missing is None:
            raise ValueError(f"the assembler's log does not match {pattern!r}:\n{log}")
        return max(found, default=missing or 0)

    return Usage(
        registers=largest(r"Used (\d+) registers"),
        stack=largest(r"(\d+) bytes stack frame"),
        spills=max(largest(r"(\d+) bytes spill stores"), largest(r"(\d+) bytes spill loads")),
        shared=largest(r"(\d+) bytes smem", missing=0),
        remarks=tuple(re.findall(r".*(?:serialized|setmaxnreg.*ignored).*", log)),
    )


def complaint(instance: Instance, usage: Usage) -> str:
    """What is wrong with a kernel, "" if nothing."""
    wrong = []
    if usage.registers > instance.most_registers:
        wrong.append(f"{usage.registers} registers, its limit is {instance.most_registers}")
    if usage.spills:
        wrong.append(f"{usage.spills} bytes spilled")
    elif usage.stack:
        wrong.append(f"{usage.stack} bytes of local memory: index local arrays by constants alone")
    wrong += usage.remarks
    return "; ".join(wrong)
