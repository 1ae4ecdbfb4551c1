"""FlashAttention's backward pass on tensor cores, with `mma.sync`: Turing, Ampere, Ada.

Algorithm 2 of "FlashAttention-2" (Dao, 2023), in three kernels. P is computed anew from a number L
of each row:

    delta = rowsum(dO * O) - dL, L, rest        mma/delta.py
    S^T = K Q^T,  P^T = exp(S^T - L)            `key_value_kernel`: a block owns keys, its tiles'
    dP^T = V dO^T                               rows; queries pass by
    dS^T = P^T * (dP^T - delta)                 (keys, queries)
    dV += P^T dO,  dK += dS^T Q
    S, P, dP, dS                                `query_kernel`: a block owns queries; keys pass by
    dQ += dS K

Each kernel has the shape of the forward pass: P and dS are used as they lie in the registers, as
the left operand of the last products. What is missing in P, the factor `rest` of a row, is seldom
anything but 1. S and dP are computed twice for that, seven products for
five. In return every gradient is the sum of one warp, in an order that never changes.
"""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

from ...gpu.ptx import global_address, ld_global_f32, opaque, shared_address
from ...gpu.register_tile import RegisterTile
from ...gpu.runtime import cuda, device_function, kernel, precision, types
from ..fragments.dropout import dropout_words
from ..fragments.store import write_scores
from ..schedule_cuda import line_of, walk
from ..scores_cuda import head_place
from .memory import copy_barriers, pair_copier, row_writer
from .scores import read_own_rows, scale_columns, score_gradients, score_rule
from .tiles import (
    Kind,
    Tiles,
    block_number,
    divide,
    lane_places,
    load_rows,
    multiply_columns,
    multiply_rows,
    thread_number,
)

# ----- shared memory -----


class BackwardMemory(NamedTuple):
    """Where tiles begin in shared memory, in bytes: a block's own two, and of each stage the two
    that pass by, and the L and delta of its queries.
    """

    own: int  # keys, or queries
    own_2: int  # values, or dO
    other: int
    other_2: int
    shift: int
    delta: int
    stage: int  # from one stage's tiles to the next one's
    size: int


@cache
def backward_memory(kind: Kind, tiles: Tiles, needs_rows: bool) -> BackwardMemory:
    """The plan of shared memory; with `needs_rows` that of the kernel for dK and dV."""
    step, v_step = kind.step(kind.width), kind.step(kind.value_width)
    other = tiles.rows * (step + v_step)
    other_2 = other + tiles.columns * step
    shift = other_2 + tiles.columns * v_step
    delta = shift + 4 * tiles.columns * needs_rows
    end = delta + 4 * tiles.columns * needs_rows
    stage = end - other
    return BackwardMemory(
        0, tiles.rows * step, other, other_2, shift, delta, stage,
        other + tiles.stages * stage,
    )  # fmt: skip


# ----- dK and dV -----


class HeadLines(NamedTuple):
    """The tiles of queries that a tile of keys visits, of all heads that share dK and dV.

    Args:
        lists: of the kernel, transposed.
        batch: of the heads.
        first_head: of them.
        group: how many.
        tile: of keys.
        first, count: the tiles of each head where the band says it.

    """

    lists: Any
    batch: Any
    first_head: Any
    group: Any
    tile: Any
    first: Any
    count: Any


@cache
def query_walk(kind: Kind, tiles: Tiles) -> Any:
    """Device functions. `turns_of(lines)`: how many tiles there are. `turn_at(turn, lines)`: which
    head a turn takes, where its tile of queries begins, and whether that is full.

    From the last tile to the first: with a causal mask early queries have the largest P, and a long
    sum is most accurate when these come last.
    """
    is_sparse, whole = kind.is_sparse, types.int32
    _, tile_at = walk(is_sparse, tiles.columns, tiles.rows, transposed=True)

    @device_function
    def turns_of(lines):
        if not is_sparse:
            return types.int32(lines.count * lines.group)
        turns = whole(0)
        for head in range(lines.group):
            first, end = line_of(lines.lists, lines.batch, lines.first_head + head, lines.tile)
            turns += end - first
        return turns

    @device_function
    def turn_at(turn, lines):
        if not is_sparse:
            head, done = divide(turn, lines.count)
            row0, full = tile_at(lines.lists, lines.first + lines.count - 1 - done)
            return lines.first_head + head, row0, full
        h, rest = whole(lines.first_head), whole(turn)
        first, end = line_of(lines.lists, lines.batch, h, lines.tile)
        while rest >= end - first:
            rest -= end - first
            h += whole(1)
            first, end = line_of(lines.lists, lines.batch, h, lines.tile)
        row0, full = tile_at(lines.lists, end - 1 - rest)
        return h, row0, full

    return turns_of, turn_at


