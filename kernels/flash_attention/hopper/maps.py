"""What the copy engine is told of Q, K, V and dO: their tensor maps.

A dimension that a stride of 0 repeats is not in the map: there its matrix has number 0 for all.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from ...gpu.tensor_map import matrices_map
from ..launch import Heads, Ints, Matrices
from ..problem import AttentionProblem


class Each(NamedTuple):
    """Whether a tensor map has a matrix for each batch, and for each head, 1, or one for all, 0."""

    batch: int
    head: int


def each_of(matrices: Matrices) -> Each:
    """What the tensor map of the matrices has."""
    return Each(int(matrices.strides.batch != 0), int(matrices.strides.head != 0))


def tensor_map(
    problem: AttentionProblem, heads: Heads, group: int, matrices: Matrices, rows: int, shape: Ints
) -> Any:
    """The tensor map of Q, K, V or dO.

    Args:
        problem: whose dtype it has.
        heads: of the problem.
        group: heads of queries to one of these matrices.
        matrices: in memory.
        rows: of the boxes that are copied.
        shape: rows and columns of a matrix.

    """
    each = each_of(matrices)
    whole = heads.batch if each.batch else 1, heads.heads // group if each.head else 1, *shape
    return matrices_map(problem.dtype.name, matrices.address, whole, matrices.strides, rows)


__all__ = ["Each", "each_of", "tensor_map"]
