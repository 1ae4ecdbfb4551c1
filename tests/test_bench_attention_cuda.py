"""The page and the picture of the GPU's attention benchmark, from made-up measurements."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from project import bench_attention_cuda as bench


def times(milliseconds: float) -> dict[str, float]:
    return {"gpu_ms": milliseconds, "wall_ms": milliseconds + 0.1}


def cell(length: int, causal: bool, standard_fits: bool = True) -> dict[str, Any]:
    both = {"flash": times(10.0), "standard": times(30.0), "torch": times(9.0)}
    if not standard_fits:
        del both["standard"]
    return {
        "batch": 16384 // length,
        "heads": 16,
        "length": length,
        "head_dim": 64,
        "causal": causal,
        "errors": {name: {"forward": 1e-7, "backward": 4e-7} for name in both},
        "forward": {"flash": times(2.0), "standard": times(4.0), "torch": times(1.0)},
        "both": both,
    }


@pytest.fixture
def result() -> dict[str, Any]:
    memory = [
        {"length": 4096, "flash": 48.0, "flash_seconds": 0.1, "standard": 2560.0},
        {"length": 65536, "flash": 768.0, "flash_seconds": 9.0, "standard": None},
    ]
    return {
        "machine": {
            "date": "today",
            "gpu": "a GPU",
            "memory_gib": 1,
            "python": "3",
            "numpy": "2",
            "numba-cuda": "0",
            "torch": "2",
            "config": {"driver": "13.0", "matmul": "tiles"},
        },
        "command": "python project/bench_attention_cuda.py",
        "seed": 0,
        "rounds": 30,
        "cells": [cell(1024, False), cell(1024, True), cell(16384, False, standard_fits=False)],
        "memory": memory,
    }


def test_ratios(result: dict[str, Any]) -> None:
    cells = result["cells"]
    assert bench.ratio(cells[0], "both", "standard") == 3
    assert bench.ratio(cells[2], "both", "standard") is None
    assert bench.geometric_mean(cells, "both", "standard") == pytest.approx(3)
    assert bench.geometric_mean(cells, "forward", "torch") == pytest.approx(0.5)


def test_operations_are_counted_as_papers_do(result: dict[str, Any]) -> None:
    full, causal = result["cells"][:2]
    forward = 4 * 16 * 16 * 1024**2 * 64 / 2e-3 / 1e12
    assert bench.tflops(full, "forward") == pytest.approx(forward)
    assert bench.tflops(causal, "forward") == pytest.approx(forward / 2)
    assert bench.tflops(full, "both") == pytest.approx(forward * 3.5 / 5)


def test_page_and_picture(result: dict[str, Any], tmp_path: Path) -> None:
    bench.write(result, tmp_path)
    page = (tmp_path / "attention_cuda.md").read_text()
    assert "| our standard attention (cuBLAS) | 2.00 / 3.00 | 2.00 / 3.00 |" in page
    assert "| 16384 | no | 2.00 / 10.00 |" in page
    assert "| 2.00 / no memory | 0.50 / 0.90 |" in page
    assert "| 65536 | 768 | 12.00 | 9.00 | no memory |" in page
    assert (tmp_path / "attention_cuda.png").stat().st_size > 10_000
