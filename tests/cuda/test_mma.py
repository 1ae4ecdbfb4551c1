"""FlashAttention by mma.sync, forward and backward, against attention in float64.

In the simulator on tiles of 16 x 16 and a warp or two; on a GPU on its own tiles. More tests, for
every implementation, are in test_flash_attention_cuda.py.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from minitorch.cuda import attention as cuda_attention
from minitorch.kernels.flash_attention.mma import launch as mma
from minitorch.kernels.flash_attention.mma.tiles import Tiles
from minitorch.kernels.gpu.runtime import SIMULATED, compute_capability
from minitorch.kernels.philox import attention_dropout_mask
from tests.cuda import test_flash_attention_cuda as attention_tests
from tests.cuda.test_flash_attention_cuda import BACKEND, check, on_gpu, problem_of, random

NQ, NK = (17, 20) if SIMULATED else (150, 339)
TF32_TOLERANCE = 5e-3


@pytest.fixture(autouse=True)
def mma_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """No other kernels take a problem."""
    if not SIMULATED and compute_capability() < mma.FIRST_WITH_ALL:
        pytest.skip("bfloat16 and TF32 need compute capability 8.0")
    monkeypatch.setattr(cuda_attention, "FLASH_ATTENTION", (mma,))


def shapes(columns: int = 16, value_columns: int = 16, heads: int = 1, kv_heads: int = 1) -> Any:
    return [
        (1, heads, NQ, columns), (1, kv_heads, NK, columns), (1, kv_heads, NK, value_columns),
    ]  # fmt: skip


def bias(seed: int = 7) -> Any:
    numbers = random(NQ, NK, seed=seed)
    return np.where(numbers < -1, -np.inf, numbers).astype(np.float32)


# ----- numbers -----


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_16_bits(dtype: str) -> None:
    check(shapes(), dtype)


def test_three_products_of_tf32_are_as_good_as_float32() -> None:
    check(shapes(), "float32", fp32_precision="tf32x3", is_causal=True)


def test_tf32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(attention_tests.TOLERANCE, "float32", TF32_TOLERANCE)
    check(shapes(), "float32", fp32_precision="tf32")


def test_float32_is_left_to_others_unless_asked_for() -> None:
    tensors = [on_gpu(random(*shape)) for shape in shapes()]
    architecture = (9, 0)
    assert "fp32_precision" in str(mma.why_not(problem_of(tensors), architecture))
    assert mma.why_not(problem_of(tensors, fp32_precision="tf32"), architecture) is None


# ----- features -----

FEATURES: dict[str, dict[str, Any]] = {
    "causal": {"is_causal": True},
    "causal, the last aligned": {"is_causal": "bottom-right"},
    "window": {"window": (9, 3)},
    "negative scale": {"scale": -0.3},
    "scale 0": {"scale": 0.0},
    "dropout": {"dropout_p": 0.3, "seed": 2**63 + 5},
    "everything dropped": {"dropout_p": 1.0},
    "no number reaches the threshold": {"dropout_p": 1 - 1e-11},
    "boolean mask": {"mask": bias() > -0.5},
    "additive mask": {"mask": bias()},
    "causal, mask, dropout": {"is_causal": True, "mask": bias(), "dropout_p": 0.5, "seed": 3},
}


@pytest.mark.parametrize("name", FEATURES)
def test_feature(name: str) -> None:
    check(shapes(20, 7), "float16", **FEATURES[name])


def test_heads_that_share_keys() -> None:
    check(shapes(8, 8, 2, 1), "float16", enable_gqa=True, is_causal="bottom-right")


def test_strided_inputs() -> None:
    check(shapes(24, 8, 2, 2), "float16", ("heads", "part", "transposed", "heads"))


def test_rows_that_see_no_key() -> None:
    allowed = random(11, 13) > 0
    allowed[[0, 5, 10]] = False
    check([(11, 8), (13, 8), (13, 8)], "float16", mask=allowed)
    check([(21, 8), (13, 8), (13, 8)], "float16", is_causal="bottom-right")


@pytest.mark.parametrize("lengths", [(0, 5), (5, 0), (1, 1)])
def test_short_sequences(lengths: tuple[int, int]) -> None:
    nq, nk = lengths
    check([(2, nq, 4), (2, nk, 4), (2, nk, 4)], "float16")


def test_dropout_keeps_what_the_mask_says() -> None:
    """Queries of 0 and values that are the unit vectors make the output the mask itself."""
    p, seed = 0.4, 12345678901234567890
    q, k, v = np.zeros((1, 2, 17, 8)), random(1, 2, 19, 8), np.eye(19)[None, None].repeat(2, 1)
    tensors = [on_gpu(x, "float16") for x in (q, k, v)]
    ops: Any = BACKEND.ops
    out, *_ = ops.flash_attention_forward(
        *tensors, None, problem_of(tensors, dropout_p=p, seed=seed)
    )
    kept = attention_dropout_mask(2, 17, 19, p, seed)
    np.testing.assert_array_equal(out.to_numpy()[0] != 0, kept)


def test_nothing_outside_of_the_inputs_is_used() -> None:
    """Surrounded by NaN, and NaN in the columns behind those of a row."""
    tensors = []
    for seed, shape in enumerate([(1, NQ, 20), (1, NK, 20), (1, NK, 12)]):
        wide = np.full((1, shape[1] + 24, 40), np.nan)
        wide[:, 8:-16, 8 : 8 + shape[2]] = random(*shape, seed=seed)
        tensors.append(on_gpu(wide, "float16")[:, 8:-16, 8 : 8 + shape[2]].detach())
    problem = problem_of(tensors)
    grad_out = on_gpu(random(*problem.out_shape, seed=5), "float16")
    results = attention_tests.run(tensors, None, (grad_out, None), False, problem)
    plain = [on_gpu(t.to_numpy(), "float16") for t in tensors]
    expected = attention_tests.run(plain, None, (grad_out, None), False, problem)
    for got, want in zip(results[:5], expected[:5], strict=True):
        np.testing.assert_array_equal(got, want)


# ----- sizes of tiles -----


@pytest.mark.parametrize(
    ("tiles", "dtype"),
    [
        (Tiles(32, 16, 1, 2), "float16"),
        (Tiles(32, 32, 2, 1), "float32"),
        (Tiles(32, 16, 1, 1, in_registers=True, lazy=True), "float16"),
        (Tiles(16, 16, 1, 2, parts=2), "bfloat16"),
    ],
)
def test_tiles(monkeypatch: pytest.MonkeyPatch, tiles: Tiles, dtype: str) -> None:
    """Two row blocks to a warp, two warps, one stage, operands in registers, half the columns."""
    whole = replace(tiles, parts=1)
    monkeypatch.setattr(mma, "forward_tiles", lambda *_: whole)
    monkeypatch.setattr(mma, "backward_tiles", lambda *_: (tiles, whole))
    check(
        [(1, 35, 32), (1, 37, 32), (1, 37, 32)], dtype, is_causal=True, dropout_p=0.2,
        fp32_precision="tf32x3",
    )  # fmt: skip


def test_turing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plain copies, and products of half the depth."""
    monkeypatch.setattr(mma, "is_turing", lambda _: True)
    monkeypatch.setattr(mma, "forward_tiles", lambda *_: Tiles(16, 16, 1, 1))
    monkeypatch.setattr(mma, "backward_tiles", lambda *_: (Tiles(16, 16, 1, 1),) * 2)
    check(shapes(20, 7), "float16", dropout_p=0.2)


