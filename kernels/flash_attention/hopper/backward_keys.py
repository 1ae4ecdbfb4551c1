"""The Hopper backward pass, dK and dV: a block owns a tile of keys, all queries pass by.

For each tile of queries that see any of its keys, a warpgroup with 64 of them computes

    S^T = K Q^T                  (64, block_m), in registers; so are all the others of this size
    dP^T = V dO^T
    P^T = exp2(S^T - L)
    dS^T = P^T * (dP^T - delta)
    dV += P^T dO                 (64, Dv), in registers until the last tile
    dK += dS^T Q                 (64, D)

Because the tile is transposed, P^T and dS^T lie in registers just as the tensor cores want the
first factor of a product: they never go through shared memory (as P of P V in "FlashAttention-3",
Shah et al., 2024). For head sizes above 128 the registers do not hold dK and dV at once: there two
launches compute one each.
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
from ..fragments.dropout import drop_by_bits, dropout_words, keep_bits_of_keys
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
from .backward_prepare import INCOMPLETE
from .backward_tiles import (
    apply_slopes,
    complete,
    has_slopes,
    score_gradients,
    weigher,
    write_rows,
)
from .tiles import ROWS, WARPGROUP, Kind, own_place, ring, row_bytes


@cache
def tile_bringer(kind: Kind, blocks: Blocks) -> Any:
    """Device function: one thread has all tiles of all the block's items fetched.

    `own_heads` are `OwnHeads`; `rows` is the address of all queries' numbers, those of a head
    `pitch` bytes apart from those of the next.
    """
    take_item, load_own = item_taker(kind, blocks), own_loader(kind, blocks)
    load_pair, passing, whole = pair_loader(kind, blocks, True), blocks.passing, types.int32
    (step, places, row_at), own = passing_tiles(kind, passing), blocks.own

    @device_function
    def bring(base, maps, own_heads, counter, table, count, heads, rows, pitch, lists):
        q_heads, do_heads = whole(own_heads.q), whole(own_heads.do)
        turn, number = types.uint32(0), types.uint32(0)
        left, work, stage, full = take_item(base, number, counter, table, count)
        while left:
            b, first_head, key0 = whole(work.batch), whole(work.head), whole(work.row0)
            item_heads = whole(work.heads)
            load_own(
                base, stage, maps, full, key0, (whole(work.k_head), whole(work.v_head)),
                (whole(work.k_batch), whole(work.v_batch)),
            )  # fmt: skip
            others = whole(work.q_batch), whole(work.do_batch)
            for h in range(first_head, first_head + item_heads):
                of_head = rows + types.uint64(b * heads + h) * pitch
                # From the last tile to the first: with a causal mask early queries have the
                # largest P, and a long sum is most accurate when these come last.
                first, place = places(
                    work.first, work.end, lists, b, h, key0 // whole(own), item_heads
                )
                while place > first:
                    place -= whole(step)
                    row, _ = row_at(place, lists)
                    load_pair(base, turn, maps, row, (h * q_heads, h * do_heads), others, of_head)
                    turn += types.uint32(1)
            number += types.uint32(1)
            left, work, stage, full = take_item(base, number, counter, table, count)

    return bring


@cache
def key_kernel(kind: Kind, blocks: Blocks, wants_dk: bool = True, wants_dv: bool = True) -> Any:
    """A block computes `own` rows of dK or dV or both, from all queries' heads that share them."""
    plan, passing, own = memory_plan(kind, blocks), blocks.passing, blocks.own
    (k_at, v_at), (q_at, do_at), rows_at = plan.own, plan.passing, plan.rows
    k_bytes, v_bytes = own * row_bytes(kind.head_dim), own * row_bytes(kind.value_dim)
    q_bytes, do_bytes = passing * row_bytes(kind.head_dim), passing * row_bytes(kind.value_dim)
    (q_full, do_full), empty, own_empty = plan.full, plan.empty, plan.own_empty
    give_registers = setmaxnreg("dec", blocks.registers_to_load)
    take_registers = setmaxnreg("inc", blocks.registers_to_compute)
    init_barriers, place_of = make_barriers(kind, blocks), ring(blocks.stages)
    bring_tiles, read_item = tile_bringer(kind, blocks), item_reader(kind, blocks)
    of_own, of_passing = descriptor(own), descriptor(passing)
    scores_of = score_product(kind, blocks, kind.head_dim)
    products_of = score_product(kind, blocks, kind.value_dim)
    add_dk = gradient_product(kind, blocks, kind.head_dim)
    add_dv = gradient_product(kind, blocks, kind.value_dim)
    scores_done = wgmma_wait_group(int(wants_dk), passing // 2)
    products_done = wgmma_wait_group(0, passing // 2)
    dk_fence, dk_done = wgmma_fence(kind.head_dim // 2), wgmma_wait_group(0, kind.head_dim // 2)
    dv_fence, dv_done = wgmma_fence(kind.value_dim // 2), wgmma_wait_group(0, kind.value_dim // 2)
    fence, tile = wgmma_fence(), RegisterTile(passing)
    zero_dk, zero_dv = RegisterTile(kind.head_dim).zero, RegisterTile(kind.value_dim).zero
    weigh, to_ds = weigher(kind, tile, True), score_gradients(tile, True)
    to_factor, dropout = tile.to_operand(kind.precision), kind.dropout
    keep_bits, drop_from = keep_bits_of_keys(tile), drop_by_bits(tile)
    write_dk = write_rows(kind.precision, kind.head_dim, kind.vectors)
    write_dv = write_rows(kind.precision, kind.value_dim, kind.vectors)
    put_dk, put_dv = (write_scores(RegisterTile(n)) for n in (kind.head_dim, kind.value_dim))
    complete_p, unit, rows_bytes = complete(tile), kind.unit_of_products, ROW_BYTES * passing
    times_slopes, derives, count = apply_slopes(tile), has_slopes(kind), tile.registers
    (step, places, row_at), is_sparse = passing_tiles(kind, passing), kind.is_sparse
    has_score = kind.functions.score is not None
    keys, no_end, whole, u64 = ROWS, 1 << 30, types.int32, types.uint64

    @kernel(blocks.threads, blocks=1)
    def flash_backward_keys_hopper(
        maps, own_heads, mask, offset, workspace, areas, dk_out, dv_out, mask_steps, dk_steps,
        dv_steps, sizes, scale, seed, threshold, keep, words, lists,
    ):  # fmt: skip
        base = shared_address(cuda.shared.array(0, types.uint8))
        init_barriers(base)
        heads, seqlen_q, seqlen_k, lower, upper, _, head_dim, value_dim = sizes
        thread, heads = whole(cuda.threadIdx.x), whole(heads)
        counter, table, items, rows, pitch, call, parts = areas
        if thread < WARPGROUP:
            give_registers()
            if thread == 0:
                space = global_address(workspace)
                bring_tiles(
                    base, maps, own_heads, space + u64(counter), space + u64(table), items, heads,
                    space + u64(rows), u64(pitch), lists,
                )  # fmt: skip
        else:
            take_registers()
            band = (whole(lower), whole(upper), whole(seqlen_q), whole(seqlen_k))
            # Keys beyond the last are computed with, and not written.
            endless = Band(whole(lower), whole(upper), whole(seqlen_q), no_end)
            consumer, lane = thread // WARPGROUP - 1, thread & whole(31)
            my_row, my_column = own_place()
            own_scale = types.float32(scale * unit)
            incomplete = ld_global_f32(
                global_address(workspace) + u64(INCOMPLETE)
            ) == types.float32(call)
            turn, number = types.uint32(0), types.uint32(0)
            item_heads, work, part, own_stage = read_item(base, number)
            while item_heads:
                b, first_head, key0, first_tile, end_tile, slot = work
                own_tile = key0 // whole(own)
                key0 = whole(key0 + consumer * keys)
                k = of_own(base + k_at + own_stage * k_bytes + consumer * (keys * 128))
                v = of_own(base + v_at + own_stage * v_bytes + consumer * (keys * 128))
                dk, dv = zero_dk(), zero_dv()
                for h in range(first_head, first_head + item_heads):
                    mask_place = head_place(b, h, mask_steps)
                    random = dropout_words(seed + offset[0], b * heads + h, threshold)
                    first, place = places(first_tile, end_tile, lists, b, h, own_tile, item_heads)
                    while place > first:
                        place -= whole(step)
                        row0, full = row_at(place, lists)
                        stage, parity = place_of(turn)
                        q = of_passing(base + q_at + stage * q_bytes)
                        do = of_passing(base + do_at + stage * do_bytes)
                        numbers = types.uint32(base + rows_at + stage * rows_bytes + 4 * my_column)
                        # S^T = K Q^T,  dP^T = V dO^T
                        mbarrier_wait_parity(base + q_full + 8 * stage, parity)
                        fence()
                        scores = scores_of(k, q)
                        wgmma_commit_group()
                        mbarrier_wait_parity(base + do_full + 8 * stage, parity)
                        if wants_dk:
                            products = products_of(v, do)
                            wgmma_commit_group()
                        # P = exp(S - L),  dS = P * (Z dP - delta)
                        is_full = full
                        if not is_sparse:
                            is_full = is_whole(row0, passing, key0, keys, endless)
                            if has_score:  # which reads nothing past the last query or key
                                inside = row0 + passing <= seqlen_q and key0 + keys <= seqlen_k
                                is_full = is_full and inside
                        found = weigh(
                            scores_done(scores), own_scale, numbers, is_full, row0 + my_column,
                            key0 + my_row, band, mask, mask_place, words,
                        )  # fmt: skip
                        p = found[:count]
                        if incomplete:
                            p = complete_p(p, numbers + 128)
                        if dropout:
                            bits = keep_bits(row0 + my_column, key0 + my_row, random)
                        if wants_dk:
                            products = products_done(products)
                            if dropout:
                                products = drop_from(products, bits)
                            gradients = to_ds(p, products, keep, numbers + 64)
                            if derives:
                                gradients = times_slopes(gradients, found[count:])
                            ds = to_factor(gradients)
                        # dV += P^T dO,  dK += dS^T Q
                        if wants_dv:
                            if dropout:
                                p = drop_from(p, bits)
                            dv = add_dv(dv_fence(dv), to_factor(p), do)
                        if wants_dk:
                            dk = add_dk(dk_fence(dk), ds, q)
                        wgmma_commit_group()
                        if wants_dv:
                            dv = dv_done(dv)
                        if wants_dk:
                            dk = dk_done(dk)
                        mbarrier_arrive(base + empty + 8 * stage)
                        turn += types.uint32(1)
                mbarrier_arrive(base + own_empty + 8 * own_stage)
                row = key0 + my_row
                if is_sparse and part:  # of a list in pieces: parts.py adds them up
                    first_part = u64(4 * (part - 1) * own * types.int64(head_dim + value_dim))
                    target = global_address(workspace) + u64(parts) + first_part
                    own_row = whole(consumer * keys + my_row)
                    if wants_dk:
                        put_dk(dk, target, own_row, my_column, whole(own), whole(head_dim))
                    if wants_dv:
                        target += u64(4 * own * types.int64(head_dim))
                        put_dv(dv, target, own_row, my_column, whole(own), whole(value_dim))
                    number += types.uint32(1)
                    item_heads, work, part, own_stage = read_item(base, number)
                    continue
                if wants_dk:
                    place = b * dk_steps.batch + slot * dk_steps.head + row * dk_steps.row
                    write_dk(
                        dk, scale, global_address(dk_out) + types.uint64(2 * place),
                        2 * dk_steps.row, band[3] - row, head_dim, lane,
                    )  # fmt: skip
                if wants_dv:
                    place = b * dv_steps.batch + slot * dv_steps.head + row * dv_steps.row
                    write_dv(
                        dv, keep, global_address(dv_out) + types.uint64(2 * place),
                        2 * dv_steps.row, band[3] - row, value_dim, lane,
                    )  # fmt: skip
                number += types.uint32(1)
                item_heads, work, part, own_stage = read_item(base, number)

    return flash_backward_keys_hopper


__all__ = ["key_kernel"]
