"""FlashAttention on tensor cores by `mma.sync`, from Turing on: what to launch, and how.

The algorithm is in `mma/forward.py` and `mma/backward.py`; here are the sizes of their tiles, and
the host's side of a call. Nothing is allocated here.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

from ...gpu.runtime import SIMULATED, ceil_div, launch
from ..launch import (
    Architecture,
    Gradients,
    Heads,
    Inputs,
    Matrices,
    functions_of,
    scalars_of,
    sizes_of,
    tile_lists,
)
from ..problem import AttentionProblem
from ..scores import is_additive
from ..softmax import next_call
from ..tuning import SHORT, Numbers, choice
from .backward import backward_memory, key_value_kernel, query_kernel
from .delta import (
    DELTA_THREADS,
    delta_kernel,
    delta_team,
)
from .forward import forward_kernel, forward_memory
from .memory import copy_team
from .tiles import Kind, Tiles

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
# As the compiler names them.
ARCHITECTURES = {
    "sm_75": (7, 5), "sm_80": (8, 0), "sm_86": (8, 6), "sm_89": (8, 9), "sm_90a": (9, 0),
}  # fmt: skip


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


def kind_of(problem: AttentionProblem, mask_kind: str, architecture: Architecture) -> Kind:
    name = problem.dtype.name
    return Kind(
        problem.fp32_precision if name == "float32" else name,
        problem.head_dim, problem.value_dim, mask_kind, problem.dropout_p > 0,
        not problem.scale_in_exponent or is_additive(mask_kind), is_turing(architecture),
        functions_of(problem), problem.is_sparse,
    )  # fmt: skip


def is_turing(architecture: Architecture) -> bool:
    """Whether kernels go without cp.async, and with half the depth of a product."""
    return architecture < FIRST_WITH_ALL and not SIMULATED


# ----- sizes of tiles -----
#
# The first in a list that fits: in shared memory, and in registers, which hold a warp's sums.
# Addresses, fragments and the masks' bounds take about 60 of the 255. The order is that of the
# speed on an H200. The table of tuning.py goes before it.
#
# In these lists, tiles of eight warps are for head sizes beyond WIDE, where a block of four warps
# often leaves no room for another: eight hide more of each other's waiting, and read what passes by
# half as often.

FORWARD: tuple[Tiles, ...]
KEY_VALUE: tuple[Tiles, ...]
QUERY: tuple[Tiles, ...]
if SIMULATED:
    FORWARD = KEY_VALUE = QUERY = (Tiles(16, 16, 1, 2),)
else:
    FORWARD = (
        Tiles(128, 64, 4, 2, in_registers=True), Tiles(128, 64, 4, 2),
        Tiles(128, 64, 4, 2, lazy=True), Tiles(128, 32, 4, 2, lazy=True),
        Tiles(128, 64, 8, 2, lazy=True), Tiles(64, 64, 4, 2), Tiles(128, 32, 8, 2),
        Tiles(64, 32, 4, 2), Tiles(64, 64, 4, 1), Tiles(64, 32, 4, 1), Tiles(64, 16, 4, 1),
        Tiles(32, 16, 2, 1),
    )  # fmt: skip
    KEY_VALUE = (
        Tiles(128, 32, 4, 2), Tiles(64, 64, 4, 2), Tiles(64, 32, 4, 2), Tiles(64, 32, 4, 1),
        Tiles(64, 16, 4, 1), Tiles(128, 32, 8, 2, parts=2), Tiles(64, 32, 4, 2, parts=2),
        Tiles(64, 32, 4, 1, parts=2), Tiles(64, 16, 4, 1, parts=2), Tiles(32, 16, 2, 1, parts=2),
        Tiles(32, 16, 2, 1, parts=4), Tiles(16, 16, 1, 1, parts=2),
    )  # fmt: skip
    QUERY = (
        Tiles(128, 64, 4, 2), Tiles(128, 32, 4, 2), Tiles(128, 64, 8, 2), Tiles(128, 32, 8, 2),
        Tiles(64, 64, 4, 2), Tiles(64, 32, 4, 2), Tiles(64, 64, 4, 1), Tiles(64, 32, 4, 1),
        Tiles(64, 16, 4, 1), Tiles(32, 16, 2, 1),
    )  # fmt: skip
# To be measured for plain attention: arguments of `Tiles`.
CANDIDATES: dict[str, dict[int, tuple[Numbers, ...]]] = {
    "forward": {
        64: (
            (128, 64, 4, 2, True), (128, 64, 4, 2, True, 1, 1, True), (256, 64, 8, 2, True),
            (64, 64, 4, 2, True, 3), (64, 128, 4, 2, True), (128, 128, 8, 2, True),
        ),
        128: (
            (128, 64, 4, 2, False, 1, 1, True), (256, 64, 8, 2, False, 1, 1, True),
            (128, 32, 4, 2, False, 1, 1, True), (64, 64, 4, 2, True), (128, 64, 8, 2, True),
            (128, 128, 8, 2, True, 1, 1, True),
        ),
        256: (
            (128, 64, 8, 2, False, 1, 1, True), (128, 48, 8, 2, False, 1, 1, True),
            (128, 32, 8, 2), (128, 64, 8, 1, False, 1, 1, True), (64, 32, 4, 2),
            (64, 64, 4, 1, False, 1, 1, True),
        ),
    },
    "key_value": {
        64: (
            (128, 32, 4, 2), (256, 32, 8, 2), (64, 64, 4, 2), (64, 64, 4, 2, True),
            (64, 64, 4, 2, False, 3), (128, 64, 8, 2, True),
        ),
        128: (
            (64, 64, 4, 2), (128, 64, 8, 2), (128, 48, 8, 2), (128, 32, 8, 2), (64, 48, 4, 2),
            (64, 32, 4, 2),
        ),
        256: (
            (128, 32, 8, 2, False, 1, 2), (128, 64, 8, 1, False, 1, 2),
            (128, 48, 8, 1, False, 1, 2), (64, 32, 4, 2, False, 1, 2),
            (64, 32, 4, 1, False, 1, 2), (64, 16, 4, 2, False, 1, 2),
        ),
    },
    "query": {
        64: (
            (128, 64, 4, 2), (256, 64, 8, 2), (128, 32, 4, 2, True), (64, 64, 4, 2, True),
            (64, 64, 4, 2, True, 3), (128, 64, 8, 2, True),
        ),
        128: (
            (128, 32, 4, 2), (256, 32, 8, 2), (64, 64, 4, 2), (64, 64, 4, 2, True),
            (128, 64, 8, 2, True), (128, 32, 4, 1),
        ),
        256: (
            (128, 32, 8, 2), (128, 64, 8, 1), (128, 48, 8, 1), (64, 64, 4, 2), (64, 32, 4, 1),
            (64, 16, 4, 2),
        ),
    },
}  # fmt: skip
WIDE = 128  # columns
SUMS = 192  # of a lane at most, 4 bytes each
SUMS_OF_SOFTMAX = 144  # if all of them are rescaled while there are scores
SUMS_WITH_DROPOUT = 160  # of 16-bit numbers; the generator's words stand beside them
SUMS_WITH_MASK = 144  # of float32
SUMS_OF_TURING = 144  # for dK and dV: what is copied goes through registers
OWN = 32  # words of a warp's own operand in registers
SCORES_WITH_FUNCTIONS = 32
SCORES_WITH_MASK = 16  # of a lane, for each of which a number of the mask is on its way


def tiles_of(numbers: Numbers) -> Tiles:
    """The tiles that a row of the tuning table, or of CANDIDATES, stands for."""
    arguments: Any = numbers  # some of them are bools
    return Tiles(*arguments)


def can_be_copied(kind: Kind, tiles: Tiles, architecture: Architecture, size: int) -> bool:
    """Whether tiles of `size` bytes in all have room, and threads that share their rows."""
    for width in (kind.width, kind.value_width):
        at_once = tiles.threads // copy_team(kind, width)
        if not at_once or any(n > at_once and n % at_once for n in (tiles.rows, tiles.columns)):
            return False
        if width // tiles.parts % 16:
            return False
    return size <= MEMORY.get(architecture, LITTLE_MEMORY)


def _fits(kind: Kind, tiles: Tiles, architecture: Architecture, size: int, sums: int) -> bool:
    """Whether tiles of `size` bytes in all, and `sums` numbers of a lane, can be."""
    if not can_be_copied(kind, tiles, architecture, size):
        return False
    most = SUMS
    if kind.dropout:
        most = SUMS_WITH_DROPOUT
    scores = tiles.row_blocks * tiles.columns // 2
    if kind.functions and scores > SCORES_WITH_FUNCTIONS:
        return False
    if kind.mask != "none":
        if scores > SCORES_WITH_MASK:
            return False
        most = SUMS_WITH_MASK if kind.itemsize == 4 else most
    return sums <= most


def _scores(kind: Kind) -> int:
    """Numbers that a backward kernel keeps of a score: S, dP, and a score function's slope."""
    return 2 + (kind.functions.score is not None)


