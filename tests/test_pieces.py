"""Long lists of tiles, cut in pieces: each tile is in one piece, in order, and none is too long."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from minitorch.kernels.flash_attention.pieces import FEWEST, Piece, Pieces, cut, most_of


def pieces_of_line(pieces: Pieces, line: int) -> list[Piece]:
    found = [Piece(*row) for row in pieces.table.tolist() if row[0] == line]
    return sorted(found, key=lambda piece: piece.part)


@given(
    st.integers(1, 4),
    st.lists(st.integers(0, 40), min_size=1, max_size=12),
    st.integers(1, 17),
)
def test_pieces_of_lists(group: int, lengths: list[int], most: int) -> None:
    length = np.array(lengths * group).reshape(-1, group)
    first = (np.cumsum(length.ravel()) - length.ravel()).reshape(length.shape)
    pieces = cut(first, length, most)
    assert sorted(pieces.lengths, reverse=True) == pieces.lengths.tolist()
    splits = {line: (start, count) for line, start, count in pieces.splits.tolist()}
    for line in range(len(length)):
        found = pieces_of_line(pieces, line)
        if length[line].sum() <= most:
            (piece,) = found
            assert piece.part == -1 and piece.heads == group and line not in splits
            assert group > 1 or (piece.first, piece.end) == (first[line, 0], sum(
                (first[line, 0], length[line, 0])
            ))  # fmt: skip
            continue
        start, count = splits[line]
        assert [piece.part for piece in found] == list(range(start, start + count))
        visited = [
            (piece.head, place) for piece in found for place in range(piece.first, piece.end)
        ]
        assert visited == [
            (head, place)
            for head in range(group)
            for place in range(first[line, head], first[line, head] + length[line, head])
        ]
        assert all(0 < piece.end - piece.first <= most and piece.heads == 1 for piece in found)
    assert pieces.parts == sum(count for _, count in splits.values())


def test_an_empty_list_gets_a_tile() -> None:
    pieces = cut(np.array([[0], [3], [3]]), np.array([[3], [0], [2]]), 9, empty=77)
    (empty,) = pieces_of_line(pieces, 1)
    assert (empty.first, empty.end, empty.part) == (77, 78, -1)


def test_pieces_are_long_enough_to_be_worth_it_and_short_enough_to_share() -> None:
    assert most_of(100, 132) == FEWEST
    assert most_of(26400, 132) == 100
