"""Convolution against numpy and against PyTorch; gradients are in test_functions_grad."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import minitorch
from minitorch import FastOps, Tensor, TensorBackend
from minitorch.testing import arrays

FAST = TensorBackend(FastOps)


def test_anchored_on_the_left_and_zero_past_the_end() -> None:
    x = minitorch.tensor([[[0, 1, 2, 3]]], backend=FAST)
    weight = minitorch.tensor([[[1, 2, 3]]], backend=FAST)
    out = minitorch.conv1d(x, weight)
    assert out.shape == (1, 1, 4)
    assert [out[0, 0, i] for i in range(4)] == [0 * 1 + 1 * 2 + 2 * 3, 1 * 1 + 2 * 2 + 3 * 3, 8, 3]


@settings(max_examples=25)
@given(data=st.data())
def test_conv2d_is_pytorchs(data: st.DataObject) -> None:
    """Value and both gradients, kernels larger than the image among them."""
    torch = pytest.importorskip("torch")
    sizes = st.integers(1, 5)
    batch, channels, height, width, out, kh, kw = data.draw(st.tuples(*[sizes] * 7))
    dtype = [np.float64]
    arrays_in = [
        data.draw(arrays(s, dtype))
        for s in ((batch, channels, height, width), (out, channels, kh, kw))
    ]
    ours = [minitorch.tensor(a, backend=FAST) for a in arrays_in]
    theirs = [torch.from_numpy(np.array(a, order="C")).requires_grad_() for a in arrays_in]
    result = minitorch.conv2d(*ours)
    padded = torch.nn.functional.pad(theirs[0], (0, kw - 1, 0, kh - 1))
    expected = torch.nn.functional.conv2d(padded, theirs[1])
    np.testing.assert_allclose(result.numpy(), expected.detach().numpy(), atol=1e-10)
    grad = np.random.default_rng(0).normal(size=result.shape)
    result.backward(minitorch.tensor(grad, backend=FAST, requires_grad=False))
    expected.backward(torch.from_numpy(grad))
    for mine, other in zip(ours, theirs, strict=True):
        assert mine.grad is not None
        np.testing.assert_allclose(mine.grad.numpy(), other.grad.numpy(), atol=1e-10)


def test_threads_share_a_large_convolution() -> None:
    rng = np.random.default_rng(0)
    x, weight = rng.normal(size=(8, 4, 20, 20)), rng.normal(size=(8, 4, 3, 3))
    whole = minitorch.conv2d(minitorch.tensor(x, FAST), minitorch.tensor(weight, FAST)).numpy()
    for n in range(8):
        one = minitorch.conv2d(minitorch.tensor(x[n : n + 1], FAST), minitorch.tensor(weight, FAST))
        np.testing.assert_array_equal(one.numpy()[0], whole[n])


@pytest.mark.parametrize("reverse", [False, True])
def test_the_loop_as_courses_call_it(reverse: bool) -> None:
    out, x, weight = np.zeros(4), np.array([1.0, 2, 3, 4]), np.array([1.0, 10])
    shape, strides = np.array([1, 1, 4]), np.array([4, 4, 1])
    minitorch.tensor_conv1d(
        out, shape, strides, 4, x, shape, strides,
        weight, np.array([1, 1, 2]), np.array([2, 2, 1]), reverse,
    )  # fmt: skip
    expected: Any = [1, 12, 23, 34] if reverse else [21, 32, 43, 4]
    np.testing.assert_array_equal(out, expected)


@pytest.mark.parametrize("shapes", [((1, 2, 5), (3, 3, 2)), ((2, 5), (3, 2, 2))])
def test_shapes_that_do_not_fit(shapes: tuple[tuple[int, ...], ...]) -> None:
    x, weight = (minitorch.zeros(s, FAST) for s in shapes)
    with pytest.raises(ValueError, match="conv1d: input"):
        minitorch.conv1d(x, weight)


def test_dtypes() -> None:
    x: Tensor = minitorch.tensor(np.ones((1, 1, 3), np.float32), FAST)
    weight = minitorch.tensor(np.ones((1, 1, 2), np.float32), FAST)
    assert minitorch.conv1d(x, weight).dtype == np.float32
