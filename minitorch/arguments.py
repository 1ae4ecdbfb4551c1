"""What arguments may be: whole numbers, shapes, numbers, arrays, tensors.

Each check says what is wanted and what was given, in one sentence with the argument's name, before
any work is done. A Tensor of one element counts as a number, as in MiniTorch's courses.
"""

from __future__ import annotations

from math import prod
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from .dtypes import BFLOAT16

if TYPE_CHECKING:
    from .tensor import Tensor

_INT = {int}
MAX_ELEMENTS = 1 << 60  # more than any memory holds, and few enough for 64-bit positions


_classes: list[type[Tensor]] = []


def set_tensor_class(cls: type[Tensor]) -> None:
    """Make `Tensor` known here; its file, which needs this one first, calls it."""
    _classes[:] = [cls]


def tensor_class() -> type[Tensor]:
    """The class `Tensor`."""
    return _classes[0]


# ----- what an error says -----


def given(value: Any) -> str:
    """How an error names what was given: short values as they are, others by their type."""
    if isinstance(value, np.generic):
        value = value.item()
    if value is None or isinstance(value, bool | int | float | complex | str):
        text = repr(value) if not isinstance(value, int) or abs(value) < 1 << 64 else "a huge int"
        if len(text) <= 40:
            return text
    return type_name(value)


def type_name(value: Any) -> str:
    """The name of an object's type, with that of its package: there is more than one `Tensor`."""
    kind = type(value)
    package = kind.__module__.split(".")[0]
    return kind.__qualname__ if package == "builtins" else f"{package}.{kind.__qualname__}"


def advice(value: Any, name: str) -> str:
    """What to write in place of `value` where a Tensor is wanted, if that is known."""
    if isinstance(value, int | float | list | tuple) or hasattr(value, "__array__"):
        return f": write minitorch.tensor({name}, backend=...)"
    if type(value).__name__ == "Parameter":
        return f": write {name}.value"
    return ""


# ----- tensors -----


def check_tensor(value: Any, name: str) -> None:
    """Raise TypeError unless `value` is a Tensor; `name` is that of the argument, with or without
    its function's in front ("Linear: x").
    """
    if not isinstance(value, tensor_class()):
        what = name.split(": ")[-1]
        raise TypeError(f"{name} must be a Tensor, got {given(value)}{advice(value, what)}")


# ----- whole numbers -----


def as_int(value: Any, name: str) -> int:
    """A whole number, given as one or as a Tensor of one element.

    Raises:
        TypeError: it is something else: a float, True, None, a string.

    """
    if type(value) is int:
        return value
    if isinstance(value, tensor_class()) and value.size == 1:
        number = value.item()
        if number.is_integer():
            return int(number)
        raise TypeError(f"{name} must be a whole number, got a Tensor of {number:g}")
    index = getattr(value, "__index__", None)
    if index is not None and not isinstance(value, bool):
        try:
            return int(index())
        except TypeError:  # an array of several numbers
            pass
    raise TypeError(f"{name} must be a whole number, got {given(value)}")


def as_ints(values: Any, name: str) -> tuple[int, ...]:
    """Several whole numbers, given as a tuple, a list, an array, a Tensor, or as one number.

    Raises:
        TypeError: some are no whole numbers.

    """
    if type(values) in (tuple, list) and _INT >= {*map(type, values)}:
        return tuple(values)
    if isinstance(values, tensor_class()) and values.size != 1:
        values = values.to_numpy().reshape(-1)
        if (values == np.floor(values)).all() and np.isfinite(values).all():
            return tuple(int(n) for n in values)
        raise TypeError(f"{name} must hold whole numbers, got a Tensor of others")
    array = isinstance(values, np.ndarray) and values.ndim > 0
    if array or isinstance(values, tuple | list | range):
        return tuple(as_int(n, name) for n in values)
    return (as_int(values, name),)


def spread(values: tuple[Any, ...]) -> Any:
    """The arguments of `view(2, 3)`, or of `view((2, 3))` and `view([2, 3])` what they hold."""
    return values[0] if len(values) == 1 else values


def as_size(value: Any, name: str, least: int = 0) -> int:
    """A whole number that is not below `least`.

    Raises:
        TypeError: no whole number.
        ValueError: it is too small.

    """
    size = as_int(value, name)
    if size < least:
        raise ValueError(f"{name} must be at least {least}, got {size}")
    return size


