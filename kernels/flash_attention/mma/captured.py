"""Gradients of the arrays that a score function captured, on tensor cores: see ../captured.py.

S and dP are computed as for dQ in `mma/backward.py`; what a score function got, and the gradient of
what it gave, go through shared memory to the threads that add them up.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import cache, partial
from typing import Any

from ...gpu.ptx import shared_address, st_shared_b32
from ...gpu.register_tile import RegisterTile
from ...gpu.runtime import SIMULATED, Instance, ceil_div, cuda, kernel, precision, types
from ...gpu.traced import traced, word_of
from ..captured import CapturedSums, Place, add_up, adder, pair_of_instances
from ..fragments.dropout import dropout_words
from ..launch import (
    Architecture,
    Heads,
    Inputs,
    Matrices,
    argument_types,
    example_functions,
    scalars_of,
    sizes_of,
    tile_lists,
)
from ..problem import AttentionProblem
from ..schedule_cuda import walk
from ..scores import Functions
from ..scores_cuda import head_place
from ..softmax import next_call
from .backward import backward_memory
from .launch import ARCHITECTURES, can_be_copied, kind_of, launch_delta, why_not
from .memory import copy_barriers, pair_copier
from .scores import read_own_rows, score_gradients, score_rule
from .tiles import Kind, Tiles, divide, lane_places, multiply_rows

# The first that fits in shared memory.
CHOICES = (
    (Tiles(16, 16, 1, 1),) if SIMULATED else (
        Tiles(64, 64, 4, 1), Tiles(64, 32, 4, 1), Tiles(64, 16, 4, 1), Tiles(32, 16, 2, 1),
        Tiles(16, 16, 1, 1),
    )
)  # fmt: skip
ODD = 1  # column more than a tile has, so that rows begin in different banks


@cache
def tiles_of(kind: Kind, architecture: Architecture) -> Tiles | None:
    """The kernel's tiles; None if none fit, as of float32 with 256 columns on small GPUs."""
    wide = max(kind.width, kind.value_width) > 128 and not SIMULATED
    for tiles in CHOICES[2 * wide :]:
        if can_be_copied(kind, tiles, architecture, shared_bytes(kind, tiles)):
            return tiles
    return None


def takes(problem: AttentionProblem, architecture: Architecture) -> bool:
    """Whether the kernel computes it."""
    kind = kind_of(problem, problem.mask_kind, architecture)
    return why_not(problem, architecture) is None and tiles_of(kind, architecture) is not None


def shared_bytes(kind: Kind, tiles: Tiles) -> int:
    """What passes by, and two tiles of float32."""
    return backward_memory(kind, tiles, False).size + 8 * tiles.rows * (tiles.columns + ODD)


@cache
def put_tile(tile: RegisterTile, step: int) -> Any:
    """Traced `(numbers, address)`: a lane's numbers to shared memory, in rows of `step` float32;
    its first goes to the address.
    """

    @traced(types.void, tile.type, types.uint32)
    def put(numbers, address):
        for p in tile.places():
            at = 4 * (p.row * step + p.column)
            st_shared_b32(address + at, word_of(numbers[p.register]))

    return put


