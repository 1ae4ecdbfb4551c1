"""What a score function and a block mask add to attention, and the dense form of both.

The order is fixed: scores are scaled, then go through the score function; an additive mask is
added; what the band, a boolean mask or the block mask hide becomes -inf; then comes the softmax. So
soft-capping comes before a bias, as in Gemma 2.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt

from .arguments import type_name
from .autodiff import Context
from .block_mask import BlockMask, block_mask_of_call
from .captured_arrays import numbers_of
from .function import Function
from .kernels.flash_attention.problem import AttentionProblem
from .kernels.flash_attention.variant import (
    NO_VARIANT,
    Captured,
    VariantInputs,
    captured_gradients,
    evaluated,
    gradients_of_tensors,
    wanted_gradients,
)
from .kernels.score_bands import band_of
from .mask_functions import MaskMod
from .score_mods import ScoreMod
from .score_trace import Traced, check, trace

if TYPE_CHECKING:
    from .tensor import Tensor

Array = npt.NDArray[Any]


class Variant(NamedTuple):
    """A score function and a block mask of a call, checked.

    Args:
        score: the function's graph and what it closes over.
        block_mask: whose shape fits.

    """

    score: Traced | None
    block_mask: BlockMask | None

    @staticmethod
    def of(
        score_mod: ScoreMod | None,
        block_mask: BlockMask | MaskMod | None,
        problem: AttentionProblem,
    ) -> Variant:
        """What is asked for.

        Args:
            score_mod: a function (score, b, h, q_idx, kv_idx) -> score.
            block_mask: a BlockMask, or a function (b, h, q_idx, kv_idx) -> truth value, of which
                one is made.
            problem: of the call.

        Raises:
            TypeError: neither, or a function that does what only Python can do.
            ValueError: a mask for other lengths, batches or heads; an index that leaves its array.

        """
        sizes = sizes_of(problem)
        score = None if score_mod is None else trace(score_mod, "score_mod")
        if score is not None:
            check(score, "score_mod", sizes)
        return Variant(score, _checked_mask(block_mask, sizes))

    def fused(self, problem: AttentionProblem) -> tuple[AttentionProblem, VariantInputs]:
        """The problem with the functions' graphs, and what these are given.

        A mask that is a band, as a causal one, becomes the band of the problem. Arrays are copied:
        what is written to them afterwards does not change the gradients.
        """
        if self.score is None and self.block_mask is None:
            return problem, NO_VARIANT
        score, mask, lists = Captured(), Captured(), None
        if self.score is not None:
            score = Captured(self.score.arrays, self.score.parameters).each(_kept)
            problem = replace(problem, score_mod=self.score.graph)
        if self.block_mask is not None:
            function = self.block_mask.function
            band = band_of(function.graph, function.parameters)
            if band is not None:
                return problem.within(*band), VariantInputs(score)
            mask, lists = Captured(function.arrays, function.parameters), self.block_mask.tile_lists
            problem = replace(problem, mask_mod=function.graph, is_sparse=True)
        return problem, VariantInputs(score, mask, lists)

    @property
    def arrays(self) -> tuple[Any, ...]:
        """What the score function closes over."""
        return () if self.score is None else self.score.arrays

    @property
    def names(self) -> tuple[str, ...]:
        """Of these, as the function knows them."""
        return () if self.score is None else self.score.names

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """Tensors among them."""
        return tuple(x for x in self.arrays if hasattr(x, "requires_grad"))


def sizes_of(problem: AttentionProblem) -> tuple[int, int, int, int]:
    """Batches, over all leading dimensions but the last, heads, and the numbers of queries and
    keys.
    """
    return problem.batch, problem.heads, problem.seqlen_q, problem.seqlen_k


def _checked_mask(
    block_mask: BlockMask | MaskMod | None, sizes: tuple[int, int, int, int]
) -> BlockMask | None:
    if block_mask is None or not math.prod(sizes):
        return None
    if callable(block_mask):
        return block_mask_of_call(block_mask, sizes)
    if not isinstance(block_mask, BlockMask):
        raise TypeError(
            f"block_mask must be a BlockMask or a function (b, h, q_idx, kv_idx), got "
            f"{type_name(block_mask)}"
        )
    fits = block_mask.shape[2:] == sizes[2:] and all(
        have in (1, want) for have, want in zip(block_mask.shape[:2], sizes[:2], strict=True)
    )
    if not fits:
        longer = block_mask.shape[2] >= sizes[2] and block_mask.shape[3] >= sizes[3]
        hint = f"; block_mask.rows(0, {sizes[2]}, {sizes[3]}) is its beginning" if longer else ""
        raise ValueError(
            f"block_mask has shape {block_mask.shape} (B, H, Q_LEN, KV_LEN); wanted {sizes}, or 1 "
            f"for B or H{hint if block_mask.shape[2:] != sizes[2:] else ''}"
        )
    return block_mask


def _kept(captured: Any) -> Any:
    """A Tensor as it is, of which the graph knows when it changes; a copy of an array."""
    return captured if hasattr(captured, "requires_grad") else numbers_of(captured)


# ----- dense -----


def dense_mask(block_mask: BlockMask, leading: tuple[int, ...]) -> npt.NDArray[np.bool_]:
    """Which scores count: (*leading, Q_LEN, KV_LEN), or with 1 for what the mask does not tell
    apart.
    """
    found = block_mask.to_mask()
    batch, heads = found.shape[:2]
    if not leading:
        first: npt.NDArray[np.bool_] = found[0, 0]
        return first
    batches = leading[:-1] if batch > 1 else (1,) * len(leading[:-1])
    dense: npt.NDArray[np.bool_] = found.reshape(*batches, heads, *found.shape[2:])
    return dense


class ApplyScoreMod(Function):
    """A score function on a whole matrix of scores (..., H, Nq, Nk), by numpy."""

    @staticmethod
    def forward(ctx: Context, scores: Tensor, traced: Any, *captured: Tensor) -> Tensor:
        """What the function gives; `captured` are the Tensors that it closes over."""
        numbers, given = scores.to_numpy(), Captured(traced.arrays, traced.parameters)
        given = given.each(numbers_of)
        ctx.save_for_backward(numbers, given, traced, captured)
        (found,) = evaluated(traced.graph, given, numbers)
        return scores._from_numpy(np.broadcast_to(found, numbers.shape).astype(scores.dtype))

    @staticmethod
    def backward(ctx: Context, grad_output: Tensor) -> tuple[Any, ...]:
        """Gradients of the scores and of the captured Tensors."""
        scores, given, traced, _ = ctx.saved_values
        upstream = grad_output.to_numpy().astype(np.float64)
        of_scores, sums = captured_gradients(traced.graph, given, scores, upstream)
        wanted = (traced.arrays[n] for n in wanted_gradients(traced.graph))
        found = [x._from_numpy(g.astype(x.dtype)) for x, g in zip(wanted, sums, strict=True)]
        gradients = gradients_of_tensors(
            traced.graph, Captured(traced.arrays, traced.parameters), found
        )
        return grad_output._from_numpy(of_scores.astype(grad_output.dtype)), 0.0, *gradients


__all__ = ["ApplyScoreMod", "Variant", "dense_mask", "sizes_of"]
