"""Which blocks of the score matrix count: a list for each row of blocks.

A block is `block_m` queries by `block_n` keys. A list has the blocks of its row that are not empty,
in the order of their columns. An entry is a number

    column << 1 | full

where a full block is one whose scores all count, so that nobody looks at the mask there; one that
reaches over the end of the queries or keys is not full. Lists lie one after another ("CSR"):
entries[offsets[row] : offsets[row + 1]] are those of a row, and the rows of one head after those of
another. Nothing is of the size of the score matrix.

The lists of a mask function come from its graph by interval arithmetic (score_intervals.py): large
ranges of positions first, and only those that are neither empty nor full in halves, down to the
blocks. What is still open there is looked at in halves of blocks, until both a score that counts
and one that does not are found.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..score_graph import Graph
from ..score_intervals import IntervalOperations, intervals_of
from .schedule import RULES, Band, TileCounts

Array = NDArray[Any]
EMPTY, PARTIAL, FULL = 0, 1, 2
COARSEST = 32  # blocks along the side of the ranges that are looked at first
MOST_RANGES = 1 << 21  # that are looked at within open blocks; if there are more they stay partial


class Runs(NamedTuple):
    """Blocks beside each other in a row, as many runs of them as one likes.

    Args:
        head, row: of the run.
        column: of its first block.
        length: how many blocks.
        full: whether they are.

    """

    head: Array
    row: Array
    column: Array
    length: Array
    full: Array


@dataclass(frozen=True, eq=False)
class BlockLists:
    """Lists of blocks.

    Args:
        offsets: (heads * rows + 1,), int64.
        entries: int32.
        heads: how many matrices there are.
        rows: of blocks, of a matrix.
        columns: of blocks.

    """

    offsets: Array
    entries: Array
    heads: int
    rows: int
    columns: int

    @staticmethod
    def of(runs: Runs, heads: int, rows: int, columns: int) -> BlockLists:
        """Lists of runs that are given in any order and do not overlap."""
        line = runs.head.astype(np.int64) * rows + runs.row
        order = np.argsort(line << max(columns - 1, 1).bit_length() | runs.column)
        length, column = runs.length[order], runs.column[order]
        first = np.cumsum(length) - length
        whole = (column - first) << 1 | runs.full[order]
        entries = np.repeat(whole, length) + (np.arange(length.sum()) << 1)
        of_line = np.bincount(line, weights=runs.length, minlength=heads * rows).astype(np.int64)
        offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(of_line)])
        return BlockLists(offsets, entries.astype(np.int32), heads, rows, columns)

    @staticmethod
    def from_states(states: Array) -> BlockLists:
        """Lists of a matrix (heads, rows, columns) of EMPTY, PARTIAL and FULL."""
        head, row, column = np.nonzero(states)
        full = states[head, row, column] == FULL
        return BlockLists.of(Runs(head, row, column, np.ones_like(row), full), *states.shape)

    def counts(self) -> TileCounts:
        """How many blocks of all heads are visited, whole, partial and skipped."""
        visited, whole = len(self.entries), int(np.count_nonzero(self.entries & 1))
        every = self.heads * self.rows * self.columns
        return TileCounts(visited, whole, visited - whole, every - visited)

    @property
    def places(self) -> tuple[Array, Array, Array, Array]:
        """Head, row, column and whether it is full, of each block."""
        lines = np.repeat(np.arange(self.heads * self.rows), np.diff(self.offsets))
        return lines // self.rows, lines % self.rows, self.entries >> 1, self.entries & 1 == 1

    def states(self) -> Array:
        """EMPTY, PARTIAL or FULL: (heads, rows, columns), uint8."""
        found = np.zeros((self.heads, self.rows, self.columns), np.uint8)
        head, row, column, full = self.places
        found[head, row, column] = PARTIAL + full
        return found

    def repeated(self, heads: int) -> BlockLists:
        """The lists of one matrix for several."""
        ends = np.arange(heads)[:, None] * len(self.entries) + self.offsets[1:]
        offsets = np.concatenate([np.zeros(1, np.int64), ends.ravel()])
        return replace(self, offsets=offsets, entries=np.tile(self.entries, heads), heads=heads)

    def transposed(self) -> BlockLists:
        """For each column of blocks its rows."""
        head, row, column, full = self.places
        runs = Runs(head, column, row, np.ones_like(row), full)
        return BlockLists.of(runs, self.heads, self.columns, self.rows)

    def with_whole_blocks(self, block: tuple[int, int], sizes: tuple[int, int]) -> BlockLists:
        """The same, but that blocks which reach over the end of the queries or keys are not full.

        Args:
            block: sizes of the blocks.
            sizes: seqlen_q and seqlen_k.

        """
        ragged_rows, ragged_columns = (n % size != 0 for n, size in zip(sizes, block, strict=True))
        cut = np.zeros(len(self.entries), bool)
        if ragged_columns:
            cut |= self.entries >> 1 == self.columns - 1
        if ragged_rows:
            for head in range(self.heads):
                last = (head + 1) * self.rows - 1
                cut[self.offsets[last] : self.offsets[last + 1]] = True
        entries = np.where(cut, self.entries & ~1, self.entries)
        return replace(self, entries=entries)

    def retiled(
        self, block: tuple[int, int], tile: tuple[int, int], sizes: tuple[int, int]
    ) -> BlockLists:
        """The lists for tiles of another size: a tile is empty if all blocks are that it overlaps,
        and full if all are full.

        Args:
            block: sizes of the blocks now, (block_m, block_n).
            tile: wanted sizes.
            sizes: seqlen_q and seqlen_k.

        """
        if block == tile:
            return self
        states = self.states()
        some, every = states > EMPTY, states == FULL
        for axis, (have, want, size) in enumerate(zip(block, tile, sizes, strict=True), start=1):
            begin = np.arange(0, size, want)
            first, last = begin // have, (np.minimum(begin + want, size) - 1) // have
            some = _over_ranges(some, first, last, axis) > 0
            every = _over_ranges(every, first, last, axis) == _broadcast(last - first + 1, axis)
            every &= _broadcast(begin + want <= size, axis)
        return BlockLists.from_states(some.astype(np.uint8) + every)

    def within(self, tile: tuple[int, int], band: Band) -> BlockLists:
        """What a band leaves of lists of tiles: those with a score that counts, and full ones all
        of whose scores do.
        """
        head, row, column, full = self.places
        row0, key0 = row * tile[0], column * tile[1]
        last = np.minimum(row0 + tile[0], band.seqlen_q) - 1
        end = np.minimum(key0 + tile[1], band.seqlen_k)
        seen = (row0 + band.lower < end) & (key0 < last + band.upper)
        whole = (row0 + tile[0] - 1 + band.lower <= key0) & (key0 + tile[1] <= row0 + band.upper)
        runs = Runs(head, row, column, np.ones_like(row), full & whole)
        left = Runs(*(x[seen] for x in runs))
        return BlockLists.of(left, self.heads, self.rows, self.columns)


class TileLists:
    """A mask's lists for tiles of any size, made when they are first asked for, and kept.

    Args:
        lists: of blocks.
        block: their size.
        shape: (B, H, seqlen_q, seqlen_k); 1 for B or H serves any number.

    """

    def __init__(
        self, lists: BlockLists, block: tuple[int, int], shape: tuple[int, int, int, int]
    ) -> None:
        self.lists, self.block, self.shape = lists, block, shape
        self.kept: dict[Any, Any] = {}  # whatever follows from the lists, by what it is

    def of(self, tile: tuple[int, int], lower: int, upper: int) -> BlockLists:
        """For each tile of queries its tiles of keys, within a band."""
        key = tile, lower, upper
        if key not in self.kept:
            band = Band(lower, upper, *self.shape[2:])
            retiled = self.lists.retiled(self.block, tile, self.shape[2:])
            everything = RULES.is_whole(0, band.seqlen_q, 0, band.seqlen_k, band)
            self.kept[key] = retiled if everything else retiled.within(tile, band)
        found: BlockLists = self.kept[key]
        return found

    def transposed(self, tile: tuple[int, int], lower: int, upper: int) -> BlockLists:
        """For each tile of keys its tiles of queries."""
        key = "transposed", tile, lower, upper
        if key not in self.kept:
            self.kept[key] = self.of(tile, lower, upper).transposed()
        found: BlockLists = self.kept[key]
        return found

    def head_steps(self) -> tuple[int, int]:
        """How many matrices of lists lie between those of a batch and of the next, and of a head
        and of the next; 0 where one serves all.
        """
        batches, heads = self.shape[:2]
        return heads if batches > 1 else 0, 1 if heads > 1 else 0


def _broadcast(x: Array, axis: int) -> Array:
    return x.reshape([-1 if n == axis else 1 for n in range(3)])


def _over_ranges(x: Array, first: Array, last: Array, axis: int) -> Array:
    """Sums of x[first : last + 1] along an axis."""
    width = [(1, 0) if n == axis else (0, 0) for n in range(3)]
    sums = np.cumsum(np.pad(x, width), axis, dtype=np.int32)
    return np.take(sums, last + 1, axis) - np.take(sums, first, axis)


# ----- of a mask function -----


class _Ranges(NamedTuple):
    """Ranges of positions, as many as one likes: of a head queries q0 ... q1, keys k0 ... k1."""

    head: Array
    q0: Array
    q1: Array
    k0: Array
    k1: Array

    def of(self, chosen: Array) -> _Ranges:
        """Some of them."""
        return _Ranges(*(x[chosen] for x in tuple(self)))


def lists_of_mask(
    graph: Graph,
    arrays: Sequence[Array],
    parameters: Sequence[Any],
    sizes: tuple[int, int, int, int],
    block: tuple[int, int],
) -> BlockLists:
    """The lists of a mask function.

    Args:
        graph: its graph.
        arrays, parameters: what the graph is given.
        sizes: batch, heads, seqlen_q, seqlen_k.
        block: queries and keys of a block.

    """
    batch, heads, seqlen_q, seqlen_k = sizes
    if batch * heads > 1 and not any(graph.depends_on("b", "h")):
        one = lists_of_mask(graph, arrays, parameters, (1, 1, *sizes[2:]), block)
        return one.repeated(batch * heads)
    rows, columns = -(-seqlen_q // block[0]), -(-seqlen_k // block[1])
    look = _Looker(graph, arrays, parameters, heads)
    found: list[Runs] = []
    head, row, column = (
        x.ravel() for x in np.meshgrid(
            np.arange(batch * heads), np.arange(-(-rows // COARSEST)),
            np.arange(-(-columns // COARSEST)), indexing="ij",
        )
    )  # fmt: skip
    side = COARSEST
    while True:
        ranges = _Ranges(
            head,
            row * (side * block[0]), np.minimum((row + 1) * (side * block[0]), seqlen_q) - 1,
            column * (side * block[1]), np.minimum((column + 1) * (side * block[1]), seqlen_k) - 1,
        )  # fmt: skip
        surely, possibly = look(ranges)
        found.append(_runs(head[surely], row[surely], column[surely], side, rows, columns))
        mixed = possibly & ~surely
        if side == 1:
            break
        side //= 2
        head, row, column = _quarters(head[mixed], row[mixed], column[mixed], side, rows, columns)
    some, every = look.closely(ranges.of(mixed))
    head, row, column = (x[mixed][some] for x in (head, row, column))
    found.append(Runs(head, row, column, np.ones_like(row), every[some]))
    runs = Runs(*(np.concatenate(x) for x in zip(*found, strict=True)))
    lists = BlockLists.of(runs, batch * heads, rows, columns)
    return lists.with_whole_blocks(block, (seqlen_q, seqlen_k))


def _runs(head: Array, row: Array, column: Array, side: int, rows: int, columns: int) -> Runs:
    """The blocks of full ranges of side * side blocks."""
    r = (row[:, None] * side + np.arange(side)).ravel()
    first = np.repeat(column * side, side)
    runs = Runs(np.repeat(head, side), r, first, np.minimum(side, columns - first), r >= 0)
    return Runs(*(x[r < rows] for x in runs))


def _quarters(
    head: Array, row: Array, column: Array, side: int, rows: int, columns: int
) -> tuple[Array, Array, Array]:
    """Each range in four smaller ones, of `side` * `side` blocks; those outside the matrix go."""
    r = (row[:, None] * 2 + np.array([0, 0, 1, 1])).ravel()
    c = (column[:, None] * 2 + np.array([0, 1, 0, 1])).ravel()
    inside = (r * side < rows) & (c * side < columns)
    return np.repeat(head, 4)[inside], r[inside], c[inside]


class _Looker:
    """What a mask function says of ranges."""

    def __init__(
        self, graph: Graph, arrays: Sequence[Array], parameters: Sequence[Any], heads: int
    ) -> None:
        self.graph, self.heads = graph, heads
        self.operations = IntervalOperations(arrays, parameters)

    def __call__(self, ranges: _Ranges) -> tuple[Array, Array]:
        """Whether all scores of each range surely count, and whether any possibly does."""
        b, h = ranges.head // self.heads, ranges.head % self.heads
        inputs = {
            "b": (b, b),
            "h": (h, h),
            "q": (ranges.q0, ranges.q1),
            "k": (ranges.k0, ranges.k1),
        }
        ((surely, possibly),) = intervals_of(self.graph, self.operations, inputs)
        shape = ranges.q0.shape
        return np.broadcast_to(surely, shape), np.broadcast_to(possibly, shape)

    def closely(self, ranges: _Ranges) -> tuple[Array, Array]:
        """Of open ranges whether any score counts, and whether all do: in halves, until known.

        Where it takes too long the answer is (True, False), with which a kernel looks itself.
        """
        count = len(ranges.head)
        some, lacks = np.zeros(count, bool), np.zeros(count, bool)
        owner = np.arange(count)
        while len(owner):
            if len(owner) > MOST_RANGES:
                some[owner], lacks[owner] = True, True
                break
            ranges, owner = _bisected(ranges, owner)
            surely, possibly = self(ranges)
            some[owner[surely]] = True
            lacks[owner[~possibly]] = True
            single = (ranges.q0 == ranges.q1) & (ranges.k0 == ranges.k1)
            vague = single & possibly & ~surely  # NaN, or a load that intervals do not follow
            some[owner[vague]], lacks[owner[vague]] = True, True
            open_ = possibly & ~surely & ~(some & lacks)[owner]
            ranges, owner = ranges.of(open_), owner[open_]
        return some, ~lacks


def _bisected(ranges: _Ranges, owner: Array) -> tuple[_Ranges, Array]:
    """Each range in up to four, and whose part each is."""
    q_mid, k_mid = (ranges.q0 + ranges.q1) // 2, (ranges.k0 + ranges.k1) // 2
    parts = []
    for q0, q1 in ((ranges.q0, q_mid), (q_mid + 1, ranges.q1)):
        for k0, k1 in ((ranges.k0, k_mid), (k_mid + 1, ranges.k1)):
            parts.append((ranges.head, q0, q1, k0, k1, owner))
    joined = [np.concatenate(x) for x in zip(*parts, strict=True)]
    inside = (joined[1] <= joined[2]) & (joined[3] <= joined[4])
    *bounds, owner = (x[inside] for x in joined)
    return _Ranges(*bounds), owner


__all__ = ["EMPTY", "FULL", "PARTIAL", "BlockLists", "Runs", "TileLists", "lists_of_mask"]
