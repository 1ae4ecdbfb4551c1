"""`CudaKernelOps`: fused operations on the GPU; each hands its arrays to a kernel.

No mathematics here: `fused_ops` says what each operation means, `kernels/*_cuda.py` how it is
computed. Nothing is copied between host and GPU.
"""

from __future__ import annotations

from math import prod
from typing import TYPE_CHECKING, Any

import numpy as np

from .cuda import attention
from .cuda.device_array import DeviceArray, error_word
from .cuda.storage import contiguous, in_dtype
from .cuda.views import contiguous_data, device_storage, gradient_memory
from .cuda_ops import CudaOps
from .dtypes import HALF_DTYPES, layer_dtype
from .kernels import (
    adamw_cuda,
    cross_entropy_cuda,
    dropout_cuda,
    embedding_cuda,
    gelu_cuda,
    layernorm_cuda,
    softmax_cuda,
)
from .kernels.elementwise_cuda import broadcast_strides, merge_dimensions
from .kernels.gpu.vectors import BYTES
from .rng import device_offset

if TYPE_CHECKING:
    from .tensor import Tensor

    DType = np.dtype[Any]


# ----- operands -----


def _elements(t: Tensor, dtype: DType | None = None) -> DeviceArray:
    """The elements of a tensor in row-major order, in `dtype`, where kernels can read 16 bytes at
    a time: the tensor's own memory if that is so already.
    """
    data = t._tensor if dtype is None else in_dtype(t._tensor, dtype)
    storage = device_storage(contiguous(data))
    if storage.size != data.size:
        storage = storage[: data.size]
    if storage.pointer % BYTES:
        copy = DeviceArray.empty(data.size, data.dtype)
        copy.copy_from_device(storage)
        return copy
    return storage


def _elements_in_place(t: Tensor, name: str) -> DeviceArray:
    """The tensor's own memory, contiguous, to be changed.

    Raises:
        ValueError: a kernel cannot work on it where it is.

    """
    storage = device_storage(t._tensor)
    if storage.pointer % BYTES:
        raise ValueError(f"{name} must begin at an address that {BYTES} divides")
    return storage if storage.size == t.size else storage[: t.size]


def _arithmetic(dtype: DType) -> DType:
    """The dtype that kernels compute in."""
    return np.dtype(np.float32) if dtype in HALF_DTYPES else dtype


def _output(like: Tensor, storage: DeviceArray, shape: tuple[int, ...]) -> Tensor:
    return like._new(contiguous_data(storage, shape))


def _last(t: Tensor, dim: int) -> Tensor:
    """The tensor with dimension `dim` moved to the end."""
    if dim == t.dims - 1:
        return t
    order = [d for d in range(t.dims) if d != dim]
    return t._new(t._tensor.permute(*order, dim))


def _back(t: Tensor, dim: int) -> Tensor:
    """What `_last` did undone; row-major."""
    if dim == t.dims - 1:
        return t
    order = list(range(t.dims - 1))
    order.insert(dim, t.dims - 1)
    return t._new(contiguous(t._tensor.permute(*order)))


def _rows(t: Tensor) -> tuple[int, int]:
    """Rows and columns of a tensor (..., columns)."""
    return prod(t.shape[:-1]), t.shape[-1]


def _mask_operand(
    inp: Tensor, mask: Tensor
) -> tuple[DeviceArray, tuple[int, int], tuple[int, int, int]]:
    """A mask that broadcasts to inp (..., columns), as `softmax_cuda.forward` takes it."""
    data = mask._tensor
    if data.shape[-1] != inp.shape[-1]:
        data = data.broadcast_to((*data.shape[:-1], inp.shape[-1]))
    leading = inp.shape[:-1]
    storage = _elements(mask._new(data), inp.dtype)
    rows = contiguous_data(storage, data.shape)
    shape, (steps,) = merge_dimensions(
        leading, broadcast_strides(inp.shape, rows.shape, rows.strides)[:-1]
    )
    if len(shape) > 3:  # broadcast in more than the kernel's three dimensions
        storage = _elements(mask._new(data.broadcast_to(inp.shape)), inp.dtype)
        shape, steps = (prod(leading),), (inp.shape[-1],)
    if prod(leading) == 1:
        steps = (0,)
    shape, steps = (1,) * (3 - len(shape)) + shape, (0,) * (3 - len(steps)) + steps
    return storage, (shape[1], shape[2]), (steps[0], steps[1], steps[2])


