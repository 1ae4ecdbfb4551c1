"""FlashAttention on tensor cores by `mma.sync`, from Turing on: what to launch, and how.

The algorithm is in `mma_forward.py` and `mma_backward.py`; here are the sizes of their tiles, and
the host's side of a call. Nothing is allocated here.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any

from ..runtime import SIMULATED, Instance, ceil_div, launch, precision, types
from . import cuda
from .cuda import Architecture, Gradients, Heads, Inputs, Matrices
from .mma_backward import backward_memory, key_value_kernel, query_kernel
from .mma_delta import DELTA_THREADS, delta_kernel, delta_team
from .mma_forward import forward_kernel, forward_memory
from .mma_tiles import Kind, Tiles
from .problem import AttentionProblem

NAME = "mma"
ROW_ALIGNMENT = 16  # bytes: where rows of queries, keys, values and dO begin
MOST_COLUMNS = 256  # of a query, a key or a value
FIRST, FIRST_WITH_ALL = (7, 5), (8, 0)  # with tensor cores for this; with bfloat16 and cp.async

# Bytes of shared memory that a block can get.
MEMORY = {
    (7, 5): 64 * 1024, (8, 0): 163 * 1024, (8, 6): 99 * 1024, (8, 7): 163 * 1024,
    (8, 9): 99 * 1024, (9, 0): 227 * 1024,
}  # fmt: skip
LITTLE_MEMORY = 99 * 1024


def why_not(problem: AttentionProblem, architecture: Architecture) -> str | None:
    """Why these kernels cannot compute it on a GPU of this compute capability; None if they can."""
    name = problem.dtype.name
    if architecture < FIRST and not SIMULATED:
        return f"{_text(architecture)} has no tensor cores that these kernels know, 7.5 has"
    if name == "float64":
        return "tensor cores compute with 16-bit numbers and float32"
    if name == "float32" and problem.fp32_precision == "ieee":
        return "float32 takes no tensor cores but with fp32_precision 'tf32' or 'tf32x3'"
    if name != "float16" and architecture < FIRST_WITH_ALL and not SIMULATED:
        return f"{_text(architecture)} has tensor cores for float16 alone, 8.0 for {name}"
    if max(problem.head_dim, problem.value_dim) > MOST_COLUMNS:
        return f"head sizes are {problem.head_dim} and {problem.value_dim}, at most {MOST_COLUMNS}"
    return None


def _text(architecture: Architecture) -> str:
    return "compute capability {}.{}".format(*architecture)


def _kind(problem: AttentionProblem, inputs: Inputs, architecture: Architecture) -> Kind:
    name = problem.dtype.name
    return Kind(
        problem.fp32_precision if name == "float32" else name,
        problem.head_dim, problem.value_dim, inputs.mask_kind, problem.dropout_p > 0,
        problem.scale <= 0 or inputs.mask_kind not in ("none", "bool"),
        is_turing(architecture),
    )  # fmt: skip


def is_turing(architecture: Architecture) -> bool:
    """Whether kernels go without cp.async, and with half the depth of a product."""
    return architecture < FIRST_WITH_ALL and not SIMULATED


# ----- sizes of tiles: the first in a list that fits -----


def _forward_choices(kind: Kind) -> tuple[Tiles, ...]:
    if SIMULATED:
        return (Tiles(16, 16, 1, 2),)
    return (
        Tiles(128, 64, 4, 2), Tiles(128, 32, 4, 2), Tiles(64, 64, 4, 2), Tiles(64, 64, 4, 1),
        Tiles(64, 32, 4, 1), Tiles(64, 16, 4, 1), Tiles(32, 16, 2, 1),
    )  # fmt: skip


@cache
def forward_tiles(kind: Kind, architecture: Architecture) -> Tiles:
    """The forward kernel's tiles."""
    most = MEMORY.get(architecture, LITTLE_MEMORY)
    for tiles in _forward_choices(kind):
        sums = tiles.row_blocks * (kind.value_width + tiles.columns) // 2
        if forward_memory(kind, tiles).size <= most and sums <= 200:
            return tiles
    raise AssertionError(f"no tiles fit {kind}")


