"""Mask functions that follow from others: of blocks that were given by hand, and of some rows."""

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


def function_of_rows(traced: Traced, start: int) -> Traced:
    """The mask function of queries that are numbered from `start` on. The number is a parameter, so
    all starts have one graph.
    """
    graph = traced.graph
    builder = Builder(graph.captured, (*graph.parameters, "whole"))
    number = builder.parameter(len(graph.parameters))
    places: list[int] = []
    for node in graph.nodes:
        n = builder.node(node._replace(operands=tuple(places[x] for x in node.operands)))
        places.append(builder.apply("add", n, number) if node.name == "q" else n)
    moved = builder.finished([places[n] for n in graph.outputs])
    return traced._replace(graph=moved, parameters=(*traced.parameters, start))


__all__ = ["function_of_blocks", "function_of_rows"]
