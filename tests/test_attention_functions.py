"""Score functions, masks and lists on the CPU: what its kernels promise beside all rules."""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
import pytest

import minitorch
from minitorch import FastOps, TensorBackend, attention_masks
from minitorch.kernels.cpu.compiler import COMPILES
from minitorch.kernels.flash_attention.block_lists import FULL, PARTIAL, BlockLists, TileLists
from minitorch.kernels.flash_attention.cpu import backward as cpu_backward
from minitorch.kernels.flash_attention.cpu import forward as cpu_forward
from minitorch.kernels.flash_attention.cpu import launch as cpu
from minitorch.kernels.flash_attention.cpu import score_rows
from minitorch.kernels.flash_attention.cpu.launch import TileSizes
from minitorch.kernels.flash_attention.problem import AttentionProblem
from tests import attention_functions as functions
from tests.attention_calls import Call, call_of, compare, make_mask, random
from tests.attention_families import CPU, SMALL_TILES, by_cpu
from tests.attention_functions import BATCHES, HEADS, Make, both, leaf, reference_with_functions

BACKEND = TensorBackend(FastOps)
MAKES: dict[str, Make] = {
    "soft cap": functions.soft_cap,
    "scattered": functions.scattered,
    "pairs": functions.pairs,
    "documents": functions.documents,
    "heads of their own": functions.per_head,
    "blocks": functions.blocks,
    "slopes, wide blocks": both(functions.slopes, functions.wide_blocks),
    "neighbours, blocks": both(functions.neighbours, functions.blocks),
}
OPTIONS: dict[str, dict[str, Any]] = {
    "causal": {"is_causal": True},
    "window": {"window": (30, 5), "is_causal": "bottom-right"},
    "boolean mask": {"mask": "bool"},
    "mask that is added": {"mask": "additive"},
    "dropout": {"dropout_p": 0.3, "seed": 9},
    "heads share keys": {"enable_gqa": True},
    "no gradient of the logsumexp": {"dl": 0.0},
    "all": {
        "is_causal": True, "mask": "additive", "dropout_p": 0.2, "seed": 4, "enable_gqa": True,
    },
}  # fmt: skip


def function_call(
    make: Make, dtype: str = "float32", nq: int = 70, nk: int = 90, **options: Any
) -> Call:
    """A call of random numbers."""
    heads = 1 if options.get("enable_gqa") else HEADS
    arrays = [
        random(BATCHES, of, n, size, seed=seed)
        for seed, (of, n, size) in enumerate(((HEADS, nq, 20), (heads, nk, 20), (heads, nk, 12)))
    ]
    if "mask" in options:
        options["mask"] = make_mask(options["mask"], (HEADS, nq, nk), dtype)
    return call_of(CPU, arrays, dtype, functions=make(nq, nk), **options)


def bits(results: Any) -> list[bytes | None]:
    """Of all arrays."""
    return [None if x is None else np.ascontiguousarray(x).tobytes() for x in results]


def full_marked_partial(call: Call) -> Call:
    """The same call, but that nothing says of a block that all its scores count."""
    lists = call.variant.lists
    assert lists is not None and (lists.lists.entries & 1).any()
    entries = lists.lists.entries & ~np.int32(1)
    found = lists.lists
    partial = BlockLists(found.offsets, entries, found.heads, found.rows, found.columns)
    other = TileLists(partial, lists.block, lists.shape)
    return call._replace(variant=call.variant._replace(lists=other))


@pytest.mark.parametrize("dtype", CPU.dtypes)
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("make", MAKES)
def test_every_function_with_every_argument(make: str, options: str, dtype: str) -> None:
    call = function_call(MAKES[make], dtype, **OPTIONS[options])
    compare(CPU, call, by_cpu(call), wanted=reference_with_functions(call))


@pytest.mark.parametrize("tiles", [(32, 32, 64, 96), (64, 96, 32, 64), (96, 128, 96, 32)])
@pytest.mark.parametrize("make", ["heads of their own", "blocks", "documents"])
def test_tiles_that_do_not_divide_the_blocks(make: str, tiles: tuple[int, ...]) -> None:
    call = function_call(MAKES[make], nq=200, nk=150, is_causal=True)
    compare(CPU, call, by_cpu(call, TileSizes(*tiles)), wanted=reference_with_functions(call))


