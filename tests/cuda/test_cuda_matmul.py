"""Matrix products and linear layers on the GPU, by cuBLAS and by the tiled kernel."""

from typing import Any

import numpy as np
import pytest

from minitorch import Tensor
from minitorch.cuda import cublas
from minitorch.cuda.matmul import MATMULS
from minitorch.cuda.views import view_of
from minitorch.cuda_ops import CudaOps
from minitorch.kernels import matmul_cuda
from tests.cuda.arrays import DTYPES, Array, assert_same, dtype_of, make, permuted

# ----- matrix products -----

PRODUCTS = [
    ((2, 2), (2, 2)),
    ((5, 7), (7, 3)),
    ((33, 17), (17, 10)),
    ((2, 9, 8), (2, 8, 10)),
    ((2, 3, 4, 5), (3, 5, 6)),
    ((3, 4), (2, 4, 5)),
    ((2, 5, 3), (3, 4)),
    ((1, 6), (6, 1)),
    ((1, 1), (1, 1)),
]


@pytest.mark.parametrize("shapes", PRODUCTS)
@pytest.mark.parametrize("implementation", MATMULS, ids=lambda m: m.name)
def test_matmul(implementation: Any, shapes: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each way to compute a product, with each factor as it is and transposed."""
    if implementation.name == "cuBLAS" and not cublas.is_available():
        pytest.skip("no cuBLAS here: pip install minitorch[cuda] on a machine with a GPU")
    monkeypatch.setattr("minitorch.cuda.matmul.MATMULS", [implementation])
    for turn_a, turn_b in ((False, False), (True, False), (False, True)):
        (a, x), (b, y) = (turned(s, t) for s, t in zip(shapes, (turn_a, turn_b), strict=True))
        assert_same(a @ b, x.astype(np.float64) @ y.astype(np.float64), "float32", 4)


def turned(shape: tuple[int, ...], turn: bool, dtype: str = "float32") -> tuple[Tensor, Array]:
    """A factor of `shape`; `turn`: stored by columns."""
    if not turn:
        return make(shape, dtype)
    dims = len(shape)
    order = [*range(dims - 2), dims - 1, dims - 2]
    return permuted((*shape[:-2], shape[-1], shape[-2]), order, dtype)


def test_larger_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of large matrices, which the shapes above do not reach."""
    monkeypatch.setattr("minitorch.cuda.matmul.MATMULS", MATMULS[-1:])
    monkeypatch.setattr("minitorch.kernels.matmul_cuda.SMALL", matmul_cuda.LARGE)
    (a, x), (b, y) = make((2, 19, 9)), make((9, 21))
    assert_same(a @ b, x.astype(np.float64) @ y.astype(np.float64), "float32", 4)


@pytest.mark.parametrize("dtype", DTYPES)
def test_matmul_dtypes(dtype: str) -> None:
    (a, x), (b, y) = make((3, 6, 20), dtype), make((20, 9), dtype)
    assert_same(a @ b, x.astype(np.float64) @ y.astype(np.float64), dtype, 4)


def test_matmul_of_views_with_gaps() -> None:
    a, x = make((2, 3, 4, 6))
    heads = a.permute(0, 2, 1, 3)  # batch dimensions that cannot be merged
    assert_same(heads @ heads.permute(0, 1, 3, 2), matmul_of_heads(x), "float32", 4)
    part = CudaOps.slice(a, (0, 0, slice(None), slice(1, 6, 2)))
    values = x[0, 0, :, 1:6:2]
    assert_same(part @ part.permute(1, 0), values @ values.T, "float32", 4)


def matmul_of_heads(x: Array) -> Array:
    heads = x.transpose(0, 2, 1, 3)
    product: Array = heads @ heads.swapaxes(-1, -2)
    return product


def test_matmul_checks() -> None:
    a, b = make((2, 3))[0], make((4, 2))[0]
    with pytest.raises(ValueError, match="last size"):
        a @ b
    with pytest.raises(ValueError, match="two dimensions"):
        a @ make((3,))[0]


def test_how_cublas_reads_a_factor() -> None:
    assert cublas.factor((4, 3, 5), (15, 5, 1)) == (cublas.BY_ROWS, 5, 15)
    assert cublas.factor((4, 3, 5), (15, 1, 3)) == (cublas.BY_COLUMNS, 3, 15)
    assert cublas.factor((1, 3, 5), (0, 10, 2)) is None
    assert cublas.factor((1, 3, 5), (0, 0, 1)) is None
    assert cublas.factor((1, 1, 5), (0, 0, 1)) == (cublas.BY_ROWS, 5, 0)
    assert cublas.factor((1, 1, 5), (0, 7, 2)) == (cublas.BY_COLUMNS, 2, 0)
    assert cublas.factor((1, 3, 1), (0, 4, 9)) == (cublas.BY_ROWS, 4, 0)
    with pytest.raises(ValueError, match="highest"):
        cublas.set_float32_matmul_precision("medium")


def test_a_weight_makes_one_product_of_a_batch() -> None:
    a = view_of(make((4, 3, 5))[0]._tensor)
    weight = view_of(make((5, 2))[0]._tensor.broadcast_to((4, 5, 2)))
    found = cublas.plan(a, weight)
    assert found is not None and (found.batches, found.m, found.n, found.k) == (1, 12, 2, 5)
    turned_weight = weight._replace(strides=(0, 1, 5))
    found = cublas.plan(a, turned_weight)
    assert found is not None and found.b.order == cublas.BY_COLUMNS


# ----- linear layers -----


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("with_bias", [True, False])
def test_linear(dtype: str, with_bias: bool) -> None:
    (x, xa), (w, wa), (b, ba) = make((2, 5, 8), dtype), make((8, 6), dtype), make((6,), dtype)
    g, ga = make((2, 5, 6), dtype)
    x64, w64, b64, g64 = (values.astype(np.float64) for values in (xa, wa, ba, ga))
    out = CudaOps.linear_forward(x, w, b if with_bias else None)
    assert_same(out, x64 @ w64 + (b64 if with_bias else 0), dtype, 4)
    dx, dw, db = CudaOps.linear_backward(g, x, w, (True, True, True))
    assert dx is not None and dw is not None and db is not None
    assert_same(dx, g64 @ w64.T, dtype, 4)
    assert_same(dw, x64.reshape(10, 8).T @ g64.reshape(10, 6), dtype, 8)
    assert_same(db, g64.sum((0, 1)), dtype, 4)
    assert CudaOps.linear_backward(g, x, w, (False, False, False)) == (None, None, None)


def test_linear_checks() -> None:
    x, w, b = make((2, 8))[0], make((7, 6))[0], make((6,))[0]
    with pytest.raises(ValueError, match=r"\(2, 8\) and \(7, 6\)"):
        CudaOps.linear_forward(x, w, b)
    with pytest.raises(ValueError, match="bias"):
        CudaOps.linear_forward(make((2, 7))[0], w, make((5,))[0])


@pytest.mark.parametrize(
    "left, right", [((2, 2), (2, 2)), ((33, 33), (33, 33)), ((2, 45, 33), (2, 33, 40))]
)
def test_course_products(left: tuple[int, ...], right: tuple[int, ...]) -> None:
    (a, x), (b, y) = make(left), make(right)
    assert_same(a @ b, x @ y, "float32", 10)


# ----- on the hardware: sizes that the simulator is too slow for -----


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
def test_large_products(dtype: str) -> None:
    (a, x_values), (b, y_values) = make((130, 600), dtype), make((600, 515), dtype)
    expected = x_values.astype(np.float64) @ y_values.astype(np.float64)
    for implementation in MATMULS:
        out = CudaOps.empty((130, 515), dtype_of(dtype))
        if implementation.run(out, a._tensor, b._tensor):
            assert_same(a._new(out), expected, dtype, 40)


@pytest.mark.gpu
@pytest.mark.parametrize("implementation", MATMULS, ids=lambda m: m.name)
def test_more_batches_than_a_grid_dimension(implementation: Any) -> None:
    (a, x), (b, y) = make((70000, 2, 3)), make((70000, 3, 2))
    out = CudaOps.empty((70000, 2, 2), a.dtype)
    if implementation.run(out, a._tensor, b._tensor):
        assert_same(a._new(out), x @ y, "float32", 10)


@pytest.mark.gpu
def test_a_second_product_is_bit_equal() -> None:
    (x, _), (w, _), (b, _) = make((300, 700)), make((700, 900)), make((900,))
    first = (x @ w).to_numpy(), CudaOps.linear_forward(x, w, b).to_numpy()
    for _ in range(20):
        np.testing.assert_array_equal((x @ w).to_numpy(), first[0])
        np.testing.assert_array_equal(CudaOps.linear_forward(x, w, b).to_numpy(), first[1])
