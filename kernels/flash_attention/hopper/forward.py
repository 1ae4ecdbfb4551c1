"""FlashAttention's forward pass on Hopper GPUs.

After "FlashAttention-3" (Shah et al., 2024): Algorithm 1 with the pipelining of Algorithm 2 and the
ping-pong schedule of section 3.1. The softmax is that of simt/forward.py; what is new is who does
what, and when.

**Who.** A block has a warpgroup that loads, of which two threads work, and two or three warpgroups
that compute, with 64 queries each; together they have a tile of queries. The loading threads have
the copy engine (TMA) bring tiles of Q, K and V into shared memory, as far ahead as there is room.
Registers go from the one warpgroup to the others (setmaxnreg).

**How they wait.** Each place for a tile in shared memory has two barriers (mbarrier): `full` ends
its phase when the tile has come, `free` when all warps that read the tile are done with it. The
n-th tile of a ring of places uses the place n % places for the (n // places)-th time.

**When.** The tensor cores multiply while the warps compute exponentials. So a warpgroup is always
one tile of weights P ahead: it begins S = Q K^T of the next tile of keys and O += P V of this one
together, and while P V is still running it takes the softmax of S. And the warpgroups take turns in
beginning products, so that one multiplies while the other is busy with its softmax: named barriers
pass the turn on.

**What comes next.** As many blocks as there are multiprocessors stay and take tile after tile of
queries (a persistent kernel). The next tile's first product begins before this one's output is
written, so that nothing ever drains: the loop below goes through tiles of keys, and whether the
next one belongs to the next tile of queries is a detail.

In the paper's words: `load_queries` and `load_keys` are the producer, the rest is the consumer; s
and p are S_next and P_cur of Algorithm 2; the barriers own_turn and next_turn are the ping-pong's.
"""

from __future__ import annotations

from functools import cache
from typing import Any

from ...gpu.ptx import (
    bar_arrive,
    bar_sync,
    div_full_f32,
    ex2_approx_ftz_f32,
    global_address,
    lg2_approx_ftz_f32,
    mul_rn_f32,
    shared_address,
    shfl_sync_idx_b32,
    st_global_f32,
)
from ...gpu.ptx_hopper import (
    mbarrier_arrive,
    mbarrier_wait_parity,
    setmaxnreg,
    wgmma_commit_group,
    wgmma_fence,
    wgmma_rs,
    wgmma_ss,
    wgmma_wait_group,
    wgmma_wait_group_after,
)
from ...gpu.register_tile import RegisterTile
from ...gpu.runtime import NEGATIVE_INFINITY, cuda, device_function, kernel, types
from ...gpu.shared_layout import panels_descriptor, steps_along, steps_down
from ..fragments.dropout import drop, dropout_words
from ..fragments.scores import NO_WORDS, exponential, mask_scores, modify_scores
from ..fragments.store import store_rows, write_scores
from ..schedule_cuda import is_whole
from ..scores import LOG2_E
from ..scores_cuda import head_place, keys_of
from .forward_loaders import barrier_maker, forward_memory, loaders
from .schedule import piece_at, tile_finder
from .tiles import (
    ROWS,
    WARPGROUP,
    Blocks,
    Kind,
    own_place,
    ring,
)

LOWEST = NEGATIVE_INFINITY
# 128 threads of each warpgroup: together at most the 65,536 registers of a multiprocessor.
LOADERS_REGISTERS = {2: 56, 3: 32}  # of a loading thread, by the number of computing warpgroups
REGISTERS = {2: 224, 3: 160}  # of a computing thread
WITH_FUNCTIONS = {2: (56, 224), 3: (40, 152)}  # both, with a user's functions


# ----- the warpgroups that compute -----


