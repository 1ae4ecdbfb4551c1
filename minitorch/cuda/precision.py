"""How the GPU may multiply float32 numbers in flash attention: exactly, or on tensor cores.

Tensor cores take float32 numbers as TF32, which keeps 10 of the 23 bits of their mantissas. Three
such products of the upper and lower parts of two numbers give almost all of it back (3xTF32).
"""

from __future__ import annotations

from typing import overload

from ..kernels.flash_attention.problem import Float32Precision, checked_fp32_precision

_setting: dict[str, Float32Precision] = {"attention": "ieee"}


class Restored:
    """What `fp32_precision(name)` returns: as a context it puts the former setting back."""

    def __init__(self, name: Float32Precision, former: Float32Precision) -> None:
        self._name, self._former = name, former

    def __enter__(self) -> None:
        """The setting holds inside the block, be it the second one of this object."""
        _setting["attention"] = self._name

    def __exit__(self, *exception: object) -> None:
        _setting["attention"] = self._former


@overload
def fp32_precision() -> Float32Precision: ...
@overload
def fp32_precision(name: Float32Precision) -> Restored: ...
def fp32_precision(name: Float32Precision | None = None) -> Float32Precision | Restored:
    """Say, or ask, how flash attention of float32 tensors on a GPU may multiply.

    The names are those of `torch.backends` and Triton. The setting belongs to the process: one
    thread's holds for all, so threads must not have blocks `with fp32_precision(...)` at the same
    time. A backward pass uses that of its forward pass. Tensors on the CPU do not heed it. For
    matrix products there is `set_float32_matmul_precision`.

    Args:
        name: "ieee" (the default): in float32. "tf32": on tensor cores, errors of about 1e-3 of a
            score. "tf32x3": on tensor cores with three products for one, errors near those of
            float32. Nothing: only ask.

    Returns:
        The setting, if nothing is given; else a context that ends it, `with
        fp32_precision("tf32"): ...`, which need not be used.

    Raises:
        ValueError: another name.

    """
    former = _setting["attention"]
    if name is None:
        return former
    _setting["attention"] = checked_fp32_precision(name)
    return Restored(_setting["attention"], former)