def _key_value_choices(kind: Kind) -> tuple[Tiles, ...]:
    if SIMULATED:
        return (Tiles(16, 16, 1, 2), Tiles(16, 16, 1, 2, parts=2))
    return (
        Tiles(128, 32, 4, 2), Tiles(64, 64, 4, 2), Tiles(64, 32, 4, 2), Tiles(64, 16, 4, 2),
        Tiles(64, 32, 4, 1), Tiles(64, 16, 4, 1), Tiles(64, 32, 4, 2, parts=2),
        Tiles(64, 32, 4, 1, parts=2), Tiles(64, 16, 4, 1, parts=2), Tiles(32, 16, 2, 1, parts=2),
    )  # fmt: skip


def _query_choices(kind: Kind) -> tuple[Tiles, ...]:
    if SIMULATED:
        return (Tiles(16, 16, 1, 2),)
    return (
        Tiles(128, 32, 4, 2), Tiles(64, 32, 4, 2), Tiles(64, 32, 4, 1), Tiles(64, 16, 4, 1),
        Tiles(32, 16, 2, 1),
    )  # fmt: skip


@cache
def backward_tiles(kind: Kind, architecture: Architecture) -> tuple[Tiles, Tiles]:
    """The tiles of the kernel for dK and dV, and of that for dQ."""
    most = MEMORY.get(architecture, LITTLE_MEMORY)

    def key_value_fits(tiles: Tiles) -> bool:
        widths = (kind.width + kind.value_width) // tiles.parts
        sums = tiles.row_blocks * (widths + 2 * tiles.columns) // 2
        return sums <= 200 and backward_memory(kind, tiles, True).size <= most

    def query_fits(tiles: Tiles) -> bool:
        sums = tiles.row_blocks * (kind.width + 2 * tiles.columns) // 2
        return sums <= 200 and backward_memory(kind, tiles, False).size <= most

    return (
        next(filter(key_value_fits, _key_value_choices(kind))),
        next(filter(query_fits, _query_choices(kind))),
    )


# ----- launches -----


