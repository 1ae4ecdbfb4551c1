"""The machine code of GPU kernels, without a GPU: what it needs of one, and whether it has changed.

    PYTHONPATH=../old python project/bench/machine_code.py --out before.json
    python project/bench/machine_code.py --against before.json
    python project/bench/machine_code.py --only "^hopper_forward"

The library is that of the checkout that PYTHONPATH names, or else of this one; its folder is
printed first. Prints each kernel whose registers, local memory or code are not as before: with the
same hash it is the same machine code, so the same bits and the same speed. All kernels take an
hour; `--only` chooses some by their names, `--part 0/2` and `--part 1/2` share them between two
processes.

Kernels are compiled the way that numba-cuda goes when one is first launched: numba lowers the
Python function to LTO-IR, NVIDIA's nvJitLink makes machine code of it for one architecture. The
first step takes five times as long as the second. It is made once, for the oldest architecture,
unless what it makes depends on the architecture, as storing bfloat16 does (kernels/gpu/runtime.py)
and nothing else.
"""

from __future__ import annotations

import argparse
import gc
import hashlib
import importlib
import inspect
import re
import struct
import sys
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from functools import cache, lru_cache
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[2]))  # PYTHONPATH may name another checkout

import minitorch  # isort: skip

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # but `project` is that of this file

import minitorch.kernels
from minitorch.kernels.gpu import runtime
from minitorch.kernels.gpu.runtime import Instance, cuda, precision, types
from project.arguments import parser_of
from project.bench.versions import Comparison, add_options

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
        code: hash and number of bytes of the machine code, of each function.

    """

    registers: int
    stack: int
    spills: int
    shared: int
    remarks: tuple[str, ...] = ()
    code: str = ""


# ----- the library's kernels -----


def modules_with_kernels() -> dict[str, Path]:
    """Modules of the library that hold GPU kernels, or list them, and their files."""
    marks = ("def instances(", "@kernel(", "@runtime.kernel(")
    found = {}
    for package in (minitorch, minitorch.kernels):
        folder = Path(package.__path__[0]).resolve()
        for path in sorted(folder.rglob("*.py")):
            parts = path.relative_to(folder).with_suffix("").parts
            text = path.read_text(encoding="utf-8")
            if path.name != "runtime.py" and any(mark in text for mark in marks):
                found[".".join((package.__name__, *parts))] = path
    return found


@cache
def instances() -> list[Instance]:
    """Of every module: what its function `instances` lists, if that needs no arguments.

    Kernels made of functions given by the caller (map, zip, reduce) are listed where those
    functions are known.
    """
    found: list[Instance] = []
    for name in modules_with_kernels():
        list_instances = getattr(importlib.import_module(name), "instances", None)
        if list_instances is not None and not inspect.signature(list_instances).parameters:
            found += list_instances()
    return found


# ----- compiling -----


@lru_cache(maxsize=4)  # the next call may want the same for other architectures
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
    from cuda.bindings import nvjitlink

    flags = [f"-arch={architecture}", "-lto", "-verbose"]
    if instance.kernel.targetoptions.get("max_registers"):
        flags.append(f"-maxrregcount={instance.kernel.targetoptions['max_registers']}")
    linker = nvjitlink.create(len(flags), flags)
    try:
        nvjitlink.add_data(linker, nvjitlink.InputType.LTOIR, code, len(code), instance.name)
        nvjitlink.complete(linker)
        log = bytearray(nvjitlink.get_info_log_size(linker))
        nvjitlink.get_info_log(linker, log)
        elf = bytearray(nvjitlink.get_linked_cubin_size(linker))
        nvjitlink.get_linked_cubin(linker, elf)
    except nvjitlink.nvJitLinkError as error:
        log = bytearray(nvjitlink.get_error_log_size(linker))
        nvjitlink.get_error_log(linker, log)
        raise ValueError(f"{instance.name} for {architecture}: {log.decode()}") from error
    finally:
        nvjitlink.destroy(linker)
    return parsed(log.decode(), code_of(bytes(elf)))


def parsed(log: str, code: str = "") -> Usage:
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
        code=code,
    )


def code_of(elf: bytes) -> str:
    """Hash and length of each section with machine code of a 64-bit ELF file (`man 5 elf`)."""
    (table,) = struct.unpack_from("<Q", elf, 0x28)
    size, count, names = struct.unpack_from("<HHH", elf, 0x3A)
    headers = [struct.unpack_from("<II4Q", elf, table + i * size) for i in range(count)]
    found = []
    for name, _, _, _, offset, length in headers:
        start = headers[names][4] + name
        if elf[start : elf.index(b"\0", start)].startswith(b".text."):
            digest = hashlib.sha256(elf[offset : offset + length]).hexdigest()
            found.append(f"{digest[:12]}:{length}")
    return " ".join(sorted(found))


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


# ----- the program -----


def part_of(text: str) -> tuple[int, int]:
    """The type of `--part`: "0/2" is the first of two halves."""
    number, _, count = text.partition("/")
    if not (number.isdecimal() and count.isdecimal() and int(number) < int(count)):
        raise argparse.ArgumentTypeError(f'must be such as "0/2", got {text:.40}')
    return int(number), int(count)


def pattern(text: str) -> re.Pattern[str]:
    """The type of `--only`."""
    try:
        return re.compile(text)
    except re.error as error:
        raise argparse.ArgumentTypeError(f"is no regular expression: {error}") from None


def main(words: list[str] | None = None) -> int:
    """Compile, compare; returns the exit code."""
    parser = parser_of(__doc__)
    add = parser.add_argument
    add("--only", type=pattern, default="^(flash|mma|hopper)", help="default: %(default)s")
    add("--part", type=part_of, default="0/1", metavar="I/N", help="default: all")
    add_options(parser)
    arguments = parser.parse_args(words)
    if runtime.SIMULATED:
        raise SystemExit("the simulator has no compiler: unset NUMBA_ENABLE_CUDASIM")
    comparison = Comparison(arguments.out, arguments.against)
    gc.set_threshold(1_000_000, 50, 1000)  # numba makes many objects
    first, step = arguments.part
    chosen = [instance for instance in instances() if arguments.only.search(instance.name)]
    for instance in chosen[first::step]:
        for architecture, usage in usages(instance).items():
            found = asdict(usage) | {"remarks": list(usage.remarks)}  # as JSON has it
            comparison.add(f"{instance.name} {architecture}", found)
    return comparison.finish()


if __name__ == "__main__":
    sys.exit(main())
