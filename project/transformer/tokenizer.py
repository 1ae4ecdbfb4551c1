"""Text to token numbers and back: one token a character, or pieces found by byte-pair encoding."""

from __future__ import annotations

import json
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from .errors import UserError

Ids = npt.NDArray[np.int64]


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
        model = library.Tokenizer(library.models.BPE())
        model.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=False)
        model.decoder = library.decoders.ByteLevel()
        trainer = library.trainers.BpeTrainer(
            vocab_size=size,
            initial_alphabet=library.pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        model.train_from_iterator(text.splitlines(keepends=True), trainer)
        return cls(model)

    @property
    def size(self) -> int:
        """Number of tokens."""
        return int(self._model.get_vocab_size())

    def encode(self, text: str) -> Ids:
        """The tokens of a text."""
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
    """The tokenizer that `to_json` described."""
    parts = json.loads(description)
    if parts["kind"] == "char":
        return CharTokenizer(parts["characters"])
    return BpeTokenizer(_tokenizers().Tokenizer.from_str(parts["model"]))


def _tokenizers() -> Any:
    try:
        import tokenizers
        from tokenizers import decoders, models, pre_tokenizers, trainers  # noqa: F401
    except ImportError as error:
        raise UserError(
            "--tokenizer bpe needs the package tokenizers: pip install -e '.[train]'"
        ) from error
    return tokenizers
