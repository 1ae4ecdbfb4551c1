"""Flash-Decoding's two kernels: one split of the keys, and the merging of all splits.

In the first a row of keys is read by `lanes` neighbouring threads, 16 bytes each; such a group of
threads takes every groups-th key of the split, and has a running maximum m, sum l and output o of
its own, in registers. They are merged in the end, by shuffles and then through shared memory. The
algorithm, and what is launched, are in `decode/launch.py`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

from ...gpu.runtime import (
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
)
from ...gpu.vectors import vector_access
from ..scores import LOG2_E, NO_FUNCTIONS, Functions, Masked, Where
from ..scores_cuda import Asked, counts, head_place, keys_of, masked_score
from ..softmax import exp2_function, reciprocal_of

WARPS = 2 if SIMULATED else 8
UNROLLED = 2  # keys of a group that are on their way at once
AT_ONCE = 4  # blocks that a multiprocessor's registers are to be enough for, of one row each
MOST_SPLITS = 4 if SIMULATED else 128
MERGE_THREADS = 128


@dataclass(frozen=True)
class DecodeKind(Masked):
    """What the kernel is compiled for.

    Args:
        precision: name of the dtype.
        head_dim: D, of queries and keys.
        value_dim: Dv, of values.
        mask: "none", "bool", or the name of the additive mask's dtype.
        banded: whether some query sees only part of the keys that any of them sees.
        vectors: elements that are read at once; 1 if rows do not lie at multiples of 16 bytes.
        rows: queries (of all heads that share keys) of a block: 1, 2 or 4.
        functions: the user's. Lists of tiles are not used: few queries see few keys in vain.

    """

    precision: str
    head_dim: int
    value_dim: int
    mask: str
    banded: bool
    vectors: int
    rows: int
    functions: Functions = NO_FUNCTIONS

    @property
    def lanes(self) -> int:
        """Threads that read a row together: a power of two."""
        pieces = ceil_div(max(self.head_dim, self.value_dim, 1), self.vectors)
        return min(WARP, 1 << (pieces - 1).bit_length())

    def pieces(self, columns: int) -> int:
        """Vectors of a row that one thread reads."""
        return ceil_div(columns, self.vectors * self.lanes)


class Cuts(NamedTuple):
    """How the keys that some query sees are cut: [begin, end), in splits of `split_keys`."""

    begin: int
    end: int
    split_keys: int
    splits: int


class MergeSizes(NamedTuple):
    """What the kernel that merges splits is told of them."""

    heads: int
    seqlen_q: int
    value_dim: int
    rows: int  # queries of all heads
    splits: int


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
def score_reader(kind: DecodeKind) -> Any:
    """Device functions. `row_of(query, lower, upper, place)`: what a query's scores have in common,
    from `head_place`. `score_of(score, key, end, mask, query, row, words)`: a score as the rule
    leaves it; `end` is one past the last key of the split.
    """
    masked = masked_score(kind.mask, kind.precision, kind.functions)
    has_mask, banded, has_functions = kind.mask != "none", kind.banded, bool(kind.functions)

    @device_function
    def row_of(query, lower, upper, place):
        batch, head, start, query_step, key_step = place
        return *keys_of(query, lower, upper), start + query * query_step, key_step, batch, head

    @device_function
    def place_of(batch, head, query, key, end, words):
        if has_functions:
            return Asked(batch, head, query, min(key, end - 1), words)
        return Where(batch, head, query, key)

    @device_function
    def score_of(score, key, end, mask, query, row, words):
        first, last, start, step, batch, head = row
        sees, where = key < end, place_of(batch, head, query, key, end, words)
        if banded:
            sees = counts(sees, key, first, last)
        if not has_mask:
            return masked(score, sees, 0, where)
        number = mask[start + (key if sees else types.int64(0)) * step]
        return masked(score, sees, number, where)

    return row_of, score_of


@cache
def exponential(real_name: str) -> Any:
    """Device functions: e to the x; and what to subtract from scores whose largest is x, 0 where
    that is infinite: a row that has seen no key yet, or one whose sum is infinite.
    """
    real, exp2 = precision(real_name).real, exp2_function(real_name)
    log2_e, infinity = real(LOG2_E), float("inf")

    @device_function
    def exp_of(x):
        return exp2(x * log2_e)

    @device_function
    def shift_of(largest):
        return real(0.0) if abs(largest) == infinity else largest

    return exp_of, shift_of


@cache
def group_merger(kind: DecodeKind) -> Any:
    """Device function `(m, l, o, r, outputs, sums)`: a warp's groups put row r together, by
    shuffles, and one of them writes it to shared memory: outputs (warps, Dv), sums (warps, 2).
    """
    real = precision(kind.precision).real
    vectors, lanes, value_dim = kind.vectors, kind.lanes, kind.value_dim
    own, (exp_of, shift_of) = kind.pieces(value_dim) * vectors, exponential(real.name)
    steps = (WARP // lanes).bit_length() - 1

    @device_function
    def merge_groups(m, l, o, r, outputs, sums):
        thread = cuda.threadIdx.x
        warp, lane = thread // 32, thread % lanes
        largest = m
        for step in range(steps):
            largest = max(largest, shuffle_xor(largest, lanes << step))
        alpha = exp_of(m - shift_of(largest))
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
        whole: there is one split: write the output and the logsumexp. Else `out` gets the sums of
            each split, not yet divided by l, and `logsumexp`, from `sums_start` on, its m and l, in
            numbers as they are computed with.

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
    group_sum, (row_of, score_of) = group_reduction(lanes), score_reader(kind)
    exp_of, shift_of = exponential(real.name)
    reciprocal = reciprocal_of(kind.precision)
    threads, warps, width = WARPS * WARP, WARPS, max(value_dim, 1)
    write = store if whole else precision(real.name).store
    nothing = NEGATIVE_INFINITY

    @kernel(threads, blocks=AT_ONCE if rows == 1 and not kind.functions else 1)
    def flash_decode(
        q, k, v, mask, out, logsumexp, q_steps, k_steps, v_steps, mask_steps, out_steps, sizes,
        group, cuts, rows_of_all, sums_start, scale, words,
    ):  # fmt: skip
        heads, seqlen_q, _, lower, upper, k_group, v_group = sizes
        begin, end, split_keys, splits = cuts
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
        k_start = b * k_steps.batch + first_head // k_group * k_steps.head
        v_start = b * v_steps.batch + first_head // v_group * v_steps.head
        first_key = begin + split * split_keys
        last_key = min(first_key + split_keys, end)

        for r in range(rows):
            packed = min(row0 + r, group * seqlen_q - 1)
            h, i = first_head + packed // seqlen_q, packed % seqlen_q
            start = b * q_steps.batch + h * q_steps.head + i * q_steps.row
            for c in range(own):
                column = (c // vectors * lanes + lane) * vectors + c % vectors
                number = load(q[start + min(column, head_dim - 1) * q_steps.column])
                inside = column < head_dim
                q_own[r, c] = number * real(scale) if inside else real(0.0)
            for c in range(own_v):
                o[r, c] = real(0.0)
            m[r], l[r] = real(nothing), real(0.0)

        for key0 in range(first_key, last_key, groups * unrolled):
            for u in range(unrolled):
                key = types.int64(min(key0 + u * groups + thread // lanes, last_key - 1))
                read_key(found, u * own, k, k_start + key * k_steps.row, k_steps.column)
            for u in range(unrolled):
                key = types.int64(min(key0 + u * groups + thread // lanes, last_key - 1))
                read_value(found_v, u * own_v, v, v_start + key * v_steps.row, v_steps.column)
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
                seen = row_of(i, lower, upper, head_place(b, h, mask_steps))
                largest = m[r]
                for u in range(unrolled):
                    key = key0 + u * groups + thread // lanes
                    scores[r, u] = score_of(
                        group_sum(scores[r, u]), key, last_key, mask, i, seen, words
                    )
                    largest = max(largest, scores[r, u])
                shift = shift_of(largest)
                alpha = exp_of(m[r] - shift)
                m[r] = largest
                l[r] *= alpha
                for c in range(own_v):
                    o[r, c] *= alpha
                for u in range(unrolled):
                    scores[r, u] = exp_of(scores[r, u] - shift)
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
            shift = shift_of(largest)
            for w in range(warps):
                total += exp_of(sums[w, 0] - shift) * sums[w, 1]
            factor = reciprocal(total) if whole else real(1.0)
            if row0 + r < group * seqlen_q:
                h, i = first_head + (row0 + r) // seqlen_q, (row0 + r) % seqlen_q
                row = (b * heads + h) * seqlen_q + i + split * rows_of_all
                to = row * value_dim
                if whole:
                    to = b * out_steps.batch + h * out_steps.head + i * out_steps.row
                for column in range(thread, value_dim, threads):
                    number = real(0.0)
                    for w in range(warps):
                        number += exp_of(sums[w, 0] - shift) * outputs[w, column]
                    out[to + column] = write(number * factor)
                if thread == 0:
                    if not whole:
                        place = sums_start + 2 * row
                        logsumexp[place], logsumexp[place + 1] = largest, total
                    elif total == real(0.0):
                        logsumexp[row] = real(nothing)
                    else:
                        logsumexp[row] = largest + real(math.log(total))
            cuda.syncthreads()

    return flash_decode


# ----- the kernel that merges splits -----


@cache
def merge_kernel(name: str) -> Any:
    """A block computes one row of the output from those of all splits."""
    numbers = precision(name)
    real, store, (exp_of, shift_of) = numbers.real, numbers.store, exponential(numbers.real.name)
    reciprocal, nothing = reciprocal_of(name), NEGATIVE_INFINITY
    most, threads = MOST_SPLITS, MERGE_THREADS

    @kernel(threads)
    def flash_decode_merge(partial, out, logsumexp, out_steps, sizes):
        heads, seqlen_q, value_dim, rows_of_all, splits = sizes
        weights = cuda.shared.array(most, real)
        row, thread = types.int64(cuda.blockIdx.x), cuda.threadIdx.x
        sums_start = splits * rows_of_all * value_dim
        for split in range(thread, splits, threads):
            weights[split] = partial[sums_start + 2 * (split * rows_of_all + row)]
        cuda.syncthreads()
        largest = weights[0]
        for split in range(1, splits):
            largest = max(largest, weights[split])
        shift = shift_of(largest)
        cuda.syncthreads()
        for split in range(thread, splits, threads):
            weights[split] = exp_of(weights[split] - shift)
        cuda.syncthreads()
        total = real(0.0)
        for split in range(splits):
            total += weights[split] * partial[sums_start + 2 * (split * rows_of_all + row) + 1]
        inverse = reciprocal(total)
        batch_head = row // seqlen_q
        to = (
            batch_head // heads * out_steps.batch
            + batch_head % heads * out_steps.head
            + row % seqlen_q * out_steps.row
        )
        for column in range(thread, value_dim, threads):
            number = real(0.0)
            for split in range(splits):
                number += weights[split] * partial[(split * rows_of_all + row) * value_dim + column]
            out[to + column] = store(number * inverse)
        if thread == 0:
            logsumexp[row] = (
                real(nothing) if total == real(0.0) else largest + real(math.log(total))
            )

    return flash_decode_merge


__all__ = ["DecodeKind", "merge_kernel", "split_kernel"]
