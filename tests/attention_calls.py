"""One call of attention by one family of kernels, and what it is compared with.

A `Family` is a row of the table in tests/attention.py. `check` makes a call of it, forward and
backward, and compares every result with attention in float64 (tests/references.py) of the same
rounded inputs; `calls` draws the arguments of such a check with hypothesis.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import pytest
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy

from minitorch.attention_variants import Variant
from minitorch.dtypes import BFLOAT16
from minitorch.kernels.flash_attention.problem import AttentionProblem
from minitorch.kernels.flash_attention.scores import mask_numbers
from minitorch.kernels.flash_attention.variant import NO_VARIANT, VariantInputs
from minitorch.kernels.philox import attention_dropout_mask
from tests import references

Array = Any
Shape = tuple[int, ...]
# Out, logsumexp, gradients of query, key, value and mask, and then those of captured tensors; None
# for one that there is not.
Results = tuple[Any, ...]
NAMES = ("out", "logsumexp", "dq", "dk", "dv", "dmask")
PLAIN = ("plain",) * 4
# How numbers are stored, where that is not the name: float32 may be multiplied in other ways.
STORED = {"tf32": "float32", "tf32x3": "float32", "bfloat16": BFLOAT16}
# Of the largest number in a result: float32 and what is kept in it, and numbers of 16 bits.
TOLERANCE = {
    "float32": 3e-5, "float64": 1e-11, "float16": 3e-3, "bfloat16": 2e-2, "tf32x3": 3e-5,
    "tf32": 5e-3,
}  # fmt: skip
OF_LOGSUMEXP = TOLERANCE | {"float16": 2e-4, "bfloat16": 2e-4}


class Call(NamedTuple):
    """A call, forward and backward, as a family takes it.

    Args:
        tensors: query, key, value and the gradient of the output.
        grad_logsumexp: or None.
        mask: numpy array or None.
        options: the other arguments of `AttentionProblem.of`.
        dtype: a name in `TOLERANCE`.
        functions: `score_mod` and `block_mask`, as attention takes them.
        variant: what the problem's functions are given: arrays of numpy, and tensors.

    """

    tensors: list[Any]
    grad_logsumexp: Array | None
    mask: Array | None
    options: dict[str, Any]
    problem: AttentionProblem
    dtype: str
    functions: dict[str, Any] | None = None
    variant: VariantInputs = NO_VARIANT

    @property
    def wants_mask(self) -> bool:
        """Whether there is a gradient of the mask."""
        return self.problem.additive_mask


@dataclass(frozen=True)
class Family:
    """One implementation of attention: how it is called, and the sizes that tests give it.

    Args:
        name: of the row.
        compute: the results of a call.
        place: an array with a dtype and a layout, as the family takes it.
        dtypes: names in `TOLERANCE`; a test for one dtype takes the first.
        shape: Nq, Nk, D and Dv of a small call.
        longest: the most queries and keys that `calls` draws.
        columns: D that `calls` draws.
        value_columns: Dv that it draws.
        layouts: that it draws, see `laid_out`.
        examples: that hypothesis draws for each dtype and kind of mask; 0 for no such test.
        derandomize: whether these are the same in every run: each may be a kernel to compile.
        dropout: whether there is any.
        functions: whether there are score functions and block masks.
        lengths: Nq and Nk of larger calls.
        head_sizes: D and Dv of larger calls.
        extreme: Nq and Nk of calls with large numbers.
        extreme_dtypes: of such calls, with those of masks.
        large_scores: factors of query and key, and the options of such calls.
        repeated: shapes of query, key and value of a call that gives the same bits every time.
        runs: so many times.
        gradient_factor: by which gradients may be further off than the output.
        thorough: names of tests that `make test` leaves out for this family.
        device: of PyTorch, which computes the same.
        force: lets no other kernels compute, or skips the test.

    """

    name: str
    compute: Callable[[Call], Results]
    place: Callable[[Array, str, str], Any]
    dtypes: tuple[str, ...]
    shape: tuple[int, int, int, int]
    longest: tuple[int, int]
    columns: SearchStrategy[int]
    value_columns: SearchStrategy[int]
    layouts: tuple[str, ...]
    examples: int
    lengths: tuple[tuple[int, int], ...]
    head_sizes: tuple[tuple[int, int], ...]
    extreme: tuple[int, int]
    extreme_dtypes: tuple[tuple[str, str], ...]
    repeated: tuple[tuple[Shape, Shape], ...]
    runs: int
    derandomize: bool = True
    dropout: bool = True
    functions: bool = True
    large_scores: tuple[dict[str, Any], ...] = ({},)
    gradient_factor: float = 1.0
    thorough: tuple[str, ...] = ()
    device: str = "cuda"
    force: Callable[[pytest.MonkeyPatch], None] = field(default=lambda monkeypatch: None)

    def tolerance(self, name: str, dtype: str) -> float:
        """Of one result, relative to its largest number."""
        if name == "logsumexp":
            return OF_LOGSUMEXP[dtype]
        return TOLERANCE[dtype] * (1 if name == "out" else self.gradient_factor)


# ----- arrays -----


def random(*shape: int, seed: int = 0) -> Array:
    """Normally distributed, of mean 0 and variance 1."""
    return np.random.default_rng((seed, *shape)).standard_normal(shape)


def real_dtype(dtype: str) -> np.dtype[Any]:
    """Of the scores and the logsumexp."""
    return np.dtype(np.float64 if dtype == "float64" else np.float32)


def exact(x: Any) -> Array:
    """The numbers of a family's tensor in float64."""
    return np.asarray(x.to_numpy() if hasattr(x, "to_numpy") else x).astype(np.float64)


