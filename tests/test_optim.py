"""Optimisers against PyTorch's and by hand; clipping, the schedule, resuming."""

import math
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from minitorch.factories import tensor
from minitorch.fast_ops import FastOps
from minitorch.module import Parameter
from minitorch.modules_basic import Linear
from minitorch.optim import SGD, Adam, AdamW, CosineSchedule, Optimizer, clip_grad_norm_
from minitorch.scalar import Scalar
from minitorch.tensor_ops import SimpleBackend, TensorBackend

Array = npt.NDArray[Any]
BACKENDS = {"simple": SimpleBackend, "fast": TensorBackend(FastOps)}
SHAPES = ((3, 4), (5,))

# (ours, PyTorch's class, its arguments)
OPTIMIZERS: dict[str, tuple[Any, str, dict[str, Any]]] = {
    "sgd": (lambda p: SGD(p, lr=0.1), "SGD", {"lr": 0.1}),
    "momentum": (
        lambda p: SGD(p, lr=0.1, momentum=0.9, weight_decay=0.01),
        "SGD",
        {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01},
    ),
    "nesterov": (
        lambda p: SGD(p, lr=0.1, momentum=0.8, nesterov=True),
        "SGD",
        {"lr": 0.1, "momentum": 0.8, "nesterov": True},
    ),
    "adam": (
        lambda p: Adam(p, lr=0.1, beta1=0.8, beta2=0.95, eps=1e-6),
        "Adam",
        {"lr": 0.1, "betas": (0.8, 0.95), "eps": 1e-6},
    ),
    "adam with decay": (
        lambda p: Adam(p, betas=(0.8, 0.95), weight_decay=0.1),
        "Adam",
        {"betas": (0.8, 0.95), "weight_decay": 0.1},
    ),
    "adamw": (lambda p: AdamW(p), "AdamW", {}),
    "adamw with decay": (
        lambda p: AdamW(p, lr=0.1, weight_decay=0.2),
        "AdamW",
        {"lr": 0.1, "weight_decay": 0.2},
    ),
}


def make_parameters(
    backend: TensorBackend = SimpleBackend, dtype: npt.DTypeLike = np.float64
) -> list[Parameter]:
    rng = np.random.default_rng(0)
    return [Parameter(tensor(rng.normal(size=s).astype(dtype), backend=backend)) for s in SHAPES]


def gradients_of(step: int) -> list[Array]:
    rng = np.random.default_rng(100 + step)
    return [rng.normal(size=shape) for shape in SHAPES]


def give_gradients(parameters: list[Parameter], step: int) -> None:
    for parameter, array in zip(parameters, gradients_of(step), strict=True):
        value = parameter.value
        value.grad = tensor(array.astype(value.dtype), value.backend, requires_grad=False)


def values(parameters: list[Parameter]) -> list[Array]:
    return [p.value.to_numpy() for p in parameters]


def run(optimizer: Optimizer, first: int, last: int) -> list[Array]:
    for step in range(first, last):
        give_gradients(optimizer.parameters, step)
        optimizer.step()
    return values(optimizer.parameters)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_like_pytorch(name: str, backend: str) -> None:
    torch = pytest.importorskip("torch")
    ours, class_name, arguments = OPTIMIZERS[name]
    parameters = make_parameters(BACKENDS[backend])
    theirs = [torch.nn.Parameter(torch.tensor(v)) for v in values(parameters)]
    reference = getattr(torch.optim, class_name)(theirs, **arguments)
    for step in range(5):
        for p, array in zip(theirs, gradients_of(step), strict=True):
            p.grad = torch.tensor(array)
        reference.step()
    for mine, p in zip(run(ours(parameters), 0, 5), theirs, strict=True):
        np.testing.assert_allclose(mine, p.detach().numpy(), rtol=1e-12, atol=1e-14)


# Options of the second group; the first has those of the optimiser.
GROUPS: dict[str, tuple[Any, str, dict[str, Any], dict[str, Any]]] = {
    "adamw": (AdamW, "AdamW", {"lr": 0.1, "weight_decay": 0.3}, {"weight_decay": 0.0}),
    "adam": (
        Adam,
        "Adam",
        {"lr": 0.1},
        {"lr": 0.01, "betas": (0.5, 0.7), "eps": 1e-3, "weight_decay": 0.1},
    ),
    "sgd": (SGD, "SGD", {"lr": 0.1}, {"momentum": 0.9, "nesterov": True, "weight_decay": 0.2}),
}