# ----- operations -----


class CudaKernelOps(CudaOps):
    """Tensors on the GPU, every fused operation by a kernel of its own.

    Without a GPU `TensorBackend(CudaKernelOps)` computes with `FastOps`, so that programs and tests
    that make it run anywhere.
    """

    @staticmethod
    def check_class_numbers(ids: Tensor, num_classes: int, name: str) -> None:
        """Nothing is read here: the kernels that use the numbers report bad ones
        (`device_array.error_word`).
        """

    # ----- softmax -----

    @staticmethod
    def softmax_forward(x: Tensor, dim: int) -> Tensor:
        """See `FusedOps.softmax_forward`."""
        dim %= x.dims
        along = _last(x, dim)
        source, out = _elements(along), DeviceArray.empty(x.size, x.dtype)
        softmax_cuda.forward(x.dtype.name, source.array, out.array, *_rows(along))
        return _back(_output(x, out, along.shape), dim)

    @staticmethod
    def softmax_backward(grad: Tensor, y: Tensor, dim: int) -> Tensor:
        """See `FusedOps.softmax_backward`."""
        dim %= y.dims
        along = _last(y, dim)
        dy, value = _elements(_last(grad, dim), y.dtype), _elements(along)
        out = DeviceArray.empty(y.size, y.dtype)
        softmax_cuda.backward(y.dtype.name, dy.array, value.array, out.array, *_rows(along))
        return _back(_output(y, out, along.shape), dim)

    @staticmethod
    def logsumexp_forward(x: Tensor, dim: int) -> Tensor:
        """See `FusedOps.logsumexp_forward`."""
        dim %= x.dims
        along = _last(x, dim)
        rows, columns = _rows(along)
        source, out = _elements(along), DeviceArray.empty(rows, x.dtype)
        softmax_cuda.logsumexp_forward(x.dtype.name, source.array, out.array, rows, columns)
        return _output(x, out, (*x.shape[:dim], 1, *x.shape[dim + 1 :]))

    @staticmethod
    def logsumexp_backward(grad: Tensor, x: Tensor, logsumexp: Tensor) -> Tensor:
        """See `FusedOps.logsumexp_backward`."""
        reduced = [d for d in range(x.dims) if logsumexp.shape[d] != x.shape[d]]
        ones = [d for d in range(x.dims) if x.shape[d] == 1]  # any of them, if nothing was reduced
        dim = (reduced or ones or [x.dims - 1])[0]
        along = _last(x, dim)
        dl, total = (_elements(_last(t, dim), x.dtype) for t in (grad, logsumexp))
        source, out = _elements(along), DeviceArray.empty(x.size, x.dtype)
        softmax_cuda.logsumexp_backward(
            x.dtype.name, dl.array, source.array, total.array, out.array, *_rows(along)
        )
        return _back(_output(x, out, along.shape), dim)

    @classmethod
    def attn_softmax_fw(cls, inp: Tensor, mask: Tensor) -> Tensor:
        """See `FusedOps.attn_softmax_fw`; the mask is not made larger."""
        added, sizes, strides = _mask_operand(inp, mask)
        source, out = _elements(inp), DeviceArray.empty(inp.size, inp.dtype)
        softmax_cuda.forward(
            inp.dtype.name, source.array, out.array, *_rows(inp), added.array, sizes, strides
        )
        return _output(inp, out, inp.shape)

    # ----- layer norm -----

    @staticmethod
    def layernorm_fw(
        inp: Tensor, gamma: Tensor, beta: Tensor, eps: float = 1e-8
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See `FusedOps.layernorm_fw`; variance and mean in float32 for 16-bit inputs."""
        rows, columns = _rows(inp)
        inp = _in_dtype(inp, layer_dtype(inp.dtype, gamma.dtype, beta.dtype))
        weight = _weight_dtype(inp, gamma)
        x, scale, shift = _elements(inp), _elements(gamma, weight), _elements(beta, weight)
        real = _arithmetic(inp.dtype)
        y = DeviceArray.empty(inp.size, inp.dtype)
        var, mean = DeviceArray.empty(rows, real), DeviceArray.empty(rows, real)
        layernorm_cuda.forward(
            inp.dtype.name, weight.name, x.array, scale.array, shift.array, eps,
            y.array, var.array, mean.array, rows, columns,
        )  # fmt: skip
        return (
            _output(inp, y, inp.shape),
            _output(inp, var, (rows,)),
            _output(inp, mean, (rows,)),
        )

    @staticmethod
    def layernorm_bw(
        out_grad: Tensor,
        inp: Tensor,
        gamma: Tensor,
        beta: Tensor,
        var: Tensor,
        mean: Tensor,
        eps: float = 1e-8,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See `FusedOps.layernorm_bw`."""
        rows, columns = _rows(inp)
        inp = _in_dtype(inp, layer_dtype(inp.dtype, gamma.dtype, beta.dtype))
        name, real, weight = inp.dtype.name, _arithmetic(inp.dtype), _weight_dtype(inp, gamma)
        dy, x, scale = _elements(out_grad, inp.dtype), _elements(inp), _elements(gamma, weight)
        variance, centre = _elements(var, real), _elements(mean, real)
        dx = DeviceArray.empty(inp.size, inp.dtype)
        dgamma, dbeta = gradient_memory(gamma, weight), gradient_memory(beta, weight)
        blocks = layernorm_cuda.backward_blocks(name, rows, columns)
        partials = DeviceArray.empty(max(1, 2 * blocks * columns), real)
        layernorm_cuda.backward(
            name, weight.name, dy.array, x.array, scale.array, variance.array, centre.array, eps,
            dx.array, partials.array, device_storage(dgamma).array, device_storage(dbeta).array,
            rows, columns,
        )  # fmt: skip
        return (
            _output(inp, dx, inp.shape),
            _in_dtype(gamma._new(dgamma), gamma.dtype),
            _in_dtype(beta._new(dbeta), beta.dtype),
        )

    # ----- GELU -----

    @staticmethod
    def gelu_forward(x: Tensor) -> Tensor:
        """See `FusedOps.gelu_forward`."""
        source, out = _elements(x), DeviceArray.empty(x.size, x.dtype)
        gelu_cuda.forward(x.dtype.name, source.array, out.array, x.size)
        return _output(x, out, x.shape)

    @staticmethod
    def gelu_backward(grad: Tensor, x: Tensor) -> Tensor:
        """See `FusedOps.gelu_backward`."""
        dy, source = _elements(grad, x.dtype), _elements(x)
        out = DeviceArray.empty(x.size, x.dtype)
        gelu_cuda.backward(x.dtype.name, dy.array, source.array, out.array, x.size)
        return _output(x, out, x.shape)

    # ----- dropout -----

    @staticmethod
    def dropout_forward(x: Tensor, p: float, seed: int) -> Tensor:
        """See `StorageOps.dropout_forward`: the same mask."""
        source, out = _elements(x), DeviceArray.empty(x.size, x.dtype)
        offset = device_offset().array
        dropout_cuda.forward(x.dtype.name, source.array, out.array, x.size, p, seed, offset)
        return _output(x, out, x.shape)

    # ----- embedding -----

    @staticmethod
    def embedding_forward(ids: Tensor, weight: Tensor) -> Tensor:
        """See `FusedOps.embedding_forward`; a wrong id is reported when something is next copied
        to the host.
        """
        numbers, table = _elements(ids), _elements(weight)
        num_embeddings, width = weight.shape
        out = DeviceArray.empty(ids.size * width, weight.dtype)
        embedding_cuda.forward(
            weight.dtype.name, ids.dtype.name, numbers.array, table.array, out.array,
            error_word().array, ids.size, width, num_embeddings,
        )  # fmt: skip
        return _output(weight, out, (*ids.shape, width))

    @staticmethod
    def embedding_backward(grad: Tensor, ids: Tensor, num_embeddings: int) -> Tensor:
        """See `FusedOps.embedding_backward`."""
        dy, numbers, width = _elements(grad), _elements(ids), grad.shape[-1]
        parts = embedding_cuda.workspace(ids.size, num_embeddings)
        work = DeviceArray.empty(parts.size, np.int32)
        work[: parts.starts].fill(0)
        partials = DeviceArray.empty(max(1, 2 * parts.tiles * width), _arithmetic(grad.dtype))
        dweight = DeviceArray.empty(num_embeddings * width, grad.dtype)
        embedding_cuda.backward(
            grad.dtype.name, ids.dtype.name, dy.array, numbers.array, work.array, partials.array,
            dweight.array, ids.size, width, num_embeddings,
        )  # fmt: skip
        return _output(grad, dweight, (num_embeddings, width))

    # ----- cross entropy -----

    @staticmethod
    def cross_entropy_forward(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """See `FusedOps.cross_entropy_forward`; both outputs in float32 for 16-bit logits. A wrong
        target is reported when something is next copied to the host.
        """
        rows, classes = logits.shape
        x, number = _elements(logits), _elements(target)
        real = _arithmetic(logits.dtype)
        loss, logsumexp = DeviceArray.empty(rows, real), DeviceArray.empty(rows, real)
        cross_entropy_cuda.forward(
            logits.dtype.name, target.dtype.name, x.array, number.array, loss.array,
            logsumexp.array, error_word().array, rows, classes,
        )  # fmt: skip
        return _output(logits, loss, (rows,)), _output(logits, logsumexp, (rows,))

    @staticmethod
    def cross_entropy_backward(
        grad: Tensor, logits: Tensor, target: Tensor, logsumexp: Tensor
    ) -> Tensor:
        """See `FusedOps.cross_entropy_backward`."""
        real = _arithmetic(logits.dtype)
        dloss, x, number = _elements(grad, real), _elements(logits), _elements(target)
        total, out = _elements(logsumexp, real), DeviceArray.empty(logits.size, logits.dtype)
        cross_entropy_cuda.backward(
            logits.dtype.name, target.dtype.name, dloss.array, x.array, number.array, total.array,
            out.array, *logits.shape,
        )  # fmt: skip
        return _output(logits, out, logits.shape)

    # ----- AdamW -----

    @staticmethod
    def adamw_step(
        param: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, **numbers: Any
    ) -> None:
        """See `FusedOps.adamw_step`.

        Raises:
            ValueError: what changes does not begin where vectors of 16 bytes may.

        """
        p, g = _elements_in_place(param, "param"), _elements(grad, param.dtype)
        m = _elements_in_place(exp_avg, "exp_avg")
        v = _elements_in_place(exp_avg_sq, "exp_avg_sq")
        adamw_cuda.step(param.dtype.name, p.array, g.array, m.array, v.array, param.size, **numbers)

    # ----- attention -----

    flash_attention_forward = staticmethod(attention.flash_attention_forward)
    flash_attention_backward = staticmethod(attention.flash_attention_backward)


def _in_dtype(t: Tensor, dtype: DType) -> Tensor:
    return t if t.dtype == dtype else t._new(in_dtype(t._tensor, dtype))


def _weight_dtype(inp: Tensor, gamma: Tensor) -> DType:
    """In which dtype layer norm reads gamma and beta: that of the input, or float32 beside 16
    bits.
    """
    wide = inp.dtype in HALF_DTYPES and gamma.dtype not in (inp.dtype, *HALF_DTYPES)
    return np.dtype(np.float32) if wide else inp.dtype
