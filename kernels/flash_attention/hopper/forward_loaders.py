"""How the Hopper forward kernel's tiles come into shared memory: plan, barriers, who loads."""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

from ...gpu.ptx_hopper import (
    fence_mbarrier_init_release_cluster,
    mbarrier_arrive_expect_tx,
    mbarrier_init,
    mbarrier_wait_parity,
)
from ...gpu.runtime import device_function, types
from .schedule import quotient, tile_finder
from .tiles import ROWS, Blocks, Kind, ring, row_bytes, tile_loader

WARPS = 4  # of a warpgroup
MAP_BYTES = 128  # of a tensor map


class ForwardMemory(NamedTuple):
    """Where tiles and barriers begin in shared memory, in bytes.

    A barrier has 8 bytes. Each warpgroup has its own tile of queries and its own pair of barriers
    for it; the others are one for each place of the ring.
    """

    q: int
    k: int
    v: int
    q_full: int
    q_free: int
    k_full: int
    k_free: int
    v_full: int
    v_free: int
    size: int
    q_bytes: int  # of a warpgroup's tile
    k_bytes: int  # of a tile
    v_bytes: int


@cache
def forward_memory(kind: Kind, blocks: Blocks) -> ForwardMemory:
    """The forward kernel's plan of shared memory."""
    q_bytes = ROWS * row_bytes(kind.head_dim)
    k_bytes = blocks.block_n * row_bytes(kind.head_dim)
    v_bytes = blocks.block_n * row_bytes(kind.value_dim)
    k = blocks.warpgroups * q_bytes
    v = k + blocks.stages * k_bytes
    q_full = v + blocks.stages * v_bytes
    q_free = q_full + 8 * blocks.warpgroups
    k_full = q_free + 8 * blocks.warpgroups
    k_free, v_full, v_free, size = (k_full + 8 * n * blocks.stages for n in (1, 2, 3, 4))
    return ForwardMemory(
        0, k, v, q_full, q_free, k_full, k_free, v_full, v_free, size, q_bytes, k_bytes, v_bytes
    )


# ----- the threads that load -----


class Shares(NamedTuple):
    """How many batches, and heads, of queries there are to one of the matrices of Q, of K and of V,
    all where a dimension is repeated: their reciprocals (see hopper/schedule.py).
    """

    q_batch_factor: int
    q_batch_shift: int
    q_head_factor: int
    q_head_shift: int
    k_batch_factor: int
    k_batch_shift: int
    k_head_factor: int
    k_head_shift: int
    v_batch_factor: int
    v_batch_shift: int
    v_head_factor: int
    v_head_shift: int


@cache
def box_loader(rows: int, columns: int) -> Any:
    """`tile_loader` that also tells the barrier `full` how many bytes to wait for."""
    load_tile, tile_bytes = tile_loader(rows, columns), rows * row_bytes(columns)

    @device_function
    def load(target, tensor_map, full, row, head, batch):
        mbarrier_arrive_expect_tx(full, tile_bytes)
        load_tile(target, tensor_map, full, row, head, batch)

    return load


@cache
def loaders(kind: Kind, blocks: Blocks) -> Any:
    """Device functions `load_queries` and `load_keys` `(memory, maps, order, sizes, shares,
    lists)`, each of one thread: they load all that the block needs, in the order of its use.
    """
    plan, block_n = forward_memory(kind, blocks), blocks.block_n
    load_q = box_loader(ROWS, kind.head_dim)
    load_k, load_v = box_loader(block_n, kind.head_dim), box_loader(block_n, kind.value_dim)
    place_of, (tile_number, tile_of, keys_at) = ring(blocks.stages), tile_finder(kind, blocks)
    warpgroups, u32 = blocks.warpgroups, types.uint32

    @device_function
    def load_queries(memory, maps, order, sizes, shares, lists):
        turn, tiles = u32(0), sizes.tiles
        number, following = tile_number(order, 0), tile_number(order, 1)
        while number < tiles:
            row0, batch, head, _, _ = tile_of(number, sizes, lists)
            head = quotient(head, shares.q_head_factor, shares.q_head_shift)
            batch = quotient(batch, shares.q_batch_factor, shares.q_batch_shift)
            for n in range(warpgroups):
                mbarrier_wait_parity(memory + plan.q_free + 8 * n, (turn & u32(1)) ^ u32(1))
                load_q(
                    memory + plan.q + n * plan.q_bytes, maps, memory + plan.q_full + 8 * n,
                    row0 + ROWS * n, head, batch,
                )  # fmt: skip
            turn = u32(turn + 1)
            number, following = following, tile_number(order, turn + 1)

    @device_function
    def load_keys(memory, maps, order, sizes, shares, lists):
        turn, n, tiles = u32(0), u32(0), sizes.tiles
        number, following = tile_number(order, 0), tile_number(order, 1)
        while number < tiles:
            _, batch, head, first, end = tile_of(number, sizes, lists)
            tile, _ = keys_at(first, lists)
            k_head = quotient(head, shares.k_head_factor, shares.k_head_shift)
            k_batch = quotient(batch, shares.k_batch_factor, shares.k_batch_shift)
            v_head = quotient(head, shares.v_head_factor, shares.v_head_shift)
            v_batch = quotient(batch, shares.v_batch_factor, shares.v_batch_shift)
            for place_in_list in range(first, end):
                next_tile, _ = keys_at(place_in_list + 1, lists)
                place, parity = place_of(n)
                barrier = memory + 8 * place
                mbarrier_wait_parity(barrier + plan.k_free, parity ^ u32(1))
                load_k(
                    memory + plan.k + place * plan.k_bytes, maps + MAP_BYTES, barrier + plan.k_full,
                    tile * block_n, k_head, k_batch,
                )  # fmt: skip
                mbarrier_wait_parity(barrier + plan.v_free, parity ^ u32(1))
                load_v(
                    memory + plan.v + place * plan.v_bytes, maps + 2 * MAP_BYTES,
                    barrier + plan.v_full, tile * block_n, v_head, v_batch,
                )  # fmt: skip
                n, tile = u32(n + 1), next_tile
            turn = u32(turn + 1)
            number, following = following, tile_number(order, turn + 1)

    return load_queries, load_keys


@cache
def barrier_maker(kind: Kind, blocks: Blocks) -> Any:
    """Device function `(memory)` of one thread: makes the barriers."""
    plan, warpgroups, stages = forward_memory(kind, blocks), blocks.warpgroups, blocks.stages

    @device_function
    def make(memory):
        for n in range(warpgroups):
            mbarrier_init(memory + plan.q_full + 8 * n, 1)
            mbarrier_init(memory + plan.q_free + 8 * n, WARPS)
        for n in range(stages):
            mbarrier_init(memory + plan.k_full + 8 * n, 1)
            mbarrier_init(memory + plan.v_full + 8 * n, 1)
            mbarrier_init(memory + plan.k_free + 8 * n, WARPS * warpgroups)
            mbarrier_init(memory + plan.v_free + 8 * n, WARPS * warpgroups)
        fence_mbarrier_init_release_cluster()

    return make


__all__ = ["Shares", "barrier_maker", "forward_memory", "loaders"]
