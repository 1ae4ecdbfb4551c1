"""What each fused operation means: a few lines of numpy, the backward pass beside the forward pass.

Every backend inherits these, so SimpleOps has nothing else, and a backend with a faster kernel
overrides the pair. Tensors on the GPU are copied to the host and back, which makes a backend whole
that has no kernels for them, as `CudaOps`. They are the text to read before a kernel, and what
kernels are tested against.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from .fused_checks import guard
from .ieee import quiet
from .kernels.flash_attention.standard import standard_attention, standard_attention_backward
from .kernels.flash_attention.variant import NO_VARIANT, VariantInputs, wanted_gradients
from .storage_ops import copied_to_host, host, like
from .tensor_data import TensorData

if TYPE_CHECKING:
    from .kernels.flash_attention.problem import AttentionProblem
    from .tensor import Tensor

    Array = npt.NDArray[Any]

_SQRT_2_OVER_PI = math.sqrt(2 / math.pi)


def arrays(*tensors: Tensor) -> Any:
    """A tuple of the arrays of tensors, all in the widest of their dtypes."""
    found = tuple(host(t) for t in tensors)
    if len({a.dtype for a in found}) == 1:
        return found
    dtype = np.result_type(*found)
    return tuple(a.astype(dtype, copy=False) for a in found)


def whole_numbers(tensor: Tensor) -> npt.NDArray[np.int64]:
    """The elements, which have been checked to be whole numbers."""
    return host(tensor).astype(np.int64)


def _mask_here(mask: Any) -> Any:
    """What a backend's `attention_mask` gave, as a numpy array."""
    return copied_to_host(mask) if isinstance(mask, TensorData) else mask


def _array_here(captured: Any) -> Array:
    """A captured array or tensor, as a numpy array."""
    return host(captured) if hasattr(captured, "_tensor") else captured


def _max_or_zero(x: Array, axis: int) -> Array:
    """The maximum along `axis`, 0 where everything is -inf: subtracting it then gives no NaN."""
    maximum: Array = x.max(axis, keepdims=True, initial=-np.inf)
    return np.where(np.isneginf(maximum), x.dtype.type(0), maximum)


def _softmax(x: Array, axis: int) -> Array:
    e = np.exp(x - _max_or_zero(x, axis))
    total = e.sum(axis, keepdims=True)
    return np.asarray(e / np.where(total == 0, e.dtype.type(1), total))


def _mean(x: Array) -> Array:
    """Along the last dimension, which is kept; NaN of no elements."""
    mean: Array = x.sum(-1, keepdims=True) / x.dtype.type(x.shape[-1])
    return mean


def _logsumexp(x: Array, axis: int) -> tuple[Array, Array]:
    """Two parts of log(sum(exp(x))) along `axis`, which is kept: the maximum and the logarithm of
    the sum under it. Their sum, infinite where a number or the sum is, has no room for the second
    where the first is large.
    """
    maximum = _max_or_zero(x, axis)
    shift = np.where(np.isfinite(maximum), maximum, x.dtype.type(0))
    total: Array = np.exp(x - shift).sum(axis, keepdims=True)
    return shift, np.log(total)


def _softmax_from(x: Array, logsumexp: Array) -> Array:
    """exp(x - logsumexp), divided by its sum, since a large logsumexp is rounded; zeros where
    everything is -inf.
    """
    finite = np.isfinite(logsumexp)
    e = np.exp(x - np.where(np.isneginf(logsumexp), x.dtype.type(0), logsumexp))
    axes = tuple(d for d in range(x.ndim) if logsumexp.shape[d] != x.shape[d])
    return np.asarray(e / np.where(finite, e.sum(axes, keepdims=True), e.dtype.type(1)))


