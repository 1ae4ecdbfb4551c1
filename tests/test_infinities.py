"""Infinity, NaN, numbers at the ends of their range: every backend agrees, PyTorch does too."""

import math
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import minitorch
from minitorch import FastOps, Scalar, SimpleOps, Tensor, TensorBackend, operators
from minitorch.ieee import ieee

SIMPLE, FAST = TensorBackend(SimpleOps), TensorBackend(FastOps)
MAPS = sorted(name for name in vars(SIMPLE) if name.endswith("_map"))
ZIPS = sorted(name for name in vars(SIMPLE) if name.endswith("_zip"))
REDUCTIONS = sorted(name for name in vars(SIMPLE) if name.endswith("_reduce"))
inf, nan = math.inf, math.nan

# Both signs of all, and the neighbours of where exp and squares leave the range.
ENDS = {
    np.float64: [0.0, 5e-324, 1e-200, 1e-6, 0.5, 1.0, 3.0, 709.0, 710.0, 1e200, 1.7e308, inf, nan],
    np.float32: [0.0, 1e-45, 1e-6, 0.5, 1.0, 3.0, 88.0, 89.0, 3e38, inf, nan],
}


def values(dtype: Any) -> st.SearchStrategy[Any]:
    """Numbers of a dtype, often those at the ends."""
    width: Any = np.dtype(dtype).itemsize * 8
    ends = [x for end in ENDS[dtype] for x in (end, -end)]
    return st.sampled_from(ends) | st.floats(width=width)


def both(name: str, *arrays: Any, **options: Any) -> list[npt.NDArray[Any]]:
    """An operation on both backends; warnings are errors in these tests."""
    results = []
    for backend in (SIMPLE, FAST):
        made = [minitorch.tensor(array, backend, False) for array in arrays]
        results.append(getattr(backend, name)(*made, **options).to_numpy())
    return results


def check_same(a: Any, b: Any) -> None:
    """Equal to a few units in the last place; NaN, infinities and the signs of zeros too."""
    assert a.dtype == b.dtype
    rtol = 1e-14 if a.dtype == np.float64 else 1e-6
    np.testing.assert_allclose(a, b, rtol=rtol, atol=0 if a.dtype == np.float64 else 1e-44)
    zeros = (a == 0) & (b == 0)
    np.testing.assert_array_equal(np.signbit(a[zeros]), np.signbit(b[zeros]))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("name", MAPS)
@settings(max_examples=15)
@given(data=st.data())
def test_maps(name: str, dtype: Any, data: st.DataObject) -> None:
    x = np.array(data.draw(st.lists(values(dtype), max_size=9)), dtype)
    check_same(*both(name, x))


@pytest.mark.parametrize("name", ZIPS)
@settings(max_examples=25)
@given(data=st.data())
def test_zips(name: str, data: st.DataObject) -> None:
    pairs = data.draw(st.lists(st.tuples(values(np.float64), values(np.float64)), max_size=9))
    x, y = np.array(pairs, np.float64).reshape(-1, 2).T
    check_same(*both(name, x, y))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("name", REDUCTIONS)
@settings(max_examples=15)
@given(data=st.data())
def test_reductions(name: str, dtype: Any, data: st.DataObject) -> None:
    x = np.array([data.draw(st.lists(values(dtype), max_size=9))], dtype)
    check_same(*both(name, x, dim=1))


def test_every_pair_of_ends() -> None:
    ends = [x for end in ENDS[np.float64] for x in (end, -end)]
    x, y = np.array(ends)[:, None], np.array(ends)
    for name in ZIPS:
        check_same(*both(name, x, y))
    check_same(*both("matrix_multiply", x, y[None]))


@pytest.mark.parametrize("backend", [SIMPLE, FAST])
def test_known_values(backend: TensorBackend) -> None:
    x = minitorch.tensor([1000.0, 0.0, -1.0], backend)
    assert x.exp().to_numpy().tolist()[:2] == [inf, 1.0]
    assert (1.0 / x).to_numpy().tolist() == [0.001, inf, -1.0]
    assert np.isnan((x - 5.0).log().to_numpy()).tolist() == [False, True, True]
    assert np.isnan((x**0.5).to_numpy()).tolist() == [False, False, True]
    assert (x**-1.0).to_numpy().tolist() == [0.001, inf, -1.0]
    assert (x / 0.0).to_numpy()[0] == inf
    (1.0 / x).sum().backward()
    assert x.grad is not None and x.grad.to_numpy().tolist() == [-1e-6, -inf, -1.0]


