"""Text from a model, token by token."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from minitorch import DecoderLM, no_grad

from . import model as models
from .errors import UserError
from .tokenizer import Ids, Tokenizer


def choose(
    scores: npt.NDArray[np.floating], temperature: float, top_k: int, draw: np.random.Generator
) -> int:
    """The next token.

    Args:
        scores: of each token, (vocabulary,).
        temperature: divides the scores; 0 takes the highest.
        top_k: only that many of the highest are in play; 0 means all.
        draw: the source of chance.

    Raises:
        UserError: scores that are no numbers.

    """
    if not np.isfinite(scores).all():
        raise UserError("the model gives scores that are no finite numbers: its training diverged")
    if temperature == 0:
        return int(scores.argmax())
    with np.errstate(over="ignore"):  # far below the highest, at a temperature near 0
        scaled = (scores.astype(np.float64) - float(scores.max())) / temperature
    if 0 < top_k < len(scaled):
        scaled[np.argsort(scaled)[:-top_k]] = -np.inf
    weights = np.exp(scaled)
    return int(draw.choice(len(weights), p=weights / weights.sum()))


def generate(
    model: DecoderLM,
    prompt: Ids,
    *,
    temperature: float = 0.8,
    top_k: int = 0,
    seed: int = 0,
    use_cache: bool = True,
) -> Iterator[int]:
    """Tokens that follow a prompt, without end.

    The keys and values of what has been read are kept, so that a token costs one pass over one
    position. Positions are learned, hence when the context is full its last half is read anew.

    Args:
        model: the network, left in evaluation mode.
        prompt: at least one token; its end is used if it is longer than the context.
        temperature: see `choose`.
        top_k: see `choose`.
        seed: of the chance.
        use_cache: if False, everything is read anew for each token (same text, slower).

    """
    draw = np.random.default_rng(seed)
    model.eval()
    context = list(prompt[-model.n_positions :])
    cache = model.init_cache()
    unread = context
    while True:
        with no_grad():
            ids = models.as_tensor(np.array([unread]), model.backend)
            logits = model(ids, cache=cache if use_cache else None)  # (1, T, V)
        scores = logits[:, -1:].to_numpy().reshape(-1)
        token = choose(scores, temperature, top_k, draw)
        yield token
        if len(context) == model.n_positions:
            context = [*context[len(context) - model.n_positions // 2 :], token]
            cache = model.init_cache()
            unread = context
        else:
            context.append(token)
            unread = [token] if use_cache else context


def stream_text(tokenizer: Tokenizer, tokens: Iterator[int], count: int) -> Iterator[str]:
    """The text of `count` tokens in pieces, each as soon as its characters are whole.

    Args:
        tokenizer: how tokens become text.
        tokens: where they come from.
        count: how many.

    """
    pending: list[int] = []
    for number in range(count):
        pending.append(next(tokens))
        text = tokenizer.decode(np.array(pending))
        # A piece may end inside a character of several bytes, which decodes to U+FFFD.
        if not text.endswith("\ufffd") or len(pending) == 8 or number == count - 1:
            yield text
            pending = []
