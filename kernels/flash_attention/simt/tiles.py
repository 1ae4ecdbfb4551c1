"""What the GPU's forward and backward kernels do with one tile.

A tile lies in shared memory in rows that are a little longer than its width, so that the rows that
neighbouring threads read at once begin in different banks. What is beyond the end of a sequence is
filled with zeros. All tiles of a block are parts of one array, `memory`; a tile is an offset.

Which tiles a block visits is decided in schedule.py alone, and which scores count in scores.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

from ...gpu.runtime import (
    cuda,
    device_function,
    precision,
    types,
)
from ...gpu.vectors import vector_access
from ..schedule_cuda import is_whole
from ..scores import LOG2_E, NO_FUNCTIONS, Functions, Masked, Where
from ..scores_cuda import Asked, counts, keys_of, masked_score
from ..softmax import exp2_function
from .registers import (
    BYTES,
    Factor,
)

IN_FLIGHT = 8  # reads of a thread from global memory before it uses the first; half for float64


@dataclass(frozen=True)
class Kind(Masked):
    """What a kernel is compiled for, beside the sizes of its tiles.

    Args:
        precision: name of the dtype of query, key, value and their gradients.
        head_dim: D, the length of a query and of a key.
        value_dim: Dv, the length of a value.
        mask: "none", "bool", or the name of the additive mask's dtype.
        dropout: whether weights are dropped.
        vectors: whether all rows that are loaded begin at multiples of 16 bytes, and have as many.
        functions: the user's.
        is_sparse: there are lists of the tiles that are visited.

    """

    precision: str
    head_dim: int
    value_dim: int
    mask: str
    dropout: bool
    vectors: bool
    functions: Functions = NO_FUNCTIONS
    is_sparse: bool = False


@dataclass(frozen=True)
class Blocks:
    """Sizes of a block's tiles, and how its threads share them.

    Args:
        block_m: queries of a tile.
        block_n: keys of a tile.
        threads_m: threads along the queries of a tile of scores.
        threads_n: threads along its keys; 2, 4, 8 or 16.
        columns: threads along the columns of a tile of outputs or gradients; 0 for threads_n.
        at_once: blocks that a multiprocessor's registers are to be enough for.

    """

    block_m: int
    block_n: int
    threads_m: int
    threads_n: int
    columns: int = 0
    at_once: int = 1

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
        """Queries of a thread: the row of `own_place`, and every threads_m-th from there."""
        return self.block_m // self.threads_m

    @property
    def keys(self) -> int:
        """Keys of a thread: the column of `own_place`, and every threads_n-th from there."""
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


# ----- which scores -----
#
# Scores that are masked go through shared memory, where a loop may index them: unrolled, so that
# they could stay in registers, these lines would be there for every one of them.


class Scores(NamedTuple):
    """What is the same for all scores of a head.

    Args:
        band: (lower, upper, seqlen_q, seqlen_k).
        mask: the mask's array.
        place: of `head_place`.
        words: what the user's functions are given.

    """

    band: Any
    mask: Any
    place: Any
    words: Any


@cache
def tile_looker(kind: Kind, blocks: Blocks) -> Any:
    """Device function `(row0, key0, full, band)`: whether a tile's scores are looked at one by one;
    `full` is what a list says of it.
    """
    always = kind.mask != "none" or kind.functions.score is not None
    has_mask_mod, is_sparse = kind.functions.mask is not None, kind.is_sparse
    block_m, block_n = blocks.block_m, blocks.block_n

    @device_function
    def looks(row0, key0, full, band):
        if always:
            return True
        if is_sparse:
            return not full
        if has_mask_mod:
            return True
        return not is_whole(row0, block_m, key0, block_n, band)

    return looks


@cache
def place_asker(kind: Kind) -> Any:
    """Device function `(row, column, scores)`: the place that the user's functions are asked about.
    Past the end it is the last one, so that they read inside of their arrays.
    """
    has_functions = bool(kind.functions)

    @device_function
    def asked_at(row, column, scores):
        batch, head, _, _, _ = scores.place
        if not has_functions:
            return Where(batch, head, row, column)
        _, _, seqlen_q, seqlen_k = scores.band
        return Asked(batch, head, min(row, seqlen_q - 1), min(column, seqlen_k - 1), scores.words)

    return asked_at


@cache
def score_reader(kind: Kind) -> Any:
    """Device function `(score, row, column, scores)`: a score as the rule leaves it."""
    masked = masked_score(kind.mask, kind.precision, kind.functions, kind.unit_of_results)
    has_mask, asked_at = kind.mask != "none", place_asker(kind)
    has_functions = bool(kind.functions)  # what they make of no query may be NaN

    @device_function
    def score_of(score, row, column, scores):
        lower, upper, seqlen_q, seqlen_k = scores.band
        _, _, start, row_step, column_step = scores.place
        first, end = keys_of(row, lower, upper)
        sees = counts(column < seqlen_k, column, first, end)
        if has_functions:
            sees = sees & (row < seqlen_q)
        where = asked_at(row, column, scores)
        if not has_mask:
            return masked(score, sees, 0, where)
        # Where there is no number of the mask the first is read, to no effect: no branch.
        offset = types.int64(row) * row_step + types.int64(column) * column_step
        number = scores.mask[start + (offset if sees & (row < seqlen_q) else types.int64(0))]
        return masked(score, sees, number, where)

    return score_of


@cache
def exponential(kind: Kind) -> Any:
    """Device function `(score, shift)`: e to the score - shift, both in the kind's unit."""
    real, additive = precision(kind.precision).real, kind.additive
    exp2, log2_e = exp2_function(real.name), real(LOG2_E)

    @device_function
    def exp_of(score, shift):
        if additive:
            return exp2((score - shift) * log2_e)
        return exp2(score - shift)

    return exp_of


