"""Small classification problems: points in the unit square, each labelled 0 or 1."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass

Point = tuple[float, float]


def make_pts(N: int) -> list[Point]:
    """N points, uniform in the unit square, drawn with `random`."""
    return [(random.random(), random.random()) for _ in range(N)]


@dataclass
class Graph:
    """A data set: the number of points, the points, and their labels."""

    N: int
    X: list[Point]
    y: list[int]


def _labelled(N: int, is_one: Callable[[float, float], bool]) -> Graph:
    """N random points, labelled 1 where `is_one` holds."""
    X = make_pts(N)
    return Graph(N, X, [int(is_one(x1, x2)) for x1, x2 in X])


def simple(N: int) -> Graph:
    """Label 1 on the left half."""
    return _labelled(N, lambda x1, x2: x1 < 0.5)


def diag(N: int) -> Graph:
    """Label 1 below a diagonal line that cuts off a corner."""
    return _labelled(N, lambda x1, x2: x1 + x2 < 0.5)


def split(N: int) -> Graph:
    """Label 1 in a strip at the left and one at the right."""
    return _labelled(N, lambda x1, x2: x1 < 0.2 or x1 > 0.8)


def xor(N: int) -> Graph:
    """Label 1 in two quarters that touch at the centre."""
    return _labelled(N, lambda x1, x2: (x1 < 0.5 < x2) or (x2 < 0.5 < x1))


def circle(N: int) -> Graph:
    """Label 1 outside a circle around the centre."""
    return _labelled(N, lambda x1, x2: (x1 - 0.5) ** 2 + (x2 - 0.5) ** 2 > 0.1)


def spiral(N: int) -> Graph:
    """Two arms that wind around the centre, half a turn apart: label 0 and label 1."""
    first = N // 2

    def arm(count: int, start: float) -> list[Point]:
        # Radius and angle grow together; the innermost points, where the arms would meet, are left
        # out.
        turns = [10.0 * (i + 5) / (count + 5) for i in range(count)]
        return [
            (0.5 + t / 21 * math.cos(t + start), 0.5 + t / 21 * math.sin(t + start)) for t in turns
        ]

    X = arm(first, 0.0) + arm(N - first, math.pi)
    return Graph(N, X, [0] * first + [1] * (N - first))


datasets: dict[str, Callable[[int], Graph]] = {
    "Simple": simple,
    "Diag": diag,
    "Split": split,
    "Xor": xor,
    "Circle": circle,
    "Spiral": spiral,
}
