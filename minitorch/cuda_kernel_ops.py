"""`CudaKernelOps`: the backend's name in the transformer course, whose kernels are fused.

There are no GPU kernels yet: it computes with FastOps, on the CPU, so that programs and tests
written for it run anywhere.
"""

from __future__ import annotations

from .cuda_ops import CudaOps


class CudaKernelOps(CudaOps):
    """FastOps under the name that the transformer course asks for."""


__all__ = ["CudaKernelOps"]
