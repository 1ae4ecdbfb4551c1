"""The differentiable operations that only move elements: other orders, shapes, parts, copies."""

from __future__ import annotations

from itertools import accumulate
from math import prod
from typing import TYPE_CHECKING, Any

from .arguments import as_ints, as_shape, check_dim
from .autodiff import Context
from .function import Function
from .tensor_data import TensorData, shape_broadcast

if TYPE_CHECKING:
    from .tensor import Tensor


class Permute(Function):
    """The same elements with the dimensions in another order."""

    @staticmethod
    def forward(ctx: Context, a: Tensor, order: Any) -> Tensor:
        given = as_ints(order, "order")
        counted = tuple(n + a.dims if -a.dims <= n < 0 else n for n in given)
        ctx.save_for_backward(counted)
        return a._new(a._tensor.permute(*counted))

    @staticmethod
    def backward(ctx: Context, grad_output: Tensor) -> tuple[Tensor, float]:
        (order,) = ctx.saved_values
        inverse = [order.index(i) for i in range(len(order))]
        return grad_output._new(grad_output._tensor.permute(*inverse)), 0.0


class View(Function):
    """The same elements, contiguous, in another shape; a size of -1 is worked out."""

    @staticmethod
    def forward(ctx: Context, a: Tensor, shape: Any) -> Tensor:
        ctx.save_for_backward(a.shape)
        given = sizes = as_ints(shape, "shape")
        known = prod(n for n in sizes if n != -1)
        if sizes.count(-1) == 1 and known and a.size % known == 0:
            sizes = tuple(a.size // known if n == -1 else n for n in sizes)
        if min(sizes, default=0) < 0 or prod(sizes) != a.size:
            raise ValueError(
                f"view: shape {given} does not hold the {a.size} elements of {a.shape}"
            )
        if not a._tensor.is_contiguous():
            raise AssertionError(
                f"view needs a contiguous tensor, got strides {a._tensor.strides} for {a.shape}: "
                "call contiguous() first"
            )
        return a._new(TensorData(a._tensor._storage[: a.size], sizes))

    @staticmethod
    def backward(ctx: Context, grad_output: Tensor) -> tuple[Tensor, float]:
        (shape,) = ctx.saved_values
        grad = grad_output.contiguous()
        return grad._new(TensorData(grad._tensor._storage[: grad.size], shape)), 0.0


class BroadcastTo(Function):
    """The same elements repeated to a larger shape, without a copy."""

    @staticmethod
    def forward(ctx: Context, a: Tensor, shape: Any) -> Tensor:
        return a.f.ops.broadcast_to(a, as_shape(shape))

    @staticmethod
    def backward(ctx: Context, grad_output: Tensor) -> tuple[Tensor, float]:
        return grad_output, 0.0  # summed to the tensor's shape, as for all that broadcast


def expand(self: Tensor, other: Tensor | float) -> Tensor:
    """`other`, a gradient, brought to this tensor's shape: repeated where it is smaller, summed
    where it is larger.
    """
    other = self._ensure_tensor(other)
    if other.shape == self.shape:
        return other
    shape = shape_broadcast(self.shape, other.shape)
    out = other if other.shape == shape else self.f.ops.broadcast_to(other, shape)
    added = len(shape) - self.dims
    for dim in range(len(shape)):
        if shape[dim] != 1 and (dim < added or self.shape[dim - added] == 1):
            out = self.f.add_reduce(out, dim)
    contiguous = out.detach().contiguous()
    return self._new(TensorData(contiguous._tensor._storage[: self.size], self.shape))


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
        return a.f.ops.slice(a, key)

    @staticmethod
    def backward(ctx: Context, grad_output: Tensor) -> tuple[Tensor, float]:
        shape, key = ctx.saved_values
        return grad_output.f.ops.slice_backward(grad_output, key, shape), 0.0


class Concatenate(Function):
    """Tensors joined along a dimension."""

    @staticmethod
    def forward(ctx: Context, dim: int, *parts: Tensor) -> Tensor:
        if not parts:
            raise ValueError("Concatenate needs at least one tensor")
        axis = check_dim(dim, parts[0].dims)
        ctx.save_for_backward(axis, [part.shape[axis] for part in parts])
        return parts[0].f.ops.concatenate(parts, axis)

    @staticmethod
    def backward(ctx: Context, grad_output: Tensor) -> tuple[Any, ...]:
        axis, sizes = ctx.saved_values
        ends = list(accumulate(sizes))
        before = (slice(None),) * axis
        pieces = [(*before, slice(end - n, end)) for n, end in zip(sizes, ends, strict=True)]
        return 0.0, *(grad_output.f.ops.slice(grad_output, piece) for piece in pieces)
