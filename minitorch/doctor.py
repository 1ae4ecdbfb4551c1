"""`python -m minitorch doctor`: what this machine offers, what is wrong with it and how to mend it.

Each `examine_*` function looks at one thing and returns a `Finding`: facts to print and problems,
one line each. A problem is fatal if the library cannot be used at all; the rest cost speed.
"""

from __future__ import annotations

import ctypes
import itertools
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from . import threads
from .cuda import cublas, version_of
from .kernels.cpu import compiler as cpu_compiler
from .kernels.gpu import compile_cache, runtime

SAMPLE_BYTES = 1 << 16  # a compiled kernel has as many
# About a millisecond, as a power of two of cycles.
MOST_SPINNING = 22
EXTRAS = {
    "cuda": ["numba-cuda", "nvmath-python"],
    "train": ["matplotlib", "rich", "safetensors", "tokenizers"],
    "bench": ["torch", "threadpoolctl"],
}
OLDEST_CUDA_13_DRIVER = 580
# OpenBLAS's own names for the kernels it can be held to that use 512-bit vectors.
OPENBLAS_512_BIT = ("skylakex", "cooperlake", "sapphirerapids")
# How builds of OpenBLAS name their functions (numpy's wheels: the first).
OPENBLAS_SYMBOLS = ("scipy_openblas_{}64_", "scipy_openblas_{}", "openblas_{}64_", "openblas_{}")


@dataclass(frozen=True)
class Problem:
    """What is wrong and how to mend it, in one line; `fatal` if nothing works until then."""

    what: str
    mend: str
    fatal: bool = False

    def __str__(self) -> str:
        return f"{'error' if self.fatal else 'warning'}: {self.what}: {self.mend}"


@dataclass(frozen=True)
class Finding:
    """Facts to print, label to text, and the problems seen on the way."""

    facts: dict[str, str] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)


# --- versions --------------------------------------------------------------------------------


def examine_versions() -> Finding:
    """Python, the packages everything needs, and which extras are complete."""
    facts = {
        "python": f"{platform.python_version()} ({platform.python_implementation()})",
        "system": platform.platform(),
    }
    for package in ("minitorch", "numpy", "ml_dtypes", "numba", "llvmlite"):
        facts[package] = version_of(package) or "not installed as a package"
    for extra, packages in EXTRAS.items():
        missing = [package for package in packages if version_of(package) is None]
        facts[f"extra [{extra}]"] = (
            f"missing {', '.join(missing)} ({_install(extra)})"
            if missing
            else ", ".join(f"{package} {version_of(package)}" for package in packages)
        )
    return Finding(facts)


# --- the CPU and its threads ------------------------------------------------------------------


def usable_cores() -> int:
    """Cores this process may run on: its affinity, or the container's share if that is less."""
    affinity = getattr(os, "sched_getaffinity", None)
    cores = len(affinity(0)) if affinity else os.cpu_count() or 1
    quota = Path("/sys/fs/cgroup/cpu.max")
    if quota.is_file():
        allowed, period = quota.read_text().split()
        if allowed != "max":
            cores = min(cores, max(1, round(int(allowed) / int(period))))
    return cores


def vector_bits(features: Mapping[str, bool], machine: str) -> int:
    """The widest vectors of a CPU in bits, by LLVM's names of its features."""
    if features.get("avx512f"):
        return 512
    if features.get("avx"):
        return 256
    return 128 if features.get("sse2") or machine.lower() in ("arm64", "aarch64") else 0


def examine_cpu() -> Finding:
    """The CPU's name, its cores and its vectors."""
    import llvmlite.binding as llvm

    features = llvm.get_host_cpu_features()
    bits = vector_bits(features, platform.machine())
    notable = ("fma", "avx2", "avx512f", "avx512bf16", "amx-tile", "neon", "sve")
    present = [name for name in notable if features.get(name)]
    name = f"{llvm.get_host_cpu_name()} ({platform.machine()})"
    return Finding(
        {
            "cpu": f"{name}, {usable_cores()} cores usable",
            "vectors": f"{bits} bits ({', '.join(present) or 'none of the named features'})",
        }
    )


