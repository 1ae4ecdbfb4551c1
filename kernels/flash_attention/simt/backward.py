"""FlashAttention's backward pass on a GPU, with ordinary (SIMT) arithmetic.

Algorithm 2 of "FlashAttention-2" (Dao, 2023), in three kernels. P is computed anew from each row's
maximum m and sum l, which the forward pass left:

    delta = rowsum(dO * O) - dL                 `delta_kernel`
    S = Q K^T,  P = exp(S - m) / l              (block_m, block_n)
    dP = dO V^T
    dS = P * (dP - delta)
    dK += dS^T Q,  dV += P^T dO                 `key_value_kernel`: a block takes a tile of keys
    dQ += dS K                                  `query_kernel`: a block takes a tile of queries

(Not from the logsumexp: where scores are large it has no room for log(l), and P of a row with one
key that counts would not be 1. The scores are the forward pass's to the last bit.)

S and dP are computed twice, once for each of the last two. In return every gradient is the sum of
one block, in an order that never changes: no two blocks add to one number.
"""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

from ...gpu.runtime import (
    WARP,
    cuda,
    device_function,
    kernel,
    precision,
    types,
    warp_barrier,
    warp_sum,
)
from ...gpu.vectors import vector_access
from ..schedule import Band
from ..schedule_cuda import walk
from ..scores_cuda import head_place, slope_function
from ..softmax import reciprocal_of
from .dropout import keep_factor, keep_maker, keep_size
from .registers import Factor, multiply
from .tiles import (
    Blocks,
    Kind,
    Scores,
    exponential,
    fill,
    own_columns,
    own_keys,
    own_place,
    own_rows,
    pair_loader,
    place_asker,
    row_step,
    score_masker,
    tile_copier,
    tile_looker,
    tile_width,
    vector_lanes,
)

DELTA_THREADS = 128
DELTA_ROWS = DELTA_THREADS // WARP


# ----- delta, and m and 1 / l -----


@cache
def delta_kernel(precision_name: str, has_grad_logsumexp: bool) -> Any:
    """One row to a warp: delta, shift = m, and inverse = 1 / l. A row that saw no key gets a shift
    of +inf, with which all its P are 0.
    """
    numbers = precision(precision_name)
    real, load = numbers.real, numbers.load
    reciprocal, infinity, rows_of_block = reciprocal_of(precision_name), float("inf"), DELTA_ROWS

    @kernel(DELTA_THREADS)
    def flash_delta(
        out, grad_out, rows_of, grad_logsumexp, delta, shift, inverse, out_steps, grad_steps, heads,
        seqlen_q, value_dim, count,
    ):  # fmt: skip
        number = types.int64(cuda.blockIdx.x) * rows_of_block + cuda.threadIdx.x // WARP
        row = min(number, count - 1)  # all threads of a warp take part in its sum
        batch_head = row // seqlen_q
        b, h, r = batch_head // heads, batch_head % heads, row % seqlen_q
        x = b * out_steps.batch + h * out_steps.head + r * out_steps.row
        y = b * grad_steps.batch + h * grad_steps.head + r * grad_steps.row
        total = real(0.0)
        for c in range(cuda.threadIdx.x % WARP, value_dim, WARP):
            total += load(out[x + c]) * load(grad_out[y + c * grad_steps.column])
        total = warp_sum(total)
        if number == row and cuda.threadIdx.x % WARP == 0:
            m, l = rows_of[2 * row], rows_of[2 * row + 1]
            inverse[row] = reciprocal(l)
            if l == real(0.0):
                delta[row], shift[row] = real(0.0), real(infinity)
            else:
                if has_grad_logsumexp:
                    total -= grad_logsumexp[row]
                delta[row], shift[row] = total, m

    return flash_delta


# ----- P and dS of a tile -----


class BackwardMemory(NamedTuple):
    """Where tiles begin in shared memory, and how far their rows lie apart, in elements."""

    q: int
    do: int
    k: int
    v: int
    p: int  # (block_m, block_n); with a score function what `score_gradients` says
    ds: int  # (block_m, block_n); for dQ where P was, if there is no score function
    shift: int  # (block_m,)
    inverse: int
    delta: int
    keep: int  # with dropout
    size: int
    width: int  # of q and k, with zeros
    v_width: int  # of v and dO
    step: int
    v_step: int
    p_step: int


