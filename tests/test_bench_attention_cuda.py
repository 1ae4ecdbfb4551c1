"""The page and the pictures of the GPU's attention benchmark, from made-up measurements."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from project.bench import attention_cuda as bench
from project.bench import attention_report as report
from project.bench.attention_parts import cases


def cell(head_dim: int, length: int, causal: bool, **times: float) -> dict[str, Any]:
    """A cell of the grid in which each contestant took so many milliseconds."""
    figures = {name: {"ms": ms, "rounds": 30, "error": 1e-3} for name, ms in times.items()}
    return {
        "batch": 16384 // length,
        "heads": 2048 // head_dim,
        "seqlen_q": length,
        "seqlen_k": length,
        "head_dim": head_dim,
        "causal": causal,
        "dtype": "float16",
        "dropout_p": 0.0,
        "seed": 0,
        "forward": figures,
        "backward": {name: {**figure, "ms": 3 * figure["ms"]} for name, figure in figures.items()},
    }


@pytest.fixture
def result() -> dict[str, Any]:
    grid = [
        cell(64, 1024, False, hopper=1.0, mma=2.5, flash=2.0, cudnn=1.0),
        cell(64, 1024, True, hopper=1.0, mma=2.5, flash=1.0, cudnn=1.1),
        cell(128, 8192, False, hopper=1.0, flash=4.0, cudnn=1.0),
    ]
    decode = cell(128, 65536, False, ours=0.3, flash=2.0)
    decode |= {"batch": 1, "heads": 32, "seqlen_q": 1, "backward": {}}
    return {
        "machine": {
            "date": "today",
            "gpu": "a GPU",
            "memory_gib": 1,
            "driver": "13.0",
            "torch": "2",
        },
        "command": "python project/bench/attention_cuda.py",
        "seed": 0,
        "rounds": 30,
        "ceilings": {"matmul_tflops": {"float16": 700.0}, "copy_tb_per_s": 4.0},
        "grid": grid,
        "decode": [decode],
        "memory": [{"length": 4096, "flash_attention": 48.0, "attention": None}],
        "compile": [{"kernel": "hopper", "cold": {"forward": 12.0, "backward": 20.0}}],
    }


def test_operations_are_counted_as_papers_do(result: dict[str, Any]) -> None:
    full, causal = result["grid"][:2]
    forward = 4 * 16 * 32 * 1024**2 * 64 / 1e-3 / 1e12
    assert report.tflops(full, "forward", "hopper") == pytest.approx(forward)
    assert report.tflops(causal, "forward", "hopper") == pytest.approx(forward / 2)
    assert report.tflops(full, "backward", "hopper") == pytest.approx(forward * 2.5 / 3)
    assert report.tflops(full, "forward", "absent") is None


def test_bars(result: dict[str, Any]) -> None:
    """A bar holds for the worst cell, or for the geometric mean, or from above."""
    bars = {bar.what: bar for bar in report.bars(result)}
    flash = bars["hopper forward over PyTorch's flash backend"]
    assert flash.worst == ("D 64, N 1024, causal", 1.0)
    assert flash.mean == pytest.approx(2.0)
    assert flash.verdict() == "**missed**"
    assert bars["hopper forward over cuDNN, geometric mean"].verdict() == "met"
    assert bars["hopper backward over PyTorch's flash backend"].verdict() == "met"
    assert bars["mma forward over PyTorch's flash backend"].worst[1] == pytest.approx(0.4)
    share = bars["hopper forward, share of the matrix product's rate"]
    assert share.verdict() == "-"
    assert len(share.figures) == 1
    decode = bars["decode, share of the rate of a copy"]
    assert decode.worst[1] == pytest.approx(65536 * 32 * 128 * 4 / 0.3e-3 / 4e12)
    assert bars["first use of a kernel, cold cache, seconds"].verdict() == "**missed**"
    assert "hopper forward over PyTorch's flash backend, D = 256" not in bars


def test_page_and_pictures(result: dict[str, Any], tmp_path: Path) -> None:
    bench.write(result, tmp_path / "attention_cuda.json")
    page = (tmp_path / "attention_cuda.md").read_text()
    assert "| hopper forward over cuDNN | ≥ 0.9 | 1.03 | 1.00 (D 64, N 1024) | - | met |" in page
    assert "| 128 | 8192 | no |" in page
    assert "| 4096 | 48 | - |" in page
    assert "| hopper | 12.00 | 20.00 | - | - |" in page
    pictures = sorted(path.name for path in tmp_path.glob("*.png"))
    assert pictures == [
        f"attention_cuda_d{d}_{what}.png" for d in (128, 64) for what in ("backward", "forward")
    ]
    bench.main(["--draw", "--out", str(tmp_path)])
    assert (tmp_path / "attention_cuda.md").read_text() == page
    assert json.loads((tmp_path / "attention_cuda.json").read_text()) == result


@pytest.mark.parametrize("text", [None, "{}", "[]", "not json", '{"machine": {"gpu": "x"}}'])
def test_draw_says_what_is_wrong_with_the_file(tmp_path: Path, text: str | None) -> None:
    if text is not None:
        (tmp_path / "attention_cuda.json").write_text(text)
    with pytest.raises(
        SystemExit,
        match=r"attention_cuda.json has another format|cannot read .*attention_cuda.json",
    ):
        bench.main(["--draw", "--out", str(tmp_path)])


def test_the_grid_keeps_hidden_size_and_tokens() -> None:
    grid = cases([512, 16384], [64, 256])
    assert len(grid) == 8
    assert {case.batch * case.seqlen_q for case in grid} == {16384}
    assert {case.heads * case.head_dim for case in grid} == {2048}


def test_new_cells_take_the_place_of_old_ones(result: dict[str, Any]) -> None:
    old = result["grid"]
    new = [cell(64, 1024, True, hopper=9.0)]
    merged = bench.merged(old, new)
    assert len(merged) == 3
    assert merged[1] == new[0]
