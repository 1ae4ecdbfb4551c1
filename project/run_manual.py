"""Classify points by a line whose weights you choose by hand: no training at all.

python project/run_manual.py --dataset diag --weights -10 -10 --bias 5 --plot
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that `project` is found

import minitorch
from minitorch import operators
from project.arguments import FINITE, real
from project.points import make_parser, make_points, parse, picture


class Network(minitorch.Module):
    """sigmoid(w1 x1 + w2 x2 + bias)."""

    def __init__(self, weights: Sequence[float], bias: float) -> None:
        super().__init__()
        self.linear = Linear(weights, bias)

    def forward(self, x: tuple[float, float]) -> float:
        """The probability that the point `x` has label 1."""
        return operators.sigmoid(self.linear(x))


class Linear(minitorch.Module):
    """w1 x1 + w2 x2 + bias."""

    def __init__(self, weights: Sequence[float], bias: float) -> None:
        super().__init__()
        self.w1, self.w2 = (minitorch.Parameter(w) for w in weights)
        self.bias = minitorch.Parameter(bias)

    def forward(self, x: tuple[float, float]) -> float:
        """A number, positive on one side of the line."""
        return operators.sum([self.w1.value * x[0], self.w2.value * x[1], self.bias.value])


def main(argv: Sequence[str] | None = None) -> float:
    """Run from the command line; returns the share of points that are right."""
    parser = make_parser(__doc__, points=100)
    add = parser.add_argument_group("the line w1 x1 + w2 x2 + bias = 0").add_argument
    add("--weights", type=real(FINITE), nargs=2, default=(-20.0, 0.0), metavar=("W1", "W2"))
    add("--bias", type=real(FINITE), default=10.0)
    args = parse(parser, argv)
    graph = make_points(args)
    model = Network(args.weights, args.bias)
    guesses = [model(x) > 0.5 for x in graph.X]
    correct = sum(int(guess) == label for guess, label in zip(guesses, graph.y, strict=True))
    if args.plot:
        print(picture(graph, lambda points: [model(x) for x in points]))
    print(f"{correct} of {graph.N} points right")
    return correct / graph.N


if __name__ == "__main__":
    main()
