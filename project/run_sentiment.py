"""Classify texts by the mean of their word vectors: sentiment, if you bring labelled reviews.

Without a file the task is one whose text is installed already: does a sentence come from Python's
language reference or from numpy's documentation? The last line is the accuracy on held-out texts.

    python project/run_sentiment.py
    python project/run_sentiment.py --data reviews.tsv
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
from project import text_data
from project.arguments import COUNT, POSITIVE, SEED, Range, parser_of, real, refuse_too_large, whole

Array = npt.NDArray[Any]
BACKEND = TensorBackend(minitorch.FastOps)


def RParam(*shape: int, backend: TensorBackend = BACKEND) -> minitorch.Parameter:
    """A parameter uniform in [-0.05, 0.05], drawn from `random`."""
    return minitorch.Parameter((0.1 * (minitorch.rand(shape, backend=backend) - 0.5)).detach())


class Linear(minitorch.Module):
    """x @ weights + bias, on whatever backend x is."""

    def __init__(self, in_size: int, out_size: int) -> None:
        super().__init__()
        self.weights = RParam(in_size, out_size)
        self.bias = RParam(out_size)
        self.out_size = out_size

    def forward(self, x: Tensor) -> Tensor:
        """(batch, in_size) -> (batch, out_size)"""
        for parameter in self.parameters():
            if parameter.value.backend is not x.backend:
                parameter.value._type_(x.backend)
        out: Tensor = x @ self.weights.value + self.bias.value
        return out


class Network(minitorch.Module):
    """Mean of the word vectors, linear, relu, dropout, linear, sigmoid.

    Args:
        embedding_dim: length of a word vector.
        hidden_dim: size of the hidden layer.
        dropout_prob: share of the hidden layer that is dropped in training.

    """

    def __init__(
        self, embedding_dim: int = 50, hidden_dim: int = 32, dropout_prob: float = 0.5
    ) -> None:
        super().__init__()
        self.embedding_dim = embedding_dim
        self.dropout_prob = dropout_prob
        self.linear1 = Linear(embedding_dim, hidden_dim)
        self.linear2 = Linear(hidden_dim, 1)

    def forward(self, embeddings: Tensor) -> Tensor:
        """The probability of label 1: (batch, sentence length, embedding_dim) -> (batch,)"""
        batch = embeddings.shape[0]
        mean = embeddings.mean(1).view(batch, self.embedding_dim)
        hidden = self.linear1(mean).relu()
        hidden = minitorch.dropout(hidden, self.dropout_prob, ignore=not self.training)
        out: Tensor = self.linear2(hidden).sigmoid().view(batch)
        return out


class TextClassifier(minitorch.Module):
    """Word vectors that are learnt, and a Network on top."""

    def __init__(self, words: int, embedding_dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.embedding = minitorch.Embedding(words, embedding_dim, BACKEND)
        self.network = Network(embedding_dim, hidden_dim)

    def forward(self, ids: Array) -> Tensor:
        """The probability of label 1 for rows of word numbers: (batch, length) -> (batch,)"""
        present = ids != text_data.PADDING
        # So weighted, padding counts for nothing in the mean, whatever the length of the text.
        weight = present * (ids.shape[1] / np.maximum(present.sum(1, keepdims=True), 1))
        vectors = self.embedding(_constant(ids))  # (batch, length, embedding_dim)
        out: Tensor = self.network(vectors * _constant(weight[:, :, None].astype(ids.dtype)))
        return out


def _constant(array: Array) -> Tensor:
    return minitorch.tensor_from_numpy(array, backend=BACKEND)


class SentenceSentimentTrain:
    """Trains a TextClassifier with Adam on shuffled batches."""

    def __init__(self, model: TextClassifier) -> None:
        self.model = model

    def train(
        self,
        data_train: tuple[Array, Array],
        learning_rate: float,
        batch_size: int = 32,
        max_epochs: int = 10,
        data_val: tuple[Array, Array] | None = None,
    ) -> list[float]:
        """Train, with one printed line an epoch; returns the losses.

        Args:
            data_train: word numbers (N, length) and labels (N,).
            learning_rate: of Adam.
            batch_size: texts in a step.
            max_epochs: passes over the data.
            data_val: held-out texts whose accuracy is printed.

        """
        ids, labels = data_train
        optim = minitorch.Adam(self.model.parameters(), learning_rate)
        rng = np.random.default_rng(0)
        losses = []
        for epoch in range(1, max_epochs + 1):
            self.model.train()
            total = 0.0
            order = rng.permutation(len(ids))
            for start in range(0, len(order), batch_size):
                chosen = order[start : start + batch_size]
                optim.zero_grad()
                out = self.model(ids[chosen])
                y = _constant(labels[chosen])
                loss = -(out * y + (1.0 - out) * (1.0 - y)).log()  # binary cross entropy
                loss.mean().backward()
                optim.step()
                total += loss.sum().item()
            losses.append(total / len(ids))
            held_out = "" if data_val is None else f"  held out {self.accuracy(*data_val):.1%}"
            print(f"epoch {epoch:3d}  loss {losses[-1]:.4f}{held_out}")
        return losses

    def accuracy(self, ids: Array, labels: Array) -> float:
        """The share of texts whose likelier label is the right one."""
        self.model.eval()
        with minitorch.no_grad():
            guesses = self.model(ids).to_numpy() > 0.5
        return float((guesses == labels).mean())


def main(argv: Sequence[str] | None = None) -> float:
    """Run from the command line; returns the accuracy on held-out texts."""
    parser = parser_of(__doc__)
    add = parser.add_argument
    add("--data", metavar="FILE", help=".tsv or .csv with two columns: label (0 or 1) and text")
    count = whole(COUNT)
    add("--epochs", type=count, default=5, help="default %(default)s")
    add("--rate", type=real(POSITIVE), default=0.003, help="learning rate, default %(default)s")
    add("--embedding", type=count, default=50, help="length of word vectors, default %(default)s")
    add("--hidden", type=count, default=32, help="hidden units, default %(default)s")
    add("--words", type=count, default=5000, help="size of the vocabulary, default %(default)s")
    add("--length", type=count, default=40, help="words kept of a text, default %(default)s")
    add("--examples", type=whole(Range(2, 2**31)), metavar="N", help="use N texts; all by default")
    add("--seed", type=whole(SEED), default=0, help="default %(default)s")
    args = parser.parse_args(argv)
    try:
        examples = text_data.read_examples(args.data) if args.data else None
    except (OSError, ValueError) as error:
        parser.error(str(error))
    examples = examples or text_data.installed_documentation()
    random.Random(args.seed).shuffle(examples)
    learn, held_out = text_data.split(examples[: args.examples], 0.2, args.seed)
    words = text_data.vocabulary(learn, args.words)
    # Adam keeps four times the weights; the held-out texts become vectors all at once.
    texts = len(held_out) * args.length
    needed = 4 * args.embedding * (4 * (len(words) + args.hidden) + texts)
    refuse_too_large(parser, f"--embedding {args.embedding}", needed)
    needed = 4 * args.hidden * (4 * args.embedding + len(held_out))
    refuse_too_large(parser, f"--hidden {args.hidden}", needed)
    refuse_too_large(parser, f"--length {args.length}", 4 * len(examples) * args.length)
    print(f"{len(learn)} texts to learn, {len(held_out)} held out, {len(words)} words")

    minitorch.manual_seed(args.seed)
    minitorch.set_default_dtype(np.float32)
    trainer = SentenceSentimentTrain(TextClassifier(len(words) + 2, args.embedding, args.hidden))
    test = text_data.encode(held_out, words, args.length)
    trainer.train(
        text_data.encode(learn, words, args.length),
        args.rate,
        max_epochs=args.epochs,
        data_val=test,
    )
    accuracy = trainer.accuracy(*test)
    print(f"accuracy on {len(held_out)} held-out texts: {accuracy:.1%}")
    return accuracy


if __name__ == "__main__":
    main()
