"""Rows of a table by number on a GPU: y[i] = weight[ids[i]], and dweight[ids[i]] += dy[i].

Backward, the tokens are first listed by id, those of one id in their own order (a counting sort
over chunks of tokens). Then each row of the table adds up the tokens in its list, in a fixed
order: a second run gives the same bits, which atomic additions would not, and a common id costs no
more than many rare ones.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

from .runtime import (
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
from .vectors_cuda import BYTES, vector_access

ERROR_BIT = 1  # of the device's word of errors: an id that is no row of the table
WARPS = 2 if SIMULATED else 4  # of a block, one token or one row of the table each
MOST_WARPS = 4 if SIMULATED else 16  # that share one row of the table
CHUNK = 32 if SIMULATED else 512  # tokens of a block that counts
SCAN_THREADS = 32 if SIMULATED else 1024
AHEAD = 4  # rows that a thread reads at once


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
            forward_kernel(precision_name, id_name, _vector(precision_name, width)),
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
    """Where the parts of the int32 workspace of `backward` begin.

    Args:
        counts: (chunks, num_embeddings), tokens of each id in each chunk; 0 at first.
        totals: (num_embeddings,), tokens of each id; 0 at first.
        starts: (num_embeddings,), where the list of each id begins.
        ranks: (tokens,), a token's place among those of its id in its chunk.
        order: (tokens,), the lists.
        size: of the whole; the first `starts` elements must be 0 at first.

    """

    counts: int
    totals: int
    starts: int
    ranks: int
    order: int
    size: int


@cache
def workspace(tokens: int, num_embeddings: int) -> Workspace:
    """For so many tokens and rows of the table."""
    totals = ceil_div(tokens, CHUNK) * num_embeddings
    starts = totals + num_embeddings
    ranks = starts + num_embeddings
    return Workspace(0, totals, starts, ranks, ranks + tokens, ranks + 2 * tokens)


def backward(
    precision_name: str,
    id_name: str,
    dy: Any,
    ids: Any,
    work: Any,
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
        dweight: (num_embeddings, width).
        tokens: number of ids.
        width: of a row.
        num_embeddings: rows of the table.

    """
    if not num_embeddings or not width:
        return
    parts = workspace(tokens, num_embeddings)
    places = (parts.totals, parts.starts, parts.ranks, parts.order)
    if tokens:
        chunks = ceil_div(tokens, CHUNK)
        launch(count_kernel(id_name), chunks, CHUNK, ids, work, *places, tokens, num_embeddings)
        launch(starts_kernel(), 1, SCAN_THREADS, work, *places, num_embeddings)
        launch(order_kernel(id_name), chunks, CHUNK, ids, work, *places, tokens, num_embeddings)
    vector = _vector(precision_name, width)
    warps = 1
    while warps < MOST_WARPS and warps * num_embeddings < 4 * tokens:
        warps *= 2  # a list of 16 tokens or more, on average, is worth several warps
    shared = warps >= WARPS
    launch(
        backward_kernel(precision_name, vector, warps if shared else WARPS, shared),
        (num_embeddings if shared else ceil_div(num_embeddings, WARPS),
         ceil_div(width, WARP * vector)),
        (WARP, warps if shared else WARPS),
        dy, work, *places, dweight, width, num_embeddings,
    )  # fmt: skip


@cache
def count_kernel(id_name: str) -> Any:
    """Ranks of a chunk's tokens, and how many it has of each id. CHUNK**2 comparisons a block."""
    to_id = _whole_number(id_name)

    @kernel(CHUNK)
    def embedding_count(ids, work, totals, starts, ranks, order, tokens, num_embeddings):
        of_chunk = cuda.shared.array(CHUNK, types.int32)
        own = cuda.threadIdx.x
        token = types.int64(cuda.blockIdx.x) * CHUNK + own
        row = types.int64(-1)
        if token < tokens:
            row = to_id(ids[token], num_embeddings)
        of_chunk[own] = row
        cuda.syncthreads()
        before, all_of_it = types.int32(0), types.int32(0)
        for other in range(CHUNK):
            if of_chunk[other] == row:
                all_of_it += types.int32(1)
                if other < own:
                    before += types.int32(1)
        if row >= 0:
            work[ranks + token] = before
            if before == 0:
                work[cuda.blockIdx.x * num_embeddings + row] = all_of_it
                cuda.atomic.add(work, totals + row, all_of_it)

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
    def embedding_order(ids, work, totals, starts, ranks, order, tokens, num_embeddings):
        token = types.int64(cuda.blockIdx.x) * CHUNK + cuda.threadIdx.x
        if token < tokens:
            row = to_id(ids[token], num_embeddings)
            if row >= 0:
                place = work[starts + row] + work[ranks + token]
                for chunk in range(cuda.blockIdx.x):
                    place += work[chunk * num_embeddings + row]
                work[order + place] = token

    return embedding_order


