"""Gradients of the arrays that a score function captured, with ordinary arithmetic: see
../captured.py. S and dS' are computed as for dQ in `simt/backward.py`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import cache, partial
from typing import Any

from ...gpu.runtime import Instance, ceil_div, cuda, kernel, precision, types
from ..captured import CapturedSums, Place, add_up, adder, pair_of_instances
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
from ..schedule import Band
from ..schedule_cuda import walk
from ..scores import Functions
from ..scores_cuda import head_place
from .backward import backward_memory, row_loader, score_gradients, tile_pair
from .dropout import keep_maker
from .launch import backward_blocks, backward_bytes, has_whole_vectors, kind_of, launch_delta
from .tiles import Blocks, Kind, Scores


@cache
def captured_kernel(kind: Kind, blocks: Blocks, measures: bool) -> Any:
    """A block goes through block_m queries' scores, and measures, or adds, what they add."""
    real = precision(kind.precision).real
    plan, block_m, block_n = backward_memory(kind, blocks, True), blocks.block_m, blocks.block_n
    rows, keys = blocks.rows, blocks.keys
    q_tile, do_tile, k_tile, v_tile, p_tile, ds_tile = plan[:6]
    p_step = plan.p_step
    load_queries = tile_pair(kind, blocks, plan, block_m)
    load_keys = tile_pair(kind, blocks, plan, block_n)
    load_rows = row_loader(kind.precision, block_m, blocks.threads, plan)
    to_ds, dropout = score_gradients(kind, blocks, plan, "score"), kind.dropout
    make_keep, unit = keep_maker(kind, blocks, plan.keep), kind.unit_of_products
    places, tile_at = walk(kind.is_sparse, block_m, block_n)
    begin, add, end_with, loads = adder(
        kind.functions, real.name, (block_m, block_n), blocks.threads, measures
    )

    @kernel(blocks.threads, blocks=blocks.at_once)
    def flash_captured(
        q, k, v, mask, offset, grad_out, shift, inverse, delta, largest, units, sums_of, q_steps,
        k_steps, v_steps, mask_steps, grad_steps, sizes, scale, seed, threshold, keep, words, lists,
        starts,
    ):  # fmt: skip
        heads, seqlen_q, seqlen_k, lower, upper, k_group, v_group = sizes
        memory = cuda.shared.array(0, real)
        sums = cuda.local.array((rows, keys), real)
        state = (
            cuda.local.array(loads, types.int64), cuda.local.array(loads, types.int64),
            cuda.local.array(loads, real),
        )  # fmt: skip
        tiles = (seqlen_q + block_m - 1) // block_m
        batch_head = types.int64(cuda.blockIdx.x // tiles)
        tile = tiles - 1 - cuda.blockIdx.x % tiles
        row0 = tile * block_m
        b, h = batch_head // heads, batch_head % heads
        k_start = b * k_steps.batch + h // k_group * k_steps.head
        v_start = b * v_steps.batch + h // v_group * v_steps.head
        q_start = b * q_steps.batch + h * q_steps.head + row0 * q_steps.row
        do_start = b * grad_steps.batch + h * grad_steps.head + row0 * grad_steps.row
        load_queries(
            memory, (q_tile, q, q_start, q_steps.row, q_steps.column),
            (do_tile, grad_out, do_start, grad_steps.row, grad_steps.column), seqlen_q - row0,
            real(scale * unit),
        )  # fmt: skip
        rows_of = shift, inverse, delta
        load_rows(memory, rows_of, batch_head * seqlen_q + row0, seqlen_q - row0)
        band = Band(lower, upper, seqlen_q, seqlen_k)
        of_head = Scores(band, mask, head_place(b, h, mask_steps), words)
        dropout_of = (seed + offset[0], types.uint64(threshold), real(keep))
        begin(state)
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
            to_ds(memory, sums, row0, key0, full, of_head, dropout_of[2])
            cuda.syncthreads()
            own = Place(b, h, seqlen_q, seqlen_k, row0, key0)
            add(
                state, memory, p_tile, ds_tile, p_step, own, real(1.0), words, units, sums_of,
                starts,
            )  # fmt: skip
        end_with(state, largest, sums_of)

    return flash_captured


# ----- launches -----


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
    """Write the gradients of what the score function captured; arguments as in launch.py.

    Args:
        problem, heads, inputs, out, rows, grad_out, grad_logsumexp, architecture: of the pass.
        workspace: as in `Gradients`.
        sums: where they are added up.
        gradients: as in `add_up`.

    """
    kind = kind_of(problem, inputs.mask_kind, has_whole_vectors(problem, inputs, grad_out))
    # Other kernels do not know which gradients are wanted; this one must.
    kind = replace(kind, functions=Functions(problem.score_mod, problem.mask_mod))
    _, blocks = backward_blocks(kind, architecture)
    launch_delta(problem, heads, out, rows, grad_out, grad_logsumexp, workspace)
    delta, shift, inverse = workspace
    grid = ceil_div(problem.seqlen_q, blocks.block_m) * problem.batch_heads
    arguments = (
        *inputs.arrays, inputs.offset, grad_out.array, shift, inverse, delta, *sums[:3],
        *inputs.strides, grad_out.strides, sizes_of(problem, heads), *scalars_of(problem),
        inputs.words, tile_lists(problem, inputs, (blocks.block_m, blocks.block_n)), sums.starts,
    )  # fmt: skip
    add_up(
        partial(captured_kernel, kind, blocks), grid, blocks.threads, arguments,
        backward_bytes(kind, blocks, True), precision(kind.precision).real.name, sums, gradients,
    )  # fmt: skip


# ----- for the compile tests -----


def instances() -> Iterator[Instance]:
    """With dropout and lists, and without; a double precision of each."""
    functions = example_functions()
    for kind in (
        Kind("float16", 64, 64, "none", True, True, functions, is_sparse=True),
        Kind("float32", 128, 128, "none", False, True, functions),
        Kind("float64", 64, 64, "float64", False, False, functions),
    ):
        _, blocks = backward_blocks(kind, (8, 0))
        yield from pair_of_instances(
            f"flash_captured[{kind.precision}, {kind.head_dim}, {{}}]",
            partial(captured_kernel, kind, blocks),
            argument_types(kind.precision, kind.mask, functions),
        )  # fmt: skip


__all__ = ["captured_gradients", "instances"]
