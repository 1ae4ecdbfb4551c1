"""Fused operations refuse what does not fit, by one sentence on all backends, before any loop; what
fits in more than one way gives the same everywhere.
"""

from __future__ import annotations

import inspect
from typing import Any

import numpy as np
import pytest

import minitorch
from minitorch.fast_ops import FastOps
from minitorch.fused_checks import CHECKS
from minitorch.fused_functions import LinearFun
from minitorch.fused_ops import FusedOps
from minitorch.tensor_ops import SimpleOps, TensorBackend

from .wrong_calls import CALLS, answers

BACKENDS = {"simple": TensorBackend(SimpleOps), "fast": TensorBackend(FastOps)}
ON_EACH = pytest.mark.parametrize("backend", BACKENDS.values(), ids=BACKENDS.keys())


def test_wrong_shapes_are_refused_by_the_same_sentence() -> None:
    simple, fast = answers(SimpleOps), answers(FastOps)
    for (_, wanted), ours, other in zip(CALLS, fast, simple, strict=True):
        assert wanted in ours
        assert ours == other


def test_every_operation_of_more_than_one_tensor_has_a_check() -> None:
    """With the parameters of the operation, in each class that defines it."""
    names = {name for name in vars(FusedOps) if not name.startswith("_")}
    assert names - set(CHECKS) == {"gelu_forward"}  # takes any tensor
    assert set(CHECKS) - names == {"concatenate", "dropout_forward", "dropout_backward"}
    for name, check in CHECKS.items():
        for ops in (SimpleOps, FastOps, minitorch.CudaOps, minitorch.CudaKernelOps):
            assert getattr(ops, name).check is check, (name, ops)
            given = list(inspect.signature(check).parameters)
            if name in vars(FusedOps):
                assert given == list(inspect.signature(getattr(FusedOps, name)).parameters)


class OwnOps(FastOps):
    """As a program outside of the library may define it."""

    @staticmethod
    def gelu_backward(grad: Any, x: Any) -> Any:
        raise AssertionError("called")


def test_operations_of_other_backends_are_checked_too() -> None:
    x, grad = minitorch.tensor([1.0, 2.0]), minitorch.tensor([1.0])
    with pytest.raises(ValueError, match="grad must have the shape"):
        OwnOps.gelu_backward(grad, x)
    with pytest.raises(ValueError, match="grad must have the shape"):
        TensorBackend(OwnOps).ops.gelu_backward(grad=grad, x=x)


BAD_NUMBERS = (-1.0, 3.0, 1.5, np.nan, np.inf, -np.inf, 1e300)


@ON_EACH
def test_ids_and_targets_that_are_none(backend: TensorBackend) -> None:
    ops = backend.ops

    def make(array: Any) -> Any:
        return minitorch.tensor(np.array(array, np.float64), backend, requires_grad=False)

    for bad in BAD_NUMBERS:
        ids = make([0.0, bad])
        for call in (
            lambda ids: minitorch.Embedding(3, 2, backend)(ids),
            lambda ids: ops.embedding_forward(ids, make(np.ones((3, 2)))),
            lambda ids: ops.embedding_backward(make(np.ones((2, 4))), ids, 3),
        ):
            with pytest.raises(ValueError, match="Embedding: x must hold whole numbers"):
                call(ids)
        logits, row = make(np.ones((2, 3))), make([1.0, 1.0])
        for call in (
            lambda ids, logits=logits: minitorch.softmax_loss(logits, ids),
            lambda ids, logits=logits: ops.cross_entropy_forward(logits, ids),
            lambda ids, logits=logits, row=row: ops.cross_entropy_backward(row, logits, ids, row),
        ):
            with pytest.raises(ValueError, match="target must hold whole numbers from 0 to 2"):
                call(ids)


@ON_EACH
def test_ids_that_are_changed_between_the_passes(backend: TensorBackend) -> None:
    layer = minitorch.Embedding(3, 2, backend)
    ids = minitorch.tensor([0.0, 1.0], backend, requires_grad=False)
    out = layer(ids).sum()
    ids[1] = 1e9
    with pytest.raises(ValueError, match="Embedding: x must hold"):
        out.backward()


