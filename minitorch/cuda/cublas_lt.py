"""A linear layer in one kernel: x @ weight + bias by cuBLASLt, which adds the bias as it writes.

cuBLASLt has many kernels for a product, and says for given sizes which it expects to be fastest.
That takes longer than the product itself, so it is asked once for each (`_choose`).
"""

from __future__ import annotations

import importlib
from functools import cache
from typing import Any, NamedTuple

import numpy as np

from ..kernels.elementwise_cuda import View
from . import cublas, driver
from .cublas import BY_ROWS, WORKSPACE, Product

# Attributes and values of cuBLASLt, by their names in its manual.
_TRANSA, _TRANSB, _EPILOGUE, _BIAS_POINTER = 3, 4, 7, 8  # CUBLASLT_MATMUL_DESC_...
_MAX_WORKSPACE_BYTES, _REDUCTION_SCHEME_MASK, _MIN_ALIGNMENT_A = 1, 3, 5  # ..._MATMUL_PREF_...
_EPILOGUE_BIAS = 4
_REDUCTION_SCHEME_COMPUTE_TYPE = 2  # partial sums are added in float32, not in 16 bits
_MOST_ALIGNMENT = 256


@cache
def _bindings() -> Any:
    """The module of nvmath-python; None where it or a GPU is missing."""
    if not cublas.is_available():
        return None
    try:
        return importlib.import_module("nvmath.bindings.cublasLt")
    except ImportError:
        return None


class _Choice(NamedTuple):
    """A product that cuBLASLt has chosen a kernel for; numbers are its handles.

    Args:
        desc: of the operation.
        weight, x, out: how the matrices lie.
        algorithm: the kernel; the array is cuBLASLt's own record.

    """

    desc: int
    weight: int
    x: int
    out: int
    algorithm: Any


def linear_into(out: int, x: View, weight: View, bias: View, product: Product) -> bool:
    """x @ weight + bias, where `product` is cublas.plan(x, weight) with one batch.

    Args:
        out: address of the result, contiguous (rows, out).
        x: of as many rows as there are in all.
        weight: (in, out).
        bias: (out,), contiguous, of the same dtype.
        product: the plan of the product.

    Returns:
        False if cuBLASLt is missing or has no kernel for this: nothing has been done.

    """
    bindings = _bindings()
    if bindings is None:
        return False
    pointers = (weight.address, x.address, out, bias.address)
    alignments = tuple(min(p & -p, _MOST_ALIGNMENT) for p in pointers[:3])
    numbers = cublas.numbers(x.dtype)
    choice = _choose(product, x.dtype, numbers[1], alignments)
    if choice is None:
        return False
    _set(bindings.matmul_desc_set_attribute, choice.desc, _BIAS_POINTER, bias.address, np.uint64)
    _, _, one, zero = numbers
    stream = driver.stream_handle()
    handle = cublas.handle()
    bindings.matmul(
        *(handle, choice.desc, one, weight.address, choice.weight, x.address, choice.x),
        *(zero, out, choice.out, out, choice.out, choice.algorithm.ctypes.data),
        *(cublas.workspace(stream), WORKSPACE, stream),
    )
    return True


@cache
def _choose(
    product: Product, dtype: str, compute: int, alignments: tuple[int, ...]
) -> _Choice | None:
    """Ask cuBLASLt for its fastest kernel; None if it has none.

    Args:
        product: sizes and layouts of x (a) and weight (b).
        dtype: of all matrices.
        compute: type of the arithmetic.
        alignments: of the addresses of weight, x and out.

    """
    bindings = _bindings()
    _, m, n, k, x, weight = product
    kind = cublas.numbers(dtype)[0]
    scale = 1 if dtype == "float64" else 0  # the type of alpha and beta
    desc = bindings.matmul_desc_create(compute, scale)
    for attribute, value in ((_TRANSA, weight.order), (_TRANSB, x.order)):
        _set(bindings.matmul_desc_set_attribute, desc, attribute, value, np.int32)
    _set(bindings.matmul_desc_set_attribute, desc, _EPILOGUE, _EPILOGUE_BIAS, np.uint32)

    def layout(rows: int, columns: int, by_rows: bool, leading: int) -> int:
        """Of a row-major matrix, as cuBLAS sees it: rows are its columns."""
        sizes = (columns, rows) if by_rows else (rows, columns)
        return int(bindings.matrix_layout_create(kind, *sizes, leading))

    weight_layout = layout(k, n, weight.order == BY_ROWS, weight.leading)
    x_layout = layout(m, k, x.order == BY_ROWS, x.leading)
    out_layout = layout(m, n, True, n)

    wish = bindings.matmul_preference_create()
    wishes = bindings.matmul_preference_set_attribute
    _set(wishes, wish, _MAX_WORKSPACE_BYTES, WORKSPACE, np.uint64)
    _set(wishes, wish, _REDUCTION_SCHEME_MASK, _REDUCTION_SCHEME_COMPUTE_TYPE, np.uint32)
    for place, alignment in enumerate((*alignments, alignments[2])):  # A, B, C and D
        _set(wishes, wish, _MIN_ALIGNMENT_A + place, alignment, np.uint32)
    result = np.zeros(1, bindings.matmul_heuristic_result_dtype)
    found = np.zeros(1, np.int32)
    layouts = (weight_layout, x_layout, out_layout, out_layout)
    try:
        bindings.matmul_algo_get_heuristic(
            *(cublas.handle(), desc, *layouts, wish, 1, result.ctypes.data, found.ctypes.data)
        )
    except bindings.cuBLASLtError:  # "not supported" is an answer too
        found[0] = 0
    bindings.matmul_preference_destroy(wish)
    if found[0] == 0:
        return None
    return _Choice(desc, weight_layout, x_layout, out_layout, result)


def _set(function: Any, handle: int, attribute: int, value: int, kind: Any) -> None:
    buffer = np.array([value], kind)
    function(handle, attribute, buffer.ctypes.data, buffer.nbytes)
