"""Tensors on the GPU with their values, and comparisons, for the tests of its operations."""

from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
from hypothesis import strategies as st

import minitorch
from minitorch import Tensor
from minitorch.cuda_ops import CudaOps
from minitorch.kernels.gpu import runtime

Array = npt.NDArray[Any]

DTYPES = ("float32", "float64", "float16", "bfloat16")
TOLERANCE = {"float64": 1e-12, "float32": 1e-5, "float16": 2e-3, "bfloat16": 2e-2}
backend = minitorch.TensorBackend(CudaOps)
numbers = np.random.default_rng(3)
EXAMPLES = 12 if runtime.SIMULATED else 5  # on a GPU each layout is a kernel to compile


@st.composite
def layouts(draw: st.DrawFn, most: int = 5) -> tuple[tuple[int, ...], list[int]]:
    """A shape and an order of its dimensions."""
    shape = draw(st.lists(st.integers(1, most), min_size=1, max_size=4))
    return tuple(shape), draw(st.permutations(range(len(shape))))


def dtype_of(name: str) -> np.dtype[Any]:
    return np.dtype(ml_dtypes.bfloat16) if name == "bfloat16" else np.dtype(name)


def make(shape: tuple[int, ...], dtype: str = "float32") -> tuple[Tensor, Array]:
    """A tensor on the GPU and its values."""
    array = numbers.standard_normal(shape).astype(dtype_of(dtype))
    return minitorch.tensor_from_numpy(array, backend=backend), array


def permuted(shape: tuple[int, ...], order: list[int], dtype: str) -> tuple[Tensor, Array]:
    """The same with its dimensions in another order, so not contiguous."""
    tensor, array = make(shape, dtype)
    return tensor.permute(*order), array.transpose(order)


def assert_same(result: Tensor, expected: Array, dtype: str, factor: float = 1.0) -> None:
    assert result.dtype == dtype_of(dtype)
    assert result.shape == expected.shape
    np.testing.assert_allclose(
        result.to_numpy().astype(np.float64),
        expected.astype(np.float64),
        rtol=factor * TOLERANCE[dtype],
        atol=factor * TOLERANCE[dtype],
    )