@pytest.mark.parametrize("name", GROUPS)
def test_parameter_groups_like_pytorch(name: str) -> None:
    """Options differ from group to group, and change between steps; a saved state goes on."""
    torch = pytest.importorskip("torch")
    ours, class_name, options, others = GROUPS[name]

    def make(parameters: list[Any], optimizer: Any) -> Any:
        first, second = parameters
        return optimizer([{"params": [first]}, {"params": second, **others}], **options)

    parameters = make_parameters(BACKENDS["fast"])
    theirs = [torch.nn.Parameter(torch.tensor(v)) for v in values(parameters)]
    mine, reference = make(parameters, ours), make(theirs, getattr(torch.optim, class_name))
    for step in range(6):
        if step == 2:  # a schedule that sets each group's rate
            for optimizer in (mine, reference):
                for group in optimizer.param_groups:
                    group["lr"] *= 0.5
        if step == 4:
            state, parameters = (
                mine.state_dict(),
                [Parameter(tensor(v)) for v in values(parameters)],
            )
            mine = make(parameters, ours)
            mine.load_state_dict(state)
        for p, array in zip(theirs, gradients_of(step), strict=True):
            p.grad = torch.tensor(array)
        reference.step()
        run(mine, step, step + 1)
    for a, b in zip(values(parameters), theirs, strict=True):
        np.testing.assert_allclose(a, b.detach().numpy(), rtol=1e-12, atol=1e-14)
    for a, b in zip(mine.param_groups, reference.param_groups, strict=True):
        assert a["lr"] == pytest.approx(b["lr"])


def test_a_schedule_keeps_the_ratio_of_the_groups() -> None:
    first, second = make_parameters()
    optimizer = SGD([{"params": [first]}, {"params": [second], "lr": 0.2}], lr=2.0)
    schedule = CosineSchedule(optimizer, total_steps=8, warmup_steps=2)
    for _ in range(8):
        rates = [group["lr"] for group in optimizer.param_groups]
        assert rates[1] == pytest.approx(rates[0] / 10) and rates[0] == schedule.lr
        schedule.step()
    optimizer.lr = 0.5
    assert [group["lr"] for group in optimizer.param_groups] == [0.5, 0.5]


def test_parameter_groups_that_make_no_sense() -> None:
    first, second = make_parameters()
    for groups, message in (
        ([{"params": [first]}, {"params": [first]}], "given twice"),
        ([first, first], "given twice"),
        ([{"params": [first], "weight_deacy": 0.0}], "weight_deacy"),
        ([{"lr": 0.1}], "params"),
        ([{"params": [first], "lr": math.nan}], "lr must be"),
        ([{"params": [first], "betas": 0.9}], "betas must be"),
        ([{"params": [first], "betas": (0.9, 1.0)}], "beta2 must be"),
    ):
        with pytest.raises(ValueError, match=message):
            AdamW(groups)
    for wrong in (first, first.value, [first, {"params": [second]}], [first.value], "ab"):
        with pytest.raises(TypeError, match="parameters must be"):
            AdamW(wrong)  # type: ignore[arg-type]
    model = Linear(2, 3)
    for wrong in (model, model.parameters, [{"params": model}], Linear):
        with pytest.raises(TypeError, match=r"must be .* got \w+: write model.parameters\(\)"):
            AdamW(wrong)  # type: ignore[arg-type]
    for wrong in (3, None, [{"params": 3}]):
        with pytest.raises(TypeError, match=r"must be a list of Parameters, got \w+$"):
            AdamW(wrong)  # type: ignore[arg-type]
    group = AdamW([first]).param_groups[0]
    for name, value in (("lr", -1.0), ("eps", math.inf), ("params", [second])):
        with pytest.raises(ValueError, match=name):
            group[name] = value
    with pytest.raises(TypeError, match="lr must be a number"):
        group.update(lr="0.1")
    assert group["lr"] == 1e-3 and group["params"] == [first]


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_and_moments_of_another_shape(name: str, backend: str) -> None:
    """Neither read beyond their ends nor broadcast; nothing has been changed by then."""
    for shape in ((3,), (1,), (5, 1), (6,)):
        parameters = make_parameters(BACKENDS[backend])
        optimizer = OPTIMIZERS[name][0](parameters)
        run(optimizer, 0, 1)
        state, before = optimizer.state_dict(), values(parameters)
        give_gradients(parameters, 1)
        parameters[1].value.grad = tensor(np.ones(shape), BACKENDS[backend])
        with pytest.raises(ValueError, match=r"grad of parameter 1 .* must have its shape \(5,\)"):
            optimizer.step()
        assert all(map(np.array_equal, values(parameters), before))
        for key, array in optimizer.state_dict().items():
            np.testing.assert_array_equal(array, state[key])
        parameters[1].value.grad = np.ones(5)
        with pytest.raises(TypeError, match=r"grad of parameter 1 .* must be a Tensor"):
            optimizer.step()
        parameters[1].update(tensor(np.ones(shape), BACKENDS[backend]))
        parameters[1].value.grad = tensor(np.ones(shape), BACKENDS[backend])
        if any(key.endswith(".1") for key in state):
            with pytest.raises(ValueError, match=r"(exp_avg|momentum) of parameter 1"):
                optimizer.step()


