"""How a backend makes and moves elements: new storage, views, casts, pieces put together.

Written for numpy, and inherited by every backend of the CPU; a backend of the GPU overrides what
touches elements. Functions call these through their tensor's backend, so that no function asks
where a tensor lives.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from .dtypes import HALF_DTYPES, rounded
from .fused_checks import guard
from .ieee import quiet
from .kernels.philox import vector_dropout_mask
from .tensor_data import TensorData, strides_from_shape

if TYPE_CHECKING:
    from .tensor import Tensor

    Array = npt.NDArray[Any]


def host(tensor: Tensor) -> Array:
    """The elements here, as numpy computes with them: those of the CPU themselves, of the GPU a
    copy, 16-bit numbers as float32.
    """
    data = tensor._tensor
    return copied_to_host(data) if data.on_device else data.array


def copied_to_host(data: TensorData) -> Array:
    """A copy of the elements here, 16-bit numbers as float32."""
    array = data.to_numpy()
    return array.astype(np.float32) if array.dtype in HALF_DTYPES else array


def like(tensor: Tensor, array: Array) -> Tensor:
    """A constant tensor of `array`, made row-major, on the backend of `tensor`; of 16 bits as that
    is.
    """
    if tensor._tensor.on_device and tensor.dtype in HALF_DTYPES:
        array = array.astype(tensor.dtype)
    return tensor._from_numpy(np.asarray(array, order="C"))


class StorageOps:
    """Making and moving elements. Tensors in, constant tensors out."""

    # ----- new storage -----

    @staticmethod
    def from_numpy(array: Array) -> TensorData:
        """The elements of a numpy array where this backend computes; shared if that is here."""
        return TensorData.from_array(array)

    @staticmethod
    def placed(data: TensorData) -> TensorData:
        """Elements that are elsewhere, copied to where this backend computes. To the CPU float16
        and bfloat16 come as float32.
        """
        return TensorData.from_array(copied_to_host(data))

    @staticmethod
    def empty(shape: tuple[int, ...], dtype: np.dtype[Any]) -> TensorData:
        """Contiguous elements that are not set."""
        return TensorData._of(np.empty(prod(shape), dtype), shape, strides_from_shape(shape))

    @staticmethod
    def full(shape: tuple[int, ...], value: float, dtype: np.dtype[Any]) -> TensorData:
        """Contiguous elements that are all `value`."""
        size = prod(shape)
        storage = np.full(size, rounded(value, dtype), dtype) if value else np.zeros(size, dtype)
        return TensorData._of(storage, shape, strides_from_shape(shape))

    @staticmethod
    def constant(value: float, dtype: np.dtype[Any]) -> TensorData:
        """A number as an operand, of shape (1,). It may be shared: nobody may write into it."""
        return TensorData._of(np.array([rounded(value, dtype)], dtype), (1,), (1,))

    # ----- views -----

    @staticmethod
    def slice(a: Tensor, key: Any) -> Tensor:
        """Basic indexing: a view of part of the tensor."""
        return a._new(a._tensor.slice(key))

    @staticmethod
    def broadcast_to(a: Tensor, shape: tuple[int, ...]) -> Tensor:
        """A view that repeats the tensor to `shape`."""
        return a._new(a._tensor.broadcast_to(shape))

    # ----- copies -----

    @staticmethod
    def slice_backward(grad: Tensor, key: Any, shape: tuple[int, ...]) -> Tensor:
        """Zeros of `shape`, with `grad` where `key` points."""
        out = np.zeros(shape, grad.dtype)
        out[key] = grad._tensor.array
        return like(grad, out)

    @staticmethod
    def copy_into(target: Tensor, source: Tensor) -> None:
        """Overwrite the elements of `target`, of any strides, by those of `source` of its shape."""
        target._tensor.array[...] = source._tensor.array

    @staticmethod
    @quiet
    def cast(a: Tensor, dtype: np.dtype[Any]) -> Tensor:
        """A contiguous copy in a dtype, which may be the same, rounded to the nearest."""
        return a._new(TensorData.from_array(a._tensor.array.astype(dtype, order="C")))

    @staticmethod
    def concatenate(parts: Sequence[Tensor], dim: int) -> Tensor:
        """Tensors joined along a dimension."""
        return like(parts[0], np.concatenate([part._tensor.array for part in parts], dim))

    @staticmethod
    def masked_fill(a: Tensor, mask: Any, value: float) -> Tensor:
        """`value` where `mask` (of `attention_mask`, bool, broadcasts to the tensor) is True, the
        tensor elsewhere.
        """
        return like(a, np.where(mask, a.dtype.type(value), a._tensor.array))

    @staticmethod
    def band_fill(a: Tensor, lower: int, upper: int, value: float) -> Tensor:
        """`value` in column j of row i (the last two dimensions) unless
        i + lower <= j < i + upper, the tensor elsewhere.
        """
        rows, columns = a.shape[-2:]
        row, column = np.arange(rows)[:, None], np.arange(columns)
        inside = (column >= row + lower) & (column < row + upper)
        return like(a, np.where(inside, a._tensor.array, a.dtype.type(value)))

    @staticmethod
    def attention_mask(mask: Any) -> Any:
        """The mask of an attention, bool or added to the scores, as this backend's kernels take it:
        here a numpy array, on the GPU a TensorData whose elements are there.
        """
        return mask._tensor.array if hasattr(mask, "_tensor") else mask

    # ----- dropout: y = x / (1 - p) where kept, else 0 -----

    @staticmethod
    def dropout_forward(x: Tensor, p: float, seed: int) -> Tensor:
        """Elements dropped with probability `p`, the others divided by 1 - p.

        The mask is `kernels.philox.vector_dropout_mask`, the same on every device.
        """
        a, kept = host(x), vector_dropout_mask(x.size, p, seed).reshape(x.shape)
        factor = a.dtype.type(0 if p == 1 else 1 / (1 - p))
        return like(x, np.where(kept, a * factor, a.dtype.type(0)))

    @classmethod
    def dropout_backward(cls, grad: Tensor, p: float, seed: int) -> Tensor:
        """The same mask and factor, on the gradient."""
        return cls.dropout_forward(grad, p, seed)

    # ----- checks -----

    @staticmethod
    @quiet
    def check_class_numbers(ids: Tensor, num_classes: int, name: str) -> None:
        """Check that a tensor holds whole numbers from 0 to num_classes - 1.

        Raises:
            ValueError: it does not; `name` is named. A backend of the GPU, where looking would make
                the program wait, leaves that to the kernel which uses the numbers, and the error
                comes when something is next copied from the GPU.

        """
        values = host(ids)
        with np.errstate(invalid="ignore"):  # NaN becomes some number, which is not equal to it
            whole = values.astype(np.int64)
        wrong = (whole != values) | (whole < 0) | (whole >= num_classes)
        if wrong.any():
            raise ValueError(
                f"{name} must hold whole numbers from 0 to {num_classes - 1}, "
                f"got {values[wrong][0]:g}"
            )


guard(StorageOps)
