"""The host's side of a call that all GPU families share: matrices, heads, inputs and gradients in
device memory, and what goes to every kernel.

A family is a module with

    NAME                               for people
    why_not(problem, architecture)     None if it computes the problem, else why not, in words
    forward(problem, heads, inputs, out, logsumexp, rows, architecture, workspace)
    backward(problem, heads, inputs, out, rows, grad_out, grad_logsumexp, gradients, architecture,
             workspace)
    instances()                        its kernels, for the compile tests

and if need be

    ROW_ALIGNMENT                      bytes at whose multiples the rows that it reads begin: of
                                       queries, keys, values and dO. Their last stride is 1 then
    forward_workspace, backward_workspace    (problem, heads, inputs, architecture) -> bytes of
                                       device memory, which the pass gets as `workspace`, flat, in
                                       float32
                                       (float64 if the problem is in float64); without them it has
                                       no such argument
    tiles(problem, architecture, backward)      says the sizes of its tiles, for people
    block_sizes(problem, architecture, backward)    the same as pairs (block_m, block_n) by the name
                                       of what a kernel computes, for `Schedule`

Without `backward` it is forward only, and `forward` has no argument `rows`. The arguments:

    problem        what is asked for
    heads          how it is laid out (`heads_of`)
    inputs         what is read
    out            where the output (Nq, Dv) of each head goes, or in the backward pass is; its rows
                   are contiguous, in 16-byte pieces if Dv is a multiple of as many elements
    logsumexp      contiguous (batch, heads, Nq), flat, float32 (float64 for float64)
    rows           likewise (batch, heads, Nq, 2), which the backward pass wants back: each row's
                   maximum m, in units of log 2 but with an additive mask, and the sum l of
                   exp(score - m)
    grad_out       the gradient of `out`
    grad_logsumexp of the logsumexp, contiguous; None for 0
    gradients      where the gradients of queries, keys and values go
    architecture   compute capability, (9, 0)
    blocks         sizes of tiles of one's choice; in the backward pass a pair: of the kernel for dK
                   and dV, and of that for dQ

Nothing is allocated in device memory but small tables that are kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import cache
from typing import Any, NamedTuple

import numpy as np

from ..gpu.runtime import Instance, precision, types
from ..philox import dropout_threshold
from ..score_graph import Builder, CapturedArray, Graph
from .block_lists import TileLists
from .problem import AttentionProblem
from .schedule_cuda import NO_LISTS, Lists
from .score_values import words_type
from .scores import NO_FUNCTIONS, Functions

Architecture = tuple[int, int]
Ints = tuple[int, ...]

# ----- what lies in device memory -----


class Strides(NamedTuple):
    """Of matrices, in elements; 0 where a dimension repeats one element."""

    batch: int
    head: int
    row: int
    column: int


NO_STRIDES = Strides(0, 0, 0, 0)


class Matrices(NamedTuple):
    """Matrices (batch, heads, rows, columns) in device memory.

    Args:
        array: flat numba array, whose first element is theirs.
        address: of that element.
        strides: in elements.
        owner: of the memory, kept until the launch.

    """

    array: Any
    address: int
    strides: Strides
    owner: Any = None


class Heads(NamedTuple):
    """How heads share keys and values: query head h uses key head h // k_group.

    Args:
        batch: size of the first dimension.
        heads: of queries, size of the second.
        k_group: heads of queries to one of keys.
        v_group: heads of queries to one of values.
        group: heads of queries to one of dK and dV: k_group if it is v_group too, or else 1.

    """

    batch: int
    heads: int
    k_group: int
    v_group: int
    group: int


def heads_of(problem: AttentionProblem) -> Heads:
    """How a problem's heads share keys and values."""
    heads = problem.heads
    k_group = v_group = 1
    if problem.enable_gqa:
        k_group, v_group = (heads // s[-3] for s in (problem.key_shape, problem.value_shape))
    group = k_group if k_group == v_group else 1
    return Heads(problem.batch, heads, k_group, v_group, group)


class Inputs(NamedTuple):
    """What is read by the forward and the backward pass.

    Args:
        q, k, v: queries, keys (Nk, D) and values (Nk, Dv).
        mask: attn_mask, or None; a bool one as uint8.
        mask_kind: its kind, in the words of `AttentionProblem.mask_kind`; "none" too where there is
            no score that it could be for.
        offset: uint64 array of one element, which is added to the problem's seed.
        functions: the user's; none where there is no score.
        words: what these are given (see score_values.py).
        lists: the tiles that are visited, None if the band says it.
        on_device: function `(name, array)`: the address of a copy that is kept with the lists.
        owners: of the memory that `words` points to, kept until the launch.

    """

    q: Matrices
    k: Matrices
    v: Matrices
    mask: Matrices | None
    mask_kind: str
    offset: Any
    functions: Functions = NO_FUNCTIONS
    words: Ints = (0,)
    lists: TileLists | None = None
    on_device: Callable[[Any, Any], int] | None = None
    owners: tuple[Any, ...] = ()

    @property
    def mask_array(self) -> Any:
        """The mask's array, or some array if there is none."""
        return self.q.array if self.mask is None else self.mask.array

    @property
    def mask_strides(self) -> Strides:
        """The mask's strides; 0 if there is none."""
        return NO_STRIDES if self.mask is None else self.mask.strides

    @property
    def arrays(self) -> tuple[Any, Any, Any, Any]:
        """What a kernel's arguments begin with: the arrays of Q, K, V and the mask."""
        return self.q.array, self.k.array, self.v.array, self.mask_array

    @property
    def strides(self) -> tuple[Strides, Strides, Strides, Strides]:
        """The strides of `arrays`."""
        return self.q.strides, self.k.strides, self.v.strides, self.mask_strides


def functions_of(problem: AttentionProblem) -> Functions:
    """The user's functions, for which kernels are compiled. Which gradients are wanted is none of
    their business.
    """
    if not problem.seqlen_q or not problem.seqlen_k:  # no score that they could be for
        return NO_FUNCTIONS
    return Functions(*(_without_gradients(x) for x in (problem.score_mod, problem.mask_mod)))


@cache
def _without_gradients(graph: Graph | None) -> Graph | None:
    if graph is None:
        return None
    return replace(graph, captured=tuple(x._replace(wants_gradient=False) for x in graph.captured))


def tile_lists(
    problem: AttentionProblem,
    inputs: Inputs,
    tile: tuple[int, int],
    transposed: bool = False,
    spare: int = 0,
) -> Lists:
    """The lists for tiles of (block_m, block_n), in device memory: of each tile of queries its
    tiles of keys, or `transposed`. Behind them is one tile more, and whoever reads an entry ahead
    may read behind that.

    Args:
        problem, inputs: of the call.
        tile: its size.
        transposed: see above.
        spare: number of the tile behind the lists, which is not full.

    """
    if inputs.lists is None or inputs.on_device is None:
        return NO_LISTS
    lists, place = inputs.lists, inputs.on_device
    key = tile, problem.lower, problem.upper
    name = (transposed, spare, *key)
    if name not in lists.kept:
        found = (lists.transposed if transposed else lists.of)(*key)
        entries = np.append(found.entries, np.array([spare << 1, 0], np.int32))
        batch, head = lists.head_steps()
        lists.kept[name] = Lists(
            place(("offsets", *name), found.offsets.astype(np.uint32)),
            place(("entries", *name), entries),
            batch * found.rows, head * found.rows,
        )  # fmt: skip
    kept: Lists = lists.kept[name]
    return kept


class Gradients(NamedTuple):
    """What the backward pass writes.

    Args:
        dq: like the queries, of all their heads.
        dk: (batch, heads // group, Nk, D).
        dv: (batch, heads // group, Nk, Dv).
        ds: of the scores, contiguous (batch, heads, Nq, Nk), flat, zero at first, float32 (float64
            for float64); None if it is not wanted.
        workspace: three flat arrays, each longer than logsumexp by one.

    """

    dq: Matrices
    dk: Matrices
    dv: Matrices
    ds: Any
    workspace: tuple[Any, Any, Any]


def has_vectors(problem: AttentionProblem, columns: tuple[int, ...], *matrices: Matrices) -> bool:
    """Whether rows of as many columns begin at multiples of 16 bytes, and are a multiple of 16
    bytes long.
    """
    count = 16 // precision(problem.dtype.name).storage.itemsize  # a power of two
    for matrix in matrices:
        strides = matrix.strides
        if matrix.address % 16 or strides.column != 1:
            return False
        if (strides.batch | strides.head | strides.row) % count:  # any of them
            return False
    return not any(n % count for n in columns)


# ----- what goes to the kernels -----


class Sizes(NamedTuple):
    """What kernels are told of a problem; a `band` of schedule.py, too."""

    heads: int  # of queries, in a batch
    seqlen_q: int
    seqlen_k: int
    lower: int  # query i sees keys i + lower ... i + upper - 1
    upper: int
    k_group: int  # heads of queries to one of keys
    v_group: int


def sizes_of(problem: AttentionProblem, heads: Heads) -> Sizes:
    """The band's bounds go no farther than where a query sees everything, or nothing, so that
    kernels can compute with them in 32 bits.
    """
    seqlen_q, seqlen_k = problem.seqlen_q, problem.seqlen_k
    far = seqlen_q + seqlen_k
    lower, upper = min(max(problem.lower, -far), far), min(max(problem.upper, -far), far)
    return Sizes(heads.heads, seqlen_q, seqlen_k, lower, upper, heads.k_group, heads.v_group)


def scalars_of(problem: AttentionProblem) -> tuple[float, np.uint64, int, float]:
    """Arguments `scale`, `seed`, `threshold` and `keep` of all kernels: a weight is dropped if its
    random word is below the threshold, else multiplied by 1 / (1 - p).
    """
    p, seed = problem.dropout_p, np.uint64(problem.seed)
    return problem.scale, seed, dropout_threshold(p) if p else 0, problem.keep_scale


# ----- for the compile tests -----


def named_type(fields: Any) -> Any:
    """numba type of a NamedTuple of whole numbers."""
    return types.NamedUniTuple(types.int64, len(fields._fields), fields)


class ArgumentTypes(NamedTuple):
    """numba types of what most kernels take.

    Args:
        array: of the inputs' dtype.
        rows: numbers of rows, in the arithmetic's type.
        mask: the mask's array.
        word: the seed's offset.
        words: what the functions are given.
        lists: `Lists`.
        strides: of one of the matrices.
        sizes: `Sizes`.
        scalars: of `scalars_of`.

    """

    array: Any
    rows: Any
    mask: Any
    word: Any
    words: Any
    lists: Any
    strides: Any
    sizes: Any
    scalars: tuple[Any, Any, Any, Any]

    @property
    def inputs(self) -> tuple[Any, ...]:
        """Of `Inputs.arrays` and the offset."""
        return (self.array, self.array, self.array, self.mask, self.word)


def argument_types(
    precision_name: str, mask_kind: str, functions: Functions = NO_FUNCTIONS
) -> ArgumentTypes:
    """The types for inputs of a dtype, a mask of a kind, and a user's functions."""
    numbers = precision(precision_name)
    array, mask = numbers.array, numbers.array  # which stands there if there is no mask
    if mask_kind != "none":
        is_bool = mask_kind == "bool"
        mask = types.Array(types.uint8, 1, "C") if is_bool else precision(mask_kind).array
    return ArgumentTypes(
        array, types.Array(numbers.real, 1, "C"), mask, types.Array(types.uint64, 1, "C"),
        words_type(functions), named_type(Lists), named_type(Strides), named_type(Sizes),
        (types.float64, types.uint64, types.int64, types.float64),
    )  # fmt: skip


def example_functions() -> Functions:
    """Functions of the kind that people write: a soft cap with a relative table, whose gradient is
    wanted; and documents.
    """
    score = Builder([CapturedArray("real", 2, wants_gradient=True)], ["real"])
    q, k, cap = score.input("q"), score.input("k"), score.parameter(0)
    capped = score.apply("tanh", score.apply("divide", score.input("score"), cap))
    distance = score.apply("minimum", score.apply("subtract", q, k), score.constant(63, "whole"))
    distance = score.apply("maximum", distance, score.constant(0, "whole"))
    bias = score.load(0, (score.input("h"), distance))
    mask = Builder([CapturedArray("whole", 2)])
    b = mask.input("b")
    same = mask.apply("equal", *(mask.load(0, (b, mask.input(name))) for name in ("q", "k")))
    result = score.apply("add", score.apply("multiply", cap, capped), bias)
    return Functions(score.finished([result]), mask.finished([same]))


def instances_of(
    family: str, kind: str, kernels: Mapping[str, Mapping[str, Any]], signatures: Mapping[str, Any]
) -> Iterator[Instance]:
    """Each kernel once, with all architectures that launch it.

    Args:
        family: what names begin with.
        kind: what the kernels are compiled for, in words.
        kernels: for each architecture ("sm_80") what it launches: kernels by their names.
        signatures: by the same names.

    """
    picked: dict[tuple[str, Any], tuple[str, ...]] = {}
    for architecture, found in kernels.items():
        for what, kernel in found.items():
            picked[what, kernel] = (*picked.get((what, kernel), ()), architecture)
    for (what, kernel), names in picked.items():
        yield Instance(
            f"{family}_{what}[{kind}, {', '.join(names)}]", kernel, signatures[what],
            architectures=names,
        )  # fmt: skip


__all__ = [
    "Architecture", "ArgumentTypes", "Gradients", "Heads", "Inputs", "Ints", "Matrices", "Sizes",
    "Strides", "argument_types", "example_functions", "functions_of", "has_vectors", "heads_of",
    "instances_of",
    "named_type", "scalars_of", "sizes_of", "tile_lists",
]  # fmt: skip