@pytest.mark.parametrize("backend", BACKENDS)
def test_float32_stays_float32(backend: str) -> None:
    for make, _, _ in OPTIMIZERS.values():
        exact = run(make(make_parameters()), 0, 5)
        single = run(make(make_parameters(BACKENDS[backend], np.float32)), 0, 5)
        for a, b in zip(single, exact, strict=True):
            assert a.dtype == np.float32
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_resumed_run_is_the_same_bit_for_bit(name: str) -> None:
    make = OPTIMIZERS[name][0]
    whole = run(make(make_parameters()), 0, 7)

    first = make(make_parameters())
    run(first, 0, 3)
    state = {key: array.copy() for key, array in first.state_dict().items()}
    weights = values(first.parameters)
    run(first, 3, 5)  # what was saved must not change with it

    second = make([Parameter(tensor(w)) for w in weights])
    second.lr = 123.0
    second.load_state_dict(state)
    for a, b in zip(run(second, 3, 7), whole, strict=True):
        assert np.array_equal(a, b)


def test_state_of_an_optimizer_that_has_not_stepped() -> None:
    fresh = Adam(make_parameters())
    restored = Adam(make_parameters())
    restored.load_state_dict(fresh.state_dict())
    for a, b in zip(run(restored, 0, 2), run(fresh, 0, 2), strict=True):
        assert np.array_equal(a, b)


def test_loading_a_state_that_does_not_fit() -> None:
    optimizer = Adam(make_parameters())
    state = optimizer.state_dict()
    state["exp_avg.0"] = np.zeros((2, 2))
    del state["lr"]
    state["momentum.0"] = np.zeros(1)
    with pytest.raises(ValueError) as error:
        optimizer.load_state_dict(state)
    for part in ("missing: lr", "unexpected: momentum.0", "exp_avg.0 has shape (2, 2)"):
        assert part in str(error.value)


@pytest.mark.parametrize(
    ("name", "array"),
    [
        ("lr", np.array(math.nan)),
        ("lr", np.array(-1.0)),
        ("steps", np.array([1.5, 1.0])),
        ("steps", np.array([1, -1])),
        ("exp_avg.1", np.array(["a"] * 5)),
        ("exp_avg.1", np.ones(5, complex)),
    ],
)
def test_loading_numbers_that_are_none(name: str, array: Array) -> None:
    optimizer = AdamW(make_parameters())
    state = optimizer.state_dict() | {name: array, "exp_avg.0": np.ones((3, 4))}
    with pytest.raises(ValueError, match=f"does not fit this AdamW: {name}"):
        optimizer.load_state_dict(state)
    assert not optimizer.state_dict()["exp_avg.0"].any()


def test_a_step_does_not_write_into_old_values() -> None:
    for make, _, _ in OPTIMIZERS.values():
        parameters = make_parameters()
        old = [p.value for p in parameters]
        before = values(parameters)
        run(make(parameters), 0, 2)
        for tensor_before, array in zip(old, before, strict=True):
            assert np.array_equal(tensor_before.to_numpy(), array)
        assert all(p.value.is_leaf() for p in parameters)


def test_parameters_of_any_strides() -> None:
    array = np.arange(12.0).reshape(4, 3)
    for make, _, _ in OPTIMIZERS.values():
        results = []
        for values_ in (tensor(array).permute(1, 0).detach(), tensor(array.T)):
            parameter = Parameter(values_)
            parameter.value.grad = tensor(array, requires_grad=False).permute(1, 0)
            make([parameter]).step()
            results.append(parameter.value.to_numpy())
        assert np.array_equal(*results)


def test_scalars_step_like_tensors() -> None:
    for make, _, _ in OPTIMIZERS.values():
        scalar, vector = Parameter(Scalar(2.0)), Parameter(tensor([2.0]))
        optimizer = make([scalar, vector])
        for derivative in (3.0, -1.0, 0.5):
            scalar.value.derivative = derivative
            vector.value.grad = tensor([derivative], requires_grad=False)
            optimizer.step()
            assert scalar.value.data == vector.value.item()
        assert optimizer.state_dict()["steps"].tolist() == [3, 3]


