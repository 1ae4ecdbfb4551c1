"""FlashAttention's backward pass on the CPU.

Algorithm 2 of "FlashAttention-2" (Dao, 2023). A task is a tile of keys, with all heads of queries
that share them; past it go the tiles of queries, for each of which P is computed anew from the
row's maximum m and sum l that the forward pass left:

    S = Q K^T,  P = exp(S - m) / l              (tile_q, tile_k)
    dV += P^T dO                                (tile_k, value_dim)
    dP = dO V^T                                 (tile_q, tile_k)
    dS = P * (dP - delta)                       delta = rowsum(dO * O) - dL
    dK += dS^T Q                                (tile_k, head_dim)
    dQ += dS K                                  (tile_q, head_dim)

Not from the logsumexp m + log(l): where scores are large it has no room for log(l), and P of a row
with one key that counts would not be 1.

With a score function S goes through it before the softmax, and dS through its derivative, which is
taken at the S before it; what the function read from captured arrays gets its gradient there.

dK and dV stay with the task. dQ is added up over tasks: each waits for its turn at a tile of dQ, so
that the order of the sums, and every bit of the result, is the same however many threads there are.
(Tasks are taken in the order of the keys, so what a task waits for is already being computed.)
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from ...cpu.compiler import njit
from ...cpu.simd import (
    block_rows,
    cache_key,
    exp2,
    lanes,
    load,
    splat,
    store,
    sum_of,
)
from ...cpu.threads import fetch_add, store_release, wait_until
from ..scores import LOG2_E
from .score_rows import call_gradient_row
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
    load_tile,
    load_tile_transposed,
    matrix_product,
    new_workspace,
    queries_at,
    query_places,
    round_up,
    tile_multiply,
    tile_start,
    visible_tile,
)

BACKWARD_KEY = cache_key(*FILES)


class Tiles(NamedTuple):
    """Where a task's tiles begin in its workspace, and their leading dimensions."""

    k: int  # (tile_k, head_dim)
    kt: int  # (head_dim, tile_k), times the scale
    vt: int  # (value_dim, tile_k)
    dk: int  # (tile_k, head_dim)
    dv: int  # (tile_k, value_dim)
    q: int  # (tile_q, head_dim)
    do: int  # (tile_q, value_dim)
    dq: int  # (tile_q, head_dim)
    s: int  # (tile_q, tile_k): S, then P
    ds: int  # (tile_q, tile_k): dP, then dS
    z: int  # (tile_q, tile_k): dropout
    raw: int  # (tile_q, tile_k): S before the score function, if there is one
    ld_q: int  # leading dimension of k, dk, q, dq
    ld_v: int  # of dv, do
    ld_s: int  # of kt, vt, s, ds, z


@njit
def new_tiles(like, sizes, functions):
    """A workspace for the tiles of a task: (w, Tiles)."""
    ld_q, ld_v = leading_dimension(like, sizes.head_dim), leading_dimension(like, sizes.value_dim)
    ld_s = leading_dimension(like, sizes.tile_k)
    depth_q, depth_v = max(sizes.head_dim, 1), max(sizes.value_dim, 1)
    keys, rows = sizes.tile_k, sizes.tile_q
    of_scores = 3 if functions.score == 0 else 4
    size = keys * (2 * ld_q + ld_v) + (depth_q + depth_v + of_scores * rows) * ld_s
    w, k = new_workspace(like, size + rows * (2 * ld_q + ld_v))
    kt = k + keys * ld_q
    vt = kt + depth_q * ld_s
    dk = vt + depth_v * ld_s
    dv = dk + keys * ld_q
    q = dv + keys * ld_v
    do = q + rows * ld_q
    dq = do + rows * ld_v
    s = dq + rows * ld_q
    ds = s + rows * ld_s
    z = ds + rows * ld_s
    raw = z + (of_scores - 3) * rows * ld_s
    return w, Tiles(k, kt, vt, dk, dv, q, do, dq, s, ds, z, raw, ld_q, ld_v, ld_s)


