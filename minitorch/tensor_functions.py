"""Every differentiable operation on tensors: a small class with its forward pass beside its backward pass.

In order: elementwise, comparison, reduction, movement, matrix product, fused operations, attention. Functions never
ask where a tensor lives: its backend (`t.f`) has the operation.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from .autodiff import Context, is_grad_enabled
from .tensor_data import TensorData

if TYPE_CHECKING:
    from .kernels.flash_attention.problem import AttentionProblem
    from .tensor import Tensor


class History:
    """How a tensor came to be: the function, its context and its inputs. A leaf has an empty one.

    Args:
        last_fn: the function that made it.
        ctx: what that call saved.
        inputs: what it was called with, tensors and plain values.

    """

    __slots__ = ("ctx", "inputs", "last_fn")

    def __init__(
        self,
        last_fn: type[Function] | None = None,
        ctx: Context | None = None,
        inputs: Sequence[Any] = (),
    ) -> None:
        self.last_fn = last_fn
        self.ctx = ctx
        self.inputs = inputs


class Function:
    """An operation with a derivative. Subclasses give `forward` and `backward`; `apply` records the graph."""

    @classmethod
    def _backward(cls, ctx: Context, grad_out: Tensor) -> tuple[Any, ...]:
        grads = cls.backward(ctx, grad_out)  # type: ignore[attr-defined]
        return grads if isinstance(grads, tuple) else (grads,)

    @classmethod
    def _forward(cls, ctx: Context, *inputs: Any) -> Tensor:
        return cls.forward(ctx, *inputs)  # type: ignore[attr-defined,no-any-return]

    @classmethod
    def apply(cls, *inputs: Any) -> Tensor:
        """Call `forward` on detached inputs, and remember how, if any input wants a gradient.

        Args:
            inputs: tensors, and plain values that have no derivative.

        """
        tracked = is_grad_enabled() and any(
            getattr(x, "history", None) is not None for x in inputs
        )
        ctx = Context(no_grad=not tracked)
        raw = [x.detach() if hasattr(x, "history") else x for x in inputs]
        out = cls._forward(ctx, *raw)
        if not tracked:
            return out
        return type(out)(out._tensor, History(cls, ctx, inputs), backend=out.backend)


def _as_int(value: Any) -> int:
    """A dimension, given as a whole number or as a tensor of one element (as MiniTorch's courses do)."""
    return int(value.item()) if hasattr(value, "item") else int(value)


def _as_ints(values: Any) -> tuple[int, ...]:
    """A shape or an order, given as numbers or as a tensor."""
    array = values.to_numpy().reshape(-1) if hasattr(values, "to_numpy") else values
    return tuple(int(v) for v in array)


def check_dim(dim: Any, dims: int) -> int:
    """A dimension counted from 0; negative ones count from the end.

    Raises:
        IndexError: there is no such dimension.

    """
    given = _as_int(dim)
    if not -dims <= given < dims:
        raise IndexError(f"dim must be in [{-dims}, {dims - 1}] for {dims} dimensions, got {given}")
    return given % dims


# ----- elementwise -----


class Neg(Function):
    """-a"""

    @staticmethod
    def forward(ctx: Context, t1: Tensor) -> Tensor:
        return t1.f.neg_map(t1)

    @staticmethod
    def backward(ctx: Context, grad_output: Tensor) -> Tensor:
        return grad_output.f.neg_map(grad_output)


class Inv(Function):
    """1 / a"""

    @staticmethod
    def forward(ctx: Context, t1: Tensor) -> Tensor:
        ctx.save_for_backward(t1)
        return t1.f.inv_map(t1)

    @staticmethod
    def backward(ctx: Context, grad_output: Tensor) -> Tensor:
        (t1,) = ctx.saved_values
        return grad_output.f.inv_back_zip(t1, grad_output)


class Add(Function):
    """a + b"""

    @staticmethod
    def forward(ctx: Context, t1: Tensor, t2: Tensor) -> Tensor:
        return t1.f.add_zip(t1, t2)

    @staticmethod
    def backward(ctx: Context, grad_output: Tensor) -> tuple[Tensor, Tensor]:
        return grad_output, grad_output


class Mul(Function):
    """a * b"""

    @staticmethod
    def forward(ctx: Context, a: Tensor, b: Tensor) -> Tensor:
        ctx.save_for_backward(a, b)
        return a.f.mul_zip(a, b)

    @staticmethod
    def backward(ctx: Context, grad_output: Tensor) -> tuple[Tensor, Tensor]:
        a, b = ctx.saved_values
        f = grad_output.f
        return f.mul_zip(grad_output, b), f.mul_zip(grad_output, a)


class PowerScalar(Function):
    """a ** scalar, where scalar is a number or a tensor of one element without a derivative."""

    @staticmethod
    def forward(ctx: Context, a: Tensor, scalar: Tensor) -> Tensor:
        ctx.save_for_backward(a, scalar)
        return a.f.pow_scalar_zip(a, scalar)

    @staticmethod
    def backward(ctx: Context, grad_output: Tensor) -> tuple[Tensor, float]:
        a, scalar = ctx.saved_values
        exponent = scalar.item()
        if exponent == 0:  # 0 * a**-1 is not 0 at a = 0
            return grad_output.zeros(), 0.0
        power = a.f.pow_scalar_zip(a, scalar + -1.0)
        return grad_output.f.mul_zip(grad_output, power * exponent), 0.0


class Sigmoid(Function):
    """1 / (1 + exp(-a))"""

    @staticmethod
    def forward(ctx: Context, t1: Tensor) -> Tensor:
        y = t1.f.sigmoid_map(t1)
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx: Context, grad_output: Tensor) -> Tensor:
        (y,) = ctx.saved_values
        return grad_output * y * (-y + 1.0)


