"""P and dS of one tile in registers: what both kernels of the Hopper backward pass do with it.

    P  = exp2(scale S - L)             S is -inf where the query may not see the key; with an
                                       additive mask exp(scale S + mask - L)
    dS = P * (Z dP - delta)            Z = 1 / (1 - p) where dropout keeps the weight, else 0

How a warpgroup's tile of 64 rows lies in registers is told in register_tile.py. In the kernel for
dQ its rows are queries and its columns keys. In the kernel for dK and dV it is the other way round:
there the tile is S^T, which makes P^T and dS^T, as they lie, first factors of P^T dO and dS^T Q.
Functions take either, and `keys_are_rows` says which. The numbers of a query, its logsumexp L and
delta = rowsum(dO * O), are two of a lane's registers if queries are rows; if they are columns, they
are read from shared memory where they are needed: 16 numbers L, 16 of delta, 16 rests, and so on.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

from ...gpu.ptx import ld_shared_v2_f32, mul_rn_f32
from ...gpu.register_tile import Place, RegisterTile
from ...gpu.runtime import device_function, types
from ...gpu.traced import fma, select, traced
from ...score_graph import Node
from ..fragments.scores import exponential, mask_scores, modify_scores
from ..fragments.store import store_rows
from ..variant import derivative_of
from .backward_pipeline import ROW_BYTES
from .tiles import Kind

WORD = types.uint32


def _of_queries(keys_are_rows: bool, given: Any) -> Callable[[Place], Any]:
    """A function of a place: the number of its query."""
    if not keys_are_rows:
        return lambda place: given[place.own_row]
    pairs: dict[int, Any] = {}

    def number(place: Place) -> Any:
        j, c = divmod(place.column, 8)
        if j not in pairs:
            pairs[j] = ld_shared_v2_f32(given + (j // 2 * (16 * ROW_BYTES) + j % 2 * 32))
        return pairs[j][c]

    return number


def _given(keys_are_rows: bool) -> Any:
    return WORD if keys_are_rows else types.UniTuple(types.float32, 2)


# ----- P -----


@cache
def probabilities(kind: Kind, tile: RegisterTile, keys_are_rows: bool) -> Any:
    """Traced `(scores, scale, shifts)`: exp2(scale * scores - L); with an additive mask, where the
    scores are scaled already, exp(scores - L).
    """
    power = exponential(kind)

    @traced(tile.type, tile.type, types.float32, _given(keys_are_rows))
    def run(scores, scale, shifts):
        shift = _of_queries(keys_are_rows, shifts)
        return [power(scores[p.register], scale, shift(p)) for p in tile.places()]

    return run


def has_slopes(kind: Kind) -> bool:
    """Whether the score function's derivative by the score is another number than 1."""
    if kind.functions.score is None:
        return False
    graph = derivative_of(kind.functions.score).graph
    return graph.nodes[graph.outputs[1]] != Node("constant", "real", value="1.0")


@cache
def weigher(kind: Kind, tile: RegisterTile, keys_are_rows: bool) -> Any:
    """Device function: P of a tile of scores; `whole` says that all of them count. With
    `has_slopes` the slopes come after P.

    `query` and `key` are those of the lane's first score. The scores are scaled and masked as in
    the forward pass, to the last bit.
    """
    scaled_first, has_mask = kind.scaled_first, kind.mask != "none"
    scale_all = tile.each(mul_rn_f32, tile.type, types.float32)
    derives, functions = has_slopes(kind), kind.functions
    options = functions, derives, True
    masked = mask_scores(kind.mask, tile, scaled_first, keys_are_rows, True, *options)
    exponentials = probabilities(kind, tile, keys_are_rows)
    # What is computed for keys past the end is not written, where keys are rows.
    has_edges, one = kind.banded or kind.is_sparse or not keys_are_rows, types.float32(1.0)
    # Whole tiles may have exponentials of their own, right behind their product. At D = 64 that is
    # 4% faster, with dropout 5% slower; and scaled first, registers spill without.
    apart = not kind.dropout

    if functions.score is not None:
        return _user_weigher(kind, tile, masked, exponentials, keys_are_rows)

    @device_function
    def weigh(scores, scale, shifts, whole, query, key, band, mask, place, words):
        if has_mask or (has_edges and not whole):
            scores = masked(scores, query, key, band, mask, place, scale, words)
        elif scaled_first:
            return exponentials(scale_all(scores, scale), one, shifts)
        elif apart:
            return exponentials(scores, scale, shifts)
        return exponentials(scores, one if scaled_first else scale, shifts)

    return weigh


