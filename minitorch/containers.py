"""`ModuleList` and `Sequential`: modules in a row, filed under "0", "1" and so on, as PyTorch's."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Self, SupportsIndex

from .module import Module


class _Row(Module):
    """What both share: the modules are those of `_modules`, in order, and numbered."""

    def _refile(self, modules: Iterable[Module]) -> None:
        """Let these be the modules, numbered anew."""
        numbered = {str(number): module for number, module in enumerate(modules)}
        self._modules.clear()
        self._modules.update(numbered)

    def _part(self, modules: dict[str, Module]) -> Self:
        """A container of some of the modules, under these names; all else is the same."""
        out = type(self).__new__(type(self))
        out.__dict__.update(self.__dict__, _modules=modules, _parameters={})
        return out

    def _checked(self, module: Any) -> Module:
        if isinstance(module, Module):
            return module
        name = module.__name__ if isinstance(module, type) else type(module).__name__
        what = f"the class {name}: make one, {name}(...)" if isinstance(module, type) else name
        raise TypeError(f"{type(self).__name__} holds modules, got {what}")

    def _position(self, index: Any) -> int:
        try:
            number = operator.index(index)
        except TypeError:
            raise TypeError(
                f"{type(self).__name__} is indexed by whole numbers and slices, "
                f"got {type(index).__name__}"
            ) from None
        if not -len(self) <= number < len(self):
            raise IndexError(f"index {number} is out of range for {len(self)} modules")
        return number % len(self)

    def __len__(self) -> int:
        return len(self._modules)

    def __iter__(self) -> Iterator[Any]:
        return iter(list(self._modules.values()))

    def __contains__(self, module: object) -> bool:
        return any(module is filed for filed in self)

    def __getitem__(self, index: SupportsIndex | slice) -> Any:
        """A module, or for a slice a container of the same modules."""
        if isinstance(index, slice):
            return self._part(dict(list(self._modules.items())[index]))
        return list(self)[self._position(index)]

    def __setitem__(self, index: SupportsIndex, module: Any) -> None:
        name = list(self._modules)[self._position(index)]
        self._modules[name] = self._checked(module)

    def __delitem__(self, index: SupportsIndex | slice) -> None:
        """The modules behind it move up."""
        modules = list(self)
        del modules[index if isinstance(index, slice) else self._position(index)]
        self._refile(modules)

    def __iadd__(self, modules: Iterable[Any]) -> Self:
        return self.extend(modules)

    def __add__(self, modules: Iterable[Any]) -> Self:
        out: Self = self[:]
        return out.extend(modules)

    def append(self, module: Any) -> Self:
        """Add a module at the end."""
        return self.extend([module])

    def extend(self, modules: Iterable[Any]) -> Self:
        """Add several at the end."""
        if not isinstance(modules, Iterable):
            raise TypeError(f"modules must be several modules, got {type(modules).__name__}")
        for module in [self._checked(module) for module in modules]:
            if str(len(self)) in self._modules:
                self._refile(self)
            self._modules[str(len(self))] = module
        return self

    def insert(self, index: SupportsIndex, module: Any) -> Self:
        """Add a module before that of number `index`, as for a list."""
        modules = list(self)
        modules.insert(index, self._checked(module))
        self._refile(modules)
        return self

    def pop(self, index: SupportsIndex = -1) -> Any:
        """Take a module out, and return it."""
        module = self[self._position(index)]
        del self[index]
        return module


class ModuleList(_Row):
    """A list whose modules are filed, so that their parameters are found: in a plain list they are
    not.

    Args:
        modules: the first of them.

    Raises:
        TypeError: one of them is no module.

    Example:
        >>> from minitorch import Linear, ModuleList
        >>> layers = ModuleList(Linear(2, 2, bias=False) for _ in range(2))
        >>> [name for name, _ in layers.named_parameters()]
        ['0.weights', '1.weights']
    """

    def __init__(self, modules: Iterable[Module] = ()) -> None:
        super().__init__()
        self.extend(modules)

    def _part(self, modules: dict[str, Module]) -> Self:
        out = super()._part(modules)
        out._refile(out)
        return out


class Sequential(_Row):
    """Modules applied one after the other.

    Args:
        modules: in order, or one mapping from names to modules. Functions of a tensor may stand
            between them, such as `minitorch.GELU` or `minitorch.ReLU.apply`.

    A slice keeps the modules' names.

    Raises:
        TypeError: one of them is neither.
        ValueError: a name that an attribute has, or with a dot.

    Example:
        >>> from minitorch import Linear, Sequential, rand
        >>> model = Sequential(Linear(2, 8), lambda x: x.relu(), Linear(8, 1))
        >>> model(rand((5, 2))).shape
        (5, 1)
    """

    def __init__(self, *modules: Any) -> None:
        super().__init__()
        if len(modules) == 1 and isinstance(modules[0], Mapping):
            for name, module in modules[0].items():
                self._modules[self._checked_name(name)] = self._checked(module)
        else:
            self.extend(modules)

    def _checked(self, module: Any) -> Module:
        if callable(module) and not isinstance(module, Module | type):
            return _Step(module)
        return super()._checked(module)

    def _checked_name(self, name: Any) -> str:
        if isinstance(name, str) and name and "." not in name and not hasattr(self, name):
            return name
        raise ValueError(f"a name of a module must be new and without a dot, got {name!r}")

    def forward(self, x: Any) -> Any:
        """What the last module gives; `x` itself if there is none."""
        for module in self:
            x = module(x)
        return x


class _Step(Module):
    """A function as a module of `Sequential`."""

    def __init__(self, function: Callable[[Any], Any]) -> None:
        super().__init__()
        self.forward = function

    def __repr__(self) -> str:
        return getattr(self.forward, "__qualname__", repr(self.forward))


__all__ = ["ModuleList", "Sequential"]
