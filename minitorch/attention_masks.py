"""Ready-made masks of attention.

Most are mask functions, which `and_masks` and `or_masks` combine and `create_block_mask` makes a
`BlockMask` of; `random_blocks` and `bigbird` are a BlockMask themselves, whose blocks are known.
Queries and keys are numbered from 0; a function that looks back does so from the query's number.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from .arguments import as_int, as_ints, as_size
from .block_mask import BlockMask
from .kernels.flash_attention.block_lists import BlockLists, Runs
from .mask_functions import MaskMod, or_masks

Ints = npt.NDArray[np.integer[Any]]


def causal(offset: int = 0) -> MaskMod:
    """Query i sees keys up to i + offset: 0 aligns the first query with the first key, Nk - Nq the
    last with the last.
    """
    offset = as_int(offset, "offset")

    def causal_mask(b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        return q_idx + offset >= kv_idx

    return causal_mask


def sliding_window(left: int, right: int = 0) -> MaskMod:
    """Query i sees keys i - left ... i + right (Beltagy et al., "Longformer", 2020)."""
    left, right = as_size(left, "left"), as_size(right, "right")

    def window_mask(b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        return (q_idx - kv_idx <= left) & (kv_idx - q_idx <= right)

    return window_mask


def dilated_window(window: int, dilation: int) -> MaskMod:
    """Query i sees every `dilation`-th key before it, `window` of them with itself (Beltagy et al.,
    2020, figure 2c).
    """
    window, dilation = as_size(window, "window", 1), as_size(dilation, "dilation", 1)
    reach = window * dilation

    def dilated_mask(b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        distance = q_idx - kv_idx
        return (distance >= 0) & (distance < reach) & (distance % dilation == 0)

    return dilated_mask


def global_tokens(tokens: int | Sequence[int] | Ints, length: int | None = None) -> MaskMod:
    """Some tokens see all, and are seen by all.

    Args:
        tokens: how many of the first ones, or the numbers of those that are global.
        length: of the sequence, with numbers of tokens.

    Raises:
        ValueError: numbers without a length, or outside of it.

    """
    if isinstance(tokens, int | np.integer):
        count = as_size(tokens, "tokens")

        def first_mask(b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
            return (q_idx < count) | (kv_idx < count)

        return first_mask
    numbers = as_ints(tokens, "tokens")
    if length is None or not all(0 <= n < as_size(length, "length", 1) for n in numbers):
        raise ValueError(
            f"tokens are numbers 0 ... length - 1 of a sequence, got length={length!r}"
        )
    is_global = np.zeros(length, bool)
    is_global[list(numbers)] = True

    def global_mask(b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        return is_global[q_idx] | is_global[kv_idx]

    return global_mask


def longformer(window: int, tokens: int | Sequence[int], length: int | None = None) -> MaskMod:
    """Half a window to each side, and global tokens (Beltagy et al., 2020, figure 2d)."""
    half = as_size(window, "window") // 2
    return or_masks(sliding_window(half, half), global_tokens(tokens, length))


def prefix_lm(prefix: int | Sequence[int]) -> MaskMod:
    """A prefix that all see, and behind it a causal mask (Raffel et al., "T5", 2020, figure 4).

    Args:
        prefix: its length, or one for each batch.

    """
    lengths = np.atleast_1d(np.asarray(prefix))
    _check_whole(lengths, "prefix", 1)
    if lengths.size == 0 or lengths.min() < 0:
        raise ValueError(f"prefix must be lengths of at least 0, got {prefix}")
    if lengths.size == 1:
        length = int(lengths[0])

        def prefix_mask(b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
            return (kv_idx < length) | (q_idx >= kv_idx)

        return prefix_mask

    def prefix_masks(b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        return (kv_idx < lengths[b]) | (q_idx >= kv_idx)

    return prefix_masks


def document_ids(lengths: Sequence[int]) -> npt.NDArray[np.int32]:
    """The number of its document for each token, of documents of these lengths in a row."""
    sizes = as_ints(lengths, "lengths")
    return np.repeat(np.arange(len(sizes), dtype=np.int32), [as_size(n, "lengths") for n in sizes])


def document(ids: Sequence[int] | Ints) -> MaskMod:
    """Tokens see those of their own document.

    Args:
        ids: of each token, (N,), or (B, N): `document_ids` makes them of lengths.

    """
    numbers = np.asarray(ids)
    _check_whole(numbers, "ids", 1, 2)

    def document_mask(b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        if numbers.ndim == 1:
            return numbers[q_idx] == numbers[kv_idx]
        return numbers[b, q_idx] == numbers[b, kv_idx]

    return document_mask


def streaming(window: int, sinks: int = 4) -> MaskMod:
    """The last `window` keys, and the first few (Xiao et al., "Efficient Streaming Language Models
    with Attention Sinks", 2023).
    """
    window, sinks = as_size(window, "window", 1), as_size(sinks, "sinks")

    def streaming_mask(b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        return (q_idx >= kv_idx) & ((q_idx - kv_idx < window) | (kv_idx < sinks))

    return streaming_mask


def neighborhood(width: int, height: int, size: int) -> MaskMod:
    """Pixels of an image, row by row, see a square of size * size around them, which at an edge is
    moved inside (Hassani et al., "Neighborhood Attention Transformer", 2023).

    Args:
        width, height: of the image.
        size: of the square, odd, not larger than the image.

    Raises:
        ValueError: another size.

    """
    width, height = as_size(width, "width", 1), as_size(height, "height", 1)
    size = as_size(size, "size", 1)
    if size % 2 == 0 or size > min(width, height):
        raise ValueError(f"size must be odd and at most {min(width, height)}, got {size}")
    reach = size // 2

    def neighborhood_mask(b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        center_x = np.clip(q_idx % width, reach, width - 1 - reach)
        center_y = np.clip(q_idx // width, reach, height - 1 - reach)
        near_x = abs(center_x - kv_idx % width) <= reach
        return near_x & (abs(center_y - kv_idx // width) <= reach)

    return neighborhood_mask


def shared_prefix(prefix: int, lengths: Sequence[int]) -> MaskMod:
    """Several texts that go on from one prefix: each sees the prefix and itself, causally.

    Args:
        prefix: tokens of the prefix, which come first.
        lengths: of the texts, one after another.

    """
    prefix = as_size(prefix, "prefix")
    ids = np.concatenate([np.full(prefix, -1, np.int32), document_ids(lengths)])

    def shared_prefix_mask(b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        return (q_idx >= kv_idx) & ((kv_idx < prefix) | (ids[q_idx] == ids[kv_idx]))

    return shared_prefix_mask


def block_diffusion(length: int, block_size: int) -> MaskMod:
    """The training mask of block diffusion: `length` noisy tokens, then the same text clean.

    Noisy blocks see themselves and the clean blocks before them, clean ones are causal by blocks
    (Arriola et al., "Block Diffusion", 2025, figure 3).
    """
    length, block_size = as_size(length, "length", 1), as_size(block_size, "block_size", 1)

    def diffusion_mask(b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        q_clean, k_clean = q_idx >= length, kv_idx >= length
        q_block = np.where(q_clean, q_idx - length, q_idx) // block_size
        k_block = np.where(k_clean, kv_idx - length, kv_idx) // block_size
        noisy = ~q_clean & np.where(k_clean, k_block < q_block, k_block == q_block)
        return noisy | (q_clean & k_clean & (k_block <= q_block))

    return diffusion_mask


def tree(parents: Sequence[int]) -> MaskMod:
    """A tree of tokens, as speculative decoding makes: each sees itself and its ancestors.

    Args:
        parents: of each token the number of the one before it, smaller than its own; -1: none.

    Raises:
        ValueError: a parent that is none.

    """
    numbers = as_ints(parents, "parents")
    if not all(-1 <= parent < n for n, parent in enumerate(numbers)):
        raise ValueError("parents must be -1 or the number of an earlier token")
    # An ancestor's descendants follow it in the order in which a walk enters them: one range.
    below = np.ones(len(numbers), np.int32)
    for n in range(len(numbers) - 1, -1, -1):
        if numbers[n] >= 0:
            below[numbers[n]] += below[n]
    entered = np.zeros(len(numbers), np.int32)
    free = np.zeros(len(numbers) + 1, np.int32)  # where the next child begins; the last: next root
    for n, parent in enumerate(numbers):
        entered[n] = free[parent]
        free[parent] += below[n]
        free[n] = entered[n] + 1
    left = entered + below

    def tree_mask(b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        return (entered[kv_idx] <= entered[q_idx]) & (entered[q_idx] < left[kv_idx])

    return tree_mask


# ----- masks of whole blocks -----


def random_blocks(
    length: int, block_size: int = 64, count: int = 3, *, seed: int = 0, heads: int | None = None
) -> BlockMask:
    """Each block of queries sees `count` blocks of keys that are drawn at random.

    Args:
        length: of the sequence.
        block_size: queries, and keys, of a block.
        count: blocks of a row; all, if there are not so many.
        seed: of `numpy.random.default_rng`.
        heads: draw for each of so many heads; None: once for all.

    """
    return bigbird(
        length, block_size, window=0, global_blocks=0, random_blocks=count, seed=seed, heads=heads
    )


def bigbird(
    length: int,
    block_size: int = 64,
    window: int = 3,
    global_blocks: int = 2,
    random_blocks: int = 3,
    *,
    seed: int = 0,
    heads: int | None = None,
) -> BlockMask:
    """A window, global blocks and random blocks (Zaheer et al., "Big Bird: Transformers for Longer
    Sequences", 2020, figure 1).

    Args:
        length: of the sequence.
        block_size: tokens of a block.
        window: blocks around the query's own that it sees, with its own: an odd number, or 0.
        global_blocks: that see all, and are seen by all: one half at the beginning, one at the end,
            an odd one at the beginning.
        random_blocks: of a row, drawn from those that it does not see otherwise.
        seed: of `numpy.random.default_rng`.
        heads: draw for each of so many heads; None: once for all.

    Raises:
        ValueError: sizes below 0, an even window.

    """
    length, block = as_size(length, "length", 1), as_size(block_size, "block_size", 1)
    window, count = as_size(window, "window"), as_size(random_blocks, "random_blocks")
    global_blocks = as_size(global_blocks, "global_blocks")
    if window and window % 2 == 0:
        raise ValueError(f"window must be odd, or 0, got {window}")
    blocks = -(-length // block)
    at_start = min((global_blocks + 1) // 2, blocks)
    at_end = min(global_blocks // 2, blocks - at_start)
    pages = 1 if heads is None else as_size(heads, "heads", 1)
    rng = np.random.default_rng(as_size(seed, "seed"))
    places = [_bigbird_places(rng, blocks, window, at_start, at_end, count) for _ in range(pages)]
    head = np.repeat(np.arange(pages), [len(rows) for rows, _ in places])
    row, column = (np.concatenate([page[n] for page in places]) for n in (0, 1))
    runs = Runs(head, row, column, np.ones_like(row), row >= 0)
    lists = BlockLists.of(runs, pages, blocks, blocks)
    lists = lists.with_whole_blocks((block, block), (length, length))
    return BlockMask(lists, None, (1, pages, length, length), (block, block))


def _bigbird_places(
    rng: np.random.Generator, blocks: int, window: int, at_start: int, at_end: int, count: int
) -> tuple[Ints, Ints]:
    """Rows and columns of one head's blocks."""
    first, last = at_start, blocks - at_end
    everything = np.arange(blocks)
    global_rows = np.concatenate([everything[:first], everything[last:]])
    rows, columns = [np.repeat(global_rows, blocks)], [np.tile(everything, len(global_rows))]
    for row in range(first, last):
        low, high = max(row - window // 2, 0), min(row + window // 2 + 1, blocks)
        if not window:
            low = high = row
        near = np.arange(max(low, first), min(high, last))
        others = np.concatenate(
            [np.arange(first, max(low, first)), np.arange(max(high, first), last)]
        )
        drawn = rng.choice(others, min(count, len(others)), replace=False)
        seen = np.concatenate([global_rows, near, drawn])
        rows.append(np.full(len(seen), row))
        columns.append(seen)
    return np.concatenate(rows), np.concatenate(columns)


def _check_whole(numbers: npt.NDArray[Any], name: str, *dims: int) -> None:
    if numbers.dtype.kind not in "iu" or numbers.ndim not in dims:
        raise TypeError(
            f"{name} must be whole numbers in {' or '.join(map(str, dims))} dimensions, got "
            f"{numbers.dtype} of shape {numbers.shape}"
        )


__all__ = [
    "bigbird", "block_diffusion", "causal", "dilated_window", "document", "document_ids",
    "global_tokens", "longformer", "neighborhood", "prefix_lm", "random_blocks", "shared_prefix",
    "sliding_window", "streaming", "tree",
]  # fmt: skip
