"""Put the pages in `project/results` that the benchmarks wrote into texts, between markers.

    python project/readme_tables.py            # rewrite README.md and project/results/README.md
    python project/readme_tables.py --check    # exit with 1 if one is out of date

A block begins with `<!-- results: NAME -->`, stands for `project/results/NAME.md`, and ends with
`<!-- end of results -->`. Titles are left out and long tables folded. Numbers after the name,
`<!-- results: NAME 1 3 -->`, choose among the page's paragraphs, a table being one.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "project" / "results"
TEXTS = (ROOT / "README.md", RESULTS / "README.md")
BLOCK = re.compile(r"<!-- results: (\w+)((?: \d+)*) -->\n.*?<!-- end of results -->", re.DOTALL)
# Longer tables are folded.
MOST_ROWS = 18


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
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="change nothing")
    check = parser.parse_args().check
    stale = [path for path in TEXTS if rendered(_read(path)) != _read(path)]
    names = " and ".join(path.relative_to(ROOT).as_posix() for path in stale)
    if not stale:
        print("all tables are up to date")
        return 0
    if check:
        print(f"out of date: {names}; run python project/readme_tables.py", file=sys.stderr)
        return 1
    for path in stale:
        path.write_text(rendered(_read(path)), encoding="utf-8")
    print(f"rewritten: {names}")
    return 0


def _read(path: Path) -> str:
    return path.read_text(encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
