"""Training on the GPU beside the CPU: AdamW in place, clipping, loss scaling, whole steps, graphs."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

import minitorch
from minitorch import AdamW, CudaKernelOps, FastOps, GradScaler, Parameter, TensorBackend
from minitorch.cuda_graph import Graph
from minitorch.kernels import runtime

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
@pytest.mark.races
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


def test_the_norm_is_that_of_the_gradients() -> None:
    for max_norm in (0.5, 100.0):
        norms = []
        for backend, capturable in ((CPU, False), (GPU, False), (GPU, True)):
            optimizer = AdamW(parameters(backend, "float32"), capturable=capturable)
            give_gradients(optimizer.parameters, 0)
            norms.append(float(optimizer.clip_grad_norm_(max_norm)))
        np.testing.assert_allclose(norms, norms[0], rtol=1e-6)


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
        assert parameter.value.grad is parameter.value.grad_buffer
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


@pytest.mark.races
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
