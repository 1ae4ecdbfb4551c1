"""The training loop: one step, the validation loss, and a run that can stop and go on."""

from __future__ import annotations

import math
import signal
import sys
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Protocol

import numpy as np

import minitorch
from minitorch import AdamW, DecoderLM, GradScaler, no_grad

from . import model as models
from .cuda_step import CudaStep
from .data import Corpus, check_fingerprint, validation_windows, windows
from .errors import Diverged, UserError
from .options import RunOptions, TrainingOptions, largest_norm
from .run_files import RunFolder, Snapshot
from .sizes import check_size
from .tokenizer import Ids


class Pending(Protocol):
    """A loss that may still be computed."""

    def value(self) -> float:
        """The loss; waits for it."""


@dataclass(frozen=True)
class Known:
    """A loss that has been computed."""

    number: float

    def value(self) -> float:
        """See `Pending`."""
        return self.number


@dataclass(frozen=True)
class StartedStep:
    """A step of which the loss may not be known yet: its number from 1, its learning rate."""

    number: int
    lr: float
    pending: Pending

    def loss(self) -> float:
        """Nats per token before the step; waits for it.

        Raises:
            Diverged: it is not a finite number.

        """
        value = self.pending.value()
        if not math.isfinite(value):
            raise Diverged("the loss", value, self.number)
        return value


class CpuStep:
    """Takes training steps on the CPU (on the GPU: `CudaStep`).

    Args:
        model: the network.
        optimizer: of its parameters.
        options: clipping.

    """

    def __init__(self, model: DecoderLM, optimizer: AdamW, options: TrainingOptions) -> None:
        self.model = model
        self.optimizer = optimizer
        self.options = options

    def start(self, windows: Ids, step: int) -> Known:
        """Take a step; the weights stay as they are if loss or gradient are not finite.

        Args:
            windows: token numbers (batch, context + 1); a target is the token after its input.
            step: its number.

        Returns:
            The loss before the step.

        Raises:
            Diverged: the loss is a number, but the norm of the gradient is not.

        """
        self.model.train()
        self.optimizer.zero_grad()
        loss = models.loss_of_ids(self.model, windows[:, :-1], windows[:, 1:])
        value = loss.item()
        if math.isfinite(value):
            loss.backward()
            norm = float(self.optimizer.clip_grad_norm_(largest_norm(self.options)))
            if not math.isfinite(norm):
                raise Diverged("the gradient's norm", norm, step + 1)
            self.optimizer.step()
        return Known(value)


class Trainer:
    """A model in training: everything that changes from step to step.

    Args:
        options: of the run.
        corpus: the text.

    Raises:
        UserError: the run is to be on the GPU, and there is none; or there is no room for it.

    """

    def __init__(self, options: RunOptions, corpus: Corpus) -> None:
        self.options = options
        self.corpus = corpus
        training = options.training
        models.backend(training.device)
        check_size(options, corpus.tokenizer.size)
        minitorch.manual_seed(training.seed)
        self.model = models.build(options.model, corpus.tokenizer.size, training.device)
        self.optimizer, self.schedule = models.optimizer(self.model, training)
        self.scaler = GradScaler(enabled=options.model.precision == "fp16")
        self.step = 0
        self._taker: CpuStep | CudaStep
        if training.device == "cuda":
            self._taker = CudaStep(
                self.model, self.optimizer, self.scaler, training, options.model.context
            )
        else:
            self._taker = CpuStep(self.model, self.optimizer, training)
        # Steps to begin before the loss of one is asked for: the GPU must not wait for the host.
        self.steps_ahead = 1 if training.device == "cuda" else 0

    @property
    def tokens_per_step(self) -> int:
        """Tokens that one step learns from."""
        return self.options.training.batch * self.options.model.context

    def train_step(self) -> float:
        """One step of AdamW on the next batch.

        Returns:
            The loss before the step, in nats per token.

        Raises:
            Diverged: the loss is not a finite number; the weights are unchanged.

        """
        return self.start_step().loss()

    def start_step(self) -> StartedStep:
        """Begin the next step; on the GPU it goes on after this has returned."""
        training, rate = self.options.training, self.optimizer.lr
        chosen = windows(
            self.corpus.train_ids,
            self.options.model.context,
            training.batch,
            training.seed,
            self.step,
        )
        pending = self._taker.start(chosen, self.step)
        self.schedule.step()
        self.step += 1
        return StartedStep(self.step, rate, pending)

    def validation_loss(self) -> float:
        """Nats per character on the held-out text; draws no random numbers."""
        inputs, targets = validation_windows(self.corpus.valid_ids, self.options.model.context)
        rows = self.options.training.batch
        total = 0.0
        self.model.eval()
        with no_grad():
            for start in range(0, len(inputs), rows):
                part = slice(start, start + rows)
                mean = models.loss_of_ids(self.model, inputs[part], targets[part]).item()
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
            self.scaler.state_dict(),
        )

    def restore(self, snapshot: Snapshot) -> None:
        """Go on where a snapshot was taken.

        Raises:
            UserError: it was taken of another model, or with another text.

        """
        check_fingerprint(self.corpus.fingerprint, snapshot.fingerprint)
        try:
            self.model.load_state_dict(snapshot.model)
            self.optimizer.load_state_dict(models.grouped_state(snapshot.optimizer, self.model))
            if snapshot.scaler:  # none if the run has computed in another precision until now
                self.scaler.load_state_dict(snapshot.scaler)
            self.schedule.load_state_dict({"steps": np.array(snapshot.step)})
            minitorch.set_rng_state(snapshot.rng)
        except (LookupError, TypeError, ValueError, OverflowError) as error:
            raise UserError(f"the checkpoint does not fit: {error}") from error
        self.step = snapshot.step