@cache
def query_copier(kind: Kind, tiles: Tiles, plan: BackwardMemory) -> Any:
    """Device function that begins to copy a tile of queries and one of dO of the head h."""
    copy = pair_copier(kind, tiles, tiles.columns, (plan.other, plan.other_2))

    @device_function
    def copy_queries(memory, base, at, others_of, h, row0):
        q, grad_out, q_start, grad_start, q_steps, grad_steps, seqlen_q = others_of
        queries = (q, q_start + h * q_steps.head, q_steps.row)
        upstream = (grad_out, grad_start + h * grad_steps.head, grad_steps.row)
        copy(memory, base, at, queries, upstream, row0, seqlen_q)

    return copy_queries


@cache
def row_copier(tiles: Tiles, plan: BackwardMemory) -> Any:
    """Device functions that copy a tile's L and delta to shared memory, in two halves: `read_rows`
    gives a thread's pair of numbers, 0 past the end, and `put_rows` writes them. (A query of zeros
    with an L of 0 adds nothing: its dO and delta are 0.)
    """
    columns, shift_at, delta_at = tiles.columns, plan.shift // 4, plan.delta // 4

    @device_function
    def read_rows(rows_of, h, row0):
        shift, delta, first_head, seqlen_q = rows_of
        thread, pair = cuda.threadIdx.x, (types.float32(0.0), types.float32(0.0))
        if thread < columns and row0 + thread < seqlen_q:
            place = (first_head + h) * seqlen_q + row0 + thread
            pair = (shift[place], delta[place])
        return pair

    @device_function
    def put_rows(numbers, at, pair):
        thread = cuda.threadIdx.x
        if thread < columns:
            numbers[types.int64(at // 4) + shift_at + thread] = pair[0]
            numbers[types.int64(at // 4) + delta_at + thread] = pair[1]

    return read_rows, put_rows


@cache
def key_value_place(tiles: Tiles) -> Any:
    """Device function `(block, key_tiles, slots)`: a block's batch, slot of dK and dV, first key,
    and part.
    """
    rows, parts = tiles.rows, tiles.parts

    @device_function
    def place_of(block, key_tiles, slots):
        item, part = divide(block, parts)
        number, tile = divide(item, key_tiles)
        b, slot = divide(number, slots)
        return b, slot, tile * rows, part

    return place_of


@cache
def key_value_kernel(kind: Kind, tiles: Tiles) -> Any:
    """A block computes `tiles.rows` rows of dK and dV, from all queries' heads that share them."""
    storage = getattr(types, precision(kind.precision).storage.name)
    block_n, block_m, row_blocks, parts = tiles.rows, tiles.columns, tiles.row_blocks, tiles.parts
    plan, two_stages, in_registers = (
        backward_memory(kind, tiles, True), tiles.stages == 2, tiles.in_registers,
    )  # fmt: skip
    v_tile, q_tile, do_tile, stage_bytes = plan.own_2, plan.other, plan.other_2, plan.stage
    shift_at, to_delta = plan.shift, plan.delta - plan.shift
    width, value_width = kind.width, kind.value_width
    step, v_step = kind.step(width), kind.step(value_width)
    part, v_part = width // parts, value_width // parts
    part_step, v_part_step = kind.step(part), kind.step(v_part)
    part_bytes, v_part_bytes = part * kind.itemsize, v_part * kind.itemsize
    copy_keys = pair_copier(kind, tiles, block_n, (plan.own, plan.own_2))
    copy_queries = query_copier(kind, tiles, plan)
    read_rows, put_rows = row_copier(tiles, plan)
    (commit, wait), (own, others, across) = copy_barriers(kind), lane_places(kind)
    load_k, load_v = load_rows(kind, row_blocks, width), load_rows(kind, row_blocks, value_width)
    scores_of = multiply_rows(kind, row_blocks, block_m, width, in_registers, transposed=True)
    products_of = multiply_rows(kind, row_blocks, block_m, value_width, in_registers)
    add_dk = multiply_columns(kind, row_blocks, block_m, part, step)
    add_dv = multiply_columns(kind, row_blocks, block_m, v_part, v_step)
    scores = RegisterTile(block_m, row_blocks)
    of_dk, of_dv = RegisterTile(part, row_blocks), RegisterTile(v_part, row_blocks)
    rule = score_rule(kind, scores, (block_m, block_n), keys_are_rows=True, derives=True)
    gradients = score_gradients(kind, scores, True)
    complete, unit = scale_columns(scores), kind.unit_of_products
    whole, u64 = types.int32, types.uint64
    no_dk, no_dv, scale_dk, scale_dv = of_dk.zero, of_dv.zero, of_dk.scale_rows, of_dv.scale_rows
    fill_rows, dropout = scores.fill_rows, kind.dropout
    write_dk = row_writer(kind, row_blocks, kind.head_dim, part)
    write_dv = row_writer(kind, row_blocks, kind.value_dim, v_part)
    place_of, (turns_of, turn_at) = key_value_place(tiles), query_walk(kind, tiles)
    places, _ = walk(False, block_m, block_n, transposed=True)
    scaled_first, exponent_unit = kind.scaled_first, kind.exponent_unit

    @kernel(tiles.threads, blocks=tiles.at_once)
    def flash_backward_key_value_mma(
        q, k, v, mask, offset, grad_out, shift, delta, rest, dk, dv, call, q_steps, k_steps,
        v_steps, mask_steps, grad_steps, dk_steps, dv_steps, sizes, group, scale, seed, threshold,
        keep, words, lists,
    ):  # fmt: skip
        heads, seqlen_q, seqlen_k, lower, upper, k_group, v_group = sizes
        memory, numbers = cuda.shared.array(0, storage), cuda.shared.array(0, types.float32)
        base, thread = shared_address(memory), cuda.threadIdx.x
        lane, warp_row = thread % 32, thread // 32 * 16 * row_blocks
        key_tiles = (seqlen_k + block_n - 1) // block_n
        slots, _ = divide(heads, group)  # of heads that share dK and dV
        b, slot, key0, my_part = place_of(cuda.blockIdx.x, key_tiles, slots)
        first_head = slot * group
        keys = (k, b * k_steps.batch + divide(first_head, k_group)[0] * k_steps.head, k_steps.row)
        values = (v, b * v_steps.batch + divide(first_head, v_group)[0] * v_steps.head, v_steps.row)
        copy_keys(memory, base, 0, keys, values, key0, seqlen_k)
        band = (
            types.int32(lower), types.int32(upper), types.int32(seqlen_q), types.int32(seqlen_k),
        )  # fmt: skip
        own_scale, keep_scale = types.float32(scale * unit), types.float32(keep)
        exponent_scale = types.float32(1.0) if scaled_first else own_scale
        if exponent_unit:
            exponent_scale = types.float32(exponent_unit)
        incomplete = ld_global_f32(global_address(rest)) == types.float32(call)
        # Where this lane reads, and which key and query its first score is.
        k_place = types.uint32(base + warp_row * step + own(step))
        v_place = types.uint32(base + v_tile + warp_row * v_step + own(v_step))
        q_place = types.uint32(base + q_tile + others(step))
        do_place = types.uint32(base + do_tile + others(v_step))
        q_across = types.uint32(base + q_tile + my_part * part_bytes + across(step))
        do_across = types.uint32(base + do_tile + my_part * v_part_bytes + across(v_step))
        rows_place = types.uint32(base + shift_at + lane % 4 * 8)
        my_key, my_row = key0 + warp_row + lane // 4, lane % 4 * 2

        tile, _ = divide(key0, block_n)
        first, end = places(lists, b, first_head, tile, sizes)
        lines = HeadLines(lists, b, first_head, group, tile, first, end - first)
        turns = turns_of(lines)
        rows_of = (shift, delta, b * heads, seqlen_q)
        others_of = (
            q, grad_out, b * q_steps.batch, b * grad_steps.batch, q_steps, grad_steps, seqlen_q,
        )  # fmt: skip
        if two_stages and turns > 0:
            h, row0, _ = turn_at(0, lines)
            copy_queries(memory, base, 0, others_of, h, row0)
            put_rows(numbers, 0, read_rows(rows_of, h, row0))
        commit()
        if in_registers:
            wait()
            cuda.syncthreads()
        own_k = load_k(k_place) if in_registers else k_place
        own_v = load_v(v_place) if in_registers else v_place
        dk_sums, dv_sums = no_dk(), no_dv()
        for turn in range(turns):
            h, row0, full = turn_at(turn, lines)
            at = types.uint32(turn % 2 * stage_bytes if two_stages else 0)
            if two_stages:
                wait()
                cuda.syncthreads()  # the tiles have come, and all warps are done with the others
                next_h, next_row0, _ = turn_at(min(turn + 1, turns - 1), lines)
                next_rows = read_rows(rows_of, next_h, next_row0)
                if turn + 1 < turns:
                    copy_queries(memory, base, stage_bytes - at, others_of, next_h, next_row0)
                    commit()
            else:
                cuda.syncthreads()
                copy_queries(memory, base, 0, others_of, h, row0)
                commit()
                put_rows(numbers, 0, read_rows(rows_of, h, row0))
                wait()
                cuda.syncthreads()
            # S^T = K Q^T and dP^T = V dO^T, whose rows are keys
            s = scores_of(own_k, types.uint32(q_place + at))
            rated = rule(
                s, row0 + my_row, my_key, row0, key0, full, sizes, band, mask,
                head_place(b, h, mask_steps), own_scale, words,
            )  # fmt: skip
            dp = products_of(own_v, types.uint32(do_place + at))
            p, ds, _ = gradients(
                rated, dp, types.uint32(rows_place + at), types.uint32(rows_place + to_delta + at),
                exponent_scale, row0 + my_row, my_key,
                dropout_words(seed + offset[0], b * heads + h, threshold), keep_scale,
            )  # fmt: skip
            if incomplete:
                # Computed here: nothing of it is to stay in registers.
                query = whole(opaque(types.uint32(row0))) + whole(thread_number() % 4 * 2)
                head = whole(opaque(types.uint32(h))) + b * heads
                first_row = types.int64(head) * seqlen_q + 1
                p, ds = complete(
                    p, ds, global_address(rest) + u64(4 * first_row), query, whole(seqlen_q)
                )
            # dV += P^T dO, dK += dS^T Q
            dv_sums = add_dv(dv_sums, p, types.uint32(do_across + at))
            dk_sums = add_dk(dk_sums, ds, types.uint32(q_across + at))
            if two_stages:
                put_rows(numbers, stage_bytes - at, next_rows)

        wait()  # for the keys, where there was no tile of queries
        cuda.syncthreads()
        b, slot, key0, my_part = place_of(block_number(), key_tiles, slots)
        warp_row = thread_number() // 32 * 16 * row_blocks
        row = key0 + warp_row
        write_dk(
            memory, base, warp_row * part_step, scale_dk(dk_sums, fill_rows(types.float32(scale))),
            dk, b * dk_steps.batch + slot * dk_steps.head + row * dk_steps.row, dk_steps.row,
            seqlen_k - row, my_part * part,
        )  # fmt: skip
        write_dv(
            memory, base, v_tile + warp_row * v_part_step,
            scale_dv(dv_sums, fill_rows(keep_scale if dropout else types.float32(1.0))), dv,
            b * dv_steps.batch + slot * dv_steps.head + row * dv_steps.row, dv_steps.row,
            seqlen_k - row, my_part * v_part,
        )  # fmt: skip

    return flash_backward_key_value_mma


# ----- dQ -----


@cache
def query_kernel(kind: Kind, tiles: Tiles, keep_scores: bool) -> Any:
    """A block computes `tiles.rows` rows of dQ; with `keep_scores` it also writes dS, whole."""
    storage = getattr(types, precision(kind.precision).storage.name)
    block_m, block_n, row_blocks = tiles.rows, tiles.columns, tiles.row_blocks
    plan, two_stages, in_registers = (
        backward_memory(kind, tiles, False), tiles.stages == 2, tiles.in_registers,
    )  # fmt: skip
    do_tile, k_tile, v_tile, stage_bytes = plan.own_2, plan.other, plan.other_2, plan.stage
    width, value_width = kind.width, kind.value_width
    step, v_step = kind.step(width), kind.step(value_width)
    copy_queries = pair_copier(kind, tiles, block_m, (plan.own, plan.own_2))
    copy_keys = pair_copier(kind, tiles, block_n, (plan.other, plan.other_2))
    (commit, wait), (own, others, across) = copy_barriers(kind), lane_places(kind)
    load_q, load_do = load_rows(kind, row_blocks, width), load_rows(kind, row_blocks, value_width)
    scores_of = multiply_rows(kind, row_blocks, block_n, width, in_registers)
    products_of = multiply_rows(kind, row_blocks, block_n, value_width, in_registers)
    add_dq = multiply_columns(kind, row_blocks, block_n, width, step)
    scores, of_dq = RegisterTile(block_n, row_blocks), RegisterTile(width, row_blocks)
    rule = score_rule(kind, scores, (block_m, block_n), derives=True)
    gradients, unit = score_gradients(kind, scores, False), kind.unit_of_products
    places, tile_at = walk(kind.is_sparse, block_m, block_n)
    read, put_ds = read_own_rows(scores), write_scores(scores)
    no_dq, scale_dq, scale_ds = of_dq.zero, of_dq.scale_rows, scores.scale_rows
    scale_row = scores.each_row(lambda x, factor: x * factor, scores.rows_type, types.float32)
    write_dq = row_writer(kind, row_blocks, kind.head_dim, width)
    scaled_first, exponent_unit, infinity = kind.scaled_first, kind.exponent_unit, float("inf")

    @kernel(tiles.threads, blocks=tiles.at_once)
    def flash_backward_query_mma(
        q, k, v, mask, offset, grad_out, shift, delta, rest, dq, ds_out, q_steps, k_steps, v_steps,
        mask_steps, grad_steps, dq_steps, sizes, scale, seed, threshold, keep, words, lists,
    ):  # fmt: skip
        heads, seqlen_q, seqlen_k, lower, upper, k_group, v_group = sizes
        memory = cuda.shared.array(0, storage)
        base, thread = shared_address(memory), cuda.threadIdx.x
        lane, warp_row = thread % 32, thread // 32 * 16 * row_blocks
        row_tiles = (seqlen_q + block_m - 1) // block_m
        batch_head, number = divide(cuda.blockIdx.x, row_tiles)
        tile = row_tiles - 1 - number
        row0 = tile * block_m
        b, h = divide(batch_head, heads)
        queries = (q, b * q_steps.batch + h * q_steps.head, q_steps.row)
        upstream = (grad_out, b * grad_steps.batch + h * grad_steps.head, grad_steps.row)
        keys = (k, b * k_steps.batch + divide(h, k_group)[0] * k_steps.head, k_steps.row)
        values = (v, b * v_steps.batch + divide(h, v_group)[0] * v_steps.head, v_steps.row)
        copy_queries(memory, base, 0, queries, upstream, row0, seqlen_q)
        mask_place = head_place(b, h, mask_steps)
        band = (
            types.int32(lower), types.int32(upper), types.int32(seqlen_q), types.int32(seqlen_k),
        )  # fmt: skip
        own_scale = types.float32(scale * unit)
        exponent_scale = types.float32(1.0) if scaled_first else own_scale
        if exponent_unit:
            exponent_scale = types.float32(exponent_unit)
        dropout_of = dropout_words(seed + offset[0], batch_head, threshold)
        # Where this lane reads, and which row and key its first score is.
        q_place = types.uint32(base + warp_row * step + own(step))
        do_place = types.uint32(base + do_tile + warp_row * v_step + own(v_step))
        k_place = types.uint32(base + k_tile + others(step))
        v_place = types.uint32(base + v_tile + others(v_step))
        k_across = types.uint32(base + k_tile + across(step))
        my_row, my_key = row0 + warp_row + lane // 4, lane % 4 * 2
        first_row = types.int64(batch_head) * seqlen_q
        shifts = read(shift, first_row, my_row, seqlen_q, types.float32(infinity))
        less = read(delta, first_row, my_row, seqlen_q, types.float32(0.0))

        first, end = places(lists, b, h, tile, sizes)
        if two_stages and first < end:
            copy_keys(memory, base, 0, keys, values, tile_at(lists, first)[0], seqlen_k)
        commit()
        if in_registers:
            wait()
            cuda.syncthreads()
        own_q = load_q(q_place) if in_registers else q_place
        own_do = load_do(do_place) if in_registers else do_place
        dq_sums = no_dq()
        for number in range(first, end):
            key0, full = tile_at(lists, number)
            at = types.uint32((number - first) % 2 * stage_bytes if two_stages else 0)
            if two_stages:
                wait()
                cuda.syncthreads()  # the tiles have come, and all warps are done with the others
                if number + 1 < end:
                    copy_keys(
                        memory, base, stage_bytes - at, keys, values,
                        tile_at(lists, number + 1)[0], seqlen_k,
                    )  # fmt: skip
                    commit()
            else:
                cuda.syncthreads()
                copy_keys(memory, base, 0, keys, values, key0, seqlen_k)
                commit()
                wait()
                cuda.syncthreads()
            # S = Q K^T and dP = dO V^T
            s = scores_of(own_q, types.uint32(k_place + at))
            rated = rule(
                s, my_row, key0 + my_key, row0, key0, full, sizes, band, mask, mask_place,
                own_scale, words,
            )  # fmt: skip
            dp = products_of(own_do, types.uint32(v_place + at))
            _, ds, of_rated = gradients(
                rated, dp, shifts, less, exponent_scale, my_row, key0 + my_key, dropout_of,
                types.float32(keep),
            )  # fmt: skip
            if keep_scores:
                head = global_address(ds_out) + types.uint64(
                    types.int64(batch_head) * seqlen_q * seqlen_k * 4
                )
                rests = read(rest, first_row + 1, my_row, seqlen_q, types.float32(1.0))
                put_ds(scale_ds(of_rated, rests), head, my_row, key0 + my_key, seqlen_q, seqlen_k)
            # dQ += dS K
            dq_sums = add_dq(dq_sums, ds, types.uint32(k_across + at))

        wait()  # for the queries, where there was no tile of keys
        cuda.syncthreads()
        batch_head, tile = divide(block_number(), row_tiles)
        b, h = divide(batch_head, heads)
        warp_row = thread_number() // 32 * 16 * row_blocks
        row = (row_tiles - 1 - tile) * block_m + warp_row
        rests = read(
            rest, types.int64(batch_head) * seqlen_q + 1, row + thread_number() % 32 // 4, seqlen_q,
            types.float32(1.0),
        )  # fmt: skip
        dq_sums = scale_dq(dq_sums, scale_row(rests, types.float32(scale)))
        write_dq(
            memory, base, warp_row * step, dq_sums, dq,
            b * dq_steps.batch + h * dq_steps.head + row * dq_steps.row, dq_steps.row,
            seqlen_q - row, 0,
        )  # fmt: skip

    return flash_backward_query_mma


__all__ = ["backward_memory", "key_value_kernel", "query_kernel"]
