"""What can be chosen for a model and for its training: names, defaults, limits, help texts.

The command line is built from these dataclasses (`cli.py`) and checkpoints carry them.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from .errors import UserError


def option(default: Any, text: str, choices: tuple[str, ...] | None = None) -> Any:
    """A field with its default, its help text and, for a name, the names there are."""
    return field(default=default, metadata={"help": text, "choices": choices})


@dataclass(frozen=True)
class ModelOptions:
    """The network."""

    layers: int = option(4, "number of transformer layers")
    d_model: int = option(128, "size of the embedding")
    heads: int = option(4, "number of attention heads; divides --d-model")
    d_middle: int = option(256, "size of the feed-forward layers in between")
    context: int = option(128, "longest sequence, in tokens")
    dropout: float = option(0.0, "probability of dropout, everywhere")
    attention: str = option("flash", "kind of attention", ("flash", "standard"))
    dtype: str = option("float32", "type of the weights", ("float32", "float64"))
    precision: str = option(
        "",
        "numbers that the network computes with, from float32 weights; none: those of --dtype",
        ("fp32", "bf16", "fp16"),
    )


@dataclass(frozen=True)
class DataOptions:
    """The text and how it becomes tokens."""

    data: str = option("", "a UTF-8 text file, in place of the text inside Python")
    tokenizer: str = option("char", "a token is a character, or a BPE piece", ("char", "bpe"))
    vocab: int = option(1024, "size of the BPE vocabulary")
    held_out: float = option(0.1, "share of the text, at its end, for the validation loss")


@dataclass(frozen=True)
class TrainingOptions:
    """The optimisation: AdamW, linear warm-up, then a cosine down to zero."""

    steps: int = option(1000, "number of steps")
    batch: int = option(16, "sequences in a step")
    lr: float = option(5e-3, "highest learning rate")
    warmup: int = option(100, "steps until the learning rate is reached")
    weight_decay: float = option(0.1, "AdamW's weight decay")
    beta2: float = option(0.99, "AdamW's decay of the squared gradients")
    clip: float = option(1.0, "largest norm of the gradient")
    seed: int = option(1, "of the weights, the batches and dropout")
    device: str = option("cpu", "where it is computed", ("cpu", "cuda"))
    graph: bool = option(True, "on the GPU, launch a whole step at once, as a CUDA graph")
    eval_every: int = option(100, "steps from one validation loss to the next")
    save_every: int = option(200, "steps from one checkpoint to the next")


@dataclass(frozen=True)
class RunOptions:
    """Everything that makes a run what it is."""

    model: ModelOptions = field(default_factory=ModelOptions)
    data: DataOptions = field(default_factory=DataOptions)
    training: TrainingOptions = field(default_factory=TrainingOptions)

    def replaced(self, given: dict[str, Any]) -> RunOptions:
        """A copy in which the options named in `given` have its values."""
        parts = {}
        for part in dataclasses.fields(self):
            old = getattr(self, part.name)
            names = {f.name for f in dataclasses.fields(old)}
            mine = {name: value for name, value in given.items() if name in names}
            parts[part.name] = dataclasses.replace(old, **mine)
        return RunOptions(**parts)

    def flat(self) -> dict[str, Any]:
        """All options by name; the names differ from part to part."""
        return {
            f.name: getattr(getattr(self, part.name), f.name)
            for part in dataclasses.fields(self)
            for f in dataclasses.fields(getattr(self, part.name))
        }

    def check(self) -> None:
        """Raise `UserError` for the first option that makes no sense."""
        values = self.flat()
        for name in ("layers", "d_model", "heads", "d_middle", "context", "steps", "batch"):
            if values[name] < 1:
                raise UserError(f"{flag(name)} must be at least 1, got {values[name]}")
        for name in ("eval_every", "save_every"):
            if values[name] < 1:
                raise UserError(f"{flag(name)} must be at least 1, got {values[name]}")
        for name in ("lr", "clip"):
            if not values[name] > 0:
                raise UserError(f"{flag(name)} must be above 0, got {values[name]}")
        for name in ("warmup", "weight_decay", "seed"):
            if values[name] < 0:
                raise UserError(f"{flag(name)} must not be negative, got {values[name]}")
        for name in ("dropout", "beta2"):
            if not 0 <= values[name] < 1:
                raise UserError(f"{flag(name)} must be in [0, 1), got {values[name]}")
        if not 0 < values["held_out"] < 1:
            raise UserError(f"--held-out must be between 0 and 1, got {values['held_out']}")
        if values["d_model"] % values["heads"]:
            raise UserError(
                f"--heads must divide --d-model = {values['d_model']}, got {values['heads']}"
            )
        _check_precision(values["precision"], values["dtype"], values["device"])
        if values["vocab"] < 256:
            raise UserError(f"--vocab must be at least 256, the bytes, got {values['vocab']}")


def _check_precision(precision: str, dtype: str, device: str) -> None:
    if precision and dtype != "float32":
        raise UserError(
            f"--precision {precision} computes from float32 weights, got --dtype {dtype}: "
            "leave one of them out"
        )
    if precision in ("bf16", "fp16") and device != "cuda":
        raise UserError(
            f"--precision {precision} needs --device cuda: the CPU computes in float32 or float64"
        )


# What `compare` starts from: attention weighs more in a longer context.
COMPARE_DEFAULTS = {"context": 512, "batch": 4, "steps": 10}


def flag(name: str) -> str:
    """How an option is written on the command line."""
    return "--" + name.replace("_", "-")
