"""Matrix products by cuBLAS, NVIDIA's own library, through its Python bindings (nvmath-python).

cuBLAS thinks in columns: it sees a row-major (m, n) matrix as an (n, m) one whose columns are the
rows. So out = a @ b is asked for as out^T = b^T @ a^T, and nothing is ever transposed in memory:
each factor is read by rows or by columns, as its strides say.

Products of float32 are computed in float32 (`set_float32_matmul_precision` allows TF32, which keeps
10 bits of the mantissa), those of 16-bit numbers summed in float32. The workspace is our own, so
that results do not depend on what else runs and a CUDA graph may capture the products.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import threading
from functools import cache
from math import prod
from typing import Any, NamedTuple

import numpy as np

from ..kernels.elementwise_cuda import Ints, View, merge_dimensions
from ..kernels.gpu import runtime
from . import driver

WORKSPACE = 32 << 20  # bytes; what NVIDIA recommends for Hopper, and enough for the others
_LARGEST = (1 << 31) - 1
BY_ROWS, BY_COLUMNS = 0, 1  # cuBLAS's N and T, for a row-major reader

# cudaDataType, cublasComputeType and the numpy type of alpha and beta
_TYPES: dict[str, tuple[int, int, Any]] = {
    "float32": (0, 68, np.float32),
    "float64": (1, 70, np.float64),
    "float16": (2, 68, np.float32),
    "bfloat16": (14, 68, np.float32),
}
_COMPUTE_TF32 = 77
_NO_16_BIT_SUMS = 16  # CUBLAS_MATH_DISALLOW_REDUCED_PRECISION_REDUCTION

_ones_zeros = {kind: np.array([1, 0], kind) for kind in (np.float32, np.float64)}
_ONE_ZERO: dict[Any, tuple[int, int]] = {  # their addresses, kept alive by the line above
    kind: (pair.ctypes.data, pair.ctypes.data + pair.itemsize) for kind, pair in _ones_zeros.items()
}
_settings = {"float32": "highest"}
_this_thread = threading.local()


# ----- what is there -----


@cache
def _bindings() -> Any:
    """The module of nvmath-python; None where it or a GPU is missing."""
    if runtime.SIMULATED or not runtime.is_available():
        return None
    try:
        module = importlib.import_module("nvmath.bindings.cublas")
        driver.use_context()
        module.destroy(module.create())
    except Exception:  # not installed, or no library that fits: the tiled kernel does without
        return None
    return module


def is_available() -> bool:
    """Whether products are computed by cuBLAS."""
    return _bindings() is not None


def description() -> str:
    """What computes matrix products, in words."""
    bindings = _bindings()
    if bindings is None:
        return "the tiled kernel (nvmath-python is not installed or finds no cuBLAS)"
    number = bindings.get_version(handle())
    release = f"{number // 10000}.{number // 100 % 100}.{number % 100}"
    return f"cuBLAS {release} through nvmath-python {importlib.metadata.version('nvmath-python')}"


def set_float32_matmul_precision(precision: str) -> None:
    """How products of float32 tensors are computed on the GPU (PyTorch has the same function).

    Args:
        precision: "highest", in float32, or "high", in TF32 on the tensor cores, about 10 times as
            fast and with errors of about 1e-3.

    Raises:
        ValueError: it is something else.

    """
    if precision not in ("highest", "high"):
        raise ValueError(f"precision must be 'highest' or 'high', got {precision!r}")
    _settings["float32"] = precision


def get_float32_matmul_precision() -> str:
    """What `set_float32_matmul_precision` was last told; "highest" at first."""
    return _settings["float32"]


# ----- the library's state -----


def handle() -> int:
    """This thread's handle, on the current stream, with that stream's workspace."""
    state = _this_thread
    bindings = _bindings()
    if not hasattr(state, "handle"):
        state.workspaces = {}
        state.stream = None
        state.handle = bindings.create()
        bindings.set_math_mode(state.handle, _NO_16_BIT_SUMS)
    stream = driver.stream_handle()
    if stream != state.stream:
        bindings.set_stream(state.handle, stream)
        bindings.set_workspace(state.handle, workspace(stream), WORKSPACE)
        state.stream = stream
    return int(state.handle)


def workspace(stream: int) -> int:
    """The address of this thread's workspace for a stream: two streams may not share one."""
    if stream not in _this_thread.workspaces:
        address = driver.allocate(WORKSPACE)
        if address is None:
            raise MemoryError(f"the GPU has no {WORKSPACE >> 20} MiB left for cuBLAS's workspace")
        _this_thread.workspaces[stream] = address
    return int(_this_thread.workspaces[stream])