@cache
def captured_kernel(kind: Kind, tiles: Tiles, measures: bool) -> Any:
    """A block goes through `tiles.rows` queries' scores, and measures, or adds, what they add."""
    storage = getattr(types, precision(kind.precision).storage.name)
    block_m, block_n, row_blocks = tiles.rows, tiles.columns, tiles.row_blocks
    plan = backward_memory(kind, tiles, False)
    do_tile, k_tile, v_tile, scores_tile = plan.own_2, plan.other, plan.other_2, plan.size
    width, value_width = kind.width, kind.value_width
    step, v_step, tile_step = kind.step(width), kind.step(value_width), block_n + ODD
    scores_at, gradients_at = scores_tile // 4, scores_tile // 4 + block_m * tile_step
    copy_queries = pair_copier(kind, tiles, block_m, (plan.own, plan.own_2))
    copy_keys = pair_copier(kind, tiles, block_n, (plan.other, plan.other_2))
    (commit, wait), (own, others, _) = copy_barriers(kind), lane_places(kind)
    scores_of = multiply_rows(kind, row_blocks, block_n, width, False)
    products_of = multiply_rows(kind, row_blocks, block_n, value_width, False)
    scores = RegisterTile(block_n, row_blocks)
    rule, put = score_rule(kind, scores, (block_m, block_n)), put_tile(scores, tile_step)
    gradients, scale_ds = score_gradients(kind, scores, False, derives=False), scores.scale_rows
    read, exponent_unit, infinity = read_own_rows(scores), kind.exponent_unit, float("inf")
    places, tile_at = walk(kind.is_sparse, block_m, block_n)
    begin, add, end_with, loads = adder(
        kind.functions, "float32", (block_m, block_n), tiles.threads, measures, kind.approximate
    )

    @kernel(tiles.threads, blocks=tiles.at_once)
    def flash_captured_mma(
        q, k, v, mask, offset, grad_out, shift, delta, rest, largest, units, sums_of, q_steps,
        k_steps, v_steps, mask_steps, grad_steps, sizes, scale, seed, threshold, keep, words, lists,
        starts,
    ):  # fmt: skip
        heads, seqlen_q, seqlen_k, lower, upper, k_group, v_group = sizes
        memory, numbers = cuda.shared.array(0, storage), cuda.shared.array(0, types.float32)
        state = (
            cuda.local.array(loads, types.int64), cuda.local.array(loads, types.int64),
            cuda.local.array(loads, types.float32),
        )  # fmt: skip
        base, thread = shared_address(memory), cuda.threadIdx.x
        lane, warp_row = thread % 32, thread // 32 * 16 * row_blocks
        row_tiles = (seqlen_q + block_m - 1) // block_m
        batch_head, number = divide(cuda.blockIdx.x, row_tiles)
        tile = row_tiles - 1 - number
        row0 = tile * block_m
        b, h = divide(batch_head, heads)
        queries = (q, b * q_steps.batch + h * q_steps.head, q_steps.row)
        upstream = (grad_out, b * grad_steps.batch + h * grad_steps.head, grad_steps.row)
        keys = (k, b * k_steps.batch + divide(h, k_group)[0] * k_steps.head, k_steps.row)
        values = (v, b * v_steps.batch + divide(h, v_group)[0] * v_steps.head, v_steps.row)
        copy_queries(memory, base, 0, queries, upstream, row0, seqlen_q)
        commit()
        mask_place = head_place(b, h, mask_steps)
        band = (
            types.int32(lower), types.int32(upper), types.int32(seqlen_q), types.int32(seqlen_k),
        )  # fmt: skip
        own_scale = types.float32(scale)
        dropout_of = dropout_words(seed + offset[0], batch_head, threshold)
        q_place = types.uint32(base + warp_row * step + own(step))
        do_place = types.uint32(base + do_tile + warp_row * v_step + own(v_step))
        k_place = types.uint32(base + k_tile + others(step))
        v_place = types.uint32(base + v_tile + others(v_step))
        my_row, my_key = row0 + warp_row + lane // 4, lane % 4 * 2
        own_place = types.uint32(
            base + scores_tile + 4 * ((warp_row + lane // 4) * tile_step + my_key)
        )
        first_row = types.int64(batch_head) * seqlen_q
        shifts = read(shift, first_row, my_row, seqlen_q, types.float32(infinity))
        less = read(delta, first_row, my_row, seqlen_q, types.float32(0.0))
        rests = read(rest, first_row + 1, my_row, seqlen_q, types.float32(1.0))
        begin(state)
        first, end = places(lists, b, h, tile, sizes)
        for number in range(first, end):
            key0, full = tile_at(lists, number)
            cuda.syncthreads()  # all warps are done with the tiles before
            copy_keys(memory, base, 0, keys, values, key0, seqlen_k)
            commit()
            wait()
            cuda.syncthreads()
            s = scores_of(q_place, k_place)
            put(s, own_place)
            rated = rule(
                s, my_row, key0 + my_key, row0, key0, full, sizes, band, mask, mask_place,
                own_scale, words,
            )  # fmt: skip
            dp = products_of(do_place, v_place)
            _, _, ds = gradients(
                rated, dp, shifts, less, types.float32(exponent_unit), my_row, key0 + my_key,
                dropout_of, types.float32(keep),
            )  # fmt: skip
            put(scale_ds(ds, rests), types.uint32(own_place + 4 * block_m * tile_step))
            cuda.syncthreads()
            at = Place(b, h, seqlen_q, seqlen_k, row0, key0)
            add(
                state, numbers, gradients_at, scores_at, tile_step, at, own_scale, words, units,
                sums_of, starts,
            )  # fmt: skip
        wait()  # for the queries, where there was no tile of keys
        end_with(state, largest, sums_of)

    return flash_captured_mma


def captured_gradients(
    problem: AttentionProblem,
    heads: Heads,
    inputs: Inputs,
    out: Matrices,
    rows: Any,
    grad_out: Matrices,
    grad_logsumexp: Any,
    workspace: tuple[Any, Any, Any],
    sums: CapturedSums,
    gradients: list[tuple[Any, int, str]],
    architecture: Architecture,
) -> None:
    """Write the gradients of what the score function captured: see simt/captured.py."""
    kind, call = kind_of(problem, inputs.mask_kind, architecture), next_call()
    # Other kernels do not know which gradients are wanted; this one must.
    kind = replace(kind, functions=Functions(problem.score_mod, problem.mask_mod))
    tiles = tiles_of(kind, architecture)
    assert tiles is not None
    launch_delta(problem, heads, kind, out, rows, grad_out, grad_logsumexp, workspace, call)
    delta, shift, rest = workspace
    grid = ceil_div(problem.seqlen_q, tiles.rows) * problem.batch_heads
    arguments = (
        *inputs.arrays, inputs.offset, grad_out.array, shift, delta, rest, *sums[:3],
        *inputs.strides, grad_out.strides, sizes_of(problem, heads), *scalars_of(problem),
        inputs.words, tile_lists(problem, inputs, (tiles.rows, tiles.columns)), sums.starts,
    )  # fmt: skip
    add_up(
        partial(captured_kernel, kind, tiles), grid, tiles.threads, arguments,
        shared_bytes(kind, tiles), "float32", sums, gradients,
    )  # fmt: skip


# ----- for the compile tests -----


def instances() -> Iterator[Instance]:
    """With lists, with dropout, and of wide heads."""
    functions = example_functions()
    for kind, name in (
        (Kind("float16", 64, 64, "none", False, False, False, functions, True), "sm_90a"),
        (Kind("float16", 128, 128, "none", True, False, False, functions), "sm_86"),
        (Kind("bfloat16", 128, 128, "none", True, False, False, functions), "sm_80"),
        (Kind("tf32x3", 256, 256, "float32", False, True, False, functions), "sm_90a"),
        (Kind("tf32x3", 128, 128, "none", False, False, False, functions), "sm_89"),
        (Kind("float16", 128, 128, "none", False, False, True, functions), "sm_75"),
    ):
        tiles = tiles_of(kind, ARCHITECTURES[name])
        assert tiles is not None
        yield from pair_of_instances(
            f"mma_captured[{kind.numbers}, {kind.head_dim}, {{}}, {name}]",
            partial(captured_kernel, kind, tiles),
            argument_types(kind.precision, kind.mask, functions), (name,),
        )  # fmt: skip


__all__ = ["captured_gradients", "instances", "takes"]
