"""Where the elements of a matrix lie: in the registers of a warp, and in shared memory.

All of it is arithmetic with whole numbers, so that it runs anywhere: while code is generated, in a
test, at a prompt, and what concerns a lane in a kernel, too (decorated with `device_function`):

    >>> print(fragment_table("sums"))

**Registers.** A fragment is what one lane (a thread of a warp) has of a matrix. For every kind
there is a function from the lane and the number of its element to (row, column), after the figures
of the PTX ISA, 9.7.14.5 (mma) and 9.7.15.5 (wgmma).

**Shared memory.** The tensor cores read eight rows of 16 bytes at a time. Rows of 128 bytes, the
width of the memory's 32 banks, would have all eight in the same four banks. So the copy engine
swizzles: of a row's eight pieces of 16 bytes, piece p is put at place p ^ (row % 8), and each such
column of eight pieces covers all banks. A matrix with longer rows is cut into panels of 64 columns
(128 bytes), one after the other, each with all rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from .checked import checked, whole

PIECE = 16  # bytes that move together
PANEL = 128  # bytes of a row of a swizzled panel
REPEAT = 1024  # bytes after which the swizzle repeats: panels begin at multiples of it
SWIZZLE_CODES = {128: 1, 64: 2, 32: 3}  # wgmma's, by the bytes of a row

# ----- fragments -----


def sums_place(lane: int, n: int) -> tuple[int, int]:
    """(row, column) of a lane's n-th sum: of mma's C and D, and of a warp's rows of wgmma's D.

    16 rows and any multiple of 8 columns; n = 4 j + 2 r + c is row lane // 4 + 8 r, column
    8 j + 2 (lane % 4) + c.
    """
    j, r, c = n // 4, n // 2 % 2, n % 2
    return lane // 4 + 8 * r, 8 * j + 2 * (lane % 4) + c


def a_place(lane: int, n: int) -> tuple[int, int]:
    """(row, k) of a lane's n-th 16-bit element of A, two to a register: mma's m16n8k16 (8 elements)
    and m16n8k8 (the first 4), and a warp's rows of wgmma's A.
    """
    pair, c = n // 2, n % 2
    return lane // 4 + 8 * (pair % 2), 8 * (pair // 2) + 2 * (lane % 4) + c


def b_place(lane: int, n: int) -> tuple[int, int]:
    """(k, column) of a lane's n-th 16-bit element of B: m16n8k16 (4) and m16n8k8 (the first 2)."""
    pair, c = n // 2, n % 2
    return 8 * pair + 2 * (lane % 4) + c, lane // 4


def a_place_tf32(lane: int, n: int) -> tuple[int, int]:
    """(row, k) of a lane's n-th element of A of m16n8k8 for tf32, one to a register."""
    return lane // 4 + 8 * (n % 2), lane % 4 + 4 * (n // 2)


def b_place_tf32(lane: int, n: int) -> tuple[int, int]:
    """(k, column) of a lane's n-th element of B of m16n8k8 for tf32."""
    return lane % 4 + 4 * n, lane // 4


FRAGMENTS: dict[str, tuple[Callable[[int, int], tuple[int, int]], int, tuple[int, int]]] = {
    "sums": (sums_place, 4, (16, 8)),
    "a": (a_place, 8, (16, 16)),
    "b": (b_place, 4, (16, 8)),
    "a tf32": (a_place_tf32, 4, (16, 8)),
    "b tf32": (b_place_tf32, 2, (8, 8)),
}


def fragment_table(kind: str) -> str:
    """Which lane has each element of a matrix, and as its how many-th: "T5:2" is lane 5's third.

    Args:
        kind: "sums", "a", "b" (of 16-bit numbers), "a tf32" or "b tf32".

    Raises:
        ValueError: there is no such fragment.

    """
    if kind not in FRAGMENTS:
        raise ValueError(f"fragments are {', '.join(FRAGMENTS)}; got {kind!r}")
    place, count, (rows, columns) = FRAGMENTS[kind]
    owner = {place(lane, n): f"T{lane}:{n}" for lane in range(32) for n in range(count)}
    return "\n".join(
        " ".join(f"{owner[row, column]:>5}" for column in range(columns)) for row in range(rows)
    )


# ----- what ldmatrix is told -----
#
# ldmatrix.x4 loads four matrices of 8 x 8; lane 8 m + r gives the address of row r of matrix m. So
# that matrix m becomes a fragment's register m, the lanes point at these (row, column) of a tile.


def ldmatrix_a(lane: int) -> tuple[int, int]:
    """Of a tile (16 rows, 16 k): the registers are those of A."""
    return lane % 16, lane // 16 * 8


