"""The rules of schedule.py as device functions, for the kernels of all GPU families; and lists of
tiles in device memory, for masks that are no band.
"""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

from ..gpu.ptx import ld_global_nc_b32
from ..gpu.runtime import device_function, types
from .schedule import rules

first_key, end_key, key_tiles, query_tiles, tile_start, is_whole = rules(device_function)


class Lists(NamedTuple):
    """Where lists of tiles are in device memory (`BlockLists`), for the lines of one direction.

    Args:
        offsets: address of where each line begins, uint32.
        entries: address of the tiles, `number << 1 | full`.
        batch: lines from those of a batch to those of the next; 0 where one serves all.
        head: lines from a head's to the next one's.

    """

    offsets: int
    entries: int
    batch: int
    head: int


NO_LISTS = Lists(0, 0, 0, 0)


@device_function
def line_of(lists, batch, head, tile):
    """Places [first, end) in the list of a tile of a head."""
    line = types.int64(batch) * lists.batch + types.int64(head) * lists.head + tile
    address = types.uint64(lists.offsets + 4 * line)
    first, end = ld_global_nc_b32(address), ld_global_nc_b32(address + types.uint64(4))
    return types.int32(first), types.int32(end)


@device_function
def entry_of(lists, place):
    """The number of the tile at a place in a list, and whether it is full."""
    entry = types.int32(ld_global_nc_b32(types.uint64(lists.entries + 4 * types.int64(place))))
    return entry >> types.int32(1), (entry & types.int32(1)) != 0


class Walk(NamedTuple):
    """How a kernel goes through the tiles that one of its own visits: device functions.

    Args:
        places: `(lists, batch, head, tile, band)`: where the tile's own list, or range, begins, and
            one past its end.
        tile_at: `(lists, place)`: the first row of the tile at a place, and whether it is full: a
            list says so, a range never.

    """

    places: Any
    tile_at: Any


@cache
def walk(is_sparse: bool, block_m: int, block_n: int, transposed: bool = False) -> Walk:
    """The walk of a tile of queries through tiles of keys, or `transposed`: by lists, or where the
    band says it.
    """
    range_of, own, passing = key_tiles, block_m, block_n
    if transposed:
        range_of, own, passing = query_tiles, block_n, block_m

    @device_function
    def places(lists, batch, head, tile, band):
        if is_sparse:
            return line_of(lists, batch, head, tile)
        return range_of(tile_start(tile, own), band, block_m, block_n)

    @device_function
    def tile_at(lists, place):
        if is_sparse:
            number, full = entry_of(lists, place)
            return tile_start(types.int64(number), passing), full
        return tile_start(place, passing), False

    return Walk(places, tile_at)


__all__ = [
    "NO_LISTS", "Lists", "Walk", "end_key", "entry_of", "first_key", "is_whole", "key_tiles",
    "line_of", "query_tiles", "tile_start", "walk",
]  # fmt: skip
