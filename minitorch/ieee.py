"""Arithmetic of IEEE 754 where Python raises an error: 1 / 0 is inf, log(-1) is NaN, exp(1000) inf.

Compiled code computes so by itself, and numpy does it with a warning. What runs in Python, the
Scalars and `SimpleOps`, agrees with it by this.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from types import BuiltinFunctionType, FunctionType, SimpleNamespace
from typing import Any

import numpy as np

# A decorator: numpy's infinities and NaN without its warnings.
quiet = np.errstate(all="ignore")

# `math` as numpy has it, whose functions raise no errors.
_MATH = SimpleNamespace(**{name: getattr(np, name, fn) for name, fn in vars(math).items()})


def ieee(fn: Callable[..., Any]) -> Callable[..., float]:
    """`fn`, a function of floats, for Python to call: with infinity or NaN where it would raise
    ZeroDivisionError, OverflowError or a "math domain error", and NaN instead of complex numbers.

    The function is then computed again with numpy's numbers, and numpy's functions for those of
    `math`. Errors of its own it raises as before.
    """
    again = _with_numpy(fn)
    if again is None:
        return fn

    @functools.wraps(fn)
    def call(*numbers: float) -> float:
        try:
            result = fn(*numbers)
        except (ArithmeticError, TypeError, ValueError):
            return again(*numbers)
        return again(*numbers) if isinstance(result, complex) else result

    return call


def _with_numpy(fn: Callable[..., Any]) -> Callable[..., float] | None:
    """`fn` computed with numpy; None if it is not a Python function."""
    plain: Any = getattr(fn, "py_func", fn)  # of one that numba has compiled
    if isinstance(plain, FunctionType):
        scope = {k: _MATH if v is math else v for k, v in plain.__globals__.items()}
        twin: Any = FunctionType(
            plain.__code__, scope, plain.__name__, plain.__defaults__, plain.__closure__
        )
    elif isinstance(plain, BuiltinFunctionType) and plain in vars(math).values():
        twin = getattr(_MATH, plain.__name__)
    else:
        return None

    @quiet
    def again(*numbers: float) -> float:
        return float(twin(*(np.float64(x) for x in numbers)))

    return again