def ldmatrix_b(lane: int) -> tuple[int, int]:
    """Of a tile (16 columns of B, 16 k), such as K in Q K^T: the registers are B's two for columns
    0-7, then B's two for columns 8-15.
    """
    return lane % 8 + lane // 16 * 8, lane // 8 % 2 * 8


def ldmatrix_b_trans(lane: int) -> tuple[int, int]:
    """With .trans, of a tile (16 k, 16 columns of B), such as V in P V: the same registers."""
    return lane % 16, lane // 16 * 8


def ldmatrix_a_trans(lane: int) -> tuple[int, int]:
    """With .trans, of a tile (16 k, 16 rows of A), such as P in P^T dO: the registers are A's."""
    return lane % 8 + lane // 16 * 8, lane // 8 % 2 * 8


# ----- swizzled tiles -----


def swizzle(offset: int, width: int = PANEL) -> int:
    """Where the copy engine, and wgmma, put the byte `offset` of rows of `width` bytes.

    Args:
        offset: from an address that is a multiple of 8 * width.
        width: 128, 64 or 32: the 3, 2 or 1 bits from bit 4 on (the piece in the row) are changed by
            those from bit 7 on.

    Raises:
        ValueError: another width.

    """
    checked("width", width, width in SWIZZLE_CODES, "128, 64 or 32")
    pieces = width // PIECE - 1
    return offset ^ (((offset >> 7) & pieces) << 4)


def tile_offset(row: int, column: int, rows: int) -> int:
    """The byte at which element (row, column) of a tile of `rows` rows of 16-bit numbers begins, as
    the copy engine leaves it in panels of 64 columns with the 128-byte swizzle.

    Raises:
        ValueError: rows that are no multiple of 8, or an element that is not in the tile.

    """
    checked("rows", rows, rows > 0 and rows % 8 == 0, "a multiple of 8")
    checked("(row, column)", (row, column), 0 <= row < rows and column >= 0, f"row < {rows}")
    panel, byte = column // 64, column % 64 * 2
    return panel * rows * PANEL + swizzle(row * PANEL + byte)


# ----- wgmma's operands in shared memory -----


def descriptor(leading: int = PIECE, stride: int = REPEAT, width: int = PANEL) -> int:
    """wgmma's description of a matrix in shared memory, but for its address (PTX ISA, 9.7.15.5.1).

    A kernel adds the address: `uint64(descriptor(...)) | uint64(address >> 4)`.

    Args:
        leading: where wgmma reads along the rows of panels (operand transposed), bytes from one
            panel to the next; else it has no meaning.
        stride: bytes from 8 rows of a panel to the next 8.
        width: bytes of a panel's row, and of the swizzle: 128, 64 or 32.

    Raises:
        ValueError: a distance that is no multiple of 16 or too large, another width.

    """
    if width not in SWIZZLE_CODES:
        raise ValueError(f"rows of a panel have 128, 64 or 32 bytes, got {width}")
    for name, distance in (("leading", leading), ("stride", stride)):
        if distance % PIECE or not 0 <= distance < 1 << 18:
            raise ValueError(f"{name} is a multiple of 16 below 2**18, got {distance}")
    return SWIZZLE_CODES[width] << 62 | (stride >> 4) << 32 | (leading >> 4) << 16


def panels_descriptor(rows: int) -> int:
    """Of a tile of `rows` rows in 128-byte panels: the same for either direction.

    Raises:
        TypeError: `rows` is no whole number.
        ValueError: it is no multiple of 8, or too large.

    """
    whole("rows", rows, 8, 2040, step=8)
    return descriptor(leading=rows * PANEL)


def steps_along(depth: int, rows: int) -> tuple[int, ...]:
    """Byte offsets of wgmma's steps of 16 along the rows of a tile (rows, depth) in panels: Q and K
    in Q K^T.

    Raises:
        TypeError: a number that is not whole.
        ValueError: rows that are no multiple of 8, or a depth that is none of 16.

    """
    whole("rows", rows, 8, step=8)
    return tuple(k // 64 * rows * PANEL + k % 64 * 2 for k in _steps(depth))


def steps_down(depth: int) -> tuple[int, ...]:
    """Byte offsets of wgmma's steps of 16 down the rows of a tile (depth, columns) in panels: V in
    P V, whose descriptor is transposed.

    Raises:
        TypeError: the depth is no whole number.
        ValueError: it is no multiple of 16.

    """
    return tuple(k * PANEL for k in _steps(depth))


def _steps(depth: int) -> Iterator[int]:
    whole("depth", depth, 16, step=16)  # wgmma takes 16 of a 16-bit number at a time
    return iter(range(0, depth, 16))
