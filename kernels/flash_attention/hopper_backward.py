"""The backward pass on Hopper GPUs, 16-bit dtypes: what to launch, and how.

Algorithm 2 of "FlashAttention-2" (Dao, 2023), in launches that each have their file:

    hopper_backward_prepare.py    delta = rowsum(dO * O) - dL, and the list of work
    hopper_backward_keys.py       dK, dV: a block owns keys
    hopper_backward_queries.py    dQ: a block owns queries

S and dP are computed twice, seven products where five would do. In return every gradient is the sum
of one block, in an order that never changes, and nothing but results is written: a kernel that adds
to dQ in memory was measured, and is slower once its order is fixed (project/results).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from typing import Any, NamedTuple

from ..runtime import Instance, ceil_div, cuda, launch, precision, types
from ..tensor_map import matrices_map, on_device
from .cuda import Architecture, Gradients, Heads, Inputs, Ints, Matrices, arguments_of, mask_of
from .hopper_backward_keys import key_kernel
from .hopper_backward_pipeline import COUNTER_BYTES, WORK_BYTES, Blocks, memory_plan
from .hopper_backward_prepare import COUNTERS, THREADS, prepare_kernel, row_threads
from .hopper_backward_queries import query_kernel
from .hopper_tiles import HEAD_SIZES, Kind, padded
from .problem import AttentionProblem

PADDING = 256  # rows of L and delta beyond the last query, which tiles may reach
AT_ONCE = 24 << 20  # bytes of passing tiles that blocks work with at one time: they stay in the L2

# ----- sizes of tiles -----

# By the larger of the two head sizes. 232448 bytes of shared memory, and the registers of a
# consumer, allow no more.
KEYS = {
    64: Blocks(128, 128, 2, 2), 96: Blocks(128, 64, 2, 2), 128: Blocks(128, 64, 2, 2),
    192: Blocks(128, 64, 2, 1), 256: Blocks(128, 48, 2, 1),
}  # fmt: skip
QUERIES = {
    64: Blocks(128, 128, 2, 2), 96: Blocks(128, 96, 2, 2), 128: Blocks(128, 96, 2, 2),
    192: Blocks(128, 80, 2, 1), 256: Blocks(128, 48, 2, 1),
}  # fmt: skip


def backward_blocks(kind: Kind) -> tuple[Blocks, Blocks]:
    """The tiles of the kernel for dK and dV, and of that for dQ."""
    size = max(kind.head_dim, kind.value_dim)
    # Dropout, a mask, and most of all an additive one, take registers for what passes by.
    most = 128
    if kind.dropout or kind.mask == "bool":
        most = 48
    if kind.mask not in ("none", "bool"):
        most = 32
    if kind.mask != "none" and size > 192:
        most = 16
    for_keys, for_queries = KEYS[size], QUERIES[size]
    return (
        replace(for_keys, passing=min(for_keys.passing, most)),
        replace(for_queries, passing=min(for_queries.passing, most)),
    )


def launches_for_keys(kind: Kind) -> tuple[tuple[bool, bool], ...]:
    """Which of (dK, dV) each launch computes: the registers hold both up to 128 columns, if not mask
    and dropout need them.
    """
    crowded = kind.dropout and kind.mask != "none"
    if max(kind.head_dim, kind.value_dim) <= (64 if crowded else 128):
        return ((True, True),)
    return ((True, False), (False, True))


# ----- launches -----


class Workspace(NamedTuple):
    """Where things are in the workspace, in bytes from its beginning.

    Args:
        rows: L in units of log 2, and delta, of all queries (see hopper_backward_prepare.py).
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
    first = COUNTERS * COUNTER_BYTES
    tables = first, first + WORK_BYTES * counts[0]
    rows = tables[1] + WORK_BYTES * counts[1]
    rows = ceil_div(rows, 128) * 128
    size = rows + 8 * problem.batch_heads * padded_q
    return Workspace(rows, tables, counts, size, padded_q)


def backward_workspace(problem: AttentionProblem, heads: Heads, architecture: Architecture) -> int:
    """Bytes of memory that `backward` needs."""
    # It depends on the rows of own tiles, not on those of passing ones.
    return _workspace(problem, heads, backward_blocks(_kind(problem, "none", True))).size


