"""Arrays of other libraries as tensors, and attention for them: PyTorch's and CuPy's users can call
the kernels on their own arrays.

    out = minitorch.flash_attention(q, k, v, is_causal=True)  # torch tensors in, a torch tensor out
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from .. import attention
from ..arguments import type_name
from ..dtypes import FLOAT_DTYPES, HALF_DTYPES
from ..kernels.gpu.runtime import SIMULATED, cuda, on_stream
from ..tensor import Tensor
from ..tensor_data import TensorData
from ..tensor_ops import TensorBackend
from .arrays import LEGACY_STREAM, default_backend, import_array


def as_tensor(x: Any, backend: TensorBackend | None = None) -> Tensor:
    """A constant tensor that shares the memory of an array of another library.

    Work on the two is ordered: on the GPU, the current stream waits for the array's. The array's
    library must not write into it while an operation of ours may still read. A copy is made where
    memory cannot be shared: of a numpy array that is read-only, runs backwards or has the other
    byte order, and of a torch tensor whose sign PyTorch keeps aside (`is_neg()`).

    Args:
        x: has `__dlpack__` (PyTorch, CuPy, JAX, numpy) or `__cuda_array_interface__` (numba), and
            float32 or float64, on the GPU also float16 or bfloat16. A Tensor is returned as it is,
            or moved.
        backend: of the tensor, where the array is; CudaKernelOps or FastOps if not given.

    Raises:
        TypeError: `x` is no array, or has another dtype.
        ValueError: the array is on a device that the backend does not compute on, has negative
            strides there, or its library does not give its memory away, as PyTorch does for a
            tensor that requires a gradient.

    """
    if isinstance(x, Tensor):
        return x if backend is None else x.to(backend)
    if isinstance(x, np.ndarray) and not x.flags.writeable:
        x = x.copy()  # or an optimiser would write into it
    return imported(x, backend=backend)


def from_dlpack(x: Any, backend: TensorBackend | None = None) -> Tensor:
    """`as_tensor` for objects with `__dlpack__`, under the name of the array API standard.

    Raises:
        TypeError: `x` has no DLPack, or another dtype.
        ValueError: see `as_tensor`.

    """
    if not hasattr(x, "__dlpack__"):
        raise TypeError(f"x must have __dlpack__, got {type_name(x)}")
    return as_tensor(x, backend)


def imported(x: Any, name: str = "x", backend: TensorBackend | None = None) -> Tensor:
    """`as_tensor` for an array that nobody will write to: also a read-only one is shared. Errors
    call it by `name`.
    """
    return _tensor(import_array(x, name=name), backend)


def _tensor(data: TensorData, backend: TensorBackend | None) -> Tensor:
    # In the simulator the device's memory is the host's, and a backend of the GPU may have either.
    if SIMULATED and backend is not None and backend.cuda and not data.on_device:
        return Tensor(data, backend=backend)
    backend = default_backend(data.on_device) if backend is None else backend
    if backend.cuda != data.on_device:
        raise ValueError(
            f"the array is on the {'GPU' if data.on_device else 'CPU'}, where {backend} does not "
            "compute: leave the backend out, and move the tensor with .to(backend)"
        )
    return Tensor(data, backend=backend)


# ----- attention -----

_OPTIONS = tuple(inspect.signature(attention.flash_attention).parameters)[3:]


def flash_attention(query: Any, key: Any, value: Any, **options: Any) -> Any:
    """`Tensor.flash_attention`, for tensors and for arrays of other libraries.

    For torch tensors this is an operation of PyTorch. Those that require a gradient get it, from
    our backward pass, also under `create_graph=True`, checkpointing, `torch.func` and `vmap`; a
    second derivative and forward mode raise RuntimeError. Dropout without a `seed` draws one from
    PyTorch's generator of the device. `torch.compile` breaks its graph around the call. Inside
    `torch.autocast` the dtypes stay what they are. Torch tensors that a `score_mod` reads get
    gradients, too; functions that were written for PyTorch's flex_attention are taken if they use
    operators and numpy's functions, and so is its BlockMask, which is copied in each call. Under
    `vmap` a call with functions is computed sample by sample.

    Args:
        query: a Tensor; or an array of PyTorch, CuPy, numpy or another library with DLPack, on the
            GPU or on the CPU. It is used where it is, without a copy, on its library's stream;
            numpy's are copied if they run backwards or have the other byte order.
        key: of the same kind.
        value: of the same kind.
        options: see `minitorch.attention.flash_attention`. `attn_mask` may be an array of the same
            library or of numpy, bool or float.

    Returns:
        What `minitorch.attention.flash_attention` returns, for arrays as arrays of their library.

    Raises:
        ValueError: shapes, devices, mask or options that do not fit together.
        TypeError: dtypes that differ or are none of ours, or not arrays.

    """
    for name in options:
        if name not in _OPTIONS:
            raise TypeError(f"flash_attention has no option {name}; it has {', '.join(_OPTIONS)}")
    if isinstance(query, Tensor):
        return attention.flash_attention(query, key, value, **options)
    library = _library(query)
    if library == "torch":
        from . import torch_attention

        return torch_attention.flash_attention(query, key, value, **options)
    for name, given in (("query", query), ("key", key), ("value", value)):
        if not _is_array(given):
            raise TypeError(
                f"{name} must be a minitorch.Tensor or an array of torch, numpy or another library "
                f"with DLPack, got {type_name(given)}: minitorch.tensor takes numbers and lists"
            )
        if _library(given) != library:
            raise TypeError(
                "query, key and value must be arrays of one library, got a query of "
                f"{library} and a {name} of {_library(given)}"
            )
    with stream_of(query, library):
        mask = mask_from(options.pop("attn_mask", None))
        q, k, v = (
            imported(x, name) for name, x in (("query", query), ("key", key), ("value", value))
        )
        out = attention.flash_attention(q, k, v, attn_mask=mask, **options)
        if isinstance(out, tuple):
            return tuple(_as_array_of(query, library, x) for x in out)
        return _as_array_of(query, library, out)


def _is_array(x: Any) -> bool:
    return hasattr(x, "__dlpack__") or hasattr(x, "__cuda_array_interface__")


def _library(x: Any) -> str:
    """The name of the package that an array is of, which a subclass of its type is, too."""
    torch = sys.modules.get("torch")
    if isinstance(x, getattr(torch, "Tensor", ())):
        return "torch"
    return "numpy" if isinstance(x, np.ndarray) else type(x).__module__.split(".")[0]


@contextmanager
def stream_of(x: Any, library: str) -> Iterator[None]:
    """Compute on the stream on which the array's library computes."""
    stream = 0
    if library == "torch":
        if x.is_cuda:
            stream = sys.modules["torch"].cuda.current_stream(x.device).cuda_stream
    elif hasattr(x, "__cuda_array_interface__"):
        stream = x.__cuda_array_interface__.get("stream") or 0
    if SIMULATED or stream in (0, LEGACY_STREAM):
        yield
    else:
        with on_stream(cuda.external_stream(stream)):
            yield


