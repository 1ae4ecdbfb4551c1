"""Which tiles a pass visits: here it is decided that key tile 7 is skipped, and nowhere else.

The band of an attention problem lets query i see keys i + lower ... i + upper - 1 (scores.py). So a
tile of queries has to do with one range of tiles of keys, and a tile of keys with one range of
tiles of queries. A tile that is visited is whole if all its queries see all its keys; only the
others are masked, score by score.

`rules` holds the arithmetic, as Python functions that every compiler takes: `Schedule` calls them
as they are, `cpu/tiles.py` compiles them for the CPU, `schedule_cuda.py` for the GPU. `Schedule`
is what the host reads: the user's `explain`, the order in which Hopper's blocks take their tiles,
tests, and whatever shows a pass step by step.

A mask that is no band has lists of tiles (block_lists.py). A kernel then goes through places in a
list where it would go through a range: by `walk` of schedule_cuda.py on a GPU, by `next_tile` and
`query_places` of cpu/tiles.py on the CPU.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

from . import scores
from .problem import AttentionProblem


class Band(NamedTuple):
    """Query i sees keys i + lower ... i + upper - 1, those that there are."""

    lower: Any
    upper: Any
    seqlen_q: Any
    seqlen_k: Any


class Rules(NamedTuple):
    """The functions of `rules`.

    A `band` is whatever has the fields of `Band`: a problem, a `Schedule`, the sizes that a kernel
    is given. A tile of block_m queries begins at row0, one of block_n keys at key0.

    Args:
        first_key: `(row, band)`: the first key that a query may see.
        end_key: `(row, band)`: one past the last.
        key_tiles: `(row0, band, block_m, block_n)`: numbers [first, end) of the tiles of keys that
            a tile of queries visits.
        query_tiles: `(key0, band, block_m, block_n)`: and of queries, for a tile of keys.
        tile_start: `(number, block)`: the first row of a tile.
        is_whole: `(row0, rows, key0, keys, band)`: whether the band, and the end of the keys, let
            all rows of a tile see all of its keys. Rows beyond the last query count, too.

    """

    first_key: Any
    end_key: Any
    key_tiles: Any
    query_tiles: Any
    tile_start: Any
    is_whole: Any


def rules(compiled: Callable[[Any], Any], number: Any = None) -> Rules:
    """The rules, each function made by the decorator `compiled`.

    `number` is the type that the number of a tile's last row gets; if None, what it has anyway.
    """
    as_number = compiled(lambda x: x) if number is None else number
    keys_of, queries_of = compiled(scores.keys_of), compiled(scores.queries_of)

    @compiled
    def first_key(row, band):
        return min(max(keys_of(row, band.lower, band.upper)[0], 0), band.seqlen_k)

    @compiled
    def end_key(row, band):
        return min(max(keys_of(row, band.lower, band.upper)[1], 0), band.seqlen_k)

    @compiled
    def first_query(key, band):
        return min(max(queries_of(key, band.lower, band.upper)[0], 0), band.seqlen_q)

    @compiled
    def end_query(key, band):
        return min(max(queries_of(key, band.lower, band.upper)[1], 0), band.seqlen_q)

    @compiled
    def covering(begin, end, block):
        """Numbers [first, end) of the tiles that hold begin ... end - 1."""
        first, last = begin // block, (end + block - 1) // block
        return first, max(first, last) if begin < end else first

    @compiled
    def key_tiles(row0, band, block_m, block_n):
        last_row = as_number(min(row0 + block_m, band.seqlen_q) - 1)
        return covering(first_key(row0, band), end_key(last_row, band), block_n)

    @compiled
    def query_tiles(key0, band, block_m, block_n):
        last_key = as_number(min(key0 + block_n, band.seqlen_k) - 1)
        return covering(first_query(key0, band), end_query(last_key, band), block_m)

    @compiled
    def tile_start(number, block):
        return number * block

    @compiled
    def is_whole(row0, rows, key0, keys, band):
        return (
            key0 + keys <= band.seqlen_k
            and keys_of(row0 + rows - 1, band.lower, band.upper)[0] <= key0
            and key0 + keys <= keys_of(row0, band.lower, band.upper)[1]
        )

    return Rules(first_key, end_key, key_tiles, query_tiles, tile_start, is_whole)


RULES = rules(lambda function: function)


class TileCounts(NamedTuple):
    """Of the tiles of scores of one head, or of several.

    Args:
        visited: that are computed: whole and partial ones.
        whole: all of whose scores count.
        partial: which are masked, score by score.
        skipped: that are not visited.

    """

    visited: int
    whole: int
    partial: int
    skipped: int

    def __str__(self) -> str:
        kinds = f"{self.whole} whole, {self.partial} partial"
        return f"{self.visited} tiles visited ({kinds}), {self.skipped} skipped"


@dataclass(frozen=True)
class Schedule:
    """Which tiles of scores one head's pass visits, for given sizes of tiles.

    Args:
        seqlen_q: number of queries.
        seqlen_k: number of keys.
        lower: query i sees keys from i + lower on.
        upper: it sees keys before i + upper.
        block_m: queries of a tile.
        block_n: keys of a tile.
        masked: there is an attn_mask, so that no tile is whole.

    """

    seqlen_q: int
    seqlen_k: int
    lower: int
    upper: int
    block_m: int
    block_n: int
    masked: bool = False

    @staticmethod
    def of(problem: AttentionProblem, block_m: int, block_n: int) -> Schedule:
        """The schedule of a problem, in tiles of block_m queries by block_n keys."""
        return Schedule(
            problem.seqlen_q, problem.seqlen_k, problem.lower, problem.upper, block_m, block_n,
            problem.mask_kind != "none",
        )  # fmt: skip

    @property
    def query_tile_count(self) -> int:
        """How many tiles the queries make."""
        return -(-self.seqlen_q // self.block_m)

    @property
    def key_tile_count(self) -> int:
        """How many tiles the keys make."""
        return -(-self.seqlen_k // self.block_n)

    def key_tiles(self, query_tile: int) -> range:
        """Numbers of the tiles of keys that a tile of queries visits; all others are skipped."""
        row0 = RULES.tile_start(query_tile, self.block_m)
        return range(*RULES.key_tiles(row0, self, self.block_m, self.block_n))

    def query_tiles(self, key_tile: int) -> range:
        """Numbers of the tiles of queries that a tile of keys visits: the transpose."""
        key0 = RULES.tile_start(key_tile, self.block_n)
        return range(*RULES.query_tiles(key0, self, self.block_m, self.block_n))

    def is_whole(self, query_tile: int, key_tile: int) -> bool:
        """Whether no score of a tile is masked. Of a last tile that the queries do not fill, the
        rows beyond their end count, too.
        """
        row0 = RULES.tile_start(query_tile, self.block_m)
        key0 = RULES.tile_start(key_tile, self.block_n)
        return not self.masked and RULES.is_whole(row0, self.block_m, key0, self.block_n, self)

    def counts(self) -> TileCounts:
        """How many tiles are visited, whole, partial and skipped."""
        visited = whole = 0
        for query_tile in range(self.query_tile_count):
            tiles = self.key_tiles(query_tile)
            visited += len(tiles)
            whole += self._whole_tiles(query_tile, tiles)
        every = self.query_tile_count * self.key_tile_count
        return TileCounts(visited, whole, visited - whole, every - visited)

    def _whole_tiles(self, query_tile: int, tiles: range) -> int:
        """How many of a range are whole: they are neighbours, so it is searched from both ends."""
        if self.masked:
            return 0
        first = next((n for n in tiles if self.is_whole(query_tile, n)), None)
        if first is None:
            return 0
        return next(n for n in reversed(tiles) if self.is_whole(query_tile, n)) - first + 1


__all__ = ["RULES", "Band", "Rules", "Schedule", "TileCounts", "rules"]
