"""Optimisers: SGD, Adam and AdamW; gradient clipping and a learning-rate schedule.

A step replaces the value of each parameter by a new leaf, as MiniTorch does, and never writes into
the old one: a graph, a snapshot or a second model that holds the old value is not disturbed. The
exception is Adam with `capturable=True`, for CUDA graphs: see `capturable.py`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from .autodiff import no_grad
from .capturable import CapturableState
from .factories import tensor
from .module import Parameter
from .scalar import Scalar
from .tensor import Tensor
from .tensor_data import TensorData

Array = npt.NDArray[Any]


def _check(name: str, value: float, low: float, high: float = math.inf) -> None:
    """Raise ValueError unless low <= value < high."""
    if not low <= value < high:
        wanted = f"at least {low:g}" if high == math.inf else f"in [{low:g}, {high:g})"
        raise ValueError(f"{name} must be {wanted}, got {value}")


def _gradient(parameter: Parameter) -> Any:
    """The gradient of a Tensor, the derivative of a Scalar, None if there is neither."""
    value = parameter.value
    return value.derivative if isinstance(value, Scalar) else getattr(value, "grad", None)


class Optimizer:
    """What all optimisers share: their parameters, what they keep for each of them, and saving it.

    Subclasses name what they keep in `slots` and compute one parameter's new value in `_update`.
    Parameters without a gradient are passed over. Scalars are stepped too.

    Args:
        parameters: what to optimise.
        lr: the learning rate, which may be changed between steps.

    Raises:
        ValueError: a negative learning rate.

    """

    slots: tuple[str, ...] = ()

    def __init__(self, parameters: Sequence[Parameter], lr: float) -> None:
        _check("lr", lr, 0.0)
        self.parameters = list(parameters)
        self._lr = lr
        self._kept: list[dict[str, Tensor]] = [{} for _ in self.parameters]
        self._steps = [0] * len(self.parameters)

    @property
    def lr(self) -> float:
        """The learning rate of the next step."""
        return self._lr

    @lr.setter
    def lr(self, lr: float) -> None:
        self._lr = lr

    def clip_grad_norm_(self, max_norm: float) -> float | Tensor:
        """`clip_grad_norm_` of this optimiser's parameters."""
        return clip_grad_norm_(self.parameters, max_norm)

    def zero_grad(self) -> None:
        """Forget the gradients of all parameters."""
        for parameter in self.parameters:
            parameter.zero_grad()

    def step(self) -> None:
        """Change each parameter that has a gradient."""
        with no_grad():
            for number, parameter in enumerate(self.parameters):
                gradient = _gradient(parameter)
                if gradient is None:
                    continue
                self._steps[number] += 1
                value = parameter.value
                if isinstance(value, Scalar):
                    pair = (tensor([x], dtype=np.float64) for x in (value.data, gradient))
                    parameter.update(Scalar(self._update(number, *pair).item()))
                else:
                    gradient = gradient.to(value.dtype)
                    parameter.update(self._update(number, value.detach(), gradient))

    def _update(self, number: int, value: Tensor, grad: Tensor) -> Tensor:
        """The new value of parameter `number`, which must not share memory with `value`."""
        raise NotImplementedError(f"{type(self).__name__} defines no _update()")

    def _slots_of(self, number: int, like: Tensor) -> dict[str, Tensor]:
        """What is kept for a parameter; zeros before its first step."""
        kept = self._kept[number]
        for slot in self.slots:
            if slot not in kept:
                kept[slot] = like.zeros()
            elif kept[slot].backend is not like.backend:  # the parameter has been moved
                kept[slot] = kept[slot].to(like.backend)
        return kept

    # ----- saving and loading -----

    def state_dict(self) -> dict[str, Array]:
        """The learning rate, the steps taken by each parameter, and all that is kept for it.

        With the parameters' own values, this is what a run needs to go on bit for bit.
        """
        state = {"lr": np.array(self.lr), "steps": np.array(self._steps, dtype=np.int64)}
        for number in range(len(self.parameters)):
            for slot in self.slots:
                state[f"{slot}.{number}"] = self._kept_array(slot, number)
        return state

    def _kept_array(self, slot: str, number: int) -> Array:
        """A copy of what is kept for a parameter."""
        kept = self._kept[number]
        return kept[slot].to_numpy() if slot in kept else _zeros_like(self.parameters[number])

    def load_state_dict(self, state: Mapping[str, Array]) -> None:
        """Take back what `state_dict` gave, for the same parameters in the same order.

        Raises:
            ValueError: names or shapes differ. The message lists all of them, and nothing has
                been changed.

        """
        arrays = {name: np.asarray(array) for name, array in state.items()}
        wanted = {name: array.shape for name, array in self.state_dict().items()}
        missing = [name for name in wanted if name not in arrays]
        unexpected = [name for name in arrays if name not in wanted]
        problems = [f"missing: {', '.join(missing)}"] if missing else []
        if unexpected:
            problems.append(f"unexpected: {', '.join(unexpected)}")
        for name, shape in wanted.items():
            if name in arrays and arrays[name].shape != shape:
                problems.append(f"{name} has shape {arrays[name].shape}, wanted {shape}")
        if problems:
            raise ValueError(
                f"state does not fit this {type(self).__name__}: {'; '.join(problems)}"
            )
        self.lr = float(arrays["lr"].item())
        self._steps = [int(n) for n in arrays["steps"]]
        self._load_kept(arrays)

    def _load_kept(self, arrays: Mapping[str, Array]) -> None:
        """Take back what `state_dict` gave under the names of the slots."""
        self._kept = [
            {slot: _tensor_like(arrays[f"{slot}.{number}"], parameter) for slot in self.slots}
            for number, parameter in enumerate(self.parameters)
        ]