def _user_weigher(
    kind: Kind, tile: RegisterTile, masked: Any, exponentials: Any, keys_are_rows: bool
) -> Any:
    """`weigher` where there is a score function, which acts on whole tiles, too."""
    derives, count, always_masked = has_slopes(kind), tile.registers, kind.mask != "none"
    modified = modify_scores(tile, kind.functions, keys_are_rows, derives, True)
    factor = types.float32(1.0 if kind.additive else kind.unit_of_results)

    @device_function
    def weigh(scores, scale, shifts, whole, query, key, band, mask, place, words):
        if always_masked or not whole:
            found = masked(scores, query, key, band, mask, place, scale, words)
        else:
            found = modified(scores, query, key, band, place, scale, words)
        weights = exponentials(found[:count], factor, shifts)
        return weights + found[count:] if derives else weights

    return weigh


@cache
def apply_slopes(tile: RegisterTile) -> Any:
    """Traced `(ds, slopes)`: gradients of what the score function got; 0 where they are 0."""

    @traced(tile.type, tile.type, tile.type)
    def run(ds, slopes):
        return [select(x == 0.0, 0.0, x * slope) for x, slope in zip(ds, slopes, strict=True)]

    return run


@cache
def complete(tile: RegisterTile) -> Any:
    """Traced `(p, rests)`: P times the rest of its query; keys are rows, and `rests` is the place
    of that of the lane's first query.
    """

    @traced(tile.type, tile.type, WORD)
    def run(weights, rests):
        rest = _of_queries(True, rests)
        return [weights[p.register] * rest(p) for p in tile.places()]

    return run


# ----- dS -----


@cache
def score_gradients(tile: RegisterTile, keys_are_rows: bool) -> Any:
    """Traced `(p, dp, keep, delta)`: P * (keep * dP - delta); `keep` is 1 without dropout."""

    @traced(tile.type, tile.type, tile.type, types.float32, _given(keys_are_rows))
    def run(weights, dp, keep, delta):
        shift = _of_queries(keys_are_rows, delta)
        return [weights[p.register] * fma(dp[p.register], keep, -shift(p)) for p in tile.places()]

    return run


# ----- results -----


@cache
def write_rows(precision: str, columns: int, vectors: bool) -> Any:
    """Device function `(sums, factor, address, row_step, rows, columns, lane)`: a warpgroup's tile
    times a factor, rounded to 16 bits, to global memory.

    `address` is that of the lane's row, `row_step` counts bytes. Of the rows from the lane's first
    one on, and of all columns, `rows` and `columns` are to be written. With `vectors` rows begin at
    multiples of 16 bytes and are as long.
    """
    tile, u64, whole = RegisterTile(columns), types.uint64, types.int32
    scale_all = tile.each(lambda x, factor: x * factor, tile.type, types.float32)
    store = store_rows(precision, columns, vectors)

    @device_function
    def write(sums, factor, address, row_step, rows, wanted, lane):
        addresses = u64(address), u64(address + u64(8 * row_step))
        sums = scale_all(sums, types.float32(factor))
        store(sums, addresses, (rows > 0, rows > 8), whole(wanted), lane)

    return write


__all__ = [
    "apply_slopes", "complete", "has_slopes", "score_gradients", "weigher", "write_rows",
]  # fmt: skip
