"""FlashAttention's forward pass on a GPU, with ordinary (SIMT) arithmetic.

Algorithm 1 of "FlashAttention-2" (Dao, 2023). A block takes a tile of queries of one head; tiles of
keys and values pass by, and for each of them

    S = Q K^T                                   (block_m, block_n)
    m_new = max(m, rowmax(S))
    P = exp(S - m_new)
    l = exp(m - m_new) l + rowsum(P)
    O = diag(exp(m - m_new)) O + P V            (block_m, value_dim)

and in the end O = diag(1/l) O and logsumexp = m + log(l); m and l are kept for the backward pass,
too. S and O are in the threads' registers: of
a row of S each of `threads_n` neighbouring threads has every threads_n-th number. The product P V
needs whole rows of P, so P goes through shared memory. Exponentials are powers of
two, with log2(e) folded into the scale of the queries (see `Kind.unit`).
"""

from __future__ import annotations

import math
from functools import cache
from typing import Any, NamedTuple

from ...gpu.runtime import (
    NEGATIVE_INFINITY,
    cuda,
    device_function,
    kernel,
    precision,
    shuffle_xor,
    types,
    warp_barrier,
)
from ...gpu.vectors import vector_access
from ..schedule_cuda import walk
from ..scores_cuda import head_place
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
    row_step,
    score_masker,
    tile_access,
    tile_copier,
    tile_loader,
    tile_looker,
    tile_width,
    vector_lanes,
)


class ForwardMemory(NamedTuple):
    """Where tiles begin in shared memory, and how far their rows lie apart, in elements."""

    q: int
    k: int
    v: int
    p: int
    keep: int  # with dropout
    size: int
    step: int  # of q and k
    v_step: int
    p_step: int


@cache
def forward_memory(kind: Kind, blocks: Blocks) -> ForwardMemory:
    """The forward kernel's plan of shared memory."""
    lanes = vector_lanes(kind.precision)
    step = row_step(kind.head_dim, lanes)
    v_step = tile_width(kind.value_dim, blocks.threads_n, lanes)
    p_step = blocks.block_n + max(blocks.threads_n, lanes)
    k = blocks.block_m * step
    v = k + blocks.block_n * step
    p = v + blocks.block_n * v_step
    keep = p + blocks.block_m * p_step
    size = keep + keep_size(kind, blocks)
    return ForwardMemory(0, k, v, p, keep, size, step, v_step, p_step)


@cache
def row_reductions(real_name: str, threads: int) -> Any:
    """Device functions: the largest, and the sum, of a number over a row's threads."""
    masks = (1, *(1 << bit for bit in range(2, threads.bit_length())))  # see `own_place`

    @device_function
    def row_max(x):
        for mask in masks:
            x = max(x, shuffle_xor(x, mask))
        return x

    @device_function
    def row_sum(x):
        for mask in masks:
            x += shuffle_xor(x, mask)
        return x

    return row_max, row_sum