class Tanh(Function):
    """tanh(a)"""

    @staticmethod
    def forward(ctx: Context, t1: Tensor) -> Tensor:
        y = t1.f.tanh_map(t1)
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx: Context, grad_output: Tensor) -> Tensor:
        (y,) = ctx.saved_values
        return grad_output * (-(y * y) + 1.0)


class ReLU(Function):
    """max(a, 0)"""

    @staticmethod
    def forward(ctx: Context, t1: Tensor) -> Tensor:
        ctx.save_for_backward(t1)
        return t1.f.relu_map(t1)

    @staticmethod
    def backward(ctx: Context, grad_output: Tensor) -> Tensor:
        (t1,) = ctx.saved_values
        return grad_output.f.relu_back_zip(t1, grad_output)


class Log(Function):
    """log(a + 1e-6), MiniTorch's logarithm."""

    @staticmethod
    def forward(ctx: Context, t1: Tensor) -> Tensor:
        ctx.save_for_backward(t1)
        return t1.f.log_map(t1)

    @staticmethod
    def backward(ctx: Context, grad_output: Tensor) -> Tensor:
        (t1,) = ctx.saved_values
        return grad_output.f.log_back_zip(t1, grad_output)


class Exp(Function):
    """exp(a)"""

    @staticmethod
    def forward(ctx: Context, t1: Tensor) -> Tensor:
        y = t1.f.exp_map(t1)
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx: Context, grad_output: Tensor) -> Tensor:
        (y,) = ctx.saved_values
        return grad_output.f.mul_zip(y, grad_output)


# ----- comparison: 1.0 where true, 0.0 where not; the derivative is 0 -----


class LT(Function):
    """a < b"""

    @staticmethod
    def forward(ctx: Context, a: Tensor, b: Tensor) -> Tensor:
        ctx.save_for_backward(a.shape, b.shape)
        return a.f.lt_zip(a, b)

    @staticmethod
    def backward(ctx: Context, grad_output: Tensor) -> tuple[Tensor, Tensor]:
        a_shape, b_shape = ctx.saved_values
        return grad_output.zeros(a_shape), grad_output.zeros(b_shape)


class EQ(Function):
    """a == b"""

    @staticmethod
    def forward(ctx: Context, a: Tensor, b: Tensor) -> Tensor:
        ctx.save_for_backward(a.shape, b.shape)
        return a.f.eq_zip(a, b)

    @staticmethod
    def backward(ctx: Context, grad_output: Tensor) -> tuple[Tensor, Tensor]:
        a_shape, b_shape = ctx.saved_values
        return grad_output.zeros(a_shape), grad_output.zeros(b_shape)


class IsClose(Function):
    """|a - b| < 0.01"""

    @staticmethod
    def forward(ctx: Context, a: Tensor, b: Tensor) -> Tensor:
        ctx.save_for_backward(a.shape, b.shape)
        return a.f.is_close_zip(a, b)

    @staticmethod
    def backward(ctx: Context, grad_output: Tensor) -> tuple[Tensor, Tensor]:
        a_shape, b_shape = ctx.saved_values
        return grad_output.zeros(a_shape), grad_output.zeros(b_shape)


