"""FlashAttention on Hopper GPUs (compute capability 9.0a), 16-bit dtypes: what to launch, and how.

The algorithm is in `hopper/forward.py`; here are the sizes of its tiles, and the host's side of a
call: from a problem and arrays in device memory to a launch. Nothing is allocated here but, once
for each set of addresses and shapes, the copy engine's tensor maps and the order of the tiles.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import cache, lru_cache
from typing import Any, NamedTuple

from ...gpu.runtime import Instance, ceil_div, launch, multiprocessors, types
from ...gpu.tensor_map import constant, on_device
from ...score_bands import reads_scattered
from ..launch import (
    Architecture,
    Heads,
    Inputs,
    Ints,
    Matrices,
    Strides,
    argument_types,
    example_functions,
    has_vectors,
    named_type,
    scalars_of,
    sizes_of,
)
from ..problem import AttentionProblem
from ..schedule import Schedule
from ..scores import Functions
from ..tuning import choice
from .backward_launch import backward, backward_block_sizes, backward_tiles, backward_workspace
from .forward import forward_kernel
from .forward_loaders import Shares, forward_memory
from .lists import CutLists, cut_lists
from .maps import each_of, tensor_map
from .parts import THREADS, WARPS, Splits, merge_kernel
from .schedule import (
    AT_ONCE,
    NO_KEYS,
    NO_PIECES,
    PiecesOnDevice,
    TileSizes,
    order,
    reciprocal,
    tile_costs,
)
from .tiles import ARCHITECTURE, HEAD_SIZES, NAME, ROWS, Blocks, Kind, kind_of, own_kind

ROW_ALIGNMENT = 16  # bytes at whose multiples the copy engine's rows begin
MOST_ROWS = 1 << 30


def why_not(problem: AttentionProblem, architecture: Architecture) -> str | None:
    """None if this module computes the problem on a GPU of this compute capability, or why not."""
    if architecture != ARCHITECTURE:
        return "it is for compute capability 9.0 (Hopper)"
    if problem.dtype.name not in ("float16", "bfloat16"):
        return f"it takes float16 and bfloat16, not {problem.dtype.name}"
    sizes = problem.head_dim, problem.value_dim
    if not 1 <= min(sizes) <= max(sizes) <= HEAD_SIZES[-1]:
        return f"it takes head sizes from 1 to {HEAD_SIZES[-1]}, got {sizes[0]} and {sizes[1]}"
    if max(problem.seqlen_q, problem.seqlen_k) >= MOST_ROWS:
        return f"it takes fewer than {MOST_ROWS} queries and keys"
    return None


# ----- sizes of tiles -----

# By the larger of the two head sizes, and whether there is a band. For D = 64 three warpgroups have
# registers enough, and more of them hide more of the softmax; from 192 on tiles are as large as
# shared memory allows.
FORWARD = {
    (64, False): Blocks(3, 128, overlap=False), (64, True): Blocks(3, 128, overlap=False),
    (96, False): Blocks(2, 128), (96, True): Blocks(2, 128),
    (128, False): Blocks(2, 128), (128, True): Blocks(2, 128),
    (192, False): Blocks(2, 96), (192, True): Blocks(2, 96),
    (256, False): Blocks(2, 80), (256, True): Blocks(2, 80),
}  # fmt: skip
FEW_QUERIES = 1024  # up to which tiles of 192 rows fit a causal mask's triangle too badly
CANDIDATES: dict[str, dict[int, tuple[Ints, ...]]] = {
    "forward": {
        64: ((3, 128, 2, 1, 0), (3, 128, 3, 1, 0), (2, 128, 2, 1, 1), (2, 128, 3, 1, 1)),
        96: ((2, 128, 2, 1, 1),),
        128: ((2, 128, 2, 1, 1), (2, 160, 2, 1, 1), (2, 128, 2, 1, 0), (2, 128, 2, 0, 1)),
        192: ((2, 96, 2, 1, 1),),
        256: ((2, 80, 2, 1, 1), (2, 80, 2, 0, 1), (2, 64, 2, 1, 1), (2, 64, 2, 1, 0)),
    },
    # of the backward pass's `Blocks`
    "key_value": {
        64: ((128, 128, 2, 2), (128, 96, 2, 2), (128, 64, 3, 2)),
        128: ((128, 64, 2, 2), (128, 48, 2, 2), (128, 48, 3, 1)),
    },
    "query": {
        64: ((128, 128, 2, 2), (128, 96, 2, 2), (128, 64, 3, 2)),
        128: ((128, 96, 2, 2), (128, 80, 2, 2), (128, 64, 2, 2)),
        256: ((128, 48, 2, 1), (128, 32, 2, 1)),
    },
}


def blocks_of(numbers: Ints) -> Blocks:
    """The tiles that a row of the tuning table, or of CANDIDATES["forward"], stands for."""
    warpgroups, block_n, stages, ping_pong, overlap = numbers
    return Blocks(warpgroups, block_n, stages, bool(ping_pong), bool(overlap))


@cache
def forward_blocks(kind: Kind, seqlen_q: int) -> Blocks:
    """The forward kernel's tiles."""
    size = max(kind.head_dim, kind.value_dim)
    measured = choice(NAME, "forward", ARCHITECTURE, size, kind.banded, seqlen_q)
    blocks = FORWARD[size, kind.banded]
    if measured:
        blocks = blocks_of(measured)
    elif kind.banded and seqlen_q <= FEW_QUERIES and blocks.warpgroups > 2:
        blocks = Blocks(2, 128)
    # What is done with each score takes registers, of which two warpgroups have more each.
    if kind.functions or kind.is_sparse:
        blocks = _with_functions(kind, size, blocks)
    if kind.dropout:
        blocks = Blocks(2, min(blocks.block_n, 128 if size == 64 else 112), overlap=False)
    if kind.mask != "none":
        blocks = Blocks(2, min(blocks.block_n, 64), overlap=False)
    return blocks


