"""Training on the GPU beside the CPU: AdamW, clipping, loss scaling, graphs, whole runs."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

import minitorch
from minitorch import (
    AdamW,
    CudaKernelOps,
    FastOps,
    GradScaler,
    Parameter,
    TensorBackend,
)
from minitorch.cuda.graph import Graph
from minitorch.kernels.gpu import runtime
from project.transformer import cli, data, training
from project.transformer.errors import UserError
from project.transformer.options import RunOptions
from project.transformer.run_files import RunFolder

Array = npt.NDArray[Any]
CPU, GPU = TensorBackend(FastOps), TensorBackend(CudaKernelOps)
SHAPES = ((3, 5), (7,), (70,))  # none a multiple of a vector, one longer than an alignment


def parameters(backend: TensorBackend, dtype: Any) -> list[Parameter]:
    rng = np.random.default_rng(0)
    return [
        Parameter(minitorch.tensor(rng.normal(size=shape).astype(dtype), backend), f"p{i}")
        for i, shape in enumerate(SHAPES)
    ]


def give_gradients(made: list[Parameter], step: int, factor: float = 1.0) -> None:
    rng = np.random.default_rng(100 + step)
    for parameter in made:
        value = parameter.value
        array = (factor * rng.normal(size=value.shape)).astype(value.dtype)
        value.grad = minitorch.tensor(array, value.backend, requires_grad=False)


def values(made: list[Parameter]) -> list[Array]:
    return [parameter.value.to_numpy() for parameter in made]


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("capturable", [False, True])
def test_adamw_like_on_the_cpu(dtype: str, capturable: bool) -> None:
    ours, expected = parameters(GPU, dtype), parameters(CPU, dtype)
    gpu = AdamW(ours, lr=0.1, weight_decay=0.2, capturable=capturable)
    cpu = AdamW(expected, lr=0.1, weight_decay=0.2)
    for step in range(3):
        gpu.lr = cpu.lr = 0.1 / (step + 1)
        for optimizer in (gpu, cpu):
            give_gradients(optimizer.parameters, step)
            optimizer.clip_grad_norm_(4.0)
            optimizer.step()
    tolerance = 2e-6 if dtype == "float32" else 1e-13
    for a, b in zip(values(ours), values(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)
    saved, wanted = gpu.state_dict(), cpu.state_dict()
    assert saved.keys() == wanted.keys()
    for name, array in wanted.items():
        np.testing.assert_allclose(saved[name], array, rtol=1e-5, atol=1e-6, err_msg=name)


def test_parameter_groups_like_on_the_cpu() -> None:
    """The rates of both groups are changed between steps, and saved."""
    results = []
    for backend in (CPU, GPU):
        made = parameters(backend, "float64")
        groups: list[dict[str, Any]] = [
            {"params": made[:1]},
            {"params": made[1:], "weight_decay": 0.0, "betas": (0.5, 0.6), "lr": 0.03},
        ]
        optimizer = AdamW(groups, lr=0.1, weight_decay=0.3, capturable=backend.cuda)
        schedule = minitorch.CosineSchedule(optimizer, 4, 1)
        for step in range(3):
            give_gradients(made, step)
            optimizer.clip_grad_norm_(4.0)
            optimizer.step()
            schedule.step()
            optimizer.param_groups[0]["lr"] *= 0.9
        results.append(optimizer.state_dict() | dict(enumerate(values(made))))
    assert results[1]["lr"].shape == (2,)
    assert results[0].keys() == results[1].keys()
    for name, array in results[0].items():
        np.testing.assert_allclose(results[1][name], array, rtol=1e-12, atol=1e-14)


def test_gradients_and_values_of_another_shape() -> None:
    """The flat arrays have no room for them."""
    made = parameters(GPU, "float32")
    optimizer = AdamW(made, capturable=True)
    give_gradients(made, 0)
    before = values(made)
    for shape in ((8,), (1,)):
        made[1].value.grad = minitorch.tensor(np.ones(shape), GPU, requires_grad=False)
        with pytest.raises(ValueError, match=r"grad of parameter 1 \(p1\) must have its shape"):
            optimizer.step()
    for a, b in zip(values(made), before, strict=True):
        np.testing.assert_array_equal(a, b)
    made[1].update(minitorch.tensor(np.ones(71), GPU))
    with pytest.raises(ValueError, match=r"parameter 1 \(p1\) must keep its shape \(7,\)"):
        optimizer.step()


def test_the_norm_is_that_of_the_gradients() -> None:
    for max_norm in (0.5, 100.0):
        norms = []
        for backend, capturable in ((CPU, False), (GPU, False), (GPU, True)):
            optimizer = AdamW(parameters(backend, "float32"), capturable=capturable)
            give_gradients(optimizer.parameters, 0)
            norms.append(float(optimizer.clip_grad_norm_(max_norm)))
        np.testing.assert_allclose(norms, norms[0], rtol=1e-6)


@pytest.mark.parametrize("by", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_a_copied_capturable_run_goes_on_alone(by: Any) -> None:
    optimizer = AdamW(parameters(GPU, "float32"), lr=0.1, capturable=True)

    def step(optimizer: AdamW, number: int) -> list[Array]:
        give_gradients(optimizer.parameters, number)
        optimizer.step()
        return values(optimizer.parameters)

    before = step(optimizer, 0)
    other: AdamW = by(optimizer)
    ours = step(other, 1)
    for a, b in zip(values(optimizer.parameters), before, strict=True):
        np.testing.assert_array_equal(a, b)
    for a, b in zip(ours, step(optimizer, 1), strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_pickled_tensor_of_16_bits() -> None:
    x = minitorch.tensor([[1.5, -2.0]], GPU, dtype="bfloat16")
    y = pickle.loads(pickle.dumps(x))
    assert (
        y.backend.ops is CudaKernelOps
        and y.dtype == x.dtype
        and y.to_numpy().tolist() == [[1.5, -2.0]]
    )
    state = {**x.__getstate__(), "backend": CPU}  # as on a machine without a GPU
    y.__setstate__(state)
    assert y.dtype == np.float32 and y.numpy().tolist() == [[1.5, -2.0]]


def test_a_capturable_run_resumes() -> None:
    def run(optimizer: AdamW, first: int, last: int) -> list[Array]:
        for step in range(first, last):
            give_gradients(optimizer.parameters, step)
            optimizer.step()
        return values(optimizer.parameters)

    whole = run(AdamW(parameters(GPU, "float32"), capturable=True), 0, 4)
    first = AdamW(parameters(GPU, "float32"), capturable=True)
    run(first, 0, 2)
    second = AdamW(parameters(GPU, "float32"), lr=9.0, capturable=True)
    for new, old in zip(second.parameters, first.parameters, strict=True):
        new.update(minitorch.tensor(old.value.to_numpy(), GPU))
    second.load_state_dict(first.state_dict())
    assert second.state_dict()["steps"].tolist() == [2, 2, 2]
    for a, b in zip(run(second, 2, 4), whole, strict=True):
        np.testing.assert_array_equal(a, b)


def test_gradients_are_written_into_the_flat_array() -> None:
    made = parameters(GPU, "float32")
    optimizer = AdamW(made, capturable=True)
    for parameter in made:
        (parameter.value * 3.0).sum().backward()
        assert parameter.value.grad is parameter.value._tensor.slot.gradient
        (parameter.value * 2.0).sum().backward()  # accumulates
        assert (parameter.value.grad.to_numpy() == 5.0).all()
    optimizer.step()
    optimizer.zero_grad()
    give_gradients(made[:2], 0)
    with pytest.raises(ValueError, match=r"number 2 \(p2\) has no gradient"):
        optimizer.step()


def test_a_gradient_that_is_not_finite_skips_the_step() -> None:
    made = parameters(GPU, "float32")
    optimizer = AdamW(made, capturable=True)
    before = values(made)
    for bad in (np.inf, np.nan):
        give_gradients(made, 0)
        made[1].value.grad[3] = bad
        optimizer.clip_grad_norm_(1.0)
        optimizer.step()
    for a, b in zip(values(made), before, strict=True):
        np.testing.assert_array_equal(a, b)
    assert optimizer.state_dict()["steps"].tolist() == [0, 0, 0]


def test_loss_scaling_like_on_the_cpu() -> None:
    results, scales = [], []
    for backend in (CPU, GPU):
        made = parameters(backend, "float32")
        optimizer = AdamW(made, lr=0.1, capturable=backend.cuda)
        scaler = GradScaler(init_scale=8.0, growth_interval=2)
        for step in range(6):
            optimizer.zero_grad()
            factor = minitorch.tensor([np.inf if step in (1, 4) else 1.0], backend)
            loss = sum((p.value * p.value).sum() for p in made) * factor.detach()
            scaler.scale(loss).backward()
            if step % 2:
                scaler.unscale_(optimizer)
                optimizer.clip_grad_norm_(2.0)
            scaler.step(optimizer)
            scaler.update()
            scales.append(scaler.get_scale())
        results.append(values(made))
        scales.append(float(scaler.state_dict()["growth_tracker"]))
    assert scales[:7] == scales[7:]
    for a, b in zip(*results, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def test_the_scale_is_saved() -> None:
    first, second = GradScaler(init_scale=8.0), GradScaler()
    for scaler in (first, second):
        scaler.scale(minitorch.tensor([1.0], GPU))
    first.update()
    second.load_state_dict(first.state_dict())
    assert second.get_scale() == 8.0
    assert second.state_dict()["growth_tracker"] == 1


def test_scaling_needs_a_capturable_optimizer() -> None:
    made = parameters(GPU, "float32")
    give_gradients(made, 0)
    with pytest.raises(ValueError, match="capturable=True"):
        GradScaler().step(AdamW(made))


# ----- graphs -----


@pytest.mark.gpu
def test_a_graph_repeats_its_work() -> None:
    x = minitorch.tensor(np.arange(8.0, dtype=np.float32), GPU)
    (x * 2.0 + 1.0).to_numpy()  # compiles
    graph = Graph()
    with graph.capture():
        y = x * 2.0 + 1.0
    for factor in (1.0, 3.0):
        x._tensor._storage.copy_from_host(factor * np.arange(8.0, dtype=np.float32))
        graph.replay()
        np.testing.assert_array_equal(y.to_numpy(), 2 * factor * np.arange(8.0) + 1)
    with pytest.raises(RuntimeError, match="holds work already"), graph.capture():
        pass
    graph.close()


@pytest.mark.gpu
def test_a_capture_that_fails_leaves_the_gpu_usable() -> None:
    x = minitorch.tensor([1.0, 2.0], GPU)
    graph = Graph()
    with pytest.raises(Exception, match=r"CAPTURE|captur"), graph.capture():
        (x * 2.0).to_numpy()  # waits
    assert (x * 2.0).to_numpy().tolist() == [2.0, 4.0]


@pytest.mark.skipif(not runtime.SIMULATED, reason="there are graphs on a GPU")
def test_the_simulator_has_no_graphs() -> None:
    with pytest.raises(RuntimeError, match="the simulator has none"):
        Graph()


# ----- whole training steps -----

SENTENCE = "the theft that the other hater hated " if runtime.SIMULATED else "the quick brown fox "
SMALL: dict[str, Any] = (
    {"layers": 1, "d_model": 4, "heads": 2, "d_middle": 4, "context": 3, "batch": 1, "steps": 2}
    if runtime.SIMULATED
    else {"layers": 2, "d_model": 32, "heads": 2, "d_middle": 64, "context": 16, "steps": 12}
)


@pytest.fixture(autouse=True)
def restore_default_dtype() -> Iterator[None]:
    before = minitorch.get_default_dtype()
    yield
    minitorch.set_default_dtype(before)


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(SENTENCE * (4 if runtime.SIMULATED else 40), encoding="utf-8")
    return path


def trainer(text: Path, **changes: Any) -> training.Trainer:
    given = {**SMALL, "data": str(text), "device": "cuda", "warmup": 2, **changes}
    options = RunOptions().replaced(given)
    options.check()
    return training.Trainer(options, data.load(options.data, options.model.context))


def losses(made: training.Trainer) -> list[float]:
    return [made.train_step() for _ in range(made.options.training.steps)]


@pytest.mark.parametrize(
    "attention", ["flash", pytest.param("standard", marks=pytest.mark.thorough)]
)
def test_losses_are_those_of_the_cpu(text: Path, attention: str) -> None:
    """Each loss depends on all the steps before it."""
    gpu, cpu = trainer(text, attention=attention), trainer(text, attention=attention, device="cpu")
    np.testing.assert_allclose(losses(gpu), losses(cpu), rtol=1e-5)
    assert gpu.validation_loss() == pytest.approx(cpu.validation_loss(), rel=1e-4)


@pytest.mark.parametrize("precision", ["bf16", pytest.param("fp16", marks=pytest.mark.thorough)])
def test_sixteen_bits_follow_float32(text: Path, precision: str) -> None:
    made = trainer(text, precision=precision)
    wanted = losses(trainer(text, device="cpu"))
    np.testing.assert_allclose(losses(made), wanted, rtol=0.02 if precision == "bf16" else 0.004)
    parameters = made.model.parameters()
    assert {p.value.dtype.name for p in parameters} == {"float32"}
    assert {p.value.grad.dtype.name for p in parameters} == {"float32"}


def test_dropout_changes_from_step_to_step(text: Path) -> None:
    """The batch and the weights being the same; and it is the same in a second run."""
    seen = []
    for _ in range(2):
        made = trainer(text, dropout=0.5, lr=1e-30, weight_decay=0.0)
        shape = made.options.training.batch, made.options.model.context + 1
        seen += [made._taker.start(np.ones(shape, np.int64), step).value() for step in (0, 1)]
    assert seen[0] != seen[1]
    assert seen[:2] == seen[2:]


def test_a_loss_that_is_no_number_ends_the_run(text: Path) -> None:
    made = trainer(text)
    bias = made.model.lm_head.bias
    assert bias is not None
    bias.value[0] = np.nan
    before = made.model.state_dict()
    with pytest.raises(UserError, match="the loss is nan at step 1: try a smaller --lr"):
        made.train_step()
    for name, array in made.model.state_dict().items():
        np.testing.assert_array_equal(array, before[name])


def test_a_run_resumes_bit_for_bit(text: Path, tmp_path: Path) -> None:
    """With dropout, float16 and its loss scale."""
    pytest.importorskip("safetensors")
    changes: dict[str, Any] = {"dropout": 0.2, "precision": "fp16"}
    whole = trainer(text, **changes)
    expected = losses(whole)
    first = trainer(text, **changes)
    half = len(expected) // 2
    seen = [first.train_step() for _ in range(half)]
    folder = RunFolder(str(tmp_path / "run"))
    folder.save(first.snapshot())
    second = trainer(text, **changes)
    second.restore(folder.load())
    seen += [second.train_step() for _ in range(len(expected) - half)]
    assert seen == expected
    for name, array in second.model.state_dict().items():
        np.testing.assert_array_equal(array, whole.model.state_dict()[name])


def test_the_commands(text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for package in cli.PACKAGES:
        pytest.importorskip(package)
    values = {**SMALL, "steps": 2, "eval_every": 2, "data": text, "device": "cuda"}
    words = [word for k, v in values.items() for word in (f"--{k.replace('_', '-')}", str(v))]
    out = str(tmp_path / "run")
    if runtime.SIMULATED:
        made = trainer(text)  # its samples of 240 characters take too long there
        RunFolder(out).save(made.snapshot())
    else:
        assert cli.main(["train", "--out", out, "--precision", "bf16", *words]) == 0
        assert "computing in bfloat16, each step launched as one" in capsys.readouterr().out
    count = "3" if runtime.SIMULATED else "40"
    printed = []
    for device in ("cpu", "cuda"):
        command = ["sample", "--out", out, "--prompt", "the ", "--tokens", count]
        assert cli.main([*command, "--temperature", "0", "--device", device]) == 0
        printed.append(capsys.readouterr().out)
    assert printed[0] == printed[1] or not runtime.SIMULATED  # bf16 may choose another letter


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_a_graph_gives_the_same_numbers(text: Path, precision: str) -> None:
    """Bit for bit, with dropout."""
    runs = [
        trainer(text, precision=precision, dropout=0.1, graph=graph, steps=20)
        for graph in (True, False)
    ]
    assert losses(runs[0]) == losses(runs[1])
    for name, array in runs[0].model.state_dict().items():
        np.testing.assert_array_equal(array, runs[1].model.state_dict()[name])


def test_a_weight_used_twice_collects_both_gradients() -> None:
    """The first product may write into the flat array, the second must not overwrite it."""
    rng = np.random.default_rng(0)
    gradients = []
    for backend in (CPU, GPU):
        weight = Parameter(minitorch.tensor(rng.normal(size=(4, 4)).astype(np.float32), CPU))
        weight.update(minitorch.tensor(np.eye(4, dtype=np.float32), backend))
        if backend.cuda:
            AdamW([weight], capturable=True)
        layer = minitorch.Linear(4, 4, bias=False, backend=backend)
        layer.weights = weight
        x = minitorch.tensor(np.arange(8, dtype=np.float32).reshape(2, 4), backend)
        for _ in range(2):  # the second pass adds to the first
            layer(layer(x)).sum().backward()
        gradients.append(weight.value.grad.to_numpy())
    np.testing.assert_allclose(gradients[1], gradients[0], rtol=1e-6)


def test_a_state_is_loaded_in_place() -> None:
    """A captured graph, which holds the addresses, goes on with the loaded values."""
    layer = minitorch.Linear(4, 4, backend=GPU)
    optimizer = AdamW(layer.parameters(), capturable=True)
    assert optimizer.device_state is not None
    before = [parameter.value for parameter in layer.parameters()]
    state = {name: array + 1 for name, array in layer.state_dict().items()}
    (layer(minitorch.tensor(np.ones((2, 4)), GPU))).sum().backward()
    layer.load_state_dict(state)
    for number, (name, parameter) in enumerate(layer.named_parameters()):
        assert parameter.value is before[number]
        assert parameter.value.grad is None
        kept = optimizer.device_state.view(optimizer.device_state.values, number)
        np.testing.assert_array_equal(kept.to_numpy(), state[name])


def test_copies_in_sixteen_bits_follow_the_weights() -> None:
    layer = minitorch.Linear(4, 4, backend=GPU)
    optimizer = AdamW(layer.parameters(), lr=0.5, capturable=True)
    bias = layer.bias
    assert bias is not None
    x = minitorch.tensor(np.eye(4), GPU).to("bfloat16")
    for change in ("none", "by hand", "step", "loaded"):
        if change == "by hand":
            layer.weights.value[0, 0] = 3.0
        elif change == "step":
            optimizer.zero_grad()
            layer(x).to("float32").sum().backward()
            optimizer.step()
        elif change == "loaded":
            layer.load_state_dict({k: v + 1 for k, v in layer.state_dict().items()})
        wanted = layer.weights.value.to_numpy() + bias.value.to_numpy()
        np.testing.assert_allclose(layer(x).to_numpy().astype(float), wanted, rtol=0.02, atol=0.02)
