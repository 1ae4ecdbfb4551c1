"""Arrays of other libraries as tensors, and attention for them: PyTorch's and CuPy's users can call
the kernels on their own arrays.

    out = minitorch.flash_attention(q, k, v, is_causal=True)  # torch tensors in, a torch tensor out
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import numpy as np

from . import attention
from .autodiff import Context
from .interop import LEGACY_STREAM, data_from_dlpack, default_backend, import_array
from .kernels.runtime import SIMULATED, cuda, on_stream
from .tensor import Tensor
from .tensor_data import TensorData
from .tensor_functions import FlashAttention
from .tensor_ops import TensorBackend


def as_tensor(x: Any, backend: TensorBackend | None = None) -> Tensor:
    """A constant tensor that shares the memory of an array of another library.

    Work on the two is ordered: on the GPU, the current stream waits for the array's. The array's
    library must not write into it while an operation of ours may still read.

    Args:
        x: has `__dlpack__` (PyTorch, CuPy, JAX, numpy) or `__cuda_array_interface__` (numba), and
            float32 or float64, on the GPU also float16 or bfloat16. A Tensor is returned as it is,
            or moved.
        backend: of the tensor, where the array is; CudaKernelOps or FastOps if not given.

    Raises:
        TypeError: `x` is no array, or has another dtype.
        ValueError: the array is on a device that the backend does not compute on, or has negative
            strides.

    """
    if isinstance(x, Tensor):
        return x if backend is None else x.to(backend)
    return _tensor(import_array(x), backend)


def from_dlpack(x: Any, backend: TensorBackend | None = None) -> Tensor:
    """`as_tensor` for objects with `__dlpack__`, under the name of the array API standard.

    Raises:
        TypeError: `x` has no DLPack, or another dtype.
        ValueError: see `as_tensor`.

    """
    if not hasattr(x, "__dlpack__"):
        raise TypeError(f"x must have __dlpack__, got {type(x).__name__}")
    return _tensor(import_array(x), backend)


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


def flash_attention(query: Any, key: Any, value: Any, **options: Any) -> Any:
    """`Tensor.flash_attention`, for tensors and for arrays of other libraries.

    Args:
        query: a Tensor; or an array of PyTorch, CuPy, numpy or another library with DLPack, on the
            GPU or on the CPU. It is used where it is, without a copy, on its library's stream.
        key: of the same kind.
        value: of the same kind.
        options: see `minitorch.attention.flash_attention`. `attn_mask` may be an array of the same
            library, bool or float.

    Returns:
        What `minitorch.attention.flash_attention` returns, for arrays as arrays of their library.
        PyTorch tensors that require a gradient get it, from our backward pass.

    Raises:
        ValueError: shapes, mask or options that do not fit together.
        TypeError: dtypes that differ or are none of ours, or not arrays.

    """
    if isinstance(query, Tensor):
        return attention.flash_attention(query, key, value, **options)
    library = _library(query)
    for name, given in (("key", key), ("value", value)):
        if _library(given) != library:
            raise TypeError(
                "query, key and value must be arrays of one library, got a query of "
                f"{library} and a {name} of {_library(given)}"
            )
    with _stream_of(query, library):
        if library == "torch" and _wants_gradient(query, key, value, options.get("attn_mask")):
            return _torch_attention(query, key, value, options)
        mask = _mask(options.pop("attn_mask", None))
        q, k, v = (as_tensor(_plain(x)) for x in (query, key, value))
        out = attention.flash_attention(q, k, v, attn_mask=mask, **options)
        if isinstance(out, tuple):
            return tuple(_as_array_of(query, library, x) for x in out)
        return _as_array_of(query, library, out)


def _library(x: Any) -> str:
    """The name of the package that defines an object's type."""
    return type(x).__module__.split(".")[0]


@contextmanager
def _stream_of(x: Any, library: str) -> Iterator[None]:
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


def _plain(x: Any) -> Any:
    """A PyTorch tensor without its graph, all else as it is."""
    return x.detach() if hasattr(x, "detach") else x


def _mask(mask: Any) -> Any:
    """A mask of another library as attention takes it: bool as bare elements, float as a Tensor."""
    if mask is None or isinstance(mask, Tensor | np.ndarray):
        return mask
    mask = _plain(mask)
    if str(mask.dtype).endswith("bool"):
        data = data_from_dlpack(mask)
        return data if data.on_device else data.array
    return as_tensor(mask)


# ----- PyTorch's autograd -----


def _wants_gradient(*arrays: Any) -> bool:
    enabled: bool = sys.modules["torch"].is_grad_enabled()
    return enabled and any(getattr(x, "requires_grad", False) for x in arrays)


def _torch_attention(query: Any, key: Any, value: Any, options: dict[str, Any]) -> Any:
    options = dict(options)
    mask = options.pop("attn_mask", None)
    out = torch_function().apply(query, key, value, mask, options)
    return out if len(out) == 2 else out[0]


@cache
def torch_function() -> Any:
    """Our attention as a `torch.autograd.Function`; made when first needed, torch is not ours."""
    torch = sys.modules["torch"]

    class MiniTorchFlashAttention(torch.autograd.Function):  # type: ignore[misc,name-defined]
        """The graph is PyTorch's, both passes are ours."""

        @staticmethod
        def forward(ctx: Any, query: Any, key: Any, value: Any, mask: Any, options: Any) -> Any:
            """Output, and the logsumexp if it is wanted."""
            ctx.save_for_backward(query, key, value, mask)  # so that PyTorch sees writes to them
            q, k, v = (as_tensor(x.detach()) for x in (query, key, value))
            our_mask = _mask(mask)
            ctx.inputs = (q, k, v, our_mask)
            ctx.ours, ctx.with_lse = Context(), bool(options.pop("return_lse", False))
            problem = attention.describe(q, k, v, our_mask, **options)
            masked = mask is not None and mask.requires_grad
            out = FlashAttention.forward(ctx.ours, q, k, v, our_mask, problem, masked, ctx.with_lse)
            results = (out[..., :-1].to(problem.dtype), out[..., -1]) if ctx.with_lse else (out,)
            return tuple(_as_array_of(query, "torch", x) for x in results)

        @staticmethod
        @torch.autograd.function.once_differentiable
        def backward(ctx: Any, grad_out: Any, grad_lse: Any = None) -> Any:
            """Gradients of query, key, value and mask, where they are wanted."""
            like = ctx.saved_tensors[0]  # raises if an input was written to
            with _stream_of(like, "torch"):
                grad = as_tensor(grad_out)
                if ctx.with_lse:
                    columns = torch.cat((grad_out.to(grad_lse.dtype), grad_lse[..., None]), -1)
                    grad = as_tensor(columns)
                grads = FlashAttention.backward(ctx.ours, grad)[:4]
                wanted = zip(ctx.inputs, grads, ctx.needs_input_grad, strict=False)
                found = [
                    _as_array_of(like, "torch", x.expand(g).contiguous()) if needed else None
                    for x, g, needed in wanted
                ]
            return (*found, None)

    return MiniTorchFlashAttention


__all__ = ["as_tensor", "flash_attention", "from_dlpack"]
