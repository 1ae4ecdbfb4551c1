"""FlashAttention's forward pass on the CPU.

Algorithm 1 of "FlashAttention-2" (Dao, 2023). A task is a block of queries of one head; for it, tiles of
keys and values pass by, and for each tile and each smaller tile of the block's queries:

    S = Q K^T                                   (tile_q, tile_k)
    m_new = max(m, rowmax(S))
    P = exp(S - m_new)
    l = exp(m - m_new) l + rowsum(P)
    O = diag(exp(m - m_new)) O + P V            (tile_q, value_dim)

and in the end O = diag(1/l) O and logsumexp = m + log(l). Neither S nor P is ever larger than a tile.
Exponentials are powers of two, with log2(e) folded into the scale of the scores.
"""

from __future__ import annotations

import numpy as np
from numba import njit, prange

from .. import philox
from ..simd import block_rows, cache_key, exp2, fetch_add
from . import cpu_tiles
from .cpu_tiles import (
    LOG2_E,
    Dropout,
    Mask,
    Matrices,
    Sizes,
    dropout_tile,
    leading_dimension,
    load_tile,
    load_tile_transposed,
    mask_allows,
    mask_scores,
    matrix_product,
    new_workspace,
    round_up,
    row_exp2_sum,
    row_max,
    row_multiply,
    row_scale,
    tile_columns,
)

FORWARD_KEY = cache_key(cpu_tiles.__file__, philox.__file__)
LN_2 = np.log(2.0)


@njit(parallel=True, cache=True, error_model="numpy")
def forward_kernel(
    q_data, k_data, v_data, bools, bias, out, logsumexp,  # flat arrays
    q_offset, k_offset, v_offset, mask_offset,  # (batch_heads,)
    strides, mask_kind, sizes, scale, dropout_threshold, seed, keep_scale,
    next_task, tile_counts, key=FORWARD_KEY,
):  # fmt: skip
    """Run the tasks on all threads; tile_counts[t] is the number of tiles that thread t computed."""
    q = Matrices(q_data, q_offset, strides[0], strides[1])
    k = Matrices(k_data, k_offset, strides[2], strides[3])
    v = Matrices(v_data, v_offset, strides[4], strides[5])
    mask = Mask(mask_kind, bools, bias, mask_offset, strides[6], strides[7])
    dropout = Dropout(dropout_threshold, np.uint64(seed), keep_scale)
    for worker in prange(len(tile_counts)):
        tile_counts[worker] = forward_worker(
            q, k, v, mask, out, logsumexp, Sizes(*sizes), scale, dropout, next_task
        )


@njit(error_model="numpy")
def forward_worker(q, k, v, mask, out, logsumexp, sizes, scale, dropout, next_task):
    """Take tasks until none is left, the longest (under a causal mask: the last rows) first."""
    blocks = (sizes.seqlen_q + sizes.block_q - 1) // sizes.block_q
    tiles = 0
    w, origin = new_workspace(out, workspace_size(out, sizes))
    while True:
        task = fetch_add(next_task, 0, 1)
        if task >= blocks * sizes.batch_heads:
            return tiles
        block, i = blocks - 1 - task // sizes.batch_heads, task % sizes.batch_heads
        tiles += forward_block(
            w, origin, i, block * sizes.block_q, q, k, v, mask, out, logsumexp, sizes, scale, dropout
        )


@njit
def workspace_size(w, sizes):
    """Elements for the tiles that `forward_block` keeps."""
    head, value = leading_dimension(w, sizes.head_dim), leading_dimension(w, sizes.value_dim)
    scores = leading_dimension(w, sizes.tile_k)
    block = sizes.block_q
    return (
        block * (head + value + 2) + max(sizes.head_dim, 1) * scores
        + sizes.tile_k * value + 2 * sizes.tile_q * scores
    )  # fmt: skip


