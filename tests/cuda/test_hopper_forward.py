"""FlashAttention's forward pass on Hopper GPUs: each feature, against attention in float64.

What it does with a tile of scores in registers runs in the simulator too.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from minitorch import TensorBackend
from minitorch.cuda import attention as cuda_attention
from minitorch.cuda.device_array import DeviceArray
from minitorch.cuda_kernel_ops import CudaKernelOps
from minitorch.kernels.flash_attention.fragments.dropout import (
    drop,
    drop_by_bits,
    dropout_words,
    keep_bits_of_keys,
)
from minitorch.kernels.flash_attention.hopper import launch as hopper
from minitorch.kernels.flash_attention.hopper.tiles import Blocks, own_place
from minitorch.kernels.flash_attention.problem import AttentionProblem
from minitorch.kernels.gpu.register_tile import RegisterTile
from minitorch.kernels.gpu.runtime import SIMULATED, compute_capability, is_available, launch, types
from minitorch.kernels.gpu.runtime import kernel as kernel_of
from minitorch.kernels.philox import attention_dropout_mask, dropout_threshold
from tests import references
from tests.cuda.test_flash_attention_cuda import on_gpu, random

BACKEND = TensorBackend(CudaKernelOps)
TOLERANCE = {"float16": 3e-3, "bfloat16": 2e-2}
attention: Any = references.attention

hopper_only = pytest.mark.skipif(
    not is_available() or compute_capability() != (9, 0), reason="needs compute capability 9.0"
)


# ----- a tile of scores in registers -----

WARPGROUP = 128


def dropped(columns: int, keys_are_rows: bool) -> Any:
    """Kernel: 1 where a weight of the tile at (row0, column0) is kept, else 0, as (64, columns)."""
    tile = RegisterTile(columns)
    drop_some, bits_of, drop_by = drop(tile), keep_bits_of_keys(tile), drop_by_bits(tile)
    ones = tile.each(lambda x: x + 1.0, tile.type)
    zero, count = tile.zero, tile.registers

    @kernel_of(WARPGROUP)
    def make(out, row0, column0, batch_head, seed, threshold):  # type: ignore[no-untyped-def]
        own_row, own_column = own_place()
        row, column = types.uint32(row0 + own_row), types.uint32(column0 + own_column)
        words = dropout_words(seed, batch_head, threshold)
        if keys_are_rows:
            kept = drop_by(ones(zero()), bits_of(column, row, words))
        else:
            kept = drop_some(ones(zero()), row, column, words)
        for n in range(count):
            j, r, c = n // 4, n // 2 % 2, n % 2
            out[(own_row + 8 * r) * columns + own_column + 8 * j + c] = kept[n]

    return make


@pytest.mark.parametrize("keys_are_rows", [False, True])
@pytest.mark.parametrize("columns", [64, 80, 128])
def test_dropout_of_a_tile_is_that_of_every_implementation(
    columns: int, keys_are_rows: bool
) -> None:
    row0, column0, p, seed = 64, columns, 0.3, 2**63 + 12345
    out = DeviceArray.empty(64 * columns, np.float32)
    launch(dropped(columns, keys_are_rows), 1, WARPGROUP, out.array, row0, column0, 2,
           np.uint64(seed), dropout_threshold(p))  # fmt: skip
    lengths = (row0 + 64, column0 + columns)
    if keys_are_rows:
        whole = attention_dropout_mask(3, *lengths[::-1], p, seed).transpose(0, 2, 1)
    else:
        whole = attention_dropout_mask(3, *lengths, p, seed)
    got = out.copy_to_host().reshape(64, columns)
    np.testing.assert_array_equal(got != 0, whole[2, row0:, column0:])


# ----- the kernel -----


def forward(
    monkeypatch: pytest.MonkeyPatch, tensors: Any, mask: Any = None, **arguments: Any
) -> tuple[Any, Any, AttentionProblem]:
    """Output and logsumexp of the Hopper kernel alone."""
    monkeypatch.setattr(cuda_attention, "FLASH_ATTENTION", (hopper,))
    q, k, v = (t.shape for t in tensors)
    problem = AttentionProblem.of(q, k, v, tensors[0].dtype, attn_mask=mask, **arguments)
    ops: Any = BACKEND.ops
    out, lse, _ = ops.flash_attention_forward(*tensors, ops.attention_mask(mask), problem)
    return out.to_numpy().astype(np.float64), lse.to_numpy().astype(np.float64), problem


def check(
    monkeypatch: pytest.MonkeyPatch,
    shapes: Any,
    dtype: str = "float16",
    layouts: Any = ("plain",) * 3,
    mask: Any = None,
    factor: float = 1.0,
    **arguments: Any,
) -> None:
    """Output and logsumexp are those of attention in float64, of the same rounded inputs."""
    tensors = [
        on_gpu(factor * random(*shape, seed=n), dtype, layout)
        for n, (shape, layout) in enumerate(zip(shapes, layouts, strict=True))
    ]
    out, lse, problem = forward(monkeypatch, tensors, mask, **arguments)
    p, kept, seed = arguments.get("dropout_p", 0.0), None, arguments.pop("seed", 0)
    if p:
        lengths = problem.seqlen_q, problem.seqlen_k
        kept = attention_dropout_mask(problem.batch_heads, *lengths, p, seed)
    inputs = [t.to_numpy().astype(np.float64) for t in tensors]
    want = attention(*inputs, attn_mask=mask, kept=kept, **arguments)
    atol = TOLERANCE[dtype] * max(1.0, np.abs(want.out).max(initial=0))
    np.testing.assert_allclose(out, want.out, rtol=0, atol=atol)
    np.testing.assert_allclose(lse, want.logsumexp, rtol=1e-5, atol=2e-4)


def on_hopper(test: Any) -> Any:
    """Decorator: the test needs such a GPU."""
    return pytest.mark.gpu(hopper_only(test))


# ----- small calls, in the simulator too -----

SMALL: dict[str, Any] = {
    "plain": {"shapes": [(1, 1, 70, 64)] * 3},
    "causal": {"shapes": [(1, 1, 135, 64), (1, 1, 150, 64), (1, 1, 150, 64)], "is_causal": True},
    "shared keys, ragged": {
        "shapes": [(1, 2, 9, 59), (1, 1, 90, 59), (1, 1, 90, 40)], "enable_gqa": True,
        "dtype": "bfloat16",
    },
    "window, long rows": {
        "shapes": [(1, 1, 30, 160), (1, 1, 100, 160), (1, 1, 100, 160)], "window": (20, 10),
    },
    "dropout": {
        "shapes": [(1, 1, 20, 64), (1, 1, 70, 64), (1, 1, 70, 64)], "dropout_p": 0.3, "seed": 7,
    },
    "mask": {
        "shapes": [(1, 1, 20, 64), (1, 1, 70, 64), (1, 1, 70, 64)],
        "mask": random(20, 70).astype(np.float16),
    },
    "window": {
        "shapes": [(1, 1, 70, 64), (1, 1, 150, 64), (1, 1, 150, 64)], "window": (40, 10),
    },
    "no key": {"shapes": [(1, 1, 70, 64), (1, 1, 0, 64), (1, 1, 0, 64)]},
}  # fmt: skip


@pytest.mark.parametrize("name", SMALL)
def test_small_calls(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """The simulator's blocks have two warpgroups that compute, and tiles of 64 keys."""
    if SIMULATED:
        monkeypatch.setattr(cuda_attention, "compute_capability", lambda: (9, 0))
        monkeypatch.setattr(hopper, "forward_blocks", lambda *_: Blocks(2, 64))
        hopper._planned.cache_clear()
    elif compute_capability() != (9, 0):
        pytest.skip("needs compute capability 9.0")
    check(monkeypatch, **SMALL[name])


