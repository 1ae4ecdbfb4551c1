"""Scalar: a number that remembers how it was computed, so that derivatives can be taken."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import Any, TypeAlias

import numpy as np

from .arguments import as_number
from .autodiff import (
    Variable,
    backpropagate,
    central_difference,
    new_id,
    no_grad,
    topological_sort,
)
from .copies import another_history, become_another, check_deepcopy
from .scalar_functions import (
    EQ,
    LT,
    Add,
    Exp,
    Inv,
    Log,
    Mul,
    Neg,
    ReLU,
    ScalarFunction,
    ScalarHistory,
    Sigmoid,
    wrap_tuple,
)

_LEAF = ScalarHistory()


class Scalar:
    """A number with a history.

    Args:
        v: the value.
        back: how it was made; the default makes it a leaf, whose derivative is kept; None makes it
            a constant.
        name: shown by tools that draw the graph; a number if not given.

    Raises:
        TypeError: the value is no real number.

    Example:
        >>> from minitorch import Scalar
        >>> x = Scalar(3.0)
        >>> (x * x + 1).backward()
        >>> x.derivative
        6.0

    """

    data: float
    derivative: float | None
    history: ScalarHistory | None
    name: str
    unique_id: int

    def __init__(
        self, v: float, back: ScalarHistory | None = _LEAF, name: str | None = None
    ) -> None:
        self.unique_id = new_id()
        self.data = as_number(v, "v")
        self.derivative = None
        self.history = back
        self.name = str(self.unique_id) if name is None else name

    def __repr__(self) -> str:
        return f"Scalar({self.data})"

    # ----- copies: see copies.py -----

    def __copy__(self) -> Scalar:
        out = Scalar.__new__(type(self))
        history = another_history(self.history)
        become_another(out, {**self.__dict__, "history": history, "derivative": None})
        return out

    def __deepcopy__(self, memo: dict[int, Any]) -> Scalar:
        check_deepcopy(self, "Scalar(x.data)")
        out = memo[id(self)] = Scalar.__new__(type(self))
        become_another(out, copy.deepcopy(self.__dict__, memo))
        return out

    def __getstate__(self) -> dict[str, Any]:
        history = None if self.history is None else _LEAF
        return {**self.__dict__, "history": history, "derivative": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        become_another(self, state)

    # ----- arithmetic -----

    def __neg__(self) -> Scalar:
        return Neg.apply(self)

    def __add__(self, b: ScalarLike) -> Scalar:
        return Add.apply(self, b)

    def __radd__(self, b: ScalarLike) -> Scalar:
        return Add.apply(b, self)

    def __sub__(self, b: ScalarLike) -> Scalar:
        return Add.apply(self, Neg.apply(b))

    def __rsub__(self, b: ScalarLike) -> Scalar:
        return Add.apply(b, Neg.apply(self))

    def __mul__(self, b: ScalarLike) -> Scalar:
        return Mul.apply(self, b)

    def __rmul__(self, b: ScalarLike) -> Scalar:
        return Mul.apply(b, self)

    def __truediv__(self, b: ScalarLike) -> Scalar:
        return Mul.apply(self, Inv.apply(b))

    def __rtruediv__(self, b: ScalarLike) -> Scalar:
        return Mul.apply(b, Inv.apply(self))

    # ----- comparison: Scalars of 1.0 or 0.0 -----

    def __bool__(self) -> bool:
        return bool(self.data)

    def __lt__(self, b: ScalarLike) -> Scalar:
        return LT.apply(self, b)

    def __gt__(self, b: ScalarLike) -> Scalar:
        return LT.apply(b, self)

    def __eq__(self, b: ScalarLike) -> Scalar:  # type: ignore[override]
        return EQ.apply(b, self)

    def __hash__(self) -> int:  # identity, since == gives a Scalar
        return hash(self.unique_id)

    # ----- elementary functions -----

    def log(self) -> Scalar:
        """The logarithm, of the value plus 1e-6."""
        return Log.apply(self)

    def exp(self) -> Scalar:
        """The exponential."""
        return Exp.apply(self)

    def sigmoid(self) -> Scalar:
        """1 / (1 + exp(-x))."""
        return Sigmoid.apply(self)

    def relu(self) -> Scalar:
        """The value if positive, else 0."""
        return ReLU.apply(self)

    # ----- the graph -----

    def requires_grad_(self, val: bool) -> None:
        """Make this a leaf whose derivative is kept (True) or a constant (False)."""
        self.history = _LEAF if val else None

    def accumulate_derivative(self, x: float) -> None:
        """Add `x` to the derivative.

        Raises:
            RuntimeError: this is not a leaf.

        """
        if not self.is_leaf():
            raise RuntimeError("only a leaf keeps its derivative, and this Scalar was computed")
        self.derivative = x if self.derivative is None else self.derivative + x

    def is_leaf(self) -> bool:
        """Whether the user made this Scalar, no function did."""
        return self.history is not None and self.history.last_fn is None

    def is_constant(self) -> bool:
        """Whether no derivative is wanted."""
        return self.history is None

    @property
    def parents(self) -> Iterable[Variable]:
        """The inputs of the function that made this Scalar."""
        return () if self.history is None else self.history.inputs

    def chain_rule(self, d_output: float) -> Iterable[tuple[Variable, float]]:
        """Every input of the function that made this Scalar, constants too, with its derivative.

        Args:
            d_output: derivative of the final result in this Scalar.

        Raises:
            RuntimeError: no function made this Scalar, or the graph has been released.
            ValueError: `backward` returned another number of derivatives than there are inputs.

        """
        h = self.history
        if h is None or h.last_fn is None or h.ctx is None:
            raise RuntimeError("no function made this Scalar: the chain rule does not apply")
        if h.ctx.released:
            _ = h.ctx.saved_values  # raises, and says what to do
        derivatives = wrap_tuple(h.last_fn._backward(h.ctx, d_output))
        if len(derivatives) != len(h.inputs):
            raise ValueError(
                f"{h.last_fn.__name__}.backward must return {len(h.inputs)} derivatives, "
                f"one for each input, got {len(derivatives)}"
            )
        return list(zip(h.inputs, derivatives, strict=True))

    def release_graph(self) -> None:
        """Forget what the function that made this Scalar saved."""
        if self.history is not None and self.history.ctx is not None:
            self.history.ctx.release()

    def backward(self, d_output: float | None = None, retain_graph: bool = False) -> None:
        """Add the derivative of this Scalar in each leaf to that leaf's `derivative`.

        Args:
            d_output: derivative of the final result in this Scalar, 1 if not given.
            retain_graph: keep what the forward pass saved, so that `backward` can be called again.

        Raises:
            RuntimeError: the graph has been released by an earlier call.

        """
        d_output = 1.0 if d_output is None else as_number(d_output, "d_output")
        backpropagate(self, d_output, retain_graph)


ScalarLike: TypeAlias = float | int | Scalar
ScalarFunction.variable = Scalar


def derivative_check(f: Callable[..., Scalar], *scalars: Scalar) -> None:
    """Check the derivatives that autodiff gives for `f` against finite differences, to 1e-3.

    At a kink (relu at 0) or a jump (`<` where both sides meet) the derivative is that of one side,
    so a match with the forward, the backward or the central difference will do.

    Args:
        f: a function of `len(scalars)` Scalars that returns one.
        scalars: where the derivatives are taken. Their own `derivative`, and those of other Scalars
            that `f` uses, are left alone.

    Raises:
        AssertionError: no difference matches; the message names the argument and the values.
        TypeError: `scalars` are not Scalars, or `f` returns none.
        ValueError: no Scalar, one that is NaN, or `f` gives two values for the same Scalars.

    """
    _check_scalars(scalars)
    eps = 1e-6
    leaves = [Scalar(x.data) for x in scalars]
    value = _derivatives(f, leaves)
    for i, leaf in enumerate(leaves):
        derivative = 0.0 if leaf.derivative is None else leaf.derivative
        with no_grad():
            here = f(*leaves).data
            above = f(*leaves[:i], leaf + eps, *leaves[i + 1 :]).data
            below = f(*leaves[:i], leaf - eps, *leaves[i + 1 :]).data
            central = central_difference(f, *leaves, arg=i, epsilon=eps).data
        if not np.array_equal(here, value, equal_nan=True):
            raise ValueError("f gives different values for the same Scalars: it has no derivative")
        differences = [central, (above - here) / eps, (here - below) / eps]
        rounding = 64 * np.finfo(np.float64).eps * abs(here) / eps
        atol = 1e-6 + (rounding if np.isfinite(rounding) else 0.0)
        if not any(np.isclose(derivative, d, rtol=1e-3, atol=atol) for d in differences):
            raise AssertionError(
                f"derivative check failed at {[x.data for x in leaves]}: in argument {i} autodiff "
                f"gives {derivative}; central, forward and backward difference are {differences}"
            )


def _check_scalars(scalars: tuple[Any, ...]) -> None:
    """Raise unless there are Scalars, and numbers in them."""
    if not scalars:
        raise ValueError("derivative_check needs at least one Scalar beside the function, got none")
    for i, x in enumerate(scalars):
        if not isinstance(x, Scalar):
            raise TypeError(
                f"argument {i} must be a Scalar, got {type(x).__name__}: write Scalar(...)"
            )
        if np.isnan(x.data):
            raise ValueError(f"argument {i} is NaN, where there is no derivative to check")


def _derivatives(f: Callable[..., Scalar], leaves: list[Scalar]) -> float:
    """The value of f; the leaves get their derivatives, and no other Scalar does."""
    result = f(*leaves)
    if not isinstance(result, Scalar):
        raise TypeError(f"f must return a Scalar, got {type(result).__name__}")
    graph: list[Any] = list(topological_sort(result))
    others = [(x, x.derivative) for x in graph if x.is_leaf() and all(x is not y for y in leaves)]
    try:
        result.backward()
    finally:
        for other, derivative in others:
            other.derivative = derivative
    return result.data