@pytest.mark.parametrize("backend", [SIMPLE, FAST])
def test_numbers_too_large_for_float32_are_infinite(backend: TensorBackend) -> None:
    x = minitorch.tensor(np.full((1, 1), 2.0, np.float32), backend)
    x_large = minitorch.tensor([[3e38]], backend, dtype=np.float32)
    x_double = minitorch.tensor([1e300], backend)
    assert (x * 1e300).item() == (x + 1e300).item() == (1e300 / x).item() == inf
    assert (x / 1e300).item() == 0.0 and (x < 1e300).item() == 1.0
    assert x_double.to(np.float32).item() == inf
    assert (x_large @ x_large).item() == (x_large + x_large).item() == inf
    x[0, 0] = 1e300
    assert x.item() == inf


def test_functions_of_a_user() -> None:
    def root(x: float) -> float:
        return math.sqrt(x) + math.log(x) / x

    def power(x: float) -> Any:
        return x**0.5  # complex in Python

    def picky(x: float) -> float:
        if x < 0:
            raise ValueError("x must not be negative")
        return x

    x = minitorch.tensor([4.0, 0.0, -4.0], SIMPLE, False)
    got = SimpleOps.map(root)(x).to_numpy()
    assert got[0] == pytest.approx(2 + math.log(4) / 4) and got[1] == -inf and np.isnan(got[2])
    assert np.isnan(SimpleOps.map(power)(x).to_numpy()).tolist() == [False, False, True]
    assert SimpleOps.map(math.exp)(x * 1e3).to_numpy().tolist() == [inf, 1.0, 0.0]
    with pytest.raises(ValueError, match="x must not be negative"):
        SimpleOps.map(picky)(x)
    assert ieee(root).__name__ == "root" and ieee(operators.inv)(-0.0) == -inf


def test_scalars() -> None:
    zero = Scalar(0.0)
    quotient = 1.0 / zero
    assert quotient.data == inf and Scalar(1e4).exp().data == inf
    assert math.isnan(Scalar(-1.0).log().data)
    quotient.backward()
    assert zero.derivative == -inf


def test_whole_numbers_that_are_none() -> None:
    for wrong in (nan, inf, -inf, 1e300):
        with pytest.raises(ValueError, match="must hold whole numbers"):
            minitorch.one_hot(minitorch.tensor([wrong], FAST), 3)


# ----- along a dimension -----

# In PyTorch a row that is -inf throughout has softmax NaN, here 0: nothing to attend to.
ROWS = [
    [inf, 0.0, -1.0],
    [inf, inf, 2.0],
    [inf, -inf, 0.0],
    [nan, 0.0, 1.0],
    [inf, nan, 0.0],
    [-inf, 0.0, 3.0],
    [nan, -inf, -inf],
    [1e4, -1e4, 0.0],
]


@pytest.mark.parametrize("backend", [SIMPLE, FAST])
@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("name", ["logsumexp", "softmax", "logsoftmax", "softmax_loss"])
def test_rows_beside_pytorch(name: str, dim: int, backend: TensorBackend) -> None:
    torch = pytest.importorskip("torch")
    array = np.array(ROWS)
    x = minitorch.tensor(array if dim == 1 else array.T, backend)
    y = torch.tensor(array, requires_grad=True)
    targets = [0, 1, 2, 0, 1, 2, 0, 1]
    out: Tensor
    if name == "softmax_loss":
        rows = x if dim == 1 else x.permute(1, 0)
        out = minitorch.softmax_loss(rows, minitorch.tensor(targets, backend, False)).view(8, 1)
        expected = torch.nn.functional.cross_entropy(y, torch.tensor(targets), reduction="none")
        expected = expected[:, None]
    else:
        theirs = {"logsoftmax": "log_softmax"}.get(name, name)
        options = {"keepdim": True} if name == "logsumexp" else {}
        out = getattr(minitorch, name)(x, dim)
        out = out if dim == 1 else out.permute(1, 0)
        expected = getattr(torch, theirs)(y, 1, **options)
    np.testing.assert_allclose(out.to_numpy(), expected.detach().numpy(), rtol=1e-12)
    weights = np.random.default_rng(0).normal(size=out.shape)
    out.backward(minitorch.tensor(weights, backend, False))
    expected.backward(torch.tensor(weights))
    assert x.grad is not None
    ours = x.grad.to_numpy() if dim == 1 else x.grad.to_numpy().T
    np.testing.assert_allclose(ours, y.grad.numpy(), rtol=1e-12, atol=1e-300)


