"""The rules of schedule.py as device functions, for the kernels of all GPU families; and lists of
tiles in device memory, for masks that are no band.
"""

from __future__ import annotations

from typing import NamedTuple

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


__all__ = [
    "NO_LISTS", "Lists", "end_key", "entry_of", "first_key", "is_whole", "key_tiles", "line_of",
    "query_tiles", "tile_start",
]  # fmt: skip
