"""What comes from the host to a tensor on the GPU: elements given to its constructor, as the
courses' tests give them, and the masks of dropout.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import minitorch
from minitorch import Tensor, TensorBackend, TensorData, rng
from minitorch.cuda import allocator
from minitorch.dtypes import BFLOAT16
from minitorch.kernels.philox import vector_dropout_mask
from minitorch.testing import arrays

FAST = TensorBackend(minitorch.FastOps)


@pytest.fixture(scope="module", params=["CudaOps", "CudaKernelOps"])
def backend(request: pytest.FixtureRequest) -> TensorBackend:
    return TensorBackend(getattr(minitorch, request.param))


@pytest.fixture(scope="module")
def gpu() -> TensorBackend:
    return TensorBackend(minitorch.CudaKernelOps)


# ----- elements -----


@settings(max_examples=10)
@given(data=st.data())
def test_elements_of_the_host_are_moved(backend: TensorBackend, data: st.DataObject) -> None:
    array = data.draw(arrays(data.draw(st.sampled_from([(), (0,), (3,), (2, 1, 3)]))))
    given = TensorData.from_array(array)
    x = Tensor(given, backend=backend)
    assert x._tensor.on_device and not given.on_device  # what was given is as it was
    assert x.dtype == array.dtype and x.shape == array.shape
    np.testing.assert_array_equal(x.to_numpy(), array)
    np.testing.assert_allclose((x + x).to_numpy(), 2 * array)


def test_views_of_moved_elements_are_right(backend: TensorBackend) -> None:
    """Permuted and repeated storage, and what a test of a course does with it."""
    data = TensorData(list(range(6)), (2, 3))
    x = Tensor(data.permute(1, 0), backend=backend)
    x.requires_grad_(True)
    (x * x._new(x._tensor.permute(1, 0)).permute(1, 0)).sum().backward()
    assert x.grad is not None
    np.testing.assert_array_equal(x.grad.to_numpy(), np.arange(6.0).reshape(2, 3).T)
    rows = Tensor(TensorData([1.0, 2.0], (2, 3), (1, 0)), backend=backend)
    assert rows.to_numpy().tolist() == [[1, 1, 1], [2, 2, 2]]
    made = x._new(TensorData([5.0], (1,)))
    assert made._tensor.on_device and made.item() == 5


@pytest.mark.parametrize("dtype", [np.dtype(np.float16), BFLOAT16, np.dtype(np.float64)], ids=str)
def test_elements_of_the_gpu_are_moved(gpu: TensorBackend, dtype: np.dtype[np.generic]) -> None:
    x = minitorch.tensor([1.0, 2.5], gpu, dtype=dtype)
    y = Tensor(x._tensor, backend=FAST)
    assert not y._tensor.on_device and x._tensor.on_device
    assert y.dtype == (dtype if dtype == np.float64 else np.float32)
    assert (y * 2).to_numpy().tolist() == [2, 5]


# ----- dropout -----


def test_masks_are_those_of_the_cpu(backend: TensorBackend) -> None:
    array = np.arange(1.0, 21.0).reshape(4, 5)
    outputs = []
    for where in (backend, FAST):
        x = minitorch.tensor(array, backend=where)
        minitorch.manual_seed(5)
        out = minitorch.Dropout(0.25)(x)
        out.sum().backward()
        assert x.grad is not None
        outputs.append((out, x.grad, minitorch.dropout(x, 0.5), minitorch.dropout(x, 1.0)))
    for mine, other in zip(*outputs, strict=True):
        np.testing.assert_allclose(mine.to_numpy(), other.to_numpy())
    np.random.seed(5)
    kept = np.random.binomial(1, 0.75, (4, 5))
    np.testing.assert_allclose(outputs[0][0].to_numpy(), array * kept / 0.75)


@pytest.mark.parametrize("dtype", [np.dtype(np.float16), BFLOAT16], ids=str)
def test_masks_of_16_bits(gpu: TensorBackend, dtype: np.dtype[np.generic]) -> None:
    x = minitorch.tensor(np.ones(64), gpu, dtype=dtype)
    for out in (minitorch.Dropout(0.5)(x) * 0.5, minitorch.dropout(x, 0.5)):
        assert out.dtype == dtype
        assert set(out.to_numpy().astype(float)) == {0.0, 1.0}


def test_a_repeatable_step_draws_nothing_on_the_host(gpu: TensorBackend) -> None:
    x = minitorch.tensor(np.arange(1.0, 21.0).reshape(4, 5), backend=gpu)
    before = {k: v for k, v in rng.get_rng_state().items() if k != "attention"}
    results: list[list[npt.NDArray[Any]]] = []
    for _ in range(2):
        x.grad = None
        with rng.repeatable_step(5):
            out = minitorch.Dropout(0.25)(x)
            plain = minitorch.dropout(x, 0.5)
        out.sum().backward()
        assert x.grad is not None
        results.append([t.to_numpy() for t in (out, plain, x.grad)])
    assert {k: v for k, v in rng.get_rng_state().items() if k != "attention"} == before
    np.testing.assert_array_equal(results[0], results[1])

    minitorch.manual_seed(5)
    kept: npt.NDArray[Any] = vector_dropout_mask(20, 0.25, rng.next_seed()).reshape(4, 5)
    np.testing.assert_allclose(results[0][0], x.to_numpy() * kept / 0.75)
    np.testing.assert_allclose(results[0][2], kept / 0.75)
    assert set(np.unique(results[0][1] / x.to_numpy())) <= {0.0, 1.0}
    with rng.repeatable_step(5):
        assert not minitorch.dropout(x, 1.0).to_numpy().any()
    assert rng.device_offset().copy_to_host().tolist() == [0]
    assert not rng.masks_come_from_seeds()


def test_dropout_in_a_graph_wants_a_repeatable_step(gpu: TensorBackend) -> None:
    x = minitorch.ones((4,), gpu)
    with allocator.use_pool(allocator.Pool()):  # as a capture has it
        for drop in (minitorch.Dropout(0.5), lambda x: minitorch.dropout(x, 0.5)):
            with pytest.raises(RuntimeError, match="repeatable_step"):
                drop(x)
            with rng.repeatable_step(0):
                drop(x)
