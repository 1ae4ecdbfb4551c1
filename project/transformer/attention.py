"""Kinds of attention by name, as `--attention` has them: all is causal, some of it sparse."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from minitorch import attention_masks

from .errors import UserError

WHOLE = ("flash", "standard")  # all positions up to one's own


def window(length: int, left: int = 32) -> Any:
    """Each position sees so many before it."""
    return attention_masks.sliding_window(left)


def dilated(length: int, window: int = 16, dilation: int = 2) -> Any:
    """Every `dilation`-th of the positions before it, `window` of them."""
    return attention_masks.dilated_window(window, dilation)


def streaming(length: int, window: int = 32, sinks: int = 4) -> Any:
    """The last `window` positions, and the first few."""
    return attention_masks.streaming(window, sinks)


def longformer(length: int, window: int = 64, tokens: int = 4) -> Any:
    """Half a window to each side, and the first `tokens` see all and are seen by all."""
    return attention_masks.longformer(window, tokens)


def bigbird(
    length: int,
    block_size: int = 16,
    window: int = 3,
    global_blocks: int = 2,
    random_blocks: int = 1,
) -> Any:
    """A window, global and random ones, of blocks."""
    return attention_masks.bigbird(length, block_size, window, global_blocks, random_blocks, seed=0)


SPARSE: dict[str, Callable[..., Any]] = {
    made.__name__: made for made in (window, dilated, streaming, longformer, bigbird)
}


def in_words() -> str:
    """All kinds, with their numbers and defaults, for --help."""
    kinds = []
    for name, made in SPARSE.items():
        numbers = list(inspect.signature(made).parameters.values())[1:]
        kinds.append(f"{name}[:{','.join(f'{n.name}={n.default}' for n in numbers)}]")
    return f"{', '.join(WHOLE)}, or sparse: {', '.join(kinds)}"


def mask_of(kind: str, length: int) -> Any:
    """The mask of a kind of attention, None if there is none.

    Args:
        kind: a name, with numbers behind a colon: "window:64", "bigbird:16,3,2,1"; those that are
            left out have their defaults.
        length: of the longest sequence.

    Raises:
        UserError: there is no such kind, or numbers that it does not take.

    """
    if kind in WHOLE:
        return None
    name, _, behind = kind.partition(":")
    if name not in SPARSE:
        raise UserError(f"--attention must be {in_words()}, got {kind:.40}")
    try:
        numbers = [int(number) for number in behind.split(",")] if behind else []
        inspect.signature(SPARSE[name]).bind(length, *numbers)
        return SPARSE[name](length, *numbers)
    except (TypeError, ValueError) as error:
        raise UserError(f"--attention {kind:.40}: {error}") from None


__all__ = ["SPARSE", "WHOLE", "in_words", "mask_of"]
