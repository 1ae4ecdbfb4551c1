"""How results are kept: a JSON file with what was measured, and a page in Markdown made of it."""

from __future__ import annotations

import argparse
import json
import math
import shlex
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from project.bench.machine import about

Result = dict[str, Any]
Page = Callable[[Result], str]
RESULTS = Path(__file__).resolve().parents[1] / "results"
TELL_NOTHING = ("--out", "--prefix")  # options that say nothing of what was measured


# ----- the parts of a page -----


def page(title: str, *paragraphs: str | None) -> str:
    """A page of these paragraphs, those left out that are None or empty."""
    return "\n\n".join([f"# {title}", *filter(None, paragraphs)]) + "\n"


def table(titles: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A table in Markdown; of truth values it says "yes" or "no"."""
    head = [f"| {' | '.join(titles)} |", "|" + "---|" * len(titles)]
    words = {"True": "yes", "False": "no"}
    cells = ([words.get(text, text) for text in map(str, row)] for row in rows)
    return "\n".join([*head, *(f"| {' | '.join(row)} |" for row in cells)])


def number(x: float | None, form: str = "{:.2f}") -> str:
    """A figure, or a dash."""
    return "-" if x is None or math.isnan(x) else form.format(x)


def source(result: Mapping[str, Any], *more: str) -> str:
    """Where figures come from: machine, versions, date, what else there is to tell, command."""
    return ". ".join([about(result["machine"]), *more, f"Command: `{result['command']}`."])


def geometric_mean(ratios: Sequence[float]) -> float:
    """NaN of none."""
    return math.exp(sum(map(math.log, ratios)) / len(ratios)) if ratios else math.nan


# ----- the command line, and the files -----


def add_out(parser: argparse.ArgumentParser, kept: str = "") -> None:
    """The option `--out`, and `--add` if there is something that it keeps."""
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder; default: %(default)s")
    if kept:
        parser.add_argument("--add", action="store_true", help=f"keep {kept}")


def command(program: str, words: Sequence[str] | None = None) -> str:
    """The command line as a page tells it, from the repository's root.

    Args:
        program: the file that was started.
        words: its arguments; those of this process if None.

    """
    kept, remaining = [], iter(sys.argv[1:] if words is None else words)
    for word in remaining:
        if word in TELL_NOTHING:
            next(remaining, None)
        elif not word.startswith(tuple(f"{name}=" for name in TELL_NOTHING)):
            kept.append(word)
    return shlex.join(["python", f"project/bench/{Path(program).name}", *kept])


def read(path: Path, page: Page) -> Result:
    """What an earlier run of a benchmark has written, to which this one adds.

    Args:
        path: its JSON file.
        page: makes a page of such results.

    Raises:
        SystemExit: it cannot be read, or another program wrote it.

    """
    try:
        found: Result = json.loads(path.read_text(encoding="utf-8"))
        page(found)
    except OSError as error:
        raise SystemExit(f"cannot read {path}: {error.strerror}") from None
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        raise SystemExit(f"{path} has another format: measure anew") from None
    return found


def former(arguments: argparse.Namespace, path: Path, page: Page) -> Result:
    """What `--add` keeps: what `read` finds; nothing without it, or where there is no file yet."""
    return read(path, page) if arguments.add and path.exists() else {}


def write(result: Result, path: Path, page: Page | None) -> None:
    """Write the results so far, so that nothing is lost if a later part fails.

    Args:
        result: what was measured.
        path: the JSON file; its folder is made. The page gets its name, with the ending `.md`.
        page: makes the page; None if there is to be none yet.

    """
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    if page is not None:
        path.with_suffix(".md").write_text(page(result), encoding="utf-8")
        print(f"Written: {path} and .md", flush=True)