# ----- how a factor lies in memory -----


class Factor(NamedTuple):
    """A batch of matrices as cuBLAS takes it.

    Args:
        order: by rows or by columns.
        leading: elements from one row (or column) to the next.
        batch_stride: elements from one matrix to the next, 0 if it is the same one.

    """

    order: int
    leading: int
    batch_stride: int


def factor(shape: Ints, strides: Ints) -> Factor | None:
    """A batch of matrices (batch, rows, columns) for cuBLAS; None if it cannot read them so.

    Either the numbers of a row or those of a column must be neighbours.
    """
    _, rows, columns = shape
    batch_stride, row, column = strides
    if column == 1 or columns == 1:
        leading = row if rows > 1 else columns
        if columns <= leading <= _LARGEST:
            return Factor(BY_ROWS, leading, batch_stride)
    if row == 1 or rows == 1:
        leading = column if columns > 1 else rows
        if rows <= leading <= _LARGEST:
            return Factor(BY_COLUMNS, leading, batch_stride)
    return None


class Product(NamedTuple):
    """One call of cuBLAS: sizes, and how both factors lie."""

    batches: int
    m: int
    n: int
    k: int
    a: Factor
    b: Factor


def plan(a: View, b: View) -> Product | None:
    """a (..., m, k) @ b (..., k, n), batch dimensions equal, as one call; None if it is not one."""
    (m, k), n = a.shape[-2:], b.shape[-1]
    batch = a.shape[:-2]
    if not any(b.strides[:-2]) or prod(batch) == 1:
        # One matrix b for all: the rows of all matrices of a are those of one.
        (rows, *more), (steps,) = merge_dimensions(a.shape[:-1], a.strides[:-1])
        if not more:
            a_factor = factor((1, rows, k), (0, steps[0], a.strides[-1]))
            b_factor = factor((1, k, n), (0, *b.strides[-2:]))
            if a_factor and b_factor and rows <= _LARGEST:
                return Product(1, rows, n, k, a_factor, b_factor)
    (batches, *more), (a_steps, b_steps) = merge_dimensions(batch, a.strides[:-2], b.strides[:-2])
    if more or batches > _LARGEST:
        return None
    a_factor = factor((batches, m, k), (a_steps[0], *a.strides[-2:]))
    b_factor = factor((batches, k, n), (b_steps[0], *b.strides[-2:]))
    if a_factor is None or b_factor is None:
        return None
    return Product(batches, m, n, k, a_factor, b_factor)


# ----- products -----


def matmul_into(out: int, a: View, b: View, product: Product, out_dtype: str | None = None) -> None:
    """Compute the product of `plan(a, b)`, which is not empty, into contiguous memory.

    Args:
        out: address of the product.
        a: left factor.
        b: right factor, of the same dtype.
        product: what `plan` returned.
        out_dtype: of the product, if not that of the factors: float32 for factors of 16 bits.

    """
    batches, m, n, k, left, right = product
    kind, compute, alpha, beta = numbers(a.dtype)
    out_kind = _TYPES[out_dtype or a.dtype][0]
    bindings = _bindings()
    # out^T (n, m) = b^T (n, k) @ a^T (k, m)
    head = (handle(), right.order, left.order, n, m, k, alpha)
    if batches == 1:
        bindings.gemm_ex(
            *head,
            *(b.address, kind, right.leading, a.address, kind, left.leading),
            *(beta, out, out_kind, n, compute, -1),
        )
    else:
        bindings.gemm_strided_batched_ex(
            *head,
            *(b.address, kind, right.leading, right.batch_stride),
            *(a.address, kind, left.leading, left.batch_stride),
            *(beta, out, out_kind, n, m * n, batches, compute, -1),
        )


def numbers(dtype: str) -> tuple[int, int, int, int]:
    """The type of the factors, the type of the arithmetic, and where 1 and 0 stand in that."""
    kind, compute, scale = _TYPES[dtype]
    if dtype == "float32" and _settings["float32"] == "high":
        compute = _COMPUTE_TF32
    return kind, compute, *_ONE_ZERO[scale]
