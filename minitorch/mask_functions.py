"""Mask functions: what they give one by one, and their combinations.

Names and meanings are those of `torch.nn.attention.flex_attention`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from .arguments import as_size, given
from .captured_arrays import numbers_of
from .kernels.score_graph import NumpyOperations, evaluate
from .score_trace import Traced, check, trace

Array = npt.NDArray[Any]
MaskMod: TypeAlias = Callable[[Any, Any, Any, Any], Any]


def create_mask(
    mod_fn: Callable[..., Any], B: int | None, H: int | None, Q_LEN: int, KV_LEN: int
) -> Array:
    """What a mask function or a score function gives for every score, one by one.

    Args:
        mod_fn: a mask_mod, or a score_mod, which gets scores of 0.
        B, H: batches and heads; None is 1.
        Q_LEN, KV_LEN: numbers of queries and keys.

    Returns:
        (B, H, Q_LEN, KV_LEN): bool of a mask function, float32 of a score function.

    Raises:
        TypeError: a function of neither 4 nor 5 arguments.

    """
    shape = tuple(
        1 if n is None else as_size(n, name, 1)
        for name, n in (("B", B), ("H", H), ("Q_LEN", Q_LEN), ("KV_LEN", KV_LEN))
    )
    is_score = _arguments(mod_fn) == 5
    traced = trace(mod_fn, "score_mod" if is_score else "mask_mod")
    b, h, q, k = np.ogrid[tuple(slice(n) for n in shape)]
    found = values_of(traced, b, h, q, k)
    return np.broadcast_to(found, shape).astype(np.float32 if is_score else np.bool_)


def and_masks(*mask_mods: MaskMod) -> MaskMod:
    """The function of what all of the functions let count."""
    _check_functions(mask_mods)

    def and_mask(b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        allowed = noop_mask(b, h, q_idx, kv_idx)
        for mask in mask_mods:
            allowed = allowed & mask(b, h, q_idx, kv_idx)
        return allowed

    return and_mask


def or_masks(*mask_mods: MaskMod) -> MaskMod:
    """The function of what any of the functions lets count."""
    _check_functions(mask_mods)

    def or_mask(b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        allowed = ~noop_mask(b, h, q_idx, kv_idx)
        for mask in mask_mods:
            allowed = allowed | mask(b, h, q_idx, kv_idx)
        return allowed

    return or_mask


def noop_mask(b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
    """The mask of all scores."""
    return q_idx == q_idx


def _check_functions(mask_mods: tuple[Any, ...]) -> None:
    for mask in mask_mods:
        if not callable(mask):
            raise TypeError(f"mask_mods must be functions (b, h, q_idx, kv_idx), got {given(mask)}")


def _arguments(function: Any) -> int:
    """How many arguments a function takes, as far as it is known."""
    code = getattr(getattr(function, "func", function), "__code__", None)
    if code is None:
        return 4
    taken: int = code.co_argcount - len(getattr(function, "__defaults__", None) or ())
    return taken


def snapshot(mask_mod: MaskMod, shape: tuple[int, ...]) -> Traced:
    """The function's graph, and copies of the arrays that it closes over."""
    traced = trace(mask_mod, "mask_mod")
    traced = traced._replace(arrays=tuple(numbers_of(x) for x in traced.arrays))
    check(traced, "mask_mod", shape)
    return traced


def values_of(traced: Traced, b: Any, h: Any, q: Any, k: Any) -> Array:
    arrays = [numbers_of(x) for x in traced.arrays]
    inputs = {"b": b, "h": h, "q": q, "k": k, "score": np.float64(0)}
    with np.errstate(all="ignore"):
        (found,) = evaluate(traced.graph, NumpyOperations(arrays, traced.parameters), inputs)
    return np.asarray(found)


__all__ = [
    "MaskMod", "and_masks", "create_mask", "noop_mask", "or_masks", "snapshot", "values_of",
]  # fmt: skip
