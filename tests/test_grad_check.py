"""`grad_check` and `derivative_check`: what they find, what they refuse, what they leave alone."""

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import minitorch
from minitorch import (
    FastOps,
    Scalar,
    ScalarFunction,
    Tensor,
    TensorBackend,
    derivative_check,
    grad_central_difference,
    grad_check,
)
from minitorch.autodiff import Context
from minitorch.function import Function

FAST = TensorBackend(FastOps)


def tensor(*shape: int, dtype: Any = np.float64, scale: float = 1.0) -> Tensor:
    values = scale * np.random.default_rng(3).normal(size=shape)
    return minitorch.tensor(values.astype(dtype), FAST)


class Off(Function):
    """x^2, with a gradient that is wrong by a share."""

    @staticmethod
    def forward(ctx: Context, x: Tensor, share: float) -> Tensor:
        ctx.save_for_backward(x, share)
        return x * x

    @staticmethod
    def backward(ctx: Context, grad: Tensor) -> tuple[Tensor, float]:
        x, share = ctx.saved_values
        return grad * x * (2.0 * (1 + share)), 0.0


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("scale", [1e-2, 1.0, 1e3])
@pytest.mark.parametrize("shape", [(3, 4), (30, 20)])
def test_half_a_percent_is_found(dtype: Any, scale: float, shape: tuple[int, ...]) -> None:
    x = tensor(*shape, dtype=dtype, scale=scale)
    grad_check(lambda x: Off.apply(x, 0.0), x)
    for share in (0.005, -0.005):
        with pytest.raises(AssertionError, match="gradient of argument 0"):
            grad_check(lambda x, share=share: Off.apply(x, share), x)


def test_a_gradient_that_is_lost_is_found() -> None:
    with pytest.raises(AssertionError, match="backward gives 0, finite differences give"):
        grad_check(lambda x: x.detach() * 2.0, tensor(3))
    grad_check(lambda x: minitorch.ones((2,), FAST), tensor(3))  # truly constant


@pytest.mark.parametrize(
    "f",
    [
        lambda x: minitorch.dropout(x, 0.4),
        minitorch.Dropout(0.4),
        lambda x: x * random.gauss(0, 1),
        lambda x: x * float(np.random.normal()),
        lambda x: x.view(1, 3, 4).flash_attention(x.view(1, 3, 4), x.view(1, 3, 4), dropout_p=0.4),
    ],
)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_random_numbers_are_drawn_again(f: Callable[[Tensor], Tensor], dtype: Any) -> None:
    grad_check(f, tensor(3, 4, dtype=dtype))


def test_other_random_numbers_are_no_wrong_gradient() -> None:
    own = np.random.default_rng(0)
    with pytest.raises(ValueError, match="different values for the same tensors"):
        grad_check(lambda x: x * float(own.normal()), tensor(3))


