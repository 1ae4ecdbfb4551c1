"""Which tile of queries a block of the Hopper forward kernel takes, and when.

Blocks stay: block b takes tiles b, b + blocks, b + 2 blocks and so on, tile t being tile
t % tiles_of_a_head of head t // tiles_of_a_head. Under a causal mask or a window tiles differ in
length, and this would leave some blocks with long tiles only. There `order` says which tiles they
take: the longest first, each to the block that has had the least to do (Graham's LPT rule).
"""

from __future__ import annotations

import heapq
from functools import cache
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ...gpu.ptx import ld_global_nc_b32, ld_global_v4_b32
from ...gpu.runtime import ceil_div, cuda, device_function, types
from ..pieces import Piece
from ..schedule import Schedule, rules
from ..schedule_cuda import entry_of
from .tiles import Blocks, Kind

NO_TILE = 1 << 30  # in `order`: this block has no more
NO_KEYS = 1 << 30  # the first key of the tile that queries get who see none: beyond all keys
AT_ONCE = 1 << 24  # bytes of keys and values that blocks work with at one time: they stay in the L2
MOST_TILES = 1 << 16  # that are dealt out one by one: of more, each block has enough of all kinds
SHORT = 0.25  # of the longest tile, up to which a tile is kept for the end
SWITCH = 0.5  # time that a tile of queries takes beside its tiles of keys, in tiles of keys


# ----- division by numbers that are known before the launch -----
#
# A division takes a GPU some 200 cycles, and between two tiles of queries there are several, one
# after another, while the tensor cores wait.


