"""The CPU's FlashAttention kernels against standard attention in float64, and their promises."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from typing import Any

import numba
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minitorch.kernels.flash_attention.cpu import (
    backward as cpu_backward,
)
from minitorch.kernels.flash_attention.cpu import (
    forward as cpu_forward,
)
from minitorch.kernels.flash_attention.cpu import (
    launch as cpu,
)
from minitorch.kernels.flash_attention.cpu.launch import TileSizes
from minitorch.kernels.flash_attention.problem import AttentionProblem
from minitorch.kernels.flash_attention.standard import (
    standard_attention,
    standard_attention_backward,
)
from minitorch.kernels.philox import attention_dropout_mask
from tests import references

TOLERANCE = {np.float32: 3e-5, np.float64: 1e-12}
SMALL_TILES = TileSizes(32, 32, 32, 32)


def random(*shape: int, dtype: Any = np.float32, seed: int = 0) -> Any:
    return np.random.default_rng((seed, *shape)).standard_normal(shape).astype(dtype)


def problem_of(q: Any, k: Any, v: Any, **arguments: Any) -> AttentionProblem:
    return AttentionProblem.of(q.shape, k.shape, v.shape, q.dtype, **arguments)


def run(
    q: Any, k: Any, v: Any, do: Any = None, dl: Any = None, *, tiles: Any = None, **arguments: Any
) -> Any:
    """(out, logsumexp, dq, dk, dv, dmask) of the kernels; of small tiles unless told."""
    tiles = tiles or SMALL_TILES
    mask = arguments.get("attn_mask")
    problem = problem_of(q, k, v, **arguments)
    out, lse, rows, _ = cpu.forward_with_count(problem, q, k, v, mask, tiles)
    do = random(*out.shape, dtype=q.dtype, seed=7) if do is None else do
    wants_mask = mask is not None and mask.dtype != bool
    gradients = cpu.backward(problem, q, k, v, mask, out, rows, do, dl, wants_mask, tiles)
    return out, lse, *gradients


def check(q: Any, k: Any, v: Any, dl: bool = True, tiles: Any = None, **arguments: Any) -> None:
    """Outputs and gradients are those of standard attention."""
    problem = problem_of(q, k, v, **arguments)
    do = random(*problem.out_shape, dtype=q.dtype, seed=1)
    grad_lse = random(*problem.logsumexp_shape, dtype=q.dtype, seed=2) if dl else None
    ours = run(q, k, v, do, grad_lse, tiles=tiles, **arguments)
    p, seed = arguments.get("dropout_p", 0.0), arguments.pop("seed", 0)
    kept = None
    if p:
        kept = attention_dropout_mask(
            problem.batch_heads, problem.seqlen_q, problem.seqlen_k, p, seed
        )
    reference = references.attention(q, k, v, do, grad_lse, kept=kept, **arguments)
    wanted: tuple[Any, ...] = (
        reference.out, reference.logsumexp, reference.grad_query, reference.grad_key,
        reference.grad_value, reference.grad_mask,
    )  # fmt: skip
    for name, got, want in zip(
        ("out", "lse", "dq", "dk", "dv", "dmask"), ours, wanted, strict=True
    ):
        if got is None:
            continue
        assert got.dtype == q.dtype and got.shape == want.shape, name
        atol = tolerance(got, want, problem if name == "dmask" else None)
        np.testing.assert_allclose(got, want, rtol=0, atol=atol, err_msg=name)


def tolerance(got: Any, want: Any, summed: AttentionProblem | None = None) -> float:
    """Of a result; of a mask's gradient, a sum of scores' gradients, those of a problem."""
    scale = max(1.0, np.abs(want[np.isfinite(want)]).max(initial=0))
    terms = 1.0
    if summed is not None:  # of whose terms the rounding errors add up
        terms = summed.batch_heads * summed.seqlen_q * summed.seqlen_k / max(want.size, 1)
    return float(TOLERANCE[got.dtype.type] * scale * max(1.0, np.sqrt(terms) / 8))


# --------------------------------------------------------------------------- every argument


@st.composite
def strided(draw: Any, shape: tuple[int, ...], dtype: Any) -> Any:
    """An array of this shape that lies in memory in one of several ways."""
    seed = draw(st.integers(0, 2**16))
    layout = draw(
        st.sampled_from(["plain", "transposed", "sliced", "reversed", "expanded", "read-only"])
    )
    if layout == "transposed":
        return np.moveaxis(
            random(*shape[::-1], dtype=dtype, seed=seed), range(len(shape)), range(len(shape))[::-1]
        )
    if layout == "sliced":
        padded = random(*[2 * n + 1 for n in shape], dtype=dtype, seed=seed)
        return padded[tuple(slice(1, 2 * n + 1, 2) for n in shape)]
    if layout == "reversed":
        return random(*shape, dtype=dtype, seed=seed)[(slice(None, None, -1),) * len(shape)]
    if layout == "expanded" and shape:
        return np.broadcast_to(random(1, *shape[1:], dtype=dtype, seed=seed), shape)
    array = random(*shape, dtype=dtype, seed=seed)
    array.flags.writeable = layout != "read-only"
    return array


@st.composite
def calls(draw: Any) -> Any:
    """Inputs and arguments of a call: shapes with broadcasting, strides, masks, every flag."""
    dtype = draw(st.sampled_from([np.float32, np.float64]))
    nq, nk = draw(st.integers(0, 70)), draw(st.integers(0, 70))
    d, dv = draw(st.integers(1, 40)), draw(st.integers(0, 40))
    arguments: dict[str, Any] = {}
    if draw(st.booleans()):
        kv_heads, group, batch = (draw(st.integers(1, 3)) for _ in range(3))
        leading: list[Any] = [(batch, kv_heads * group), (batch, kv_heads), (batch, kv_heads)]
        arguments["enable_gqa"] = True
    else:
        full = tuple(draw(st.lists(st.integers(1, 3), max_size=3)))
        leading = []
        for _ in range(3):
            own = tuple(n if draw(st.booleans()) else 1 for n in full)
            leading.append(own[draw(st.integers(0, len(own))) :])
    q, k, v = (
        draw(strided((*lead, n, columns), dtype))
        for lead, n, columns in zip(leading, (nq, nk, nk), (d, d, dv), strict=True)
    )
    expanded = [leading[0], *leading[1:]] if "enable_gqa" not in arguments else [leading[0]]
    scores = (*np.broadcast_shapes(*expanded), nq, nk)
    kind = draw(st.sampled_from(["none", "bool", "additive"]))
    if kind != "none":
        shape = tuple(n if draw(st.booleans()) else 1 for n in scores)
        shape = shape[draw(st.integers(0, len(shape))) :]
        bias = draw(strided(shape, dtype))
        if kind == "bool":
            arguments["attn_mask"] = bias > -0.5
        else:
            arguments["attn_mask"] = np.where(bias < -1, -np.inf, bias).astype(dtype)
    arguments["is_causal"] = draw(st.sampled_from([False, True, "top-left", "bottom-right"]))
    side = st.none() | st.integers(-1, 40)
    arguments["window"] = draw(st.none() | st.tuples(side, side))
    arguments["scale"] = draw(st.none() | st.sampled_from([0.0, -0.3, 1.0]))
    if draw(st.booleans()):
        arguments["dropout_p"] = draw(st.sampled_from([0.2, 0.5, 1.0]))
        arguments["seed"] = draw(st.integers(0, 2**64 - 1))
    return q, k, v, arguments


@settings(max_examples=150, deadline=None)
@given(calls())
def test_every_combination_of_arguments(call: Any) -> None:
    q, k, v, arguments = call
    check(q, k, v, **arguments)


@settings(max_examples=100, deadline=None)
@given(calls())
def test_standard_attention_agrees(call: Any) -> None:
    q, k, v, arguments = call
    mask = arguments.get("attn_mask")
    problem = problem_of(q, k, v, **arguments)
    out, lse, rows = standard_attention(problem, q, k, v, mask)
    do = random(*out.shape, dtype=q.dtype, seed=7)
    dl = random(*lse.shape, dtype=q.dtype, seed=8)
    wants_mask = problem.mask_kind == "additive"
    theirs = standard_attention_backward(problem, q, k, v, mask, out, rows, do, dl, wants_mask)
    for n, (got, want) in enumerate(
        zip(run(q, k, v, do, dl, **arguments), (out, lse, *theirs), strict=True)
    ):
        if want is not None:
            assert got.shape == want.shape and got.dtype == want.dtype
            atol = tolerance(got, want, problem if n == 5 else None)
            np.testing.assert_allclose(got, want, rtol=0, atol=atol)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("is_causal", [False, "bottom-right"])
@pytest.mark.parametrize(
    "nq, nk", [(97, 97), (1023, 1025), (3, 799), (127, 513), (512, 108), (1, 239)]
)
def test_lengths(nq: Any, nk: Any, is_causal: Any, dtype: Any) -> None:
    q, k, v = (
        random(2, nq, 59, dtype=dtype),
        random(2, nk, 59, dtype=dtype),
        random(2, nk, 32, dtype=dtype),
    )
    check(q, k, v, is_causal=is_causal, tiles=TileSizes())


@pytest.mark.parametrize("d, dv", [(1, 1), (8, 24), (59, 111), (111, 59), (256, 256), (300, 7)])
def test_head_sizes(d: Any, dv: Any) -> None:
    q, k, v = random(3, 70, d), random(3, 90, d), random(3, 90, dv)
    check(q, k, v, is_causal=True, tiles=TileSizes())


@pytest.mark.parametrize(
    "nq, nk, d, dv", [(0, 5, 4, 4), (5, 0, 4, 4), (0, 0, 4, 4), (5, 6, 0, 4), (5, 6, 4, 0)]
)
def test_zero_sizes(nq: Any, nk: Any, d: Any, dv: Any) -> None:
    check(random(2, nq, d), random(2, nk, d), random(2, nk, dv))
    assert run(random(0, 3, 4), random(0, 5, 4), random(0, 5, 4))[0].shape == (0, 3, 4)


# --------------------------------------------------------------------------- pitfalls


@pytest.mark.parametrize("d", [16, 64, 128])
@pytest.mark.parametrize("is_causal", [False, True])
def test_error_is_near_that_of_float32_standard_attention(d: Any, is_causal: Any) -> None:
    """The criterion of FlashAttention's own tests: outputs 2 times, gradients 3 times its error."""
    q, k, v, do = (random(2, 200, d, seed=n) for n in range(4))
    q = q * 3
    torch = pytest.importorskip("torch")
    inputs = [torch.from_numpy(x).requires_grad_() for x in (q, k, v)]
    scores = inputs[0] @ inputs[1].transpose(-1, -2) / d**0.5
    if is_causal:
        scores = scores.masked_fill(torch.ones(200, 200).triu(1).bool(), -torch.inf)
    theirs = torch.softmax(scores, -1) @ inputs[2]
    grads = torch.autograd.grad(theirs, inputs, torch.from_numpy(do))
    naive = [x.detach().numpy() for x in (theirs, *grads)]
    ours = run(q, k, v, do, is_causal=is_causal, tiles=TileSizes())
    want = references.attention(q, k, v, do, is_causal=is_causal)
    exact = (want.out, want.grad_query, want.grad_key, want.grad_value)
    pairs = zip((ours[0], *ours[2:5]), naive, exact, (2, 3, 3, 3), strict=True)
    for got, standard, truth, factor in pairs:
        assert np.abs(got - truth).max() <= factor * np.abs(standard - truth).max() + 1e-6


