"""How much code there is: lines for each folder, and the longest functions and files.

    python project/code_budget.py

A line counts if it holds code: not if it is blank, a comment, part of a docstring or of an import.
`tests/test_layers.py` holds the limits; this program prints where the code stands.
"""

from __future__ import annotations

import argparse
import ast
import sys
import tokenize
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("kernels", "minitorch", "project", "tests")
LONGEST = 12  # functions that are listed
NO_CODE = {
    tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT,
    tokenize.ENCODING, tokenize.ENDMARKER,
}  # fmt: skip


class Function(NamedTuple):
    """A function of a file, and how many of its lines hold code, inner functions included."""

    lines: int
    name: str
    path: Path


def source_files(folder: Path) -> list[Path]:
    """Python files below a folder, those behind a link left out."""
    return sorted(p for p in folder.rglob("*.py") if p.resolve() == p.absolute())


def code_lines(path: Path) -> set[int]:
    """Numbers of the lines that hold code."""
    with tokenize.open(path) as file:
        lines = {
            line
            for token in tokenize.generate_tokens(file.readline)
            if token.type not in NO_CODE
            for line in range(token.start[0], token.end[0] + 1)
        }
    for node in without_code(ast.parse(path.read_text(encoding="utf-8"))):
        lines -= set(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    return lines


def without_code(tree: ast.Module) -> Iterator[ast.stmt]:
    """Imports and docstrings."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield node
        elif isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            if ast.get_docstring(node, clean=False) is not None:
                yield node.body[0]


def functions(path: Path, lines: set[int]) -> Iterator[Function]:
    """Every function of a file that is not inside another one."""
    pending: list[ast.AST] = [ast.parse(path.read_text(encoding="utf-8"))]
    while pending:
        for node in ast.iter_child_nodes(pending.pop()):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                own = sum(n in lines for n in range(node.lineno, (node.end_lineno or 0) + 1))
                yield Function(own, node.name, path)
            else:
                pending.append(node)


def main() -> int:
    """Print the tables."""
    argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args()
    folders: Counter[str] = Counter()
    files: Counter[str] = Counter()
    found: list[Function] = []
    longest_file = (0, "")
    for folder in FOLDERS:
        for path in source_files(ROOT / folder):
            lines = code_lines(path)
            where = path.parent.relative_to(ROOT).as_posix()
            folders[where] += len(lines)
            files[where] += 1
            found += functions(path, lines)
            length = len(path.read_text(encoding="utf-8").splitlines())
            longest_file = max(longest_file, (length, path.relative_to(ROOT).as_posix()))
    print(f"{'code lines':>10}  {'files':>5}  folder")
    for where, count in sorted(folders.items()):
        print(f"{count:10,}  {files[where]:5}  {where}/")
    library = sum(n for where, n in folders.items() if where.split("/")[0] != "tests")
    print(f"{library:10,}         kernels, minitorch and project together")
    print(f"\nThe longest file: {longest_file[1]}, {longest_file[0]} lines. Functions:")
    for function in sorted(found, reverse=True)[:LONGEST]:
        place = function.path.relative_to(ROOT).as_posix()
        print(f"{function.lines:10,}  {function.name}  {place}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
