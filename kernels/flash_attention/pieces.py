"""Long lists of tiles, cut in pieces, so that no block of a GPU is busy when all others are done.

With a few global tokens some rows see every key, and most see a few: a block that went through the
whole list of such a row would take longer than all others together. What the pieces of a list give
is put together afterwards in the order of the list, so results do not depend on timing.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
FEWEST = 32  # tiles that a piece has, if its list has more


class Piece(NamedTuple):
    """What a kernel is told of a piece: eight int32.

    Args:
        line: number of the list, or of the group of lists whose results are summed.
        head: of the group, the first one that the piece is of.
        heads: how many; with more than one it is their whole lists.
        first, end: places in the list, if it is of one head.
        part: where its results go, -1 if it is all of the line.

    """

    line: Any
    head: Any
    heads: Any
    first: Any
    end: Any
    part: Any
    unused: Any = 0
    unused_too: Any = 0


class Pieces(NamedTuple):
    """Pieces of all lines, the longest first.

    Args:
        table: of `Piece`, int32.
        lengths: how many tiles each has.
        splits: of each line that is cut its number, its first part and how many there are, int32.
        parts: of all lines.

    """

    table: Array
    lengths: Array
    splits: Array
    parts: int


def most_of(tiles: int, processors: int) -> int:
    """Tiles of a piece, at most, for so many of all lines."""
    return max(FEWEST, -(-tiles // (2 * processors)))


def cut(first: Array, length: Array, most: int, empty: int | None = None) -> Pieces:
    """Pieces of at most `most` tiles.

    Args:
        first: where each list begins, (lines, lists of a line).
        length: how many tiles each has.
        most: see above.
        empty: place of a tile that stands for the list where there is none.

    """
    group = length.shape[1]
    total = length.sum(1)
    short = np.flatnonzero(total <= most)
    whole = np.zeros((len(short), len(Piece._fields)), np.int64)
    whole[:, 0], whole[:, 2], whole[:, 5] = short, group, -1
    if group == 1:
        begin, count = first[short, 0], length[short, 0]
        if empty is not None:
            begin, count = np.where(count == 0, empty, begin), np.maximum(count, 1)
        whole[:, 3], whole[:, 4] = begin, begin + count
    line, head = np.nonzero((length > 0) & (total > most)[:, None])
    count = -(-length[line, head] // most)
    number = np.arange(count.sum()) - np.repeat(np.cumsum(count) - count, count)
    line, head, each = (np.repeat(x, count) for x in (line, head, count))
    begin, size = first[line, head], length[line, head]
    parts = np.zeros((len(line), len(Piece._fields)), np.int64)
    parts[:, 0], parts[:, 1], parts[:, 2] = line, head, 1
    parts[:, 3] = begin + size * number // each
    parts[:, 4] = begin + size * (number + 1) // each
    parts[:, 5] = np.arange(len(line))
    split, start, of_line = np.unique(line, return_index=True, return_counts=True)
    lengths = np.concatenate([total[short], parts[:, 4] - parts[:, 3]])
    order = np.argsort(-lengths, kind="stable")
    table = np.concatenate([whole, parts])[order].astype(np.int32)
    splits = np.stack([split, start, of_line], 1).astype(np.int32)
    return Pieces(table, lengths[order], splits, len(line))


__all__ = ["Piece", "Pieces", "cut", "most_of"]
