"""Philox 4x32-10, a counter-based random number generator, and the dropout masks made with it.

"Parallel Random Numbers: As Easy as 1, 2, 3" (Salmon, Moraes, Dror, Shaw, SC 2011). A number is a
pure function of a key and a counter, so any tile of a dropout mask can be made anywhere, at any
time, in any order: the forward pass, the backward pass, the CPU, the GPU and a test all see the
same mask. The key is the 64-bit seed; an entry is kept iff its 32-bit number is at least
round(dropout_p * 2**32).

**A vector's mask.** Entry i has word i % 4 of the counter (i // 4, 0, 0, 0).

**Attention's mask.** The generator is what dropout costs, so a call's four words are made to serve
eight weights: a word is the number of one weight, and with its two halves exchanged that of
another. Each number is uniform; of two weights that share a word, the one's first half is the
other's second half, which matters to a threshold once in 2**16 times (and so to a dropout_p that
is itself not far above 2**-16). The eight weights are those
that a lane has in its registers of a 16 x 16 tile of scores on tensor cores ("Matrix Fragments for
mma.m16n8k16", PTX ISA): two rows, 8 apart, and of each 8 columns two neighbours. So row i and
column j of head h have

    the counter     (4 (j // 16) + j % 8 // 2,  8 (i // 16) + i % 8,  h,  0)
    of its words    number 2 (j // 8 % 2) + i // 8 % 2
    the halves      exchanged if j is even
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from .cpu.compiler import njit

MULTIPLIER_0 = np.uint64(0xD2511F53)
MULTIPLIER_1 = np.uint64(0xCD9E8D57)
WEYL_0 = np.uint64(0x9E3779B9)  # the golden ratio
WEYL_1 = np.uint64(0xBB67AE85)  # sqrt(3) - 1
LOW_WORD = np.uint64(0xFFFFFFFF)
WORD_BITS = np.uint64(32)
HALF_BITS = np.uint64(16)


def philox4x32(c0: Any, c1: Any, c2: Any, c3: Any, k0: Any, k1: Any) -> tuple[Any, Any, Any, Any]:
    """Four 32-bit random words from a counter of four words and a key of two.

    Words are numpy.uint64 scalars or arrays below 2**32 (64 bits hold the products). The function
    is plain Python: numba compiles it for the CPU and for the GPU, and numpy runs it as it is.
    """
    for _ in range(10):
        product_0 = MULTIPLIER_0 * c0
        product_1 = MULTIPLIER_1 * c2
        c0 = (product_1 >> WORD_BITS) ^ c1 ^ k0
        c1 = product_1 & LOW_WORD
        c2 = (product_0 >> WORD_BITS) ^ c3 ^ k1
        c3 = product_0 & LOW_WORD
        k0 = (k0 + WEYL_0) & LOW_WORD
        k1 = (k1 + WEYL_1) & LOW_WORD
    return c0, c1, c2, c3


# As a call of its own it would pass vectors through memory.
philox4x32_cpu = njit(philox4x32, forceinline=True)


def dropout_threshold(dropout_p: float) -> int:
    """A 32-bit number drops its entry if it is below this: round(dropout_p * 2**32)."""
    return round(dropout_p * 2**32)


def vector_dropout_mask(size: int, dropout_p: float, seed: int) -> NDArray[np.bool_]:
    """The mask of elementwise dropout: (size,), True where kept."""
    counters = np.arange(-(-size // 4), dtype=np.uint64)
    zeros = np.zeros_like(counters)
    words = np.stack(philox4x32(counters, zeros, zeros, zeros, *_key_words(seed)), axis=-1)
    return words.reshape(-1)[:size] >= np.uint64(dropout_threshold(dropout_p))


def attention_dropout_mask(
    batch_heads: int, seqlen_q: int, seqlen_k: int, dropout_p: float, seed: int
) -> NDArray[np.bool_]:
    """The mask flash attention uses: (batch_heads, seqlen_q, seqlen_k), True where kept.

    `batch_heads` counts the leading dimensions of the output, flattened in C order.
    """
    down, across = -(-seqlen_q // 16), -(-seqlen_k // 16)
    column = np.arange(4 * across, dtype=np.uint64)
    row = np.arange(8 * down, dtype=np.uint64)[:, None]
    batch_head = np.arange(batch_heads, dtype=np.uint64)[:, None, None]
    c0, c1, c2, c3 = np.broadcast_arrays(column, row, batch_head, np.uint64(0))
    words = np.stack(philox4x32(c0, c1, c2, c3, *_key_words(seed)))  # (4, BH, rows, columns)
    exchanged = (words >> HALF_BITS) | (words << HALF_BITS & LOW_WORD)
    numbers = np.stack([exchanged, words])  # (2, 4, BH, rows, columns)
    kept = numbers >= np.uint64(dropout_threshold(dropout_p))
    # Of row i: i // 16, i // 8 % 2, i % 8. Of column j: j // 16, j // 8 % 2, j % 8 // 2, j % 2.
    kept = kept.reshape(2, 2, 2, batch_heads, down, 8, across, 4).transpose(3, 4, 2, 5, 6, 1, 7, 0)
    return kept.reshape(batch_heads, 16 * down, 16 * across)[:, :seqlen_q, :seqlen_k].copy()


def _key_words(seed: int) -> tuple[NDArray[np.uint64], NDArray[np.uint64]]:
    """As arrays: numpy warns of wrapping scalars, though no sum here reaches 2**64."""
    key = np.full((1,), seed % 2**64, np.uint64)
    return key & LOW_WORD, key >> WORD_BITS
