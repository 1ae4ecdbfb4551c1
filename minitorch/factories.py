"""How tensors are made: from lists, from numpy arrays, from random numbers.

As in MiniTorch, `tensor` and `rand` give leaves that collect a gradient unless told otherwise;
`zeros` and `ones` give constants.
"""

from __future__ import annotations

from math import prod
from typing import Any

import numpy as np
import numpy.typing as npt

from .arguments import as_array, as_shape
from .autodiff import is_grad_enabled
from .dtypes import check_dtype, get_default_dtype
from .rng import uniform
from .tensor import Tensor
from .tensor_data import Storage, TensorData, UserShape
from .tensor_ops import SimpleBackend, TensorBackend

__all__ = [
    "_tensor",
    "ones",
    "ones_tensor_from_numpy",
    "rand",
    "tensor",
    "tensor_from_numpy",
    "zeros",
    "zeros_tensor_from_numpy",
]


def _leaf(data: TensorData, backend: TensorBackend, requires_grad: bool) -> Tensor:
    out = Tensor(data, backend=backend)
    out.requires_grad_(requires_grad)
    return out


def _check_backend(backend: Any) -> None:
    if not isinstance(backend, TensorBackend):
        raise TypeError(f"backend must be a TensorBackend, got {backend!r}")


def _dtype(dtype: npt.DTypeLike | None, backend: TensorBackend) -> np.dtype[Any]:
    _check_backend(backend)
    return get_default_dtype() if dtype is None else check_dtype(dtype, backend.cuda)


def zeros(
    shape: UserShape,
    backend: TensorBackend = SimpleBackend,
    requires_grad: bool = False,
    dtype: npt.DTypeLike | None = None,
) -> Tensor:
    """Zeros of `shape`."""
    wanted = _dtype(dtype, backend)
    data = backend.ops.full(as_shape(shape), 0.0, wanted)
    return _leaf(data, backend, requires_grad)


def ones(
    shape: UserShape,
    backend: TensorBackend = SimpleBackend,
    requires_grad: bool = False,
    dtype: npt.DTypeLike | None = None,
) -> Tensor:
    """Ones of `shape`."""
    wanted = _dtype(dtype, backend)
    data = backend.ops.full(as_shape(shape), 1.0, wanted)
    return _leaf(data, backend, requires_grad)


def rand(
    shape: UserShape,
    backend: TensorBackend = SimpleBackend,
    requires_grad: bool | None = None,
    dtype: npt.DTypeLike | None = None,
) -> Tensor:
    """Uniform numbers in [0, 1), those of one `random.random()` an element in row-major order."""
    wanted = as_shape(shape)
    values = uniform(prod(wanted), _dtype(dtype, backend))
    data = backend.ops.from_numpy(values.reshape(wanted))
    return _leaf(data, backend, requires_grad is not False)


def _tensor(
    ls: Any,
    shape: UserShape,
    backend: TensorBackend = SimpleBackend,
    requires_grad: bool | None = None,
) -> Tensor:
    """A tensor of `shape` from a flat list or storage."""
    _check_backend(backend)
    return _leaf(TensorData(ls, as_shape(shape)), backend, requires_grad is not False)


def tensor(
    ls: Any,
    backend: TensorBackend = SimpleBackend,
    requires_grad: bool | None = None,
    dtype: npt.DTypeLike | None = None,
) -> Tensor:
    """A tensor from a number, nested lists or an array; the values are copied.

    Args:
        ls: float32 and float64 arrays keep their dtype (on the GPU float16 and bfloat16 too), all
            else becomes the default dtype.
        backend: its operations.
        requires_grad: None or True: a leaf that collects a gradient; False: a constant.
        dtype: float32 or float64, on the GPU also float16 or bfloat16, in place of the rule above.

    Raises:
        ValueError: lists of different lengths, masked elements, or numbers beyond a float.
        TypeError: elements that are no real numbers (complex, None, strings), or Tensors that want
            a gradient; another `dtype` or `backend`.

    """
    wanted = _dtype(dtype, backend)
    if is_grad_enabled() and _wants_gradient(ls):
        raise TypeError(
            "ls holds a Tensor that wants a gradient, whose graph a copy of values would lose: "
            "compute with it instead, or give its values, t.detach() or t.to_numpy()"
        )
    array = as_array(ls, "ls")
    if dtype is not None or not hasattr(ls, "__array__"):
        array = array.astype(wanted)
    data = backend.ops.from_numpy(np.array(array, order="C"))
    return _leaf(data, backend, requires_grad is not False)


def _wants_gradient(values: Any) -> bool:
    """Whether a tensor wants a gradient, or one in nested lists does."""
    if isinstance(values, Tensor):
        return values.requires_grad()
    if not isinstance(values, list | tuple):
        return False
    return any(_wants_gradient(x) for x in values if isinstance(x, Tensor | list | tuple))


def tensor_from_numpy(
    ls: Storage, backend: TensorBackend = SimpleBackend, requires_grad: bool = False
) -> Tensor:
    """A contiguous copy of an array: float32 and float64 keep their dtype, all else becomes the
    default one. Errors are those of `tensor`.
    """
    _check_backend(backend)
    data = backend.ops.from_numpy(np.array(as_array(ls, "ls"), order="C"))
    return _leaf(data, backend, requires_grad)


def zeros_tensor_from_numpy(shape: UserShape, backend: TensorBackend = SimpleBackend) -> Tensor:
    """`zeros`, under the transformer course's name."""
    return zeros(shape, backend)


def ones_tensor_from_numpy(shape: UserShape, backend: TensorBackend = SimpleBackend) -> Tensor:
    """`ones`, under the transformer course's name."""
    return ones(shape, backend)