@cache
def backward_memory(kind: Kind, blocks: Blocks, needs_p: bool) -> BackwardMemory:
    """The plan of shared memory: of the kernel for dK and dV, which needs P, or of that for dQ."""
    lanes, m, n = vector_lanes(kind.precision), blocks.block_m, blocks.block_n
    width = tile_width(kind.head_dim, blocks.threads_d, lanes)
    v_width = tile_width(kind.value_dim, blocks.threads_d, lanes)
    step, v_step = row_step(width, lanes), row_step(v_width, lanes)
    p_step = n + max(blocks.threads_n % 32, lanes)
    starts = [0]
    needs_p, keep = needs_p or kind.functions.score is not None, keep_size(kind, blocks)
    p = m * p_step if needs_p else 0
    for size in (m * step, m * v_step, n * step, n * v_step, p, m * p_step, m, m, m, keep):
        starts.append(starts[-1] + size)
    return BackwardMemory(*starts, width, v_width, step, v_step, p_step)  # type: ignore[call-arg]


@cache
def tile_pair(kind: Kind, blocks: Blocks, plan: BackwardMemory, rows: int) -> Any:
    """`pair_loader` of tiles of queries and dO, or of keys and values."""
    return pair_loader(
        kind,
        tile_copier(kind, blocks, rows, kind.head_dim, plan.width, plan.step),
        tile_copier(kind, blocks, rows, kind.value_dim, plan.v_width, plan.v_step),
    )


@cache
def row_loader(precision_name: str, block_m: int, threads: int, plan: BackwardMemory) -> Any:
    """Device function that copies a tile's numbers of rows to shared memory; the shift is +inf past
    the end.
    """
    real = precision(precision_name).real
    to_shift, to_inverse, to_delta = plan.shift, plan.inverse, plan.delta
    infinity = float("inf")

    @device_function
    def load_rows(memory, rows, first, count):
        shift, inverse, delta = rows
        for row in range(cuda.threadIdx.x, block_m, threads):
            inside = row < count
            memory[to_shift + row] = shift[first + row] if inside else real(infinity)
            memory[to_inverse + row] = inverse[first + row] if inside else real(0.0)
            memory[to_delta + row] = delta[first + row] if inside else real(0.0)

    return load_rows


@cache
def before_rule(kind: Kind, to_ds: int, keeps: str) -> Any:
    """What `score_gradients` keeps of a score where dS will be: see `score_masker`."""
    if kind.functions.score is None:
        return None
    asked_at, keeps_score = place_asker(kind), keeps == "score"
    slope_of = slope_function(kind.functions, kind.precision)

    @device_function
    def keep(memory, place, row, column, scores):
        if keeps_score:
            memory[place + to_ds] = memory[place]
        else:
            memory[place + to_ds] = slope_of(memory[place], asked_at(row, column, scores))

    return keep


@cache
def score_gradients(kind: Kind, blocks: Blocks, plan: BackwardMemory, keeps: str = "p") -> Any:
    """Device function: from the tiles q, do, k, v to the tiles ds and p.

    A thread writes its own elements of them and reads none but these, so there is no barrier.

    Args:
        kind: of the kernel.
        blocks: its tiles.
        plan: of shared memory.
        keeps: what is in the tile p in the end: "p", P with dropout; or with a score function
            "gradients", of what this function gave. With "score" these are there, too, and in the
            tile ds there is what the function got.

    """
    real = precision(kind.precision).real
    lanes, rows, keys = vector_lanes(kind.precision), blocks.rows, blocks.keys
    threads_m, threads_n = blocks.threads_m, blocks.threads_n
    q_tile, do_tile, k_tile, v_tile, p_tile = plan[:5]
    shift_at, inverse_at, delta_at = plan.shift, plan.inverse, plan.delta
    to_ds = plan.ds - plan.p
    step, v_step, p_step = plan.step, plan.v_step, plan.p_step
    scores = multiply(own_rows(blocks, step), own_keys(blocks, step), kind.head_dim, lanes)
    products = multiply(own_rows(blocks, v_step), own_keys(blocks, v_step), kind.value_dim, lanes)
    apply_mask = score_masker(kind, blocks, p_tile, p_step, before_rule(kind, to_ds, keeps))
    factor_of, looks = keep_factor(kind, blocks, plan.keep), tile_looker(kind, blocks)
    exp_of, place_of = exponential(kind), own_place(threads_n)
    dropout, has_score = kind.dropout, kind.functions.score is not None
    keeps_p, has_slope = keeps == "p", has_score and keeps != "score"

    @device_function
    def run(memory, sums, row0, key0, full, of_head, keep_scale):
        my_row, my_key = place_of()
        own = p_tile + my_row * p_step + my_key
        # S = Q K^T, P = exp(S - m) / l
        fill(sums, rows, keys, real(0.0))
        scores(memory, q_tile + my_row * step, k_tile + my_key * step, sums)
        if looks(row0, key0, full, of_head.band):
            apply_mask(memory, sums, row0, key0, of_head)
        for i in range(rows):
            shift = memory[shift_at + my_row + i * threads_m]
            inverse = memory[inverse_at + my_row + i * threads_m]
            for j in range(keys):
                place = own + i * threads_m * p_step + j * threads_n
                memory[place] = exp_of(sums[i, j], shift) * inverse
        # dP = dO V^T
        fill(sums, rows, keys, real(0.0))
        products(memory, do_tile + my_row * v_step, v_tile + my_key * v_step, sums)
        # dS = P * (Z dP - delta), and P Z
        for i in range(rows):
            delta = memory[delta_at + my_row + i * threads_m]
            for j in range(keys):
                place = own + i * threads_m * p_step + j * threads_n
                p, z = memory[place], real(1.0)
                if dropout:
                    z = factor_of(
                        memory, my_row + i * threads_m, my_key + j * threads_n, keep_scale
                    )
                ds = p * (z * sums[i, j] - delta)
                if not keeps_p:
                    memory[place] = ds
                elif dropout:
                    memory[place] = p * z
                if has_slope:  # 0 times an infinite slope is 0
                    ds = ds * memory[place + to_ds] if ds != real(0.0) else real(0.0)
                if has_slope or not has_score:
                    memory[place + to_ds] = ds

    return run


