"""Machine code on disk: found again by another process, never taken for another kernel's."""

from __future__ import annotations

import errno
import math
import os
import subprocess
import sys
import time
from collections import namedtuple
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import pytest

from minitorch.kernels.gpu import compile_cache, runtime
from minitorch.kernels.gpu.arguments import pack
from minitorch.kernels.gpu.runtime import cuda, types
from minitorch.kernels.gpu.traced import traced

if runtime.SIMULATED:
    pytest.skip("the simulator compiles nothing", allow_module_level=True)
pytest.importorskip("numba_cuda", reason="compiles with pip install 'numba-cuda[cu13]'")

SIGNATURE = (types.float32[::1],)
ROOT = Path(__file__).resolve().parent.parent


@runtime.device_function
def doubled(x):  # type: ignore[no-untyped-def]
    return x + x


@runtime.device_function
def squared(x):  # type: ignore[no-untyped-def]
    return x * x


def applied(fn: Any, times: int = 1, threads: int = 64, **options: Any) -> Any:
    @runtime.kernel(threads, **options)
    def apply(x):  # type: ignore[no-untyped-def]
        for _ in range(times):
            x[cuda.grid(1)] = fn(x[cuda.grid(1)])

    return apply


def key(kernel: Any, signature: tuple[Any, ...] = SIGNATURE, architecture: str = "sm_80") -> str:
    name = compile_cache.key(kernel, signature, architecture)
    assert name is not None
    return name


def test_the_same_kernel_made_twice_has_one_key() -> None:
    assert key(applied(doubled)) == key(applied(doubled))


def test_whatever_the_machine_code_depends_on_is_in_the_key() -> None:
    others = [
        key(applied(squared)),
        key(applied(doubled, times=2)),
        key(applied(doubled, threads=128)),
        key(applied(doubled, blocks=2)),
        key(applied(doubled, fastmath=True)),
        key(applied(doubled), (types.float64[::1],)),
        key(applied(doubled), architecture="sm_90a"),
    ]
    assert len({key(applied(doubled)), *others}) == 1 + len(others)


def scaled_by(factor: int) -> Any:
    @dataclass(frozen=True)
    class Scale:
        unit: int = 1

        def apply(self, x: Any) -> Any:
            return x * factor

    scale = Scale()

    @traced(types.float32, types.float32)
    def run(x: Any) -> Any:
        return scale.apply(x)

    return run


def added(number: int) -> Any:
    def add(x: Any, *, other: int = number) -> Any:
        return x + other

    @traced(types.float32, types.float32)
    def run(x: Any) -> Any:
        return add(x)

    return run


def picked(numbers: Any) -> Any:
    @runtime.device_function
    def first(x):  # type: ignore[no-untyped-def]
        return x * numbers[0]

    return first


def fields(names: str) -> Any:
    make: Any = namedtuple
    return make("Pair", names)(1, 2)


def member(number: int) -> Any:
    return Enum("Member", {"ONE": number}).ONE  # type: ignore[attr-defined]


LAMBDAS = (lambda x: x + x), (lambda x: x * x)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        pytest.param(scaled_by(2), scaled_by(3), id="what a method refers to"),
        pytest.param(added(2), added(3), id="a default of a keyword"),
        pytest.param(*map(runtime.device_function, LAMBDAS), id="lambdas of one line"),
        pytest.param(picked(fields("a b")), picked(fields("b a")), id="names of fields"),
        pytest.param(picked(member(1)), picked(member(2)), id="value of an enum"),
        pytest.param(picked(1), picked(True), id="type of a number"),
        pytest.param(picked(1), picked(1.0), id="int or float"),
    ],
)
def test_what_looks_alike_is_told_apart(one: Any, other: Any) -> None:
    assert key(applied(one)) != key(applied(other))


def test_a_module_of_the_users_own_is_not_described(tmp_path: Path) -> None:
    """Its attributes may change, and nothing says which a kernel reads."""
    module = ModuleType("of_the_user")
    module.__file__ = str(tmp_path / "of_the_user.py")
    assert compile_cache.key(applied(picked(module)), SIGNATURE, "sm_80") is None
    assert compile_cache.key(applied(picked(math)), SIGNATURE, "sm_80") is not None


MODULE = """
from minitorch.kernels.gpu import compile_cache, runtime
from minitorch.kernels.gpu.arguments import pack
from minitorch.kernels.gpu.runtime import cuda, types

FACTOR = 2

@runtime.device_function
def scaled(x):
    return FACTOR * x

@runtime.kernel(64)
def apply(x):
    x[cuda.grid(1)] = scaled(x[cuda.grid(1)])

print(compile_cache.key(apply, (types.float32[::1],), "sm_80"))
"""