@pytest.mark.parametrize("block", [16, 48, 64, 100, 128, 192, (96, 32), 1000])
def test_blocks_of_any_size(block: Any) -> None:
    """With tiles of the kernels' own choice."""

    def make(nq: int, nk: int) -> dict[str, Any]:
        mask = attention_masks.longformer(50, [0, 200], max(nq, nk))
        return {"block_mask": minitorch.create_block_mask(mask, None, None, nq, nk, block)}

    call = function_call(make, nq=333, nk=333)
    compare(CPU, call, by_cpu(call), wanted=reference_with_functions(call))


# ----- the same bits -----


@pytest.mark.parametrize("name", ["scattered", "pairs", "blocks", "neighbours, blocks"])
@pytest.mark.parametrize("options", ["causal", "all"])
def test_same_bits_in_every_run_and_on_any_number_of_threads(name: str, options: str) -> None:
    call = function_call(MAKES[name], nq=300, nk=300, **OPTIONS[options])
    first = bits(by_cpu(call, SMALL_TILES))
    for _ in range(20):
        assert bits(by_cpu(call, SMALL_TILES)) == first
    before = numba.get_num_threads()
    try:
        numba.set_num_threads(1)
        assert bits(by_cpu(call, SMALL_TILES)) == first
    finally:
        numba.set_num_threads(before)


@pytest.mark.parametrize("options", ["causal", "boolean mask", "dropout", "all"])
@pytest.mark.parametrize("name", ["documents", "blocks", "neighbours, blocks"])
def test_marking_full_blocks_partial_changes_no_bit(name: str, options: str) -> None:
    call = function_call(MAKES[name], nq=200, nk=200, **OPTIONS[options])
    wanted = bits(by_cpu(call, SMALL_TILES))
    assert bits(by_cpu(full_marked_partial(call), SMALL_TILES)) == wanted


def test_a_mask_function_and_a_score_function_that_hide_the_same() -> None:
    def hides(b: Any, h: Any, q: Any, k: Any) -> Any:
        return (q >= k) & ((q + k) % 3 > 0)

    def mask(nq: int, nk: int) -> dict[str, Any]:
        return {"block_mask": minitorch.create_block_mask(hides, None, None, nq, nk, 32)}

    def score(nq: int, nk: int) -> dict[str, Any]:
        return {"score_mod": lambda s, b, h, q, k: np.where(hides(b, h, q, k), s, -np.inf)}

    one, other = (by_cpu(function_call(make), SMALL_TILES) for make in (mask, score))
    for got, want in zip(one[:5], other[:5], strict=True):
        np.testing.assert_allclose(got, want, atol=2e-6)


def test_a_causal_list_is_causal() -> None:
    """Lists and a mask function in the place of the band."""

    def make(nq: int, nk: int) -> dict[str, Any]:
        flags = np.ones(nk, bool)  # so that it is no band to those who read the function
        return {
            "block_mask": minitorch.create_block_mask(
                lambda b, h, q, k: (q >= k) & flags[k], None, None, nq, nk, 32
            )
        }

    tiles = TileSizes(32, 32, 32, 32)
    lists = function_call(make, nq=200, nk=200)
    assert lists.problem.is_sparse
    band = function_call(lambda nq, nk: {}, nq=200, nk=200, is_causal=True)
    for got, want in zip(by_cpu(lists, tiles)[:5], by_cpu(band, tiles)[:5], strict=True):
        np.testing.assert_array_equal(got, want)


# ----- which tiles are computed, and what is compiled -----


def tiles_of(call: Call, tiles: TileSizes = SMALL_TILES) -> int:
    q, k, v, _ = call.tensors
    return cpu.forward_with_count(call.problem, q, k, v, None, tiles, call.variant).tiles


