"""Random calls of the public API, most of them wrong: each works, or is refused on purpose.

Refused on purpose means: the last frame of the traceback is a `raise` in this library (or the call
itself, where Python says that arguments are missing). An error out of the insides of Python, numpy
or numba is a failure; the message then shows the call, which the seed repeats.
"""

from __future__ import annotations

import inspect
import linecache
import random
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import minitorch
from minitorch import Parameter, Scalar, Tensor, TensorBackend, TensorData
from minitorch.function import Function

HERE = str(Path(minitorch.__file__).parent)
REFUSED = (TypeError, ValueError, IndexError, RuntimeError, AssertionError, NotImplementedError)
CALLS = 900  # for each backend

OPERATORS = """add radd sub rsub mul rmul truediv rtruediv pow rpow matmul rmatmul lt le gt ge eq
ne getitem setitem""".split()
METHODS = """all sum mean var permute transpose view contiguous is_close broadcast_to zeros expand
backward to item make requires_grad_ exp""".split()
OF_DATA = "index get set permute broadcast_to slice shape_broadcast sample item".split()
OF_SCALARS = "__add__ __rsub__ __mul__ __truediv__ __lt__ __eq__ backward log".split()
FUNCTIONS = """softmax logsoftmax logsumexp max argmax tile avgpool2d maxpool2d one_hot GELU
layer_norm softmax_loss conv1d conv2d tensor tensor_from_numpy zeros ones _tensor TensorData Scalar
Linear Embedding LayerNorm1d Dropout shape_broadcast strides_from_shape""".split()
APPLIED = """Add Mul Inv PowerScalar Sum Max Permute View BroadcastTo Slice Concatenate MatMul
Softmax""".split()
UFUNCS = [np.add, np.multiply, np.matmul, np.less, np.equal, np.power, np.exp, np.log, np.isnan]


class Odd:
    """An object that nobody knows."""


def values(backend: TensorBackend) -> list[Any]:
    """What may come as an argument, right for some calls and wrong for most."""
    tensors = [
        minitorch.tensor(np.linspace(0.5, 2.0, int(np.prod(shape))).reshape(shape), backend)
        for shape in ((2, 3), (2, 3), (3, 2), (3,), (1,), (), (0, 3), (1, 2, 4, 4))
    ]
    return [
        *(None, True, False, 0, 1, 2, -1, 7, -9, 10**30, 10**400, 0.5, 1.5, -0.5, 1e300),
        *(float("nan"), float("inf"), 1j, "a", "1", "", b"x", Ellipsis, NotImplemented),
        *(np.float32(2), np.int64(1), np.uint8(3), np.bool_(True), np.complex64(1j)),
        *(np.datetime64("2020-01-01"), np.timedelta64(3, "s"), np.str_("b")),
        *([], [1, 2], [1.5], [[1, 2], [3]], [None], ["a"], (), (1,), (2, 3), (3, 2), (2, -1)),
        *((2.0, 3.0), (1, 0), (0, 0), (0, 1), (None, 1), ((1, 2), 3), (10**20, 10**20), (1,) * 70),
        *({}, {1: 2}, {1}, Odd(), Odd, len, range(3), slice(None), slice(0, 1.5), slice(0, 2, 0)),
        *(np.ones((2, 3)), np.ones(3, np.float32), np.ones((0, 3)), np.array(2.0), np.array(1)),
        *(np.ones((2, 3), int), np.ones((2, 3), bool), np.ones((2, 3), complex), np.array(["a"])),
        *(np.array([None]), np.ones((2, 3), ">f4"), np.ma.masked_array([1.0], [True])),
        *(np.float64, float, "float32", "float16", np.dtype(complex), backend),
        *(Scalar(1.0), Parameter(tensors[0]), minitorch.Linear(2, 3), TensorData([1.0], (1,))),
        *tensors,
        *(tensors[0].detach(), tensors[0].to("float32"), minitorch.tensor([1.5]), tensors[0] * 2),
    ]


