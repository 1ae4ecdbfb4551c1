"""The mathematics of single numbers: elementwise operations and their derivatives.

Plain functions of floats, so that Python calls them (`Scalar`, `SimpleOps`) and numba compiles them
(`FastOps`, the GPU). Names are MiniTorch's; some hide a builtin on purpose. Sorted as: arithmetic,
comparison, elementary functions, derivatives, functions of lists.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

EPS = 1e-6  # added inside `log`, so that log(0) is finite

# ----- arithmetic -----


def id(x: float) -> float:
    """$f(x) = x$"""
    return x


def neg(x: float) -> float:
    """$f(x) = -x$"""
    return -x


def add(x: float, y: float) -> float:
    """$f(x, y) = x + y$"""
    return x + y


def mul(x: float, y: float) -> float:
    """$f(x, y) = x y$"""
    return x * y


def inv(x: float) -> float:
    """$f(x) = 1/x$"""
    return 1.0 / x


def pow(x: float, y: float) -> float:
    """$f(x, y) = x^y$"""
    return float(x**y)


# ----- comparison: 1.0 for true, 0.0 for false -----


def lt(x: float, y: float) -> float:
    """1.0 if x is less than y, else 0.0."""
    return 1.0 if x < y else 0.0


def eq(x: float, y: float) -> float:
    """1.0 if x equals y, else 0.0."""
    return 1.0 if x == y else 0.0


def is_close(x: float, y: float) -> float:
    """1.0 if x and y differ by less than 0.01, else 0.0."""
    # Two comparisons instead of abs(): courses' tests call this with tensors too.
    return 1.0 if (x - y < 1e-2) and (y - x < 1e-2) else 0.0


def max(x: float, y: float) -> float:
    """The larger of x and y; NaN if either is."""
    return x if x > y or x != x else y


# ----- elementary functions -----


def sigmoid(x: float) -> float:
    r"""$f(x) = 1 / (1 + e^{-x})$, written so that the exponential never overflows."""
    e = math.exp(-abs(x))
    return (1.0 if x >= 0 else e) / (1.0 + e)


def relu(x: float) -> float:
    """x if it is positive, else 0; NaN stays NaN."""
    return 0.0 if x <= 0 else x


def log(x: float) -> float:
    r"""$f(x) = \log(x + \epsilon)$ with $\epsilon = 10^{-6}$, as MiniTorch has it."""
    return math.log(x + EPS)


def exp(x: float) -> float:
    """$f(x) = e^x$"""
    return math.exp(x)


def tanh(x: float) -> float:
    r"""$f(x) = \tanh(x)$"""
    return math.tanh(x)


# ----- derivatives: f'(x) times d, the derivative of what follows -----


def log_back(x: float, d: float) -> float:
    """d times the derivative of `log` at x."""
    return d / (x + EPS)


def inv_back(x: float, d: float) -> float:
    """d times the derivative of `inv` at x."""
    return -d / (x * x)


def pow_back(x: float, y: float) -> float:
    """The derivative of `pow` in its exponent, x^y log(x): at x = 0 its limit, below 0 NaN."""
    if x < 0:
        return math.nan
    if x == 0:
        return 0.0 if y >= 0 else y * math.inf
    return float(x**y * math.log(x))


def relu_back(x: float, d: float) -> float:
    """d times the derivative of `relu` at x, which is taken as 0 at 0."""
    return d if x > 0 else 0.0


# ----- functions of lists -----


def map(fn: Callable[[float], float]) -> Callable[[Iterable[float]], Iterable[float]]:
    """The function that applies `fn` to each element of a list."""
    return lambda ls: [fn(x) for x in ls]


def zipWith(
    fn: Callable[[float, float], float],
) -> Callable[[Iterable[float], Iterable[float]], Iterable[float]]:
    """The function that combines two lists in pairs with `fn`, as far as the shorter goes."""
    return lambda ls1, ls2: [fn(x, y) for x, y in zip(ls1, ls2, strict=False)]


def reduce(fn: Callable[[float, float], float], start: float) -> Callable[[Iterable[float]], float]:
    """The function that folds a list from the left: fn(...fn(fn(start, x1), x2)..., xn)."""

    def fold(ls: Iterable[float]) -> float:
        total = start
        for x in ls:
            total = fn(total, x)
        return total

    return fold


def negList(ls: Iterable[float]) -> Iterable[float]:
    """Each element of `ls` negated."""
    return map(neg)(ls)


def addLists(ls1: Iterable[float], ls2: Iterable[float]) -> Iterable[float]:
    """The elements of two lists added in pairs."""
    return zipWith(add)(ls1, ls2)


def sum(ls: Iterable[float]) -> float:
    """The sum of a list; 0 if it is empty."""
    return reduce(add, 0.0)(ls)


def prod(ls: Iterable[float]) -> float:
    """The product of a list; 1 if it is empty."""
    return reduce(mul, 1.0)(ls)
