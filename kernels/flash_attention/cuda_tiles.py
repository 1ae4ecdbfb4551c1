"""What the GPU's forward and backward kernels do with one tile.

A tile lies in shared memory in rows that are a little longer than its width, so that the rows that
neighbouring threads read at once begin in different banks. What is beyond the end of a sequence is
filled with zeros. All tiles of a block are parts of one array, `memory`; a tile is an offset.

Which tiles a block visits is decided by `tile_range` and `tile_start` alone, and which scores count
by `masked_score` alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

from ..philox import philox4x32
from ..runtime import NEGATIVE_INFINITY, cuda, device_function, precision, types
from ..vectors_cuda import vector_access
from .cuda_registers import BYTES, Factor


@dataclass(frozen=True)
class Kind:
    """What a kernel is compiled for, beside the sizes of its tiles.

    Args:
        precision: name of the dtype of query, key, value and their gradients.
        head_dim: D, the length of a query and of a key.
        value_dim: Dv, the length of a value.
        mask: "none", "bool", or the name of the additive mask's dtype.
        dropout: whether weights are dropped.
        vectors: whether all rows that are loaded begin at multiples of 16 bytes, and have as many.

    """

    precision: str
    head_dim: int
    value_dim: int
    mask: str
    dropout: bool
    vectors: bool


@dataclass(frozen=True)
class Blocks:
    """Sizes of a block's tiles, and how its threads share them.

    Args:
        block_m: queries of a tile.
        block_n: keys of a tile.
        threads_m: threads along the queries of a tile of scores.
        threads_n: threads along its keys; 2, 4, 8, 16 or 32.
        columns: threads along the columns of a tile of outputs or gradients; 0 for threads_n.

    """

    block_m: int
    block_n: int
    threads_m: int
    threads_n: int
    columns: int = 0

    @property
    def threads_d(self) -> int:
        """Threads along the columns of a tile of outputs or gradients."""
        return self.columns or self.threads_n

    @property
    def threads(self) -> int:
        """Of the block."""
        return self.threads_m * self.threads_n

    @property
    def rows(self) -> int:
        """Queries of a thread: number `thread // threads_n` and every threads_m-th from there."""
        return self.block_m // self.threads_m

    @property
    def keys(self) -> int:
        """Keys of a thread: number `thread % threads_n` and every threads_n-th from there."""
        return self.block_n // self.threads_n


@cache
def vector_lanes(precision_name: str) -> int:
    """Numbers of the arithmetic's type in 16 bytes."""
    bits: int = precision(precision_name).real.bitwidth
    return 8 * BYTES // bits


