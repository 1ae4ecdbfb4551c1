"""The scalar mathematics: values against Python's own, derivatives against differences, numba."""

import math
from typing import Any

import numba
import numpy as np
import pytest
from hypothesis import given
from hypothesis.strategies import floats, lists

from minitorch import operators

numbers = floats(-100, 100)

TWO: dict[str, Any] = {
    "add": lambda x, y: x + y,
    "mul": lambda x, y: x * y,
    "lt": lambda x, y: float(x < y),
    "eq": lambda x, y: float(x == y),
    "max": max,
    "is_close": lambda x, y: float(abs(x - y) < 0.01),
}
ONE: dict[str, Any] = {
    "id": lambda x: x,
    "neg": lambda x: -x,
    "relu": lambda x: max(x, 0.0),
    "tanh": math.tanh,
    "exp": math.exp,
    "sigmoid": lambda x: 0.5 * (1 + math.tanh(x / 2)),
}


@pytest.mark.parametrize("name", TWO)
@given(x=numbers, y=numbers)
def test_functions_of_two_numbers(name: str, x: float, y: float) -> None:
    assert getattr(operators, name)(x, y) == TWO[name](x, y)


@pytest.mark.parametrize("name", ONE)
@given(x=numbers)
def test_functions_of_one_number(name: str, x: float) -> None:
    assert getattr(operators, name)(x) == pytest.approx(ONE[name](x), rel=1e-12, abs=1e-15)


@given(x=floats(0.01, 100), d=numbers)
def test_derivatives_agree_with_differences(x: float, d: float) -> None:
    eps = 1e-7 * x
    for name in ("log", "inv", "relu"):
        f = getattr(operators, name)
        slope = (f(x + eps) - f(x - eps)) / (2 * eps)
        assert getattr(operators, f"{name}_back")(x, d) == pytest.approx(d * slope, rel=1e-5)


def test_log_is_finite_at_zero() -> None:
    assert operators.log(0.0) == pytest.approx(math.log(1e-6))


def test_sigmoid_does_not_overflow() -> None:
    assert operators.sigmoid(-1e4) == 0.0
    assert operators.sigmoid(1e4) == 1.0


def test_nan_goes_through_max_and_relu() -> None:
    for value in (operators.max(math.nan, 1.0), operators.max(1.0, math.nan)):
        assert math.isnan(value)
    assert math.isnan(operators.relu(math.nan))


@given(lists(numbers), lists(numbers))
def test_functions_of_lists(xs: list[float], ys: list[float]) -> None:
    assert list(operators.negList(xs)) == [-x for x in xs]
    assert list(operators.addLists(xs, ys)) == [x + y for x, y in zip(xs, ys, strict=False)]
    assert operators.sum(xs) == pytest.approx(math.fsum(xs), abs=1e-9)
    assert operators.prod(xs) == pytest.approx(math.prod(xs), rel=1e-9)
    assert list(operators.map(abs)(xs)) == [abs(x) for x in xs]


def test_reduce_folds_from_the_left() -> None:
    assert operators.reduce(lambda total, x: 10 * total + x, 1)([2, 3, 4]) == 1234


@pytest.mark.parametrize("name", ["sigmoid", "is_close", "pow", "relu", "max"])
def test_numba_compiles_them(name: str) -> None:
    f = getattr(operators, name)
    given_numbers = (0.3, 2.0)[: f.__code__.co_argcount]
    assert numba.njit(f)(*given_numbers) == pytest.approx(f(*given_numbers))
    in_float32 = tuple(np.float32(x) for x in given_numbers)
    assert numba.njit(f)(*in_float32) == pytest.approx(f(*given_numbers), rel=1e-6)
