"""Random numbers: `rand` gives Python's own, however many are wanted."""

import copy
import random
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import minitorch
from minitorch import rng


@pytest.mark.parametrize("size", [0, 1, rng.FEW - 1, rng.FEW, 5000, rng.CHUNK + 3])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_the_numbers_and_the_state_of_a_loop(size: int, dtype: Any) -> None:
    random.seed(7)
    expected = np.array([random.random() for _ in range(size)], dtype)
    after = random.getstate()
    random.seed(7)
    got = rng.uniform(size, dtype)
    assert got.dtype == dtype and np.array_equal(got, expected)
    assert random.getstate() == after


@settings(max_examples=25)
@given(st.integers(0, 2**40), st.lists(st.sampled_from([1, 2, 311, 1024, 1500]), max_size=4))
def test_python_goes_on_where_it_stopped(seed: int, sizes: list[int]) -> None:
    """Between other draws, which leave the generator in the middle of its block of 624 words."""
    random.seed(seed)
    first = random.gauss(0, 1)  # keeps a second number for later, in the state
    expected = [random.random() for size in sizes for _ in range(size)]
    last = (random.gauss(0, 1), random.getrandbits(32), random.random())
    random.seed(seed)
    assert random.gauss(0, 1) == first
    got = np.concatenate([np.empty(0), *(rng.uniform(size) for size in sizes)])
    assert got.tolist() == expected
    assert (random.gauss(0, 1), random.getrandbits(32), random.random()) == last


def test_layers_start_with_these_numbers() -> None:
    random.seed(3)
    layer = minitorch.Linear(64, 32)
    random.seed(3)
    drawn = np.array([random.random() for _ in range(64 * 32 + 32)])
    bound = 1 / 8
    weights, bias = (p.value.to_numpy().ravel() for p in layer.parameters())
    np.testing.assert_array_equal(weights, (drawn[: 64 * 32] - 0.5) * (2 * bound))
    np.testing.assert_array_equal(bias, (drawn[64 * 32 :] - 0.5) * (2 * bound))


def test_numpys_generator_is_left_alone() -> None:
    np.random.seed(1)
    expected = np.random.random()
    np.random.seed(1)
    minitorch.rand((100, 100))
    assert np.random.random() == expected


def _state_with(part: str, place: int, value: Any) -> Any:
    state = copy.deepcopy(rng.get_rng_state())
    state[part][place] = value
    return state


@pytest.mark.parametrize(
    ("part", "place", "value"),
    [
        ("python", 0, 99),
        ("python", 1, [1, 2]),
        ("python", 2, "x"),
        ("numpy", 0, "PCG64"),
        ("numpy", 1, [1, 2]),
        ("numpy", 2, 10**6),
        ("numpy", 2, -5),
        ("numpy", 4, "x"),
    ],
)
def test_a_damaged_state_changes_nothing(part: str, place: int, value: Any) -> None:
    damaged, before = _state_with(part, place, value), rng.fingerprint()
    with pytest.raises(ValueError, match="get_rng_state"):
        rng.set_rng_state(damaged)
    assert rng.fingerprint() == before


def test_a_damaged_last_part_changes_no_first() -> None:
    before_draw, random_before = rng.get_rng_state(), random.random()
    before = rng.fingerprint()
    with pytest.raises(ValueError, match="get_rng_state"):
        rng.set_rng_state({**before_draw, "attention": {"bit_generator": "PCG64"}})
    assert rng.fingerprint() == before
    rng.set_rng_state(before_draw)
    assert random.random() == random_before
