"""Dropout of a tile of scores in shared memory, in the kernels of ordinary arithmetic.

Shared memory has a tile of bits: of each call of the generator one number, whose eight bits say
which of the call's eight weights are kept (see philox.py). Of row i and column j it is bit
4 (j // 8 % 2) + 2 (i // 8 % 2) + j % 2.

A tile of scores has 4, 8 or a multiple of 16 rows and columns, and begins at a multiple of that.
One that has only second halves of 16 rows or columns finds its bits shifted to the first halves,
so that i and j may count from the tile's beginning. How the tensor cores' kernels do it is in
fragments/dropout.py.
"""

from __future__ import annotations

from functools import cache
from math import prod
from typing import Any

from ...gpu.runtime import cuda, device_function, precision, types
from ...philox import philox4x32
from .tiles import Blocks, Kind

philox = device_function(philox4x32)
_WORD, _HALF = types.uint64(0xFFFFFFFF), types.uint64(16)


def keep_shape(blocks: Blocks) -> tuple[int, int]:
    """Rows and columns of the tile of bits: of calls of the generator for a tile of scores."""
    m, n = blocks.block_m, blocks.block_n
    return m // 2 if m >= 16 else m, n // 4 if n >= 16 else n // 2


def keep_size(kind: Kind, blocks: Blocks) -> int:
    """Numbers of the tile of bits: none without dropout."""
    return prod(keep_shape(blocks)) if kind.dropout else 0


@device_function
def two_bits(word, threshold):
    """Which of a word's two weights are kept: 1 for that in an even column, 2 for the other."""
    exchanged = (word >> _HALF | word << _HALF) & _WORD
    bits = types.int32(1) if exchanged >= threshold else types.int32(0)
    return bits + (types.int32(2) if word >= threshold else types.int32(0))


@cache
def keep_maker(kind: Kind, blocks: Blocks, tile: int) -> Any:
    """Device function that writes which weights of a tile of scores are kept."""
    real, threads = precision(kind.precision).real, blocks.threads
    rows, columns = keep_shape(blocks)

    @device_function
    def make(memory, row0, key0, batch_head, dropout_of):
        key, threshold, _ = dropout_of
        first_row, first_column = row0 // 16 * 8 + row0 % 8, key0 // 16 * 4 + key0 % 8 // 2
        shift = types.int32(key0 // 8 % 2 * 4 + row0 // 8 % 2 * 2)
        for number in range(cuda.threadIdx.x, rows * columns, threads):
            words = philox(
                types.uint64(first_column + number % columns),
                types.uint64(first_row + number // columns),
                types.uint64(batch_head), types.uint64(0), key & _WORD, key >> types.uint64(32),
            )  # fmt: skip
            bits = two_bits(words[0], threshold) | two_bits(words[1], threshold) << types.int32(2)
            bits |= two_bits(words[2], threshold) << types.int32(4)
            bits |= two_bits(words[3], threshold) << types.int32(6)
            memory[tile + number] = real(bits >> shift)

    return make


@cache
def keep_factor(kind: Kind, blocks: Blocks, tile: int) -> Any:
    """Device function: keep_scale if the weight at (row, key) of the tile is kept, else 0."""
    real, (_, columns) = precision(kind.precision).real, keep_shape(blocks)

    @device_function
    def factor_of(memory, row, key, keep_scale):
        call = (row // 16 * 8 + row % 8) * columns + key // 16 * 4 + key % 8 // 2
        bit = key // 8 % 2 * 4 + row // 8 % 2 * 2 + key % 2
        bits = types.int32(memory[tile + call])
        return keep_scale if bits >> types.int32(bit) & types.int32(1) else real(0.0)

    return factor_of


__all__ = ["keep_factor", "keep_maker", "keep_shape", "keep_size"]
