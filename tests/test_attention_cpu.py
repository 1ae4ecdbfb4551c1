"""Attention on the CPU: the rules of tests/attention.py, and what the kernels promise beside."""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
import pytest

import minitorch
from minitorch import FastOps, TensorBackend
from minitorch.kernels.flash_attention.cpu import backward as cpu_backward
from minitorch.kernels.flash_attention.cpu import forward as cpu_forward
from minitorch.kernels.flash_attention.cpu import launch as cpu
from minitorch.kernels.flash_attention.cpu.launch import TileSizes
from minitorch.kernels.flash_attention.problem import AttentionProblem
from tests import references
from tests.attention import Rules
from tests.attention_calls import call_of, check, compare
from tests.attention_calls import random as random64
from tests.attention_families import CPU, OPERATIONS, SMALL_TILES, STANDARD, by_cpu

BACKEND = TensorBackend(FastOps)


class TestCPU(Rules):
    family = CPU


class TestStandard(Rules):
    family = STANDARD


class TestOperations(Rules):
    family = OPERATIONS


def random(*shape: int, dtype: Any = np.float32, seed: int = 0) -> Any:
    return random64(*shape, seed=seed).astype(dtype)


def run(q: Any, k: Any, v: Any, mask: Any = None, **options: Any) -> Any:
    """(out, logsumexp, dq, dk, dv, dmask) of the kernels."""
    return by_cpu(call_of(CPU, [q, k, v], q.dtype.name, mask=mask, **options))


@pytest.mark.parametrize("d, dv", [(0, 4), (4, 0)])
def test_head_sizes_of_0(d: int, dv: int) -> None:
    check(CPU, [(2, 5, d), (2, 6, d), (2, 6, dv)], "float32")


# ----- pitfalls -----


def test_no_path_leads_from_a_row_without_a_key() -> None:
    q, k, v = random(2, 40, 8), random(2, 25, 8), random(2, 25, 8)
    mask = np.random.default_rng(0).random((40, 25)) < 0.5
    mask[17] = False
    call = call_of(CPU, [q, k, v], "float32", mask=mask)
    call.tensors[3][:, 17] = np.nan
    out, _, dq, dk, dv, _ = by_cpu(call)
    assert all(np.isfinite(x).all() for x in (out, dq, dk, dv))
    assert (out[:, 17] == 0).all() and (dq[:, 17] == 0).all()


def test_nan_in_a_query_stays_in_its_row_and_in_a_key_reaches_all() -> None:
    q, k, v = random(40, 8), random(50, 8), random(50, 8)
    q[3, 2] = np.nan
    out, lse, dq, dk, *_ = run(q, k, v)
    assert np.isnan(out[3]).all() and np.isnan(lse[3]) and np.isnan(dq[3]).all()
    assert np.isfinite(np.delete(out, 3, 0)).all() and np.isnan(dk).all()
    q[3, 2], k[45, 0] = 0, np.nan
    out, lse, *_ = run(q, k, v)
    assert np.isnan(out).all() and np.isnan(lse).all()
    odd_nan = np.array([0x7FC00001], np.uint32).view(np.float32)[0]  # a NaN with a payload
    k[45, 0] = odd_nan
    assert np.isnan(run(q, k, v)[0]).all()


def test_nan_behind_the_band_in_other_tiles_does_not_leak() -> None:
    call = call_of(CPU, [random(128, 8)] * 3, "float32", is_causal=True)
    for x in call.tensors[1:3]:
        x[64:] = np.nan
    out, lse, *_ = by_cpu(call, SMALL_TILES)
    assert np.isfinite(out[:64]).all() and np.isfinite(lse[:64]).all() and np.isnan(out[64:]).all()


@pytest.mark.parametrize("family", [CPU, STANDARD], ids=lambda family: family.name)
def test_an_infinite_query(family: Any) -> None:
    """The same as a score that its mask makes infinite."""
    arrays = [random(4, 8), random(70, 8, seed=1), random(70, 8, seed=2)]
    arrays[0][1], arrays[1][:, 0] = [np.inf, *[0] * 7], 1.0
    arrays[0][2] = np.nan
    with np.errstate(all="ignore"):
        out, lse, dq, *_ = family.compute(call_of(family, arrays, "float32"))
    assert np.isnan(out[1:3]).all() and np.isfinite(out[[0, 3]]).all()
    assert np.isposinf(lse[1]) and np.isnan(lse[2]) and np.isfinite(lse[[0, 3]]).all()
    assert np.isnan(dq[1:3]).all() and np.isfinite(dq[[0, 3]]).all()


