"""What the programs are given: options within limits, sizes with room for them."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from project.transformer.memory import installed

Number = TypeVar("Number", int, float)


@dataclass(frozen=True)
class Range:
    """The numbers from `low` up to, and without, `high`; `low` itself only if it is not `above`."""

    low: float
    high: float = math.inf
    above: bool = False

    def problem(self, value: float) -> str | None:
        """What is wrong with a value, such as "must be at least 1, got 0"; None if nothing is."""
        if (self.low < value if self.above else self.low <= value) and value < self.high:
            return None
        return f"must {self._wanted(value)}, got {value}"

    def _wanted(self, value: float) -> str:
        if self.high == 1:
            return "be between 0 and 1" if self.above else "be in [0, 1)"
        if value >= self.high:
            return "be finite" if self.high == math.inf else f"be below {self.high}"
        if self.above:
            return "be finite" if self.low == -math.inf else f"be above {self.low:g}"
        if math.isnan(value):
            return "be a number"
        return "not be negative" if self.low == 0 else f"be at least {self.low:g}"


FINITE = Range(-math.inf, above=True)
POSITIVE = Range(0, above=True)
NOT_NEGATIVE = Range(0)
SHARE = Range(0, 1)
# Arrays and loops of more than 2**31 are beyond these programs, and so are figures of that size.
COUNT = Range(1, 2**31)
COUNT_OR_NONE = Range(0, 2**31)
SEED = Range(0, 2**32)  # what numpy's global generator takes
THREADS = Range(1, 1025)


def parser_of(description: str | None) -> argparse.ArgumentParser:
    """A parser that prints a program's docstring as it is written."""
    return argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )


def whole(limits: Range) -> Callable[[str], int]:
    """A `type` for argparse: a whole number within limits."""

    def parse(text: str) -> int:
        try:
            number = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"must be a whole number, got {text:.40}") from None
        return _checked(number, limits)

    return parse


def real(limits: Range) -> Callable[[str], float]:
    """A `type` for argparse: a number within limits."""

    def parse(text: str) -> float:
        try:
            number = float(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"must be a number, got {text:.40}") from None
        return _checked(number, limits)

    return parse


def _checked(number: Number, limits: Range) -> Number:
    problem = limits.problem(number)
    if problem:
        raise argparse.ArgumentTypeError(problem)
    return number


def refuse_too_large(parser: argparse.ArgumentParser, option: str, needed: float) -> None:
    """End the program if an option asks for more memory than the machine has.

    Args:
        parser: whose program it is.
        option: as written on the command line, with its value.
        needed: bytes that are needed at least.

    Raises:
        SystemExit: it does.

    """
    problem = too_large(needed)
    if problem:
        parser.error(f"argument {option}: {problem}")


def too_large(needed: float, there: int | None = None, where: str = "this machine") -> str | None:
    """What is wrong with a size, or None.

    Args:
        needed: bytes that are needed at least.
        there: bytes that there are; those of this machine if not given.
        where: who has them.

    """
    there = installed() if there is None else there
    if needed <= there:
        return None
    return f"needs {_size(needed)} of memory at least, and {where} has {_size(there)}"


def _size(number: float) -> str:
    for unit in ("MiB", "GiB", "TiB", "PiB"):
        number /= 1024 if unit != "MiB" else 2**20
        if number < 1024:
            break
    return f"{number:,.1f} {unit}"