def _openblas() -> ctypes.CDLL | None:
    """The OpenBLAS inside numpy's wheel, loaded already; None if numpy has another BLAS."""
    package = Path(np.__file__).parent
    for folder in (package.parent / "numpy.libs", package / ".dylibs"):
        for library in sorted(folder.glob("*openblas*")):
            return ctypes.CDLL(str(library))
    return None


def _ask_openblas(library: ctypes.CDLL, question: str, answer: type) -> Any:
    """Call one of OpenBLAS's `get_` functions; None if this build has no such function."""
    for pattern in OPENBLAS_SYMBOLS:
        function = getattr(library, pattern.format(question), None)
        if function is not None:
            function.restype = answer
            return function()
    return None


def examine_blas(cores: int, environment: Mapping[str, str], cpu_vector_bits: int) -> Finding:
    """Which BLAS numpy calls, its threads, and whether it is held to slower instructions.

    Args:
        cores: how many cores this process may use.
        environment: `os.environ`.
        cpu_vector_bits: what the CPU has (see `vector_bits`).

    """
    build = np.show_config(mode="dicts")["Build Dependencies"]["blas"]
    facts = {"blas": f"{build.get('name', 'unknown')} {build.get('version', '')}".strip()}
    problems = []
    library = _openblas()
    if library is not None:
        count = _ask_openblas(library, "get_num_threads", ctypes.c_int) or 0
        core = _ask_openblas(library, "get_corename", ctypes.c_char_p)
        facts["blas"] += f", kernels for {core.decode()}" if core else ""
        facts["blas threads"] = str(count or "unknown")
        if count > cores:
            problems.append(
                Problem(
                    f"BLAS starts {count} threads on {cores} usable cores",
                    f"set OPENBLAS_NUM_THREADS={cores}",
                )
            )
    held_to = environment.get("OPENBLAS_CORETYPE")
    facts["OPENBLAS_CORETYPE"] = held_to or "not set"
    if held_to and cpu_vector_bits == 512 and held_to.lower() not in OPENBLAS_512_BIT:
        problems.append(
            Problem(
                f"OPENBLAS_CORETYPE={held_to} keeps matrix products off this CPU's 512-bit vectors",
                "unset OPENBLAS_CORETYPE (env -u OPENBLAS_CORETYPE ...)",
            )
        )
    return Finding(facts, problems)


def examine_numba(cores: int, environment: Mapping[str, str]) -> Finding:
    """Whether numba compiles and runs a parallel loop, with how many threads, in which layer.

    Args:
        cores: how many cores this process may use.
        environment: `os.environ`.

    """
    import numba

    if environment.get("NUMBA_DISABLE_JIT", "0") not in ("", "0"):
        return Finding(
            {"numba": "compilation is switched off"},
            [
                Problem(
                    "NUMBA_DISABLE_JIT runs kernels as plain Python, for debugging: on one thread, "
                    "thousands of times slower",
                    "unset NUMBA_DISABLE_JIT",
                )
            ],
        )
    count = numba.get_num_threads()
    facts = {"numba threads": str(count)}
    problems = []
    try:
        _run_parallel_loop()
        facts["numba threading layer"] = numba.threading_layer()
    except Exception as error:
        problem = f"numba cannot run a parallel loop ({type(error).__name__}: {error})"
        mend = "try NUMBA_THREADING_LAYER=workqueue, or reinstall numba"
        return Finding(facts, [Problem(problem.replace("\n", " "), mend, fatal=True)])
    if count > cores:
        text = f"numba starts {count} threads on {cores} usable cores"
        problems.append(Problem(text, f"set NUMBA_NUM_THREADS={cores}"))
    elif count < cores:
        text = f"numba uses {count} of {cores} usable cores"
        problems.append(Problem(text, "unset NUMBA_NUM_THREADS, or do not mind if it was meant"))
    return Finding(facts, problems)


