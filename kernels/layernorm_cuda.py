"""Layer norm of the rows of a matrix on a GPU (Ba, Kiros & Hinton 2016, equation 4).

xhat = (x - mean) / sqrt(var + eps),     y = gamma xhat + beta
dx = (g - mean(g) - xhat mean(g xhat)) / sqrt(var + eps),     g = gamma dy
dgamma = sum over rows of dy xhat,     dbeta = sum over rows of dy

The backward pass is two kernels: in the first, each thread adds up dgamma and dbeta over the rows
of its team, in registers, or in shared memory where rows are long, and the block adds up those of
its teams; the second adds the blocks' sums. Always in one order, so a second run gives the same
bits. A block has as many teams as fit, since each block's sums are written and read again.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from typing import Any

from .gpu.approximate import inverse_root
from .gpu.rows import (
    RowShape,
    block_row,
    most_shared_bytes,
    row_blocks,
    row_shape,
    team_sum,
    team_sums,
    tile_access,
    weights_access,
)
from .gpu.runtime import (
    SIMULATED,
    WARP,
    Instance,
    ceil_div,
    cuda,
    device_function,
    kernel,
    launch,
    multiprocessors,
    precision,
    types,
)
from .gpu.vectors import longest_vector, vector_access
from .reduce_cuda import FOLD_COLUMNS, FOLD_SIZE, FOLD_THREADS, fold

FORWARD_BYTES = 128  # of a row that a thread keeps, in its registers
# Of each of two rows, in float32: the first with which a row is kept whole. Of 16-bit numbers it is
# twice what is read: with less, too little would be on its way from memory.
BACKWARD_BYTES = {"float32": (64, 128), "float64": (64, 128), "float16": (128,), "bfloat16": (128,)}
BACKWARD_THREADS = 512  # of a row's team
BACKWARD_ROWS = 2 if SIMULATED else 32  # of a block
TILED_BYTES = 32
REGISTERS, SHARED_BYTES = 65536, 220 * 1024  # of a multiprocessor
MOST_THREADS, MOST_BARRIERS = 1024, 15  # of a block; it has a 16th barrier, of all its threads
# Columns of a thread whose sums stay in its registers.
KEPT_SUMS = {"float32": 16, "float64": 0, "float16": 32, "bfloat16": 32}
AHEAD = 2 if SIMULATED else 16  # blocks' sums that a thread reads at once


def forward(
    precision_name: str,
    weight_name: str,
    x: Any,
    gamma: Any,
    beta: Any,
    eps: float,
    y: Any,
    var: Any,
    mean: Any,
    rows: int,
    columns: int,
) -> None:
    """y, var and mean of the rows of x.

    Args:
        precision_name: of x and y; var and mean are of its arithmetic type, float32 for 16 bits.
        weight_name: of gamma and beta.
        x: (rows, columns), flat and contiguous, as y.
        gamma: (columns,), as beta.
        beta: added.
        eps: added to the variance.
        y: the output.
        var: (rows,), as mean.
        mean: of each row.
        rows: number of rows.
        columns: length of a row.

    """
    if not rows or not columns:
        return
    shape = row_shape(precision_name, columns, FORWARD_BYTES)
    launch(
        forward_kernel(precision_name, weight_name, shape),
        row_blocks(rows, shape), shape.block, x, gamma, beta, eps, y, var, mean, rows, columns,
    )  # fmt: skip


@cache
def forward_kernel(precision_name: str, weight_name: str, shape: RowShape) -> Any:
    """One row to a team."""
    real = precision(precision_name).real
    load, store = tile_access(precision_name, shape)
    load_weights = weights_access(weight_name, shape)
    add, invert_root = team_sum(precision_name, shape.threads), inverse_root(precision_name)
    count, width, rows_of_block, tiled = shape.values, shape.tile, shape.rows, shape.tiled
    vector, vectors, step = shape.vector, shape.vectors, shape.threads * shape.vector

    @kernel(shape.threads * shape.rows)
    def layernorm_forward(x, gamma, beta, eps, y, var, mean, rows, columns):
        values = cuda.local.array(count, real)
        scale = cuda.local.array(vector, real)
        shift = cuda.local.array(vector, real)
        row = block_row(rows_of_block)
        start = row * columns
        limit = columns if row < rows else 0  # a team without a row reads and writes nothing
        tiles = (columns + width - 1) // width if tiled else 1
        first = cuda.threadIdx.x * vector

        total = real(0.0)
        for tile in range(tiles):
            load(x, start, tile, limit, values, real(0.0))
            for i in range(count):
                total += values[i]
        centre = add(total) / real(columns)

        total = real(0.0)
        for tile in range(tiles):
            if tiled:  # read again
                load(x, start, tile, limit, values, centre)
            for i in range(count):
                column = tile * width + first + (i // vector) * step  # of the element's vector
                distance = values[i] - centre if column < columns else real(0.0)
                total += distance * distance
        variance = add(total) / real(columns)
        rstd = invert_root(variance + real(eps))

        for tile in range(tiles):
            if tiled:
                load(x, start, tile, limit, values, centre)
            for k in range(vectors):
                load_weights(gamma, tile, k, limit, scale)
                load_weights(beta, tile, k, limit, shift)
                for lane in range(vector):
                    xhat = (values[k * vector + lane] - centre) * rstd
                    values[k * vector + lane] = xhat * real(scale[lane]) + real(shift[lane])
            store(y, start, tile, limit, values)
        if row < rows and cuda.threadIdx.x == 0:
            var[row] = variance
            mean[row] = centre

    return layernorm_forward


@cache
def backward_shape(precision_name: str, columns: int, shared_bytes: int | None = None) -> RowShape:
    """The shape of the backward pass, in which the sums of a block's teams share its memory:
    `shared_bytes`, or what this GPU has.
    """
    room = most_shared_bytes() if shared_bytes is None else shared_bytes
    for bytes_kept in BACKWARD_BYTES[precision_name]:
        shape = row_shape(precision_name, columns, bytes_kept, 1, BACKWARD_THREADS)
        if not shape.tiled and _sums_bytes(precision_name, shape) <= room:
            return replace(shape, rows=_teams(precision_name, shape, room))
    return row_shape(precision_name, columns, TILED_BYTES, 1, BACKWARD_THREADS)


def _teams(precision_name: str, shape: RowShape, room: int) -> int:
    """Of a block: as many as its threads, registers, memory and barriers are enough for."""
    by_memory = room // _sums_bytes(precision_name, shape)
    # Registers are dealt out to four warps at a time.
    threads = REGISTERS // _registers(precision_name, shape) // (4 * WARP) * (4 * WARP)
    by_threads = min(MOST_THREADS, threads) // shape.threads
    by_barriers = BACKWARD_ROWS if shape.threads == WARP else MOST_BARRIERS
    return max(1, min(BACKWARD_ROWS, by_memory, by_threads, by_barriers))


def sums_in_registers(precision_name: str, shape: RowShape) -> bool:
    """Whether a thread adds up its columns in registers, or in shared memory, row by row."""
    enough = _registers_to_keep(shape) * shape.threads <= REGISTERS
    return enough and shape.values <= KEPT_SUMS[precision_name] and not shape.tiled


def _registers_to_keep(shape: RowShape) -> int:
    """Of a thread that has dy, x and both sums of its columns there, and some for addresses."""
    return 4 * shape.values + 40


def _sums_bytes(precision_name: str, shape: RowShape) -> int:
    return shape.rows * 2 * shape.tile * (8 if precision_name == "float64" else 4)


@cache
def backward_blocks(precision_name: str, rows: int, columns: int) -> int:
    """Blocks of the backward pass along the rows; `partials` is (blocks, 2, columns)."""
    if not rows or not columns:
        return 0
    shape = backward_shape(precision_name, columns)
    # The blocks of a row's tiles run side by side, so that the row is read from memory once.
    most = blocks_at_once(precision_name, shape) // ceil_div(columns, shape.tile)
    return max(1, min(rows, most))


def blocks_at_once(precision_name: str, shape: RowShape) -> int:
    """As many as fit on the GPU: then all go round equally often, and end together."""
    by_memory = SHARED_BYTES // (_sums_bytes(precision_name, shape) + 1024)
    return multiprocessors() * max(1, min(_blocks_by_registers(precision_name, shape), by_memory))


def _blocks_by_registers(precision_name: str, shape: RowShape) -> int:
    """Of a multiprocessor; the compiler is told, and keeps to it."""
    return max(1, REGISTERS // (_registers(precision_name, shape) * shape.threads * shape.rows))


def _registers(precision_name: str, shape: RowShape) -> int:
    """Of a thread: what it keeps, and some for addresses."""
    words = 2 if precision_name == "float64" else 1  # of a number
    if sums_in_registers(precision_name, shape):
        return _registers_to_keep(shape)
    return (2 * shape.values + 16) * words + 24


def backward(
    precision_name: str,
    weight_name: str,
    dy: Any,
    x: Any,
    gamma: Any,
    var: Any,
    mean: Any,
    eps: float,
    dx: Any,
    partials: Any,
    dgamma: Any,
    dbeta: Any,
    rows: int,
    columns: int,
) -> None:
    """dx, dgamma and dbeta, given what `forward` took and gave.

    Args:
        precision_name: of dy, x and dx; var, mean and partials are of its arithmetic type.
        weight_name: of gamma, dgamma and dbeta.
        dy: (rows, columns), flat and contiguous, as x and dx.
        x: input of the forward pass.
        gamma: (columns,), as dgamma and dbeta.
        var: (rows,), as mean.
        mean: of each row.
        eps: that of the forward pass.
        dx: gradient of x.
        partials: workspace of (backward_blocks(...), 2, columns).
        dgamma: gradient of gamma.
        dbeta: gradient of beta.
        rows: number of rows; with 0 of them dgamma and dbeta become 0.
        columns: length of a row.

    """
    if not columns:
        return
    shape = backward_shape(precision_name, columns)
    blocks = backward_blocks(precision_name, rows, columns)
    if rows:
        launch(
            backward_kernel(precision_name, weight_name, shape),
            (blocks, ceil_div(columns, shape.tile)), shape.block,
            dy, x, gamma, var, mean, eps, dx, partials, rows, columns,
            shared_bytes=_sums_bytes(precision_name, shape),
        )  # fmt: skip
    launch(
        fold_kernel(precision(precision_name).real.name, weight_name),
        (ceil_div(columns, FOLD_COLUMNS), 2), (FOLD_COLUMNS, FOLD_THREADS),
        partials, dgamma, dbeta, blocks, columns,
    )  # fmt: skip


@cache
def _tile_reader(precision_name: str, shape: RowShape) -> Any:
    """Device function: reads a tile of dy and x; leaves dy, and x's distance from the mean. Past
    the row's end dy is 0, and the distance finite: no sum must see 0 times infinity.
    """
    real, count = precision(precision_name).real, shape.values
    load, _ = tile_access(precision_name, shape)

    @device_function
    def read(dy, x, start, tile, columns, centre, grad, distance):
        load(dy, start, tile, columns, grad, real(0.0))
        load(x, start, tile, columns, distance, real(0.0))  # not `centre`, itself on its way
        for i in range(count):
            distance[i] -= centre

    return read


@cache
def _weighted(weight_name: str, shape: RowShape) -> Any:
    """Device function: g = gamma dy in the place of a tile of dy."""
    load_weights = weights_access(weight_name, shape)
    real, vector, vectors = precision(weight_name).real, shape.vector, shape.vectors

    @device_function
    def weigh(gamma, tile, columns, grad):
        scale = cuda.local.array(vector, real)
        for k in range(vectors):
            load_weights(gamma, tile, k, columns, scale)
            for lane in range(vector):
                grad[k * vector + lane] *= scale[lane]

    return weigh


@cache
def _team_sums(precision_name: str, shape: RowShape) -> tuple[Any, Any, Any]:
    """Device functions that add up dgamma and dbeta of a team's columns.

    `gather(dy, distance, rstd, dgamma, dbeta, sums, place)` adds a tile's to a thread's own sums,
    and these to the team's unless they are kept for later. `pass_on(dgamma, dbeta, sums, place)`
    adds a thread's own to the team's, in shared memory: dgamma's from `place` on, then dbeta's. A
    thread has its columns to itself, so that no barrier is needed. `column_of(n)`: that of sum
    number n. The sums lie in pieces of 16 bytes, those of neighbouring threads side by side: thus a
    warp's are in different banks.
    """
    real, count = precision(precision_name).real, shape.values
    vector, threads = shape.vector, shape.threads
    piece, width = min(vector, longest_vector(real.name)), shape.tile
    load, store = vector_access(piece)
    kept = sums_in_registers(precision_name, shape)

    @device_function
    def pass_on(dgamma, dbeta, sums, place):
        total = cuda.local.array(piece, real)
        for i in range(0, count, piece):
            first = place + i * threads + cuda.threadIdx.x * piece
            load(sums, first, total)
            for lane in range(piece):
                total[lane] += dgamma[i + lane]
                dgamma[i + lane] = real(0.0)
            store(sums, first, total)
            load(sums, first + width, total)
            for lane in range(piece):
                total[lane] += dbeta[i + lane]
                dbeta[i + lane] = real(0.0)
            store(sums, first + width, total)

    @device_function
    def gather(dy, distance, rstd, dgamma, dbeta, sums, place):
        for i in range(count):
            dgamma[i] += dy[i] * rstd * distance[i]
            dbeta[i] += dy[i]
        if not kept:
            pass_on(dgamma, dbeta, sums, place)

    @device_function
    def column_of(n):
        i, thread = n // (piece * threads) * piece, n // piece % threads
        return (i // vector * threads + thread) * vector + i % vector + n % piece

    return gather, pass_on, column_of


@cache
def backward_kernel(precision_name: str, weight_name: str, shape: RowShape) -> Any:
    """dx of rows number blockIdx.x + n gridDim.x, of the columns of tile blockIdx.y; their sums.

    The block's first team takes the first of these rows, the second team the second: so a few rows
    occupy all blocks.
    """
    real = precision(precision_name).real
    _, store = tile_access(precision_name, shape)
    read, weigh = _tile_reader(precision_name, shape), _weighted(weight_name, shape)
    gather, pass_on, column_of = _team_sums(precision_name, shape)
    add = team_sums(precision_name, shape.threads, shape.rows)
    invert_root = inverse_root(precision_name)
    count, width, rows_of_block, tiled = shape.values, shape.tile, shape.rows, shape.tiled
    threads = shape.threads * shape.rows

    @kernel(threads, blocks=_blocks_by_registers(precision_name, shape))
    def layernorm_backward(dy, x, gamma, var, mean, eps, dx, partials, rows, columns):
        sums = cuda.shared.array(0, real)  # (rows_of_block, 2, width)
        grad = cuda.local.array(count, real)
        distance = cuda.local.array(count, real)
        dgamma = cuda.local.array(count, real)
        dbeta = cuda.local.array(count, real)
        for i in range(count):
            dgamma[i], dbeta[i] = real(0.0), real(0.0)
        thread = cuda.threadIdx.y * cuda.blockDim.x + cuda.threadIdx.x
        for i in range(thread, 2 * rows_of_block * width, threads):
            sums[i] = real(0.0)
        cuda.syncthreads()
        place, share = cuda.threadIdx.y * 2 * width, real(1.0) / real(columns)
        own = cuda.blockIdx.y if tiled else 0
        tiles = (columns + width - 1) // width if tiled else 1
        # All teams of a block go round equally often, so that they have passed as many barriers at
        # the end: compute-sanitizer counts them.
        for first in range(cuda.blockIdx.x, rows, rows_of_block * cuda.gridDim.x):
            row = types.int64(first) + types.int64(cuda.threadIdx.y) * cuda.gridDim.x
            start = row * columns
            limit = columns if row < rows else 0
            known = min(row, rows - 1)
            centre, rstd = mean[known], invert_root(var[known] + real(eps))
            sum_g, sum_g_distance = real(0.0), real(0.0)
            for tile in range(tiles):
                read(dy, x, start, tile, limit, centre, grad, distance)
                if not tiled:
                    gather(grad, distance, rstd, dgamma, dbeta, sums, place)
                weigh(gamma, tile, limit, grad)
                for i in range(count):
                    sum_g += grad[i]
                    sum_g_distance += grad[i] * distance[i]
            sum_g, sum_g_distance = add(sum_g, sum_g_distance)
            mean_g, slope = sum_g * share, sum_g_distance * share * rstd * rstd
            if tiled:  # the own tile again
                read(dy, x, start, own, limit, centre, grad, distance)
                gather(grad, distance, rstd, dgamma, dbeta, sums, place)
                weigh(gamma, own, limit, grad)
            for i in range(count):
                grad[i] = (grad[i] - mean_g - distance[i] * slope) * rstd
            store(dx, start, own, limit, grad)
        pass_on(dgamma, dbeta, sums, place)  # what is kept
        cuda.syncthreads()
        for n in range(thread, width, threads):
            column = own * width + column_of(n)
            if column < columns:
                sum_dgamma, sum_dbeta = real(0.0), real(0.0)
                for team in range(rows_of_block):
                    sum_dgamma += sums[2 * team * width + n]
                    sum_dbeta += sums[(2 * team + 1) * width + n]
                to = 2 * cuda.blockIdx.x * columns + column
                partials[to] = sum_dgamma
                partials[to + columns] = sum_dbeta

    return layernorm_backward


@cache
def fold_kernel(real_name: str, weight_name: str) -> Any:
    """The blocks' sums added up: dgamma in the blocks of blockIdx.y = 0, dbeta in those of 1."""
    real, to_storage = precision(real_name).real, precision(weight_name).store
    add = fold(real, 1)

    @kernel(FOLD_SIZE)
    def layernorm_fold(partials, dgamma, dbeta, parts, columns):
        shared = cuda.shared.array(FOLD_SIZE, real)
        read = cuda.local.array(AHEAD, real)
        sums = cuda.local.array(1, real)
        sums[0] = real(0.0)
        column = types.int64(cuda.blockIdx.x) * FOLD_COLUMNS + cuda.threadIdx.x
        if column < columns:
            for part in range(cuda.threadIdx.y, parts, FOLD_THREADS * AHEAD):
                for n in range(AHEAD):  # all reads first: none waits for another
                    other = min(part + n * FOLD_THREADS, parts - 1)
                    read[n] = partials[(2 * other + cuda.blockIdx.y) * columns + column]
                for n in range(AHEAD):
                    sums[0] += read[n] if part + n * FOLD_THREADS < parts else real(0.0)
        add(shared, sums)
        if cuda.threadIdx.y == 0 and column < columns:
            if cuda.blockIdx.y == 0:
                dgamma[column] = to_storage(sums[0])
            else:
                dbeta[column] = to_storage(sums[0])

    return layernorm_fold


