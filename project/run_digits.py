"""Recognise handwritten digits with convolutions: scikit-learn's bundled 8x8 set, no download.

Two convolutions, pooling and a linear layer learn 1,437 images; the last line is the accuracy on
the 360 that were held out.

    python project/run_digits.py --epochs 10
"""

from __future__ import annotations

import random
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that `project` is found

import numpy as np
import numpy.typing as npt

import minitorch
from minitorch import Tensor, TensorBackend
from project.arguments import COUNT, POSITIVE, SEED, parser_of, real, refuse_too_large, whole

Array = npt.NDArray[Any]
CLASSES = 10
BACKEND = TensorBackend(minitorch.FastOps)


class Conv2d(minitorch.Module):
    """A convolution with a bias for each output channel; weights uniform in +-1/sqrt(fan in)."""

    def __init__(self, in_channels: int, out_channels: int, kernel: tuple[int, int]) -> None:
        super().__init__()
        bound = (in_channels * kernel[0] * kernel[1]) ** -0.5
        weights = minitorch.rand((out_channels, in_channels, *kernel), backend=BACKEND)
        self.weights = minitorch.Parameter(((weights - 0.5) * (2 * bound)).detach())
        self.bias = minitorch.Parameter(minitorch.zeros((out_channels, 1, 1), backend=BACKEND))

    def forward(self, x: Tensor) -> Tensor:
        """(batch, in_channels, height, width) -> (batch, out_channels, height, width)"""
        out: Tensor = minitorch.conv2d(x, self.weights.value) + self.bias.value
        return out


class Network(minitorch.Module):
    """conv 3x3, relu, conv 3x3, relu, 2x2 max pooling, linear."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = Conv2d(1, channels, (3, 3))
        self.conv2 = Conv2d(channels, 2 * channels, (3, 3))
        self.features = 2 * channels * 4 * 4
        self.linear = minitorch.Linear(self.features, CLASSES, True, BACKEND)

    def forward(self, x: Tensor) -> Tensor:
        """The logits of the digits: (batch, 1, 8, 8) -> (batch, 10)"""
        x = self.conv1(x).relu()  # (batch, channels, 8, 8)
        x = self.conv2(x).relu()  # (batch, 2 channels, 8, 8)
        x = minitorch.maxpool2d(x, (2, 2))  # (batch, 2 channels, 4, 4)
        logits: Tensor = self.linear(x.view(x.shape[0], self.features))
        return logits


def load_digits(seed: int) -> tuple[Array, Array, Array, Array]:
    """Images (N, 1, 8, 8) in [0, 1] and labels (N,), shuffled: four fifths to learn, one to test.

    Raises:
        SystemExit: scikit-learn is not installed.

    """
    try:
        from sklearn import datasets
    except ImportError:
        raise SystemExit("the digits come with scikit-learn: pip install scikit-learn") from None
    bundled = datasets.load_digits()
    images = (bundled.images / 16.0).astype(np.float32)[:, None]
    order = np.random.default_rng(seed).permutation(len(images))
    learn, test = np.split(order, [len(order) * 4 // 5])
    labels = bundled.target.astype(np.float32)
    return images[learn], labels[learn], images[test], labels[test]


class ImageTrain:
    """Trains a Network with Adam on shuffled batches."""

    def __init__(self, channels: int = 8) -> None:
        self.model = Network(channels)

    def train(
        self, images: Array, labels: Array, learning_rate: float, epochs: int, batch: int = 32
    ) -> None:
        """Learn the images, one printed line an epoch."""
        optim = minitorch.Adam(self.model.parameters(), learning_rate)
        rng = np.random.default_rng(0)
        for epoch in range(1, epochs + 1):
            total = 0.0
            order = rng.permutation(len(images))
            for start in range(0, len(order), batch):
                chosen = order[start : start + batch]
                optim.zero_grad()
                loss = minitorch.softmax_loss(
                    self.logits(images[chosen]), _constant(labels[chosen])
                )
                loss.mean().backward()
                optim.step()
                total += loss.sum().item()
            print(f"epoch {epoch:3d}  loss {total / len(images):.4f}")

    def logits(self, images: Array) -> Tensor:
        """(batch, 1, 8, 8) -> (batch, 10)"""
        logits: Tensor = self.model(_constant(images))
        return logits

    def accuracy(self, images: Array, labels: Array) -> float:
        """The share of images whose likeliest digit is the right one."""
        with minitorch.no_grad():
            return float((self.logits(images).to_numpy().argmax(1) == labels).mean())


def _constant(array: Array) -> Tensor:
    return minitorch.tensor_from_numpy(array, backend=BACKEND)


def main(argv: Sequence[str] | None = None) -> float:
    """Run from the command line; returns the accuracy on the held-out images."""
    parser = parser_of(__doc__)
    add = parser.add_argument
    add(
        "--epochs",
        type=whole(COUNT),
        default=8,
        help="passes over the images (default %(default)s)",
    )
    channels_help = "of the first convolution (default %(default)s)"
    add("--channels", type=whole(COUNT), default=8, help=channels_help)
    rate_help = "learning rate of Adam (default %(default)s)"
    add("--rate", type=real(POSITIVE), default=0.003, help=rate_help)
    add("--seed", type=whole(SEED), default=0, help="of split and weights (default %(default)s)")
    args = parser.parse_args(argv)
    # The held-out images go through both convolutions at once; Adam keeps four times the weights.
    needed = 4 * args.channels * (4 * 18 * args.channels + 360 * 3 * 64)
    refuse_too_large(parser, f"--channels {args.channels}", needed)
    minitorch.set_default_dtype(np.float32)
    random.seed(args.seed)
    images, labels, test_images, test_labels = load_digits(args.seed)
    trainer = ImageTrain(args.channels)
    trainer.train(images, labels, args.rate, args.epochs)
    accuracy = trainer.accuracy(test_images, test_labels)
    print(f"accuracy on {len(test_labels)} held-out images: {accuracy:.1%}")
    return accuracy


if __name__ == "__main__":
    main()
