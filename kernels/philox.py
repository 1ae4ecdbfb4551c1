"""Philox 4x32-10, a counter-based random number generator, and the dropout mask made with it.

"Parallel Random Numbers: As Easy as 1, 2, 3" (Salmon, Moraes, Dror, Shaw, SC 2011). A number is a
pure function of a key and a counter, so any tile of a dropout mask can be made anywhere, at any
time, in any order: the forward pass, the backward pass, the CPU, the GPU and a test all see the
same mask.

The mask of attention: key = the 64-bit seed, counter = (column // 4, row, batch_head, 0), of whose
four words column % 4 picks one; the entry is kept iff it is at least round(dropout_p * 2**32).
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit
from numpy.typing import NDArray

MULTIPLIER_0 = np.uint64(0xD2511F53)
MULTIPLIER_1 = np.uint64(0xCD9E8D57)
WEYL_0 = np.uint64(0x9E3779B9)  # the golden ratio
WEYL_1 = np.uint64(0xBB67AE85)  # sqrt(3) - 1
LOW_WORD = np.uint64(0xFFFFFFFF)
WORD_BITS = np.uint64(32)


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


philox4x32_cpu = njit(philox4x32)


def dropout_threshold(dropout_p: float) -> int:
    """A 32-bit word drops its entry if it is below this: round(dropout_p * 2**32)."""
    return round(dropout_p * 2**32)


def attention_dropout_mask(
    batch_heads: int, seqlen_q: int, seqlen_k: int, dropout_p: float, seed: int
) -> NDArray[np.bool_]:
    """The mask flash attention uses: (batch_heads, seqlen_q, seqlen_k), True where kept.

    `batch_heads` counts the leading dimensions of the output, flattened in C order.
    """
    groups = -(-seqlen_k // 4)
    column = np.arange(groups, dtype=np.uint64)
    row = np.arange(seqlen_q, dtype=np.uint64)[:, None]
    batch_head = np.arange(batch_heads, dtype=np.uint64)[:, None, None]
    key = np.uint64(seed % 2**64)
    zero = np.uint64(0)
    c0, c1, c2, c3 = np.broadcast_arrays(column, row, batch_head, zero)
    # The key as arrays: numpy warns of wrapping scalars, though no sum here reaches 2**64.
    k0, k1 = np.full((1,), key & LOW_WORD), np.full((1,), key >> WORD_BITS)
    words = np.stack(philox4x32(c0, c1, c2, c3, k0, k1), axis=-1)  # (BH, Nq, groups, 4)
    kept = words >= np.uint64(dropout_threshold(dropout_p))
    return kept.reshape(batch_heads, seqlen_q, 4 * groups)[:, :, :seqlen_k].copy()