def _as_array_of(like: Any, library: str, tensor: Tensor) -> Any:
    """The tensor as an array of the library that `like` comes from, without a copy."""
    if isinstance(like, np.ndarray):
        return tensor.numpy()
    from_dlpack = getattr(sys.modules[library], "from_dlpack", None)
    if from_dlpack is None and hasattr(like, "__array_namespace__"):
        from_dlpack = like.__array_namespace__().from_dlpack
    if from_dlpack is not None:
        return from_dlpack(tensor)
    return cuda.as_cuda_array(tensor)


def mask_from(mask: Any) -> Any:
    """A mask of another library as attention takes it: bool as bare elements, float as a Tensor;
    None, numpy's and a Tensor as they are.

    Raises:
        TypeError: it is no array, or neither bool nor one of our floats.
        ValueError: it is where we do not compute.

    """
    if mask is None or isinstance(mask, Tensor | np.ndarray):
        return mask
    if not _is_array(mask):
        raise TypeError(
            f"attn_mask must be an array of bool or float, or a minitorch.Tensor, got "
            f"{type_name(mask)}"
        )
    data = import_array(mask, (np.dtype(np.bool_), *FLOAT_DTYPES, *HALF_DTYPES), "attn_mask")
    if data.dtype == np.bool_:
        return data if data.on_device else data.array
    return _tensor(data, None)
