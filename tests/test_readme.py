"""The README is run: its code, its paths, its commands."""

import re
from pathlib import Path

import pytest

from project.transformer import cli

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
CODE = re.findall(r"^```python\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
SHELL = re.findall(r"^```\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
PROGRAM = "python project/run_transformer.py"


@pytest.mark.parametrize("code", CODE)
def test_code_runs(code: str) -> None:
    exec(compile(code, "README.md", "exec"), {})


def test_links_lead_somewhere() -> None:
    links = re.findall(r"\]\((?!https?:)([^)#]+)\)", README)
    assert links
    assert [link for link in links if not (ROOT / link).exists()] == []


def test_files_named_in_the_text_exist() -> None:
    names = re.findall(r"`((?:minitorch|kernels|tests|project)/[\w/]+\.\w+)`", README)
    assert names
    assert [name for name in names if not (ROOT / name).exists()] == []


def test_make_targets_exist() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in set(re.findall(r"`make (\w+)`", README)):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


def test_commands_are_understood() -> None:
    words = [line.split("#")[0].split() for block in SHELL for line in block.splitlines()]
    commands = [w[2:] for w in words if " ".join(w[:2]) == PROGRAM]
    assert len(commands) >= 4
    for command in commands:
        command = [word.strip('"') for word in command]
        named = command if command and command[0] in cli.COMMANDS else ["train", *command]
        cli.build_parser().parse_args(named)