def test_rows_without_a_key_are_zero() -> None:
    q, k, v = random(2, 40, 8), random(2, 25, 8), random(2, 25, 8)
    mask = np.random.default_rng(0).random((40, 25)) < 0.5
    mask[[0, 17, 39]] = False
    for attn_mask in (mask, np.where(mask, 0, -np.inf).astype(np.float32)):
        do = random(2, 40, 8, seed=3)
        do[:, 17] = np.nan  # no path leads from this row to any input
        out, lse, dq, dk, dv, _ = run(
            q, k, v, do, np.ones((2, 40), np.float32), attn_mask=attn_mask
        )
        for row in (0, 17, 39):
            assert (out[:, row] == 0).all() and np.isneginf(lse[:, row]).all()
            assert (dq[:, row] == 0).all()
        assert np.isfinite(out).all() and all(np.isfinite(g).all() for g in (dq, dk, dv))
    out, lse, dq, dk, dv, _ = run(q, k, v, is_causal="bottom-right")
    assert (out[:, :15] == 0).all() and (dq[:, :15] == 0).all() and np.isneginf(lse[:, :15]).all()


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


@pytest.mark.parametrize("nq, nk, d, dv", [(5, 3, 5, 3), (37, 41, 17, 9)])
def test_nothing_outside_the_arrays_is_read(nq: Any, nk: Any, d: Any, dv: Any) -> None:
    def poisoned(*shape: int) -> Any:
        whole = np.full([n + 64 for n in shape], np.nan, np.float32)
        inner = whole[tuple(slice(32, 32 + n) for n in shape)]
        inner[...] = random(*shape)
        return inner

    q, k, v, do = poisoned(2, nq, d), poisoned(2, nk, d), poisoned(2, nk, dv), poisoned(2, nq, dv)
    results = run(q, k, v, do, tiles=TileSizes())
    assert all(np.isfinite(x).all() for x in results[:5])
    copies = [np.ascontiguousarray(x) for x in (q, k, v, do)]
    for got, want in zip(results, run(*copies, tiles=TileSizes()), strict=True):
        np.testing.assert_array_equal(got, want)