@njit(nogil=True, cache=True)
def delta_worker(
    out, grad_out, grad_out_offset, row_stride, column_stride, rows_of, grad_logsumexp,
    seqlen_q, value_dim, delta, shift, inverse, next_task, key=BACKWARD_KEY,
):  # fmt: skip
    """delta = rowsum(dO * O) - dL, shift = m and inverse = 1 / l, for heads until none is left.

    A row that saw no key gets a shift of +inf, with which all its P become 0, and delta 0. One with
    an infinite score has no P: NaN.
    """
    infinity, zero, one = out.dtype.type(np.inf), out.dtype.type(0), out.dtype.type(1)
    n = lanes(out)
    whole = value_dim // n * n if column_stride == 1 else 0
    while True:
        i = fetch_add(next_task, 0, 1)
        if i >= len(grad_out_offset):
            return
        for r in range(seqlen_q):
            row = i * seqlen_q + r
            m, l = rows_of[2 * row], rows_of[2 * row + 1]
            if l == zero:
                shift[row], inverse[row], delta[row] = infinity, one, zero
                continue
            x, y = row * value_dim, grad_out_offset[i] + r * row_stride
            total = splat(out, 0.0)
            for c in range(0, whole, n):
                total = total + load(out, x + c) * load(grad_out, y + c)
            tail = sum_of(total)
            for c in range(whole, value_dim):
                tail += out[x + c] * grad_out[y + c * column_stride]
            if len(grad_logsumexp):
                tail -= grad_logsumexp[row]
            delta[row], shift[row] = tail, m
            inverse[row] = one / l if l < infinity else out.dtype.type(np.nan)


@njit
def gradient_row(w, p, ds, length, shift, inverse, delta, factor):
    """One row: scores become P = exp(S - m) / l, and dP becomes dS = P * (dP - delta) * factor."""
    log2_e = w.dtype.type(LOG2_E)
    for j in range(0, length, lanes(w)):
        p_j = exp2((load(w, p + j) - shift) * log2_e) * inverse
        store(w, p + j, p_j)
        store(w, ds + j, (load(w, ds + j) - delta) * factor * p_j)


@njit
def recompute_tile(w, t, mask, functions, dropout, tile, sizes, factor, shift, inverse, delta):
    """From tiles q, do, kt, vt: P, with dropout, in tile s, and dS * factor in tile ds."""
    n, start, stop = tile.rows, tile.start, tile.stop
    # S = scale Q K^T and dP = dO V^T
    matrix_product(
        w, t.q, t.ld_q, 1, t.kt + start, t.ld_s, t.s + start, t.ld_s,
        n, stop - start, max(sizes.head_dim, 1), False,
    )  # fmt: skip
    matrix_product(
        w, t.do, t.ld_v, 1, t.vt + start, t.ld_s, t.ds + start, t.ld_s,
        n, stop - start, max(sizes.value_dim, 1), False,
    )  # fmt: skip
    if functions.score != 0:
        for r in range(n):
            for j in range(r * t.ld_s + start, r * t.ld_s + stop, lanes(w)):
                store(w, t.raw + j, load(w, t.s + j))
    if tile.masked or functions.score != 0:
        finish_scores(w, t.s, t.ld_s, mask, functions, tile, sizes)
    if dropout.threshold > 0:  # what reached O is P Z: dP = Z dO V^T
        dropout_tile(w, t.z, t.ld_s, dropout, tile)
        tile_multiply(w, t.ds, t.z, t.ld_s, n, start, stop)
    for r in range(n):
        row, line = tile.batch_head * sizes.seqlen_q + tile.row0 + r, r * t.ld_s + start
        gradient_row(
            w, t.s + line, t.ds + line, stop - start, shift[row], inverse[row], delta[row], factor
        )
    if dropout.threshold > 0:
        tile_multiply(w, t.s, t.z, t.ld_s, n, start, stop)


@njit
def derive_scores(w, t, functions, table, tile, sizes, factor):
    """In tile ds: gradients of what the score function gave become those of what it got, times a
    factor; those of captured arrays are added to the table.
    """
    batch, head = tile.batch_head // sizes.heads, tile.batch_head % sizes.heads
    for r in range(tile.rows):
        line = r * t.ld_s + tile.start
        call_gradient_row(
            functions.gradient, w, functions.score_words, table, t.raw + line, t.ds + line,
            tile.stop - tile.start, batch, head, tile.row0 + r, tile.key0 + tile.start, factor,
        )  # fmt: skip


@njit
def load_queries(w, t, q, q_offset, do, do_offset, strides, i, row0, n, sizes, shift):
    """Tiles q and do of n rows of head i; dO counts as 0 in rows that saw no key."""
    padded = round_up(n, block_rows())
    load_tile(
        w, t.q, t.ld_q, padded, q, q_offset[i] + row0 * strides.q_row,
        strides.q_row, strides.q_column, n, sizes.head_dim,
    )  # fmt: skip
    load_tile(
        w, t.do, t.ld_v, padded, do, do_offset[i] + row0 * strides.do_row,
        strides.do_row, strides.do_column, n, sizes.value_dim,
    )  # fmt: skip
    for r in range(n):
        if shift[i * sizes.seqlen_q + row0 + r] == np.inf:
            fill(w, t.do + r * t.ld_v, t.do + (r + 1) * t.ld_v, 0.0)


