"""Masks that skip: a mask function, and lists of the blocks in which it lets any score count.

    def causal(b, h, q_idx, kv_idx):
        return q_idx >= kv_idx

    mask = create_block_mask(causal, None, None, 131072, 131072)
    print(mask.sparsity(), mask)

Names and meanings are those of `torch.nn.attention.flex_attention`. The lists are made from the
function's graph by interval arithmetic (kernels/flash_attention/block_lists.py): nothing of the
size of the score matrix is ever made.
"""

from __future__ import annotations

from collections import deque
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from .arguments import as_int, as_size
from .block_states import function_of_blocks, function_of_rows
from .kernels.flash_attention.block_lists import (
    EMPTY,
    FULL,
    PARTIAL,
    BlockLists,
    TileLists,
    lists_of_mask,
)
from .mask_functions import MaskMod, snapshot, values_of
from .score_trace import Traced

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Array = npt.NDArray[Any]
BlockSize = tuple[int, int]
SYMBOLS = {EMPTY: " ", PARTIAL: "▒", FULL: "█"}
WIDEST = 48  # blocks of a line that is printed
MOST_CUTS = 16  # masks of some of the rows that a mask keeps


class BlockMask:
    """Which scores of attention count, block by block.

    `create_block_mask` and `from_kv_blocks` make one. It has copies of the arrays that its function
    closes over, and never changes.

    Args:
        lists: the blocks that are not empty; None: those of the function, made when they are asked
            for.
        mask_mod: the function, or None: then all scores of these blocks count.
        shape: (B, H, Q_LEN, KV_LEN); 1 for B or H serves any number.
        block_size: queries and keys of a block.

    """

    def __init__(
        self,
        lists: BlockLists | None,
        mask_mod: MaskMod | None,
        shape: tuple[int, int, int, int],
        block_size: BlockSize,
        traced: Traced | None = None,
        exact: bool = False,
    ) -> None:
        self._given, self._shape, self.BLOCK_SIZE = lists, shape, block_size
        self.mask_mod = mask_mod
        self._traced, self._exact = traced, exact  # exact: the lists follow from the function
        self._cuts: dict[tuple[int, int, int], BlockMask] = {}

    # ----- what there is -----

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(B, H, Q_LEN, KV_LEN)."""
        return self._shape

    @property
    def seq_lengths(self) -> tuple[int, int]:
        """(Q_LEN, KV_LEN)."""
        return self._shape[2], self._shape[3]

    @cached_property
    def lists(self) -> BlockLists:
        """The blocks that are not empty."""
        if self._given is not None:
            return self._given
        made = self.function
        return lists_of_mask(made.graph, made.arrays, made.parameters, self._shape, self.BLOCK_SIZE)

    @cached_property
    def function(self) -> Traced:
        """A function that alone says which scores count. Where the blocks were given by hand, it
        reads in which state each is.
        """
        if self._exact and self._traced is not None:
            return self._traced
        return function_of_blocks(self._traced, self._states, self.BLOCK_SIZE)

    @cached_property
    def tile_lists(self) -> TileLists:
        """The lists as kernels want them."""
        return TileLists(self.lists, self.BLOCK_SIZE, self._shape)

    def numel(self) -> int:
        """The number of scores."""
        return int(np.prod(self._shape, dtype=np.int64))

    def sparsity(self) -> float:
        """Percentage of the blocks that are skipped."""
        lists = self.lists
        blocks = lists.heads * lists.rows * lists.columns
        return 100.0 * (1 - len(lists.entries) / blocks) if blocks else 0.0

    def to_dense(self) -> npt.NDArray[np.int32]:
        """1 for each block that is not empty: (B, H, rows of blocks, columns of blocks)."""
        return (self._states > EMPTY).astype(np.int32)

    def to_mask(self) -> npt.NDArray[np.bool_]:
        """Which scores count, one by one, (B, H, Q_LEN, KV_LEN): for tests, and to read."""
        return self.rows_of_mask(np.arange(self._shape[0] * self._shape[1])).reshape(self._shape)

    def rows_of_mask(self, heads: Array) -> npt.NDArray[np.bool_]:
        """Which scores count, of these heads (numbers b * H + h): (len(heads), Q_LEN, KV_LEN)."""
        q, k = np.arange(self._shape[2])[:, None], np.arange(self._shape[3])
        b, h = (x[:, None, None] for x in (heads // self._shape[1], heads % self._shape[1]))
        found = values_of(self.function, b, h, q, k)
        return np.broadcast_to(found, (len(heads), *self.seq_lengths))

    @cached_property
    def _states(self) -> Array:
        lists = self.lists
        return lists.states().reshape(*self._shape[:2], lists.rows, lists.columns)

    # ----- PyTorch's lists -----

    def _padded(self, lists: BlockLists, full: bool) -> tuple[Array, Array]:
        """Number of entries of each row, and their columns, in front of as many zeros."""
        head, row, column, is_full = (x for x in lists.places)
        chosen = is_full == full
        counts = np.zeros((lists.heads, lists.rows), np.int32)
        np.add.at(counts, (head[chosen], row[chosen]), 1)
        line = head[chosen] * lists.rows + row[chosen]
        starts = np.cumsum(counts.ravel()) - counts.ravel()
        columns = np.zeros((lists.heads, lists.rows, lists.columns), np.int32)
        place = np.arange(len(line)) - starts[line]
        columns.reshape(-1, lists.columns)[line, place] = column[chosen]
        leading = self._shape[:2]
        return (
            counts.reshape(*leading, lists.rows),
            columns.reshape(*leading, lists.rows, lists.columns),
        )

    @property
    def kv_num_blocks(self) -> Array:
        """Number of partial blocks of each row: (B, H, rows), int32."""
        return self._padded(self.lists, full=False)[0]

    @property
    def kv_indices(self) -> Array:
        """Columns of the partial blocks, then zeros: (B, H, rows, columns), int32."""
        return self._padded(self.lists, full=False)[1]

    @property
    def full_kv_num_blocks(self) -> Array:
        """Number of full blocks of each row."""
        return self._padded(self.lists, full=True)[0]

    @property
    def full_kv_indices(self) -> Array:
        """Columns of the full blocks."""
        return self._padded(self.lists, full=True)[1]

    @cached_property
    def _transposed(self) -> BlockLists:
        return self.lists.transposed()

    @property
    def q_num_blocks(self) -> Array:
        """Number of partial blocks of each column: (B, H, columns), int32."""
        return self._padded(self._transposed, full=False)[0]

    @property
    def q_indices(self) -> Array:
        """Rows of the partial blocks of each column."""
        return self._padded(self._transposed, full=False)[1]

    @property
    def full_q_num_blocks(self) -> Array:
        """Number of full blocks of each column."""
        return self._padded(self._transposed, full=True)[0]

    @property
    def full_q_indices(self) -> Array:
        """Rows of the full blocks of each column."""
        return self._padded(self._transposed, full=True)[1]

    # ----- other masks -----

    @classmethod
    def from_kv_blocks(
        cls,
        kv_num_blocks: Array,
        kv_indices: Array,
        full_kv_num_blocks: Array | None = None,
        full_kv_indices: Array | None = None,
        BLOCK_SIZE: int | BlockSize = 128,
        mask_mod: MaskMod | None = None,
        seq_lengths: tuple[int, int] | None = None,
    ) -> BlockMask:
        """A mask of given blocks.

        Args:
            kv_num_blocks: partial blocks of each row of blocks, (B, H, rows).
            kv_indices: their columns, (B, H, rows, columns); only the first ones of a row count.
            full_kv_num_blocks, full_kv_indices: likewise of the full blocks.
            BLOCK_SIZE: of a block, or (queries, keys).
            mask_mod: says which scores of partial blocks count; None: all.
            seq_lengths: (Q_LEN, KV_LEN); whole blocks if not given.

        Raises:
            ValueError: shapes that do not fit, columns that there are not, a block that is given
                twice.

        """
        block = _block_size(BLOCK_SIZE)
        indices = np.asarray(kv_indices)
        if indices.ndim != 4:
            raise ValueError(
                f"kv_indices has shape {indices.shape}; wanted (B, H, rows, columns) of blocks"
            )
        batch, heads, rows, columns = indices.shape
        lengths = (rows * block[0], columns * block[1]) if seq_lengths is None else seq_lengths
        seqlen_q, seqlen_k = _pair("seq_lengths", lengths, "(Q_LEN, KV_LEN)", 0)
        if (-(-seqlen_q // block[0]), -(-seqlen_k // block[1])) != (rows, columns):
            raise ValueError(
                f"seq_lengths {(seqlen_q, seqlen_k)} in blocks of {block} are not the {rows} x "
                f"{columns} blocks of kv_indices"
            )
        if (full_kv_num_blocks is None) != (full_kv_indices is None):
            raise ValueError("full_kv_num_blocks and full_kv_indices: give both, or none")
        states = np.zeros((batch * heads, rows, columns), np.uint8)
        _enter(states, "kv", kv_num_blocks, indices, PARTIAL)
        if full_kv_indices is not None:
            _enter(states, "full_kv", full_kv_num_blocks, np.asarray(full_kv_indices), FULL)
        shape = (batch, heads, seqlen_q, seqlen_k)
        traced = None if mask_mod is None else snapshot(mask_mod, shape)
        return cls(BlockLists.from_states(states), mask_mod, shape, block, traced)

    def __getitem__(self, index: Any) -> BlockMask:
        """The mask of some batches and heads, mask[b], mask[b, h]: numbers or slices."""
        index = index if isinstance(index, tuple) else (index,)
        if len(index) > 2:
            raise IndexError(f"a BlockMask is indexed by [b] or [b, h], got {len(index)} indices")
        numbers = np.arange(self._shape[0] * self._shape[1]).reshape(self._shape[:2])
        index = tuple(
            i if isinstance(i, slice) else _place(i, size)
            for i, size in zip(index, self._shape, strict=False)
        )
        whole = tuple(i if isinstance(i, slice) else slice(i, i + 1) for i in index)
        chosen = numbers[whole]
        if not chosen.size:
            raise IndexError(f"index {index} of a BlockMask leaves no batch, or no head")
        lists = self.lists
        states = BlockLists.from_states(lists.states()[chosen.ravel()])
        picked = _with_heads(self.mask_mod, chosen, self._shape[1])
        shape = (*chosen.shape, *self.seq_lengths)
        traced = None if picked is None else snapshot(picked, shape)
        return BlockMask(states, picked, shape, self.BLOCK_SIZE, traced, self._exact)

    def rows(self, start: int, count: int, keys: int | None = None) -> BlockMask:
        """The mask of some of the queries, which are numbered from 0 anew: for a cache of keys.

            mask.rows(start, 1, start + 1)  # of the query after `start` others, and no later key

        Args:
            start: number of the first query.
            count: how many.
            keys: how many of the keys, from the first one on; None: all.

        Raises:
            ValueError: queries or keys that there are not.

        """
        start, count = as_size(start, "start"), as_size(count, "count", 1)
        keys = self._shape[3] if keys is None else as_size(keys, "keys", 1)
        if start + count > self._shape[2] or keys > self._shape[3]:
            raise ValueError(
                f"queries {start} to {start + count - 1} and {keys} keys are not within a "
                f"BlockMask of shape {self._shape} (B, H, Q_LEN, KV_LEN)"
            )
        shape = (*self._shape[:2], count, keys)
        if shape == self._shape:
            return self
        if (start, count, keys) not in self._cuts:
            if len(self._cuts) >= MOST_CUTS:
                self._cuts.clear()
            self._cuts[start, count, keys] = self._rows(start, shape)
        return self._cuts[start, count, keys]

    def _rows(self, start: int, shape: tuple[int, int, int, int]) -> BlockMask:
        """From the query `start` on."""
        mask_mod = self.mask_mod

        def mask_of_rows(b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
            assert mask_mod is not None
            return mask_mod(b, h, q_idx + start, kv_idx)

        function = None if mask_mod is None else mask_of_rows
        moved = function_of_rows(self.function, start)
        return BlockMask(None, function, shape, self.BLOCK_SIZE, moved, exact=True)

    def is_like(self, other: BlockMask) -> bool:
        """Whether both have the same function, numbers, sizes and blocks."""
        if (self._shape, self.BLOCK_SIZE) != (other._shape, other.BLOCK_SIZE):
            return False
        mine, others = self.function, other.function
        return (
            mine.graph == others.graph
            and mine.parameters == others.parameters
            and all(map(np.array_equal, mine.arrays, others.arrays))
        )

    def __str__(self) -> str:
        """Its blocks, as characters: █ full, ▒ partial."""
        lines = [f"BlockMask(shape={self._shape}, sparsity={self.sparsity():.2f}%)"]
        lists = self.lists
        step = max(-(-max(lists.rows, lists.columns) // WIDEST), 1)
        if lists.heads > 1:
            lines.append(f"[0, 0] of {lists.heads}:")
        for r in range(0, lists.rows if lists.heads else 0, step):
            line = ""
            for c in range(0, lists.columns, step):
                part = self._states[0, 0, r : r + step, c : c + step]
                line += SYMBOLS[FULL if (part == FULL).all() else PARTIAL if part.any() else EMPTY]
            lines.append(line.rstrip())
        return "\n".join(lines)

    __repr__ = __str__

    def picture(self, b: int = 0, h: int = 0) -> Figure:
        """A drawing of the blocks of one head: dark full, light partial. Needs matplotlib.

        Raises:
            ImportError: matplotlib is not installed.
            IndexError: no such batch or head.

        """
        from matplotlib.figure import Figure

        b, h = _place(b, self._shape[0]), _place(h, self._shape[1])
        figure = Figure(figsize=(4, 4), layout="constrained")
        axes = figure.subplots()
        axes.imshow(self._states[b, h], cmap="Blues", vmin=EMPTY, vmax=FULL + 1, aspect="auto")
        axes.set(xlabel="block of keys", ylabel="block of queries")
        axes.set_title(f"{self.sparsity():.0f}% skipped")
        return figure


def _place(given: Any, size: int) -> int:
    """A number of a batch or head; negative ones count from the end."""
    index = as_int(given, "index")
    if not -size <= index < size:
        raise IndexError(f"index {index} of a BlockMask is outside of its size {size}")
    return index % size


def _enter(states: Array, name: str, counts: Any, indices: Array, state: int) -> None:
    """Enter blocks that are given as PyTorch has them."""
    heads, rows, columns = states.shape
    counts = np.asarray(counts)
    if counts.shape != indices.shape[:3] or indices.size != states.size:
        raise ValueError(
            f"{name}_num_blocks has shape {counts.shape} and {name}_indices {indices.shape}; "
            f"wanted (B, H, {rows}) and (B, H, {rows}, {columns})"
        )
    if counts.dtype.kind not in "iu" or indices.dtype.kind not in "iu":
        raise TypeError(f"{name}_num_blocks and {name}_indices must be whole numbers")
    if counts.size and not 0 <= counts.min() <= counts.max() <= columns:
        raise ValueError(f"{name}_num_blocks must be 0 to {columns}, the number of columns")
    used = np.arange(columns) < counts.reshape(heads, rows, 1)
    head, row, place = np.nonzero(used)
    column = indices.reshape(heads, rows, columns)[head, row, place]
    if column.size and not 0 <= column.min() <= column.max() < columns:
        raise ValueError(f"{name}_indices must be 0 to {columns - 1} where they count")
    seen = np.zeros_like(states)
    np.add.at(seen, (head, row, column), 1)
    if (seen > 1).any() or (states[head, row, column] != EMPTY).any():
        raise ValueError(f"{name}_indices has a block twice, or one that is given as another kind")
    states[head, row, column] = state


def _with_heads(mask_mod: MaskMod | None, chosen: Array, heads: int) -> MaskMod | None:
    """A mask function whose b and h count among the chosen ones."""
    if mask_mod is None:
        return None
    batches = (chosen[:, 0] // heads).astype(np.int32)
    of_head = (chosen[0] % heads).astype(np.int32)

    def picked(b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        return mask_mod(batches[b], of_head[h], q_idx, kv_idx)

    return picked


# ----- making masks -----


_recent: deque[BlockMask] = deque(maxlen=8)  # masks of functions that were given to attention


def create_block_mask(
    mask_mod: MaskMod,
    B: int | None,
    H: int | None,
    Q_LEN: int,
    KV_LEN: int,
    BLOCK_SIZE: int | BlockSize = 128,
) -> BlockMask:
    """The blocks in which a mask function lets any score count.

    Args:
        mask_mod: (b, h, q_idx, kv_idx) -> truth value: whether query q_idx of batch b and head h
            sees key kv_idx. It is run once, see `score_trace`.
        B, H: batches and heads of queries; None if the function does not tell them apart: then the
            mask serves any number.
        Q_LEN, KV_LEN: numbers of queries and keys.
        BLOCK_SIZE: of a block, or (queries, keys).

    Raises:
        TypeError: no mask function, or one that does what only Python can do.
        ValueError: sizes that are none; B or H is None and the function depends on it; an index of
            a captured array leaves it.

    """
    mask = _of_function(mask_mod, B, H, Q_LEN, KV_LEN, BLOCK_SIZE)
    _ = mask.lists  # made here, where one expects it
    return mask


def _of_function(
    mask_mod: MaskMod,
    B: int | None,
    H: int | None,
    Q_LEN: int,
    KV_LEN: int,
    BLOCK_SIZE: int | BlockSize = 128,
) -> BlockMask:
    """`create_block_mask`, but that the lists are made when they are asked for."""
    block = _block_size(BLOCK_SIZE)
    shape = (
        1 if B is None else as_size(B, "B", 1), 1 if H is None else as_size(H, "H", 1),
        as_size(Q_LEN, "Q_LEN", 1), as_size(KV_LEN, "KV_LEN", 1),
    )  # fmt: skip
    traced = snapshot(mask_mod, shape)
    for name, size, index in (("B", B, "b"), ("H", H, "h")):
        if size is None and any(traced.graph.depends_on(index)):
            raise ValueError(
                f"{name} is None, and mask_mod `{traced.name}` depends on {index}: give {name}"
            )
    return BlockMask(None, mask_mod, shape, block, traced, exact=True)


def block_mask_of_call(mask_mod: MaskMod, shape: tuple[int, int, int, int]) -> BlockMask:
    """The BlockMask of a function that is given to attention: a recent one, if it is the same. The
    lists of one that is a band are never made.
    """
    made = _of_function(mask_mod, *shape)
    depends = (any(made.function.graph.depends_on(index)) for index in "bh")
    leading = tuple(n if d else 1 for n, d in zip(shape[:2], depends, strict=True))
    made._shape = (leading[0], leading[1], *shape[2:])
    for known in tuple(_recent):
        if known.is_like(made):
            return known
    _recent.append(made)
    return made


def _block_size(given_size: int | BlockSize) -> BlockSize:
    sizes = given_size if isinstance(given_size, tuple | list) else (given_size, given_size)
    return _pair("BLOCK_SIZE", sizes, "a number, or (queries, keys)", 1)


def _pair(name: str, given: Any, wanted: str, least: int) -> tuple[int, int]:
    if not isinstance(given, tuple | list) or len(given) != 2:
        raise ValueError(f"{name} is {given!r}; wanted {wanted}")
    return as_size(given[0], name, least), as_size(given[1], name, least)


__all__ = ["BlockMask", "block_mask_of_call", "create_block_mask"]