def test_nan_behind_the_band_in_other_tiles_does_not_leak() -> None:
    q, k, v = random(128, 8), random(128, 8), random(128, 8)
    k[64:], v[64:] = np.nan, np.nan
    out, lse, *_ = run(q, k, v, is_causal=True)
    assert np.isfinite(out[:64]).all() and np.isfinite(lse[:64]).all() and np.isnan(out[64:]).all()


@pytest.mark.parametrize("factor", [1e3, -1e3])
def test_huge_scores(factor: Any) -> None:
    """Scores of 1e4, of which one key takes all: any error of the maximum would show."""
    q, k, v, do = random(2, 33, 16), random(2, 65, 16), random(2, 65, 16), random(2, 33, 16, seed=1)
    out, lse, dq, dk, dv, _ = run(q, k, v, do, scale=factor)
    want = references.attention(q, k, v, do, scale=factor)
    np.testing.assert_allclose(out, want.out, atol=2e-3)
    np.testing.assert_allclose(lse, want.logsumexp, rtol=1e-6)
    # Scores of 1e4 are rounded to float32 in both passes, an error of up to 5e-4 in log P.
    np.testing.assert_allclose(dv, want.grad_value, atol=2e-3)
    # dP - delta is a difference of equals here, of which the scale enlarges the rounding error.
    for got, exact in ((dq, want.grad_query), (dk, want.grad_key)):
        # dP - delta may be a difference of equals, of which the scale enlarges the rounding error.
        tolerance = 2e-3 * np.abs(exact).max() + 2e-5 * abs(factor)
        np.testing.assert_allclose(got, exact, rtol=0, atol=tolerance)
    results = run(q * 1e15, k * 1e15, v)
    assert all(np.isfinite(x).all() for x in results[:2])