class FusedOps:
    """The fused operations of a backend, forward and backward. Tensors in, constant tensors out.

    Those that need it begin with the check of `fused_checks` that has their name, here and in every
    class that overrides them.
    """

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        guard(cls)

    # ----- softmax: y = exp(x - max) / sum(exp(x - max)) -----

    @staticmethod
    @quiet
    def softmax_forward(x: Tensor, dim: int) -> Tensor:
        """Softmax along `dim`; a slice that is -inf throughout gives zeros."""
        return like(x, _softmax(host(x), dim))

    @staticmethod
    @quiet
    def softmax_backward(grad: Tensor, y: Tensor, dim: int) -> Tensor:
        """dx = y * (grad - sum(grad * y)), with `y` the softmax."""
        g, p = host(grad), host(y)
        return like(y, p * (g - (g * p).sum(dim, keepdims=True)))

    @staticmethod
    @quiet
    def logsumexp_forward(x: Tensor, dim: int) -> Tensor:
        """log(sum(exp(x))) along `dim`, which is kept with size 1."""
        maximum, log_sum = _logsumexp(host(x), dim)
        return like(x, maximum + log_sum)

    @staticmethod
    @quiet
    def logsumexp_backward(grad: Tensor, x: Tensor, logsumexp: Tensor) -> Tensor:
        """dx = grad * softmax(x)."""
        softmax = _softmax_from(host(x), host(logsumexp))
        return like(x, host(grad) * softmax)

    @staticmethod
    @quiet
    def attn_softmax_fw(inp: Tensor, mask: Tensor) -> Tensor:
        """softmax(inp + mask) along the last dimension; inp (B, H, from, to), mask broadcasts to
        it.
        """
        x = host(inp)
        return like(inp, _softmax(x + host(mask).astype(x.dtype, copy=False), inp.dims - 1))

    @classmethod
    def attn_softmax_bw(cls, out_grad: Tensor, soft_inp: Tensor) -> Tensor:
        """Gradient of inp, given `soft_inp`, what the forward pass returned."""
        return cls.softmax_backward(out_grad, soft_inp, soft_inp.dims - 1)

    # ----- layer norm: y = gamma * (x - mean) / sqrt(var + eps) + beta -----

    @staticmethod
    @quiet
    def layernorm_fw(
        inp: Tensor, gamma: Tensor, beta: Tensor, eps: float = 1e-8
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Normalise the last dimension. inp (..., D), gamma and beta (D,) or (1, D) -> out,
        variance and mean (rows,).
        """
        x, weight, bias = arrays(inp, gamma, beta)
        mean = _mean(x)
        var = _mean((x - mean) ** 2)
        y = (x - mean) / np.sqrt(var + x.dtype.type(eps)) * weight + bias
        return like(inp, y), like(inp, var.reshape(-1)), like(inp, mean.reshape(-1))

    @staticmethod
    @quiet
    def layernorm_bw(
        out_grad: Tensor,
        inp: Tensor,
        gamma: Tensor,
        beta: Tensor,
        var: Tensor,
        mean: Tensor,
        eps: float = 1e-8,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of inp, gamma and beta, in their shapes."""
        g, x, weight, variance, centre = arrays(out_grad, inp, gamma, var, mean)
        column = (*x.shape[:-1], 1)
        rstd = 1 / np.sqrt(variance.reshape(column) + x.dtype.type(eps))
        xhat = (x - centre.reshape(column)) * rstd
        gx = g * weight
        rows = tuple(range(x.ndim - 1))
        dinp = rstd * (gx - _mean(gx) - xhat * _mean(gx * xhat))
        return (
            like(inp, dinp),
            like(gamma, (g * xhat).sum(rows).reshape(gamma.shape)),
            like(beta, g.sum(rows).reshape(beta.shape)),
        )

    # ----- GELU, tanh form (Hendrycks & Gimpel 2016, section 2) -----

    @staticmethod
    @quiet
    def gelu_forward(x: Tensor) -> Tensor:
        """0.5 x (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3)))."""
        a = host(x)
        return like(x, 0.5 * a * (1 + np.tanh(_SQRT_2_OVER_PI * (a + 0.044715 * a**3))))

    @staticmethod
    @quiet
    def gelu_backward(grad: Tensor, x: Tensor) -> Tensor:
        """grad * d gelu(x) / dx."""
        a = host(x)
        t = np.tanh(_SQRT_2_OVER_PI * (a + 0.044715 * a**3))
        inner = _SQRT_2_OVER_PI * (1 + 3 * 0.044715 * a**2)
        return like(x, host(grad) * (0.5 * (1 + t) + 0.5 * a * (1 - t * t) * inner))

    # ----- linear layer: y = x @ weight + bias -----

    @staticmethod
    @quiet
    def linear_forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """x (..., in), weight (in, out), bias (out,) or (1, out) or None -> (..., out)."""
        if bias is None:
            a, w = arrays(x, weight)
            return like(x, a @ w)
        a, w, b = arrays(x, weight, bias)
        return like(x, a @ w + b)

    @staticmethod
    @quiet
    def linear_backward(
        grad: Tensor, x: Tensor, weight: Tensor, needs: tuple[bool, bool, bool]
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Gradients of x, weight and bias; None for each that `needs` says is not wanted."""
        g, w = host(grad), host(weight)
        count = math.prod(g.shape[:-1])
        rows = g.reshape(count, w.shape[1])  # (rows, out)
        x_rows = host(x).reshape(count, w.shape[0])  # (rows, in)
        return (
            like(x, g @ w.T) if needs[0] else None,
            like(weight, x_rows.T @ rows) if needs[1] else None,
            like(weight, rows.sum(0)) if needs[2] else None,
        )

    # ----- embedding: y[i] = weight[ids[i]] -----

    @staticmethod
    def embedding_forward(ids: Tensor, weight: Tensor) -> Tensor:
        """ids (...), whole numbers stored as floats; weight (num_embeddings, E) -> (..., E)."""
        return like(weight, host(weight)[whole_numbers(ids)])

    @staticmethod
    @quiet
    def embedding_backward(grad: Tensor, ids: Tensor, num_embeddings: int) -> Tensor:
        """Gradient of weight: each row of `grad` added to the row that it was read from."""
        g = host(grad)
        dweight = np.zeros((num_embeddings, g.shape[-1]), g.dtype)
        np.add.at(dweight, whole_numbers(ids), g)
        return like(grad, dweight)

    # ----- cross entropy: loss = log(sum(exp(logits - max))) + (max - logits[target]) -----

    @staticmethod
    @quiet
    def cross_entropy_forward(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """logits (N, C), target (N,) -> the loss and the logsumexp of each row, both (N,). They are
        NaN where a logit is inf or all are -inf: no softmax has a limit there.
        """
        x, t = host(logits), whole_numbers(target)
        maximum, log_sum = (part[:, 0] for part in _logsumexp(x, 1))
        log_sum = np.where(np.isinf(log_sum), x.dtype.type(np.nan), log_sum)
        loss = log_sum + (maximum - x[np.arange(len(t)), t])
        return like(logits, loss), like(logits, maximum + log_sum)

    @staticmethod
    @quiet
    def cross_entropy_backward(
        grad: Tensor, logits: Tensor, target: Tensor, logsumexp: Tensor
    ) -> Tensor:
        """dlogits = grad * (softmax(logits) - one_hot(target)); grad (N,)."""
        x, t = host(logits), whole_numbers(target)
        p = _softmax_from(x, host(logsumexp)[:, None])
        p[np.arange(len(t)), t] -= 1
        return like(logits, p * host(grad)[:, None])

    # ----- AdamW (Loshchilov & Hutter 2019, algorithm 2) -----

    @staticmethod
    @quiet
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
        p, g = host(param), host(grad)
        m, v = host(exp_avg), host(exp_avg_sq)
        p *= 1 - lr * weight_decay
        m[...] = beta1 * m + (1 - beta1) * g
        v[...] = beta2 * v + (1 - beta2) * g * g
        m_hat = m / (1 - beta1**step)
        v_hat = v / (1 - beta2**step)
        p -= lr * m_hat / (np.sqrt(v_hat) + eps)
        for changed, array in ((param, p), (exp_avg, m), (exp_avg_sq, v)):
            if changed._tensor.on_device:  # these were copies
                changed.f.ops.copy_into(changed, like(changed, array))

    # ----- attention: softmax(query @ key^T * scale + mask) @ value -----

    # What computes it, on arrays: here with the whole score matrix
    _attention_forward = staticmethod(standard_attention)
    _attention_backward = staticmethod(standard_attention_backward)

    @classmethod
    @quiet
    def flash_attention_forward(
        cls,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Any,
        problem: AttentionProblem,
        variant: VariantInputs = NO_VARIANT,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Output (..., seqlen_q, value_dim), logsumexp (..., seqlen_q), and the rows that the
        backward pass of the same backend wants, which may be None. The mask is one of
        `StorageOps.attention_mask`; `variant` is for the problem's score and mask functions.
        """
        out, logsumexp, rows = cls._attention_forward(
            problem, host(query), host(key), host(value), _mask_here(attn_mask),
            variant.each(_array_here),
        )  # fmt: skip
        return like(query, out), like(query, logsumexp), like(query, rows)

    @classmethod
    @quiet
    def flash_attention_backward(
        cls,
        grad_out: Tensor,
        grad_logsumexp: Tensor | None,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Any,
        out: Tensor,
        rows: Tensor | None,
        problem: AttentionProblem,
        needs_mask_grad: bool = False,
        variant: VariantInputs = NO_VARIANT,
    ) -> tuple[Tensor | None, ...]:
        """Gradients of query, key, value, of an additive mask if it is wanted (else None), and of
        each captured array that the score function's graph says wants one, in its dtype.
        """
        assert rows is not None
        dq, dk, dv, dmask, *captured = cls._attention_backward(
            problem,
            host(query),
            host(key),
            host(value),
            _mask_here(attn_mask),
            host(out),
            host(rows),
            host(grad_out),
            None if grad_logsumexp is None else host(grad_logsumexp),
            needs_mask_grad,
            variant=variant.each(_array_here),
        )
        dmask_tensor = None if dmask is None else like(query, dmask)
        owners = [variant.score.arrays[n] for n in wanted_gradients(problem.score_mod)]
        gradients = [
            like(owner, np.asarray(gradient, owner.dtype))
            for owner, gradient in zip(owners, captured, strict=True)
        ]
        assert dq is not None and dk is not None and dv is not None
        return like(query, dq), like(key, dk), like(value, dv), dmask_tensor, *gradients


guard(FusedOps)
