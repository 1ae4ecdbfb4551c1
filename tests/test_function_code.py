"""The page on score functions, and the program that prints what stands there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from minitorch.kernels.cpu.compiler import COMPILES
from project import draw_masks
from project.bench import function_code

PAGE = Path(__file__).resolve().parent.parent / "kernels/flash_attention/FUNCTIONS.md"
TEXT = PAGE.read_text(encoding="utf-8")
BLOCKS = [
    code for name, code in re.findall(r"^```(\w*)\n(.*?)^```$", TEXT, re.M | re.S) if not name
]


def test_graphs_on_the_page_are_those_of_today() -> None:
    assert "\n".join(function_code.graph_lines()) + "\n" == "\n".join(BLOCKS[:2])


@pytest.mark.skipif(not COMPILES, reason="nothing is compiled")
def test_the_loop_on_the_cpu_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    """The operations that the page shows, in their order."""
    function_code.main(["cpu"])
    lines = capsys.readouterr().out.splitlines()[1:-1]
    printed, shown = (
        [(line.partition(" = ")[2] or line).split()[0] for line in some]
        for some in (lines, BLOCKS[2].splitlines())
    )
    rest = iter(printed)
    assert all(operation in rest for operation in shown)


@pytest.mark.thorough
def test_instructions_on_hopper_are_printed(capsys: pytest.CaptureFixture[str]) -> None:
    function_code.main(["hopper"])
    printed = [line.split()[0] for line in capsys.readouterr().out.splitlines()[1:-2]]
    shown = [line.split()[0] for line in BLOCKS[3].splitlines()]
    rest = iter(printed)
    assert all(instruction in rest for instruction in shown)


def test_pictures_of_masks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    draw_masks.main(["--out", str(tmp_path)])
    printed = capsys.readouterr().out
    for name, mask in draw_masks.masks(2048, 64, 0).items():
        picture = tmp_path / f"mask_{name}.png"
        assert picture.read_bytes()[:4] == b"\x89PNG"
        assert f"{picture}: {mask.sparsity():.1f}%" in printed
        assert (draw_masks.RESULTS / picture.name).exists()
    parts = draw_masks.masks(2048, 64, 0)
    blocks = {name: mask.to_dense()[0, 0] > 0 for name, mask in parts.items()}
    for name in ("global", "window"):
        assert (blocks["bigbird"] | ~blocks[name]).all()