def forward(
    problem: AttentionProblem,
    heads: Heads,
    inputs: Inputs,
    out: Matrices,
    logsumexp: Any,
    architecture: Architecture,
    blocks: Tiles | None = None,
) -> None:
    """Write the output (Nq, Dv) of each head, and the logsumexp: see `cuda.forward`.

    Rows of queries, keys and values begin at multiples of `ROW_ALIGNMENT` bytes, and the last
    stride is 1.
    """
    if not problem.batch_heads * problem.seqlen_q:
        return
    kind = _kind(problem, inputs, architecture)
    tiles = blocks or forward_tiles(kind, architecture)
    mask, mask_strides = cuda.mask_of(inputs)
    sizes, numbers = cuda.arguments_of(problem, heads)
    q, k, v = inputs.q, inputs.k, inputs.v
    launch(
        forward_kernel(kind, tiles),
        ceil_div(problem.seqlen_q, tiles.rows) * problem.batch_heads, tiles.threads,
        q.array, k.array, v.array, mask, inputs.offset, out.array, logsumexp,
        q.strides, k.strides, v.strides, mask_strides, out.strides, sizes, *numbers,
        shared_bytes=forward_memory(kind, tiles).size,
    )  # fmt: skip


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
    blocks: tuple[Tiles, Tiles] | None = None,
) -> None:
    """Write the gradients of queries, keys and values: see `cuda.backward`.

    Rows of dO begin at multiples of `ROW_ALIGNMENT` bytes too.
    """
    if not problem.batch_heads:
        return
    kind = _kind(problem, inputs, architecture)
    for_keys, for_queries = blocks or backward_tiles(kind, architecture)
    mask, mask_strides = cuda.mask_of(inputs)
    sizes, numbers = cuda.arguments_of(problem, heads)
    q, k, v = inputs.q, inputs.k, inputs.v
    delta, logsumexp2 = gradients.workspace
    rows = problem.batch_heads * problem.seqlen_q
    if rows:
        launch(
            delta_kernel(kind, grad_logsumexp is not None),
            ceil_div(rows, DELTA_THREADS // delta_team(kind)[0]), DELTA_THREADS,
            out.array, grad_out.array, logsumexp,
            logsumexp if grad_logsumexp is None else grad_logsumexp, delta, logsumexp2,
            out.strides, grad_out.strides, heads.heads, problem.seqlen_q, rows,
        )  # fmt: skip
    read = (q.array, k.array, v.array, mask, inputs.offset, grad_out.array, logsumexp2, delta)
    strides = (q.strides, k.strides, v.strides, mask_strides, grad_out.strides)
    if problem.seqlen_k:
        dk, dv = gradients.dk, gradients.dv
        tiles = ceil_div(problem.seqlen_k, for_keys.rows) * for_keys.parts
        launch(
            key_value_kernel(kind, for_keys), tiles * (problem.batch_heads // heads.group),
            for_keys.threads, *read, dk.array, dv.array, *strides, dk.strides, dv.strides,
            (*sizes, heads.group), *numbers,
            shared_bytes=backward_memory(kind, for_keys, True).size,
        )  # fmt: skip
    if rows:
        dq, ds = gradients.dq, gradients.ds
        launch(
            query_kernel(kind, for_queries, ds is not None),
            ceil_div(problem.seqlen_q, for_queries.rows) * problem.batch_heads,
            for_queries.threads, *read, dq.array, delta if ds is None else ds, *strides,
            dq.strides, sizes, *numbers,
            shared_bytes=backward_memory(kind, for_queries, False).size,
        )  # fmt: skip


# ----- for the compile tests -----


def _signatures(kind: Kind) -> dict[str, tuple[Any, ...]]:
    """numba types of the kernels' arguments, by their names."""
    array, rows = precision(kind.precision).array, types.Array(types.float32, 1, "C")
    masks = {"none": array, "bool": types.Array(types.uint8, 1, "C")}
    mask = masks.get(kind.mask) or precision(kind.mask).array
    word, strides = types.Array(types.uint64, 1, "C"), types.UniTuple(types.int64, 4)
    sizes = types.UniTuple(types.int64, 7)
    scalars = (types.float64, types.uint64, types.int64, types.float64)
    read = (array, array, array, mask, word)
    return {
        "delta": (array, array, *[rows] * 4, strides, strides, *[types.int64] * 3),
        "forward": (*read, array, rows, *[strides] * 5, sizes, *scalars),
        "key_value": (
            *read, array, rows, rows, array, array, *[strides] * 7, types.UniTuple(types.int64, 8),
            *scalars,
        ),
        "query": (*read, array, rows, rows, array, rows, *[strides] * 6, sizes, *scalars),
    }  # fmt: skip


ARCHITECTURES = {
    "sm_75": (7, 5), "sm_80": (8, 0), "sm_86": (8, 6), "sm_89": (8, 9), "sm_90a": (9, 0),
}  # fmt: skip


def instances() -> Iterator[Instance]:
    """Numbers, head sizes, masks and dropout; every shape of tiles for the GPUs that pick it."""
    for turing in (False, True):
        for kind in (
            Kind("float16", 64, 64, "none", False, False, turing),
            Kind("float16", 128, 128, "none", True, False, turing),
            Kind("float16", 256, 256, "float32", False, True, turing),
            Kind("float16", 40, 72, "bool", True, False, turing),
            Kind("bfloat16", 128, 128, "none", False, False, False),
            Kind("tf32", 64, 64, "none", False, False, False),
            Kind("tf32x3", 64, 64, "none", True, False, False),
            Kind("tf32x3", 256, 256, "bool", False, False, False),
        ):
            if kind.turing == turing:
                yield from _instances_of(kind)


def _instances_of(kind: Kind) -> Iterator[Instance]:
    picked: dict[tuple[str, Any], tuple[str, ...]] = {}
    for name, capability in ARCHITECTURES.items():
        if (capability < FIRST_WITH_ALL) == kind.turing:
            for_keys, for_queries = backward_tiles(kind, capability)
            for what, kernel in (
                ("forward", forward_kernel(kind, forward_tiles(kind, capability))),
                ("key_value", key_value_kernel(kind, for_keys)),
                ("query", query_kernel(kind, for_queries, kind.mask == "float32")),
            ):
                picked[what, kernel] = (*picked.get((what, kernel), ()), name)
    for (what, kernel), architectures in picked.items():
        yield Instance(
            f"mma_{what}[{_name(kind)}, {', '.join(architectures)}]", kernel,
            _signatures(kind)[what], architectures=architectures,
        )  # fmt: skip


def _name(kind: Kind) -> str:
    flags = ", dropout" * kind.dropout + ", scaled first" * kind.scaled_first
    return f"{kind.numbers}, {kind.head_dim}, {kind.value_dim}, {kind.mask}{flags}"


__all__ = [
    "NAME",
    "ROW_ALIGNMENT",
    "Tiles",
    "backward",
    "backward_tiles",
    "forward",
    "forward_tiles",
    "instances",
    "why_not",
]