@cache
def backward_kernel(precision_name: str, vector: int, warps: int, shared: bool) -> Any:
    """One row of the table to a block whose warps share its list, or else to a warp."""
    number = precision(precision_name)
    real, to_real = number.real, number.load
    storage, to_storage = number.storage, number.store
    load_vector, store_vector = vector_access(vector)
    sums_size = warps * vector * WARP if shared else 1
    ahead, step = AHEAD, warps if shared else 1
    read_size = ahead * vector

    @kernel(WARP * warps)
    def embedding_backward(
        dy, work, totals, starts, ranks, order, dweight, width, num_embeddings
    ):  # fmt: skip
        sums = cuda.shared.array(sums_size, real)
        read = cuda.local.array(read_size, storage)
        one = cuda.local.array(vector, storage)
        total = cuda.local.array(vector, real)
        lane, warp = cuda.threadIdx.x, cuda.threadIdx.y
        row = types.int64(cuda.blockIdx.x) if shared else cuda.blockIdx.x * warps + warp
        column = (types.int64(cuda.blockIdx.y) * WARP + lane) * vector
        inside = row < num_embeddings and column < width
        for k in range(vector):
            total[k] = real(0.0)
        if inside:
            end = work[starts + row] + work[totals + row]
            first = work[starts + row] + (warp if shared else 0)
            for position in range(first, end, step * ahead):
                for n in range(ahead):  # all reads first: none waits for another
                    if position + n * step < end:
                        token = types.int64(work[order + position + n * step])
                        load_vector(dy, token * width + column, one)
                    else:
                        for k in range(vector):
                            one[k] = to_storage(real(0.0))
                    for k in range(vector):
                        read[n * vector + k] = one[k]
                for n in range(ahead):
                    for k in range(vector):
                        total[k] += to_real(read[n * vector + k])
        if shared:
            for k in range(vector):
                sums[(warp * vector + k) * WARP + lane] = total[k]
            cuda.syncthreads()
            if warp == 0:
                for k in range(vector):
                    total[k] = real(0.0)
                    for other in range(warps):
                        total[k] += sums[(other * vector + k) * WARP + lane]
        if inside and (warp == 0 or not shared):
            for k in range(vector):
                one[k] = to_storage(total[k])
            store_vector(dweight, row * width + column, one)

    return embedding_backward


def _vector(precision_name: str, width: int) -> int:
    vector = BYTES // precision(precision_name).storage.itemsize
    while width % vector:
        vector //= 2
    return vector


def instances() -> Iterator[Instance]:
    """Rows of an odd width and of whole vectors; lists for a warp and for a block."""
    size, ids = types.int64, precision("float32").array
    work = types.Array(types.int32, 1, "C")
    places = (size,) * 4
    yield Instance("embedding_count", count_kernel("float32"), (ids, work, *places, size, size))
    yield Instance("embedding_starts", starts_kernel(), (work, *places, size))
    yield Instance("embedding_order", order_kernel("float32"), (ids, work, *places, size, size))
    for name in ("float32", "float64", "float16", "bfloat16"):
        array = precision(name).array
        largest = BYTES // precision(name).storage.itemsize
        for vector in (1, largest) if name == "float32" else (largest,):
            yield Instance(
                f"embedding_forward[{name}, {vector}]",
                forward_kernel(name, "float32", vector),
                (ids, array, array, work, size, size, size),
            )
            for warps, shared in ((WARPS, False), (MOST_WARPS, True)):
                yield Instance(
                    f"embedding_backward[{name}, {vector}, {warps}]",
                    backward_kernel(name, vector, warps, shared),
                    (array, work, *places, array, size, size),
                )
