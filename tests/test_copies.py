"""Copies are other variables: `copy.copy`, `copy.deepcopy`, pickle, and a worker process."""

import copy
import multiprocessing
import pickle
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import minitorch
from minitorch import (
    AdamW,
    FastOps,
    Linear,
    Module,
    Parameter,
    Scalar,
    Tensor,
    TensorBackend,
)
from minitorch.function import History
from minitorch.testing import shapes, tensors

FAST, SIMPLE = TensorBackend(FastOps), minitorch.SimpleBackend


def by_pickle(x: Any, protocol: int | None = None) -> Any:
    return pickle.loads(pickle.dumps(x, protocol))


COPIES: dict[str, Callable[[Any], Any]] = {
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
    "pickle": by_pickle,
    "oldest pickle": partial(by_pickle, protocol=0),
}
every_copy = pytest.mark.parametrize("make", COPIES.values(), ids=COPIES)


# ----- variables -----


@every_copy
def test_a_tensor(make: Any) -> None:
    x = minitorch.tensor([1.0, 2.0], FAST)
    y = make(x)
    assert y.unique_id != x.unique_id and y.name == str(y.unique_id)
    assert y.backend.ops is FAST.ops and y.requires_grad()
    (x * 2.0 + y * y).sum().backward()
    assert x.grad is not None and x.grad.to_numpy().tolist() == [2, 2]
    assert y.grad.to_numpy().tolist() == [2, 4]


@every_copy
def test_a_scalar(make: Any) -> None:
    x = Scalar(3.0)
    y = make(x)
    assert y.unique_id != x.unique_id and y.name == str(y.unique_id)
    (x * 2 + y * y).backward()
    assert (x.derivative, y.derivative) == (2.0, 6.0)


@every_copy
def test_what_a_copy_keeps(make: Any) -> None:
    x = minitorch.tensor([[1.0, 2.0]], SIMPLE, requires_grad=False, dtype=np.float32)
    x.name, x.note = "given", ["attributes"]  # type: ignore[attr-defined]
    y = make(x)
    assert (y.name, y.note, y.dtype) == ("given", ["attributes"], np.float32)
    assert y.is_constant() and y.backend.ops is SIMPLE.ops
    assert make(Scalar(1.0, back=None, name="s")).name == "s"
    assert make(Scalar(1.0, back=None)).is_constant()


def test_memory_and_gradients_as_in_pytorch() -> None:
    x, s = minitorch.tensor([1.0, 2.0], FAST), Scalar(1.0)
    (x * 3.0).sum().backward()
    (s * 3.0).backward()
    shallow, deep, loaded = copy.copy(x), copy.deepcopy(x), by_pickle(x)
    assert shallow.grad is None and loaded.grad is None
    assert deep.grad is not None and deep.grad is not x.grad
    assert [c.derivative for c in (copy.copy(s), copy.deepcopy(s), by_pickle(s))] == [None, 3, None]
    x[0] = 7.0
    assert [c[0] for c in (shallow, deep, loaded)] == [7.0, 1.0, 1.0]
    deep.grad[0] = 9.0
    assert x.grad is not None and x.grad[0] == 3.0


@settings(max_examples=40)
@given(st.data())
def test_every_layout_keeps_its_values(data: st.DataObject) -> None:
    x = data.draw(tensors(shapes(min_dims=0, min_size=0), FAST))
    for make in (copy.copy, copy.deepcopy, by_pickle):
        y = make(x)
        assert y.dtype == x.dtype
        np.testing.assert_array_equal(y.to_numpy(), x.to_numpy())
    assert len(pickle.dumps(minitorch.zeros((1000,), FAST)[2:4])) < 2000  # not the whole storage


def test_a_shallow_copy_of_a_result_comes_from_the_same_inputs() -> None:
    x, s = minitorch.tensor([2.0], FAST), Scalar(2.0)
    y, t = x * x, s * s
    (y * copy.copy(y)).sum().backward()
    (t * copy.copy(t)).backward()
    assert x.grad is not None and x.grad.item() == 32.0  # 4 x^3
    assert s.derivative == 32.0


def test_results_of_functions() -> None:
    for result in (minitorch.tensor([1.0], FAST) * 2.0, Scalar(1.0) * 2.0):
        with pytest.raises(RuntimeError, match="only leaves and constants can be deep-copied"):
            copy.deepcopy(result)
        loaded = by_pickle(result)  # as in PyTorch
        assert loaded.is_leaf() and not loaded.is_constant()
    assert copy.deepcopy((minitorch.tensor([1.0]) * 2.0).detach()).item() == 2.0


