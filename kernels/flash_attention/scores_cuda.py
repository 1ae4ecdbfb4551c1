"""The rule of scores.py in device functions, for families that handle one score at a time."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np

from ..gpu.runtime import NEGATIVE_INFINITY, device_function, precision, types
from . import scores
from .scores import Tools, is_additive, nearest

keys_of, counts = device_function(scores.keys_of), device_function(scores.counts)


@device_function
def head_place(batch, head, mask_steps):
    """Batch, head, where in the mask's array the head's begins, and the steps to the next query and
    to the next key: what a score's place is counted from.
    """
    start = batch * mask_steps.batch + head * mask_steps.head
    return (
        types.int64(batch), types.int64(head), types.int64(start), types.int64(mask_steps.row),
        types.int64(mask_steps.column),
    )  # fmt: skip


@device_function
def _select(condition, yes, no):
    return yes if condition else no


@cache
def mask_number(mask: str, precision_name: str) -> Any:
    """Device function: an additive mask's number, as it is in the array, in the scores' type."""
    load, real = precision(mask).load, precision(precision_name).real
    if mask != "float64" or real != types.float32:
        return device_function(lambda number: real(load(number)))
    largest, near = real(np.finfo(np.float32).max), device_function(nearest)
    return device_function(lambda number: near(number, real(number), largest, _select))


@cache
def masked_score(mask: str, precision_name: str) -> Any:
    """Device function: `scores.masked_score` for a kind of mask, and inputs of a dtype."""
    nothing = precision(precision_name).real(NEGATIVE_INFINITY)
    load = mask_number(mask if is_additive(mask) else "float32", precision_name)

    @device_function
    def add(score, number):
        return score + load(number)

    return device_function(scores.masked_score(mask, Tools(_select, add, nothing)))


__all__ = ["counts", "head_place", "keys_of", "masked_score"]
