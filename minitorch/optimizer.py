"""What all optimisers share: parameter groups, what is kept for each parameter, saving it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from numbers import Real
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from .autodiff import no_grad
from .checkpoint import some
from .factories import tensor
from .module import Parameter
from .scalar import Scalar
from .tensor import Tensor
from .tensor_data import TensorData

Array = npt.NDArray[Any]

# Parameters, or PyTorch's parameter groups: {"params": [...], "weight_decay": 0.0}.
Parameters: TypeAlias = Iterable[Parameter | Mapping[str, Any]]


def check_range(name: str, value: float, low: float, high: float = math.inf) -> None:
    """Check that a number is in a range.

    Raises:
        TypeError: it is no number; `name` is named.
        ValueError: not low <= value < high.

    """
    if not isinstance(value, Real):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")
    if not low <= value < high:
        wanted = f"at least {low:g}" if high == math.inf else f"in [{low:g}, {high:g})"
        if value == math.inf:
            wanted += " and finite"
        raise ValueError(f"{name} must be {wanted}, got {value}")


def gradient_of(parameter: Parameter) -> Any:
    """The gradient of a Tensor, the derivative of a Scalar, None if there is neither."""
    value = parameter.value
    return value.derivative if isinstance(value, Scalar) else getattr(value, "grad", None)


def check_gradient(number: int, value: Tensor) -> None:
    """Check the gradient of a parameter, which is not None, against its value.

    Raises:
        TypeError: it is no Tensor; parameter `number` is named.
        ValueError: its shape is not that of the value, or one of the two is on the GPU alone.

    """
    grad = value.grad
    if not isinstance(grad, Tensor):
        raise TypeError(f"grad of {_called(number, value)} must be a Tensor, got {_type(grad)}")
    if grad.shape != value.shape:
        raise ValueError(
            f"grad of {_called(number, value)} must have its shape {value.shape}, got {grad.shape}"
        )
    if grad._tensor.on_device != value._tensor.on_device:
        here, there = ("GPU", "CPU") if value._tensor.on_device else ("CPU", "GPU")
        raise ValueError(
            f"grad of {_called(number, value)} must be on the {here}, got one on the {there}"
        )


def _type(x: Any) -> str:
    return type(x).__name__


def _called(number: int, value: Tensor) -> str:
    return f"parameter {number} ({value.name})"


# ----- parameter groups -----

_LOWEST = dict.fromkeys(("lr", "momentum", "weight_decay", "eps"), 0.0)


def _check_option(name: str, value: Any) -> None:
    """Raise TypeError or ValueError unless an option of a group can have this value."""
    if name == "betas":
        if not isinstance(value, tuple | list) or len(value) != 2:
            raise ValueError(f"betas must be a pair of numbers, got {value!r}")
        for number, beta in enumerate(value, 1):
            check_range(f"beta{number}", beta, 0.0, 1.0)
    elif name in _LOWEST:
        check_range(name, value, _LOWEST[name])


class ParamGroup(dict[str, Any]):
    """Parameters that share their options: "params", a list that stays as it is, and the options by
    name, which may be changed between steps.

    Raises:
        ValueError: an option outside its range, or "params" set anew.

    """

    on_lr: Callable[[], None] | None = None  # called when the learning rate has been set

    def __setitem__(self, name: str, value: Any) -> None:
        if name == "params" and name in self:
            raise ValueError("the params of a group stay as they are: make another optimiser")
        _check_option(name, value)
        super().__setitem__(name, value)
        if name == "lr" and self.on_lr is not None:
            self.on_lr()

    def update(self, *args: Any, **options: Any) -> None:
        """As of a dict; each value is checked."""
        for name, value in dict(*args, **options).items():
            self[name] = value


def _members(name: str, given: Any) -> list[Any]:
    """What an optimiser, or a group, was given, as a list.

    Raises:
        TypeError: it is a module, its method `parameters` that was not called, or no iterable.

    """
    if callable(given) or not isinstance(given, Iterable):
        what = getattr(given, "__name__", _type(given))
        called = ": write model.parameters()" if callable(given) else ""
        raise TypeError(f"{name} must be a list of Parameters, got {what}{called}")
    return list(given)


def _make_groups(parameters: Any, options: Mapping[str, Any]) -> list[ParamGroup]:
    """The groups that an optimiser was given, each with all options."""
    if isinstance(parameters, Parameter | Tensor | Scalar | Mapping | str):
        raise TypeError(
            f"parameters must be a list of Parameters or of groups, got one {_type(parameters)}"
        )
    given = _members("parameters", parameters)
    grouped = [isinstance(item, Mapping) for item in given]
    if not any(grouped):
        given = [{"params": given}]
    elif not all(grouped):
        raise TypeError("parameters must be Parameters or groups (dicts), got both")
    groups, seen = [], set[int]()
    for number, group in enumerate(given):
        unknown = [name for name in group if name not in ("params", *options)]
        if "params" not in group or unknown:
            found = f"{unknown[0]!r}" if unknown else "no 'params'"
            known = ", ".join(("params", *options))
            raise ValueError(f"parameter group {number} has {found}; it may have {known}")
        members = group["params"]
        single = isinstance(members, Parameter)
        members = [members] if single else _members(f"params of group {number}", members)
        for member in members:
            if not isinstance(member, Parameter):
                raise TypeError(f"parameters must be Parameters, got {_type(member)}")
            if id(member) in seen:
                raise ValueError(f"a parameter is given twice, again in group {number}")
            seen.add(id(member))
        made = ParamGroup()
        made.update({**options, **group, "params": members})
        groups.append(made)
    return groups


class Optimizer:
    """What all optimisers share: their parameters, what they keep for each of them, and saving it.

    Subclasses name what they keep in `_slots` and compute one parameter's new value in `_update`.
    Parameters without a gradient are passed over. Scalars are stepped too.

    Args:
        parameters: Parameters to optimise, each once; or PyTorch's parameter groups, dicts with
            "params" and the options in which a group differs from the arguments below:
            `[{"params": weights}, {"params": biases, "weight_decay": 0.0}]`.
        lr: the learning rate, which may be changed between steps.
        options: the other options of the kind of optimiser, by name.

    Attributes:
        param_groups: the groups, one if none was given. Their options may be changed between steps.
        parameters: those of all groups, in order.

    Raises:
        TypeError: something else than Parameters or groups, or an option that is no number.
        ValueError: an option outside its range or unknown, or a parameter given twice.

    """

    def __init__(self, parameters: Parameters, lr: float, **options: Any) -> None:
        self.param_groups = _make_groups(parameters, {"lr": lr, **options})
        self.parameters: list[Parameter] = []
        self._group_numbers: list[int] = []  # of each parameter
        for number, group in enumerate(self.param_groups):
            self.parameters += group["params"]
            self._group_numbers += [number] * len(group["params"])
        self._kept: list[dict[str, Tensor]] = [{} for _ in self.parameters]
        self._steps = [0] * len(self.parameters)

    @property
    def lr(self) -> float:
        """The learning rate of the next step, of the first group; setting it sets that of all."""
        rate: float = self.param_groups[0]["lr"]
        return rate

    @lr.setter
    def lr(self, lr: float) -> None:
        check_range("lr", lr, 0.0)
        for group in self.param_groups:
            group["lr"] = lr

    def clip_grad_norm_(self, max_norm: float) -> float | Tensor:
        """`clip_grad_norm_` of this optimiser's parameters."""
        return clip_grad_norm_(self.parameters, max_norm)

    def zero_grad(self) -> None:
        """Forget the gradients of all parameters."""
        for parameter in self.parameters:
            parameter.zero_grad()

    def step(self) -> None:
        """Change each parameter that has a gradient.

        Raises:
            TypeError: a gradient that is no Tensor.
            ValueError: a gradient, or what is kept for a parameter, has not the parameter's shape.
                Nothing has been changed.

        """
        numbers = [n for n, p in enumerate(self.parameters) if gradient_of(p) is not None]
        for number in numbers:
            self._check_shapes(number)
        with no_grad():
            for number in numbers:
                self._steps[number] += 1
                self._step_one(number)

    def _check_shapes(self, number: int) -> None:
        value = self.parameters[number].value
        if not isinstance(value, Tensor):
            return
        check_gradient(number, value)
        for slot, kept in self._kept[number].items():
            if kept.shape != value.shape:
                raise ValueError(
                    f"{slot} of {_called(number, value)} must have its shape {value.shape}, "
                    f"got {kept.shape}"
                )

    def _step_one(self, number: int) -> None:
        parameter = self.parameters[number]
        group, value = self._group_of(number), parameter.value
        if isinstance(value, Scalar):
            pair = (tensor([x], dtype=np.float64) for x in (value.data, value.derivative))
            parameter.update(Scalar(self._update(number, group, *pair).item()))
        else:
            grad = value.grad.to(value.dtype)
            parameter.update(self._update(number, group, value.detach(), grad))

    def _update(self, number: int, group: ParamGroup, value: Tensor, grad: Tensor) -> Tensor:
        """The new value of parameter `number`, which must not share memory with `value`."""
        raise NotImplementedError(f"{type(self).__name__} defines no _update()")

    def _slots(self, group: ParamGroup) -> tuple[str, ...]:
        """Names of what is kept for each parameter of a group."""
        return ()

    def _group_of(self, number: int) -> ParamGroup:
        return self.param_groups[self._group_numbers[number]]

    def _slots_of(self, number: int, like: Tensor) -> dict[str, Tensor]:
        """What is kept for a parameter; zeros before its first step."""
        kept = self._kept[number]
        for slot in self._slots(self._group_of(number)):
            if slot not in kept:
                kept[slot] = like.zeros()
            elif kept[slot].backend is not like.backend:  # the parameter has been moved
                kept[slot] = kept[slot].to(like.backend)
            if kept[slot].dtype != like.dtype:
                kept[slot] = kept[slot].to(like.dtype)
        return kept

    # ----- saving and loading -----

    def state_dict(self) -> dict[str, Array]:
        """The learning rate (of each group, if there are several), the steps taken by each
        parameter, and all that is kept for it; parameters are numbered through all groups.

        With the parameters' own values, this is what a run needs to go on bit for bit.
        """
        rates = np.array([float(group["lr"]) for group in self.param_groups])
        state = {
            "lr": rates.reshape(()) if len(rates) == 1 else rates,
            "steps": np.array(self._steps, dtype=np.int64),
        }
        for slot, number in self._kept_names():
            state[f"{slot}.{number}"] = self._kept_array(slot, number)
        return state

    def _kept_names(self) -> list[tuple[str, int]]:
        """Names of what is kept, and the numbers of the parameters that it is kept for."""
        count = len(self.parameters)
        return [(slot, n) for n in range(count) for slot in self._slots(self._group_of(n))]

    def _kept_array(self, slot: str, number: int) -> Array:
        """A copy of what is kept for a parameter."""
        kept = self._kept[number]
        return kept[slot].to_numpy() if slot in kept else _zeros_like(self.parameters[number])

    def load_state_dict(self, state: Mapping[str, Array]) -> None:
        """Take back what `state_dict` gave, for the same parameters in the same order.

        Raises:
            ValueError: names, shapes or kinds of numbers differ, or a learning rate or a number of
                steps is none. The message lists all of them, and nothing has been changed.

        """
        arrays = {name: np.asarray(array) for name, array in state.items()}
        wanted = {name: array.shape for name, array in self.state_dict().items()}
        problems = _misfits(arrays, wanted)
        if problems:
            raise ValueError(
                f"state does not fit this {type(self).__name__}: {'; '.join(problems)}"
            )
        self._steps = [int(n) for n in arrays["steps"]]
        self._load_kept(arrays)
        for group, rate in zip(self.param_groups, arrays["lr"].reshape(-1), strict=True):
            group["lr"] = float(rate)

    def _load_kept(self, arrays: Mapping[str, Array]) -> None:
        """Take back what `state_dict` gave under the names of the slots."""
        kept: list[dict[str, Tensor]] = [{} for _ in self.parameters]
        for slot, number in self._kept_names():
            kept[number][slot] = _tensor_like(arrays[f"{slot}.{number}"], self.parameters[number])
        self._kept = kept


