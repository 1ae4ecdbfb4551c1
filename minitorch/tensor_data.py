"""Storage, shape and strides: how the elements of a tensor lie in memory. No mathematics here."""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from math import prod
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from .arguments import as_array, as_ints, as_number, as_shape, check_key
from .cuda.device_array import DeviceArray
from .dtypes import FLOAT_DTYPES, get_default_dtype, storage_dtype

MAX_DIMS = 32

Storage: TypeAlias = npt.NDArray[Any]
OutIndex: TypeAlias = npt.NDArray[np.int32]
Index: TypeAlias = npt.NDArray[np.int32]
Shape: TypeAlias = npt.NDArray[np.int64]
Strides: TypeAlias = npt.NDArray[np.int64]

UserIndex: TypeAlias = Sequence[int]
UserShape: TypeAlias = Sequence[int]
UserStrides: TypeAlias = Sequence[int]


class IndexingError(RuntimeError, IndexError):
    """An index or a shape that does not fit."""


# Plain Python on purpose: numba compiles these three for the CPU and for the GPU.


def index_to_position(index: Index, strides: Strides) -> int:
    """The position in storage of the element at `index`: the dot product with the strides.

    Args:
        index: one number for each dimension.
        strides: likewise, in elements.

    """
    position = 0
    for i in range(len(strides)):
        position += index[i] * strides[i]
    return position


def to_index(ordinal: int, shape: Shape, out_index: OutIndex) -> None:
    """Write into `out_index` the index of element number `ordinal` in row-major order.

    Args:
        ordinal: 0 <= ordinal < product of `shape`.
        shape: the tensor's shape.
        out_index: receives one number for each dimension.

    """
    remaining = ordinal + 0  # a copy: numba keeps the type of an argument
    for i in range(len(shape) - 1, -1, -1):
        out_index[i] = remaining % shape[i]
        remaining = remaining // shape[i]


def broadcast_index(big_index: Index, big_shape: Shape, shape: Shape, out_index: OutIndex) -> None:
    """Write into `out_index` the index in a tensor of `shape` that broadcasts to `big_index` in
    `big_shape`.

    Args:
        big_index: index in the larger shape.
        big_shape: the larger shape.
        shape: the smaller shape: dimensions missing on the left or of size 1 are repeated.
        out_index: receives one number for each dimension of `shape`.

    """
    offset = len(big_shape) - len(shape)
    for i in range(len(shape)):
        out_index[i] = big_index[i + offset] if shape[i] > 1 else 0


def shape_broadcast(shape1: UserShape, shape2: UserShape) -> tuple[int, ...]:
    """The shape that two shapes broadcast to, by numpy's rules.

    Raises:
        IndexingError: two sizes differ and neither is 1.

    """
    if type(shape1) is type(shape2) is tuple and shape1 == shape2:
        return shape1
    a, b = as_ints(shape1, "shape1"), as_ints(shape2, "shape2")
    dims = max(len(a), len(b))
    padded_a = (1,) * (dims - len(a)) + a
    padded_b = (1,) * (dims - len(b)) + b
    out = []
    for size_a, size_b in zip(padded_a, padded_b, strict=True):
        if size_a != size_b and size_a != 1 and size_b != 1:
            raise IndexingError(f"shapes {a} and {b} cannot be broadcast together")
        out.append(size_b if size_a == 1 else size_a)
    return tuple(out)


def strides_from_shape(shape: UserShape) -> tuple[int, ...]:
    """The strides of a contiguous (row-major) tensor, in elements."""
    sizes = as_ints(shape, "shape")
    strides = [1]
    for size in reversed(sizes[1:]):
        strides.append(strides[-1] * size)
    return tuple(reversed(strides))[: len(sizes)]


def numpy_view(storage: Storage, shape: Iterable[int], strides: Iterable[int]) -> npt.NDArray[Any]:
    """The elements of a storage in this shape; strides in elements.

    Raises:
        ValueError: they do not all lie in the storage.

    """
    steps = tuple(int(stride) * storage.itemsize for stride in strides)
    return np.ndarray(tuple(int(n) for n in shape), storage.dtype, storage, strides=steps)


