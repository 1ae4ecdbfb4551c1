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
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

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
        path: tab-separated (`.tsv`) or comma-separated; labels are 0 and 1. A first line whose
            label is neither is taken as a header.

    Raises:
        ValueError: a line that does not fit, or too few lines.
        OSError: the file cannot be read.

    """
    delimiter = "\t" if Path(path).suffix == ".tsv" else ","
    examples: list[Example] = []
    with open(path, newline="", encoding="utf-8") as file:
        for number, row in enumerate(csv.reader(file, delimiter=delimiter), 1):
            cells = [cell.strip() for cell in row]
            labels = [cell for cell in cells if cell in ("0", "1")]
            if len(cells) == 2 and len(labels) == 1:
                label = labels[0]
                text = cells[1] if cells[0] == label else cells[0]
                examples.append((words_of(text), int(label)))
            elif number > 1:
                raise ValueError(
                    f"{path}, line {number}: want a label (0 or 1) and a text, got {row}"
                )
    if len({label for _, label in examples}) < 2:
        raise ValueError(f"{path} must hold texts of both labels, got {len(examples)} lines")
    return examples


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
