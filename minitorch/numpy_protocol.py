"""Tensors beside numpy's arrays: what an operator takes, and what numpy's own functions do.

    np.float64(2) * t    array @ t    array < t    np.exp(t)

are tensors with their graph: numpy hands them to `array_ufunc`, which calls the operator or the
method of the same meaning. Where there is none, TypeError is raised, since an array that has lost
the graph would come out. `t.to_numpy()` and `np.asarray(t)` say that just this is meant.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from .arguments import as_array, as_number, tensor_class
from .autodiff import is_grad_enabled
from .dtypes import FLOAT_DTYPES, arithmetic_dtype

if TYPE_CHECKING:
    from .tensor import Tensor

    Array = npt.NDArray[Any]


def plain_operand(b: Any, dtype: np.dtype[Any]) -> float | Array:
    """What stands beside a tensor in an operator: a number as a Python float, or an array as a copy
    of floats, since a graph will hold it.

    Args:
        b: what was given.
        dtype: of an array that is neither float32 nor float64.

    Raises:
        TypeError: it is neither.

    """
    if isinstance(b, np.ndarray) and b.ndim > 0:
        array = as_array(b, "b")
        return array.astype(array.dtype if array.dtype in FLOAT_DTYPES else dtype)
    return as_number(b, "b", "a number, an array or a Tensor")


def array(
    self: Tensor, dtype: npt.DTypeLike | None = None, copy: bool | None = None
) -> npt.NDArray[Any]:
    """The elements for `np.asarray`, which share this tensor's memory if that is on the CPU."""
    data = self._tensor
    if not data.on_device:
        return np.array(data.array, dtype=dtype, copy=copy)
    if copy is False:
        raise ValueError("a tensor on the GPU becomes a numpy array by a copy only")
    return np.asarray(data.to_numpy(), dtype)


# ----- functions of elements -----

_UFUNCS: dict[np.ufunc, Callable[..., Tensor]] = {
    np.add: operator.add,
    np.subtract: operator.sub,
    np.multiply: operator.mul,
    np.divide: operator.truediv,
    np.power: operator.pow,
    np.float_power: operator.pow,
    np.matmul: operator.matmul,
    np.less: operator.lt,
    np.less_equal: operator.le,
    np.greater: operator.gt,
    np.greater_equal: operator.ge,
    np.equal: operator.eq,
    np.not_equal: operator.ne,
    np.positive: lambda t: t,
    np.negative: operator.neg,
    np.reciprocal: lambda t: 1.0 / t,
    np.square: lambda t: t * t,
    np.sqrt: lambda t: t**0.5,
    np.exp: lambda t: t.exp(),
    np.tanh: lambda t: t.tanh(),
}


def array_ufunc(self: Tensor, ufunc: np.ufunc, method: str, *inputs: Any, **options: Any) -> Tensor:
    """`ufunc(*inputs)` where one of the inputs is a tensor, as a tensor.

    Raises:
        TypeError: it has no counterpart here, or options of numpy are given.

    """
    name = f"numpy.{ufunc.__name__}" + ("" if method == "__call__" else f".{method}")
    if options.get("out") is not None:
        raise TypeError(
            f"{name} cannot write into an array what a Tensor is part of: "
            "write a = a + t in place of a += t or out=a"
        )
    run = _UFUNCS.get(ufunc) if method == "__call__" else None
    if run is None or options:
        what = f" with {', '.join(options)}" if run is not None else ""
        log = " (Tensor.log() is log(x + 1e-6), as MiniTorch has it)" if ufunc is np.log else ""
        raise TypeError(
            f"{name}{what} has no counterpart here that keeps the graph{log}: "
            "use the methods of Tensor, or t.to_numpy() for the values"
        )
    return run(*(_operand(self, x) for x in inputs))


def _operand(like: Tensor, x: Any) -> Any:
    """A tensor or a number that numpy has no say about."""
    if isinstance(x, tensor_class()):
        return x
    value = plain_operand(x, arithmetic_dtype(like.dtype))
    return value if isinstance(value, float) else like._from_numpy(value)


# ----- other functions -----

_ONLY_THE_SHAPE = (np.zeros_like, np.ones_like, np.empty_like, np.full_like)


def array_function(
    self: Tensor,
    func: Callable[..., Any],
    types: Any,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
) -> Any:
    """`func(*args, **kwargs)` of the arrays that the tensors hold, if no graph is lost by that:
    no tensor wants a gradient, or no floats come out, as from `np.array_equal`.

    Raises:
        TypeError: a graph would be lost.

    """
    tracked = is_grad_enabled() and any(t.requires_grad() for t in _tensors((args, kwargs)))
    out = func(*_with_arrays(args), **_with_arrays(kwargs))
    if tracked and func not in _ONLY_THE_SHAPE and _has_floats(out):
        raise TypeError(
            f"{func.__module__}.{func.__name__} would lose the graph of a Tensor that wants a "
            "gradient: use the methods of Tensor, or t.to_numpy() for the values"
        )
    return out


def _tensors(value: Any) -> Iterator[Tensor]:
    """The tensors in nested tuples, lists and dictionaries."""
    if isinstance(value, tensor_class()):
        yield value
    elif isinstance(value, tuple | list | dict):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _tensors(part)


def _with_arrays(value: Any) -> Any:
    """The same with arrays in place of tensors."""
    if isinstance(value, tensor_class()):
        return np.asarray(value)
    if isinstance(value, dict):
        return {key: _with_arrays(part) for key, part in value.items()}
    if type(value) in (tuple, list):
        return type(value)(_with_arrays(part) for part in value)
    return value


def _has_floats(value: Any) -> bool:
    """Whether floats are among what a function returned."""
    if isinstance(value, tuple | list):
        return any(_has_floats(part) for part in value)
    if isinstance(value, np.ndarray | np.generic):
        return value.dtype.kind in "fcOV"
    return isinstance(value, float)