def test_infinity_and_nan_in_one_row() -> None:
    """In one tile, and in tiles after each other, in both orders."""
    for first, second in ((1, 2), (2, 1), (1, 600), (600, 1)):
        mask = np.zeros((1, 700), np.float32)
        mask[0, first], mask[0, second] = np.inf, np.nan
        with np.errstate(all="ignore"):
            assert np.isnan(run(random(1, 4), random(700, 4), random(700, 4), mask)[1]).all()


@pytest.mark.parametrize("factor", [1e3, -1e3])
def test_huge_scores(factor: Any) -> None:
    """Scores of 1e4, of which one key takes all: any error of the maximum would show."""
    arrays = [random(2, 33, 16), random(2, 65, 16), random(2, 65, 16)]
    call = call_of(CPU, arrays, "float32", dl=0.0, scale=factor)
    out, lse, dq, dk, dv, _ = by_cpu(call)
    want = references.attention(*call.tensors, scale=factor)
    np.testing.assert_allclose(out, want.out, atol=2e-3)
    np.testing.assert_allclose(lse, want.logsumexp, rtol=1e-6)
    # Scores of 1e4 are rounded to float32 in both passes, an error of up to 5e-4 in log P.
    np.testing.assert_allclose(dv, want.grad_value, atol=2e-3)
    for got, exact in ((dq, want.grad_query), (dk, want.grad_key)):
        # dP - delta may be a difference of equals, of which the scale enlarges the rounding error.
        tolerance = 2e-3 * np.abs(exact).max() + 2e-5 * abs(factor)
        np.testing.assert_allclose(got, exact, rtol=0, atol=tolerance)
    results = run(arrays[0] * 1e15, arrays[1] * 1e15, arrays[2])
    assert all(np.isfinite(x).all() for x in results[:2])


@pytest.mark.parametrize("family", [CPU, STANDARD, OPERATIONS], ids=lambda family: family.name)
@pytest.mark.parametrize("options", CPU.large_scores, ids=str)
def test_no_gradient_at_rows_of_one_key(family: Any, options: Any) -> None:
    """What is left is the rounding of delta and dP, times keys and queries of 1e3."""
    arrays = [random(50, 16, seed=s) * scale for s, scale in enumerate((1e3, 1e3, 1))]
    call = call_of(family, arrays, "float32", dl=0.0, **options)
    _, _, dq, dk, dv, _ = family.compute(call)
    want = references.attention(*call.tensors, **options)
    np.testing.assert_allclose(dv, want.grad_value, rtol=0, atol=1e-6 * np.abs(dv).max())
    assert np.abs(want.grad_query).max() < 1e-6 > np.abs(want.grad_key).max()
    for got in (dq, dk):
        assert np.abs(got).max() < 1e3 * 1e-4 * abs(options.get("scale", 0.25))


def test_minus_zero_and_subnormal_inputs() -> None:
    q, k, v = random(9, 4), random(9, 4), random(9, 4)
    q[0], k[1], v[2] = -0.0, 1e-41, -1e-41
    call = call_of(CPU, [q, k, v], "float32")
    compare(CPU, call, by_cpu(call))


def test_keys_that_contribute_nothing_underflow_to_zero() -> None:
    q, k, v = np.ones((1, 1)), np.array([[0.0], [-200.0]]), np.array([[1.0], [1e38]])
    out, lse, *_ = by_cpu(call_of(CPU, [q, k, v], "float32", scale=1.0))
    assert out[0, 0] == 1.0 and lse[0] == 0.0


