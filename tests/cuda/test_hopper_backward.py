"""FlashAttention's backward pass on Hopper GPUs: each feature, against gradients in float64.

A few small calls run in the simulator too, with its emulation of the copy engine and of wgmma.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings

from minitorch.cuda import attention as launcher
from minitorch.kernels.flash_attention.hopper import backward_launch as hopper_backward
from minitorch.kernels.flash_attention.hopper import launch as hopper
from minitorch.kernels.flash_attention.hopper.backward_pipeline import memory_plan
from minitorch.kernels.flash_attention.hopper.tiles import Kind
from minitorch.kernels.flash_attention.problem import AttentionProblem
from minitorch.kernels.flash_attention.simt import launch as simt
from minitorch.kernels.gpu.runtime import SIMULATED, compute_capability
from minitorch.kernels.philox import attention_dropout_mask
from tests import references
from tests.cuda.test_flash_attention_cuda import on_gpu, random
from tests.cuda.test_hopper_forward import BACKEND, PAIRS, calls, on_hopper

# Of the largest gradient. A 16-bit product of 16-bit factors is right to a few of its last places.
TOLERANCE = {"float16": 5e-3, "bfloat16": 4e-2}
attention: Any = references.attention


def gradients(
    monkeypatch: pytest.MonkeyPatch, tensors: Any, mask: Any, with_lse: bool, **arguments: Any
) -> tuple[list[Any], Any, Any, AttentionProblem]:
    """dQ, dK, dV and dmask of the Hopper kernels, and the gradients that they began with.

    Output and logsumexp are those of the SIMT kernels.
    """
    monkeypatch.setattr(launcher, "compute_capability", lambda: (9, 0))
    q, k, v = (t.shape for t in tensors)
    problem = AttentionProblem.of(q, k, v, tensors[0].dtype, attn_mask=mask, **arguments)
    ops: Any = BACKEND.ops
    on_device = ops.attention_mask(mask)
    monkeypatch.setattr(launcher, "FLASH_ATTENTION", (simt,))
    out, _, rows = ops.flash_attention_forward(*tensors, on_device, problem)
    do = on_gpu(random(*problem.out_shape, seed=8), problem.dtype.name)
    dl = on_gpu(random(*problem.logsumexp_shape, seed=9)) if with_lse else None
    monkeypatch.setattr(launcher, "FLASH_ATTENTION", (hopper,))
    wants_dmask = mask is not None and mask.dtype != bool
    got = ops.flash_attention_backward(
        do, dl, *tensors, on_device, out, rows, problem, wants_dmask
    )  # fmt: skip
    return [g for g in got if g is not None], do, dl, problem


def check(
    monkeypatch: pytest.MonkeyPatch,
    shapes: Any,
    dtype: str = "float16",
    layouts: Any = ("plain",) * 3,
    mask: Any = None,
    factor: float = 1.0,
    with_lse: bool = False,
    **arguments: Any,
) -> None:
    """The gradients are those of attention in float64, of the same rounded inputs."""
    tensors = [
        on_gpu(factor * random(*shape, seed=n), dtype, layout)
        for n, (shape, layout) in enumerate(zip(shapes, layouts, strict=True))
    ]
    found, do, dl, problem = gradients(monkeypatch, tensors, mask, with_lse, **arguments)
    p, kept, seed = arguments.get("dropout_p", 0.0), None, arguments.pop("seed", 0)
    if p:
        lengths = problem.seqlen_q, problem.seqlen_k
        kept = attention_dropout_mask(problem.batch_heads, *lengths, p, seed)
    inputs = [None if t is None else t.to_numpy().astype(np.float64) for t in (*tensors, do, dl)]
    want = attention(*inputs, attn_mask=mask, kept=kept, **arguments)
    wanted = (want.grad_query, want.grad_key, want.grad_value, want.grad_mask)
    for got, right in zip(found, wanted, strict=False):
        atol = TOLERANCE[dtype] * max(1.0, np.abs(right).max(initial=0))
        np.testing.assert_allclose(got.to_numpy().astype(np.float64), right, rtol=0, atol=atol)


# ----- small calls, which the simulator runs as well -----

SMALL: dict[str, dict[str, Any]] = {
    "two tiles of keys": {"shapes": [(1, 1, 10, 64), (1, 1, 70, 64), (1, 1, 70, 64)]},
    "two warpgroups": {"shapes": [(1, 1, 70, 64), (1, 1, 80, 64), (1, 1, 80, 64)]},
    "two tiles of queries": {"shapes": [(1, 1, 70, 64), (1, 1, 20, 64), (1, 1, 20, 64)]},
    "causal, logsumexp": {
        "shapes": [(1, 1, 50, 64), (1, 1, 40, 64), (1, 1, 40, 64)],
        "is_causal": "bottom-right",
        "with_lse": True,
    },
    "heads share keys": {
        "shapes": [(1, 2, 20, 64), (1, 1, 20, 64), (1, 1, 20, 64)],
        "enable_gqa": True,
    },
    "keys of one batch for two": {"shapes": [(2, 2, 10, 64), (10, 64), (1, 2, 10, 64)]},
    "queries of one batch for two": {"shapes": [(1, 1, 10, 64), (2, 1, 10, 64), (2, 1, 10, 64)]},
    "two head sizes": {"shapes": [(1, 1, 20, 59), (1, 1, 20, 59), (1, 1, 20, 96)]},
    "dropout": {
        "shapes": [(1, 1, 20, 64), (1, 1, 20, 64), (1, 1, 20, 64)],
        "dropout_p": 0.25,
        "dtype": "bfloat16",
    },
    "bool mask": {
        "shapes": [(1, 1, 20, 64), (1, 1, 30, 64), (1, 1, 30, 64)],
        "mask": random(1, 1, 20, 30) > 0,
    },
    "additive mask": {
        "shapes": [(1, 1, 20, 64), (1, 1, 30, 64), (1, 1, 30, 64)],
        "mask": random(20, 30).astype(np.float32),
    },
    "no queries, columns before rows": {
        "shapes": [(1, 1, 0, 64), (1, 1, 20, 64), (1, 1, 20, 64)],
        "layouts": ["transposed"] * 3,
    },
    "no keys, columns before rows": {
        "shapes": [(1, 1, 20, 64), (1, 1, 0, 64), (1, 1, 0, 64)],
        "layouts": ["transposed"] * 3,
    },
    "large heads": {"shapes": [(1, 1, 10, 256), (1, 1, 10, 256), (1, 1, 10, 256)]},
}


@pytest.mark.parametrize("name", SMALL)
def test_small_calls(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    if SIMULATED:
        find, own = hopper_backward.backward_blocks, 128 if name == "two warpgroups" else 64
        monkeypatch.setattr(
            hopper_backward,
            "backward_blocks",
            lambda *kind: tuple(replace(b, own=own, passing=16) for b in find(*kind)),
        )
    elif compute_capability() != (9, 0):
        pytest.skip("needs compute capability 9.0")
    check(monkeypatch, **SMALL[name])


# ----- on the GPU -----


@on_hopper
@pytest.mark.parametrize("size", [8, 32, 40, 59, 64, 72, 96, 111, 128, 160, 192, 224, 256])
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("is_causal", [False, True])
def test_head_sizes(
    monkeypatch: pytest.MonkeyPatch, size: int, dtype: str, is_causal: bool
) -> None:
    shapes = [(1, 2, 150, size), (1, 2, 201, size), (1, 2, 201, size)]
    check(monkeypatch, shapes, dtype, is_causal=is_causal)


@on_hopper
@pytest.mark.parametrize(("nq", "nk"), [*PAIRS, *((b, a) for a, b in PAIRS)])
@pytest.mark.parametrize("is_causal", ["top-left", "bottom-right"])
@pytest.mark.parametrize("size", [64, 128])
def test_causal(
    monkeypatch: pytest.MonkeyPatch, nq: int, nk: int, is_causal: str, size: int
) -> None:
    shapes = [(2, 3, nq, size), (2, 3, nk, size), (2, 3, nk, size)]
    check(monkeypatch, shapes, "bfloat16", is_causal=is_causal, with_lse=True)


@on_hopper
@pytest.mark.parametrize("window", [(64, 10), (0, 0), (None, 100), (300, None)])
@pytest.mark.parametrize("is_causal", [False, True, "bottom-right"])
def test_windows(monkeypatch: pytest.MonkeyPatch, window: Any, is_causal: Any) -> None:
    shapes = [(1, 2, 1300, 64), (1, 2, 1500, 64), (1, 2, 1500, 64)]
    check(monkeypatch, shapes, window=window, is_causal=is_causal)


@on_hopper
@settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(call=calls())
def test_any_call(monkeypatch: pytest.MonkeyPatch, call: Any) -> None:
    check(monkeypatch, **call)


@on_hopper
def test_rows_that_see_no_key(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gradients of 0: also beside rows that see some."""
    allowed = random(300, 200) > 0
    allowed[[0, 5, 64, 299]] = False
    check(monkeypatch, [(300, 64), (200, 64), (200, 64)], mask=allowed)
    check(monkeypatch, [(700, 64), (200, 64), (200, 64)], is_causal="bottom-right")


