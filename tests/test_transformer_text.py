"""The toy transformer's text: tokenizers, batches, and the yardstick that training is held to."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from project.transformer import data, sampling
from project.transformer.ngram import ngram_losses
from project.transformer.options import DataOptions
from project.transformer.tokenizer import BpeTokenizer, CharTokenizer, from_json

SENTENCE = "the quick brown fox jumps over the lazy dog, again and again. "


# ----- text, tokens, batches -----


def test_python_text_is_english() -> None:
    text = data.python_text()
    assert len(text) > 400_000
    assert text.count(" the ") > 2000


@given(st.text(max_size=60))
def test_characters_come_back(text: str) -> None:
    tokenizer = CharTokenizer(text)
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.size == len(set(text))
    assert from_json(tokenizer.to_json()).decode(tokenizer.encode(text)) == text


def test_pieces_come_back_for_any_text() -> None:
    pytest.importorskip("tokenizers")
    tokenizer = BpeTokenizer.trained_on(SENTENCE * 5, 280)
    for text in (SENTENCE, "naïve 你好 🙂\n\ttabs", ""):
        assert tokenizer.decode(tokenizer.encode(text)) == text
        assert from_json(tokenizer.to_json()).decode(tokenizer.encode(text)) == text
    assert len(tokenizer.encode(SENTENCE)) < len(SENTENCE)


def test_pieces_are_printed_when_their_characters_are_whole() -> None:
    pytest.importorskip("tokenizers")
    tokenizer = BpeTokenizer.trained_on("abc", 256)
    ids = tokenizer.encode("né 🙂!")
    assert len(ids) == 9  # bytes
    pieces = list(sampling.stream_text(tokenizer, iter(ids.tolist()), len(ids)))
    assert pieces == ["n", "é", " ", "🙂", "!"]


@given(st.integers(0, 2**31), st.integers(0, 10**6))
def test_batches_are_a_function_of_seed_and_step(seed: int, step: int) -> None:
    ids = np.arange(50)
    inputs, targets = data.batch(ids, 7, 3, seed, step)
    again = data.batch(ids, 7, 3, seed, step)
    np.testing.assert_array_equal(inputs, again[0])
    np.testing.assert_array_equal(targets, inputs + 1)
    assert inputs.shape == (3, 7)


def test_batches_differ_and_reach_both_ends() -> None:
    ids = np.arange(10)
    starts = {int(data.batch(ids, 7, 1, 0, step)[0][0, 0]) for step in range(100)}
    assert starts == {0, 1, 2}  # 2 + 7 is the last target


@given(st.integers(2, 60), st.integers(1, 10), st.integers(1, 5))
def test_validation_windows_lie_side_by_side(length: int, context: int, most: int) -> None:
    context = min(context, length - 1)
    inputs, targets = data.validation_windows(np.arange(length), context, most)
    assert inputs.shape == targets.shape == (min(most, (length - 1) // context), context)
    np.testing.assert_array_equal(targets, inputs + 1)
    assert (inputs[:, 0] % context == 0).all()
    assert len(set(inputs[:, 0].tolist())) == len(inputs)


def test_the_vocabulary_covers_the_held_out_text(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text(SENTENCE * 20 + "ZÉ", encoding="utf-8")
    corpus = data.load(DataOptions(data=str(path)), 8)
    assert corpus.tokenizer.decode(corpus.valid_ids).endswith("ZÉ")
    assert len(corpus.valid_text) == pytest.approx(0.1 * 20 * len(SENTENCE), abs=2)


# ----- the yardstick -----


@pytest.mark.parametrize("order", [1, 2, 3])
def test_ngrams_against_plain_counting(order: int) -> None:
    train, valid, a = "abracadabra abracadabra", "cadabra bar", 0.1
    vocabulary = len(set(train + valid))
    grams = Counter(train[i : i + order] for i in range(len(train) - order + 1))
    contexts: Counter[str] = Counter()
    for gram, count in grams.items():
        contexts[gram[:-1]] += count
    losses = []
    for i in range(order - 1, len(valid)):
        gram = valid[i - order + 1 : i + 1]
        p = (grams[gram] + a) / (contexts[gram[:-1]] + a * vocabulary)
        losses.append(-np.log(p))
    assert ngram_losses(train, valid)[order - 1] == pytest.approx(np.mean(losses))