def _first(
    choices: tuple[Tiles, ...],
    kind: Kind,
    measured: Numbers | None,
    fits: Callable[[Tiles], bool],
) -> Tiles:
    """The tiles that were measured to be the fastest, or else the first of the choices.

    What was measured is for 16-bit numbers without mask and dropout: to these it may leave no
    registers.
    """
    if SIMULATED:
        return choices[0]
    plain = kind == Kind(kind.precision, kind.head_dim, kind.value_dim, "none", False, False, False)
    if measured and plain and kind.width == kind.value_width and fits(tiles_of(measured)):
        return tiles_of(measured)
    most = 8 if max(kind.width, kind.value_width) > WIDE else 4
    return next(tiles for tiles in choices if tiles.warps <= most and fits(tiles))


@cache
def forward_tiles(
    kind: Kind, architecture: Architecture, causal: bool = False, seqlen_q: int = SHORT + 1
) -> Tiles:
    """The forward kernel's tiles."""

    def fits(tiles: Tiles) -> bool:
        sums = tiles.row_blocks * (kind.value_width + tiles.columns) // 2
        three = kind.numbers == "tf32x3" and kind.mask != "none"  # with parts of both operands
        if not tiles.lazy and sums > SUMS_OF_SOFTMAX - 8 * three:
            return False
        own = tiles.row_blocks * kind.width * kind.itemsize // 8
        if tiles.in_registers and (kind.dropout or own > OWN):
            return False
        return _fits(kind, tiles, architecture, forward_memory(kind, tiles).size, sums)

    measured = choice(NAME, "forward", architecture, kind.width, causal, seqlen_q)
    return _first(FORWARD, kind, measured, fits)


