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

from ...gpu.runtime import Instance, ceil_div, launch, multiprocessors, precision, types
from ...gpu.tensor_map import constant, matrices_map, on_device
from ..launch import (
    Architecture,
    Heads,
    Inputs,
    Ints,
    Matrices,
    arguments_of,
    mask_of,
    mask_type,
)
from ..problem import AttentionProblem
from ..tuning import choice
from .backward_launch import backward, backward_tiles, backward_workspace
from .forward import forward_kernel, forward_memory
from .schedule import AT_ONCE, order, reciprocal, tile_costs
from .tiles import ARCHITECTURE, HEAD_SIZES, NAME, ROWS, Blocks, Kind, padded

ROW_ALIGNMENT = 16  # bytes at whose multiples the copy engine's rows begin
MOST_ROWS = 1 << 30
MASKS = ("bool", "float16", "bfloat16", "float32", "float64")


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
    if kind.dropout:
        blocks = Blocks(2, min(blocks.block_n, 128 if size == 64 else 112), overlap=False)
    if kind.mask != "none":
        blocks = Blocks(2, min(blocks.block_n, 64), overlap=False)
    return blocks


def tiles(problem: AttentionProblem, architecture: Architecture, backward: bool = False) -> str:
    """The tiles, in words."""
    if backward:
        return backward_tiles(problem)
    mask = "none" if problem.mask_kind == "none" else "bool"
    kind = _kind(problem, mask, vectors=True)
    blocks = forward_blocks(kind, problem.seqlen_q)
    return (
        f"{blocks.block_m} queries x {blocks.block_n} keys, "
        f"{blocks.warpgroups} + 1 warpgroups, {blocks.stages} stages"
    )


# ----- launches -----


def _kind(problem: AttentionProblem, mask_kind: str, vectors: bool) -> Kind:
    last = problem.seqlen_q - 1
    return Kind(
        precision=problem.dtype.name,
        head_dim=padded(problem.head_dim),
        value_dim=padded(problem.value_dim),
        mask=mask_kind,
        dropout=problem.dropout_p > 0,
        scaled_first=mask_kind not in ("none", "bool") or not problem.scale_in_exponent,
        banded=last + problem.lower > 0 or problem.upper < problem.seqlen_k,
        vectors=vectors,
    )


def _has_vectors(matrices: Matrices, columns: int) -> bool:
    """Whether rows begin at multiples of 16 bytes, and are as long."""
    return (
        columns % 8 == 0
        and matrices.address % 16 == 0
        and all(stride % 8 == 0 for stride in matrices.strides[:3])
    )


def matrices_on_device(
    problem: AttentionProblem, heads: Heads, group: int, matrices: Matrices, rows: int, shape: Ints
) -> tuple[Any, Ints]:
    """The tensor map of Q, K, V or dO, and how many batches and heads of queries share a matrix.

    Args:
        problem: whose dtype it has.
        heads: of the problem.
        group: heads of queries to one of these matrices.
        matrices: in memory. A stride of 0 repeats a dimension, which is then not in the map.
        rows: of the boxes that are copied.
        shape: rows and columns of a matrix.

    """
    batches, of_head = matrices.strides[:2]
    share = (
        heads.batch if batches == 0 else 1,
        heads.heads if of_head == 0 else group,
    )  # fmt: skip
    whole = heads.batch // share[0], heads.heads // share[1], *shape
    tensor_map = matrices_map(
        problem.dtype.name, matrices.address, whole, matrices.strides, rows
    )  # fmt: skip
    return tensor_map, share


@cache
def _order_on_device(sizes: Ints, blocks: Blocks, heads: int, together: int, count: int) -> int:
    """The address of the order of the tiles."""
    seqlen_q, seqlen_k, lower, upper = sizes
    costs = tile_costs(seqlen_q, seqlen_k, lower, upper, blocks)
    return int(constant(order(costs, heads, together, count).tobytes()))