@cache
def softmax(kind: Kind, block_n: int) -> Any:
    """Device function: from a tile of scores S, and m of its rows so far, to m_new, the weights
    P = exp2(scale S - scale m_new), scale m_new and the lane's part of rowsum(P), in which weights
    count that are dropped from P. Of a row that has seen no key scale m_new is 0 here, so that
    nothing is subtracted from -inf. With an additive mask S is scaled, and P = exp(S - m_new). A
    score function gets S scaled, and scale is log2(e) after it.
    """
    tile = RegisterTile(block_n)
    row_max, shift_of, own_row_sum = tile.row_max, tile.shift, tile.own_row_sum
    exp_of = tile.each(exponential(kind), tile.type, types.float32, tile.rows_type)
    scale_all = tile.each(mul_rn_f32, tile.type, types.float32)
    functions, is_sparse, has_score = (
        kind.functions,
        kind.is_sparse,
        kind.functions.score is not None,
    )
    masked = mask_scores(kind.mask, tile, functions=functions, approximate=True)
    modified = modify_scores(tile, functions, approximate=True) if has_score else None
    ended, drop_some = mask_scores("none", tile, begins=False), drop(tile)
    plain = not functions and not is_sparse
    always_masked, scaled_first, drops = kind.mask != "none", kind.scaled_first, kind.dropout
    additive, f32, i32 = kind.additive, types.float32, types.int32
    unit_of_results = kind.unit_of_results

    @device_function
    def softmax_of(
        s, m, row0, key0, full, batch, head, scale, sizes, mask, mask_steps, dropout, words
    ):  # fmt: skip
        heads, seqlen_q, seqlen_k = sizes.heads, sizes.seqlen_q, sizes.seqlen_k
        lower, upper = sizes.lower, sizes.upper
        if row0 >= seqlen_q:  # none of the rows is a query: nothing of this is ever written
            return m, s, m, (f32(0.0), f32(0.0))
        own_row, own_key = own_place()
        own_row, own_key = i32(row0 + own_row), i32(key0 + own_key)
        if scaled_first and not additive and not has_score:
            s, scale = scale_all(s, scale), f32(1.0)
        whole = full
        if not is_sparse:
            whole = is_whole(row0, ROWS, key0, block_n, sizes)
            if has_score:  # which reads nothing past the last query
                whole = whole and row0 + ROWS <= seqlen_q
        if always_masked or not whole:
            band = i32(lower), i32(upper), i32(seqlen_q), i32(seqlen_k)
            place = head_place(batch, head, mask_steps)
            begin, _ = keys_of(row0 + (ROWS - 1), lower, upper)
            if plain and not always_masked and begin <= key0:  # as if causal
                s = ended(s, own_row, own_key, band, mask, place, scale, NO_WORDS)
            else:
                s = masked(s, own_row, own_key, band, mask, place, scale, words)
        elif has_score:
            band = i32(lower), i32(upper), i32(seqlen_q), i32(seqlen_k)
            place = head_place(batch, head, mask_steps)
            s = modified(s, own_row, own_key, band, place, scale, words)
        if has_score:
            scale = f32(unit_of_results)
        m, scale = row_max(s, m), f32(1.0) if additive else scale
        shift = shift_of(m, scale)
        weights = exp_of(s, scale, shift)
        sums = own_row_sum(weights, (f32(0.0), f32(0.0)))
        if drops:
            seed, threshold = dropout
            words = dropout_words(seed, batch * heads + head, threshold)
            weights = drop_some(weights, own_row, own_key, words)
        return m, weights, shift, sums

    return softmax_of


