"""FlashAttention on any CUDA GPU, with ordinary (SIMT) arithmetic: what to launch, and how.

The algorithm is in `simt/forward.py` and `simt/backward.py`; here are the sizes of their tiles, and
the host's side of a call: from a problem and arrays in device memory to launches. Nothing is
allocated here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache, partial
from typing import Any

from ...gpu.runtime import SIMULATED, Instance, ceil_div, launch, types
from ..launch import (
    Architecture,
    Gradients,
    Heads,
    Inputs,
    Matrices,
    argument_types,
    example_functions,
    functions_of,
    has_vectors,
    instances_of,
    scalars_of,
    sizes_of,
    tile_lists,
)
from ..problem import AttentionProblem
from .backward import (
    DELTA_ROWS,
    DELTA_THREADS,
    backward_memory,
    delta_kernel,
    key_value_kernel,
    query_kernel,
)
from .forward import forward_kernel, forward_memory
from .tiles import Blocks, Kind, tile_width, vector_lanes

NAME = "simt"
PRECISIONS = ("float32", "float64", "float16", "bfloat16")
MOST_COLUMNS = 256  # of a query, a key or a value


def why_not(problem: AttentionProblem, architecture: Architecture) -> str | None:
    """None if these kernels compute it, on a GPU of this compute capability; else why not."""
    if max(problem.head_dim, problem.value_dim) > MOST_COLUMNS:
        return f"it takes head sizes up to {MOST_COLUMNS}"
    return None


# ----- sizes of tiles -----
#
# The first in a list whose tiles fit in shared memory, and whose sums in registers. A thread's keys
# of dK come in vectors: there block_n must be a multiple of their length times the threads that
# share the keys.

FORWARD: tuple[Blocks, ...]
BACKWARD_KEY_VALUE: tuple[Blocks, ...]
BACKWARD_QUERY: tuple[Blocks, ...]
if SIMULATED:
    FORWARD = BACKWARD_QUERY = (Blocks(8, 8, 4, 2),)
    BACKWARD_KEY_VALUE = (Blocks(8, 16, 4, 2),)
else:
    FORWARD = (
        Blocks(128, 32, 16, 8), Blocks(64, 32, 8, 8), Blocks(64, 32, 8, 16),
        Blocks(32, 32, 8, 16), Blocks(32, 16, 8, 16), Blocks(16, 16, 8, 16), Blocks(4, 8, 4, 8),
    )  # fmt: skip
    BACKWARD_KEY_VALUE = (
        Blocks(64, 64, 16, 8), Blocks(32, 32, 8, 8), Blocks(32, 32, 8, 16), Blocks(16, 16, 4, 16),
        Blocks(8, 16, 4, 16), Blocks(4, 16, 4, 16), Blocks(8, 8, 8, 8, 16), Blocks(8, 4, 8, 4, 16),
    )  # fmt: skip
    BACKWARD_QUERY = (
        Blocks(128, 32, 16, 8), Blocks(64, 32, 8, 8), Blocks(32, 32, 8, 8), Blocks(32, 32, 8, 16),
        Blocks(16, 16, 4, 16), Blocks(8, 16, 4, 16), Blocks(8, 8, 2, 8), Blocks(4, 8, 2, 8),
    )  # fmt: skip
# Bytes of shared memory for a block: as many as any GPU gives, or where there are more a share of
# them that lets several blocks run at once.
LITTLE_MEMORY = 48 * 1024
MEMORY = {(8, 0): 80 * 1024, (9, 0): 112 * 1024, (10, 0): 112 * 1024}
REGISTERS = 136  # of 4 bytes, for a thread's sums


def _itemsize(kind: Kind) -> int:
    return 16 // vector_lanes(kind.precision)


def _first_that_fits(
    choices: tuple[Blocks, ...],
    plan: Callable[[Kind, Blocks], Any],
    sums: Callable[[Kind, Blocks], int],
    kind: Kind,
    architecture: Architecture,
) -> Blocks:
    itemsize = _itemsize(kind)
    most_bytes = MEMORY.get(architecture, LITTLE_MEMORY)
    for blocks in choices:
        fits = itemsize * plan(kind, blocks).size <= most_bytes
        if fits and sums(kind, blocks) * itemsize // 4 <= REGISTERS:
            return blocks
    return choices[-1]


def _columns(kind: Kind, blocks: Blocks) -> tuple[int, int]:
    """A thread's columns of Q, K or dK, and of V, dV or O."""
    lanes, threads = vector_lanes(kind.precision), blocks.threads_d
    return (
        tile_width(kind.head_dim, threads, lanes) // threads,
        tile_width(kind.value_dim, threads, lanes) // threads,
    )


