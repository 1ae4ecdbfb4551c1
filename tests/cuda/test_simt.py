"""FlashAttention without tensor cores on the GPU: the rules of tests/attention.py, and its own."""

from __future__ import annotations

import numpy as np
import pytest

from minitorch.kernels.flash_attention.simt.dropout import keep_factor, keep_maker, keep_size
from minitorch.kernels.flash_attention.simt.tiles import Blocks, Kind
from minitorch.kernels.gpu import runtime
from minitorch.kernels.gpu.runtime import SIMULATED, cuda, kernel, types
from minitorch.kernels.philox import attention_dropout_mask, dropout_threshold
from tests.attention import Rules, check_error
from tests.attention_calls import check, random
from tests.attention_families import SIMT
from tests.cuda.attention import on_gpu


class TestSimt(Rules):
    family = SIMT

    def test_head_sizes_above_the_limit_are_refused(self) -> None:
        q, k, v = (on_gpu(random(1, 1, 3, 257)) for _ in range(3))
        with pytest.raises(ValueError, match="257"):
            q.flash_attention(k, v)

    def test_more_heads_than_a_grid_has_rows(self) -> None:
        """A block's number is one-dimensional: 65,535 is no limit. Head sizes of 1."""
        heads = 40 if SIMULATED else 70_000
        check(SIMT, [(heads, 1, 1), (heads, 2, 1), (heads, 2, 1)], "float32")

    @pytest.mark.gpu
    @pytest.mark.parametrize("is_causal", [False, True])
    def test_error_of_long_sums(self, is_causal: bool) -> None:
        """dK and dV of the first keys are sums over 4096 queries, the early ones far the largest
        with a causal mask. Begun with these, the sums' errors would be 4 times PyTorch's.
        """
        arrays = [random(1, 1, 4096, 64, seed=n) for n in range(3)]
        check_error(SIMT, arrays, "float32", is_causal)


BIT_TILES = [(4, 8), (8, 4), (8, 8), (8, 16), (32, 8), (16, 16), (48, 32)]


@pytest.mark.parametrize("block_m, block_n", BIT_TILES)
def test_every_tile_of_scores_finds_its_bits(block_m: int, block_n: int) -> None:
    """Also one with a part of 16 rows or columns, wherever among the 16 it begins."""
    p, seed, blocks = 0.4, 2**40 + 3, Blocks(block_m, block_n, 4, 4)
    kind = Kind("float32", 8, 8, "none", True, False)
    make, factor_of = keep_maker(kind, blocks, 0), keep_factor(kind, blocks, 0)
    threads = blocks.threads

    @kernel(threads)
    def write_factors(out, row0, key0, threshold, seed):  # type: ignore[no-untyped-def]
        memory = cuda.shared.array(0, types.float32)
        keep_scale = types.float32(2.0)
        make(memory, row0, key0, 1, (seed, types.uint64(threshold), keep_scale))
        cuda.syncthreads()
        for place in range(cuda.threadIdx.x, block_m * block_n, threads):
            out[place] = factor_of(memory, place // block_n, place % block_n, keep_scale)

    mask = attention_dropout_mask(2, 64 + block_m, 64 + block_n, p, seed)[1]
    for number in range(4):
        row0, key0 = (4 + number) * block_m % 64, (5 + 3 * number) * block_n % 64
        out = cuda.to_device(np.full(block_m * block_n, np.nan, np.float32))
        runtime.launch(
            write_factors, 1, threads, out, row0, key0, dropout_threshold(p),
            np.uint64(seed), shared_bytes=4 * keep_size(kind, blocks),
        )  # fmt: skip
        kept = mask[row0 : row0 + block_m, key0 : key0 + block_n]
        np.testing.assert_array_equal(out.copy_to_host().reshape(kept.shape), 2.0 * kept)
