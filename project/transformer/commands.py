"""The commands `train` and `sample`: what happens, in order."""

from __future__ import annotations

import os
import shlex
import shutil
import sys
from pathlib import Path
from typing import Any

import minitorch
from minitorch.checkpoint import write_atomically
from project.arguments import COUNT_OR_NONE, NOT_NEGATIVE, SEED

from . import data
from . import model as models
from .errors import UserError
from .ngram import ngram_losses
from .options import CHANGEABLE, RunOptions, flag
from .report import Terminal, draw_losses, training_page
from .run_files import RunFolder, Snapshot, load_snapshot
from .run_lock import locked
from .sampling import generate, stream_text
from .sizes import check_size
from .tokenizer import beginning
from .training import Trainer, train


def program() -> str:
    """This program, as the user types it in this folder: with the environment that `make` made, if
    it is that.
    """
    python, script = (
        Path(sys.executable),
        Path(__file__).resolve().parents[1] / "run_transformer.py",
    )
    found = shutil.which("python")
    if python.is_relative_to(Path.cwd()):
        python = python.relative_to(Path.cwd())
    elif found and Path(found).resolve() == python.resolve():
        python = Path("python")
    if script.is_relative_to(Path.cwd()):
        script = script.relative_to(Path.cwd())
    return shlex.join([str(python), str(script)])


def train_command(
    given: dict[str, Any],
    out: str,
    resume: bool,
    overwrite: bool,
    record: str,
    terminal: Terminal,
) -> int:
    """Train, from the start or from where a run stopped.

    Args:
        given: the options named on the command line.
        out: the run's folder.
        resume: whether to go on with what is in it.
        overwrite: whether a run, or other files of its names, that are in it may be lost.
        record: a file for the result as a Markdown page, or "".
        terminal: where to print.

    Returns:
        The exit code: 0, or 130 if the run was interrupted (and saved).

    """
    if given.get("data"):  # so that the run finds it from another folder too
        given = {**given, "data": os.path.abspath(given["data"])}
    folder = RunFolder(out)
    if resume and not folder.checkpoint.is_file():
        raise UserError(f"there is no checkpoint at {folder.checkpoint}: leave --resume out")
    if not resume:  # before the folder is made, for mistakes leave nothing behind
        RunOptions().replaced(given).check()
    with locked(folder.path):
        folder.remove_halves()
        if not resume:
            folder.check_new(overwrite)
        snapshot = folder.load() if resume else None
        options = _resumed_options(snapshot, given) if snapshot else RunOptions().replaced(given)
        trainer = _trainer(options, snapshot)
        _introduce(trainer, terminal)
        if snapshot:
            _say_what_changed(snapshot, trainer, terminal)
        else:
            _show_sample(trainer, "sample before training", terminal)
            if overwrite:
                folder.clear()
        with terminal.progress(options.training.steps, trainer.step):
            finished = train(trainer, folder, terminal)
        if not finished:
            terminal.say(f"interrupted after step {trainer.step}; saved to {folder.checkpoint}")
            command = f"{program()} train --resume --out {shlex.quote(out)}"
            terminal.say(f"go on with: {command}")
            return 130
        own, ngrams = _conclude(trainer, folder, terminal)
        if record:
            _record(record, trainer, folder, own, ngrams, terminal)
    return 0


def _trainer(options: RunOptions, snapshot: Snapshot | None) -> Trainer:
    """A new one, or the one of which a snapshot was taken."""
    options.check()
    tokenizer, fingerprint = None, None
    if snapshot:
        tokenizer, fingerprint = snapshot.tokenizer, snapshot.fingerprint
    corpus = data.load(options.data, options.model.context, tokenizer, fingerprint)
    trainer = Trainer(options, corpus)
    if snapshot:
        trainer.restore(snapshot)
    return trainer


def _record(
    path: str,
    trainer: Trainer,
    folder: RunFolder,
    own: float,
    ngrams: list[float],
    terminal: Terminal,
) -> None:
    """Write the result as a Markdown page, if that can be done."""
    page = training_page(folder.read_metrics(), trainer.tokens_per_step, own, ngrams)
    try:
        write_atomically(path, page.encode())
    except OSError as error:
        folder.tell(f"the record {path}", error)
    else:
        terminal.say(f"recorded    {path}")