@on_hopper
@pytest.mark.parametrize("lengths", [(0, 5), (5, 0), (0, 0), (1, 1)])
def test_short_sequences(monkeypatch: pytest.MonkeyPatch, lengths: Any) -> None:
    nq, nk = lengths
    check(monkeypatch, [(2, nq, 64), (2, nk, 64), (2, nk, 64)])


@on_hopper
@pytest.mark.parametrize("size", [64, 96, 128])
def test_nothing_outside_is_read(monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    """Rows before, between and after heads are NaN."""
    wide = np.full((2, 3, 300, 256), np.nan)
    wide[:, :, 20:220, 64 : 64 + size] = random(2, 3, 200, size)
    tensors = [on_gpu(wide, "float16")[:, :, 20:220, 64 : 64 + size].detach() for _ in range(3)]
    found, do, _, _ = gradients(monkeypatch, tensors, None, False, is_causal=True)
    inputs = [t.to_numpy().astype(np.float64) for t in (*tensors, do)]
    want = attention(*inputs, is_causal=True)
    for got, right in zip(found, (want.grad_query, want.grad_key, want.grad_value), strict=True):
        np.testing.assert_allclose(got.to_numpy().astype(np.float64), right, rtol=0, atol=2e-2)


@on_hopper
@pytest.mark.parametrize("size", [64, 128, 256])
def test_equal_bits(monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    """Which block takes which tile differs from run to run; no bit of a gradient does."""
    tensors = [on_gpu(random(2, 4, 600, size, seed=n), "float16") for n in range(3)]

    def run() -> list[bytes]:
        found, *_ = gradients(monkeypatch, tensors, None, False, is_causal=True)
        return [g.to_numpy().tobytes() for g in found]

    first = run()
    assert all(run() == first for _ in range(60))


# ----- the choice of tiles -----


@pytest.mark.parametrize("mask", ["none", "bool", "float32"])
@pytest.mark.parametrize("dropout", [False, True])
@pytest.mark.parametrize("size", [64, 96, 128, 192, 256])
def test_tiles_fit_in_shared_memory(size: int, dropout: bool, mask: str) -> None:
    kind = Kind("float16", size, size, mask, dropout)
    for blocks in hopper_backward.backward_blocks(kind):
        assert memory_plan(kind, blocks).size <= 227 * 1024
        assert blocks.own % 64 == 0 and blocks.passing % 16 == 0
