"""Module and Parameter: how networks are put together, walked, saved and loaded."""

from __future__ import annotations

import copy
import difflib
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from .checkpoint import some
from .tensor_ops import TensorBackend

Array = npt.NDArray[Any]


class Parameter:
    """A value that training changes, filed by the Module that it is assigned to.

    Args:
        x: a Tensor, a Scalar, or anything else; told to require a gradient if it can.
        name: given to the value too, for messages.

    """

    def __init__(self, x: Any, name: str | None = None) -> None:
        self.name = name
        self.update(x)

    def update(self, x: Any) -> None:
        """Replace the value. Nobody who holds the old one sees a change, nor does a CUDA graph
        that has been captured; `load` sets the value for one, too.
        """
        self.value = x
        if hasattr(x, "requires_grad_"):
            x.requires_grad_(True)
            if self.name:
                x.name = self.name

    def load(self, array: Array) -> None:
        """Set the value to that of an array of its shape, and forget the gradient.

        The value is replaced; in place if it is optimised inside CUDA graphs
        (`AdamW(capturable=True)`), which hold its address.
        """
        slot = getattr(getattr(self.value, "_tensor", None), "slot", None)
        if slot is None:
            self.update(_from_array(array, self.value))
        else:
            slot.load(array)

    def zero_grad(self) -> None:
        """Forget the gradient of a Tensor or the derivative of a Scalar."""
        for attribute in ("grad", "derivative"):
            if getattr(self.value, attribute, None) is not None:
                setattr(self.value, attribute, None)

    def __copy__(self) -> Self:
        """A parameter whose value is another variable, with the same elements."""
        out = type(self).__new__(type(self))
        out.__dict__.update(self.__dict__, value=copy.copy(self.value))
        return out

    def __repr__(self) -> str:
        return repr(self.value)

    def __str__(self) -> str:
        return str(self.value)


CONTAINERS = (list, tuple, set, dict)
MOST_MEMBERS = 1000  # that are looked at: a list of layers is short, one of data is not


def _members(container: Any, depth: int = 4) -> Iterator[Any]:
    """All that a container holds, and containers in it, some levels deep."""
    for member in container.values() if isinstance(container, dict) else container:
        yield member
        if depth and isinstance(member, CONTAINERS):
            yield from _members(member, depth - 1)


def _no_forward(self: Module, *args: Any, **kwargs: Any) -> Any:
    raise NotImplementedError(f"{type(self).__name__} defines no forward()")


