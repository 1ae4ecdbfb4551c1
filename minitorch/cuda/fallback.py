"""Fused operations without a GPU kernel: copied to the host, computed by `FusedOps`, copied back.

This makes a backend complete that has map, zip, reduce and a matrix product only, as `CudaOps` of
MiniTorch's third module; each such call waits for the GPU and crosses the bus twice. A backend with
kernels overrides them all.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from ..dtypes import HALF_DTYPES
from ..fused_checks import guard
from ..fused_ops import FusedOps
from ..tensor_data import TensorData
from ..tensor_ops import TensorOps
from .storage import CudaStorageOps

# What an operation changes in place: names of arguments whose values are copied back.
IN_PLACE = {"adamw_step": (0, 2, 3)}


def _array(data: TensorData) -> npt.NDArray[Any]:
    """A copy on the host; 16-bit numbers as float32, in which numpy computes well."""
    array = data.to_numpy()
    return array.astype(np.float32) if array.dtype in HALF_DTYPES else array


def _to_host(x: Any) -> Any:
    """A tensor as one on the host, a mask as an array, all else as it is."""
    if isinstance(x, TensorData):
        return _array(x)
    if hasattr(x, "_tensor"):
        return type(x)(TensorData.from_array(_array(x._tensor)))
    return x


def _to_device(x: Any, like: Any) -> Any:
    """A result of FusedOps as tensors on the backend and in the dtype of `like`."""
    if isinstance(x, tuple):
        return tuple(_to_device(item, like) for item in x)
    if not hasattr(x, "_tensor"):
        return x
    array = x.to_numpy()
    return like._from_numpy(array.astype(like.dtype) if like.dtype in HALF_DTYPES else array)


def on_host(name: str) -> Callable[..., Any]:
    """The operation `name` of TensorOps, for tensors on the GPU."""
    compute = getattr(TensorOps, name)

    def apply(*args: Any, **options: Any) -> Any:
        host = [_to_host(x) for x in args]
        result = compute(*host, **{key: _to_host(x) for key, x in options.items()})
        for number in IN_PLACE.get(name, ()):
            changed = host[number].to_numpy().astype(args[number].dtype)
            args[number]._tensor._storage.copy_from_host(changed)
        # Embedding takes its dtype from the weights, everything else from its first tensor.
        like = args[1] if name == "embedding_forward" else args[0]
        return _to_device(result, like)

    apply.__name__ = name
    apply.__doc__ = f"See `TensorOps.{name}`; on the host."
    return apply


class CudaFallbackOps(CudaStorageOps):
    """Every fused operation of `FusedOps`, and dropout, by the host."""


for _name in (*vars(FusedOps), "dropout_forward", "dropout_backward"):
    if not _name.startswith("_"):
        setattr(CudaFallbackOps, _name, staticmethod(on_host(_name)))
guard(CudaFallbackOps)

__all__ = ["CudaFallbackOps"]
