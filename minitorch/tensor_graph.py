"""A `Tensor` as a variable of the autodiff engine: its place in the graph, and the backward pass.

The functions are methods of `Tensor`, under the same names; see `autodiff.Variable`.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from .arguments import check_tensor, tensor_class
from .autodiff import Variable, backpropagate

if TYPE_CHECKING:
    from .autodiff import Context
    from .tensor import Tensor


def accumulate_derivative(self: Tensor, x: Any) -> None:
    """Add `x` to the gradient of this leaf; it is copied, so that no two gradients share
    memory.
    """
    if not self.is_leaf():
        raise RuntimeError("only leaves collect a derivative")
    if self.grad is None:
        slot = self._tensor.slot
        self.grad = x.f.ops.cast(x, self.dtype) if slot is None else slot.keep_gradient(x)
    else:
        self.grad = (self.grad + x).detach()


def is_leaf(self: Tensor) -> bool:
    """Whether no function made this tensor and it wants a gradient."""
    return self.history is not None and self.history.last_fn is None


def is_constant(self: Tensor) -> bool:
    """Whether no gradient is wanted."""
    return self.history is None


def parents(self: Tensor) -> Iterable[Variable]:
    """The tensors that this one was computed from."""
    inputs = () if self.history is None else self.history.inputs
    return [x for x in inputs if isinstance(x, tensor_class())]


def chain_rule(self: Tensor, d_output: Any) -> Iterable[tuple[Variable, Any]]:
    """Each input that wants a gradient, with its gradient in its shape."""
    history = self.history
    if history is None or history.last_fn is None or history.ctx is None:
        raise RuntimeError("chain_rule needs a tensor that a function made")
    ctx: Context = history.ctx
    _ = ctx.saved_values  # raises if the graph has been released
    grads = history.last_fn._backward(ctx, d_output)
    without = history.inputs[len(grads) :]  # plain values at the end need no gradient
    if len(grads) > len(history.inputs) or any(isinstance(x, tensor_class()) for x in without):
        raise RuntimeError(
            f"{history.last_fn.__name__}.backward returned {len(grads)} gradients for "
            f"{len(history.inputs)} inputs"
        )
    return [
        (x, x.expand(grad))
        for x, grad in zip(history.inputs, grads, strict=False)
        if isinstance(x, tensor_class()) and x.history is not None
    ]


def release_graph(self: Tensor) -> None:
    """Forget what the function that made this tensor had saved, and its inputs."""
    if self.history is not None and self.history.ctx is not None:
        self.history.ctx.release()
        self.history.inputs = ()


def backward(self: Tensor, grad_output: Tensor | None = None, retain_graph: bool = False) -> None:
    """Add the gradient of this tensor to the `grad` of every leaf that it was computed from.

    Args:
        grad_output: gradient of the final result with respect to this tensor, of its shape; 1
            if it has one element.
        retain_graph: keep what the forward pass saved, for another call.

    Raises:
        RuntimeError: no gradient is recorded, or an earlier call has released the graph.
        TypeError: `grad_output` is no Tensor.
        ValueError: it is missing for more than one element, or has another shape.

    """
    if self.history is None:
        raise RuntimeError("this tensor does not require a gradient: nothing to go back to")
    if grad_output is None:
        if self.size != 1:
            raise ValueError(
                f"backward() of a tensor of shape {self.shape} needs grad_output: "
                "give one, or sum() first"
            )
        grad_output = self._new(self.backend.ops.full(self.shape, 1.0, self.dtype))
    check_tensor(grad_output, "grad_output")
    if grad_output.shape != self.shape:
        raise ValueError(f"grad_output must have shape {self.shape}, got {grad_output.shape}")
    backpropagate(self, grad_output.detach(), retain_graph)
