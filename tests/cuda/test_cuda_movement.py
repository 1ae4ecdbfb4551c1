"""Movement of elements by `CudaOps`, against numpy: copies, transposed and cast, and pieces."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minitorch.cuda.device_array import DeviceArray
from minitorch.cuda.views import contiguous_data, view_of
from minitorch.cuda_ops import CudaOps
from minitorch.kernels import copy_cuda, elementwise_cuda
from tests.cuda.arrays import (
    DTYPES,
    EXAMPLES,
    assert_same,
    backend,
    dtype_of,
    layouts,
    make,
    numbers,
    permuted,
)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape, order", [((9, 7), [1, 0]), ((2, 5, 6), [2, 0, 1])])
def test_contiguous_of_a_transposed_tensor(
    dtype: str, shape: tuple[int, ...], order: list[int]
) -> None:
    x, array = permuted(shape, order, dtype)
    copy = backend.id_map(x)
    assert copy._tensor.is_contiguous()
    np.testing.assert_array_equal(copy.to_numpy(), array)


@settings(max_examples=EXAMPLES, deadline=None)
@given(layout=layouts(9))
def test_contiguous(layout: tuple[tuple[int, ...], list[int]]) -> None:
    x, array = permuted(*layout, "float32")
    np.testing.assert_array_equal(x.contiguous().to_numpy(), array)


@pytest.mark.parametrize("target", DTYPES)
@pytest.mark.parametrize("source", DTYPES)
def test_cast(source: str, target: str) -> None:
    x, array = make((5, 9), source)
    out = CudaOps.cast(x, dtype_of(target))
    assert out._tensor._storage is not x._tensor._storage
    expected = array.astype(np.float32 if source != "float64" else np.float64)
    np.testing.assert_array_equal(
        out.to_numpy().astype(np.float64), expected.astype(dtype_of(target)).astype(np.float64)
    )


def test_pieces() -> None:
    (a, x), (b, y) = make((2, 3, 4)), make((2, 5, 4))
    joined = CudaOps.concatenate([a, b], 1)
    assert_same(joined, np.concatenate([x, y], 1), "float32")
    key = (slice(None), slice(1, 6, 2))
    piece = CudaOps.slice(joined, key)
    assert_same(piece, joined.to_numpy()[key], "float32")
    back = CudaOps.slice_backward(piece, key, joined.shape)
    expected = np.zeros(joined.shape)
    expected[key] = piece.to_numpy()
    assert_same(back, expected, "float32")
    with pytest.raises(ValueError, match="agree"):
        CudaOps.concatenate([a, b], 2)
    CudaOps.copy_into(CudaOps.slice(joined, (0, slice(0, 3))), CudaOps.slice(a, 1))
    assert_same(CudaOps.slice(joined, (0, slice(0, 3))), x[1], "float32")


@pytest.mark.parametrize("dtype", DTYPES)
def test_masked_fill(dtype: str) -> None:
    x, array = make((3, 4, 8), dtype)
    mask = numbers.random((4, 8)) < 0.5
    assert_same(
        CudaOps.masked_fill(x, mask, -np.inf), np.where(mask, -np.inf, array.astype(float)), dtype
    )
    column = numbers.random((4, 1)) < 0.5
    assert_same(
        CudaOps.masked_fill(x, column, 0.0), np.where(column, 0, array.astype(float)), dtype
    )


def transposition(
    shape: tuple[int, ...], out: tuple[int, ...], x: tuple[int, ...], address: int = 0
) -> copy_cuda.Transposition | None:
    """The plan for these strides of two float32 tensors."""
    return copy_cuda.make_plan(
        elementwise_cuda.View(None, 256, "float32", shape, out),
        elementwise_cuda.View(None, 256 + address, "float32", shape, x),
    )


def test_a_transposition_is_recognised() -> None:
    found = transposition((64, 5, 48), (240, 48, 1), (1, 64, 320))
    assert found is not None and (found.rows, found.columns, found.rest) == (64, 48, (5,))
    assert transposition((64, 48), (48, 1), (48, 1)) is None


@pytest.mark.parametrize(
    "shape, out_row, x_column, address, lanes",
    [
        ((64, 48), 48, 64, 0, 4),
        ((64, 48), 48, 64, 8, 2),
        ((64, 48), 48, 64, 4, 1),
        ((64, 48), 50, 64, 0, 2),
        ((64, 48), 48, 65, 0, 1),
        ((62, 48), 48, 64, 0, 2),
        ((64, 47), 48, 64, 0, 1),
    ],
)
def test_vectors_of_a_transposition(
    shape: tuple[int, ...], out_row: int, x_column: int, address: int, lanes: int
) -> None:
    found = transposition(shape, (out_row, 1), (1, x_column), address)
    assert found is not None and found.lanes == lanes


@settings(max_examples=EXAMPLES, deadline=None)
@given(
    dtype=st.sampled_from(DTYPES),
    unit=st.sampled_from([1, 2, 4, 8]),
    sizes=st.tuples(st.integers(1, 3), *[st.integers(1, 5)] * 2),
    around=st.tuples(*[st.integers(0, 2)] * 4),
)
def test_transposed_copy_between_views(
    dtype: str, unit: int, sizes: tuple[int, ...], around: tuple[int, ...]
) -> None:
    """In vectors of every size: sizes, strides and addresses are multiples of `unit`."""
    count, rows, columns = sizes[0], *(max(4, unit * n) for n in sizes[1:])
    before, after, out_before, out_after = (unit * n for n in around)
    x, array = make((count, columns, before + rows + after), dtype)
    out, _ = make((count, rows, out_before + columns + out_after), dtype)
    kept = out.to_numpy().copy()
    inside, target = slice(before, before + rows), slice(out_before, out_before + columns)
    kept[:, :, target] = array[:, :, inside].transpose(0, 2, 1)
    source = CudaOps.slice(x, (slice(None), slice(None), inside)).permute(0, 2, 1)
    CudaOps.copy_into(CudaOps.slice(out, (slice(None), slice(None), target)), source)
    np.testing.assert_array_equal(out.to_numpy(), kept)


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_copies_of_a_mask(order: tuple[int, int]) -> None:
    array = np.random.default_rng(3).random((40, 24)) > 0.5
    mask = CudaOps.attention_mask(array).permute(*order)
    copy = contiguous_data(DeviceArray.empty(mask.size, mask.dtype), mask.shape)
    copy_cuda.copy_into(view_of(copy), view_of(mask))
    np.testing.assert_array_equal(copy.to_numpy(), array.transpose(order))