@pytest.mark.parametrize("backend", [SIMPLE, FAST])
def test_a_row_of_minus_infinity(backend: TensorBackend) -> None:
    x = minitorch.tensor(np.full((1, 4), -inf), backend)
    total, weights = minitorch.logsumexp(x, 1), minitorch.softmax(x, 1)
    assert total.item() == -inf and not weights.to_numpy().any()
    (total.sum() + weights.sum()).backward()
    assert x.grad is not None and not x.grad.to_numpy().any()
    assert np.isnan(minitorch.logsoftmax(x, 1).to_numpy()).all()


@pytest.mark.parametrize("backend", [SIMPLE, FAST])
def test_the_loss_of_a_row_of_minus_infinity(backend: TensorBackend) -> None:
    """NaN as in PyTorch, its gradient as well; the row beside it is as ever."""
    x = minitorch.tensor([[-inf, -inf], [0.0, 0.0]], backend)
    loss = minitorch.softmax_loss(x, minitorch.tensor([0, 1], backend, False))
    np.testing.assert_allclose(loss.to_numpy(), [nan, math.log(2)])
    loss.sum().backward()
    assert x.grad is not None
    np.testing.assert_allclose(x.grad.to_numpy(), [[nan, nan], [0.5, -0.5]])


@pytest.mark.parametrize("backend", [SIMPLE, FAST])
@pytest.mark.parametrize("large", [0.0, 1e3, -1e5, 1e6, 1e8, -1e8, 3e38])
@pytest.mark.parametrize("dim", [0, 1])
def test_large_logits_keep_the_logarithm(dim: int, large: float, backend: TensorBackend) -> None:
    """A float32 of 1e8 has steps of 8: no room for the logarithm of a sum of 40 numbers."""
    rng = np.random.default_rng(0)
    x = (rng.normal(size=(6, 40)) + large).astype(np.float32)
    x[:, 7] -= np.float32(1e-7 * abs(large) + 30)  # a class far below the others
    exact, target, every = x.astype(np.float64), rng.integers(0, 40, 6), np.arange(6)
    target[0] = 7
    below = exact - exact.max(1, keepdims=True)
    log_sum = np.log(np.exp(below).sum(1, keepdims=True))
    share, one_hot = np.exp(below - log_sum), np.eye(40)[target]
    weights = rng.normal(size=(6, 40)).astype(np.float32)

    def check(name: str, grad: Any, values: Any, gradient: Any) -> None:
        def turned(a: npt.NDArray[Any]) -> npt.NDArray[Any]:
            return a.T if dim == 0 and name != "softmax_loss" else a

        logits = minitorch.tensor(np.ascontiguousarray(turned(x)), backend)
        other: Any = dim
        if name == "softmax_loss":
            other = minitorch.tensor(target, backend, False)
        out = getattr(minitorch, name)(logits, other)
        np.testing.assert_allclose(turned(out.to_numpy()), values, rtol=3e-6, atol=1e-6)
        out.backward(minitorch.tensor(np.ascontiguousarray(turned(grad)), backend, False))
        assert logits.grad is not None
        np.testing.assert_allclose(
            turned(logits.grad.to_numpy()), gradient, rtol=1e-5, atol=2e-6 * np.abs(grad).sum()
        )

    column = weights[:, :1]
    losses = (log_sum - below)[every, target]
    check("softmax_loss", weights[:, 0], losses, column * (share - one_hot))
    sums = weights.sum(1, keepdims=True, dtype=np.float64)
    check("logsoftmax", weights, below - log_sum, weights - share * sums)
    check("logsumexp", column, exact.max(1, keepdims=True) + log_sum, column * share)


@pytest.mark.parametrize("length", [5, 33, 1000])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_infinity_anywhere_in_a_row(length: int, dtype: Any) -> None:
    """Vectors, and what is left at the end of a row."""
    rows = np.random.default_rng(0).normal(size=(length, length)).astype(dtype)
    np.fill_diagonal(rows, inf)
    assert np.isposinf(minitorch.logsumexp(minitorch.tensor(rows, FAST), 1).to_numpy()).all()
    rows[0, -1] = rows[-1, 0] = nan
    total = minitorch.logsumexp(minitorch.tensor(rows, FAST), 1).to_numpy().ravel()
    assert np.isnan(total[[0, -1]]).all() and np.isposinf(total[1:-1]).all()