def _kind(problem: AttentionProblem, mask_kind: str, vectors: bool) -> Kind:
    last = problem.seqlen_q - 1
    return Kind(
        precision=problem.dtype.name,
        head_dim=padded(problem.head_dim),
        value_dim=padded(problem.value_dim),
        mask=mask_kind,
        dropout=problem.dropout_p > 0,
        banded=last + problem.lower > 0 or problem.upper < problem.seqlen_k,
        vectors=vectors,
    )


def _maps(
    problem: AttentionProblem, heads: Heads, inputs: Inputs, grad_out: Matrices
) -> dict[str, Any]:
    """For each of Q, K, V, dO a function from the rows of a box to its tensor map.

    Of an empty one nothing is read, but its map wants an address.
    """
    q, k, v = inputs.q, inputs.k, inputs.v
    spare = q.address if problem.seqlen_q else k.address

    def maker(matrices: Matrices, group: int, length: int, columns: int) -> Any:
        shape = heads.batch, heads.heads // group, max(length, 1), columns
        address = matrices.address if length else spare
        return lambda rows: matrices_map(
            problem.dtype.name, address, shape, matrices.strides, rows
        )  # fmt: skip

    return {
        "q": maker(q, 1, problem.seqlen_q, problem.head_dim),
        "k": maker(k, heads.k_group, problem.seqlen_k, problem.head_dim),
        "v": maker(v, heads.v_group, problem.seqlen_k, problem.value_dim),
        "do": maker(grad_out, 1, problem.seqlen_q, problem.value_dim),
    }


def _has_pieces(columns: int, *matrices: Matrices) -> bool:
    """Whether all rows begin at multiples of 16 bytes, and are as long."""
    return columns % 8 == 0 and all(
        m.address % 16 == 0 and all(stride % 8 == 0 for stride in m.strides[:3]) for m in matrices
    )


@cache
def processors() -> int:
    """Multiprocessors of the GPU, each of which has one block."""
    return int(cuda.get_current_device().MULTIPROCESSOR_COUNT)