def _forward_sums(kind: Kind, blocks: Blocks) -> int:
    return blocks.rows * (blocks.keys + _columns(kind, blocks)[1])


def _key_value_sums(kind: Kind, blocks: Blocks) -> int:
    own = blocks.block_n * blocks.threads_d // blocks.threads
    if own % vector_lanes(kind.precision):
        return 1 << 30  # these threads' keys are no whole vectors
    return blocks.rows * blocks.keys + own * sum(_columns(kind, blocks))


def _query_sums(kind: Kind, blocks: Blocks) -> int:
    return blocks.rows * (blocks.keys + _columns(kind, blocks)[0])


@cache
def forward_blocks(kind: Kind, architecture: Architecture) -> Blocks:
    """The forward kernel's tiles."""
    return _first_that_fits(FORWARD, forward_memory, _forward_sums, kind, architecture)


@cache
def backward_blocks(kind: Kind, architecture: Architecture) -> tuple[Blocks, Blocks]:
    """The tiles of the kernel for dK and dV, and of that for dQ."""
    find = _first_that_fits
    key_value_memory = partial(backward_memory, needs_p=True)
    query_memory = partial(backward_memory, needs_p=False)
    return (
        find(BACKWARD_KEY_VALUE, key_value_memory, _key_value_sums, kind, architecture),
        find(BACKWARD_QUERY, query_memory, _query_sums, kind, architecture),
    )


# ----- launches -----


def kind_of(problem: AttentionProblem, mask_kind: str, vectors: bool) -> Kind:
    return Kind(
        problem.dtype.name, problem.head_dim, problem.value_dim, mask_kind,
        problem.dropout_p > 0, vectors, functions_of(problem),
        problem.is_sparse,
    )  # fmt: skip


def has_whole_vectors(problem: AttentionProblem, inputs: Inputs, *more: Matrices) -> bool:
    columns = problem.head_dim, problem.value_dim
    return has_vectors(problem, columns, inputs.q, inputs.k, inputs.v, *more)


def block_sizes(
    problem: AttentionProblem, architecture: Architecture, backward: bool = False
) -> dict[str, tuple[int, int]]:
    """Queries and keys of a tile, by what a kernel computes; for rows that come in vectors."""
    kind = kind_of(problem, problem.mask_kind, vectors=True)
    found = {"output": forward_blocks(kind, architecture)}
    if backward:
        for_keys, for_queries = backward_blocks(kind, architecture)
        found = {"dK and dV": for_keys, "dQ": for_queries}
    return {name: (blocks.block_m, blocks.block_n) for name, blocks in found.items()}


def _forward_bytes(kind: Kind, blocks: Blocks) -> int:
    """Of shared memory."""
    return forward_memory(kind, blocks).size * _itemsize(kind)


def backward_bytes(kind: Kind, blocks: Blocks, needs_p: bool) -> int:
    return backward_memory(kind, blocks, needs_p).size * _itemsize(kind)


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
    """Write the output, the logsumexp and what the backward pass wants: see launch.py."""
    kind = kind_of(problem, inputs.mask_kind, has_whole_vectors(problem, inputs))
    blocks = blocks or forward_blocks(kind, architecture)
    launch(
        forward_kernel(kind, blocks),
        ceil_div(problem.seqlen_q, blocks.block_m) * problem.batch_heads, blocks.threads,
        *inputs.arrays, inputs.offset, out.array, logsumexp, rows, *inputs.strides, out.strides,
        sizes_of(problem, heads), *scalars_of(problem), inputs.words,
        tile_lists(problem, inputs, (blocks.block_m, blocks.block_n)),
        shared_bytes=_forward_bytes(kind, blocks),
    )  # fmt: skip