def _misfits(arrays: Mapping[str, Array], wanted: Mapping[str, tuple[int, ...]]) -> list[str]:
    """What is wrong with a state whose arrays should have these names and shapes."""
    missing = [name for name in wanted if name not in arrays]
    unexpected = [name for name in arrays if name not in wanted]
    problems = [f"missing: {some(missing)}"] if missing else []
    if unexpected:
        problems.append(f"unexpected: {some(unexpected)}")
    values = []
    for name, shape in wanted.items():
        array = arrays.get(name)
        if array is None:
            continue
        if array.shape != shape:
            values.append(f"{name} has shape {array.shape}, wanted {shape}")
        elif array.dtype.kind not in "fiu" and array.dtype.name != "bfloat16":
            values.append(f"{name} holds {array.dtype.name}, wanted real numbers")
        elif name == "lr" and not ((array >= 0) & np.isfinite(array)).all():
            values.append(f"lr is {array}, wanted at least 0 and finite")
        elif name == "steps" and not ((array >= 0) & (array % 1 == 0)).all():
            values.append(f"steps are {array}, wanted whole numbers from 0")
    return [*problems, some(values, "; ")] if values else problems


def _zeros_like(parameter: Parameter) -> Array:
    value = parameter.value
    if isinstance(value, Tensor):
        return np.zeros(value.shape, value.dtype)
    return np.zeros(1)  # a Scalar is stepped as a tensor of one element