def instances() -> Iterator[Instance]:
    """Rows for one warp, a block, and several tiles; gamma of the precision of x and in float32."""
    size, eps = types.int64, types.float64
    lengths = {"float32": (63, 384, 1024, 16384, 100_000), "float64": (1024, 100_000)}
    for name in ("float32", "float64", "float16", "bfloat16"):
        number = precision(name)
        array, sums = number.array, number.real_array
        for weight_name in sorted({name, number.real.name}):
            weight = precision(weight_name).array
            for columns in lengths.get(name, (384,)):
                yield Instance(
                    f"layernorm_forward[{name}, {weight_name}, {columns}]",
                    forward_kernel(name, weight_name, row_shape(name, columns, FORWARD_BYTES)),
                    (array, weight, weight, eps, array, sums, sums, size, size),
                )
                yield _backward_instance(name, weight_name, columns, 47 * 1024)
        fold_of = fold_kernel(number.real.name, name)
        yield Instance(f"layernorm_fold[{name}]", fold_of, (sums, array, array, size, size))
    # More memory makes other shapes.
    for name, columns in (("float32", 1024), ("float32", 16384), ("bfloat16", 16384)):
        yield _backward_instance(name, name, columns, 226 * 1024, ("sm_90a",))


def _backward_instance(
    name: str, weight_name: str, columns: int, room: int, architectures: tuple[str, ...] = ()
) -> Instance:
    """The backward pass where a block has `room` bytes of shared memory."""
    array, sums, size = precision(name).array, precision(name).real_array, types.int64
    weight, eps = precision(weight_name).array, types.float64
    return Instance(
        f"layernorm_backward[{name}, {weight_name}, {columns}, {room // 1024} KB]",
        backward_kernel(name, weight_name, backward_shape(name, columns, room)),
        (array, array, weight, sums, sums, eps, array, sums, size, size),
        architectures=architectures,
    )
