"""Convolution in one and two dimensions, forward and backward; loops compiled for all cores.

As in MiniTorch the output has the size of the input, and the kernel is anchored on the left (and
top): an output sees what follows it, and 0 past the end.

    out[b, o, y, x] = sum over c, i, j of  input[b, c, y + i, x + j] * weight[o, c, i, j]

There is no kernel for the GPU: tensors there are copied to the host for it, and back.
"""

from __future__ import annotations

from math import prod
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from .autodiff import Context
from .dtypes import HALF_DTYPES, promote
from .function import Function
from .kernels.cpu import threads
from .kernels.cpu.compiler import njit
from .kernels.cpu.simd import cache_key
from .kernels.cpu.threads import fetch_add, run_on_threads, thread_count
from .tensor_data import numpy_view

if TYPE_CHECKING:
    from .tensor import Tensor

    Array = npt.NDArray[Any]


# Below this many multiplications one core is done before a second one has woken up.
SERIAL = 1 << 17
KEY = cache_key(threads.__file__)


def _check(input: Tensor, weight: Tensor, dims: int) -> None:
    """Raise ValueError unless the shapes are those of a convolution in `dims` dimensions."""
    name = f"conv{dims}d"
    if input.dims != dims + 2 or weight.dims != dims + 2:
        raise ValueError(
            f"{name}: input (batch, in_channels, ...) and weight (out_channels, in_channels, ...) "
            f"must have {dims + 2} dimensions, got {input.shape} and {weight.shape}"
        )
    if input.shape[1] != weight.shape[1]:
        raise ValueError(
            f"{name}: input and weight must have the same in_channels, "
            f"got {input.shape[1]} and {weight.shape[1]}"
        )


def _arrays(a: Tensor, b: Tensor, dims: int) -> tuple[Array, Array]:
    """Contiguous arrays of four dimensions and one dtype, on the host."""
    arrays = [t.to_numpy() if t._tensor.on_device else t._tensor.array for t in (a, b)]
    dtype = promote(a.dtype, b.dtype)
    if dtype in HALF_DTYPES:
        dtype = np.dtype(np.float32)
    first, second = (np.array(array, dtype, order="C", copy=None) for array in arrays)
    if dims == 1:
        return first[:, :, None, :], second[:, :, None, :]
    return first, second


def _wrap(like: Tensor, array: Array) -> Tensor:
    array = array.reshape(*array.shape[:2], *array.shape[4 - like.dims + 2 :])
    return like._from_numpy(array.astype(like.dtype) if like.dtype in HALF_DTYPES else array)


def _convolve(a: Array, b: Array, reverse: bool) -> Array:
    """a (B, C, H, W) with b (O, C, KH, KW) -> (B, O, H, W).

    Raises:
        ValueError: other shapes.

    """
    if a.ndim != 4 or b.ndim != 4 or a.shape[1] != b.shape[1]:
        raise ValueError(
            f"input and weight must have the same in_channels, got shapes {a.shape} and {b.shape}"
        )
    out = np.zeros((a.shape[0], b.shape[0], *a.shape[2:]), a.dtype)
    _run(
        _convolution_worker,
        out.shape[0] * out.shape[1],
        out.size * prod(b.shape[1:]),
        out,
        a,
        b,
        reverse,
    )
    return out


def _run(worker: Any, tasks: int, work: int, *arguments: Any) -> None:
    """Call a worker on as many threads as there are tasks and `work` multiplications are worth."""
    next_task = np.zeros(1, np.int64)
    if work < SERIAL:
        worker(*arguments, next_task)
    else:
        run_on_threads(min(thread_count(), tasks), worker, *arguments, next_task)


class Conv1dFun(Function):
    """Convolution in one dimension."""

    @staticmethod
    def forward(ctx: Context, input: Tensor, weight: Tensor) -> Tensor:
        """Same-size convolution.

        Args:
            ctx: keeps the inputs.
            input: (batch, in_channels, width)
            weight: (out_channels, in_channels, kernel width)

        Returns:
            (batch, out_channels, width)

        Raises:
            ValueError: other shapes.

        """
        _check(input, weight, 1)
        ctx.save_for_backward(input, weight)
        return _wrap(input, _convolve(*_arrays(input, weight, 1), reverse=False))

    @staticmethod
    def backward(ctx: Context, grad_output: Tensor) -> tuple[Tensor, Tensor]:
        """Gradients of input and weight."""
        return _backward(ctx, grad_output, 1)


class Conv2dFun(Function):
    """Convolution in two dimensions."""

    @staticmethod
    def forward(ctx: Context, input: Tensor, weight: Tensor) -> Tensor:
        """Same-size convolution.

        Args:
            ctx: keeps the inputs.
            input: (batch, in_channels, height, width)
            weight: (out_channels, in_channels, kernel height, kernel width)

        Returns:
            (batch, out_channels, height, width)

        Raises:
            ValueError: other shapes.

        """
        _check(input, weight, 2)
        ctx.save_for_backward(input, weight)
        return _wrap(input, _convolve(*_arrays(input, weight, 2), reverse=False))

    @staticmethod
    def backward(ctx: Context, grad_output: Tensor) -> tuple[Tensor, Tensor]:
        """Gradients of input and weight."""
        return _backward(ctx, grad_output, 2)