def _tensor_like(array: Array, parameter: Parameter) -> Tensor:
    """A constant tensor from a copy of `array`, in the dtype and on the backend of a parameter."""
    value = parameter.value
    if not isinstance(value, Tensor):
        return tensor(array, requires_grad=False)
    return value._new(TensorData.from_array(np.array(array, value.dtype, order="C")))


# ----- clipping -----


def clip_grad_norm_(parameters: Iterable[Parameter], max_norm: float) -> float | Tensor:
    """Scale all gradients together so that their joint norm is at most `max_norm`.

    A gradient that is scaled is replaced, not written into. Formula as in PyTorch: scale =
    max_norm / (norm + 1e-6), if that is below 1. On the GPU nothing is read back.

    Args:
        parameters: those without a gradient are passed over.
        max_norm: the largest norm allowed.

    Returns:
        The joint norm before scaling; a Tensor of one element if gradients are on the GPU.

    Raises:
        ValueError: `max_norm` is negative.

    """
    check_range("max_norm", max_norm, 0.0)
    with_gradient = [p for p in parameters if gradient_of(p) is not None]
    tensors = [p.value for p in with_gradient if isinstance(p.value, Tensor)]
    if any(value.grad is not None and value.grad._tensor.on_device for value in tensors):
        with no_grad():
            return _clip_on_device(tensors, max_norm)
    squares = 0.0
    for parameter in with_gradient:
        array = np.asarray(gradient_of(parameter))
        squares += float(np.vdot(array, array))
    norm = math.sqrt(squares)
    scale = max_norm / (norm + 1e-6)
    if scale < 1:
        with no_grad():
            for parameter in with_gradient:
                attribute = "derivative" if isinstance(parameter.value, Scalar) else "grad"
                setattr(parameter.value, attribute, gradient_of(parameter) * scale)
    return norm


def _clip_on_device(values: Sequence[Tensor], max_norm: float) -> Tensor:
    found = [value.grad for value in values if value.grad is not None]
    gradients = [g.to(np.float32) if g.dtype.itemsize == 2 else g for g in found]
    norm = sum(((g * g).sum() for g in gradients[1:]), (gradients[0] * gradients[0]).sum()) ** 0.5
    scale = max_norm / (norm + 1e-6)
    scale = scale * (scale < 1.0) + (scale >= 1.0)
    for value in values:
        if value.grad is not None:
            value.grad = value.grad * scale.to(value.grad.dtype)
    return norm


__all__ = [
    "Optimizer",
    "ParamGroup",
    "Parameters",
    "check_gradient",
    "check_range",
    "clip_grad_norm_",
    "gradient_of",
]
