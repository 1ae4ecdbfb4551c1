"""`minitorch.cuda.explain`: which kernels compute a call of flash attention, and why no faster one.

    >>> q = k = v = numpy.zeros((2, 16, 4096, 64), numpy.float16)
    >>> print(minitorch.cuda.explain(q, k, v, is_causal=True, architecture="sm_75"))

No GPU is needed to ask.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..attention_variants import Variant
from ..block_mask import BlockMask
from ..dtypes import BFLOAT16
from ..kernels.flash_attention.block_lists import BlockLists, TileLists
from ..kernels.flash_attention.problem import AttentionProblem, Causal, Window
from ..kernels.flash_attention.schedule import Schedule
from ..kernels.gpu.runtime import compute_capability, is_available
from ..kernels.score_bands import hides_by_position
from ..mask_functions import MaskMod
from ..score_mods import ScoreMod
from . import attention as cuda_attention
from .precision import fp32_precision

Architecture = tuple[int, int]


@dataclass(frozen=True)
class Pass:
    """How one pass is computed.

    Args:
        kernel: the NAME of the module in `cuda_attention.FLASH_ATTENTION` that computes it.
        tiles: the sizes of its tiles, in words; "" if it does not say.
        passed_over: (name, reason) of each faster one that does not take the problem.
        copied: the inputs that are copied first, since their rows do not lie as the kernel needs.
        schedules: by what a kernel computes ("output", "dQ") which tiles of scores it visits;
            empty if the kernel's tiles are cut from the keys that there are.
        lists: likewise, if a block mask says which tiles are visited: its lists for these tiles.

    """

    kernel: str
    tiles: str
    passed_over: tuple[tuple[str, str], ...]
    copied: tuple[str, ...]
    schedules: dict[str, Schedule]
    lists: dict[str, BlockLists]

    def lines(self) -> list[str]:
        """For people."""
        found = [self.kernel + (f": {self.tiles}" if self.tiles else "")]
        for name, lists in self.lists.items():
            heads = "each head's" if lists.heads == 1 else f"{lists.heads} heads'"
            found.append(f"    {heads} {name}: {lists.counts()}")
        if self.schedules and not self.lists:
            counts = (f"{name}: {schedule.counts()}" for name, schedule in self.schedules.items())
            found.append(f"    each head's {'; '.join(counts)}")
        found += [f"    not {name}: {reason}" for name, reason in self.passed_over]
        if self.copied:
            *others, last = self.copied
            names = f"{', '.join(others)} and {last}" if others else last
            found.append(f"    {names} will be copied: rows must be contiguous and aligned")
        return found


@dataclass(frozen=True)
class Explanation:
    """Which kernels compute a call; `print` it.

    Args:
        problem: of the call.
        architecture: compute capability of the GPU.
        forward, backward: the passes.
        notes: of a score function and a block mask: what they are, and what could be better.

    """

    problem: AttentionProblem
    architecture: Architecture
    forward: Pass
    backward: Pass
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        p = self.problem
        what = [f"query {p.query_shape}, key {p.key_shape}, value {p.value_shape}, {p.dtype.name}"]
        if p.left is not None or p.right is not None:
            first = "" if p.left is None else f" from i{p.lower:+}"
            last = "" if p.right is None else f" to i{p.upper - 1:+}"
            what.append(f"query i sees keys{first}{last}")
        if p.mask_kind != "none":
            what.append(f"{'additive' if p.additive_mask else p.mask_kind} mask")
        if p.dropout_p:
            what.append(f"dropout {p.dropout_p:g}")
        if p.dtype == np.float32:
            what.append(f"fp32_precision {p.fp32_precision!r}")
        major, minor = self.architecture
        lines = [f"flash attention: {', '.join(what)}; compute capability {major}.{minor}"]
        lines += [f"  {note}" for note in self.notes]
        for name, found in (("forward", self.forward), ("backward", self.backward)):
            first, *others = found.lines()
            lines += [f"  {name:8} {first}", *(f"  {line}" for line in others)]
        return "\n".join(lines)


def explain(
    query: Any,
    key: Any,
    value: Any,
    attn_mask: Any = None,
    dropout_p: float = 0.0,
    is_causal: Causal = False,
    *,
    scale: float | None = None,
    window: Window | None = None,
    enable_gqa: bool = False,
    score_mod: ScoreMod | None = None,
    block_mask: BlockMask | MaskMod | None = None,
    architecture: str | Architecture | None = None,
) -> Explanation:
    """Say which kernels `flash_attention` would take for these arguments, and why no faster ones.

    Args:
        query: a Tensor, or an array of any library; only shape, dtype and strides are looked at.
        key: likewise.
        value: likewise.
        attn_mask: these, and what follows, as in `flash_attention`.
        dropout_p: see there.
        is_causal: see there.
        scale: see there.
        window: see there.
        enable_gqa: see there.
        score_mod: see there.
        block_mask: see there.
        architecture: "sm_80" or (8, 0); that of the current GPU if None.

    Returns:
        An object to print, whose `forward` and `backward` have `kernel`, `tiles`, `passed_over`,
        `copied`, `schedules` and `lists`: `found.forward.schedules["output"].key_tiles(2)` are the
        numbers of the tiles of keys that the third tile of queries visits.

    Raises:
        ValueError: arguments that do not fit together, or that no kernel takes.
        TypeError: arguments without shape and dtype, or of different dtypes.
        RuntimeError: there is no GPU, and no architecture is given.

    """
    inputs = {"query": query, "key": key, "value": value}
    dtypes = {name: _dtype(name, x) for name, x in inputs.items()}
    if len(set(dtypes.values())) > 1:
        names = ", ".join(dtype.name for dtype in dtypes.values())
        raise TypeError(f"query, key and value must have one dtype, got {names}")
    problem = AttentionProblem.of(
        tuple(query.shape),
        tuple(key.shape),
        tuple(value.shape),
        dtypes["query"],
        attn_mask=None if attn_mask is None else _Described(attn_mask),
        is_causal=is_causal,
        dropout_p=dropout_p,
        scale=scale,
        window=window,
        enable_gqa=enable_gqa,
        fp32_precision=fp32_precision(),
    )
    capability = _capability(architecture)
    variant = Variant.of(score_mod, block_mask, problem)
    problem, given = variant.fused(problem)
    forward, backward = (
        _explained(problem, capability, inputs, given.lists, is_backward)
        for is_backward in (False, True)
    )
    return Explanation(problem, capability, forward, backward, _notes(variant, problem))


def _notes(variant: Variant, problem: AttentionProblem) -> tuple[str, ...]:
    """What there is to say of functions and masks."""
    notes = []
    if variant.score is not None:
        notes.append(f"score_mod `{variant.score.name}`: {len(variant.score.graph.nodes)} nodes")
        if hides_by_position(variant.score.graph):
            notes.append(
                "    it returns -inf by position: as a mask_mod, block_mask=..., whole tiles would "
                "be skipped"
            )
    if variant.block_mask is not None:
        name = variant.block_mask.function.name
        if problem.mask_mod is None:
            notes.append(f"block_mask `{name}`: a band, which the kernels have in their loops")
        else:
            m, n = variant.block_mask.BLOCK_SIZE
            skipped = variant.block_mask.sparsity()
            notes.append(f"block_mask `{name}`: blocks of {m} x {n}, {skipped:.1f}% skipped")
    return tuple(notes)


def _explained(
    problem: AttentionProblem,
    capability: Architecture,
    inputs: dict[str, Any],
    lists: TileLists | None,
    backward: bool,
) -> Pass:
    module, passed_over = cuda_attention.choose(problem, capability, backward)
    tiles = getattr(module, "tiles", None)
    alignment = getattr(module, "ROW_ALIGNMENT", 1)
    block_sizes = getattr(module, "block_sizes", None)
    sizes = {} if block_sizes is None else block_sizes(problem, capability, backward)
    band = problem.lower, problem.upper
    of_tile = {} if lists is None else {name: lists.of(t, *band) for name, t in sizes.items()}
    return Pass(
        module.NAME,
        "" if tiles is None else tiles(problem, capability, backward),
        passed_over,
        tuple(name for name, x in inputs.items() if not _is_aligned(x, alignment)),
        {name: Schedule.of(problem, *blocks) for name, blocks in sizes.items()},
        of_tile,
    )


def _capability(architecture: str | Architecture | None) -> Architecture:
    if architecture is None:
        if not is_available():
            raise RuntimeError("there is no GPU here: say which is meant, architecture='sm_80'")
        return compute_capability()
    if isinstance(architecture, str):
        match = re.fullmatch(r"sm_([1-9]\d*)(\d)[af]?", architecture)
        if match is not None:
            return int(match[1]), int(match[2])
    elif isinstance(architecture, tuple | list) and len(architecture) == 2:
        major, minor = architecture
        if all(isinstance(n, int | np.integer) for n in architecture) and major > 0 <= minor:
            return int(major), int(minor)
    raise ValueError(f"architecture is {architecture!r}; wanted one such as 'sm_80' or (8, 0).")


def _dtype(name: str, x: Any) -> np.dtype[Any]:
    if not hasattr(x, "shape") or not hasattr(x, "dtype"):
        raise TypeError(f"{name} must be a Tensor or an array, got {type(x).__name__}")
    kind = str(x.dtype).removeprefix("torch.")
    return BFLOAT16 if kind == "bfloat16" else np.dtype(kind)


class _Described:
    """A mask of any library in numpy's words."""

    def __init__(self, mask: Any) -> None:
        self.dtype, self.shape = _dtype("attn_mask", mask), tuple(mask.shape)


def _is_aligned(x: Any, alignment: int) -> bool:
    """Whether rows are contiguous and as far apart as a multiple of `alignment` bytes."""
    itemsize = _dtype("x", x).itemsize
    if alignment <= itemsize or 0 in x.shape:
        return True
    if hasattr(x, "_tensor"):
        strides = [n * itemsize for n in x._tensor.strides]
    elif callable(getattr(x, "stride", None)):  # PyTorch's, in elements
        strides = [n * itemsize for n in x.stride()]
    else:
        strides = list(getattr(x, "strides", None) or ())
    *others, last = zip(x.shape, strides, strict=True) if strides else [(1, 0)]
    return (last[0] == 1 or last[1] == itemsize) and not any(
        n > 1 and step % alignment for n, step in others
    )