@njit(error_model="numpy")
def forward_block(w, origin, i, row0, q, k, v, mask, out, logsumexp, sizes, scale, dropout):
    """Rows row0 ... row0 + block_q of head i; returns the number of tiles computed."""
    head_dim, value_dim, tile_q, tile_k = sizes.head_dim, sizes.value_dim, sizes.tile_q, sizes.tile_k
    ld_q, ld_v = leading_dimension(w, head_dim), leading_dimension(w, value_dim)
    ld_s = leading_dimension(w, tile_k)
    zero, minus_infinity = w.dtype.type(0), w.dtype.type(-np.inf)
    rows = min(sizes.block_q, sizes.seqlen_q - row0)
    q_tile = origin  # (block_q, head_dim)
    o_tile = q_tile + sizes.block_q * ld_q  # (block_q, value_dim), not yet divided by l
    kt_tile = o_tile + sizes.block_q * ld_v  # (head_dim, tile_k), scaled
    v_tile = kt_tile + max(head_dim, 1) * ld_s  # (tile_k, value_dim)
    s_tile = v_tile + tile_k * ld_v  # (tile_q, tile_k): S, then P
    z_tile = s_tile + tile_q * ld_s  # (tile_q, tile_k): dropout
    m = z_tile + tile_q * ld_s  # (block_q,), in units of log 2
    l = m + sizes.block_q  # (block_q,)

    load_tile(
        w, q_tile, ld_q, round_up(rows, block_rows()),
        q.data, q.offset[i] + row0 * q.row, q.row, q.column, rows, head_dim,
    )  # fmt: skip
    for j in range(o_tile, o_tile + round_up(rows, block_rows()) * ld_v):
        w[j] = zero
    for r in range(rows):
        w[m + r], w[l + r] = minus_infinity, zero

    tiles = 0
    begin, end = cpu_tiles.first_key(row0, sizes), cpu_tiles.end_key(row0 + rows - 1, sizes)
    for key0 in range(begin // tile_k * tile_k, end, tile_k):
        keys = min(tile_k, sizes.seqlen_k - key0)
        load_tile_transposed(
            w, kt_tile, ld_s, k.data, k.offset[i] + key0 * k.row, k.row, k.column,
            keys, head_dim, scale,
        )  # fmt: skip
        load_tile(
            w, v_tile, ld_v, tile_k, v.data, v.offset[i] + key0 * v.row, v.row, v.column,
            keys, value_dim,
        )  # fmt: skip
        for r0 in range(0, rows, tile_q):
            n = min(tile_q, rows - r0)
            start, stop = tile_columns(w, row0 + r0, n, key0, sizes)
            if start >= stop:
                continue  # wholly outside the band
            last = min(stop, keys)
            some, every = mask_allows(mask, i, row0 + r0, n, key0, start, last)
            if not some:
                continue  # wholly masked
            tiles += 1
            # S = scale Q K^T
            matrix_product(
                w, q_tile + r0 * ld_q, ld_q, 1, kt_tile + start, ld_s, s_tile + start, ld_s,
                n, stop - start, max(head_dim, 1), False,
            )  # fmt: skip
            mask_scores(w, s_tile, ld_s, mask, i, every, row0 + r0, n, key0, start, stop, sizes)
            # m, l, P, and O = diag(exp(m - m_new)) O
            for r in range(n):
                line, row = s_tile + r * ld_s, r0 + r
                m_old = w[m + row]
                m_new = row_max(w, line + start, line + stop, m_old)
                m_safe = m_new if m_new != minus_infinity else zero  # no key yet: exp2(-inf - 0) = 0
                alpha = exp2(m_old - m_safe)
                w[l + row] = w[l + row] * alpha + row_exp2_sum(w, line + start, line + stop, m_safe)
                w[m + row] = m_new
                if m_new > m_old:
                    row_scale(w, o_tile + row * ld_v, o_tile + (row + 1) * ld_v, alpha)
            if dropout.threshold > 0:  # after l: the softmax is over all keys
                dropout_tile(w, z_tile, ld_s, dropout, i, row0 + r0, n, key0, start, stop)
                for r in range(n):
                    line = s_tile + r * ld_s
                    row_multiply(w, line + start, line + stop, z_tile + r * ld_s + start)
            # O += P V
            matrix_product(
                w, s_tile + start, ld_s, 1, v_tile + start * ld_v, ld_v, o_tile + r0 * ld_v, ld_v,
                n, value_dim, stop - start, True,
            )  # fmt: skip

    write_rows(w, o_tile, ld_v, m, l, i * sizes.seqlen_q + row0, rows, value_dim, out, logsumexp)
    return tiles


@njit(error_model="numpy")
def write_rows(w, o_tile, ld_v, m, l, first_row, rows, value_dim, out, logsumexp):
    """O = diag(1/l) O and logsumexp = m + log(l); 0 and -inf for a row that saw no key."""
    one, zero = w.dtype.type(1), w.dtype.type(0)
    for r in range(rows):
        row, line = first_row + r, o_tile + r * ld_v
        if w[l + r] == zero:
            logsumexp[row] = w.dtype.type(-np.inf)
            for c in range(value_dim):
                out[row * value_dim + c] = zero
        else:
            # m is -inf with l not 0 only where every score was NaN: then l is NaN, and so is the sum.
            inverse = one / w[l + r]
            logsumexp[row] = w[m + r] * w.dtype.type(LN_2) + np.log(w[l + r])
            for c in range(value_dim):
                out[row * value_dim + c] = w[line + c] * inverse