def forward(
    problem: AttentionProblem,
    heads: Heads,
    inputs: Inputs,
    out: Matrices,
    logsumexp: Any,
    rows: Any,
    architecture: Architecture,
    blocks: Blocks | None = None,
) -> None:
    """Write the output (Nq, Dv) of each head, logsumexp and rows: see `cuda.forward`.

    Args:
        problem: what is asked for.
        heads: how it is laid out.
        inputs: what is read: rows are contiguous and begin at multiples of ROW_ALIGNMENT bytes.
        out: rows are contiguous.
        logsumexp: contiguous (batch, heads, Nq), flat, float32.
        rows: contiguous (batch, heads, Nq, 2), flat, float32.
        architecture: compute capability.
        blocks: of one's choice.

    """
    if not problem.batch_heads * problem.seqlen_q:
        return
    places = tuple((x.address, x.strides) for x in (inputs.q, inputs.k, inputs.v))
    vectors = _has_vectors(out, problem.value_dim)
    without_seed = replace(problem, seed=0) if problem.dropout_p else problem
    plan = _planned(without_seed, heads, places, inputs.mask_kind, vectors, blocks)
    _, numbers = arguments_of(problem, heads)
    mask, mask_strides = mask_of(inputs)
    launch(
        plan.kernel, plan.grid, plan.threads, plan.maps, plan.order, out.address, logsumexp, rows,
        mask, inputs.offset, out.strides, mask_strides, plan.sizes, plan.shares, *numbers,
        shared_bytes=plan.shared_bytes,
    )  # fmt: skip


class Plan(NamedTuple):
    """What the forward pass launches for given shapes and addresses."""

    kernel: Any
    grid: int
    threads: int
    shared_bytes: int
    maps: int
    order: int
    sizes: Ints
    shares: Ints


@lru_cache(maxsize=1024)
def _planned(
    problem: AttentionProblem,
    heads: Heads,
    places: tuple[tuple[int, Ints], ...],
    mask_kind: str,
    vectors: bool,
    blocks: Blocks | None,
) -> Plan:
    """Remembered: a model's layers ask for the same again and again, and it takes longer than a
    launch. `places` are the addresses and strides of queries, keys and values.
    """
    kind = _kind(problem, mask_kind, vectors)
    blocks = blocks or forward_blocks(kind, problem.seqlen_q)
    keys, head_dim = max(problem.seqlen_k, 1), problem.head_dim
    q, k, v = (Matrices(None, *place) for place in places)
    groups, value_dim = (heads.k_group, heads.v_group), problem.value_dim
    if not problem.seqlen_k:  # nothing of them is read
        k, v, groups, value_dim = q, q, (1, 1), head_dim
    block_n, queries = blocks.block_n, (problem.seqlen_q, head_dim)
    q_map, q_share = matrices_on_device(problem, heads, 1, q, ROWS, queries)
    k_map, k_share = matrices_on_device(problem, heads, groups[0], k, block_n, (keys, head_dim))
    v_map, v_share = matrices_on_device(problem, heads, groups[1], v, block_n, (keys, value_dim))
    sizes, _ = arguments_of(problem, heads)
    of_head = ceil_div(problem.seqlen_q, blocks.block_m)
    count, divisors = of_head * problem.batch_heads, (*reciprocal(of_head), *reciprocal(sizes[0]))
    grid, table = min(count, multiprocessors()), 0
    if kind.banded:
        head_bytes = 2 * keys * (problem.head_dim + problem.value_dim)
        together = max(heads.k_group * (AT_ONCE // head_bytes), 1)
        table = _order_on_device(sizes[1:5], blocks, problem.batch_heads, together, grid)
    return Plan(
        forward_kernel(kind, blocks), grid, blocks.threads, forward_memory(kind, blocks).size,
        int(on_device(q_map, k_map, v_map)), table,
        (*sizes[:5], count, problem.value_dim, *divisors),
        tuple(x for share in (*q_share, *k_share, *v_share) for x in reciprocal(share)),
    )  # fmt: skip


# ----- for the compile tests -----


def forward_signature(kind: Kind) -> tuple[Any, ...]:
    """numba types of the forward kernel's arguments."""
    mask = mask_type(kind.mask, precision(kind.precision).array)
    whole, floats = types.int64, types.Array(types.float32, 1, "C")
    return (
        whole, whole, whole, floats, floats, mask, types.Array(types.uint64, 1, "C"),
        types.UniTuple(whole, 4), types.UniTuple(whole, 4), types.UniTuple(whole, 11),
        types.UniTuple(whole, 12), types.float64, types.uint64, whole, types.float64,
    )  # fmt: skip


def instances() -> Iterator[Instance]:
    """Head sizes, dtypes, and each feature."""
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
    )
    for kind in kinds:
        blocks = forward_blocks(kind, 4096)
        features = [kind.mask] * (kind.mask != "none") + ["dropout"] * kind.dropout
        features += ["band"] * kind.banded + ["any rows"] * (not kind.vectors)
        name = ", ".join([kind.precision, f"{kind.head_dim}", f"{kind.value_dim}", *features])
        yield Instance(
            f"hopper_forward[{name}]",
            forward_kernel(kind, blocks),
            forward_signature(kind),
            architectures=("sm_90a",),
        )


__all__ = [
    "Blocks", "Kind", "backward", "backward_workspace", "forward", "instances",
    "matrices_on_device", "why_not",
]  # fmt: skip
