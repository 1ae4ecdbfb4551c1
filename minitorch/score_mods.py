"""Ready-made score functions of attention: what is done with a score before the softmax.

Each gives a function (score, b, h, q_idx, kv_idx) -> score for the argument `score_mod` of
attention. Tables and slopes may be numpy arrays or Tensors; a Tensor that requires a gradient gets
one.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import numpy.typing as npt

from .arguments import as_number, as_size, check_tensor

if TYPE_CHECKING:
    from .tensor import Tensor

ScoreMod: TypeAlias = Callable[[Any, Any, Any, Any, Any], Any]
Table: TypeAlias = "npt.NDArray[Any] | Tensor"


def softcap(cap: float) -> ScoreMod:
    """cap * tanh(score / cap): scores stay below cap (Gemma Team, "Gemma 2", 2024).

    Raises:
        ValueError: cap is not above 0.

    """
    cap = as_number(cap, "cap")
    if not 0 < cap < math.inf:
        raise ValueError(f"cap must be a number above 0, got {cap}")

    def softcap_mod(score: Any, b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        return cap * np.tanh(score / cap)

    return softcap_mod


def alibi_slopes(heads: int) -> npt.NDArray[np.float64]:
    """The slopes 2**(-8 / heads), 2**(-16 / heads), ... (Press et al., "Train Short, Test Long",
    2022, section 3); for heads that are no power of two those of the next smaller one, and every
    other of the next larger.
    """
    heads = as_size(heads, "heads", 1)
    power = 1 << (heads.bit_length() - 1)
    slopes = 2.0 ** (-8.0 / power * np.arange(1, power + 1))
    between = 2.0 ** (-4.0 / power * np.arange(1, 2 * power + 1, 2))
    return np.concatenate([slopes, between[: heads - power]])


def alibi(slopes: int | Table) -> ScoreMod:
    """score - slopes[h] * |q - k| (Press et al., 2022).

    Args:
        slopes: one for each head, or the number of heads, for `alibi_slopes`.

    """
    of_head = alibi_slopes(slopes) if isinstance(slopes, int) else slopes
    _check_table(of_head, "slopes", 1)

    def alibi_mod(score: Any, b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        return score - of_head[h] * abs(q_idx - kv_idx)

    return alibi_mod


def relative_bias(table: Table) -> ScoreMod:
    """score + table[h, q - k + n], clipped at the table's ends (Shaw et al., "Self-Attention with
    Relative Position Representations", 2018).

    Args:
        table: (heads, 2 n + 1), for distances -n ... n. Distances beyond have the last number.

    Raises:
        ValueError: an even number of columns.

    """
    _check_table(table, "table", 2)
    if table.shape[1] % 2 == 0:
        raise ValueError(f"table has shape {table.shape}; wanted (heads, 2 n + 1)")
    reach = table.shape[1] // 2

    def relative_mod(score: Any, b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        return score + table[h, np.clip(q_idx - kv_idx, -reach, reach) + reach]

    return relative_mod


def t5_buckets(
    buckets: int = 32, max_distance: int = 128, bidirectional: bool = True
) -> npt.NDArray[np.int32]:
    """The bucket of each distance k - q = -max_distance ... max_distance.

    Half of the buckets (of a direction) are for one distance each, the others grow with the
    logarithm up to max_distance (Raffel et al., "T5", 2020, section 2.1).
    """
    buckets, far = as_size(buckets, "buckets", 2), as_size(max_distance, "max_distance", 1)
    of_direction = buckets // 2 if bidirectional else buckets
    exact = max(of_direction // 2, 1)
    if far <= exact:
        raise ValueError(f"max_distance must be above {exact}, got {far}")
    distance = np.arange(-far, far + 1)
    size = np.abs(distance) if bidirectional else np.maximum(-distance, 0)
    ratio = np.log(np.maximum(size, 1) / exact) / math.log(far / exact)
    wide = np.minimum(exact + (ratio * (of_direction - exact)).astype(int), of_direction - 1)
    found = np.where(size < exact, size, wide)
    if bidirectional:
        found = found + np.where(distance > 0, of_direction, 0)
    return found.astype(np.int32)


def t5_bias(table: Table, max_distance: int = 128, bidirectional: bool = True) -> ScoreMod:
    """score + table[bucket of k - q, h].

    Args:
        table: (buckets, heads), as in T5.
        max_distance: from which on distances share the last bucket.
        bidirectional: whether keys behind the query have buckets of their own.

    """
    _check_table(table, "table", 2)
    bucket = t5_buckets(int(table.shape[0]), max_distance, bidirectional)

    def t5_mod(score: Any, b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        near = np.clip(kv_idx - q_idx, -max_distance, max_distance)
        return score + table[bucket[near + max_distance], h]

    return t5_mod


def head_scale(scales: Table) -> ScoreMod:
    """score * scales[h]."""
    _check_table(scales, "scales", 1)

    def head_scale_mod(score: Any, b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        return score * scales[h]

    return head_scale_mod


def scalable_softmax(scales: Table, causal: bool = True) -> ScoreMod:
    """score * scales[h] * log(n), where n is the number of keys that the query sees, with a causal
    mask its own number (Nakanishi, "Scalable-Softmax Is Superior for Attention", 2025).

    Args:
        scales: one for each head, (heads,), or for each head and query, (heads, Nq).
        causal: False: `scales` is (heads, Nq) and holds all of the factor.

    """
    if not causal:
        _check_table(scales, "scales", 2)

        def scaled_mod(score: Any, b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
            return score * scales[h, q_idx]

        return scaled_mod
    _check_table(scales, "scales", 1)

    def scalable_mod(score: Any, b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        return score * (scales[h] * np.log((q_idx + 1).astype(float)))

    return scalable_mod


def attention_sinks(out: Tensor, lse: Tensor, sink: Tensor) -> Tensor:
    """Attention with a key more, of score sink[h] and value 0, which takes part of the weight of
    each row: out * sigmoid(lse - sink[h]) (OpenAI, "gpt-oss", 2025).

    Args:
        out: (..., H, Nq, Dv), of attention with `return_lse=True`.
        lse: (..., H, Nq), from there.
        sink: (H,).

    Raises:
        ValueError: shapes that do not fit.

    """
    for name, tensor in (("out", out), ("lse", lse), ("sink", sink)):
        check_tensor(tensor, name)
    if out.shape[:-1] != lse.shape or out.dims < 3 or sink.shape != (out.shape[-3],):
        raise ValueError(
            f"out has shape {out.shape}, lse {lse.shape} and sink {sink.shape}; wanted "
            "(..., H, Nq, Dv), (..., H, Nq) and (H,)"
        )
    share = (lse - sink.view(sink.shape[0], 1).to(lse.dtype)).sigmoid()
    return out * share.view(*lse.shape, 1).to(out.dtype)


def _check_table(table: Any, name: str, dims: int) -> None:
    if not hasattr(table, "shape") or len(table.shape) != dims:
        shape = getattr(table, "shape", type(table).__name__)
        raise ValueError(f"{name} must be an array or a Tensor of {dims} dimensions, got {shape}")


__all__ = [
    "alibi", "alibi_slopes", "attention_sinks", "head_scale", "relative_bias", "scalable_softmax",
    "softcap", "t5_bias", "t5_buckets",
]  # fmt: skip