def backward(
    problem: AttentionProblem,
    heads: Heads,
    inputs: Inputs,
    out: Matrices,
    logsumexp: Any,
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
        logsumexp: its logsumexp.
        grad_out: the gradient of `out`; rows begin at multiples of 16 bytes.
        grad_logsumexp: of the logsumexp, likewise contiguous; None for 0.
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
    both = for_keys, for_queries = blocks or backward_blocks(kind)
    space = _workspace(problem, heads, both)
    (_, *lengths, k_group, v_group), numbers = arguments_of(problem, heads)
    _prepare(problem, heads, kind, both, space, workspace, out, grad_out, logsumexp, grad_logsumexp)
    maps = _maps(problem, heads, inputs, grad_out)
    mask, mask_strides = mask_of(inputs)
    sizes = (heads.heads, *lengths, heads.group, problem.head_dim, problem.value_dim)
    places = [
        (COUNTER_BYTES * n, space.tables[n > 1], space.counts[n > 1], space.rows,
         8 * space.padded_q)
        for n in (0, 1, 2)
    ]  # fmt: skip
    if problem.seqlen_k:
        own, passing = for_keys.own, for_keys.passing
        address = on_device(
            maps["k"](own), maps["v"](own), maps["q"](passing), maps["do"](passing)
        )  # fmt: skip
        for n, wanted in enumerate(launches_for_keys(kind)):
            launch(
                key_kernel(kind, for_keys, *wanted), min(space.counts[0], processors()),
                for_keys.threads, address, mask, inputs.offset, workspace, places[n], dk.array, dv.array,
                mask_strides, dk.strides, dv.strides, sizes, *numbers,
                shared_bytes=memory_plan(kind, for_keys).size,
            )  # fmt: skip
    if problem.seqlen_q:
        own, passing = for_queries.own, for_queries.passing
        address = on_device(
            maps["q"](own), maps["do"](own), maps["k"](passing), maps["v"](passing)
        )  # fmt: skip
        launch(
            query_kernel(kind, for_queries, ds is not None), min(space.counts[1], processors()),
            for_queries.threads, address, mask, inputs.offset, workspace, places[2], dq.array,
            logsumexp if ds is None else ds, mask_strides, dq.strides, sizes, *numbers,
            shared_bytes=memory_plan(kind, for_queries).size,
        )  # fmt: skip


def _prepare(
    problem: AttentionProblem, heads: Heads, kind: Kind, both: tuple[Blocks, Blocks],
    space: Workspace, workspace: Any, out: Matrices, grad_out: Matrices, logsumexp: Any,
    grad_logsumexp: Any,
) -> None:  # fmt: skip
    """Launch what writes delta, L and the tables of work to the workspace."""
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
    (key_table, query_table), (key_count, query_count) = space.tables, space.counts
    launch(
        prepare_kernel(
            problem.dtype.name, kind.value_dim, pieces, grad_logsumexp is not None
        ),
        ceil_div(threads, THREADS), THREADS,
        out.array, grad_out.array, logsumexp,
        logsumexp if grad_logsumexp is None else grad_logsumexp, out.strides, grad_out.strides,
        (heads.batch, heads.heads, *lengths, k_group, v_group, heads.group), workspace, space.rows,
        space.padded_q, problem.value_dim,
        (key_table, key_count, query_table, query_count),
        (both[0].own, both[0].passing, both[1].own, both[1].passing), together,
    )  # fmt: skip


# ----- for the compile tests -----


def _signatures(kind: Kind) -> dict[str, tuple[Any, ...]]:
    """numba types of the kernels' arguments, by their names."""
    array, rows = precision(kind.precision).array, types.Array(types.float32, 1, "C")
    masks = {"none": array, "bool": types.Array(types.uint8, 1, "C")}
    mask = masks.get(kind.mask) or precision(kind.mask).array
    words, whole = types.Array(types.uint64, 1, "C"), types.int64

    def tuples(*counts: int) -> tuple[Any, ...]:
        return tuple(types.UniTuple(whole, count) for count in counts)

    numbers = (types.float64, types.uint64, whole, types.float64)
    read = (types.uint64, mask, words, rows, *tuples(5))
    return {
        "keys": (*read, array, array, *tuples(4, 4, 4, 8), *numbers),
        "queries": (*read, array, rows, *tuples(4, 4, 8), *numbers),
        "prepare": (
            array, array, rows, rows, *tuples(4, 4, 9), rows, *[whole] * 3, *tuples(4, 4, 2),
        ),
    }  # fmt: skip


KINDS = (
    *(Kind("float16", size, size) for size in HEAD_SIZES),
    *(Kind("bfloat16", size, size, banded=True) for size in HEAD_SIZES),
    Kind("float16", 64, 64, dropout=True),
    Kind("bfloat16", 128, 128, dropout=True, banded=True, vectors=False),
    Kind("float16", 64, 64, "bool"),
    Kind("float16", 128, 128, "float32"),
    Kind("float16", 128, 128, "bool", dropout=True, banded=True),
    Kind("bfloat16", 128, 128, "bfloat16", dropout=True),
    Kind("float16", 256, 256, "float32", banded=True),
    Kind("float16", 192, 128),
)


def instances() -> Iterator[Instance]:
    """Head sizes, dtypes, and each feature."""
    for kind in KINDS:
        signatures, (for_keys, for_queries) = _signatures(kind), backward_blocks(kind)
        features = [kind.mask] * (kind.mask != "none") + ["dropout"] * kind.dropout
        features += ["band"] * kind.banded + ["any rows"] * (not kind.vectors)
        name = ", ".join([kind.precision, f"{kind.head_dim}", f"{kind.value_dim}", *features])
        kernels = {
            f"keys {'dK' * dk}{'dV' * dv}": key_kernel(kind, for_keys, dk, dv)
            for dk, dv in launches_for_keys(kind)
        }
        wants_ds = kind.mask not in ("none", "bool")
        kernels["queries"] = query_kernel(kind, for_queries, wants_ds)
        for what, kernel in kernels.items():
            yield Instance(
                f"hopper_backward_{what}[{name}]", kernel, signatures[what.split()[0]],
                architectures=("sm_90a",),
            )  # fmt: skip
    for precision_name, vectors in (("float16", True), ("bfloat16", False)):
        kernel = prepare_kernel(precision_name, 128, vectors, True)
        signature = _signatures(Kind(precision_name, 128, 128))["prepare"]
        name = f"hopper_backward_prepare[{precision_name}, {vectors}]"
        yield Instance(name, kernel, signature, architectures=("sm_90a",))


__all__ = ["Blocks", "backward", "backward_blocks", "backward_workspace", "instances"]