@pytest.mark.parametrize("name", ["flash_attention", "attention"])
def test_a_mask_of_float64_beside_float32(name: str) -> None:
    """Its numbers stay finite: a row of the smallest is even, one of -inf is empty."""
    q, k, v = (minitorch.tensor(random(n, 4, seed=n), BACKEND) for n in (3, 5, 5))
    mask = np.zeros((3, 5))
    mask[0], mask[1, :-1] = np.finfo(np.float64).min, -np.inf
    out = getattr(q, name)(k, v, attn_mask=mask).to_numpy()
    np.testing.assert_allclose(out[0], v.to_numpy().mean(0), atol=1e-6)
    np.testing.assert_allclose(out[1], v.to_numpy()[-1], atol=1e-6)


@pytest.mark.parametrize("name", ["flash_attention", "attention"])
@pytest.mark.parametrize("of_mask", ["float16", "bfloat16", "longdouble", ">f4"])
def test_masks_of_other_floats(name: str, of_mask: str) -> None:
    """Their numbers are added; each is one of float32, too."""
    q, k, v = (minitorch.tensor(random(n, 4, seed=n), BACKEND) for n in (3, 5, 5))
    kind = minitorch.dtypes.BFLOAT16 if of_mask == "bfloat16" else np.dtype(of_mask)
    mask = random(3, 5, seed=9).astype(minitorch.dtypes.BFLOAT16)
    out = getattr(q, name)(k, v, attn_mask=mask.astype(np.float32).astype(kind))
    expected = getattr(q, name)(k, v, attn_mask=mask.astype(np.float32))
    np.testing.assert_allclose(out.to_numpy(), expected.to_numpy(), atol=2e-3)


# ----- promises -----


@pytest.mark.parametrize(
    "options", [{}, {"is_causal": True}, {"dropout_p": 0.3}, {"window": (40, 3)}], ids=str
)
def test_same_bits_on_any_number_of_threads(options: Any) -> None:
    call = call_of(CPU, [random(1, 300, 24, seed=n) for n in range(3)], "float32", **options)
    first = by_cpu(call, SMALL_TILES)
    before = numba.get_num_threads()
    try:
        numba.set_num_threads(1)
        again = by_cpu(call, SMALL_TILES)
    finally:
        numba.set_num_threads(before)
    for one, other in zip(first[:5], again[:5], strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("dtype", CPU.dtypes)
def test_dropout_mask_does_not_depend_on_tiles(dtype: str) -> None:
    arrays = [random64(2, n, 16, seed=n) for n in (100, 140, 140)]
    call = call_of(CPU, arrays, dtype, dropout_p=0.4, seed=99)
    for tiles in ((32, 32, 64, 32), (64, 128, 32, 128), (128, 64, 96, 64)):
        compare(CPU, call, by_cpu(call, TileSizes(*tiles)))


def count_tiles(n: int, mask: Any = None, **options: Any) -> int:
    q = random(n, 8)
    problem = AttentionProblem.of(q.shape, q.shape, q.shape, q.dtype, attn_mask=mask, **options)
    return cpu.forward_with_count(problem, q, q, q, mask, SMALL_TILES).tiles


def test_wholly_masked_tiles_are_not_computed() -> None:
    n, t = 256, 256 // 32
    assert count_tiles(n) == t * t
    assert count_tiles(n, is_causal=True) == t * (t + 1) // 2
    assert count_tiles(n, window=(0, 0)) == t
    assert count_tiles(n, window=(32, 0)) == 2 * t - 1
    blocks = np.kron(np.eye(t), np.ones((32, 32))).astype(bool)
    assert count_tiles(n, blocks) == t
    assert count_tiles(n, np.where(blocks, 0, -np.inf).astype(np.float32)) == t
    padding = np.arange(n) < 40
    assert count_tiles(n, padding) == 2 * t
    assert count_tiles(n, np.zeros((n, n), bool)) == 0


def test_one_compiled_kernel_for_each_dtype() -> None:
    """Masks, strides, read-only inputs: none makes numba compile anew."""
    for kernel in (
        cpu_forward.forward_worker,
        cpu_backward.backward_worker,
        cpu_backward.delta_worker,
    ):
        assert len(kernel.signatures) <= 2


def test_16_bit_numbers_are_for_the_gpu() -> None:
    half = AttentionProblem.of((5, 4), (6, 4), (6, 4), np.float16)
    with pytest.raises(TypeError, match="on the CPU"):
        q, k, v = (np.zeros((n, 4), np.float16) for n in (5, 6, 6))
        cpu.forward(half, q, k, v)
