"""The backward pass on Hopper GPUs, 16-bit dtypes: what to launch, and how.

Algorithm 2 of "FlashAttention-2" (Dao, 2023), in launches that each have their file:

    hopper/backward_prepare.py    delta = rowsum(dO * O) - dL, L, rest, and the list of work
    hopper/backward_keys.py       dK, dV: a block owns keys
    hopper/backward_queries.py    dQ: a block owns queries

S and dP are computed twice, seven products where five would do. In return every gradient is the sum
of one block, in an order that never changes, and nothing but results is written. (One that adds
to dQ in memory was measured for D = 128 and N = 8192: 534 TFLOP/s in any order, 421 in a fixed one,
where these do 502.)
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any, NamedTuple

from ...gpu.runtime import Instance, ceil_div, launch, multiprocessors, precision, types
from ...gpu.tensor_map import matrices_map, on_device
from ..launch import (
    Architecture,
    Gradients,
    Heads,
    Inputs,
    Ints,
    Matrices,
    arguments_of,
    mask_of,
    mask_type,
)
from ..problem import AttentionProblem
from ..softmax import (
    next_call,
)
from ..tuning import SHORT, choice
from .backward_keys import key_kernel
from .backward_pipeline import COUNTER_BYTES, ROW_BYTES, WORK_BYTES, Blocks, memory_plan
from .backward_prepare import INCOMPLETE, THREADS, prepare_kernel, row_threads
from .backward_queries import query_kernel
from .tiles import ARCHITECTURE, NAME, ROWS, Kind, padded

PADDING = 256  # rows of L and delta beyond the last query, which tiles may reach
AT_ONCE = 24 << 20  # bytes of passing tiles that blocks work with at one time: they stay in the L2

# ----- sizes of tiles -----

# By the larger of the two head sizes. 232448 bytes of shared memory, and the registers of a
# consumer, allow no more.
# The table of tuning.py goes before these.
KEYS = {
    64: Blocks(128, 128, 2, 2), 96: Blocks(128, 64, 2, 2), 128: Blocks(128, 64, 2, 2),
    192: Blocks(128, 64, 2, 1, 72), 256: Blocks(128, 48, 2, 1),
}  # fmt: skip
QUERIES = {
    64: Blocks(128, 128, 2, 2), 96: Blocks(128, 96, 2, 2), 128: Blocks(128, 96, 2, 2),
    192: Blocks(128, 80, 2, 1), 256: Blocks(128, 48, 2, 1),
}  # fmt: skip
# What may pass by with dropout: queries, and keys.
MOST_WITH_DROPOUT = {64: (96, 128), 96: (48, 96), 128: (48, 80), 192: (48, 64), 256: (48, 48)}


def backward_blocks(kind: Kind, seqlen_q: int = SHORT + 1) -> tuple[Blocks, Blocks]:
    """The tiles of the kernel for dK and dV, and of that for dQ."""
    size = max(kind.head_dim, kind.value_dim)
    measured = (
        choice(NAME, kernel, ARCHITECTURE, size, kind.banded, seqlen_q)
        for kernel in ("key_value", "query")
    )
    for_keys, for_queries = (
        Blocks(*numbers) if numbers else table[size]
        for numbers, table in zip(measured, (KEYS, QUERIES), strict=True)
    )
    # Dropout, a mask, and most of all an additive one, take registers for what passes by.
    keys_most, queries_most = MOST_WITH_DROPOUT[size] if kind.dropout else (128, 128)
    if kind.mask != "none":
        most = 48 if kind.mask == "bool" else 32
        if size + 64 * kind.dropout > 192:
            most = 16
        keys_most, queries_most = min(keys_most, most), min(queries_most, most)
    return (
        replace(for_keys, passing=min(for_keys.passing, keys_most)),
        replace(for_queries, passing=min(for_queries.passing, queries_most)),
    )


def launches_for_keys(kind: Kind) -> tuple[tuple[bool, bool], ...]:
    """Which of (dK, dV) each launch computes.

    The registers hold both up to 128 columns, or 64 where mask and dropout need some.
    """
    crowded = kind.dropout and kind.mask != "none"
    if max(kind.head_dim, kind.value_dim) <= (64 if crowded else 128):
        return ((True, True),)
    return ((True, False), (False, True))


def backward_tiles(problem: AttentionProblem) -> str:
    """The tiles, in words."""
    mask = {"none": "none", "bool": "bool"}.get(problem.mask_kind, "float32")
    for_keys, for_queries = backward_blocks(_kind(problem, mask, vectors=True), problem.seqlen_q)
    return (
        f"dK and dV {for_keys.own} keys x {for_keys.passing} queries, dQ {for_queries.own} queries "
        f"x {for_queries.passing} keys, {for_keys.consumers} + 1 warpgroups"
    )


# ----- launches -----


class Workspace(NamedTuple):
    """Where things are in the workspace, in bytes from its beginning.

    Args:
        rows: L, delta and rest of all queries (see hopper/backward_prepare.py).
        tables: of `Work`, for dK and dV, and for dQ.
        counts: entries of these.
        size: of all.
        padded_q: queries of a head in `rows`.

    """

    rows: int
    tables: tuple[int, int]
    counts: tuple[int, int]
    size: int
    padded_q: int


def _workspace(problem: AttentionProblem, heads: Heads, both: tuple[Blocks, Blocks]) -> Workspace:
    padded_q = ceil_div(problem.seqlen_q, 64) * 64 + PADDING
    counts = (
        ceil_div(problem.seqlen_k, both[0].own) * (problem.batch_heads // heads.group),
        ceil_div(problem.seqlen_q, both[1].own) * problem.batch_heads,
    )
    first = INCOMPLETE + COUNTER_BYTES
    tables = first, first + WORK_BYTES * counts[0]
    rows = tables[1] + WORK_BYTES * counts[1]
    rows = ceil_div(rows, 128) * 128
    size = rows + ROW_BYTES * problem.batch_heads * padded_q
    return Workspace(rows, tables, counts, size, padded_q)


def backward_workspace(problem: AttentionProblem, heads: Heads, architecture: Architecture) -> int:
    """Bytes of memory that `backward` needs."""
    smallest = Blocks(ROWS, ROWS)  # own tiles, of which there are the most then
    return _workspace(problem, heads, (smallest, smallest)).size


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


def _maps(
    problem: AttentionProblem, heads: Heads, inputs: Inputs, grad_out: Matrices
) -> dict[str, tuple[Any, Ints]]:
    """For each of Q, K, V, dO: a function from the rows of a box to its tensor map; and whether the
    map has a matrix for each batch, and for each head, or one that is repeated.

    Of an empty one nothing is read, but its map wants an address.
    """
    q, k, v = inputs.q, inputs.k, inputs.v
    spare = q.address if problem.seqlen_q else k.address

    def of(matrices: Matrices, group: int, length: int, columns: int) -> tuple[Any, Ints]:
        steps = tuple(int(stride != 0) for stride in matrices.strides[:2])
        batch, of_head = (
            size if step else 1
            for size, step in zip((heads.batch, heads.heads // group), steps, strict=True)
        )
        shape = batch, of_head, max(length, 1), columns
        address = matrices.address if length else spare

        def make(rows: int) -> Any:
            return matrices_map(problem.dtype.name, address, shape, matrices.strides, rows)

        return make, steps

    return {
        "q": of(q, 1, problem.seqlen_q, problem.head_dim),
        "k": of(k, heads.k_group, problem.seqlen_k, problem.head_dim),
        "v": of(v, heads.v_group, problem.seqlen_k, problem.value_dim),
        "do": of(grad_out, 1, problem.seqlen_q, problem.value_dim),
    }


def _on_device(maps: dict[str, tuple[Any, Ints]], names: str, blocks: Blocks) -> Any:
    """The address of the tensor maps of a block's own pair and of the passing one, so named."""
    rows = blocks.own, blocks.own, blocks.passing, blocks.passing
    makers = [maps[name][0] for name in names.split()]
    return on_device(*(make(n) for make, n in zip(makers, rows, strict=True)))


