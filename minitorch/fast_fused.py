"""Fused operations of FastOps: each hands its arrays to a kernel and wraps what comes back.

No mathematics here: `fused_ops` says what each operation means, `kernels/` how it is computed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from .kernels import adamw, cross_entropy, embedding, gelu, layernorm, linear, softmax
from .kernels.flash_attention import cpu as flash_attention
from .tensor_data import TensorData
from .tensor_ops import TensorOps

if TYPE_CHECKING:
    from .kernels.flash_attention.problem import AttentionProblem
    from .tensor import Tensor

    Array = npt.NDArray[Any]


def _like(tensor: Tensor, array: Array) -> Tensor:
    """A constant tensor of `array`, made row-major, on the backend of `tensor`."""
    return tensor._new(TensorData.from_array(np.asarray(array, order="C")))


def _arrays(*tensors: Tensor) -> Any:
    """A tuple of the arrays of tensors, in one dtype: a kernel takes no mixture."""
    arrays = tuple(t._tensor.array for t in tensors)
    if len({a.dtype for a in arrays}) == 1:
        return arrays
    dtype = np.result_type(*arrays)
    return tuple(a.astype(dtype, copy=False) for a in arrays)


def _whole_numbers(tensor: Tensor) -> npt.NDArray[np.int64]:
    return tensor._tensor.array.astype(np.int64)


class FastFusedOps(TensorOps):
    """The kernels' side of `FusedOps`."""

    # ----- softmax -----

    @staticmethod
    def softmax_forward(x: Tensor, dim: int) -> Tensor:
        """See `FusedOps.softmax_forward`."""
        along = np.moveaxis(x._tensor.array, dim, -1)
        return _like(x, np.moveaxis(softmax.forward(along), -1, dim))

    @staticmethod
    def softmax_backward(grad: Tensor, y: Tensor, dim: int) -> Tensor:
        """See `FusedOps.softmax_backward`."""
        g, p = (np.moveaxis(a, dim, -1) for a in _arrays(grad, y))
        return _like(y, np.moveaxis(softmax.backward(g, p), -1, dim))

    @staticmethod
    def logsumexp_forward(x: Tensor, dim: int) -> Tensor:
        """See `FusedOps.logsumexp_forward`."""
        along = np.moveaxis(x._tensor.array, dim, -1)
        return _like(x, np.expand_dims(softmax.logsumexp_forward(along), dim))

    @staticmethod
    def logsumexp_backward(grad: Tensor, x: Tensor, logsumexp: Tensor) -> Tensor:
        """See `FusedOps.logsumexp_backward`."""
        g, a, total = _arrays(grad, x, logsumexp)
        reduced = [d for d in range(a.ndim) if total.shape[d] != a.shape[d]]
        dim = reduced[0] if reduced else _dim_of_size_one(a)
        g, a, total = (np.moveaxis(array, dim, -1) for array in (g, a, total))
        dx = softmax.logsumexp_backward(g[..., 0], a, total[..., 0])
        return _like(x, np.moveaxis(dx, -1, dim))

    @classmethod
    def attn_softmax_fw(cls, inp: Tensor, mask: Tensor) -> Tensor:
        """See `FusedOps.attn_softmax_fw`."""
        return _like(inp, softmax.forward(inp._tensor.array, mask._tensor.array))

    # ----- layer norm -----

    @staticmethod
    def layernorm_fw(
        inp: Tensor, gamma: Tensor, beta: Tensor, eps: float = 1e-8
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See `FusedOps.layernorm_fw`."""
        x, weight, bias = _arrays(inp, gamma, beta)
        y, var, mean = layernorm.forward(x, weight, bias, eps)
        return _like(inp, y), _like(inp, var), _like(inp, mean)

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
        dy, x, weight, variance, centre = _arrays(out_grad, inp, gamma, var, mean)
        dinp, dgamma, dbeta = layernorm.backward(dy, x, weight, variance, centre, eps)
        return _like(inp, dinp), _like(gamma, dgamma), _like(beta, dbeta)

    # ----- GELU -----

    @staticmethod
    def gelu_forward(x: Tensor) -> Tensor:
        """See `FusedOps.gelu_forward`."""
        return _like(x, gelu.forward(x._tensor.array))

    @staticmethod
    def gelu_backward(grad: Tensor, x: Tensor) -> Tensor:
        """See `FusedOps.gelu_backward`."""
        return _like(x, gelu.backward(*_arrays(grad, x)))

    # ----- linear layer -----

    @staticmethod
    def linear_forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """See `FusedOps.linear_forward`."""
        if bias is None:
            rows, w = _arrays(x, weight)
            return _like(x, linear.forward(rows, w, None))
        return _like(x, linear.forward(*_arrays(x, weight, bias)))

    @staticmethod
    def linear_backward(
        grad: Tensor, x: Tensor, weight: Tensor, needs: tuple[bool, bool, bool]
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """See `FusedOps.linear_backward`."""
        dy, rows, w = _arrays(grad, x, weight)
        dx, dweight, dbias = linear.backward(dy, rows, w, needs)
        return (
            None if dx is None else _like(x, dx),
            None if dweight is None else _like(weight, dweight),
            None if dbias is None else _like(weight, dbias),
        )

    # ----- embedding -----

    @staticmethod
    def embedding_forward(ids: Tensor, weight: Tensor) -> Tensor:
        """See `FusedOps.embedding_forward`."""
        return _like(weight, embedding.forward(_whole_numbers(ids), weight._tensor.array))

    @staticmethod
    def embedding_backward(grad: Tensor, ids: Tensor, num_embeddings: int) -> Tensor:
        """See `FusedOps.embedding_backward`."""
        dweight = embedding.backward(grad._tensor.array, _whole_numbers(ids), num_embeddings)
        return _like(grad, dweight)

    # ----- cross entropy -----

    @staticmethod
    def cross_entropy_forward(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """See `FusedOps.cross_entropy_forward`."""
        loss, logsumexp = cross_entropy.forward(logits._tensor.array, _whole_numbers(target))
        return _like(logits, loss), _like(logits, logsumexp)

    @staticmethod
    def cross_entropy_backward(
        grad: Tensor, logits: Tensor, target: Tensor, logsumexp: Tensor
    ) -> Tensor:
        """See `FusedOps.cross_entropy_backward`."""
        g, x, total = _arrays(grad, logits, logsumexp)
        return _like(logits, cross_entropy.backward(g, x, _whole_numbers(target), total))

    # ----- AdamW -----

    @staticmethod
    def adamw_step(
        param: Tensor,
        grad: Tensor,
        exp_avg: Tensor,
        exp_avg_sq: Tensor,
        *,
        lr: float,
        beta1: float,
        beta2: float,
        eps: float,
        weight_decay: float,
        step: int,
    ) -> None:
        """See `FusedOps.adamw_step`; what changes is contiguous and of one dtype."""
        p, m, v = (t._tensor.array.reshape(-1) for t in (param, exp_avg, exp_avg_sq))
        g = np.ascontiguousarray(grad._tensor.array, param.dtype).reshape(-1)
        adamw.step(
            p,
            g,
            m,
            v,
            lr=lr,
            beta1=beta1,
            beta2=beta2,
            eps=eps,
            weight_decay=weight_decay,
            step=step,
        )

    # ----- attention -----

    @staticmethod
    def flash_attention_forward(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Array | None,
        problem: AttentionProblem,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """See `FusedOps.flash_attention_forward`; in tiles."""
        out, logsumexp, rows = flash_attention.forward(
            problem, query._tensor.array, key._tensor.array, value._tensor.array, attn_mask
        )
        return _like(query, out), _like(query, logsumexp), _like(query, rows)

    @staticmethod
    def flash_attention_backward(
        grad_out: Tensor,
        grad_logsumexp: Tensor | None,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Array | None,
        out: Tensor,
        rows: Tensor | None,
        problem: AttentionProblem,
        needs_mask_grad: bool = False,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """See `FusedOps.flash_attention_backward`; scores are computed again, tile by tile."""
        assert rows is not None
        dq, dk, dv, dmask = flash_attention.backward(
            problem,
            query._tensor.array,
            key._tensor.array,
            value._tensor.array,
            attn_mask,
            out._tensor.array,
            rows._tensor.array,
            grad_out._tensor.array,
            None if grad_logsumexp is None else grad_logsumexp._tensor.array,
            needs_mask_grad,
        )
        dmask_tensor = None if dmask is None else _like(query, dmask)
        return _like(query, dq), _like(key, dk), _like(value, dv), dmask_tensor


def _dim_of_size_one(a: Array) -> int:
    """Which dimension was reduced if that left the shape as it was: any of size 1 will do."""
    return a.shape.index(1) if 1 in a.shape else a.ndim - 1