def _zeros_like(parameter: Parameter) -> Array:
    value = parameter.value
    if isinstance(value, Tensor):
        return np.zeros(value.shape, value.dtype)
    return np.zeros(1)  # a Scalar is stepped as a tensor of one element


def _tensor_like(array: Array, parameter: Parameter) -> Tensor:
    """A constant tensor from a copy of `array`, in the dtype and on the backend of a parameter."""
    value = parameter.value
    if not isinstance(value, Tensor):
        return tensor(array, requires_grad=False)
    return value._new(TensorData.from_array(np.array(array, value.dtype, order="C")))


# sorted in order of increasing complexity


class SGD(Optimizer):
    """Stochastic gradient descent: value - lr * gradient.

    With weight decay, gradient + weight_decay * value takes the gradient's place; with momentum,
    velocity = momentum * velocity + gradient does, or gradient + momentum * velocity (Nesterov).
    The formulas are PyTorch's (its dampening 0). Source: Sutskever et al. 2013, section 2.

    Args:
        parameters: what to optimise.
        lr: the learning rate; 1.0 as in MiniTorch.
        momentum: the share of the velocity that a step keeps.
        weight_decay: strength of the pull towards 0.
        nesterov: look ahead along the velocity.

    Raises:
        ValueError: a negative argument, or `nesterov` without momentum.

    """

    def __init__(
        self,
        parameters: Sequence[Parameter],
        lr: float = 1.0,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
    ) -> None:
        super().__init__(parameters, lr)
        _check("momentum", momentum, 0.0)
        _check("weight_decay", weight_decay, 0.0)
        if nesterov and momentum == 0:
            raise ValueError("nesterov needs a momentum above 0, got 0")
        self.momentum = momentum
        self.weight_decay = weight_decay
        self.nesterov = nesterov
        self.slots = ("momentum",) if momentum else ()

    def _update(self, number: int, value: Tensor, grad: Tensor) -> Tensor:
        if self.weight_decay:
            grad = grad + value * self.weight_decay
        if self.momentum:
            kept = self._slots_of(number, value)
            velocity = kept["momentum"] * self.momentum + grad
            kept["momentum"] = velocity
            grad = grad + velocity * self.momentum if self.nesterov else velocity
        return value - grad * self.lr


