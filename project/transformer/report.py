"""What the user sees: a live progress bar, tables, text, and the picture of the loss."""

from __future__ import annotations

import math
import statistics
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from itertools import chain, islice
from pathlib import Path
from typing import IO, cast

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from project.bench.machine import about, machine

from .errors import shown
from .ngram import SMOOTHING
from .output import CompileNote, Output

Row = dict[str, float]


class Terminal:
    """Prints to a terminal, or plainly to a file or pipe; shows control characters as signs.

    Args:
        console: where to; standard output if not given.

    """

    def __init__(self, console: Console | None = None) -> None:
        self.output = Output(sys.stdout)
        self.console = console or Console(highlight=False, file=cast(IO[str], self.output))
        self._progress: Progress | None = None
        self._first_step = ExitStack()
        self._said_compiling = False
        self._smooth_loss: float | None = None
        self._valid = ""

    def say(self, text: str = "") -> None:
        """Print a line; square brackets are only brackets."""
        self.console.print(shown(text), markup=False, soft_wrap=True)

    def compiling(self) -> AbstractContextManager[None]:
        """Say so once, if the block takes long because numba compiles."""
        return CompileNote(self._say_compiling).listening()

    def _say_compiling(self) -> None:
        if not self._said_compiling:
            self._said_compiling = True
            self.say("compiling ... (once; later runs find the result in numba's cache)")

    def stream(self, title: str, prompt: str, pieces: Iterable[str]) -> None:
        """Print generated text as it comes, the prompt first; ends when nobody reads it."""
        remaining = iter(pieces)
        with self.compiling():
            first = list(islice(remaining, 1))
        self.console.rule(shown(title), align="left")
        self.console.out(shown(prompt), end="", style="bold")
        held = ""  # a carriage return, until it is known whether a line break follows
        for piece in chain(first, remaining):
            piece = held + piece
            held = "\r" if piece.endswith("\r") else ""
            self.console.out(shown(piece.removesuffix(held)), end="")
            if self.output.gone:
                return
        self.console.out(shown(held))
        self.console.rule()

    @contextmanager
    def progress(self, total: int, done: int) -> Iterator[None]:
        """Show the bar while the block runs.

        Args:
            total: steps of the run.
            done: steps taken before (of a resumed run).

        """
        columns = (
            TextColumn("training"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[figures]}"),
            TimeRemainingColumn(),
            TextColumn("left"),
        )
        with Progress(
            *columns, console=self.console, disable=not self.console.is_terminal
        ) as progress:
            self._progress = progress
            self._task = progress.add_task("", total=total, completed=done, figures="")
            self._first_step.enter_context(self.compiling())
            try:
                yield
            finally:
                self._first_step.close()
                self._progress = None

    def stepped(self, step: int, loss: float, tokens_per_second: float) -> None:
        """Move the bar; the loss shown is a running mean."""
        self._first_step.close()
        old = loss if self._smooth_loss is None else self._smooth_loss
        self._smooth_loss = 0.95 * old + 0.05 * loss
        if self._progress is not None:
            figures = (
                f"loss {self._smooth_loss:.3f}{self._valid}  {tokens_per_second:,.0f} tokens/s"
            )
            self._progress.update(self._task, completed=step, figures=figures)

    def evaluated(self, step: int, loss: float, valid_loss: float) -> None:
        """Print a line that stays."""
        self._valid = f" (held out {valid_loss:.3f})"
        self.say(f"step {step:>5}  loss {loss:.4f}  held out {valid_loss:.4f} nats per character")

    def ngram_table(self, own: float, ngrams: Sequence[float]) -> None:
        """Set the model's validation loss beside those of the n-gram models."""
        table = Table(title="nats per character on the held-out text (lower is better)")
        table.add_column("model")
        table.add_column("loss", justify="right")
        for order, loss in enumerate(ngrams, start=1):
            table.add_row(f"{order}-gram (counts, smoothing {SMOOTHING:g})", f"{loss:.3f}")
        table.add_row("this transformer", f"{own:.3f}", style="bold")
        self.console.print(table)


def training_page(
    rows: Sequence[Row], tokens_per_step: int, own: float, ngrams: Sequence[float]
) -> str:
    """The result of a run as a Markdown page.

    Args:
        rows: its metrics.
        tokens_per_step: tokens that a step learns from.
        own: its validation loss, nats per character.
        ngrams: those of the n-gram models, by order.

    """
    steps = len(rows)
    median = statistics.median([row["seconds"] for row in rows] or [math.nan]) * 1000
    titles = " | ".join(f"{order}-gram" for order in range(1, len(ngrams) + 1))
    losses = " | ".join(f"{loss:.3f}" for loss in ngrams)
    return f"""# Training run

{about(machine("numpy", "numba"))}. {steps} steps of {tokens_per_step} tokens,
{median:.1f} ms a step (median). Command: `python project/run_transformer.py train --record ...`.

Nats per character on the held-out text (lower is better):

| {titles} | this transformer |
|{"---|" * (len(ngrams) + 1)}
| {losses} | {own:.3f} |
"""


def draw_losses(
    rows: Sequence[Row], ngrams: Sequence[float], characters_per_token: float, path: Path
) -> None:
    """Draw the training and validation loss, with the n-gram models as levels, to a PNG file.

    Args:
        rows: the metrics of a run.
        ngrams: their losses, by order.
        characters_per_token: turns the training loss into nats per character.
        path: the file.

    """
    from matplotlib.figure import Figure  # without pyplot: no window system is looked for

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.add_subplot()
    steps = [row["step"] for row in rows]
    losses = [row["loss"] / characters_per_token for row in rows]
    axes.plot(steps, losses, linewidth=0.8, alpha=0.6, label="training batches")
    evaluated = [row for row in rows if "valid_nats_per_character" in row]
    axes.plot(
        [row["step"] for row in evaluated],
        [row["valid_nats_per_character"] for row in evaluated],
        marker="o",
        markersize=3,
        label="held-out text",
    )
    for order, loss in enumerate(ngrams, start=1):
        axes.axhline(loss, color="grey", linewidth=0.6, linestyle="--")
        axes.annotate(f"{order}-gram", (steps[0] if steps else 0, loss), fontsize=7, va="bottom")
    axes.set(xlabel="step", ylabel="nats per character", title="Loss")
    axes.legend()
    figure.savefig(path, dpi=120)
