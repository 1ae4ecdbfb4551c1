"""Flash-Decoding's two kernels: one split of the keys, and the merging of all splits.

In the first a row of keys is read by `lanes` neighbouring threads, 16 bytes each; such a group of
threads takes every groups-th key of the split, and has a running maximum m, sum l and output o of
its own, in registers. They are merged in the end, by shuffles and then through shared memory. The
algorithm, and what is launched, are in `decode.py`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from typing import Any

from ..runtime import (
    NEGATIVE_INFINITY,
    SIMULATED,
    WARP,
    ceil_div,
    cuda,
    device_function,
    kernel,
    precision,
    shuffle_xor,
    types,
)  # fmt: skip
from ..vectors_cuda import vector_access
from .cuda_registers import exp2_function

WARPS = 2 if SIMULATED else 8
UNROLLED = 2  # keys of a group that are on their way at once
AT_ONCE = 4  # blocks that a multiprocessor's registers are to be enough for, of one row each
MOST_SPLITS = 4 if SIMULATED else 128
MERGE_THREADS = 128
LN_2 = math.log(2.0)


@dataclass(frozen=True)
class DecodeKind:
    """What the kernel is compiled for.

    Args:
        precision: name of the dtype.
        head_dim: D, of queries and keys.
        value_dim: Dv, of values.
        mask: "none", "bool", or the name of the additive mask's dtype.
        banded: whether some query sees only part of the keys that any of them sees.
        vectors: elements that are read at once; 1 if rows do not lie at multiples of 16 bytes.
        rows: queries (of all heads that share keys) of a block: 1, 2 or 4.

    """

    precision: str
    head_dim: int
    value_dim: int
    mask: str
    banded: bool
    vectors: int
    rows: int

    @property
    def lanes(self) -> int:
        """Threads that read a row together: a power of two."""
        pieces = ceil_div(max(self.head_dim, self.value_dim, 1), self.vectors)
        return min(WARP, 1 << (pieces - 1).bit_length())

    def pieces(self, columns: int) -> int:
        """Vectors of a row that one thread reads."""
        return ceil_div(columns, self.vectors * self.lanes)


# ----- the kernel of one split -----


@cache
def read_row(kind: DecodeKind, columns: int) -> Any:
    """Device function `(found, place, x, start, step)`: a thread's pieces of a row that begins at
    x[start], into found[place ...]. What is beyond the row's end is another part of the row.
    """
    vectors, lanes, pieces = kind.vectors, kind.lanes, kind.pieces(columns)
    storage = getattr(types, precision(kind.precision).storage.name)
    read, _ = vector_access(vectors)

    @device_function
    def read_pieces(found, place, x, start, step):
        got = cuda.local.array(vectors, storage)
        lane = cuda.threadIdx.x % lanes
        for piece in range(pieces):
            column = min((piece * lanes + lane) * vectors, columns - vectors)
            read(x, start + column * step, got)
            for n in range(vectors):
                found[place + piece * vectors + n] = got[n]

    return read_pieces


@cache
def group_reduction(lanes: int) -> Any:
    """Device function: the sum of a number over the threads that share a row of keys."""
    steps = lanes.bit_length() - 1

    @device_function
    def group_sum(x):
        for step in range(steps):
            x += shuffle_xor(x, 1 << step)
        return x

    return group_sum


@cache
def visibility(kind: DecodeKind) -> Any:
    """Device function `(score, key, end, row_of)`: a score in units of log 2 as the mask leaves it.

    row_of: first key that the row sees, one past the last, where its mask begins, its step.
    """
    real = precision(kind.precision).real
    nothing, log2_e = real(NEGATIVE_INFINITY), real(1.4426950408889634)
    masked, is_bool, banded = kind.mask != "none", kind.mask == "bool", kind.banded
    load = precision("float32" if kind.mask in ("none", "bool") else kind.mask).load

    @device_function
    def seen(score, key, end, mask, row_of):
        first, last, start, step = row_of
        visible = key < end
        if banded:
            visible = visible & (key >= first) & (key < last)
        if masked:
            number = mask[start + (key if visible else types.int64(0)) * step]
            if is_bool:
                visible = visible & (number != 0)
            else:
                score += real(load(number)) * log2_e
        return score if visible else nothing

    return seen


@cache
def group_merger(kind: DecodeKind) -> Any:
    """Device function `(m, l, o, r, outputs, sums)`: a warp's groups put row r together, by
    shuffles, and one of them writes it to shared memory: outputs (warps, Dv), sums (warps, 2).
    """
    real = precision(kind.precision).real
    vectors, lanes, value_dim = kind.vectors, kind.lanes, kind.value_dim
    own, exp2 = kind.pieces(value_dim) * vectors, exp2_function(real.name)
    steps, nothing = (WARP // lanes).bit_length() - 1, NEGATIVE_INFINITY

    @device_function
    def merge_groups(m, l, o, r, outputs, sums):
        thread = cuda.threadIdx.x
        warp, lane = thread // 32, thread % lanes
        largest = m
        for step in range(steps):
            largest = max(largest, shuffle_xor(largest, lanes << step))
        alpha = exp2(m - (real(0.0) if largest == real(nothing) else largest))
        total = l * alpha
        for step in range(steps):
            total += shuffle_xor(total, lanes << step)
        for c in range(own):
            number = o[r, c] * alpha
            for step in range(steps):
                number += shuffle_xor(number, lanes << step)
            column = (c // vectors * lanes + lane) * vectors + c % vectors
            if thread % 32 < lanes and column < value_dim:
                outputs[warp, column] = number
        if thread % 32 == 0:
            sums[warp, 0], sums[warp, 1] = largest, total

    return merge_groups


@cache
def split_kernel(kind: DecodeKind, whole: bool) -> Any:
    """A block computes `rows` rows against one split of the keys.

    Args:
        kind: what it is compiled for.
        whole: there is one split: write the output itself. Else `out` and `logsumexp` are those of
            all splits, in numbers as they are computed with.

    """
    numbers = precision(kind.precision)
    real, load, store = numbers.real, numbers.load, numbers.store
    storage = getattr(types, numbers.storage.name)
    vectors, lanes, rows, unrolled = kind.vectors, kind.lanes, kind.rows, UNROLLED
    head_dim, value_dim = kind.head_dim, kind.value_dim
    own, own_v = kind.pieces(head_dim) * vectors, kind.pieces(value_dim) * vectors
    size, size_v = max(own, 1), max(own_v, 1)
    fetched, fetched_v = unrolled * size, unrolled * size_v
    read_key, read_value = read_row(kind, head_dim), read_row(kind, value_dim)
    groups, merge_groups = WARPS * WARP // lanes, group_merger(kind)
    group_sum, seen, exp2 = group_reduction(lanes), visibility(kind), exp2_function(real.name)
    threads, warps, width = WARPS * WARP, WARPS, max(value_dim, 1)
    write = store if whole else precision(real.name).store
    nothing, ln_2 = NEGATIVE_INFINITY, LN_2

    @kernel(threads, blocks=AT_ONCE if rows == 1 else 1)
    def flash_decode(
        q, k, v, mask, out, logsumexp, q_steps, k_steps, v_steps, mask_steps, out_steps, sizes,
        cuts, scale,
    ):  # fmt: skip
        heads, seqlen_q, lower, upper, group, k_group, v_group = sizes
        begin, end, split_keys, splits, rows_of_all, sums_start = cuts
        outputs = cuda.shared.array((warps, width), real)
        sums = cuda.shared.array((warps, 2), real)
        q_own = cuda.local.array((rows, size), real)
        o = cuda.local.array((rows, size_v), real)
        m, l = cuda.local.array(rows, real), cuda.local.array(rows, real)
        found = cuda.local.array(fetched, storage)
        found_v = cuda.local.array(fetched_v, storage)
        scores = cuda.local.array((rows, unrolled), real)
        thread = cuda.threadIdx.x
        lane = thread % lanes
        row_tiles = (group * seqlen_q + rows - 1) // rows  # neighbours, so that they share the L2
        row0, rest = cuda.blockIdx.x % row_tiles * rows, cuda.blockIdx.x // row_tiles
        split, kv = rest % splits, rest // splits
        b, first_head = kv // (heads // group), kv % (heads // group) * group
        k_start = b * k_steps[0] + first_head // k_group * k_steps[1]
        v_start = b * v_steps[0] + first_head // v_group * v_steps[1]
        first_key = begin + split * split_keys
        last_key = min(first_key + split_keys, end)

        for r in range(rows):
            packed = min(row0 + r, group * seqlen_q - 1)
            h, i = first_head + packed // seqlen_q, packed % seqlen_q
            start = b * q_steps[0] + h * q_steps[1] + i * q_steps[2]
            for c in range(own):
                column = (c // vectors * lanes + lane) * vectors + c % vectors
                number = load(q[start + min(column, head_dim - 1) * q_steps[3]])
                inside = column < head_dim
                q_own[r, c] = number * real(scale * 1.4426950408889634) if inside else real(0.0)
            for c in range(own_v):
                o[r, c] = real(0.0)
            m[r], l[r] = real(nothing), real(0.0)

        for key0 in range(first_key, last_key, groups * unrolled):
            for u in range(unrolled):
                key = types.int64(min(key0 + u * groups + thread // lanes, last_key - 1))
                read_key(found, u * own, k, k_start + key * k_steps[2], k_steps[3])
            for u in range(unrolled):
                key = types.int64(min(key0 + u * groups + thread // lanes, last_key - 1))
                read_value(found_v, u * own_v, v, v_start + key * v_steps[2], v_steps[3])
            # s = q k^T
            for u in range(unrolled):
                for r in range(rows):
                    scores[r, u] = real(0.0)
                for c in range(own):
                    number = load(found[u * own + c])
                    for r in range(rows):
                        scores[r, u] += q_own[r, c] * number
            # m, l, p and o = exp(m - m_new) o
            for r in range(rows):
                packed = min(row0 + r, group * seqlen_q - 1)
                h, i = first_head + packed // seqlen_q, packed % seqlen_q
                row_of = (
                    i + lower, i + upper, b * mask_steps[0] + h * mask_steps[1] + i * mask_steps[2],
                    mask_steps[3],
                )  # fmt: skip
                largest = m[r]
                for u in range(unrolled):
                    key = key0 + u * groups + thread // lanes
                    scores[r, u] = seen(group_sum(scores[r, u]), key, last_key, mask, row_of)
                    largest = max(largest, scores[r, u])
                # No key yet: 2**(-inf - 0) = 0, not NaN.
                shift = real(0.0) if largest == real(nothing) else largest
                alpha = exp2(m[r] - shift)
                m[r] = largest
                l[r] *= alpha
                for c in range(own_v):
                    o[r, c] *= alpha
                for u in range(unrolled):
                    scores[r, u] = exp2(scores[r, u] - shift)
                    l[r] += scores[r, u]
            # o += p v
            for u in range(unrolled):
                for c in range(own_v):
                    number = load(found_v[u * own_v + c])
                    for r in range(rows):
                        o[r, c] += scores[r, u] * number

        for r in range(rows):
            merge_groups(m[r], l[r], o, r, outputs, sums)
            cuda.syncthreads()
            # The warps, in their order.
            largest, total = sums[0, 0], real(0.0)
            for w in range(1, warps):
                largest = max(largest, sums[w, 0])
            shift = real(0.0) if largest == real(nothing) else largest
            for w in range(warps):
                total += exp2(sums[w, 0] - shift) * sums[w, 1]
            inverse = real(0.0) if total == real(0.0) else real(1.0) / total
            if row0 + r < group * seqlen_q:
                h, i = first_head + (row0 + r) // seqlen_q, (row0 + r) % seqlen_q
                row = (b * heads + h) * seqlen_q + i + split * rows_of_all
                to = row * value_dim
                if whole:
                    to = b * out_steps[0] + h * out_steps[1] + i * out_steps[2]
                for column in range(thread, value_dim, threads):
                    number = real(0.0)
                    for w in range(warps):
                        number += exp2(sums[w, 0] - shift) * outputs[w, column]
                    out[to + column] = write(number * inverse)
                if thread == 0:
                    logsumexp[sums_start + row] = (
                        real(nothing)
                        if total == real(0.0)
                        else shift * real(ln_2) + real(math.log(total))
                    )
            cuda.syncthreads()

    return flash_decode


# ----- the kernel that merges splits -----


@cache
def merge_kernel(name: str) -> Any:
    """A block computes one row of the output from those of all splits."""
    numbers = precision(name)
    real, store, exp2 = numbers.real, numbers.store, exp2_function(numbers.real.name)
    nothing, log2_e, most, threads = NEGATIVE_INFINITY, 1.0 / LN_2, MOST_SPLITS, MERGE_THREADS

    @kernel(threads)
    def flash_decode_merge(partial, out, logsumexp, out_steps, sizes):
        heads, seqlen_q, value_dim, rows_of_all, splits = sizes
        weights = cuda.shared.array(most, real)
        row, thread = types.int64(cuda.blockIdx.x), cuda.threadIdx.x
        sums_start = splits * rows_of_all * value_dim
        for split in range(thread, splits, threads):
            weights[split] = partial[sums_start + split * rows_of_all + row]
        cuda.syncthreads()
        largest = weights[0]
        for split in range(1, splits):
            largest = max(largest, weights[split])
        shift = real(0.0) if largest == real(nothing) else largest
        cuda.syncthreads()
        for split in range(thread, splits, threads):
            weights[split] = exp2((weights[split] - shift) * real(log2_e))
        cuda.syncthreads()
        total = real(0.0)
        for split in range(splits):
            total += weights[split]
        inverse = real(0.0) if total == real(0.0) else real(1.0) / total
        batch_head = row // seqlen_q
        to = (
            batch_head // heads * out_steps[0]
            + batch_head % heads * out_steps[1]
            + row % seqlen_q * out_steps[2]
        )
        for column in range(thread, value_dim, threads):
            number = real(0.0)
            for split in range(splits):
                number += weights[split] * partial[(split * rows_of_all + row) * value_dim + column]
            out[to + column] = store(number * inverse)
        if thread == 0:
            logsumexp[row] = real(nothing) if total == real(0.0) else shift + real(math.log(total))

    return flash_decode_merge


__all__ = ["DecodeKind", "merge_kernel", "split_kernel"]
