"""The text, its two parts, and batches drawn from it as a pure function of seed and step."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np

from project import text_files

from . import tokenizer as tokenizers
from .errors import UserError
from .options import DataOptions
from .tokenizer import Ids, Tokenizer


@dataclass(frozen=True)
class Corpus:
    """A text cut in two, as characters and as tokens."""

    train_text: str
    valid_text: str
    tokenizer: Tokenizer
    train_ids: Ids
    valid_ids: Ids

    @property
    def fingerprint(self) -> str:
        """Of `fingerprint_of`."""
        return fingerprint_of(self.train_text, self.valid_text)

    @property
    def valid_characters_per_token(self) -> float:
        """For losses by character, which do not depend on the tokenizer; 1 for characters."""
        return len(self.valid_text) / len(self.valid_ids)


def fingerprint_of(train_text: str, valid_text: str) -> str:
    """A hash of the text and where it is cut: a resumed run must have the same."""
    text = f"{len(train_text)}\n{train_text}{valid_text}"
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def check_fingerprint(found: str, expected: str) -> None:
    """Raise `UserError` unless a run goes on with the text it was started with."""
    if found != expected:
        raise UserError(
            "the text is not the one this run was started with (the text inside Python differs "
            "by version): name the same text and Python, or start anew without --resume"
        )


def python_text() -> str:
    """The 460 to 510 kB of English inside Python itself: what `help()` says on its topics.

    It differs from one version of Python to the next.
    """
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name] for name in sorted(topics))


def read_text(path: str) -> str:
    """A user's text, or Python's own for the path "".

    Raises:
        UserError: no such file, not UTF-8 text, or empty.

    """
    if not path:
        return python_text()
    try:
        text = text_files.read_text(path)
    except OSError as error:
        raise UserError(f"cannot read the text {path}: {error.strerror}") from error
    except ValueError as error:
        raise UserError(str(error)) from error
    if not text.strip():
        raise UserError(f"{path} is empty")
    return text


def load(
    options: DataOptions,
    context: int,
    tokenizer: Tokenizer | None = None,
    fingerprint: str | None = None,
) -> Corpus:
    """Read a text, cut off its end for validation, and turn both into tokens.

    Args:
        options: where the text is, and how it becomes tokens.
        context: both parts must be longer than this.
        tokenizer: one to use in place of a new one (that of a checkpoint).
        fingerprint: that the text must have (that of a checkpoint).

    Raises:
        UserError: the text cannot be read, is another one, or is too short.

    """
    text = read_text(options.data)
    cut = round(len(text) * (1 - options.held_out))
    train_text, valid_text = text[:cut], text[cut:]
    if fingerprint is not None:
        check_fingerprint(fingerprint_of(train_text, valid_text), fingerprint)
    if tokenizer is None:
        # A character that the last part alone has needs a token; to BPE all text is bytes.
        known = text if options.tokenizer == "char" else train_text
        tokenizer = tokenizers.build(options.tokenizer, known, options.vocab)
    train_ids, valid_ids = tokenizer.encode(train_text), tokenizer.encode(valid_text)
    for ids, part in ((train_ids, "training"), (valid_ids, "validation")):
        if len(ids) <= context:
            raise UserError(
                f"the text is too short: its {part} part has {len(ids)} tokens, "
                f"a context of {context} needs {context + 1}; give more text or a smaller --context"
            )
    return Corpus(train_text, valid_text, tokenizer, train_ids, valid_ids)


def windows(ids: Ids, context: int, size: int, seed: int, step: int) -> Ids:
    """Random windows of a text, the same ones whenever seed and step are the same.

    Args:
        ids: the tokens of the text.
        context: length of a window.
        size: number of windows.
        seed: of the run.
        step: number of the step.

    Returns:
        (size, context + 1): the inputs and, one place further, the targets.

    """
    generator = np.random.Generator(np.random.Philox(key=[seed, step]))
    starts = generator.integers(0, len(ids) - context, size)
    chosen: Ids = ids[starts[:, None] + np.arange(context + 1)]
    return chosen


def batch(ids: Ids, context: int, size: int, seed: int, step: int) -> tuple[Ids, Ids]:
    """`windows` as inputs and targets (size, context); a target is the token after its input."""
    chosen = windows(ids, context, size, seed, step)
    return chosen[:, :-1], chosen[:, 1:]


def validation_windows(ids: Ids, context: int, most: int = 512) -> tuple[Ids, Ids]:
    """Neighbouring windows that cover a text once; evenly spread ones of them if there are many.

    Args:
        ids: the tokens of the text.
        context: length of a window.
        most: how many windows at most.

    Returns:
        Inputs and targets (windows, context).

    """
    count = (len(ids) - 1) // context
    chosen = np.unique(np.linspace(0, count - 1, min(count, most)).round().astype(np.int64))
    covering = ids[chosen[:, None] * context + np.arange(context + 1)]
    return covering[:, :-1], covering[:, 1:]
