"""Labelled sentences for the text classifier: from a file, or from documentation that is installed.

The built-in task needs no download: does a sentence come from Python's language reference
(`pydoc_data.topics`, label 0) or from numpy's documentation (docstrings, label 1)?
"""

from __future__ import annotations

import csv
import inspect
import random
import re
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from project.text_files import read_text

Example = tuple[list[str], int]  # words, label
PADDING, UNKNOWN = 0, 1

_RULES = re.compile(r"[*=~^_`\-]{2,}")
_SECTION = re.compile(r"(?m)^\S+ : .*$|^(Parameters|Returns|Notes|Raises|Yields)$")
_WITHOUT_PROSE = re.compile(r"\n(Examples|References|See Also)\n-+")


def words_of(text: str) -> list[str]:
    """The words of a text in lower case, without punctuation."""
    return re.findall(r"[a-z']+", text.lower())


def installed_documentation() -> list[Example]:
    """Sentences of Python's reference (label 0), and as many of numpy's docstrings (label 1).

    What they are differs by the versions of Python and numpy.
    """
    from pydoc_data.topics import topics

    modules = (np, np.linalg, np.fft, np.random, np.ma, np.polynomial, np.char)
    docstrings = set()
    for module in modules:
        for name in dir(module):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # names that numpy is about to remove
                docstrings.add(getattr(getattr(module, name, None), "__doc__", None))
    python = _sentences(topics.values())
    numpy = _sentences(_prose(text) for text in docstrings if isinstance(text, str))
    size = min(len(python), len(numpy))
    rng = random.Random(0)
    return [
        (words.split(), label)
        for label, sentences in enumerate((python, numpy))
        for words in rng.sample(sentences, size)
    ]


def _prose(docstring: str) -> str:
    """A docstring without its examples, references and tables of arguments."""
    return _SECTION.sub(" ", _WITHOUT_PROSE.split(inspect.cleandoc(docstring))[0])


def _sentences(texts: Any) -> list[str]:
    """Each different sentence of 6 to 40 words once, as words joined by spaces, sorted."""
    found = set()
    for text in texts:
        plain = " ".join(_RULES.sub(" ", text).split())
        for sentence in re.split(r"(?<=[.!?])\s+", plain):
            words = words_of(sentence)
            if 6 <= len(words) <= 40:
                found.add(" ".join(words))
    return sorted(found)


def read_examples(path: str | Path) -> list[Example]:
    """Labelled texts from a file with two columns, label and text in either order.

    Args:
        path: UTF-8, tab-separated (`.tsv`) or comma-separated; labels are 0 and 1. A first line
            whose label is neither is taken as a header; blank lines are passed over. A text may be
            in quotes and then go on over several lines; a quote that nothing closes is a character
            like others.

    Raises:
        ValueError: a line that does not fit, too few lines, or a file that is not UTF-8.
        OSError: the file cannot be read.

    """
    delimiter = "\t" if Path(path).suffix == ".tsv" else ","
    examples: list[Example] = []
    first = True
    for number, row in _rows(read_text(path).split("\n"), delimiter):
        example = _example(row)
        if example is not None:
            examples.append(example)
        elif not first:
            raise ValueError(f"{path}, line {number}: want a label (0 or 1) and a text, got {row}")
        first = False
    if len({label for _, label in examples}) < 2:
        raise ValueError(f"{path} must hold texts of both labels, got {len(examples)} lines")
    return examples


def _rows(lines: list[str], delimiter: str) -> Iterator[tuple[int, list[str]]]:
    """The rows of a file, each with the number of its first line."""
    start = 0
    while start < len(lines):
        end = start + 1
        if lines[start].strip():
            end = _end_of_row(lines, start, delimiter)
            text = "\n".join(lines[start:end])
            yield start + 1, _cells(text, delimiter) or _literal(text, delimiter)
        start = end


def _end_of_row(lines: list[str], start: int, delimiter: str) -> int:
    """The line after a row: the next one, or that after the line in which a quoted text ends.

    Until that line none may be a row of its own: else the quote is a lone one.
    """
    if _cells(lines[start], delimiter) is not None:
        return start + 1
    for last in range(start + 1, len(lines)):
        whole = "\n".join(lines[start : last + 1])
        if lines[last].count('"') % 2 and _example(_cells(whole, delimiter) or []):
            return last + 1
        if _example(_cells(lines[last], delimiter) or _literal(lines[last], delimiter)):
            break
    return start + 1


def _cells(text: str, delimiter: str) -> list[str] | None:
    """The cells of a row, without spaces around them; None if its quotes do not fit together."""
    reader = csv.reader([text], delimiter=delimiter, strict=True)
    try:
        rows = list(reader)
    except csv.Error:
        return None
    return [cell.strip() for row in rows for cell in row]


def _literal(text: str, delimiter: str) -> list[str]:
    """The cells of a row whose quotes are characters like others: a label, and all the rest."""
    first, _, rest = text.partition(delimiter)
    before, _, last = text.rpartition(delimiter)
    cells = [before, last] if _label(first) is None else [first, rest]
    return [cell.strip() for cell in cells]


def _example(row: list[str]) -> Example | None:
    """The words and the label of a row; None if it is no label with a text."""
    labels = [_label(cell) for cell in row]
    if len(row) != 2 or labels.count(None) != 1:
        return None
    place = 0 if labels[1] is None else 1
    label = labels[place]
    assert label is not None
    return words_of(row[1 - place]), label


def _label(cell: str) -> int | None:
    return {"0": 0, "1": 1}.get(cell.strip().strip('"'))


def split(examples: list[Example], share: float, seed: int) -> tuple[list[Example], list[Example]]:
    """Examples to learn and a share of them, at least one, held out; shuffled."""
    shuffled = list(examples)
    random.Random(seed).shuffle(shuffled)
    held_out = max(1, round(share * len(shuffled)))
    return shuffled[held_out:], shuffled[:held_out]


def vocabulary(examples: list[Example], size: int) -> dict[str, int]:
    """A number for each of the commonest words; 0 and 1 stand for padding and unknown words."""
    counts = Counter(word for words, _ in examples for word in words)
    return {word: number for number, (word, _) in enumerate(counts.most_common(size), 2)}


def encode(
    examples: list[Example], words: dict[str, int], length: int
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    """Word numbers (N, length), padded with 0 or cut, and labels (N,)."""
    ids = np.full((len(examples), length), PADDING, np.float32)
    for row, (sentence, _) in zip(ids, examples, strict=True):
        numbers = [words.get(word, UNKNOWN) for word in sentence[:length]]
        row[: len(numbers)] = numbers
    return ids, np.array([label for _, label in examples], np.float32)