def _has_pieces(columns: int, *matrices: Matrices) -> bool:
    """Whether all rows begin at multiples of 16 bytes, and are as long."""
    return columns % 8 == 0 and all(
        m.address % 16 == 0 and all(stride % 8 == 0 for stride in m.strides[:3]) for m in matrices
    )


def backward(
    problem: AttentionProblem,
    heads: Heads,
    inputs: Inputs,
    out: Matrices,
    rows: Any,
    grad_out: Matrices,
    grad_logsumexp: Any,
    gradients: Gradients,
    architecture: Architecture,
    blocks: tuple[Blocks, Blocks] | None = None,
    workspace: Any = None,
) -> None:
    """Write the gradients of queries, keys and values.

    Args:
        problem: what was asked for.
        heads: how it is laid out.
        inputs: as in the forward pass; rows begin at multiples of 16 bytes.
        out: its output.
        rows: what it left in them.
        grad_out: the gradient of `out`; rows begin at multiples of 16 bytes.
        grad_logsumexp: of the logsumexp, contiguous; None for 0.
        gradients: where to write.
        architecture: compute capability.
        blocks: of one's choice, for dK and dV, and for dQ.
        workspace: flat array in device memory of `backward_workspace` bytes.

    """
    if not problem.batch_heads:
        return
    dq, dk, dv, ds = gradients[:4]
    vectors = _has_pieces(problem.head_dim, dq, dk) and _has_pieces(problem.value_dim, dv)
    kind = _kind(problem, inputs.mask_kind, vectors)
    both = for_keys, for_queries = blocks or backward_blocks(kind, problem.seqlen_q)
    space = _workspace(problem, heads, both)
    (_, *lengths, _, _), numbers = arguments_of(problem, heads)
    maps = _maps(problem, heads, inputs, grad_out)
    steps = {name: steps for name, (_, steps) in maps.items()}
    own_heads = steps["q"][1], steps["do"][1]
    call = next_call()
    _prepare(
        problem, heads, kind, both, space, workspace, steps, out, grad_out, rows,
        grad_logsumexp, call,
    )  # fmt: skip
    mask, mask_strides = mask_of(inputs)
    sizes = (heads.heads, *lengths, heads.group, problem.head_dim, problem.value_dim)
    places = [
        (COUNTER_BYTES * n, space.tables[n > 1], space.counts[n > 1], space.rows,
         ROW_BYTES * space.padded_q, call)
        for n in (0, 1, 2)
    ]  # fmt: skip
    if problem.seqlen_k:
        address = _on_device(maps, "k v q do", for_keys)
        for n, wanted in enumerate(launches_for_keys(kind)):
            launch(
                key_kernel(kind, for_keys, *wanted), min(space.counts[0], multiprocessors()),
                for_keys.threads, address, own_heads, mask, inputs.offset, workspace, places[n],
                dk.array, dv.array, mask_strides, dk.strides, dv.strides, sizes, *numbers,
                shared_bytes=memory_plan(kind, for_keys).size,
            )  # fmt: skip
    if problem.seqlen_q:
        address = _on_device(maps, "q do k v", for_queries)
        launch(
            query_kernel(kind, for_queries, ds is not None),
            min(space.counts[1], multiprocessors()),
            for_queries.threads, address, own_heads, mask, inputs.offset, workspace, places[2],
            dq.array, rows if ds is None else ds, mask_strides, dq.strides, sizes, *numbers,
            shared_bytes=memory_plan(kind, for_queries).size,
        )  # fmt: skip