@cache
def forward_kernel(kind: Kind, blocks: Blocks) -> Any:
    """A block computes block_m rows of the output."""
    numbers, lanes = precision(kind.precision), vector_lanes(kind.precision)
    real, to_storage, storage = numbers.real, numbers.store, getattr(types, numbers.storage.name)
    block_m, block_n = blocks.block_m, blocks.block_n
    threads_m, threads_n = blocks.threads_m, blocks.threads_n
    rows, keys, head_dim, value_dim = blocks.rows, blocks.keys, kind.head_dim, kind.value_dim
    plan = forward_memory(kind, blocks)
    q_tile, k_tile, v_tile, p_tile = plan.q, plan.k, plan.v, plan.p
    step, v_step, p_step = plan.step, plan.v_step, plan.p_step
    columns = v_step // threads_n
    width = -(-max(head_dim, 1) // lanes) * lanes
    load_q = tile_loader(kind, tile_copier(kind, blocks, block_m, head_dim, width, step))
    load_keys = pair_loader(
        kind,
        tile_copier(kind, blocks, block_n, head_dim, width, step),
        tile_copier(kind, blocks, block_n, value_dim, v_step, v_step),
    )
    q_rows, k_rows, p_rows = (
        own_rows(blocks, step), own_keys(blocks, step), Factor(rows, threads_m * p_step),
    )  # fmt: skip
    scores = multiply(q_rows, k_rows, head_dim, lanes)
    add_values = multiply(p_rows, own_columns(v_step, threads_n, lanes, v_step), block_n, lanes)
    apply_mask, (put, _) = score_masker(kind, blocks, p_tile, p_step), tile_access(blocks, p_step)
    make_keep, factor_of = keep_maker(kind, blocks, plan.keep), keep_factor(kind, blocks, plan.keep)
    row_max, row_sum = row_reductions(real.name, threads_n)
    exp_of, place_of = exponential(kind), own_place(threads_n)
    at_once = lanes if value_dim % lanes == 0 else 1
    _, write = vector_access(at_once)
    (places, tile_at), looks = walk(kind.is_sparse, block_m, block_n), tile_looker(kind, blocks)
    reciprocal, dropout = reciprocal_of(kind.precision), kind.dropout
    nothing, infinity, unit, to_natural = (
        NEGATIVE_INFINITY, float("inf"), kind.unit_of_products, 1.0 / kind.unit,
    )  # fmt: skip

    @kernel(blocks.threads, blocks=blocks.at_once)
    def flash_forward(
        q, k, v, mask, offset, out, logsumexp, rows_of, q_steps, k_steps, v_steps, mask_steps,
        out_steps, sizes, scale, seed, threshold, keep, words, lists,
    ):  # fmt: skip
        heads, seqlen_q, seqlen_k, lower, upper, k_group, v_group = sizes
        memory = cuda.shared.array(0, real)
        sums = cuda.local.array((rows, keys), real)
        o = cuda.local.array((rows, columns), real)
        m = cuda.local.array(rows, real)
        l = cuda.local.array(rows, real)
        pieces = cuda.local.array(at_once, storage)
        my_row, my_key = place_of()
        tiles = (seqlen_q + block_m - 1) // block_m
        batch_head = cuda.blockIdx.x // tiles
        # The last rows, which see the most keys under a causal mask, come first.
        tile = tiles - 1 - cuda.blockIdx.x % tiles
        row0 = tile * block_m
        b, h = batch_head // heads, batch_head % heads
        q_start = b * q_steps.batch + h * q_steps.head + row0 * q_steps.row
        k_start = b * k_steps.batch + h // k_group * k_steps.head
        v_start = b * v_steps.batch + h // v_group * v_steps.head
        of_head = Scores(
            (lower, upper, seqlen_q, seqlen_k), mask, head_place(b, h, mask_steps), words
        )
        own_scale, keep_scale = real(scale * unit), real(keep)
        dropout_of = (seed + offset[0], types.uint64(threshold), keep_scale)
        load_q(memory, q_tile, q, q_start, q_steps.row, q_steps.column, seqlen_q - row0, own_scale)
        for i in range(rows):
            m[i], l[i] = real(nothing), real(0.0)
        fill(o, rows, columns, real(0.0))

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
            # S = Q K^T
            fill(sums, rows, keys, real(0.0))
            scores(memory, q_tile + my_row * step, k_tile + my_key * step, sums)
            if looks(row0, key0, full, sizes):
                apply_mask(memory, sums, row0, key0, of_head)
            # m, l, P and O = diag(exp(m - m_new)) O
            for i in range(rows):
                largest = m[i]
                for j in range(keys):
                    largest = max(largest, sums[i, j])
                largest = row_max(largest)
                # No key yet: 2**(-inf - 0) = 0, not NaN. With an infinite score l is infinite.
                shift = real(0.0) if abs(largest) == infinity else largest
                alpha = exp_of(m[i], shift)
                m[i] = largest
                l[i] *= alpha
                for c in range(columns):
                    o[i, c] *= alpha
                for j in range(keys):
                    sums[i, j] = exp_of(sums[i, j], shift)
                    l[i] += sums[i, j]
            if dropout:  # after l: the softmax is over all keys
                for i in range(rows):
                    for j in range(keys):
                        sums[i, j] *= factor_of(
                            memory, my_row + i * threads_m, my_key + j * threads_n, keep_scale
                        )
            # A row's threads are in one warp.
            put(memory, p_tile + my_row * p_step + my_key, sums)
            warp_barrier()
            # O += P V
            add_values(memory, p_tile + my_row * p_step, v_tile + my_key * lanes, o)

        for i in range(rows):
            row = row0 + my_row + i * threads_m
            total = row_sum(l[i])
            if row < seqlen_q:
                if my_key == 0:
                    place = batch_head * seqlen_q + row
                    rows_of[2 * place], rows_of[2 * place + 1] = m[i], total
                    logsumexp[place] = (
                        real(nothing)
                        if total == real(0.0)
                        else m[i] * real(to_natural) + real(math.log(total))
                    )
                inverse = reciprocal(total)
                start = b * out_steps.batch + h * out_steps.head + row * out_steps.row
                for c in range(0, columns, at_once):
                    column = (c // lanes * threads_n + my_key) * lanes + c % lanes
                    if column < value_dim:
                        for n in range(at_once):
                            pieces[n] = to_storage(o[i, c + n] * inverse)
                        write(out, start + column, pieces)

    return flash_forward


__all__ = ["forward_kernel", "forward_memory", "reciprocal_of"]
