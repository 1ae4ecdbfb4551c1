"""Rows of a table by number on a GPU: y[i] = weight[ids[i]], and dweight[ids[i]] += dy[i].

Backward, the tokens are first listed by id, those of one id in their own order (a counting sort
over chunks of tokens). Then a warp adds up each tile of the lists, and another each list that lies
in several tiles. All in a fixed order: a second run gives the same bits, which atomic additions
would not; and one common id costs no more than many rare ones.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

from .gpu.runtime import (
    SIMULATED,
    WARP,
    Instance,
    ceil_div,
    cuda,
    device_function,
    kernel,
    launch,
    precision,
    types,
)
from .gpu.vectors import longest_vector, vector_access

ERROR_BIT = 1  # of the device's word of errors: an id that is no row of the table
WARPS = 2 if SIMULATED else 4  # of a block, one token or one row of the table each
CHUNK = 32 if SIMULATED else 256  # tokens that a block counts at once
MOST_CHUNKS = 2 if SIMULATED else 64
TILE = 4 if SIMULATED else 32  # tokens of the lists that a warp adds up
SCAN_THREADS = 32 if SIMULATED else 1024
AHEAD = 2 if SIMULATED else 8  # rows that a thread reads at once


def forward(
    precision_name: str,
    id_name: str,
    ids: Any,
    weight: Any,
    y: Any,
    error: Any,
    tokens: int,
    width: int,
    num_embeddings: int,
) -> None:
    """y[i] = weight[ids[i]].

    Args:
        precision_name: of weight and y.
        id_name: precision of the ids, whole numbers stored as floats.
        ids: (tokens,).
        weight: (num_embeddings, width), flat and contiguous.
        y: (tokens, width); NaN where the id is no row of the table.
        error: int32 (1,), gets `ERROR_BIT` if there is such an id.
        tokens: number of ids.
        width: of a row.
        num_embeddings: rows of the table.

    """
    if tokens and width:
        launch(
            forward_kernel(precision_name, id_name, longest_vector(precision_name, width)),
            ceil_div(tokens, WARPS), (WARP, WARPS),
            ids, weight, y, error, tokens, width, num_embeddings,
        )  # fmt: skip


@cache
def forward_kernel(precision_name: str, id_name: str, vector: int) -> Any:
    """One token to a warp."""
    number, to_id = precision(precision_name), _whole_number(id_name)
    storage, real, to_storage = number.storage, number.real, number.store
    load_vector, store_vector = vector_access(vector)

    @kernel(WARP * WARPS)
    def embedding_forward(ids, weight, y, error, tokens, width, num_embeddings):
        one = cuda.local.array(vector, storage)
        token = types.int64(cuda.blockIdx.x) * WARPS + cuda.threadIdx.y
        if token < tokens:
            row = to_id(ids[token], num_embeddings)
            if row < 0:
                cuda.atomic.or_(error, 0, ERROR_BIT)
                for lane in range(vector):
                    one[lane] = to_storage(real(math.nan))
            for column in range(cuda.threadIdx.x * vector, width, WARP * vector):
                if row >= 0:
                    load_vector(weight, row * width + column, one)
                store_vector(y, token * width + column, one)

    return embedding_forward


@cache
def _whole_number(id_name: str) -> Any:
    """Device function `(id, count)`: the id as an integer, -1 if it is not one below `count`."""
    to_number = precision(id_name).load

    @device_function
    def convert(stored, count):
        number = to_number(stored)
        if number >= 0 and number < count and math.floor(number) == number:
            return types.int64(number)
        return types.int64(-1)

    return convert


# ----- backward -----


@dataclass(frozen=True)
class Workspace:
    """Where the parts of the int32 workspace of `backward` begin, in elements.

    Args:
        counts: (chunks, num_embeddings), tokens of each id in each chunk; 0 at first.
        totals: (num_embeddings,), tokens of each id; 0 at first.
        starts: (num_embeddings,), where the list of each id begins.
        ranks: (tokens,), a token's place among those of its id in its chunk.
        order: (tokens,), the lists, one after the other.
        size: of the whole; what comes before `starts` must be 0 at first.
        chunks: into how many chunks the tokens are divided.
        tiles: into how many tiles the lists are divided.

    """

    counts: int
    totals: int
    starts: int
    ranks: int
    order: int
    size: int
    chunks: int
    tiles: int


@cache
def workspace(tokens: int, num_embeddings: int) -> Workspace:
    """For so many tokens and rows of the table."""
    chunks = min(ceil_div(tokens, CHUNK), MOST_CHUNKS)
    totals = chunks * num_embeddings
    starts = totals + num_embeddings
    ranks = starts + num_embeddings
    order, size = ranks + tokens, ranks + 2 * tokens
    return Workspace(0, totals, starts, ranks, order, size, chunks, ceil_div(tokens, TILE))


def backward(
    precision_name: str,
    id_name: str,
    dy: Any,
    ids: Any,
    work: Any,
    partials: Any,
    dweight: Any,
    tokens: int,
    width: int,
    num_embeddings: int,
) -> None:
    """dweight[r] = sum of dy[i] over the tokens i with ids[i] = r.

    Args:
        precision_name: of dy and dweight.
        id_name: precision of the ids.
        dy: (tokens, width), flat and contiguous.
        ids: (tokens,); those that are no row of the table are passed over.
        work: int32, see `workspace`; all 0 up to `Workspace.starts`.
        partials: workspace of (Workspace.tiles, 2, width), of the arithmetic type of the
            precision, float32 for 16 bits.
        dweight: (num_embeddings, width).
        tokens: number of ids.
        width: of a row.
        num_embeddings: rows of the table.

    """
    if not num_embeddings or not width:
        return
    parts = workspace(tokens, num_embeddings)
    places = (parts.totals, parts.starts, parts.ranks, parts.order)
    vector = longest_vector(precision_name, width)
    across = ceil_div(width, WARP * vector)
    if tokens:
        rounds = ceil_div(ceil_div(tokens, CHUNK), parts.chunks)
        sizes = (tokens, num_embeddings, rounds)
        launch(count_kernel(id_name), parts.chunks, CHUNK, ids, work, *places, *sizes)
        launch(starts_kernel(), 1, SCAN_THREADS, work, *places, num_embeddings)
        launch(order_kernel(id_name), ceil_div(tokens, CHUNK), CHUNK, ids, work, *places, *sizes)
        launch(
            tile_kernel(precision_name, id_name, vector),
            (ceil_div(parts.tiles, WARPS), across), (WARP, WARPS),
            dy, ids, work, *places, partials, dweight, width, num_embeddings,
        )  # fmt: skip
    launch(
        row_kernel(precision_name, vector),
        (ceil_div(num_embeddings, WARPS), across), (WARP, WARPS),
        work, *places, partials, dweight, width, num_embeddings,
    )  # fmt: skip


@cache
def count_kernel(id_name: str) -> Any:
    """Ranks of a chunk's tokens, and how many it has of each id.

    A block goes through its chunk in rounds of CHUNK tokens, CHUNK**2 comparisons each.
    """
    to_id = _whole_number(id_name)

    @kernel(CHUNK)
    def embedding_count(ids, work, totals, starts, ranks, order, tokens, num_embeddings, rounds):
        of_round = cuda.shared.array(CHUNK, types.int32)
        own = cuda.threadIdx.x
        counts = types.int64(cuda.blockIdx.x) * num_embeddings
        for number in range(rounds):
            token = (types.int64(cuda.blockIdx.x) * rounds + number) * CHUNK + own
            row = types.int64(-1)
            earlier = types.int32(0)  # of this id, in the rounds before
            if token < tokens:
                row = to_id(ids[token], num_embeddings)
            if row >= 0:
                earlier = work[counts + row]
            short = types.int32(row)
            of_round[own] = short
            cuda.syncthreads()
            before, together = types.int32(0), types.int32(0)
            for other in range(CHUNK):
                same = types.int32(1) if of_round[other] == short else types.int32(0)
                together += same
                before += same if other < own else types.int32(0)
            if row >= 0:
                work[ranks + token] = earlier + before
                if before == 0:  # one thread speaks for the id
                    work[counts + row] = earlier + together
                    cuda.atomic.add(work, totals + row, together)
            cuda.syncthreads()

    return embedding_count


@cache
def starts_kernel() -> Any:
    """starts[r] = totals[0] + ... + totals[r - 1], by one block: each thread a stretch of rows."""

    @kernel(SCAN_THREADS)
    def embedding_starts(work, totals, starts, ranks, order, num_embeddings):
        sums = cuda.shared.array(SCAN_THREADS, types.int32)
        own = cuda.threadIdx.x
        stretch = (num_embeddings + SCAN_THREADS - 1) // SCAN_THREADS
        first = own * stretch
        end = min(first + stretch, num_embeddings)
        total = types.int32(0)
        for row in range(first, end):
            total += work[totals + row]
        sums[own] = total
        cuda.syncthreads()
        distance = 1
        while distance < SCAN_THREADS:  # sums of 2, 4, 8, ... stretches that end here
            before = types.int32(0)
            if own >= distance:
                before = sums[own - distance]
            cuda.syncthreads()
            sums[own] += before
            cuda.syncthreads()
            distance *= 2
        start = sums[own] - total
        for row in range(first, end):
            work[starts + row] = start
            start += work[totals + row]

    return embedding_starts


@cache
def order_kernel(id_name: str) -> Any:
    """Each token to its place: start of its id, tokens of the chunks before, rank in its own."""
    to_id = _whole_number(id_name)

    @kernel(CHUNK)
    def embedding_order(ids, work, totals, starts, ranks, order, tokens, num_embeddings, rounds):
        token = types.int64(cuda.blockIdx.x) * CHUNK + cuda.threadIdx.x
        if token < tokens:
            row = to_id(ids[token], num_embeddings)
            if row >= 0:
                place = work[starts + row] + work[ranks + token]
                own = types.int64(cuda.blockIdx.x // rounds)
                for chunk in range(0, own, AHEAD):
                    for n in range(AHEAD):  # independent reads: none waits for another
                        if chunk + n < own:
                            place += work[(chunk + n) * num_embeddings + row]
                work[order + place] = token

    return embedding_order


@cache
def tile_kernel(precision_name: str, id_name: str, vector: int) -> Any:
    """The sums of one tile of the lists to a warp.

    The sum of a list that lies within the tile goes to dweight. Of a list that goes on from the
    tile before, the sum here goes to partials[tile, 0]; of one that begins here and goes on into
    the next tile, to partials[tile, 1].
    """
    number, to_id = precision(precision_name), _whole_number(id_name)
    real, to_real = number.real, number.load
    storage, to_storage = number.storage, number.store
    load_vector, store_vector = vector_access(vector)
    read_size, listed = AHEAD * vector, TILE * WARPS

    @device_function
    def flush(total, row, tile, column, work, totals, starts, partials, dweight, width):
        start, begin = work[starts + row], tile * TILE
        end = start + work[totals + row]
        if start >= begin and end <= begin + TILE:
            rounded = cuda.local.array(vector, storage)
            for k in range(vector):
                rounded[k] = to_storage(total[k])
            store_vector(dweight, row * width + column, rounded)
        else:
            place = (2 * tile + (1 if start >= begin else 0)) * width + column
            for k in range(vector):
                partials[place + k] = total[k]

    @kernel(WARP * WARPS)
    def embedding_tiles(
        dy, ids, work, totals, starts, ranks, order, partials, dweight, width, num_embeddings
    ):  # fmt: skip
        tokens = cuda.shared.array(listed, types.int32)
        rows = cuda.shared.array(listed, types.int32)
        read = cuda.local.array(read_size, storage)
        one = cuda.local.array(vector, storage)
        total = cuda.local.array(vector, real)
        lane, warp = cuda.threadIdx.x, cuda.threadIdx.y
        tile = types.int64(cuda.blockIdx.x) * WARPS + warp
        last = num_embeddings - 1
        all_of_them = types.int64(work[starts + last] + work[totals + last])
        count = min(types.int64(TILE), all_of_them - tile * TILE)  # may be below 0
        for i in range(lane, count, WARP):
            token = work[order + tile * TILE + i]
            tokens[warp * TILE + i] = token
            rows[warp * TILE + i] = to_id(ids[token], num_embeddings)
        cuda.syncthreads()
        column = (types.int64(cuda.blockIdx.y) * WARP + lane) * vector
        if column < width and count > 0:
            row = types.int64(rows[warp * TILE])
            for k in range(vector):
                total[k] = real(0.0)
            for first in range(0, count, AHEAD):
                for n in range(AHEAD):  # all reads first: none waits for another
                    token = types.int64(tokens[warp * TILE + min(first + n, count - 1)])
                    load_vector(dy, token * width + column, one)
                    for k in range(vector):
                        read[n * vector + k] = one[k]
                for n in range(AHEAD):
                    if first + n < count:
                        of_token = types.int64(rows[warp * TILE + first + n])
                        if of_token != row:
                            flush(
                                total, row, tile, column, work, totals, starts, partials, dweight,
                                width,
                            )  # fmt: skip
                            row = of_token
                            for k in range(vector):
                                total[k] = real(0.0)
                        for k in range(vector):
                            total[k] += to_real(read[n * vector + k])
            flush(total, row, tile, column, work, totals, starts, partials, dweight, width)

    return embedding_tiles


@cache
def row_kernel(precision_name: str, vector: int) -> Any:
    """What the tiles left: the sums of lists in several tiles, and 0 for ids that do not occur."""
    number = precision(precision_name)
    real, storage, to_storage = number.real, number.storage, number.store
    _, store_vector = vector_access(vector)
    read_size = AHEAD * vector

    @kernel(WARP * WARPS)
    def embedding_rows(
        work, totals, starts, ranks, order, partials, dweight, width, num_embeddings
    ):  # fmt: skip
        read = cuda.local.array(read_size, real)
        total = cuda.local.array(vector, real)
        one = cuda.local.array(vector, storage)
        row = types.int64(cuda.blockIdx.x) * WARPS + cuda.threadIdx.y
        column = (types.int64(cuda.blockIdx.y) * WARP + cuda.threadIdx.x) * vector
        if row < num_embeddings and column < width:
            count = types.int64(work[totals + row])
            first = types.int64(work[starts + row]) // TILE if count else types.int64(0)
            last = (
                (types.int64(work[starts + row]) + count - 1) // TILE if count else types.int64(0)
            )
            if count == 0 or first != last:
                for k in range(vector):
                    total[k] = real(0.0)
                    if count:
                        total[k] = partials[(2 * first + 1) * width + column + k]
                for tile in range(first + 1, last + 1, AHEAD):
                    for n in range(AHEAD):
                        for k in range(vector):
                            read[n * vector + k] = real(0.0)
                            if tile + n <= last:
                                place = 2 * (tile + n) * width + column + k
                                read[n * vector + k] = partials[place]
                    for n in range(AHEAD):
                        for k in range(vector):
                            total[k] += read[n * vector + k]
                for k in range(vector):
                    one[k] = to_storage(total[k])
                store_vector(dweight, row * width + column, one)

    return embedding_rows


def instances() -> Iterator[Instance]:
    """Rows of an odd width, and of whole vectors."""
    size, ids = types.int64, precision("float32").array
    work = types.Array(types.int32, 1, "C")
    places, three = (size,) * 4, (size,) * 3
    yield Instance("embedding_count", count_kernel("float32"), (ids, work, *places, *three))
    yield Instance("embedding_starts", starts_kernel(), (work, *places, size))
    yield Instance("embedding_order", order_kernel("float32"), (ids, work, *places, *three))
    for name in ("float32", "float64", "float16", "bfloat16"):
        array, partials = precision(name).array, precision(name).real_array
        largest = longest_vector(name)
        for vector in (1, largest) if name == "float32" else (largest,):
            yield Instance(
                f"embedding_forward[{name}, {vector}]",
                forward_kernel(name, "float32", vector),
                (ids, array, array, work, *three),
            )
            yield Instance(
                f"embedding_tiles[{name}, {vector}]",
                tile_kernel(name, "float32", vector),
                (array, ids, work, *places, partials, array, size, size),
            )
            yield Instance(
                f"embedding_rows[{name}, {vector}]",
                row_kernel(name, vector),
                (work, *places, partials, array, size, size),
            )