def _backward(ctx: Context, grad_output: Tensor, dims: int) -> tuple[Tensor, Tensor]:
    """The input's gradient is a convolution anchored on the right, channels exchanged."""
    input, weight = ctx.saved_values
    grad, weights = _arrays(grad_output, weight, dims)
    _, inputs = _arrays(grad_output, input, dims)
    dinput = _convolve(grad, np.array(weights.swapaxes(0, 1), order="C"), True)
    dweight = np.zeros_like(weights)
    pairs = weights.shape[0] * weights.shape[1]
    _run(_weight_gradient_worker, pairs, grad.size * prod(weights.shape[1:]), dweight, inputs, grad)
    return _wrap(input, dinput), _wrap(weight, dweight)


conv1d = Conv1dFun.apply
conv2d = Conv2dFun.apply


# ----- loops: threads take planes, or pairs of channels, from a shared counter -----


@njit(nogil=True, cache=True, error_model="numpy")
def _convolution_worker(out, a, b, reverse, next_plane, key=KEY):  # type: ignore[no-untyped-def]
    """out (B, O, H, W) += a (B, C, H, W) * b (O, C, KH, KW); looks ahead, or back if `reverse`."""
    batch, out_channels, height, width = out.shape
    channels, kh, kw = b.shape[1], min(b.shape[2], height), min(b.shape[3], width)
    while True:
        plane = fetch_add(next_plane, 0, 1)
        if plane >= batch * out_channels:
            return
        n, o = plane // out_channels, plane % out_channels
        for c in range(channels):
            for i in range(kh):
                for j in range(kw):
                    weight = b[o, c, i, j]
                    for y in range(height - i):
                        if reverse:
                            to, x = out[n, o, y + i][j:], a[n, c, y][: width - j]
                        else:
                            to, x = out[n, o, y][: width - j], a[n, c, y + i][j:]
                        for k in range(len(to)):
                            to[k] += weight * x[k]


@njit(nogil=True, cache=True, error_model="numpy")
def _weight_gradient_worker(dweight, a, grad, next_pair, key=KEY):  # type: ignore[no-untyped-def]
    """dweight[o, c, i, j] = sum over n, y, x of grad[n, o, y, x] * a[n, c, y + i, x + j]"""
    out_channels, channels, kh, kw = dweight.shape
    batch, height, width = grad.shape[0], grad.shape[2], grad.shape[3]
    while True:
        pair = fetch_add(next_pair, 0, 1)
        if pair >= out_channels * channels:
            return
        o, c = pair // channels, pair % channels
        for i in range(min(kh, height)):
            for j in range(min(kw, width)):
                total = 0.0
                for n in range(batch):
                    for y in range(height - i):
                        g, x = grad[n, o, y], a[n, c, y + i][j:]
                        for k in range(len(x)):
                            total += g[k] * x[k]
                dweight[o, c, i, j] = total


def tensor_conv1d(
    out: Array,
    out_shape: Array,
    out_strides: Array,
    out_size: int,
    input: Array,
    input_shape: Array,
    input_strides: Array,
    weight: Array,
    weight_shape: Array,
    weight_strides: Array,
    reverse: bool,
) -> None:
    """Convolution of storages with shapes and strides, MiniTorch's signature; see `Conv1dFun`.

    Args:
        out: receives (batch, out_channels, width).
        out_size: number of elements of `out`.
        input: (batch, in_channels, width).
        weight: (out_channels, in_channels, kernel width).
        reverse: anchor the kernel on the right: an output sees what comes before it.

    """
    target = numpy_view(out, out_shape, out_strides)
    a = numpy_view(input, input_shape, input_strides)
    b = numpy_view(weight, weight_shape, weight_strides)
    a, b = np.array(a[:, :, None], order="C"), np.array(b[:, :, None], order="C")
    result = _convolve(a, b, reverse)
    target[...] = result[:, :, 0, : target.shape[2]]


def tensor_conv2d(
    out: Array,
    out_shape: Array,
    out_strides: Array,
    out_size: int,
    input: Array,
    input_shape: Array,
    input_strides: Array,
    weight: Array,
    weight_shape: Array,
    weight_strides: Array,
    reverse: bool,
) -> None:
    """As `tensor_conv1d`, in two dimensions; see `Conv2dFun`."""
    target = numpy_view(out, out_shape, out_strides)
    a = numpy_view(input, input_shape, input_strides)
    b = numpy_view(weight, weight_shape, weight_strides)
    result = _convolve(np.array(a, order="C"), np.array(b, order="C"), reverse)
    target[...] = result[:, :, : target.shape[2], : target.shape[3]]


__all__ = ["Conv1dFun", "Conv2dFun", "conv1d", "conv2d", "tensor_conv1d", "tensor_conv2d"]