# ----- reduction: the dimension is kept with size 1 -----


class Sum(Function):
    """Sum along a dimension."""

    @staticmethod
    def forward(ctx: Context, a: Tensor, dim: Any) -> Tensor:
        ctx.save_for_backward(a.shape)
        return a.f.add_reduce(a, check_dim(dim, a.dims))

    @staticmethod
    def backward(ctx: Context, grad_output: Tensor) -> tuple[Tensor, float]:
        (shape,) = ctx.saved_values
        return grad_output.broadcast_to(shape), 0.0


class All(Function):
    """Product along a dimension: 1.0 if every element is true."""

    @staticmethod
    def forward(ctx: Context, a: Tensor, dim: Any) -> Tensor:
        ctx.save_for_backward(a.shape)
        return a.f.mul_reduce(a, check_dim(dim, a.dims))

    @staticmethod
    def backward(ctx: Context, grad_output: Tensor) -> tuple[Tensor, float]:
        (shape,) = ctx.saved_values
        return grad_output.zeros(shape), 0.0


class Max(Function):
    """Maximum along a dimension; the gradient goes to every element that attains it."""

    @staticmethod
    def forward(ctx: Context, input: Tensor, dim: Any) -> Tensor:
        out = input.f.max_reduce(input, check_dim(dim, input.dims))
        ctx.save_for_backward(input, out)
        return out

    @staticmethod
    def backward(ctx: Context, grad_output: Tensor) -> tuple[Tensor, float]:
        input, out = ctx.saved_values
        f = grad_output.f
        return f.mul_zip(f.eq_zip(input, out), grad_output), 0.0


class LogSumExp(Function):
    """log(sum(exp(a))) along a dimension."""

    @staticmethod
    def forward(ctx: Context, input: Tensor, dim: Any) -> Tensor:
        out = input.f.logsumexp_forward(input, check_dim(dim, input.dims))
        ctx.save_for_backward(input, out)
        return out

    @staticmethod
    def backward(ctx: Context, grad_output: Tensor) -> tuple[Tensor, float]:
        input, out = ctx.saved_values
        return grad_output.f.logsumexp_backward(grad_output, input, out), 0.0


# ----- movement -----


class Permute(Function):
    """The same elements with the dimensions in another order."""

    @staticmethod
    def forward(ctx: Context, a: Tensor, order: Any) -> Tensor:
        given = _as_ints(order)
        ctx.save_for_backward(given)
        return a._new(a._tensor.permute(*given))

    @staticmethod
    def backward(ctx: Context, grad_output: Tensor) -> tuple[Tensor, float]:
        (order,) = ctx.saved_values
        inverse = [order.index(i) for i in range(len(order))]
        return grad_output._new(grad_output._tensor.permute(*inverse)), 0.0


class View(Function):
    """The same elements, contiguous, in another shape."""

    @staticmethod
    def forward(ctx: Context, a: Tensor, shape: Any) -> Tensor:
        ctx.save_for_backward(a.shape)
        if not a._tensor.is_contiguous():
            raise AssertionError(
                f"view needs a contiguous tensor, got strides {a._tensor.strides} for shape {a.shape}: "
                "call contiguous() first"
            )
        return a._new(TensorData(a._tensor._storage[: a.size], _as_ints(shape)))

    @staticmethod
    def backward(ctx: Context, grad_output: Tensor) -> tuple[Tensor, float]:
        (shape,) = ctx.saved_values
        grad = grad_output.contiguous()
        return grad._new(TensorData(grad._tensor._storage, shape)), 0.0


class Copy(Function):
    """A contiguous copy."""

    @staticmethod
    def forward(ctx: Context, a: Tensor) -> Tensor:
        return a.f.id_map(a)

    @staticmethod
    def backward(ctx: Context, grad_output: Tensor) -> Tensor:
        return grad_output


class Slice(Function):
    """Basic indexing: a view of part of the tensor."""

    @staticmethod
    def forward(ctx: Context, a: Tensor, key: Any) -> Tensor:
        ctx.save_for_backward(a.shape, key)
        return a._new(TensorData.from_array(a._tensor.array[key]))

    @staticmethod
    def backward(ctx: Context, grad_output: Tensor) -> tuple[Tensor, float]:
        shape, key = ctx.saved_values
        grad = grad_output.zeros(shape)
        grad._tensor.array[key] = grad_output._tensor.array
        return grad, 0.0


