"""Blocks that were given by hand, as a mask function: it reads in which state each block is."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from .kernels.flash_attention.block_lists import FULL, PARTIAL
from .kernels.score_graph import Builder, CapturedArray, Graph
from .score_trace import Traced


def function_of_blocks(
    traced: Traced | None, states: NDArray[Any], block: tuple[int, int]
) -> Traced:
    """Whether the block of a score is full, or it is partial and the mask function counts it.

    Args:
        traced: the mask function; None counts all.
        states: EMPTY, PARTIAL or FULL of each block, (B, H, rows, columns).
        block: queries and keys of a block.

    """
    graph = Graph((), ()) if traced is None else traced.graph
    builder, number = Builder.of(graph), len(graph.captured)
    builder.captured.append(CapturedArray("whole", 4))
    builder.parameters += ["whole"] * 2
    sizes = [builder.parameter(len(graph.parameters) + n) for n in (0, 1)]
    leading = [
        builder.input(name) if n > 1 else builder.constant(0, "whole")
        for name, n in zip("bh", states.shape[:2], strict=True)
    ]
    at = [
        builder.apply("floor_divide", builder.input(name), size)
        for name, size in zip("qk", sizes, strict=True)
    ]
    state = builder.load(number, (*leading, *at))
    counts = builder.apply("equal", state, builder.constant(FULL, "whole"))
    partial = builder.apply("equal", state, builder.constant(PARTIAL, "whole"))
    if graph.outputs:
        partial = builder.apply("logical_and", partial, graph.outputs[0])
    found = builder.finished([builder.apply("logical_or", counts, partial)])
    arrays = () if traced is None else traced.arrays
    parameters = () if traced is None else traced.parameters
    names = () if traced is None else traced.names
    return Traced(
        found, (*arrays, states.astype(np.int32)), (*parameters, *block), (*names, "blocks"),
        "blocks" if traced is None else traced.name,
    )  # fmt: skip


__all__ = ["function_of_blocks"]
