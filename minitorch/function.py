"""What every differentiable operation is made of: `Function`, and the `History` that it records."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple

from .arguments import as_int, as_number, check_tensor, tensor_class
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
            TypeError: too many inputs or too few, or another type than `forward` is annotated with.
            ValueError: some tensors are on the GPU and some are not.

        """
        _check_inputs(cls, inputs)
        tensor = tensor_class()
        wants = tuple([isinstance(x, tensor) and x.history is not None for x in inputs])
        tracked = is_grad_enabled() and True in wants
        ctx = Context(no_grad=not tracked)
        ctx.needs_input_grad = wants
        raw = [x.detach() if isinstance(x, tensor) else x for x in inputs]
        try:
            out = cls._forward(ctx, *raw)
        except Exception as error:
            _explain_mixture(cls.__name__, raw, error)
            raise
        if not isinstance(out, tensor):
            raise TypeError(
                f"{cls.__name__}.forward must return a Tensor, got {type(out).__name__}"
            )
        if not tracked:
            return out
        return type(out)(out._tensor, History(cls, ctx, inputs), backend=out.backend)


class _Signature(NamedTuple):
    """What `forward` of a function takes after the context."""

    names: tuple[str, ...]  # "MatMul: t1" and so on
    checks: tuple[Callable[[Any, str], object] | None, ...]  # by annotation; None: anything goes
    least: int  # how many inputs there must be
    most: float


_CHECKS: dict[frozenset[str], Callable[[Any, str], object]] = {
    frozenset({"Tensor"}): check_tensor,
    frozenset({"Tensor", "None"}): lambda x, name: None if x is None else check_tensor(x, name),
    frozenset({"float"}): as_number,
    frozenset({"int"}): as_int,
}


@cache
def _signature(cls: type[Function]) -> _Signature:
    forward = getattr(cls, "forward", None)
    if forward is None:
        raise TypeError(f"{cls.__name__} defines no forward(ctx, ...)")
    parameters = list(inspect.signature(forward).parameters.values())[1:]
    several = [p for p in parameters if p.kind is p.VAR_POSITIONAL]
    checks = []
    for parameter in parameters:
        written = parameter.annotation
        text = written if isinstance(written, str) else getattr(written, "__name__", str(written))
        types = frozenset(part.strip(" '\"").split(".")[-1] for part in text.split("|"))
        checks.append(_CHECKS.get(types))
    return _Signature(
        tuple(f"{cls.__name__}: {p.name}" for p in parameters),
        tuple(checks),
        sum(p.default is p.empty for p in parameters) - len(several),
        math.inf if several else len(parameters),
    )


def _check_inputs(cls: type[Function], inputs: Sequence[Any]) -> None:
    """Raise TypeError unless the inputs are as many, and what, `forward` says that it takes."""
    names, checks, least, most = _signature(cls)  # type: ignore[arg-type]
    if not least <= len(inputs) <= most:
        wanted = ", ".join(name.split(": ")[1] for name in names)
        raise TypeError(f"{cls.__name__} takes {wanted}; {len(inputs)} inputs were given")
    last = len(names) - 1
    for i, x in enumerate(inputs):
        k = i if i < last else last  # the last parameter may stand for any number
        check = checks[k]
        if check is not None:
            check(x, names[k])


def _explain_mixture(name: str, inputs: Sequence[Any], error: Exception) -> None:
    """If a function failed because its tensors are not in one place, say so."""
    on_device = {x._tensor.on_device for x in inputs if isinstance(x, tensor_class())}
    if len(on_device) > 1:
        raise ValueError(
            f"{name}: some of its tensors are on the GPU and some on the CPU; "
            "move them with .to(backend)"
        ) from error
