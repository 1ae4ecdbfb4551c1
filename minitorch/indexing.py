"""What stands in the brackets of `x[...]`: reading a number or a view, writing one element."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from .arguments import as_int, as_ints, given
from .movement_functions import Slice
from .tensor_data import IndexingError

if TYPE_CHECKING:
    from .tensor import Tensor


def get_item(self: Tensor, key: Any) -> Any:
    """A number for a full index of whole numbers; a tensor (differentiable, no copy) for slices
    and partial indices.

    Raises:
        TypeError: something else than whole numbers, slices, None and `...`.
        IndexingError: the index does not fit the shape.

    """
    full = check_key(key)
    if len(full) == self.dims and all(isinstance(i, int) for i in full):
        return self._tensor.get(_count_from_start(full, self.shape))
    try:
        return Slice.apply(self, full)
    except IndexError as error:
        raise IndexingError(f"index {key} does not fit shape {self.shape}: {error}") from None


def set_item(self: Tensor, key: int | Sequence[int], val: float) -> None:
    """Change one element in place; a graph knows nothing of it.

    Raises:
        TypeError: the index holds something else than whole numbers, or `val` is no number.
        IndexingError: the index does not fit the shape.

    """
    self._tensor.set(_count_from_start(as_ints(key, "index"), self.shape), val)


def _count_from_start(index: tuple[int, ...], shape: tuple[int, ...]) -> tuple[int, ...]:
    """An index in which negative numbers, which count from the end, have been replaced."""
    if len(index) != len(shape):
        return index
    return tuple(i + n if -n <= i < 0 else i for i, n in zip(index, shape, strict=True))


def check_key(key: Any) -> tuple[Any, ...]:
    """What stands in the brackets of `x[...]`, as a tuple of whole numbers, slices, None and `...`.

    Raises:
        TypeError: something else is among it.
        ValueError: a slice whose step is 0.

    """
    found: list[Any] = []
    for part in key if isinstance(key, tuple) else (key,):
        if isinstance(part, slice):
            ends = (part.start, part.stop, part.step)
            part = slice(*(None if n is None else as_int(n, "an end of a slice") for n in ends))
            if part.step == 0:
                raise ValueError("the step of a slice must not be 0")
        elif not (part is None or part is Ellipsis):
            if isinstance(part, bool) or not hasattr(part, "__index__") or np.ndim(part):
                raise TypeError(
                    f"an index may hold whole numbers, slices, None and ..., got {given(part)}"
                )
            part = as_int(part, "an index")
        found.append(part)
    return tuple(found)
