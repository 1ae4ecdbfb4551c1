"""Compiled CPU code is kept on disk where that can be done, and nothing fails where it cannot."""

import ast
import shutil
from pathlib import Path
from typing import Any

import numba
import pytest

from minitorch.kernels.cpu import compiler as cpu_compiler

ROOT = Path(__file__).resolve().parent.parent


def add_one(x: float) -> float:
    return x + 1.0


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where numba is told to keep code."""
    monkeypatch.setattr(numba.core.config, "CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


def compiled() -> Any:
    return cpu_compiler.njit(add_one, cache=True)


def files(folder: Path, suffix: str) -> list[Path]:
    return sorted(folder.rglob(f"*.{suffix}"))


def test_code_is_kept_and_found_again(folder: Path) -> None:
    assert compiled()(1.0) == 2.0
    again = compiled()
    assert again(1.0) == 2.0
    assert again.stats.cache_hits and not again.stats.cache_misses
    found = cpu_compiler.cache_folder()
    assert found is not None and found.is_relative_to(folder)


def test_options_are_numbas() -> None:
    @cpu_compiler.njit(error_model="numpy")
    def inverse(x: float) -> float:
        return 1.0 / x

    assert inverse(0.0) == float("inf")
    assert compiled().py_func is add_one
    assert not cpu_compiler.njit(add_one).stats.cache_path


def test_no_place_for_a_cache_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError

    monkeypatch.setattr(numba.core.caching._CacheLocator, "ensure_cache_path", refuse)
    with pytest.raises(RuntimeError, match="no locator"):  # numba's own decorator
        numba.njit(cache=True)(add_one)
    function = compiled()
    assert function(1.0) == 2.0 and function.stats.cache_path is None
    assert cpu_compiler.cache_folder() is None


def test_a_user_without_a_home_gets_no_folder_of_that_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(numba.core.caching.InTreeCacheLocator, "from_function", lambda *_: None)
    monkeypatch.setattr(numba.core.config, "CACHE_DIR", "")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert cpu_compiler.cache_folder() is not None
    monkeypatch.setenv("XDG_CACHE_HOME", "~/.cache")  # what numba makes of an unknown home
    monkeypatch.chdir(tmp_path)
    assert cpu_compiler.cache_folder() is None and compiled()(1.0) == 2.0
    assert not (tmp_path / "~").exists()


def test_a_folder_that_is_gone_or_full_is_no_error(folder: Path) -> None:
    """It could be written when the function was defined, and cannot when it is first called."""
    function = compiled()
    shutil.rmtree(folder)
    folder.touch()
    assert function(1.0) == 2.0


@pytest.mark.parametrize("suffix", ["nbi", "nbc"])
@pytest.mark.parametrize("damage", [b"", b"nothing that pickle knows"])
def test_a_damaged_file_is_compiled_anew(folder: Path, suffix: str, damage: bytes) -> None:
    compiled()(1.0)
    (file,) = files(folder, suffix)
    file.write_bytes(damage)
    assert compiled()(1.0) == 2.0
    again = compiled()
    assert again(1.0) == 2.0 and again.stats.cache_hits  # and the file is whole again


def test_all_cpu_code_is_compiled_here() -> None:
    for path in sorted((ROOT / "minitorch").rglob("*.py")) + sorted(ROOT.glob("kernels/**/*.py")):
        if path.stem in ("compiler", "doctor"):  # the doctor's loop tries numba itself
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.module and "numba" in node.module:
                names = {name.name for name in node.names}
            elif isinstance(node, ast.Attribute) and ast.unparse(node.value) == "numba":
                names = {node.attr}
            else:
                continue
            assert not names & {"njit", "jit", "vectorize", "guvectorize"}, f"{path}: {names}"