def tile_width(columns: int, threads: int, lanes: int) -> int:
    """Columns of a tile whose columns `threads` threads share in groups of `lanes`."""
    group = threads * lanes
    return -(-max(columns, 1) // group) * group


def row_step(columns: int, lanes: int) -> int:
    """Distance of the rows of a tile that threads read along the row: an odd number of vectors, so
    that those of neighbouring rows lie in different banks.
    """
    return (-(-max(columns, 1) // lanes) | 1) * lanes


# ----- which tiles -----


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


# ----- which scores -----


@cache
def masked_score(kind: Kind) -> Any:
    """Device function: a score in units of log 2, given its row and column, as the mask leaves it.

    -inf where the query may not see the key. An additive mask is added.
    """
    real = precision(kind.precision).real
    nothing, log2_e = real(NEGATIVE_INFINITY), real(1.4426950408889634)
    no_mask, is_bool = kind.mask == "none", kind.mask == "bool"
    load = precision("float32" if no_mask or is_bool else kind.mask).load

    @device_function
    def score_of(
        score, row, column, lower, upper, seqlen_q, seqlen_k, mask, mask_start, mask_row,
        mask_column,
    ):  # fmt: skip
        if column >= seqlen_k or column < row + lower or column >= row + upper:
            return nothing
        if no_mask or row >= seqlen_q:
            return score
        place = mask_start + types.int64(row) * mask_row + types.int64(column) * mask_column
        if is_bool:
            return score if mask[place] != 0 else nothing
        return score + real(load(mask[place])) * log2_e

    return score_of


philox = device_function(philox4x32)
_WORD = types.uint64(0xFFFFFFFF)


@cache
def dropout_factor(real_name: str) -> Any:
    """Device function: keep_scale where a weight is kept, 0 where it is dropped (see philox.py)."""
    real = getattr(types, real_name)

    @device_function
    def factor_of(seed, threshold, keep_scale, batch_head, row, column):
        low = seed & _WORD
        high = seed >> types.uint64(32)
        words = philox(
            types.uint64(column >> 2), types.uint64(row), types.uint64(batch_head),
            types.uint64(0), low, high,
        )  # fmt: skip
        number = column & 3
        word = words[0] if number == 0 else words[1]
        if number >= 2:
            word = words[2] if number == 2 else words[3]
        return keep_scale if word >= threshold else real(0.0)

    return factor_of


# ----- tiles in -----


@cache
def tile_loader(kind: Kind, blocks: Blocks, rows: int, columns: int, width: int, step: int) -> Any:
    """Device function that copies (rows, columns) of a matrix to a tile, times a factor.

    Args:
        kind: says the dtype, and whether rows come 16 bytes at a time.
        blocks: whose threads do it.
        rows: of the tile.
        columns: of the matrix.
        width: columns of the tile, those from `columns` on 0.
        step: distance of its rows.

    Returns:
        `(memory, tile, x, start, row_step, column_step, count, factor)`: rows from `count` on are
        0. The matrix begins at x[start].

    """
    numbers = precision(kind.precision)
    real, load, threads = numbers.real, numbers.load, blocks.threads
    lanes = vector_lanes(kind.precision)
    at_once = BYTES // numbers.storage.itemsize if kind.vectors else 1
    read, _ = vector_access(at_once)
    _, write = vector_access(lanes if at_once > 1 else 1)
    group = lanes if at_once > 1 else 1
    # Where rows are not whole pieces, the last one is zero from `columns` on.
    pieces_of_row = -(-width // at_once)
    pieces = rows * pieces_of_row
    storage = getattr(types, numbers.storage.name)
    uint = types.uint32

    @device_function
    def load_tile(memory, tile, x, start, row_step, column_step, count, factor):
        found = cuda.local.array(at_once, storage)
        made = cuda.local.array(group, real)
        for turn in range((pieces + threads - 1) // threads):
            piece = uint(cuda.threadIdx.x + turn * threads)
            row, column = piece // uint(pieces_of_row), piece % uint(pieces_of_row) * uint(at_once)
            if piece < uint(pieces):
                inside = row < count and column < uint(columns)
                if inside:
                    read(x, start + types.int64(row) * row_step + column * column_step, found)
                for part in range(at_once // group):
                    for k in range(group):
                        number = load(found[part * group + k]) * factor if inside else real(0.0)
                        made[k] = number
                    place = types.int64(row * uint(step) + column) + part * group
                    write(memory, tile + place, made)

    return load_tile


# ----- parts of tiles -----


def own_rows(blocks: Blocks, step: int) -> Factor:
    """A thread's rows of a tile of queries."""
    return Factor(blocks.rows, blocks.threads_m * step)


def own_keys(blocks: Blocks, step: int) -> Factor:
    """A thread's rows of a tile of keys or values."""
    return Factor(blocks.keys, blocks.threads_n * step)


def own_columns(width: int, threads: int, lanes: int, step: int) -> Factor:
    """A thread's columns of a tile: groups of `lanes` neighbours, of every `threads`-th group."""
    return Factor(width // threads, threads * lanes, step)


@device_function
def fill(sums, rows, columns, value):
    """A thread's sums become `value`."""
    for i in range(rows):
        for j in range(columns):
            sums[i, j] = value


__all__ = ["Blocks", "Kind"]
