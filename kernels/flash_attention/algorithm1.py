"""Algorithms 0 and 1 of "FlashAttention" (Dao, Fu, Ermon, Rudra, Ré, 2022), line by line.

The point of FlashAttention is what it does not move: here a large, slow memory (HBM) counts every
byte that is read from it or written to it, while the arithmetic happens on copies (in SRAM).

    standard attention     Theta(N d + N^2)       elements moved (theorem 2 of the paper)
    FlashAttention         Theta(N^2 d^2 / M)     for an SRAM of M elements, d <= M <= N d

Plain numpy and one head, written for the eye; `cpu/launch.py` is what computes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]


@dataclass
class HBM:
    """The large memory: named arrays, and the bytes read from them and written to them."""

    arrays: dict[str, Array] = field(default_factory=dict)
    bytes_read: int = 0
    bytes_written: int = 0

    def load(self, name: str, rows: slice = slice(None)) -> Array:
        """A copy, in SRAM, of some rows."""
        block: Array = self.arrays[name][rows].copy()
        self.bytes_read += block.nbytes
        return block

    def write(self, name: str, rows: slice, block: Array) -> None:
        """Put rows back."""
        self.arrays[name][rows] = block
        self.bytes_written += block.nbytes

    def create(self, name: str, array: Array) -> None:
        """Write a new array."""
        self.arrays[name] = array
        self.bytes_written += array.nbytes

    @property
    def bytes_moved(self) -> int:
        """Bytes read and written."""
        return self.bytes_read + self.bytes_written


def standard_attention(q: Array, k: Array, v: Array, scale: float = 1.0) -> tuple[Array, HBM]:
    """Algorithm 0: O = softmax(scale Q K^T) V with S and P in HBM; q, k, v (N, d).

    Returns O (N, d) and the memory with its counts.
    """
    hbm = HBM({"Q": q, "K": k, "V": v})
    # 1: Load Q, K by blocks from HBM, compute S = Q K^T, write S to HBM.
    hbm.create("S", scale * (hbm.load("Q") @ hbm.load("K").T))
    # 2: Read S from HBM, compute P = softmax(S), write P to HBM.
    s = hbm.load("S")
    p = np.exp(s - s.max(axis=1, keepdims=True))
    hbm.create("P", p / p.sum(axis=1, keepdims=True))
    # 3: Load P and V by blocks from HBM, compute O = P V, write O to HBM.
    hbm.create("O", hbm.load("P") @ hbm.load("V"))
    # 4: Return O.
    return hbm.arrays["O"], hbm


def block_sizes(sram_size: int, head_dim: int) -> tuple[int, int]:
    """(B_r, B_c), rows of a block of Q and of K, for an SRAM of `sram_size` elements: line 1."""
    block = math.ceil(sram_size / (4 * head_dim))
    return min(block, head_dim), block


def flash_attention(
    q: Array, k: Array, v: Array, sram_size: int, scale: float = 1.0
) -> tuple[Array, HBM]:
    """Algorithm 1: O = softmax(scale Q K^T) V by blocks that fit an SRAM of `sram_size` elements.

    q, k, v are (N, d). Returns O (N, d) and the memory with its counts.

    Raises:
        ValueError: `sram_size` is less than 1.
    """
    if sram_size < 1:
        raise ValueError(f"sram_size is {sram_size}; wanted a number of elements >= 1.")
    (n, d), dtype = q.shape, q.dtype
    hbm = HBM({"Q": q, "K": k, "V": v})
    # 1: Set block sizes B_c = ceil(M / 4d), B_r = min(ceil(M / 4d), d).
    block_r, block_c = block_sizes(sram_size, d)
    # 2: Initialize O = (0), l = (0), m = (-inf) in HBM.
    hbm.create("O", np.zeros((n, d), dtype))
    hbm.create("l", np.zeros(n, dtype))
    hbm.create("m", np.full(n, -np.inf, dtype))
    # 3: Divide Q into T_r blocks of B_r rows, K and V into T_c blocks of B_c rows.
    # 4: Divide O, l and m into T_r blocks of B_r rows.
    rows_i = [slice(start, min(start + block_r, n)) for start in range(0, n, block_r)]
    rows_j = [slice(start, min(start + block_c, n)) for start in range(0, n, block_c)]
    # 5: for 1 <= j <= T_c do
    for j in rows_j:
        # 6: Load K_j, V_j from HBM to on-chip SRAM.
        k_j, v_j = hbm.load("K", j), hbm.load("V", j)
        # 7: for 1 <= i <= T_r do
        for i in rows_i:
            # 8: Load Q_i, O_i, l_i, m_i from HBM to on-chip SRAM.
            q_i, o_i, l_i, m_i = (hbm.load(name, i) for name in ("Q", "O", "l", "m"))
            # 9: On chip, compute S_ij = Q_i K_j^T.                              (B_r, B_c)
            s_ij = scale * (q_i @ k_j.T)
            # 10: On chip, compute m~_ij = rowmax(S_ij), P~_ij = exp(S_ij - m~_ij),
            #     l~_ij = rowsum(P~_ij).
            m_ij = s_ij.max(axis=1)
            p_ij = np.exp(s_ij - m_ij[:, None])
            l_ij = p_ij.sum(axis=1)
            # 11: On chip, compute m_new = max(m_i, m~_ij),
            #     l_new = exp(m_i - m_new) l_i + exp(m~_ij - m_new) l~_ij.
            m_new = np.maximum(m_i, m_ij)
            old, new = np.exp(m_i - m_new), np.exp(m_ij - m_new)
            l_new = old * l_i + new * l_ij
            # 12: Write O_i = diag(l_new)^-1 (diag(l_i) exp(m_i - m_new) O_i
            #     + exp(m~_ij - m_new) P~_ij V_j) to HBM.
            o_i = ((l_i * old)[:, None] * o_i + new[:, None] * (p_ij @ v_j)) / l_new[:, None]
            hbm.write("O", i, o_i)
            # 13: Write l_i = l_new, m_i = m_new to HBM.
            hbm.write("l", i, l_new)
            hbm.write("m", i, m_new)
        # 14: end for
    # 15: end for
    # 16: Return O.
    return hbm.arrays["O"], hbm
