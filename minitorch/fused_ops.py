"""What each fused operation means: a few lines of numpy, the backward pass beside the forward pass.

Every backend inherits these, so SimpleOps has nothing else, and a backend with a faster kernel
overrides the pair. They are the text to read before a kernel, and what kernels are tested against.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from .kernels.flash_attention.standard import standard_attention, standard_attention_backward
from .tensor_data import TensorData

if TYPE_CHECKING:
    from .kernels.flash_attention.problem import AttentionProblem
    from .tensor import Tensor

    Array = npt.NDArray[Any]

_SQRT_2_OVER_PI = math.sqrt(2 / math.pi)


def _like(tensor: Tensor, array: Array) -> Tensor:
    """A constant tensor of `array`, made row-major, on the backend of `tensor`."""
    return tensor._new(TensorData.from_array(np.asarray(array, order="C")))


def _finite_max(x: Array, axis: int) -> Array:
    """The maximum along `axis`, 0 where everything is -inf: subtracting it never gives NaN."""
    maximum: Array = x.max(axis, keepdims=True, initial=-np.inf)
    return np.where(np.isneginf(maximum), x.dtype.type(0), maximum)


class FusedOps:
    """The fused operations of a backend, forward and backward. Tensors in, constant tensors out."""

    # ----- softmax: y = exp(x - max) / sum(exp(x - max)) -----

    @staticmethod
    def softmax_forward(x: Tensor, dim: int) -> Tensor:
        """Softmax along `dim`; a slice that is -inf throughout gives zeros."""
        a = x._tensor.array
        e = np.exp(a - _finite_max(a, dim))
        total = e.sum(dim, keepdims=True)
        return _like(x, e / np.where(total == 0, e.dtype.type(1), total))

    @staticmethod
    def softmax_backward(grad: Tensor, y: Tensor, dim: int) -> Tensor:
        """dx = y * (grad - sum(grad * y)), with `y` the softmax."""
        g, p = grad._tensor.array, y._tensor.array
        return _like(y, p * (g - (g * p).sum(dim, keepdims=True)))

    @staticmethod
    def logsumexp_forward(x: Tensor, dim: int) -> Tensor:
        """log(sum(exp(x))) along `dim`, which is kept with size 1."""
        a = x._tensor.array
        shift = _finite_max(a, dim)
        with np.errstate(divide="ignore"):  # log(0) = -inf where everything is -inf
            return _like(x, np.log(np.exp(a - shift).sum(dim, keepdims=True)) + shift)

    @staticmethod
    def logsumexp_backward(grad: Tensor, x: Tensor, logsumexp: Tensor) -> Tensor:
        """dx = grad * softmax(x)."""
        total = logsumexp._tensor.array
        shift = np.where(np.isneginf(total), total.dtype.type(0), total)
        return _like(x, grad._tensor.array * np.exp(x._tensor.array - shift))

    @classmethod
    def attn_softmax_fw(cls, inp: Tensor, mask: Tensor) -> Tensor:
        """softmax(inp + mask) along the last dimension; inp (B, H, from, to), mask broadcasts to
        it.
        """
        scores = inp._tensor.array + mask._tensor.array.astype(inp.dtype, copy=False)
        return cls.softmax_forward(_like(inp, scores), inp.dims - 1)

    @classmethod
    def attn_softmax_bw(cls, out_grad: Tensor, soft_inp: Tensor) -> Tensor:
        """Gradient of inp, given `soft_inp`, what the forward pass returned."""
        return cls.softmax_backward(out_grad, soft_inp, soft_inp.dims - 1)

    # ----- layer norm: y = gamma * (x - mean) / sqrt(var + eps) + beta -----

    @staticmethod
    def layernorm_fw(
        inp: Tensor, gamma: Tensor, beta: Tensor, eps: float = 1e-8
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Normalise the last dimension. inp (..., D), gamma and beta (D,) -> out, variance and mean
        (rows,).
        """
        x = inp._tensor.array
        mean = x.mean(-1, keepdims=True)
        var = ((x - mean) ** 2).mean(-1, keepdims=True)
        y = (x - mean) / np.sqrt(var + x.dtype.type(eps)) * gamma._tensor.array + beta._tensor.array
        return _like(inp, y), _like(inp, var.reshape(-1)), _like(inp, mean.reshape(-1))

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
        """Gradients of inp, gamma and beta."""
        x, g = inp._tensor.array, out_grad._tensor.array
        column = (*x.shape[:-1], 1)
        rstd = 1 / np.sqrt(var._tensor.array.reshape(column) + x.dtype.type(eps))
        xhat = (x - mean._tensor.array.reshape(column)) * rstd
        gx = g * gamma._tensor.array
        mean_gx = gx.mean(-1, keepdims=True)
        mean_gx_xhat = (gx * xhat).mean(-1, keepdims=True)
        rows = tuple(range(x.ndim - 1))
        dinp = rstd * (gx - mean_gx - xhat * mean_gx_xhat)
        return (
            _like(inp, dinp),
            _like(gamma, (g * xhat).sum(rows)),
            _like(beta, g.sum(rows)),
        )

    # ----- GELU, tanh form (Hendrycks & Gimpel 2016, section 2) -----

    @staticmethod
    def gelu_forward(x: Tensor) -> Tensor:
        """0.5 x (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3)))."""
        a = x._tensor.array
        return _like(x, 0.5 * a * (1 + np.tanh(_SQRT_2_OVER_PI * (a + 0.044715 * a**3))))

    @staticmethod
    def gelu_backward(grad: Tensor, x: Tensor) -> Tensor:
        """grad * d gelu(x) / dx."""
        a = x._tensor.array
        t = np.tanh(_SQRT_2_OVER_PI * (a + 0.044715 * a**3))
        inner = _SQRT_2_OVER_PI * (1 + 3 * 0.044715 * a**2)
        return _like(x, grad._tensor.array * (0.5 * (1 + t) + 0.5 * a * (1 - t * t) * inner))

    # ----- linear layer: y = x @ weight + bias -----

    @staticmethod
    def linear_forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """x (..., in), weight (in, out), bias (out,) or None -> (..., out)."""
        y = x._tensor.array @ weight._tensor.array
        return _like(x, y if bias is None else y + bias._tensor.array)

    @staticmethod
    def linear_backward(
        grad: Tensor, x: Tensor, weight: Tensor, needs: tuple[bool, bool, bool]
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Gradients of x, weight and bias; None for each that `needs` says is not wanted."""
        g, w = grad._tensor.array, weight._tensor.array
        count = math.prod(g.shape[:-1])
        rows = g.reshape(count, w.shape[1])  # (rows, out)
        x_rows = x._tensor.array.reshape(count, w.shape[0])  # (rows, in)
        return (
            _like(x, g @ w.T) if needs[0] else None,
            _like(weight, x_rows.T @ rows) if needs[1] else None,
            _like(weight, rows.sum(0)) if needs[2] else None,
        )

    # ----- embedding: y[i] = weight[ids[i]] -----

    @staticmethod
    def embedding_forward(ids: Tensor, weight: Tensor) -> Tensor:
        """ids (...), whole numbers stored as floats; weight (num_embeddings, E) -> (..., E)."""
        return _like(weight, weight._tensor.array[ids._tensor.array.astype(np.int64)])

    @staticmethod
    def embedding_backward(grad: Tensor, ids: Tensor, num_embeddings: int) -> Tensor:
        """Gradient of weight: each row of `grad` added to the row that it was read from."""
        g = grad._tensor.array
        dweight = np.zeros((num_embeddings, g.shape[-1]), g.dtype)
        np.add.at(dweight, ids._tensor.array.astype(np.int64), g)
        return _like(grad, dweight)

    # ----- cross entropy: loss = logsumexp(logits) - logits[target] -----

    @staticmethod
    def cross_entropy_forward(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """logits (N, C), target (N,) -> the loss and the logsumexp of each row, both (N,)."""
        x, t = logits._tensor.array, target._tensor.array.astype(np.int64)
        shift = _finite_max(x, 1)
        logsumexp = np.log(np.exp(x - shift).sum(1)) + shift[:, 0]
        return _like(logits, logsumexp - x[np.arange(len(t)), t]), _like(logits, logsumexp)

    @staticmethod
    def cross_entropy_backward(
        grad: Tensor, logits: Tensor, target: Tensor, logsumexp: Tensor
    ) -> Tensor:
        """dlogits = grad * (softmax(logits) - one_hot(target)); grad (N,)."""
        x, t = logits._tensor.array, target._tensor.array.astype(np.int64)
        p = np.exp(x - logsumexp._tensor.array[:, None])
        p[np.arange(len(t)), t] -= 1
        return _like(logits, p * grad._tensor.array[:, None])

    # ----- AdamW (Loshchilov & Hutter 2019, algorithm 2) -----

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
        """One update of `param`, `exp_avg` and `exp_avg_sq` in place; `step` counts from 1, no
        decay is Adam.
        """
        p, g = param._tensor.array, grad._tensor.array
        m, v = exp_avg._tensor.array, exp_avg_sq._tensor.array
        p *= 1 - lr * weight_decay
        m[...] = beta1 * m + (1 - beta1) * g
        v[...] = beta2 * v + (1 - beta2) * g * g
        m_hat = m / (1 - beta1**step)
        v_hat = v / (1 - beta2**step)
        p -= lr * m_hat / (np.sqrt(v_hat) + eps)

    # ----- attention: softmax(query @ key^T * scale + mask) @ value -----

    @staticmethod
    def flash_attention_forward(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Array | None,
        problem: AttentionProblem,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Output (..., seqlen_q, value_dim), logsumexp (..., seqlen_q), and the rows that the
        backward pass of the same backend wants, which may be None; here with the whole score
        matrix.
        """
        out, logsumexp, rows = standard_attention(
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
        """Gradients of query, key, value, and of an additive mask if it is wanted."""
        assert rows is not None
        dq, dk, dv, dmask = standard_attention_backward(
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
