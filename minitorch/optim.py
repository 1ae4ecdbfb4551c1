"""Optimisers: SGD, Adam and AdamW; gradient clipping and a learning-rate schedule.

A step replaces the value of each parameter by a new leaf, as MiniTorch does, and never writes into
the old one: a graph, a snapshot or a second model that holds the old value is not disturbed. The
exception is Adam with `capturable=True`, for CUDA graphs: see `capturable.py`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from .cuda.capturable import CapturableState
from .optimizer import (
    Optimizer,
    Parameters,
    ParamGroup,
    check_range,
    clip_grad_norm_,
)
from .tensor import Tensor

Array = npt.NDArray[Any]

# sorted in order of increasing complexity


class SGD(Optimizer):
    """Stochastic gradient descent: value - lr * gradient.

    With weight decay, gradient + weight_decay * value takes the gradient's place; with momentum,
    velocity = momentum * velocity + gradient does, or gradient + momentum * velocity (Nesterov).
    The formulas are PyTorch's (its dampening 0). Source: Sutskever et al. 2013, section 2.

    Args:
        parameters: what to optimise, or parameter groups: see `Optimizer`.
        lr: the learning rate; 1.0 as in MiniTorch.
        momentum: the share of the velocity that a step keeps.
        weight_decay: strength of the pull towards 0.
        nesterov: look ahead along the velocity.

    Raises:
        ValueError: a negative argument, or `nesterov` without momentum.

    """

    def __init__(
        self,
        parameters: Parameters,
        lr: float = 1.0,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
    ) -> None:
        super().__init__(
            parameters, lr, momentum=momentum, weight_decay=weight_decay, nesterov=nesterov
        )
        for group in self.param_groups:
            if group["nesterov"] and group["momentum"] == 0:
                raise ValueError("nesterov needs a momentum above 0, got 0")

    def _slots(self, group: ParamGroup) -> tuple[str, ...]:
        return ("momentum",) if group["momentum"] else ()

    def _update(self, number: int, group: ParamGroup, value: Tensor, grad: Tensor) -> Tensor:
        momentum: float = group["momentum"]
        weight_decay: float = group["weight_decay"]
        lr: float = group["lr"]
        if weight_decay:
            grad = grad + value * weight_decay
        if momentum:
            kept = self._slots_of(number, value)
            velocity = kept["momentum"] * momentum + grad
            kept["momentum"] = velocity
            grad = grad + velocity * momentum if group["nesterov"] else velocity
        return value - grad * lr


class Adam(Optimizer):
    """Adam: the mean of recent gradients, divided by the root of the mean of their squares.

    Source: Kingma & Ba 2015, algorithm 1. Weight decay is added to the gradient, as in PyTorch.

    Args:
        parameters: what to optimise, or parameter groups: see `Optimizer`.
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

    decoupled = False  # whether weight decay acts on the value itself
    device_state: CapturableState | None = None  # of an optimiser that is capturable

    def __init__(
        self,
        parameters: Parameters,
        lr: float = 1e-3,
        beta1: float = 0.9,
        beta2: float = 0.999,
        eps: float = 1e-8,
        *,
        betas: tuple[float, float] | None = None,
        weight_decay: float = 0.0,
        capturable: bool = False,
    ) -> None:
        betas = (beta1, beta2) if betas is None else betas
        super().__init__(parameters, lr, betas=betas, eps=eps, weight_decay=weight_decay)
        if capturable:
            decays = [group["weight_decay"] for group in self.param_groups]
            if any(decays) and not self.decoupled:
                raise ValueError(
                    f"Adam with capturable=True needs weight_decay 0, got {max(decays)}: use AdamW"
                )
            sizes = [len(group["params"]) for group in self.param_groups]
            self.device_state = CapturableState(self.parameters, sizes)
            self._write_rates()
            for group in self.param_groups:
                group.on_lr = self._write_rates

    def _write_rates(self) -> None:
        """Write the learning rates to the GPU, where graphs that have been captured read them."""
        if self.device_state is not None:
            self.device_state.set_rates([group["lr"] for group in self.param_groups])

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
        check_range("max_norm", max_norm, 0.0)
        return self.device_state.clip(max_norm)

    def step(self) -> None:
        """Change each parameter that has a gradient; if capturable, all must have one."""
        if self.device_state is None:
            super().step()
            return
        self.device_state.step(
            [(*group["betas"], group["eps"], group["weight_decay"]) for group in self.param_groups]
        )

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
        for slot, number in self._kept_names():
            self.device_state.load(slot, number, arrays[f"{slot}.{number}"])

    def _slots(self, group: ParamGroup) -> tuple[str, ...]:
        return ("exp_avg", "exp_avg_sq")

    def _update(self, number: int, group: ParamGroup, value: Tensor, grad: Tensor) -> Tensor:
        kept = self._slots_of(number, value)
        weight_decay = group["weight_decay"]
        if weight_decay and not self.decoupled:
            grad = grad + value * weight_decay
        new = value.f.id_map(value)  # a contiguous copy, which the fused step changes in place
        value.f.ops.adamw_step(
            new,
            grad.contiguous(),
            kept["exp_avg"],
            kept["exp_avg_sq"],
            lr=group["lr"],
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            eps=group["eps"],
            weight_decay=weight_decay if self.decoupled else 0.0,
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
        parameters: Parameters,
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


class CosineSchedule:
    """A learning rate that rises linearly, then falls along half a cosine.

    Source: Loshchilov & Hutter 2017 (SGDR), equation 5, without restarts. Sets the `lr` of each of
    the optimiser's groups at once and after each `step()`; the highest rate of a group is the one
    that it had.

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
        check_range("min_lr", min_lr, 0.0)
        self.optimizer = optimizer
        self.max_lrs: list[float] = [group["lr"] for group in optimizer.param_groups]
        self.min_lr = min_lr
        self.warmup_steps = warmup_steps
        self.total_steps = total_steps
        self.steps = 0
        self._set_rates()

    def lr_at(self, step: int, group: int = 0) -> float:
        """The learning rate of a group in step number `step`, counted from 0."""
        max_lr = self.max_lrs[group]
        if step < self.warmup_steps:
            return max_lr * (step + 1) / self.warmup_steps
        if step >= self.total_steps:
            return self.min_lr
        progress = (step - self.warmup_steps) / (self.total_steps - self.warmup_steps)
        return self.min_lr + (max_lr - self.min_lr) * 0.5 * (1 + math.cos(math.pi * progress))

    @property
    def lr(self) -> float:
        """The present learning rate, of the first group."""
        return self.lr_at(self.steps)

    def _set_rates(self) -> None:
        for number, group in enumerate(self.optimizer.param_groups):
            group["lr"] = self.lr_at(self.steps, number)

    def step(self) -> None:
        """Go to the next step; call it after the optimiser's."""
        self.steps += 1
        self._set_rates()

    def state_dict(self) -> dict[str, Array]:
        """The number of steps taken."""
        return {"steps": np.array(self.steps, dtype=np.int64)}

    def load_state_dict(self, state: Mapping[str, Array]) -> None:
        """Take back what `state_dict` gave, and set the learning rate of that step.

        Raises:
            ValueError: `state` has other names, or `steps` is no whole number.

        """
        if set(state) != {"steps"}:
            raise ValueError(f"state of a schedule must have the name steps, got {sorted(state)}")
        steps = np.asarray(state["steps"])
        if (
            steps.shape != ()
            or steps.dtype.kind not in "fiu"
            or not (steps >= 0 and steps % 1 == 0)
        ):
            raise ValueError(f"steps of a schedule must be a whole number from 0, got {steps}")
        self.steps = int(steps)
        self._set_rates()


__all__ = ["SGD", "Adam", "AdamW", "CosineSchedule", "Optimizer", "clip_grad_norm_"]
