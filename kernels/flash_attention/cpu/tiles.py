"""What the CPU's forward and backward kernels do with one tile.

Every tile lies in one array, the worker's workspace `w`, which stays in the level-2 cache: a tile
is an offset into it and a leading dimension, the distance between its rows. Leading dimensions are
odd numbers of vectors, so that the rows of a power-of-two matrix do not compete for the same cache
sets. Padding (rows up to a multiple of the register block, columns up to its width) is filled with
zeros, so that what lies beyond the end of a sequence is never read.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from ... import philox
from ...cpu import simd_matrix, threads
from ...cpu.compiler import njit
from ...cpu.simd import (
    block_columns,
    block_rows,
    count_from,
    exp2,
    lanes,
    load,
    max_of,
    maximum,
    select_bytes,
    splat,
    store,
    store_thresholds,
    sum_of,
    word_lanes,
)
from ...cpu.simd_matrix import matrix_product_block, transpose_block
from ...philox import LOW_WORD, WORD_BITS, philox4x32_cpu
from .. import schedule, scores
from ..scores import LOG2_E, Tools, Where
from . import score_rows
from .score_rows import call_score_row

# Kernels that the disk keeps are compiled anew when one of these changes: see `cache_key`.
FILES = (
    __file__, schedule.__file__, scores.__file__, philox.__file__, simd_matrix.__file__,
    threads.__file__, score_rows.__file__,
)  # fmt: skip

NO_MASK, BOOL_MASK, ADDITIVE_MASK = 0, 1, 2  # Mask.kind, a number as numba wants one


class Mask(NamedTuple):
    """An attn_mask as it was given, not broadcast: a dimension of size 1 has stride 0."""

    kind: int
    bools: Any  # uint8, for BOOL_MASK
    bias: Any  # float, for ADDITIVE_MASK
    offset: Any
    row: int
    column: int


class Functions(NamedTuple):
    """A user's functions of a score: addresses of row functions (score_rows.py), 0 for none, and
    what they are given.
    """

    score: int
    gradient: int  # what the score function's derivative adds to the backward pass
    mask: int
    score_words: Any
    mask_words: Any


class Lists(NamedTuple):
    """Lists of the tiles that are visited, as in block_lists.py; without any the band says it.

    For each `rows` queries their tiles of keys, and in the backward pass for each tile of keys the
    tiles of `rows` queries.
    """

    offsets: (
        Any  # int64: a list is entries[offsets[line] : offsets[line + 1]]; (0,) if there is none
    )
    entries: Any  # int32
    ranks: Any  # int64, in the backward pass: the tile's place in the list of its queries
    rows: int
    lines: int  # lists of a head
    batch_step: int  # heads between the lists of a batch and of the next, 0 if they share them
    head_step: int


class Sizes(NamedTuple):
    """Shape of the problem and of its tiles; a `band` of schedule.py, too."""

    batch_heads: int
    seqlen_q: int
    seqlen_k: int
    head_dim: int
    value_dim: int
    lower: int  # query i may see keys [i + lower, i + upper), clipped to [0, seqlen_k)
    upper: int
    tile_q: int
    tile_k: int
    block_q: int
    heads: int  # head batch_head is the head batch_head % heads of its batch


class Tile(NamedTuple):
    """Which scores are computed: queries row0 ... row0 + rows - 1 and, of the tile of keys that
    begins at key0 and has so many, columns start ... stop - 1; none if stop is not larger.
    """

    batch_head: int
    row0: int
    rows: int
    key0: int
    keys: int
    start: int
    stop: int
    masked: bool  # whether a score may be hidden
    full: bool  # whether the mask function hides none


class Strides(NamedTuple):
    """Distances of the rows, and of the columns, of the matrices that are read, in elements."""

    q_row: int
    q_column: int
    k_row: int
    k_column: int
    v_row: int
    v_column: int
    mask_row: int
    mask_column: int
    do_row: int = 0  # in the backward pass
    do_column: int = 0


class Dropout(NamedTuple):
    """A weight is kept, times keep_scale, iff its random number is at least threshold."""

    threshold: int  # 0: no dropout
    seed: Any  # uint64
    keep_scale: float


@njit
def round_up(n, multiple):
    return (n + multiple - 1) // multiple * multiple


@njit
def leading_dimension(w, columns):
    """Distance of a tile's rows: its columns in whole register blocks, and an odd vector."""
    return round_up(max(columns, 1), block_columns(w)) + lanes(w)


