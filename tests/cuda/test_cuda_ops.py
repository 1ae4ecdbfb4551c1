"""`CudaOps` against numpy: map, zip, reduce and movement, in four precisions."""

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import minitorch
from minitorch import Tensor, operators
from minitorch.cuda_ops import (
    CudaOps,
    device_jit,
    mm_practice,
    sum_practice,
    tensor_map,
    tensor_reduce,
    tensor_zip,
)
from minitorch.kernels import elementwise_cuda, fold_cuda
from minitorch.kernels.gpu import runtime
from minitorch.kernels.gpu.scalar import with_constants_of_type
from minitorch.tensor_data import TensorData
from tests.cuda.arrays import (
    DTYPES,
    EXAMPLES,
    Array,
    assert_same,
    backend,
    dtype_of,
    layouts,
    make,
    numbers,
    permuted,
)

# ----- map and zip -----

MAPS: list[tuple[Callable[[float], float], Callable[[Array], Array]]] = [
    (operators.neg, lambda x: -x),
    (operators.sigmoid, lambda x: 1 / (1 + np.exp(-x))),
    (operators.relu, lambda x: np.maximum(x, 0)),
    (operators.exp, np.exp),
    (operators.tanh, np.tanh),
    (operators.id, lambda x: x),
]
APPROXIMATE = [MAPS[1], MAPS[3], (operators.inv, lambda x: 1 / x)]


@pytest.mark.parametrize("dtype", DTYPES)
@settings(max_examples=EXAMPLES, deadline=None)
@given(layout=layouts(), number=st.integers(0, len(MAPS) - 1))
def test_map(dtype: str, layout: tuple[tuple[int, ...], list[int]], number: int) -> None:
    x, array = permuted(*layout, dtype)
    fn, expected = MAPS[number]
    assert_same(CudaOps.map(fn)(x), expected(array.astype(np.float64)), dtype)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("number", range(len(APPROXIMATE)))
def test_all_numbers_of_sixteen_bits(number: int, dtype: str) -> None:
    """Approximate exponentials and divisions are right to the last place of what is stored."""
    bits = np.arange(0, 1 << 16, 509 if runtime.SIMULATED else 1).astype(np.uint16)
    array: Array = bits.view(dtype_of(dtype))
    with np.errstate(invalid="ignore"):  # signalling NaNs
        array = array[np.isfinite(array.astype(np.float32))]
    fn, expected = APPROXIMATE[number]
    with np.errstate(over="ignore", divide="ignore"):
        wanted = expected(array.astype(np.float64)).astype(dtype_of(dtype))
    result = CudaOps.map(fn)(minitorch.tensor_from_numpy(array, backend=backend)).to_numpy()
    unit, least = (2**-10, 2**-24) if dtype == "float16" else (2**-7, 2**-133)
    np.testing.assert_allclose(result.astype(np.float64), wanted.astype(np.float64), unit, least)


@pytest.mark.parametrize("dtype", DTYPES)
@settings(max_examples=EXAMPLES, deadline=None)
@given(layout=layouts(), data=st.data())
def test_zip_broadcasts(
    dtype: str, layout: tuple[tuple[int, ...], list[int]], data: st.DataObject
) -> None:
    a, a_array = permuted(*layout, dtype)
    kept = data.draw(st.integers(0, a.dims))  # of the last dimensions, some of size 1
    shape = tuple(data.draw(st.sampled_from([1, n])) for n in a.shape[a.dims - kept :]) or (1,)
    b, b_array = make(shape, dtype)
    a64, b64 = a_array.astype(np.float64), b_array.astype(np.float64)
    assert_same(backend.add_zip(a, b), a64 + b64, dtype)
    assert_same(backend.mul_zip(b, a), a64 * b64, dtype)


@pytest.mark.parametrize("size", [1, 7, 8, 31, 64, 257])
@pytest.mark.parametrize("dtype", DTYPES)
def test_long_rows_with_an_end(dtype: str, size: int) -> None:
    """The end of a row that is shorter than a vector."""
    (a, x), (b, y), (one, z) = make((size,), dtype), make((size,), dtype), make((1,), dtype)
    x, y, z = (values.astype(np.float64) for values in (x, y, z))
    assert_same(backend.add_zip(a, b), x + y, dtype)
    assert_same(backend.mul_zip(a, one), x * z, dtype)
    assert_same(CudaOps.map(operators.tanh)(a), np.tanh(x), dtype)


def test_views_that_are_not_aligned() -> None:
    a, x = make((65,))
    for start in range(5):
        view = CudaOps.slice(a, slice(start, start + 60))
        assert_same(CudaOps.map(operators.neg)(view), -x[start : start + 60], "float32")