@cache
def row_writer(kind: Kind, blocks: Blocks) -> Any:
    """Device function: writes a warpgroup's tile O / l to rows of the output, the logsumexp, and m
    and l.
    """
    tile = RegisterTile(kind.value_dim)
    scale_rows, quad_sum = tile.scale_rows, tile.quad_sum
    store = store_rows(kind.precision, kind.value_dim, kind.vectors)
    f32, i32, zero, u64 = types.float32, types.int32, types.float32(0.0), types.uint64
    is_sparse, block_m, put = kind.is_sparse, blocks.block_m, write_scores(tile)
    find_tile = tile_finder(kind, blocks)[1]
    of_m, of_log2 = 1.0 / kind.unit, 1.0 / LOG2_E

    @device_function
    def write(
        o, l, scaled_m, number, warpgroup, out, steps, logsumexp, rows_of, sizes, keep, lists, space
    ):
        row0, batch, head, _, _ = find_tile(number, sizes, lists)
        heads, seqlen_q = sizes.heads, sizes.seqlen_q
        l = quad_sum(l)
        own_row, own_column = own_place()
        if is_sparse:
            part = piece_at(lists.table, number).part
            if part >= 0:  # of a list in pieces: hopper/parts.py puts them together
                row, lane = i32(ROWS * warpgroup + own_row), i32(cuda.threadIdx.x) & i32(31)
                first, columns = types.int64(part) * block_m, i32(sizes.value_dim)
                target = space + u64(lists.outputs + 4 * first * columns)
                put(o, target, row, own_column, i32(block_m), columns)
                if lane & i32(3) == 0:
                    for r in range(2):
                        own = space + u64(lists.rows + 8 * (first + row + 8 * r))
                        st_global_f32(own, scaled_m[r])
                        st_global_f32(own + u64(4), l[r])
                return
        row, lane = row0 + ROWS * warpgroup + own_row, i32(cuda.threadIdx.x) & i32(31)
        inside = (row < seqlen_q, row + 8 < seqlen_q)
        # A row that sees no key: 0, and a logsumexp of -inf, which log2(0) is. One with an infinite
        # score: NaN, and a logsumexp of inf.
        factor = (
            zero if l[0] == zero else div_full_f32(keep, l[0]) + (l[0] - l[0]),
            zero if l[1] == zero else div_full_f32(keep, l[1]) + (l[1] - l[1]),
        )  # fmt: skip
        start = types.int64(out) + 2 * (batch * steps.batch + head * steps.head + row * steps.row)
        addresses = (types.uint64(start), types.uint64(start + 16 * steps.row))
        store(scale_rows(o, factor), addresses, inside, i32(sizes.value_dim), lane)
        if lane & i32(3) == 0:
            place = (batch * heads + head) * seqlen_q + row
            for r in range(2):
                if inside[r]:
                    own = place + 8 * r
                    logarithm = lg2_approx_ftz_f32(l[r]) * f32(of_log2)
                    logsumexp[own] = scaled_m[r] * f32(of_m) + logarithm
                    rows_of[2 * own], rows_of[2 * own + 1] = scaled_m[r], l[r]

    return write


