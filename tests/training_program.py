"""A tiny run of the training program, for its tests: fixtures and shorthands."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

import minitorch
from project.transformer import cli
from project.transformer.run_files import RunFolder

TINY = {
    "layers": 1,
    "d_model": 8,
    "heads": 1,
    "d_middle": 8,
    "context": 8,
    "batch": 2,
    "steps": 4,
    "warmup": 1,
    "eval_every": 2,
    "save_every": 2,
}
SENTENCE = "sphinx of black quartz, judge my vow.\n"


@pytest.fixture(autouse=True)
def restore_default_dtype() -> Iterator[None]:
    before = minitorch.get_default_dtype()
    yield
    minitorch.set_default_dtype(before)


@pytest.fixture(autouse=True)
def no_samples_and_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """They take most of the time, and `test_run_transformer.py` has them."""
    monkeypatch.setattr("project.transformer.commands._show_sample", lambda *_: None)
    monkeypatch.setattr("project.transformer.commands.draw_losses", lambda *_: None)


@pytest.fixture(name="text")
def text_file(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(SENTENCE * 20, encoding="utf-8")
    return path


def words(**values: Any) -> list[str]:
    return [f"--{name.replace('_', '-')}={value}" for name, value in values.items()]


def start(text: Path, out: Path, *more: str, **changes: Any) -> int:
    return cli.main(["train", f"--out={out}", *words(**{**TINY, "data": text, **changes}), *more])


def resume(out: Path, *more: str) -> int:
    return cli.main(["train", "--resume", f"--out={out}", *more])


def steps_of(out: Path) -> list[float]:
    return [row["step"] for row in RunFolder(str(out)).read_metrics()]


def message(capsys: pytest.CaptureFixture[str], command: list[str]) -> str:
    capsys.readouterr()
    assert cli.main(command) == 1
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1, lines
    return lines[0]


def edited(path: Path, **changes: str | None) -> None:
    """Change a checkpoint's metadata as another program would; None takes an entry away."""
    with safe_open(path, "numpy") as file:
        metadata = {**file.metadata(), **changes}
    save_file(load_file(path), path, {k: v for k, v in metadata.items() if v is not None})
