"""The command `compare`: kinds of attention from the same weights on the same batches.

Each trains in a process of its own, for memory that one has used stays with the process.
"""

from __future__ import annotations

import dataclasses
import multiprocessing
import statistics
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from rich.table import Table

import minitorch
from project.bench.machine import about, machine

from . import data
from . import model as models
from .attention import WHOLE
from .errors import UserError
from .memory import peak, restart_peak
from .options import COMPARE_DEFAULTS, RunOptions, flag
from .report import Terminal
from .training import Trainer

STAGES = 10  # of a run, whose mean losses a page shows


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


def compare_command(
    given: dict[str, object], kinds: Sequence[str], record: str, terminal: Terminal
) -> int:
    """Measure kinds of attention and print them side by side.

    Args:
        given: the options named on the command line.
        kinds: of attention.
        record: a file for the result as a Markdown page, or "".
        terminal: where to print.

    Returns:
        The exit code, 0.

    Raises:
        UserError: there is no GPU, or no such kind, or the page cannot be written.

    """
    options = RunOptions().replaced({**COMPARE_DEFAULTS, **given})
    for kind in kinds:
        options.replaced({"attention": kind}).check()
    models.backend(options.training.device)  # a GPU is missed before anything is printed
    model = options.model
    terminal.say(
        f"{options.training.steps} steps each: {model.layers} layers, d_model {model.d_model}, "
        f"{model.heads} heads, context {model.context}, batch {options.training.batch}, "
        f"{model.dtype}"
    )
    results = {}
    for kind in kinds:
        terminal.say(f"training with {kind} attention ...")
        chosen = dataclasses.replace(options, model=dataclasses.replace(model, attention=kind))
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
            results[kind] = process.submit(measure, chosen).result()
    terminal.console.print(_table(results))
    if set(WHOLE) <= set(results):
        flash, standard = (results[kind].losses for kind in WHOLE)
        difference = max(abs(a - b) for a, b in zip(flash, standard, strict=True))
        terminal.say(
            f"largest difference between the two losses at any step: {difference:.1e} nats"
        )
    if record:
        try:
            Path(record).write_text(comparison_page(options, results), encoding="utf-8")
        except OSError as error:
            raise UserError(f"the record {record} cannot be written: {error.strerror}") from error
    return 0


def comparison_page(options: RunOptions, results: dict[str, Measurement]) -> str:
    """The losses of each kind as a Markdown page: means over the stages of the run."""
    steps, model = options.training.steps, options.model
    size = max(steps // STAGES, 1)
    stages = [(first, min(first + size, steps)) for first in range(0, steps, size)]
    rows = [f"| attention | {' | '.join(f'{a + 1} to {b}' for a, b in stages)} |"]
    rows.append("|---|" + "---|" * len(stages))
    for kind, result in results.items():
        means = (f"{statistics.fmean(result.losses[a:b]):.3f}" for a, b in stages)
        rows.append(f"| {kind} | {' | '.join(means)} |")
    usual = RunOptions().replaced(COMPARE_DEFAULTS).flat()
    given = [f"{flag(n)} {v}" for n, v in options.flat().items() if v != usual[n]]
    command = ["compare --kinds", *results, *given, "--record ..."]
    table = "\n".join(rows)
    return f"""# Kinds of attention

{about(machine("numpy", "numba"))}. {model.layers} layers, d_model {model.d_model}, {model.heads}
heads, context {model.context}, batch {options.training.batch}; each kind from the same weights on
the same batches. Command: `python project/run_transformer.py {" ".join(command)}`.

Mean training loss in nats per token, by steps:

{table}
"""


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
