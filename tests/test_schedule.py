"""Which tiles are visited: against the mask of allowed positions, element by element."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from numpy.typing import NDArray

from minitorch.kernels.flash_attention.launch import heads_of, sizes_of
from minitorch.kernels.flash_attention.problem import AttentionProblem
from minitorch.kernels.flash_attention.schedule import RULES, Band, Schedule, TileCounts


def problem_of(seqlen_q: int, seqlen_k: int, **arguments: Any) -> AttentionProblem:
    shape_k = (2, seqlen_k, 8)
    return AttentionProblem.of((2, seqlen_q, 8), shape_k, shape_k, "float32", **arguments)


SIDES = st.none() | st.integers(0, 70)
PROBLEMS = st.builds(
    problem_of,
    st.integers(0, 60),
    st.integers(0, 60),
    is_causal=st.sampled_from([False, True, "bottom-right"]),
    window=st.none() | st.tuples(SIDES, SIDES),
)
BLOCKS = st.sampled_from([1, 3, 4, 8, 16, 100])


def tiles_of(allowed: NDArray[np.bool_], block_m: int, block_n: int) -> NDArray[np.bool_]:
    """(tiles of queries, tiles of keys): whether some position in a tile is allowed."""
    rows, columns = allowed.shape
    found = np.zeros((-(-rows // block_m), -(-columns // block_n)), bool)
    for i, j in zip(*np.nonzero(allowed), strict=True):
        found[i // block_m, j // block_n] = True
    return found


@given(PROBLEMS, BLOCKS, BLOCKS)
@example(problem_of(1, 60, is_causal="bottom-right", window=(7, None)), 4, 16)
@example(problem_of(60, 8, is_causal="bottom-right"), 16, 4)  # the first queries see no key
@example(problem_of(8, 60, window=(0, 0)), 3, 3)
def test_a_tile_is_visited_if_some_position_is_allowed(
    problem: AttentionProblem, block_m: int, block_n: int
) -> None:
    """By queries and by keys."""
    visited = tiles_of(problem.allowed_positions(), block_m, block_n)
    schedule = Schedule.of(problem, block_m, block_n)
    assert visited.shape == (schedule.query_tile_count, schedule.key_tile_count)
    for i, row in enumerate(visited):
        assert list(schedule.key_tiles(i)) == np.flatnonzero(row).tolist()
    for j, column in enumerate(visited.T):
        assert list(schedule.query_tiles(j)) == np.flatnonzero(column).tolist()


@given(PROBLEMS, BLOCKS, BLOCKS)
def test_a_tile_is_whole_if_no_position_is_hidden(
    problem: AttentionProblem, block_m: int, block_n: int
) -> None:
    """The rows that a last tile of queries lacks are as the band would have them."""
    schedule = Schedule.of(problem, block_m, block_n)
    rows, columns = schedule.query_tile_count * block_m, schedule.key_tile_count * block_n
    row, column = np.arange(rows)[:, None], np.arange(columns)[None, :]
    allowed = (column >= row + problem.lower) & (column < row + problem.upper)
    allowed &= column < problem.seqlen_k
    whole = ~tiles_of(~allowed, block_m, block_n)
    for i, j in np.ndindex(*whole.shape):
        assert schedule.is_whole(i, j) == whole[i, j], (i, j)
    visited = tiles_of(problem.allowed_positions(), block_m, block_n)
    counts = schedule.counts()
    assert counts.whole == np.sum(whole & visited)
    assert counts.visited == counts.whole + counts.partial == np.sum(visited)
    assert counts.visited + counts.skipped == visited.size


@given(PROBLEMS, BLOCKS, BLOCKS)
def test_the_sizes_that_kernels_get_say_the_same(
    problem: AttentionProblem, block_m: int, block_n: int
) -> None:
    """The bounds of their band are cut off, to stay within 32 bits."""
    sizes, schedule = sizes_of(problem, heads_of(problem)), Schedule.of(problem, block_m, block_n)
    for i in range(schedule.query_tile_count):
        found = RULES.key_tiles(i * block_m, sizes, block_m, block_n)
        assert range(*found) == schedule.key_tiles(i)


def test_the_rules_compiled_for_the_cpu_are_the_same() -> None:
    from minitorch.kernels.flash_attention.cpu import tiles

    for lower, upper in ((-9, 9), (-3, 1), (2, 5), (-20, -12)):
        band = Band(lower, upper, 10, 12)
        for start in range(0, 12, 4):
            for name in ("key_tiles", "query_tiles"):
                wanted = getattr(RULES, name)(start, band, 4, 3)
                assert getattr(tiles, name)(start, band, 4, 3) == wanted
            assert tiles.is_whole(start, 4, 3, 3, band) == RULES.is_whole(start, 4, 3, 3, band)


def test_counts_under_a_causal_mask() -> None:
    counts = Schedule.of(problem_of(32, 32, is_causal=True), 8, 8).counts()
    assert counts == TileCounts(visited=10, whole=6, partial=4, skipped=6)
    assert str(counts) == "10 tiles visited (6 whole, 4 partial), 6 skipped"


@pytest.mark.parametrize("mask", [np.ones((32, 32), bool), np.zeros((1, 32))])
def test_under_a_mask_no_tile_is_whole(mask: NDArray[Any]) -> None:
    counts = Schedule.of(problem_of(32, 32, is_causal=True, attn_mask=mask), 8, 8).counts()
    assert counts == TileCounts(visited=10, whole=0, partial=10, skipped=6)
