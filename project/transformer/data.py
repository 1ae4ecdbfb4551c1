"""The text, its two parts, and batches drawn from it as a pure function of seed and step."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

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
        """A hash of the text and where it is cut: a resumed run must have the same."""
        text = f"{len(self.train_text)}\n{self.train_text}{self.valid_text}"
        return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()

    @property
    def valid_characters_per_token(self) -> float:
        """For losses by character, which do not depend on the tokenizer; 1 for characters."""
        return len(self.valid_text) / len(self.valid_ids)


def python_text() -> str:
    """The 460 to 510 kB of English inside Python itself: what `help()` says on its topics.

    It differs from one version of Python to the next.
    """
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name] for name in sorted(topics))


def read_text(path: str) -> str:
    """A user's text, or Python's own for the path "".

    Raises:
        UserError: no such file, not UTF-8, or empty.

    """
    if not path:
        return python_text()
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot read the text {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text (byte {error.start})") from error
    if not text.strip():
        raise UserError(f"{path} is empty")
    return text


def load(options: DataOptions, context: int, tokenizer: Tokenizer | None = None) -> Corpus:
    """Read a text, cut off its end for validation, and turn both into tokens.

    Args:
        options: where the text is, and how it becomes tokens.
        context: both parts must be longer than this.
        tokenizer: one to use in place of a new one (that of a checkpoint).

    Raises:
        UserError: the text cannot be read, or is too short.

    """
    text = read_text(options.data)
    cut = round(len(text) * (1 - options.held_out))
    train_text, valid_text = text[:cut], text[cut:]
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