def test_dtypes_promote() -> None:
    (a, x), (b, y), (c, z) = make((5, 8)), make((8,), "bfloat16"), make((5, 8), "float16")
    x, y, z = (values.astype(np.float64) for values in (x, y, z))
    assert_same(backend.add_zip(a, b), x + y, "float32")
    assert_same(backend.mul_zip(b, c), y * z, "float32", 100)
    assert_same(backend.mul_zip(CudaOps.cast(a, np.dtype("float64")), b), x * y, "float64")


def test_infinity_and_nan() -> None:
    x = minitorch.tensor([-np.inf, np.inf, np.nan, 0.0, 1000.0, -1000.0], backend=backend)
    values = x.to_numpy()
    with np.errstate(all="ignore"):
        np.testing.assert_array_equal(CudaOps.map(operators.exp)(x).to_numpy(), np.exp(values))
        np.testing.assert_array_equal(CudaOps.map(operators.inv)(x).to_numpy(), 1 / values)
    np.testing.assert_array_equal(CudaOps.map(operators.relu)(x).to_numpy(), np.maximum(values, 0))
    assert np.isnan(backend.max_reduce(x, 0).item())


def test_map_into_a_larger_output() -> None:
    x, array = make((3, 1))
    out, _ = make((2, 3, 4))
    assert CudaOps.map(operators.id)(x, out) is out
    assert_same(out, np.broadcast_to(array, (2, 3, 4)), "float32")
    CudaOps.cmap(operators.exp)(x, out)
    assert_same(out, np.broadcast_to(np.exp(array), (2, 3, 4)), "float32")


def test_empty_tensors() -> None:
    x, _ = make((0, 3))
    assert backend.add_zip(x, x).shape == (0, 3)
    assert_same(x.sum(0), np.zeros((1, 3)), "float32")
    assert x.sum(1).shape == (0, 1)
    assert_same(make((2, 0))[0] @ make((0, 3))[0], np.zeros((2, 3)), "float32")


def test_any_function_of_the_user() -> None:
    offset = 3

    def shifted(x: float) -> float:  # has a closure: taken as it is
        return 2 * x + offset

    x, array = make((9,))
    for fn in (shifted, device_jit(shifted), lambda x: 2 * x + 3):
        assert_same(CudaOps.map(fn)(x), 2 * array + 3, "float32")


def polynomial(x: float) -> float:
    """Numbers of all kinds."""
    scale: float = 0.1
    if x > 1:
        return scale * x**2 + operators.EPS
    return -1.5 * x + 1 / 3


def test_numbers_in_a_function_take_the_working_type() -> None:
    for dtype in (np.float32, np.float64):
        fn = with_constants_of_type(polynomial, dtype)
        for x in (0.5, 2.0):
            result = fn(dtype(x))
            assert type(result) is dtype
            assert result == pytest.approx(polynomial(x), rel=1e-6)
    assert with_constants_of_type(len, np.float32) is None


def test_minitorchs_kernels() -> None:
    a, x = make((3, 4))
    b, y = make((4,))
    out, _ = make((3, 4))
    tensor_map(device_jit(operators.exp))(*out.tuple(), *a.tuple())
    assert_same(out, np.exp(x), "float32")
    tensor_zip(operators.mul)(*out.tuple(), *a.tuple(), *b.tuple())
    assert_same(out, x * y, "float32")
    row, _ = make((1, 4))
    tensor_reduce(operators.add)(*row.tuple(), *a.tuple(), 0, 1.0)
    assert_same(row, x.sum(0, keepdims=True) + 1, "float32")


def test_merge_dimensions() -> None:
    merge = elementwise_cuda.merge_dimensions
    assert merge((2, 3, 4), (12, 4, 1)) == ((24,), [(1,)])
    assert merge((2, 3, 4), (12, 4, 1), (0, 0, 1)) == ((6, 4), [(4, 1), (0, 1)])
    assert merge((2, 1, 4), (4, 99, 1), (4, 0, 1)) == ((8,), [(1,), (1,)])
    assert merge((3, 4), (1, 3)) == ((3, 4), [(1, 3)])
    assert merge((), ()) == ((1,), [(1,)])


# ----- reduce -----

FOLDS = {"sum": (operators.add, 0.0), "max": (operators.max, -np.inf)}


@pytest.mark.parametrize("dtype", DTYPES)
@settings(max_examples=EXAMPLES, deadline=None)
@given(layout=layouts(9), dim=st.integers(0, 3), name=st.sampled_from(sorted(FOLDS)))
def test_reduce(dtype: str, layout: tuple[tuple[int, ...], list[int]], dim: int, name: str) -> None:
    x, array = permuted(*layout, dtype)
    dim %= x.dims
    expected = getattr(array.astype(np.float64), name)(dim, keepdims=True)
    assert_same(CudaOps.reduce(*FOLDS[name])(x, dim), expected, dtype, 4)