@cache
def backward_tiles(
    kind: Kind, architecture: Architecture, causal: bool = False, seqlen_q: int = SHORT + 1
) -> tuple[Tiles, Tiles]:
    """The tiles of the kernel for dK and dV, and of that for dQ."""

    def key_value_fits(tiles: Tiles) -> bool:
        widths = (kind.width + kind.value_width) // tiles.parts
        sums = tiles.row_blocks * (widths + _scores(kind) * tiles.columns) // 2
        if kind.turing and sums > SUMS_OF_TURING - 16 * (tiles.warps < 4):
            return False
        return _fits(kind, tiles, architecture, backward_memory(kind, tiles, True).size, sums)

    def query_fits(tiles: Tiles) -> bool:
        sums = tiles.row_blocks * (kind.width + _scores(kind) * tiles.columns) // 2
        return _fits(kind, tiles, architecture, backward_memory(kind, tiles, False).size, sums)

    for_keys, for_queries = (
        choice(NAME, kernel, architecture, kind.width, causal, seqlen_q)
        for kernel in ("key_value", "query")
    )
    return (
        _first(KEY_VALUE, kind, for_keys, key_value_fits),
        _first(QUERY, kind, for_queries, query_fits),
    )


def _choosers(
    problem: AttentionProblem, mask_kind: str, architecture: Architecture
) -> tuple[Kind, Architecture, bool, int]:
    """What tiles are chosen by."""
    kind = kind_of(problem, mask_kind, architecture)
    return kind, architecture, problem.right is not None, problem.seqlen_q


def block_sizes(
    problem: AttentionProblem, architecture: Architecture, backward: bool = False
) -> dict[str, tuple[int, int]]:
    """Queries and keys of a tile, by what a kernel computes."""
    of_problem = _choosers(problem, problem.mask_kind, architecture)
    if not backward:
        found = forward_tiles(*of_problem)
        return {"output": (found.rows, found.columns)}
    for_keys, for_queries = backward_tiles(*of_problem)
    return {
        "dK and dV": (for_keys.columns, for_keys.rows),
        "dQ": (for_queries.rows, for_queries.columns),
    }


def tiles(problem: AttentionProblem, architecture: Architecture, backward: bool = False) -> str:
    """The sizes of the tiles, for people."""
    of_problem = _choosers(problem, problem.mask_kind, architecture)
    if not backward:
        return _in_words(forward_tiles(*of_problem), "queries", "keys")
    for_keys, for_queries = backward_tiles(*of_problem)
    parts = f" in {for_keys.parts} parts" * (for_keys.parts > 1)
    return (
        f"dK and dV{parts} {_in_words(for_keys, 'keys', 'queries')}; "
        f"dQ {_in_words(for_queries, 'queries', 'keys')}"
    )