# ----- everything together -----


@st.composite
def calls(draw: Any, dtype: str, mask_kind: str) -> dict[str, Any]:
    longest, most = (20, 24) if SIMULATED else (200, 256)
    nq, nk = draw(st.integers(0, longest)), draw(st.integers(0, longest))
    d, dv = draw(st.integers(1, most)), draw(st.integers(1, most))
    heads, group = draw(st.integers(1, 2)), draw(st.integers(1, 2))
    call: dict[str, Any] = {
        "shapes": [(heads * group, nq, d), (heads, nk, d), (heads, nk, dv)],
        "dtype": dtype,
        "enable_gqa": True,
        "fp32_precision": "tf32x3",
        "is_causal": draw(st.sampled_from([False, "top-left", "bottom-right"])),
        "dropout_p": draw(st.sampled_from([0.0, 0.2])),
        "window": draw(st.none() | st.tuples(st.none() | st.integers(0, 12), st.none())),
        "scale": draw(st.none() | st.sampled_from([-0.3, 1.0])),
    }
    if mask_kind != "none":
        numbers = random(nq if draw(st.booleans()) else 1, nk, seed=draw(st.integers(0, 99)))
        additive = np.where(numbers < -1, -np.inf, numbers).astype(np.float32)
        call["mask"] = numbers > -0.5 if mask_kind == "bool" else additive
    return call


@pytest.mark.parametrize("mask_kind", ["none", "bool", "additive"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@settings(
    max_examples=3 if SIMULATED else 7,
    deadline=None,
    derandomize=True,
    suppress_health_check=list(HealthCheck),
)
@given(data=st.data())
def test_any_call(dtype: str, mask_kind: str, data: st.DataObject) -> None:
    check(**data.draw(calls(dtype, mask_kind)))


# ----- on hardware -----


@pytest.mark.gpu
@pytest.mark.parametrize("columns", [1, 16, 40, 59, 64, 96, 111, 128, 160, 192, 256])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_head_sizes(columns: int, dtype: str) -> None:
    check(shapes(columns, columns), dtype, is_causal=True, fp32_precision="tf32x3")
