"""Which scores count: the rule of scores.py in the GPU families' forms, against loops."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import pytest

from minitorch.kernels.flash_attention.decode import forward as decode
from minitorch.kernels.flash_attention.fragments.scores import mask_scores
from minitorch.kernels.flash_attention.launch import Strides
from minitorch.kernels.flash_attention.scores_cuda import head_place
from minitorch.kernels.flash_attention.simt import tiles as simt
from minitorch.kernels.gpu import runtime
from minitorch.kernels.gpu.register_tile import RegisterTile
from minitorch.kernels.gpu.runtime import cuda, kernel, types

from .test_register_tile import access, own_place

SEQLEN_Q, SEQLEN_K = 21, 26
ROW0, KEY0 = 3, 6  # of the tile
BATCH, HEAD = 1, 2
STEPS = Strides(100, 10, SEQLEN_K, 1)  # of the mask
HUGE = 1e300  # a finite number that float32 has no room for
BANDS = {"causal": (-99, 1), "window": (-4, 6), "far": (2, 99), "all": (-99, 99)}
MASKS = {"none": np.float32, "bool": np.uint8, "float32": np.float32, "float64": np.float64}


def numbers_of(mask: str) -> Any:
    """The mask as it lies in memory, with something before it."""
    random = np.random.default_rng(3)
    size = BATCH * STEPS[0] + HEAD * STEPS[1] + SEQLEN_Q * SEQLEN_K
    if mask == "bool":
        return (random.random(size) < 0.6).astype(np.uint8)
    numbers = random.normal(size=size).astype(MASKS[mask])
    if mask == "float64":
        numbers[::7], numbers[3::7], numbers[5::7] = HUGE, -HUGE, -np.inf
    return numbers


def expected(mask: str, band: tuple[int, int], scores: Any, scale: float) -> Any:
    """What the rule says, score by score; NaN where there is no such query."""
    right, numbers = np.full(scores.shape, np.nan, np.float32), numbers_of(mask)
    largest = np.finfo(np.float32).max
    for (r, c), score in np.ndenumerate(scores):
        i, j = ROW0 + r, KEY0 + c
        if i >= SEQLEN_Q:
            continue
        right[r, c] = -np.inf
        if not band[0] <= j - i < band[1] or j >= SEQLEN_K:
            continue
        number = numbers[BATCH * STEPS[0] + HEAD * STEPS[1] + i * STEPS[2] + j]
        if mask == "none":
            right[r, c] = score
        elif mask == "bool":
            right[r, c] = score if number else -np.inf
        elif np.isinf(number):
            right[r, c] = number
        else:
            right[r, c] = score * scale + np.clip(number, -largest, largest)
    return right


@cache
def fragment_kernel(mask: str, tile: RegisterTile, keys_are_rows: bool, begins: bool) -> Any:
    load, put, _ = access(tile)
    masked, i32 = mask_scores(mask, tile, False, keys_are_rows, begins), types.int32
    row0, key0, seqlen_q, seqlen_k, steps, place = ROW0, KEY0, SEQLEN_Q, SEQLEN_K, STEPS, 0
    batch, head = BATCH, HEAD

    @kernel(32)
    def run(x, out, mask, lower, upper, scale):  # type: ignore[no-untyped-def]
        row, column = own_place()
        query, key = (column, row) if keys_are_rows else (row, column)
        band = i32(lower), i32(upper), i32(seqlen_q), i32(seqlen_k)
        scores = masked(
            load(x, row, column), i32(query + row0), i32(key + key0), band, mask,
            head_place(batch, head, steps), types.float32(scale), (types.int64(0),),
        )  # fmt: skip
        put(out, place, row, column, scores)

    return run


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("band", BANDS)
@pytest.mark.parametrize("keys_are_rows", [False, True])
def test_a_tile_in_registers(mask: str, band: str, keys_are_rows: bool) -> None:
    tile = RegisterTile(24, row_blocks=2) if keys_are_rows else RegisterTile(24)
    shape = (16 * tile.row_blocks, tile.columns)
    x = np.random.default_rng(1).normal(size=shape).astype(np.float32)
    scale, begins = np.float32(0.7), keys_are_rows or BANDS[band][0] > -99
    out = cuda.to_device(np.zeros(x.size, np.float32))
    given = cuda.to_device(x.reshape(-1)), out, cuda.to_device(numbers_of(mask)), *BANDS[band]
    runtime.launch(fragment_kernel(mask, tile, keys_are_rows, begins), 1, 32, *given, scale)
    found = out.copy_to_host().reshape(shape)
    scores = x.T if keys_are_rows else x
    right = expected(mask, BANDS[band], scores, float(scale))
    if keys_are_rows:
        found = found.T
    inside = ~np.isnan(right)
    if keys_are_rows:  # keys past the end are rows of which nothing is written
        inside[:, SEQLEN_K - KEY0 :] = False
    np.testing.assert_allclose(found[inside], right[inside], rtol=1e-6, atol=1e-6)


@cache
def scalar_kernel(family: str, mask: str) -> Any:
    """A thread for each score of a row, 32 keys long."""
    row0, key0, seqlen_q, seqlen_k, steps = ROW0, KEY0, SEQLEN_Q, SEQLEN_K, STEPS
    batch, head = BATCH, HEAD
    if family == "simt":
        simt_score = simt.score_reader(simt.Kind("float32", 8, 8, mask, False, False))

        @kernel(32)
        def run(x, out, mask, lower, upper):  # type: ignore[no-untyped-def]
            n = cuda.blockIdx.x * 32 + cuda.threadIdx.x
            row, key = types.int64(row0 + cuda.blockIdx.x), types.int64(key0 + cuda.threadIdx.x)
            band = lower, upper, seqlen_q, seqlen_k
            of_head = simt.Scores(band, mask, head_place(batch, head, steps), (types.int64(0),))
            out[n] = simt_score(x[n], row, key, of_head)

        return run
    row_of, score_of = decode.score_reader(decode.DecodeKind("float32", 8, 8, mask, True, 1, 1))

    @kernel(32)
    def run_decode(x, out, mask, lower, upper):  # type: ignore[no-untyped-def]
        n = cuda.blockIdx.x * 32 + cuda.threadIdx.x
        row, key = types.int64(row0 + cuda.blockIdx.x), types.int64(key0 + cuda.threadIdx.x)
        seen = row_of(row, lower, upper, head_place(batch, head, steps))
        out[n] = score_of(x[n], key, types.int64(seqlen_k), mask, row, seen, (types.int64(0),))

    return run_decode


@pytest.mark.parametrize("family", ["simt", "decode"])
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("band", BANDS)
def test_a_score_at_a_time(family: str, mask: str, band: str) -> None:
    rows = SEQLEN_Q - ROW0
    x = np.random.default_rng(2).normal(size=(rows, 32)).astype(np.float32)
    out = cuda.to_device(np.zeros(x.size, np.float32))
    given = cuda.to_device(x.reshape(-1)), out, cuda.to_device(numbers_of(mask)), *BANDS[band]
    runtime.launch(scalar_kernel(family, mask), rows, 32, *given)
    found = out.copy_to_host().reshape(x.shape)
    np.testing.assert_allclose(found, expected(mask, BANDS[band], x, 1.0), rtol=1e-6, atol=1e-6)