def _in_words(tiles: Tiles, rows: str, columns: str) -> str:
    stages = "two stages" if tiles.stages == 2 else "one stage"
    return f"{tiles.rows} {rows} x {tiles.columns} {columns}, {tiles.warps} warps, {stages}"


# ----- launches -----


def forward(
    problem: AttentionProblem,
    heads: Heads,
    inputs: Inputs,
    out: Matrices,
    logsumexp: Any,
    rows: Any,
    architecture: Architecture,
    blocks: Tiles | None = None,
) -> None:
    """Write the output, the logsumexp and rows: see launch.py."""
    of_problem = _choosers(problem, inputs.mask_kind, architecture)
    kind, tiles = of_problem[0], blocks or forward_tiles(*of_problem)
    launch(
        forward_kernel(kind, tiles),
        ceil_div(problem.seqlen_q, tiles.rows) * problem.batch_heads, tiles.threads,
        *inputs.arrays, inputs.offset, out.array, logsumexp, rows, *inputs.strides, out.strides,
        sizes_of(problem, heads), *scalars_of(problem), inputs.words,
        tile_lists(problem, inputs, (tiles.rows, tiles.columns)),
        shared_bytes=forward_memory(kind, tiles).size,
    )  # fmt: skip


def launch_delta(
    problem: AttentionProblem,
    heads: Heads,
    kind: Kind,
    out: Matrices,
    rows: Any,
    grad_out: Matrices,
    grad_logsumexp: Any,
    workspace: tuple[Any, Any, Any],
    call: int,
) -> None:
    """Write delta, L and rest of each row; `call` is the number of this call, see `next_call`."""
    count = problem.batch_heads * problem.seqlen_q
    launch(
        delta_kernel(kind, grad_logsumexp is not None),
        ceil_div(count, DELTA_THREADS // delta_team(kind)[0]), DELTA_THREADS,
        out.array, grad_out.array, rows, rows if grad_logsumexp is None else grad_logsumexp,
        *workspace, call, out.strides, grad_out.strides, heads.heads, problem.seqlen_q, count,
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
    blocks: tuple[Tiles, Tiles] | None = None,
) -> None:
    """Write the gradients of queries, keys and values: see launch.py."""
    of_problem = _choosers(problem, inputs.mask_kind, architecture)
    kind, (for_keys, for_queries) = of_problem[0], blocks or backward_tiles(*of_problem)
    sizes, scalars = sizes_of(problem, heads), scalars_of(problem)
    (delta, shift, rest), call = gradients.workspace, next_call()
    launch_delta(
        problem, heads, kind, out, rows, grad_out, grad_logsumexp, gradients.workspace, call
    )
    read = (*inputs.arrays, inputs.offset, grad_out.array, shift, delta, rest)
    strides = (*inputs.strides, grad_out.strides)
    dq, dk, dv, ds = gradients[:4]
    key_tiles = ceil_div(problem.seqlen_k, for_keys.rows) * for_keys.parts
    launch(
        key_value_kernel(kind, for_keys), key_tiles * (problem.batch_heads // heads.group),
        for_keys.threads, *read, dk.array, dv.array, call, *strides, dk.strides, dv.strides, sizes,
        heads.group, *scalars, inputs.words,
        tile_lists(problem, inputs, (for_keys.columns, for_keys.rows), transposed=True),
        shared_bytes=backward_memory(kind, for_keys, True).size,
    )  # fmt: skip
    launch(
        query_kernel(kind, for_queries, ds is not None),
        ceil_div(problem.seqlen_q, for_queries.rows) * problem.batch_heads, for_queries.threads,
        *read, dq.array, delta if ds is None else ds, *strides, dq.strides, sizes, *scalars,
        inputs.words, tile_lists(problem, inputs, (for_queries.rows, for_queries.columns)),
        shared_bytes=backward_memory(kind, for_queries, False).size,
    )  # fmt: skip


__all__ = [
    "NAME",
    "ROW_ALIGNMENT",
    "Tiles",
    "backward",
    "backward_tiles",
    "block_sizes",
    "forward",
    "forward_tiles",
    "tiles",
    "why_not",
]