def _prepare(
    problem: AttentionProblem, heads: Heads, kind: Kind, both: tuple[Blocks, Blocks],
    space: Workspace, workspace: Any, steps: dict[str, Ints], out: Matrices, grad_out: Matrices,
    rows: Any, grad_logsumexp: Any, call: int,
) -> None:  # fmt: skip
    """Launch what writes numbers of rows and the tables of work to the workspace."""
    pieces = _has_pieces(problem.value_dim, out, grad_out)
    (_, *lengths, k_group, v_group), _ = arguments_of(problem, heads)
    columns = 2 * (problem.head_dim + problem.value_dim)
    head_bytes = (
        max(problem.seqlen_q, 1) * columns * heads.group,
        max(problem.seqlen_k, 1) * columns,
    )
    slots = problem.batch_heads // heads.group, problem.batch_heads
    together = tuple(
        min(max(AT_ONCE // size, 1), count) for size, count in zip(head_bytes, slots, strict=True)
    )
    threads = problem.batch_heads * space.padded_q * row_threads(kind.value_dim)
    # A head that is repeated is number 0 of its tensor map.
    k_group, v_group = (
        group if steps[name][1] else heads.heads for name, group in (("k", k_group), ("v", v_group))
    )
    (key_table, query_table), (key_count, query_count) = space.tables, space.counts
    launch(
        prepare_kernel(
            problem.dtype.name, kind.value_dim, pieces, kind.additive, grad_logsumexp is not None
        ),
        ceil_div(threads, THREADS), THREADS,
        out.array, grad_out.array, rows,
        rows if grad_logsumexp is None else grad_logsumexp, out.strides, grad_out.strides,
        (heads.batch, heads.heads, *lengths, k_group, v_group, heads.group,
         *(steps[name][0] for name in ("k", "v", "q", "do"))), workspace, space.rows,
        call, space.padded_q, problem.value_dim,
        (key_table, key_count, query_table, query_count),
        (both[0].own, both[0].passing, both[1].own, both[1].passing), together,
    )  # fmt: skip


# ----- for the compile tests -----


def _signatures(kind: Kind) -> dict[str, tuple[Any, ...]]:
    """numba types of the kernels' arguments, by their names."""
    array, rows = precision(kind.precision).array, types.Array(types.float32, 1, "C")
    mask = mask_type(kind.mask, array)
    words, whole = types.Array(types.uint64, 1, "C"), types.int64

    def tuples(*counts: int) -> tuple[Any, ...]:
        return tuple(types.UniTuple(whole, count) for count in counts)

    numbers = (types.float64, types.uint64, whole, types.float64)
    read = (types.uint64, *tuples(2), mask, words, rows, *tuples(6))
    return {
        "keys": (*read, array, array, *tuples(4, 4, 4, 8), *numbers),
        "queries": (*read, array, rows, *tuples(4, 4, 8), *numbers),
        "prepare": (
            array, array, rows, rows, *tuples(4, 4, 13), rows, *[whole] * 4, *tuples(4, 4, 2),
        ),
    }  # fmt: skip


def instances() -> Iterator[Instance]:
    """Of each head size that has its own tiles one kind, and one with all that takes registers."""
    crowded = Kind("bfloat16", 128, 128, "bfloat16", dropout=True, banded=True, vectors=False)
    for kind in (
        Kind("float16", 64, 64),
        Kind("float16", 64, 64, dropout=True),
        Kind("bfloat16", 128, 128, banded=True),
        Kind("float16", 256, 256),
        crowded,
    ):
        signatures, (for_keys, for_queries) = _signatures(kind), backward_blocks(kind)
        name = f"{kind.precision}, {kind.head_dim}" + ", dropout" * kind.dropout
        name += ", all features" * (kind == crowded)
        kernels = {
            "keys": key_kernel(kind, for_keys, *launches_for_keys(kind)[0]),
            "queries": query_kernel(kind, for_queries, kind == crowded),
        }
        for what, kernel in kernels.items():
            yield Instance(
                f"hopper_backward_{what}[{name}]",
                kernel,
                signatures[what],
                architectures=("sm_90a",),
            )
    yield Instance(
        "hopper_backward_prepare[bfloat16]",
        prepare_kernel("bfloat16", 128, True, False, True),
        _signatures(Kind("bfloat16", 128, 128))["prepare"],
        architectures=("sm_90a",),
    )


__all__ = [
    "Blocks",
    "backward",
    "backward_blocks",
    "backward_tiles",
    "backward_workspace",
    "instances",
]
