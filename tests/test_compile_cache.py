"""Machine code on disk: found again by another process, never taken for another kernel's."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from minitorch.kernels import compile_cache, runtime
from minitorch.kernels.runtime import cuda, types

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


MODULE = """
from minitorch.kernels import compile_cache, runtime
from minitorch.kernels.runtime import cuda, types

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


def test_what_nobody_used_for_long_goes(folder: Path) -> None:
    compile_cache.write("old", b"1")
    compile_cache.write("used", b"2")
    long_ago = time.time() - (compile_cache.DAYS_KEPT + 1) * 24 * 3600
    for name in ("old", "used"):
        os.utime(folder / name, (long_ago, long_ago))
    compile_cache.read("used")
    compile_cache._forget_old.cache_clear()
    compile_cache.write("new", b"3")
    assert sorted(path.name for path in folder.iterdir()) == ["new", "used"]


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
