"""FlashAttention's forward pass on tensor cores, with `mma.sync`: Turing, Ampere, Ada.

Algorithm 1 of "FlashAttention-2" (Dao, 2023). A block takes a tile of queries of one head, a warp
some of its rows; tiles of keys and values pass by, and for each of them

    S = Q K^T                                           (rows, columns)
    m_new = max(m, rowmax(S))
    P = exp(S - m_new),  alpha = exp(m - m_new)
    l = alpha l + rowsum(P)
    O = diag(alpha) O + P V                             (rows, value_dim)

and in the end O = diag(1/l) O and logsumexp = m + log(l); m and l are kept for the backward pass,
too. S, P and O stay in the warp's registers:
the sums of S, rounded, are the operand of the next product as they lie. While a tile is computed
with, the next one is copied to the other half of shared memory (`cp.async`). Exponentials are
powers of two, with log2(e) in the scale (see `Kind.unit`).
"""

from __future__ import annotations

import math
from functools import cache
from typing import Any, NamedTuple

from ...gpu.ptx import shared_address
from ...gpu.register_tile import RegisterTile
from ...gpu.runtime import NEGATIVE_INFINITY, cuda, kernel, precision, types
from ..fragments.dropout import drop, dropout_words
from ..schedule_cuda import walk
from ..scores_cuda import head_place
from .memory import copy_barriers, pair_copier, row_writer, tile_copier
from .scores import any_changes, pick_row, reciprocal_rows, score_rule, softmax_rows
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


class ForwardMemory(NamedTuple):
    """Where tiles begin in shared memory, in bytes: queries, and of each stage keys and values."""

    q: int
    k: int
    v: int
    stage: int  # from one stage's tiles to the next one's
    size: int


@cache
def forward_memory(kind: Kind, tiles: Tiles) -> ForwardMemory:
    """The forward kernel's plan of shared memory. The output leaves through the queries' tile."""
    step, v_step = kind.step(kind.width), kind.step(kind.value_width)
    k = tiles.rows * max(step, v_step)
    v = k + tiles.columns * step
    stage = tiles.columns * (step + v_step)
    return ForwardMemory(0, k, v, stage, k + tiles.stages * stage)