def test_minus_zero_and_subnormal_inputs() -> None:
    q, k, v = random(9, 4), random(9, 4), random(9, 4)
    q[0], k[1], v[2] = -0.0, 1e-41, -1e-41
    check(q, k, v)


def test_keys_that_contribute_nothing_underflow_to_zero() -> None:
    q, k, v = (
        np.ones((1, 1), np.float32),
        np.array([[0.0], [-200.0]], np.float32),
        np.array([[1.0], [np.float32(1e38)]]),
    )
    out, lse, *_ = run(q, k, v.astype(np.float32), scale=1.0)
    assert out[0, 0] == 1.0 and lse[0] == 0.0


def test_all_weights_dropped() -> None:
    q, k, v = random(2, 20, 8), random(2, 20, 8), random(2, 20, 8)
    out, lse, *gradients = run(q, k, v, dropout_p=1.0)
    assert (out == 0).all() and all((g == 0).all() for g in gradients[:3])
    np.testing.assert_allclose(lse, run(q, k, v)[1])


# --------------------------------------------------------------------------- promises


def results_equal(one: Any, other: Any) -> bool:
    return all(
        (x is None and y is None) or np.array_equal(x, y, equal_nan=True)
        for x, y in zip(one, other, strict=True)
    )


@pytest.mark.parametrize(
    "arguments", [{}, {"is_causal": True}, {"dropout_p": 0.3}, {"window": (40, 3)}]
)
def test_same_bits_every_time_and_on_any_number_of_threads(arguments: Any) -> None:
    q, k, v = random(1, 300, 24), random(1, 300, 24), random(1, 300, 24)
    first = run(q, k, v, **arguments)
    for _ in range(30):
        assert results_equal(first, run(q, k, v, **arguments))
    before = numba.get_num_threads()
    try:
        numba.set_num_threads(1)
        assert results_equal(first, run(q, k, v, **arguments))
    finally:
        numba.set_num_threads(before)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_dropout_mask_does_not_depend_on_tiles(dtype: Any) -> None:
    q, k, v = (random(2, n, 16, dtype=dtype) for n in (100, 140, 140))
    for tiles in (
        TileSizes(32, 32, 64, 32),
        TileSizes(64, 128, 32, 128),
        TileSizes(128, 64, 96, 64),
    ):
        check(q, k, v, dropout_p=0.4, seed=99, tiles=tiles)


def count_tiles(n: int, mask: Any = None, **arguments: Any) -> int:
    q = random(n, 8)
    problem = problem_of(q, q, q, attn_mask=mask, **arguments)
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


