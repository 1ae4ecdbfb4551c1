"""Which tiles the blocks of the Hopper forward kernel take: pure functions of whole numbers."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minitorch.kernels.flash_attention.hopper import launch as hopper
from minitorch.kernels.flash_attention.hopper import schedule as hopper_schedule
from minitorch.kernels.flash_attention.hopper.forward_loaders import forward_memory
from minitorch.kernels.flash_attention.hopper.schedule import NO_TILE, order, reciprocal, tile_costs
from minitorch.kernels.flash_attention.hopper.tiles import HEAD_SIZES, Blocks, Kind, padded, parts
from minitorch.kernels.flash_attention.problem import AttentionProblem
from minitorch.kernels.flash_attention.schedule import Schedule

BLOCKS = Blocks(2, 128)


@given(st.integers(1, 2**31 - 1), st.integers(0, 2**31 - 1), st.integers(0, 3))
def test_reciprocals_divide(divisor: int, number: int, beside: int) -> None:
    m, p = reciprocal(divisor)
    multiple = number // divisor * divisor
    for n in (number, max(multiple - beside, 0), multiple + beside, 2**31 - 1 - beside):
        if n < 2**31:
            assert n * m >> p == n // divisor
    assert m < 2**32 and p < 64


def taken_by_each(table: np.ndarray, processors: int) -> list[list[int]]:
    """The tiles of each block, up to the first that is none."""
    assert table.size % processors == 0
    columns = table.reshape(-1, processors).T
    return [list(column[: int(np.argmax(column == NO_TILE))]) for column in columns]


@given(
    st.lists(st.integers(1, 20), min_size=1, max_size=12),
    st.integers(1, 20),
    st.integers(1, 25),
    st.integers(1, 9),
)
def test_every_tile_is_taken_once(
    costs: list[float], heads: int, together: int, processors: int
) -> None:
    table = order(costs, heads, together, processors)
    taken = taken_by_each(table, processors)
    assert sorted(tile for tiles in taken for tile in tiles) == list(range(heads * len(costs)))
    # A block asks for its next tile before it has done the last one, and once more in the end.
    assert table.size >= processors * (max(map(len, taken)) + 2)


def test_more_tiles_than_are_dealt_out_singly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hopper_schedule, "MOST_TILES", 30)
    taken = taken_by_each(order([1, 2, 3, 4], 10, 2, 7), 7)
    assert sorted(tile for tiles in taken for tile in tiles) == list(range(40))
    assert all(len(tiles) in (5, 6) for tiles in taken)


@pytest.mark.parametrize("length", [512, 1024, 4096, 16384])
def test_causal_blocks_have_about_the_same_to_do(length: int) -> None:
    """132 multiprocessors, 16,384 tokens, 16 heads: none has more than 3% above the mean."""
    heads, processors = 16 * 16384 // length, 132
    costs = tile_costs(schedule(length, length, -2 * length, 1))
    together = hopper_schedule.AT_ONCE // (length * 512)
    taken = taken_by_each(order(costs, heads, together, processors), processors)
    work = [sum(costs[tile % len(costs)] for tile in tiles) for tiles in taken]
    assert max(work) < 1.03 * np.mean(work)


def schedule(seqlen_q: int, seqlen_k: int, lower: int, upper: int) -> Schedule:
    return Schedule(seqlen_q, seqlen_k, lower, upper, BLOCKS.block_m, BLOCKS.block_n)


def test_costs_are_the_keys_that_a_tile_sees() -> None:
    far, switch = 5000, hopper_schedule.SWITCH
    causal = tile_costs(schedule(512, 512, -far, 1))
    assert causal == [n + switch for n in (1, 2, 3, 4)]
    window = tile_costs(schedule(512, 512, -100, 1))
    assert window == [n + switch for n in (1, 2, 2, 2)]
    assert tile_costs(schedule(200, 0, -far, far)) == [1 + switch] * 2
    # The first queries of a bottom-right mask with fewer keys see none, and get one tile still.
    assert tile_costs(schedule(300, 44, -far, 44 - 300 + 1)) == [1 + switch] * 3


def test_head_sizes_are_padded() -> None:
    assert [padded(n) for n in (1, 64, 65, 96, 128, 136, 193, 256)] == [
        64, 64, 96, 96, 128, 192, 256, 256,
    ]  # fmt: skip
    assert [parts(n) for n in HEAD_SIZES] == [1, 2, 2, 3, 4]


@pytest.mark.parametrize("size", HEAD_SIZES)
@pytest.mark.parametrize("banded", [False, True])
@pytest.mark.parametrize("mask", ["none", "bool", "float32"])
@pytest.mark.parametrize("dropout", [False, True])
def test_tiles_fit_in_shared_memory(size: int, banded: bool, mask: str, dropout: bool) -> None:
    """227 KiB, what a block may have on compute capability 9.0."""
    kind = Kind("float16", size, size, mask, dropout, banded=banded)
    for length in (100, 10_000):
        blocks = hopper.forward_blocks(kind, length)
        memory = forward_memory(kind, blocks)
        assert memory.size <= 227 * 1024
        begins = (memory.q, memory.k, memory.v)
        assert all(begin % 1024 == 0 for begin in begins), "the swizzle repeats every 1024 bytes"


def problem_of(dtype: str = "float16", size: int = 64, **arguments: object) -> AttentionProblem:
    shape = (2, 3, 50, size)
    return AttentionProblem.of(shape, shape, shape, dtype, **arguments)  # type: ignore[arg-type]


def test_what_is_taken() -> None:
    assert hopper.why_not(problem_of(), (9, 0)) is None
    assert "Hopper" in str(hopper.why_not(problem_of(), (8, 0)))
    assert "float32" in str(hopper.why_not(problem_of("float32"), (9, 0)))
    assert "264" in str(hopper.why_not(problem_of(size=264), (9, 0)))
    assert hopper.why_not(problem_of(size=111, is_causal=True, dropout_p=0.5), (9, 0)) is None


def test_tiles_in_words() -> None:
    assert "queries x" in hopper.tiles(problem_of(), (9, 0))
