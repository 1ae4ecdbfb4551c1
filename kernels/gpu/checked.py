"""What a function that makes a part of a kernel is given: wrong values are errors there and then,
and not what the assembler says about the text, or a kernel that computes something else.
"""

from __future__ import annotations

from numbers import Integral
from typing import Any


def checked(what: str, given: Any, fits: bool, wanted: str) -> None:
    """Nothing, where it fits.

    Raises:
        ValueError: `what` is `given`; `wanted` says what it may be.

    """
    if not fits:
        raise ValueError(f"{what} is {given!r}; wanted {wanted}")


def whole(what: str, given: Any, least: int = 0, most: int | None = None, step: int = 1) -> None:
    """Nothing, where it is a multiple of `step` from `least` to `most`.

    Raises:
        TypeError: it is no whole number.
        ValueError: it is another one.

    """
    if not isinstance(given, Integral):
        raise TypeError(f"{what} is {given!r}; wanted a whole number")
    number, number_given = "a whole number" if step == 1 else f"a multiple of {step}", int(given)
    fits = number_given >= least and number_given % step == 0
    reach = f"from {least} on" if most is None else f"from {least} to {most}"
    checked(what, given, fits and (most is None or number_given <= most), f"{number} {reach}")


def one_of(what: str, given: Any, names: tuple[str, ...]) -> None:
    """Nothing, where it is one of these names.

    Raises:
        ValueError: it is another one.

    """
    checked(what, given, given in names, " or ".join(map(repr, names)))


def byte_offsets(what: str, given: Any) -> None:
    """Nothing, where it says in bytes where rows of 16 bytes lie in shared memory.

    Raises:
        TypeError: an offset is no whole number.
        ValueError: there is none, or one is no multiple of 16 below 2**18.

    """
    checked(what, given, isinstance(given, tuple) and given != (), "a tuple of at least one offset")
    for offset in given:
        whole(what, offset, 0, (1 << 18) - 16, step=16)
