"""The differentiable operations whose passes are fused: one class each, named beside `fused_ops`.

A backend computes them by the pairs of `FusedOps`; here is only what is saved in between.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .arguments import check_dim
from .autodiff import Context
from .function import Function

if TYPE_CHECKING:
    from .tensor import Tensor


class Softmax(Function):
    """exp(a - max) / sum(exp(a - max)) along a dimension."""

    @staticmethod
    def forward(ctx: Context, input: Tensor, dim: Any) -> Tensor:
        axis = check_dim(dim, input.dims)
        out = input.f.ops.softmax_forward(input, axis)
        ctx.save_for_backward(out, axis)
        return out

    @staticmethod
    def backward(ctx: Context, grad_output: Tensor) -> tuple[Tensor, float]:
        out, axis = ctx.saved_values
        return grad_output.f.ops.softmax_backward(grad_output, out, axis), 0.0


class LogSoftmax(Function):
    """(a - max) - logsumexp(a - max) along a dimension; NaN where one is inf or all are -inf, as in
    PyTorch. The maximum goes first: beside a large one the logarithm of the sum has no room.
    """

    @staticmethod
    def forward(ctx: Context, input: Tensor, dim: Any) -> Tensor:
        axis = check_dim(dim, input.dims)
        below = input - input.f.max_reduce(input, axis)
        out = below - input.f.ops.logsumexp_forward(below, axis)
        ctx.save_for_backward(out, axis)
        return out

    @staticmethod
    def backward(ctx: Context, grad_output: Tensor) -> tuple[Tensor, float]:
        out, axis = ctx.saved_values
        f = grad_output.f
        return grad_output - f.mul_zip(f.exp_map(out), f.add_reduce(grad_output, axis)), 0.0


class LogSumExp(Function):
    """log(sum(exp(a))) along a dimension."""

    @staticmethod
    def forward(ctx: Context, input: Tensor, dim: Any) -> Tensor:
        out = input.f.ops.logsumexp_forward(input, check_dim(dim, input.dims))
        ctx.save_for_backward(input, out)
        return out

    @staticmethod
    def backward(ctx: Context, grad_output: Tensor) -> tuple[Tensor, float]:
        input, out = ctx.saved_values
        return grad_output.f.ops.logsumexp_backward(grad_output, input, out), 0.0


class Attn_Softmax(Function):
    """softmax(inp + mask) along the last dimension."""

    @staticmethod
    def forward(ctx: Context, inp: Tensor, mask: Tensor) -> Tensor:
        out = inp.f.attn_softmax_fw(inp, mask)
        ctx.save_for_backward(out)
        return out

    @staticmethod
    def backward(ctx: Context, out_grad: Tensor) -> tuple[Tensor, Tensor]:
        (out,) = ctx.saved_values
        grad = out_grad.f.attn_softmax_bw(out_grad, out)
        return grad, grad  # summed to the mask's shape if the mask wants it


class LayerNorm(Function):
    """gamma * (inp - mean) / sqrt(var + eps) + beta over the last dimension."""

    @staticmethod
    def forward(
        ctx: Context, inp: Tensor, gamma: Tensor, beta: Tensor, eps: float = 1e-8
    ) -> Tensor:
        out, var, mean = inp.f.layernorm_fw(inp, gamma, beta, eps)
        ctx.save_for_backward(inp, gamma, beta, var, mean, eps)
        return out

    @staticmethod
    def backward(ctx: Context, out_grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return out_grad.f.layernorm_bw(out_grad, *ctx.saved_values)


class GELUFun(Function):
    """The tanh form of GELU."""

    @staticmethod
    def forward(ctx: Context, input: Tensor) -> Tensor:
        ctx.save_for_backward(input)
        return input.f.ops.gelu_forward(input)

    @staticmethod
    def backward(ctx: Context, grad_output: Tensor) -> Tensor:
        (input,) = ctx.saved_values
        return grad_output.f.ops.gelu_backward(grad_output, input)


class LinearFun(Function):
    """input @ weight + bias; bias may be None."""

    @staticmethod
    def forward(ctx: Context, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(input, weight, bias is not None)
        return input.f.ops.linear_forward(input, weight, bias)

    @staticmethod
    def backward(ctx: Context, grad_output: Tensor) -> tuple[Any, ...]:
        input, weight, has_bias = ctx.saved_values
        return grad_output.f.ops.linear_backward(grad_output, input, weight, (True, True, has_bias))


class EmbeddingFun(Function):
    """Row ids[i] of weight for each i."""

    @staticmethod
    def forward(ctx: Context, ids: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(ids, weight.shape[0])
        return weight.f.ops.embedding_forward(ids, weight)

    @staticmethod
    def backward(ctx: Context, grad_output: Tensor) -> tuple[float, Tensor]:
        ids, num_embeddings = ctx.saved_values
        return 0.0, grad_output.f.ops.embedding_backward(grad_output, ids, num_embeddings)


class SoftmaxLoss(Function):
    """Cross entropy of each row of logits (N, C) with its target (N,)."""

    @staticmethod
    def forward(ctx: Context, logits: Tensor, target: Tensor) -> Tensor:
        loss, logsumexp = logits.f.ops.cross_entropy_forward(logits, target)
        ctx.save_for_backward(logits, target, logsumexp)
        return loss

    @staticmethod
    def backward(ctx: Context, grad_output: Tensor) -> tuple[Tensor, float]:
        return grad_output.f.ops.cross_entropy_backward(grad_output, *ctx.saved_values), 0.0


class DropoutFun(Function):
    """input / (1 - p) where a mask keeps it, else 0; the backward pass makes the mask again."""

    @staticmethod
    def forward(ctx: Context, input: Tensor, p: float, seed: int) -> Tensor:
        ctx.save_for_backward(p, seed)
        return input.f.ops.dropout_forward(input, p, seed)

    @staticmethod
    def backward(ctx: Context, grad_output: Tensor) -> tuple[Tensor, float, float]:
        p, seed = ctx.saved_values
        return grad_output.f.ops.dropout_backward(grad_output, p, seed), 0.0, 0.0
