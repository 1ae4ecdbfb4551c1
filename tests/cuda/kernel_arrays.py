"""Arrays in device memory as kernels take them, of every precision, and how close results are."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
from hypothesis import settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from minitorch.kernels.gpu import runtime
from minitorch.kernels.gpu.runtime import SIMULATED

Array = NDArray[Any]

NAMES = ("float32", "float64", "float16", "bfloat16")
DTYPES = {name: np.dtype(name) for name in NAMES[:3]} | {"bfloat16": np.dtype(ml_dtypes.bfloat16)}
# Roundings of a result and of a sum of a hundred terms, relative to the largest number.
TOLERANCE = {"float32": 4e-6, "float64": 1e-13, "float16": 2e-3, "bfloat16": 1.6e-2}
few = settings(max_examples=12 if SIMULATED else 20, deadline=None)
names = st.sampled_from(NAMES)
seeds = st.integers(0, 2**32 - 1)


def real_name(name: str) -> str:
    """The dtype that a precision computes in."""
    return str(runtime.precision(name).real.name)


def random(seed: int, name: str, *shape: int) -> Array:
    return np.random.default_rng(seed).standard_normal(shape).astype(DTYPES[name])


def exact(array: Array) -> Array:
    return array.astype(np.float64)


def to_device(array: Array) -> Any:
    """Flat, as the kernels take it: bfloat16 as its bits."""
    flat = np.ascontiguousarray(array).reshape(-1)
    if flat.dtype == DTYPES["bfloat16"]:
        flat = flat.view(np.uint16)
    return runtime.cuda.to_device(flat)


def empty(name: str, *shape: int) -> Any:
    """Output, with NaN in it: what a kernel forgets is seen."""
    return to_device(np.full(shape, np.nan, DTYPES[name]))


def to_host(array: Any, name: str, *shape: int) -> Array:
    return np.asarray(array.copy_to_host()).view(DTYPES[name]).reshape(shape)


def assert_close(actual: Array, expected: Array, name: str) -> None:
    finite = np.abs(expected[np.isfinite(expected)])
    size = max(1.0, float(finite.max(initial=0.0)))
    np.testing.assert_allclose(
        exact(actual), expected, rtol=4 * TOLERANCE[name], atol=TOLERANCE[name] * size
    )