@pytest.mark.parametrize(
    "shape, dim",
    [
        *(((2200,), 0), ((3, 71), 1), ((3, 72), 1), ((600, 3), 0), ((300, 8), 0), ((2, 40, 4), 1)),
        *(((3, 33), 1), ((2, 65), 1), ((5, 3), 0), ((2, 516), 1), ((41, 2), 0)),
    ],
)
def test_reduce_long_folds(shape: tuple[int, ...], dim: int) -> None:
    """In chunks, and by trees of every height."""
    x, array = make(shape)
    expected = array.astype(np.float64).sum(dim, keepdims=True) + 2.5
    assert_same(CudaOps.reduce(operators.add, 2.5)(x, dim), expected, "float32", 10)
    again = CudaOps.reduce(operators.add, 2.5)(x, dim).to_numpy()
    np.testing.assert_array_equal(CudaOps.reduce(operators.add, 2.5)(x, dim).to_numpy(), again)


def test_fold_plans_cover_each_element_once() -> None:
    for shape, strides in (((5000,), (1,)), ((7, 300), (300, 1)), ((300, 8), (1, 300))):
        for dim, size in enumerate(shape):
            view = elementwise_cuda.View(None, 0, "float32", shape, strides)
            plan = fold_cuda.make_plan(view, dim)
            assert plan.length * (plan.lanes if plan.along_row else 1) == size
            assert plan.outputs * size == np.prod(shape)
            assert (plan.chunks - 1) * plan.per_chunk < plan.length <= plan.chunks * plan.per_chunk


# ----- the course's cases -----


