"""Moving elements on the GPU: copies, casts, pieces cut out and put together. No arithmetic."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache, reduce
from typing import TYPE_CHECKING, Any

import numpy as np

from ..dtypes import promote
from ..kernels.copy_cuda import copy_into
from ..kernels.elementwise_cuda import zip_into
from ..kernels.gpu.runtime import precision
from ..tensor_data import TensorData
from .fallback import CudaFallbackOps
from .views import dtype_name, view_of

if TYPE_CHECKING:
    from ..tensor import Tensor


class CudaMovementOps(CudaFallbackOps):
    """See `StorageOps`, of which these are the kernels."""

    @classmethod
    def cast(cls, a: Tensor, dtype: np.dtype[Any]) -> Tensor:
        """See `StorageOps.cast`."""
        out = cls.empty(a.shape, dtype)
        copy_into(view_of(out), view_of(a._tensor))
        return a._new(out)

    @staticmethod
    def copy_into(target: Tensor, source: Tensor) -> None:
        """See `StorageOps.copy_into`."""
        copy_into(view_of(target._tensor), view_of(source._tensor))

    @classmethod
    def slice_backward(cls, grad: Tensor, key: Any, shape: tuple[int, ...]) -> Tensor:
        """See `StorageOps.slice_backward`; a key with a negative step goes through the host."""
        keys = key if isinstance(key, tuple) else (key,)
        if any(isinstance(part, slice) and (part.step or 1) < 0 for part in keys):
            host = np.zeros(shape, grad.dtype)
            host[key] = grad.to_numpy()
            return grad._from_numpy(host)
        out = cls.full(shape, 0.0, grad.dtype)
        copy_into(view_of(out.slice(key)), view_of(grad._tensor))
        return grad._new(out)

    @classmethod
    def concatenate(cls, parts: Sequence[Tensor], dim: int) -> Tensor:
        """See `StorageOps.concatenate`; parts of several dtypes become the widest.

        Raises:
            ValueError: the parts differ in more than the size of `dim`.

        """
        first = parts[0]
        dim %= first.dims
        rest = (*first.shape[:dim], *first.shape[dim + 1 :])
        for part in parts[1:]:
            if (*part.shape[:dim], *part.shape[dim + 1 :]) != rest or part.dims != first.dims:
                raise ValueError(
                    f"concatenate: {first.shape} and {part.shape} must agree in all dimensions "
                    f"but {dim}"
                )
        length = sum(part.shape[dim] for part in parts)
        dtype = reduce(promote, (part.dtype for part in parts))
        out = cls.empty((*first.shape[:dim], length, *first.shape[dim + 1 :]), dtype)
        start = 0
        for part in parts:
            place = (slice(None),) * dim + (slice(start, start + part.shape[dim]),)
            copy_into(view_of(out.slice(place)), view_of(part._tensor))
            start += part.shape[dim]
        return first._new(out)

    @classmethod
    def masked_fill(cls, a: Tensor, mask: Any, value: float) -> Tensor:
        """See `StorageOps.masked_fill`."""
        masked: TensorData = cls.attention_mask(mask)
        out = cls.empty(a.shape, a.dtype)
        fill = _fill_function(float(value), dtype_name(a.dtype))
        zip_into(fill, view_of(out), view_of(a._tensor), view_of(masked))
        return a._new(out)


@cache
def _fill_function(value: float, dtype: str) -> Callable[[Any, Any], Any]:
    """The scalar function that gives `value` where the mask is not 0."""
    number = precision(dtype).real(value)

    def fill(x: Any, masked: Any) -> Any:
        return number if masked else x

    return fill


__all__ = ["CudaMovementOps"]
