"""Make the pages in `project/results` anew, and put them into texts, between markers.

    python project/bench/results.py            # pages, README.md and project/results/README.md
    python project/bench/results.py --check    # exit with 1 if one is out of date

`NAME.md` is what the program `NAME.py` of this folder makes of `NAME.json`. In a text a block that
begins with `<!-- results: NAME -->` and ends with `<!-- end of results -->` stands for it. Titles
are left out and long tables folded. Numbers after the name, `<!-- results: NAME 1 3 -->`, choose
among the page's paragraphs, a table being one.
"""

from __future__ import annotations

import importlib
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # so that `project` is found

from project.arguments import parser_of
from project.bench.pages import RESULTS

ROOT = Path(__file__).resolve().parents[2]
TEXTS = (ROOT / "README.md", RESULTS / "README.md")
BLOCK = re.compile(r"<!-- results: (\w+)((?: \d+)*) -->\n.*?<!-- end of results -->", re.DOTALL)
# Longer tables are folded.
MOST_ROWS = 18


def pages() -> Iterator[tuple[Path, str]]:
    """Each page that has a JSON file, and what it should be."""
    for path in sorted(RESULTS.glob("*.json")):
        program = importlib.import_module(f"project.bench.{path.stem}")
        yield path.with_suffix(".md"), program.page(json.loads(path.read_text(encoding="utf-8")))


def rendered(text: str, results: Path = RESULTS) -> str:
    """A text with every block as its page says.

    Args:
        text: as it is.
        results: the folder of the pages.

    """

    def block(match: re.Match[str]) -> str:
        path = results / f"{match[1]}.md"
        command = "make bench-gpu" if match[1].endswith("_cuda") else "make bench"
        page = f"Not measured yet: `{command}` does it.\n"
        if path.is_file():
            page = condensed(path.read_text(encoding="utf-8"), [int(n) for n in match[2].split()])
        return f"<!-- results: {match[1]}{match[2]} -->\n{page}<!-- end of results -->"

    return BLOCK.sub(block, text)


def condensed(page: str, chosen: list[int] | None = None) -> str:
    """A page without its title, its long tables folded; of its paragraphs those chosen, from 1."""
    parts = [p for p in re.split(r"\n{2,}", page.strip()) if not p.startswith("# ")]
    kept = [fold(p) for n, p in enumerate(parts, 1) if not chosen or n in chosen]
    return "\n\n".join(kept) + "\n"


def fold(part: str) -> str:
    """A paragraph as it is; a long table behind a line to click on."""
    rows = part.splitlines()
    if not part.startswith("|") or len(rows) - 2 <= MOST_ROWS:
        return part
    return f"<details><summary>all {len(rows) - 2} rows</summary>\n\n{part}\n\n</details>"


def main() -> int:
    """Rewrite or check; returns the exit code."""
    parser = parser_of(__doc__)
    parser.add_argument("--check", action="store_true", help="change nothing")
    check = parser.parse_args().check
    stale = [write_or_check(path, text, check) for path, text in pages()]
    stale += [write_or_check(path, rendered(_read(path)), check) for path in TEXTS]
    names = ", ".join(filter(None, stale))
    if check and names:
        print(f"out of date: {names}; run python project/bench/results.py", file=sys.stderr)
        return 1
    print(f"rewritten: {names}" if names else "all tables are up to date")
    return 0


def write_or_check(path: Path, text: str, check: bool) -> str:
    """The name of a file that is not as it should be, else ""; it is rewritten unless `check`."""
    if path.is_file() and _read(path) == text:
        return ""
    if not check:
        path.write_text(text, encoding="utf-8")
    return path.relative_to(ROOT).as_posix()


def _read(path: Path) -> str:
    return path.read_text(encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
