"""What an optimiser keeps on the GPU so that its step can be replayed inside a CUDA graph.

A graph repeats the same kernels on the same addresses. So parameters are changed in place, and
every number that differs from step to step (learning rate, count of steps, factor of the gradient,
whether to skip) is in device memory. All parameters lie one after the other in one flat array,
their gradients in another, so that a step of all of them is one kernel:

    values      | embedding        | weights   | bias | ...      each starts at a multiple of 64
    gradients   | embedding        | weights   | bias | ...

A parameter's value is a view of the first, its gradient one of the second: its `ParameterSlot` says
so to the operations that use the value, which write the gradient there and may ask for a copy of
the value in 16 bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise
from math import prod
from typing import Any

import numpy as np
import numpy.typing as npt

from ..kernels import adamw_cuda, reduce_cuda
from ..kernels.copy_cuda import copy_into
from ..module import Parameter
from ..optimizer import check_gradient
from ..tensor import Tensor
from ..tensor_data import TensorData
from .allocator import ordinary, use_pool
from .device_array import DeviceArray
from .views import contiguous_data, view_of

Array = npt.NDArray[Any]

ALIGNMENT = 64  # elements: vectors of 16 bytes and cuBLAS want aligned addresses


def zeros(size: int, dtype: npt.DTypeLike) -> DeviceArray:
    """A device array of zeros."""
    array = DeviceArray.empty(size, dtype)
    array.fill(0)
    return array


class ParameterSlot:
    """Where a parameter lies in the flat arrays; found at its value's `TensorData.slot`.

    Args:
        state: that has the flat arrays.
        number: of the parameter.
        leaf: its value.

    """

    def __init__(self, state: CapturableState, number: int, leaf: Tensor) -> None:
        self.state = state
        self.number = number
        self.leaf = leaf
        self.gradient = leaf._new(state.view(state.gradients, number))
        self._claimed = False

    def claim_gradient(self) -> TensorData | None:
        """Memory for a backward pass to write the gradient into; None if there is a gradient
        already, or another operation of the same pass has the memory.
        """
        if self._claimed or self.leaf.grad is not None:
            return None
        self._claimed = True
        return self.gradient._tensor

    def keep_gradient(self, x: Tensor) -> Tensor:
        """The first derivative of a leaf, in the flat array."""
        self._claimed = False
        if x._tensor is not self.gradient._tensor:
            x.f.ops.copy_into(self.gradient, x)
        return self.gradient

    def rounded(self, dtype: np.dtype[Any]) -> TensorData:
        """The value in 16 bits."""
        return self.state.view(self.state.rounded(dtype), self.number)

    def load(self, array: Array) -> None:
        """Overwrite the value where it is: a graph that has been captured goes on with it."""
        storage: DeviceArray = self.leaf._tensor._storage
        storage.copy_from_host(array)
        self.leaf.grad = None
        self.state.round()

    def changed(self) -> None:
        """Elements of the value have been set by hand."""
        self.state.round()


class CapturableState:
    """Flat parameters and gradients, AdamW's means, and the scalars of `kernels/adamw_cuda.py`.

    Args:
        parameters: Tensors on one GPU backend, all float32 or all float64. Each gets a new value,
            a view of the flat array.
        group_sizes: how many parameters each group has that shares options; one group if not given.

    Raises:
        ValueError: a parameter that is not on the GPU, or no parameter at all.
        TypeError: parameters of different dtypes, or of 16 bits.

    """

    def __init__(
        self, parameters: Sequence[Parameter], group_sizes: Sequence[int] | None = None
    ) -> None:
        self.parameters = list(parameters)
        self.dtype = _common_dtype(self.parameters)
        self._starts = [0]
        for parameter in self.parameters:
            padded = -(-parameter.value.size // ALIGNMENT) * ALIGNMENT
            self._starts.append(self._starts[-1] + padded)
        self.size = self._starts[-1]
        self._shapes = [parameter.value.shape for parameter in self.parameters]
        sizes = [len(self.parameters)] if group_sizes is None else group_sizes
        ends = [0, *accumulate(sizes)]
        # The part of the flat arrays that belongs to each group.
        self._parts = [slice(self._starts[a], self._starts[b]) for a, b in pairwise(ends)]
        self.values, self.gradients, self.exp_avg, self.exp_avg_sq = (
            zeros(self.size, self.dtype) for _ in range(4)
        )
        self.scalars = zeros(adamw_cuda.SCALARS * len(self._parts), np.float64)
        self.scalars[adamw_cuda.FACTOR] = 1.0
        self.found = zeros(1, np.float32)  # not 0: a gradient is not finite
        self._partials = zeros(max(reduce_cuda.square_blocks(self.size), 1), self.dtype)
        self._total = zeros(1, self.dtype)
        self._leaves: list[Tensor | None] = [None] * len(self.parameters)
        self._rounded: dict[np.dtype[Any], DeviceArray] = {}
        self.adopt()

    # ----- copies -----

    def __getstate__(self) -> dict[str, Any]:
        """For copies and pickle; the parameters' values are views of the flat array no more."""
        return {**self.__dict__, "_leaves": [None] * len(self.parameters), "_rounded": {}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """The values of the copied parameters become views of the copied flat array."""
        self.__dict__.update(state)
        self.adopt()

    # ----- parameters and gradients -----

    def view(self, flat: DeviceArray, number: int) -> TensorData:
        """The part of a flat array that belongs to a parameter."""
        start, shape = self._starts[number], self._shapes[number]
        return contiguous_data(flat[start : start + prod(shape)], shape)

    def adopt(self) -> None:
        """Copy values that others have set (`Parameter.update` does) into the flat array.

        Raises:
            ValueError: a value has another shape than before.

        """
        for number, parameter in enumerate(self.parameters):
            value = parameter.value
            if value is self._leaves[number]:
                continue
            if value.shape != self._shapes[number]:
                raise ValueError(
                    f"capturable=True: parameter {number} ({value.name}) must keep its shape "
                    f"{self._shapes[number]}, got {value.shape}"
                )
            leaf = value._new(self.view(self.values, number))
            leaf.f.ops.copy_into(leaf, value.detach())
            leaf.grad = value.grad
            leaf._tensor.slot = ParameterSlot(self, number, leaf)
            parameter.update(leaf)
            self._leaves[number] = leaf
            self.round()

    def gather_gradients(self) -> None:
        """Copy gradients that are elsewhere into the flat array.

        Raises:
            ValueError: a parameter has no gradient, or one of another shape.

        """
        self.adopt()
        for number, parameter in enumerate(self.parameters):
            self._check_gradient(number, parameter.value)
        for parameter in self.parameters:
            value = parameter.value
            gradient = value._tensor.slot.gradient
            if value.grad is not gradient:
                value.f.ops.copy_into(gradient, value.grad.detach())
                value.grad = gradient

    def _check_gradient(self, number: int, value: Tensor) -> None:
        if value.grad is None:
            raise ValueError(
                f"capturable=True steps all parameters together, and number {number} "
                f"({value.name}) has no gradient"
            )
        check_gradient(number, value)

    # ----- copies in 16 bits -----

    def rounded(self, dtype: np.dtype[Any]) -> DeviceArray:
        """The flat values in a dtype of 16 bits, which each step keeps up to date."""
        if dtype not in self._rounded:
            with use_pool(ordinary):
                self._rounded[dtype] = DeviceArray.empty(self.size, dtype)
            self.round()
        return self._rounded[dtype]

    def round(self) -> None:
        """Bring the copies in 16 bits up to date."""
        for copy in self._rounded.values():
            flat = (self.size,)
            copy_into(
                view_of(contiguous_data(copy, flat)), view_of(contiguous_data(self.values, flat))
            )

    # ----- the step -----

    def set_rates(self, rates: Sequence[float]) -> None:
        """Write the learning rate of each group, in order with the kernels."""
        for number, rate in enumerate(rates):
            self.scalars[adamw_cuda.SCALARS * number + adamw_cuda.LR] = rate

    def sum_of_squares(self, found: DeviceArray) -> DeviceArray:
        """Of all gradients, (1,); `found` becomes 1 if one of them is not finite."""
        self.gather_gradients()
        name, count = self.dtype.name, reduce_cuda.square_blocks(self.size)
        reduce_cuda.sum_of_squares(
            name, self.gradients.array, self.size, self._partials.array, 0, found.array
        )
        reduce_cuda.total(name, self._partials.array, count, self._total.array)
        return self._total

    def clip(self, max_norm: float) -> Tensor:
        """See `Optimizer.clip_grad_norm_`; nothing is read back."""
        total = self.sum_of_squares(self.found)
        adamw_cuda.clip(total.array, self.found.array, self.scalars.array, max_norm)
        norm = self.scalars[adamw_cuda.NORM : adamw_cuda.NORM + 1]
        like: Tensor = self.parameters[0].value
        return like._new(TensorData._of(norm, (1,), (1,)))

    def step(self, options: Sequence[tuple[float, float, float, float]]) -> None:
        """One step of AdamW in place, with beta1, beta2, eps and weight decay of each group."""
        self.gather_gradients()
        for group, (beta1, beta2, eps, weight_decay) in enumerate(options):
            adamw_cuda.begin(
                self.scalars.array,
                group,
                beta1=beta1,
                beta2=beta2,
                eps=eps,
                weight_decay=weight_decay,
            )
            part, first = self._parts[group], adamw_cuda.SCALARS * group
            adamw_cuda.captured_step(
                self.dtype.name,
                self.values[part].array,
                self.gradients[part].array,
                self.exp_avg[part].array,
                self.exp_avg_sq[part].array,
                part.stop - part.start,
                self.scalars[first : first + adamw_cuda.SCALARS].array,
                beta1=beta1,
                beta2=beta2,
            )
        self.round()

    # ----- saving and loading -----

    def steps(self) -> int:
        """Steps taken; steps that were skipped do not count."""
        return int(self.scalars[adamw_cuda.STEP])

    def kept(self, slot: str, number: int) -> Array:
        """A copy of "exp_avg" or "exp_avg_sq" of a parameter."""
        data = self.view(getattr(self, slot), number)
        return data.to_numpy()

    def load(self, slot: str, number: int, array: Array) -> None:
        """Overwrite what `kept` gave."""
        storage: DeviceArray = self.view(getattr(self, slot), number)._storage
        storage.copy_from_host(array)

    def load_steps(self, steps: int) -> None:
        """Overwrite the number of steps taken."""
        self.scalars[adamw_cuda.STEP] = steps


def _common_dtype(parameters: Sequence[Parameter]) -> np.dtype[Any]:
    """The dtype of all parameters, which are checked."""
    if not parameters:
        raise ValueError("capturable=True needs at least one parameter, got none")
    for parameter in parameters:
        value = parameter.value
        if not isinstance(value, Tensor) or not value._tensor.on_device:
            raise ValueError(
                "capturable=True needs parameters that are Tensors on the GPU, got "
                f"{parameter.name or type(value).__name__} on the CPU: build the model with "
                "backend=minitorch.TensorBackend(minitorch.CudaKernelOps)"
            )
    dtypes = sorted({parameter.value.dtype.name for parameter in parameters})
    if dtypes not in (["float32"], ["float64"]):
        raise TypeError(
            "capturable=True needs parameters that are all float32 or all float64, got "
            + ", ".join(dtypes)
        )
    dtype: np.dtype[Any] = np.dtype(dtypes[0])
    return dtype
