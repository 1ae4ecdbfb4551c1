"""Put the pages in `project/results` that the benchmarks wrote into the README, between markers.

    python project/readme_tables.py            # rewrite README.md
    python project/readme_tables.py --check    # exit with 1 if it is out of date

A block begins with `<!-- results: NAME -->`, stands for `project/results/NAME.md`, and ends with
`<!-- end of results -->`. Titles are left out and long tables folded.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
RESULTS = ROOT / "project" / "results"
BLOCK = re.compile(r"<!-- results: (\w+) -->\n.*?<!-- end of results -->", re.DOTALL)
# Longer tables are folded.
MOST_ROWS = 18


def rendered(readme: str, results: Path = RESULTS) -> str:
    """The README with every block as its page says.

    Args:
        readme: the present text.
        results: the folder of the pages.

    """

    def block(match: re.Match[str]) -> str:
        path = results / f"{match[1]}.md"
        command = "make bench-gpu" if match[1].endswith("_cuda") else "make bench"
        page = f"Not measured yet: `{command}` does it.\n"
        if path.is_file():
            page = condensed(path.read_text(encoding="utf-8"))
        return f"<!-- results: {match[1]} -->\n{page}<!-- end of results -->"

    return BLOCK.sub(block, readme)


def condensed(page: str) -> str:
    """A page without its title, its long tables folded."""
    parts = re.split(r"\n{2,}", page.strip())
    kept = [fold(part) for part in parts if not part.startswith("# ")]
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
    old = README.read_text(encoding="utf-8")
    new = rendered(old)
    if old == new:
        print("README.md is up to date")
        return 0
    if check:
        print("README.md is out of date: run python project/readme_tables.py", file=sys.stderr)
        return 1
    README.write_text(new, encoding="utf-8")
    print("README.md rewritten")
    return 0


if __name__ == "__main__":
    sys.exit(main())
