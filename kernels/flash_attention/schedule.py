"""Which tiles a block visits: the one rule, in device functions that all GPU families call.

The band of an attention problem lets query i see keys i + lower ... i + upper - 1, so that a tile
of queries has to do with one range of tiles of keys, and, with the bounds turned over, a tile of
keys with one range of tiles of queries.
"""

from __future__ import annotations

from ..gpu.runtime import device_function


@device_function
def tile_range(first_row, last_row, lower, upper, length, block):
    """Numbers [first, end) of the tiles of `block` columns with which rows first_row ... last_row
    have to do: those of columns row + lower ... row + upper - 1 within [0, length).
    """
    begin = min(max(first_row + lower, 0), length)
    end = min(max(last_row + upper, 0), length)
    first, last = begin // block, (end + block - 1) // block
    return first, max(first, last) if begin < end else first


@device_function
def tile_start(number, block):
    """The first column of a tile of `tile_range`."""
    return number * block


@device_function
def is_whole(row0, rows, key0, keys, lower, upper, seqlen_k):
    """Whether the band, and the end of the keys, let all rows of a tile see all of its keys."""
    return (
        key0 + keys <= seqlen_k and row0 + rows - 1 + lower <= key0 and key0 + keys <= row0 + upper
    )


__all__ = ["is_whole", "tile_range", "tile_start"]
