"""What a version of the code gives, name by name, beside what another one gave.

The library is that of the checkout that PYTHONPATH names, or else of this one:

    PYTHONPATH=../old python project/bench/same_bits.py --out before.json
    python project/bench/same_bits.py --against before.json
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

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

        self.out, self.found, self.different = out, Found(), 0
        self.former: Found | None = Found() if against else None
        for path in against:
            try:
                self.former |= json.loads(path.read_text(encoding="utf-8"))
            except (OSError, ValueError, TypeError) as error:
                raise SystemExit(f"cannot read {path}: {error}") from None
        print(f"{minitorch.__path__[0]}", flush=True)

    def add(self, name: str, found: Found) -> None:
        """Keep what was found of a name; print it if another version gave something else."""
        self.found[name] = found
        if self.former is not None and self.former.get(name) != found:
            self.different += 1
            print(f"{name}\n  before {self.former.get(name)}\n  now    {found}", flush=True)

    def finish(self) -> int:
        """Write the file, print how much there was; the exit code, 1 if something differs."""
        if self.out is not None:
            self.out.write_text(json.dumps(self.found, indent=1) + "\n", encoding="utf-8")
        compared = "" if self.former is None else f", {self.different} differ"
        print(f"{len(self.found)} in all{compared}")
        return int(self.different > 0)
