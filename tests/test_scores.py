"""Which scores count: the rule of scores.py, on numpy's arrays and on the CPU, against loops."""

from __future__ import annotations

import math
from itertools import product

import numpy as np
import numpy.typing as npt
import pytest

from minitorch.kernels.flash_attention.cpu import tiles as cpu
from minitorch.kernels.flash_attention.scores import (
    Masked,
    Tools,
    Where,
    counts,
    is_additive,
    keys_of,
    mask_numbers,
    masked_score,
    queries_of,
)

BANDS = [(-3, 1), (0, 4), (2, 9), (-20, 20), (4, 2), (-1, -1)]  # lower, upper
SEQLEN_Q, SEQLEN_K = 7, 10
NUMPY = Tools(np.where, np.add)
WHERE = Where(0, 0, 0, 0)


def allowed(query: int, key: int, lower: int, upper: int) -> bool:
    """The definition, with both ends of the keys."""
    return lower <= key - query < upper and 0 <= key < SEQLEN_K


def dense(lower: int, upper: int) -> npt.NDArray[np.bool_]:
    return np.array(
        [[allowed(i, j, lower, upper) for j in range(SEQLEN_K)] for i in range(SEQLEN_Q)]
    )


@pytest.mark.parametrize(("lower", "upper"), BANDS)
def test_the_band_from_both_sides(lower: int, upper: int) -> None:
    query, key = np.arange(SEQLEN_Q)[:, None], np.arange(SEQLEN_K)
    of_keys = counts(True, key, *keys_of(query, lower, upper))
    of_queries = counts(True, query, *queries_of(key, lower, upper))
    np.testing.assert_array_equal(of_keys, dense(lower, upper))
    np.testing.assert_array_equal(of_queries, dense(lower, upper))


def test_what_the_softmax_gets() -> None:
    scores, numbers = np.array([1.0, 2.0, 3.0]), np.array([0.0, 5.0, -math.inf])
    sees = np.array([True, True, False])
    expected = {
        "none": [1.0, 2.0, -math.inf],
        "bool": [-math.inf, 2.0, -math.inf],
        "float32": [1.0, 7.0, -math.inf],
    }
    for mask, right in expected.items():
        found = masked_score(mask, NUMPY)(scores, sees, numbers, WHERE)
        np.testing.assert_array_equal(found, right)


def test_kinds_of_masks() -> None:
    class Kind(Masked):
        def __init__(self, mask: str) -> None:
            self.mask = mask

    units = {"none": 1 / math.log(2), "bool": 1 / math.log(2), "bfloat16": 1, "float64": 1}
    for mask, unit in units.items():
        assert Kind(mask).unit == pytest.approx(unit, rel=1e-15)
        assert Kind(mask).additive == is_additive(mask) == (unit == 1)


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_numbers_of_an_additive_mask(dtype: str) -> None:
    """A finite number stays finite, an infinite one infinite."""
    kind = np.dtype(dtype)
    largest = float(np.finfo(kind).max)
    numbers = [0.0, -0.0, 1.5, 1e5, -1e5, 1e300, -1e300, math.inf, -math.inf, math.nan]
    found = mask_numbers(np.array(numbers), kind)
    assert found.dtype == kind
    for given, number in zip(numbers, found, strict=True):
        if math.isfinite(given):
            right = math.copysign(min(abs(given), largest), given)
            assert float(number) == float(kind.type(right)), given
            assert np.signbit(number) == np.signbit(given)
        else:
            np.testing.assert_equal(float(number), given)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_tile_on_the_cpu(dtype: str) -> None:
    """Tiles that lie across the band, with each kind of mask, broadcast or not.

    The time that it takes is the compiler's.
    """
    random = np.random.default_rng(0)
    bools = (random.random(2 * SEQLEN_Q * SEQLEN_K) < 0.6).astype(np.uint8)
    bias = random.normal(size=bools.size).astype(dtype)
    width, row0, key0 = 64, 2, 3
    rows, keys = SEQLEN_Q - row0, SEQLEN_K - key0
    columns, words = np.arange(key0, SEQLEN_K), np.zeros(1, np.int64)
    no_functions = cpu.Functions(0, 0, 0, words, words)
    steps = {"none": (0, 0), "whole": (SEQLEN_K, 1), "a row": (0, 1), "a column": (1, 0)}
    for (lower, upper), kind, (row, column) in product(BANDS, range(3), steps.values()):
        sizes = cpu.Sizes(4, SEQLEN_Q, SEQLEN_K, 8, 8, lower, upper, 16, 16, 16, 2)
        offset = np.array([0, 0, SEQLEN_K * SEQLEN_Q, 0])
        mask = cpu.Mask(kind, bools, bias, offset, row, column)
        w = random.normal(size=(rows, width)).astype(dtype)
        expected = w[:, :keys].copy()
        for r in range(rows):
            place = offset[2] + (row0 + r) * row + columns * column
            if kind == cpu.BOOL_MASK:
                expected[r, bools[place] == 0] = -np.inf
            elif kind == cpu.ADDITIVE_MASK:
                expected[r] += bias[place]
            for n, key in enumerate(columns):
                if not allowed(row0 + r, int(key), lower, upper):
                    expected[r, n] = -np.inf
        flat = w.reshape(-1)
        tile = cpu.Tile(2, row0, rows, key0, keys, 0, 16, True, False)
        cpu.finish_scores(flat, 0, width, mask, no_functions, tile, sizes)
        np.testing.assert_array_equal(w[:, :keys], expected)
        assert (w[:, keys:16] == -np.inf).all()  # past the end of the keys
        assert (w[:, 16:] != -np.inf).all()


@pytest.mark.parametrize(("lower", "upper"), BANDS)
def test_ranges_on_the_cpu(lower: int, upper: int) -> None:
    sizes = cpu.Sizes(1, SEQLEN_Q, SEQLEN_K, 8, 8, lower, upper, 2, 4, 4, 1)
    right = dense(lower, upper)
    for i, row in enumerate(right):
        found = np.arange(cpu.first_key(i, sizes), cpu.end_key(i, sizes))
        np.testing.assert_array_equal(found, np.flatnonzero(row))
