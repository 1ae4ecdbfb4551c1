"""Check gradients against finite differences."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from .arguments import check_tensor
from .autodiff import is_grad_enabled, no_grad, topological_sort
from .dtypes import BFLOAT16
from .rng import fingerprint, manual_seed, random_state_kept
from .tensor import Tensor
from .tensor_data import UserIndex

SMALL = 32  # up to this many elements each one is moved by itself
DIRECTIONS = 4  # random directions for a larger tensor
SAMPLES = 4  # and single elements of it, so that a failure can name an index
EPS = float(np.finfo(np.float64).eps)

# (rtol, atol, and a share of the tensor's largest gradient that is added to atol) of the gradient
# under test, by its dtype: what sums of a hundred terms lose to rounding. The differences
# themselves are always in float64.
TOLERANCES = {
    np.dtype(np.float64): (1e-3, 1e-6, 0.0),
    np.dtype(np.float32): (1e-3, 1e-5, 1e-4),
    np.dtype(np.float16): (3e-2, 3e-2, 0.0),
    BFLOAT16: (1e-1, 1e-1, 0.0),
}

Array = npt.NDArray[np.float64]


def grad_central_difference(
    f: Callable[..., Tensor], *vals: Tensor, arg: int = 0, epsilon: float = 1e-6, ind: UserIndex
) -> float:
    """Central difference of `f(*vals).sum()` in one element, in float64.

    Args:
        f: a function of tensors.
        vals: where the derivative is taken.
        arg: number of the tensor that moves.
        epsilon: how far, to each side.
        ind: index of the element that moves.

    Raises:
        TypeError: `vals` are not tensors, or `f` returns none.
        ValueError: `epsilon` is not above 0, or too small to change the element.
        IndexError: there is no such argument or element.

    """
    _check_arguments(f, vals, epsilon)
    if not -len(vals) <= arg < len(vals):
        raise IndexError(f"arg must be the number of one of {len(vals)} tensors, got {arg}")
    index = tuple(ind)
    vals[arg]._tensor.index(index)  # raises if there is no such element
    step = np.zeros(vals[arg].shape)
    step[index] = epsilon
    above, below = (_evaluate(f, vals, arg % len(vals), sign * step) for sign in (1, -1))
    return float((above - below).sum() / (2 * epsilon))


def grad_check(
    f: Callable[..., Tensor],
    *vals: Tensor,
    epsilon: float = 1e-6,
    rtol: float | None = None,
    atol: float | None = None,
    tol: float | None = None,
    seed: int = 10,
) -> None:
    """Check the gradients that `backward` gives for `f` against finite differences.

    The output is projected on random weights w, so that errors cannot cancel in a plain sum, and
    the derivative of sum(w * f) is compared: for each element of a small tensor, and along random
    directions (and a few single elements) of a large one. The gradient under test is computed in
    each tensor's own dtype, the differences always on float64 copies. At a kink (relu at 0) a
    one-sided difference is accepted as well.

    `f` gets copies, as leaves. The caller's tensors, their graphs and gradients, those of other
    tensors that `f` uses, and the state of the random generators are afterwards as before.

    Args:
        f: a function of tensors that returns a tensor. It may draw random numbers from `random`,
            numpy's global generator and the library's, as dropout does: all are seeded before each
            call.
        vals: the tensors.
        epsilon: length of the finite step.
        rtol: relative tolerance; by default 1e-3 for float64 and float32 gradients, 3e-2 for
            float16, 1e-1 for bfloat16.
        atol: absolute tolerance; by default 1e-6 for float64, 1e-5 and 1e-4 times the tensor's
            largest gradient for float32, else the same as `rtol`.
        tol: the transformer course's name for `atol`.
        seed: of the random weights and directions, and of the random numbers of `f`.

    Raises:
        AssertionError: a gradient does not agree; the message names the argument, the index or
            direction, both values and the relative error.
        TypeError: `vals` are not tensors, or `f` returns none.
        ValueError: no tensor, one that holds NaN, an epsilon or a tolerance that is none, an
            epsilon too small to tell the values apart; or `f` gives two values for the same
            tensors, or computes with one of `vals` itself in place of what it is given.
        RuntimeError: called inside `no_grad()`.

    """
    _check_arguments(f, vals, epsilon)
    for name, tolerance in (("rtol", rtol), ("atol", atol), ("tol", tol)):
        if tolerance is not None and not 0 <= tolerance < math.inf:
            raise ValueError(f"{name} must be a number of at least 0, got {tolerance}")
    if not is_grad_enabled():
        raise RuntimeError("grad_check needs the graph, which is not recorded inside no_grad()")
    with random_state_kept():
        manual_seed(seed)
        before = fingerprint()
        rng = np.random.default_rng(seed)
        gradients, weights = _gradients(f, vals, rng)
        draws = fingerprint() != before

        def output(arg: int, step: Array | float) -> Array:
            if draws:
                manual_seed(seed)
            return _evaluate(f, vals, arg, step) * weights

        here = output(0, 0.0)
        if not np.array_equal(output(0, 0.0), here, equal_nan=True):
            raise ValueError(
                "f gives different values for the same tensors, so that it has no gradient to "
                "check: random numbers must come from random, np.random or the library"
            )
        for arg, (x, gradient) in enumerate(zip(vals, gradients, strict=True)):
            default_rtol, floor, share = TOLERANCES[x.dtype]
            largest = float(np.abs(gradient[np.isfinite(gradient)]).max(initial=0.0))
            default_atol = floor + share * largest
            check = _Check(
                output,
                here,
                arg,
                epsilon,
                default_rtol if rtol is None else rtol,
                next((t for t in (atol, tol) if t is not None), default_atol),
            )
            for where, direction in _directions(x.shape, rng):
                along = direction != 0  # elsewhere infinity may stand
                expected = float((gradient[along] * direction[along]).sum())
                check.compare(where, direction, expected)


def _check_arguments(f: Any, vals: tuple[Any, ...], epsilon: float) -> None:
    """Raise unless `f` can be called, `vals` are tensors, and `epsilon` moves them."""
    if not callable(f):
        raise TypeError(f"f must be a function of tensors, got {type(f).__name__}")
    if not vals:
        raise ValueError("grad_check needs at least one tensor beside the function, got none")
    if not 0 < epsilon < math.inf:
        raise ValueError(f"epsilon must be a number above 0, got {epsilon}")
    for arg, x in enumerate(vals):
        check_tensor(x, f"argument {arg}")
        values = np.abs(x.to_numpy().astype(np.float64))
        if np.isnan(values).any():
            raise ValueError(f"argument {arg} holds NaN, where there is no gradient to check")
        largest = float(values.max(initial=1.0, where=np.isfinite(values)))
        if epsilon < 100 * EPS * largest:
            raise ValueError(
                f"epsilon {epsilon:g} is too small a step for values up to {largest:g} in "
                f"float64 (argument {arg}): give a larger one"
            )


def _gradients(
    f: Callable[..., Tensor], vals: tuple[Tensor, ...], rng: np.random.Generator
) -> tuple[list[Array], Array]:
    """The gradient of each tensor that `backward` gives, and the weights of the output."""
    leaves = [x._new(x.backend.ops.cast(x.detach(), x.dtype)._tensor) for x in vals]
    for leaf in leaves:
        leaf.requires_grad_(True)
    out = _checked_output(f(*leaves))
    weights = rng.uniform(0.5, 1.5, out.shape) * rng.choice([-1.0, 1.0], out.shape)
    graph: list[Any] = list(topological_sort(out))
    _check_graph(graph, vals)
    others = [(x, x.grad) for x in graph if x.is_leaf() and all(x is not y for y in leaves)]
    try:
        if not out.is_constant():
            out.backward(out._from_numpy(weights.astype(out.dtype)))
    finally:
        for other, grad in others:
            other.grad = grad
    zeros = (np.zeros(x.shape) for x in vals)
    return [
        zero if leaf.grad is None else leaf.grad.to_numpy().astype(np.float64)
        for leaf, zero in zip(leaves, zeros, strict=True)
    ], weights


def _check_graph(graph: list[Any], vals: tuple[Tensor, ...]) -> None:
    """Raise if a function has computed with the caller's own tensors."""
    for arg, x in enumerate(vals):
        if any(node is x for node in graph):
            raise ValueError(
                f"f computes with argument {arg} of grad_check itself, in place of the copy that "
                "it is given: differences of the copy then say nothing of it"
            )


