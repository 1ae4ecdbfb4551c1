"""The SIMD building blocks: what they compute, and what LLVM makes of them elsewhere."""

from __future__ import annotations

import re
from typing import Any

import llvmlite.binding as llvm
import numpy as np
import pytest
from llvmlite import ir
from numba import njit

from minitorch.kernels.cpu import simd, simd_matrix, threads, vector_target
from minitorch.kernels.flash_attention.cpu.tiles import (
    leading_dimension,
    load_tile,
    load_tile_transposed,
    matrix_product,
)

LINUX = "unknown-linux-gnu"
DTYPES = [np.float32, np.float64]


@njit(error_model="numpy")
def exp2_of(x: Any) -> Any:
    y = x.copy()
    for j in range(0, len(x), simd.lanes(x)):
        simd.store(y, j, simd.exp2(simd.load(x, j)))
    return y


@pytest.mark.parametrize("dtype", DTYPES)
def test_exp2(dtype: Any) -> None:
    smallest = np.finfo(dtype).minexp
    x = np.linspace(smallest, 0, 16 * 20_000, dtype=dtype)
    want = np.exp2(x.astype(np.longdouble))
    assert np.abs(exp2_of(x) / want - 1).max() < 3 * np.finfo(dtype).eps
    special = np.array([0, -0.0, -np.inf, np.nan, smallest - 1, -1e30, -1, -2] * 2, dtype)
    got = exp2_of(special)[:8]
    np.testing.assert_array_equal(got, np.array([1, 1, 0, np.nan, 0, 0, 0.5, 0.25], dtype))


@njit
def reduce_rows(x: Any) -> Any:
    v = simd.load(x, 0)
    return simd.sum_of(v), simd.max_of(simd.maximum(v, simd.splat(x, -1.0)))


@pytest.mark.parametrize("dtype", DTYPES)
def test_reductions(dtype: Any) -> None:
    x = np.random.default_rng(0).standard_normal(16).astype(dtype)
    n = vector_target.TARGET.lanes(8 * x.itemsize)
    total, largest = reduce_rows(x)
    assert total == pytest.approx(x[:n].sum(), rel=1e-5) and largest == x[:n].max()
    x[1] = np.nan
    total, largest = reduce_rows(x)
    assert np.isnan(total) and largest == max(-1.0, np.delete(x[:n], 1).max())


@njit
def product(a: Any, b: Any, transposed: Any) -> Any:
    """A B, or C + A^T B with C = 1, through tiles."""
    w = np.zeros(40_000, a.dtype)
    rows, depth = a.shape
    columns = b.shape[1]
    ld_a, ld = leading_dimension(w, max(rows, depth)), leading_dimension(w, columns)
    b_tile, c_tile = 12_000, 24_000
    load_tile(w, b_tile, ld, depth, b.ravel(), 0, columns, 1, depth, columns)
    if transposed:
        one = a.dtype.type(1)
        load_tile_transposed(w, 0, ld_a, a.ravel(), 0, depth, 1, rows, depth, one)
        for j in range(rows * ld):
            w[c_tile + j] = 1
        matrix_product(w, 0, 1, ld_a, b_tile, ld, c_tile, ld, rows, columns, depth, True)
    else:
        load_tile(w, 0, ld_a, rows + 8, a.ravel(), 0, depth, 1, rows, depth)
        matrix_product(w, 0, ld_a, 1, b_tile, ld, c_tile, ld, rows, columns, depth, False)
    c = np.empty((rows, columns), a.dtype)
    for i in range(rows):
        for j in range(columns):
            c[i, j] = w[c_tile + i * ld + j]
    return c


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("m, n, k", [(1, 1, 1), (8, 32, 5), (37, 41, 23), (64, 70, 65)])
def test_matrix_product_and_transposition(m: int, n: int, k: int, dtype: Any) -> None:
    rng = np.random.default_rng(m)
    a, b = rng.standard_normal((m, k)).astype(dtype), rng.standard_normal((k, n)).astype(dtype)
    tolerance = 100 * np.finfo(dtype).eps
    np.testing.assert_allclose(product(a, b, False), a @ b, atol=tolerance)
    np.testing.assert_allclose(product(a, b, True), 1 + a @ b, atol=tolerance)