@cache
def gradient_writer(kind: Kind, blocks: Blocks, rows: int, columns: int, width: int) -> Any:
    """Device function that writes a thread's part of one row of a gradient.

    `(target, start, values, row, factor)`: the thread's columns of values[row], times a factor, go
    to target[start] and on.
    """
    numbers, lanes = precision(kind.precision), vector_lanes(kind.precision)
    to_storage, storage = numbers.store, getattr(types, numbers.storage.name)
    threads_d, count = blocks.threads_d, width // blocks.threads_d
    at_once = lanes if columns % lanes == 0 else 1
    _, write = vector_access(at_once)
    place_of = own_place(threads_d)

    @device_function
    def write_row(target, start, values, row, factor):
        pieces = cuda.local.array(at_once, storage)
        _, mine = place_of()
        for c in range(0, count, at_once):
            column = (c // lanes * threads_d + mine) * lanes + c % lanes
            if column < columns:
                for n in range(at_once):
                    pieces[n] = to_storage(values[row, c + n] * factor)
                write(target, start + column, pieces)

    return write_row


# ----- dK and dV -----


@cache
def key_value_kernel(kind: Kind, blocks: Blocks) -> Any:
    """A block computes block_n rows of dK and dV, from all queries' heads that share them."""
    real, lanes = precision(kind.precision).real, vector_lanes(kind.precision)
    plan, block_m, block_n = backward_memory(kind, blocks, True), blocks.block_m, blocks.block_n
    rows, keys, threads_d = blocks.rows, blocks.keys, blocks.threads_d
    head_dim, value_dim = kind.head_dim, kind.value_dim
    q_tile, do_tile, k_tile, v_tile, p_tile, ds_tile = plan[:6]
    step, v_step, p_step, width, v_width = (
        plan.step, plan.v_step, plan.p_step, plan.width, plan.v_width,
    )  # fmt: skip
    load_queries = tile_pair(kind, blocks, plan, block_m)
    load_keys = tile_pair(kind, blocks, plan, block_n)
    load_rows = row_loader(kind.precision, block_m, blocks.threads, plan)
    to_ds, dropout = score_gradients(kind, blocks, plan), kind.dropout
    make_keep = keep_maker(kind, blocks, plan.keep)
    # A thread's keys and columns of dK and dV; the sums are over queries.
    key_threads, place_of = blocks.threads // threads_d, own_place(threads_d)
    p_keys = own_columns(block_n, key_threads, lanes, p_step)
    own = p_keys.count
    count, v_count = width // threads_d, v_width // threads_d
    add_dk = multiply(p_keys, own_columns(width, threads_d, lanes, step), block_m, lanes)
    add_dv = multiply(p_keys, own_columns(v_width, threads_d, lanes, v_step), block_m, lanes)
    write_dk = gradient_writer(kind, blocks, own, head_dim, width)
    write_dv = gradient_writer(kind, blocks, own, value_dim, v_width)
    unit, to_natural = kind.unit_of_products, 1.0 / kind.unit_of_products
    places, tile_at = walk(kind.is_sparse, block_m, block_n, transposed=True)

    @kernel(blocks.threads, blocks=blocks.at_once)
    def flash_backward_key_value(
        q, k, v, mask, offset, grad_out, shift, inverse, delta, dk, dv, q_steps, k_steps, v_steps,
        mask_steps, grad_steps, dk_steps, dv_steps, sizes, group, scale, seed, threshold, keep,
        words, lists,
    ):  # fmt: skip
        heads, seqlen_q, seqlen_k, lower, upper, k_group, v_group = sizes
        memory = cuda.shared.array(0, real)
        sums = cuda.local.array((rows, keys), real)
        dk_sums = cuda.local.array((own, count), real)
        dv_sums = cuda.local.array((own, v_count), real)
        my_keys, my_columns = place_of()
        tiles = (seqlen_k + block_n - 1) // block_n
        slot = types.int64(cuda.blockIdx.x // tiles)  # of heads that share dK and dV
        tile = cuda.blockIdx.x % tiles
        key0 = tile * block_n
        slots = heads // group
        b, first_head = slot // slots, slot % slots * group
        k_start = b * k_steps.batch + first_head // k_group * k_steps.head + key0 * k_steps.row
        v_start = b * v_steps.batch + first_head // v_group * v_steps.head + key0 * v_steps.row
        load_keys(
            memory, (k_tile, k, k_start, k_steps.row, k_steps.column),
            (v_tile, v, v_start, v_steps.row, v_steps.column), seqlen_k - key0, real(1.0),
        )  # fmt: skip
        fill(dk_sums, own, count, real(0.0))
        fill(dv_sums, own, v_count, real(0.0))
        band = Band(lower, upper, seqlen_q, seqlen_k)
        rows_of = shift, inverse, delta
        dropout_of = (seed + offset[0], types.uint64(threshold), real(keep))
        for h in range(first_head, first_head + group):
            batch_head = b * heads + h
            q_start = b * q_steps.batch + h * q_steps.head
            do_start = b * grad_steps.batch + h * grad_steps.head
            of_head = Scores(band, mask, head_place(b, h, mask_steps), words)
            first, end = places(lists, b, h, tile, sizes)
            # From the last tile to the first: with a causal mask early queries have the largest P,
            # and a long sum is most accurate when these come last.
            for number in range(first, end):
                row0, full = tile_at(lists, first + end - 1 - number)
                load_queries(
                    memory, (q_tile, q, q_start + row0 * q_steps.row, q_steps.row, q_steps.column),
                    (
                        do_tile, grad_out, do_start + row0 * grad_steps.row, grad_steps.row,
                        grad_steps.column,
                    ),
                    seqlen_q - row0, real(scale * unit),
                )  # fmt: skip
                load_rows(memory, rows_of, batch_head * seqlen_q + row0, seqlen_q - row0)
                if dropout:
                    make_keep(memory, row0, key0, batch_head, dropout_of)
                cuda.syncthreads()
                to_ds(memory, sums, row0, key0, full, of_head, dropout_of[2])
                cuda.syncthreads()
                # dK += dS^T Q
                add_dk(memory, ds_tile + my_keys * lanes, q_tile + my_columns * lanes, dk_sums)
                # dV += P^T dO
                add_dv(memory, p_tile + my_keys * lanes, do_tile + my_columns * lanes, dv_sums)

        for i in range(own):
            row = key0 + (i // lanes * key_threads + my_keys) * lanes + i % lanes
            if row < seqlen_k:
                dk_start = b * dk_steps.batch + slot % slots * dk_steps.head + row * dk_steps.row
                dv_start = b * dv_steps.batch + slot % slots * dv_steps.head + row * dv_steps.row
                # The queries were times scale and unit.
                write_dk(dk, dk_start, dk_sums, i, real(to_natural))
                write_dv(dv, dv_start, dv_sums, i, real(1.0))

    return flash_backward_key_value


# ----- dQ -----


@cache
def query_kernel(kind: Kind, blocks: Blocks, keep_scores: bool) -> Any:
    """A block computes block_m rows of dQ; with `keep_scores` it also writes dS, whole."""
    real, lanes = precision(kind.precision).real, vector_lanes(kind.precision)
    plan, block_m, block_n = backward_memory(kind, blocks, False), blocks.block_m, blocks.block_n
    rows, keys, threads_n, threads_m = blocks.rows, blocks.keys, blocks.threads_n, blocks.threads_m
    head_dim = kind.head_dim
    q_tile, do_tile, k_tile, v_tile, p_tile, ds_tile = plan[:6]
    step, p_step, width = plan.step, plan.p_step, plan.width
    load_queries = tile_pair(kind, blocks, plan, block_m)
    load_keys = tile_pair(kind, blocks, plan, block_n)
    load_rows = row_loader(kind.precision, block_m, blocks.threads, plan)
    has_score, dropout = kind.functions.score is not None, kind.dropout
    to_ds = score_gradients(kind, blocks, plan, "gradients" if has_score else "p")
    kept_tile = p_tile if has_score else ds_tile
    make_keep = keep_maker(kind, blocks, plan.keep)
    count, place_of, unit = width // threads_n, own_place(threads_n), kind.unit_of_products
    places, tile_at = walk(kind.is_sparse, block_m, block_n)
    p_rows = Factor(rows, threads_m * p_step)
    add_dq = multiply(p_rows, own_columns(width, threads_n, lanes, step), block_n, lanes)
    write_dq = gradient_writer(kind, blocks, rows, head_dim, width)

    @kernel(blocks.threads, blocks=blocks.at_once)
    def flash_backward_query(
        q, k, v, mask, offset, grad_out, shift, inverse, delta, dq, ds, q_steps, k_steps, v_steps,
        mask_steps, grad_steps, dq_steps, sizes, scale, seed, threshold, keep, words, lists,
    ):  # fmt: skip
        heads, seqlen_q, seqlen_k, lower, upper, k_group, v_group = sizes
        memory = cuda.shared.array(0, real)
        sums = cuda.local.array((rows, keys), real)
        dq_sums = cuda.local.array((rows, count), real)
        my_row, my_key = place_of()
        tiles = (seqlen_q + block_m - 1) // block_m
        batch_head = types.int64(cuda.blockIdx.x // tiles)
        tile = tiles - 1 - cuda.blockIdx.x % tiles
        row0 = tile * block_m
        b, h = batch_head // heads, batch_head % heads
        k_start = b * k_steps.batch + h // k_group * k_steps.head
        v_start = b * v_steps.batch + h // v_group * v_steps.head
        load_queries(
            memory,
            (
                q_tile, q, b * q_steps.batch + h * q_steps.head + row0 * q_steps.row, q_steps.row,
                q_steps.column,
            ),
            (
                do_tile, grad_out,
                b * grad_steps.batch + h * grad_steps.head + row0 * grad_steps.row,
                grad_steps.row, grad_steps.column,
            ),
            seqlen_q - row0, real(scale * unit),
        )  # fmt: skip
        rows_of = shift, inverse, delta
        load_rows(memory, rows_of, batch_head * seqlen_q + row0, seqlen_q - row0)
        fill(dq_sums, rows, count, real(0.0))
        band = Band(lower, upper, seqlen_q, seqlen_k)
        of_head = Scores(band, mask, head_place(b, h, mask_steps), words)
        dropout_of = (seed + offset[0], types.uint64(threshold), real(keep))
        first, end = places(lists, b, h, tile, sizes)
        for number in range(first, end):
            key0, full = tile_at(lists, number)
            load_keys(
                memory, (k_tile, k, k_start + key0 * k_steps.row, k_steps.row, k_steps.column),
                (v_tile, v, v_start + key0 * v_steps.row, v_steps.row, v_steps.column),
                seqlen_k - key0, real(1.0),
            )  # fmt: skip
            if dropout:
                make_keep(memory, row0, key0, batch_head, dropout_of)
            cuda.syncthreads()
            to_ds(memory, sums, row0, key0, full, of_head, dropout_of[2])
            warp_barrier()  # a row's threads are in one warp
            if keep_scores:
                for i in range(rows):
                    for j in range(keys):
                        r, c = my_row + i * threads_m, my_key + j * threads_n
                        if row0 + r < seqlen_q and key0 + c < seqlen_k:
                            place = (batch_head * seqlen_q + row0 + r) * seqlen_k + key0 + c
                            ds[place] = memory[kept_tile + r * p_step + c]
            # dQ += dS K
            add_dq(memory, ds_tile + my_row * p_step, k_tile + my_key * lanes, dq_sums)

        for i in range(rows):
            row = row0 + my_row + i * threads_m
            if row < seqlen_q:
                dq_start = b * dq_steps.batch + h * dq_steps.head + row * dq_steps.row
                write_dq(dq, dq_start, dq_sums, i, real(scale))

    return flash_backward_query


__all__ = ["backward_memory", "delta_kernel", "key_value_kernel", "query_kernel"]