def _checked_output(out: Any) -> Tensor:
    if isinstance(out, Tensor):
        return out
    raise TypeError(f"f must return a Tensor, got {type(out).__name__}")


def _evaluate(
    f: Callable[..., Tensor], vals: tuple[Tensor, ...], arg: int, step: Array | float
) -> Array:
    """f on float64 copies, the one of number `arg` moved by `step`."""
    moved = []
    for i, x in enumerate(vals):
        value = x.to_numpy().astype(np.float64)
        moved.append(x._from_numpy(value + step if i == arg else value))
    with no_grad():
        return _checked_output(f(*moved)).to_numpy().astype(np.float64)


def _directions(shape: tuple[int, ...], rng: np.random.Generator) -> list[tuple[str, Array]]:
    """Unit steps along single elements, and random directions if there are many elements, each with
    a name.
    """
    size = int(np.prod(shape))
    chosen = range(size) if size <= SMALL else rng.choice(size, SAMPLES, replace=False)
    found = []
    for position in chosen:
        unit = np.zeros(size)
        unit[position] = 1.0
        index = tuple(int(i) for i in np.unravel_index(int(position), shape))
        found.append((f"index {index}", unit.reshape(shape)))
    if size > SMALL:
        for number in range(DIRECTIONS):
            direction = rng.standard_normal(shape)
            found.append((f"random direction {number}", direction / np.linalg.norm(direction)))
    return found