def key_of_module(folder: Path, text: str) -> str:
    path = folder / "written.py"
    path.write_text(text, encoding="utf-8")
    command = [sys.executable, str(path)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    run = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    return run.stdout.strip()


def test_another_process_finds_it_unless_the_source_has_changed(tmp_path: Path) -> None:
    first = key_of_module(tmp_path, MODULE)
    assert first.startswith("apply-sm_80-")
    assert key_of_module(tmp_path, MODULE + "\nprint()\n").strip() == first
    assert key_of_module(tmp_path, MODULE.replace("FACTOR = 2", "FACTOR = 3")) != first
    assert key_of_module(tmp_path, MODULE.replace("FACTOR * x", "FACTOR * x + x")) != first


def test_required_packages_may_be_anywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a folder that PYTHONPATH names: pip install --target."""

    @runtime.device_function
    def root(x):  # type: ignore[no-untyped-def]
        return np.float32(x)

    before = key(applied(root))
    monkeypatch.setattr(np, "__file__", "/somewhere/numpy/__init__.py")
    assert key(applied(root)) == before


def test_what_cannot_be_described_is_not_kept() -> None:
    class Opaque:
        def __call__(self, x: Any) -> Any:
            return x

    assert compile_cache.key(applied(Opaque()), SIGNATURE, "sm_80") is None
    compile_cache.write(None, b"code")
    assert compile_cache.read(None) is None


@pytest.fixture
def folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    monkeypatch.setenv(compile_cache.FOLDER_VARIABLE, str(tmp_path / "kernels"))
    compile_cache.folder.cache_clear()
    compile_cache._forget_old.cache_clear()
    yield tmp_path / "kernels"
    compile_cache.folder.cache_clear()


def test_code_is_read_as_it_was_written(folder: Path) -> None:
    assert compile_cache.read("a") is None
    compile_cache.write("a", b"machine code")
    compile_cache.write("b", b"other")
    assert compile_cache.read("a") == b"machine code"
    assert sorted(path.name for path in folder.iterdir()) == ["a", "b"]


@pytest.mark.parametrize("size", [0, 10, compile_cache.DIGEST_SIZE, -1])
def test_a_damaged_file_is_not_read(folder: Path, size: int) -> None:
    compile_cache.write("a", b"machine code")
    (folder / "a").write_bytes((folder / "a").read_bytes()[:size])
    assert compile_cache.read("a") is None
    compile_cache.write("a", b"machine code")
    assert compile_cache.read("a") == b"machine code"


def test_what_nobody_used_for_long_goes(folder: Path) -> None:
    old, used, new = (key(applied(doubled, times)) for times in (1, 2, 3))
    compile_cache.write(old, b"1")
    compile_cache.write(used, b"2")
    unfinished, somebodys = folder / f"{compile_cache.UNFINISHED}1", folder / "thesis.tex"
    long_ago = time.time() - (compile_cache.DAYS_KEPT + 1) * 24 * 3600
    for path in (folder / old, folder / used, unfinished, somebodys):
        path.touch()
        os.utime(path, (long_ago, long_ago))
    compile_cache.read(used)
    compile_cache._forget_old.cache_clear()
    compile_cache.write(new, b"3")
    assert {path.name for path in folder.iterdir()} == {new, used, "thesis.tex"}


def test_a_folder_that_others_fill_is_read(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compile_cache.write("a", b"1")

    def refuse(*_: Any) -> None:
        raise PermissionError

    monkeypatch.setattr(os, "utime", refuse)
    assert compile_cache.read("a") == b"1"


def test_a_full_disk_is_no_error(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = Path.write_bytes

    def write_half(path: Path, code: bytes) -> None:
        write(path, code[: len(code) // 2])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", write_half)
    compile_cache.write("a", b"machine code")
    assert compile_cache.read("a") is None
    assert not list(folder.iterdir())


def test_a_user_without_a_home_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (compile_cache.FOLDER_VARIABLE, "XDG_CACHE_HOME", "LOCALAPPDATA"):
        monkeypatch.delenv(name, raising=False)

    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", homeless)
    compile_cache.folder.cache_clear()
    try:
        assert compile_cache.folder() is None
        compile_cache.write("a", b"1")
    finally:
        compile_cache.folder.cache_clear()


def test_an_empty_variable_turns_it_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(compile_cache.FOLDER_VARIABLE, "")
    compile_cache.folder.cache_clear()
    try:
        assert compile_cache.folder() is None
        compile_cache.write("a", b"1")
        assert compile_cache.read("a") is None
    finally:
        compile_cache.folder.cache_clear()


def test_a_folder_that_cannot_be_made_is_no_error(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv(compile_cache.FOLDER_VARIABLE, str(tmp_path / "file" / "below"))
    compile_cache.folder.cache_clear()
    try:
        compile_cache.write("a", b"1")
        assert compile_cache.read("a") is None
    finally:
        compile_cache.folder.cache_clear()


def test_numba_cuda_is_lent_a_name_that_numpy_took_away() -> None:
    """As with numpy 2.5: the module that wants the name loads, and numpy is as it was."""
    code = (
        "import numpy\n"
        "vars(numpy).pop('row_stack', None)\n"
        "from minitorch.kernels.gpu import runtime\n"
        "assert runtime.ROW_STACK_LENT and not hasattr(numpy, 'row_stack')\n"
        "import numba.cuda.np.arrayobj\n"
    )
    command = [sys.executable, "-W", "error", "-c", code]
    run = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr


def test_the_fields_of_named_tuples_are_part_of_the_key() -> None:
    """Which number `sizes.rows` is, neither the kernel's source says nor the type's name."""

    def key_with(fields: Any) -> str:
        return key(applied(doubled), (*SIGNATURE, types.NamedUniTuple(types.int64, 2, fields)))

    def first() -> Any:
        class Sizes(NamedTuple):
            rows: int
            columns: int

        return Sizes

    def second() -> Any:
        class Sizes(NamedTuple):
            columns: int
            rows: int

        return Sizes

    assert key_with(first()) == key_with(first()) != key_with(second())


class Pair(NamedTuple):
    m: int
    n: int


class Other(NamedTuple):
    n: int
    m: int


def test_arguments_as_the_driver_takes_them() -> None:
    kinds = set()
    for _ in range(2):  # what was never met, and what was
        for pair in (Pair(3, -4), Other(3, -4), (3, -4)):
            packed = pack((pair, 5, np.float32(1.0)))
            assert packed is not None
            assert packed[0] == [3, -4, 5, 0x3F800000]
            kinds.add(packed[1])
    assert len(kinds) == 3, "three kernels: they know the numbers by other names"
    assert pack((Pair(1, 2), "text")) is None
