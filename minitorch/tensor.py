"""`Tensor`: an array that remembers how it was computed. Each operation is one line to its
`Function`.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any, TypeAlias, Union

import numpy as np
import numpy.typing as npt

from . import dtypes, numpy_protocol, tensor_graph
from .arguments import (
    as_ints,
    as_shape,
    check_dim,
    check_dims,
    set_tensor_class,
    spread,
)
from .attention import flash_attention, standard_attention
from .autodiff import new_id
from .copies import copy_tensor, deepcopy_tensor, set_tensor_state, tensor_state
from .function import Function, History
from .fused_functions import Attn_Softmax, LayerNorm
from .indexing import get_item, set_item
from .interop.arrays import cuda_array_interface, dlpack_device, to_dlpack
from .movement_functions import BroadcastTo, Copy, Permute, View, expand
from .numpy_protocol import plain_operand
from .tensor_data import Shape, Storage, Strides, TensorData, UserShape, UserStrides
from .tensor_functions import (
    EQ,
    LT,
    Add,
    All,
    Cast,
    Exp,
    Inv,
    IsClose,
    Log,
    MatMul,
    Move,
    Mul,
    Neg,
    PowerScalar,
    ReLU,
    Sigmoid,
    Sum,
    Tanh,
)
from .tensor_ops import SimpleBackend, TensorBackend

TensorLike: TypeAlias = Union[float, int, np.number[Any], npt.NDArray[Any], "Tensor"]

# Aliases, because inside the class `tuple` is the method that MiniTorch has.
Sizes: TypeAlias = tuple[int, ...]
Arrays: TypeAlias = tuple[Storage, Shape, Strides]


class Tensor:
    """A multi-dimensional array with a gradient.

    Operators take tensors, numbers and arrays, and keep the graph with an array on the left too.
    Comparisons and truth values (`<`, `==`, `all`, `is_close`) have a gradient of 0. What `numpy`,
    `to_numpy`, `item`, `detach`, `zeros`, `expand` and a full index, `x[0, 1]`, give has left the
    graph; all other methods that return a tensor have a gradient.

    Args:
        v: the elements; copied to where the backend computes if they are elsewhere.
        back: how it was computed; an empty `History` for a leaf, None for a constant.
        name: for messages.
        backend: the operations to use; `SimpleBackend` if not given.

    """

    grad: Tensor | None

    def __init__(
        self,
        v: TensorData,
        back: History | None = None,
        name: str | None = None,
        backend: TensorBackend | None = None,
    ) -> None:
        if not isinstance(v, TensorData):
            raise TypeError(
                f"v must be a TensorData, got {type(v).__name__}: "
                "minitorch.tensor() takes lists and arrays"
            )
        self.unique_id = new_id()
        self.history = back
        self.backend = backend = SimpleBackend if backend is None else backend
        self._tensor = v if v.on_device == backend.cuda else backend.ops.placed(v)
        self.grad = None
        self.name = name if name is not None else str(self.unique_id)

    # ----- what it is -----

    @property
    def f(self) -> TensorBackend:
        """The backend, by the short name that functions use."""
        return self.backend

    @property
    def shape(self) -> Sizes:
        """Size of each dimension."""
        return self._tensor.shape

    @property
    def size(self) -> int:
        """Number of elements."""
        return self._tensor.size

    @property
    def dims(self) -> int:
        """Number of dimensions."""
        return len(self._tensor.shape)

    @property
    def dtype(self) -> np.dtype[Any]:
        """float32 or float64; on the GPU also float16 or bfloat16."""
        return self._tensor.dtype

    def requires_grad_(self, x: bool) -> None:
        """Make this tensor a leaf that collects a gradient, or (False) a constant."""
        if not isinstance(x, int | np.bool_):
            raise TypeError(f"requires_grad_() takes True or False, got {type(x).__name__}")
        self.history = History() if x else None

    def requires_grad(self) -> bool:
        """Whether a gradient is computed for this tensor."""
        return self.history is not None

    # ----- to and from other forms -----

    def numpy(self) -> npt.NDArray[Any]:
        """The elements as a numpy array that shares this tensor's memory; a graph knows nothing of
        writes to it.

        Raises:
            TypeError: the tensor is on the GPU; `to_numpy` copies it.

        """
        return self._tensor.array

    def to_numpy(self) -> npt.NDArray[Any]:
        """A contiguous copy of the elements, from the GPU too (then this waits for its work).

        Raises:
            ValueError: a kernel has found bad input, such as a class number that does not exist.

        """
        return self._tensor.to_numpy()

    # For numpy's functions, and operators with an array on the left: see numpy_protocol.py
    __array__ = numpy_protocol.array
    __array_ufunc__ = numpy_protocol.array_ufunc
    __array_function__ = numpy_protocol.array_function

    # For copies and pickle, which make other variables: see copies.py
    __copy__, __deepcopy__ = copy_tensor, deepcopy_tensor
    __getstate__, __setstate__ = tensor_state, set_tensor_state

    # For other libraries, which share the memory: see interop.py
    __cuda_array_interface__ = property(cuda_array_interface)
    __dlpack__ = to_dlpack
    __dlpack_device__ = dlpack_device

    def item(self) -> float:
        """The only element, as a Python float.

        Raises:
            ValueError: there is not exactly one.

        """
        return self._tensor.item()

    def __float__(self) -> float:
        return self.item()

    def __bool__(self) -> bool:
        """Whether every element is true (not zero). MiniTorch's `is_close` relies on a truth value
        of whole tensors.
        """
        if self._tensor.on_device:
            return bool(np.all(self.to_numpy()))
        return bool(np.all(self._tensor.array))

    def to(self, target: npt.DTypeLike | TensorBackend) -> Tensor:
        """The same values in another dtype, or on another backend: `x.to(cuda_backend)` copies them
        to the GPU. The gradient comes back in this tensor's dtype, to this tensor's backend.

        Args:
            target: float32 or float64, on the GPU also float16 or bfloat16, as dtype or name; or a
                backend, where float16 and bfloat16 become float32 if that is one of the CPU.

        Raises:
            TypeError: another dtype, or no dtype and no backend, such as "cuda".

        """
        if isinstance(target, TensorBackend):
            return self if target is self.backend else Move.apply(self, target)
        if target is None or str(target).split(":")[0] in ("cpu", "cuda", "gpu"):  # as in PyTorch
            raise TypeError(f"to() takes a TensorBackend or a dtype, got {target!r}")
        wanted = dtypes.check_dtype(target, self.backend.cuda)
        return self if wanted == self.dtype else Cast.apply(self, wanted)

    def tuple(self) -> Arrays:
        """Storage, shape and strides."""
        return self._tensor.tuple()

    def __repr__(self) -> str:
        text = np.array2string(
            self.to_numpy(), precision=4, separator=", ", prefix="tensor(", threshold=100
        )
        dtype = "" if self.dtype == dtypes.get_default_dtype() else f", dtype={self.dtype.name}"
        if self.history is None or self.history.last_fn is None:
            return f"tensor({text}{dtype})"
        return f"tensor({text}{dtype}, grad_fn={self.history.last_fn.__name__})"

    __str__ = __repr__

    # ----- elementwise -----

    def _ensure_tensor(self, b: TensorLike, dtype: np.dtype[Any] | None = None) -> Tensor:
        """`b`, or a constant: of a number, shape (1,) in this tensor's or another dtype; of an
        array.
        """
        if isinstance(b, Tensor):
            return b
        dtype = self.dtype if dtype is None else dtype
        value = plain_operand(b, dtype)
        if isinstance(value, float):
            return self._new(self.backend.ops.constant(value, dtype))
        return self._from_numpy(value)

    def _operand(self, b: TensorLike) -> Tensor:
        """`b` for arithmetic: a number is not rounded to 16 bits, in which 1e-6 would be 0."""
        return self._ensure_tensor(b, dtypes.arithmetic_dtype(self.dtype))

    def __add__(self, b: TensorLike) -> Tensor:
        return Add.apply(self, self._operand(b))

    def __sub__(self, b: TensorLike) -> Tensor:
        if not isinstance(b, Tensor):  # negated as a float: uint8 has no -1
            b = plain_operand(b, dtypes.arithmetic_dtype(self.dtype))
        return Add.apply(self, self._operand(-b))

    def __mul__(self, b: TensorLike) -> Tensor:
        return Mul.apply(self, self._operand(b))

    def __truediv__(self, b: TensorLike) -> Tensor:
        if not isinstance(b, Tensor):
            b = plain_operand(b, dtypes.arithmetic_dtype(self.dtype))
        if isinstance(b, float):
            divisor = dtypes.rounded(b, dtypes.arithmetic_dtype(self.dtype))
            if divisor:
                return self * (1.0 / divisor)  # what Inv would give
        return Mul.apply(self, Inv.apply(self._ensure_tensor(b)))

    def __rtruediv__(self, b: TensorLike) -> Tensor:
        return Mul.apply(self._operand(b), Inv.apply(self))

    def __pow__(self, b: TensorLike) -> Tensor:
        return PowerScalar.apply(self, self._operand(b))

    def __rpow__(self, b: TensorLike) -> Tensor:
        return PowerScalar.apply(self._operand(b), self)

    def __matmul__(self, b: Tensor) -> Tensor:
        return MatMul.apply(self, b)

    def __rmatmul__(self, b: Tensor) -> Tensor:
        return MatMul.apply(b, self)

    def __lt__(self, b: TensorLike) -> Tensor:  # type: ignore[misc]
        return LT.apply(self, self._ensure_tensor(b))

    def __gt__(self, b: TensorLike) -> Tensor:  # type: ignore[misc]
        return LT.apply(self._ensure_tensor(b), self)

    def __le__(self, b: TensorLike) -> Tensor:  # type: ignore[misc]
        return (self < b) + (self == b)

    def __ge__(self, b: TensorLike) -> Tensor:  # type: ignore[misc]
        return (self > b) + (self == b)

    def __eq__(self, b: TensorLike) -> Tensor:  # type: ignore[override]
        return EQ.apply(self, self._ensure_tensor(b))

    def __ne__(self, b: TensorLike) -> Tensor:  # type: ignore[override]
        return 1.0 - (self == b)

    __hash__ = object.__hash__

    def __neg__(self) -> Tensor:
        return Neg.apply(self)

    def __radd__(self, b: TensorLike) -> Tensor:
        return self + b

    def __rmul__(self, b: TensorLike) -> Tensor:
        return self * b

    def __rsub__(self, b: TensorLike) -> Tensor:
        return self._operand(b) - self

    def is_close(self, y: Tensor) -> Tensor:
        """1.0 where the two differ by less than 0.01."""
        return IsClose.apply(self, self._ensure_tensor(y))

    def sigmoid(self) -> Tensor:
        """1 / (1 + exp(-x))"""
        return Sigmoid.apply(self)

    def tanh(self) -> Tensor:
        """Hyperbolic tangent."""
        return Tanh.apply(self)

    def relu(self) -> Tensor:
        """max(x, 0)"""
        return ReLU.apply(self)

    def log(self) -> Tensor:
        """log(x + 1e-6), as MiniTorch has it."""
        return Log.apply(self)

    def exp(self) -> Tensor:
        """e ** x"""
        return Exp.apply(self)

    # ----- reduction: a dimension, or each of several, is kept with size 1; without any,
    # everything is reduced to shape (1,) -----

    def _reduced(self, function: type[Function], dim: int | Sequence[int] | None) -> Tensor:
        """A reduction by one dimension after the other; an empty list means all, as in PyTorch."""
        dims = () if dim is None else check_dims(dim, self.dims)
        if not dims:
            return function.apply(self._flat(), 0)
        out = self
        for d in dims:
            out = function.apply(out, d)
        return out

    def all(self, dim: int | Sequence[int] | None = None) -> Tensor:
        """1.0 where every element along `dim` is true."""
        return self._reduced(All, dim)

    def sum(self, dim: int | Sequence[int] | None = None) -> Tensor:
        """Sum along `dim`."""
        return self._reduced(Sum, dim)

    def mean(self, dim: int | Sequence[int] | None = None) -> Tensor:
        """Mean along `dim`.

        Raises:
            ValueError: there is nothing to take the mean of.

        """
        dims = () if dim is None else check_dims(dim, self.dims)
        n = prod([self.shape[d] for d in dims]) if dims else self.size
        if n == 0:
            raise ValueError(f"mean() needs at least one element, got shape {self.shape}")
        if self.dtype in dtypes.HALF_DTYPES:  # whose sum may be out of their range
            return self.to("float32").mean(dim).to(self.dtype)
        return self.sum(dim) / float(n)

    def var(self, dim: int | Sequence[int] | None = None) -> Tensor:
        """Biased variance along `dim`: the mean of the squared distances to the mean."""
        distance = self - self.mean(dim)
        return (distance * distance).mean(dim)

    def _flat(self) -> Tensor:
        return self.contiguous().view(self.size)

    # ----- movement -----

    def permute(self, *order: int | Sequence[int]) -> Tensor:
        """The dimensions in the given order: `permute(1, 0)` or `permute((1, 0))`."""
        return Permute.apply(self, spread(order))

    def transpose(self, dim0: int, dim1: int) -> Tensor:
        """Two dimensions exchanged."""
        order = list(range(self.dims))
        a, b = check_dim(dim0, self.dims, "dim0"), check_dim(dim1, self.dims, "dim1")
        order[a], order[b] = order[b], order[a]
        return Permute.apply(self, order)

    def view(self, *shape: int | Sequence[int]) -> Tensor:
        """The same elements in another shape, `view(2, 3)` or `view((2, 3))`; one size may be -1,
        to be worked out.

        Raises:
            AssertionError: the tensor is not contiguous.
            ValueError: the shape has another number of elements.

        """
        return View.apply(self, spread(shape))

    def contiguous(self) -> Tensor:
        """This tensor if its elements lie in row-major order, else a copy in which they do."""
        return self if self._tensor.is_contiguous() else Copy.apply(self)

    # See indexing.py
    __getitem__ = get_item
    __setitem__ = set_item

    def broadcast_to(self, *shape: int | Sequence[int]) -> Tensor:
        """This tensor repeated to `shape`, without a copy: `broadcast_to((2, 3))` or
        `broadcast_to(2, 3)`.

        Raises:
            ValueError: the shape does not broadcast to that.

        """
        return BroadcastTo.apply(self, as_shape(spread(shape)))

    # ----- fused -----

    def attn_softmax(self, mask: Tensor) -> Tensor:
        """softmax(self + mask) along the last dimension; self (B, H, from, to), mask broadcasts to
        it.
        """
        return Attn_Softmax.apply(self, mask)

    def layernorm(self, gamma: Tensor, beta: Tensor, eps: float = 1e-8) -> Tensor:
        """Layer norm of the last dimension; self (..., D), gamma and beta (D,)."""
        return LayerNorm.apply(self, gamma, beta, eps)

    # ----- attention: see attention.py, where `query` is this tensor -----

    flash_attention = flash_attention
    attention = standard_attention

    def flash_attention_causal(self, key: Tensor, value: Tensor) -> Tensor:
        """`flash_attention(key, value, is_causal=True)`, as versions of the course call it."""
        out: Tensor = self.flash_attention(key, value, is_causal=True)
        return out

    # ----- making others like it -----

    def _new(self, tensor_data: TensorData) -> Tensor:
        """A constant on the same backend; the elements are there already."""
        return Tensor(tensor_data, backend=self.backend)

    def _from_numpy(self, array: npt.NDArray[Any]) -> Tensor:
        """A constant on the same backend, from an array, which a backend of the CPU may share."""
        return Tensor(self.backend.ops.from_numpy(array), backend=self.backend)

    @staticmethod
    def make(
        storage: Storage | list[float],
        shape: UserShape,
        strides: UserStrides | None = None,
        backend: TensorBackend | None = None,
    ) -> Tensor:
        """A constant tensor from storage, shape and strides."""
        strides = None if strides is None else as_ints(strides, "strides")
        return Tensor(TensorData(storage, as_shape(shape), strides), backend=backend)

    def zeros(self, shape: UserShape | None = None) -> Tensor:
        """Zeros of `shape` (of this one if not given), with this tensor's dtype and backend."""
        wanted = self.shape if shape is None else as_shape(shape)
        return self._new(self.backend.ops.full(wanted, 0.0, self.dtype))

    expand = expand

    def detach(self) -> Tensor:
        """A constant that shares this tensor's elements."""
        return Tensor(self._tensor, backend=self.backend)

    def _type_(self, backend: TensorBackend) -> None:
        """Move this tensor to another backend, in place."""
        self._tensor = Tensor(self._tensor, backend=backend)._tensor
        self.backend = backend

    # ----- the variable of the autodiff engine: see tensor_graph.py -----

    is_leaf, is_constant = tensor_graph.is_leaf, tensor_graph.is_constant
    parents = property(tensor_graph.parents)
    accumulate_derivative = tensor_graph.accumulate_derivative
    chain_rule = tensor_graph.chain_rule
    release_graph = tensor_graph.release_graph
    backward = tensor_graph.backward

    def zero_grad_(self) -> None:
        """Forget the gradient."""
        self.grad = None


set_tensor_class(Tensor)

__all__ = ["Function", "History", "Tensor", "TensorLike"]