@njit
def load_keys(w, t, k, k_offset, v, v_offset, strides, i, key0, keys, sizes, scale):
    """Tiles k, kt and vt of head i's keys key0 ... key0 + keys."""
    first = k_offset[i] + key0 * strides.k_row
    load_tile(
        w, t.k, t.ld_q, sizes.tile_k, k, first, strides.k_row, strides.k_column, keys,
        sizes.head_dim,
    )  # fmt: skip
    load_tile_transposed(
        w, t.kt, t.ld_s, k, first, strides.k_row, strides.k_column, keys, sizes.head_dim,
        scale,
    )  # fmt: skip
    load_tile_transposed(
        w, t.vt, t.ld_s, v, v_offset[i] + key0 * strides.v_row, strides.v_row, strides.v_column,
        keys, sizes.value_dim, w.dtype.type(1),
    )  # fmt: skip


@njit
def add_rows(w, tile, ld, rows, columns, target, first):
    """target[first:] += the tile's (rows, columns); target is contiguous."""
    n = lanes(w)
    whole = columns // n * n
    for r in range(rows):
        line, target_line = tile + r * ld, first + r * columns
        for c in range(0, whole, n):
            store(target, target_line + c, load(target, target_line + c) + load(w, line + c))
        for c in range(whole, columns):
            target[target_line + c] += w[line + c]


@njit
def turn_of(lists, place, key_tile, row0, sizes):
    """How many tiles of keys add to a tile of dQ before this one."""
    if len(lists.offsets) == 0:
        return key_tile - key_tiles(row0, sizes, sizes.tile_q, sizes.tile_k)[0]
    return lists.ranks[place]


@njit(nogil=True, cache=True)
def backward_worker(
    q, k, v, bools, bias, grad_out, dq, dk, dv,  # flat arrays; the last three zero at first
    q_offset, k_offset, v_offset, mask_offset, grad_out_offset,  # (batch_heads,)
    strides, mask_kind, sizes, scale, dropout_threshold, seed, keep_scale, functions, lists,
    shift, inverse, delta,  # (batch_heads * seqlen_q,)
    slot_start, slot_heads,  # dK, dV of slot s: heads slot_heads[slot_start[s]:slot_start[s + 1]]
    turn,  # (batch_heads * tiles of queries,): how many tasks have added to this tile of dQ
    tables, next_table,  # (threads, of captured arrays): sums in fixed point; number of the next
    next_task, key=BACKWARD_KEY,
):  # fmt: skip
    """Take tasks (a slot of dK and dV, a tile of its keys) until none is left."""
    sizes, strides = Sizes(*sizes), Strides(*strides)
    functions, lists = Functions(*functions), Lists(*lists)
    table = tables[fetch_add(next_table, 0, 1)]
    factor = scale if functions.score == 0 else dq.dtype.type(1)
    mask = Mask(mask_kind, bools, bias, mask_offset, strides.mask_row, strides.mask_column)
    dropout = Dropout(dropout_threshold, np.uint64(seed), keep_scale)
    w, t = new_tiles(dq, sizes, functions)
    key_tile_count = (sizes.seqlen_k + sizes.tile_k - 1) // sizes.tile_k
    query_tile_count = (sizes.seqlen_q + sizes.tile_q - 1) // sizes.tile_q
    while True:
        task = fetch_add(next_task, 0, 1)
        if task >= key_tile_count * (len(slot_start) - 1):
            return
        slot, key_tile = task // key_tile_count, task % key_tile_count
        key0 = key_tile * sizes.tile_k
        keys = min(sizes.tile_k, sizes.seqlen_k - key0)
        load_keys(
            w, t, k, k_offset, v, v_offset, strides, slot_heads[slot_start[slot]], key0, keys,
            sizes, scale,
        )  # fmt: skip
        fill(w, t.dk, t.dk + sizes.tile_k * t.ld_q, 0.0)
        fill(w, t.dv, t.dv + sizes.tile_k * t.ld_v, 0.0)
        for i in slot_heads[slot_start[slot] : slot_start[slot + 1]]:
            begin_place, end_place = query_places(lists, i, key_tile, sizes)
            for at in range(begin_place, end_place):
                first, end, full = queries_at(lists, at, sizes)
                for number in range(first, end):
                    row0 = tile_start(number, sizes.tile_q)
                    n = min(sizes.tile_q, sizes.seqlen_q - row0)
                    place = i * query_tile_count + number
                    my_turn = turn_of(lists, at, key_tile, row0, sizes)
                    tile = visible_tile(w, mask, functions, i, row0, n, key0, keys, full, sizes)
                    start, stop = tile.start, tile.stop
                    if start >= stop:  # wholly masked: skipped, not computed
                        wait_until(turn, place, my_turn)
                        store_release(turn, place, my_turn + 1)
                        continue
                    load_queries(
                        w, t, q, q_offset, grad_out, grad_out_offset, strides, i, row0, n, sizes,
                        shift,
                    )  # fmt: skip
                    recompute_tile(
                        w, t, mask, functions, dropout, tile, sizes, factor, shift, inverse, delta
                    )
                    if functions.score != 0:
                        derive_scores(w, t, functions, table, tile, sizes, scale)
                    # dV += P^T dO
                    matrix_product(
                        w, t.s + start, 1, t.ld_s, t.do, t.ld_v, t.dv + start * t.ld_v, t.ld_v,
                        stop - start, sizes.value_dim, n, True,
                    )  # fmt: skip
                    # dK += dS^T Q
                    matrix_product(
                        w, t.ds + start, 1, t.ld_s, t.q, t.ld_q, t.dk + start * t.ld_q, t.ld_q,
                        stop - start, sizes.head_dim, n, True,
                    )  # fmt: skip
                    # dQ += dS K
                    matrix_product(
                        w, t.ds + start, t.ld_s, 1, t.k + start * t.ld_q, t.ld_q, t.dq, t.ld_q,
                        n, sizes.head_dim, stop - start, False,
                    )  # fmt: skip
                    wait_until(turn, place, my_turn)
                    add_rows(
                        w, t.dq, t.ld_q, n, sizes.head_dim, dq,
                        (i * sizes.seqlen_q + row0) * sizes.head_dim,
                    )  # fmt: skip
                    store_release(turn, place, my_turn + 1)
        first = slot * sizes.seqlen_k + key0
        add_rows(w, t.dk, t.ld_q, keys, sizes.head_dim, dk, first * sizes.head_dim)
        add_rows(w, t.dv, t.ld_v, keys, sizes.value_dim, dv, first * sizes.value_dim)