def as_shape(values: Any, name: str = "shape") -> tuple[int, ...]:
    """Sizes, given as `as_ints` takes them.

    Raises:
        TypeError: some are no whole numbers.
        ValueError: one is negative, or there are more elements than any memory holds.

    """
    shape = as_ints(values, name)
    if min(shape, default=0) < 0:
        raise ValueError(f"{name} must have no negative size, got {shape}")
    if prod(shape) > MAX_ELEMENTS:
        raise ValueError(f"{name} has more elements than any memory holds, got {shape}")
    return shape


def check_dim(dim: Any, dims: int, name: str = "dim") -> int:
    """A dimension counted from 0; negative ones count from the end.

    Raises:
        IndexError: there is no such dimension.
        TypeError: it is no whole number.

    """
    number = as_int(dim, name)
    if not -dims <= number < dims:
        wanted = f"in [{-dims}, {dims - 1}] for {dims} dimensions" if dims else "left out: no shape"
        raise IndexError(f"{name} must be {wanted}, got {number}")
    return number % dims


def check_dims(values: Any, dims: int, name: str = "dim") -> tuple[int, ...]:
    """Several dimensions, each named once, or one.

    Raises:
        IndexError: there is no such dimension.
        TypeError: one is no whole number.
        ValueError: one is named twice.

    """
    found = tuple(check_dim(dim, dims, name) for dim in as_ints(values, name))
    if len(set(found)) < len(found):
        raise ValueError(f"{name} must name a dimension once, got {tuple(values)}")
    return found


def check_key(key: Any) -> tuple[Any, ...]:
    """What stands in the brackets of `x[...]`, as a tuple of whole numbers, slices, None and `...`.

    Raises:
        TypeError: something else is among it.
        ValueError: a slice whose step is 0.

    """
    found: list[Any] = []
    for part in key if isinstance(key, tuple) else (key,):
        if isinstance(part, slice):
            ends = (part.start, part.stop, part.step)
            part = slice(*(None if n is None else as_int(n, "an end of a slice") for n in ends))
            if part.step == 0:
                raise ValueError("the step of a slice must not be 0")
        elif not (part is None or part is Ellipsis):
            if isinstance(part, bool) or not hasattr(part, "__index__") or np.ndim(part):
                raise TypeError(
                    f"an index may hold whole numbers, slices, None and ..., got {given(part)}"
                )
            part = as_int(part, "an index")
        found.append(part)
    return tuple(found)


# ----- numbers -----


def as_number(value: Any, name: str, wanted: str = "a number") -> float:
    """A real number as a Python float.

    Raises:
        TypeError: it is something else: complex, None, a string, several numbers.
        ValueError: a whole number beyond the largest float.

    """
    if type(value) is float:
        return value
    real = hasattr(value, "__float__") and getattr(value, "ndim", 0) == 0
    if isinstance(value, tensor_class()):
        real = value.size == 1
    elif isinstance(value, np.generic | np.ndarray):
        real = real and _is_real(value.dtype)
    if not real:
        raise TypeError(f"{name} must be {wanted}, got {given(value)}{advice(value, name)}")
    try:
        return float(value)
    except OverflowError:
        raise ValueError(f"{name} must fit into a float, got {given(value)}") from None
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(f"{name} must be {wanted}, got {given(value)}") from None


def _is_real(dtype: np.dtype[Any]) -> bool:
    """Whether a dtype holds real numbers or truth values."""
    return dtype.kind in "fiub" or dtype == BFLOAT16


# ----- arrays -----


def as_array(values: Any, name: str) -> npt.NDArray[Any]:
    """An array of real numbers, in the byte order of this machine, from whatever numpy reads.

    Raises:
        TypeError: elements that are no real numbers: complex, None, strings, dates, other objects.
        ValueError: lists of different lengths, masked elements, or numbers beyond the largest
            float.

    """
    if isinstance(values, np.ma.MaskedArray) and np.ma.is_masked(values):
        raise ValueError(f"{name} has masked elements: fill them first")
    try:
        array = np.asarray(values)
    except ValueError as error:
        raise ValueError(f"{name}: nested lists must all have the same length ({error})") from None
    if array.dtype == object and array.size:
        array = _from_objects(array, name)
    elif not _is_real(array.dtype):
        kind = type(values).__name__ if array.dtype == object else array.dtype.name
        raise TypeError(f"{name} must hold real numbers, got {kind}")
    if not array.dtype.isnative:
        array = array.astype(array.dtype.newbyteorder("="))
    return array


def _from_objects(array: npt.NDArray[Any], name: str) -> npt.NDArray[np.float64]:
    """float64 from an array of Python objects, such as whole numbers of more than 64 bits."""
    numbers = [as_number(x, f"{name}: an element") for x in array.reshape(-1)]
    return np.array(numbers, np.float64).reshape(array.shape)
