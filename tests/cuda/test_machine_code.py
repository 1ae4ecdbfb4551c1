"""On a GPU: the first launch writes machine code to disk, later ones take it from there."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from minitorch.kernels.gpu import compile_cache, runtime
from minitorch.kernels.gpu.runtime import cuda

pytestmark = pytest.mark.gpu
THREADS = 64


def adder(number: int) -> Any:
    @runtime.kernel(THREADS)
    def add(x):  # type: ignore[no-untyped-def]
        x[cuda.grid(1)] += number

    return add


def added(kernel: Any) -> float:
    x = cuda.to_device(np.zeros(THREADS, np.float32))
    runtime.launch(kernel, 1, THREADS, x)
    (result,) = set(x.copy_to_host().tolist())
    return float(result)


@pytest.fixture
def folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    monkeypatch.setenv(compile_cache.FOLDER_VARIABLE, str(tmp_path))
    compile_cache.folder.cache_clear()
    yield tmp_path
    compile_cache.folder.cache_clear()


def test_the_second_kernel_is_not_compiled(folder: Path) -> None:
    first, second, other = adder(5), adder(5), adder(6)
    assert added(first) == 5 and len(first.overloads) == 1
    assert added(second) == 5 and len(second.overloads) == 0
    assert added(other) == 6 and len(other.overloads) == 1
    assert len(list(folder.iterdir())) == 2


def test_a_damaged_file_is_compiled_anew(folder: Path) -> None:
    assert added(adder(7)) == 7
    (path,) = folder.iterdir()
    path.write_bytes(path.read_bytes()[:100])  # a driver that is given this crashes
    again = adder(7)
    assert added(again) == 7 and len(again.overloads) == 1
    assert added(adder(7)) == 7 and path.stat().st_size > 100