@cache
def score_masker(kind: Kind, blocks: Blocks, tile: int, step: int, before: Any = None) -> Any:
    """Device function `(memory, sums, row0, key0, scores)`: `score_reader` of a thread's scores, by
    way of its elements of a tile.

    `before` is a device function `(memory, place, row, column, scores)`, which is called for each
    of them before the rule, while memory[place] is scale Q K^T.
    """
    score_of, has_before = score_reader(kind), before is not None
    threads_m, threads_n, keys = blocks.threads_m, blocks.threads_n, blocks.keys
    count, place_of = blocks.rows * keys, own_place(threads_n)
    put, get = tile_access(blocks, step)

    @device_function
    def apply_mask(memory, sums, row0, key0, scores):
        my_row, my_key = place_of()
        put(memory, tile + my_row * step + my_key, sums)
        for number in range(count):
            r = my_row + number // keys * threads_m
            c = my_key + number % keys * threads_n
            place = tile + r * step + c
            if has_before:
                before(memory, place, row0 + r, key0 + c, scores)
            memory[place] = score_of(memory[place], row0 + r, key0 + c, scores)
        get(memory, tile + my_row * step + my_key, sums)

    return apply_mask


@cache
def tile_access(blocks: Blocks, step: int) -> Any:
    """Device functions `put` and `get` (memory, own, sums): a thread's elements of a tile of
    scores, of which the first is at `own`, from `sums` or into them.
    """
    rows, keys, threads_n = blocks.rows, blocks.keys, blocks.threads_n
    apart = blocks.threads_m * step

    @device_function
    def put(memory, own, sums):
        for i in range(rows):
            for j in range(keys):
                memory[own + i * apart + j * threads_n] = sums[i, j]

    @device_function
    def get(memory, own, sums):
        for i in range(rows):
            for j in range(keys):
                sums[i, j] = memory[own + i * apart + j * threads_n]

    return put, get


# ----- tiles in -----


class Copier(NamedTuple):
    """How the threads of a block copy a tile, in two halves: read a batch, then write it."""

    fetch: Any
    place: Any
    batches: int
    found: int  # numbers of a batch that a thread keeps


