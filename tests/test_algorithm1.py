"""The FlashAttention paper's Algorithms 0 and 1: what they compute, how many bytes they move."""

from typing import Any

import numpy as np
import pytest

from minitorch.kernels.flash_attention import algorithm1
from tests import references


def inputs(n: int, d: int) -> list[Any]:
    rng = np.random.default_rng(n + d)
    return [rng.standard_normal((n, d)) for _ in range(3)]


@pytest.mark.parametrize(
    "n, d, sram_size", [(1, 1, 1), (64, 8, 256), (100, 7, 333), (33, 16, 10**6)]
)
def test_both_compute_attention(n: int, d: int, sram_size: int) -> None:
    q, k, v = inputs(n, d)
    want = references.attention(q, k, v, scale=0.5).out
    np.testing.assert_allclose(algorithm1.standard_attention(q, k, v, 0.5)[0], want, atol=1e-12)
    got, _ = algorithm1.flash_attention(q, k, v, sram_size, 0.5)
    np.testing.assert_allclose(got, want, atol=1e-12)


def flash(n: int, d: int, sram_size: int) -> Any:
    """The memory after Algorithm 1, with its counts."""
    q, k, v = inputs(n, d)
    return algorithm1.flash_attention(q, k, v, sram_size)[1]


def moved(n: int, d: int, sram_size: int) -> int:
    """Elements that Algorithm 1 moves."""
    return int(flash(n, d, sram_size).bytes_moved) // 8


def test_flash_attention_moves_n2_d2_over_m_elements() -> None:
    """Half as many for twice the SRAM, 4 times for twice the length or twice the head size."""
    base = moved(512, 32, 4096)
    assert moved(512, 32, 8192) / base == pytest.approx(1 / 2, rel=0.1)
    assert moved(1024, 32, 4096) / base == pytest.approx(4, rel=0.1)
    assert moved(512, 64, 4096) / base == pytest.approx(4, rel=0.1)


@pytest.mark.parametrize("n", [128, 512])
@pytest.mark.parametrize("d", [16, 64])
@pytest.mark.parametrize("blocks", [2, 8, 32])
def test_flash_attention_stays_within_constants_of_n2_d2_over_m(
    n: int, d: int, blocks: int
) -> None:
    sram_size = 4 * d * (n // blocks)  # d <= M <= N d up to the factor of line 1
    assert 10 <= moved(n, d, sram_size) / (n**2 * d**2 / sram_size) <= 24


def test_the_count_is_what_the_lines_say() -> None:
    n, d, sram_size = 96, 8, 512
    _, block_c = algorithm1.block_sizes(sram_size, d)
    hbm = flash(n, d, sram_size)
    passes = n // block_c
    lines_2, line_6, line_8, lines_12_13 = (
        n * d + 2 * n,
        2 * n * d,
        2 * n * d + 2 * n,
        n * d + 2 * n,
    )
    assert hbm.bytes_read == 8 * (line_6 + passes * line_8)
    assert hbm.bytes_written == 8 * (lines_2 + passes * lines_12_13)


def test_standard_attention_moves_nd_plus_n2_elements() -> None:
    for n in (64, 256, 1024):
        for d in (8, 64):
            _, hbm = algorithm1.standard_attention(*inputs(n, d))
            assert hbm.bytes_moved == 8 * (4 * n * d + 4 * n * n)


def test_flash_attention_moves_less_where_the_sram_holds_more_than_d_squared() -> None:
    q, k, v = inputs(1024, 64)
    standard = algorithm1.standard_attention(q, k, v)[1].bytes_moved
    assert flash(1024, 64, 100_000 // 4).bytes_moved < standard / 1.8


def test_sram_of_no_size_is_an_error() -> None:
    with pytest.raises(ValueError, match="sram_size is 0"):
        flash(4, 4, 0)