class Concatenate(Function):
    """Tensors joined along a dimension."""

    @staticmethod
    def forward(ctx: Context, dim: int, *parts: Tensor) -> Tensor:
        axis = check_dim(dim, parts[0].dims)
        ctx.save_for_backward(axis, [part.shape[axis] for part in parts])
        joined = np.concatenate([part._tensor.array for part in parts], axis)
        return parts[0]._new(TensorData.from_array(joined))

    @staticmethod
    def backward(ctx: Context, grad_output: Tensor) -> tuple[Any, ...]:
        axis, sizes = ctx.saved_values
        pieces = np.split(grad_output._tensor.array, np.cumsum(sizes)[:-1], axis)
        return 0.0, *(grad_output._new(TensorData.from_array(piece)) for piece in pieces)


class MaskedFill(Function):
    """-inf where a mask is True (it broadcasts to the tensor), the tensor elsewhere."""

    @staticmethod
    def forward(ctx: Context, a: Tensor, mask: Any) -> Tensor:
        ctx.save_for_backward(mask)
        filled = np.where(mask, a.dtype.type(-np.inf), a._tensor.array)
        return a._new(TensorData.from_array(filled))

    @staticmethod
    def backward(ctx: Context, grad_output: Tensor) -> tuple[Tensor, float]:
        (mask,) = ctx.saved_values
        grad = np.where(mask, grad_output.dtype.type(0), grad_output._tensor.array)
        return grad_output._new(TensorData.from_array(grad)), 0.0


class Cast(Function):
    """The same values in another dtype."""

    @staticmethod
    def forward(ctx: Context, a: Tensor, dtype: np.dtype[Any]) -> Tensor:
        ctx.save_for_backward(a.dtype)
        return a._new(TensorData.from_array(a._tensor.array.astype(dtype)))

    @staticmethod
    def backward(ctx: Context, grad_output: Tensor) -> tuple[Tensor, float]:
        (dtype,) = ctx.saved_values
        return Cast.forward(Context(no_grad=True), grad_output, dtype), 0.0


# ----- matrix product -----


class MatMul(Function):
    """a @ b, leading dimensions broadcast."""

    @staticmethod
    def forward(ctx: Context, t1: Tensor, t2: Tensor) -> Tensor:
        ctx.save_for_backward(t1, t2)
        return t1.f.matrix_multiply(t1, t2)

    @staticmethod
    def backward(ctx: Context, grad_output: Tensor) -> tuple[Tensor, Tensor]:
        t1, t2 = ctx.saved_values
        f = grad_output.f
        if t2.dims == 2:  # one product over all rows, in place of one for each batch and a sum
            return f.linear_backward(grad_output, t1, t2, (True, True, False))[:2]  # type: ignore[return-value]
        return (
            f.matrix_multiply(grad_output, t2.transpose(-2, -1)),
            f.matrix_multiply(t1.transpose(-2, -1), grad_output),
        )


# ----- fused operations -----


class Softmax(Function):
    """exp(a - max) / sum(exp(a - max)) along a dimension."""

    @staticmethod
    def forward(ctx: Context, input: Tensor, dim: Any) -> Tensor:
        axis = check_dim(dim, input.dims)
        out = input.f.softmax_forward(input, axis)
        ctx.save_for_backward(out, axis)
        return out

    @staticmethod
    def backward(ctx: Context, grad_output: Tensor) -> tuple[Tensor, float]:
        out, axis = ctx.saved_values
        return grad_output.f.softmax_backward(grad_output, out, axis), 0.0


class LogSoftmax(Function):
    """a - logsumexp(a) along a dimension."""

    @staticmethod
    def forward(ctx: Context, input: Tensor, dim: Any) -> Tensor:
        axis = check_dim(dim, input.dims)
        out = input - input.f.logsumexp_forward(input, axis)
        ctx.save_for_backward(out, axis)
        return out

    @staticmethod
    def backward(ctx: Context, grad_output: Tensor) -> tuple[Tensor, float]:
        out, axis = ctx.saved_values
        f = grad_output.f
        return grad_output - f.mul_zip(f.exp_map(out), f.add_reduce(grad_output, axis)), 0.0


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
        return input.f.gelu_forward(input)

    @staticmethod
    def backward(ctx: Context, grad_output: Tensor) -> Tensor:
        (input,) = ctx.saved_values
        return grad_output.f.gelu_backward(grad_output, input)