def test_empty_tiles_are_not_computed() -> None:
    states = np.zeros((1, 6, 5), np.uint8)
    states[0, [0, 0, 2, 3], [1, 4, 2, 0]] = FULL, PARTIAL, FULL, FULL
    seen = states[0] > 0

    def make(nq: int, nk: int) -> dict[str, Any]:
        mask = minitorch.create_block_mask(
            lambda b, h, q, k: seen[q // 32, k // 32], None, None, nq, nk, 32
        )
        return {"block_mask": mask}

    call = function_call(make, nq=6 * 32, nk=5 * 32)
    assert tiles_of(call) == 4 * BATCHES * HEADS
    out, lse, dq, *_ = by_cpu(call, SMALL_TILES)
    empty = np.repeat(~seen.any(-1), 32)
    assert (out[..., empty, :] == 0).all() and np.isneginf(lse[..., empty]).all()
    assert (dq[..., empty, :] == 0).all() and np.isfinite(lse[..., ~empty]).all()


def test_lists_without_any_block() -> None:
    def make(nq: int, nk: int) -> dict[str, Any]:
        never = np.zeros(nk, bool)
        return {
            "block_mask": minitorch.create_block_mask(
                lambda b, h, q, k: never[k] & (q >= k), None, None, nq, nk, 32
            )
        }

    call = function_call(both(functions.slopes, make))
    out, lse, dq, dk, dv, _, slopes = by_cpu(call)
    assert tiles_of(call) == 0 and np.isneginf(lse).all()
    assert all((x == 0).all() for x in (out, dq, dk, dv, slopes))


WORKERS = (
    cpu_forward.forward_worker, cpu_backward.backward_worker, cpu_backward.delta_worker,
    cpu_backward.mask_gradient_worker,
)  # fmt: skip


@pytest.mark.skipif(not COMPILES, reason="nothing is compiled")
def test_a_new_function_compiles_no_worker_and_a_new_number_nothing() -> None:
    def attend(nq: int, cap: float, far: int, table: Any) -> None:
        def make(nq: int, nk: int) -> dict[str, Any]:
            def mask(b: Any, h: Any, q: Any, k: Any) -> Any:
                return (abs(q - k) < far) | (k < far)

            def score(s: Any, b: Any, h: Any, q: Any, k: Any) -> Any:
                return cap * np.tanh(s / cap) + table[h] * cap

            return {"score_mod": score, "block_mask": mask}

        by_cpu(function_call(make, nq=nq, nk=nq, mask="additive"))

    by_cpu(function_call(functions.soft_cap, mask="additive"))
    signatures = [set(worker.signatures) for worker in WORKERS]
    attend(70, 3.0, 9, leaf(HEADS, seed=1))
    assert [set(worker.signatures) for worker in WORKERS] == signatures
    made = score_rows.score_row.cache_info(), score_rows.gradient_row.cache_info()
    attend(133, 5.0, 20, leaf(HEADS, seed=2))
    now = score_rows.score_row.cache_info(), score_rows.gradient_row.cache_info()
    assert [x.misses for x in now] == [x.misses for x in made]
    assert [set(worker.signatures) for worker in WORKERS] == signatures


# ----- gradients of what is captured -----


def test_a_gradient_that_nothing_bounds_is_nan() -> None:
    table = leaf(HEADS, seed=3)

    def make(nq: int, nk: int) -> dict[str, Any]:
        return {"score_mod": lambda s, b, h, q, k: s + table[h] / s}

    with np.errstate(all="ignore"):
        *_, gradient = by_cpu(function_call(make))
    assert np.isnan(gradient).all()


@pytest.mark.parametrize("size", [1e-12, 1.0, 1e12])
def test_sums_in_fixed_point_fit_gradients_of_any_size(size: float) -> None:
    call = function_call(functions.scattered, "float64")
    call.tensors[3] *= size
    call = call._replace(grad_logsumexp=None)
    wanted = reference_with_functions(call)[6:]
    for got, want in zip(by_cpu(call)[6:], wanted, strict=True):
        np.testing.assert_allclose(got, want, rtol=0, atol=1e-11 * np.abs(want).max())


def test_a_table_of_another_dtype() -> None:
    q, k, v = (
        minitorch.tensor(random(2, 40, 8, seed=n), BACKEND, requires_grad=True) for n in range(3)
    )
    table = minitorch.tensor(random(2, 79, seed=4), BACKEND).to("float32").detach()
    table.requires_grad_(True)

    def mod(s: Any, b: Any, h: Any, q: Any, k: Any) -> Any:
        return s + table[h, q - k + 39]

    gradients: list[Any] = []
    for attend in (q.flash_attention, q.attention):
        table.grad = None
        (attend(k, v, score_mod=mod) * v).sum().backward()
        assert table.grad is not None and table.grad.dtype == np.float32
        gradients.append(table.grad.to_numpy().astype(np.float64))
    np.testing.assert_allclose(gradients[0], gradients[1], rtol=1e-5, atol=1e-5)


def test_problems_without_rows_or_keys() -> None:
    problem = AttentionProblem.of((2, 0, 4), (2, 5, 4), (2, 5, 4), np.float32)
    table = leaf(2, seed=5)
    q, k = np.zeros((2, 0, 4), np.float32), np.zeros((2, 5, 4), np.float32)
    call = call_of(
        CPU, [q, k, k], "float32", functions={"score_mod": lambda s, b, h, q, k: s * table[h]}
    )
    assert call.problem.out_shape == problem.out_shape
    *_, gradient = by_cpu(call)
    assert (gradient == 0).all() and gradient.shape == (2,)
