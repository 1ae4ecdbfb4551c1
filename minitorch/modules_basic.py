"""Layers: Linear, Embedding, LayerNorm1d, Dropout."""

from __future__ import annotations

import math

import numpy as np

from .dtypes import get_default_dtype
from .factories import ones, rand, tensor_from_numpy, zeros
from .fused_functions import DropoutFun, EmbeddingFun, LinearFun
from .module import Module, Parameter
from .rng import masks_come_from_seeds, next_seed
from .tensor import Tensor
from .tensor_ops import SimpleBackend, TensorBackend


class Linear(Module):
    """input @ weights + bias.

    Args:
        in_size: size of the last dimension of the input.
        out_size: of the output.
        bias: whether there is a bias.
        backend: where the weights live.

    Parameters `weights` (in_size, out_size) and `bias` (out_size,) start uniform in
    +-1/sqrt(in_size).

    Raises:
        TypeError: `bias` is neither True nor False.

    """

    def __init__(
        self,
        in_size: int,
        out_size: int,
        bias: bool = True,
        backend: TensorBackend = SimpleBackend,
    ) -> None:
        super().__init__()
        if not isinstance(bias, bool | np.bool_):
            hint = ": write backend=..." if isinstance(bias, TensorBackend) else ""
            raise TypeError(f"Linear: bias must be True or False, got {bias!r}{hint}")
        self.in_size = in_size
        self.out_size = out_size
        bound = 1 / math.sqrt(in_size) if in_size else 0.0
        self.weights = Parameter(_uniform((in_size, out_size), bound, backend))
        self.bias = Parameter(_uniform((out_size,), bound, backend)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_size) -> (..., out_size)

        Raises:
            ValueError: the input's last size is not in_size.

        """
        if x.dims < 1 or x.shape[-1] != self.in_size:
            raise ValueError(
                f"Linear: the last size of x must be {self.in_size}, got shape {x.shape}"
            )
        return LinearFun.apply(
            x, self.weights.value, None if self.bias is None else self.bias.value
        )


def _uniform(shape: tuple[int, ...], bound: float, backend: TensorBackend) -> Tensor:
    """Uniform numbers in +-bound."""
    return ((rand(shape, backend) - 0.5) * (2 * bound)).detach()


class Embedding(Module):
    """A table of vectors: row `i` for the number `i`.

    Args:
        num_embeddings: number of rows.
        embedding_dim: length of a row.
        backend: where the weights live.

    Parameter `weights` (num_embeddings, embedding_dim) starts normal, N(0, 1), from numpy's global
    generator.
    """

    def __init__(
        self, num_embeddings: int, embedding_dim: int, backend: TensorBackend = SimpleBackend
    ) -> None:
        super().__init__()
        self.num_embeddings = num_embeddings
        self.embedding_dim = embedding_dim
        values = np.random.normal(0.0, 1.0, (num_embeddings, embedding_dim))
        self.weights = Parameter(tensor_from_numpy(values.astype(get_default_dtype()), backend))

    def forward(self, x: Tensor) -> Tensor:
        """Whole numbers stored as floats (...) -> (..., embedding_dim)

        Raises:
            ValueError: a number outside 0 ... num_embeddings - 1; on the GPU this comes when
                something is next copied from there.

        """
        return EmbeddingFun.apply(x.detach(), self.weights.value)


class Dropout(Module):
    """In training, set elements to 0 with probability p_dropout and scale the others by 1 / (1 -
    p_dropout).

    The mask comes from numpy's global generator, on every backend; within `rng.repeatable_step` and
    CUDA graphs a kernel makes it, from the seeds of `manual_seed`. p_dropout = 0 draws nothing.

    Args:
        p_dropout: from 0 to 1.

    Raises:
        ValueError: outside that range.

    """

    def __init__(self, p_dropout: float = 0.1) -> None:
        super().__init__()
        if not 0.0 <= p_dropout <= 1.0:
            raise ValueError(f"p_dropout must be in [0, 1], got {p_dropout}")
        self.p_dropout = p_dropout

    def forward(self, x: Tensor) -> Tensor:
        """Any shape, kept."""
        if not self.training or self.p_dropout == 0.0:
            return x
        if self.p_dropout == 1.0:
            return x * 0.0
        if x.backend.cuda and masks_come_from_seeds():
            return DropoutFun.apply(x, self.p_dropout, next_seed())
        kept = np.random.binomial(1, 1 - self.p_dropout, x.shape) / (1 - self.p_dropout)
        return x * tensor_from_numpy(kept.astype(x.dtype), x.backend)


class LayerNorm1d(Module):
    """weights * (x - mean) / sqrt(var + eps) + bias over the last dimension (Ba, Kiros & Hinton
    2016, equation 4).

    Args:
        dim: size of the last dimension.
        eps: added to the variance.
        backend: where the weights live.

    Parameters `weights` (ones) and `bias` (zeros), both (dim,).
    """

    def __init__(self, dim: int, eps: float = 1e-5, backend: TensorBackend = SimpleBackend) -> None:
        super().__init__()
        self.dim = dim
        self.eps = eps
        self.weights = Parameter(ones((dim,), backend))
        self.bias = Parameter(zeros((dim,), backend))

    def forward(self, x: Tensor) -> Tensor:
        """(..., dim) -> (..., dim)

        Raises:
            ValueError: the input's last size is not dim.

        """
        if x.dims < 1 or x.shape[-1] != self.dim:
            raise ValueError(
                f"LayerNorm1d: the last size of x must be {self.dim}, got shape {x.shape}"
            )
        return x.layernorm(self.weights.value, self.bias.value, self.eps)


__all__ = ["Dropout", "Embedding", "LayerNorm1d", "Linear"]
