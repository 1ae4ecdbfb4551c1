"""For tests, a course's or our own: mathematical functions to try, and hypothesis strategies.

`MathTest` and `MathTestVariable` are MiniTorch's: the same functions, of floats and of Scalars or
Tensors. The strategies (`shapes`, `arrays`, `tensors`, `attention_inputs`, ...) draw random shapes,
memory layouts and arguments. They need hypothesis, which is imported when one is called.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from . import operators
from .tensor import Tensor
from .tensor_data import TensorData
from .tensor_ops import TensorBackend

if TYPE_CHECKING:
    from hypothesis.strategies import DrawFn, SearchStrategy

Array = npt.NDArray[Any]
Shape = tuple[int, ...]
NamedFunctions = tuple[tuple[str, Callable[..., Any]], ...]
ComparedFunctions = list[tuple[str, Callable[..., Any], Callable[..., Any]]]

# Constants below are written as quotients on purpose. hypothesis tries the float literals that it
# finds in a program's source, so that written as 1.2 it would seek out the very jumps of `gt2`.


class MathTest:
    """Functions of floats. Names that end in 2 take two, names that end in red take a list."""

    @staticmethod
    def neg(a: Any) -> Any:
        """-a"""
        return -a

    @staticmethod
    def addConstant(a: Any) -> Any:
        """5 + a"""
        return 5 + a

    @staticmethod
    def square(a: Any) -> Any:
        """a^2"""
        return a * a

    @staticmethod
    def cube(a: Any) -> Any:
        """a^3"""
        return a * a * a

    @staticmethod
    def subConstant(a: Any) -> Any:
        """a - 5"""
        return a - 5

    @staticmethod
    def multConstant(a: Any) -> Any:
        """5 a"""
        return 5 * a

    @staticmethod
    def div(a: Any) -> Any:
        """a / 5"""
        return a / 5

    @staticmethod
    def inv(a: Any) -> Any:
        """1 / (a + 3.5)"""
        return operators.inv(a + 7 / 2)

    @staticmethod
    def sig(a: Any) -> Any:
        """sigmoid(a)"""
        return operators.sigmoid(a)

    @staticmethod
    def log(a: Any) -> Any:
        """log(a + 100000)"""
        return operators.log(a + 100000)

    @staticmethod
    def relu(a: Any) -> Any:
        """relu(a + 5.5)"""
        return operators.relu(a + 11 / 2)

    @staticmethod
    def exp(a: Any) -> Any:
        """exp(a - 200)"""
        return operators.exp(a - 200)

    @staticmethod
    def explog(a: Any) -> Any:
        """log(a + 100000) + exp(a - 200)"""
        return operators.log(a + 100000) + operators.exp(a - 200)

    @staticmethod
    def complex(a: Any) -> Any:
        """Several functions nested."""
        inner = operators.relu(operators.relu(a * 10 + 7) * 6 + 5)
        return operators.log(operators.sigmoid(inner * 10)) / 50

    @staticmethod
    def add2(a: Any, b: Any) -> Any:
        """a + b"""
        return a + b

    @staticmethod
    def mul2(a: Any, b: Any) -> Any:
        """a b"""
        return a * b

    @staticmethod
    def div2(a: Any, b: Any) -> Any:
        """a / (b + 5.5)"""
        return a / (b + 11 / 2)

    @staticmethod
    def gt2(a: Any, b: Any) -> Any:
        """b < a + 1.2"""
        return operators.lt(b, a + 6 / 5)

    @staticmethod
    def lt2(a: Any, b: Any) -> Any:
        """a + 1.2 < b"""
        return operators.lt(a + 6 / 5, b)

    @staticmethod
    def eq2(a: Any, b: Any) -> Any:
        """a == b + 5.5"""
        return operators.eq(a, b + 11 / 2)

    @staticmethod
    def sum_red(a: Iterable[Any]) -> Any:
        """The sum of a list."""
        return operators.sum(a)

    @staticmethod
    def mean_red(a: Iterable[Any]) -> Any:
        """The mean of a list."""
        values = list(a)
        return operators.sum(values) / len(values)

    @staticmethod
    def mean_full_red(a: Iterable[Any]) -> Any:
        """The mean of a list."""
        return MathTest.mean_red(a)

    @classmethod
    def _tests(cls) -> tuple[NamedFunctions, NamedFunctions, NamedFunctions]:
        """The functions by name: of one value, of two, of a list."""
        one: list[Any] = []
        two: list[Any] = []
        red: list[Any] = []
        for name in dir(cls):
            if not name.startswith("_"):
                kind = two if name.endswith("2") else red if name.endswith("red") else one
                kind.append((name, getattr(cls, name)))
        return tuple(one), tuple(two), tuple(red)

    @classmethod
    def _comp_testing(cls) -> tuple[ComparedFunctions, ComparedFunctions, ComparedFunctions]:
        """(name, function of floats, function of this class), in the three kinds."""
        one, two, red = (
            [(name, base, other) for (name, base), (_, other) in zip(bases, others, strict=True)]
            for bases, others in zip(MathTest._tests(), cls._tests(), strict=True)
        )
        return one, two, red


class MathTestVariable(MathTest):
    """The same functions of Scalars or Tensors, by their methods."""

    @staticmethod
    def inv(a: Any) -> Any:
        """1 / (a + 3.5)"""
        return 1 / (a + 7 / 2)

    @staticmethod
    def sig(a: Any) -> Any:
        """sigmoid(a)"""
        return a.sigmoid()

    @staticmethod
    def log(a: Any) -> Any:
        """log(a + 100000)"""
        return (a + 100000).log()

    @staticmethod
    def relu(a: Any) -> Any:
        """relu(a + 5.5)"""
        return (a + 11 / 2).relu()

    @staticmethod
    def exp(a: Any) -> Any:
        """exp(a - 200)"""
        return (a - 200).exp()

    @staticmethod
    def explog(a: Any) -> Any:
        """log(a + 100000) + exp(a - 200)"""
        return (a + 100000).log() + (a - 200).exp()

    @staticmethod
    def complex(a: Any) -> Any:
        """Several functions nested."""
        return (((a * 10 + 7).relu() * 6 + 5).relu() * 10).sigmoid().log() / 50

    @staticmethod
    def gt2(a: Any, b: Any) -> Any:
        """b < a + 1.2"""
        return a + 6 / 5 > b

    @staticmethod
    def lt2(a: Any, b: Any) -> Any:
        """a + 1.2 < b"""
        return a + 6 / 5 < b

    @staticmethod
    def eq2(a: Any, b: Any) -> Any:
        """a == b + 5.5"""
        return a == (b + 11 / 2)

    @staticmethod
    def sum_red(a: Any) -> Any:
        """The sum along the first dimension."""
        return a.sum(0)

    @staticmethod
    def mean_red(a: Any) -> Any:
        """The mean along the first dimension."""
        return a.mean(0)

    @staticmethod
    def mean_full_red(a: Any) -> Any:
        """The mean of all elements."""
        return a.mean()


# ----- strategies -----

LAYOUTS = ("contiguous", "transposed", "sliced", "expanded")
DTYPES = (np.float64, np.float32)


def shapes(
    min_dims: int = 1, max_dims: int = 4, min_size: int = 1, max_size: int = 4
) -> SearchStrategy[Shape]:
    """Shapes as tuples; with `min_size=0` some have no elements."""
    from hypothesis.strategies import integers, lists

    sizes = lists(integers(min_size, max_size), min_size=min_dims, max_size=max_dims)
    return sizes.map(tuple)


def broadcastable_shapes(
    number: int = 2, min_dims: int = 1, max_dims: int = 4, min_size: int = 1, max_size: int = 4
) -> SearchStrategy[tuple[Shape, ...]]:
    """Tuples of `number` shapes that broadcast together."""
    from hypothesis.extra.numpy import mutually_broadcastable_shapes

    drawn = mutually_broadcastable_shapes(
        num_shapes=number,
        min_dims=min_dims,
        max_dims=max_dims,
        min_side=min_size,
        max_side=max_size,
    )
    return drawn.map(lambda found: tuple(tuple(shape) for shape in found.input_shapes))


def with_layout(values: Array, layout: str, order: Sequence[int] | None = None) -> Array:
    """An array of the same shape as `values` that lies in memory in a given way.

    Args:
        values: the elements; "expanded" keeps only some of them and repeats them.
        layout: "contiguous"; "transposed": the memory follows the dimensions in `order`; "sliced":
            every second element of a larger array; "expanded": the dimensions in `order` have
            stride 0.
        order: dimensions; if not given, all of them reversed, or for "expanded" the first.

    Raises:
        ValueError: an unknown layout.

    """
    dims = values.ndim
    if layout == "contiguous":
        return np.array(values, order="C")
    if layout == "transposed":
        order = tuple(reversed(range(dims))) if order is None else tuple(order)
        inverse = tuple(order.index(d) for d in range(dims))
        return np.array(values.transpose(order), order="C").transpose(inverse)
    if layout == "sliced":
        every_second = (slice(1, None, 2),) * dims
        larger = np.full([2 * n + 1 for n in values.shape], np.nan, values.dtype)
        larger[every_second] = values  # what lies between must never be read
        return larger[every_second]
    if layout == "expanded":
        repeated = range(min(dims, 1)) if order is None else order
        first = tuple(slice(0, 1) if d in repeated else slice(None) for d in range(dims))
        array = np.broadcast_to(values[first].copy(), values.shape)
        array.flags.writeable = True  # numba compiles every loop again for read-only arrays
        return array
    raise ValueError(f"layout must be one of {', '.join(LAYOUTS)}, got {layout}")


def arrays(
    shape: Shape | SearchStrategy[Shape] | None = None,
    dtypes: Sequence[npt.DTypeLike] = DTYPES,
    layouts: Sequence[str] = LAYOUTS,
    low: float = -2.0,
    high: float = 2.0,
) -> SearchStrategy[Array]:
    """numpy arrays of random numbers, in any memory layout.

    The numbers come from a generator whose seed is drawn: they are in general position, which a
    check of gradients needs, and drawing them is quick.

    Args:
        shape: a shape or a strategy for shapes; `shapes()` if not given.
        dtypes: to choose from.
        layouts: to choose from; see `with_layout`.
        low: the smallest number.
        high: the largest number.

    """
    from hypothesis import strategies as st

    def build(draw: DrawFn) -> Array:
        wanted = shape if isinstance(shape, tuple) else draw(shapes() if shape is None else shape)
        rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
        values = rng.uniform(low, high, wanted).astype(draw(st.sampled_from(list(dtypes))))
        order = draw(st.permutations(range(len(wanted))))
        layout = draw(st.sampled_from(list(layouts)))
        repeated = draw(st.integers(0, len(wanted)))
        return with_layout(values, layout, order[:repeated] if layout == "expanded" else order)

    return st.composite(build)()


def tensors(
    shape: Shape | SearchStrategy[Shape] | None = None,
    backend: TensorBackend | None = None,
    dtypes: Sequence[npt.DTypeLike] = DTYPES,
    layouts: Sequence[str] = LAYOUTS,
    low: float = -2.0,
    high: float = 2.0,
    requires_grad: bool = True,
) -> SearchStrategy[Tensor]:
    """Tensors of random numbers; arguments as for `arrays`."""

    def make(array: Array) -> Tensor:
        out = Tensor(TensorData.from_array(array), backend=backend)
        out.requires_grad_(requires_grad)
        return out

    return arrays(shape, dtypes, layouts, low, high).map(make)


@dataclass
class AttentionInputs:
    """Arguments of one call: `query.flash_attention(key, value, **options)`."""

    query: Tensor
    key: Tensor
    value: Tensor
    options: dict[str, Any]


def attention_inputs(
    backend: TensorBackend | None = None,
    dtypes: Sequence[npt.DTypeLike] = DTYPES,
    layouts: Sequence[str] = LAYOUTS,
    max_seqlen: int = 20,
    max_head_dim: int = 9,
    min_seqlen: int = 0,
    dropout: bool = True,
) -> SearchStrategy[AttentionInputs]:
    """Arguments of `flash_attention` in every combination.

    Leading dimensions that broadcast, groups of query heads, any sequence lengths, boolean and
    additive masks of any broadcastable shape, causal in both alignments, windows, scale, dropout.

    Args:
        backend: of the tensors.
        dtypes: to choose from; query, key and value get the same.
        layouts: to choose from, for each tensor by itself.
        max_seqlen: the largest number of queries and of keys.
        max_head_dim: the largest D and Dv.
        min_seqlen: the smallest number of queries and of keys.
        dropout: whether some calls drop attention weights.

    """
    from hypothesis import strategies as st

    def build(draw: DrawFn) -> AttentionInputs:
        lengths = st.integers(min_seqlen, max_seqlen)
        sizes = st.integers(1, max_head_dim)
        seqlen_q, seqlen_k, head_dim, value_dim = (
            draw(s) for s in (lengths, lengths, sizes, sizes)
        )
        lead_q, lead_k, lead_v = draw(broadcastable_shapes(3, min_dims=0, max_dims=2, max_size=2))
        enable_gqa = draw(st.booleans())
        if enable_gqa:
            heads, groups = draw(st.integers(1, 2)), draw(st.integers(1, 3))
            lead_q, lead_k, lead_v = (*lead_q, heads * groups), (*lead_k, heads), (*lead_v, heads)
        dtype = [draw(st.sampled_from(list(dtypes)))]
        query, key, value = (
            draw(tensors(shape, backend, dtype, layouts))
            for shape in (
                (*lead_q, seqlen_q, head_dim),
                (*lead_k, seqlen_k, head_dim),
                (*lead_v, seqlen_k, value_dim),
            )
        )
        scores = (*_leading(lead_q, lead_k, lead_v, enable_gqa), seqlen_q, seqlen_k)
        widths = st.none() | st.integers(0, max_seqlen)
        options = {
            "attn_mask": draw(_masks(scores, dtype[0])),
            "is_causal": draw(st.sampled_from([False, True, "top-left", "bottom-right"])),
            "window": draw(st.none() | st.tuples(widths, widths)),
            "scale": draw(st.none() | st.sampled_from([0.0, 0.3, 1.0, -0.5])),
            "enable_gqa": enable_gqa,
            "dropout_p": draw(st.sampled_from([0.0, 0.0, 0.4])) if dropout else 0.0,
            "seed": draw(st.integers(0, 2**64 - 1)),
        }
        return AttentionInputs(query, key, value, options)

    return st.composite(build)()


def _leading(query: Shape, key: Shape, value: Shape, enable_gqa: bool) -> Shape:
    """The leading dimensions of the scores, heads included."""
    if not enable_gqa:
        return np.broadcast_shapes(query, key, value)
    return (*np.broadcast_shapes(query[:-1], key[:-1], value[:-1]), query[-1])


def _masks(scores: Shape, dtype: npt.DTypeLike) -> SearchStrategy[Array | None]:
    """None, or a boolean or additive mask that broadcasts to `scores`."""
    from hypothesis import strategies as st

    def build(draw: DrawFn) -> Array:
        skipped = draw(st.integers(0, len(scores) - 2))
        shape = tuple(draw(st.sampled_from([1, n])) for n in scores[skipped:])
        rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
        if draw(st.booleans()):
            return rng.random(shape) < draw(st.sampled_from([0.1, 0.8]))
        mask = rng.uniform(-2.0, 2.0, shape).astype(dtype)
        mask.reshape(-1)[: prod(shape) // 4] = draw(st.sampled_from([0.0, -np.inf]))
        return mask

    return st.none() | st.composite(build)()
