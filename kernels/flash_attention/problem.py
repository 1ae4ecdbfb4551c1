"""What is to be computed: one frozen description of an attention call, and all validation of it.

`AttentionProblem.of(...)` is the only constructor and raises before any work is done; everything
below it (the CPU's and the GPU's kernels) takes a problem and checks nothing.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from numbers import Real
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import DTypeLike, NDArray

from ..philox import dropout_threshold
from ..score_graph import Graph
from .scores import is_additive

Shape = tuple[int, ...]
Causal = bool | Literal["top-left", "bottom-right"]
Window = tuple[int | None, int | None]
Float32Precision = Literal["ieee", "tf32", "tf32x3"]

DTYPES = ("float32", "float64", "float16", "bfloat16")
FLOAT32_PRECISIONS = ("ieee", "tf32", "tf32x3")


class HasShape(Protocol):
    """An array or a tensor, wherever its elements are."""

    @property
    def shape(self) -> Shape: ...

    @property
    def dtype(self) -> np.dtype[Any]: ...


@dataclass(frozen=True)
class AttentionProblem:
    """softmax(scale * Q K^T + mask) V, and which keys each query may see.

    Queries (..., Nq, D), keys (..., Nk, D) and values (..., Nk, Dv), whose leading dimensions
    broadcast to `leading`. Two things decide which keys a query may see; both must allow a key.
    (PyTorch refuses the two together.)

    The band: key j for query i iff `i + offset - left <= j <= i + offset + right`, where `None` is
    unbounded. `is_causal` is `right = 0`. `offset` is 0, which aligns the first query with the
    first key ("top-left", as PyTorch does), or with "bottom-right" Nk - Nq, which aligns the last
    with the last (queries that continue a cache of keys). A window without `is_causal` is aligned
    top-left. ::

        top-left          bottom-right        (causal, Nq = 2, Nk = 4)
        1 . . .           1 1 1 .
        1 1 . .           1 1 1 1

    `attn_mask`: boolean, True where the key takes part; or floating point, added to the scaled
    score. `mask_kind` says which, here as in all kernels: "none", "bool", or an additive mask's
    dtype by its name.

    `score_mod` and `mask_mod`: graphs of a user's functions (scores.py says where they act). With
    `is_sparse` there are lists of the tiles in which `mask_mod` lets any score count. The arrays
    and numbers that the functions close over, and the lists, are a call's `VariantInputs`.

    A query that may see no key has output 0, logsumexp -inf and zero gradients. A NaN or an
    infinity in a key or value that is masked out may still reach other queries of the same tile,
    through 0 * NaN.
    """

    query_shape: Shape
    key_shape: Shape
    value_shape: Shape
    dtype: np.dtype[Any]
    leading: Shape
    mask_kind: str
    scale: float
    left: int | None
    right: int | None
    offset: int
    dropout_p: float
    seed: int
    enable_gqa: bool
    fp32_precision: Float32Precision = "ieee"
    score_mod: Graph | None = None
    mask_mod: Graph | None = None
    is_sparse: bool = False

    @staticmethod
    def of(
        query_shape: Shape,
        key_shape: Shape,
        value_shape: Shape,
        dtype: DTypeLike,
        *,
        attn_mask: HasShape | None = None,
        is_causal: Causal = False,
        dropout_p: float = 0.0,
        scale: float | None = None,
        window: Window | None = None,
        enable_gqa: bool = False,
        seed: int = 0,
        fp32_precision: Float32Precision = "ieee",
    ) -> AttentionProblem:
        """Check every argument; ValueError or TypeError says which is wrong, and what is wanted.

        Args:
            query_shape, key_shape, value_shape: (..., Nq, D), (..., Nk, D), (..., Nk, Dv).
            dtype: of the inputs and the output: float32 or float64, which are computed with as they
                are, or (on a GPU) float16 or bfloat16, computed with in float32.
            attn_mask: bool or floating point, broadcastable to (..., Nq, Nk); only its shape and
                dtype are looked at.
            is_causal: False; True or "top-left"; "bottom-right".
            dropout_p: probability, in [0, 1], with which an attention weight is dropped.
            scale: factor of the scores; None is 1 / sqrt(D).
            window: (left, right), each None or -1 (unbounded) or a number of keys >= 0. One that
                reaches over all keys is unbounded.
            enable_gqa: query's third-last dimension (heads) may be a multiple of key's and value's.
            seed: 64-bit key of the dropout mask.
            fp32_precision: how a GPU may multiply float32 numbers: "ieee", "tf32" or "tf32x3" (see
                `minitorch.cuda.fp32_precision`).
        """
        kind = np.dtype(dtype)
        if kind.name not in DTYPES:
            raise TypeError(f"attention takes {', '.join(DTYPES)}, not {kind}.")
        enable_gqa = checked_flag("enable_gqa", enable_gqa)
        leading = _leading_shape(
            tuple(query_shape), tuple(key_shape), tuple(value_shape), enable_gqa
        )
        seqlen_q, seqlen_k = query_shape[-2], key_shape[-2]
        left, right, offset = _band(is_causal, window, seqlen_q, seqlen_k)
        return AttentionProblem(
            query_shape=tuple(query_shape),
            key_shape=tuple(key_shape),
            value_shape=tuple(value_shape),
            dtype=kind,
            leading=leading,
            mask_kind=_mask_kind(attn_mask, (*leading, seqlen_q, seqlen_k)),
            scale=_scale(scale, query_shape[-1], kind),
            left=left,
            right=right,
            offset=offset,
            dropout_p=checked_dropout_p(dropout_p),
            seed=checked_seed(seed),
            enable_gqa=enable_gqa,
            fp32_precision=checked_fp32_precision(fp32_precision),
        )

    @property
    def additive_mask(self) -> bool:
        """Whether the mask is added to the scores."""
        return is_additive(self.mask_kind)

    @property
    def has_functions(self) -> bool:
        """Whether a score function or a mask function takes part."""
        return self.score_mod is not None or self.mask_mod is not None

    @property
    def keep_scale(self) -> float:
        """What dropout multiplies the weights by that it keeps: 1 / (1 - dropout_p). It keeps none
        where no random word of 32 bits reaches the threshold: 0.
        """
        p = self.dropout_p
        return 1 / (1 - p) if p == 0 or dropout_threshold(p) < 1 << 32 else 0.0

    @property
    def scale_in_exponent(self) -> bool:
        """Whether an exponential may scale the scores itself, exp(scale * s - scale * m), which
        saves a product. A factor of 0 or less would turn the maximum m over; a large one brings
        scores that float32 rounds to more than a unit, so that the weight of m is far from 1.
        """
        return 0.0 < self.scale <= 1.0

    @property
    def batch(self) -> int:
        """The product of all leading dimensions but the last, which is that of heads."""
        return math.prod(self.leading[:-1])

    @property
    def heads(self) -> int:
        """Heads of queries: the last leading dimension, 1 if there is none."""
        return self.leading[-1] if self.leading else 1

    @property
    def batch_heads(self) -> int:
        """Number of independent attention matrices: the product of `leading`."""
        return math.prod(self.leading)

    @property
    def seqlen_q(self) -> int:
        """Nq, the number of queries."""
        return self.query_shape[-2]

    @property
    def seqlen_k(self) -> int:
        """Nk, the number of keys."""
        return self.key_shape[-2]

    @property
    def head_dim(self) -> int:
        """D, the length of a query and of a key."""
        return self.query_shape[-1]

    @property
    def value_dim(self) -> int:
        """Dv, the length of a value."""
        return self.value_shape[-1]

    @property
    def out_shape(self) -> Shape:
        """(..., Nq, Dv)."""
        return (*self.leading, self.seqlen_q, self.value_dim)

    @property
    def logsumexp_shape(self) -> Shape:
        """(..., Nq)."""
        return (*self.leading, self.seqlen_q)

    @property
    def lower(self) -> int:
        """The first key that query i may see is clip(i + lower, 0, Nk)."""
        if self.left is None:
            return -(self.seqlen_q + self.seqlen_k)
        return self.offset - self.left

    @property
    def upper(self) -> int:
        """One past the last key that query i may see is clip(i + upper, 0, Nk)."""
        if self.right is None:
            return self.seqlen_q + self.seqlen_k
        return self.offset + self.right + 1

    def within(self, lower: int | None, upper: int | None) -> AttentionProblem:
        """The same where query i also sees no key before i + lower, or from i + upper on; None is
        no bound.
        """
        left, right = self.left, self.right
        if lower is not None:
            left = self.offset - max(lower, self.lower)
        if upper is not None:
            right = min(upper, self.upper) - 1 - self.offset
        return replace(self, left=left, right=right)

    def allowed_positions(self) -> NDArray[np.bool_]:
        """The band as a boolean mask (Nq, Nk), True where allowed: for tests and for teaching."""
        row = np.arange(self.seqlen_q)[:, None]
        column = np.arange(self.seqlen_k)[None, :]
        return (column >= row + self.lower) & (column < row + self.upper)


def _leading_shape(query: Shape, key: Shape, value: Shape, enable_gqa: bool) -> Shape:
    """Check the shapes against each other; the leading dimensions of the output."""
    for name, shape in (("query", query), ("key", key), ("value", value)):
        if len(shape) < 2:
            raise ValueError(f"{name} has shape {shape}; wanted (..., length, head size).")
    if query[-1] != key[-1]:
        raise ValueError(
            f"query has shape {query} and key {key}; their last dimensions (head size) must "
            "be equal."
        )
    if key[-2] != value[-2]:
        raise ValueError(
            f"key has shape {key} and value {value}; their second-last dimensions (number of keys) "
            "must be equal."
        )
    shapes = [query[:-2], key[:-2], value[:-2]]
    if enable_gqa:
        for i, name in ((1, "key"), (2, "value")):
            if not shapes[0] or not shapes[i]:
                raise ValueError(
                    f"enable_gqa needs a dimension of heads: query has shape {query}, {name} "
                    f"{(key, value)[i - 1]}; wanted (..., heads, length, head size)."
                )
            heads, wanted = shapes[i][-1], shapes[0][-1]
            if heads == 0 or wanted % heads:
                raise ValueError(
                    f"enable_gqa: query has {wanted} heads and {name} has {heads}; wanted a number "
                    f"of query heads that is a multiple of the {name} heads."
                )
            shapes[i] = (*shapes[i][:-1], wanted)
    try:
        return np.broadcast_shapes(*shapes)
    except ValueError:
        hint = "" if enable_gqa else " (enable_gqa=True lets key and value have fewer heads)"
        raise ValueError(
            f"the leading dimensions of query {query}, key {key} and value {value} "
            f"do not broadcast{hint}."
        ) from None


def _band(
    is_causal: Causal, window: Window | None, seqlen_q: int, seqlen_k: int
) -> tuple[int | None, int | None, int]:
    """left, right and offset of the band of allowed keys."""
    if not isinstance(is_causal, bool | np.bool_) and not (
        isinstance(is_causal, str) and is_causal in ("top-left", "bottom-right")
    ):
        raise ValueError(
            f"is_causal is {is_causal!r}; wanted False, True, 'top-left' or 'bottom-right'."
        )
    offset = seqlen_k - seqlen_q if is_causal == "bottom-right" else 0
    left, right = None, None
    if window is not None:
        if not isinstance(window, tuple | list) or len(window) != 2:
            raise ValueError(f"window is {window!r}; wanted a pair (left, right).")
        left, right = (_window_side(window, side, seqlen_q + seqlen_k) for side in (0, 1))
    if is_causal:
        right = 0 if right is None else min(right, 0)
    return left, right, offset


def _window_side(window: Window, side: int, everything: int) -> int | None:
    number = window[side]
    whole = isinstance(number, int | np.integer) and not isinstance(number, bool)
    if number is None or (whole and number == -1):
        return None
    if not whole or number < 0:
        raise ValueError(
            f"window is {window!r}; wanted numbers of keys >= 0, or None or -1 for no bound."
        )
    return None if number >= everything else int(number)


def mask_kind(dtype: np.dtype[Any]) -> str:
    """The kind of a mask of a dtype, in the words of `AttentionProblem.mask_kind`."""
    return str(dtype.name)  # numpy's name of its booleans is "bool", too


def _mask_kind(attn_mask: HasShape | None, scores_shape: Shape) -> str:
    if attn_mask is None:
        return "none"
    is_float = attn_mask.dtype.kind == "f" or attn_mask.dtype.name in DTYPES
    if attn_mask.dtype != np.bool_ and not is_float:
        raise TypeError(
            f"attn_mask has dtype {attn_mask.dtype}; wanted bool (True takes part) or floating "
            "point (added to the scores)."
        )
    fits = len(attn_mask.shape) <= len(scores_shape) and all(
        have in (1, want)
        for have, want in zip(attn_mask.shape[::-1], scores_shape[::-1], strict=False)
    )
    if not fits:
        raise ValueError(
            f"attn_mask has shape {attn_mask.shape}; wanted one that broadcasts to {scores_shape}."
        )
    return mask_kind(attn_mask.dtype)


def _scale(scale: float | None, head_dim: int, dtype: np.dtype[Any]) -> float:
    if scale is None:
        return 1.0 / math.sqrt(max(head_dim, 1))
    computed = "float64" if dtype == np.float64 else "float32"
    if not _is_number(scale) or not abs(scale) <= float(np.finfo(computed).max) / 2:
        raise ValueError(
            f"scale is {scale!r}; wanted a finite number of {computed}, or None for "
            "1 / sqrt(head size)."
        )
    return float(scale)


def _is_number(given: Any) -> bool:
    """Whether it is a real number; True and False are none."""
    return isinstance(given, Real) and not isinstance(given, bool)


def checked_dropout_p(dropout_p: float, name: str = "dropout_p") -> float:
    """A probability, as a float; ValueError if it is none. The rule of every kind of dropout."""
    if not _is_number(dropout_p) or not 0.0 <= dropout_p <= 1.0:
        raise ValueError(f"{name} is {dropout_p!r}; wanted a probability in [0, 1].")
    return float(dropout_p)


def checked_seed(seed: int) -> int:
    """`seed` as an int; ValueError if it has no 64 bits or is no integer."""
    whole = isinstance(seed, int | np.integer) and not isinstance(seed, bool)
    if not whole or not 0 <= seed < 2**64:
        raise ValueError(f"seed is {seed!r}; wanted an integer in [0, 2**64).")
    return int(seed)


def checked_flag(name: str, given: bool) -> bool:
    """`given` as a bool; TypeError with the option's name if it is neither True nor False."""
    if not isinstance(given, bool | np.bool_):
        raise TypeError(f"{name} is {given!r}; wanted True or False.")
    return bool(given)


def checked_fp32_precision(name: str) -> Float32Precision:
    """`name` itself; ValueError if it is none of `FLOAT32_PRECISIONS`."""
    if name not in FLOAT32_PRECISIONS:
        names = ", ".join(map(repr, FLOAT32_PRECISIONS))
        raise ValueError(f"fp32_precision is {name!r}; wanted one of {names}.")
    return name  # type: ignore[return-value]
