"""Flash-Decoding against attention in float64: few queries, many keys, in one split or several."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from minitorch import TensorBackend
from minitorch.cuda import attention as cuda_attention
from minitorch.cuda_kernel_ops import CudaKernelOps
from minitorch.kernels.flash_attention.decode import launch as decode
from minitorch.kernels.flash_attention.decode.forward import MOST_SPLITS
from minitorch.kernels.flash_attention.launch import (
    heads_of,
)
from minitorch.kernels.flash_attention.problem import AttentionProblem
from minitorch.kernels.gpu.runtime import SIMULATED, compute_capability
from tests import references
from tests.cuda.test_flash_attention_cuda import TOLERANCE, on_gpu, problem_of, random

BACKEND = TensorBackend(CudaKernelOps)
KEYS = 40 if SIMULATED else 1500
attention: Any = references.attention
COLUMNS = (1, 4, 7) if SIMULATED else (1, 59, 64, 96, 128, 256)


def described(shapes: Any, **arguments: Any) -> AttentionProblem:
    q, k, v = shapes
    return AttentionProblem.of(q, k, v, "float32", enable_gqa=True, **arguments)


@st.composite
def calls(draw: Any) -> dict[str, Any]:
    """Up to eight queries, shared heads of keys, masks, windows, layouts; no dropout."""
    dtype = draw(st.sampled_from(sorted(TOLERANCE)))
    nq, nk = draw(st.integers(1, decode.MOST_QUERIES)), draw(st.integers(0, KEYS))
    batch, kv_heads, group = (draw(st.integers(1, 2)) for _ in range(3))
    d, dv = draw(st.sampled_from(COLUMNS)), draw(st.sampled_from(COLUMNS))
    heads = kv_heads * group
    layouts = st.sampled_from(["plain", "heads", "transposed", "part"])
    call: dict[str, Any] = {
        "shapes": [(batch, heads, nq, d), (batch, kv_heads, nk, d), (batch, kv_heads, nk, dv)],
        "dtype": dtype,
        "layouts": [draw(layouts) for _ in range(3)],
        "enable_gqa": True,
        "is_causal": draw(st.sampled_from([False, True, "bottom-right"])),
        "window": draw(st.none() | st.tuples(st.integers(-1, 12), st.integers(-1, 12))),
        "scale": draw(st.none() | st.sampled_from([0.0, -0.3])),
    }
    kind = draw(st.sampled_from(["none", "bool", "additive"]))
    if kind != "none":
        scores = (batch, heads, nq, nk)
        shape = tuple(n if draw(st.booleans()) else 1 for n in scores)
        bias = random(*shape, seed=draw(st.integers(0, 99)))
        real = np.float64 if dtype == "float64" else np.float32
        additive = np.where(bias < -1, -np.inf, bias).astype(real)
        call["mask"] = bias > -0.5 if kind == "bool" else additive
    return call


def check(
    shapes: Any, dtype: str = "float32", layouts: Any = ("plain",) * 3, mask: Any = None,
    **arguments: Any,
) -> None:  # fmt: skip
    """The forward pass is that of `decode`, and its results those of attention in float64."""
    tensors = [
        on_gpu(random(*shape, seed=n), dtype, layout)
        for n, (shape, layout) in enumerate(zip(shapes, layouts, strict=True))
    ]
    problem = problem_of(tensors, attn_mask=mask, **arguments)
    assert cuda_attention.choose(problem, compute_capability()).module is decode
    ops: Any = BACKEND.ops
    ours = ops.flash_attention_forward(*tensors, ops.attention_mask(mask), problem)[:2]
    q, k, v = (t.to_numpy().astype(np.float64) for t in tensors)
    exact = mask if mask is None or mask.dtype == bool else mask.astype(np.float64)
    wanted: Any = attention(q, k, v, attn_mask=exact, **arguments)
    for got, want in zip(ours, (wanted.out, wanted.logsumexp), strict=True):
        scale = max(1.0, np.abs(want[np.isfinite(want)]).max(initial=0))
        np.testing.assert_allclose(
            got.to_numpy().astype(np.float64), want, rtol=0, atol=TOLERANCE[dtype] * scale
        )


@settings(
    max_examples=10 if SIMULATED else 30,
    deadline=None,
    derandomize=True,
    suppress_health_check=list(HealthCheck),
)
@given(call=calls())
def test_any_call(call: Any) -> None:
    check(**call)


def test_gradients_are_those_of_another_kernel() -> None:
    """From the output and the logsumexp of `decode`."""
    arrays = [random(1, 2, n, 8, seed=n) for n in (3, 40, 40)]
    tensors = [on_gpu(a) for a in arrays]
    for t in tensors:
        t.requires_grad_(True)
    tensors[0].flash_attention(*tensors[1:], is_causal="bottom-right").sum().backward()
    ones, zeros = np.ones((1, 2, 3, 8)), np.zeros((1, 2, 3))
    want: Any = attention(*arrays, ones, zeros, is_causal="bottom-right")
    for t, gradient in zip(tensors, (want.grad_query, want.grad_key, want.grad_value), strict=True):
        assert t.grad is not None
        np.testing.assert_allclose(t.grad.to_numpy(), gradient, atol=1e-5)


def test_splits_and_rows_of_several_blocks() -> None:
    """Five heads of queries to one of keys: two blocks of rows, several splits, a ragged end."""
    keys = 4 * decode.KEYS_OF_A_SPLIT + 5
    shapes = [(1, 5, 1, 8), (1, 1, keys, 8), (1, 1, keys, 8)]
    problem = described(shapes)
    assert decode.cuts_of(problem, heads_of(problem)).splits > 1
    check(shapes, enable_gqa=True)
    check(shapes, "float64", enable_gqa=True, window=(None, keys // 2))


def test_splits_that_a_row_sees_nothing_of() -> None:
    """A mask may hide all keys of a split, or of a row: output 0, logsumexp -inf."""
    keys = 3 * decode.KEYS_OF_A_SPLIT
    allowed = np.ones((3, keys), bool)
    allowed[0, : 2 * decode.KEYS_OF_A_SPLIT] = False
    allowed[1] = False
    check([(3, 8), (keys, 8), (keys, 8)], mask=allowed)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_what_is_not_seen_is_not_read(dtype: str) -> None:
    """NaN in the cache before the window, and beyond its end."""
    used, room = (11, 16) if SIMULATED else (700, 1024)
    begin = used // 2
    q = on_gpu(random(1, 2, 1, 8), dtype)
    caches = [random(1, 2, room, 8, seed=n) for n in (1, 2)]
    for cache in caches:
        cache[:, :, used:] = np.nan
        cache[:, :, :begin] = np.nan
    k, v = (on_gpu(cache, dtype)[:, :, :used].detach() for cache in caches)
    window = (used - 1 - begin, None)
    tensors = (q, k, v)
    problem = problem_of(tensors, is_causal="bottom-right", window=window)
    ops: Any = BACKEND.ops
    out, *_ = ops.flash_attention_forward(*tensors, None, problem)
    seen = [on_gpu(cache[:, :, begin:used], dtype) for cache in caches]
    alone = problem_of((q, *seen))
    want, *_ = ops.flash_attention_forward(q, *seen, None, alone)
    np.testing.assert_allclose(
        out.to_numpy().astype(float), want.to_numpy().astype(float), atol=TOLERANCE[dtype]
    )


def test_the_number_of_splits() -> None:
    """Enough for a large GPU from one head on, but none that is short; one for many heads."""

    def cuts(heads: int, keys: int, **arguments: Any) -> decode.Cuts:
        problem = described([(1, heads, 1, 64), *[(1, heads, keys, 64)] * 2], **arguments)
        return decode.cuts_of(problem, heads_of(problem))

    least = decode.KEYS_OF_A_SPLIT
    assert cuts(1, least - 1).splits == 1
    assert cuts(1, 1 << 17).splits == MOST_SPLITS
    assert cuts(decode.BLOCKS, 1 << 17).splits == 1
    assert cuts(1, 0) == decode.Cuts(0, 0, 0, 1)
    for keys in (least * 3 + 1, least * 7, 1 << 16):
        found = cuts(4, keys)
        assert found.split_keys * (found.splits - 1) < keys <= found.split_keys * found.splits
    window = cuts(1, 1 << 16, is_causal="bottom-right", window=(99, 0))
    assert (window.begin, window.end) == ((1 << 16) - 100, 1 << 16)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_250_runs_give_the_same_bits(dtype: str) -> None:
    tensors = [on_gpu(random(2, 4, n, 128, seed=n), dtype) for n in (1, 4097, 4097)]
    problem = problem_of(tensors)
    ops: Any = BACKEND.ops
    results = set()
    for _ in range(250):
        out, logsumexp, _ = ops.flash_attention_forward(*tensors, None, problem)
        results.add(out.to_numpy().tobytes() + logsumexp.to_numpy().tobytes())
    assert len(results) == 1