@cache
def forward_kernel(kind: Kind, blocks: Blocks) -> Any:
    """A block computes tiles of block_m rows of the output, one after another.

    The kernel's arguments: `maps`, address of the tensor maps of Q, K and V; `order`, address of
    the order of the tiles (hopper/schedule.py), used with a band alone; `out`, address of the
    output; `logsumexp`; `rows_of`, for m and l; `mask` (any array if there is none); `offset`,
    added to the seed; `out_steps` and `mask_steps`, their `Strides`; `sizes`, `TileSizes`;
    `shares`, `Shares`; `scale`; `seed`; `threshold`, below which a random word drops its weight;
    `keep`, 1 / (1 - p); `words`, what the functions are given; `lists`,
    `PiecesOnDevice`; `workspace`, for parts (any array if there are no lists).

    Where a tile of queries ends: m is of the next one from there on; l, scaled_m and O stay those
    of the one that is done until it is written. O is then begun anew by a product that does not
    add. A tile of queries that sees no key gets one tile of zeros (NO_KEYS), all of it masked. A
    place that has never been used is free: the phase before a barrier's first has parity 1.
    """
    block_n, head_dim, value_dim = blocks.block_n, kind.head_dim, kind.value_dim
    warpgroups, ping_pong, plan = blocks.warpgroups, blocks.ping_pong, forward_memory(kind, blocks)
    make_barriers, (load_queries, load_keys) = barrier_maker(kind, blocks), loaders(kind, blocks)
    place_of, (tile_number, tile_of, keys_at) = ring(blocks.stages), tile_finder(kind, blocks)
    # The products, and the wait for the one while the other goes on.
    q_steps, k_steps = steps_along(head_dim, ROWS), steps_along(head_dim, block_n)
    scores = wgmma_ss(block_n, kind.precision, q_steps, k_steps, accumulate=False)
    add_values = wgmma_rs(
        value_dim, kind.precision, steps_down(block_n), trans_b=True, accumulate=None
    )
    q_tile, tile = panels_descriptor(ROWS), panels_descriptor(block_n)
    s_registers, o_registers = block_n // 2, value_dim // 2
    fence, wait_first = wgmma_fence(o_registers), wgmma_wait_group(1, s_registers)
    wait_s, wait_o = wgmma_wait_group(0, s_registers), wgmma_wait_group(0, o_registers)
    wait_after, overlap = wgmma_wait_group_after(0, o_registers), blocks.overlap
    # What is done in registers.
    output, as_operand = RegisterTile(value_dim), RegisterTile(block_n).to_operand(kind.precision)
    no_output, scale_rows, exp2 = output.zero, output.scale_rows, ex2_approx_ftz_f32
    softmax_of, write = softmax(kind, block_n), row_writer(kind, blocks)
    scaled_first, additive, log2_e = kind.scaled_first, kind.additive, LOG2_E
    unit, unit_of_results = kind.unit_of_products, kind.unit_of_results
    to_load, to_compute = LOADERS_REGISTERS[warpgroups], REGISTERS[warpgroups]
    if kind.functions:
        to_load, to_compute = WITH_FUNCTIONS[warpgroups]
    give_registers, take_registers = setmaxnreg("dec", to_load), setmaxnreg("inc", to_compute)
    f32, i32, u32, u64 = types.float32, types.int32, types.uint32, types.uint64

    @kernel(blocks.threads, blocks=1)
    def hopper_forward(
        maps, order, out, logsumexp, rows_of, mask, offset, out_steps, mask_steps, sizes, shares,
        scale, seed, threshold, keep, words, lists, workspace,
    ):  # fmt: skip
        memory = shared_address(cuda.shared.array(0, types.uint8))
        thread = i32(cuda.threadIdx.x)
        # The same in all lanes of a warp, which the shuffle tells the compiler.
        warpgroup = i32(shfl_sync_idx_b32(u32(thread >> i32(7)), 0)) - 1
        if thread == 0:
            make_barriers(memory)
        cuda.syncthreads()
        if warpgroup < 0:
            give_registers()
            if thread == 0:
                load_keys(memory, maps, order, sizes, shares, lists)
            elif thread == 32:
                load_queries(memory, maps, order, sizes, shares, lists)
        else:
            take_registers()
            me = u32(warpgroup)
            is_first_lane = thread & i32(31) == 0
            own_turn, next_turn = 1 + me, 1 + (me + 1) % u32(warpgroups)
            if ping_pong and me == warpgroups - 1:
                bar_arrive(1, 2 * WARPGROUP)  # the first turn is warpgroup 0's
            space = global_address(workspace)
            q_full, q_free = memory + plan.q_full + 8 * me, memory + plan.q_free + 8 * me
            tiles, scale = sizes.tiles, f32(scale * unit)
            factor = f32(unit_of_results) if scaled_first else scale  # of scores in the softmax
            dropout = seed + offset[0], threshold
            # The first tile of keys: S = Q K^T, P = softmax(S).
            number, following = tile_number(order, 0), tile_number(order, 1)
            turn, n = u32(0), u32(0)
            row0, batch, head, key, end = tile_of(number, sizes, lists)
            row0, (tile_of_keys, full) = i32(row0 + ROWS * warpgroup), keys_at(key, lists)
            q = u64(q_tile) | u64((memory + plan.q + me * plan.q_bytes) >> u32(4))
            o, adds, nothing = no_output(), u32(0), (f32(LOWEST), f32(LOWEST))
            mbarrier_wait_parity(q_full, 0)
            mbarrier_wait_parity(memory + plan.k_full, 0)
            o = fence(o)
            s = scores(q, u64(tile) | u64((memory + plan.k) >> u32(4)))
            wgmma_commit_group()
            s = wait_s(s)
            if is_first_lane:
                mbarrier_arrive(memory + plan.k_free)
                if key + 1 == end:
                    mbarrier_arrive(q_free)
            m, key0 = nothing, i32(tile_of_keys * block_n)
            m, weights, _, l = softmax_of(
                s, m, row0, key0, full, batch, head, scale, sizes, mask, mask_steps, dropout, words
            )
            scaled_m = m[0] * factor, m[1] * factor
            p = as_operand(weights)
            while True:
                # P is of the n-th tile of keys. Which one is next?
                done, key = number, i32(key + 1)
                is_last = key == end
                if is_last:
                    if following >= tiles:
                        break
                    number, turn = following, u32(turn + 1)
                    following = tile_number(order, turn + 1)
                    row0, batch, head, key, end = tile_of(number, sizes, lists)
                    row0 = i32(row0 + ROWS * warpgroup)
                    m = nothing
                tile_of_keys, full = keys_at(key, lists)
                v_place, v_parity = place_of(n)
                n = u32(n + 1)
                k_place, k_parity = place_of(n)
                v_barrier, k_barrier = memory + 8 * v_place, memory + 8 * k_place
                # S = Q K^T of the next tile, O += P V of this one
                mbarrier_wait_parity(q_full, turn & u32(1))
                mbarrier_wait_parity(k_barrier + plan.k_full, k_parity)
                if ping_pong:
                    bar_sync(own_turn, 2 * WARPGROUP)
                o = fence(o)
                s = scores(q, u64(tile) | u64((memory + plan.k + k_place * plan.k_bytes) >> u32(4)))
                wgmma_commit_group()
                mbarrier_wait_parity(v_barrier + plan.v_full, v_parity)
                v = u64(tile) | u64((memory + plan.v + v_place * plan.v_bytes) >> u32(4))
                o = add_values(o, p, v, adds)
                wgmma_commit_group()
                if ping_pong:
                    bar_arrive(next_turn, 2 * WARPGROUP)
                s = wait_first(s)
                if is_first_lane:
                    mbarrier_arrive(k_barrier + plan.k_free)
                    if key + 1 == end:
                        mbarrier_arrive(q_free)
                # m, P and its row sums, while O += P V goes on
                key0 = i32(tile_of_keys * block_n)
                m, weights, shift, sums = softmax_of(
                    s, m, row0, key0, full, batch, head, scale, sizes, mask, mask_steps, dropout,
                    words,
                )  # fmt: skip
                o = wait_after(o, sums[0] + sums[1]) if overlap else wait_o(o)
                if is_first_lane:
                    mbarrier_arrive(v_barrier + plan.v_free)
                if is_last:
                    write(
                        o, l, scaled_m, done, warpgroup, out, out_steps, logsumexp, rows_of, sizes,
                        keep, lists, space,
                    )  # fmt: skip
                    l, scaled_m = (f32(0.0), f32(0.0)), nothing
                adds = u32(0) if is_last else u32(1)  # whether the next P V adds to O, or begins it
                # l = alpha l + rowsum(P), O = diag(alpha) O, where alpha = exp(m - m_new)
                change = scaled_m[0] - shift[0], scaled_m[1] - shift[1]
                if additive:
                    change = change[0] * f32(log2_e), change[1] * f32(log2_e)
                alpha = exp2(change[0]), exp2(change[1])
                l = l[0] * alpha[0] + sums[0], l[1] * alpha[1] + sums[1]
                scaled_m = m[0] * factor, m[1] * factor
                o, p = scale_rows(o, alpha), as_operand(weights)
            v_place, v_parity = place_of(n)
            mbarrier_wait_parity(memory + plan.v_full + 8 * v_place, v_parity)
            o = fence(o)
            v = u64(tile) | u64((memory + plan.v + v_place * plan.v_bytes) >> u32(4))
            o = add_values(o, p, v, adds)
            wgmma_commit_group()
            o = wait_o(o)
            write(
                o, l, scaled_m, done, warpgroup, out, out_steps, logsumexp, rows_of, sizes, keep,
                lists, space,
            )  # fmt: skip

    return hopper_forward


__all__ = ["forward_kernel"]