class Module:
    """A tree of modules with parameters at its nodes.

    Assigning a Parameter or a Module to an attribute files it; subclasses define `forward`. For a
    list of modules there is `ModuleList`: in a plain list they are not filed, which is an error.

    Attributes:
        training: whether the module trains (dropout acts) or is evaluated.

    """

    _modules: dict[str, Module]
    _parameters: dict[str, Parameter]
    training: bool

    # Annotated as a plain callable, so that subclasses may choose their own arguments.
    forward: Callable[..., Any] = _no_forward

    def __init__(self) -> None:
        self.__dict__["_modules"] = {}
        self.__dict__["_parameters"] = {}
        self.training = True

    # ----- the tree -----

    def modules(self) -> Sequence[Module]:
        """The modules filed directly in this one."""
        return list(self._modules.values())

    def train(self) -> None:
        """Set this module and all below it to training."""
        self._set_training(True)

    def eval(self) -> None:
        """Set this module and all below it to evaluation."""
        self._set_training(False)

    def _set_training(self, training: bool) -> None:
        self.training = training
        for module in self._modules.values():
            module._set_training(training)

    def named_parameters(self) -> Sequence[tuple[str, Parameter]]:
        """Every parameter of this module and those below, with its dotted name.

        A parameter filed in two places is listed once, under the first name.
        """
        seen: dict[int, tuple[str, Parameter]] = {}
        for name, parameter in self._walk(""):
            seen.setdefault(id(parameter), (name, parameter))
        return list(seen.values())

    def _walk(self, prefix: str) -> Iterator[tuple[str, Parameter]]:
        for name, value in self.__dict__.items():
            if isinstance(value, CONTAINERS) and name not in ("_parameters", "_modules"):
                self._check_filed(name, value)  # a list may have grown since
        for name, parameter in self._parameters.items():
            yield prefix + name, parameter
        for name, module in self._modules.items():
            yield from module._walk(f"{prefix}{name}.")

    def parameters(self) -> Sequence[Parameter]:
        """Every parameter of this module and those below, once."""
        return [parameter for _, parameter in self.named_parameters()]

    def add_parameter(self, k: str, v: Any) -> Parameter:
        """File a new parameter under a name that need not be a Python identifier.

        Args:
            k: its name.
            v: its value.

        """
        parameter = Parameter(v, k)
        self._parameters[k] = parameter
        return parameter

    def zero_grad(self) -> None:
        """Forget the gradients of all parameters."""
        for parameter in self.parameters():
            parameter.zero_grad()

    def to(self, target: TensorBackend | npt.DTypeLike) -> Self:
        """Move every parameter of this module and those below to another backend or dtype.

        Parameters get new values: an optimiser made before keeps working, a graph or a variable
        that holds an old value does not see the change. Gradients are forgotten.

        Args:
            target: as for `Tensor.to`. After a backend, modules that remember one
                (`self.backend`) remember this one.

        Returns:
            This module.

        """
        for parameter in self.parameters():
            if hasattr(parameter.value, "to"):
                parameter.update(parameter.value.detach().to(target))
        if isinstance(target, TensorBackend):
            self._set_backend(target)
        return self

    def _set_backend(self, backend: TensorBackend) -> None:
        if isinstance(self.__dict__.get("backend"), TensorBackend):
            self.backend = backend
        for module in self._modules.values():
            module._set_backend(backend)

    # ----- attributes -----

    def __setattr__(self, key: str, val: Any) -> None:
        if "_parameters" not in self.__dict__:
            raise AttributeError(
                f"call super().__init__() before setting {type(self).__name__}.{key}"
            )
        place: dict[str, Any] = self.__dict__
        if isinstance(val, CONTAINERS):
            self._check_filed(key, val)
        if isinstance(val, Parameter):
            place = self._parameters
        elif isinstance(val, Module):
            place = self._modules
        for other in (self._parameters, self._modules, self.__dict__):
            if other is not place:  # a name stands for one thing
                other.pop(key, None)
        place[key] = val

    def _check_filed(self, key: str, container: Any) -> None:
        """Raise TypeError if a list, a tuple, a set or a dict holds modules or parameters that are
        not filed: nobody would train, save or move them.
        """
        members = islice(_members(container), MOST_MEMBERS)
        suspects = [x for x in members if isinstance(x, Module | Parameter)]
        filed = {id(x) for x in self._below()} if suspects else set()
        for found in suspects:
            if id(found) not in filed:
                what, use = "parameters", "file each by add_parameter()"
                if isinstance(found, Module):
                    what, use = "modules", "use minitorch.ModuleList"
                raise TypeError(
                    f"{type(self).__name__}.{key} is a {type(container).__name__} of {what}, which "
                    f"would not be trained or saved: {use}"
                )

    def _below(self) -> Iterator[Module | Parameter]:
        """All that is filed in this module and those below."""
        yield from self._parameters.values()
        for module in self._modules.values():
            yield module
            yield from module._below()

    def __getattr__(self, key: str) -> Any:
        """A filed parameter or module."""
        for place in ("_parameters", "_modules"):
            filed = self.__dict__.get(place, {})
            if key in filed:
                return filed[key]
        hint = ""
        if not key.startswith("_"):
            names = {*self._parameters, *self._modules, *self.__dict__, *dir(type(self))}
            close = difflib.get_close_matches(key, names - {key}, 1)
            hint = f": did you mean {close[0]}?" if close else ""
        raise AttributeError(f"{type(self).__name__} has no attribute {key}{hint}")

    def __delattr__(self, key: str) -> None:
        for place in (self._parameters, self._modules):
            if key in place:
                del place[key]
                return
        super().__delattr__(key)

    def __copy__(self) -> Self:
        """A module with parameters and modules of its own, which share their elements with these;
        what is shared within the module stays so. All other attributes are the same objects.
        """
        return self._copied({})

    def _copied(self, made: dict[int, Any]) -> Self:
        if id(self) in made:
            found: Self = made[id(self)]
            return found
        out = made[id(self)] = type(self).__new__(type(self))
        parameters = {
            name: made.setdefault(id(parameter), copy.copy(parameter))
            for name, parameter in self._parameters.items()
        }
        modules = {name: module._copied(made) for name, module in self._modules.items()}
        out.__dict__.update(self.__dict__, _parameters=parameters, _modules=modules)
        return out

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.forward(*args, **kwargs)

    def __repr__(self) -> str:
        lines = [
            f"  ({name}): " + repr(module).replace("\n", "\n  ")
            for name, module in self._modules.items()
        ]
        body = "\n" + "\n".join(lines) + "\n" if lines else ""
        return f"{type(self).__name__}({body})"

    # ----- saving and loading -----

    def state_dict(self) -> dict[str, Array]:
        """A copy of every parameter's value, by dotted name.

        A parameter filed in two places appears under both names.
        """
        return {name: _to_array(parameter.value) for name, parameter in self._walk("")}

    def load_state_dict(self, state: Mapping[str, Array], strict: bool = True) -> None:
        """Set the parameters to values that `state_dict` gave. Each keeps its dtype and backend.

        Args:
            state: arrays by dotted name.
            strict: if False, names that are missing or not known are passed over.

        Raises:
            ValueError: names are missing or not known (if strict), or shapes differ. The message
                lists the first of each, and nothing has been changed.

        """
        parameters = dict(self._walk(""))
        problems = []
        missing = [name for name in parameters if name not in state]
        unexpected = [name for name in state if name not in parameters]
        if strict and missing:
            problems.append(f"missing: {some(missing)}")
        if strict and unexpected:
            problems.append(f"unexpected: {some(unexpected)}")
        arrays = {name: np.asarray(state[name]) for name in parameters if name in state}
        wanted = {name: getattr(parameters[name].value, "shape", ()) for name in arrays}
        shapes = [
            f"{name} has shape {array.shape}, wanted {wanted[name]}"
            for name, array in arrays.items()
            if array.shape != wanted[name]
        ]
        if shapes:
            problems.append(some(shapes, "; "))
        if problems:
            raise ValueError(f"state does not fit {type(self).__name__}: {'; '.join(problems)}")
        for name, array in arrays.items():
            parameters[name].load(array)


def _to_array(value: Any) -> Array:
    """A copy of a parameter's value: a Tensor, a Scalar or a number."""
    if hasattr(value, "to_numpy"):
        return np.array(value.to_numpy())
    return np.array(getattr(value, "data", value), dtype=np.float64)


def _from_array(array: Array, like: Any) -> Any:
    """A value of the same kind, dtype and backend as `like`, from a copy of `array`."""
    if hasattr(like, "to_numpy"):
        return like._from_numpy(np.array(array, dtype=like.dtype, order="C"))
    return type(like)(array.item())