def laid_out(array: Array, layout: str) -> Array:
    """The same numbers in one of several ways in memory ("expanded": a part of them, repeated).

    What surrounds the numbers of "part", "sliced" and "surrounded" is NaN.
    """
    dims, kind = array.ndim, array.dtype
    order = list(range(dims))
    if layout == "heads" and dims >= 3:  # (..., H, N, D) cut out of (..., N, H, D)
        order[-3:-1] = order[-2], order[-3]
    elif layout == "transposed" and dims >= 2:
        order[-2:] = order[-1], order[-2]
    elif layout == "axes reversed":
        order.reverse()
    elif layout == "reversed":
        backwards = (slice(None, None, -1),) * dims
        return np.array(array[backwards], order="C")[backwards]
    elif layout == "expanded" and dims:
        return np.broadcast_to(array[:1].copy(), array.shape)
    elif layout in ("part", "sliced", "surrounded") and dims:
        before, after, step = {"part": (1, 2, 1), "sliced": (1, 0, 2), "surrounded": (8, 16, 1)}[
            layout
        ]
        sizes = [before + step * n + after for n in array.shape]
        if layout == "part":  # rows do not begin at multiples of 16 bytes
            sizes[:-1] = array.shape[:-1]
        if layout == "surrounded":  # they do, here
            sizes[-1] += -sizes[-1] % 8
        first = [before * (size != n) for size, n in zip(sizes, array.shape, strict=True)]
        inner = tuple(slice(f, f + step * n, step) for f, n in zip(first, array.shape, strict=True))
        whole = np.full(sizes, np.nan).astype(kind)
        whole[inner] = array
        return whole[inner]
    copy = np.array(array.transpose(order), order="C").transpose(order)
    copy.flags.writeable = layout != "read-only"
    return copy


def place_on_cpu(array: Array, dtype: str, layout: str) -> Array:
    """An array of numpy."""
    return laid_out(array.astype(STORED.get(dtype, dtype)), layout)