class TensorData:
    """A one-dimensional storage seen through a shape and strides.

    Args:
        storage: the elements; a list gets the default dtype, a float32 or float64 array keeps its
            own and is not copied; a DeviceArray is memory of the GPU.
        shape: sizes, as a tuple.
        strides: elements between neighbours along each dimension, as a tuple; contiguous if not
            given.

    Raises:
        IndexingError: `strides` has another length than `shape`.
        TypeError: shape or strides are no tuples of whole numbers, or the storage holds no numbers.
        ValueError: shape and strides do not fit the storage.

    """

    __slots__ = (
        "_shape_array",
        "_storage",
        "_strides_array",
        "number",
        "shape",
        "size",
        "slot",
        "strides",
    )

    _storage: Any  # a numpy array, or a DeviceArray for a tensor on the GPU
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    size: int
    number: float | None  # the value of a constant on the GPU, which need not be read back
    slot: Any  # the `ParameterSlot` of a parameter that is optimised inside CUDA graphs

    def __init__(
        self,
        storage: Sequence[float] | Storage | DeviceArray,
        shape: UserShape,
        strides: UserStrides | None = None,
    ) -> None:
        if not isinstance(shape, tuple):
            raise TypeError(f"shape must be a tuple, got {type(shape).__name__}")
        if strides is not None and not isinstance(strides, tuple):
            raise TypeError(f"strides must be a tuple, got {type(strides).__name__}")
        if strides is not None and len(strides) != len(shape):
            raise IndexingError(f"strides {strides} and shape {shape} must have the same length")
        shape = as_shape(shape)
        strides = None if strides is None else as_ints(strides, "strides")
        storage = _as_storage(storage)
        size = prod(shape)
        fits = len(storage) == size
        if strides is not None and size > 0:
            last = sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True))
            fits = min(strides, default=0) >= 0 and last < len(storage)
        if not fits:
            raise ValueError(
                f"a storage of {len(storage)} elements does not hold "
                f"shape {shape} with strides {strides}"
            )
        self._set(storage, shape, strides_from_shape(shape) if strides is None else strides, size)

    def _set(
        self, storage: Any, shape: tuple[int, ...], strides: tuple[int, ...], size: int
    ) -> None:
        self._storage = storage
        self.shape = shape
        self.strides = strides
        self.size = size
        self._shape_array: Shape | None = None
        self._strides_array: Strides | None = None
        self.number = None
        self.slot = None

    @staticmethod
    def _of(
        storage: Storage | DeviceArray, shape: tuple[int, ...], strides: tuple[int, ...]
    ) -> TensorData:
        """The same as the constructor, without checks: for strides that are known to fit."""
        data = TensorData.__new__(TensorData)
        data._set(storage, shape, strides, prod(shape))
        return data

    def __reduce__(self) -> tuple[Any, ...]:
        """For copies and pickle: `slot` and `number` belong to this one alone."""
        return TensorData._of, (self._storage, self.shape, self.strides)

    @staticmethod
    def from_array(array: npt.NDArray[Any]) -> TensorData:
        """The same elements as `array`, which is not copied unless it is read-only, a stride is
        negative or its dtype is not a float of ours.

        Raises:
            TypeError: its elements are no real numbers.

        """
        dtype = storage_dtype(array.dtype)
        if array.dtype != dtype:
            array = as_array(array, "array").astype(dtype)
        if not array.flags.writeable:  # for which numba would compile every loop again
            array = array.copy(order="K")
        data = TensorData.__new__(TensorData)
        shape = array.shape
        if not array.flags.c_contiguous and any(
            stride < 0 or stride % array.itemsize for stride in array.strides
        ):
            array = np.ascontiguousarray(array).reshape(shape)
        if array.flags.c_contiguous:
            data._set(array.reshape(-1), shape, strides_from_shape(shape), array.size)
            return data
        strides = tuple(stride // array.itemsize for stride in array.strides)
        span = 1 + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True))
        storage = np.lib.stride_tricks.as_strided(array, (span,), (array.itemsize,))
        data._set(storage, shape, strides, array.size)
        return data

    @property
    def array(self) -> npt.NDArray[Any]:
        """A numpy view of the elements in this shape; writing to it writes to the storage.

        Raises:
            TypeError: the elements are on the GPU, where numpy cannot see them.

        """
        storage = self._storage
        if type(storage) is DeviceArray:
            raise TypeError(
                "this tensor is on the GPU, its elements have no numpy view: to_numpy() copies them"
            )
        if self.is_contiguous():
            array: npt.NDArray[Any] = storage[: self.size].reshape(self.shape)
            return array
        return numpy_view(storage, self.shape, self.strides)

    @property
    def _shape(self) -> Shape:
        if self._shape_array is None:
            self._shape_array = np.array(self.shape, dtype=np.int64)
        return self._shape_array

    @property
    def _strides(self) -> Strides:
        if self._strides_array is None:
            self._strides_array = np.array(self.strides, dtype=np.int64)
        return self._strides_array

    @property
    def dims(self) -> int:
        """Number of dimensions."""
        return len(self.shape)

    @property
    def dtype(self) -> np.dtype[Any]:
        """The dtype of the elements."""
        dtype: np.dtype[Any] = self._storage.dtype
        return dtype

    @property
    def on_device(self) -> bool:
        """Whether the elements are on the GPU."""
        return type(self._storage) is DeviceArray

    def to_cuda_(self) -> None:
        """Move the storage to the GPU, in place."""
        if not self.on_device:
            self._storage = DeviceArray.from_host(self._storage)

    def item(self) -> float:
        """The only element.

        Raises:
            ValueError: there is not exactly one.

        """
        if self.size != 1:
            raise ValueError(f"item() needs a tensor of one element, got shape {self.shape}")
        if not self.on_device:
            return self.array.item()  # type: ignore[no-any-return]
        return float(self.to_numpy().reshape(())) if self.number is None else self.number

    def to_numpy(self) -> npt.NDArray[Any]:
        """A contiguous copy of the elements, from wherever they are."""
        if type(self._storage) is not DeviceArray:
            return self.array.copy(order="C")
        host = self._storage.copy_to_host()
        if self.is_contiguous():
            return host[: self.size].reshape(self.shape)
        return numpy_view(host, self.shape, self.strides).copy(order="C")

    def is_contiguous(self) -> bool:
        """Whether the elements lie in row-major order with no gap."""
        expected = 1
        for size, stride in zip(reversed(self.shape), reversed(self.strides), strict=True):
            if size != 1 and stride != expected:
                return self.size == 0
            expected *= size
        return True

    @staticmethod
    def shape_broadcast(shape_a: UserShape, shape_b: UserShape) -> tuple[int, ...]:
        """`shape_broadcast` of this module, where MiniTorch has it too."""
        return shape_broadcast(shape_a, shape_b)

    def index(self, index: int | UserIndex) -> int:
        """The position in storage of one element.

        Args:
            index: one number for each dimension; a bare number for one dimension.

        Raises:
            IndexingError: wrong number of dimensions, or outside the shape (negative numbers too).
            TypeError: no whole numbers.

        """
        given = as_ints(index, "index")
        if len(given) != len(self.shape):
            raise IndexingError(
                f"index {given} must have {len(self.shape)} numbers: shape {self.shape}"
            )
        for i, size in zip(given, self.shape, strict=True):
            if not 0 <= i < size:
                raise IndexingError(f"index {given} is out of range for shape {self.shape}")
        return sum(i * stride for i, stride in zip(given, self.strides, strict=True))

    def indices(self) -> Iterable[tuple[int, ...]]:
        """Every index, in row-major order."""
        return np.ndindex(*self.shape)

    def sample(self) -> tuple[int, ...]:
        """A random valid index.

        Raises:
            ValueError: there are no elements.

        """
        if self.size == 0:
            raise ValueError(f"sample() needs at least one element, got shape {self.shape}")
        return tuple(random.randint(0, size - 1) for size in self.shape)

    def get(self, key: UserIndex) -> float:
        """The element at a full index."""
        return float(self._storage[self.index(key)])

    def set(self, key: UserIndex, val: float) -> None:
        """Change the element at a full index.

        Raises:
            TypeError: `val` is no number.

        """
        position, number = self.index(key), as_number(val, "val")
        with np.errstate(over="ignore"):  # a number too large for the dtype is infinite
            self._storage[position] = number
        self.number = None
        if self.slot is not None:
            self.slot.changed()

    def tuple(self) -> tuple[Storage, Shape, Strides]:
        """Storage, shape and strides, as the kernels of `map`, `zip` and `reduce` take them; on the
        GPU the storage as numba's array.
        """
        storage = self._storage.array if self.on_device else self._storage
        return storage, self._shape, self._strides

    def slice(self, key: Any) -> TensorData:
        """What basic indexing by `key` (whole numbers, slices, None and ...) sees; no copy, unless
        a step is negative.

        Raises:
            TypeError: the key holds something else.
            IndexingError: it does not fit the shape.

        """
        key = check_key(key)
        # On the GPU numpy works it out on an array of this shape with no elements to speak of.
        layout = _Layout(self.shape, self.strides) if self.on_device else self.array
        try:
            view = np.asarray(layout)[key]
        except IndexError as error:
            raise IndexingError(f"index {key} does not fit shape {self.shape}: {error}") from None
        if not self.on_device:
            return TensorData.from_array(view)
        offset = view.__array_interface__["data"][0] - _NO_ELEMENTS.ctypes.data
        if min(view.strides, default=0) < 0:
            host = DeviceArray.from_host(self.to_numpy()[key])
            return TensorData._of(host, view.shape, strides_from_shape(view.shape))
        span = 1 + sum((n - 1) * s for n, s in zip(view.shape, view.strides, strict=True))
        span = span if view.size else 0
        return TensorData._of(self._storage[offset : offset + span], view.shape, view.strides)

    def broadcast_to(self, shape: UserShape) -> TensorData:
        """The same storage repeated to `shape` by strides of 0.

        Raises:
            ValueError: the shape does not broadcast to that.

        """
        wanted = as_shape(shape)
        added = len(wanted) - len(self.shape)
        fits = added >= 0 and all(
            n in (1, want) for n, want in zip(self.shape, wanted[added:], strict=True)
        )
        if not fits:
            raise ValueError(f"shape {self.shape} does not broadcast to {wanted}")
        kept = zip(self.shape, self.strides, wanted[added:], strict=True)
        strides = (0,) * added + tuple(s if n == want else 0 for n, s, want in kept)
        return TensorData._of(self._storage, wanted, strides)

    def permute(self, *order: int) -> TensorData:
        """The same storage with its dimensions in another order.

        Raises:
            IndexingError: `order` is not a permutation of the dimensions.

        """
        order = as_ints(order, "order")
        if sorted(order) != list(range(len(self.shape))):
            raise IndexingError(f"order {order} must name each of the {self.dims} dimensions once")
        data = TensorData.__new__(TensorData)
        shape = tuple(self.shape[i] for i in order)
        data._set(self._storage, shape, tuple(self.strides[i] for i in order), self.size)
        return data

    def to_string(self) -> str:
        """The values, nested in brackets."""
        return np.array2string(self.to_numpy(), precision=4, separator=", ")


_NO_ELEMENTS = np.zeros(1, np.uint8)


class _Layout:
    """Makes numpy see an array of bytes with a shape and strides; nobody reads its elements."""

    def __init__(self, shape: tuple[int, ...], strides: tuple[int, ...]) -> None:
        self.__array_interface__ = {
            "shape": shape,
            "strides": strides,
            "typestr": "|u1",
            "data": (_NO_ELEMENTS.ctypes.data, False),
            "version": 3,
        }


def _as_storage(storage: Any) -> Any:
    """A one-dimensional array of a dtype that we have."""
    if isinstance(storage, DeviceArray):
        return storage
    if type(storage) is np.ndarray and storage.dtype in FLOAT_DTYPES and storage.flags.carray:
        return storage.reshape(-1)
    array = as_array(storage, "storage")
    if not isinstance(storage, np.ndarray):
        return array.astype(get_default_dtype()).reshape(-1)
    if not array.flags.writeable:
        array = array.copy()
    return np.ascontiguousarray(array, dtype=storage_dtype(array.dtype)).reshape(-1)
