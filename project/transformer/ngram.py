"""The yardstick: how well counting the last n characters predicts the next one."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

SMOOTHING = 0.1


def ngram_losses(
    train: str, valid: str, orders: int = 5, smoothing: float = SMOOTHING
) -> list[float]:
    """Nats per character of n-gram models of order 1 to `orders` on text they have not seen.

    The model of order n: p(c | context) = (count(context c) + a) / (count(context) + a V), where
    the context is the n - 1 characters before c, V the number of different characters, and a the
    smoothing (Lidstone's estimate).

    Args:
        train: the text that is counted.
        valid: the text that is predicted.
        orders: the longest n.
        smoothing: a.

    """
    text = np.frombuffer((train + valid).encode("utf-32-le", "surrogatepass"), dtype=np.uint32)
    _, letters = np.unique(text, return_inverse=True)
    vocabulary = int(np.max(letters)) + 1
    context = np.zeros(len(letters), np.int64)  # number of the context before each character
    losses = []
    for order in range(1, orders + 1):
        known = slice(order - 1, len(train))
        asked = slice(len(train) + order - 1, len(letters))
        # Numbers are handed out anew for each order, so that they stay below the text's length.
        _, grams = np.unique(context * vocabulary + letters, return_inverse=True)
        context_counts = np.bincount(context[known], minlength=int(np.max(context)) + 1)
        gram_counts = np.bincount(grams[known], minlength=int(grams.max()) + 1)
        probability: npt.NDArray[np.float64] = (gram_counts[grams[asked]] + smoothing) / (
            context_counts[context[asked]] + smoothing * vocabulary
        )
        losses.append(float(-np.log(probability).mean()) if len(probability) else float("nan"))
        context = np.concatenate([[0], grams[:-1]])  # the gram that ends before each character
    return losses