def large_mask(rows: int, columns: int, dtype: Any) -> Array:
    """Every row another mixture of numbers as large as the dtype has, infinity and small ones."""
    lowest = np.finfo(dtype).min
    mask = random(rows, columns, seed=3).astype(dtype)
    every_third = np.arange(columns) % 3 == 1
    mask[0] = lowest
    mask[1] = dtype(0.9) * lowest
    mask[2] = np.where(every_third, dtype(0.9) * lowest, lowest)
    mask[3] = np.where(every_third, mask[3], lowest)
    mask[4] = -np.inf
    mask[5] = -lowest
    mask[6] = np.where(every_third, -lowest, mask[6])
    mask[7] = np.where(every_third, lowest, -np.inf)
    mask[8] = np.where(np.arange(columns) == columns - 1, -lowest, lowest)
    return mask


def make_mask(kind: str, shape: Shape, dtype: str, seed: int = 0, layout: str = "plain") -> Array:
    """None, or a random mask: "bool", or "additive", in which some are -inf."""
    if kind == "none":
        return None
    bias = laid_out(random(*shape, seed=seed), layout)
    if kind == "bool":
        return np.asarray(bias > -0.5)
    return np.where(bias < -1, -np.inf, bias).astype(real_dtype(dtype))


# ----- calls -----


def call_of(
    family: Family, arrays: list[Array], dtype: str, layouts: Any = PLAIN, mask: Array = None,
    dl: float = 1.0, functions: dict[str, Any] | None = None, **options: Any,
) -> Call:  # fmt: skip
    """A call of query, key and value; `dl` is the size of the logsumexp's gradient, 0 for none;
    `functions` are `score_mod` and `block_mask`.
    """
    if dtype.startswith("tf32"):
        options["fp32_precision"] = dtype
    tensors = [family.place(x, dtype, layout) for x, layout in zip(arrays, layouts, strict=False)]
    numbers = mask
    if mask is not None and mask.dtype != bool:
        numbers = mask_numbers(mask, real_dtype(dtype))
    q, k, v = tensors
    problem = AttentionProblem.of(q.shape, k.shape, v.shape, q.dtype, attn_mask=numbers, **options)
    tensors.append(family.place(random(*problem.out_shape, seed=5), dtype, layouts[3]))
    grad_lse = None
    if dl:
        grad_lse = (dl * random(*problem.logsumexp_shape, seed=6)).astype(real_dtype(dtype))
    if not functions:
        return Call(tensors, grad_lse, mask, options, problem, dtype)
    asked = functions.get("score_mod"), functions.get("block_mask")
    problem, variant = Variant.of(*asked, problem).fused(problem)
    return Call(tensors, grad_lse, mask, options, problem, dtype, functions, variant)


def reference(call: Call) -> references.AttentionReference:
    """Attention in float64 of a call's rounded inputs."""
    problem, options = call.problem, dict(call.options)
    mask: Any = call.mask
    q, k, v, do = (exact(t) for t in call.tensors)
    seed, _ = options.pop("seed", 0), options.pop("fp32_precision", None)
    kept = None
    if problem.dropout_p:
        kept = attention_dropout_mask(
            problem.batch_heads, problem.seqlen_q, problem.seqlen_k, problem.dropout_p, seed
        )
    if call.wants_mask:
        mask = mask_numbers(mask, real_dtype(call.dtype)).astype(np.float64)
    with np.errstate(over="ignore"):
        return references.attention(
            q, k, v, do, call.grad_logsumexp, attn_mask=mask, kept=kept,
            scores=real_dtype(call.dtype), **options,
        )  # fmt: skip