# ----- on the GPU -----


@on_hopper
@pytest.mark.parametrize("size", [8, 32, 40, 59, 64, 72, 96, 111, 128, 160, 192, 224, 256])
@pytest.mark.parametrize(("dtype", "is_causal"), [("float16", False), ("bfloat16", True)])
def test_head_sizes(
    monkeypatch: pytest.MonkeyPatch, size: int, dtype: str, is_causal: bool
) -> None:
    shapes = [(1, 2, 150, size), (1, 2, 201, size), (1, 2, 201, size)]
    check(monkeypatch, shapes, dtype, is_causal=is_causal)


@on_hopper
@pytest.mark.parametrize(("size", "value_size"), [(192, 128), (128, 100)])
def test_values_of_another_size(
    monkeypatch: pytest.MonkeyPatch, size: int, value_size: int
) -> None:
    check(monkeypatch, [(1, 2, 150, size), (1, 2, 201, size), (1, 2, 201, value_size)])


PAIRS = [
    (1, 239), (3, 799), (127, 512), (127, 513), (113, 203), (128, 217), (113, 211), (108, 256),
    (256, 512), (1023, 1024), (97, 97), (1025, 1025),
]  # fmt: skip


@on_hopper
@pytest.mark.parametrize(("nq", "nk"), [*PAIRS, *((b, a) for a, b in PAIRS)])
@pytest.mark.parametrize("is_causal", ["top-left", "bottom-right"])
@pytest.mark.parametrize("size", [64, 128])
def test_causal(
    monkeypatch: pytest.MonkeyPatch, nq: int, nk: int, is_causal: str, size: int
) -> None:
    """With 1,300 queries three warpgroups share a tile of head size 64."""
    shapes = [(2, 3, nq, size), (2, 3, nk, size), (2, 3, nk, size)]
    check(monkeypatch, shapes, "bfloat16", is_causal=is_causal)


