"""What every differentiable operation is made of: `Function`, and the `History` that it records."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from .autodiff import Context, is_grad_enabled

if TYPE_CHECKING:
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
    """An operation with a derivative. Subclasses give `forward` and `backward`; `apply` records the
    graph.
    """

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

        Raises:
            ValueError: some tensors are on the GPU and some are not.

        """
        tracked = is_grad_enabled() and any(getattr(x, "history", None) is not None for x in inputs)
        ctx = Context(no_grad=not tracked)
        raw = [x.detach() if hasattr(x, "history") else x for x in inputs]
        try:
            out = cls._forward(ctx, *raw)
        except Exception as error:
            _explain_mixture(cls.__name__, raw, error)
            raise
        if not tracked:
            return out
        return type(out)(out._tensor, History(cls, ctx, inputs), backend=out.backend)


def _explain_mixture(name: str, inputs: Sequence[Any], error: Exception) -> None:
    """If a function failed because its tensors are not in one place, say so."""
    on_device = {x._tensor.on_device for x in inputs if hasattr(x, "_tensor")}
    if len(on_device) > 1:
        raise ValueError(
            f"{name}: some of its tensors are on the GPU and some on the CPU; "
            "move them with .to(backend)"
        ) from error


def as_int(value: Any) -> int:
    """A dimension, given as a whole number or as a tensor of one element (as MiniTorch's courses
    do).
    """
    return int(value.item()) if hasattr(value, "item") else int(value)


def as_ints(values: Any) -> tuple[int, ...]:
    """A shape or an order, given as numbers or as a tensor."""
    array = values.to_numpy().reshape(-1) if hasattr(values, "to_numpy") else values
    return tuple(int(v) for v in array)


def check_dim(dim: Any, dims: int) -> int:
    """A dimension counted from 0; negative ones count from the end.

    Raises:
        IndexError: there is no such dimension.

    """
    given = as_int(dim)
    if not -dims <= given < dims:
        raise IndexError(f"dim must be in [{-dims}, {dims - 1}] for {dims} dimensions, got {given}")
    return given % dims
