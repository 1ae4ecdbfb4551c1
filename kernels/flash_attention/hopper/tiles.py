"""What the Hopper kernels are compiled for, and the sizes of their tiles.

A warpgroup, 128 threads, computes tiles of 64 rows. Warp w has rows 16 w ... 16 w + 15, which are a
`RegisterTile` ("Register Fragments for wgmma.mma_async.m64nNk16", PTX ISA, accumulator D).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

from ...gpu.ptx_hopper import cp_async_bulk_tensor_4d
from ...gpu.runtime import cuda, device_function, types
from ..launch import functions_of
from ..problem import AttentionProblem
from ..schedule import RULES
from ..scores import NO_FUNCTIONS, Functions, Masked, is_additive

NAME, ARCHITECTURE = "hopper", (9, 0)  # of the kernels, and the compute capability they are for
WARPGROUP = 128
ROWS = 64  # of a warpgroup's tile
COLUMNS = 64  # 16-bit numbers of a row of 128 bytes, what a swizzled tile has
HEAD_SIZES = (64, 96, 128, 192, 256)  # that are compiled; others are padded with zeros


@dataclass(frozen=True)
class Kind(Masked):
    """What a Hopper kernel is compiled for, beside the sizes of its tiles.

    Args:
        precision: "float16" or "bfloat16".
        head_dim: one of HEAD_SIZES, not less than the length of a query and of a key.
        value_dim: likewise of a value.
        mask: "none", "bool", or the name of the additive mask's dtype.
        dropout: whether weights are dropped.
        scaled_first: scores are scaled before the softmax, not within it: with an additive mask or
            a score function, and unless the problem says `scale_in_exponent`.
        banded: some queries do not see all keys: causal masks and windows.
        vectors: rows of the output come in whole pieces of 16 bytes.
        functions: the user's.
        is_sparse: there are lists of the tiles that are visited.

    """

    precision: str
    head_dim: int
    value_dim: int
    mask: str = "none"
    dropout: bool = False
    scaled_first: bool = False
    banded: bool = False
    vectors: bool = True
    functions: Functions = NO_FUNCTIONS
    is_sparse: bool = False


@dataclass(frozen=True)
class Blocks:
    """Sizes of the forward kernel's tiles.

    Args:
        warpgroups: that compute, 2 or 3; each has 64 queries.
        block_n: keys of a tile, a multiple of 16.
        stages: tiles of keys, and of values, that shared memory has room for.
        ping_pong: the warpgroups take turns in beginning products.
        overlap: a warpgroup's softmax runs beside its own product P V.

    """

    warpgroups: int
    block_n: int
    stages: int = 2
    ping_pong: bool = True
    overlap: bool = True

    @property
    def block_m(self) -> int:
        """Queries of a tile."""
        return ROWS * self.warpgroups

    @property
    def threads(self) -> int:
        """Of the block, with the warpgroup that loads."""
        return WARPGROUP * (self.warpgroups + 1)


def kind_of(
    problem: AttentionProblem,
    mask_kind: str,
    vectors: bool,
    functions: Functions = NO_FUNCTIONS,
    is_sparse: bool = False,
) -> Kind:
    """What the kernels for a problem are compiled for; the other arguments are fields of `Kind`."""
    scales = is_additive(mask_kind) or functions.score is not None
    lengths = problem.seqlen_q, problem.seqlen_k
    return Kind(
        precision=problem.dtype.name,
        head_dim=padded(problem.head_dim),
        value_dim=padded(problem.value_dim),
        mask=mask_kind,
        dropout=problem.dropout_p > 0,
        scaled_first=scales or not problem.scale_in_exponent,
        banded=not RULES.is_whole(0, lengths[0], 0, lengths[1], problem),
        vectors=vectors,
        functions=functions,
        is_sparse=is_sparse,
    )


def own_kind(problem: AttentionProblem) -> Kind:
    """The kind for a problem whose rows come in whole pieces."""
    return kind_of(
        problem, problem.mask_kind, True, functions_of(problem), problem.is_sparse
    )  # fmt: skip


def padded(size: int) -> int:
    """The compiled head size that holds `size` columns."""
    return next(n for n in HEAD_SIZES if n >= size)


def parts(size: int) -> int:
    """Tiles of COLUMNS columns that hold `size`."""
    return -(-size // COLUMNS)


def row_bytes(size: int) -> int:
    """Bytes of shared memory for a row of a tile."""
    return parts(size) * COLUMNS * 2


# ----- a thread's place -----


@device_function
def own_place():
    """A thread's first row and first column of its warpgroup's tile."""
    thread = types.int32(cuda.threadIdx.x) & types.int32(WARPGROUP - 1)
    lane = thread & types.int32(31)
    return (
        types.int32((thread >> types.int32(5)) * types.int32(16) + (lane >> types.int32(2))),
        types.int32((lane & types.int32(3)) * types.int32(2)),
    )


# ----- tiles in shared memory -----


@cache
def tile_loader(rows: int, columns: int) -> Any:
    """Device function `(target, tensor_map, barrier, row, head, batch)`: has the copy engine begin
    to bring a tile (rows, columns) from `row` on, panel by panel of 64 columns. What is beyond the
    matrix becomes zeros.
    """
    panels, panel_bytes, panel_columns = parts(columns), rows * COLUMNS * 2, COLUMNS

    @device_function
    def load(target, tensor_map, barrier, row, head, batch):
        for panel in range(panels):
            cp_async_bulk_tensor_4d(
                target + panel * panel_bytes, tensor_map, barrier, panel_columns * panel, row, head,
                batch,
            )  # fmt: skip

    return load


@cache
def ring(stages: int) -> Any:
    """Device function: of the n-th tile that goes through a ring of `stages` tiles, the place in
    the ring, and the parity of the place's barriers (0 for the first tile there, then 1, 0, ...).
    """
    size = stages

    @device_function
    def place_of(n):
        turn = types.uint32(n) // types.uint32(size)
        return types.uint32(types.uint32(n) - turn * types.uint32(size)), turn & types.uint32(1)

    return place_of


__all__ = [
    "ARCHITECTURE",
    "COLUMNS",
    "HEAD_SIZES",
    "NAME",
    "ROWS",
    "WARPGROUP",
    "Blocks",
    "Kind",
    "kind_of",
    "own_kind",
    "own_place",
    "padded",
    "parts",
    "ring",
    "row_bytes",
    "tile_loader",
]