class Adam(Optimizer):
    """Adam: the mean of recent gradients, divided by the root of the mean of their squares.

    Source: Kingma & Ba 2015, algorithm 1. Weight decay is added to the gradient, as in PyTorch.

    Args:
        parameters: what to optimise.
        lr: the learning rate.
        beta1: decay of the mean of the gradient.
        beta2: decay of the mean of its square.
        eps: added to the root of the latter.
        betas: PyTorch's way to give beta1 and beta2, in place of the two.
        weight_decay: strength of the pull towards 0.
        capturable: keep everything on the GPU and change parameters in place, all by one kernel, so
            that a CUDA graph can capture the step. Every parameter must then be on the GPU and have
            a gradient at each step, and each gets a new value at once, a view of one flat array.
            A graph goes on with what `load_state_dict` sets; `Parameter.update` it does not see.

    Raises:
        ValueError: an argument outside its range, or `capturable` with parameters on the CPU or
            with weight decay that is added to the gradient (AdamW's is not).

    """

    slots = ("exp_avg", "exp_avg_sq")
    decoupled = False  # whether weight decay acts on the value itself
    device_state: CapturableState | None = None  # of an optimiser that is capturable

    def __init__(
        self,
        parameters: Sequence[Parameter],
        lr: float = 1e-3,
        beta1: float = 0.9,
        beta2: float = 0.999,
        eps: float = 1e-8,
        *,
        betas: tuple[float, float] | None = None,
        weight_decay: float = 0.0,
        capturable: bool = False,
    ) -> None:
        super().__init__(parameters, lr)
        self.beta1, self.beta2 = (beta1, beta2) if betas is None else betas
        self.eps = eps
        self.weight_decay = weight_decay
        _check("beta1", self.beta1, 0.0, 1.0)
        _check("beta2", self.beta2, 0.0, 1.0)
        _check("eps", eps, 0.0)
        _check("weight_decay", weight_decay, 0.0)
        if capturable:
            if weight_decay and not self.decoupled:
                raise ValueError(
                    f"Adam with capturable=True needs weight_decay 0, got {weight_decay}: use AdamW"
                )
            self.device_state = CapturableState(self.parameters)
            self.lr = lr

    @property
    def lr(self) -> float:
        """The learning rate of the next step; setting it writes to the GPU if capturable."""
        return self._lr

    @lr.setter
    def lr(self, lr: float) -> None:
        self._lr = lr
        if self.device_state is not None:
            self.device_state.set_lr(lr)

    def clip_grad_norm_(self, max_norm: float) -> float | Tensor:
        """Scale the gradients so that their joint norm is at most `max_norm`.

        If capturable, the gradients stay as they are: the factor waits on the GPU for the next
        `step`, which is skipped if a gradient is infinite or NaN.

        Args:
            max_norm: the largest norm allowed.

        Returns:
            The joint norm before; if capturable a float64 Tensor of one element on the GPU, which
            the next call overwrites.

        """
        if self.device_state is None:
            return super().clip_grad_norm_(max_norm)
        _check("max_norm", max_norm, 0.0)
        return self.device_state.clip(max_norm)

    def step(self) -> None:
        """Change each parameter that has a gradient; if capturable, all must have one."""
        if self.device_state is None:
            super().step()
            return
        decay = self.weight_decay if self.decoupled else 0.0
        self.device_state.step(self.beta1, self.beta2, self.eps, decay)

    def state_dict(self) -> dict[str, Array]:
        """See `Optimizer.state_dict`; the same for an optimiser that is capturable."""
        if self.device_state is not None:
            self._steps = [self.device_state.steps()] * len(self.parameters)
        return super().state_dict()

    def _kept_array(self, slot: str, number: int) -> Array:
        if self.device_state is None:
            return super()._kept_array(slot, number)
        return self.device_state.kept(slot, number)

    def _load_kept(self, arrays: Mapping[str, Array]) -> None:
        if self.device_state is None:
            super()._load_kept(arrays)
            return
        self.device_state.load_steps(max(self._steps))
        for number in range(len(self.parameters)):
            for slot in self.slots:
                self.device_state.load(slot, number, arrays[f"{slot}.{number}"])

    def _update(self, number: int, value: Tensor, grad: Tensor) -> Tensor:
        kept = self._slots_of(number, value)
        if self.weight_decay and not self.decoupled:
            grad = grad + value * self.weight_decay
        new = value.f.id_map(value)  # a contiguous copy, which the fused step changes in place
        value.f.adamw_step(
            new,
            grad.contiguous(),
            kept["exp_avg"],
            kept["exp_avg_sq"],
            lr=self.lr,
            beta1=self.beta1,
            beta2=self.beta2,
            eps=self.eps,
            weight_decay=self.weight_decay if self.decoupled else 0.0,
            step=self._steps[number],
        )
        return new


class AdamW(Adam):
    """Adam with weight decay that shrinks the value itself, by lr * weight_decay a step.

    Source: Loshchilov & Hutter 2019, algorithm 2. Arguments as for `Adam`, defaults as in PyTorch.
    """

    decoupled = True

    def __init__(
        self,
        parameters: Sequence[Parameter],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        capturable: bool = False,
    ) -> None:
        super().__init__(
            parameters,
            lr,
            eps=eps,
            betas=betas,
            weight_decay=weight_decay,
            capturable=capturable,
        )


# ----- beside the optimiser -----