def examine_waiting(environment: Mapping[str, str]) -> Finding:
    """How threads wait: those that spin take the cores of those that work (see `threads`).

    Args:
        environment: `os.environ`.

    """
    facts = {name: environment.get(name, "not set") for name in threads.SETTINGS}
    problems = []
    if environment.get("OMP_WAIT_POLICY", "").lower() == "active":
        text = "OMP_WAIT_POLICY=active makes threads spin while they wait, in each other's way"
        problems.append(Problem(text, "unset OMP_WAIT_POLICY"))
    timeout = environment.get("OPENBLAS_THREAD_TIMEOUT", "")
    if timeout.isdigit() and int(timeout) > MOST_SPINNING:
        text = f"OPENBLAS_THREAD_TIMEOUT={timeout} makes BLAS threads spin for 2**{timeout} cycles"
        problems.append(Problem(text, "unset OPENBLAS_THREAD_TIMEOUT"))
    return Finding(facts, problems)


def _run_parallel_loop() -> None:
    import numba

    @numba.njit(parallel=True)
    def count(n: int) -> int:
        total = 0
        for _ in numba.prange(n):
            total += 1
        return total

    if count(100) != 100:
        raise RuntimeError("a parallel sum over 100 ones was not 100")


# --- the compile cache -----------------------------------------------------------------------


