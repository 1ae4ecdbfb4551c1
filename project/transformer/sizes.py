"""How much memory a model needs at least: a size that cannot be is refused before it is tried."""

from __future__ import annotations

import numpy as np

from minitorch.kernels.gpu import runtime
from project.arguments import too_large

from .errors import UserError
from .memory import gpu_memory
from .options import FIELDS, RunOptions, flag

SIZES = ("layers", "d_model", "d_middle", "context", "batch")
OBJECTS = 20_000  # bytes of Python objects that a layer consists of, about


def check_size(options: RunOptions, vocabulary: int, training: bool = True) -> None:
    """Raise `UserError`, naming the option that weighs most, for a model without room.

    Args:
        options: the sizes, and the device.
        vocabulary: number of tokens.
        training: whether it is to be trained, or only to write text.

    """
    if options.training.device == "cuda" and not runtime.SIMULATED:
        problem = too_large(_needed(options, vocabulary, training), gpu_memory(), "the GPU")
    else:
        problem = too_large(_needed(options, vocabulary, training))
    if problem is None:
        return
    without = {
        name: _needed(options.replaced({name: FIELDS[name].default}), vocabulary, training)
        for name in SIZES
    }
    name = min(without, key=lambda name: without[name])
    raise UserError(f"{flag(name)} {options.flat()[name]} is too large: such a model {problem}")


def _needed(options: RunOptions, vocabulary: int, training: bool) -> int:
    """Bytes at least: weights; for training their gradients, two means each, and activations."""
    model, size = options.model, np.dtype(options.model.dtype).itemsize
    d, middle = model.d_model, model.d_middle
    layer = 4 * d * (d + 1) + 2 * d * middle + middle + 5 * d
    weights = model.layers * layer + (2 * vocabulary + model.context) * d + vocabulary
    needed = weights * size + model.layers * OBJECTS
    if not training:
        return needed
    tokens = options.training.batch * model.context
    activations = model.layers * (6 * d + 2 * middle)
    if model.attention == "standard":
        activations += model.layers * model.heads * model.context
    narrow = 2 if model.precision in ("bf16", "fp16") else size
    return needed + 3 * weights * size + tokens * (activations * narrow + vocabulary * size)
