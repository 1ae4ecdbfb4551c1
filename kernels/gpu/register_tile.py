"""A tile of a matrix in the registers of a warp, and what attention does with it.

The tensor cores leave their sums so that lane t of a warp has of every 16 rows two, g = t // 4 and
g + 8, and of every 8 columns two neighbours, 2 (t % 4) and the next (`shared_layout.sums_place`).
It is the same for mma and for wgmma, whose warpgroup has a tile like this in each of its four
warps. A lane's part is a tuple of float32; four lanes together, a quad, have a row.

    scores = RegisterTile(block_n)
    row_max, scale_rows = scores.row_max, output.scale_rows

makes functions that a kernel calls by these names, so that it reads like the algorithm:

    m_new = row_max(s, m)                       # m_new = max(m, rowmax(S))
    o = scale_rows(o, alpha)                    # O = diag(alpha) O

They are `traced`: loops over the registers are unrolled while the kernel is compiled.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np

from .checked import one_of, whole
from .ptx import (
    cvt_rna_tf32_f32,
    mov_b32_halves,
    pack_pair,
    shfl_sync_bfly_f32,
    st_global_b16_if,
    st_global_b32_if,
    st_global_f32_if,
    st_global_v2_f32_if,
)
from .runtime import types
from .traced import maximum, select, traced


class Place(NamedTuple):
    """Where one of a lane's numbers is."""

    register: int
    own_row: int  # which of the lane's rows it is in
    row: int  # counted from the lane's first row
    column: int  # counted from the lane's first column


