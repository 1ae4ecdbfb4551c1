"""Text to token numbers and back: one token a character, or pieces found by byte-pair encoding."""

from __future__ import annotations

import json
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from .errors import UserError

Ids = npt.NDArray[np.int64]
# Bytes of a piece of text at most, before pairs are merged: finding the pairs of a piece takes time
# that grows with the square of its length, and a text without spaces would be one piece.
LONGEST_PIECE = 128


class Tokenizer(Protocol):
    """What the rest of the program asks of a tokenizer."""

    @property
    def size(self) -> int:
        """Number of tokens."""

    def encode(self, text: str) -> Ids:
        """The tokens of a text; raises `UserError` for a character that has none."""

    def decode(self, ids: Ids) -> str:
        """The text of some tokens."""

    def to_json(self) -> str:
        """A text from which `from_json` makes this tokenizer again."""


class CharTokenizer:
    """One token a character, numbered in the order of Unicode.

    Args:
        characters: all there are.

    """

    def __init__(self, characters: str) -> None:
        self.characters = "".join(sorted(set(characters)))
        self._numbers = {character: number for number, character in enumerate(self.characters)}

    @property
    def size(self) -> int:
        """Number of tokens."""
        return len(self.characters)

    def encode(self, text: str) -> Ids:
        """The tokens of a text; raises `UserError` for a character that has none."""
        unknown = sorted(set(text) - self._numbers.keys())
        if unknown:
            raise UserError(
                f"the model's text had no {', '.join(map(repr, unknown[:5]))}: "
                "leave such characters out"
            )
        return np.fromiter((self._numbers[c] for c in text), np.int64, len(text))

    def decode(self, ids: Ids) -> str:
        """The text of some tokens."""
        return "".join(self.characters[number] for number in ids)

    def to_json(self) -> str:
        """The characters."""
        return json.dumps({"kind": "char", "characters": self.characters})


class BpeTokenizer:
    """Byte-pair encoding of UTF-8 bytes (Sennrich et al. 2016), by Hugging Face's `tokenizers`.

    Every text has tokens, since every byte is one.

    Args:
        model: a `tokenizers.Tokenizer`.

    """

    def __init__(self, model: Any) -> None:
        self._model = model

    @classmethod
    def trained_on(cls, text: str, size: int) -> BpeTokenizer:
        """Find the pieces of a text; `size` counts the 256 bytes in."""
        library = _tokenizers()
        splits = library.pre_tokenizers
        model = library.Tokenizer(library.models.BPE())
        model.pre_tokenizer = splits.Sequence(
            [
                splits.ByteLevel(add_prefix_space=False),
                splits.Split(library.Regex(f".{{1,{LONGEST_PIECE}}}"), "isolated"),
            ]
        )
        model.decoder = library.decoders.ByteLevel()
        trainer = library.trainers.BpeTrainer(
            # The library makes room for as many at once; a text has no more pairs than bytes.
            vocab_size=min(size, 256 + len(text.encode())),
            initial_alphabet=splits.ByteLevel.alphabet(),
            show_progress=False,
        )
        model.train_from_iterator(text.splitlines(keepends=True), trainer)
        return cls(model)

    @property
    def size(self) -> int:
        """Number of tokens."""
        return int(self._model.get_vocab_size())

    def encode(self, text: str) -> Ids:
        """The tokens of a text; raises `UserError` for half a surrogate pair, which has none."""
        try:
            text.encode()
        except UnicodeEncodeError as error:
            half = text[error.start]
            raise UserError(f"{half!a} is no character: leave it out") from error
        return np.array(self._model.encode(text).ids, dtype=np.int64)

    def decode(self, ids: Ids) -> str:
        """The text of some tokens; bytes that are no UTF-8 become U+FFFD."""
        return str(self._model.decode([int(number) for number in ids]))

    def to_json(self) -> str:
        """The library's own description."""
        return json.dumps({"kind": "bpe", "model": self._model.to_str()})


def build(kind: str, text: str, size: int) -> Tokenizer:
    """A tokenizer for a text.

    Args:
        kind: "char" or "bpe".
        text: what it must know.
        size: tokens of "bpe".

    """
    return CharTokenizer(text) if kind == "char" else BpeTokenizer.trained_on(text, size)


def from_json(description: str) -> Tokenizer:
    """The tokenizer that `to_json` described.

    Raises:
        ValueError: it is no such description.

    """
    parts = json.loads(description)
    if not isinstance(parts, dict) or parts.get("kind") not in ("char", "bpe"):
        raise ValueError(f"no tokenizer is described by {description:.40}")
    content = parts.get("characters" if parts["kind"] == "char" else "model")
    if not isinstance(content, str):
        raise ValueError(f"no tokenizer is described by {description:.40}")
    if parts["kind"] == "char":
        return CharTokenizer(content)
    try:
        return BpeTokenizer(_tokenizers().Tokenizer.from_str(content))
    except UserError:
        raise
    except Exception as error:  # the library raises no narrower one
        raise ValueError(f"the tokenizer is damaged: {error}") from error


def beginning(tokenizer: Tokenizer) -> Ids:
    """What a text without a prompt begins with: a line break; the first token if it has none."""
    try:
        return tokenizer.encode("\n")
    except UserError:
        return np.zeros(1, np.int64)


def _tokenizers() -> Any:
    try:
        import tokenizers
        from tokenizers import decoders, models, pre_tokenizers, trainers  # noqa: F401
    except ImportError as error:
        raise UserError(
            "--tokenizer bpe needs the package tokenizers: pip install -e '.[train]'"
        ) from error
    return tokenizers