def test_one_tensor_twice_stays_one() -> None:
    x = minitorch.tensor([1.0], FAST)
    for make in (copy.deepcopy, by_pickle):
        a, b = make([x, x])
        assert a is b and a is not x


class Named(Tensor):
    """A tensor of a user's own kind."""


@every_copy
def test_subclasses(make: Any) -> None:
    x = Named(minitorch.tensor([1.0])._tensor, History(), backend=FAST)
    assert type(make(x)) is Named


# ----- backends -----


class Counting(FastOps):
    """A user's own operations."""


def test_backends() -> None:
    backend = TensorBackend(Counting)
    for x in (backend, FAST, SIMPLE, TensorBackend(minitorch.CudaKernelOps)):
        assert copy.copy(x) is x and copy.deepcopy(x) is x
        assert by_pickle(x)._wanted is x._wanted
    assert by_pickle(backend) is backend and by_pickle(SIMPLE) is SIMPLE


@every_copy
def test_tensor_data(make: Any) -> None:
    data = minitorch.TensorData(list(range(6)), (2, 3)).permute(1, 0)
    made = make(data)
    assert made.shape == (3, 2) and made.to_numpy().tolist() == data.to_numpy().tolist()


# ----- parameters and modules -----


class Tied(Module):
    """Two layers of one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.backend = FAST
        self.first = Linear(2, 2, False, FAST)
        self.second = Linear(2, 2, False, FAST)
        self.second.weights = self.first.weights
        self.again = self.first
        self.scale = Parameter(Scalar(2.0), "scale")
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x))  # type: ignore[no-any-return]


@every_copy
def test_a_module(make: Any) -> None:
    model = Tied()
    other = make(model)
    values = [m.first.weights.value for m in (model, other)]
    assert values[0].unique_id != values[1].unique_id
    assert other.scale.value.unique_id != model.scale.value.unique_id
    assert other.second.weights is other.first.weights and other.again is other.first
    assert len(other.parameters()) == len(model.parameters()) == 2
    assert not other.training and other.backend.ops is FAST.ops

    x = minitorch.ones((1, 2), FAST)
    model(x).sum().backward()
    assert values[0].grad is not None and values[1].grad is None
    other.first.weights.update(minitorch.zeros((2, 2), FAST))
    other.first.extra = Parameter(Scalar(1.0))
    assert np.any(model(x).to_numpy()) and len(model.parameters()) == 2


@every_copy
def test_a_parameter(make: Any) -> None:
    parameter = Parameter(minitorch.tensor([1.0], FAST), "w")
    other = make(parameter)
    assert other.name == other.value.name == "w" and other.value.requires_grad()
    assert other.value.unique_id != parameter.value.unique_id


@pytest.mark.parametrize("make", [copy.deepcopy, by_pickle])
def test_a_model_and_its_optimiser(make: Any) -> None:
    """A copy of both goes on as they do, and leaves them alone."""

    def step(model: Module, optimizer: AdamW, scaler: Any, schedule: Any) -> list[float]:
        optimizer.zero_grad()
        x = minitorch.tensor([[1.0, -2.0]], FAST, requires_grad=False)
        scaler.scale((model(x) * model(x)).sum()).backward()
        scaler.step(optimizer)
        scaler.update()
        schedule.step()
        weights: list[float] = model.parameters()[1].value.to_numpy().ravel().tolist()
        return weights

    model = Tied()
    optimizer = AdamW(model.parameters(), lr=0.1)
    whole = (model, optimizer, minitorch.GradScaler(), minitorch.CosineSchedule(optimizer, 9))
    step(*whole)
    other = make(whole)
    assert other[1].parameters[0] is other[0].parameters()[0]
    assert other[3].optimizer is other[1]
    assert step(*other) == step(*whole)
    assert step(*other) != model.parameters()[1].value.to_numpy().ravel().tolist()


def work(model: Tied) -> tuple[Tensor, int]:
    """In another process: the output, and how many backends of FastOps the model has there."""
    backends = {id(p.value.backend) for p in model.parameters() if isinstance(p.value, Tensor)}
    return model(minitorch.ones((1, 2), model.backend)), len(backends | {id(model.backend)})


def test_a_worker_of_a_pool() -> None:
    model = Tied()
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        (out, backends) = pool.map(work, [model])[0]
    expected = model(minitorch.ones((1, 2), FAST))
    np.testing.assert_array_equal(out.to_numpy(), expected.to_numpy())
    assert backends == 1 and out.backend.ops is FAST.ops and out.is_leaf()
