"""Attention on the CPU with scores and masks that are as large as numbers get."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import minitorch
from minitorch import FastOps, SimpleOps, TensorBackend
from tests import references

BACKENDS = {"tiles": TensorBackend(FastOps), "standard": TensorBackend(SimpleOps)}
METHODS = [("tiles", "flash_attention"), ("standard", "flash_attention"), ("tiles", "attention")]
TOLERANCE = {"float32": 3e-5, "float64": 1e-12}
attention: Any = references.attention
NAMES = ("out", "logsumexp", "dq", "dk", "dv", "dmask")


def random(*shape: int, seed: int = 0, dtype: str = "float32") -> Any:
    return np.random.default_rng((seed, *shape)).standard_normal(shape).astype(dtype)


def large_mask(rows: int, columns: int, dtype: Any) -> Any:
    """Every row another mixture of numbers as large as the dtype has, infinity and small ones."""
    lowest = np.finfo(dtype).min
    mask = random(rows, columns, seed=3, dtype=dtype)
    every_third = np.arange(columns) % 3 == 1
    mask[0] = lowest
    mask[1] = dtype(0.9) * lowest
    mask[2] = np.where(every_third, dtype(0.9) * lowest, lowest)
    mask[3] = np.where(every_third, mask[3], lowest)
    mask[4] = -np.inf
    mask[5] = -lowest
    mask[6] = np.where(every_third, -lowest, mask[6])
    mask[7] = np.where(every_third, lowest, -np.inf)
    mask[8] = np.where(np.arange(columns) == columns - 1, -lowest, lowest)
    return mask


def gradients(method: tuple[str, str], arrays: Any, mask: Any, grads: Any, **arguments: Any) -> Any:
    """Output, logsumexp and gradients of query, key, value and an additive mask."""
    backend = BACKENDS[method[0]]
    q, k, v = (minitorch.tensor(x, backend, requires_grad=True) for x in arrays)
    if mask is not None and mask.dtype != bool:
        mask = minitorch.tensor(mask, backend, requires_grad=True)
    out, lse = getattr(q, method[1])(k, v, attn_mask=mask, return_lse=True, **arguments)
    do, dl = (minitorch.tensor(x, backend) for x in grads)
    ((out * do).sum() + (lse * dl).sum()).backward()
    leaves = [x for x in (q, k, v, mask) if hasattr(x, "grad")]
    return [x.to_numpy() for x in (out, lse, *(x.grad for x in leaves))]


def compare(got: Any, reference: Any, dtype: str) -> None:
    wanted = (
        reference.out, reference.logsumexp, reference.grad_query, reference.grad_key,
        reference.grad_value, reference.grad_mask,
    )  # fmt: skip
    for name, x, y in zip(NAMES, got, wanted, strict=False):
        error = TOLERANCE[dtype] * max(1.0, np.abs(y[np.isfinite(y)]).max(initial=0) * (y.ndim > 1))
        relative = TOLERANCE[dtype] if name == "logsumexp" else 0.0
        np.testing.assert_allclose(x, y, rtol=relative, atol=error, err_msg=name)


@pytest.mark.parametrize("method", METHODS[:2])
@pytest.mark.parametrize(
    ("dtype", "of_mask"),
    [
        ("float32", np.float32), ("float64", np.float64), ("float32", np.float16),
        ("float64", np.float32),
    ],
)  # fmt: skip
def test_masks_as_large_as_numbers(method: Any, dtype: str, of_mask: Any) -> None:
    rows, columns = 12, 77
    arrays = [random(2, n, 8, seed=s, dtype=dtype) for s, n in enumerate((rows, columns, columns))]
    mask = large_mask(rows, columns, of_mask).astype(dtype)
    # Small ones for the logsumexp, which is as large as numbers get: the loss is finite.
    grads = random(2, rows, 8, seed=8, dtype=dtype), random(2, rows, seed=9, dtype=dtype) / 128
    reference = attention(*arrays, *grads, attn_mask=mask, scores=dtype)
    compare(gradients(method, arrays, mask, grads), reference, dtype)


@pytest.mark.parametrize("name", ["flash_attention", "attention"])
def test_a_mask_of_float64_beside_float32(name: str) -> None:
    """Its numbers stay finite: a row of the smallest is even, one of -inf is empty."""
    q, k, v = (minitorch.tensor(random(n, 4, seed=n), BACKENDS["tiles"]) for n in (3, 5, 5))
    mask = np.zeros((3, 5))
    mask[0], mask[1, :-1] = np.finfo(np.float64).min, -np.inf
    out = getattr(q, name)(k, v, attn_mask=mask).to_numpy()
    np.testing.assert_allclose(out[0], v.to_numpy().mean(0), atol=1e-6)
    np.testing.assert_allclose(out[1], v.to_numpy()[-1], atol=1e-6)


@pytest.mark.parametrize("name", ["flash_attention", "attention"])
@pytest.mark.parametrize("of_mask", ["float16", "bfloat16", "longdouble", ">f4"])
def test_masks_of_other_floats(name: str, of_mask: str) -> None:
    """Their numbers are added; each is one of float32, too."""
    q, k, v = (minitorch.tensor(random(n, 4, seed=n), BACKENDS["tiles"]) for n in (3, 5, 5))
    kind = minitorch.dtypes.BFLOAT16 if of_mask == "bfloat16" else np.dtype(of_mask)
    mask = random(3, 5, seed=9).astype(minitorch.dtypes.BFLOAT16)
    out = getattr(q, name)(k, v, attn_mask=mask.astype(np.float32).astype(kind))
    expected = getattr(q, name)(k, v, attn_mask=mask.astype(np.float32))
    np.testing.assert_allclose(out.to_numpy(), expected.to_numpy(), atol=2e-3)


@pytest.mark.parametrize("arguments", [{}, {"is_causal": True}, {"scale": -40.0}, {"scale": 3e4}])
@pytest.mark.parametrize("method", METHODS)
def test_rows_of_one_key_at_large_scores(method: Any, arguments: Any) -> None:
    """P is exactly 1 for the key that counts: dV is a sum of rows of dO, dQ and dK are 0."""
    arrays = [random(50, 16, seed=s) * scale for s, scale in enumerate((1e3, 1e3, 1))]
    grads = random(50, 16, seed=8), np.zeros(50, np.float32)
    _, _, dq, dk, dv = gradients(method, arrays, None, grads, **arguments)
    want = attention(*arrays, *grads, **arguments)
    np.testing.assert_allclose(dv, want.grad_value, rtol=0, atol=1e-6 * np.abs(dv).max())
    assert np.abs(want.grad_query).max() < 1e-6 > np.abs(want.grad_key).max()
    # What is left is the rounding of delta and dP, times keys and queries of 1e3.
    for got in (dq, dk):
        assert np.abs(got).max() < 1e3 * 1e-4 * abs(arguments.get("scale", 0.25))


@pytest.mark.parametrize("method", METHODS[:2])
@pytest.mark.parametrize("size", [1e2, 1e3, 1e4])
def test_keys_that_tie_at_large_scores(method: Any, size: float) -> None:
    """Every key is there several times, also in other tiles: each has its share, 1/2, 1/3 ..."""
    keys = np.concatenate([random(60, 16, seed=1) * size] * 6)[:330]
    arrays = [random(40, 16) * size, keys, random(330, 16, seed=2)]
    grads = random(40, 16, seed=8), np.zeros(40, np.float32)
    out, lse, _, _, dv = gradients(method, arrays, None, grads)
    want = attention(*arrays, *grads)
    np.testing.assert_allclose(out, want.out, atol=1e-5)
    np.testing.assert_allclose(lse, want.logsumexp, rtol=1e-6)
    np.testing.assert_allclose(dv, want.grad_value, rtol=0, atol=1e-5 * np.abs(dv).max())


@pytest.mark.parametrize("method", METHODS[:2])
@pytest.mark.parametrize("of_mask", [False, True])
def test_an_infinite_score(method: Any, of_mask: bool) -> None:
    """As of PyTorch: no softmax (NaN), a logsumexp of infinity, and no other row takes notice."""
    arrays = [random(4, 8), random(70, 8, seed=1), random(70, 8, seed=2)]
    mask = np.zeros((4, 70), np.float32)
    if of_mask:
        mask[1, 40], mask[2, 5] = np.inf, np.nan
    else:
        arrays[0][1], arrays[1][:, 0] = [np.inf, *[0] * 7], 1.0
        arrays[0][2] = np.nan
    grads = random(4, 8, seed=8), random(4, seed=9)
    with np.errstate(all="ignore"):
        out, lse, dq, *_ = gradients(method, arrays, mask, grads)
    assert np.isnan(out[1:3]).all() and np.isfinite(out[[0, 3]]).all()
    assert np.isposinf(lse[1]) and np.isnan(lse[2]) and np.isfinite(lse[[0, 3]]).all()
    assert np.isnan(dq[1:3]).all() and np.isfinite(dq[[0, 3]]).all()


def test_infinity_and_nan_in_one_row() -> None:
    """In one tile, and in tiles after each other, in both orders."""
    for first, second in ((1, 2), (2, 1), (1, 600), (600, 1)):
        mask = np.zeros((1, 700), np.float32)
        mask[0, first], mask[0, second] = np.inf, np.nan
        q, k = (minitorch.tensor(random(n, 4), BACKENDS["tiles"]) for n in (1, 700))
        _, lse = q.flash_attention(k, k, attn_mask=mask, return_lse=True)
        assert np.isnan(lse.to_numpy()).all()
