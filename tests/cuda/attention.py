"""Attention's calls on the GPU, or in its simulator."""

from __future__ import annotations

from typing import Any

import numpy as np

from minitorch import Tensor, TensorBackend
from minitorch.cuda_kernel_ops import CudaKernelOps
from minitorch.tensor_data import TensorData
from tests.attention_calls import Call, Results, place_on_cpu

BACKEND = TensorBackend(CudaKernelOps)


def on_gpu(array: Any, dtype: str = "float32", layout: str = "plain") -> Tensor:
    """A tensor of the array's elements that lies in memory in one of several ways, see
    `tests.attention_calls.laid_out`.
    """
    view = place_on_cpu(np.asarray(array), dtype, layout)
    memory = view
    while memory.base is not None:
        memory = memory.base
    if not view.size:
        memory = view
    whole = BACKEND.ops.from_numpy(np.ascontiguousarray(memory.reshape(-1)))
    if not view.size:
        return Tensor(TensorData(whole._storage, view.shape), backend=BACKEND)
    start = (view.ctypes.data - memory.ctypes.data) // view.itemsize
    strides = tuple(step // view.itemsize for step in view.strides)
    return Tensor(TensorData._of(whole._storage[start:], view.shape, strides), backend=BACKEND)


def by_cuda(call: Call, backward: bool = True) -> Results:
    """What the kernels in `minitorch.cuda.attention.FLASH_ATTENTION` give, as numpy arrays."""
    ops: Any = BACKEND.ops
    *tensors, grad_out = call.tensors
    mask, dl = ops.attention_mask(call.mask), call.grad_logsumexp
    variant = call.variant.each(lambda x: on_gpu(x.to_numpy()) if hasattr(x, "to_numpy") else x)
    out, lse, rows = ops.flash_attention_forward(*tensors, mask, call.problem, variant)
    gradients: Any = (None,) * 4
    if backward:
        gradients = ops.flash_attention_backward(
            grad_out, None if dl is None else on_gpu(dl, dl.dtype.name), *tensors, mask, out, rows,
            call.problem, call.wants_mask, variant,
        )  # fmt: skip
    return tuple(None if x is None else x.to_numpy() for x in (out, lse, *gradients))


def forward_by_cuda(call: Call) -> Results:
    """The same without gradients."""
    return by_cuda(call, backward=False)