def _with_functions(kind: Kind, size: int, blocks: Blocks) -> Blocks:
    """The tiles with a user's functions, or with lists, whose tiles divide blocks of 128."""
    score, most = kind.functions.score, min(blocks.block_n, 128)
    scattered = score is not None and reads_scattered(score)
    if kind.is_sparse:
        crowded = scattered or (score is not None and size > 64)
        return Blocks(2, min(most, 64) if crowded else most)
    if size == 64:
        return Blocks(3, 80 if scattered else 96, overlap=False)
    return Blocks(2, min(most, 112), overlap=False) if scattered else Blocks(2, most)


def _blocks(problem: AttentionProblem) -> Blocks:
    return forward_blocks(own_kind(problem), problem.seqlen_q)


def block_sizes(
    problem: AttentionProblem, architecture: Architecture, backward: bool = False
) -> dict[str, tuple[int, int]]:
    """Queries and keys of a tile, by what a kernel computes."""
    if backward:
        return backward_block_sizes(problem)
    blocks = _blocks(problem)
    return {"output": (blocks.block_m, blocks.block_n)}


def tiles(problem: AttentionProblem, architecture: Architecture, backward: bool = False) -> str:
    """The tiles, in words."""
    if backward:
        return backward_tiles(problem)
    blocks = _blocks(problem)
    return (
        f"{blocks.block_m} queries x {blocks.block_n} keys, "
        f"{blocks.warpgroups} + 1 warpgroups, {blocks.stages} stages"
    )


# ----- launches -----


@cache
def _order_on_device(schedule: Schedule, heads: int, together: int, count: int) -> int:
    """The address of the order of the tiles."""
    return int(constant(order(tile_costs(schedule), heads, together, count).tobytes()))


