"""Copies of variables: `copy.copy`, `copy.deepcopy` and pickle make other variables.

The engine tells variables apart by `unique_id`, so a copy gets one of its own, and a name of its
own if it had none but that number. What becomes of the rest is as in PyTorch:

    copy.copy       shares the elements, and is computed from the same inputs; no gradient yet
    copy.deepcopy   has elements and a gradient of its own; leaves and constants only
    pickle          carries the elements, by way of the host; what had a graph comes back as a leaf

Memory that two tensors share is shared by their shallow copies alone. Two references to one tensor,
or to one Parameter of a module, stay one.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import numpy as np

from .autodiff import new_id
from .dtypes import HALF_DTYPES
from .function import History
from .tensor_data import TensorData

if TYPE_CHECKING:
    from .scalar import Scalar
    from .tensor import Tensor


def become_another(variable: Any, attributes: dict[str, Any]) -> None:
    """Give a new, empty variable the attributes of another, and an identity of its own."""
    number = new_id()
    named = attributes["name"] != str(attributes["unique_id"])
    variable.__dict__.update(attributes)
    variable.unique_id = number
    variable.name = attributes["name"] if named else str(number)


def another_history(history: Any) -> Any:
    """How a shallow copy came to be: from the same inputs, by a call that can be released alone."""
    if history is None:
        return None
    return type(history)(history.last_fn, copy.copy(history.ctx), history.inputs)


def check_deepcopy(variable: Tensor | Scalar, instead: str) -> None:
    """Raise RuntimeError if a variable was computed: its graph would have to be copied, too."""
    if not (variable.is_leaf() or variable.is_constant()):
        raise RuntimeError(
            f"only leaves and constants can be deep-copied, and this {type(variable).__name__} was "
            f"computed by a function: copy {instead}, or compute it again from copies"
        )


def copy_tensor(self: Tensor) -> Tensor:
    """For `copy.copy`."""
    out = type(self).__new__(type(self))
    data = self._tensor
    become_another(
        out,
        {
            **self.__dict__,
            "_tensor": TensorData._of(data._storage, data.shape, data.strides),
            "history": another_history(self.history),
            "grad": None,
        },
    )
    return out


def deepcopy_tensor(self: Tensor, memo: dict[int, Any]) -> Tensor:
    """For `copy.deepcopy`.

    Raises:
        RuntimeError: the tensor was computed by a function.

    """
    check_deepcopy(self, "detach()")
    out = type(self).__new__(type(self))
    memo[id(self)] = out
    elements = self.backend.ops.cast(self.detach(), self.dtype)._tensor
    rest = {name: x for name, x in self.__dict__.items() if name not in ("_tensor", "history")}
    attributes = {name: copy.deepcopy(x, memo) for name, x in rest.items()}
    history = None if self.history is None else History()
    become_another(out, {**attributes, "_tensor": elements, "history": history})
    return out


def tensor_state(self: Tensor) -> dict[str, Any]:
    """For pickle: the elements as a numpy array."""
    data = self._tensor
    array = data.to_numpy() if data.on_device else np.asarray(data.array, order="C")
    graph = self.history is not None
    return {**self.__dict__, "_tensor": array, "history": graph, "grad": None}


def set_tensor_state(self: Tensor, state: dict[str, Any]) -> None:
    """For pickle: the elements go to where the backend computes on this machine."""
    array, backend = state["_tensor"], state["backend"]
    if array.dtype in HALF_DTYPES and not backend.cuda:  # made on a GPU, and there is none here
        array = array.astype(np.float32)
    data = backend.ops.from_numpy(np.require(array, requirements=["C", "W"]))
    history = History() if state["history"] else None
    become_another(self, {**state, "_tensor": data, "history": history})
