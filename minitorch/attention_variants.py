"""What a score function and a block mask add to attention, and the dense form of both.

The order is fixed: scores are scaled, then go through the score function; an additive mask is
added; what the band, a boolean mask or the block mask hide becomes -inf; then comes the softmax. So
soft-capping comes before a bias, as in Gemma 2.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt

from .arguments import type_name
from .autodiff import Context
from .block_mask import BlockMask, MaskMod, create_block_mask, numbers_of
from .function import Function
from .kernels.flash_attention.problem import AttentionProblem
from .kernels.score_graph import NumpyOperations, clamped, differentiate, evaluate
from .kernels.score_intervals import complaint
from .score_mods import ScoreMod
from .score_trace import Traced, trace

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
            arrays = [numbers_of(x) for x in score.arrays]
            names = dict(zip(("b", "h", "q", "k"), sizes, strict=True))
            wrong = complaint(score.graph, arrays, score.parameters, score.names, names)
            if wrong:
                raise ValueError(f"score_mod `{score.name}`: {wrong}")
        return Variant(score, _checked_mask(block_mask, sizes))

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """Tensors that the score function closes over."""
        arrays = () if self.score is None else self.score.arrays
        return tuple(x for x in arrays if hasattr(x, "requires_grad"))


def sizes_of(problem: AttentionProblem) -> tuple[int, int, int, int]:
    """Batches, over all leading dimensions but the last, heads, and the numbers of queries and
    keys.
    """
    return problem.batch, problem.heads, problem.seqlen_q, problem.seqlen_k


def _checked_mask(
    block_mask: BlockMask | MaskMod | None, sizes: tuple[int, int, int, int]
) -> BlockMask | None:
    if block_mask is None or not sizes[2] * sizes[3]:
        return None
    if callable(block_mask):
        return create_block_mask(block_mask, *sizes)
    if not isinstance(block_mask, BlockMask):
        raise TypeError(
            f"block_mask must be a BlockMask or a function (b, h, q_idx, kv_idx), got "
            f"{type_name(block_mask)}"
        )
    fits = block_mask.shape[2:] == sizes[2:] and all(
        have in (1, want) for have, want in zip(block_mask.shape[:2], sizes[:2], strict=True)
    )
    if not fits:
        raise ValueError(
            f"block_mask has shape {block_mask.shape} (B, H, Q_LEN, KV_LEN); wanted {sizes}, or 1 "
            "for B or H"
        )
    return block_mask


# ----- dense -----


def positions(shape: tuple[int, ...]) -> dict[str, Array]:
    """b, h, q and k of each score of (..., H, Nq, Nk), that broadcast to this shape."""
    shape = (1,) * (3 - len(shape)) + shape
    *batches, heads, seqlen_q, seqlen_k = shape
    b = np.arange(math.prod(batches)).reshape(*batches, 1, 1, 1)
    return {
        "b": b, "h": np.arange(heads)[:, None, None], "q": np.arange(seqlen_q)[:, None],
        "k": np.arange(seqlen_k),
    }  # fmt: skip


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
        numbers = scores.to_numpy()
        arrays = [numbers_of(x) for x in traced.arrays]
        ctx.save_for_backward(numbers, arrays, traced, captured)
        (found,) = _evaluated(traced.graph, arrays, traced.parameters, numbers)
        return scores._from_numpy(np.broadcast_to(found, numbers.shape).astype(scores.dtype))

    @staticmethod
    def backward(ctx: Context, grad_output: Tensor) -> tuple[Any, ...]:
        """Gradients of the scores and of the captured Tensors. What has gradient 0 passes none on,
        whatever the derivative is there.
        """
        scores, arrays, traced, captured = ctx.saved_values
        derivative = differentiate(traced.graph)
        found = _evaluated(derivative.graph, arrays, traced.parameters, scores)
        upstream = grad_output.to_numpy().astype(np.float64)

        def times(x: Any) -> Array:
            return np.where(upstream == 0, 0, upstream * x)

        tensors = [n for n, x in enumerate(traced.arrays) if hasattr(x, "requires_grad")]
        sums = {n: np.zeros(arrays[n].shape) for n in tensors}
        for load in derivative.loads:
            total, part = sums[load.captured], times(found[load.partial])
            places = clamped([found[i] for i in load.indices], total.shape)
            np.add.at(total, tuple(np.broadcast_to(x, part.shape) for x in places), part)
        gradients = [
            x._from_numpy(sums[n].astype(x.dtype)) for n, x in zip(tensors, captured, strict=True)
        ]
        of_scores = grad_output._from_numpy(times(found[1]).astype(grad_output.dtype))
        return of_scores, 0.0, *gradients


def _evaluated(graph: Any, arrays: Any, parameters: Any, scores: Array) -> list[Any]:
    real = scores.dtype if scores.dtype == np.float64 else np.float32
    inputs = {**positions(scores.shape), "score": scores.astype(real)}
    with np.errstate(all="ignore"):
        return evaluate(graph, NumpyOperations(arrays, parameters, real), inputs)


__all__ = ["ApplyScoreMod", "Variant", "dense_mask", "positions", "sizes_of"]
