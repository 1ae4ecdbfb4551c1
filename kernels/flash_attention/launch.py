"""The host's side of a call that all GPU families share: matrices, heads, inputs and gradients in
device memory, and the numbers that go to every kernel.
"""

from __future__ import annotations

from math import prod
from typing import Any, NamedTuple

import numpy as np

from ..gpu.runtime import precision, types
from ..philox import dropout_threshold
from .problem import AttentionProblem

Architecture = tuple[int, int]
Ints = tuple[int, ...]


class Matrices(NamedTuple):
    """Matrices (batch, heads, rows, columns) in device memory.

    Args:
        array: flat numba array, whose first element is theirs.
        address: of that element.
        strides: four, in elements; 0 where a dimension repeats one element.
        owner: of the memory, kept until the launch.

    """

    array: Any
    address: int
    strides: Ints
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
    """All leading dimensions but the last are the batch."""
    heads = problem.leading[-1] if problem.leading else 1
    k_group = v_group = 1
    if problem.enable_gqa:
        k_group, v_group = (heads // s[-3] for s in (problem.key_shape, problem.value_shape))
    group = k_group if k_group == v_group else 1
    return Heads(prod(problem.leading[:-1]), heads, k_group, v_group, group)


class Inputs(NamedTuple):
    """What is read by the forward and the backward pass.

    Args:
        q, k, v: queries, keys (Nk, D) and values (Nk, Dv).
        mask: attn_mask, or None; a bool one as uint8.
        mask_kind: "none", "bool" or the name of its dtype.
        offset: uint64 array of one element, which is added to the problem's seed.

    """

    q: Matrices
    k: Matrices
    v: Matrices
    mask: Matrices | None
    mask_kind: str
    offset: Any


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


def has_vectors(problem: AttentionProblem, *matrices: Matrices) -> bool:
    """Whether all rows begin at multiples of 16 bytes and are a multiple of 16 bytes long."""
    itemsize = precision(problem.dtype.name).storage.itemsize
    count = 16 // itemsize
    return (
        problem.head_dim % count == 0
        and problem.value_dim % count == 0
        and all(
            m.address % 16 == 0
            and m.strides[3] == 1
            and all(stride % count == 0 for stride in m.strides[:3])
            for m in matrices
        )
    )


def arguments_of(problem: AttentionProblem, heads: Heads) -> tuple[Ints, tuple[Any, ...]]:
    """The kernels' sizes, and scale, seed, threshold and factor of weights that are kept."""
    far = problem.seqlen_q + problem.seqlen_k  # sees everything, and stays within 32 bits
    lower, upper = (min(max(x, -far), far) for x in (problem.lower, problem.upper))
    sizes = (
        heads.heads, problem.seqlen_q, problem.seqlen_k, lower, upper, heads.k_group,
        heads.v_group,
    )  # fmt: skip
    p = problem.dropout_p
    threshold = dropout_threshold(p)
    keep = 1.0 / (1.0 - p) if threshold < 1 << 32 else 0.0  # no number of 32 bits reaches it
    return sizes, (float(problem.scale), np.uint64(problem.seed), threshold, keep)


def mask_of(inputs: Inputs) -> tuple[Any, Ints]:
    """The mask's array, some array if there is none, and its strides."""
    if inputs.mask is None:
        return inputs.q.array, (0, 0, 0, 0)
    return inputs.mask.array, inputs.mask.strides


def mask_type(kind: str, without: Any) -> Any:
    """numba type of the mask of a kernel, by its kind in `Inputs`; `without` is that of the array
    which stands there if there is no mask.
    """
    if kind == "none":
        return without
    return types.Array(types.uint8, 1, "C") if kind == "bool" else precision(kind).array


__all__ = [
    "Architecture", "Gradients", "Heads", "Inputs", "Ints", "Matrices", "arguments_of",
    "has_vectors", "heads_of", "mask_of", "mask_type",
]  # fmt: skip
