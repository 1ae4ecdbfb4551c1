"""What a backend must give (`TensorOps`), the slow and obvious one (`SimpleOps`), and the table of
named operations.

A backend is three higher-order functions, `map`, `zip` and `reduce`, plus `matrix_multiply`;
`TensorBackend` applies them to the scalar functions of `operators`. Fused operations come from
`FusedOps`, and those that make and move elements from `StorageOps`, unless the backend overrides
them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias
from weakref import WeakValueDictionary

import numpy as np

from . import operators
from .fused_checks import broadcasts_to, check_axis
from .fused_ops import FusedOps
from .ieee import ieee, quiet
from .storage_ops import StorageOps
from .tensor_data import (
    IndexingError,
    Shape,
    Storage,
    Strides,
    TensorData,
    broadcast_index,
    index_to_position,
    shape_broadcast,
    to_index,
)

if TYPE_CHECKING:
    from .tensor import Tensor

MapFn: TypeAlias = Callable[[float], float]
ZipFn: TypeAlias = Callable[[float, float], float]
MapKernel: TypeAlias = Callable[[Storage, Shape, Strides, Storage, Shape, Strides], None]
ZipKernel: TypeAlias = Callable[
    [Storage, Shape, Strides, Storage, Shape, Strides, Storage, Shape, Strides], None
]
ReduceKernel: TypeAlias = Callable[[Storage, Shape, Strides, Storage, Shape, Strides, int], None]


class MapProto(Protocol):
    """The type of an elementwise operation on one tensor."""

    def __call__(self, x: Tensor, out: Tensor | None = ..., /) -> Tensor:
        """Apply it to `x`, into `out` (to whose shape `x` broadcasts) if that is given."""


def check_matmul(a: Tensor, b: Tensor) -> tuple[int, ...]:
    """The shape of `a @ b`.

    Raises:
        ValueError: fewer than two dimensions, or the inner sizes differ.
        IndexingError: the leading dimensions do not broadcast.

    """
    if a.dims < 2 or b.dims < 2:
        raise ValueError(
            f"matmul needs tensors of two dimensions or more, got shapes {a.shape} and {b.shape}"
        )
    if a.shape[-1] != b.shape[-2]:
        raise ValueError(
            f"matmul: the last size of {a.shape} must equal the last but one of {b.shape}"
        )
    return (*shape_broadcast(a.shape[:-2], b.shape[:-2]), a.shape[-2], b.shape[-1])


def map_output(a: Tensor, out: Tensor | None) -> Tensor:
    """Where a map of `a` writes: `out`, or a new tensor like `a` if that is None.

    Raises:
        ValueError: `a` does not broadcast to the shape of `out`.

    """
    if out is None:
        return empty_output(a, a.shape)
    if not broadcasts_to(a.shape, out.shape):
        raise ValueError(f"out must have a shape to which {a.shape} broadcasts, got {out.shape}")
    return out


def folded_shape(a: Tensor, dim: int) -> tuple[int, tuple[int, ...]]:
    """The dimension that is folded, counted from 0, and the shape that a fold leaves.

    Raises:
        IndexError: there is no such dimension.

    """
    check_axis(a, dim)
    dim %= a.dims
    return dim, (*a.shape[:dim], 1, *a.shape[dim + 1 :])


def empty_output(
    like: Tensor, shape: tuple[int, ...], dtype: np.dtype[Any] | None = None
) -> Tensor:
    """A constant tensor of `shape` on the backend of `like`, its values not set."""
    return like._new(like.backend.ops.empty(shape, like.dtype if dtype is None else dtype))


class TensorOps(FusedOps, StorageOps):
    """What a backend provides. All are static: a backend has no state."""

    cuda = False  # whether its tensors are on the GPU

    @classmethod
    def on_this_machine(cls) -> type[TensorOps]:
        """The class to compute with: this one, unless it needs what the machine does not have."""
        return cls

    @staticmethod
    def map(fn: MapFn) -> MapProto:
        """The operation that applies `fn` to each element."""
        raise NotImplementedError("a backend defines map")

    @classmethod
    def cmap(cls, fn: MapFn) -> Callable[[Tensor, Tensor], Tensor]:
        """`map`, with the output required (MiniTorch's name for it)."""
        return cls.map(fn)

    @staticmethod
    def zip(fn: ZipFn) -> Callable[[Tensor, Tensor], Tensor]:
        """The operation that applies `fn` to pairs of elements of two tensors, broadcast."""
        raise NotImplementedError("a backend defines zip")

    @staticmethod
    def reduce(fn: ZipFn, start: float = 0.0) -> Callable[[Tensor, int], Tensor]:
        """The operation that folds `fn` over one dimension, which is kept with size 1."""
        raise NotImplementedError("a backend defines reduce")

    @staticmethod
    def matrix_multiply(a: Tensor, b: Tensor) -> Tensor:
        """(..., n, k) @ (..., k, m) -> (..., n, m), leading dimensions broadcast."""
        raise NotImplementedError("a backend defines matrix_multiply")


class SimpleOps(TensorOps):
    """Loops in plain Python: slow, and the definition of what is right. Where Python would raise an
    error for a number (1 / 0) there is IEEE's infinity or NaN, as on every backend.
    """

    @staticmethod
    def map(fn: MapFn) -> MapProto:
        """See `TensorOps.map`."""
        kernel = tensor_map(fn)

        def apply(a: Tensor, out: Tensor | None = None, /) -> Tensor:
            target = map_output(a, out)
            kernel(*target.tuple(), *a.tuple())
            return target

        return apply

    @staticmethod
    def zip(fn: ZipFn) -> Callable[[Tensor, Tensor], Tensor]:
        """See `TensorOps.zip`."""
        kernel = tensor_zip(fn)

        def apply(a: Tensor, b: Tensor) -> Tensor:
            shape = shape_broadcast(a.shape, b.shape)
            out = empty_output(a, shape, np.promote_types(a.dtype, b.dtype))
            kernel(*out.tuple(), *a.tuple(), *b.tuple())
            return out

        return apply

    @staticmethod
    def reduce(fn: ZipFn, start: float = 0.0) -> Callable[[Tensor, int], Tensor]:
        """See `TensorOps.reduce`."""
        kernel = tensor_reduce(fn)

        def apply(a: Tensor, dim: int) -> Tensor:
            dim, shape = folded_shape(a, dim)
            out = empty_output(a, shape)
            out._tensor._storage[:] = start
            kernel(*out.tuple(), *a.tuple(), dim)
            return out

        return apply

    @staticmethod
    @quiet
    def matrix_multiply(a: Tensor, b: Tensor) -> Tensor:
        """The definition: each element is a sum of products."""
        shape = check_matmul(a, b)
        left = np.broadcast_to(a._tensor.array, (*shape[:-2], *a.shape[-2:]))
        right = np.broadcast_to(b._tensor.array, (*shape[:-2], *b.shape[-2:]))
        out = np.zeros(shape, np.promote_types(a.dtype, b.dtype))
        for *batch, row, col in np.ndindex(*shape):
            total = 0.0
            for k in range(a.shape[-1]):
                total += float(left[(*batch, row, k)]) * float(right[(*batch, k, col)])
            out[(*batch, row, col)] = total
        return a._new(TensorData.from_array(out))


def tensor_map(fn: MapFn) -> MapKernel:
    """The loop of `SimpleOps.map`: out[i] = fn(in[i]), where `in` broadcasts to `out`."""
    fn = ieee(fn)

    @quiet
    def kernel(
        out: Storage,
        out_shape: Shape,
        out_strides: Strides,
        in_storage: Storage,
        in_shape: Shape,
        in_strides: Strides,
    ) -> None:
        out_index = np.zeros(len(out_shape), np.int32)
        in_index = np.zeros(len(in_shape), np.int32)
        for ordinal in range(int(np.prod(out_shape))):
            to_index(ordinal, out_shape, out_index)
            broadcast_index(out_index, out_shape, in_shape, in_index)
            value = in_storage[index_to_position(in_index, in_strides)].item()
            out[index_to_position(out_index, out_strides)] = fn(value)

    return kernel


def tensor_zip(fn: ZipFn) -> ZipKernel:
    """The loop of `SimpleOps.zip`: out[i] = fn(a[i], b[i]), where both broadcast to `out`."""
    fn = ieee(fn)

    @quiet
    def kernel(
        out: Storage,
        out_shape: Shape,
        out_strides: Strides,
        a_storage: Storage,
        a_shape: Shape,
        a_strides: Strides,
        b_storage: Storage,
        b_shape: Shape,
        b_strides: Strides,
    ) -> None:
        out_index = np.zeros(len(out_shape), np.int32)
        a_index = np.zeros(len(a_shape), np.int32)
        b_index = np.zeros(len(b_shape), np.int32)
        for ordinal in range(int(np.prod(out_shape))):
            to_index(ordinal, out_shape, out_index)
            broadcast_index(out_index, out_shape, a_shape, a_index)
            broadcast_index(out_index, out_shape, b_shape, b_index)
            a_value = a_storage[index_to_position(a_index, a_strides)].item()
            b_value = b_storage[index_to_position(b_index, b_strides)].item()
            out[index_to_position(out_index, out_strides)] = fn(a_value, b_value)

    return kernel


def tensor_reduce(fn: ZipFn) -> ReduceKernel:
    """The loop of `SimpleOps.reduce`: out[i] = fn(out[i], a[i with each j along reduce_dim])."""
    fn = ieee(fn)

    @quiet
    def kernel(
        out: Storage,
        out_shape: Shape,
        out_strides: Strides,
        a_storage: Storage,
        a_shape: Shape,
        a_strides: Strides,
        reduce_dim: int,
    ) -> None:
        index = np.zeros(len(out_shape), np.int32)
        for ordinal in range(int(np.prod(out_shape))):
            to_index(ordinal, out_shape, index)
            out_position = index_to_position(index, out_strides)
            total = out[out_position].item()
            for j in range(a_shape[reduce_dim]):
                index[reduce_dim] = j
                total = fn(total, a_storage[index_to_position(index, a_strides)].item())
            out[out_position] = total

    return kernel


class TensorBackend:
    """The named operations that tensors and functions call, made from one `TensorOps`.

    Without a GPU, a backend of the GPU computes with FastOps on the CPU, and says so when printed.

    Args:
        ops: the class that provides `map`, `zip`, `reduce` and `matrix_multiply`.

    Attributes:
        ops: the class that is computed with.
        cuda: whether tensors of this backend are on the GPU.

    """

    def __init__(self, ops: type[TensorOps]) -> None:
        if not (isinstance(ops, type) and issubclass(ops, TensorOps)):
            raise TypeError(f"ops must be a subclass of TensorOps, such as FastOps, got {ops!r}")
        self._wanted = ops
        ops = ops.on_this_machine()
        self.ops = ops
        self.cuda = ops.cuda
        self.neg_map = ops.map(operators.neg)
        self.sigmoid_map = ops.map(operators.sigmoid)
        self.relu_map = ops.map(operators.relu)
        self.log_map = ops.map(operators.log)
        self.exp_map = ops.map(operators.exp)
        self.tanh_map = ops.map(operators.tanh)
        self.id_map = ops.map(operators.id)
        self.id_cmap = ops.cmap(operators.id)
        self.inv_map = ops.map(operators.inv)

        self.add_zip = ops.zip(operators.add)
        self.mul_zip = ops.zip(operators.mul)
        self.lt_zip = ops.zip(operators.lt)
        self.eq_zip = ops.zip(operators.eq)
        self.is_close_zip = ops.zip(operators.is_close)
        self.relu_back_zip = ops.zip(operators.relu_back)
        self.log_back_zip = ops.zip(operators.log_back)
        self.inv_back_zip = ops.zip(operators.inv_back)
        self.pow_scalar_zip = ops.zip(operators.pow)
        self.pow_back_zip = ops.zip(operators.pow_back)

        self.add_reduce = ops.reduce(operators.add, 0.0)
        self.mul_reduce = ops.reduce(operators.mul, 1.0)
        self.max_reduce = ops.reduce(operators.max, -np.inf)
        self.matrix_multiply = ops.matrix_multiply

        # Fused operations that the course calls so; all of them are in `ops`.
        self.attn_softmax_fw = ops.attn_softmax_fw
        self.attn_softmax_bw = ops.attn_softmax_bw
        self.layernorm_fw = ops.layernorm_fw
        self.layernorm_bw = ops.layernorm_bw
        _first.setdefault((type(self), self._wanted), self)

    # A backend has no state: it is its own copy, and pickle names its operations.

    def __copy__(self) -> TensorBackend:
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> TensorBackend:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return _backend_of, (type(self), self._wanted)

    def __repr__(self) -> str:
        if self.ops is self._wanted:
            return f"TensorBackend({self.ops.__name__})"
        return f"TensorBackend({self._wanted.__name__}, no GPU: {self.ops.__name__})"


# The first backend of each kind that this process made, for those that pickle brings.
_first: WeakValueDictionary[tuple[type, type], TensorBackend] = WeakValueDictionary()


def _backend_of(kind: type[TensorBackend], ops: type[TensorOps]) -> TensorBackend:
    """The process's backend of these operations, made if there is none."""
    return _first.get((kind, ops)) or kind(ops)


SimpleBackend = TensorBackend(SimpleOps)

__all__ = [
    "IndexingError",
    "MapProto",
    "SimpleBackend",
    "SimpleOps",
    "TensorBackend",
    "TensorOps",
    "tensor_map",
    "tensor_reduce",
    "tensor_zip",
]