@dataclass(frozen=True)
class RegisterTile:
    """A tile of 16 * row_blocks rows of a warp.

    Args:
        columns: a multiple of 8.
        row_blocks: blocks of 16 rows; 1 for wgmma.

    A number "for each row" is a tuple of 2 * row_blocks, of the lane's rows.

    Raises:
        TypeError: a number that is not whole.
        ValueError: columns that are no multiple of 8, or no rows.

    """

    columns: int
    row_blocks: int = 1

    def __post_init__(self) -> None:
        whole("columns", self.columns, 8, step=8)
        whole("row_blocks", self.row_blocks, 1)

    @property
    def registers(self) -> int:
        """Of a lane."""
        return self.row_blocks * self.columns // 2

    @property
    def type(self) -> Any:
        """numba type of a lane's part."""
        return types.UniTuple(types.float32, self.registers)

    @property
    def rows_type(self) -> Any:
        """numba type of a number for each row."""
        return types.UniTuple(types.float32, 2 * self.row_blocks)

    def places(self) -> Iterator[Place]:
        """Of all of a lane's numbers, register by register."""
        for n in range(self.registers):
            block, rest = divmod(n, self.columns // 2)
            j, r, c = rest // 4, rest // 2 % 2, rest % 2
            yield Place(n, 2 * block + r, 16 * block + 8 * r, 8 * j + c)

    def register_at(self, own_row: int, column: int) -> int:
        """Which register has the number of a lane's row that lies `column` from its first one."""
        block, r = divmod(own_row, 2)
        return block * (self.columns // 2) + column // 8 * 4 + 2 * r + column % 8

    def _by_row(self, tile: Any) -> list[list[Any]]:
        rows: list[list[Any]] = [[] for _ in range(2 * self.row_blocks)]
        for place in self.places():
            rows[place.own_row].append(tile[place.register])
        return rows

    # ----- made once for a kernel -----

    @cached_property
    def zero(self) -> Any:
        """`zero()`: a tile of zeros."""
        count = self.registers

        @traced(self.type)
        def zero():
            return [np.float32(0)] * count

        return zero

    @cached_property
    def fill_rows(self) -> Any:
        """`fill_rows(x)`: x for each row."""
        return self.each_row(lambda x: x, types.float32)

    @cached_property
    def scale_rows(self) -> Any:
        """`scale_rows(tile, factors)`: diag(factors) tile."""
        return self.each(lambda x, factor: x * factor, self.type, self.rows_type)

    @cached_property
    def row_max(self) -> Any:
        """`row_max(tile, before)`: the largest of each row, and of what it was before. All lanes of
        a quad get the same.
        """

        @traced(self.rows_type, self.type, self.rows_type)
        def row_max(tile, before):
            found = []
            for numbers, largest in zip(self._by_row(tile), before, strict=True):
                other = numbers[0]
                for x, y in zip(numbers[::2], numbers[1::2], strict=True):
                    largest, other = maximum(largest, x), maximum(other, y)
                found.append(maximum(largest, other))  # two chains: half the time
            return _over_quad(found, maximum)

        return row_max

    @cached_property
    def own_row_sum(self) -> Any:
        """`own_row_sum(tile, before)`: the sum of the lane's own numbers of each row, plus what it
        was before. A sum over many tiles needs `quad_sum` once, in the end.
        """

        @traced(self.rows_type, self.type, self.rows_type)
        def own_row_sum(tile, before):
            rows = zip(self._by_row(tile), before, strict=True)
            return [_sum(numbers) + first for numbers, first in rows]

        return own_row_sum

    @cached_property
    def quad_sum(self) -> Any:
        """`quad_sum(rows)`: numbers for each row, summed over the four lanes that share it."""

        @traced(self.rows_type, self.rows_type)
        def quad_sum(rows):
            return _over_quad(rows, lambda a, b: a + b)

        return quad_sum

    @cached_property
    def shift(self) -> Any:
        """`shift(largest, scale)`: `shift_of` each row."""
        return self.each_row(shift_of, self.rows_type, types.float32)

    def to_operand(self, dtype: str, turing: bool = False) -> Any:
        """Function of a tile: its numbers, rounded, as the operand A of the next product.

        Of each block of 16 rows in turn, and of each step along the columns (16; 8 for tf32 and on
        Turing), the registers of A: a tuple of uint32. The columns 2q and 2q + 1 of a lane are q
        and q + 4 of A for tf32: the rows of B are to be read in the same order.

        Args:
            dtype: "float16", "bfloat16" or "tf32".
            turing: without the instruction that converts two at once.

        Raises:
            ValueError: another dtype.

        """
        one_of("dtype", dtype, ("float16", "bfloat16", "tf32"))
        words = self.registers if dtype == "tf32" else self.registers // 2

        @traced(types.UniTuple(types.uint32, words), self.type)
        def to_operand(tile):
            if dtype == "tf32":
                order = [4 * n + k for n in range(words // 4) for k in (0, 2, 1, 3)]
                return [cvt_rna_tf32_f32(tile[n]) for n in order]
            pack = pack_pair(dtype, turing)
            return [pack(tile[2 * n], tile[2 * n + 1]) for n in range(words)]

        return to_operand

    def each(self, function: Callable[..., Any], *kinds: Any) -> Any:
        """A function that gives a tile, number by number.

        Args:
            function: of one number from each argument; traced with the tile.
            kinds: types of the arguments: of a tile (`type`) it gets the number at that place, of a
                number for each row (`rows_type`) that of the row, of any other type the argument.

        """

        @traced(self.type, *kinds)
        def each(*arguments):
            given = list(zip(arguments, kinds, strict=True))
            return [
                function(*(
                    x[p.register] if kind == self.type
                    else x[p.own_row] if kind == self.rows_type
                    else x
                    for x, kind in given
                ))
                for p in self.places()
            ]  # fmt: skip

        return each

    def each_row(self, function: Callable[..., Any], *kinds: Any) -> Any:
        """A function that gives a number for each row, as `each` gives a tile."""

        @traced(self.rows_type, *kinds)
        def each_row(*arguments):
            given = list(zip(arguments, kinds, strict=True))
            return [
                function(*(x[r] if kind == self.rows_type else x for x, kind in given))
                for r in range(2 * self.row_blocks)
            ]

        return each_row

    def store(self, dtype: str, pairs: bool = True, turing: bool = False) -> Any:
        """`store(tile, addresses, valid, columns)`: to rows of global memory, rounded.

        `addresses` are those of the lane's first element of each row (uint64), `valid` says for
        each row whether it is written (booleans), and of the columns those below `columns`,
        counted from the lane's first, are (int32).

        Args:
            dtype: "float16", "bfloat16" or "float32".
            pairs: two elements at a time: the addresses are multiples of twice the element's size,
                and the number of columns is even.
            turing: as in `to_operand`.

        Raises:
            ValueError: another dtype.

        """
        one_of("dtype", dtype, ("float16", "bfloat16", "float32"))
        rows = 2 * self.row_blocks
        size = 4 if dtype == "float32" else 2
        put = _store_pair(dtype, turing) if pairs else _store_each(dtype, turing)

        @traced(
            types.void, self.type, types.UniTuple(types.uint64, rows),
            types.UniTuple(types.boolean, rows), types.int32,
        )  # fmt: skip
        def store(tile, addresses, valid, columns):
            for p in list(self.places())[::2]:
                address = addresses[p.own_row] + size * p.column
                inside = [valid[p.own_row] & (columns > p.column + c) for c in range(2)]
                put(address, inside, *tile[p.register : p.register + 2])

        return store


def shift_of(largest: Any, scale: Any) -> Any:
    """Within traced functions: scale * largest; 0 where there is no number yet: 2**(-inf - 0) is 0,
    not NaN. Also where the largest is infinite: then so is its power.
    """
    return select(largest - largest == 0.0, largest * scale, 0.0)


def _sum(numbers: list[Any]) -> Any:
    total = numbers[0]
    for x in numbers[1:]:
        total = total + x
    return total


def _over_quad(rows: Any, function: Callable[[Any, Any], Any]) -> list[Any]:
    """A number for each row, over the four lanes that share the row."""
    for mask in (1, 2):
        rows = [function(x, shfl_sync_bfly_f32(x, mask)) for x in rows]
    return list(rows)


def _store_pair(dtype: str, turing: bool) -> Callable[..., None]:
    def put(address: Any, inside: Any, low: Any, high: Any) -> None:
        if dtype == "float32":
            st_global_v2_f32_if(inside[0], address, [low, high])
        else:
            st_global_b32_if(inside[0], address, pack_pair(dtype, turing)(low, high))

    return put


def _store_each(dtype: str, turing: bool) -> Callable[..., None]:
    def put(address: Any, inside: Any, low: Any, high: Any) -> None:
        if dtype == "float32":
            for c, x in enumerate((low, high)):
                st_global_f32_if(inside[c], address + 4 * c, x)
            return
        for c, x in enumerate(mov_b32_halves(pack_pair(dtype, turing)(low, high))):
            st_global_b16_if(inside[c], address + 2 * c, x)

    return put


__all__ = ["Place", "RegisterTile", "shift_of"]
