"""Learn to classify points with Scalars: one Python object for each number.

python project/run_scalar.py --dataset diag --hidden 4 --plot
"""

from __future__ import annotations

import random
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that `project` is found

import minitorch
from minitorch import Scalar
from minitorch.datasets import Graph
from project.points import (
    LogFn,
    add_training_options,
    default_log_fn,
    make_parser,
    make_points,
    parse,
    picture,
)


class Linear(minitorch.Module):
    """A linear layer of Scalars: weights and biases start uniform in [-1, 1]."""

    def __init__(self, in_size: int, out_size: int) -> None:
        super().__init__()
        self.weights = [
            [self._random(f"weight_{i}_{j}") for j in range(out_size)] for i in range(in_size)
        ]
        self.bias = [self._random(f"bias_{j}") for j in range(out_size)]

    def _random(self, name: str) -> minitorch.Parameter:
        return self.add_parameter(name, Scalar(2 * (random.random() - 0.5)))

    def forward(self, inputs: Sequence[Scalar]) -> list[Scalar]:
        """in_size Scalars -> out_size Scalars"""
        outputs = [b.value for b in self.bias]
        for x, row in zip(inputs, self.weights, strict=True):
            outputs = [y + x * w.value for y, w in zip(outputs, row, strict=True)]
        return outputs


class Network(minitorch.Module):
    """Three layers: relu, relu, sigmoid."""

    def __init__(self, hidden_layers: int) -> None:
        super().__init__()
        self.layer1 = Linear(2, hidden_layers)
        self.layer2 = Linear(hidden_layers, hidden_layers)
        self.layer3 = Linear(hidden_layers, 1)

    def forward(self, x: Sequence[Scalar]) -> Scalar:
        """The probability of label 1 for a point of two Scalars."""
        middle = [h.relu() for h in self.layer1(x)]
        end = [h.relu() for h in self.layer2(middle)]
        out: Scalar = self.layer3(end)[0].sigmoid()
        return out


class ScalarTrain:
    """Trains a Network by gradient descent on all points at once."""

    def __init__(self, hidden_layers: int) -> None:
        self.hidden_layers = hidden_layers
        self.model = Network(hidden_layers)

    def run_one(self, x: Sequence[float]) -> Scalar:
        """The probability of label 1 for one point."""
        out: Scalar = self.model([Scalar(x[0], name="x_1"), Scalar(x[1], name="x_2")])
        return out

    def train(
        self,
        data: Graph,
        learning_rate: float,
        max_epochs: int = 500,
        log_fn: LogFn = default_log_fn,
    ) -> list[float]:
        """Train, and return the loss after each epoch.

        Args:
            data: points and labels.
            learning_rate: of SGD, on the mean loss.
            max_epochs: number of passes.
            log_fn: called every tenth epoch with epoch, loss, right answers and all losses.

        """
        optim = minitorch.SGD(self.model.parameters(), learning_rate)
        losses = []
        for epoch in range(1, max_epochs + 1):
            optim.zero_grad()
            total_loss, correct = 0.0, 0
            for x, label in zip(data.X, data.y, strict=True):
                out = self.run_one(x)
                right = out if label == 1 else 1.0 - out  # probability of the right label
                correct += right.data > 0.5
                loss = -right.log()
                (loss / data.N).backward()
                total_loss += loss.data
            optim.step()
            losses.append(total_loss)
            if epoch % 10 == 0 or epoch == max_epochs:
                log_fn(epoch, total_loss, correct, losses)
        return losses


def main(argv: Sequence[str] | None = None) -> list[float]:
    """Run from the command line; returns the losses."""
    parser = make_parser(__doc__, points=50)
    add_training_options(parser, hidden=2, rate=0.5, epochs=300)
    args = parse(parser, argv, weight_bytes=400)
    graph = make_points(args)
    trainer = ScalarTrain(args.hidden)
    losses = trainer.train(graph, args.rate, args.epochs)
    if args.plot:
        with minitorch.no_grad():
            print(picture(graph, lambda points: [trainer.run_one(x).data for x in points]))
    return losses


if __name__ == "__main__":
    main()
