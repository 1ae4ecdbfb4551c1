"""How the kernels of the Hopper backward pass come by their work and their tiles.

A block stays on its multiprocessor and takes one item of work after the other: a tile of rows that
it owns (keys in one kernel, queries in the other), which many tiles of the other kind pass by. Its
first warpgroup only brings what the others, the consumers, compute with: one of its threads takes
an item, has the copy engine (TMA) fetch the block's own two tiles (K and V, or Q and dO), and after
them the pairs that pass by. As soon as a place in shared memory is free it goes on, to the next
item too: no consumer waits for what could have been asked for earlier.

Tiles go through rings in shared memory. Each place of a ring has barriers `full` and `empty`, so
that the next item's tiles are on their way while this one's are computed with, and its results are
written. What the item is, its `Work`, comes with its own tiles. At `empty` all threads of the
consumers arrive: what a product reads it has read when one of them has waited for it, but each also
reads numbers, of the item or of the passing queries, for itself.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from itertools import accumulate
from typing import Any, NamedTuple

from ...gpu.ptx import (
    atom_global_add_u32,
    ld_global_v4_b32,
    ld_shared_b32,
    st_shared_v4_b32,
)
from ...gpu.ptx_hopper import (
    cp_async_bulk,
    fence_mbarrier_init_release_cluster,
    mbarrier_arrive_expect_tx,
    mbarrier_init,
    mbarrier_wait_parity,
    wgmma_rs,
    wgmma_ss,
)
from ...gpu.runtime import cuda, device_function, types
from ...gpu.shared_layout import panels_descriptor, steps_along, steps_down
from ..schedule_cuda import entry_of, line_of
from .tiles import ROWS, WARPGROUP, Kind, ring, row_bytes, tile_loader

MAP_BYTES = 128  # of a tensor map
BARRIER_BYTES = 8
ITEM_BYTES = 32  # of shared memory: what the consumers are told of an item
ROW_BYTES = 12  # of a query's three numbers
COUNTER_BYTES = 64  # distance of the counters at the workspace's beginning


@dataclass(frozen=True)
class Blocks:
    """Sizes of a block's tiles.

    Args:
        own: rows of its own tiles, 64 for each consumer.
        passing: rows of the tiles that pass by, a multiple of 16.
        stages: pairs of passing tiles in shared memory.
        own_stages: own pairs there: with 2 the next item's are on their way.
        registers_to_load: of a thread of the first warpgroup.

    """

    own: int
    passing: int
    stages: int = 2
    own_stages: int = 2
    registers_to_load: int = 56

    @property
    def consumers(self) -> int:
        """Warpgroups that compute."""
        return self.own // ROWS

    @property
    def threads(self) -> int:
        """Of the block."""
        return WARPGROUP * (self.consumers + 1)

    @property
    def registers_to_compute(self) -> int:
        """Of a consumer's thread: those that are left, in eights, of which it can have 256."""
        threads = self.consumers + 1
        at_entry = 65536 // WARPGROUP // threads // 8 * 8
        left = at_entry * threads - self.registers_to_load
        return min(left // self.consumers // 8 * 8, 256)


class Memory(NamedTuple):
    """Where things begin in shared memory, in bytes."""

    own: tuple[int, int]
    passing: tuple[int, int]
    rows: int  # numbers of the passing queries
    items: int
    own_full: int
    own_empty: int
    full: tuple[int, int]
    empty: int
    size: int


@cache
def memory_plan(kind: Kind, blocks: Blocks) -> Memory:
    """The plan of shared memory; swizzled tiles begin at multiples of 1024."""
    widths, stages = (row_bytes(kind.head_dim), row_bytes(kind.value_dim)), blocks.stages
    sizes = [blocks.own_stages * blocks.own * width for width in widths]
    sizes += [stages * blocks.passing * width for width in widths]
    sizes += [ROW_BYTES * stages * blocks.passing, ITEM_BYTES * blocks.own_stages]
    sizes += [BARRIER_BYTES * blocks.own_stages] * 2 + [BARRIER_BYTES * stages] * 3
    starts = list(accumulate(sizes, initial=0))
    own, passing, full = starts[0:2], starts[2:4], starts[8:10]
    return Memory(
        own=(own[0], own[1]),
        passing=(passing[0], passing[1]),
        rows=starts[4],
        items=starts[5],
        own_full=starts[6],
        own_empty=starts[7],
        full=(full[0], full[1]),
        empty=starts[10],
        size=starts[11],
    )


@cache
def make_barriers(kind: Kind, blocks: Blocks) -> Any:
    """Device function `(base)`: one thread initialises the barriers of all rings."""
    plan, own_stages, stages = memory_plan(kind, blocks), blocks.own_stages, blocks.stages
    own_full, own_empty, (first, second), empty = plan[4:8]
    readers = WARPGROUP * blocks.consumers

    @device_function
    def make(base):
        if cuda.threadIdx.x == 0:
            for stage in range(own_stages):
                mbarrier_init(base + own_full + 8 * stage, 1)
                mbarrier_init(base + own_empty + 8 * stage, readers)
            for stage in range(stages):
                mbarrier_init(base + first + 8 * stage, 1)
                mbarrier_init(base + second + 8 * stage, 1)
                mbarrier_init(base + empty + 8 * stage, readers)
            fence_mbarrier_init_release_cluster()
        cuda.syncthreads()

    return make


class BackwardSizes(NamedTuple):
    """What both kernels are told of a problem."""

    heads: int  # of queries, in a batch
    seqlen_q: int
    seqlen_k: int
    lower: int  # query i sees keys i + lower ... i + upper - 1
    upper: int
    group: int  # heads of queries to one of dK and dV
    head_dim: int
    value_dim: int


class OwnHeads(NamedTuple):
    """Whether the tensor maps of Q and of dO have a matrix for each head, 1, or one for all, 0."""

    q: int
    do: int


class Places(NamedTuple):
    """Where things are in the workspace, in bytes from its beginning.

    Args:
        counter: of items taken.
        table: the list of work.
        items: how many there are in it.
        rows: numbers of all queries.
        pitch: from a head's to the next one's.
        call: the number of this call.
        parts: sums of the parts of long lists, float32.

    """

    counter: int
    table: int
    items: int
    rows: int
    pitch: int
    call: int
    parts: int


# ----- items of work -----
#
# A table of them is in global memory (`hopper/backward_prepare.py` writes it), the longest first.
# Whichever block is done takes the next one, so all end at about the same time.


class Work(NamedTuple):
    """An item of work, sixteen int32: where the block's own tiles are, and which tiles pass by."""

    batch: Any
    head: Any  # of the queries, the first if a group of them shares keys
    row0: Any  # first row of the own tiles
    first: Any  # passing tiles: numbers [first, end)
    end: Any
    slot: Any  # of the block's own head
    k_head: Any
    v_head: Any
    k_batch: Any  # in the tensor maps, where a batch that is repeated is number 0
    v_batch: Any
    q_batch: Any
    do_batch: Any
    heads: Any  # of queries, whose tiles pass by
    part: Any  # where the sums go, plus 1; 0 if they are the results
    unused: Any
    unused_too: Any


WORK_BYTES = 4 * len(Work._fields)


@cache
def item_taker(kind: Kind, blocks: Blocks) -> Any:
    """Device function `(base, turn, counter, table, count)`: one thread takes the next item, when
    its place in the ring is empty. Whether there is one, its `Work`, the place, and the place's
    barrier `full`.
    """
    plan, place_of = memory_plan(kind, blocks), ring(blocks.own_stages)
    own_full, own_empty, items = plan.own_full, plan.own_empty, plan.items
    own_bytes = blocks.own * (row_bytes(kind.head_dim) + row_bytes(kind.value_dim))

    @device_function
    def take(base, turn, counter, table, count):
        stage, parity = place_of(turn)
        item = atom_global_add_u32(counter, 1)
        left = item < count
        entry = table + types.uint64(item if left else 0) * types.uint64(WORK_BYTES)
        first, second = ld_global_v4_b32(entry), ld_global_v4_b32(entry + types.uint64(16))
        third, last = (
            ld_global_v4_b32(entry + types.uint64(32)), ld_global_v4_b32(entry + types.uint64(48)),
        )  # fmt: skip
        work = Work(*(first + second + third + last))
        mbarrier_wait_parity(base + own_empty + 8 * stage, parity ^ types.uint32(1))
        # Each of the consumers' threads has read what was here, and has arrived. What is written
        # now they read after the phase of `full`, which does not end before the arrival below.
        target = types.uint32(base + items + ITEM_BYTES * stage)
        st_shared_v4_b32(target, first)
        # Of the others the consumers need four numbers; no heads: there is no item.
        heads = work.heads if left else types.uint32(0)
        st_shared_v4_b32(target + 16, (work.end, work.slot, types.uint32(heads), work.part))
        full = types.uint32(base + own_full + 8 * stage)
        mbarrier_arrive_expect_tx(full, own_bytes if left else 0)
        return left, work, stage, full

    return take


@cache
def item_reader(kind: Kind, blocks: Blocks) -> Any:
    """Device function `(base, turn)`: wait for the own tiles of the block's item number `turn`.
    How many heads it has, 0 if there is none; the first six numbers of its `Work`; its part; and
    the ring's place.
    """
    plan, place_of = memory_plan(kind, blocks), ring(blocks.own_stages)
    own_full, items, whole = plan.own_full, plan.items, types.int32

    @device_function
    def read(base, turn):
        stage, parity = place_of(turn)
        mbarrier_wait_parity(base + own_full + 8 * stage, parity)
        source = types.uint32(base + items + ITEM_BYTES * stage)
        work = (
            whole(ld_shared_b32(source)), whole(ld_shared_b32(source + 4)),
            whole(ld_shared_b32(source + 8)), whole(ld_shared_b32(source + 12)),
            whole(ld_shared_b32(source + 16)), whole(ld_shared_b32(source + 20)),
        )  # fmt: skip
        return whole(ld_shared_b32(source + 24)), work, whole(ld_shared_b32(source + 28)), stage

    return read


@cache
def passing_tiles(kind: Kind, passing: int) -> tuple[int, Any, Any]:
    """How the tiles that pass by are gone through: by their first rows, or by places in a list.

    Returns:
        step: from a place to the next one.
        places: device function `(first, end, lists, batch, head, own_tile, heads)`: [first, end) of
            an item's places for a head. `Work` has them for an item of one head; numbers of tiles,
            if there are no lists.
        row_at: device function `(place, lists)`: the first row of the tile, and whether a list says
            that it is full.

    """
    is_sparse, whole = kind.is_sparse, types.int32

    @device_function
    def places(first, end, lists, batch, head, own_tile, heads):
        if not is_sparse:
            return whole(first * passing), whole(end * passing)
        if heads == 1:
            return whole(first), whole(end)
        return line_of(lists, batch, head, own_tile)

    @device_function
    def row_at(place, lists):
        if is_sparse:
            tile, full = entry_of(lists, place)
            return whole(tile * passing), full
        return place, False

    return 1 if is_sparse else passing, places, row_at


# ----- tiles -----


@cache
def own_loader(kind: Kind, blocks: Blocks) -> Any:
    """Device function `(base, stage, maps, full, row, heads, batches)`: begin to copy the block's
    own pair of tiles from the tensor maps 0 and 1; each has its head and its batch.
    """
    first, second = memory_plan(kind, blocks).own
    load_first = tile_loader(blocks.own, kind.head_dim)
    load_second = tile_loader(blocks.own, kind.value_dim)
    first_bytes = blocks.own * row_bytes(kind.head_dim)
    second_bytes = blocks.own * row_bytes(kind.value_dim)

    @device_function
    def load(base, stage, maps, full, row, heads, batches):
        load_first(base + first + stage * first_bytes, maps, full, row, heads[0], batches[0])
        load_second(
            base + second + stage * second_bytes, maps + MAP_BYTES, full, row, heads[1], batches[1]
        )

    return load


@cache
def pair_loader(kind: Kind, blocks: Blocks, with_rows: bool) -> Any:
    """Device function `(base, turn, maps, row, heads, batches, rows)`: begin to copy the pair of
    passing tiles number `turn` from the tensor maps 2 and 3, when its place in the ring is empty;
    `with_rows` also the numbers of these rows, those of the head's first being at address `rows`.
    """
    plan, place_of = memory_plan(kind, blocks), ring(blocks.stages)
    (first, second), (first_full, second_full), empty = plan.passing, plan.full, plan.empty
    load_first = tile_loader(blocks.passing, kind.head_dim)
    load_second = tile_loader(blocks.passing, kind.value_dim)
    first_bytes = blocks.passing * row_bytes(kind.head_dim)
    second_bytes = blocks.passing * row_bytes(kind.value_dim)
    numbers, rows_bytes = plan.rows, ROW_BYTES * blocks.passing
    second_count, row_bytes_of = second_bytes + rows_bytes * with_rows, ROW_BYTES

    @device_function
    def load(base, turn, maps, row, heads, batches, rows):
        stage, parity = place_of(turn)
        mbarrier_wait_parity(base + empty + 8 * stage, parity ^ types.uint32(1))
        full = types.uint32(base + first_full + 8 * stage)
        mbarrier_arrive_expect_tx(full, first_bytes)
        load_first(
            base + first + stage * first_bytes, maps + 2 * MAP_BYTES, full, row, heads[0],
            batches[0],
        )  # fmt: skip
        full = types.uint32(base + second_full + 8 * stage)
        mbarrier_arrive_expect_tx(full, second_count)
        load_second(
            base + second + stage * second_bytes, maps + 3 * MAP_BYTES, full, row, heads[1],
            batches[1],
        )  # fmt: skip
        if with_rows:
            target = base + numbers + stage * rows_bytes
            cp_async_bulk(target, rows + types.uint64(row_bytes_of * row), rows_bytes, full)

    return load


# ----- products -----


@cache
def descriptor(rows: int) -> Any:
    """Device function: the descriptor of a tile of `rows` rows that begins at an address."""
    constant = panels_descriptor(rows)

    @device_function
    def describe(address):
        return types.uint64(constant) | types.uint64(types.uint32(address) >> types.uint32(4))

    return describe


@cache
def score_product(kind: Kind, blocks: Blocks, columns: int) -> Any:
    """`f(own, passing)`: the product (64, passing) of a consumer's 64 rows of a tile of `columns`
    columns, and a passing tile transposed.
    """
    return wgmma_ss(
        blocks.passing, kind.precision, steps_along(columns, blocks.own),
        steps_along(columns, blocks.passing), accumulate=False,
    )  # fmt: skip


@cache
def gradient_product(kind: Kind, blocks: Blocks, columns: int) -> Any:
    """`sums = f(sums, factor, passing)`: plus a factor (64, passing) in registers times a passing
    tile of `columns` columns.
    """
    return wgmma_rs(columns, kind.precision, steps_down(blocks.passing), trans_b=True)


__all__ = [
    "COUNTER_BYTES",
    "ROW_BYTES",
    "WORK_BYTES",
    "BackwardSizes",
    "Blocks",
    "Memory",
    "OwnHeads",
    "Places",
    "Work",
    "descriptor",
    "gradient_product",
    "item_reader",
    "item_taker",
    "make_barriers",
    "memory_plan",
    "own_loader",
    "pair_loader",
    "passing_tiles",
    "score_product",
]
