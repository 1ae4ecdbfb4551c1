"""Mask functions that are a band become the kernels' own."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import minitorch
from minitorch import attention_masks
from minitorch.kernels.score_bands import band_of, of_difference, reads_scattered
from minitorch.score_trace import trace

N = 12
numbers = st.integers(-4, 4)


def bands_of(mask: Any) -> Any:
    traced = trace(mask, "mask_mod")
    return band_of(traced.graph, traced.parameters)


def allowed(band: Any) -> Any:
    lower, upper = band
    q, k = np.arange(N)[:, None], np.arange(N)
    found = np.ones((N, N), bool)
    if lower is not None:
        found &= k >= q + lower
    if upper is not None:
        found &= k < q + upper
    return found


@given(numbers, numbers, st.sampled_from(range(8)))
def test_a_band_is_what_the_function_lets_count(a: int, b: int, form: int) -> None:
    forms: list[Any] = [
        lambda _, h, q, k: q >= k + a,
        lambda _, h, q, k: (q - k < a) & (k - q <= b),
        lambda _, h, q, k: abs(q - k) <= a,
        lambda _, h, q, k: abs(k - q + b) < a,
        lambda _, h, q, k: k == q + a,
        lambda _, h, q, k: (2 * q + a > q + k) & (3 > b - 8),
        lambda _, h, q, k: (a - k < -(q - b)) & (q + 4 >= k) & (q > k - 3),
        lambda _, h, q, k: q == q,
    ]
    band = bands_of(forms[form])
    assert band is not None
    wanted = minitorch.create_mask(forms[form], None, None, N, N)[0, 0]
    np.testing.assert_array_equal(allowed(band), wanted)


@pytest.mark.parametrize(
    "mask",
    [
        lambda b, h, q, k: q + k < 9,
        lambda b, h, q, k: (q >= k) | (k < 3),
        lambda b, h, q, k: q != k,
        lambda b, h, q, k: 2 * q >= 2 * k,
        lambda b, h, q, k: q - k < h,
        lambda b, h, q, k: abs(q - k) == 2,
        attention_masks.prefix_lm(3),
        attention_masks.document(np.arange(N) // 4),
    ],
)  # fmt: skip
def test_what_is_no_band_is_none(mask: Any) -> None:
    assert bands_of(mask) is None


def test_a_causal_mask_function_is_the_causal_kernel_bit_for_bit() -> None:
    rng = np.random.default_rng(1)
    q, k, v = (minitorch.tensor(rng.normal(size=(2, 3, N, 4))) for _ in range(3))
    for mask, options in (
        (attention_masks.causal(), {"is_causal": True}),
        (attention_masks.sliding_window(2, 1), {"window": (2, 1)}),
    ):
        ours = q.flash_attention(k, v, block_mask=mask).to_numpy()
        assert np.array_equal(ours, q.flash_attention(k, v, **options).to_numpy())


def test_a_band_and_the_arguments_own_both_hold() -> None:
    rng = np.random.default_rng(2)
    q, k, v = (minitorch.tensor(rng.normal(size=(1, 2, n, 4))) for n in (N, N + 3, N + 3))
    window = attention_masks.sliding_window(3, 2)
    for options in ({"is_causal": True}, {"is_causal": "bottom-right"}, {"window": (1, None)}):
        ours = q.flash_attention(k, v, block_mask=window, **options).to_numpy()
        dense = q.attention(k, v, block_mask=window, **options).to_numpy()
        np.testing.assert_allclose(ours, dense, atol=1e-12)


@pytest.mark.parametrize(
    ("index", "same"),
    [
        (lambda q, k: q - k + 30, True),
        (lambda q, k: np.clip(5 - (k - q), 0, 9), True),
        (lambda q, k: (q + 3 - k) // 2 + 20, True),
        (lambda q, k: abs(q - k), True),
        (lambda q, k: np.where(q > k, 1, 0), False),  # a comparison of two, not of their difference
        (lambda q, k: q, False),
        (lambda q, k: (q + k) // 2, False),
        (lambda q, k: q // 2 - k // 2 + 30, False),
    ],
)
def test_what_is_the_same_along_diagonals(index: Any, same: bool) -> None:
    table = np.arange(64.0)
    graph = trace(lambda s, b, h, q, k: s + table[index(q, k)], "score_mod").graph
    (load,) = (n for n, node in enumerate(graph.nodes) if node.name == "load")
    assert of_difference(graph)[load] is same


def test_an_array_that_is_read_at_scattered_places() -> None:
    table = np.zeros(40)
    beside: Any = lambda s, b, h, q, k: s + table[q - k + 3 + h * 2]  # noqa: E731
    scattered: Any = lambda s, b, h, q, k: s + table[abs(q - k)]  # noqa: E731
    for function, wanted in ((beside, False), (scattered, True)):
        assert reads_scattered(trace(function, "score_mod").graph) == wanted
