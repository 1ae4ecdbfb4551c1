"""`GradScaler`: keeps small gradients from becoming 0 in float16, by scaling the loss.

Source: Micikevicius et al. 2018, "Mixed Precision Training", section 3.2; names and defaults are
those of PyTorch's `torch.amp.GradScaler`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from .autodiff import no_grad
from .cuda.capturable import zeros
from .cuda.device_array import DeviceArray
from .kernels import adamw_cuda
from .optim import Adam
from .optimizer import Optimizer, gradient_of
from .tensor import Tensor
from .tensor_data import TensorData

Array = npt.NDArray[Any]
LOADED = ("scale", "growth_tracker")


class GradScaler:
    """A factor on the loss that falls when gradients overflow and rises when they do not.

        loss = model(x)
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)           # only if gradients are clipped or looked at
        optimizer.clip_grad_norm_(1.0)
        scaler.step(optimizer)               # skipped if a gradient is infinite or NaN
        scaler.update()

    On the GPU everything stays there: nothing is read back, and a CUDA graph may capture it; the
    optimiser must be capturable. Gradients are then not divided themselves, the optimiser's kernel
    does that.

    Args:
        init_scale: the first factor.
        growth_factor: by which it rises.
        backoff_factor: by which it falls.
        growth_interval: steps without an overflow until it rises.
        enabled: if False, all methods do what a program without a scaler does.

    Raises:
        ValueError: an argument outside its range.

    """

    def __init__(
        self,
        init_scale: float = 2.0**16,
        growth_factor: float = 2.0,
        backoff_factor: float = 0.5,
        growth_interval: int = 2000,
        enabled: bool = True,
    ) -> None:
        if not 0 < init_scale < math.inf:
            raise ValueError(f"init_scale must be above 0 and finite, got {init_scale}")
        if not 1 < growth_factor < math.inf:
            raise ValueError(f"growth_factor must be above 1 and finite, got {growth_factor}")
        if not 0 < backoff_factor < 1:
            raise ValueError(f"backoff_factor must be between 0 and 1, got {backoff_factor}")
        if growth_interval < 1:
            raise ValueError(f"growth_interval must be at least 1, got {growth_interval}")
        self.growth_factor = growth_factor
        self.backoff_factor = backoff_factor
        self.growth_interval = growth_interval
        self._enabled = enabled
        self._scale = float(init_scale)
        self._growth_tracker = 0
        self._found_inf = False
        self._unscaled: Optimizer | None = None
        # On the GPU these two take the place of the three numbers above: scale and tracker, float32
        # (2,), and a word that is not 0 if a gradient is not finite.
        self._device: tuple[DeviceArray, DeviceArray] | None = None

    def is_enabled(self) -> bool:
        """Whether it does anything."""
        return self._enabled

    def get_scale(self) -> float:
        """The present factor, 1.0 if not enabled; on the GPU this waits for its work."""
        if not self._enabled:
            return 1.0
        if self._device is not None:
            return float(self._device[0][adamw_cuda.SCALE])
        return self._scale

    def scale(self, loss: Tensor) -> Tensor:
        """The loss times the factor."""
        if not self._enabled:
            return loss
        if not loss._tensor.on_device:
            return loss * self._scale
        state, _ = self._on_device()
        factor = TensorData._of(state[: adamw_cuda.SCALE + 1], (1,), (1,))
        return loss * loss._new(factor)

    def unscale_(self, optimizer: Optimizer) -> None:
        """Divide the gradients by the factor, and look whether all are finite.

        Raises:
            RuntimeError: they have been divided since the last `update`.
            ValueError: gradients on the GPU, and the optimiser is not capturable.

        """
        if not self._enabled:
            return
        if self._unscaled is optimizer:
            raise RuntimeError("unscale_() has already been called since the last update()")
        self._unscaled = optimizer
        device = optimizer.device_state if isinstance(optimizer, Adam) else None
        if device is not None:
            state, found = self._on_device()
            device.sum_of_squares(found)
            adamw_cuda.unscale(state.array, found.array, device.scalars.array)
            return
        with no_grad():
            for parameter in optimizer.parameters:
                gradient = gradient_of(parameter)
                if isinstance(gradient, Tensor):
                    self._unscale_tensor(parameter.value, gradient)

    def _unscale_tensor(self, value: Tensor, gradient: Tensor) -> None:
        if gradient._tensor.on_device:
            raise ValueError("GradScaler on the GPU needs an optimizer made with capturable=True")
        value.grad = gradient * (1.0 / self._scale)
        self._found_inf |= not bool(np.isfinite(value.grad.numpy()).all())

    def step(self, optimizer: Optimizer) -> None:
        """The optimiser's step, after `unscale_` if that has not been called; nothing if a gradient
        is not finite.
        """
        if self._enabled and self._unscaled is not optimizer:
            self.unscale_(optimizer)
        if not self._found_inf:  # on the GPU the optimiser's kernel looks
            optimizer.step()

    def update(self) -> None:
        """Change the factor; call it once after `step`."""
        if not self._enabled:
            return
        self._unscaled = None
        if self._device is not None:
            state, found = self._device
            adamw_cuda.update_scale(
                state.array,
                found.array,
                self.growth_factor,
                self.backoff_factor,
                self.growth_interval,
            )
            return
        if self._found_inf:
            self._scale *= self.backoff_factor
            self._growth_tracker = 0
        else:
            self._growth_tracker += 1
            if self._growth_tracker == self.growth_interval:
                grown = self._scale * self.growth_factor
                self._scale = grown if math.isfinite(grown) else self._scale
                self._growth_tracker = 0
        self._found_inf = False

    def _on_device(self) -> tuple[DeviceArray, DeviceArray]:
        """The state on the GPU, made there at the first call."""
        if self._device is None:
            state = zeros(2, np.float32)
            state[adamw_cuda.SCALE] = self._scale
            state[adamw_cuda.GROWTH_TRACKER] = self._growth_tracker
            self._device = state, zeros(1, np.float32)
        return self._device

    # ----- saving and loading -----

    def state_dict(self) -> dict[str, Array]:
        """The factor and the steps since it last changed; empty if not enabled."""
        if not self._enabled:
            return {}
        scale, tracker = self._scale, float(self._growth_tracker)
        if self._device is not None:
            scale, tracker = (float(x) for x in self._device[0].copy_to_host())
        return {"scale": np.array(scale), "growth_tracker": np.array(int(tracker))}

    def load_state_dict(self, state: Mapping[str, Array]) -> None:
        """Take back what `state_dict` gave.

        Raises:
            ValueError: `state` has other names, or numbers that a scaler cannot have. Nothing has
                been changed.

        """
        if not self._enabled:
            return
        if set(state) != set(LOADED):
            raise ValueError(f"state of a GradScaler must have {LOADED}, got {sorted(state)}")
        scale, tracker = (np.asarray(state[name]) for name in LOADED)
        for name, array in (("scale", scale), ("growth_tracker", tracker)):
            if array.size != 1 or array.dtype.kind not in "fiu":
                raise ValueError(f"{name} must be one number, got {array}")
        if not 0 < scale.item() < math.inf:
            raise ValueError(f"scale must be above 0 and finite, got {scale.item()}")
        if not (tracker.item() >= 0 and tracker.item() % 1 == 0):
            raise ValueError(f"growth_tracker must be a whole number, got {tracker.item()}")
        self._scale = float(scale.item())
        self._growth_tracker = int(tracker.item())
        if self._device is not None:
            array = np.array([self._scale, self._growth_tracker], np.float32)
            self._device[0].copy_from_host(array)


__all__ = ["GradScaler"]
