"""Learn to classify points with tensors on the readable, slow backend.

python project/run_tensor.py --dataset split --hidden 8 --plot
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that `project` is found

import minitorch
from minitorch import Tensor, TensorBackend
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
    """x @ weights + bias; both start uniform in [-1, 1]."""

    def __init__(self, in_size: int, out_size: int, backend: TensorBackend) -> None:
        super().__init__()
        self.weights = _random_parameter((in_size, out_size), backend)
        self.bias = _random_parameter((out_size,), backend)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, in_size) -> (batch, out_size)"""
        out: Tensor = x @ self.weights.value + self.bias.value
        return out


def _random_parameter(shape: tuple[int, ...], backend: TensorBackend) -> minitorch.Parameter:
    return minitorch.Parameter((2 * (minitorch.rand(shape, backend=backend) - 0.5)).detach())


class Network(minitorch.Module):
    """Three layers: relu, relu, sigmoid."""

    def __init__(
        self, hidden_layers: int, backend: TensorBackend = minitorch.SimpleBackend
    ) -> None:
        super().__init__()
        self.layer1 = Linear(2, hidden_layers, backend)
        self.layer2 = Linear(hidden_layers, hidden_layers, backend)
        self.layer3 = Linear(hidden_layers, 1, backend)

    def forward(self, x: Tensor) -> Tensor:
        """The probability of label 1: (batch, 2) -> (batch, 1)"""
        middle = self.layer1(x).relu()
        end = self.layer2(middle).relu()
        out: Tensor = self.layer3(end).sigmoid()
        return out


class TensorTrain:
    """Trains a Network by gradient descent on all points at once."""

    def __init__(
        self, hidden_layers: int, backend: TensorBackend = minitorch.SimpleBackend
    ) -> None:
        self.hidden_layers = hidden_layers
        self.backend = backend
        self.model = Network(hidden_layers, backend)

    def run_one(self, x: Sequence[float]) -> Tensor:
        """The probability of label 1 for one point, (1, 1)."""
        return self.run_many([x])

    def run_many(self, X: Sequence[Sequence[float]]) -> Tensor:
        """The probability of label 1 for each point, (len(X), 1)."""
        out: Tensor = self.model(minitorch.tensor(X, backend=self.backend, requires_grad=False))
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
        y = minitorch.tensor(data.y, backend=self.backend, requires_grad=False)
        losses = []
        for epoch in range(1, max_epochs + 1):
            optim.zero_grad()
            out = self.run_many(data.X).view(data.N)
            right = out * y + (1.0 - out) * (1.0 - y)  # probability of the right label
            loss = -right.log()
            loss.mean().backward()
            optim.step()
            losses.append(loss.sum().item())
            if epoch % 10 == 0 or epoch == max_epochs:
                log_fn(epoch, losses[-1], int((right.detach() > 0.5).sum().item()), losses)
        return losses


def main(argv: Sequence[str] | None = None) -> list[float]:
    """Run from the command line; returns the losses."""
    parser = make_parser(__doc__, points=50)
    add_training_options(parser, hidden=2, rate=0.5, epochs=300)
    args = parse(parser, argv, weight_bytes=3 * 8)
    graph = make_points(args)
    trainer = TensorTrain(args.hidden)
    losses = trainer.train(graph, args.rate, args.epochs)
    if args.plot:
        with minitorch.no_grad():
            print(picture(graph, lambda points: trainer.run_many(points).to_numpy()[:, 0].tolist()))
    return losses


if __name__ == "__main__":
    main()