@on_hopper
@pytest.mark.parametrize("window", [(64, 10), (0, 0), (None, 100), (300, None)])
@pytest.mark.parametrize("is_causal", [False, True, "bottom-right"])
def test_windows(monkeypatch: pytest.MonkeyPatch, window: Any, is_causal: Any) -> None:
    shapes = [(1, 2, 1300, 64), (1, 2, 1500, 64), (1, 2, 1500, 64)]
    check(monkeypatch, shapes, window=window, is_causal=is_causal)


@st.composite
def calls(draw: Any) -> dict[str, Any]:
    """Shapes with broadcasting, layouts, masks, every flag."""
    call: dict[str, Any] = {"dtype": "float16"}
    nq, nk = draw(st.integers(0, 400)), draw(st.integers(0, 400))
    d, dv = draw(st.sampled_from([16, 64])), draw(st.sampled_from([16, 64]))
    kv_heads, group, batch = (draw(st.integers(1, 2)) for _ in range(3))
    if draw(st.booleans()):
        call["enable_gqa"] = True
        leading = [(batch, kv_heads * group), (batch, kv_heads), (batch, kv_heads)]
    else:
        leading = [(batch, 3), *(draw(st.sampled_from([(batch, 3), (1, 3), (3,), ()])),) * 2]
    call["shapes"] = [
        (*lead, n, columns)
        for lead, n, columns in zip(leading, (nq, nk, nk), (d, d, dv), strict=True)
    ]
    call["layouts"] = [draw(st.sampled_from(["plain", "heads", "transposed"])) for _ in range(3)]
    kind = draw(st.sampled_from(["none", "none", "bool", "float32"]))
    scores = (*leading[0], nq, nk)
    if kind != "none":
        shape = tuple(n if draw(st.booleans()) else 1 for n in scores)
        bias = random(*shape, seed=draw(st.integers(0, 99)))
        additive = np.where(bias < -1, -np.inf, bias).astype(np.float32)
        call["mask"] = bias > -0.5 if kind == "bool" else additive.astype(kind)
    call["is_causal"] = draw(st.sampled_from([False, True, "bottom-right"]))
    side = st.none() | st.integers(-1, 200)
    call["window"] = draw(st.none() | st.tuples(side, side))
    call["scale"] = draw(st.none() | st.sampled_from([0.0, -0.3, 1.0]))
    if draw(st.booleans()):
        call["dropout_p"] = draw(st.sampled_from([0.2, 0.5, 1.0]))
        call["seed"] = draw(st.integers(0, 2**64 - 1))
    return call