@njit(nogil=True, cache=True)
def mask_gradient_worker(
    q, k, v, bools, bias, grad_out, dmask,  # flat arrays; the last zero at first
    q_offset, k_offset, v_offset, mask_offset, grad_out_offset,  # (batch_heads,)
    strides, mask_kind, sizes, scale, dropout_threshold, seed, keep_scale, functions, lists,
    shift, inverse, delta,  # (batch_heads * seqlen_q,)
    slot_start, slot_heads,  # as for `backward_worker`, of the mask's gradient
    slot_size, row_stride, column_stride,  # of dmask: elements of a slot; 0 where it is broadcast
    next_task, key=BACKWARD_KEY,
):  # fmt: skip
    """dmask += dS, for an additive mask, summed where it was broadcast.

    Tasks: a slot of dmask and a tile of its columns; all the columns where they share one.
    """
    sizes, strides = Sizes(*sizes), Strides(*strides)
    functions, lists = Functions(*functions), Lists(*lists)
    mask = Mask(mask_kind, bools, bias, mask_offset, strides.mask_row, strides.mask_column)
    dropout = Dropout(dropout_threshold, np.uint64(seed), keep_scale)
    one = dmask.dtype.type(1)
    w, t = new_tiles(dmask, sizes, functions)
    key_tile_count = (sizes.seqlen_k + sizes.tile_k - 1) // sizes.tile_k
    tasks_of_slot = 1 if column_stride == 0 else key_tile_count
    while True:
        task = fetch_add(next_task, 0, 1)
        if task >= tasks_of_slot * (len(slot_start) - 1):
            return
        slot = task // tasks_of_slot
        begin = 0 if column_stride == 0 else task % tasks_of_slot
        stop_tile = key_tile_count if column_stride == 0 else begin + 1
        for key_tile in range(begin, stop_tile):
            key0 = tile_start(key_tile, sizes.tile_k)
            keys = min(sizes.tile_k, sizes.seqlen_k - key0)
            for i in slot_heads[slot_start[slot] : slot_start[slot + 1]]:
                load_keys(w, t, k, k_offset, v, v_offset, strides, i, key0, keys, sizes, scale)
                begin_place, end_place = query_places(lists, i, key_tile, sizes)
                for at in range(begin_place, end_place):
                    first, end, full = queries_at(lists, at, sizes)
                    for number in range(first, end):
                        row0 = tile_start(number, sizes.tile_q)
                        n = min(sizes.tile_q, sizes.seqlen_q - row0)
                        tile = visible_tile(w, mask, functions, i, row0, n, key0, keys, full, sizes)
                        if tile.start >= tile.stop:
                            continue
                        load_queries(
                            w, t, q, q_offset, grad_out, grad_out_offset, strides, i, row0, n,
                            sizes, shift,
                        )  # fmt: skip
                        recompute_tile(
                            w, t, mask, functions, dropout, tile, sizes, one, shift, inverse, delta
                        )
                        target = slot * slot_size + row0 * row_stride + key0 * column_stride
                        for r in range(n):
                            line = t.ds + r * t.ld_s
                            for j in range(tile.start, min(tile.stop, keys)):
                                dmask[target + r * row_stride + j * column_stride] += w[line + j]
