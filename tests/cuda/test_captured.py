"""Gradients of what a score function captured: what the rules of attention do not ask."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from minitorch.kernels.flash_attention.captured import order_of
from minitorch.kernels.flash_attention.scores import Functions
from minitorch.score_trace import trace
from tests.attention_calls import call_of, compare, random
from tests.attention_families import SIMT
from tests.attention_functions import leaf, reference_with_functions

NQ, NK = 10, 21


def arrays(columns: int = 4) -> list[Any]:
    return [random(1, 2, n, columns, seed=s) for s, n in enumerate((NQ, NK, NK))]


def call_with(score_mod: Any, given: list[Any], **options: Any) -> Any:
    return call_of(SIMT, given, "float32", functions={"score_mod": score_mod}, **options)


TABLE = leaf(2, NQ + NK - 1, seed=1)
BIAS, HEADS = leaf(NK, seed=2), leaf(2, seed=3)


@pytest.mark.parametrize(
    ("order", "mod"),
    [
        ("diagonals", lambda s, b, h, q, k: s + TABLE[h, q - k + (NK - 1)]),
        ("diagonals", lambda s, b, h, q, k: s * TABLE[h, np.clip((NK - 1) + q - k, 3, 25)]),
        ("diagonals", lambda s, b, h, q, k: s + TABLE[h, (q - k) // 4 + 6] + HEADS[h]),
        ("keys", lambda s, b, h, q, k: s + BIAS[k] * HEADS[h]),
        ("rows", lambda s, b, h, q, k: s + TABLE[h, q]),
        ("rows", lambda s, b, h, q, k: s * HEADS[h]),
        ("rows", lambda s, b, h, q, k: s + TABLE[h, (q + k) // 2]),
        ("rows", lambda s, b, h, q, k: s + TABLE[h, q - k + (NK - 1)] * BIAS[k]),
    ],
)
def test_sums_follow_the_places(order: str, mod: Any) -> None:
    functions = Functions(trace(mod, "score_mod").graph)
    assert order_of(functions) == order
    call = call_with(mod, arrays(), is_causal=True)
    compare(SIMT, call, SIMT.compute(call), wanted=reference_with_functions(call))


def test_what_is_not_finite_has_no_gradient() -> None:
    """Of one array a derivative is infinite; the other's gradient takes no notice."""
    zero = leaf(2, seed=4)
    zero._tensor._storage[:] = 0.0

    def mod(s: Any, b: Any, h: Any, q: Any, k: Any) -> Any:
        return s + BIAS[k] + np.sqrt(zero[h])

    call = call_with(mod, arrays())
    with np.errstate(all="ignore"):
        of_size = {x.size: x for x in SIMT.compute(call)[6:]}
    assert np.isfinite(of_size[NK]).all() and np.isnan(of_size[2]).all()


@pytest.mark.parametrize("size", [1e-12, 1.0, 1e12])
def test_sums_are_as_exact_for_any_size_of_gradients(size: float) -> None:
    def mod(s: Any, b: Any, h: Any, q: Any, k: Any) -> Any:
        return s + TABLE[h, q - k + (NK - 1)]

    call = call_with(mod, arrays(), dl=0.0)
    found = SIMT.compute(call)[-1]
    call.tensors[3] = SIMT.place(size * call.tensors[3].to_numpy(), "float32", "plain")
    np.testing.assert_allclose(SIMT.compute(call)[-1], size * found, rtol=1e-5, atol=1e-6 * size)


@pytest.mark.parametrize(("nq", "nk"), [(0, 5), (5, 0)])
def test_without_scores_gradients_are_zero(nq: int, nk: int) -> None:
    given = [random(1, 2, n, 4) for n in (nq, nk, nk)]
    call = call_with(lambda s, b, h, q, k: s * HEADS[h], given)
    np.testing.assert_array_equal(SIMT.compute(call)[-1], np.zeros(2))