def assembly(triple: str, cpu: str, double: bool = False) -> str:
    """The micro-kernel, compiled for another machine."""
    target = vector_target.probe_target(triple, cpu, "")
    element = ir.DoubleType() if double else ir.FloatType()
    vector = ir.VectorType(element, target.lanes(64 if double else 32))
    pointer, index = element.as_pointer(), ir.IntType(64)
    types = [pointer, index, index, pointer, index, pointer, index, index, ir.IntType(1)]
    module = ir.Module()
    function = ir.Function(module, ir.FunctionType(ir.VoidType(), types), "block")
    builder = ir.IRBuilder(function.append_basic_block())
    simd_matrix.build_matrix_product_block(builder, target, vector, *function.args)
    builder.ret_void()
    machine = llvm.Target.from_triple(triple).create_target_machine(cpu, "", opt=3)
    return str(machine.emit_assembly(llvm.parse_assembly(str(module))))


def available(triple: str) -> bool:
    llvm.initialize_all_targets()
    try:
        llvm.Target.from_triple(triple)
    except RuntimeError:
        return False
    return True


@pytest.mark.skipif(not available(f"aarch64-{LINUX}"), reason="this llvmlite has no Arm target")
@pytest.mark.parametrize("double, lanes", [(False, "4s"), (True, "2d")])
def test_on_arm_the_products_are_vector_fmla(double: bool, lanes: str) -> None:
    text = assembly(f"aarch64-{LINUX}", "generic", double)
    assert len(re.findall(rf"\tfmla\tv\d+\.{lanes}", text)) == 16  # 8 rows of 2 vectors
    assert "\tbl\t" not in text


@pytest.mark.skipif(not available(f"x86_64-{LINUX}"), reason="this llvmlite has no x86 target")
@pytest.mark.parametrize(
    "cpu, pattern, count",
    [
        ("skylake-avx512", r"vfmadd\d+ps\t.*%zmm", 16),
        ("haswell", r"vfmadd\d+ps\t.*%ymm", 8),
        ("sandybridge", r"vmulps\t.*%ymm", 8),
        ("nehalem", r"\tmulps\t.*%xmm", 8),
        ("x86-64", r"\tmulps\t.*%xmm", 8),
    ],
)
def test_on_x86_the_products_are_vectors_of_full_width(cpu: str, pattern: str, count: int) -> None:
    text = assembly(f"x86_64-{LINUX}", cpu)
    assert len(re.findall(pattern, text)) == count
    assert "call" not in text  # no library's fma


@pytest.mark.parametrize("count", [1, 2, 5])
def test_every_thread_takes_tasks_until_none_is_left(count: int) -> None:
    next_task, done = np.zeros(1, np.int64), np.zeros(1000, np.int64)

    threads.run_on_threads(count, take_tasks, next_task, done)
    assert (done == 1).all()


@njit(nogil=True)
def take_tasks(next_task: Any, done: Any) -> None:
    while True:
        task = threads.fetch_add(next_task, 0, 1)
        if task >= len(done):
            return
        done[task] += 1


@njit(nogil=True)
def pass_on(turn: Any, order: Any) -> None:
    for place in range(len(order)):
        me = threads.fetch_add(turn, 1, 1)
        if me >= len(order):
            return
        threads.wait_until(turn, 0, me)
        order[me] = place
        threads.store_release(turn, 0, me + 1)


def test_waiting_threads_go_in_order() -> None:
    turn, order = np.zeros(2, np.int64), np.full(2000, -1)
    threads.run_on_threads(4, pass_on, turn, order)
    assert turn[0] == 2000 and (order >= 0).all()


def test_an_exception_of_any_thread_is_raised_after_all_have_ended() -> None:
    def fail(*arguments: Any) -> None:
        raise RuntimeError("on purpose")

    with pytest.raises(RuntimeError, match="on purpose"):
        threads.run_on_threads(3, fail)
    done = np.zeros(10, np.int64)
    threads.run_on_threads(3, take_tasks, np.zeros(1, np.int64), done)
    assert (done == 1).all()


def test_cache_key_sees_a_change_in_a_file(tmp_path: Any) -> None:
    file = tmp_path / "constants.py"
    file.write_text("WIDTH = 1")
    before = simd.cache_key(str(file))
    file.write_text("WIDTH = 2")
    assert simd.cache_key(str(file)) != before
