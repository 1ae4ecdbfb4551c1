"""The lists of a call, cut in pieces, in device memory: made once for a mask and a tile's size."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from ...gpu.runtime import multiprocessors
from ..launch import Inputs, tile_lists
from ..pieces import cut, most_of
from ..problem import AttentionProblem
from ..schedule_cuda import Lists
from .schedule import order_of_pieces


class CutLists(NamedTuple):
    """Lists in pieces.

    Args:
        name: of these lists among all that a mask has.
        table: address of the pieces, the longest first.
        lists: in which the pieces' places are.
        piece_count: how many there are.
        lengths: of each, in tiles.
        splits: address of the lines that are cut (`pieces.Pieces.splits`).
        split_count: how many these are.
        parts: of all of them.

    """

    name: Any
    table: int
    lists: Lists
    piece_count: int
    lengths: Any
    splits: int
    split_count: int
    parts: int

    def order(self, inputs: Inputs, processors: int) -> int:
        """The address of the order in which so many blocks take the pieces."""
        assert inputs.lists is not None and inputs.on_device is not None
        name = "order", processors, *self.name
        if name not in inputs.lists.kept:
            order = order_of_pieces(self.lengths, processors)
            inputs.lists.kept[name] = inputs.on_device(name, order)
        return int(inputs.lists.kept[name])


def cut_lists(
    problem: AttentionProblem,
    inputs: Inputs,
    tile: tuple[int, int],
    transposed: bool = False,
    group: int = 1,
    empty: int | None = None,
) -> CutLists:
    """The lists for tiles of (block_m, block_n): of each tile of queries, or `transposed`.

    Args:
        problem, inputs: of the call.
        tile: its size.
        transposed: whether they are of tiles of keys.
        group: heads whose results are summed: their lists are one line.
        empty: number of a tile that is visited where a list is empty.

    """
    assert inputs.lists is not None and inputs.on_device is not None
    lists, key = inputs.lists, (tile, problem.lower, problem.upper)
    name = ("pieces", transposed, group, empty, problem.batch, problem.heads, *key)
    if name not in lists.kept:
        found = (lists.transposed if transposed else lists.of)(*key)
        shape = *lists.shape[:2], found.rows
        wide = problem.batch, problem.heads, found.rows
        first, length = (
            np.broadcast_to(x.reshape(shape), wide).reshape(-1, group, found.rows)
            for x in (found.offsets[:-1], np.diff(found.offsets))
        )
        lines = [np.moveaxis(x, 1, 2).reshape(-1, group) for x in (first, length)]
        most = most_of(int(length.sum()), multiprocessors())
        place = None if empty is None else len(found.entries)
        pieces = cut(lines[0], lines[1], most, place)
        splits = pieces.splits if len(pieces.splits) else np.zeros((1, 3), np.int32)
        lists.kept[name] = CutLists(
            name, inputs.on_device(("table", *name), pieces.table),
            tile_lists(problem, inputs, tile, transposed, empty or 0), len(pieces.table),
            pieces.lengths,
            inputs.on_device(("splits", *name), splits), len(pieces.splits), pieces.parts,
        )  # fmt: skip
    kept: CutLists = lists.kept[name]
    return kept


__all__ = ["CutLists", "cut_lists"]
