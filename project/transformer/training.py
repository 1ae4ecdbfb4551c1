"""The training loop: one step, the validation loss, and a run that can stop and go on."""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Protocol

import numpy as np

import minitorch
from minitorch import no_grad

from . import model as models
from .data import Corpus, batch, validation_windows
from .errors import UserError
from .options import RunOptions
from .run_files import RunFolder, Snapshot


class Trainer:
    """A model in training: everything that changes from step to step.

    Args:
        options: of the run.
        corpus: the text.

    """

    def __init__(self, options: RunOptions, corpus: Corpus) -> None:
        self.options = options
        self.corpus = corpus
        minitorch.manual_seed(options.training.seed)
        self.model = models.build(options.model, corpus.tokenizer.size)
        self.optimizer, self.schedule = models.optimizer(self.model, options.training)
        self.step = 0

    @property
    def tokens_per_step(self) -> int:
        """Tokens that one step learns from."""
        return self.options.training.batch * self.options.model.context

    def train_step(self) -> float:
        """One step of AdamW on the next batch.

        Returns:
            The loss before the step, in nats per token.

        Raises:
            UserError: the loss is not a finite number; the weights are unchanged.

        """
        training = self.options.training
        inputs, targets = batch(
            self.corpus.train_ids,
            self.options.model.context,
            training.batch,
            training.seed,
            self.step,
        )
        self.model.train()
        self.optimizer.zero_grad()
        loss = models.loss(self.model, inputs, targets)
        value = loss.item()
        if not math.isfinite(value):
            raise UserError(
                f"the loss is {value} at step {self.step + 1}: "
                f"try a smaller --lr than {training.lr:g}"
            )
        loss.backward()
        minitorch.clip_grad_norm_(self.optimizer.parameters, training.clip)
        self.optimizer.step()
        self.schedule.step()
        self.step += 1
        return value

    def validation_loss(self) -> float:
        """Nats per character on the held-out text; draws no random numbers."""
        inputs, targets = validation_windows(self.corpus.valid_ids, self.options.model.context)
        rows = self.options.training.batch
        total = 0.0
        self.model.eval()
        with no_grad():
            for start in range(0, len(inputs), rows):
                part = slice(start, start + rows)
                mean = models.loss(self.model, inputs[part], targets[part]).item()
                total += mean * targets[part].size
        return total / targets.size / self.corpus.valid_characters_per_token

    def snapshot(self) -> Snapshot:
        """All that a later `restore` needs."""
        return Snapshot(
            self.options,
            self.step,
            self.corpus.tokenizer,
            self.corpus.fingerprint,
            minitorch.get_rng_state(),
            self.model.state_dict(),
            self.optimizer.state_dict(),
        )

    def restore(self, snapshot: Snapshot) -> None:
        """Go on where a snapshot was taken.

        Raises:
            UserError: it was taken of another model, or with another text.

        """
        if snapshot.fingerprint != self.corpus.fingerprint:
            raise UserError(
                "the text is not the one this run was started with (the text inside Python differs "
                "by version): name the same text and Python, or start anew without --resume"
            )
        try:
            self.model.load_state_dict(snapshot.model)
            self.optimizer.load_state_dict(snapshot.optimizer)
        except ValueError as error:
            raise UserError(f"the checkpoint does not fit: {error}") from error
        self.schedule.load_state_dict({"steps": np.array(snapshot.step)})
        minitorch.set_rng_state(snapshot.rng)
        self.step = snapshot.step


class Reporter(Protocol):
    """Who is told how a run goes (see `report`)."""

    def stepped(self, step: int, loss: float, tokens_per_second: float) -> None:
        """A step is done."""

    def evaluated(self, step: int, loss: float, valid_loss: float) -> None:
        """The validation loss is known."""


def train(trainer: Trainer, folder: RunFolder, reporter: Reporter) -> bool:
    """Run the remaining steps, writing metrics and checkpoints on the way.

    Ctrl-C (or a polite kill) ends the run after the step it is in, and saves.

    Args:
        trainer: new, or restored.
        folder: where files go.
        reporter: who is told.

    Returns:
        Whether all steps are done; False if the run was interrupted.

    """
    training = trainer.options.training
    folder.start_metrics(trainer.step)
    with _interrupts() as interrupted:
        while trainer.step < training.steps and not interrupted:
            rate = trainer.optimizer.lr
            started = time.perf_counter()
            loss = trainer.train_step()
            seconds = time.perf_counter() - started
            row = {"step": trainer.step, "loss": loss, "lr": rate, "seconds": seconds}
            reporter.stepped(trainer.step, loss, trainer.tokens_per_step / seconds)
            last = trainer.step == training.steps
            if last or trainer.step % training.eval_every == 0:
                row["valid_nats_per_character"] = trainer.validation_loss()
                reporter.evaluated(trainer.step, loss, row["valid_nats_per_character"])
            folder.add_metrics(row)
            if last or trainer.step % training.save_every == 0:
                folder.save(trainer.snapshot())
        if trainer.step < training.steps:
            folder.save(trainer.snapshot())
    return trainer.step == training.steps


@contextmanager
def _interrupts() -> Iterator[list[int]]:
    """A list that fills when the user presses Ctrl-C or the system asks the program to end.

    The step in hand is finished, for half an optimiser step is no state to save. A second Ctrl-C
    ends the program at once.
    """
    seen: list[int] = []

    def remember(number: int, frame: FrameType | None) -> None:
        if seen:
            raise KeyboardInterrupt
        seen.append(number)

    numbers = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.signal(number, remember) for number in numbers}
    try:
        yield seen
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
