"""FlashAttention by mma.sync: the rules of tests/attention.py, and its own sizes of tiles.

In the simulator on tiles of 16 x 16 and a warp or two; on a GPU on its own tiles.
"""

from __future__ import annotations

from dataclasses import replace

import pytest

from minitorch.kernels.flash_attention.mma import launch as mma
from minitorch.kernels.flash_attention.mma.tiles import Tiles
from tests.attention import Rules
from tests.attention_calls import call_of, check, random, shapes_of
from tests.attention_families import MMA


class TestMma(Rules):
    family = MMA

    def test_tf32(self) -> None:
        check(MMA, shapes_of(MMA, (1,), (1,)), "tf32")

    def test_float32_is_left_to_others_unless_asked_for(self) -> None:
        arrays = [random(*shape) for shape in shapes_of(MMA)]
        architecture = (9, 0)
        reason = mma.why_not(call_of(MMA, arrays, "float32").problem, architecture)
        assert "fp32_precision" in str(reason)
        assert mma.why_not(call_of(MMA, arrays, "tf32").problem, architecture) is None

    @pytest.mark.parametrize(
        ("tiles", "dtype"),
        [
            (Tiles(32, 16, 1, 2), "float16"),
            pytest.param(Tiles(32, 32, 2, 1), "tf32x3", marks=pytest.mark.thorough),
            (Tiles(32, 16, 1, 1, in_registers=True, lazy=True), "float16"),
            (Tiles(16, 16, 1, 2, parts=2), "bfloat16"),
        ],
    )
    def test_tiles(self, monkeypatch: pytest.MonkeyPatch, tiles: Tiles, dtype: str) -> None:
        """Two row blocks to a warp, two warps, one stage, operands in registers, half the
        columns.
        """
        whole = replace(tiles, parts=1)
        monkeypatch.setattr(mma, "forward_tiles", lambda *_: whole)
        monkeypatch.setattr(mma, "backward_tiles", lambda *_: (tiles, whole))
        shapes = [(1, 35, 32), (1, 37, 32), (1, 37, 32)]
        check(MMA, shapes, dtype, is_causal=True, dropout_p=0.2)

    def test_turing(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Plain copies, and products of half the depth."""
        monkeypatch.setattr(mma, "is_turing", lambda _: True)
        monkeypatch.setattr(mma, "forward_tiles", lambda *_: Tiles(16, 16, 1, 1))
        monkeypatch.setattr(mma, "backward_tiles", lambda *_: (Tiles(16, 16, 1, 1),) * 2)
        check(MMA, shapes_of(MMA, (1,), (1,)), "float16", dropout_p=0.2)