def launch_delta(
    problem: AttentionProblem,
    heads: Heads,
    out: Matrices,
    rows: Any,
    grad_out: Matrices,
    grad_logsumexp: Any,
    workspace: tuple[Any, Any, Any],
) -> None:
    """Write delta, shift and inverse of each row."""
    count = problem.batch_heads * problem.seqlen_q
    launch(
        delta_kernel(problem.dtype.name, grad_logsumexp is not None),
        ceil_div(count, DELTA_ROWS), DELTA_THREADS,
        out.array, grad_out.array, rows, rows if grad_logsumexp is None else grad_logsumexp,
        *workspace, out.strides, grad_out.strides, heads.heads, problem.seqlen_q,
        problem.value_dim, count,
    )  # fmt: skip


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
) -> None:
    """Write the gradients of queries, keys and values: see launch.py."""
    kind = kind_of(problem, inputs.mask_kind, has_whole_vectors(problem, inputs, grad_out))
    for_keys, for_queries = blocks or backward_blocks(kind, architecture)
    sizes, scalars = sizes_of(problem, heads), scalars_of(problem)
    launch_delta(problem, heads, out, rows, grad_out, grad_logsumexp, gradients.workspace)
    delta, shift, inverse = gradients.workspace
    read = (*inputs.arrays, inputs.offset, grad_out.array, shift, inverse, delta)
    strides = (*inputs.strides, grad_out.strides)
    dq, dk, dv, ds = gradients[:4]
    launch(
        key_value_kernel(kind, for_keys),
        ceil_div(problem.seqlen_k, for_keys.block_n) * (problem.batch_heads // heads.group),
        for_keys.threads, *read, dk.array, dv.array, *strides, dk.strides, dv.strides, sizes,
        heads.group, *scalars, inputs.words,
        tile_lists(problem, inputs, (for_keys.block_m, for_keys.block_n), transposed=True),
        shared_bytes=backward_bytes(kind, for_keys, True),
    )  # fmt: skip
    launch(
        query_kernel(kind, for_queries, ds is not None),
        ceil_div(problem.seqlen_q, for_queries.block_m) * problem.batch_heads,
        for_queries.threads, *read, dq.array, delta if ds is None else ds, *strides, dq.strides,
        sizes, *scalars, inputs.words,
        tile_lists(problem, inputs, (for_queries.block_m, for_queries.block_n)),
        shared_bytes=backward_bytes(kind, for_queries, False),
    )  # fmt: skip


# ----- for the compile tests -----


def _signatures(kind: Kind) -> dict[str, tuple[Any, ...]]:
    """numba types of the kernels' arguments, by their names."""
    of = argument_types(kind.precision, kind.mask, kind.functions)
    array, rows, strides, whole = of.array, of.rows, of.strides, types.int64
    last = *of.scalars, of.words, of.lists
    return {
        "forward": (
            *of.inputs, array, rows, rows, *[strides] * 5, of.sizes, *last,
        ),
        "key_value": (
            *of.inputs, array, *[rows] * 3, array, array, *[strides] * 7, of.sizes, whole,
            *last,
        ),
        "query": (
            *of.inputs, array, *[rows] * 3, array, rows, *[strides] * 6, of.sizes, *last,
        ),
        "delta": (array, array, *[rows] * 5, strides, strides, *[whole] * 4),
    }  # fmt: skip


ARCHITECTURES = {
    "sm_75": (7, 5), "sm_80": (8, 0), "sm_86": (8, 6), "sm_89": (8, 9), "sm_90a": (9, 0),
}  # fmt: skip


def instances() -> Iterator[Instance]:
    """Sizes, precisions, masks and dropout; every shape of tiles for the GPUs that pick it.

    Of 16 bits only bfloat16 on Turing: all else has the tensor cores' kernels (mma/launch.py).
    """
    kinds = (
        Kind("float32", 64, 64, "none", False, True),
        Kind("float32", 256, 256, "none", False, True),
        Kind("float32", 80, 40, "bool", True, False),
        Kind("float64", 64, 64, "float64", True, False),
        Kind("bfloat16", 128, 128, "bool", False, True),
        Kind("float32", 64, 64, "none", True, True, example_functions(), is_sparse=True),
        Kind("float64", 64, 64, "float64", False, True, example_functions()),
    )
    for kind in kinds:
        names = ("sm_75",) if kind.precision == "bfloat16" else tuple(ARCHITECTURES)
        kernels = {name: _kernels(kind, ARCHITECTURES[name]) for name in names}
        yield from instances_of("flash", _name(kind), kernels, _signatures(kind))
    for name in PRECISIONS:
        kind = Kind(name, 64, 64, "none", False, True)
        yield Instance(f"flash_delta[{name}]", delta_kernel(name, True), _signatures(kind)["delta"])


def _kernels(kind: Kind, architecture: Architecture) -> dict[str, Any]:
    """Forward and backward kernels, in the shape of tiles that an architecture picks."""
    for_keys, for_queries = backward_blocks(kind, architecture)
    return {
        "forward": forward_kernel(kind, forward_blocks(kind, architecture)),
        "key_value": key_value_kernel(kind, for_keys),
        "query": query_kernel(kind, for_queries, False),
    }


def _name(kind: Kind) -> str:
    flags = ", dropout" * kind.dropout + ", vectors" * kind.vectors
    flags += ", functions" * bool(kind.functions) + ", lists" * kind.is_sparse
    return f"{kind.precision}, {kind.head_dim}, {kind.value_dim}, {kind.mask}{flags}"


__all__ = ["backward", "block_sizes", "forward", "instances", "why_not"]
