"""Every GPU kernel compiles for every architecture, and keeps its numbers in registers."""

from __future__ import annotations

import ast
import gc
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from minitorch.kernels.gpu import runtime
from minitorch.kernels.gpu.runtime import Instance, cuda, types

if runtime.SIMULATED:
    pytest.skip("the simulator has no compiler", allow_module_level=True)
pytest.importorskip("numba_cuda", reason="compiles with pip install 'numba-cuda[cu13]'")

from project.bench import machine_code

THREADS = 64


def kernels_in(module: str, path: Path) -> Iterator[tuple[str, str]]:
    """Module and name of every function that is decorated with `kernel(...)`."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef):
            for decorator in node.decorator_list:
                if isinstance(decorator, ast.Call):
                    if ast.unparse(decorator.func).split(".")[-1] == "kernel":
                        yield module, node.name


def test_every_kernel_is_compiled_here() -> None:
    written = {k for item in machine_code.modules_with_kernels().items() for k in kernels_in(*item)}
    listed = {
        (i.kernel.py_func.__module__, i.kernel.py_func.__name__) for i in machine_code.instances()
    }
    assert written - listed == set(), "give these modules a function instances()"
    names = [instance.name for instance in machine_code.instances()]
    assert sorted(names) == sorted(set(names)), "two instances have one name"


@pytest.fixture(scope="module", autouse=True)
def rare_garbage_collection() -> Iterator[None]:
    """numba makes so many objects that looking for garbage takes a third of its time."""
    thresholds = gc.get_threshold()
    gc.freeze()
    gc.set_threshold(1_000_000, 50, 1000)
    yield
    gc.set_threshold(*thresholds)
    gc.unfreeze()


def is_rare(instance: Instance) -> bool:
    """Whether few users meet it: float64 on a GPU; rows of more than 10,000 columns, but for the
    classes of a cross entropy; attention in bfloat16 on Turing, which has no instructions for that,
    with heads of more than 128 columns, or without tensor cores, and with every feature, in the
    tiles of the GPUs of data centres; gradients of captured arrays on some; and Hopper's without a
    band, whose code that with one has.
    """
    name, architectures = instance.name, instance.architectures
    if not name.startswith(("flash_", "mma_", "hopper_")):
        return "float64" in name or re.search(r"\b(16384|100000)\b", name) is not None
    on_turing = "bfloat16" in name and architectures == ("sm_75",)
    large_heads = re.search(r"\b(192|256)\b", name) is not None
    other_tiles = "80, 40, bool, dropout" in name and "sm_75" not in architectures
    captured = "_captured[" in name and re.search(r"float32|tf32|sm_75|sm_86", name) is not None
    functions = name.startswith("flash_") and re.search(r"functions, .*sm_90a\]", name) is not None
    without_band = name in ("hopper_forward[float16, 64, 64]", "hopper_forward[bfloat16, 128, 128]")
    rare = on_turing, large_heads, other_tiles, captured, functions, without_band
    return "float64" in name or any(rare)


def kernel_of(instance: Instance) -> tuple[str, str]:
    """The module and the name of its kernel, which stands in a function that makes its kinds."""
    function = instance.kernel.py_func
    return function.__module__, function.__qualname__


def compilations() -> Iterator[Any]:
    """Parameters of `test_compiles`: each instance with the architectures that `make test` compiles
    it for, and with the others.

    Each kernel for each of its architectures, once; in its other kinds for the oldest and the
    newest, between which the others lie; one that stores bfloat16, which is lowered anew for
    Turing, for those that have it.
    """
    seen: set[tuple[Any, str]] = set()
    for instance in machine_code.instances():
        every, kernel = machine_code.architectures_of(instance), kernel_of(instance)
        usual = [a for a in every if a != "sm_75" or not machine_code.stores_bfloat16(instance)]
        common = {a for a in usual if (kernel, a) not in seen} | {*usual[:1], *usual[-1:]}
        if is_rare(instance):
            common = set()
        seen |= {(kernel, architecture) for architecture in common}
        rest = [a for a in every if a not in common]
        if common:
            yield pytest.param(instance, sorted(common), id=instance.name)
        if rest:
            name = f"{instance.name} for {', '.join(rest)}"
            yield pytest.param(instance, rest, id=name, marks=pytest.mark.thorough)


@pytest.mark.parametrize(("instance", "architectures"), list(compilations()))
def test_compiles(instance: Instance, architectures: list[str]) -> None:
    complaints = {
        architecture: machine_code.complaint(instance, usage)
        for architecture, usage in machine_code.usages(instance, architectures).items()
    }
    assert not any(complaints.values()), f"{instance.name}: {complaints}"


def test_every_kernel_is_compiled_for_every_architecture_by_make_test() -> None:
    """Of those that it has instances for, but bfloat16 on Turing and float64."""
    common: dict[Any, set[str]] = {}
    for instance, architectures in (p.values for p in compilations() if not p.marks):
        common.setdefault(kernel_of(instance), set()).update(architectures)
    for instance in machine_code.instances():
        if not is_rare(instance):
            wanted = {a for a in machine_code.architectures_of(instance) if a != "sm_75"}
            assert wanted <= common[kernel_of(instance)], instance.name


# ----- the checks find what they are there to find -----


@runtime.kernel(THREADS)
def indexed_at_run_time(x, n):  # type: ignore[no-untyped-def]
    """An array that cannot live in registers, since the loop's bound is not known."""
    numbers = cuda.local.array(64, types.float32)
    for i in range(64):
        numbers[i] = x[(cuda.threadIdx.x * i) % n]
    for i in range(n):
        x[i] += numbers[(7 * i + cuda.threadIdx.x) % 64]