@cache
def tile_copier(
    kind: Kind, blocks: Blocks, rows: int, columns: int, width: int, step: int
) -> Copier:
    """Device functions that copy (rows, columns) of a matrix to a tile.

    `fetch(found, number, x, start, row_step, column_step, count)` reads a batch of the matrix,
    which begins at x[start] and has `count` rows. `place(found, number, memory, tile, count,
    factor)` writes them, times a factor, and zeros beyond the end.

    Args:
        kind: says the dtype, and whether rows come 16 bytes at a time.
        blocks: whose threads do it.
        rows: of the tile.
        columns: of the matrix.
        width: columns of the tile.
        step: distance of its rows.

    """
    numbers = precision(kind.precision)
    real, load, threads = numbers.real, numbers.load, blocks.threads
    storage, zero = getattr(types, numbers.storage.name), real(0.0)
    at_once = BYTES // numbers.storage.itemsize if kind.vectors else 1
    group = vector_lanes(kind.precision) if kind.vectors else 1
    read, _ = vector_access(at_once)
    _, write = vector_access(group)
    pieces_of_row = -(-width // at_once)
    pieces = rows * pieces_of_row
    turns = -(-pieces // threads)
    in_flight = IN_FLIGHT * 4 // (real.bitwidth // 8)
    batch = next(n for n in range(min(turns, in_flight), 0, -1) if turns % n == 0)
    ragged, uint = pieces % threads != 0, types.uint32
    # Rows of a thread's pieces lie a constant apart, in one column, if rows divide the threads.
    regular, apart = threads % pieces_of_row == 0, threads // pieces_of_row
    exact = regular and not ragged and columns == width

    @device_function
    def piece_at(turn):
        """Row and column of a thread's piece."""
        if regular:
            piece = uint(cuda.threadIdx.x)
            row = types.int32(piece // uint(pieces_of_row)) + turn * apart
        else:
            piece = uint(cuda.threadIdx.x + turn * threads)
            row = types.int32(piece // uint(pieces_of_row))
        return row, types.int32(piece % uint(pieces_of_row)) * at_once

    @device_function
    def fetch(found, number, x, start, row_step, column_step, count):
        got = cuda.local.array(at_once, storage)
        if exact and count >= rows:
            row, column = piece_at(number * batch)
            first = start + row * row_step + column * column_step
            for n in range(batch):
                read(x, first + n * apart * row_step, got)
                for k in range(at_once):
                    found[n * at_once + k] = got[k]
        else:
            for n in range(batch):
                row, column = piece_at(number * batch + n)
                if columns:
                    # What is beyond the end is read elsewhere: a branch would hold up the others.
                    r = min(types.int64(row), types.int64(count - 1))
                    c = min(types.int64(column), types.int64(columns - at_once))
                    read(x, start + r * row_step + c * column_step, got)
                for k in range(at_once):
                    found[n * at_once + k] = got[k]

    @device_function
    def place(found, number, memory, tile, count, factor):
        made = cuda.local.array(group, real)
        for n in range(batch):
            row, column = piece_at(number * batch + n)
            inside = row < count and column < columns
            for part in range(0, at_once, group):
                for k in range(group):
                    value = load(found[n * at_once + part + k]) * factor
                    made[k] = value if inside else zero
                if not ragged or cuda.threadIdx.x + (number * batch + n) * threads < pieces:
                    write(memory, tile + types.int64(row) * step + column + part, made)

    return Copier(fetch, place, turns // batch, batch * at_once)


@cache
def tile_loader(kind: Kind, copier: Copier) -> Any:
    """Device function `(memory, tile, x, start, row_step, column_step, count, factor)` that copies
    a tile.
    """
    storage = getattr(types, precision(kind.precision).storage.name)
    fetch, place, batches, size = copier

    @device_function
    def load_tile(memory, tile, x, start, row_step, column_step, count, factor):
        found = cuda.local.array(size, storage)
        for number in range(batches):
            fetch(found, number, x, start, row_step, column_step, count)
            place(found, number, memory, tile, count, factor)

    return load_tile


@cache
def pair_loader(kind: Kind, copier: Copier, other: Copier) -> Any:
    """Device function `(memory, first, second, count, factor)` that copies two tiles of as many
    rows, each given as (tile, x, start, row_step, column_step), the first times a factor.

    It waits until all threads of the block are done with what was there before; if they are small,
    both tiles are on their way meanwhile.
    """
    numbers = precision(kind.precision)
    storage, one = getattr(types, numbers.storage.name), numbers.real(1.0)
    fetch, place, batches, size = copier
    fetch_other, place_other, other_batches, other_size = other
    together = batches == 1 and other_batches == 1

    @device_function
    def load_pair(memory, first, second, count, factor):
        found = cuda.local.array(size, storage)
        found_other = cuda.local.array(other_size, storage)
        tile, x, start, row_step, column_step = first
        tile_2, x_2, start_2, row_step_2, column_step_2 = second
        if together:
            fetch(found, 0, x, start, row_step, column_step, count)
            fetch_other(found_other, 0, x_2, start_2, row_step_2, column_step_2, count)
            cuda.syncthreads()
            place(found, 0, memory, tile, count, factor)
            place_other(found_other, 0, memory, tile_2, count, one)
        else:
            cuda.syncthreads()
            for number in range(batches):
                fetch(found, number, x, start, row_step, column_step, count)
                place(found, number, memory, tile, count, factor)
            for number in range(other_batches):
                fetch_other(found_other, number, x_2, start_2, row_step_2, column_step_2, count)
                place_other(found_other, number, memory, tile_2, count, one)

    return load_pair


# ----- parts of tiles -----


@cache
def own_place(threads: int) -> Any:
    """Device function: a thread's row and column in a block of `threads` columns of threads.

    Bit 1 of its number belongs to the row, the bits beside it to the column. The hardware serves a
    warp's 16-byte reads of shared memory in four steps, and in two if threads n and n ^ 1, or n and
    n ^ 2, read at one address: so it is here for the factor that is shared along rows, and for the
    one that is shared along columns.
    """
    uint = types.uint32
    one, two, high, above = uint(1), uint(2), uint(threads // 2 - 1), uint(threads.bit_length())

    @device_function
    def place():
        thread = uint(cuda.threadIdx.x)
        row = (thread >> one & one) | thread >> above << one
        column = (thread & one) | (thread >> two & high) << one
        return types.int64(uint(row)), types.int64(uint(column))

    return place


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
