"""What the scripts on two-dimensional points share: their command line, progress and a picture."""

from __future__ import annotations

import argparse
import random
from collections.abc import Callable, Sequence

from minitorch.datasets import Graph, datasets
from project.arguments import COUNT, POSITIVE, SEED, parser_of, real, refuse_too_large, whole

POINT_BYTES = 150  # a tuple of two numbers and a label, in lists
LogFn = Callable[[int, float, int, list[float]], None]


def make_parser(description: str | None, points: int) -> argparse.ArgumentParser:
    """The options that every script has. MiniTorch's spellings (`--PTS` ...) work too."""
    parser = parser_of(description)
    add = parser.add_argument
    names = [name.lower() for name in datasets]
    add("--dataset", "--DATASET", type=str.lower, choices=names, default="simple")
    add("--points", "--PTS", type=whole(COUNT), default=points, help=f"default {points}")
    add(
        "--seed", type=whole(SEED), default=0, help="of the points and the first weights, default 0"
    )
    add("--plot", "--PLOT", action="store_true", help="draw the answer in characters")
    return parser


def add_training_options(
    parser: argparse.ArgumentParser, hidden: int, rate: float, epochs: int
) -> None:
    """The options of scripts that train, with their defaults."""
    add = parser.add_argument_group("training").add_argument
    hidden_help = f"units, default {hidden}"
    add("--hidden", "--HIDDEN", type=whole(COUNT), default=hidden, help=hidden_help)
    add(
        "--rate", "--RATE", type=real(POSITIVE), default=rate, help=f"learning rate, default {rate}"
    )
    add("--epochs", type=whole(COUNT), default=epochs, help=f"default {epochs}")


def parse(
    parser: argparse.ArgumentParser, argv: Sequence[str] | None, weight_bytes: int = 0
) -> argparse.Namespace:
    """The command line, if the machine has room for what it asks for.

    Args:
        parser: from `make_parser`.
        argv: the words; those of the program if None.
        weight_bytes: what a weight takes, of the `hidden` x `hidden` in the middle layer.

    Raises:
        SystemExit: a word makes no sense, or asks for too much.

    """
    args = parser.parse_args(argv)
    refuse_too_large(parser, f"--points {args.points}", args.points * POINT_BYTES)
    if weight_bytes:
        needed = args.hidden * (args.hidden * weight_bytes + args.points * weight_bytes)
        refuse_too_large(parser, f"--hidden {args.hidden}", needed)
    return args


def make_points(args: argparse.Namespace) -> Graph:
    """Seed `random` and draw the points that the command line asks for."""
    random.seed(args.seed)
    return datasets[args.dataset.capitalize()](args.points)


def default_log_fn(epoch: int, loss: float, correct: int, losses: list[float]) -> None:
    """Print one line."""
    print(f"epoch {epoch:4d}  loss {loss:9.4f}  correct {correct}")


def picture(
    graph: Graph, predict: Callable[[Sequence[tuple[float, float]]], Sequence[float]]
) -> str:
    """The unit square in characters: shaded where label 1 is likelier, 1 and 0 where points are.

    Args:
        graph: the points and their labels.
        predict: the probability of label 1 for each point of a list.

    """
    width, height = 60, 24
    cells = [
        ((x + 0.5) / width, (y + 0.5) / height)
        for y in reversed(range(height))
        for x in range(width)
    ]
    shades = [":" if p > 0.5 else " " for p in predict(cells)]
    for (x1, x2), label in zip(graph.X, graph.y, strict=True):
        column, row = min(int(x1 * width), width - 1), min(int(x2 * height), height - 1)
        shades[(height - 1 - row) * width + column] = str(label)
    return "\n".join("".join(shades[i : i + width]) for i in range(0, len(shades), width))