@runtime.kernel(1024)
def crowded(x, out):  # type: ignore[no-untyped-def]
    """128 numbers for each of 1024 threads, twice what a multiprocessor's registers hold."""
    numbers = cuda.local.array(128, types.float32)
    for i in range(128):
        numbers[i] = x[1024 * i + cuda.threadIdx.x]
    cuda.syncthreads()
    for i in range(128):
        out[1024 * (127 - i) + cuda.threadIdx.x] = numbers[i]


@runtime.kernel(THREADS)
def modest(x, out):  # type: ignore[no-untyped-def]
    tile = cuda.shared.array(THREADS, types.float32)
    tile[cuda.threadIdx.x] = x[cuda.grid(1)]
    cuda.syncthreads()
    out[cuda.grid(1)] = tile[THREADS - 1 - cuda.threadIdx.x]


def doubled(dtype: str) -> Any:
    precision = runtime.precision(dtype)
    load, store, real = precision.load, precision.store, precision.real

    @runtime.kernel(THREADS)
    def double(x):  # type: ignore[no-untyped-def]
        x[cuda.grid(1)] = store(real(2) * load(x[cuda.grid(1)]))

    return double


def planted(kernel: Any, *signature: Any) -> tuple[Instance, machine_code.Usage]:
    instance = Instance("planted", kernel, signature)
    return instance, machine_code.assembled(instance, machine_code.intermediate(instance), "sm_80")


def test_an_array_outside_of_registers_is_found() -> None:
    instance, usage = planted(indexed_at_run_time, types.float32[::1], types.int64)
    assert usage.stack == 4 * 64
    assert "local memory" in machine_code.complaint(instance, usage)


def test_spills_are_found() -> None:
    instance, usage = planted(crowded, types.float32[::1], types.float32[::1])
    assert usage.registers <= 64  # the launch bounds arrive: 65536 registers for 1024 threads
    assert usage.spills > 0
    assert "spilled" in machine_code.complaint(instance, usage)


def test_too_many_registers_are_found() -> None:
    instance, usage = planted(modest, types.float32[::1], types.float32[::1])
    assert usage.shared == 4 * THREADS
    assert machine_code.complaint(instance, usage) == ""
    strict = replace(instance, most_registers=usage.registers - 1)
    assert "registers, its limit is" in machine_code.complaint(strict, usage)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_code_of_the_oldest_architecture_serves_the_others(dtype: str) -> None:
    """Lowered for an architecture or for an older one, a kernel needs the same."""
    array = runtime.precision(dtype).array
    instance = Instance("planted", doubled(dtype), (array,))
    own = machine_code.intermediate(instance, (9, 0, "a"))
    assert machine_code.usages(instance)["sm_90a"] == machine_code.assembled(
        instance, own, "sm_90a"
    )


def test_the_hash_is_of_the_code() -> None:
    """The same code compiled again has the same hash, another kernel of the same size has not."""

    def adder(number: int) -> Any:
        @runtime.kernel(THREADS)
        def add(x):  # type: ignore[no-untyped-def]
            x[cuda.grid(1)] += number

        return add

    codes = [planted(adder(n), types.int32[::1])[1].code for n in (5, 5, 6)]
    assert codes[0] == codes[1] != codes[2]
    assert all(code.split(":")[1] == codes[0].split(":")[1] for code in codes)