def test_parameters_without_a_gradient_stay() -> None:
    parameters = [*make_parameters(), Parameter(5)]
    before = values(parameters[:2])
    optimizer = AdamW(parameters)
    optimizer.step()
    assert all(map(np.array_equal, before, values(parameters[:2])))
    assert optimizer.state_dict()["steps"].tolist() == [0, 0, 0]


def test_default_learning_rate_of_sgd() -> None:
    parameter = Parameter(tensor([5.0]))
    (parameter.value * 2).sum().backward()
    SGD([parameter]).step()
    assert parameter.value.item() == 3.0


def test_zero_grad() -> None:
    parameters = [*make_parameters(), Parameter(Scalar(1.0)), Parameter(5)]
    give_gradients(parameters[:2], 0)
    parameters[2].value.derivative = 1.0
    SGD(parameters).zero_grad()
    assert parameters[0].value.grad is None and parameters[2].value.derivative is None


@pytest.mark.parametrize(
    "make",
    [
        lambda p: SGD(p, lr=-1.0),
        lambda p: SGD(p, momentum=-0.1),
        lambda p: SGD(p, nesterov=True),
        lambda p: Adam(p, beta1=1.0),
        lambda p: Adam(p, eps=math.nan),
        lambda p: AdamW(p, weight_decay=-1.0),
        lambda p: CosineSchedule(SGD(p), total_steps=3, warmup_steps=4),
        lambda p: clip_grad_norm_(p, -1.0),
    ],
)
def test_arguments_out_of_range(make: Any) -> None:
    with pytest.raises(ValueError, match="got"):
        make(make_parameters())


def test_an_optimizer_defines_its_update() -> None:
    optimizer = Optimizer(make_parameters(), 0.1)
    with pytest.raises(NotImplementedError, match="_update"):
        run(optimizer, 0, 1)


@pytest.mark.parametrize("max_norm", [0.5, 100.0])
def test_clipping(max_norm: float) -> None:
    parameters = [*make_parameters(), Parameter(Scalar(1.0)), Parameter(5)]
    give_gradients(parameters[:2], 0)
    parameters[2].value.derivative = 2.0
    before = [p.value.grad for p in parameters[:2]]
    arrays = [g.to_numpy() for g in before]
    expected = math.sqrt(sum((a**2).sum() for a in arrays) + 4.0)

    norm = clip_grad_norm_(parameters, max_norm)

    assert norm == pytest.approx(expected, rel=1e-12)
    scale = min(1.0, max_norm / (expected + 1e-6))
    for parameter, gradient, array in zip(parameters[:2], before, arrays, strict=True):
        assert np.array_equal(gradient.to_numpy(), array)
        np.testing.assert_allclose(parameter.value.grad.to_numpy(), array * scale, rtol=1e-12)
    assert parameters[2].value.derivative == pytest.approx(2.0 * scale)


def test_clipping_nothing() -> None:
    assert clip_grad_norm_([], 1.0) == 0.0


def test_cosine_schedule() -> None:
    optimizer = SGD(make_parameters(), lr=2.0)
    schedule = CosineSchedule(optimizer, total_steps=14, warmup_steps=4, min_lr=1.0)
    rates = []
    for _ in range(16):
        rates.append(optimizer.lr)
        schedule.step()
    assert rates[:5] == [0.5, 1.0, 1.5, 2.0, 2.0]
    assert rates[9] == pytest.approx(1.5)  # half way down
    assert rates[14:] == [1.0, 1.0]
    assert rates[4:15] == sorted(rates[4:15], reverse=True)


def test_cosine_schedule_like_pytorch() -> None:
    torch = pytest.importorskip("torch")
    ours = SGD(make_parameters(), lr=0.3)
    schedule = CosineSchedule(ours, total_steps=20, min_lr=0.1)
    theirs = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.3)
    reference = torch.optim.lr_scheduler.CosineAnnealingLR(theirs, 20, eta_min=0.1)
    for _ in range(20):
        assert ours.lr == pytest.approx(theirs.param_groups[0]["lr"], rel=1e-9)
        schedule.step()
        theirs.step()
        reference.step()


def test_a_schedule_resumes() -> None:
    first = CosineSchedule(SGD(make_parameters(), lr=1.0), 10, 2)
    for _ in range(6):
        first.step()
    optimizer = SGD(make_parameters(), lr=1.0)
    second = CosineSchedule(optimizer, 10, 2)
    second.load_state_dict(first.state_dict())
    assert optimizer.lr == first.lr == second.lr
    for wrong in ({"epoch": np.array(1)}, {"steps": np.array(-1)}, {"steps": np.array([1, 2])}):
        with pytest.raises(ValueError, match="steps"):
            second.load_state_dict(wrong)
    assert second.steps == 6
