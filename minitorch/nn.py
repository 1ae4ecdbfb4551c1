"""Functions of neural networks: pooling, softmax, dropout, GELU, losses."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from .arguments import as_ints, as_size, check_dim, check_dims, check_tensor
from .factories import rand
from .fused_functions import (
    DropoutFun,
    GELUFun,
    LogSoftmax,
    LogSumExp,
    Softmax,
    SoftmaxLoss,
)
from .kernels.flash_attention.problem import checked_dropout_p
from .rng import masks_come_from_seeds, next_seed
from .storage_ops import StorageOps
from .tensor import Tensor
from .tensor_data import TensorData
from .tensor_functions import Max

# ----- pooling -----


def tile(input: Tensor, kernel: tuple[int, int] | int) -> tuple[Tensor, int, int]:
    """Cut an image into the tiles that pooling reduces.

    Args:
        input: (batch, channel, height, width).
        kernel: (kernel_height, kernel_width), which must divide height and width; one number
            stands for both.

    Returns:
        Tensor (batch, channel, new_height, new_width, kernel_height * kernel_width), new_height,
        new_width.

    Raises:
        TypeError: no Tensor, or a kernel of other than whole numbers.
        ValueError: not four dimensions, or the kernel does not divide the image.

    """
    check_tensor(input, "input")
    if input.dims != 4:
        raise ValueError(f"input must be (batch, channel, height, width), got {input.shape}")
    batch, channel, height, width = input.shape
    sizes = as_ints(kernel, "kernel")
    if len(sizes) not in (1, 2) or min(sizes) < 1:
        raise ValueError(f"kernel must be (height, width), 1 or more, got {kernel}")
    kh, kw = sizes[0], sizes[-1]
    if height % kh or width % kw:
        raise ValueError(f"kernel {kernel} must divide height and width, got ({height}, {width})")
    new_height, new_width = height // kh, width // kw
    blocks = input.contiguous().view(batch, channel, new_height, kh, new_width, kw)
    tiles = blocks.permute(0, 1, 2, 4, 3, 5).contiguous()
    return tiles.view(batch, channel, new_height, new_width, kh * kw), new_height, new_width


def avgpool2d(input: Tensor, kernel: tuple[int, int] | int) -> Tensor:
    """Mean of each tile: (batch, channel, height, width) -> (batch, channel, height / kh, width /
    kw).
    """
    tiles, height, width = tile(input, kernel)
    return tiles.mean(4).view(*input.shape[:2], height, width)


def maxpool2d(input: Tensor, kernel: tuple[int, int] | int) -> Tensor:
    """Maximum of each tile: (batch, channel, height, width) -> (batch, channel, height / kh, width
    / kw).
    """
    tiles, height, width = tile(input, kernel)
    return max(tiles, 4).view(*input.shape[:2], height, width)


def max(input: Tensor, dim: int | Tensor) -> Tensor:
    """Maximum along a dimension, which is kept with size 1."""
    return Max.apply(input, dim)


def argmax(input: Tensor, dim: int) -> Tensor:
    """1.0 where an element is the maximum along `dim`, else 0.0 (one-hot if there is no tie)."""
    check_tensor(input, "input")
    axis = check_dim(dim, input.dims)
    return input == input.f.max_reduce(input.detach(), axis)


# ----- softmax -----


def softmax(input: Tensor, dim: int) -> Tensor:
    """exp(x) / sum(exp(x)) along a dimension; a slice that is -inf throughout gives zeros."""
    return Softmax.apply(input, dim)


def logsoftmax(input: Tensor, dim: int) -> Tensor:
    """Logarithm of the softmax, computed as x - logsumexp(x)."""
    return LogSoftmax.apply(input, dim)


def logsumexp(input: Tensor, dim: int | Sequence[int]) -> Tensor:
    """log(sum(exp(x))) along a dimension, or several, each kept with size 1; stable for large x."""
    check_tensor(input, "input")
    for d in check_dims(dim, input.dims):
        input = LogSumExp.apply(input, d)
    return input


# ----- dropout, activation, normalisation -----


def dropout(input: Tensor, rate: float, ignore: bool = False) -> Tensor:
    """Set elements to 0 with probability `rate`. As in MiniTorch the others are not rescaled.

    The mask is drawn by `rand`, on every backend; within `rng.repeatable_step` a kernel makes
    it, from seeds.

    Args:
        input: any tensor.
        rate: 0 keeps everything, 1 drops everything.
        ignore: if True nothing is dropped.

    Raises:
        TypeError: no Tensor.
        ValueError: `rate` is not in [0, 1].

    """
    check_tensor(input, "input")
    rate = checked_dropout_p(rate, "rate")
    if ignore:
        return input
    if input.backend.cuda and masks_come_from_seeds():
        ones = input._new(input.f.ops.full(input.shape, 1.0, input.dtype))
        return input * (DropoutFun.apply(ones, rate, next_seed()) > 0.0)
    return input * (rand(input.shape, backend=input.backend, requires_grad=False) > rate).to(
        input.dtype
    )


def GELU(input: Tensor) -> Tensor:
    """0.5 x (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3))), Hendrycks & Gimpel 2016, section 2."""
    return GELUFun.apply(input)


def layer_norm(input: Tensor, eps: float = 1e-5) -> Tensor:
    """(x - mean) / sqrt(var + eps) over the last dimension, without weights."""
    check_tensor(input, "input")
    last = input.dims - 1
    return (input - input.mean(last)) / ((input.var(last) + eps) ** 0.5)


# ----- losses -----


def one_hot(input: Tensor, num_classes: int) -> Tensor:
    """A row with a single 1.0 for each class number: (...) -> (..., num_classes).

    Tensors on the GPU come to the host for it: it is not meant for training (`softmax_loss` is).

    Raises:
        TypeError: no Tensor, or no whole number of classes.
        ValueError: a class number outside 0 ... num_classes - 1.

    """
    check_tensor(input, "input")
    num_classes = as_size(num_classes, "num_classes")
    ids = class_numbers(input, num_classes, "input")
    return input._from_numpy(np.eye(num_classes, dtype=input.dtype)[ids])


def softmax_loss(logits: Tensor, target: Tensor) -> Tensor:
    """Cross entropy of each row: logsumexp(logits) - logits[target].

    Args:
        logits: (batch, C).
        target: (batch,), class numbers stored as floats.

    Returns:
        Loss of each row, (batch,).

    Raises:
        TypeError: no Tensors.
        ValueError: shapes that do not fit, or a class number outside 0 ... C - 1; on the GPU the
            latter comes when something is next copied from there.

    """
    check_tensor(logits, "logits")
    check_tensor(target, "target")
    return SoftmaxLoss.apply(logits, target.detach())


def class_numbers(ids: Tensor, num_classes: int, name: str) -> Any:
    """The class numbers held by a tensor of floats, as an int64 array.

    Raises:
        ValueError: one of them is not a whole number from 0 to num_classes - 1; `name` is named.

    """
    values = ids.to_numpy()
    StorageOps.check_class_numbers(Tensor(TensorData.from_array(values)), num_classes, name)
    return values.astype(np.int64)


__all__ = [
    "GELU",
    "argmax",
    "avgpool2d",
    "dropout",
    "layer_norm",
    "logsoftmax",
    "logsumexp",
    "max",
    "maxpool2d",
    "one_hot",
    "softmax",
    "softmax_loss",
    "tile",
]