@pytest.mark.parametrize("size", [16, 48, 64, 500])
def test_sum_practice(size: int) -> None:
    values = [random.random() for _ in range(size)]
    x = minitorch.tensor(values, backend=backend)
    sums = sum_practice(x)._storage
    for block in range(-(-size // 32)):
        assert float(sums[block]) == pytest.approx(sum(values[32 * block : 32 * block + 32]))
    assert x.sum(0).item() == pytest.approx(sum(values))


@pytest.mark.parametrize("size", [1, 2, 5] if runtime.SIMULATED else [1, 2, 16, 31, 32])
def test_mm_practice(size: int) -> None:
    (a, x), (b, y) = make((size, size)), make((size, size))
    np.testing.assert_allclose(mm_practice(a, b).to_numpy(), x @ y, rtol=1e-4, atol=1e-5)


def test_practice_kernels_have_the_courses_names() -> None:
    assert minitorch.sum_practice is sum_practice and minitorch.mm_practice is mm_practice
    x = minitorch.tensor([[random.random() for _ in range(2)] for _ in range(2)], backend=backend)
    product, expected = minitorch.mm_practice(x, x), x @ x
    for i, j in ((0, 0), (0, 1), (1, 0), (1, 1)):  # the course reads storages
        assert product._storage[2 * i + j] == pytest.approx(expected[i, j])


def test_practice_checks() -> None:
    a = make((33, 33))[0]
    with pytest.raises(ValueError, match="n <= 32"):
        mm_practice(a, a)
    with pytest.raises(ValueError, match="one dimension"):
        sum_practice(a)


def test_sum_of_rows() -> None:
    x, array = make((16, 32))
    assert_same(x.sum(1), array.sum(1, keepdims=True), "float32", 10)


UNARY: list[Callable[[Tensor], Tensor]] = [
    lambda a: -a,
    lambda a: a * a * a + 1.0,
    lambda a: (a * a + 1.5).log(),
    lambda a: a.sigmoid() * 2.0,
    lambda a: (a + 10.0).relu(),
    lambda a: a.exp(),
    lambda a: (a * a + 1.0) ** -1,
]
BINARY: list[Callable[[Tensor, Tensor], Tensor]] = [
    lambda a, b: a + b,
    lambda a, b: a - b,
    lambda a, b: a * b,
    lambda a, b: a / (b * b + 1.0),
]


@pytest.mark.parametrize("number", range(len(UNARY)))
def test_gradients_of_one_tensor(number: int) -> None:
    a = minitorch.tensor_from_numpy(numbers.standard_normal((2, 3)), backend=backend)
    minitorch.grad_check(UNARY[number], a)


@pytest.mark.parametrize("number", range(len(BINARY)))
def test_gradients_of_two_tensors_that_broadcast(number: int) -> None:
    a = minitorch.tensor_from_numpy(numbers.standard_normal((2, 3)), backend=backend)
    b = minitorch.tensor_from_numpy(numbers.standard_normal((3,)), backend=backend)
    minitorch.grad_check(BINARY[number], a, b)


def test_gradients_of_movement_sums_and_products() -> None:
    a = minitorch.tensor_from_numpy(numbers.standard_normal((2, 3)), backend=backend)
    minitorch.grad_check(lambda x: x.permute(1, 0) * 2.0, a)
    minitorch.grad_check(lambda x: x.sum(0) * x.sum(1).sum(), a)
    minitorch.grad_check(lambda x: x @ x.permute(1, 0), a)
    minitorch.grad_check(lambda x: x.permute(1, 0).contiguous().view(6), a)


# ----- Python numbers beside 16 bits -----


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_a_number_is_not_rounded_to_sixteen_bits(dtype: str) -> None:
    """The result is rounded once, as in PyTorch."""
    expressions: list[Callable[[Any], Any]] = [
        lambda x: x / 1e-6,
        lambda x: x * 70000.0,
        lambda x: x + 1e-5,
        lambda x: x - 0.1,
        lambda x: 0.1 - x,
        lambda x: 0.001 * x,
        lambda x: x**1.1,
        lambda x: x / 3,
        lambda x: x + 1e6,
    ]
    array = np.array([[1e-3, 2e-5, 6e-3], [0.25, 1e-2, 3e-4]]).astype(dtype_of(dtype))
    for number, expression in enumerate(expressions):
        x = minitorch.tensor_from_numpy(array, backend=backend)
        y = expression(x)
        with np.errstate(over="ignore"):
            wanted = expression(array.astype(np.float32)).astype(dtype_of(dtype))
        assert y.dtype == dtype_of(dtype)
        np.testing.assert_array_equal(y.to_numpy(), wanted, err_msg=f"number {number}")


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_nor_is_it_in_the_gradient(dtype: str) -> None:
    given = np.array([1e-4, 3e-4, 2e-5]).astype(dtype_of(dtype))
    cases: list[tuple[Callable[[Tensor], Tensor], float]] = [
        (lambda x: x / 1e-6, 1e6),
        (lambda x: x * 70000.0, 70000.0),
        (lambda x: 0.1 - x, -1.0),
        (lambda x: x**1.0001, 1.0001),
    ]
    for expression, factor in cases:
        ones = np.ones(3, dtype_of(dtype))
        x = minitorch.tensor_from_numpy(ones, backend=backend, requires_grad=True)
        expression(x).backward(minitorch.tensor_from_numpy(given, backend=backend))
        wanted = (given.astype(np.float32) * np.float32(factor)).astype(dtype_of(dtype))
        assert x.grad is not None and x.grad.dtype == dtype_of(dtype)
        np.testing.assert_array_equal(x.grad.to_numpy(), wanted)


def test_comparisons_are_in_sixteen_bits() -> None:
    """As in PyTorch: 0.1 is equal to the number that it became."""
    x = minitorch.tensor_from_numpy(np.full(3, 0.1, np.float16), backend=backend)
    assert (x == 0.1).to_numpy().tolist() == [1, 1, 1]
    assert (x < 1e6).to_numpy().tolist() == [1, 1, 1]
    assert (x / 0.0).to_numpy().tolist() == [np.inf] * 3
    assert (x == 0.1).dtype == (x / 0.0).dtype == np.float16


# ----- on the hardware: sizes and layouts that the simulator is too slow for -----


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
def test_large_shapes(dtype: str) -> None:
    for shape, order in (((300, 4097), [1, 0]), ((8, 129, 6, 64), [0, 2, 1, 3])):
        x, array = permuted(shape, order, dtype)
        np.testing.assert_array_equal(x.contiguous().to_numpy(), array)
        for dim in range(x.dims):
            expected = array.astype(np.float64).sum(dim, keepdims=True)
            assert_same(CudaOps.reduce(operators.add)(x, dim), expected, dtype, 40)


@pytest.mark.gpu
def test_more_than_two_to_the_31_elements() -> None:
    size = (1 << 31) + 5
    x = a_tensor_of(CudaOps.full((size,), 1.0, np.dtype("float16")))
    y = backend.add_zip(x, x)
    assert float(CudaOps.slice(y, slice(size - 3, size)).to_numpy().min()) == 2.0
    column = a_tensor_of(CudaOps.full((size // 8, 1), 2.0, np.dtype("float16")))
    spread = backend.mul_zip(column, a_tensor_of(CudaOps.full((1, 9), 3.0, np.dtype("float16"))))
    assert CudaOps.reduce(operators.max, 0.0)(spread, 0).to_numpy().min() == 6.0
    assert float(CudaOps.slice(spread, slice(size // 8 - 1, size // 8)).to_numpy().min()) == 6.0


def a_tensor_of(data: TensorData) -> Tensor:
    return Tensor(data, backend=backend)
