"""The READMEs are run: their code, their paths, their commands."""

import re
from pathlib import Path

import pytest

from project.bench.pages import RESULTS
from project.bench.results import condensed, pages, rendered
from project.transformer import cli

ROOT = Path(__file__).resolve().parent.parent
FILES = (
    "README.md", "CONTRIBUTING.md", "CHANGELOG.md", "minitorch/README.md", "kernels/README.md",
    "project/results/README.md", "kernels/flash_attention/FUNCTIONS.md",
)  # fmt: skip
TEXTS = {name: (ROOT / name).read_text(encoding="utf-8") for name in FILES}
README = TEXTS["README.md"]
MOST_LINES = 260  # so that it is read to its end
BLOCKS = re.findall(
    r"^```(\w*)\n(.*?)^```$", README + TEXTS["minitorch/README.md"], re.MULTILINE | re.DOTALL
)
CODE = [text for language, text in BLOCKS if language == "python"]
SHELL = [text for language, text in BLOCKS if not language]
PROGRAM = "python project/run_transformer.py"


@pytest.mark.parametrize("code", CODE)
def test_code_runs(code: str) -> None:
    if "import torch" in code:
        pytest.importorskip("torch")
    exec(compile(code, "README.md", "exec"), {})


@pytest.mark.parametrize("name", FILES)
def test_figures_are_those_of_the_result_files(name: str) -> None:
    up_to_date = rendered(TEXTS[name]) == TEXTS[name]
    assert up_to_date, "run python project/bench/results.py"


def test_pages_are_those_of_the_result_files() -> None:
    stale = [path.name for path, text in pages() if path.read_text(encoding="utf-8") != text]
    assert stale == [], "run python project/bench/results.py"


def test_the_readme_is_short() -> None:
    assert len(README.splitlines()) <= MOST_LINES


def test_pages_are_condensed(tmp_path: Path) -> None:
    table = "| a |\n|---|\n" + "| 1 |\n" * 20
    (tmp_path / "x.md").write_text(f"# Title\n\nA line.\n\n| b |\n|---|\n| 2 |\n\n{table}")
    readme = "before\n<!-- results: x -->\nold\n<!-- end of results -->\nafter\n"
    new = rendered(readme, tmp_path)
    assert new.startswith("before\n<!-- results: x -->\nA line.\n\n| b |")
    assert "<summary>all 20 rows</summary>\n\n| a |" in new
    assert new.endswith("<!-- end of results -->\nafter\n")
    assert rendered(new, tmp_path) == new
    assert "Title" not in condensed("# Title\n\ntext")
    assert condensed("# Title\n\none\n\ntwo\n\nthree", [1, 3]) == "one\n\nthree\n"


@pytest.mark.parametrize("name", FILES)
def test_links_lead_somewhere(name: str) -> None:
    links = re.findall(r"\]\((?!https?:|#)([^)#]+)\)", TEXTS[name])
    assert [link for link in links if not (ROOT / name).parent.joinpath(link).exists()] == []


@pytest.mark.parametrize("name", FILES)
def test_files_named_in_the_text_exist(name: str) -> None:
    names = re.findall(r"`((?:minitorch|kernels|tests|project)/[\w/]+\.\w+)`", TEXTS[name])
    assert [name for name in names if not (ROOT / name).exists()] == []


def test_commands_name_programs_that_exist() -> None:
    pages = [path.read_text(encoding="utf-8") for path in RESULTS.glob("*.md")]
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    named = re.findall(r"python (project/\S+\.py)", " ".join([*TEXTS.values(), *pages, makefile]))
    assert len(set(named)) > 5
    assert [name for name in set(named) if not (ROOT / name).exists()] == []


def test_make_targets_exist() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in set(re.findall(r"`make ([\w-]+)`", README)):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


def test_commands_are_understood() -> None:
    words = [line.split("#")[0].split() for block in SHELL for line in block.splitlines()]
    commands = [w[2:] for w in words if " ".join(w[:2]) == PROGRAM]
    assert len(commands) >= 4
    for command in commands:
        command = [word.strip('"') for word in command]
        named = command if command and command[0] in cli.COMMANDS else ["train", *command]
        cli.build_parser().parse_args(named)
