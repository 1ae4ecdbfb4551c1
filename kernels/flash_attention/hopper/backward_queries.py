"""The Hopper backward pass, dQ: a block owns a tile of queries, the keys that they see pass by.

For each tile of keys a warpgroup with 64 of the queries computes

    S = Q K^T                    (64, block_n), in registers; so are all the others of this size
    dP = dO V^T
    P = exp2(S - L)              but for a factor of its row, the rest, which dQ is times in the end
    dS = P * (dP - delta)
    dQ += dS K                   (64, D), in registers until the last tile

It is the kernel of hopper/backward_keys.py with the parts of queries and keys exchanged: S and dP
are computed a second time, and no two blocks add to one number.
"""

from __future__ import annotations

from functools import cache
from typing import Any

from ...gpu.ptx import global_address, ld_global_f32, shared_address
from ...gpu.ptx_hopper import (
    mbarrier_arrive,
    mbarrier_wait_parity,
    setmaxnreg,
    wgmma_commit_group,
    wgmma_fence,
    wgmma_wait_group,
)
from ...gpu.register_tile import RegisterTile
from ...gpu.runtime import cuda, device_function, kernel, types
from ..fragments.dropout import drop, dropout_words
from ..fragments.store import write_scores
from ..schedule import Band
from ..schedule_cuda import is_whole
from ..scores_cuda import head_place
from .backward_pipeline import (
    ROW_BYTES,
    Blocks,
    descriptor,
    gradient_product,
    item_reader,
    item_taker,
    make_barriers,
    memory_plan,
    own_loader,
    pair_loader,
    passing_tiles,
    score_product,
)
from .backward_tiles import apply_slopes, has_slopes, score_gradients, weigher, write_rows
from .tiles import ROWS, WARPGROUP, Kind, own_place, ring, row_bytes


