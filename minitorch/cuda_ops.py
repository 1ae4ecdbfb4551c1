"""`CudaOps`: the backend's name in MiniTorch's GPU module.

There are no GPU kernels yet: it computes with FastOps, on the CPU, so that programs and tests
written for it run anywhere.
"""

from __future__ import annotations

from .fast_ops import FastOps


class CudaOps(FastOps):
    """FastOps under the name that GPU programs ask for."""


__all__ = ["CudaOps"]
