"""FlashAttention on Hopper GPUs: the rules of tests/attention.py, and its own tiles.

In the simulator with its emulation of the copy engine and of wgmma, in tiles of 64 x 64.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from minitorch.cuda.device_array import DeviceArray
from minitorch.kernels.flash_attention import pieces
from minitorch.kernels.flash_attention.fragments.dropout import (
    drop,
    drop_by_bits,
    dropout_words,
    keep_bits_of_keys,
)
from minitorch.kernels.flash_attention.hopper import backward_launch as hopper_backward
from minitorch.kernels.flash_attention.hopper import launch as hopper
from minitorch.kernels.flash_attention.hopper.backward_pipeline import memory_plan
from minitorch.kernels.flash_attention.hopper.tiles import Kind, own_place
from minitorch.kernels.gpu.register_tile import RegisterTile
from minitorch.kernels.gpu.runtime import SIMULATED, launch, types
from minitorch.kernels.gpu.runtime import kernel as kernel_of
from minitorch.kernels.philox import attention_dropout_mask, dropout_threshold
from tests.attention import Rules, check_error
from tests.attention_calls import check, random
from tests.attention_families import HOPPER
from tests.cuda.attention import forward_by_cuda

FORWARD = replace(HOPPER, compute=forward_by_cuda)
# Nq, Nk, D and Dv.
SIZES = {
    "two tiles of keys": (10, 70, 64, 64),
    "two tiles of queries": (70, 20, 64, 64),
    "long rows": (30, 40, 160, 160),
    "two head sizes": (20, 20, 59, 96),
    "large heads": (10, 10, 256, 256),
}


class TestHopper(Rules):
    family = HOPPER

    @pytest.mark.parametrize(
        "name",
        [
            pytest.param(n, marks=[pytest.mark.thorough] * (n in ("long rows", "two head sizes")))
            for n in SIZES
        ],
    )
    def test_sizes(self, name: str) -> None:
        nq, nk, d, dv = SIZES[name]
        check(HOPPER, [(1, 1, nq, d), (1, 1, nk, d), (1, 1, nk, dv)], "float16")

    @pytest.mark.parametrize("name", ["slopes and blocks", "scattered and heads of their own"])
    def test_lists_in_pieces(self, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
        """Each tile of a list is a piece of its own."""
        if SIMULATED and name != "slopes and blocks":
            pytest.skip("the other one takes 40 s there")
        monkeypatch.setattr(pieces, "FEWEST", 1)
        self.test_functions(name)

    def test_two_warpgroups_in_the_backward_pass(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Blocks of 384 threads: one warpgroup loads, and two have 64 rows each."""
        if SIMULATED:
            find = hopper_backward.backward_blocks
            monkeypatch.setattr(
                hopper_backward,
                "backward_blocks",
                lambda *kind: tuple(replace(b, own=128) for b in find(*kind)),
            )
        check(HOPPER, [(1, 1, 70, 64), (1, 1, 80, 64), (1, 1, 80, 64)], "float16")

    @pytest.mark.parametrize(
        ("nq", "nk"), [(135, 150), pytest.param(70, 150, marks=pytest.mark.thorough)]
    )
    def test_tiles_that_a_band_leaves_out(self, nq: int, nk: int) -> None:
        """The forward pass alone, since the simulator takes long for such a backward pass."""
        for options in ({"is_causal": True}, {"window": (40, 10)}):
            shapes = [(1, 1, nq, 64), (1, 1, nk, 64), (1, 1, nk, 64)]
            check(FORWARD, shapes, "float16", **options)

    @pytest.mark.gpu
    @pytest.mark.parametrize("number", range(4))
    @pytest.mark.parametrize("size", [64, 128, 256])
    def test_every_tile_that_can_be_chosen(
        self, monkeypatch: pytest.MonkeyPatch, number: int, size: int
    ) -> None:
        candidates = hopper.CANDIDATES["forward"][size]
        if number >= len(candidates):
            pytest.skip("there are fewer")
        chosen = hopper.blocks_of(candidates[number])
        monkeypatch.setattr(hopper, "forward_blocks", lambda *_: chosen)
        hopper._planned.cache_clear()
        check(HOPPER, [(1, 2, 500, size)] * 3, "float16", is_causal=True)

    @pytest.mark.gpu
    @pytest.mark.parametrize("size", [64, 96, 128, 192, 256])
    def test_error_of_long_rows(self, dtype: str, size: int) -> None:
        arrays = [random(2, 3, 1024, size, seed=n) for n in range(3)]
        check_error(HOPPER, arrays, dtype, dtype == "bfloat16", ("out",))


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


# ----- the choice of tiles -----


@pytest.mark.parametrize("mask", ["none", "bool", "float32"])
@pytest.mark.parametrize("dropout", [False, True])
@pytest.mark.parametrize("size", [64, 96, 128, 192, 256])
def test_tiles_fit_in_shared_memory(size: int, dropout: bool, mask: str) -> None:
    kind = Kind("float16", size, size, mask, dropout)
    for blocks in hopper_backward.backward_blocks(kind):
        assert memory_plan(kind, blocks).size <= 227 * 1024
        assert blocks.own % 64 == 0 and blocks.passing % 16 == 0