@cache
def forward_kernel(kind: Kind, tiles: Tiles) -> Any:
    """A block computes `tiles.rows` rows of the output."""
    storage = getattr(types, precision(kind.precision).storage.name)
    block_m, block_n, row_blocks, threads = (
        tiles.rows,
        tiles.columns,
        tiles.row_blocks,
        tiles.threads,
    )
    width, value_width, two_stages = kind.width, kind.value_width, tiles.stages == 2
    step, v_step = kind.step(width), kind.step(value_width)
    plan, in_registers = forward_memory(kind, tiles), tiles.in_registers
    k_tile, v_tile, stage_bytes = plan.k, plan.v, plan.stage
    copy_q = tile_copier(kind, threads, block_m, kind.head_dim, width)
    copy_keys = pair_copier(kind, tiles, block_n, (plan.k, plan.v))
    (commit, wait), (own, others, across) = copy_barriers(kind), lane_places(kind)
    load_q = load_rows(kind, row_blocks, width)
    scores_of = multiply_rows(kind, row_blocks, block_n, width, in_registers)
    add_values = multiply_columns(kind, row_blocks, block_n, value_width, v_step)
    scores, output = RegisterTile(block_n, row_blocks), RegisterTile(value_width, row_blocks)
    largest, softmax = scores.row_max, softmax_rows(kind, scores)
    rule = score_rule(kind, scores, (block_m, block_n))
    places, tile_at = walk(kind.is_sparse, block_m, block_n)
    apply_dropout, fill_rows = drop(scores), scores.fill_rows
    no_output, rescale, total = output.zero, output.scale_rows, scores.quad_sum
    pick, reciprocal, changes = pick_row(scores), reciprocal_rows(scores), any_changes(scores)
    lazy = tiles.lazy
    write_o = row_writer(kind, row_blocks, kind.value_dim, value_width)
    dropout, scaled_first, exponent_unit = kind.dropout, kind.scaled_first, kind.exponent_unit
    nothing, unit, to_natural = NEGATIVE_INFINITY, kind.unit_of_products, 1.0 / kind.unit

    @kernel(threads, blocks=tiles.at_once)
    def flash_forward_mma(
        q, k, v, mask, offset, out, logsumexp, rows_of, q_steps, k_steps, v_steps, mask_steps,
        out_steps, sizes, scale, seed, threshold, keep, words, lists,
    ):  # fmt: skip
        heads, seqlen_q, seqlen_k, lower, upper, k_group, v_group = sizes
        memory = cuda.shared.array(0, storage)
        base = shared_address(memory)
        lane, warp_row = cuda.threadIdx.x % 32, cuda.threadIdx.x // 32 * 16 * row_blocks
        row_tiles = (seqlen_q + block_m - 1) // block_m
        # The last rows, which see the most keys under a causal mask, come first.
        batch_head, number = divide(cuda.blockIdx.x, row_tiles)
        tile = row_tiles - 1 - number
        row0 = tile * block_m
        b, h = divide(batch_head, heads)
        keys = (k, b * k_steps.batch + divide(h, k_group)[0] * k_steps.head, k_steps.row)
        values = (v, b * v_steps.batch + divide(h, v_group)[0] * v_steps.head, v_steps.row)
        mask_place = head_place(b, h, mask_steps)
        band = (
            types.int32(lower), types.int32(upper), types.int32(seqlen_q), types.int32(seqlen_k),
        )  # fmt: skip
        own_scale = types.float32(scale * unit)
        softmax_scale = types.float32(1.0) if scaled_first else own_scale
        if exponent_unit:
            softmax_scale = types.float32(exponent_unit)
        dropout_of = dropout_words(seed + offset[0], batch_head, threshold)
        # Where this lane reads, and which row and key its first score is.
        q_place = types.uint32(base + warp_row * step + own(step))
        k_place = types.uint32(base + k_tile + others(step))
        v_place = types.uint32(base + v_tile + across(v_step))
        my_row, my_key = row0 + warp_row + lane // 4, lane % 4 * 2

        first, end = places(lists, b, h, tile, sizes)
        q_start = b * q_steps.batch + h * q_steps.head + row0 * q_steps.row
        copy_q(memory, base, 0, q, q_start, q_steps.row, seqlen_q - row0)
        if two_stages and first < end:
            copy_keys(memory, base, 0, keys, values, tile_at(lists, first)[0], seqlen_k)
        commit()
        if in_registers:
            wait()
            cuda.syncthreads()
        own_q = load_q(q_place) if in_registers else q_place
        m, l = fill_rows(types.float32(nothing)), fill_rows(types.float32(0.0))
        o = no_output()
        for number in range(first, end):
            key0, full = tile_at(lists, number)
            at = types.uint32(0)
            if two_stages:
                wait()
                cuda.syncthreads()  # the tile has come, and all warps are done with the other one
                at = types.uint32((number - first) % 2 * stage_bytes)
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
            # S = Q K^T
            s = scores_of(own_q, types.uint32(k_place + at))
            s = rule(
                s, my_row, key0 + my_key, row0, key0, full, sizes, band, mask, mask_place,
                own_scale, words,
            )  # fmt: skip
            # m, l, P and O = diag(exp(m - m_new)) O
            m_new = largest(s, m)
            p, l, alpha = softmax(s, m, m_new, l, softmax_scale)
            m = m_new
            if not lazy or changes(alpha):
                o = rescale(o, alpha)
            if dropout:  # after l: the softmax is over all keys
                p = apply_dropout(p, my_row, key0 + my_key, dropout_of)
            # O += P V
            o = add_values(o, p, types.uint32(v_place + at))

        l = total(l)
        o = rescale(o, reciprocal(l, types.float32(keep)))
        batch_head, number = divide(block_number(), row_tiles)
        b, h = divide(batch_head, heads)
        row0 = (row_tiles - 1 - number) * block_m
        thread = thread_number()
        warp_row, n = thread // 32 * 16 * row_blocks, thread % 4
        row = row0 + warp_row + thread % 32 // 4 + 8 * n  # a lane writes one of its rows' logsumexp
        if n < 2 * row_blocks and row < seqlen_q:
            largest_of_row, sum_of_row = pick(m, n) * softmax_scale, pick(l, n)
            place = types.int64(batch_head) * seqlen_q + row
            rows_of[2 * place], rows_of[2 * place + 1] = largest_of_row, sum_of_row
            logsumexp[place] = (
                types.float32(nothing)
                if sum_of_row == types.float32(0.0)
                else largest_of_row * types.float32(to_natural)
                + types.float32(math.log(sum_of_row))
            )
        wait()  # for the queries, where there was no tile of keys
        cuda.syncthreads()
        start = b * out_steps.batch + h * out_steps.head + (row0 + warp_row) * out_steps.row
        write_o(
            memory, base, warp_row * v_step, o, out, start, out_steps.row,
            seqlen_q - row0 - warp_row, 0,
        )  # fmt: skip

    return flash_forward_mma


__all__ = ["forward_kernel", "forward_memory"]
