"""The mma kernels in some of their kinds, for the compile tests."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ...gpu.runtime import Instance, types
from ..launch import Architecture, argument_types, example_functions, instances_of
from .backward import key_value_kernel, query_kernel
from .delta import delta_kernel
from .forward import forward_kernel
from .launch import backward_tiles, forward_tiles
from .tiles import Kind


def _signatures(kind: Kind) -> dict[str, tuple[Any, ...]]:
    """numba types of the kernels' arguments, by their names."""
    of = argument_types(kind.precision, kind.mask, kind.functions)
    array, rows, strides, whole = of.array, of.rows, of.strides, types.int64
    last = *of.scalars, of.words, of.lists
    return {
        "delta": (array, array, *[rows] * 5, whole, strides, strides, *[whole] * 3),
        "forward": (
            *of.inputs, array, rows, rows, *[strides] * 5, of.sizes, *last,
        ),
        "key_value": (
            *of.inputs, array, *[rows] * 3, array, array, whole, *[strides] * 7, of.sizes, whole,
            *last,
        ),
        "query": (
            *of.inputs, array, *[rows] * 3, array, rows, *[strides] * 6, of.sizes, *last,
        ),
    }  # fmt: skip


def instances() -> Iterator[Instance]:
    """Numbers, head sizes, masks and dropout; each for some of the GPUs, and all GPUs have some."""
    for kind, architectures in (
        (Kind("float16", 64, 64, "none", True, False, True), {"sm_75": (7, 5)}),
        (
            Kind("float16", 64, 64, "none", False, False, False),
            {"sm_80": (8, 0), "sm_86": (8, 6), "sm_89": (8, 9), "sm_90a": (9, 0)},
        ),
        (Kind("bfloat16", 128, 128, "none", False, False, False), {"sm_90a": (9, 0)}),
        (Kind("float16", 128, 128, "float32", True, True, False), {"sm_86": (8, 6)}),
        (
            Kind("float16", 256, 256, "none", False, False, False),
            {"sm_80": (8, 0), "sm_90a": (9, 0)},
        ),
        (Kind("tf32x3", 64, 64, "bool", False, False, False), {"sm_80": (8, 0)}),
        (
            Kind("float16", 64, 64, "none", False, False, False, example_functions(), True),
            {"sm_80": (8, 0), "sm_86": (8, 6), "sm_89": (8, 9), "sm_90a": (9, 0)},
        ),
        (
            Kind("bfloat16", 128, 128, "none", True, False, False, example_functions()),
            {"sm_80": (8, 0), "sm_86": (8, 6), "sm_90a": (9, 0)},
        ),
        (
            Kind("tf32x3", 64, 64, "float32", False, True, False, example_functions(), True),
            {"sm_80": (8, 0)},
        ),
    ):
        yield from _instances_of(kind, architectures)
    for columns in (64, 8):  # several threads to a row, and one
        kind = Kind("float16", columns, columns, "none", False, False, False)
        yield Instance(
            f"mma_delta[float16, {columns}]", delta_kernel(kind, True), _signatures(kind)["delta"]
        )


def _instances_of(kind: Kind, architectures: dict[str, Architecture]) -> Iterator[Instance]:
    kernels = {name: _kernels(kind, capability) for name, capability in architectures.items()}
    return instances_of("mma", _name(kind), kernels, _signatures(kind))


def _kernels(kind: Kind, architecture: Architecture) -> dict[str, Any]:
    """Forward and backward kernels, in the shape of tiles that an architecture picks."""
    for_keys, for_queries = backward_tiles(kind, architecture)
    return {
        "forward": forward_kernel(kind, forward_tiles(kind, architecture)),
        "key_value": key_value_kernel(kind, for_keys),
        "query": query_kernel(kind, for_queries, kind.mask == "float32"),
    }


def _name(kind: Kind) -> str:
    flags = ", dropout" * kind.dropout + ", scaled first" * kind.scaled_first
    flags += ", functions" * bool(kind.functions) + ", lists" * kind.is_sparse
    return f"{kind.numbers}, {kind.head_dim}, {kind.value_dim}, {kind.mask}{flags}"


__all__ = ["instances"]
