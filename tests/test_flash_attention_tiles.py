"""Every problem that the GPU kernels say they support has tiles that fit; no GPU needed."""

from __future__ import annotations

import pytest

from minitorch.kernels.flash_attention.simt import launch as simt
from minitorch.kernels.flash_attention.simt.backward import backward_memory
from minitorch.kernels.flash_attention.simt.forward import forward_memory
from minitorch.kernels.flash_attention.simt.tiles import Blocks, Kind, vector_lanes
from minitorch.kernels.gpu import runtime

if runtime.SIMULATED:
    pytest.skip("the simulator has small tiles of its own", allow_module_level=True)

# What a block can ask for at most: Turing, A100, the smaller Ampere and Ada, Hopper.
SHARED_BYTES = {(7, 5): 64 << 10, (8, 0): 163 << 10, (8, 6): 99 << 10, (9, 0): 227 << 10}
COLUMNS = (1, 8, 16, 40, 64, 80, 128, 136, 192, 256)


def check(blocks: Blocks, size: int, sums: int, itemsize: int, most: int) -> None:
    assert size * itemsize <= most
    assert sums * itemsize // 4 <= simt.REGISTERS
    assert blocks.block_m % blocks.threads_m == 0 and blocks.block_n % blocks.threads_n == 0
    for length in (blocks.block_m, blocks.block_n):  # as the tile of dropout's bits wants them
        assert length in (4, 8) or length % 16 == 0


@pytest.mark.parametrize("capability", SHARED_BYTES)
@pytest.mark.parametrize("precision", simt.PRECISIONS)
@pytest.mark.parametrize("dropout", [False, True])
def test_tiles_fit(precision: str, capability: tuple[int, int], dropout: bool) -> None:
    itemsize, most = 16 // vector_lanes(precision), SHARED_BYTES[capability]
    for head_dim in COLUMNS:
        for value_dim in (0, *COLUMNS):
            kind = Kind(precision, head_dim, value_dim, "none", dropout, False)
            tiles = simt.forward_blocks(kind, capability)
            size = forward_memory(kind, tiles).size
            check(tiles, size, simt._forward_sums(kind, tiles), itemsize, most)
            for_keys, for_queries = simt.backward_blocks(kind, capability)
            size = backward_memory(kind, for_keys, True).size
            check(for_keys, size, simt._key_value_sums(kind, for_keys), itemsize, most)
            size = backward_memory(kind, for_queries, False).size
            check(for_queries, size, simt._query_sums(kind, for_queries), itemsize, most)
