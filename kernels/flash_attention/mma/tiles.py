"""Products of small matrices on the tensor cores (`mma.sync`), and how their operands lie.

A warp computes `mma` tiles of 16 x 8 sums; several of them, 16 * row_blocks rows by any number of
columns, make a `RegisterTile`: a tuple of float32, of which the place 4 (i * blocks + j) begins the
four of the row block i and the column block j (8 columns), `blocks` of which are in a row.

Operands are read from shared memory by `ldmatrix`: matrices of 8 rows of 16 bytes, four at a time.
A step along the depth of a product is 32 bytes of a row: 16 numbers of 16 bits, 8 of float32.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

from ...gpu.ptx import (
    cvt_rna_tf32_f32,
    ld_shared_b32,
    ldmatrix,
    mma,
    opaque,
    pack_pair,
)
from ...gpu.register_tile import RegisterTile
from ...gpu.runtime import cuda, device_function, precision, types
from ...gpu.traced import float_of, i32, traced, word_of
from ..scores import NO_FUNCTIONS, Functions, Masked

PIECE = 16  # bytes that one instruction copies; a row of an 8 x 8 matrix
DEPTH = 32  # bytes of a row that one step of a product takes


@dataclass(frozen=True)
class Kind(Masked):
    """What a kernel is compiled for, beside the sizes of its tiles.

    Args:
        numbers: "float16", "bfloat16", or of float32 "tf32" (rounded to 11 bits) or "tf32x3" (three
            products of two such parts, which give float32's accuracy).
        head_dim: D, the length of a query and of a key.
        value_dim: Dv, the length of a value.
        mask: "none", "bool", or the name of the additive mask's dtype.
        dropout: whether weights are dropped.
        scaled_first: scores are scaled before the softmax, not within it: with an additive mask,
            and unless the problem says `scale_in_exponent`.
        turing: no cp.async, and products of half the depth, as on compute capability 7.5.
        functions: the user's.
        is_sparse: there are lists of the tiles that are visited.

    """

    numbers: str
    head_dim: int
    value_dim: int
    mask: str
    dropout: bool
    scaled_first: bool
    turing: bool
    functions: Functions = NO_FUNCTIONS
    is_sparse: bool = False

    @property
    def precision(self) -> str:
        """Name of the dtype of query, key and value."""
        return "float32" if self.numbers.startswith("tf32") else self.numbers

    @property
    def approximate(self) -> bool:
        """Whether functions may be as exact as numbers of 16 bits, and no more."""
        return self.itemsize == 2

    @property
    def exponent_unit(self) -> float:
        """What scores that a score function gave are multiplied by in the softmax; 0 without."""
        return 0.0 if self.functions.score is None else self.unit_of_results

    @property
    def itemsize(self) -> int:
        """Bytes of an element."""
        return int(precision(self.precision).storage.itemsize)

    @property
    def lanes(self) -> int:
        """Elements of a piece."""
        return PIECE // self.itemsize

    @property
    def width(self) -> int:
        """Columns of tiles of queries and keys: D, padded with zeros to a multiple of 16."""
        return self._padded(self.head_dim)

    @property
    def value_width(self) -> int:
        """Columns of tiles of values and outputs."""
        return self._padded(self.value_dim)

    def _padded(self, columns: int) -> int:
        # Wide gradients are computed in two parts.
        unit = 16 if max(self.head_dim, self.value_dim) <= 128 else 32
        return max(-(-columns // unit), 1) * unit

    def step(self, width: int) -> int:
        """Bytes from a row of a tile in shared memory to the next: an odd number of pieces, so that
        the eight rows of a matrix lie in different banks.
        """
        return width * self.itemsize + PIECE


@dataclass(frozen=True)
class Tiles:
    """Sizes of a block's tiles.

    Args:
        rows: of the tile that a block owns: queries, or in the kernel for dK and dV keys.
        columns: of the tiles that pass by: keys, or queries.
        warps: of the block; each owns rows / warps rows, a multiple of 16.
        stages: tiles in shared memory that pass by: with 2 the next one is on its way meanwhile.
        in_registers: the warp's own operands stay in registers.
        at_once: blocks that a multiprocessor's registers are to be enough for.
        parts: of the gradients' columns, of which a block computes one.
        lazy: the output is rescaled only where a row's maximum has grown.

    """

    rows: int
    columns: int
    warps: int
    stages: int
    in_registers: bool = False
    at_once: int = 1
    parts: int = 1
    lazy: bool = False

    @property
    def threads(self) -> int:
        """Of the block."""
        return 32 * self.warps

    @property
    def row_blocks(self) -> int:
        """Row blocks of a warp."""
        return self.rows // (16 * self.warps)


# ----- products of fragments -----


def _parts(kind: Kind, words: Any) -> list[Any]:
    """The fragments whose products are to be added up: one, but for tf32x3."""
    if not kind.numbers.startswith("tf32"):
        return [words]
    numbers = [float_of(x) for x in words]
    high = [cvt_rna_tf32_f32(x) for x in numbers]
    if kind.numbers == "tf32":
        return [high]
    rest = [x - float_of(h) for x, h in zip(numbers, high, strict=True)]
    return [high, [cvt_rna_tf32_f32(x) for x in rest]]


def _multiply(kind: Kind, sums: Any, a: list[Any], b: list[Any], transposed: bool = False) -> Any:
    """Four sums plus the product of A's (16 x DEPTH bytes) and B's (8 x DEPTH bytes) parts.

    `transposed`: each sum gets the bits that it has in the product of B and A.
    """
    if kind.itemsize == 4:
        product = mma("m16n8k8", "tf32")
        if kind.numbers == "tf32x3":
            # The small ones first; that of the two small parts is below float32's last bit.
            pairs = [(a[1], b[0]), (a[0], b[1])]
            for x, y in reversed(pairs) if transposed else pairs:
                sums = product(sums, x, y)
        return product(sums, a[0], b[0])
    if kind.turing:
        product = mma("m16n8k8", "float16")
        return product(product(sums, a[0][:2], b[0][:1]), a[0][2:], b[0][1:])
    return mma("m16n8k16", kind.numbers)(sums, a[0], b[0])


def _as_operand(kind: Kind, tile: Any, blocks: int, i: int, k: int) -> list[Any]:
    """The step k along the columns of row block i of a tile of sums, as the operand A.

    In float32 the columns 2q and 2q + 1 of a lane stand where the operand has q and q + 4: the rows
    of B are read in the same order (`_across`).
    """
    if kind.itemsize == 4:
        first = 4 * (i * blocks + k)
        return [word_of(tile[first + n]) for n in (0, 2, 1, 3)]
    first, pack = 4 * (i * blocks + 2 * k), pack_pair(kind.numbers, kind.turing)
    return [pack(tile[first + n], tile[first + n + 1]) for n in (0, 2, 4, 6)]


def _across(kind: Kind, place: Any, k: int, j: int, step: int) -> list[Any]:
    """B's fragments of the step k along a tile's rows, of its column blocks j and j + 1."""
    if kind.itemsize == 2:
        words = ldmatrix((16 * k * step + PIECE * j,), trans=True)(place)
        return [words[:2], words[2:]]
    first = 8 * k * step + 32 * j
    return [
        [ld_shared_b32(place + (first + 32 * n + c * step)) for c in range(2)] for n in range(2)
    ]


# ----- which tile -----


@traced(types.UniTuple(types.int32, 2), types.uint32, types.uint32)
def divide(number, by):
    """Quotient and remainder, in 32 bits: numba would take 64, which the GPU has no division of."""
    return [i32(number // by), i32(number % by)]


@device_function
def block_number():
    """cuda.blockIdx.x, anew: what a kernel's end makes of it is not kept from its beginning."""
    return opaque(types.uint32(cuda.blockIdx.x))


@device_function
def thread_number():
    """cuda.threadIdx.x, anew."""
    return types.int32(opaque(types.uint32(cuda.threadIdx.x)))


# ----- where a lane reads -----


@cache
def lane_places(kind: Kind) -> Any:
    """Device functions of a tile's step: where a lane reads, in bytes from the tile's beginning.

    `own(step)`: rows of A, or of a 16-bit B whose depth goes down the rows. `others(step)`: rows of
    B whose depth goes along them. `across(step)`: B whose depth goes down the rows.
    """
    wide = kind.itemsize == 4

    @device_function
    def own(step):
        lane = cuda.threadIdx.x % 32
        return types.uint32(lane % 16 * step + lane // 16 * 16)

    @device_function
    def others(step):
        lane = cuda.threadIdx.x % 32
        return types.uint32((lane % 8 + lane // 16 * 8) * step + lane // 8 % 2 * 16)

    @device_function
    def across(step):
        lane = cuda.threadIdx.x % 32
        if wide:
            return types.uint32(lane % 4 * 2 * step + lane // 4 * 4)
        return own(step)

    return own, others, across


# ----- products of tiles -----


def words_type(kind: Kind, row_blocks: int, width: int) -> Any:
    """numba type of a warp's rows of an operand A in registers."""
    return types.UniTuple(types.uint32, row_blocks * width * kind.itemsize // DEPTH * 4)


@cache
def load_rows(kind: Kind, row_blocks: int, width: int) -> Any:
    """Traced `(place)`: a warp's rows of an operand A, for `multiply_rows`."""
    steps, step = width * kind.itemsize // DEPTH, kind.step(width)

    @traced(words_type(kind, row_blocks, width), types.uint32)
    def load(place):
        return [
            word
            for k in range(steps)
            for i in range(row_blocks)
            for word in ldmatrix((16 * i * step + DEPTH * k,))(place)
        ]

    return load


@cache
def multiply_rows(
    kind: Kind,
    row_blocks: int,
    columns: int,
    width: int,
    in_registers: bool,
    transposed: bool = False,
) -> Any:
    """Traced `(a, b)`: the tile A B^T of sums, from 16 * row_blocks rows of A and `columns`
    rows of B, of `width` numbers each; `transposed`: with the bits that B A^T has.

    `a` is where the lane reads A, or what `load_rows` gave; b is where it reads B (`lane_places`).
    """
    steps, step, blocks = width * kind.itemsize // DEPTH, kind.step(width), columns // 8
    given = words_type(kind, row_blocks, width) if in_registers else types.uint32

    @traced(RegisterTile(columns, row_blocks).type, given, types.uint32)
    def run(a, b):
        sums = [[0.0] * 4] * (row_blocks * blocks)
        for k in range(steps):
            own = []
            for i in range(row_blocks):
                first = 4 * (k * row_blocks + i)
                words = (
                    a[first : first + 4]
                    if in_registers
                    else ldmatrix((16 * i * step + DEPTH * k,))(a)
                )
                own.append(_parts(kind, words))
            for j in range(0, blocks, 2):
                words = ldmatrix((8 * j * step + DEPTH * k,))(b)
                for n in range(2):
                    other = _parts(kind, words[2 * n : 2 * n + 2])
                    for i in range(row_blocks):
                        at = i * blocks + j + n
                        sums[at] = _multiply(kind, sums[at], own[i], other, transposed)
        return [x for four in sums for x in four]

    return run


@cache
def multiply_columns(kind: Kind, row_blocks: int, depth: int, width: int, step: int) -> Any:
    """Traced `(sums, tile, b)`: sums + tile B, from a tile of `depth` columns and as many rows of
    B, of which `width` numbers are multiplied, in rows `step` bytes apart. `b` is where the lane
    reads B.
    """
    of_step = DEPTH // kind.itemsize
    blocks, depth_blocks = width // 8, depth // 8
    out = RegisterTile(width, row_blocks).type

    @traced(out, out, RegisterTile(depth, row_blocks).type, types.uint32)
    def run(sums, tile, b):
        fours = [sums[4 * n : 4 * n + 4] for n in range(row_blocks * blocks)]
        for k in range(depth // of_step):
            own = [
                _parts(kind, _as_operand(kind, tile, depth_blocks, i, k)) for i in range(row_blocks)
            ]
            for j in range(0, blocks, 2):
                for n, words in enumerate(_across(kind, b, k, j, step)):
                    other = _parts(kind, words)
                    for i in range(row_blocks):
                        at = i * blocks + j + n
                        fours[at] = _multiply(kind, fours[at], own[i], other)
        return [x for four in fours for x in four]

    return run


__all__ = [
    "Kind",
    "Tiles",
    "block_number",
    "divide",
    "lane_places",
    "load_rows",
    "multiply_columns",
    "multiply_rows",
    "thread_number",
]
