"""Flash-Decoding: a few queries against a long cache of keys and values. Forward only.

"Flash-Decoding for long-context inference" (Dao, Haziza, Massa, Sizov, 2023). With one query there
is one tile of queries, so FlashAttention would keep one multiprocessor busy. Here the keys are cut
into splits, each computed by a block of its own:

    L_s = logsumexp of the scores of split s
    O_s = softmax(scores of split s) V_s

and a second kernel merges them: L = log(sum exp(L_s)), O = sum exp(L_s - L) O_s, always in the
order of the splits, so that a second run gives the same bits.

Each key and value is read once, and that is what takes the time: the arithmetic is ordinary. All
query heads that share a key head (GQA) are rows of one small matrix, `rows` of them to a block.

Within a block a row of keys is read by `lanes` neighbouring threads, 16 bytes each; such a group of
threads takes every groups-th key, and has a running maximum m, sum l and output o of its own, in
registers. They are merged in the end: in a warp by shuffles, then through shared memory.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

from ..runtime import (
    NEGATIVE_INFINITY,
    SIMULATED,
    WARP,
    Instance,
    ceil_div,
    cuda,
    device_function,
    kernel,
    launch,
    precision,
    shuffle_xor,
    types,
)  # fmt: skip
from ..vectors_cuda import vector_access
from .cuda import (
    Architecture,
    Heads,
    Inputs,
    Matrices,
    arguments_of,
    has_vectors,
    heads_of,
    mask_of,
)  # fmt: skip
from .cuda_registers import exp2_function
from .problem import AttentionProblem

NAME = "decode"
MOST_QUERIES = 8
MOST_COLUMNS = 256
MOST_ROWS = 4  # of a block: more are in other blocks, which read the same keys
WARPS = 2 if SIMULATED else 8
UNROLLED = 2 if SIMULATED else 4  # keys of a group that are on their way at once
KEYS_OF_A_SPLIT = 16 if SIMULATED else 256  # at least
MOST_SPLITS = 4 if SIMULATED else 128
BLOCKS = 64 if SIMULATED else 2048  # that fill any GPU several times over
MERGE_THREADS = 128
MOST_NUMBERS = 64  # of 32 bits, that a thread keeps of queries and outputs
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


def why_not(problem: AttentionProblem, architecture: Architecture) -> str | None:
    """None if these kernels compute it, and are the faster way; else why not."""
    if problem.seqlen_q > MOST_QUERIES:
        return f"it is for up to {MOST_QUERIES} queries, there are {problem.seqlen_q}"
    if problem.dropout_p > 0:
        return "it has no dropout"
    if max(problem.head_dim, problem.value_dim) > MOST_COLUMNS:
        return f"it takes head sizes up to {MOST_COLUMNS}"
    return None


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
    groups_of_warp, groups = WARP // lanes, WARPS * WARP // lanes
    steps = groups_of_warp.bit_length() - 1
    group_sum, seen, exp2 = group_reduction(lanes), visibility(kind), exp2_function(real.name)
    threads, warps, width = WARPS * WARP, WARPS, max(value_dim, 1)
    write = store if whole else precision(real.name).store
    nothing, ln_2 = NEGATIVE_INFINITY, LN_2

    @kernel(threads)
    def flash_decode(
        q, k, v, mask, out, logsumexp, q_steps, k_steps, v_steps, mask_steps, out_steps, sizes,
        cuts, scale,
    ):  # fmt: skip
        heads, seqlen_q, lower, upper, group, k_group, v_group = sizes
        begin, end, split_keys, splits, rows_of_all, sums_start = cuts
        outputs, sums = cuda.shared.array((warps, width), real), cuda.shared.array((warps, 2), real)
        q_own = cuda.local.array((rows, size), real)
        o = cuda.local.array((rows, size_v), real)
        m, l = cuda.local.array(rows, real), cuda.local.array(rows, real)
        found = cuda.local.array(fetched, storage)
        found_v = cuda.local.array(fetched_v, storage)
        scores = cuda.local.array((rows, unrolled), real)
        thread = cuda.threadIdx.x
        lane, warp = thread % lanes, thread // 32
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
            # The groups of a warp, by shuffles; then one of them has the warp's sums.
            largest = m[r]
            for step in range(steps):
                largest = max(largest, shuffle_xor(largest, lanes << step))
            alpha = exp2(m[r] - (real(0.0) if largest == real(nothing) else largest))
            total = l[r] * alpha
            for step in range(steps):
                total += shuffle_xor(total, lanes << step)
            for c in range(own_v):
                number = o[r, c] * alpha
                for step in range(steps):
                    number += shuffle_xor(number, lanes << step)
                column = (c // vectors * lanes + lane) * vectors + c % vectors
                if thread % 32 < lanes and column < value_dim:
                    outputs[warp, column] = number
            if thread % 32 == 0:
                sums[warp, 0], sums[warp, 1] = largest, total
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


# ----- launches -----


@dataclass(frozen=True)
class Cuts:
    """How the keys that some query sees are cut: [begin, end), in splits of `split_keys`."""

    begin: int
    end: int
    split_keys: int
    splits: int


def cuts_of(problem: AttentionProblem, heads: Heads) -> Cuts:
    """As many splits as fill a GPU, of `KEYS_OF_A_SPLIT` keys at least.

    A function of the problem alone: on every GPU the sums are the same.
    """
    seqlen_q, seqlen_k = problem.seqlen_q, problem.seqlen_k
    begin = min(max(problem.lower, 0), seqlen_k)
    end = min(max(seqlen_q - 1 + problem.upper, begin), seqlen_k)
    keys = end - begin
    blocks = max(1, problem.batch_heads // heads.group)
    splits = min(ceil_div(BLOCKS, blocks), keys // KEYS_OF_A_SPLIT, MOST_SPLITS)
    split_keys = ceil_div(ceil_div(keys, max(splits, 1)), KEYS_OF_A_SPLIT) * KEYS_OF_A_SPLIT
    return Cuts(begin, end, split_keys, max(1, ceil_div(keys, max(split_keys, 1))))


def kind_of(problem: AttentionProblem, heads: Heads, mask: str, vectors: bool) -> DecodeKind:
    """The kernel's compile-time choices."""
    banded = problem.seqlen_q > 1 and (problem.left is not None or problem.right is not None)
    numbers = precision(problem.dtype.name)
    at_once = 16 // numbers.storage.itemsize if vectors else 1
    sizes = problem.head_dim, problem.value_dim
    one = DecodeKind(problem.dtype.name, *sizes, mask, banded, at_once, rows=1)
    each = sum(one.pieces(size) for size in sizes) * at_once * (numbers.real.bitwidth // 32)
    most = min(MOST_ROWS, MOST_NUMBERS // max(each, 1))
    rows = 1
    while rows * 2 <= most and rows < heads.group * problem.seqlen_q:
        rows *= 2
    return replace(one, rows=rows)


def forward_workspace(problem: AttentionProblem, heads: Heads, architecture: Architecture) -> int:
    """Bytes for the output (Nq, Dv) and the logsumexp of each split."""
    splits = cuts_of(problem, heads).splits
    itemsize = 8 if problem.dtype.name == "float64" else 4
    rows = problem.batch_heads * problem.seqlen_q
    return splits * rows * (problem.value_dim + 1) * itemsize if splits > 1 else 0


def tiles(problem: AttentionProblem, architecture: Architecture, backward: bool = False) -> str:
    """The sizes of tiles, for people."""
    heads = heads_of(problem)
    cuts, kind = cuts_of(problem, heads), kind_of(problem, heads, "none", True)
    return f"{kind.rows} queries, {cuts.splits} splits of {cuts.split_keys} keys"


def forward(
    problem: AttentionProblem,
    heads: Heads,
    inputs: Inputs,
    out: Matrices,
    logsumexp: Any,
    architecture: Architecture,
    workspace: Any = None,
) -> None:
    """Write the output (Nq, Dv) of each head, and the logsumexp: see `cuda.forward`.

    Args:
        problem: what is asked for.
        heads: how it is laid out.
        inputs: what is read.
        out: its rows are contiguous.
        logsumexp: contiguous (batch, heads, Nq), flat, float32 (float64 for float64).
        architecture: compute capability.
        workspace: flat, of `forward_workspace` bytes, of the logsumexp's dtype.

    """
    rows = problem.batch_heads * problem.seqlen_q
    if not rows:
        return
    kind = kind_of(problem, heads, inputs.mask_kind, has_vectors(problem, inputs.k, inputs.v))
    cuts = cuts_of(problem, heads)
    mask, mask_strides = mask_of(inputs)
    sizes, (scale, *_) = arguments_of(problem, heads)
    _, seqlen_q, _, lower, upper, k_group, v_group = sizes
    q, k, v = inputs.q, inputs.k, inputs.v
    whole, sums_start = cuts.splits == 1, cuts.splits * rows * problem.value_dim
    row_tiles = ceil_div(heads.group * problem.seqlen_q, kind.rows)
    launch(
        split_kernel(kind, whole),
        problem.batch_heads // heads.group * row_tiles * cuts.splits, WARPS * WARP,
        q.array, k.array, v.array, mask,
        out.array if whole else workspace, logsumexp if whole else workspace,
        q.strides, k.strides, v.strides, mask_strides, out.strides,
        (heads.heads, seqlen_q, lower, upper, heads.group, k_group, v_group),
        (cuts.begin, cuts.end, cuts.split_keys, cuts.splits, rows, 0 if whole else sums_start),
        scale,
    )  # fmt: skip
    if not whole:
        launch(
            merge_kernel(problem.dtype.name), rows, MERGE_THREADS,
            workspace, out.array, logsumexp, out.strides,
            (heads.heads, seqlen_q, problem.value_dim, rows, cuts.splits),
        )  # fmt: skip


# ----- for the compile tests -----


def instances() -> Iterator[Instance]:
    """Sizes, precisions, masks and numbers of rows."""
    for kind in (
        DecodeKind("float16", 128, 128, "none", False, 8, 1),
        DecodeKind("bfloat16", 64, 64, "none", False, 8, 1),
        DecodeKind("float16", 128, 128, "bool", True, 8, 4),
        DecodeKind("bfloat16", 256, 256, "float32", True, 8, 4),
        DecodeKind("float16", 59, 59, "none", True, 1, 4),
        DecodeKind("float32", 128, 128, "none", False, 4, 4),
        DecodeKind("float64", 256, 256, "none", True, 2, 2),
    ):
        numbers = precision(kind.precision)
        array, rows = numbers.array, types.Array(numbers.real, 1, "C")
        masks = {"none": array, "bool": types.Array(types.uint8, 1, "C")}
        mask = masks.get(kind.mask) or precision(kind.mask).array
        strides, seven = types.UniTuple(types.int64, 4), types.UniTuple(types.int64, 7)
        six, five = types.UniTuple(types.int64, 6), types.UniTuple(types.int64, 5)
        for whole in (False, True):
            yield Instance(
                f"flash_decode[{kind.precision}, {kind.head_dim}, {kind.mask}, {kind.rows}, "
                f"{'whole' if whole else 'split'}]",
                split_kernel(kind, whole),
                (*[array] * 3, mask, array if whole else rows, rows, *[strides] * 5, seven, six,
                 types.float64),
            )  # fmt: skip
    for name in ("float32", "float64", "float16", "bfloat16"):
        numbers = precision(name)
        rows = types.Array(numbers.real, 1, "C")
        yield Instance(
            f"flash_decode_merge[{name}]",
            merge_kernel(name),
            (rows, numbers.array, rows, types.UniTuple(types.int64, 4), five),
        )


__all__ = ["forward", "forward_workspace", "tiles", "why_not"]