@njit
def new_workspace(like, size):
    """An array of at least `size` elements, and the first index that is aligned to a cache line."""
    w = np.empty(size + 64 // like.itemsize, like.dtype)
    return w, (-w.ctypes.data % 64) // like.itemsize


# --------------------------------------------------------------------------- which scores


@njit
def _select(condition, yes, no):
    return yes if condition else no


@njit
def _add(score, number):
    return score + number


keys_of, queries_of = njit(scores.keys_of), njit(scores.queries_of)
masked_by_bool, masked_by_sum = (
    njit(scores.masked_score(mask, Tools(_select, _add))) for mask in ("bool", "additive")
)


# --------------------------------------------------------------------------- which keys

first_key, end_key, key_tiles, query_tiles, tile_start, is_whole = schedule.rules(njit)


@njit
def tile_columns(w, row0, rows, key0, sizes):
    """Columns [start, stop) of the tile at (row0, key0) that the band lets some of its rows see.

    In whole register blocks; empty (start >= stop) where the band masks the whole tile.
    """
    width = block_columns(w)
    start = max(first_key(row0, sizes) - key0, 0)
    stop = min(end_key(row0 + rows - 1, sizes) - key0, sizes.tile_k)
    if start >= stop:
        return 0, 0
    return start // width * width, round_up(stop, width)


@njit
def visible_tile(w, mask, functions, i, row0, rows, key0, keys, full, sizes):
    """The `Tile` of what head i's queries may see of some keys."""
    start, stop = tile_columns(w, row0, rows, key0, sizes)
    if start >= stop:
        return Tile(i, row0, rows, key0, keys, 0, 0, False, full)
    masked = not is_whole(row0, rows, key0 + start, stop - start, sizes)
    if functions.mask != 0:
        masked = masked or not full
    if mask.kind != NO_MASK:
        some, every = mask_allows(mask, i, row0, rows, key0, start, min(stop, keys))
        if not some:
            return Tile(i, row0, rows, key0, keys, 0, 0, False, full)
        masked = masked or not every
    return Tile(i, row0, rows, key0, keys, start, stop, masked, full)


@njit
def list_line(lists, i, line, sizes):
    """Where in `offsets` one of head i's lists is."""
    head = i // sizes.heads * lists.batch_step + i % sizes.heads * lists.head_step
    return head * lists.lines + line


@njit
def next_tile(lists, cursor, line, count, number, end):
    """The next tile of keys after `number` that is visited, or `end`: of a range, or the first one
    in what is left of `count` lists.
    """
    if len(lists.offsets) == 0:
        return number + 1
    nearest = end
    for n in range(count):
        if cursor[n] < lists.offsets[line + n + 1]:
            nearest = min(nearest, np.int64(lists.entries[cursor[n]] >> 1))
    return nearest


@njit
def visited(lists, cursor, line, n, number):
    """Whether list n has the tile of keys, and it is full; its cursor goes on."""
    if len(lists.offsets) == 0:
        return True, False
    place = cursor[n]
    if place == lists.offsets[line + n + 1] or lists.entries[place] >> 1 != number:
        return False, False
    cursor[n] = place + 1
    return True, lists.entries[place] & 1 == 1


@njit
def query_places(lists, i, key_tile, sizes):
    """Places [first, end) of what a tile of keys visits: numbers of tiles of queries, or places in
    a list of theirs.
    """
    if len(lists.offsets) == 0:
        return query_tiles(key_tile * sizes.tile_k, sizes, sizes.tile_q, sizes.tile_k)
    line = list_line(lists, i, key_tile, sizes)
    return lists.offsets[line], lists.offsets[line + 1]


@njit
def queries_at(lists, place, sizes):
    """Numbers [first, end) of the tiles of queries at a place, and whether they are full."""
    if len(lists.offsets) == 0:
        return place, place + 1, False
    entry = np.int64(lists.entries[place])
    tiles = lists.rows // sizes.tile_q
    count = (sizes.seqlen_q + sizes.tile_q - 1) // sizes.tile_q
    first = (entry >> 1) * tiles
    return first, min(first + tiles, count), entry & 1 == 1


@njit
def mask_allows(mask, i, row0, rows, key0, start, stop):
    """(some, all) of the mask's entries for this tile take part; an additive one: (some, False)."""
    some, every = False, True
    for r in range(rows if mask.row != 0 else 1):
        line = mask.offset[i] + (row0 + r) * mask.row + key0 * mask.column
        if mask.kind == ADDITIVE_MASK:
            for j in range(start, stop):
                if not mask.bias[line + j * mask.column] == -np.inf:  # NaN counts
                    return True, False
        elif mask.column == 1:
            largest, smallest = np.uint8(0), np.uint8(1)
            for j in range(line + start, line + stop):
                largest |= mask.bools[j]
                smallest &= mask.bools[j]
            some, every = some or largest != 0, every and smallest != 0
        else:
            for j in range(start, stop):
                taken = mask.bools[line + j * mask.column] != 0
                some, every = some or taken, every and taken
        if some and not every:
            break
    return some, every and mask.kind == BOOL_MASK


@njit
def mask_row(w, line, mask, source, where, start, stop):
    """Scores [start, stop) of a row, by the mask's numbers from `source` on, of which the first is
    `where`: the rule's `masked`, in whole vectors where the numbers are neighbours.
    """
    vector, n = splat(w, -np.inf), lanes(w)
    whole = start + (stop - start) // n * n if mask.column == 1 else start
    for j in range(start, whole, n):
        if mask.kind == BOOL_MASK:
            store(w, line + j, select_bytes(mask.bools, source + j, load(w, line + j), vector))
        else:
            store(w, line + j, load(w, line + j) + load(mask.bias, source + j))
    for j in range(whole, stop):
        place = Where(where.batch, where.head, where.query, where.key + j)
        if mask.kind == BOOL_MASK:
            number = mask.bools[source + j * mask.column]
            w[line + j] = masked_by_bool(w[line + j], True, number, place)
        else:
            number = mask.bias[source + j * mask.column]
            w[line + j] = masked_by_sum(w[line + j], True, number, place)


@njit
def finish_scores(w, s, ld, mask, functions, tile, sizes):
    """Scores as the rule leaves them, row by row: the score function, the mask, the band, the end
    of the keys, the mask function.
    """
    minus_infinity = w.dtype.type(-np.inf)
    start, stop, length = tile.start, tile.stop, tile.stop - tile.start
    batch, head = tile.batch_head // sizes.heads, tile.batch_head % sizes.heads
    for r in range(tile.rows):
        line, row = s + r * ld, tile.row0 + r
        if functions.score != 0:
            call_score_row(
                functions.score, w, functions.score_words, line + start, length, batch, head, row,
                tile.key0 + start,
            )  # fmt: skip
        if not tile.masked:
            continue
        if mask.kind != NO_MASK:
            source = mask.offset[tile.batch_head] + row * mask.row + tile.key0 * mask.column
            where = Where(batch, head, row, tile.key0)
            mask_row(w, line, mask, source, where, start, min(stop, tile.keys))
        first = min(first_key(row, sizes) - tile.key0, stop)
        end = max(end_key(row, sizes) - tile.key0, start)
        for j in range(line + start, line + first):
            w[j] = minus_infinity
        for j in range(line + end, line + stop):
            w[j] = minus_infinity
        if functions.mask != 0 and not tile.full:
            call_score_row(
                functions.mask, w, functions.mask_words, line + start, length, batch, head, row,
                tile.key0 + start,
            )  # fmt: skip


# --------------------------------------------------------------------------- tiles in and out


@njit
def fill(w, start, stop, value):
    """w[start:stop] = value; up to a vector more may be written."""
    values = splat(w, value)
    for j in range(start, stop, lanes(w)):
        store(w, j, values)


@njit
def load_tile(w, tile, ld, padded_rows, source, offset, row, column, rows, columns):
    """Copy (rows, columns) of a matrix to a tile, with zeros up to (padded_rows, ld)."""
    n = lanes(w)
    whole = columns // n * n if column == 1 else 0
    for r in range(rows):
        line, source_line = tile + r * ld, offset + r * row
        fill(w, line + whole, line + ld, 0.0)
        for c in range(0, whole, n):
            store(w, line + c, load(source, source_line + c))
        for c in range(whole, columns):
            w[line + c] = source[source_line + c * column]
    fill(w, tile + rows * ld, tile + padded_rows * ld, 0.0)


@njit
def load_tile_transposed(w, tile, ld, source, offset, row, column, rows, columns, scale):
    """Copy (rows, columns) of a matrix, times scale, to a tile (columns, rows), zeros up to ld."""
    n = lanes(w)
    zero = w.dtype.type(0)
    whole_rows = rows // n * n if column == 1 else 0
    whole_columns = columns // n * n
    for r in range(0, whole_rows, n):
        for c in range(0, whole_columns, n):
            transpose_block(source, offset + r * row + c, row, w, tile + c * ld + r, ld, scale)
    for c in range(columns):
        start = whole_rows if c < whole_columns else 0
        for r in range(start, rows):
            w[tile + c * ld + r] = source[offset + r * row + c * column] * scale
        for r in range(rows, ld):
            w[tile + c * ld + r] = zero
    if columns == 0:  # a product of depth 0: one step with zeros
        for r in range(ld):
            w[tile + r] = zero


@njit
def matrix_product(w, a, a_row, a_column, b, b_row, c, c_row, rows, columns, depth, accumulate):
    """C (rows, columns) = A (rows, depth) B (depth, columns), or C += A B; rounded up to blocks."""
    for j in range(0, columns, block_columns(w)):
        for i in range(0, rows, block_rows()):
            matrix_product_block(
                w, a + i * a_row, a_row, a_column, b + j, b_row, c + i * c_row + j, c_row,
                depth, accumulate,
            )  # fmt: skip


# --------------------------------------------------------------------------- rows of a tile


@njit
def row_max(w, start, stop, initial):
    """max(initial, w[start:stop]), in whole vectors; NaN is passed over."""
    largest = splat(w, initial)
    for j in range(start, stop, lanes(w)):
        largest = maximum(load(w, j), largest)
    return max_of(largest)


@njit
def row_exp_sum(w, start, stop, m):
    """w[start:stop] = exp(w - m); returns the sum."""
    total, log2_e = splat(w, 0.0), w.dtype.type(LOG2_E)
    for j in range(start, stop, lanes(w)):
        p = exp2((load(w, j) - m) * log2_e)
        store(w, j, p)
        total = total + p
    return sum_of(total)


@njit
def row_scale(w, start, stop, factor):
    """w[start:stop] *= factor."""
    for j in range(start, stop, lanes(w)):
        store(w, j, load(w, j) * factor)


@njit
def tile_multiply(w, x, y, ld, rows, start, stop):
    """X *= Y, element by element, in columns [start, stop) of two tiles."""
    for r in range(rows):
        for j in range(r * ld + start, r * ld + stop, lanes(w)):
            store(w, x + j, load(w, x + j) * load(w, y + j))


@njit
def dropout_tile(w, z, ld, dropout, tile):
    """Z[r, j] = keep_scale where the weight of (row0 + r, key0 + j) is kept, else 0.

    One call of the generator serves rows r and r + 8 of 16, and of 16 columns four; a step of the
    inner loop takes a vector of calls. Tiles begin at multiples of 16 and have memory for whole
    blocks of 16 x 16 and for whole steps, so some more of Z may be written than is asked for.
    """
    rows, key0, start, stop = tile.rows, tile.key0, tile.start, tile.stop
    keep_scale, zero = w.dtype.type(dropout.keep_scale), w.dtype.type(0)
    threshold = np.uint64(dropout.threshold)
    k0, k1 = dropout.seed & LOW_WORD, dropout.seed >> WORD_BITS
    first_call = start // max(16, 4 * word_lanes()) * max(4, word_lanes())
    end_call = round_up(stop, 16) // 4
    for block in range(0, rows, 16):
        for r in range(block, min(block + 8, rows)):
            for call in range(first_call, end_call, word_lanes()):
                column = count_from(np.uint64(key0 // 4 + call)) & LOW_WORD
                nothing = column & np.uint64(0)
                row = nothing + (np.uint64((tile.row0 + block) // 2 + r - block) & LOW_WORD)
                head = nothing + (np.uint64(tile.batch_head) & LOW_WORD)
                x0, x1, x2, x3 = philox4x32_cpu(column, row, head, nothing, k0, k1)
                place = z + r * ld + call // 4 * 16 + call % 4 * 2
                store_thresholds(w, place, x0, x2, threshold, keep_scale, zero)
                store_thresholds(w, place + 8 * ld, x1, x3, threshold, keep_scale, zero)
