"""Check gradients against finite differences."""

from __future__ import annotations

import random
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from .autodiff import no_grad
from .dtypes import BFLOAT16
from .tensor import Tensor
from .tensor_data import UserIndex

__all__ = ["grad_central_difference", "grad_check"]

SMALL = 32  # up to this many elements each one is moved by itself
DIRECTIONS = 4  # random directions for a larger tensor
SAMPLES = 4  # and single elements of it, so that a failure can name an index

# (rtol, atol) of the gradient under test, by its dtype; the differences themselves are always in
# float64.
TOLERANCES = {
    np.dtype(np.float64): (1e-3, 1e-4),
    np.dtype(np.float32): (1e-2, 1e-2),
    np.dtype(np.float16): (3e-2, 3e-2),
    BFLOAT16: (1e-1, 1e-1),
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

    """
    step = np.zeros(vals[arg].shape)
    step[tuple(ind)] = epsilon
    above, below = (_evaluate(f, vals, arg, sign * step).sum() for sign in (1, -1))
    return float((above - below) / (2 * epsilon))


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

    Args:
        f: a deterministic function of tensors that returns a tensor.
        vals: the tensors; each becomes a leaf that requires a gradient.
        epsilon: length of the finite step.
        rtol: relative tolerance; by default 1e-3 for float64 gradients, 1e-2 for float32, 3e-2 for
            float16, 1e-1 for bfloat16.
        atol: absolute tolerance; by default 1e-4 for float64, else the same as `rtol`.
        tol: the transformer course's name for `atol`.
        seed: of the random weights and directions, and of `random` before each call of `f`, as in
            MiniTorch.

    Raises:
        AssertionError: a gradient does not agree; the message names the argument, the index or
            direction, both values and the relative error.

    """
    for x in vals:
        x.requires_grad_(True)
        x.zero_grad_()
    random.seed(seed)
    out = f(*vals)
    rng = np.random.default_rng(seed)
    weights = rng.uniform(0.5, 1.5, out.shape) * rng.choice([-1.0, 1.0], out.shape)
    out.backward(out._from_numpy(weights.astype(out.dtype)))

    def loss(arg: int, step: Array) -> float:
        random.seed(seed)
        return float((_evaluate(f, vals, arg, step) * weights).sum())

    for arg, x in enumerate(vals):
        gradient = np.zeros(x.shape) if x.grad is None else x.grad.to_numpy().astype(np.float64)
        default_rtol, default_atol = TOLERANCES[x.dtype]
        tolerance = (
            default_rtol if rtol is None else rtol,
            next((t for t in (atol, tol) if t is not None), default_atol),
        )
        for where, direction in _directions(x.shape, rng):
            _compare(loss, arg, where, direction, gradient, epsilon, tolerance)


def _evaluate(f: Callable[..., Tensor], vals: tuple[Tensor, ...], arg: int, step: Array) -> Array:
    """f on float64 copies, the one of number `arg` moved by `step`."""
    moved = []
    for i, x in enumerate(vals):
        value = x.to_numpy().astype(np.float64)
        moved.append(x._from_numpy(value + step if i == arg else value))
    with no_grad():
        return f(*moved).to_numpy().astype(np.float64)


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


def _compare(
    loss: Callable[[int, Array], float],
    arg: int,
    where: str,
    direction: Array,
    gradient: Array,
    epsilon: float,
    tolerance: tuple[float, float],
) -> None:
    """Raise unless the slope of `loss` along `direction` is the gradient's."""
    expected = float((gradient * direction).sum())
    above, here, below = (loss(arg, step * direction) for step in (epsilon, 0.0, -epsilon))
    central = (above - below) / (2 * epsilon)
    one_sided = [(above - here) / epsilon, (here - below) / epsilon]
    noise = 64 * np.finfo(np.float64).eps * max(abs(above), abs(below)) / epsilon
    rtol, atol = tolerance
    for slope in (central, *one_sided):
        if abs(slope - expected) <= atol + rtol * max(abs(slope), abs(expected)) + noise:
            return
    if not np.isfinite([above, here, below]).all() and not np.isfinite(expected):
        return  # both say that there is no derivative here
    error = abs(central - expected) / max(abs(central), abs(expected), 1e-300)
    raise AssertionError(
        f"gradient of argument {arg} at {where}: backward gives {expected:.8g}, "
        f"finite differences give {central:.8g} "
        f"(forward {one_sided[0]:.8g}, backward {one_sided[1]:.8g}), "
        f"relative error {error:.3g}; tolerance rtol {rtol:g}, atol {atol:g}"
    )