def reciprocal(divisor: int) -> tuple[int, int]:
    """(m, p) for which n // divisor is n * m >> p, for all n < 2**31 and m < 2**32 ("Division by
    Invariant Integers using Multiplication", Granlund & Montgomery, PLDI 1994).
    """
    p = 31 + (divisor - 1).bit_length()
    return -(-(1 << p) // divisor), p


@device_function
def quotient(number, factor, shift):
    """`number` // divisor, where factor and shift are the divisor's reciprocal."""
    product = types.uint64(types.uint32(number)) * types.uint64(types.uint32(factor))
    return types.int32(product >> types.uint64(shift))


class TileSizes(NamedTuple):
    """What the forward kernel is told of its tiles; a `band` of schedule.py, too."""

    heads: int
    seqlen_q: int
    seqlen_k: int
    lower: int
    upper: int
    tiles: int  # of queries, of all heads
    value_dim: int
    head_factor: int  # reciprocal of a head's tiles
    head_shift: int
    batch_factor: int  # and of the heads of a batch
    batch_shift: int


class PiecesOnDevice(NamedTuple):
    """What the forward kernel is told of lists; 0 where there are none.

    Args:
        table: address of the `Piece`s.
        entries: of the lists' entries.
        outputs: where in the workspace, in bytes, O of parts goes, float32, (parts, block_m,
            value_dim).
        rows: and their m and l, (parts, block_m, 2).

    """

    table: int
    entries: int
    outputs: int
    rows: int


NO_PIECES = PiecesOnDevice(0, 0, 0, 0)


@device_function
def piece_at(table, number):
    """A piece of the table at an address."""
    address = types.uint64(table + 32 * types.int64(number))
    first, second = ld_global_v4_b32(address), ld_global_v4_b32(address + types.uint64(16))
    i32 = types.int32
    return Piece(
        i32(first[0]), i32(first[1]), i32(first[2]), i32(first[3]), i32(second[0]),
        i32(second[1]), i32(0), i32(0),
    )  # fmt: skip


@cache
def tile_finder(kind: Kind, blocks: Blocks) -> Any:
    """Device functions. `tile_number(order, n)`: the number of the block's n-th tile of queries, or
    piece of its list; too large if there is none. `tile_of(number, sizes, lists)`, these being
    `TileSizes` and `PiecesOnDevice`: its first row, batch and head, and the places [first, end) of
    its tiles of keys, of which there is at least one. `keys_at(place, lists)`: number of a tile of
    keys, and whether a list says that it is full.
    """
    block_m, block_n, is_sparse = blocks.block_m, blocks.block_n, kind.is_sparse
    ordered = kind.banded or is_sparse
    i32, key_tiles = types.int32, rules(device_function, types.int32).key_tiles

    @device_function
    def tile_number(order, n):
        place = i32(n * cuda.gridDim.x + cuda.blockIdx.x)
        return i32(ld_global_nc_b32(types.int64(order) + 4 * place)) if ordered else place

    @device_function
    def tile_of(number, sizes, lists):
        of_head = i32((sizes.seqlen_q + (block_m - 1)) // block_m)
        if is_sparse:
            piece = piece_at(lists.table, number)
            number = piece.line
        batch_head = quotient(number, sizes.head_factor, sizes.head_shift)
        batch = quotient(batch_head, sizes.batch_factor, sizes.batch_shift)
        tile = i32(number - batch_head * of_head)
        row0, head = i32(tile * block_m), i32(batch_head - batch * sizes.heads)
        if is_sparse:
            first, end = piece.first, piece.end
        else:
            first, end = key_tiles(row0, sizes, block_m, block_n)
            if first == end:
                first, end = NO_KEYS // block_n, NO_KEYS // block_n + 1
        return row0, batch, head, i32(first), i32(end)

    @device_function
    def keys_at(place, lists):
        return entry_of(lists, place) if is_sparse else (place, False)

    return tile_number, tile_of, keys_at


def tile_costs(schedule: Schedule) -> list[float]:
    """About how long each of a head's tiles of queries takes, in tiles of keys."""
    return [
        max(len(schedule.key_tiles(tile)), 1) + SWITCH for tile in range(schedule.query_tile_count)
    ]


def order_of_pieces(lengths: NDArray[np.int64], processors: int) -> NDArray[np.int32]:
    """The same for pieces of lists, the longest of which come first."""
    longest_first = np.arange(len(lengths))
    if len(lengths) > MOST_TILES:
        table = np.full((ceil_div(len(lengths), processors) + 2) * processors, NO_TILE, np.int32)
        table[: len(lengths)] = longest_first
        return table
    busy = [(0.0, block) for block in range(processors)]
    taken: list[list[int]] = [[] for _ in range(processors)]
    for tile in longest_first.tolist():
        time, block = busy[0]
        taken[block].append(tile)
        heapq.heapreplace(busy, (time + float(lengths[tile]) + SWITCH, block))
    return _table(taken)


def _table(taken: list[list[int]]) -> NDArray[np.int32]:
    """Two more than there are: a block knows its next tile before it is done with one."""
    table = np.full((max(map(len, taken)) + 2, len(taken)), NO_TILE, np.int32)
    for block, tiles in enumerate(taken):
        table[: len(tiles), block] = tiles
    return table.ravel()


def order(costs: list[float], heads: int, together: int, processors: int) -> NDArray[np.int32]:
    """Which tiles each block takes: element n * processors + b is block b's n-th tile.

    Args:
        costs: of the tiles of one head.
        heads: how many heads there are.
        together: heads whose tiles are dealt out together, so that their keys stay in the L2 cache.
        processors: number of blocks.

    """
    count = heads * len(costs)
    if count > MOST_TILES:
        table = np.full((ceil_div(count, processors) + 2) * processors, NO_TILE, np.int32)
        table[:count] = np.arange(count).reshape(heads, len(costs))[:, ::-1].ravel()
        return table
    busy = [(0.0, block) for block in range(processors)]
    taken: list[list[int]] = [[] for _ in range(processors)]
    longest_first = sorted(range(len(costs)), key=lambda tile: -costs[tile])
    groups = [range(first, min(first + together, heads)) for first in range(0, heads, together)]
    early = [tile for tile in longest_first if costs[tile] > SHORT * max(costs)]
    # The short tiles of all heads come last: they level out what the long ones left uneven.
    rounds = [(group, early) for group in groups] + [(range(heads), longest_first[len(early) :])]
    for group, tiles in rounds:
        for tile in tiles:
            for head in group:
                time, block = busy[0]
                taken[block].append(head * len(costs) + tile)
                heapq.heapreplace(busy, (time + costs[tile], block))
    return _table(taken)


__all__ = [
    "AT_ONCE",
    "NO_KEYS",
    "NO_PIECES",
    "NO_TILE",
    "PiecesOnDevice",
    "TileSizes",
    "order",
    "order_of_pieces",
    "piece_at",
    "quotient",
    "reciprocal",
    "tile_costs",
    "tile_finder",
]