def can_write(folder: Path) -> bool:
    """Whether a file of some size can be made in a folder, or the folder itself where it is
    missing.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(bytes(SAMPLE_BYTES))  # a full disk lets an empty file be made
        return True
    except OSError:
        return False


def examine_cache(environment: Mapping[str, str], folder: Path | None) -> Finding:
    """Where the compiled code of CPU kernels is kept from one process to the next.

    Args:
        environment: `os.environ`.
        folder: where numba keeps it; None if nowhere (see `cpu_compiler.cache_folder`).

    """
    named = environment.get("NUMBA_CACHE_DIR")
    mend = "set NUMBA_CACHE_DIR to a folder that can be written"
    if folder is None:
        text = "no folder for compiled CPU kernels can be written, each process compiles them anew"
        return Finding({"compile cache": "none"}, [Problem(text, mend)])
    if not can_write(folder):
        text = f"the compile cache {folder} cannot be written, or its disk is full: kernels compile"
        problem = Problem(f"{text} anew", mend)
        return Finding({"compile cache": f"{folder} (not writable)"}, [problem])
    problems = []
    if named and not folder.is_relative_to(Path(named).absolute()):
        text = f"NUMBA_CACHE_DIR={named} cannot be written, compiled kernels go elsewhere"
        problems.append(Problem(text, mend))
    return Finding({"compile cache": str(folder)}, problems)


def examine_gpu_cache(environment: Mapping[str, str], folder: Path | None) -> Finding:
    """Where the machine code of GPU kernels is kept.

    Args:
        environment: `os.environ`.
        folder: that place; None if it is kept nowhere (see `compile_cache.folder`).

    """
    label, variable = "compile cache (gpu)", compile_cache.FOLDER_VARIABLE
    if environment.get(variable) == "":
        return Finding({label: f"switched off by {variable}"})
    if folder is not None and can_write(folder):
        return Finding({label: str(folder)})
    text = "there is no folder to keep compiled GPU kernels in, each process compiles them anew"
    if folder is not None:
        text = f"the cache of GPU kernels {folder} cannot be written: they compile anew"
    problem = Problem(text, f"set {variable} to a folder that can be written")
    return Finding({label: "none" if folder is None else f"{folder} (not writable)"}, [problem])


def examine_kernels(kernels: Path) -> Finding:
    """Whether `minitorch/kernels` is the folder it should be: some systems lose the link to it."""
    if kernels.is_dir():
        return Finding({"kernels": str(kernels.resolve())})
    problem = Problem(
        f"{kernels} is not a folder (a link lost in an archive, or on Windows)",
        "pip install -e . in the checkout, or git config core.symlinks true and check out again",
    )
    return Finding({"kernels": "link lost"}, [problem])


# --- the GPU ---------------------------------------------------------------------------------


def examine_gpu(environment: Mapping[str, str]) -> Finding:
    """The NVIDIA GPU, if there is one, whether kernels run on it, and what multiplies matrices.

    Args:
        environment: `os.environ`.

    """
    seen = _nvidia_smi()
    compiler = version_of("numba-cuda")
    facts = {
        "gpu": seen or "none (everything runs on the CPU)",
        "numba-cuda": compiler or "not installed (numba's own CUDA target is used)",
    }
    problems: list[Problem] = []
    if environment.get("NUMBA_ENABLE_CUDASIM", "0") not in ("", "0"):
        text = "NUMBA_ENABLE_CUDASIM runs GPU kernels as plain Python, thousands of times slower"
        problems.append(Problem(text, "unset NUMBA_ENABLE_CUDASIM"))
        return Finding(facts | {"gpu": "simulated"}, problems)
    if runtime.ROW_STACK_LENT:
        facts["numba-cuda"] += (
            f" (lent the name numpy.row_stack, which numpy {np.__version__} lacks)"
        )
    if seen is None:
        return Finding(facts, problems)
    usable, why_not = _cuda_usable()
    if usable:
        cache = examine_gpu_cache(environment, compile_cache.folder())
        facts, problems = facts | cache.facts, cache.problems
        facts["matmul on the gpu"] = cublas.description()
        if not cublas.is_available():
            text = "matrix products on the GPU use our tiled kernel, for lack of cuBLAS"
            problems.append(Problem(text, _install(_gpu_extra(seen))))
    else:
        facts["gpu"] += ", not usable"
        text = f"numba cannot use the GPU ({why_not})"
        problems.append(Problem(text, _install(_gpu_extra(seen))))
    return Finding(facts, problems)


def _numbers(version: str) -> tuple[int, ...]:
    """(2, 4, 6) of "2.4.6"; what is no number ends it."""
    parts = itertools.takewhile(str.isdigit, version.split("."))
    return tuple(int(part) for part in parts)


def _gpu_extra(seen: str) -> str:
    """The extra that fits a driver: CUDA 13 needs version 580 or later."""
    driver = _numbers(seen.split(";")[0].rsplit(",", 1)[-1].strip())
    return "cuda12" if driver and driver < (OLDEST_CUDA_13_DRIVER,) else "cuda"


def _install(extra: str) -> str:
    """The command for an extra. Not by name: a package index has another MiniTorch."""
    return f"pip install -e '.[{extra}]' in the checkout"


def _nvidia_smi() -> str | None:
    program = shutil.which("nvidia-smi")
    if program is None:
        return None
    query = [program, "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return "; ".join(answer.stdout.strip().splitlines()) or None


def _cuda_usable() -> tuple[bool, str]:
    try:
        return runtime.is_available(), "no working driver, or no CUDA libraries that fit it"
    except Exception as error:
        return False, f"{type(error).__name__}: {error}".replace("\n", " ")


# --- the report ------------------------------------------------------------------------------


def examine(environment: Mapping[str, str] | None = None) -> list[Finding]:
    """Look at everything.

    Args:
        environment: variables to judge by; `os.environ` if None.

    """
    import llvmlite.binding as llvm

    variables = os.environ if environment is None else environment
    cores = usable_cores()
    kernels = Path(__file__).parent / "kernels"
    bits = vector_bits(llvm.get_host_cpu_features(), platform.machine())
    return [
        examine_versions(),
        examine_cpu(),
        examine_blas(cores, variables, bits),
        examine_numba(cores, variables),
        examine_waiting(variables),
        examine_kernels(kernels),
        examine_cache(variables, cpu_compiler.cache_folder()),
        examine_gpu(variables),
    ]


def main() -> int:
    """Print the report. The exit code is 0 if the library can be used, 1 if not."""
    findings = examine()
    facts = {label: text for finding in findings for label, text in finding.facts.items()}
    width = max(map(len, facts))
    for label, text in facts.items():
        print(f"{label:<{width}}  {text}")
    problems = [problem for finding in findings for problem in finding.problems]
    print()
    for problem in problems:
        print(problem)
    fatal = any(problem.fatal for problem in problems)
    if not fatal:
        print("ready" if not problems else "ready, with the warnings above")
    sys.stdout.flush()
    return int(fatal)
