"""The engine: it records nothing and knows no operation, it only walks the graph backwards.

A variable is anything that answers `parents`, `is_leaf`, `is_constant` and `chain_rule`: `Scalar`
and `Tensor` both do. The verbs are `topological_sort`, `backpropagate` and `central_difference`;
`Context` is what a function's forward pass keeps for its backward pass.
"""

from __future__ import annotations

import functools
import inspect
import sys
import types
from collections.abc import AsyncGenerator, Callable, Generator, Iterable
from contextvars import ContextVar
from itertools import count
from typing import Any, Protocol

# How many `no_grad()` a thread or task is in. A count, because blocks need not end in the order in
# which they began: two generators may take turns.
_no_grad_depth: ContextVar[int] = ContextVar("minitorch_no_grad_depth", default=0)

_ids = count(1)


def new_id() -> int:
    """A number that no other variable of this process has."""
    return next(_ids)


def is_grad_enabled() -> bool:
    """Whether operations record the graph: False inside `no_grad()`."""
    return not _no_grad_depth.get()


class no_grad:
    """Context manager and decorator: operations inside record no graph, so nothing is kept for a
    backward pass.

    It holds for the thread, or the asyncio task, that is inside. As a decorator, `@no_grad()` or
    `@no_grad`, it takes functions, methods, generators, coroutines and asynchronous generators;
    between the steps of the latter three, their caller is not inside.

    Raises:
        TypeError: it decorates a class, or what is no function.

    Example:
        >>> import minitorch
        >>> x = minitorch.tensor([1.0])
        >>> with minitorch.no_grad():
        ...     y = x * 2
        >>> y.is_constant()
        True
    """

    def __new__(cls, function: Any = None) -> Any:
        made = super().__new__(cls)
        return made if function is None else made(function)

    def __enter__(self) -> no_grad:
        _no_grad_depth.set(_no_grad_depth.get() + 1)
        return self

    def __exit__(self, *exc: object) -> None:
        _no_grad_depth.set(max(_no_grad_depth.get() - 1, 0))

    def __call__(self, function: Any) -> Any:
        """The function, that records no graph."""
        if isinstance(function, staticmethod | classmethod):
            return type(function)(self(function.__func__))
        if isinstance(function, type) or not callable(function):
            name = function.__name__ if isinstance(function, type) else type(function).__name__
            raise TypeError(f"no_grad decorates functions and methods, got {name}")
        if _is(inspect.isgeneratorfunction, function):
            return _generator(function)
        if _is(inspect.iscoroutinefunction, function):
            return _coroutine(function)
        if _is(inspect.isasyncgenfunction, function):
            return _async_generator(function)

        @functools.wraps(function)
        def without_graph(*args: Any, **kwargs: Any) -> Any:
            with no_grad():
                return function(*args, **kwargs)

        return without_graph


def _is(kind: Callable[[Any], bool], function: Any) -> bool:
    """Whether a function, or an object that is called as one, is of a kind."""
    while isinstance(function, functools.partial):
        function = function.func
    return kind(function) or kind(type(function).__call__)


def _steps(steps: Any) -> Generator[Any, Any, Any]:
    """What a generator or a coroutine yields and returns, each step inside `no_grad()`."""
    advance, argument = steps.send, None
    while True:
        with no_grad():
            try:
                item = advance(argument)
            except StopIteration as stop:
                return stop.value
        try:
            argument = yield item
            advance = steps.send
        except GeneratorExit:
            with no_grad():
                steps.close()
            raise
        except BaseException as error:
            advance, argument = steps.throw, error


_awaited = types.coroutine(_steps)


def _generator(function: Callable[..., Any]) -> Callable[..., Generator[Any, Any, Any]]:
    @functools.wraps(function)
    def without_graph(*args: Any, **kwargs: Any) -> Generator[Any, Any, Any]:
        return (yield from _steps(function(*args, **kwargs)))

    return without_graph


def _coroutine(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    async def without_graph(*args: Any, **kwargs: Any) -> Any:
        return await _awaited(function(*args, **kwargs))

    return without_graph


def _first_step(generator: AsyncGenerator[Any, Any]) -> Any:
    """Begin an asynchronous generator that only the one around it closes.

    The event loop hears of each that begins, by these hooks, and closes at its end those that are
    left, all at once: it would close the inner one a second time.
    """
    hooks = sys.get_asyncgen_hooks()
    sys.set_asyncgen_hooks(firstiter=None, finalizer=None)
    try:
        return generator.asend(None)
    finally:
        sys.set_asyncgen_hooks(*hooks)


def _async_generator(function: Callable[..., Any]) -> Callable[..., AsyncGenerator[Any, Any]]:
    @functools.wraps(function)
    async def without_graph(*args: Any, **kwargs: Any) -> AsyncGenerator[Any, Any]:
        inner = function(*args, **kwargs)
        step = _first_step(inner)
        while True:
            try:
                item = await _awaited(step)
            except StopAsyncIteration:
                return
            try:
                step = inner.asend((yield item))
            except GeneratorExit:
                await _awaited(inner.aclose())
                raise
            except BaseException as error:
                step = inner.athrow(error)

    return without_graph


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