def forward(
    problem: AttentionProblem,
    heads: Heads,
    inputs: Inputs,
    out: Matrices,
    logsumexp: Any,
    rows: Any,
    architecture: Architecture,
    blocks: Blocks | None = None,
    workspace: Any = None,
) -> None:
    """Write the output, the logsumexp and rows: see launch.py."""
    if not problem.batch_heads * problem.seqlen_q:
        return
    places = tuple((x.address, x.strides) for x in (inputs.q, inputs.k, inputs.v))
    vectors = has_vectors(problem, (problem.value_dim,), out)
    without_seed = replace(problem, seed=0) if problem.dropout_p else problem
    kind = kind_of(
        without_seed, inputs.mask_kind, vectors, inputs.functions, inputs.lists is not None
    )
    blocks = blocks or forward_blocks(kind, problem.seqlen_q)
    plan = _planned(without_seed, heads, places, kind, blocks)
    pieces, sizes, order_of_tiles, grid = None, plan.sizes, plan.order, plan.grid
    lists = NO_PIECES
    if kind.is_sparse:
        pieces = _pieces_of(problem, inputs, blocks)
        grid = min(pieces.piece_count, multiprocessors())
        order_of_tiles = pieces.order(inputs, grid)
        sizes = sizes._replace(tiles=pieces.piece_count)
        lists = PiecesOnDevice(
            pieces.table, pieces.lists.entries, 0,
            4 * pieces.parts * blocks.block_m * problem.value_dim,
        )  # fmt: skip
    launch(
        plan.kernel, grid, plan.threads, plan.maps, order_of_tiles, out.address, logsumexp,
        rows, inputs.mask_array, inputs.offset, out.strides, inputs.mask_strides, sizes,
        plan.shares, *scalars_of(problem), inputs.words, lists,
        rows if workspace is None else workspace, shared_bytes=plan.shared_bytes,
    )  # fmt: skip
    if pieces is not None and pieces.split_count:
        size = blocks.block_m * problem.value_dim
        splits = Splits(
            pieces.splits, 0, pieces.parts * size, size, -(-problem.seqlen_q // blocks.block_m)
        )
        launch(
            merge_kernel(kind, blocks.block_m),
            pieces.split_count * ceil_div(blocks.block_m, WARPS), THREADS,
            workspace, splits, out.array, logsumexp, rows, out.strides, heads.heads,
            problem.seqlen_q, problem.value_dim, problem.keep_scale,
        )  # fmt: skip


def forward_workspace(
    problem: AttentionProblem, heads: Heads, inputs: Inputs, architecture: Architecture
) -> int:
    """Bytes for parts of long lists: O, m and l."""
    if inputs.lists is None:
        return 0
    blocks = _blocks(problem)
    parts = _pieces_of(problem, inputs, blocks).parts
    return 4 * parts * blocks.block_m * (problem.value_dim + 2)


def _pieces_of(problem: AttentionProblem, inputs: Inputs, blocks: Blocks) -> CutLists:
    empty = NO_KEYS // blocks.block_n
    return cut_lists(problem, inputs, (blocks.block_m, blocks.block_n), empty=empty)


class Plan(NamedTuple):
    """What the forward pass launches for given shapes and addresses."""

    kernel: Any
    grid: int
    threads: int
    shared_bytes: int
    maps: int
    order: int
    sizes: TileSizes
    shares: Shares


@lru_cache(maxsize=1024)
def _planned(
    problem: AttentionProblem,
    heads: Heads,
    places: tuple[tuple[int, Strides], ...],
    kind: Kind,
    blocks: Blocks,
) -> Plan:
    """Remembered: a model's layers ask for the same again and again, and it takes longer than a
    launch. `places` are the addresses and strides of queries, keys and values.
    """
    keys, head_dim = max(problem.seqlen_k, 1), problem.head_dim
    q, k, v = (Matrices(None, *place) for place in places)
    groups, value_dim = (heads.k_group, heads.v_group), problem.value_dim
    if not problem.seqlen_k:  # nothing of them is read
        k, v, groups, value_dim = q, q, (1, 1), head_dim
    maps: list[Any] = []
    shares: list[int] = []
    for matrices, group, rows, shape in (
        (q, 1, ROWS, (problem.seqlen_q, head_dim)),
        (k, groups[0], blocks.block_n, (keys, head_dim)),
        (v, groups[1], blocks.block_n, (keys, value_dim)),
    ):
        maps.append(tensor_map(problem, heads, group, matrices, rows, shape))
        each = each_of(matrices)
        shares += reciprocal(1 if each.batch else heads.batch)
        shares += reciprocal(group if each.head else heads.heads)
    schedule = Schedule.of(problem, blocks.block_m, blocks.block_n)
    count = schedule.query_tile_count * problem.batch_heads
    grid, table = min(count, multiprocessors()), 0
    if kind.banded and not kind.is_sparse:
        head_bytes = 2 * keys * (problem.head_dim + problem.value_dim)
        together = max(heads.k_group * (AT_ONCE // head_bytes), 1)
        table = _order_on_device(schedule, problem.batch_heads, together, grid)
    return Plan(
        forward_kernel(kind, blocks), grid, blocks.threads, forward_memory(kind, blocks).size,
        int(on_device(*maps)), table, _tile_sizes(problem, heads, schedule), Shares(*shares),
    )  # fmt: skip


def _tile_sizes(problem: AttentionProblem, heads: Heads, schedule: Schedule) -> TileSizes:
    _, seqlen_q, seqlen_k, lower, upper, _, _ = sizes_of(problem, heads)
    of_head = schedule.query_tile_count
    return TileSizes(
        heads.heads, seqlen_q, seqlen_k, lower, upper, of_head * problem.batch_heads,
        problem.value_dim, *reciprocal(of_head), *reciprocal(heads.heads),
    )  # fmt: skip


# ----- for the compile tests -----


def forward_signature(kind: Kind) -> tuple[Any, ...]:
    """numba types of the forward kernel's arguments."""
    of, whole = argument_types(kind.precision, kind.mask, kind.functions), types.int64
    return (
        whole, whole, whole, of.rows, of.rows, of.mask, of.word, of.strides, of.strides,
        named_type(TileSizes), named_type(Shares), *of.scalars, of.words,
        named_type(PiecesOnDevice), of.rows,
    )  # fmt: skip


def instances() -> Iterator[Instance]:
    """Head sizes, dtypes, and each feature."""
    both = example_functions()
    kinds = (
        Kind("float16", 64, 64),
        Kind("bfloat16", 64, 64, banded=True),
        Kind("float16", 128, 128, banded=True),
        Kind("bfloat16", 128, 128),
        Kind("float16", 256, 256, banded=True),
        Kind("float16", 192, 128),
        Kind("float16", 64, 64, dropout=True),
        Kind("bfloat16", 128, 128, "bfloat16", scaled_first=True, dropout=True, vectors=False),
        Kind("float16", 64, 64, "bool"),
        Kind("float16", 64, 64, scaled_first=True, banded=True, functions=Functions(both.score)),
        Kind("bfloat16", 128, 128, scaled_first=True, functions=both, is_sparse=True),
    )
    for kind in kinds:
        blocks = forward_blocks(kind, 4096)
        features = [kind.mask] * (kind.mask != "none") + ["dropout"] * kind.dropout
        features += ["functions"] * bool(kind.functions) + ["lists"] * kind.is_sparse
        features += ["band"] * kind.banded + ["any rows"] * (not kind.vectors)
        name = ", ".join([kind.precision, f"{kind.head_dim}", f"{kind.value_dim}", *features])
        yield Instance(
            f"hopper_forward[{name}]",
            forward_kernel(kind, blocks),
            forward_signature(kind),
            architectures=("sm_90a",),
        )


__all__ = [
    "Blocks", "Kind", "backward", "backward_workspace", "block_sizes", "forward",
    "forward_workspace", "instances",
    "why_not",
]  # fmt: skip
