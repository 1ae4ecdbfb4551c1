"""AdamW (Loshchilov & Hutter 2019, algorithm 2) on a GPU, and the numbers that steer it there.

The formulas are those of `adamw.py`. `step` takes its numbers from the host. `captured_step` takes
them from device memory, so that a CUDA graph can be replayed with other numbers each time: in
`scalars` (float64, `SCALARS` elements for each group of parameters) the host writes the learning
rate; in the first group's, clipping and loss scaling leave a factor for the gradient and whether to
skip the step, and the step is counted. These are kernels of one thread, a microsecond each:

    sum_of_squares, total  (reduce_cuda.py)   of the gradient, already flat
    unscale                FACTOR = FACTOR / scale,    SKIP if a gradient was not finite
    clip                   FACTOR = FACTOR min(1, max_norm / (norm + 1e-6))
    begin                  STEP = STEP + 1, the step's own numbers; FACTOR = 1;  for each group
    captured_step          every element, unless skipped;                       for each group
    update_scale           the loss scale for the next step
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import cache
from typing import Any

from .gpu.flat import COUNT, THREADS, flat_access, flat_blocks, flat_first
from .gpu.runtime import (
    Instance,
    cuda,
    device_function,
    kernel,
    launch,
    precision,
    types,
)

# Places in `scalars`. The host writes LR; the others are written by the kernels below.
LR, STEP, FACTOR, SKIP, NORM = 0, 1, 2, 3, 4
KEEP, RATE, EPS, STEP_FACTOR, STEP_SKIP = 5, 6, 7, 8, 9  # of the step that is being taken
SCALARS = 10

# Places in the state of the loss scale, float32.
SCALE, GROWTH_TRACKER = 0, 1
CLIP_EPS = 1e-6  # as in PyTorch's clip_grad_norm_
LARGEST_SCALE = 2.0**127  # the largest power of 2 in float32


# ----- every element -----


@cache
def _update(precision_name: str) -> Any:
    """Device function: new values of p, m and v in place, of the `COUNT` elements from `first`."""
    real = precision(precision_name).real
    load, store = flat_access(precision_name)
    one = real(1.0)

    @device_function
    def update(
        param, grad, exp_avg, exp_avg_sq, first, size, factor, keep, rate, eps, beta1, beta2
    ):
        p = cuda.local.array(COUNT, real)
        g = cuda.local.array(COUNT, real)
        m = cuda.local.array(COUNT, real)
        v = cuda.local.array(COUNT, real)
        load(param, first, size, p)
        load(grad, first, size, g)
        load(exp_avg, first, size, m)
        load(exp_avg_sq, first, size, v)
        for k in range(COUNT):
            d = g[k] * factor
            m[k] = beta1 * m[k] + (one - beta1) * d
            v[k] = beta2 * v[k] + (one - beta2) * d * d
            p[k] = keep * p[k] - rate * m[k] / (real(math.sqrt(v[k])) + eps)
        store(param, first, size, p)
        store(exp_avg, first, size, m)
        store(exp_avg_sq, first, size, v)

    return update


def step(
    precision_name: str,
    param: Any,
    grad: Any,
    exp_avg: Any,
    exp_avg_sq: Any,
    size: int,
    *,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    step: int,
) -> None:
    """Update param, exp_avg and exp_avg_sq (size,) in place with grad; `step` counts from 1."""
    if size == 0:
        return
    root_correction = math.sqrt(1 - beta2**step)
    keep, rate = 1 - lr * weight_decay, lr * root_correction / (1 - beta1**step)
    numbers = (
        _number(precision_name, x) for x in (keep, rate, eps * root_correction, beta1, beta2)
    )
    launch(
        step_kernel(precision_name), flat_blocks(size), THREADS,
        param, grad, exp_avg, exp_avg_sq, size, *numbers,
    )  # fmt: skip


@cache
def step_kernel(precision_name: str) -> Any:
    """Each element by itself; rate and eps carry the corrections: both are times sqrt(1 - b2^t)."""
    real, update = precision(precision_name).real, _update(precision_name)
    one = real(1.0)

    @kernel(THREADS)
    def adamw(param, grad, exp_avg, exp_avg_sq, size, keep, rate, eps, beta1, beta2):
        first = flat_first()
        if first < size:
            update(
                param, grad, exp_avg, exp_avg_sq, first, size,
                one, keep, rate, eps, beta1, beta2,
            )  # fmt: skip

    return adamw


def captured_step(
    precision_name: str,
    param: Any,
    grad: Any,
    exp_avg: Any,
    exp_avg_sq: Any,
    size: int,
    scalars: Any,
    *,
    beta1: float,
    beta2: float,
) -> None:
    """`step` with its numbers from `scalars`, those of one group, which `begin` has computed."""
    if size:
        launch(
            captured_step_kernel(precision_name), flat_blocks(size), THREADS,
            param, grad, exp_avg, exp_avg_sq, size, scalars,
            _number(precision_name, beta1), _number(precision_name, beta2),
        )  # fmt: skip


@cache
def captured_step_kernel(precision_name: str) -> Any:
    """Each element by itself."""
    real, update = precision(precision_name).real, _update(precision_name)

    @kernel(THREADS)
    def captured_adamw(param, grad, exp_avg, exp_avg_sq, size, scalars, beta1, beta2):
        first = flat_first()
        if first < size and scalars[STEP_SKIP] == 0.0:
            factor = real(scalars[STEP_FACTOR])
            keep, rate, eps = real(scalars[KEEP]), real(scalars[RATE]), real(scalars[EPS])
            update(
                param, grad, exp_avg, exp_avg_sq, first, size,
                factor, keep, rate, eps, beta1, beta2,
            )  # fmt: skip

    return captured_adamw


def _number(precision_name: str, value: float) -> Any:
    """A number as the kernel takes it: a Python float would be a float64."""
    return precision(precision_name).storage.type(value)


# ----- one thread -----


def begin(
    scalars: Any, group: int, *, beta1: float, beta2: float, eps: float, weight_decay: float
) -> None:
    """Compute the numbers of one group for the step that follows; begin with group 0."""
    launch(
        begin_kernel(), 1, 1,
        scalars, group, float(beta1), float(beta2), float(eps), float(weight_decay),
    )  # fmt: skip


@cache
def begin_kernel() -> Any:
    """Group 0 counts the step, and takes the factor and whether to skip for all groups."""

    @kernel(1)
    def begin_adamw(scalars, group, beta1, beta2, eps, weight_decay):
        if group == 0:
            if scalars[SKIP] == 0.0:
                scalars[STEP] += 1.0
            scalars[STEP_FACTOR], scalars[STEP_SKIP] = scalars[FACTOR], scalars[SKIP]
            scalars[FACTOR], scalars[SKIP] = 1.0, 0.0
        count, own = scalars[STEP], group * SCALARS
        root_correction = math.sqrt(1.0 - beta2**count)
        scalars[own + KEEP] = 1.0 - scalars[own + LR] * weight_decay
        scalars[own + RATE] = scalars[own + LR] * root_correction / (1.0 - beta1**count)
        scalars[own + EPS] = eps * root_correction
        scalars[own + STEP_FACTOR] = scalars[STEP_FACTOR]
        scalars[own + STEP_SKIP] = scalars[STEP_SKIP]

    return begin_adamw


def clip(total: Any, found: Any, scalars: Any, max_norm: float) -> None:
    """Leave the factor that brings the gradient's norm down to `max_norm`.

    Args:
        total: (1,) float32 or float64, the sum of the squares of the gradient.
        found: float32 (1,), not 0 if a gradient is not finite: then the step is skipped. Becomes 0.
        scalars: see above; NORM becomes the norm before.
        max_norm: the largest norm.

    """
    launch(clip_kernel(), 1, 1, total, found, scalars, float(max_norm))


@cache
def clip_kernel() -> Any:
    """The norm is that of the gradient times what the factor is already."""

    @kernel(1)
    def clip_gradient(total, found, scalars, max_norm):
        norm = math.sqrt(types.float64(total[0])) * scalars[FACTOR]
        scalars[NORM] = norm
        if found[0] != 0.0:
            scalars[SKIP] = 1.0
        elif norm + CLIP_EPS > max_norm:
            scalars[FACTOR] *= max_norm / (norm + CLIP_EPS)
        found[0] = 0.0

    return clip_gradient


def unscale(scale: Any, found: Any, scalars: Any) -> None:
    """Divide the gradient's factor by the loss scale; skip the step if `found` is not 0.

    Args:
        scale: float32 (2,), the state of the loss scale.
        found: float32 (1,), not 0 if a gradient is not finite; stays.
        scalars: see above.

    """
    launch(unscale_kernel(), 1, 1, scale, found, scalars)


@cache
def unscale_kernel() -> Any:
    """See `unscale`."""

    @kernel(1)
    def unscale_gradient(scale, found, scalars):
        scalars[FACTOR] /= types.float64(scale[SCALE])
        if found[0] != 0.0:
            scalars[SKIP] = 1.0

    return unscale_gradient


def update_scale(
    scale: Any, found: Any, growth_factor: float, backoff_factor: float, growth_interval: int
) -> None:
    """Lower the loss scale after a step that was skipped, raise it after many that were not.

    Args:
        scale: float32 (2,): the scale, and the steps since it last changed.
        found: float32 (1,), not 0 if the step was skipped. Becomes 0.
        growth_factor: for raising.
        backoff_factor: for lowering.
        growth_interval: steps without a skip until the scale is raised.

    """
    launch(
        update_scale_kernel(), 1, 1,
        scale, found, float(growth_factor), float(backoff_factor), float(growth_interval),
    )  # fmt: skip


@cache
def update_scale_kernel() -> Any:
    """As PyTorch's `_amp_update_scale_`."""

    @kernel(1)
    def update_loss_scale(scale, found, growth_factor, backoff_factor, growth_interval):
        if found[0] != 0.0:
            scale[SCALE] *= backoff_factor
            scale[GROWTH_TRACKER] = 0.0
        elif scale[GROWTH_TRACKER] + 1.0 >= growth_interval:
            if scale[SCALE] * growth_factor <= LARGEST_SCALE:
                scale[SCALE] *= growth_factor
            scale[GROWTH_TRACKER] = 0.0
        else:
            scale[GROWTH_TRACKER] += 1.0
        found[0] = 0.0

    return update_loss_scale


def instances() -> Iterator[Instance]:
    """Parameters are float32 or float64; 16 bits are for what is computed from them."""
    size, double = types.int64, types.float64
    single, scalars = precision("float32").array, precision("float64").array
    for name in ("float32", "float64"):
        array, real = precision(name).array, precision(name).real
        arrays = (array,) * 4
        yield Instance(f"adamw[{name}]", step_kernel(name), (*arrays, size, *(real,) * 5))
        yield Instance(
            f"captured_adamw[{name}]",
            captured_step_kernel(name),
            (*arrays, size, scalars, real, real),
        )
        yield Instance(f"clip_gradient[{name}]", clip_kernel(), (array, single, scalars, double))
    yield Instance("begin_adamw", begin_kernel(), (scalars, size, *(double,) * 4))
    yield Instance("unscale_gradient", unscale_kernel(), (single, single, scalars))
    yield Instance("update_loss_scale", update_scale_kernel(), (single, single, *(double,) * 3))
