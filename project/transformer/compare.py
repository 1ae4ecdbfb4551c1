"""The command `compare`: flash and standard attention from the same weights on the same batches.

Each trains in a process of its own, for memory that one has used stays with the process.
"""

from __future__ import annotations

import dataclasses
import multiprocessing
import statistics
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass

from rich.table import Table

import minitorch

from . import data
from . import model as models
from .memory import peak, restart_peak
from .options import COMPARE_DEFAULTS, RunOptions
from .report import Terminal
from .training import Trainer

KINDS = ("flash", "standard")


@dataclass(frozen=True)
class Measurement:
    """One kind of attention: its losses, the median time of a step, what memory grew by at most."""

    losses: list[float]
    seconds: float
    peak_bytes: int


def measure(options: RunOptions) -> Measurement:
    """Train and measure in this process.

    Args:
        options: of the run; the kind of attention is one of them.

    """
    corpus = data.load(options.data, options.model.context)
    _compile(options, corpus)
    on_gpu = options.training.device == "cuda"
    before = _restart_gpu_peak() if on_gpu else restart_peak()
    trainer = Trainer(options, corpus)
    losses, times = [], []
    for _ in range(options.training.steps):
        started = time.perf_counter()
        losses.append(trainer.train_step())
        times.append(time.perf_counter() - started)
    after = minitorch.cuda.max_memory_allocated() if on_gpu else peak()
    return Measurement(losses, statistics.median(times), max(0, after - before))


def _restart_gpu_peak() -> int:
    minitorch.cuda.reset_peak_memory_stats()
    return minitorch.cuda.memory_allocated()


def _compile(options: RunOptions, corpus: data.Corpus) -> None:
    """Take a step of a small model, so that compiling counts neither as time nor as memory."""
    small = options.replaced({"layers": 1, "context": min(8, options.model.context), "batch": 1})
    Trainer(small, corpus).train_step()


def compare_command(given: dict[str, object], terminal: Terminal) -> int:
    """Measure both kinds and print them side by side.

    Args:
        given: the options named on the command line.
        terminal: where to print.

    Returns:
        The exit code, 0.

    Raises:
        UserError: there is no GPU.

    """
    options = RunOptions().replaced({**COMPARE_DEFAULTS, **given})
    options.check()
    models.backend(options.training.device)  # a GPU is missed before anything is printed
    model = options.model
    terminal.say(
        f"{options.training.steps} steps each: {model.layers} layers, d_model {model.d_model}, "
        f"{model.heads} heads, context {model.context}, batch {options.training.batch}, "
        f"{model.dtype}"
    )
    results = {}
    for kind in KINDS:
        terminal.say(f"training with {kind} attention ...")
        chosen = dataclasses.replace(options, model=dataclasses.replace(model, attention=kind))
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
            results[kind] = process.submit(measure, chosen).result()
    terminal.console.print(_table(results))
    flash, standard = (results[kind].losses for kind in KINDS)
    difference = max(abs(a - b) for a, b in zip(flash, standard, strict=True))
    terminal.say(f"largest difference between the two losses at any step: {difference:.1e} nats")
    return 0


def _table(results: dict[str, Measurement]) -> Table:
    table = Table(title="the same model, weights and batches")
    for title in ("attention", "first loss", "last loss", "time per step", "peak memory"):
        table.add_column(title, justify="left" if title == "attention" else "right")
    for kind, result in results.items():
        table.add_row(
            kind,
            f"{result.losses[0]:.5f}",
            f"{result.losses[-1]:.5f}",
            f"{result.seconds * 1000:.1f} ms",
            f"{result.peak_bytes / 2**20:.0f} MiB",
        )
    return table
