"""GradScaler on the CPU: beside PyTorch's, and what it refuses."""

from typing import Any

import numpy as np
import pytest

from minitorch import SGD, AdamW, GradScaler, Parameter, tensor

# A gradient that is infinite in some steps.
GRADIENTS = [1.0, np.inf, 2.0, -3.0, np.nan, 0.5, 4.0, 1.0]


def ours(settings: dict[str, Any], clip: bool) -> tuple[list[float], list[float]]:
    parameter = Parameter(tensor([1.0, -2.0], dtype=np.float64))
    optimizer, scaler = SGD([parameter], lr=0.1), GradScaler(**settings)
    values, scales = [], []
    for gradient in GRADIENTS:
        optimizer.zero_grad()
        loss = (parameter.value * tensor([gradient, 1.0], dtype=np.float64)).sum()
        scaler.scale(loss).backward()
        if clip:
            scaler.unscale_(optimizer)
            optimizer.clip_grad_norm_(1.5)
        scaler.step(optimizer)
        scaler.update()
        values.append(parameter.value[0])
        scales.append(scaler.get_scale())
    return values, scales


def torchs(settings: dict[str, Any], clip: bool) -> tuple[list[float], list[float]]:
    torch = pytest.importorskip("torch")
    parameter = torch.nn.Parameter(torch.tensor([1.0, -2.0], dtype=torch.float64))
    optimizer = torch.optim.SGD([parameter], lr=0.1)
    scaler = torch.amp.GradScaler("cpu", **settings)
    values, scales = [], []
    for gradient in GRADIENTS:
        optimizer.zero_grad()
        loss = (parameter * torch.tensor([gradient, 1.0], dtype=torch.float64)).sum()
        scaler.scale(loss).backward()
        if clip:
            scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_([parameter], 1.5)
        scaler.step(optimizer)
        scaler.update()
        values.append(parameter[0].item())
        scales.append(scaler.get_scale())
    return values, scales


@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"init_scale": 8.0, "growth_interval": 2},
        {"init_scale": 4.0, "growth_factor": 3.0, "backoff_factor": 0.25, "growth_interval": 1},
        {"enabled": False},
    ],
)
def test_like_pytorch(settings: dict[str, Any], clip: bool) -> None:
    if settings.get("enabled") is False:
        pytest.importorskip("torch")
    np.testing.assert_allclose(ours(settings, clip), torchs(settings, clip), rtol=1e-7)


def test_state_comes_back() -> None:
    first = GradScaler(init_scale=4.0, growth_interval=3)
    first.update()
    second = GradScaler(growth_interval=3)
    second.load_state_dict(first.state_dict())
    for _ in range(2):
        second.update()
    assert second.get_scale() == 8.0
    with pytest.raises(ValueError, match="growth_tracker"):
        second.load_state_dict({"scale": np.array(1.0)})
    off = GradScaler(enabled=False)
    assert off.state_dict() == {} and off.get_scale() == 1.0 and not off.is_enabled()


def test_unscaling_twice() -> None:
    parameter = Parameter(tensor([1.0]))
    optimizer, scaler = SGD([parameter]), GradScaler()
    scaler.scale(parameter.value.sum()).backward()
    scaler.unscale_(optimizer)
    with pytest.raises(RuntimeError, match="already"):
        scaler.unscale_(optimizer)


@pytest.mark.parametrize(
    "settings",
    [{"init_scale": 0.0}, {"growth_factor": 1.0}, {"backoff_factor": 1.0}, {"growth_interval": 0}],
)
def test_arguments_out_of_range(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="got"):
        GradScaler(**settings)


def test_capturable_needs_the_gpu() -> None:
    with pytest.raises(ValueError, match="on the GPU"):
        AdamW([Parameter(tensor([1.0]))], capturable=True)
    with pytest.raises(ValueError, match="at least one parameter"):
        AdamW([], capturable=True)


def test_states_that_a_scaler_cannot_have() -> None:
    scaler = GradScaler(init_scale=8.0)
    good = scaler.state_dict()
    for name, value in (
        ("scale", 0.0), ("scale", -1.0), ("scale", np.nan), ("scale", np.inf), ("scale", [1.0]*2),
        ("growth_tracker", -1), ("growth_tracker", 1.5), ("growth_tracker", "3"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=name):
            scaler.load_state_dict(good | {name: np.array(value)})
    assert scaler.get_scale() == 8.0
    for name in ("init_scale", "growth_factor"):
        settings: dict[str, Any] = {name: np.inf}
        with pytest.raises(ValueError, match=f"{name} .* finite"):
            GradScaler(**settings)