def callables(backend: TensorBackend) -> list[tuple[str, Callable[..., Any], int, float]]:
    """Name, function, the fewest and the most arguments."""
    found: list[tuple[str, Callable[..., Any], int, float]] = []

    def add(name: str, function: Callable[..., Any], signature_of: Any = None) -> None:
        parameters = list(inspect.signature(signature_of or function).parameters.values())
        if isinstance(function, minitorch.Module) or signature_of is not None:
            parameters = parameters[-1:] if signature_of is None else parameters[1:]
        several = any(p.kind is p.VAR_POSITIONAL for p in parameters)
        needed = sum(p.default is p.empty for p in parameters) - several
        found.append((name, function, needed, needed + 2 if several else len(parameters)))

    for x in [v for v in values(backend) if isinstance(v, Tensor)][:7]:
        for name in [*METHODS, *(f"__{name}__" for name in OPERATORS)]:
            add(f"Tensor{x.shape}.{name}", getattr(x, name))
    data = minitorch.rand((2, 3), backend)._tensor
    for name in OF_DATA:
        add(f"TensorData.{name}", getattr(data, name))
    for name in OF_SCALARS:
        add(f"Scalar.{name}", getattr(Scalar(2.0), name))
    for name in FUNCTIONS * 2:
        function = getattr(minitorch, name)
        if inspect.isclass(function) or not hasattr(function, "__self__"):
            add(name, function)
        else:  # conv1d is Conv1dFun.apply
            add(name, function, function.__self__.forward)
    for name in APPLIED:
        cls: type[Function] = getattr(minitorch, name)
        add(f"{name}.apply", cls.apply, cls.forward)  # type: ignore[attr-defined]
    for layer in (
        minitorch.Linear(3, 2, True, backend),
        minitorch.Embedding(3, 2, backend),
        minitorch.LayerNorm1d(3, backend=backend),
        minitorch.MultiHeadAttention(4, 2, backend=backend),
    ):
        add(f"{type(layer).__name__}()", layer, type(layer).forward)
    for ufunc in UFUNCS:
        found.append((f"numpy.{ufunc.__name__}", ufunc, ufunc.nin, ufunc.nin))
    return found


def on_purpose(error: BaseException, called_from: str) -> bool:
    """Whether an error was raised by a line of ours, or by Python for the call itself."""
    last = traceback.extract_tb(error.__traceback__)[-1]
    if not isinstance(error, REFUSED):
        return False
    if last.filename == called_from or last.name == "__call__":
        return "argument" in str(error)
    line = linecache.getline(last.filename, last.lineno or 0).strip()
    return last.filename.startswith(HERE) and line.startswith("raise")


@pytest.mark.parametrize("ops", [minitorch.SimpleOps, minitorch.FastOps])
def test_wrong_calls_are_refused_on_purpose(ops: type[minitorch.TensorOps]) -> None:
    backend = TensorBackend(ops)
    rng, pool, functions = random.Random(11), values(backend), callables(backend)
    tensors = [value for value in pool if isinstance(value, Tensor)]
    failures, refused = [], 0
    for _ in range(CALLS):
        name, function, least, most = rng.choice(functions)
        number = rng.randint(least, int(min(most, least + 2))) + (rng.random() < 0.02)
        arguments = [rng.choice(tensors if rng.random() < 0.4 else pool) for _ in range(number)]
        if name.startswith("numpy."):
            arguments[-1] = rng.choice(tensors)
        if isinstance(function, type) and any(type(n) is int and n > 99 for n in arguments):
            continue  # a layer of that size
        try:
            with warnings.catch_warnings(), np.errstate(all="ignore"):
                warnings.simplefilter("error")
                function(*arguments)
        except BaseException as error:
            refused += 1
            if not on_purpose(error, __file__):
                shown = ", ".join(describe(x) for x in arguments)
                failures.append(f"{name}({shown}): {type(error).__name__}: {error}")
    assert not failures, "\n".join(failures)
    assert refused > CALLS // 3


def describe(value: Any) -> str:
    return f"Tensor{value.shape}" if isinstance(value, Tensor) else repr(value)[:60]


def test_an_error_from_the_insides_is_noticed() -> None:
    def inside() -> None:
        _ = np.ones(2) + np.ones(3)

    for call in (inside, lambda: 1 // 0, lambda: [1][3]):
        with pytest.raises(Exception) as caught:
            call()
        assert not on_purpose(caught.value, "elsewhere")
    with pytest.raises(TypeError) as refusal:
        minitorch.zeros(2.5)  # type: ignore[arg-type]
    assert on_purpose(refusal.value, "elsewhere")
