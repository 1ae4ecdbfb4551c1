"""The CPU's fused kernels, arrays in and out, against formulas in float64 and against PyTorch."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numba
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minitorch.kernels import (
    adamw,
    cross_entropy,
    embedding,
    gelu,
    layernorm,
    linear,
    softmax,
)
from minitorch.kernels.cpu import vector_math
from minitorch.testing import DTYPES, arrays, shapes

Array = Any
EPS = 1e-5
ROWS = shapes(min_dims=1, max_dims=3, min_size=1, max_size=40)
TOLERANCE = {np.dtype(np.float32): 3e-6, np.dtype(np.float64): 1e-14}


def close(ours: Array, expected: Array, scale: float = 1.0) -> None:
    """Equal within a few roundings of the largest element; NaN and infinities in their places."""
    assert ours.shape == np.shape(expected)
    finite = np.isfinite(expected)
    largest = np.abs(expected[finite]).max(initial=1e-30)
    tolerance = TOLERANCE[ours.dtype] * scale
    np.testing.assert_allclose(ours, expected, rtol=tolerance, atol=tolerance * largest)


# ----- float64 formulas -----


def ref_softmax(x: Array) -> Array:
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def ref_logsumexp(x: Array) -> Array:
    m = x.max(-1)
    return m + np.log(np.exp(x - m[..., None]).sum(-1))


def ref_gelu(x: Array) -> Array:
    """0.5 x (1 + tanh u), where 1 + tanh u = 2 / (1 + exp(-2 u)) loses no digits near tanh = -1."""
    return x / (1 + np.exp(-2 * _gelu_inner(x)))


def ref_gelu_derivative(x: Array) -> Array:
    u = _gelu_inner(x)
    up, down = 1 / (1 + np.exp(-2 * u)), 1 / (1 + np.exp(2 * u))
    return up + 2 * x * up * down * math.sqrt(2 / math.pi) * (1 + 0.134145 * x**2)


def _gelu_inner(x: Array) -> Array:
    return math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)


def ref_layernorm(x: Array, gamma: Array, beta: Array) -> Array:
    centred = x - x.mean(-1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + EPS) * gamma + beta


# ----- the exponential -----


@numba.njit(cache=True, error_model="numpy")
def exp_of(x, out, key=vector_math._LN_2):  # type: ignore[no-untyped-def]
    for j in range(len(x)):
        out[j] = vector_math.exp(x[j])


@pytest.mark.parametrize("dtype", DTYPES)
def test_exp_is_accurate_to_a_few_units_in_the_last_place(dtype: Any) -> None:
    lowest = -87.0 if dtype == np.float32 else -708.0
    x = np.linspace(lowest, 0, 200_001).astype(dtype)
    out = np.empty_like(x)
    exp_of(x, out)
    exact = np.exp(x.astype(np.longdouble))
    error = np.abs(out - exact) / exact
    assert np.max(error) < 2 * np.finfo(dtype).eps
    special = np.array([0, -np.inf, np.nan, lowest * 2], dtype)
    out = np.empty_like(special)
    exp_of(special, out)
    np.testing.assert_array_equal(out, np.array([1, 0, np.nan, 0], dtype))


# ----- values and gradients -----


@settings(max_examples=30)
@given(data=st.data())
def test_softmax(data: st.DataObject) -> None:
    x = data.draw(arrays(ROWS, low=-30, high=30))
    x64 = x.astype(np.float64)
    y = softmax.forward(x)
    assert y.dtype == x.dtype
    close(y, ref_softmax(x64))
    dy = np.random.default_rng(0).normal(size=x.shape).astype(x.dtype)
    y64 = ref_softmax(x64)
    expected = y64 * (dy - (dy * y64).sum(-1, keepdims=True))
    close(softmax.backward(dy, y), expected, 10 + 10 / max(np.abs(expected).max(), 1e-6))


@settings(max_examples=20)
@given(data=st.data())
def test_masked_softmax(data: st.DataObject) -> None:
    """Masks of every broadcastable shape; a row without an allowed element gives zeros."""
    shape = data.draw(shapes(min_dims=2, max_dims=4, max_size=9))
    x = data.draw(arrays(shape))
    mask_shape = tuple(data.draw(st.sampled_from([1, n])) for n in shape)
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    mask = np.where(rng.random(mask_shape) < 0.4, -np.inf, 0.5).astype(x.dtype)
    scores = x.astype(np.float64) + mask
    e = np.exp(scores - np.where(np.isneginf(m := scores.max(-1, keepdims=True)), 0, m))
    total = e.sum(-1, keepdims=True)
    close(softmax.forward(x, mask), e / np.where(total == 0, 1, total))


@settings(max_examples=20)
@given(data=st.data())
def test_logsumexp(data: st.DataObject) -> None:
    x = data.draw(arrays(ROWS, low=-30, high=30))
    x64 = x.astype(np.float64)
    total = softmax.logsumexp_forward(x)
    close(total, ref_logsumexp(x64), 10)
    dl = np.random.default_rng(0).normal(size=total.shape).astype(x.dtype)
    close(softmax.logsumexp_backward(dl, x, total), dl[..., None] * ref_softmax(x64), 60)


@settings(max_examples=20)
@given(data=st.data())
def test_layernorm(data: st.DataObject) -> None:
    x = data.draw(arrays(shapes(min_dims=2, max_dims=3, min_size=4, max_size=40)))
    rng = np.random.default_rng(0)
    gamma, beta = rng.normal(size=(2, x.shape[-1])).astype(x.dtype)
    dy = rng.normal(size=x.shape).astype(x.dtype)
    x64, g64 = x.astype(np.float64), gamma.astype(np.float64)
    if np.min(x64.var(-1)) < 1e-2:
        return  # nearly constant rows: the derivative is as large as the rounding errors
    y, var, mean = layernorm.forward(x, gamma, beta, EPS)
    close(y, ref_layernorm(x64, g64, beta), 10)
    close(mean, x64.mean(-1).reshape(-1), 10)
    close(var, x64.var(-1).reshape(-1), 10)
    rstd = 1 / np.sqrt(x64.var(-1, keepdims=True) + EPS)
    xhat = (x64 - x64.mean(-1, keepdims=True)) * rstd
    g = dy * g64
    dx = rstd * (g - g.mean(-1, keepdims=True) - xhat * (g * xhat).mean(-1, keepdims=True))
    rows = tuple(range(x.ndim - 1))
    ours = layernorm.backward(dy, x, gamma, var, mean, EPS)
    for got, expected in zip(ours, (dx, (dy * xhat).sum(rows), dy.sum(rows)), strict=True):
        close(got, expected, 60)


@settings(max_examples=20)
@given(data=st.data())
def test_gelu(data: st.DataObject) -> None:
    x = data.draw(arrays(low=-9, high=9))
    dy = np.random.default_rng(0).normal(size=x.shape).astype(x.dtype)
    x64 = x.astype(np.float64)
    close(gelu.forward(x), ref_gelu(x64), 10)
    close(gelu.backward(dy, x), dy * ref_gelu_derivative(x64), 10)


def test_gelu_far_from_zero() -> None:
    x = np.array([-np.inf, -1e30, -30.0, 30.0, 1e4, np.nan])
    with np.errstate(all="ignore"):
        y = gelu.forward(x)
    assert y[2] == pytest.approx(0, abs=1e-100)
    np.testing.assert_array_equal(y[3:], x[3:])


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_slope_of_gelu_far_from_zero(dtype: Any) -> None:
    x = np.array([-1e38, -1e19, -2e13, -1e4, 1e4, 2e13, 1e19, 1e38], dtype)
    with np.errstate(all="ignore"):
        np.testing.assert_array_equal(gelu.backward(np.ones_like(x), x), x > 0)


@settings(max_examples=20)
@given(data=st.data())
def test_linear(data: st.DataObject) -> None:
    dtype = [data.draw(st.sampled_from(DTYPES))]
    leading = data.draw(shapes(max_dims=2, max_size=9))
    n, m = data.draw(st.tuples(st.integers(1, 20), st.integers(1, 20)))
    x, weight, bias, dy = (
        data.draw(arrays(s, dtype)) for s in ((*leading, n), (n, m), (m,), (*leading, m))
    )
    close(linear.forward(x, weight, bias), x.astype(np.float64) @ weight + bias, 10)
    dx, dweight, dbias = linear.backward(dy, x, weight, (True, True, True))
    x64, dy64 = x.astype(np.float64).reshape(-1, n), dy.astype(np.float64).reshape(-1, m)
    close(dx, (dy64 @ weight.T).reshape(x.shape), 10)
    close(dweight, x64.T @ dy64, 10)
    close(dbias, dy64.sum(0), 10)


@settings(max_examples=20)
@given(data=st.data())
def test_embedding(data: st.DataObject) -> None:
    weight = data.draw(arrays(data.draw(st.tuples(st.integers(1, 9), st.integers(1, 70)))))
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    ids = rng.integers(0, len(weight), data.draw(shapes(max_dims=2, max_size=20)))
    np.testing.assert_array_equal(embedding.forward(ids, weight), weight[ids])
    dy = rng.normal(size=(*ids.shape, weight.shape[1])).astype(weight.dtype)
    expected = np.zeros(weight.shape)
    np.add.at(expected, ids, dy.astype(np.float64))
    close(embedding.backward(dy, ids, len(weight)), expected, 10)


@pytest.mark.parametrize("dtype", DTYPES)
def test_cross_entropy_of_many_classes(dtype: Any) -> None:
    """10000 classes and large logits: nothing overflows, small losses keep their digits."""
    rng = np.random.default_rng(0)
    logits = (rng.normal(size=(32, 10_000)) * 30 + 1000).astype(dtype)
    target = rng.integers(0, 10_000, 32)
    x64 = logits.astype(np.float64)
    loss, total = cross_entropy.forward(logits, target)
    close(loss, ref_logsumexp(x64) - x64[np.arange(32), target], 20)
    dloss = rng.normal(size=32).astype(dtype)
    expected = ref_softmax(x64)
    expected[np.arange(32), target] -= 1
    close(cross_entropy.backward(dloss, logits, target, total), expected * dloss[:, None], 20)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_adamw_is_pytorchs(dtype: Any, weight_decay: float) -> None:
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(0)
    param = rng.normal(size=1000).astype(dtype)
    exp_avg, exp_avg_sq = np.zeros_like(param), np.zeros_like(param)
    theirs = torch.from_numpy(param.copy()).requires_grad_()
    settings = {"lr": 0.01, "eps": 1e-6, "weight_decay": weight_decay}
    optimizer = torch.optim.AdamW([theirs], betas=(0.8, 0.95), **settings)
    for step in range(1, 6):
        grad = rng.normal(size=1000).astype(dtype)
        theirs.grad = torch.from_numpy(grad)
        optimizer.step()
        adamw.step(param, grad, exp_avg, exp_avg_sq, beta1=0.8, beta2=0.95, step=step, **settings)
    close(param, theirs.detach().numpy())


# ----- what must hold for all -----

KERNELS: dict[str, Callable[[Array], Any]] = {
    "softmax": softmax.forward,
    "softmax backward": lambda x: softmax.backward(x, x),
    "logsumexp": softmax.logsumexp_forward,
    "logsumexp backward": lambda x: softmax.logsumexp_backward(x[..., 0], x, x[..., 0]),
    "gelu": gelu.forward,
    "gelu backward": lambda x: gelu.backward(x, x),
    "layernorm": lambda x: layernorm.forward(x, x[0], x[0], EPS)[0],
    "layernorm backward": lambda x: layernorm.backward(
        x, x, x[0], np.abs(x[:, 0]) + 1, x[:, 0], EPS
    )[1],
    "embedding backward": lambda x: embedding.backward(x, np.arange(len(x)) % 7, 7),
    "linear": lambda x: linear.forward(x, x[:1].repeat(x.shape[1], 0), x[0]),
}


@pytest.mark.parametrize("kernel", KERNELS)
def test_threads_change_no_bit(kernel: str) -> None:
    """The same bits with one thread and with all, and again."""
    x = np.random.default_rng(0).normal(size=(1037, 129)).astype(np.float32)
    results = [KERNELS[kernel](x) for _ in range(2)]
    before = numba.get_num_threads()
    try:
        numba.set_num_threads(1)
        results.append(KERNELS[kernel](x))
    finally:
        numba.set_num_threads(before)
    for other in results[1:]:
        np.testing.assert_array_equal(results[0], other)


@pytest.mark.parametrize("kernel", KERNELS)
def test_layout_changes_no_bit(kernel: str) -> None:
    """A transposed input, and one that must not be written to, give what a contiguous one gives."""
    x = np.random.default_rng(0).normal(size=(30, 33))
    expected = KERNELS[kernel](x)
    np.testing.assert_array_equal(KERNELS[kernel](np.asfortranarray(x)), expected)
    x.flags.writeable = False
    np.testing.assert_array_equal(KERNELS[kernel](x), expected)


@pytest.mark.parametrize("kernel", ["softmax", "gelu", "layernorm", "logsumexp"])
def test_nan_stays_in_its_row(kernel: str) -> None:
    x = np.random.default_rng(0).normal(size=(5, 40))
    x[2, 17] = np.nan
    out = KERNELS[kernel](x)
    assert np.isnan(np.atleast_1d(out[2])).any()
    assert np.isfinite(out[[1, 3, 4]]).all()


def test_nothing_in_nothing_out() -> None:
    for shape in ((0, 5), (3, 0, 2)):
        x = np.empty(shape)
        assert softmax.forward(x).shape == shape
        assert softmax.backward(x, x).shape == shape
        assert gelu.forward(x).shape == shape
        assert (
            layernorm.forward(x, x.sum((*range(x.ndim - 1),)), np.zeros(shape[-1]), EPS)[0].shape
            == shape
        )
    weight = np.ones((4, 3))
    assert embedding.forward(np.empty(0, int), weight).shape == (0, 3)
    assert not embedding.backward(np.empty((0, 3)), np.empty(0, int), 4).any()
    assert linear.forward(np.empty((0, 4)), weight, np.ones(3)).shape == (0, 3)
