"""FlashAttention's forward pass on the CPU.

Algorithm 1 of "FlashAttention-2" (Dao, 2023). A task is a block of queries of one head; for it,
tiles of keys and values pass by, and for each tile and each smaller tile of the block's queries:

    S = Q K^T                                   (tile_q, tile_k)
    m_new = max(m, rowmax(S))
    P = exp(S - m_new)
    l = exp(m - m_new) l + rowsum(P)
    O = diag(exp(m - m_new)) O + P V            (tile_q, value_dim)

With a score function S goes through it, row by row, before the rest. With lists of tiles only those
pass by that are in the list of one of the block's queries.

In the end O = diag(1/l) O and logsumexp = m + log(l). Neither S nor P is ever larger than a
tile. Exponentials are powers of two, of log2(e) (S - m): the difference is exact where it matters,
and no product is larger than a number can be.
"""

from __future__ import annotations

import numpy as np

from ...cpu.compiler import njit
from ...cpu.simd import block_rows, cache_key, exp2, lanes, load, store
from ...cpu.threads import fetch_add
from ..scores import LOG2_E
from .tiles import (
    FILES,
    Dropout,
    Functions,
    Lists,
    Mask,
    Sizes,
    Strides,
    dropout_tile,
    fill,
    finish_scores,
    key_tiles,
    leading_dimension,
    list_line,
    load_tile,
    load_tile_transposed,
    matrix_product,
    new_workspace,
    next_tile,
    round_up,
    row_exp_sum,
    row_max,
    row_scale,
    tile_multiply,
    tile_start,
    visible_tile,
    visited,
)

FORWARD_KEY = cache_key(*FILES)