class LinearFun(Function):
    """input @ weight + bias; bias may be None."""

    @staticmethod
    def forward(ctx: Context, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(input, weight, bias is not None)
        return input.f.linear_forward(input, weight, bias)

    @staticmethod
    def backward(ctx: Context, grad_output: Tensor) -> tuple[Any, ...]:
        input, weight, has_bias = ctx.saved_values
        return grad_output.f.linear_backward(grad_output, input, weight, (True, True, has_bias))


class EmbeddingFun(Function):
    """Row ids[i] of weight for each i."""

    @staticmethod
    def forward(ctx: Context, ids: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(ids, weight.shape[0])
        return weight.f.embedding_forward(ids, weight)

    @staticmethod
    def backward(ctx: Context, grad_output: Tensor) -> tuple[float, Tensor]:
        ids, num_embeddings = ctx.saved_values
        return 0.0, grad_output.f.embedding_backward(grad_output, ids, num_embeddings)


class SoftmaxLoss(Function):
    """Cross entropy of each row of logits (N, C) with its target (N,)."""

    @staticmethod
    def forward(ctx: Context, logits: Tensor, target: Tensor) -> Tensor:
        loss, logsumexp = logits.f.cross_entropy_forward(logits, target)
        ctx.save_for_backward(logits, target, logsumexp)
        return loss

    @staticmethod
    def backward(ctx: Context, grad_output: Tensor) -> tuple[Tensor, float]:
        return grad_output.f.cross_entropy_backward(grad_output, *ctx.saved_values), 0.0


# ----- attention -----


class FlashAttention(Function):
    """softmax(query @ key^T * scale + mask) @ value in tiles (Dao 2023, algorithms 1 and 2).

    The tile loops are in `kernels/flash_attention/`. Only the output and the logsumexp of each row are kept; the
    backward pass computes the scores again, tile by tile.
    """

    @staticmethod
    def forward(
        ctx: Context,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Any,
        problem: AttentionProblem,
        needs_mask_grad: bool,
        return_lse: bool,
    ) -> Tensor:
        """Output (..., Nq, Dv); with `return_lse` the logsumexp is joined to it as one more column."""
        mask = attn_mask._tensor.array if hasattr(attn_mask, "_tensor") else attn_mask
        out, logsumexp = query.f.flash_attention_forward(query, key, value, mask, problem)
        ctx.save_for_backward(
            query, key, value, mask, out, logsumexp, problem, needs_mask_grad, return_lse
        )
        if not return_lse:
            return out
        column = logsumexp._new(TensorData.from_array(logsumexp._tensor.array[..., None]))
        return Concatenate.forward(Context(no_grad=True), -1, out, column)

    @staticmethod
    def backward(ctx: Context, grad_output: Tensor) -> tuple[Any, ...]:
        """Gradients of query, key, value, and of an additive mask that wants one."""
        query, key, value, mask, out, logsumexp, problem, needs_mask_grad, return_lse = (
            ctx.saved_values
        )
        grad_logsumexp = None
        if return_lse:
            columns = grad_output._tensor.array
            grad_logsumexp = grad_output._new(TensorData.from_array(columns[..., -1]))
            grad_output = grad_output._new(TensorData.from_array(columns[..., :-1]))
        dq, dk, dv, dmask = grad_output.f.flash_attention_backward(
            grad_output,
            grad_logsumexp,
            query,
            key,
            value,
            mask,
            out,
            logsumexp,
            problem,
            needs_mask_grad,
        )
        return dq, dk, dv, 0.0 if dmask is None else dmask, 0.0, 0.0, 0.0


def __getattr__(name: str) -> Any:
    """Factories and `grad_check`, under the import path that MiniTorch's courses use for them."""
    if name.startswith("__"):  # the import system probes for `__path__` while this module loads
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from . import factories
    from .grad_check import grad_central_difference, grad_check

    moved = {public: getattr(factories, public) for public in factories.__all__}
    moved |= {"grad_central_difference": grad_central_difference, "grad_check": grad_check}
    if name in moved:
        return moved[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
