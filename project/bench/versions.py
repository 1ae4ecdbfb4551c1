"""What a version of the code gives, name by name, beside what another one gave.

The library is that of the checkout that PYTHONPATH names, or else of this one:

    PYTHONPATH=../old python project/bench/same_bits.py --out before.json
    python project/bench/same_bits.py --against before.json
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from project.bench import pages

Found = dict[str, Any]


def add_options(parser: argparse.ArgumentParser) -> None:
    """Where results are written to, and with which they are compared."""
    parser.add_argument("--out", type=Path, help="write what is found to this file")
    parser.add_argument(
        "--against", type=Path, nargs="+", default=[], help="files of another version"
    )


class Comparison:
    """Collects what is found, and prints what is not as it was.

    Args:
        out: the file to write; None for none.
        against: files that another version wrote.

    Raises:
        SystemExit: one of these cannot be read.

    """

    def __init__(self, out: Path | None, against: list[Path]) -> None:
        import minitorch

        self.out, self.compares, self.different = out, bool(against), 0
        self.found, self.former = Found(), Found()
        for path in against:
            self.former |= pages.read(path, lambda found: str(found.keys()))
        print(minitorch.__path__[0], flush=True)

    def add(self, name: str, found: Found) -> None:
        """Keep what was found of a name; print it if another version gave something else."""
        self.found[name] = found
        if self.compares and self.former.get(name) != found:
            self.different += 1
            print(f"{name}\n  before {self.former.get(name)}\n  now    {found}", flush=True)

    def finish(self) -> int:
        """Write the file, print how much there was; the exit code, 1 if something differs."""
        if self.out is not None:
            pages.write(self.found, self.out, None)
        compared = f", {self.different} differ" if self.compares else ""
        print(f"{len(self.found)} in all{compared}")
        return int(self.different > 0)
