"""The commands `train` and `sample`: what happens, in order."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

import numpy as np

import minitorch
from minitorch.checkpoint import write_atomically

from . import data
from . import model as models
from .errors import UserError
from .ngram import ngram_losses
from .options import RunOptions, flag
from .report import Terminal, draw_losses, training_page
from .run_files import RunFolder, Snapshot, load_snapshot
from .sampling import generate, stream_text
from .training import Trainer, train


def program() -> str:
    """This program, as the user types it: with the environment that `make` made, if it is that."""
    python = Path(sys.executable)
    inside = python.is_relative_to(Path.cwd())
    shown = python.relative_to(Path.cwd()) if inside else "python"
    return f"{shown} project/run_transformer.py"


def train_command(
    given: dict[str, object], out: str, resume: bool, record: str, terminal: Terminal
) -> int:
    """Train, from the start or from where a run stopped.

    Args:
        given: the options named on the command line.
        out: the run's folder.
        resume: whether to go on with what is in it.
        record: a file for the result as a Markdown page, or "".
        terminal: where to print.

    Returns:
        The exit code: 0, or 130 if the run was interrupted (and saved).

    """
    folder = RunFolder(out)
    snapshot = folder.load() if resume else None
    options = _resumed_options(snapshot, given) if snapshot else RunOptions().replaced(given)
    options.check()
    tokenizer = snapshot.tokenizer if snapshot else None
    corpus = data.load(options.data, options.model.context, tokenizer)
    trainer = Trainer(options, corpus)
    if snapshot:
        trainer.restore(snapshot)
    _introduce(trainer, terminal)
    if not snapshot:
        _show_sample(trainer, "sample before training", terminal)
    with terminal.progress(options.training.steps, trainer.step):
        finished = train(trainer, folder, terminal)
    if not finished:
        terminal.say(f"interrupted after step {trainer.step}; saved to {folder.checkpoint}")
        terminal.say(f"go on with: {program()} train --resume --out {out}")
        return 130
    own, ngrams = _conclude(trainer, folder, terminal)
    if record:
        page = training_page(folder.read_metrics(), trainer.tokens_per_step, own, ngrams)
        write_atomically(record, page.encode())
        terminal.say(f"recorded    {record}")
    return 0


def _resumed_options(snapshot: Snapshot, given: dict[str, object]) -> RunOptions:
    """The options of the run that goes on; naming a different one is a mistake worth a message."""
    options = snapshot.options
    for name, value in options.flat().items():
        if given.get(name, value) != value:
            raise UserError(
                f"the run was started with {flag(name)} {value}, not {given[name]}: "
                f"leave {flag(name)} out, or start anew without --resume"
            )
    return options


def _introduce(trainer: Trainer, terminal: Terminal) -> None:
    options, corpus = trainer.options, trainer.corpus
    text = options.data.data or "the text inside Python (pydoc_data.topics)"
    terminal.say(
        f"{text}: {len(corpus.train_text):,} characters to learn from, {len(corpus.valid_text):,} "
        f"held out, {corpus.tokenizer.size} different tokens"
    )
    model = options.model
    terminal.say(
        f"{model.layers} layers, d_model {model.d_model}, {model.heads} heads, "
        f"context {model.context}: {models.size(trainer.model):,} weights in {model.dtype}, "
        f"{model.attention} attention"
    )
    if options.training.device == "cuda":
        terminal.say(f"on {minitorch.cuda.device_name()}, {_how_on_the_gpu(options)}")


def _how_on_the_gpu(options: RunOptions) -> str:
    numbers = models.COMPUTE_DTYPES[options.model.precision] or options.model.dtype
    launched = "as one CUDA graph" if options.training.graph else "kernel by kernel"
    return f"computing in {numbers}, each step launched {launched}"


def _show_sample(trainer: Trainer, title: str, terminal: Terminal, count: int = 240) -> None:
    corpus = trainer.corpus
    prompt = _prompt(corpus)
    ids = corpus.tokenizer.encode(prompt)
    tokens = generate(trainer.model, ids, seed=trainer.options.training.seed)
    terminal.stream(title, prompt, stream_text(corpus.tokenizer, tokens, count))


def _prompt(corpus: data.Corpus) -> str:
    """Something to begin a sample with that the tokenizer knows."""
    return "The " if set("The ") <= set(corpus.train_text) else corpus.train_text[:4]


def _conclude(trainer: Trainer, folder: RunFolder, terminal: Terminal) -> tuple[float, list[float]]:
    """Show what was reached and where it lies; returns the losses of the model and the n-grams."""
    corpus = trainer.corpus
    _show_sample(trainer, "sample after training", terminal)
    ngrams = ngram_losses(corpus.train_text, corpus.valid_text)
    own = trainer.validation_loss()
    terminal.ngram_table(own, ngrams)
    rows = folder.read_metrics()
    draw_losses(rows, ngrams, corpus.valid_characters_per_token, folder.picture)
    terminal.say(f"checkpoint  {folder.checkpoint}")
    terminal.say(f"metrics     {folder.metrics}")
    terminal.say(f"loss curve  {folder.picture}")
    prompt = shlex.quote(_prompt(corpus))
    terminal.say(f"next, try:  {program()} sample --out {folder.path} --prompt {prompt}")
    return own, ngrams


def sample_command(
    out: str,
    prompt: str,
    count: int,
    temperature: float,
    top_k: int,
    seed: int,
    device: str,
    terminal: Terminal,
) -> int:
    """Write text with the model of a checkpoint.

    Args:
        out: the run's folder, or a checkpoint file.
        prompt: what the text begins with; a line break if empty.
        count: how many tokens to add.
        temperature: 0 takes the likeliest token, more is more surprising.
        top_k: only that many of the likeliest; 0 means all.
        seed: of the chance.
        device: "cpu" or "cuda", whatever the model was trained on.
        terminal: where to print.

    Returns:
        The exit code, 0.

    """
    if count < 0 or temperature < 0 or top_k < 0 or seed < 0:
        raise UserError("--tokens, --temperature, --top-k and --seed must not be negative")
    snapshot = load_snapshot(Path(out))
    model = models.build(snapshot.options.model, snapshot.tokenizer.size, device)
    try:
        model.load_state_dict(snapshot.model)
    except ValueError as error:
        raise UserError(f"the checkpoint does not fit: {error}") from error
    ids = snapshot.tokenizer.encode(prompt)
    if not len(ids):
        prompt, ids = "", np.zeros(1, np.int64)
    tokens = generate(model, ids, temperature=temperature, top_k=top_k, seed=seed)
    title = f"{snapshot.options.model.attention} attention, step {snapshot.step}"
    terminal.stream(title, prompt, stream_text(snapshot.tokenizer, tokens, count))
    return 0
