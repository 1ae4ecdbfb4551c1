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

from ...gpu.runtime import Instance, ceil_div, launch, multiprocessors, types
from ...gpu.tensor_map import on_device
from ..launch import (
    Architecture,
    Gradients,
    Heads,
    Inputs,
    Ints,
    Matrices,
    argument_types,
    example_functions,
    has_vectors,
    named_type,
    scalars_of,
    sizes_of,
)
from ..problem import AttentionProblem
from ..schedule_cuda import NO_LISTS
from ..scores import Functions
from ..softmax import next_call
from ..tuning import SHORT, choice
from .backward_keys import key_kernel
from .backward_pipeline import (
    COUNTER_BYTES,
    ROW_BYTES,
    WORK_BYTES,
    BackwardSizes,
    Blocks,
    OwnHeads,
    Places,
    memory_plan,
)
from .backward_prepare import (
    INCOMPLETE,
    THREADS,
    PrepareSizes,
    Table,
    prepare_kernel,
    row_threads,
)
from .backward_queries import query_kernel
from .backward_tiles import has_slopes
from .lists import CutLists, cut_lists
from .maps import each_of, tensor_map
from .parts import THREADS as PART_THREADS
from .parts import WARPS as PART_WARPS
from .parts import Splits, sum_kernel
from .tiles import ARCHITECTURE, NAME, ROWS, Kind, kind_of, own_kind

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
    if kind.functions or kind.is_sparse:
        of_keys, of_queries = _most_with_functions(kind, size)
        keys_most, queries_most = min(keys_most, of_keys), min(queries_most, of_queries)
    if kind.is_sparse and size > 64:  # a thread that goes through lists needs some more
        for_keys = replace(for_keys, registers_to_load=64)
    return (
        replace(for_keys, passing=min(for_keys.passing, keys_most)),
        replace(for_queries, passing=min(for_queries.passing, queries_most)),
    )


def _most_with_functions(kind: Kind, size: int) -> tuple[int, int]:
    """What may pass by with a user's functions, or lists of tiles, which divide blocks of 64."""
    crowded = has_slopes(kind) + kind.is_sparse + kind.dropout + (kind.mask != "none")
    if size > 128:
        return (16, 16) if crowded > 1 else (32, 32)
    keys = 64 if size == 64 or not crowded else 48 if crowded == 1 else 32
    queries = 96 if crowded < 2 else 80
    return (min(keys, 64 if size == 64 else 32), 64) if kind.is_sparse else (keys, queries)


def launches_for_keys(kind: Kind) -> tuple[tuple[bool, bool], ...]:
    """Which of (dK, dV) each launch computes.

    The registers hold both up to 128 columns, or 64 where mask and dropout need some.
    """
    crowded = kind.dropout and kind.mask != "none"
    if max(kind.head_dim, kind.value_dim) <= (64 if crowded else 128):
        return ((True, True),)
    return ((True, False), (False, True))


def _blocks(problem: AttentionProblem) -> tuple[Blocks, Blocks]:
    return backward_blocks(own_kind(problem), problem.seqlen_q)


def backward_block_sizes(problem: AttentionProblem) -> dict[str, tuple[int, int]]:
    """Queries and keys of a tile, by what a kernel computes."""
    for_keys, for_queries = _blocks(problem)
    return {
        "dK and dV": (for_keys.passing, for_keys.own),
        "dQ": (for_queries.own, for_queries.passing),
    }


