"""Attention on the GPU with scores and masks that are as large as numbers get: every family."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from minitorch.cuda import attention as cuda_attention
from minitorch.kernels.flash_attention.decode import launch as decode
from minitorch.kernels.flash_attention.hopper import backward_launch as hopper_backward
from minitorch.kernels.flash_attention.hopper import launch as hopper
from minitorch.kernels.flash_attention.hopper.tiles import Blocks
from minitorch.kernels.flash_attention.launch import heads_of
from minitorch.kernels.flash_attention.mma import launch as mma
from minitorch.kernels.flash_attention.scores import mask_numbers
from minitorch.kernels.flash_attention.simt import launch as simt
from minitorch.kernels.gpu.runtime import SIMULATED, compute_capability
from tests import references
from tests.cuda.test_flash_attention_cuda import (
    BACKEND,
    NAMES,
    TOLERANCE,
    on_gpu,
    problem_of,
    random,
    run,
)
from tests.test_attention_extremes import large_mask

# Family, dtype, and how float32 is multiplied.
CASES = [
    ("simt", "float32", "ieee"), ("mma", "float16", "ieee"), ("mma", "float32", "tf32x3"),
    ("hopper", "bfloat16", "ieee"),
]  # fmt: skip
MORE_CASES = [
    ("simt", "float64", "ieee"), ("simt", "bfloat16", "ieee"), ("mma", "bfloat16", "ieee"),
    ("hopper", "float16", "ieee"),
]  # fmt: skip
if not SIMULATED:
    CASES += MORE_CASES
MASKS = {
    "float32": ("float32", "float64", "float16"), "float64": ("float64",),
    "float16": ("float16",), "bfloat16": ("bfloat16", "float64"),
}  # fmt: skip
ROUNDED = {"float16": 6e-4, "bfloat16": 5e-3, "float32": 1e-5, "float64": 1e-12}
NQ, NK = (10, 22) if SIMULATED else (150, 700)
Use = Callable[[str], None]


@pytest.fixture
def use(monkeypatch: pytest.MonkeyPatch) -> Use:
    """A function that lets one family compute everything; in the simulator in small tiles."""

    def family(name: str) -> None:
        module = {"simt": simt, "mma": mma, "hopper": hopper}[name]
        if name == "hopper" and SIMULATED:
            find = hopper_backward.backward_blocks
            monkeypatch.setattr(cuda_attention, "compute_capability", lambda: (9, 0))
            monkeypatch.setattr(hopper, "forward_blocks", lambda *_: Blocks(2, 64))
            monkeypatch.setattr(
                hopper_backward,
                "backward_blocks",
                lambda *kind: tuple(replace(b, own=64, passing=16) for b in find(*kind)),
            )
            hopper._planned.cache_clear()
        elif name == "hopper" and compute_capability() != (9, 0):
            pytest.skip("needs compute capability 9.0")
        elif name == "mma" and not SIMULATED and compute_capability() < mma.FIRST_WITH_ALL:
            pytest.skip("needs compute capability 8.0")
        monkeypatch.setattr(cuda_attention, "FLASH_ATTENTION", (module,))

    return family


def results(
    arrays: Any, dtype: str, mask: Any = None, of_mask: str = "", **arguments: Any
) -> tuple[Any, Any]:
    """Output, logsumexp and gradients, and the reference for the same rounded inputs."""
    tensors = [on_gpu(x, dtype) for x in arrays]
    device_mask = None if mask is None else on_gpu(mask, of_mask)._tensor
    real = "float64" if dtype == "float64" else "float32"
    exact = None if mask is None else mask_numbers(mask, np.dtype(real)).astype(np.float64)
    problem = problem_of(tensors, attn_mask=exact, **arguments)
    grads = (
        on_gpu(random(*problem.out_shape, seed=5), dtype),
        on_gpu(random(*problem.logsumexp_shape, seed=6) / 8, real),
    )
    got = run(tensors, device_mask, grads, mask is not None, problem)
    inputs = [x.to_numpy().astype(np.float64) for x in (*tensors, *grads)]
    arguments.pop("fp32_precision")
    with np.errstate(over="ignore"):
        want = references.attention(*inputs, attn_mask=exact, scores=real, **arguments)
    wanted = (
        want.out, want.logsumexp, want.grad_query, want.grad_key, want.grad_value, want.grad_mask,
    )  # fmt: skip
    return got, wanted


def compare(got: Any, wanted: Any, bound: float, names: Any = NAMES) -> None:
    for name, x, y in zip(NAMES, got, wanted, strict=True):
        if x is None or name not in names:
            continue
        most = 1.0 if name == "logsumexp" else np.abs(y[np.isfinite(y)]).max(initial=1.0)
        relative = 1e-5 if name == "logsumexp" else 0.0
        np.testing.assert_allclose(x, y, rtol=relative, atol=bound * most, err_msg=name)


def heads(*arrays: Any) -> list[Any]:
    return [x[None, None] for x in arrays]


@pytest.mark.parametrize(
    ("family", "dtype", "precision", "of_mask"),
    [(*case, name) for case in CASES for name in MASKS[case[1]][: 1 if SIMULATED else 3]]
    + [("simt", "float32", "ieee", "float64")] * SIMULATED,
)
def test_masks_as_large_as_numbers(
    use: Use, family: str, dtype: str, precision: str, of_mask: str
) -> None:
    use(family)
    kind = {"float32": np.float32, "float64": np.float64, "float16": np.float16}.get(of_mask)
    mask = large_mask(NQ, NK, kind or np.float32)
    if of_mask == "bfloat16":
        edge = float(ml_dtypes.finfo(ml_dtypes.bfloat16).max)
        finite = np.clip(mask, -edge, edge)
        mask = np.where(np.isinf(mask), mask, finite).astype(ml_dtypes.bfloat16).astype(np.float32)
    arrays = heads(random(NQ, 16), random(NK, 16, seed=1), random(NK, 16, seed=2))
    arguments: dict[str, Any] = {"fp32_precision": precision}
    got, wanted = results(arrays, dtype, mask, of_mask, **arguments)
    compare(got, wanted, max(TOLERANCE[dtype], TOLERANCE[of_mask]))


@pytest.mark.parametrize(
    ("family", "dtype", "precision", "more"),
    [(*case, {}) for case in CASES]
    + [
        (*case, more)
        for case in (CASES[-1:] if SIMULATED else CASES)
        for more in ({"scale": -40.0, "is_causal": True}, {"scale": 20.0})[: 1 if SIMULATED else 2]
    ],
)
def test_rows_of_one_key_at_large_scores(
    use: Use, family: str, dtype: str, precision: str, more: dict[str, Any]
) -> None:
    """P is exactly 1 for the key that counts: dV is a sum of rows of dO."""
    use(family)
    arrays = heads(
        1e3 * random(NQ, 16), 1e3 * random(NK, 16, seed=1), random(NK, 16, seed=2)
    )  # fmt: skip
    got, wanted = results(arrays, dtype, fp32_precision=precision, **more)
    compare(got, wanted, ROUNDED[dtype], ("logsumexp", "dv"))
    # In the forward pass P of 16 bits is a power of two that is near 1.
    compare(got, wanted, 3 * ROUNDED[dtype], ("out",))


@pytest.mark.parametrize(("family", "dtype", "precision"), CASES[2:] if SIMULATED else CASES)
def test_keys_that_tie_at_large_scores(use: Use, family: str, dtype: str, precision: str) -> None:
    """Every key is there several times, also in other tiles: each has its share, 1/2, 1/3 ..."""
    use(family)
    keys = np.concatenate([300 * random(NK // 5, 16, seed=1)] * 5)[: NK - 3]
    arrays = heads(300 * random(NQ, 16), keys, random(NK - 3, 16, seed=2))
    got, wanted = results(arrays, dtype, fp32_precision=precision)
    compare(got, wanted, 2 * ROUNDED[dtype], ("out", "logsumexp", "dv"))


@pytest.mark.parametrize(("family", "dtype", "precision"), CASES[:2] + CASES[3:])
def test_an_infinite_score(use: Use, family: str, dtype: str, precision: str) -> None:
    """As of PyTorch: no softmax (NaN), a logsumexp of infinity, and no other row takes notice."""
    use(family)
    arrays = heads(random(NQ, 16), random(NK, 16, seed=1), random(NK, 16, seed=2))
    mask = np.zeros((NQ, NK), np.float32)
    mask[1, NK - 2], mask[2, 3], mask[3, [2, NK - 2]] = np.inf, np.nan, (np.inf, np.nan)
    tensors = [on_gpu(x, dtype) for x in arrays]
    problem = problem_of(tensors, attn_mask=mask, fp32_precision=precision)
    grads = on_gpu(random(*problem.out_shape, seed=5), dtype), None
    out, lse, dq, *_ = run(tensors, on_gpu(mask)._tensor, grads, False, problem)
    ordinary = [0, *range(4, NQ)]
    assert np.isposinf(lse[0, 0, 1]) and np.isnan(lse[0, 0, 2:4]).all()
    assert np.isfinite(lse[0, 0, ordinary]).all()
    for x in (out, dq):
        assert np.isnan(x[0, 0, 1:4]).all() and np.isfinite(x[0, 0, ordinary]).all()


# ----- decode -----


@pytest.mark.parametrize("dtype", ["float16"] if SIMULATED else ["float32", "float16"])
def test_decode_with_masks_as_large_as_numbers(dtype: str) -> None:
    """Splits of unequal lengths, all of whose scores are one number: each key counts the same."""
    keys = 3 * decode.KEYS_OF_A_SPLIT + 5
    arrays = heads(random(8, 16), random(keys, 16, seed=1), random(keys, 16, seed=2))
    mask = large_mask(9, keys, np.float32)[1:]
    tensors = [on_gpu(x, dtype) for x in arrays]
    problem = problem_of(tensors, attn_mask=mask)
    assert cuda_attention.choose(problem, compute_capability()).module is decode
    assert decode.cuts_of(problem, heads_of(problem)).splits > 1
    ops: Any = BACKEND.ops
    out, lse, rows = ops.flash_attention_forward(*tensors, on_gpu(mask)._tensor, problem)
    inputs = [x.to_numpy().astype(np.float64) for x in tensors]
    want = references.attention(*inputs, attn_mask=mask, scores=np.float32)
    np.testing.assert_allclose(out.to_numpy(), want.out, atol=TOLERANCE[dtype])
    np.testing.assert_allclose(lse.to_numpy(), want.logsumexp, rtol=1e-5)
    assert rows is None


@pytest.mark.parametrize("dtype", ["float32"] if SIMULATED else ["float32", "float16"])
def test_gradients_after_decode_at_large_scores(dtype: str) -> None:
    """The backward pass is of other kernels, whose scores are not the same to the last bit."""
    arrays = heads(1e3 * random(5, 16), 1e3 * random(20, 16, seed=1), random(20, 16, seed=2))
    got, wanted = results(arrays, dtype, fp32_precision="ieee")
    compare(got, wanted, ROUNDED[dtype], ("out", "logsumexp", "dv"))


def test_decode_with_an_infinite_score() -> None:
    keys = 3 * decode.KEYS_OF_A_SPLIT + 5
    q, k, v = (on_gpu(random(1, n, 16, seed=n)) for n in (3, keys, keys))
    mask = np.zeros((3, keys), np.float32)
    mask[1, 7], mask[2, keys - 1] = np.inf, np.nan
    out, lse = q.flash_attention(k, v, attn_mask=mask, return_lse=True)
    found = lse.to_numpy()[0]
    assert np.isfinite(found[0]) and np.isposinf(found[1]) and np.isnan(found[2])
    assert np.isfinite(out.to_numpy()[0, 0]).all() and np.isnan(out.to_numpy()[0, 1:]).all()
