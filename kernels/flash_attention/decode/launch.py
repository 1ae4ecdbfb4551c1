"""Flash-Decoding: a few queries against a long cache of keys and values. Forward only.

"Flash-Decoding for long-context inference" (Dao, Haziza, Massa, Sizov, 2023). With one query there
is one tile of queries, so FlashAttention would keep one multiprocessor busy. Here the keys are cut
into splits, each computed by a block of its own:

    m_s = the largest score of split s
    l_s = sum exp(scores of split s - m_s)
    O_s = exp(scores of split s - m_s) V_s

and a second kernel merges them

    m = max(m_s)
    l = sum exp(m_s - m) l_s
    O = sum exp(m_s - m) O_s / l

always in the order of the splits, so that a second run gives the same bits.

Each key and value is read once, and that is what takes the time: the arithmetic is ordinary. All
query heads that share a key head (GQA) are rows of one small matrix, `rows` of them to a block.

The kernels are in `decode/forward.py`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from ...gpu.runtime import (
    SIMULATED,
    WARP,
    Instance,
    ceil_div,
    launch,
    precision,
    types,
)
from ..launch import (
    Architecture,
    Heads,
    Inputs,
    Matrices,
    argument_types,
    example_functions,
    functions_of,
    has_vectors,
    heads_of,
    named_type,
    sizes_of,
)
from ..problem import AttentionProblem
from ..schedule import RULES
from .forward import (
    MERGE_THREADS,
    MOST_SPLITS,
    WARPS,
    Cuts,
    DecodeKind,
    MergeSizes,
    merge_kernel,
    split_kernel,
)

NAME = "decode"
MOST_QUERIES = 8
MOST_COLUMNS = 256
MOST_ROWS = 4  # of a block: more are in other blocks, which read the same keys
MOST_ROWS_WITH_FUNCTIONS = 2  # whose code is there for each row and key
MOST_NUMBERS = 64  # of 32 bits, that a thread keeps of queries and outputs
KEYS_OF_A_SPLIT = 16 if SIMULATED else 256  # at least
BLOCKS = 64 if SIMULATED else 512  # about as many as the largest GPU runs at once


def why_not(problem: AttentionProblem, architecture: Architecture) -> str | None:
    """None if these kernels compute it, and are the faster way; else why not."""
    if problem.seqlen_q > MOST_QUERIES:
        return f"it is for up to {MOST_QUERIES} queries, there are {problem.seqlen_q}"
    if problem.dropout_p > 0:
        return "it has no dropout"
    if max(problem.head_dim, problem.value_dim) > MOST_COLUMNS:
        return f"it takes head sizes up to {MOST_COLUMNS}"
    return None


# ----- launches -----


def cuts_of(problem: AttentionProblem, heads: Heads) -> Cuts:
    """As many splits as fill a GPU, of `KEYS_OF_A_SPLIT` keys at least.

    A function of the problem alone: on every GPU the sums are the same.
    """
    seqlen_q = problem.seqlen_q
    begin = RULES.first_key(0, problem)
    end = max(RULES.end_key(seqlen_q - 1, problem), begin)
    keys = end - begin
    row_tiles = ceil_div(heads.group * seqlen_q, MOST_ROWS)
    blocks = max(1, problem.batch_heads // heads.group * row_tiles)
    splits = min(ceil_div(BLOCKS, blocks), keys // KEYS_OF_A_SPLIT, MOST_SPLITS)
    split_keys = ceil_div(ceil_div(keys, max(splits, 1)), KEYS_OF_A_SPLIT) * KEYS_OF_A_SPLIT
    return Cuts(begin, end, split_keys, max(1, ceil_div(keys, max(split_keys, 1))))


def kind_of(problem: AttentionProblem, heads: Heads, mask: str, vectors: bool) -> DecodeKind:
    """The kernel's compile-time choices."""
    banded = problem.seqlen_q > 1 and (problem.left is not None or problem.right is not None)
    numbers = precision(problem.dtype.name)
    at_once = 16 // numbers.storage.itemsize if vectors else 1
    sizes = problem.head_dim, problem.value_dim
    functions = functions_of(problem)
    one = DecodeKind(problem.dtype.name, *sizes, mask, banded, at_once, 1, functions)
    each = sum(one.pieces(size) for size in sizes) * at_once * (numbers.real.bitwidth // 32)
    most_rows = MOST_ROWS_WITH_FUNCTIONS if functions else MOST_ROWS
    most = min(most_rows, MOST_NUMBERS // max(each, 1))
    rows = 1
    while rows * 2 <= most and rows < heads.group * problem.seqlen_q:
        rows *= 2
    return replace(one, rows=rows)


def forward_workspace(
    problem: AttentionProblem, heads: Heads, inputs: Inputs, architecture: Architecture
) -> int:
    """Bytes for the output (Nq, Dv) and two numbers of each row, of each split."""
    splits = cuts_of(problem, heads).splits
    itemsize = 8 if problem.dtype.name == "float64" else 4
    rows = problem.batch_heads * problem.seqlen_q
    return splits * rows * (problem.value_dim + 2) * itemsize if splits > 1 else 0


def tiles(problem: AttentionProblem, architecture: Architecture, backward: bool = False) -> str:
    """The sizes of tiles, in words."""
    heads = heads_of(problem)
    cuts, kind = cuts_of(problem, heads), kind_of(problem, heads, "none", True)
    keys = "all keys" if cuts.splits == 1 else f"{cuts.split_keys} of {cuts.end - cuts.begin} keys"
    return f"{kind.rows} {'query' if kind.rows == 1 else 'queries'} x {keys} in a block"


def forward(
    problem: AttentionProblem,
    heads: Heads,
    inputs: Inputs,
    out: Matrices,
    logsumexp: Any,
    architecture: Architecture,
    workspace: Any = None,
) -> None:
    """Write the output and the logsumexp: see launch.py."""
    vectors = has_vectors(problem, (problem.head_dim, problem.value_dim), inputs.k, inputs.v)
    kind, cuts = kind_of(problem, heads, inputs.mask_kind, vectors), cuts_of(problem, heads)
    rows = problem.batch_heads * problem.seqlen_q
    whole, sums_start = cuts.splits == 1, cuts.splits * rows * problem.value_dim
    row_tiles = ceil_div(heads.group * problem.seqlen_q, kind.rows)
    launch(
        split_kernel(kind, whole),
        problem.batch_heads // heads.group * row_tiles * cuts.splits, WARPS * WARP,
        *inputs.arrays, out.array if whole else workspace, logsumexp if whole else workspace,
        *inputs.strides, out.strides, sizes_of(problem, heads), heads.group, cuts, rows,
        0 if whole else sums_start, problem.scale, inputs.words,
    )  # fmt: skip
    if not whole:
        launch(
            merge_kernel(problem.dtype.name), rows, MERGE_THREADS,
            workspace, out.array, logsumexp, out.strides,
            MergeSizes(heads.heads, problem.seqlen_q, problem.value_dim, rows, cuts.splits),
        )  # fmt: skip


# ----- for the compile tests -----


def instances() -> Iterator[Instance]:
    """Sizes, precisions, masks and numbers of rows; with one split, and with several."""
    for kind, one_split in (
        (DecodeKind("float16", 128, 128, "none", False, 8, 1), False),
        (DecodeKind("bfloat16", 64, 64, "none", False, 8, 1), True),
        (DecodeKind("float16", 128, 128, "bool", True, 8, 4), False),
        (DecodeKind("float32", 59, 59, "float32", True, 1, 4), False),
        (DecodeKind("float64", 256, 256, "none", True, 2, 2), True),
        (DecodeKind("float16", 64, 64, "none", False, 8, 1, example_functions()), False),
        (DecodeKind("float16", 64, 64, "bool", False, 8, 2, example_functions()), True),
    ):
        of = argument_types(kind.precision, kind.mask, kind.functions)
        functions = ", functions" if kind.functions else ""
        yield Instance(
            f"flash_decode[{kind.precision}, {kind.head_dim}, {kind.mask}, {kind.rows}{functions}]",
            split_kernel(kind, one_split),
            (
                *[of.array] * 3, of.mask, of.array if one_split else of.rows, of.rows,
                *[of.strides] * 5, of.sizes, types.int64, named_type(Cuts), types.int64,
                types.int64, types.float64, of.words,
            ),
        )  # fmt: skip
    for name in ("float16", "float64"):
        of = argument_types(name, "none")
        yield Instance(
            f"flash_decode_merge[{name}]",
            merge_kernel(name),
            (of.rows, of.array, of.rows, of.strides, named_type(MergeSizes)),
        )


__all__ = ["Cuts", "forward", "forward_workspace", "tiles", "why_not"]