class Reporter(Protocol):
    """Who is told how a run goes (see `report`)."""

    def stepped(self, step: int, loss: float, tokens_per_second: float) -> None:
        """A step is done."""

    def evaluated(self, step: int, loss: float, valid_loss: float) -> None:
        """The validation loss is known."""


def train(trainer: Trainer, folder: RunFolder, reporter: Reporter) -> bool:
    """Run the remaining steps, writing metrics and checkpoints on the way.

    Ctrl-C, a polite kill and a terminal that is closed end the run after the step it is in, and
    save. A checkpoint that cannot be written is told, and tried again at the next save; the last
    one must be written.

    Args:
        trainer: new, or restored.
        folder: where files go.
        reporter: who is told.

    Returns:
        Whether all steps are done; False if the run was interrupted.

    Raises:
        UserError: the loss is no number any more (the last finite weights have been saved), or the
            last checkpoint cannot be written.

    """
    training = trainer.options.training
    folder.start_metrics(trainer.step)
    log = _Log(trainer, folder, reporter)
    with _interrupts() as interrupted:
        try:
            _steps(trainer, folder, log, interrupted)
        except Diverged as error:
            log.write()
            raise UserError(f"{error}; {_save_last_finite(trainer, folder, error)}") from error
        if folder.saved_step != trainer.step:
            folder.save(trainer.snapshot())
    return trainer.step == training.steps


def _steps(trainer: Trainer, folder: RunFolder, log: _Log, interrupted: list[int]) -> None:
    """The remaining steps, or those until the run is interrupted."""
    training = trainer.options.training
    while trainer.step < training.steps and not interrupted:
        log.add(trainer.start_step())
        last = trainer.step == training.steps
        evaluates = last or trainer.step % training.eval_every == 0
        saves = last or trainer.step % training.save_every == 0
        log.catch_up(0 if evaluates or saves else trainer.steps_ahead)
        if evaluates:
            log.evaluate()
        if saves:
            log.write()
            try:
                folder.save(trainer.snapshot())
            except UserError as error:  # perhaps there is room again at the next save
                folder.tell("a checkpoint", error)
            log.restart_clock()
    log.catch_up(0)
    log.write()


def _save_last_finite(trainer: Trainer, folder: RunFolder, error: Diverged) -> str:
    """Save the weights of before a step that diverged, beside the checkpoint there is.

    Returns:
        Where they are, as the end of a sentence.

    """
    trainer.step = error.step - 1
    if folder.saved_step == trainer.step:
        return f"the weights before that are in {folder.checkpoint}"
    snapshot = trainer.snapshot()
    if not all(np.isfinite(array).all() for array in snapshot.model.values()):
        there = folder.saved_step is not None
        kept = (
            f"the last checkpoint is of step {folder.saved_step}" if there else "nothing is saved"
        )
        return f"the weights before that are no numbers either, {kept}"
    try:
        copy = folder.keep_copy()
        folder.save(snapshot)
    except UserError as failed:
        return str(failed)
    kept = f", and the checkpoint of before is kept as {copy}" if copy else ""
    return f"the weights before that are saved in {folder.checkpoint}{kept}"


class _Log:
    """Rows of metrics, written a little after their steps have begun.

    Args:
        trainer: whose steps.
        folder: where rows go.
        reporter: who is told.

    """

    def __init__(self, trainer: Trainer, folder: RunFolder, reporter: Reporter) -> None:
        self.trainer = trainer
        self.folder = folder
        self.reporter = reporter
        self._started: deque[StartedStep] = deque()
        self._row: dict[str, float] = {}  # of the last step whose loss is known, not yet written
        self._since = time.perf_counter()

    def add(self, step: StartedStep) -> None:
        """A step has begun."""
        self._started.append(step)

    def catch_up(self, left: int) -> None:
        """Wait for all losses but those of the last `left` steps."""
        while len(self._started) > left:
            self.write()
            step = self._started.popleft()
            loss = step.loss()
            seconds = time.perf_counter() - self._since
            self._row = {"step": step.number, "loss": loss, "lr": step.lr, "seconds": seconds}
            self.reporter.stepped(step.number, loss, self.trainer.tokens_per_step / seconds)
            self._since = time.perf_counter()

    def evaluate(self) -> None:
        """Add the validation loss to the last row."""
        loss = self.trainer.validation_loss()
        self._row["valid_nats_per_character"] = loss
        self.reporter.evaluated(int(self._row["step"]), self._row["loss"], loss)
        self.restart_clock()

    def restart_clock(self) -> None:
        """Leave what happened until now out of the next step's time."""
        self._since = time.perf_counter()

    def write(self) -> None:
        """Write the last row."""
        if self._row:
            self.folder.add_metrics(self._row)
            self._row = {}


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

    numbers = [signal.SIGINT, signal.SIGTERM]
    if sys.platform != "win32":
        numbers.append(signal.SIGHUP)  # the terminal has been closed
    # What the user has told the system to ignore (nohup does) stays ignored.
    numbers = [n for n in numbers if signal.getsignal(n) != signal.SIG_IGN]
    before = {number: signal.signal(number, remember) for number in numbers}
    try:
        yield seen
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