@njit(nogil=True, cache=True, error_model="numpy")
def forward_worker(
    q_data, k_data, v_data, bools, bias, out, logsumexp, rows_of,  # flat arrays
    q_offset, k_offset, v_offset, mask_offset,  # (batch_heads,)
    strides, mask_kind, sizes, scale, dropout_threshold, seed, keep_scale, functions, lists,
    order, next_task, tile_count, key=FORWARD_KEY,
):  # fmt: skip
    """Take tasks (a head, a block of its queries) until none is left; tile_count: tiles computed.

    The longest tasks come first: with lists they are in this `order`, numbers head * blocks +
    block; without, under a causal mask, those of the last rows are the longest.
    """
    sizes, strides = Sizes(*sizes), Strides(*strides)
    functions, lists = Functions(*functions), Lists(*lists)
    mask = Mask(mask_kind, bools, bias, mask_offset, strides.mask_row, strides.mask_column)
    dropout = Dropout(dropout_threshold, np.uint64(seed), keep_scale)
    head_dim, value_dim = sizes.head_dim, sizes.value_dim
    tile_q, tile_k = sizes.tile_q, sizes.tile_k
    depth = max(head_dim, 1)
    ld_q, ld_v = leading_dimension(out, head_dim), leading_dimension(out, value_dim)
    ld_s = leading_dimension(out, tile_k)
    w, q_tile = new_workspace(
        out,
        sizes.block_q * (ld_q + ld_v + 2) + depth * ld_s + tile_k * ld_v + 2 * tile_q * ld_s,
    )  # q_tile: (block_q, head_dim)
    o_tile = q_tile + sizes.block_q * ld_q  # (block_q, value_dim), not yet divided by l
    kt_tile = o_tile + sizes.block_q * ld_v  # (head_dim, tile_k), scaled
    v_tile = kt_tile + depth * ld_s  # (tile_k, value_dim)
    s_tile = v_tile + tile_k * ld_v  # (tile_q, tile_k): S, then P
    z_tile = s_tile + tile_q * ld_s  # (tile_q, tile_k): dropout
    m = z_tile + tile_q * ld_s  # (block_q,)
    l = m + sizes.block_q  # (block_q,)

    blocks = (sizes.seqlen_q + sizes.block_q - 1) // sizes.block_q
    cursor = np.empty(sizes.block_q // lists.rows, np.int64)  # in each list of the block
    while True:
        task = fetch_add(next_task, 0, 1)
        if task >= blocks * sizes.batch_heads:
            return
        i = task % sizes.batch_heads
        row0 = (blocks - 1 - task // sizes.batch_heads) * sizes.block_q
        if len(order) > 0:
            i, row0 = order[task] // blocks, order[task] % blocks * sizes.block_q
        rows = min(sizes.block_q, sizes.seqlen_q - row0)
        padded_rows = round_up(rows, block_rows())
        load_tile(
            w, q_tile, ld_q, padded_rows,
            q_data, q_offset[i] + row0 * strides.q_row, strides.q_row, strides.q_column,
            rows, head_dim,
        )  # fmt: skip
        fill(w, o_tile, o_tile + padded_rows * ld_v, 0.0)
        fill(w, m, m + rows, -np.inf)
        fill(w, l, l + rows, 0.0)
        number, end = key_tiles(row0, sizes, sizes.block_q, tile_k)
        line, count = list_line(lists, i, row0 // lists.rows, sizes), 0
        if len(lists.offsets) > 0:
            count = (rows + lists.rows - 1) // lists.rows
            cursor[:count] = lists.offsets[line : line + count]
        number = next_tile(lists, cursor, line, count, number - 1, end)
        while number < end:
            key0 = tile_start(number, tile_k)
            keys = min(tile_k, sizes.seqlen_k - key0)
            load_tile_transposed(
                w, kt_tile, ld_s,
                k_data, k_offset[i] + key0 * strides.k_row, strides.k_row, strides.k_column,
                keys, head_dim, scale,
            )  # fmt: skip
            load_tile(
                w, v_tile, ld_v, tile_k,
                v_data, v_offset[i] + key0 * strides.v_row, strides.v_row, strides.v_column,
                keys, value_dim,
            )  # fmt: skip
            visits, full = True, False
            for r0 in range(0, rows, tile_q):
                if r0 % lists.rows == 0:
                    visits, full = visited(lists, cursor, line, r0 // lists.rows, number)
                if not visits:
                    continue
                row, n = row0 + r0, min(tile_q, rows - r0)
                tile = visible_tile(w, mask, functions, i, row, n, key0, keys, full, sizes)
                start, stop = tile.start, tile.stop
                if start >= stop:
                    continue  # wholly masked: skipped, not computed
                fetch_add(tile_count, 0, 1)
                # S = scale Q K^T
                matrix_product(
                    w, q_tile + r0 * ld_q, ld_q, 1, kt_tile + start, ld_s, s_tile + start, ld_s,
                    n, stop - start, depth, False,
                )  # fmt: skip
                if tile.masked or functions.score != 0:
                    finish_scores(w, s_tile, ld_s, mask, functions, tile, sizes)
                # m, l, P, and O = diag(exp(m - m_new)) O
                for r in range(n):
                    softmax_row(
                        w, s_tile + r * ld_s + start, s_tile + r * ld_s + stop,
                        m + r0 + r, l + r0 + r,
                        o_tile + (r0 + r) * ld_v, o_tile + (r0 + r + 1) * ld_v,
                    )  # fmt: skip
                if dropout.threshold > 0:  # after l: the softmax is over all keys
                    dropout_tile(w, z_tile, ld_s, dropout, tile)
                    tile_multiply(w, s_tile, z_tile, ld_s, n, start, stop)
                # O += P V
                matrix_product(
                    w, s_tile + start, ld_s, 1, v_tile + start * ld_v, ld_v,
                    o_tile + r0 * ld_v, ld_v, n, value_dim, stop - start, True,
                )  # fmt: skip
            number = next_tile(lists, cursor, line, count, number, end)
        write_rows(
            w, o_tile, ld_v, m, l, i * sizes.seqlen_q + row0, rows, value_dim, out, logsumexp,
            rows_of,
        )  # fmt: skip


@njit(error_model="numpy")
def softmax_row(w, start, stop, m, l, o_start, o_stop):
    """One row's step of the online softmax: scores w[start:stop] become P; updates m, l, O."""
    infinity, zero = w.dtype.type(np.inf), w.dtype.type(0)
    m_old = w[m]
    m_new = row_max(w, start, stop, m_old)
    if m_new == infinity:  # no softmax: P is NaN. The sum is infinite, or NaN
        w[m] = m_new
        for j in range(start, stop):
            w[l] += abs(w[j])
        fill(w, start, stop, np.nan)
        return
    m_safe = m_new if m_new != -infinity else zero  # no key yet: exp(-inf - 0) = 0, not NaN
    if m_new > m_old:
        alpha = exp2((m_old - m_safe) * w.dtype.type(LOG2_E))
        w[m], w[l] = m_new, w[l] * alpha
        row_scale(w, o_start, o_stop, alpha)
    w[l] += row_exp_sum(w, start, stop, m_safe)


@njit(error_model="numpy")
def write_rows(w, o_tile, ld_v, m, l, first_row, rows, value_dim, out, logsumexp, rows_of):
    """O = diag(1/l) O and logsumexp = m + log(l); 0 and -inf for a row that saw no key. To rows_of
    go m and l.
    """
    one, zero = w.dtype.type(1), w.dtype.type(0)
    n = lanes(w)
    whole = value_dim // n * n
    for r in range(rows):
        row, line = first_row + r, o_tile + r * ld_v
        rows_of[2 * row], rows_of[2 * row + 1] = w[m + r], w[l + r]
        if w[l + r] == zero:
            logsumexp[row] = w.dtype.type(-np.inf)
            for c in range(value_dim):
                out[row * value_dim + c] = zero
        else:
            # m is -inf with l not 0 only where every score was NaN: then l is NaN, and so is the
            # sum.
            inverse = one / w[l + r]
            logsumexp[row] = w[m + r] + np.log(w[l + r])
            for c in range(0, whole, n):
                store(out, row * value_dim + c, load(w, line + c) * inverse)
            for c in range(whole, value_dim):
                out[row * value_dim + c] = w[line + c] * inverse