def layer_results(
    backend: TensorBackend, dtypes: tuple[str, str], shape: tuple[int, ...]
) -> dict[str, Any]:
    """Layer norm and a linear layer with weight and bias of a shape, forward and backward."""
    rng = np.random.default_rng(0)

    def leaf(name: str, *size: int, transposed: bool = False) -> Any:
        array = rng.normal(size=size).astype(name)
        made = minitorch.tensor(array.T.copy() if transposed else array, backend)
        return made, made.permute(1, 0) if transposed else made

    of_x, of_weight = dtypes
    x, seen = leaf(of_x, 3, 5, transposed=True)
    gamma, beta, bias = (leaf(of_weight, *shape)[0] for _ in range(3))
    weight, square = leaf(of_weight, 5, 5, transposed=True)
    normed = seen.layernorm(gamma, beta, 1e-5)
    out = LinearFun.apply(normed, square, bias)
    (out * minitorch.tensor(rng.normal(size=out.shape), backend)).sum().backward()
    results = {"normed": normed.to_numpy(), "out": out.to_numpy()}
    for name, value in (("x", x), ("gamma", gamma), ("beta", beta), ("w", weight), ("b", bias)):
        results[name] = value.grad.to_numpy()
        assert results[name].shape == value.shape and results[name].dtype == value.dtype
    return results


@pytest.mark.parametrize("shape", [(5,), (1, 5)])
@pytest.mark.parametrize("dtypes", [("float64", "float64"), ("float32", "float64"),
                                    ("float64", "float32")])  # fmt: skip
def test_weights_of_a_row_and_of_another_dtype(
    shape: tuple[int, ...], dtypes: tuple[str, str]
) -> None:
    """(1, D) is as good as (D,), its gradient has that shape; two dtypes are computed in the wider
    one. Inputs are not contiguous.
    """
    expected = layer_results(BACKENDS["simple"], dtypes, shape)
    flat = layer_results(BACKENDS["simple"], ("float64", "float64"), (5,))
    for name, array in layer_results(BACKENDS["fast"], dtypes, shape).items():
        assert array.dtype == expected[name].dtype, name
        assert array.dtype == np.float64 or name in ("x", "gamma", "beta", "w", "b")
        np.testing.assert_allclose(array, expected[name], rtol=1e-6, atol=1e-6, err_msg=name)
        np.testing.assert_allclose(
            array.reshape(flat[name].shape), flat[name], rtol=1e-5, atol=1e-5, err_msg=name
        )


@ON_EACH
def test_nothing_to_compute(backend: TensorBackend) -> None:
    """No rows, no columns, no ids, no channels: empty results and zero gradients."""

    def make(*shape: int) -> Any:
        return minitorch.tensor(np.ones(shape), backend)

    for rows, columns in ((0, 3), (2, 0), (0, 0)):
        x, gamma, beta = make(rows, columns), make(columns), make(columns)
        x.layernorm(gamma, beta).sum().backward()
        assert not gamma.grad.to_numpy().any() and beta.grad.to_numpy().tolist() == [rows] * columns
        minitorch.softmax(x, 1).sum().backward()
        minitorch.logsumexp(x, 1).sum().backward()
        minitorch.GELU(x).sum().backward()
        x.attn_softmax(make(1, columns)).sum().backward()
        assert x.grad.shape == (rows, columns)
        weight, bias = make(columns, 2), make(2)
        LinearFun.apply(x, weight, bias).sum().backward()
        assert not weight.grad.to_numpy().any() and bias.grad.to_numpy().tolist() == [rows] * 2
    embedding = minitorch.Embedding(3, 2, backend)
    assert embedding(make(0, 4)).shape == (0, 4, 2)
    assert minitorch.softmax_loss(make(0, 3), make(0)).shape == (0,)
    assert minitorch.softmax_loss(make(0, 0), make(0)).shape == (0,)
    parameter = minitorch.Parameter(make(0))
    parameter.value.grad = make(0)
    minitorch.AdamW([parameter]).step()
    for sizes in ((0, 2, 3), (2, 0, 3), (2, 2, 0)):
        image, kernel = make(1, sizes[1], 4), make(sizes[0], sizes[1], sizes[2])
        out = minitorch.conv1d(image, kernel)
        assert out.shape == (1, sizes[0], 4) and not out.to_numpy().any()
        out.sum().backward()
        assert image.grad.shape == image.shape and kernel.grad.shape == kernel.shape


def test_convolutions_of_raw_storages_are_checked() -> None:
    image, weight = np.ones(8), np.ones(12)
    of: Any = tuple(map(np.array, ((1, 2, 4), (8, 4, 1))))
    wrong: Any = tuple(map(np.array, ((1, 3, 4), (12, 4, 1))))
    with pytest.raises(ValueError, match="same in_channels"):
        minitorch.tensor_conv1d(
            image, of[0], of[1], 8, image, of[0], of[1], weight, wrong[0], wrong[1], False
        )