@on_hopper
@settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(call=calls())
def test_any_call(monkeypatch: pytest.MonkeyPatch, call: Any) -> None:
    check(monkeypatch, **call)


@on_hopper
def test_rows_that_see_no_key(monkeypatch: pytest.MonkeyPatch) -> None:
    """Output 0, logsumexp -inf: also beside rows that see some."""
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
@pytest.mark.parametrize("size", [64, 128])
def test_huge_scores(monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    """Of which a row's largest takes all the weight; exp would overflow."""
    check(monkeypatch, [(1, 2, 300, size)] * 3, factor=100.0)


@on_hopper
@pytest.mark.parametrize("size", [64, 96, 128])
def test_nothing_outside_is_read(monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    """What lies before, between and after the heads' rows is NaN."""
    wide = np.full((2, 3, 300, 256), np.nan)
    wide[:, :, 20:220, 64 : 64 + size] = random(2, 3, 200, size)
    tensors = [on_gpu(wide, "float16")[:, :, 20:220, 64 : 64 + size].detach() for _ in range(3)]
    out, lse, _ = forward(monkeypatch, tensors, is_causal=True)
    want = attention(*(t.to_numpy().astype(np.float64) for t in tensors), is_causal=True)
    np.testing.assert_allclose(out, want.out, rtol=0, atol=3e-3)
    np.testing.assert_allclose(lse, want.logsumexp, rtol=1e-5, atol=2e-4)


@on_hopper
@pytest.mark.parametrize("number", range(4))
@pytest.mark.parametrize("size", [64, 128, 256])
def test_every_tile_that_can_be_chosen(
    monkeypatch: pytest.MonkeyPatch, number: int, size: int
) -> None:
    candidates = hopper.CANDIDATES["forward"][size]
    if number >= len(candidates):
        pytest.skip("there are fewer")
    chosen = hopper.blocks_of(candidates[number])
    monkeypatch.setattr(hopper, "forward_blocks", lambda *_: chosen)
    hopper._planned.cache_clear()
    check(monkeypatch, [(1, 2, 500, size)] * 3, is_causal=True)


@on_hopper
@pytest.mark.parametrize("size", [64, 128])
@pytest.mark.parametrize("dropout_p", [0.0, 0.17])
def test_250_runs_give_the_same_bits(
    monkeypatch: pytest.MonkeyPatch, size: int, dropout_p: float
) -> None:
    tensors = [on_gpu(random(12, 4, 700, size, seed=n), "float16") for n in range(3)]
    first = None
    for _ in range(250):
        found = forward(monkeypatch, tensors, is_causal=True, dropout_p=dropout_p, seed=3)[:2]
        first = first or found
        for a, b in zip(first, found, strict=True):
            assert a.tobytes() == b.tobytes()


@on_hopper
@pytest.mark.parametrize("size", [64, 96, 128, 192, 256])
@pytest.mark.parametrize(("dtype", "is_causal"), [("float16", False), ("bfloat16", True)])
def test_error_within_twice_standard_attentions(
    monkeypatch: pytest.MonkeyPatch, dtype: str, size: int, is_causal: bool
) -> None:
    """Dao's criterion, for the output."""
    torch = pytest.importorskip("torch")
    tensors = [on_gpu(random(2, 3, 1024, size, seed=n), dtype) for n in range(3)]
    out, _, _ = forward(monkeypatch, tensors, is_causal=is_causal)
    exact = [t.to_numpy().astype(np.float64) for t in tensors]
    want = attention(*exact, is_causal=is_causal).out
    q, k, v = (torch.tensor(x, dtype=getattr(torch, dtype), device="cuda") for x in exact)
    scores = (q / size**0.5) @ k.mT
    if is_causal:
        scores = scores.masked_fill(torch.ones_like(scores).triu(1).bool(), -float("inf"))
    theirs = (torch.softmax(scores, -1) @ v).double().cpu().numpy()
    assert np.abs(out - want).max() <= 2 * np.abs(theirs - want).max() + 1e-6