@dataclass(frozen=True)
class _Check:
    """The slopes of one argument, and how closely they must agree.

    Args:
        output: the weighted output, of an argument's number and a step.
        here: the weighted output without a step.
        arg: number of the argument.
        epsilon: length of a step.
        rtol: relative tolerance.
        atol: absolute tolerance.

    """

    output: Callable[[int, Array], Array]
    here: Array
    arg: int
    epsilon: float
    rtol: float
    atol: float

    def compare(self, where: str, direction: Array, expected: float) -> None:
        """Raise unless the slope along `direction` is the gradient's."""
        above, below = (self.output(self.arg, s * direction) for s in (self.epsilon, -self.epsilon))
        moved = (above != self.here) | (below != self.here)
        above, here, below = above[moved], self.here[moved], below[moved]
        with np.errstate(invalid="ignore"):  # inf - inf
            forward = float((above - here).sum() / self.epsilon)
            backward = float((here - below).sum() / self.epsilon)
            central = float((above - below).sum() / (2 * self.epsilon))
        finite = np.isfinite(here)
        rounding = EPS * float(np.abs(here[finite]).sum()) / self.epsilon
        for slope in (central, forward, backward):
            allowed = self.atol + self.rtol * max(abs(slope), abs(expected))
            if abs(slope - expected) <= allowed + 64 * rounding:
                self._check_rounding(where, rounding, max(allowed, self.rtol))
                return
        if not np.isfinite([central, forward, backward]).all() and not np.isfinite(expected):
            return  # both say that there is no derivative here
        error = abs(central - expected) / max(abs(central), abs(expected), 1e-300)
        raise AssertionError(
            f"gradient of argument {self.arg} at {where}: backward gives {expected:.8g}, "
            f"finite differences give {central:.8g} "
            f"(forward {forward:.8g}, backward {backward:.8g}), "
            f"relative error {error:.3g}; tolerance rtol {self.rtol:g}, atol {self.atol:g}"
        )

    def _check_rounding(self, where: str, rounding: float, allowed: float) -> None:
        """Raise if the differences are lost in the rounding of values that are much larger."""
        if rounding > allowed:
            raise ValueError(
                f"argument {self.arg} at {where}: the values of f, {np.abs(self.here).max():.3g} "
                f"and less, are too large for differences of steps of {self.epsilon:g} to show a "
                "gradient: divide f by a number, or give a larger epsilon"
            )


__all__ = ["grad_central_difference", "grad_check"]
