"""The engine: it records nothing and knows no operation, it only walks the graph backwards.

A variable is anything that answers `parents`, `is_leaf`, `is_constant` and `chain_rule`: `Scalar`
and `Tensor` both do. The verbs are `topological_sort`, `backpropagate` and `central_difference`;
`Context` is what a function's forward pass keeps for its backward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import ContextDecorator
from contextvars import ContextVar, Token
from typing import Any, Protocol

_GRAD_ENABLED: ContextVar[bool] = ContextVar("minitorch_grad_enabled", default=True)


def is_grad_enabled() -> bool:
    """Whether operations record the graph: False inside `no_grad()`."""
    return _GRAD_ENABLED.get()


class no_grad(ContextDecorator):
    """Context manager and decorator: operations inside record no graph, so nothing is kept for a
    backward pass.

    Example:
        >>> import minitorch
        >>> x = minitorch.tensor([1.0])
        >>> with minitorch.no_grad():
        ...     y = x * 2
        >>> y.is_constant()
        True
    """

    def __init__(self) -> None:
        self._tokens: list[Token[bool]] = []

    def __enter__(self) -> no_grad:
        self._tokens.append(_GRAD_ENABLED.set(False))
        return self

    def __exit__(self, *exc: object) -> None:
        _GRAD_ENABLED.reset(self._tokens.pop())


def central_difference(
    f: Callable[..., Any], *vals: Any, arg: int = 0, epsilon: float = 1e-6
) -> Any:
    r"""Approximate the derivative of `f` in its argument number `arg`.

    $$f'(x_i) \approx (f(\dots, x_i + \epsilon, \dots) - f(\dots, x_i - \epsilon, \dots)) /
    2\epsilon$$

    Args:
        f: a function of `len(vals)` numbers (or Scalars) that returns one.
        vals: where the derivative is taken.
        arg: number of the argument that moves.
        epsilon: half the distance between the two points.

    """
    above, below = list(vals), list(vals)
    above[arg] = vals[arg] + epsilon
    below[arg] = vals[arg] - epsilon
    return (f(*above) - f(*below)) / (2 * epsilon)


class Variable(Protocol):
    """What the engine needs to know of a node of the graph."""

    def accumulate_derivative(self, x: Any) -> None:
        """Add `x` to the derivative kept by this leaf."""

    @property
    def unique_id(self) -> int:
        """A number that no other variable has."""

    def is_leaf(self) -> bool:
        """Whether the user made this variable, no operation did."""

    def is_constant(self) -> bool:
        """Whether no derivative is wanted for this variable."""

    @property
    def parents(self) -> Iterable[Variable]:
        """The inputs of the operation that made this variable."""

    def chain_rule(self, d_output: Any) -> Iterable[tuple[Variable, Any]]:
        """Each input of that operation with its derivative, given the output's."""

    def release_graph(self) -> None:
        """Forget what the forward pass saved: the backward pass has used it."""


def topological_sort(variable: Variable) -> Iterable[Variable]:
    """All non-constant variables that `variable` depends on, each before its parents, `variable`
    first.

    The order is that of a depth-first search, visiting parents in argument order, reversed. It uses
    a stack of its own, so that a graph may be deeper than Python's recursion limit.
    """
    order: list[Variable] = []
    if variable.is_constant():
        return order
    seen = {variable.unique_id}
    stack = [(variable, iter(variable.parents))]
    while stack:
        node, parents = stack[-1]
        for parent in parents:
            if not parent.is_constant() and parent.unique_id not in seen:
                seen.add(parent.unique_id)
                stack.append((parent, iter(parent.parents)))
                break
        else:  # every parent has been visited
            order.append(node)
            stack.pop()
    order.reverse()
    return order


def backpropagate(variable: Variable, deriv: Any, retain_graph: bool = True) -> None:
    """Run the backward pass from `variable`: the derivatives of leaves accumulate in them.

    Args:
        variable: the right-most variable of the graph.
        deriv: derivative of the final result with respect to `variable`.
        retain_graph: if False, what each operation saved is released as soon as it has been used,
            so that memory falls during the pass; a second pass through the same graph then raises
            RuntimeError.

    """
    remaining = list(topological_sort(variable))
    remaining.reverse()
    derivatives: dict[int, Any] = {variable.unique_id: deriv}
    while remaining:  # popped, so that a variable dies as soon as nothing needs it
        node = remaining.pop()
        if node.unique_id not in derivatives:
            continue  # no path along which a derivative flowed
        d_node = derivatives.pop(node.unique_id)
        if node.is_leaf():
            node.accumulate_derivative(d_node)
            continue
        for parent, d_parent in node.chain_rule(d_node):
            if parent.is_constant():
                continue
            key = parent.unique_id
            derivatives[key] = derivatives[key] + d_parent if key in derivatives else d_parent
        if not retain_graph:
            node.release_graph()


class Context:
    """What the forward pass of one function call keeps for its backward pass.

    Args:
        no_grad: if True nothing is kept, because no derivative is wanted.

    Attributes:
        needs_input_grad: for each input, whether its derivative is wanted; empty if that is not
            known. A backward pass may leave the others out.

    """

    __slots__ = ("_released", "_saved", "needs_input_grad", "no_grad")

    def __init__(self, no_grad: bool = False) -> None:
        self.no_grad = no_grad
        self.needs_input_grad: tuple[bool, ...] = ()
        self._saved: tuple[Any, ...] = ()
        self._released = False

    def save_for_backward(self, *values: Any) -> None:
        """Keep `values`, to be read from `saved_values` in the backward pass."""
        if not self.no_grad:
            self._saved = values

    @property
    def saved_values(self) -> tuple[Any, ...]:
        """The values kept, always as a tuple.

        Raises:
            RuntimeError: the graph has been released by an earlier backward pass.

        """
        if self._released:
            raise RuntimeError(
                "this graph was already used by backward(), which released what it had saved: call "
                "backward(retain_graph=True) the first time, or compute the forward pass again"
            )
        return self._saved

    @property
    def saved_tensors(self) -> tuple[Any, ...]:
        """The newer name of `saved_values`."""
        return self.saved_values

    @property
    def released(self) -> bool:
        """Whether a backward pass has released what was saved."""
        return self._released

    def release(self) -> None:
        """Forget the saved values for good."""
        self._saved = ()
        self._released = True