def clip_grad_norm_(parameters: Iterable[Parameter], max_norm: float) -> float | Tensor:
    """Scale all gradients together so that their joint norm is at most `max_norm`.

    A gradient that is scaled is replaced, not written into. Formula as in PyTorch: scale =
    max_norm / (norm + 1e-6), if that is below 1. On the GPU nothing is read back.

    Args:
        parameters: those without a gradient are passed over.
        max_norm: the largest norm allowed.

    Returns:
        The joint norm before scaling; a Tensor of one element if gradients are on the GPU.

    Raises:
        ValueError: `max_norm` is negative.

    """
    _check("max_norm", max_norm, 0.0)
    with_gradient = [p for p in parameters if _gradient(p) is not None]
    tensors = [p.value for p in with_gradient if isinstance(p.value, Tensor)]
    if any(value.grad is not None and value.grad._tensor.on_device for value in tensors):
        with no_grad():
            return _clip_on_device(tensors, max_norm)
    squares = 0.0
    for parameter in with_gradient:
        array = np.asarray(_gradient(parameter))
        squares += float(np.vdot(array, array))
    norm = math.sqrt(squares)
    scale = max_norm / (norm + 1e-6)
    if scale < 1:
        with no_grad():
            for parameter in with_gradient:
                attribute = "derivative" if isinstance(parameter.value, Scalar) else "grad"
                setattr(parameter.value, attribute, _gradient(parameter) * scale)
    return norm


def _clip_on_device(values: Sequence[Tensor], max_norm: float) -> Tensor:
    found = [value.grad for value in values if value.grad is not None]
    gradients = [g.to(np.float32) if g.dtype.itemsize == 2 else g for g in found]
    norm = sum(((g * g).sum() for g in gradients[1:]), (gradients[0] * gradients[0]).sum()) ** 0.5
    scale = max_norm / (norm + 1e-6)
    scale = scale * (scale < 1.0) + (scale >= 1.0)
    for value in values:
        if value.grad is not None:
            value.grad = value.grad * scale.to(value.grad.dtype)
    return norm


class CosineSchedule:
    """A learning rate that rises linearly, then falls along half a cosine.

    Source: Loshchilov & Hutter 2017 (SGDR), equation 5, without restarts. Sets the optimiser's `lr`
    at once and after each `step()`; the highest rate is the one the optimiser had.

    Args:
        optimizer: whose learning rate to set.
        total_steps: when the lowest rate is reached; it stays there.
        warmup_steps: length of the rise; the first step already has 1/warmup_steps of the rate.
        min_lr: the lowest rate.

    Raises:
        ValueError: not 0 <= warmup_steps <= total_steps, or a negative `min_lr`.

    """

    def __init__(
        self, optimizer: Optimizer, total_steps: int, warmup_steps: int = 0, min_lr: float = 0.0
    ) -> None:
        if not 0 <= warmup_steps <= total_steps:
            raise ValueError(
                f"warmup_steps must be in [0, total_steps={total_steps}], got {warmup_steps}"
            )
        _check("min_lr", min_lr, 0.0)
        self.optimizer = optimizer
        self.max_lr = optimizer.lr
        self.min_lr = min_lr
        self.warmup_steps = warmup_steps
        self.total_steps = total_steps
        self.steps = 0
        optimizer.lr = self.lr_at(0)

    def lr_at(self, step: int) -> float:
        """The learning rate of step number `step`, counted from 0."""
        if step < self.warmup_steps:
            return self.max_lr * (step + 1) / self.warmup_steps
        if step >= self.total_steps:
            return self.min_lr
        progress = (step - self.warmup_steps) / (self.total_steps - self.warmup_steps)
        return self.min_lr + (self.max_lr - self.min_lr) * 0.5 * (1 + math.cos(math.pi * progress))

    @property
    def lr(self) -> float:
        """The present learning rate."""
        return self.lr_at(self.steps)

    def step(self) -> None:
        """Go to the next step; call it after the optimiser's."""
        self.steps += 1
        self.optimizer.lr = self.lr

    def state_dict(self) -> dict[str, Array]:
        """The number of steps taken."""
        return {"steps": np.array(self.steps, dtype=np.int64)}

    def load_state_dict(self, state: Mapping[str, Array]) -> None:
        """Take back what `state_dict` gave, and set the learning rate of that step.

        Raises:
            ValueError: `state` has other names.

        """
        if set(state) != {"steps"}:
            raise ValueError(f"state of a schedule must have the name steps, got {sorted(state)}")
        self.steps = int(np.asarray(state["steps"]).item())
        self.optimizer.lr = self.lr