def compare(
    family: Family, call: Call, results: Results, names: tuple[str, ...] = NAMES,
    tolerance: float | None = None, wanted: Results = (),
) -> None:  # fmt: skip
    """The named results have the shapes, dtypes and numbers of attention in float64, or of
    `wanted`.
    """
    problem = call.problem
    if not wanted:
        want = reference(call)
        wanted = (
            want.out, want.logsumexp, want.grad_query, want.grad_key, want.grad_value,
            want.grad_mask,
        )  # fmt: skip
    captured = tuple(f"gradient {n} of what is captured" for n in range(len(wanted) - len(NAMES)))
    for name, got, right in zip(NAMES + captured, results, wanted, strict=True):
        if got is None or name not in names + captured:
            continue
        assert got.shape == right.shape, name
        if name not in ("dmask", *captured):  # whose dtypes are their own, or that of the scores
            real = name == "logsumexp"
            assert got.dtype == (real_dtype(call.dtype) if real else problem.dtype), name
        bound = tolerance or family.tolerance(name, call.dtype)
        relative = 0.0
        if name == "logsumexp":
            relative = min(bound, 1e-5)
        else:
            bound *= max(1.0, np.abs(right[np.isfinite(right)]).max(initial=0))
        if name in ("dmask", *captured) and right.size:  # of whose terms the rounding errors add up
            scores = problem.batch_heads * problem.seqlen_q * problem.seqlen_k
            bound *= max(1.0, (scores / right.size) ** 0.5 / 4)
        np.testing.assert_allclose(
            got.astype(np.float64), right, rtol=relative, atol=bound, err_msg=name
        )


def check(
    family: Family, shapes: Any, dtype: str, names: tuple[str, ...] = NAMES,
    tolerance: float | None = None, **arguments: Any,
) -> None:  # fmt: skip
    """The results of a call of random numbers are those of attention in float64."""
    arrays = [random(*shape, seed=n) for n, shape in enumerate(shapes)]
    call = call_of(family, arrays, dtype, **arguments)
    compare(family, call, family.compute(call), names, tolerance)


def shapes_of(family: Family, queries: Shape = (), keys: Shape = ()) -> list[Shape]:
    """Those of a small call, below these leading dimensions."""
    nq, nk, d, dv = family.shape
    return [(*queries, nq, d), (*keys, nk, d), (*keys, nk, dv)]


@st.composite
def calls(draw: Any, family: Family, dtype: str, mask_kind: str) -> dict[str, Any]:
    """Arguments of `check`: shapes with broadcasting, layouts, every flag."""
    nq, nk = (draw(st.integers(0, longest)) for longest in family.longest)
    d, dv = draw(family.columns), draw(family.value_columns)
    call: dict[str, Any] = {"enable_gqa": draw(st.booleans())}
    if call["enable_gqa"]:
        kv_heads, group, batch = (draw(st.integers(1, 2)) for _ in range(3))
        leading: list[Any] = [(batch, kv_heads * group), (batch, kv_heads), (batch, kv_heads)]
        full = leading[0]
    else:
        sizes = tuple(draw(st.lists(st.integers(1, 3), max_size=3)))
        leading = []
        for _ in range(3):
            own = tuple(n if draw(st.booleans()) else 1 for n in sizes)
            leading.append(own[draw(st.integers(0, len(own))) :])
        full = np.broadcast_shapes(*leading)
    call["shapes"] = [
        (*lead, n, columns)
        for lead, n, columns in zip(leading, (nq, nk, nk), (d, d, dv), strict=True)
    ]
    call["layouts"] = [draw(st.sampled_from(family.layouts)) for _ in range(4)]
    shape = tuple(n if draw(st.booleans()) else 1 for n in (*full, nq, nk))
    shape = shape[draw(st.integers(0, len(shape))) :]
    layout = draw(st.sampled_from(family.layouts))
    call["mask"] = make_mask(mask_kind, shape, dtype, draw(st.integers(0, 99)), layout)
    call["is_causal"] = draw(st.sampled_from([False, True, "top-left", "bottom-right"]))
    side = st.none() | st.integers(-1, max(family.longest))
    call["window"] = draw(st.none() | st.tuples(side, side))
    call["scale"] = draw(st.none() | st.sampled_from([0.0, -0.3, 1.0]))
    call["dl"] = draw(st.sampled_from([0.0, 1.0]))
    if family.dropout and draw(st.booleans()):
        call["dropout_p"] = draw(st.sampled_from([0.2, 0.5, 1.0]))
        call["seed"] = draw(st.integers(0, 2**64 - 1))
    return call
