"""FastOps: its loops for every memory layout, what numba's cache on disk keeps, matrix products."""

from __future__ import annotations

import contextlib
import io
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numba
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import minitorch
from minitorch import FastOps, TensorBackend, operators
from minitorch.fast_ops import (
    matmul,
    tensor_map,
    tensor_matrix_multiply,
    tensor_reduce,
    tensor_zip,
)
from minitorch.kernels.cpu import blas
from minitorch.kernels.cpu.jit import source_digest
from minitorch.tensor_data import TensorData
from minitorch.testing import DTYPES, arrays, shapes

ROOT = Path(__file__).resolve().parent.parent
FAST = TensorBackend(FastOps)
Array = Any


def fast(array: Array) -> minitorch.Tensor:
    """A constant that shares the array's memory."""
    return minitorch.Tensor(TensorData.from_array(array), backend=FAST)


# ----- layouts, sizes, dtypes (values of every operation are in test_functions_grad) -----


@settings(max_examples=40)
@given(x=arrays(shapes(min_dims=0, max_dims=5, min_size=0, max_size=5)))
def test_map_and_copy(x: Array) -> None:
    for out, expected in ((FAST.neg_map(fast(x)), -x), (FAST.id_map(fast(x)), x)):
        assert out.dtype == x.dtype and out._tensor.is_contiguous()
        np.testing.assert_array_equal(out.numpy(), expected)


@pytest.mark.parametrize("function", ["neg_map", "id_map"])
def test_map_fills_an_output_of_a_larger_shape(function: str) -> None:
    out = minitorch.zeros((4, 3, 2), FAST)
    getattr(FAST, function)(fast(np.array([[1.0], [2.0], [3.0]])), out)
    column = np.array([[1.0], [2.0], [3.0]]) * (-1 if function == "neg_map" else 1)
    np.testing.assert_array_equal(out.numpy(), np.broadcast_to(column, (4, 3, 2)))


# Around the sizes of a chunk, and where threads begin to share the work.
@pytest.mark.parametrize("shape", [(16383,), (16385,), (3, 50_000), (131072,), (60, 50, 70)])
def test_large_tensors(shape: tuple[int, ...]) -> None:
    x = np.random.default_rng(0).normal(size=shape)
    turned = np.array(x.T, order="C").T  # the same values, columns first
    np.testing.assert_array_equal(FAST.add_zip(fast(x), fast(turned)).numpy(), 2 * x)
    np.testing.assert_array_equal(FAST.add_zip(fast(x), fast(x[..., :1])).numpy(), x + x[..., :1])
    for dim in range(len(shape)):
        for a in (x, turned):
            total = FAST.add_reduce(fast(a), dim).numpy()
            np.testing.assert_allclose(total, x.sum(dim, keepdims=True), atol=1e-9)
            largest = FAST.max_reduce(fast(a), dim).numpy()
            np.testing.assert_array_equal(largest, x.max(dim, keepdims=True))


def test_reductions_of_nothing_are_their_start() -> None:
    x = np.empty((3, 0, 2))
    assert not FAST.add_reduce(fast(x), 1).numpy().any()
    assert (FAST.mul_reduce(fast(x), 1).numpy() == 1).all()
    assert np.isneginf(FAST.max_reduce(fast(x), 1).numpy()).all()
    assert FAST.add_reduce(fast(x), 0).shape == (1, 0, 2)


def test_float32_sums_do_not_drift() -> None:
    """A fold in float32 would stop at 2**24."""
    x = np.ones(2**24 + 1000, np.float32)
    assert FAST.add_reduce(fast(x), 0).item() == pytest.approx(2**24 + 1000, abs=1)


def test_threads_change_no_bit() -> None:
    x = np.random.default_rng(0).normal(size=(400, 500)).astype(np.float32)
    w = np.random.default_rng(1).normal(size=(500, 300)).astype(np.float32)

    def results() -> list[Array]:
        return [
            FAST.add_reduce(fast(x), 0).numpy(),
            FAST.add_reduce(fast(x), 1).numpy(),
            FAST.matrix_multiply(fast(x), fast(w)).numpy(),
        ]

    expected = results()
    before = numba.get_num_threads()
    try:
        numba.set_num_threads(1)
        for ours, other in zip(results(), expected, strict=True):
            np.testing.assert_array_equal(ours, other)
    finally:
        numba.set_num_threads(before)


# ----- MiniTorch's signatures -----


def test_the_loops_as_courses_call_them() -> None:
    """Jitted functions in, dispatchers out, which numba can tell about."""
    shape, strides = np.array([2, 3]), np.array([3, 1])
    a, b = np.arange(6.0), np.arange(6.0) * 10
    out, row = np.zeros(6), np.zeros(2)
    map_loop = tensor_map(numba.njit(operators.neg))
    map_loop(out, shape, strides, a, shape, strides)
    np.testing.assert_array_equal(out, -a)
    zip_loop = tensor_zip(numba.njit(operators.add))
    zip_loop(out, shape, strides, a, shape, strides, b, shape, strides)
    np.testing.assert_array_equal(out, a + b)
    reduce_loop = tensor_reduce(numba.njit(operators.add))
    reduce_loop(row, np.array([2, 1]), np.array([1, 1]), a, shape, strides, 1)
    np.testing.assert_array_equal(row, [3, 12])
    for loop in (map_loop, zip_loop, reduce_loop):
        text = io.StringIO()
        with contextlib.redirect_stdout(text):
            loop.parallel_diagnostics(level=3)
        assert "Parallel loop listing" in text.getvalue()


