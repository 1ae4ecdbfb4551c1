"""Layers: Linear, Embedding, LayerNorm1d, Dropout."""

from __future__ import annotations

import math

import numpy as np

from .arguments import as_number, as_size, check_tensor
from .dtypes import get_default_dtype
from .factories import ones, rand, tensor_from_numpy, zeros
from .fused_functions import DropoutFun, EmbeddingFun, LinearFun
from .kernels.flash_attention.problem import checked_dropout_p
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
        TypeError: `bias` is neither True nor False, or a size no whole number.
        ValueError: a negative size.

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
        self.in_size = as_size(in_size, "Linear: in_size")
        self.out_size = as_size(out_size, "Linear: out_size")
        bound = 1 / math.sqrt(self.in_size) if self.in_size else 0.0
        self.weights = Parameter(_uniform((self.in_size, self.out_size), bound, backend))
        self.bias = Parameter(_uniform((self.out_size,), bound, backend)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_size) -> (..., out_size)

        Raises:
            TypeError: x is no Tensor.
            ValueError: the input's last size is not in_size.

        """
        check_tensor(x, "Linear: x")
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
        self.num_embeddings = as_size(num_embeddings, "Embedding: num_embeddings")
        self.embedding_dim = as_size(embedding_dim, "Embedding: embedding_dim")
        values = np.random.normal(0.0, 1.0, (self.num_embeddings, self.embedding_dim))
        self.weights = Parameter(tensor_from_numpy(values.astype(get_default_dtype()), backend))

    def forward(self, x: Tensor) -> Tensor:
        """Whole numbers stored as floats (...) -> (..., embedding_dim)

        Raises:
            TypeError: x is no Tensor.
            ValueError: a number outside 0 ... num_embeddings - 1; on the GPU this comes when
                something is next copied from there.

        """
        check_tensor(x, "Embedding: x")
        return EmbeddingFun.apply(x.detach(), self.weights.value)


class Dropout(Module):
    """In training, set elements to 0 with probability p_dropout and scale the others by 1 / (1 -
    p_dropout).

    The mask comes from numpy's global generator, on every backend; within `rng.repeatable_step` a
    kernel makes it, from seeds. p_dropout = 0 draws nothing.

    Args:
        p_dropout: from 0 to 1.

    Raises:
        ValueError: outside that range.

    """

    def __init__(self, p_dropout: float = 0.1) -> None:
        super().__init__()
        self.p_dropout = checked_dropout_p(p_dropout, "p_dropout")

    def forward(self, x: Tensor) -> Tensor:
        """Any shape, kept.

        Raises:
            TypeError: x is no Tensor.
            ValueError: `p_dropout` has been set to what is no probability.

        """
        check_tensor(x, "Dropout: x")
        p = checked_dropout_p(self.p_dropout, "p_dropout")
        if not self.training or p == 0.0:
            return x
        if p == 1.0:
            return x * 0.0
        if x.backend.cuda and masks_come_from_seeds():
            return DropoutFun.apply(x, p, next_seed())
        kept = np.random.binomial(1, 1 - p, x.shape) / (1 - p)
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
        self.dim = as_size(dim, "LayerNorm1d: dim")
        self.eps = as_number(eps, "LayerNorm1d: eps")
        self.weights = Parameter(ones((self.dim,), backend))
        self.bias = Parameter(zeros((self.dim,), backend))

    def forward(self, x: Tensor) -> Tensor:
        """(..., dim) -> (..., dim)

        Raises:
            TypeError: x is no Tensor.
            ValueError: the input's last size is not dim.

        """
        check_tensor(x, "LayerNorm1d: x")
        if x.dims < 1 or x.shape[-1] != self.dim:
            raise ValueError(
                f"LayerNorm1d: the last size of x must be {self.dim}, got shape {x.shape}"
            )
        return x.layernorm(self.weights.value, self.bias.value, self.eps)


__all__ = ["Dropout", "Embedding", "LayerNorm1d", "Linear"]
