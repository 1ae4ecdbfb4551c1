"""Scalars: values, derivatives, and graphs that are used twice, freed or turned off."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis.strategies import floats

from minitorch.autodiff import (
    Context,
    backpropagate,
    central_difference,
    no_grad,
    topological_sort,
)
from minitorch.scalar import Scalar, derivative_check
from minitorch.scalar_functions import ScalarFunction, ScalarHistory, unwrap_tuple, wrap_tuple
from minitorch.testing import MathTestVariable

numbers = floats(-100, 100)
one_arg, two_arg, _ = MathTestVariable._comp_testing()


class Product(ScalarFunction):
    """x y + 2 x, with one derivative for each input."""

    @staticmethod
    def forward(ctx: Context, x: float, y: float) -> float:
        ctx.save_for_backward(x, y)
        return x * y + 2.0 * x

    @staticmethod
    def backward(ctx: Context, d_output: float) -> tuple[float, float]:
        x, y = ctx.saved_values
        return d_output * (y + 2.0), d_output * x


@pytest.mark.parametrize(("name", "base", "variable"), one_arg)
@given(x=numbers)
def test_one_argument(name: str, base: Any, variable: Any, x: float) -> None:
    assert variable(Scalar(x)).data == pytest.approx(base(x), rel=1e-12)
    derivative_check(variable, Scalar(x))


@pytest.mark.parametrize(("name", "base", "variable"), two_arg)
@given(x=numbers, y=numbers)
def test_two_arguments(name: str, base: Any, variable: Any, x: float, y: float) -> None:
    assert variable(Scalar(x), Scalar(y)).data == pytest.approx(base(x, y), rel=1e-12)
    derivative_check(variable, Scalar(x), Scalar(y))


@pytest.mark.parametrize("a,b", [(0.0, 1.2), (-1.2, 0.0), (5.5, 0.0)])
def test_derivative_check_at_a_jump(a: float, b: float) -> None:
    for _, _, f in two_arg:
        derivative_check(f, Scalar(a), Scalar(b))


def test_derivative_check_can_fail() -> None:
    class Wrong(ScalarFunction):
        @staticmethod
        def forward(ctx: Context, x: float) -> float:
            return 3.0 * x

        @staticmethod
        def backward(ctx: Context, d_output: float) -> float:
            return 2.0 * d_output

    with pytest.raises(AssertionError, match=r"in argument 0 autodiff gives 2\.0"):
        derivative_check(Wrong.apply, Scalar(1.0))


def test_numbers_on_either_side() -> None:
    x = Scalar(4.0)
    y = (1 - x) * 2 / x + 3 / x - x + 1
    assert y.data == pytest.approx((1 - 4) * 2 / 4 + 3 / 4 - 4 + 1)
    y.backward()
    assert x.derivative == pytest.approx(-2 / 16 - 3 / 16 - 1)


def test_comparisons_give_scalars() -> None:
    x, y = Scalar(1.0), Scalar(2.0)
    assert (x < y).data == 1.0
    assert (x > y).data == 0.0
    assert (x == 1.0).data == 1.0
    assert not Scalar(0.0)
    assert len({x, y, x}) == 2


def test_chain_rule_lists_every_input() -> None:
    x = Scalar(5.0)
    back = list(Product.apply(10, x).chain_rule(3.0))
    assert [derivative for _, derivative in back] == [3 * 7.0, 3 * 10.0]
    assert back[1][0] is x
    assert back[0][0].is_constant()


def test_chain_rule_counts_derivatives() -> None:
    class Short(Product):
        @staticmethod
        def backward(ctx: Context, d_output: float) -> Any:
            return d_output

    with pytest.raises(ValueError, match="2 derivatives"):
        Short.apply(Scalar(1.0), Scalar(2.0)).chain_rule(1.0)


def test_order_of_the_graph() -> None:
    x, y = Scalar(1.0), Scalar(2.0)
    left, right = x * 2, x + y
    top = left * right
    order = [v.unique_id for v in topological_sort(top)]
    assert order == [v.unique_id for v in (top, right, y, left, x)]


def test_a_deep_graph_is_no_recursion() -> None:
    x = y = Scalar(1.0)
    for _ in range(3000):
        y = y + 1
    y.backward()
    assert x.derivative == 1.0


def test_derivatives_accumulate() -> None:
    x = Scalar(3.0)
    (x * x).backward(d_output=5.0)
    assert x.derivative == 30.0
    (x * 2).backward()
    assert x.derivative == 32.0


def test_a_freed_graph_says_what_to_do() -> None:
    x = Scalar(3.0)
    y = x + x
    y.backward(retain_graph=True)
    y.backward()
    assert x.derivative == 4.0
    with pytest.raises(RuntimeError, match="retain_graph"):
        y.backward()


def test_no_graph_without_need() -> None:
    x = Scalar(2.0)
    with no_grad():
        assert (x * x).is_constant()
    x.requires_grad_(False)
    assert (x * x).is_constant()
    x.requires_grad_(True)
    assert not (x * x).is_constant()


def test_only_leaves_accumulate() -> None:
    with pytest.raises(RuntimeError, match="only a leaf"):
        (Scalar(1.0) * 2).accumulate_derivative(1.0)


def test_forward_must_return_a_float() -> None:
    class Whole(ScalarFunction):
        @staticmethod
        def forward(ctx: Context, x: float) -> float:
            return int(x)

    with pytest.raises(TypeError, match="must return a float, got int"):
        Whole.apply(Scalar(1.0))


def test_history_by_hand() -> None:
    x = Scalar(0.0)
    ctx = Context()
    ctx.save_for_backward(0.0, 0.0)
    y = Scalar(0.0, ScalarHistory(Product, ctx=ctx, inputs=[x, x]))
    backpropagate(y, 1.0)
    assert x.derivative == 2.0


def test_central_difference() -> None:
    assert central_difference(lambda x, y: x * y, 5, 10, arg=1) == pytest.approx(5.0)


def test_tuples() -> None:
    assert wrap_tuple(1) == (1,) and wrap_tuple((1, 2)) == (1, 2)
    assert unwrap_tuple((1,)) == 1 and unwrap_tuple((1, 2)) == (1, 2)