SCRIPT = """
import numpy as np, time
from minitorch.kernels.cpu import simd
from minitorch.kernels.flash_attention.cpu import backward as cpu_backward, forward as cpu_forward
from minitorch.kernels.flash_attention.cpu import launch as cpu
from minitorch.kernels.flash_attention.problem import AttentionProblem
from minitorch.kernels.philox import attention_dropout_mask
from tests import references
rng = np.random.default_rng(0)
q, k, v, do = (rng.standard_normal((2, 70, 20)).astype(np.float32) for _ in range(4))
arguments = {"is_causal": True, "dropout_p": 0.3}
p = AttentionProblem.of(q.shape, k.shape, v.shape, q.dtype, seed=5, **arguments)
out, lse, rows = cpu.forward(p, q, k, v)
got = (out, *cpu.backward(p, q, k, v, None, out, rows, do)[:3])
kept = attention_dropout_mask(2, 70, 70, 0.3, seed=5)
r = references.attention(q, k, v, do, kept=kept, **arguments)
for x, y in zip(got, (r.out, r.grad_query, r.grad_key, r.grad_value)):
    assert np.abs(x - y).max() < 2e-5
workers = cpu_forward.forward_worker, cpu_backward.backward_worker
hits = sum(sum(worker.stats.cache_hits.values()) for worker in workers)
print(simd.TARGET.float32_lanes, simd.TARGET.has_fma, hits)
"""


def run_script(**environment: str) -> list[str]:
    result = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        env={**os.environ, **environment},
        cwd=os.path.dirname(os.path.dirname(os.path.abspath(__file__))),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.split()


@pytest.mark.skipif(numba.core.config.CPU_NAME is not None, reason="a processor was named already")
@pytest.mark.skipif(
    platform.machine().lower() not in ("x86_64", "amd64"), reason="names of x86 processors"
)
@pytest.mark.parametrize(
    "name, lanes, fma",
    [("haswell", "8", "True"), ("x86-64", "4", "False")],
)
def test_older_processors(name: Any, lanes: Any, fma: Any) -> None:
    assert run_script(NUMBA_CPU_NAME=name, NUMBA_CPU_FEATURES="")[:2] == [lanes, fma]


def test_a_second_process_compiles_nothing() -> None:
    run_script()
    assert run_script()[2] == "2"


# --------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    "shapes, arguments, error, message",
    [
        (((5, 4), (6, 3), (6, 4)), {}, ValueError, "head size"),
        (((5, 4), (6, 4), (7, 4)), {}, ValueError, "number of keys"),
        (((4,), (6, 4), (6, 4)), {}, ValueError, "query has shape"),
        (((2, 5, 4), (3, 6, 4), (3, 6, 4)), {}, ValueError, "do not broadcast.*enable_gqa"),
        (
            ((5, 5, 4), (3, 6, 4), (3, 6, 4)),
            {"enable_gqa": True},
            ValueError,
            "5 heads and key has 3",
        ),
        (((5, 4), (6, 4), (6, 4)), {"enable_gqa": True}, ValueError, "dimension of heads"),
        (((5, 4), (6, 4), (6, 4)), {"is_causal": "left"}, ValueError, "is_causal is 'left'"),
        (((5, 4), (6, 4), (6, 4)), {"window": (1, -2)}, ValueError, "window is"),
        (((5, 4), (6, 4), (6, 4)), {"window": 3}, ValueError, "a pair"),
        (((5, 4), (6, 4), (6, 4)), {"dropout_p": 1.5}, ValueError, "dropout_p is 1.5"),
        (((5, 4), (6, 4), (6, 4)), {"scale": float("nan")}, ValueError, "scale is nan"),
        (((5, 4), (6, 4), (6, 4)), {"seed": -1}, ValueError, "seed is -1"),
        (
            ((5, 4), (6, 4), (6, 4)),
            {"attn_mask": np.ones((2, 6), bool)},
            ValueError,
            "broadcasts to",
        ),
        (
            ((5, 4), (6, 4), (6, 4)),
            {"attn_mask": np.ones((5, 6), int)},
            TypeError,
            "attn_mask has dtype",
        ),
    ],
)
def test_errors_name_the_argument(shapes: Any, arguments: Any, error: Any, message: Any) -> None:
    with pytest.raises(error, match=message):
        AttentionProblem.of(shapes[0], shapes[1], shapes[2], np.float32, **arguments)


def test_only_two_dtypes() -> None:
    with pytest.raises(TypeError, match="int32"):
        AttentionProblem.of((5, 4), (6, 4), (6, 4), np.int32)
    half = AttentionProblem.of((5, 4), (6, 4), (6, 4), np.float16)  # for a GPU
    with pytest.raises(TypeError, match="on the CPU"):
        cpu.forward(half, *(np.zeros((n, 4), np.float16) for n in (5, 6, 6)))