def test_tensor_matrix_multiply() -> None:
    a, b = np.arange(6.0), np.arange(12.0)
    out = np.zeros(8)
    tensor_matrix_multiply(
        out, np.array([2, 4]), np.array([4, 1]),
        a, np.array([2, 3]), np.array([3, 1]), b, np.array([3, 4]), np.array([1, 3]),
    )  # fmt: skip
    np.testing.assert_array_equal(out.reshape(2, 4), a.reshape(2, 3) @ b.reshape(4, 3).T)


# ----- matrix products -----


@settings(max_examples=40)
@given(data=st.data())
def test_matmul_of_any_layout(data: st.DataObject) -> None:
    n, k, m = data.draw(st.tuples(*[st.integers(0, 6)] * 3))
    lead_a, lead_b = data.draw(
        st.sampled_from([((), ()), ((2,), ()), ((3, 1), (2,)), ((1,), (4,))])
    )
    a, b = data.draw(arrays((*lead_a, n, k))), data.draw(arrays((*lead_b, k, m)))
    ours = matmul(a, b)
    expected = np.matmul(a.astype(np.float64), b.astype(np.float64))
    assert ours.dtype == np.promote_types(a.dtype, b.dtype) and ours.flags.c_contiguous
    np.testing.assert_allclose(ours, expected, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(700, 300, 200), (100, 900, 333), (1000, 1000, 17)])
def test_products_in_blocks(dtype: Any, shape: tuple[int, int, int]) -> None:
    """Cut along rows and along columns; OpenBLAS gets its threads back."""
    n, k, m = shape
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(k, n)).astype(dtype).T, rng.normal(size=(k, m)).astype(dtype)
    control = blas.openblas()
    before = None if control is None else control.get()
    expected = a.astype(np.float64) @ b.astype(np.float64)
    tolerance = 1e-3 if dtype == np.float32 else 1e-11
    np.testing.assert_allclose(blas.product(a, b), expected, atol=tolerance)
    assert control is None or control.get() == before


# ----- the cache on disk -----

PROGRAM = """
import sys
import numpy as np
from minitorch.fast_ops import FastOps, _map_worker, _worker
import functions
worker = _worker(_map_worker, functions.scale, keep=True)
shape, strides = np.array([3]), np.array([1])
out = np.zeros(3)
worker(out, shape, strides, np.ones(3), shape, strides, np.zeros(1, np.int64))
print(out[0], sum(worker.stats.cache_hits.values()))
"""


def run_program(folder: Path, factor: str, where: str = "return") -> list[str]:
    """Value and cache hits of a process whose scalar function multiplies by `factor`."""
    source = f"FACTOR = {factor}\n\ndef scale(x):\n    return x * FACTOR\n"
    (folder / "functions.py").write_text(source, encoding="utf-8")
    environment = {**os.environ, "NUMBA_CACHE_DIR": str(folder / "cache")}
    environment["PYTHONPATH"] = os.pathsep.join([str(folder), str(ROOT)])
    environment["PYTHONDONTWRITEBYTECODE"] = "1"
    run = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        env=environment, capture_output=True, text=True, check=True, timeout=120,
    )  # fmt: skip
    return run.stdout.split()


@pytest.mark.thorough
def test_another_process_finds_the_loop_and_an_edited_function_is_compiled(tmp_path: Path) -> None:
    assert run_program(tmp_path, "2.0") == ["2.0", "0"]
    assert run_program(tmp_path, "2.0") == ["2.0", "1"]
    assert run_program(tmp_path, "3.0") == ["3.0", "0"]


def test_only_functions_that_can_be_told_apart_are_kept() -> None:
    factor = 2.0
    assert source_digest(operators.add) == source_digest(numba.njit(operators.add))
    assert source_digest(operators.add) != source_digest(operators.mul)
    assert source_digest(lambda x: x * factor) is None  # factor may be anything next time
    assert source_digest(lambda x: TABLE[0] * x) is None
    one, other = (lambda x: x + 1.0), (lambda x: x + 2.0)
    assert source_digest(one) != source_digest(other)


TABLE = (1.0,)


def test_storages_that_do_not_hold_their_shapes() -> None:
    """MiniTorch's kernels take storage, shape and strides: nothing is read beyond the ends."""

    def of(size: int, shape: tuple[int, ...], strides: tuple[int, ...]) -> Any:
        return np.ones(size), np.array(shape), np.array(strides)

    out, row, short = of(6, (2, 3), (3, 1)), of(3, (3,), (1,)), of(5, (2, 3), (3, 1))
    wrong = [short, of(6, (2, 3), (3, 2)), of(9, (3, 3), (3, 1)), of(2, (2,), (1,))]
    double = tensor_map(operators.neg)
    double(*out, *row)
    assert (out[0] == -1).all()
    add = tensor_zip(operators.add)
    for bad in wrong:
        with pytest.raises(ValueError):
            double(*out, *bad)
        for operands in ((bad, row), (row, bad)):
            with pytest.raises(ValueError):
                add(*out, *operands[0], *operands[1])
    total = tensor_reduce(operators.add)
    for target, source, dim in (
        (of(3, (1, 3), (3, 1)), out, 1),
        (of(3, (1, 3), (3, 1)), out, -2),
        (of(3, (1, 3), (3, 1)), short, 0),
        (of(2, (1, 3), (3, 1)), out, 0),
        (of(3, (3,), (1,)), out, 0),
    ):
        with pytest.raises(ValueError):
            total(*target, *source, dim)
    assert (out[0] == -1).all()
