"""The differentiable operations on tensors: a small class each, its forward pass beside its
backward pass.

In order: elementwise, comparison, reduction, filling, dtype and device, matrix product, attention.
Those that move elements are in `movement_functions`, the fused ones in `fused_functions`. Functions
never ask where a tensor lives: its backend (`t.f`) has the operation.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from .arguments import check_dim
from .autodiff import Context
from .function import Function
from .kernels.flash_attention.variant import NO_VARIANT, VariantInputs, gradients_of_tensors

if TYPE_CHECKING:
    from .kernels.flash_attention.problem import AttentionProblem
    from .tensor import Tensor
    from .tensor_ops import TensorBackend


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
    """a ** exponent, where the exponent is a number, as the name says, or any tensor that
    broadcasts with a.
    """

    @staticmethod
    def forward(ctx: Context, a: Tensor, exponent: Tensor) -> Tensor:
        ctx.save_for_backward(a, exponent)
        return a.f.pow_scalar_zip(a, exponent)

    @staticmethod
    def backward(ctx: Context, grad_output: Tensor) -> tuple[Tensor | float, Tensor | float]:
        a, exponent = ctx.saved_values
        f = grad_output.f
        of_a, of_exponent = ctx.needs_input_grad or (True, True)
        grad_a: Tensor | float = 0.0
        if of_a and exponent.size == 1 and not of_exponent:
            number = exponent.item()
            if number:  # 0 * a**-1 is not 0 at a = 0
                power = f.pow_scalar_zip(a, exponent._ensure_tensor(number - 1.0))
                grad_a = f.mul_zip(grad_output, power * number)
        elif of_a:  # at exponent 0 the power is 1 in place of a**-1, for the same reason
            lower = f.add_zip(exponent - 1.0, f.eq_zip(exponent, exponent._ensure_tensor(0.0)))
            grad_a = f.mul_zip(grad_output, f.mul_zip(f.pow_scalar_zip(a, lower), exponent))
        if not of_exponent:
            return grad_a, 0.0
        return grad_a, f.mul_zip(grad_output, f.pow_back_zip(a, exponent))


class Sigmoid(Function):
    """1 / (1 + exp(-a))"""

    @staticmethod
    def forward(ctx: Context, t1: Tensor) -> Tensor:
        y = t1.f.sigmoid_map(t1)
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx: Context, grad_output: Tensor) -> Tensor:
        y: Tensor = ctx.saved_values[0]
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
        y: Tensor = ctx.saved_values[0]
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


class _Comparison(Function):
    """What the comparisons have in common."""

    @staticmethod
    def backward(ctx: Context, grad_output: Tensor) -> tuple[Tensor, Tensor]:
        a_shape, b_shape = ctx.saved_values
        return grad_output.zeros(a_shape), grad_output.zeros(b_shape)


class LT(_Comparison):
    """a < b"""

    @staticmethod
    def forward(ctx: Context, a: Tensor, b: Tensor) -> Tensor:
        ctx.save_for_backward(a.shape, b.shape)
        return a.f.lt_zip(a, b)


class EQ(_Comparison):
    """a == b"""

    @staticmethod
    def forward(ctx: Context, a: Tensor, b: Tensor) -> Tensor:
        ctx.save_for_backward(a.shape, b.shape)
        return a.f.eq_zip(a, b)


class IsClose(_Comparison):
    """|a - b| < 0.01"""

    @staticmethod
    def forward(ctx: Context, a: Tensor, b: Tensor) -> Tensor:
        ctx.save_for_backward(a.shape, b.shape)
        return a.f.is_close_zip(a, b)


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
        return grad_output.f.ops.broadcast_to(grad_output, shape), 0.0


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


# ----- filling, dtype, device -----


class MaskedFill(Function):
    """-inf where a mask is True (it broadcasts to the tensor), the tensor elsewhere."""

    @staticmethod
    def forward(ctx: Context, a: Tensor, mask: Any) -> Tensor:
        mask = a.f.ops.attention_mask(mask)
        ctx.save_for_backward(mask)
        return a.f.ops.masked_fill(a, mask, -np.inf)

    @staticmethod
    def backward(ctx: Context, grad_output: Tensor) -> tuple[Tensor, float]:
        (mask,) = ctx.saved_values
        return grad_output.f.ops.masked_fill(grad_output, mask, 0.0), 0.0


class BandFill(Function):
    """-inf outside a band: in column j of row i unless i + lower <= j < i + upper."""

    @staticmethod
    def forward(ctx: Context, a: Tensor, lower: int, upper: int) -> Tensor:
        ctx.save_for_backward(lower, upper)
        return a.f.ops.band_fill(a, lower, upper, -np.inf)

    @staticmethod
    def backward(ctx: Context, grad_output: Tensor) -> tuple[Tensor, float, float]:
        lower, upper = ctx.saved_values
        return grad_output.f.ops.band_fill(grad_output, lower, upper, 0.0), 0.0, 0.0


class Cast(Function):
    """The same values in another dtype."""

    @staticmethod
    def forward(ctx: Context, a: Tensor, dtype: np.dtype[Any]) -> Tensor:
        ctx.save_for_backward(a.dtype)
        return a.f.ops.cast(a, dtype)

    @staticmethod
    def backward(ctx: Context, grad_output: Tensor) -> tuple[Tensor, float]:
        (dtype,) = ctx.saved_values
        return grad_output.f.ops.cast(grad_output, dtype), 0.0


class Move(Function):
    """The same values on another backend."""

    @staticmethod
    def forward(ctx: Context, a: Tensor, backend: TensorBackend) -> Tensor:
        ctx.save_for_backward(a.backend)
        return type(a)(a._tensor, backend=backend)

    @staticmethod
    def backward(ctx: Context, grad_output: Tensor) -> tuple[Tensor, float]:
        (backend,) = ctx.saved_values
        return type(grad_output)(grad_output._tensor, backend=backend), 0.0


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
            return f.ops.linear_backward(grad_output, t1, t2, (True, True, False))[:2]  # type: ignore[return-value]
        return (
            f.matrix_multiply(grad_output, t2.transpose(-2, -1)),
            f.matrix_multiply(t1.transpose(-2, -1), grad_output),
        )


# ----- attention -----


class FlashAttention(Function):
    """softmax(query @ key^T * scale + mask) @ value in tiles (Dao 2023, algorithms 1 and 2).

    The tile loops are in `kernels/flash_attention/`. Only the output and two numbers of each row
    are kept; the backward pass computes the scores again, tile by tile.
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
        variant: VariantInputs = NO_VARIANT,
        *captured: Tensor,
    ) -> Tensor:
        """Output (..., Nq, Dv); with `return_lse` the logsumexp is joined as one more column, and a
        16-bit output becomes float32 for it. `captured` are the Tensors among what the score
        function is given.
        """
        mask = query.f.ops.attention_mask(attn_mask)
        out, logsumexp, rows = query.f.ops.flash_attention_forward(
            query, key, value, mask, problem, variant
        )
        ctx.save_for_backward(
            query, key, value, mask, out, rows, problem, needs_mask_grad, return_lse, variant,
            *captured,
        )  # fmt: skip
        if not return_lse:
            return out
        ops = query.f.ops
        if out.dtype != logsumexp.dtype:
            out = ops.cast(out, logsumexp.dtype)
        return ops.concatenate((out, ops.slice(logsumexp, (..., None))), out.dims - 1)

    @staticmethod
    def backward(ctx: Context, grad_output: Tensor) -> tuple[Any, ...]:
        """Gradients of query, key, value, of an additive mask that wants one, and of Tensors that
        the score function captured.
        """
        query, key, value, mask, out, rows, problem, *flags = ctx.saved_values
        needs_mask_grad, return_lse, variant = flags[:3]
        grad_logsumexp = None
        if return_lse:
            ops = grad_output.f.ops
            grad_logsumexp = ops.slice(grad_output, (..., -1))
            grad_output = ops.slice(grad_output, (..., slice(None, -1)))
            if grad_output.dtype != query.dtype:
                grad_output = ops.cast(grad_output, query.dtype)
        dq, dk, dv, dmask, *found = grad_output.f.ops.flash_attention_backward(
            grad_output,
            grad_logsumexp,
            query,
            key,
            value,
            mask,
            out,
            rows,
            problem,
            needs_mask_grad,
            variant,
        )
        gradients = gradients_of_tensors(problem.score_mod, variant.score, found)
        return dq, dk, dv, 0.0 if dmask is None else dmask, 0.0, 0.0, 0.0, 0.0, *gradients


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
