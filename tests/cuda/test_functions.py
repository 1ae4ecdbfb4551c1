"""A user's functions on registers (score_values.py), against numpy in float64."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any

import numpy as np
import pytest

from minitorch.kernels.flash_attention.fragments.scores import mask_scores, modify_scores
from minitorch.kernels.flash_attention.score_values import words_of, words_type
from minitorch.kernels.flash_attention.scores import Functions
from minitorch.kernels.flash_attention.scores_cuda import head_place
from minitorch.kernels.flash_attention.variant import Captured, derivative_of
from minitorch.kernels.gpu import ptx_simulated, runtime
from minitorch.kernels.gpu.register_tile import RegisterTile
from minitorch.kernels.gpu.runtime import Instance, cuda, kernel, types
from minitorch.kernels.score_graph import NumpyOperations, evaluate
from minitorch.score_trace import trace

from .test_register_tile import access, own_place
from .test_scores import BATCH, HEAD, KEY0, ROW0, SEQLEN_K, SEQLEN_Q, STEPS

SLOPES = np.random.default_rng(1).normal(size=4).astype(np.float32)
TABLE = np.random.default_rng(2).normal(size=(4, SEQLEN_Q + SEQLEN_K)).astype(np.float32)
IDS = np.arange(max(SEQLEN_Q, SEQLEN_K)) // 7
FLAGS = np.random.default_rng(3).random((2, SEQLEN_K)) < 0.7
CAP, WINDOW, NEAR = 3.0, 5, 4

SCORE_MODS: dict[str, Any] = {
    "identity": lambda s, b, h, q, k: s,
    "soft-cap": lambda s, b, h, q, k: CAP * np.tanh(s / CAP),
    "alibi": lambda s, b, h, q, k: s - SLOPES[h] * abs(q - k),
    "table": lambda s, b, h, q, k: s + TABLE[h, q - k + SEQLEN_K],
    "clipped": lambda s, b, h, q, k: s * (1 + TABLE[h, np.clip(q - k, -NEAR, NEAR) + NEAR]),
    "operations": lambda s, b, h, q, k: np.where(
        (q + k) % 3 == 0,
        np.exp(-abs(s)) + np.sqrt(s * s + 1),
        np.log(2 + np.exp2(s)) / (1 + q // 4),
    )
    - np.minimum(s, 0.5) * np.maximum(s, b) + np.floor(s),
    "negative remainders": lambda s, b, h, q, k: s + (q - k) % 5 + (q - k) // WINDOW,
    "truths": lambda s, b, h, q, k: s + ((q > k) ^ ~(k == 3)) + (q & 3) - (k | 1) + (q ^ k),
}  # fmt: skip
MASK_MODS: dict[str, Any] = {
    "none": None,
    "documents": lambda b, h, q, k: IDS[q] == IDS[k],
    "flags": lambda b, h, q, k: FLAGS[b, k] | (abs(q - k) <= WINDOW),
}


def traced_of(score: str, mask: str) -> tuple[Functions, tuple[Captured, Captured]]:
    found: list[Any] = []
    for function, role in ((SCORE_MODS[score], "score_mod"), (MASK_MODS[mask], "mask_mod")):
        found.append(None if function is None else trace(function, role))  # type: ignore[arg-type]
    given = [Captured() if x is None else Captured(x.arrays, x.parameters) for x in found]
    return Functions(*(None if x is None else x.graph for x in found)), (given[0], given[1])


@cache
def tile_kernel(
    functions: Functions, tile: RegisterTile, keys_are_rows: bool, is_whole: bool, approximate: bool
) -> Any:
    load, put, _ = access(tile)
    options = True, keys_are_rows, True, functions, True, approximate
    masked, count = mask_scores("none", tile, *options), tile.registers
    modified, i32 = modify_scores(tile, functions, keys_are_rows, True, approximate), types.int32
    row0, key0, seqlen_q, seqlen_k, steps, place = ROW0, KEY0, SEQLEN_Q, SEQLEN_K, STEPS, 0
    batch, head, size = BATCH, HEAD, 16 * tile.row_blocks * tile.columns

    @kernel(32)
    def run_functions(x, out, lower, upper, scale, words):  # type: ignore[no-untyped-def]
        row, column = own_place()
        query, key = (column, row) if keys_are_rows else (row, column)
        band = i32(lower), i32(upper), i32(seqlen_q), i32(seqlen_k)
        here = head_place(batch, head, steps)
        scores, query, key = load(x, row, column), i32(query + row0), i32(key + key0)
        if is_whole:
            found = modified(scores, query, key, band, here, types.float32(scale), words)
        else:
            found = masked(scores, query, key, band, x, here, types.float32(scale), words)
        put(out, place, row, column, found[:count])
        put(out, place + size, row, column, found[count:])

    return run_functions


def expected(functions: Functions, given: Any, scores: Any, scale: float, is_whole: bool) -> Any:
    """Scores and slopes, score by score; NaN where there is no such query or key."""
    rows, columns = scores.shape
    q, k = np.arange(rows)[:, None] + ROW0, np.arange(columns) + KEY0
    inside = (q < SEQLEN_Q) & (k < SEQLEN_K)
    inputs = {"b": BATCH, "h": HEAD, "q": np.minimum(q, SEQLEN_Q - 1)}
    inputs |= {"k": np.minimum(k, SEQLEN_K - 1), "score": scores * scale}
    assert functions.score is not None
    graph = derivative_of(functions.score).graph
    with np.errstate(all="ignore"):
        found = evaluate(graph, NumpyOperations(given[0].arrays, given[0].parameters), inputs)
        value, slope = (np.broadcast_to(x, scores.shape).copy() for x in found[:2])
        if functions.mask is not None and not is_whole:
            operations = NumpyOperations(given[1].arrays, given[1].parameters)
            (sees,) = evaluate(functions.mask, operations, inputs)
            value[~np.broadcast_to(sees, scores.shape)] = -np.inf
    value[~inside], slope[~inside] = np.nan, np.nan
    return value, slope


@pytest.mark.parametrize("score", SCORE_MODS)
@pytest.mark.parametrize("mask", MASK_MODS)
@pytest.mark.parametrize("keys_are_rows", [False, True])
def test_functions_of_a_tile(score: str, mask: str, keys_are_rows: bool) -> None:
    functions, given = traced_of(score, mask)
    tile = RegisterTile(16, row_blocks=2) if keys_are_rows else RegisterTile(16)
    shape = (16 * tile.row_blocks, tile.columns)
    x = np.random.default_rng(1).normal(size=shape).astype(np.float32)
    for is_whole in (False, True):
        arrays = [
            Captured(tuple(map(stored, captured.arrays)), captured.parameters) for captured in given
        ]
        devices = {id(a): cuda.to_device(a.reshape(-1)) for c in arrays for a in c.arrays}
        addresses = {n: address_of(x) for n, x in devices.items()}
        words = words_of(functions, arrays, np.dtype(np.float32), lambda a: addresses[id(a)])  # noqa: B023
        out = cuda.to_device(np.zeros(2 * x.size, np.float32))
        run = tile_kernel(functions, tile, keys_are_rows, is_whole, runtime.SIMULATED)
        runtime.launch(run, 1, 32, cuda.to_device(x.reshape(-1)), out, -99, 99, 0.7, words)
        found = out.copy_to_host().reshape(2, *shape)
        scores = x.T if keys_are_rows else x
        for ours, right in zip(
            found, expected(functions, given, scores, 0.7, is_whole), strict=True
        ):
            ours = ours.T if keys_are_rows else ours
            inside = ~np.isnan(right)
            np.testing.assert_allclose(ours[inside], right[inside], rtol=3e-5, atol=3e-5)


def stored(array: Any) -> Any:
    kind = {"f": np.float32, "b": np.uint8}.get(array.dtype.kind, np.int32)
    return np.ascontiguousarray(array, kind)


def address_of(array: Any) -> int:
    if runtime.SIMULATED:
        return int(ptx_simulated.global_address(array))
    return int(array.device_ctypes_pointer.value)


def instances() -> Iterator[Instance]:
    """For a look at the machine code."""
    for name in ("soft-cap", "table", "alibi"):
        functions, _ = traced_of(name, "none")
        tile = RegisterTile(64)
        array = types.Array(types.float32, 1, "C")
        signature = (array, array, *[types.int64] * 2, types.float64, words_type(functions))
        yield Instance(name, tile_kernel(functions, tile, False, True, True), signature)
