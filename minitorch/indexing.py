"""What stands in the brackets of `x[...]`: reading a number or a view, writing one element."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from .arguments import as_ints
from .autodiff import is_grad_enabled
from .movement_functions import Slice

if TYPE_CHECKING:
    from .tensor import Tensor


def get_item(self: Tensor, key: Any) -> Any:
    """A number for a full index of whole numbers; a tensor (differentiable, no copy) for slices
    and partial indices.

    Raises:
        TypeError: something else than whole numbers, slices, None and `...`.
        IndexingError: the index does not fit the shape.

    """
    full = key if isinstance(key, tuple) else (key,)
    if len(full) == self.dims and all(type(i) is int or isinstance(i, np.integer) for i in full):
        return self._tensor.get(_count_from_start(as_ints(full, "index"), self.shape))
    return Slice.apply(self, full)


def set_item(self: Tensor, key: int | Sequence[int], val: float) -> None:
    """Change one element in place; a graph knows nothing of it.

    Raises:
        TypeError: the index holds something else than whole numbers, or `val` is no number, or a
            Tensor whose graph would be lost.
        IndexingError: the index does not fit the shape.

    """
    if isinstance(val, type(self)) and val.requires_grad() and is_grad_enabled():
        raise TypeError(
            "val is a Tensor that wants a gradient, and an element that is set has none: "
            "give its value, val.item()"
        )
    self._tensor.set(_count_from_start(as_ints(key, "index"), self.shape), val)


def _count_from_start(index: tuple[int, ...], shape: tuple[int, ...]) -> tuple[int, ...]:
    """An index in which negative numbers, which count from the end, have been replaced."""
    if len(index) != len(shape):
        return index
    return tuple(i + n if -n <= i < 0 else i for i, n in zip(index, shape, strict=True))