def test_everything_is_as_it_was() -> None:
    weight = tensor(3)
    result = weight * 2.0
    leaf, constant, other = tensor(3), tensor(3).detach(), tensor(3)
    (leaf * 1.0).sum().backward()
    (other * 1.0).sum().backward()
    history, grads = result.history, (leaf.grad, other.grad)
    random.seed(1)
    np.random.seed(2)
    state = minitorch.get_rng_state()

    def f(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
        return minitorch.dropout(a * b * c * other, 0.2)

    grad_check(f, result, leaf, constant)
    with pytest.raises(AssertionError):
        grad_check(lambda a: Off.apply(a * other, 0.5), leaf)
    assert result.history is history and result.grad is None and constant.is_constant()
    assert leaf.grad is grads[0] and other.grad is grads[1] and constant.grad is None
    assert minitorch.get_rng_state() == state
    result.sum().backward()
    assert weight.grad is not None and weight.grad.to_numpy().tolist() == [2, 2, 2]


def test_tensors_that_share_memory_or_are_the_same() -> None:
    x = tensor(2, 3)
    grad_check(lambda a, b: a * b, x, x)
    grad_check(lambda a: a @ a.permute(1, 0), x.permute(1, 0))


X = tensor(2)
ANY: Any = grad_check  # called with what it does not take


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: ANY(lambda x: x), ValueError, "at least one tensor"),
        (lambda: ANY(3, X), TypeError, "f must be a function of tensors, got int"),
        (lambda: ANY(lambda x: x, 3), TypeError, "argument 0 must be a Tensor, got 3"),
        (lambda: ANY(lambda x, y: x, X, np.ones(2)), TypeError, "argument 1 .* got numpy.ndarray"),
        (lambda: ANY(lambda x: x, Scalar(1.0)), TypeError, "argument 0 .* got minitorch.Scalar"),
        (lambda: ANY(lambda x: x.sum().item(), X), TypeError, "f must return a Tensor, got float"),
        (lambda: ANY(lambda x: None, X), TypeError, "f must return a Tensor, got NoneType"),
        (lambda: ANY(lambda x: x, X * np.nan), ValueError, "argument 0 holds NaN"),
        (lambda: ANY(lambda x: x * X, X), ValueError, "computes with argument 0 .* itself"),
        (lambda: ANY(lambda x: x, X * 1e9), ValueError, "epsilon 1e-06 is too small a step"),
        (lambda: ANY(lambda x: x + 1e10, X), ValueError, "too large for differences"),
        (lambda: ANY(lambda x: x, X, seed=-1), ValueError, "seed must be in"),
        *(
            (lambda e=e: ANY(lambda x: x, X, epsilon=e), ValueError, "epsilon")
            for e in (0, -1e-6, np.nan, np.inf, 1e-300, 1e-15)
        ),
        *(
            (lambda n=n, v=v: ANY(lambda x: x, X, **{n: v}), ValueError, f"{n} must be a number")
            for n in ("rtol", "atol", "tol")
            for v in (-1e-3, np.nan, np.inf)
        ),
    ],
)
def test_what_it_refuses(call: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()


def test_inside_no_grad() -> None:
    with minitorch.no_grad(), pytest.raises(RuntimeError, match="inside no_grad"):
        grad_check(lambda x: x, X)


def test_where_there_is_no_derivative() -> None:
    zero = minitorch.tensor([0.0, -1.0], FAST)
    grad_check(lambda x: x.relu(), zero)
    grad_check(lambda x: 1.0 / x, zero)  # infinite, as `backward` says
    mask = minitorch.tensor([[[[0.0, -np.inf, 0.0]]]], FAST)
    grad_check(lambda x, m: x.attn_softmax(m), tensor(1, 1, 1, 3), mask)


def test_one_central_difference() -> None:
    x = tensor(2, 3)
    got = grad_central_difference(lambda a, b: a * b * b, x, x, arg=1, ind=(1, 2))
    assert got == pytest.approx(2 * x[1, 2] ** 2, rel=1e-6)
    for options, error in (
        ({"ind": (1,)}, IndexError),  # a whole row
        ({"ind": (2, 0)}, IndexError),
        ({"ind": (0, 0), "arg": 2}, IndexError),
        ({"ind": (0, 0), "epsilon": 0.0}, ValueError),
    ):
        with pytest.raises(error):
            grad_central_difference(lambda a, b: a * b, x, x, **options)


# ----- Scalars -----


class OffScalar(ScalarFunction):
    """x^2, with a derivative half a percent too large."""

    @staticmethod
    def forward(ctx: Context, x: float) -> float:
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx: Context, d_output: float) -> float:
        (x,) = ctx.saved_values
        return float(2.01 * x * d_output)


@pytest.mark.parametrize("x", [0.01, 1.0, -50.0])
def test_half_a_percent_of_a_scalar(x: float) -> None:
    derivative_check(lambda x: x * x, Scalar(x))
    with pytest.raises(AssertionError, match="in argument 0 autodiff gives"):
        derivative_check(OffScalar.apply, Scalar(x))


def test_other_scalars_are_left_alone() -> None:
    x, weight = Scalar(2.0), Scalar(3.0)
    (weight * 1.0).backward()
    derivative_check(lambda x: x * weight, x)
    assert (x.derivative, weight.derivative) == (None, 1.0)


SCALAR: Any = derivative_check


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: SCALAR(lambda: Scalar(1.0)), ValueError, "at least one Scalar"),
        (lambda: SCALAR(lambda x: x, 3.0), TypeError, "argument 0 must be a Scalar, got float"),
        (lambda: SCALAR(lambda x: 3.0, Scalar(1.0)), TypeError, "f must return a Scalar"),
        (lambda: SCALAR(lambda x: x, Scalar(np.nan)), ValueError, "argument 0 is NaN"),
        (lambda: SCALAR(lambda x: x * random.random(), Scalar(1.0)), ValueError, "different"),
    ],
)
def test_what_derivative_check_refuses(call: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()
