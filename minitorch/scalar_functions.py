"""Differentiable functions of Scalars: each a forward and a backward pass, side by side.

`ScalarFunction.apply` is the only place that records the graph. The functions know nothing of the
`Scalar` class; it names itself as `ScalarFunction.variable`, so that imports run one way.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from . import operators
from .autodiff import Context, is_grad_enabled
from .ieee import ieee

if TYPE_CHECKING:
    from .scalar import Scalar

# Infinity and NaN where Python raises an error: a Scalar computes as a tensor of one element does.
_inv, _inv_back = ieee(operators.inv), ieee(operators.inv_back)
_log, _log_back = ieee(operators.log), ieee(operators.log_back)
_exp = ieee(operators.exp)


def wrap_tuple(x: Any) -> tuple[Any, ...]:
    """`x` itself if it is a tuple, else the tuple of it alone."""
    return x if isinstance(x, tuple) else (x,)


def unwrap_tuple(x: tuple[Any, ...]) -> Any:
    """The element of a tuple of one, else the tuple."""
    return x[0] if len(x) == 1 else x


@dataclass(frozen=True)
class ScalarHistory:
    """How a Scalar was made: the edge of the graph that leads to its inputs. Empty for a leaf."""

    last_fn: type[ScalarFunction] | None = None
    ctx: Context | None = None
    inputs: Sequence[Scalar] = ()


class ScalarFunction:
    """A function of floats with a derivative. Users call `apply`; subclasses give the passes:

    forward(ctx, *floats) -> float; backward(ctx, d_output) -> one derivative for each input, a
    float or a tuple.
    """

    variable: ClassVar[type[Scalar]]  # set by scalar.py, which stands above this file

    @classmethod
    def _forward(cls, ctx: Context, *inps: float) -> float:
        return cls.forward(ctx, *inps)  # type: ignore[attr-defined,no-any-return]

    @classmethod
    def _backward(cls, ctx: Context, d_out: float) -> tuple[float, ...]:
        return wrap_tuple(cls.backward(ctx, d_out))  # type: ignore[attr-defined]

    @classmethod
    def apply(cls, *vals: Scalar | float) -> Scalar:
        """Compute the function, and remember how if a derivative may be asked for.

        Args:
            vals: Scalars or numbers; numbers are constants.

        Raises:
            TypeError: `forward` returned something else than a float.

        """
        inputs = [
            v if isinstance(v, cls.variable) else cls.variable(v, back=None)  # type: ignore[arg-type]
            for v in vals
        ]
        tracked = is_grad_enabled() and not all(v.is_constant() for v in inputs)
        ctx = Context(no_grad=not tracked)
        result = cls._forward(ctx, *(v.data for v in inputs))
        if not isinstance(result, float):
            raise TypeError(
                f"{cls.__name__}.forward must return a float, got {type(result).__name__}"
            )
        return cls.variable(result, ScalarHistory(cls, ctx, inputs) if tracked else None)


class Neg(ScalarFunction):
    """$f(x) = -x$"""

    @staticmethod
    def forward(ctx: Context, a: float) -> float:
        """-a"""
        return operators.neg(a)

    @staticmethod
    def backward(ctx: Context, d_output: float) -> float:
        """-d"""
        return operators.neg(d_output)


class Inv(ScalarFunction):
    """$f(x) = 1/x$"""

    @staticmethod
    def forward(ctx: Context, a: float) -> float:
        """1/a"""
        ctx.save_for_backward(a)
        return _inv(a)

    @staticmethod
    def backward(ctx: Context, d_output: float) -> float:
        """-d/a^2"""
        (a,) = ctx.saved_values
        return _inv_back(a, d_output)


class Add(ScalarFunction):
    """$f(x, y) = x + y$"""

    @staticmethod
    def forward(ctx: Context, a: float, b: float) -> float:
        """a + b"""
        return operators.add(a, b)

    @staticmethod
    def backward(ctx: Context, d_output: float) -> tuple[float, float]:
        """(d, d)"""
        return d_output, d_output


class Mul(ScalarFunction):
    """$f(x, y) = x y$"""

    @staticmethod
    def forward(ctx: Context, a: float, b: float) -> float:
        """a b"""
        ctx.save_for_backward(a, b)
        return operators.mul(a, b)

    @staticmethod
    def backward(ctx: Context, d_output: float) -> tuple[float, float]:
        """(d b, d a)"""
        a, b = ctx.saved_values
        return d_output * b, d_output * a


class Log(ScalarFunction):
    r"""$f(x) = \log(x)$"""

    @staticmethod
    def forward(ctx: Context, a: float) -> float:
        """log(a)"""
        ctx.save_for_backward(a)
        return _log(a)

    @staticmethod
    def backward(ctx: Context, d_output: float) -> float:
        """d/a"""
        (a,) = ctx.saved_values
        return _log_back(a, d_output)


class Exp(ScalarFunction):
    """$f(x) = e^x$"""

    @staticmethod
    def forward(ctx: Context, a: float) -> float:
        """y = exp(a)"""
        y = _exp(a)
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx: Context, d_output: float) -> float:
        """d y"""
        (y,) = ctx.saved_values
        return float(d_output * y)


class Sigmoid(ScalarFunction):
    """$f(x) = 1 / (1 + e^{-x})$"""

    @staticmethod
    def forward(ctx: Context, a: float) -> float:
        """y = sigmoid(a)"""
        y = operators.sigmoid(a)
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx: Context, d_output: float) -> float:
        """d y (1 - y)"""
        (y,) = ctx.saved_values
        return float(d_output * y * (1.0 - y))


class ReLU(ScalarFunction):
    """$f(x) = max(x, 0)$"""

    @staticmethod
    def forward(ctx: Context, a: float) -> float:
        """max(a, 0)"""
        ctx.save_for_backward(a)
        return operators.relu(a)

    @staticmethod
    def backward(ctx: Context, d_output: float) -> float:
        """d where a is positive"""
        (a,) = ctx.saved_values
        return operators.relu_back(a, d_output)


class LT(ScalarFunction):
    """1 if x < y, else 0; flat, so its derivative is 0."""

    @staticmethod
    def forward(ctx: Context, a: float, b: float) -> float:
        """a < b"""
        return operators.lt(a, b)

    @staticmethod
    def backward(ctx: Context, d_output: float) -> tuple[float, float]:
        """(0, 0)"""
        return 0.0, 0.0


class EQ(ScalarFunction):
    """1 if x = y, else 0; flat, so its derivative is 0."""

    @staticmethod
    def forward(ctx: Context, a: float, b: float) -> float:
        """a == b"""
        return operators.eq(a, b)

    @staticmethod
    def backward(ctx: Context, d_output: float) -> tuple[float, float]:
        """(0, 0)"""
        return 0.0, 0.0
