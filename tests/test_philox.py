"""Philox 4x32-10 against the known answers that its authors publish, and the dropout masks."""

from typing import Any

import numpy as np
import pytest

import minitorch
from minitorch.kernels.philox import (
    attention_dropout_mask,
    philox4x32,
    philox4x32_cpu,
    vector_dropout_mask,
)

ONES = 0xFFFFFFFF

KNOWN_ANSWERS = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((ONES,) * 4, (ONES,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (  # the digits of pi
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize("counter, key, words", KNOWN_ANSWERS)
def test_known_answers(counter: Any, key: Any, words: Any) -> None:
    arguments = [np.array([word], np.uint64) for word in (*counter, *key)]
    assert tuple(int(word[0]) for word in philox4x32(*arguments)) == words


@pytest.mark.parametrize("counter, key, words", KNOWN_ANSWERS)
def test_known_answers_compiled(counter: Any, key: Any, words: Any) -> None:
    assert philox4x32_cpu(*[np.uint64(word) for word in (*counter, *key)]) == words


def test_mask_is_a_function_of_position_alone() -> None:
    mask = attention_dropout_mask(6, 50, 77, 0.3, seed=5)
    assert mask.shape == (6, 50, 77)
    np.testing.assert_array_equal(
        attention_dropout_mask(3, 20, 10, 0.3, seed=5), mask[:3, :20, :10]
    )


def word_of(counter: Any, number: int, seed: int) -> int:
    arguments = [np.array([n], np.uint64) for n in (*counter, seed & ONES, seed >> 32)]
    return int(philox4x32(*arguments)[number][0])


def test_attentions_mask_follows_its_definition_word_by_word() -> None:
    seed, p = 0x123456789ABCDEF0, 0.4
    mask = attention_dropout_mask(2, 35, 37, p, seed)
    for h, i, j in np.ndindex(mask.shape):
        counter = (4 * (j // 16) + j % 8 // 2, 8 * (i // 16) + i % 8, h, 0)
        number = word_of(counter, 2 * (j // 8 % 2) + i // 8 % 2, seed)
        if j % 2 == 0:
            number = number >> 16 | (number & 0xFFFF) << 16
        assert mask[h, i, j] == (number >= round(p * 2**32))


def test_a_vectors_mask_follows_its_definition_word_by_word() -> None:
    seed, p = 0x123456789ABCDEF0, 0.4
    for i, kept in enumerate(vector_dropout_mask(21, p, seed)):
        assert kept == (word_of((i // 4, 0, 0, 0), i % 4, seed) >= round(p * 2**32))


@pytest.mark.parametrize("p", [0.0, 1e-4, 0.01, 0.17, 0.5, 0.9, 1.0])
def test_masks_drop_the_wanted_fraction(p: Any) -> None:
    seed = 2**63 + 11
    masks = attention_dropout_mask(4, 512, 500, p, seed), vector_dropout_mask(999_999, p, seed)
    for mask in masks:
        deviation = np.sqrt(p * (1 - p) / mask.size)
        assert abs((1 - mask.mean()) - p) <= 4 * deviation


@pytest.mark.parametrize("p", [0.01, 0.2, 0.5])
@pytest.mark.parametrize("down, right", [(0, 1), (1, 0), (0, 8), (8, 0), (8, 8), (8, 1), (8, 9)])
def test_neighbours_are_uncorrelated(p: float, down: int, right: int) -> None:
    """Also those that come from one call of the generator, or from one word of it."""
    mask = attention_dropout_mask(4, 512, 512, p, seed=7)
    standard = (mask - (1 - p)) / np.sqrt(p * (1 - p))  # mean 0, variance 1
    rows, columns = 512 - down, 512 - right
    products = standard[:, :rows, :columns] * standard[:, down:, right:]
    assert abs(products.mean()) <= 4.5 / np.sqrt(products.size)


def test_seeds_give_different_masks() -> None:
    one, other = (attention_dropout_mask(1, 64, 64, 0.5, seed) for seed in (1, 2**32 + 1))
    assert 0.4 < (one != other).mean() < 0.6


@pytest.mark.parametrize(
    ("arguments", "name"),
    [({"seed": s}, "seed") for s in (-1, 2**64, 1.5, "s")]
    + [({"dropout_p": p}, "dropout_p") for p in (-0.1, 1.5, float("nan"), "x", None)],
)
def test_bad_arguments(arguments: Any, name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} is"):
        minitorch.attention_dropout_mask((2, 3), **{"dropout_p": 0.5, "seed": 1} | arguments)
