"""Fused operations of FastOps: each hands its arrays to a kernel and wraps what comes back.

No mathematics here: `fused_ops` says what each operation means, `kernels/` how it is computed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from .fused_ops import arrays, whole_numbers
from .kernels import (
    adamw,
    cross_entropy,
    embedding,
    gelu,
    layernorm,
    linear,
    softmax,
)
from .kernels.flash_attention.cpu import launch as flash_attention
from .storage_ops import like
from .tensor_ops import TensorOps

if TYPE_CHECKING:
    from .tensor import Tensor

    Array = npt.NDArray[Any]


class FastFusedOps(TensorOps):
    """The kernels' side of `FusedOps`."""

    # ----- softmax -----

    @staticmethod
    def softmax_forward(x: Tensor, dim: int) -> Tensor:
        """See `FusedOps.softmax_forward`."""
        along = np.moveaxis(x._tensor.array, dim, -1)
        return like(x, np.moveaxis(softmax.forward(along), -1, dim))

    @staticmethod
    def softmax_backward(grad: Tensor, y: Tensor, dim: int) -> Tensor:
        """See `FusedOps.softmax_backward`."""
        g, p = (np.moveaxis(a, dim, -1) for a in arrays(grad, y))
        return like(y, np.moveaxis(softmax.backward(g, p), -1, dim))

    @staticmethod
    def logsumexp_forward(x: Tensor, dim: int) -> Tensor:
        """See `FusedOps.logsumexp_forward`."""
        along = np.moveaxis(x._tensor.array, dim, -1)
        return like(x, np.expand_dims(softmax.logsumexp_forward(along), dim))

    @staticmethod
    def logsumexp_backward(grad: Tensor, x: Tensor, logsumexp: Tensor) -> Tensor:
        """See `FusedOps.logsumexp_backward`."""
        g, a, total = arrays(grad, x, logsumexp)
        reduced = [d for d in range(a.ndim) if total.shape[d] != a.shape[d]]
        dim = reduced[0] if reduced else _dim_of_size_one(a)
        g, a, total = (np.moveaxis(array, dim, -1) for array in (g, a, total))
        dx = softmax.logsumexp_backward(g[..., 0], a, total[..., 0])
        return like(x, np.moveaxis(dx, -1, dim))

    @classmethod
    def attn_softmax_fw(cls, inp: Tensor, mask: Tensor) -> Tensor:
        """See `FusedOps.attn_softmax_fw`."""
        return like(inp, softmax.forward(inp._tensor.array, mask._tensor.array))

    # ----- layer norm -----

    @staticmethod
    def layernorm_fw(
        inp: Tensor, gamma: Tensor, beta: Tensor, eps: float = 1e-8
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See `FusedOps.layernorm_fw`."""
        x, weight, bias = arrays(inp, gamma, beta)
        y, var, mean = layernorm.forward(x, weight.reshape(-1), bias.reshape(-1), eps)
        return like(inp, y), like(inp, var), like(inp, mean)

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
        dy, x, weight, variance, centre = arrays(out_grad, inp, gamma, var, mean)
        dinp, dgamma, dbeta = layernorm.backward(dy, x, weight.reshape(-1), variance, centre, eps)
        return (
            like(inp, dinp),
            like(gamma, dgamma.reshape(gamma.shape)),
            like(beta, dbeta.reshape(beta.shape)),
        )

    # ----- GELU -----

    @staticmethod
    def gelu_forward(x: Tensor) -> Tensor:
        """See `FusedOps.gelu_forward`."""
        return like(x, gelu.forward(x._tensor.array))

    @staticmethod
    def gelu_backward(grad: Tensor, x: Tensor) -> Tensor:
        """See `FusedOps.gelu_backward`."""
        return like(x, gelu.backward(*arrays(grad, x)))

    # ----- linear layer -----

    @staticmethod
    def linear_forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """See `FusedOps.linear_forward`."""
        if bias is None:
            rows, w = arrays(x, weight)
            return like(x, linear.forward(rows, w, None))
        rows, w, b = arrays(x, weight, bias)
        return like(x, linear.forward(rows, w, b.reshape(-1)))

    @staticmethod
    def linear_backward(
        grad: Tensor, x: Tensor, weight: Tensor, needs: tuple[bool, bool, bool]
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """See `FusedOps.linear_backward`."""
        dy, rows, w = arrays(grad, x, weight)
        dx, dweight, dbias = linear.backward(dy, rows, w, needs)
        return (
            None if dx is None else like(x, dx),
            None if dweight is None else like(weight, dweight),
            None if dbias is None else like(weight, dbias),
        )

    # ----- embedding -----

    @staticmethod
    def embedding_forward(ids: Tensor, weight: Tensor) -> Tensor:
        """See `FusedOps.embedding_forward`."""
        return like(weight, embedding.forward(whole_numbers(ids), weight._tensor.array))

    @staticmethod
    def embedding_backward(grad: Tensor, ids: Tensor, num_embeddings: int) -> Tensor:
        """See `FusedOps.embedding_backward`."""
        dweight = embedding.backward(grad._tensor.array, whole_numbers(ids), num_embeddings)
        return like(grad, dweight)

    # ----- cross entropy -----

    @staticmethod
    def cross_entropy_forward(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """See `FusedOps.cross_entropy_forward`."""
        loss, logsumexp = cross_entropy.forward(logits._tensor.array, whole_numbers(target))
        return like(logits, loss), like(logits, logsumexp)

    @staticmethod
    def cross_entropy_backward(
        grad: Tensor, logits: Tensor, target: Tensor, logsumexp: Tensor
    ) -> Tensor:
        """See `FusedOps.cross_entropy_backward`."""
        g, x, total = arrays(grad, logits, logsumexp)
        return like(logits, cross_entropy.backward(g, x, whole_numbers(target), total))

    # ----- AdamW -----

    @staticmethod
    def adamw_step(
        param: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, **numbers: Any
    ) -> None:
        """See `FusedOps.adamw_step`; what changes is contiguous and of one dtype."""
        p, m, v = (t._tensor.array.reshape(-1) for t in (param, exp_avg, exp_avg_sq))
        g = np.ascontiguousarray(grad._tensor.array, param.dtype).reshape(-1)
        adamw.step(p, g, m, v, **numbers)

    # ----- attention: in tiles -----

    _attention_forward = staticmethod(flash_attention.forward)
    _attention_backward = staticmethod(flash_attention.backward)


def _dim_of_size_one(a: Array) -> int:
    """Which dimension was reduced if that left the shape as it was: any of size 1 will do."""
    return a.shape.index(1) if 1 in a.shape else a.ndim - 1