def _resumed_options(snapshot: Snapshot, given: dict[str, Any]) -> RunOptions:
    """The options of the run that goes on.

    Naming a different one is a mistake worth a message, but for those that may change from here on.
    """
    old = snapshot.options
    for name, value in old.flat().items():
        if name not in CHANGEABLE and given.get(name, value) != value:
            raise UserError(
                f"the run was started with {flag(name)} {value}, not {given[name]}: "
                f"leave {flag(name)} out, or start anew with --overwrite"
            )
    given = dict(given)
    if given.get("device") == "cpu" and old.model.precision in ("bf16", "fp16"):
        given.setdefault("precision", "")  # that of the weights: the CPU has no other
    options = old.replaced(given)
    if options.training.steps < snapshot.step:
        raise UserError(
            f"the run has taken {snapshot.step} steps already: --steps must be at least as many, "
            f"got {options.training.steps}"
        )
    if options.data.data and "data" not in given and not Path(options.data.data).is_file():
        raise UserError(
            f"the text {options.data.data} is not there any more: say with --data where it is now"
        )
    return options


def _say_what_changed(snapshot: Snapshot, trainer: Trainer, terminal: Terminal) -> None:
    before, now = snapshot.options.flat(), trainer.options.flat()
    changed = [f"{flag(n)} {before[n]} -> {now[n]}" for n in now if before[n] != now[n]]
    terminal.say(
        f"going on after step {trainer.step}, with a learning rate of {trainer.optimizer.lr:.3g}"
        + (f"; {', '.join(changed)}" if changed else "")
    )


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
    """Something to begin a sample with that the tokenizer knows, and that can be typed."""
    if set("The ") <= set(corpus.train_text):
        return "The "
    printable = "".join(c if c.isprintable() else "\n" for c in corpus.train_text[:1000])
    return next((line[:4] for line in printable.split("\n") if line.strip()), "")


def _conclude(trainer: Trainer, folder: RunFolder, terminal: Terminal) -> tuple[float, list[float]]:
    """Show what was reached and where it lies; returns the losses of the model and the n-grams."""
    corpus = trainer.corpus
    _show_sample(trainer, "sample after training", terminal)
    ngrams = ngram_losses(corpus.train_text, corpus.valid_text)
    own = trainer.validation_loss()
    terminal.ngram_table(own, ngrams)
    rows = folder.read_metrics()
    try:
        draw_losses(rows, ngrams, corpus.valid_characters_per_token, folder.picture)
    except Exception as error:  # whatever matplotlib raises: the run is done and saved
        folder.tell("the picture", error)
    terminal.say(f"checkpoint  {folder.checkpoint}")
    terminal.say(f"metrics     {folder.metrics}")
    terminal.say(f"loss curve  {folder.picture}")
    prompt = shlex.quote(_prompt(corpus))
    out = shlex.quote(str(folder.path))
    terminal.say(f"next, try:  {program()} sample --out {out} --prompt {prompt}")
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
        prompt: what the text begins with; a line break if empty (the first of the tokens if the
            model's text had no line break). Its line breaks are read as those of texts are.
        count: how many tokens to add.
        temperature: 0 takes the likeliest token, more is more surprising.
        top_k: only that many of the likeliest; 0 means all.
        seed: of the chance.
        device: "cpu" or "cuda", whatever the model was trained on.
        terminal: where to print.

    Returns:
        The exit code, 0.

    """
    for name, value, limits in (
        ("--tokens", count, COUNT_OR_NONE),
        ("--temperature", temperature, NOT_NEGATIVE),
        ("--top-k", top_k, COUNT_OR_NONE),
        ("--seed", seed, SEED),
    ):
        problem = limits.problem(value)
        if problem:
            raise UserError(f"{name} {problem}")
    models.backend(device)
    snapshot = load_snapshot(Path(out))
    options = snapshot.options.replaced({"device": device})
    check_size(options, snapshot.tokenizer.size, training=False)
    model = models.build(snapshot.options.model, snapshot.tokenizer.size, device)
    try:
        model.load_state_dict(snapshot.model)
    except ValueError as error:
        raise UserError(f"the checkpoint does not fit: {error}") from error
    prompt = prompt.replace("\r\n", "\n").replace("\r", "\n")
    ids = snapshot.tokenizer.encode(prompt) if prompt else beginning(snapshot.tokenizer)
    tokens = generate(model, ids, temperature=temperature, top_k=top_k, seed=seed)
    title = f"{snapshot.options.model.attention} attention, step {snapshot.step}"
    terminal.stream(title, prompt, stream_text(snapshot.tokenizer, tokens, count))
    return 0