@cache
def tile_bringer(kind: Kind, blocks: Blocks) -> Any:
    """Device function: one thread has all tiles of all the block's items fetched. `own_heads` are
    `OwnHeads`.
    """
    take_item, load_own = item_taker(kind, blocks), own_loader(kind, blocks)
    load_pair, passing, whole = pair_loader(kind, blocks, False), blocks.passing, types.int32
    (step, places, row_at), own = passing_tiles(kind, passing), blocks.own

    @device_function
    def bring(base, maps, own_heads, counter, table, count, lists):
        turn, number, unused = types.uint32(0), types.uint32(0), types.uint64(0)
        left, work, stage, full = take_item(base, number, counter, table, count)
        while left:
            h, b, row0 = whole(work.head), whole(work.batch), whole(work.row0)
            place, end = places(work.first, work.end, lists, b, h, row0 // whole(own), 1)
            load_own(
                base, stage, maps, full, row0, (h * own_heads.q, h * own_heads.do),
                (whole(work.q_batch), whole(work.do_batch)),
            )  # fmt: skip
            heads = whole(work.k_head), whole(work.v_head)
            others = whole(work.k_batch), whole(work.v_batch)
            while place < end:
                row, _ = row_at(place, lists)
                load_pair(base, turn, maps, row, heads, others, unused)
                place += whole(step)
                turn += types.uint32(1)
            number += types.uint32(1)
            left, work, stage, full = take_item(base, number, counter, table, count)

    return bring


@device_function
def numbers_of(space, of_head, row, which):
    """L, delta or rest, whichever number 0, 1 or 2 is, of a lane's two rows."""
    place = of_head + row // 16 * (16 * ROW_BYTES) + row % 16 * 4 + 64 * which
    address = space + types.uint64(place)
    return ld_global_f32(address), ld_global_f32(address + types.uint64(32))


@cache
def query_kernel(kind: Kind, blocks: Blocks, keep_scores: bool = False) -> Any:
    """A block computes `own` rows of dQ; with `keep_scores` it also writes dS, whole."""
    plan, passing, own = memory_plan(kind, blocks), blocks.passing, blocks.own
    (q_at, do_at), (k_at, v_at) = plan.own, plan.passing
    q_bytes, do_bytes = own * row_bytes(kind.head_dim), own * row_bytes(kind.value_dim)
    k_bytes, v_bytes = passing * row_bytes(kind.head_dim), passing * row_bytes(kind.value_dim)
    (k_full, v_full), empty, own_empty = plan.full, plan.empty, plan.own_empty
    give_registers = setmaxnreg("dec", blocks.registers_to_load)
    take_registers = setmaxnreg("inc", blocks.registers_to_compute)
    init_barriers, place_of = make_barriers(kind, blocks), ring(blocks.stages)
    bring_tiles, read_item = tile_bringer(kind, blocks), item_reader(kind, blocks)
    of_own, of_passing = descriptor(own), descriptor(passing)
    scores_of = score_product(kind, blocks, kind.head_dim)
    products_of = score_product(kind, blocks, kind.value_dim)
    add_dq = gradient_product(kind, blocks, kind.head_dim)
    scores_done = wgmma_wait_group(1, passing // 2)
    products_done = wgmma_wait_group(0, passing // 2)
    dq_fence, dq_done = wgmma_fence(kind.head_dim // 2), wgmma_wait_group(0, kind.head_dim // 2)
    tile, of_dq = RegisterTile(passing), RegisterTile(kind.head_dim)
    fence, zero_dq = wgmma_fence(), of_dq.zero
    weigh, to_ds = weigher(kind, tile, False), score_gradients(tile, False)
    to_factor, drop_from, dropout = tile.to_operand(kind.precision), drop(tile), kind.dropout
    write_dq = write_rows(kind.precision, kind.head_dim, kind.vectors)
    write_ds, put_part = write_scores(tile), write_scores(of_dq)
    times_slopes, derives, count = apply_slopes(tile), has_slopes(kind), tile.registers
    (step, places, row_at), is_sparse = passing_tiles(kind, passing), kind.is_sparse
    has_score = kind.functions.score is not None
    queries, whole, u64, unit = ROWS, types.int32, types.uint64, kind.unit_of_products
    scale_dq, scale_ds = of_dq.scale_rows, tile.scale_rows

    @kernel(blocks.threads, blocks=1)
    def flash_backward_queries_hopper(
        maps, own_heads, mask, offset, workspace, areas, dq_out, ds_out, mask_steps, dq_steps,
        sizes, scale, seed, threshold, keep, words, lists,
    ):  # fmt: skip
        base = shared_address(cuda.shared.array(0, types.uint8))
        init_barriers(base)
        heads, seqlen_q, seqlen_k, lower, upper, _, head_dim, _ = sizes
        counter, table, items, rows, pitch, _, parts = areas
        space = global_address(workspace)
        thread = whole(cuda.threadIdx.x)
        if thread < WARPGROUP:
            give_registers()
            if thread == 0:
                bring_tiles(
                    base, maps, own_heads, space + u64(counter), space + u64(table), items, lists
                )
        else:
            take_registers()
            band = (whole(lower), whole(upper), whole(seqlen_q), whole(seqlen_k))
            limits = Band(whole(lower), whole(upper), whole(seqlen_q), whole(seqlen_k))
            key = seed + offset[0]
            consumer, lane = thread // WARPGROUP - 1, thread & whole(31)
            my_row, my_column = own_place()
            own_scale = types.float32(scale * unit)
            turn, number = types.uint32(0), types.uint32(0)
            item_heads, work, part, own_stage = read_item(base, number)
            while item_heads:
                b, h, row0, first, end, _ = work
                first, end = places(first, end, lists, b, h, row0 // whole(own), 1)
                row0 = whole(row0 + consumer * queries)
                batch_head = b * types.int64(heads) + h
                row = whole(row0 + my_row)
                shifts = numbers_of(space, rows + batch_head * pitch, row, 0)
                delta = numbers_of(space, rows + batch_head * pitch, row, 1)
                q = of_own(base + q_at + own_stage * q_bytes + consumer * (queries * 128))
                do = of_own(base + do_at + own_stage * do_bytes + consumer * (queries * 128))
                mask_place = head_place(b, h, mask_steps)
                dq = zero_dq()
                for n in range(first, end, step):
                    key0, full = row_at(whole(n), lists)
                    stage, parity = place_of(turn)
                    k = of_passing(base + k_at + stage * k_bytes)
                    v = of_passing(base + v_at + stage * v_bytes)
                    # S = Q K^T,  dP = dO V^T
                    mbarrier_wait_parity(base + k_full + 8 * stage, parity)
                    fence()
                    scores = scores_of(q, k)
                    wgmma_commit_group()
                    mbarrier_wait_parity(base + v_full + 8 * stage, parity)
                    products = products_of(do, v)
                    wgmma_commit_group()
                    # P = exp(S - L),  dS = P * (Z dP - delta)
                    is_full = full
                    if not is_sparse:
                        is_full = is_whole(row0, queries, key0, passing, limits)
                        if has_score:  # which reads nothing past the last query
                            is_full = is_full and row0 + queries <= seqlen_q
                    found = weigh(
                        scores_done(scores), own_scale, shifts, is_full, row, key0 + my_column,
                        band, mask, mask_place, words,
                    )  # fmt: skip
                    products = products_done(products)
                    if dropout:
                        random = dropout_words(key, batch_head, threshold)
                        products = drop_from(products, row, key0 + my_column, random)
                    ds = to_ds(found[:count], products, keep, delta)
                    if keep_scores:
                        of_head = u64(4 * batch_head * seqlen_q * seqlen_k)
                        rest = numbers_of(space, rows + batch_head * pitch, row, 2)
                        write_ds(
                            scale_ds(ds, rest), global_address(ds_out) + of_head, row,
                            key0 + my_column, seqlen_q, seqlen_k,
                        )  # fmt: skip
                    if derives:
                        ds = times_slopes(ds, found[count:])
                    # dQ += dS K
                    dq = add_dq(dq_fence(dq), to_factor(ds), k)
                    wgmma_commit_group()
                    dq = dq_done(dq)
                    mbarrier_arrive(base + empty + 8 * stage)
                    turn += types.uint32(1)
                mbarrier_arrive(base + own_empty + 8 * own_stage)
                rest = numbers_of(space, rows + batch_head * pitch, row, 2)
                dq = scale_dq(dq, rest)
                if is_sparse and part:  # of a list in pieces: parts.py adds them up
                    target = space + u64(parts + 4 * (part - 1) * own * types.int64(head_dim))
                    put_part(
                        dq, target, whole(consumer * queries + my_row), my_column, whole(own),
                        whole(head_dim),
                    )  # fmt: skip
                    number += types.uint32(1)
                    item_heads, work, part, own_stage = read_item(base, number)
                    continue
                place = b * dq_steps.batch + h * dq_steps.head + row * dq_steps.row
                write_dq(
                    dq, scale, global_address(dq_out) + types.uint64(2 * place), 2 * dq_steps.row,
                    band[2] - row, head_dim, lane,
                )  # fmt: skip
                number += types.uint32(1)
                item_heads, work, part, own_stage = read_item(base, number)

    return flash_backward_queries_hopper


__all__ = ["query_kernel"]