def backward_tiles(problem: AttentionProblem) -> str:
    """The tiles, in words."""
    for_keys, for_queries = _blocks(problem)
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
        parts: of dK and dV, and of dQ, of long lists.
        lists: in pieces, of both kernels; None without lists.

    """

    rows: int
    tables: tuple[int, int]
    counts: tuple[int, int]
    size: int
    padded_q: int
    parts: tuple[int, int]
    lists: tuple[CutLists, CutLists] | None


def _workspace(
    problem: AttentionProblem, heads: Heads, inputs: Inputs, both: tuple[Blocks, Blocks]
) -> Workspace:
    padded_q = ceil_div(problem.seqlen_q, 64) * 64 + PADDING
    counts = (
        ceil_div(problem.seqlen_k, both[0].own) * (problem.batch_heads // heads.group),
        ceil_div(problem.seqlen_q, both[1].own) * problem.batch_heads,
    )
    lists = None
    if inputs.lists is not None:
        for_keys, for_queries = both
        lists = (
            cut_lists(problem, inputs, (for_keys.passing, for_keys.own), True, heads.group),
            cut_lists(problem, inputs, (for_queries.own, for_queries.passing)),
        )
        counts = lists[0].piece_count, lists[1].piece_count
    first = INCOMPLETE + COUNTER_BYTES
    tables = first, first + WORK_BYTES * counts[0]
    rows = tables[1] + WORK_BYTES * counts[1]
    rows = ceil_div(rows, 128) * 128
    size = rows + ROW_BYTES * problem.batch_heads * padded_q
    parts = size, size
    if lists is not None:
        columns = problem.head_dim + problem.value_dim
        of_queries = size + 4 * lists[0].parts * both[0].own * columns
        size = of_queries + 4 * lists[1].parts * both[1].own * problem.head_dim
        parts = parts[0], of_queries
    return Workspace(rows, tables, counts, size, padded_q, parts, lists)


def backward_workspace(
    problem: AttentionProblem, heads: Heads, inputs: Inputs, architecture: Architecture
) -> int:
    """Bytes of memory that `backward` needs."""
    smallest = Blocks(ROWS, ROWS)  # own tiles, of which there are the most then
    both = (smallest, smallest) if inputs.lists is None else _blocks(problem)
    return _workspace(problem, heads, inputs, both).size


class Operand(NamedTuple):
    """Q, K, V or dO, of which the copy engine brings tiles.

    Args:
        matrices: in memory.
        group: heads of queries to one of them.
        shape: rows and columns of one.

    """

    matrices: Matrices
    group: int
    shape: Ints


def _operands(
    problem: AttentionProblem, heads: Heads, inputs: Inputs, grad_out: Matrices
) -> list[Operand]:
    """Q, K, V and dO. Of an empty one nothing is read, but its map wants an address, and a row."""
    spare = inputs.q.address if problem.seqlen_q else inputs.k.address
    of_q, of_k = problem.seqlen_q, problem.seqlen_k
    return [
        Operand(
            matrices if length else matrices._replace(address=spare), group,
            (max(length, 1), columns),
        )
        for matrices, group, length, columns in (
            (inputs.q, 1, of_q, problem.head_dim),
            (inputs.k, heads.k_group, of_k, problem.head_dim),
            (inputs.v, heads.v_group, of_k, problem.value_dim),
            (grad_out, 1, of_q, problem.value_dim),
        )
    ]  # fmt: skip


Pair = tuple[Operand, Operand]


def _maps(problem: AttentionProblem, heads: Heads, blocks: Blocks, own: Pair, passing: Pair) -> Any:
    """The address of the tensor maps of a block's own pair of operands, and of the passing one."""
    boxes = [(x, blocks.own) for x in own] + [(x, blocks.passing) for x in passing]
    return on_device(
        *(tensor_map(problem, heads, x.group, x.matrices, rows, x.shape) for x, rows in boxes)
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
    """Write the gradients of queries, keys and values: see launch.py."""
    if not problem.batch_heads:
        return
    dq, dk, dv, ds = gradients[:4]
    vectors = has_vectors(problem, (problem.head_dim, problem.value_dim), dq, dk, dv)
    kind = kind_of(
        problem, inputs.mask_kind, vectors, inputs.functions, inputs.lists is not None
    )  # fmt: skip
    both = for_keys, for_queries = blocks or backward_blocks(kind, problem.seqlen_q)
    space = _workspace(problem, heads, inputs, both)
    call = next_call()
    _prepare(
        problem, heads, inputs, kind, both, space, workspace, out, grad_out, rows, grad_logsumexp,
        call,
    )  # fmt: skip
    q, k, v, do = _operands(problem, heads, inputs, grad_out)
    band = sizes_of(problem, heads)
    sizes = BackwardSizes(
        heads.heads, band.seqlen_q, band.seqlen_k, band.lower, band.upper, heads.group,
        problem.head_dim, problem.value_dim,
    )  # fmt: skip
    own_heads = OwnHeads(each_of(inputs.q).head, each_of(grad_out).head)
    scalars, of_head = scalars_of(problem), ROW_BYTES * space.padded_q
    key_lists, query_lists = (
        (NO_LISTS, NO_LISTS) if space.lists is None else (x.lists for x in space.lists)
    )  # fmt: skip

    def places(number: int) -> Places:
        """Of launch `number`: dK and dV, dV alone where dK was alone, and 2 for dQ."""
        table = space.tables[number > 1], space.counts[number > 1]
        parts = space.parts[number > 1]
        return Places(COUNTER_BYTES * number, *table, space.rows, of_head, call, parts)

    if problem.seqlen_k:
        address = _maps(problem, heads, for_keys, (k, v), (q, do))
        for number, wanted in enumerate(launches_for_keys(kind)):
            launch(
                key_kernel(kind, for_keys, *wanted), min(space.counts[0], multiprocessors()),
                for_keys.threads, address, own_heads, inputs.mask_array, inputs.offset, workspace,
                places(number), dk.array, dv.array, inputs.mask_strides, dk.strides, dv.strides,
                sizes, *scalars, inputs.words, key_lists,
                shared_bytes=memory_plan(kind, for_keys).size,
            )  # fmt: skip
    if problem.seqlen_q:
        address = _maps(problem, heads, for_queries, (q, do), (k, v))
        launch(
            query_kernel(kind, for_queries, ds is not None),
            min(space.counts[1], multiprocessors()),
            for_queries.threads, address, own_heads, inputs.mask_array, inputs.offset, workspace,
            places(2), dq.array, rows if ds is None else ds, inputs.mask_strides, dq.strides, sizes,
            *scalars, inputs.words, query_lists,
            shared_bytes=memory_plan(kind, for_queries).size,
        )  # fmt: skip
    if space.lists is not None:
        _add_parts(problem, heads, kind, both, space, workspace, gradients)


def _add_parts(
    problem: AttentionProblem, heads: Heads, kind: Kind, both: tuple[Blocks, Blocks],
    space: Workspace, workspace: Any, gradients: Gradients,
) -> None:  # fmt: skip
    """Write the gradients of tiles whose lists were cut."""
    assert space.lists is not None
    head_dim, columns = problem.head_dim, problem.head_dim + problem.value_dim
    for n, target, width, begin, scale, length in (
        (0, gradients.dk, head_dim, 0, problem.scale, problem.seqlen_k),
        (0, gradients.dv, problem.value_dim, both[0].own * head_dim, problem.keep_scale,
         problem.seqlen_k),
        (1, gradients.dq, head_dim, 0, problem.scale, problem.seqlen_q),
    ):  # fmt: skip
        lists, own = space.lists[n], both[n].own
        size = own * (columns if n == 0 else head_dim)
        splits = Splits(lists.splits, space.parts[n] // 4 + begin, 0, size, ceil_div(length, own))
        slots = heads.heads // (heads.group if n == 0 else 1)
        launch(
            sum_kernel(kind.precision, own), lists.split_count * ceil_div(own, PART_WARPS),
            PART_THREADS, workspace, splits, target.array, target.strides, slots, length, width,
            scale,
        )  # fmt: skip


def _prepare(
    problem: AttentionProblem, heads: Heads, inputs: Inputs, kind: Kind,
    both: tuple[Blocks, Blocks], space: Workspace, workspace: Any, out: Matrices,
    grad_out: Matrices, rows: Any, grad_logsumexp: Any, call: int,
) -> None:  # fmt: skip
    """Launch what writes numbers of rows and the tables of work to the workspace."""
    columns = 2 * (problem.head_dim + problem.value_dim)
    # Of what passes by: queries, of all heads that share keys, and keys.
    head_bytes = (
        max(problem.seqlen_q, 1) * columns * heads.group,
        max(problem.seqlen_k, 1) * columns,
    )
    slots = problem.batch_heads // heads.group, problem.batch_heads
    tables = [
        Table(
            space.tables[n], space.counts[n], both[n].own, both[n].passing,
            min(max(AT_ONCE // head_bytes[n], 1), slots[n]),
            0 if space.lists is None else space.lists[n].table,
        )
        for n in (0, 1)
    ]  # fmt: skip
    k_each, v_each = each_of(inputs.k), each_of(inputs.v)
    band = sizes_of(problem, heads)
    sizes = PrepareSizes(
        heads.batch, heads.heads, band.seqlen_q, band.seqlen_k, band.lower, band.upper,
        # A head that is repeated is number 0 of its tensor map.
        heads.k_group if k_each.head else heads.heads,
        heads.v_group if v_each.head else heads.heads, heads.group,
        k_each.batch, v_each.batch, each_of(inputs.q).batch, each_of(grad_out).batch,
    )  # fmt: skip
    pieces = has_vectors(problem, (problem.value_dim,), out, grad_out)
    has_grad = grad_logsumexp is not None
    threads = problem.batch_heads * space.padded_q * row_threads(kind.value_dim)
    launch(
        prepare_kernel(problem.dtype.name, kind.value_dim, pieces, kind.additive, has_grad),
        ceil_div(threads, THREADS), THREADS,
        out.array, grad_out.array, rows, grad_logsumexp if has_grad else rows, out.strides,
        grad_out.strides, sizes, workspace, space.rows, call, space.padded_q, problem.value_dim,
        *tables,
    )  # fmt: skip


# ----- for the compile tests -----


def _signatures(kind: Kind) -> dict[str, tuple[Any, ...]]:
    """numba types of the kernels' arguments, by their names."""
    of, whole = argument_types(kind.precision, kind.mask, kind.functions), types.int64
    array, rows, strides, sizes = of.array, of.rows, of.strides, named_type(BackwardSizes)
    read = (types.uint64, named_type(OwnHeads), of.mask, of.word, rows, named_type(Places))
    return {
        "keys": (*read, array, array, *[strides] * 3, sizes, *of.scalars, of.words, of.lists),
        "queries": (*read, array, rows, *[strides] * 2, sizes, *of.scalars, of.words, of.lists),
        "prepare": (
            array, array, rows, rows, strides, strides, named_type(PrepareSizes), rows,
            *[whole] * 4, *[named_type(Table)] * 2,
        ),
    }  # fmt: skip


def instances() -> Iterator[Instance]:
    """Of each head size that has its own tiles one kind, and one with all that takes registers."""
    crowded = Kind("bfloat16", 128, 128, "bfloat16", dropout=True, banded=True, vectors=False)
    both = example_functions()
    for kind in (
        Kind("float16", 64, 64),
        Kind("float16", 64, 64, dropout=True),
        Kind("bfloat16", 128, 128, banded=True),
        Kind("float16", 256, 256),
        Kind("float16", 64, 64, scaled_first=True, banded=True, functions=Functions(both.score)),
        Kind("bfloat16", 128, 128, scaled_first=True, functions=both, is_sparse=True),
        crowded,
    ):
        signatures, (for_keys, for_queries) = _signatures(kind), backward_blocks(kind)
        name = f"{kind.precision}, {kind.head_dim}" + ", dropout" * kind.dropout
        name += ", functions" * bool(kind.functions) + ", lists" * kind.is_sparse
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
    "backward_block_sizes",
    "backward_blocks",
    "backward_tiles",
    "backward_workspace",
    "instances",
]
