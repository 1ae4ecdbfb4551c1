"""What can be chosen for a model and for its training: names, defaults, limits, help texts.

The command line is built from these dataclasses (`cli.py`) and checkpoints carry them.
"""

from __future__ import annotations

import dataclasses
import sys
from dataclasses import dataclass, field
from typing import Any

from project.arguments import COUNT, NOT_NEGATIVE, POSITIVE, SEED, SHARE, Range

from . import attention
from .errors import UserError


def option(
    default: Any,
    text: str,
    limits: Range | None = None,
    choices: tuple[str, ...] | None = None,
    changeable: bool = False,
) -> Any:
    """A field of the options.

    Args:
        default: its value if none is given.
        text: for --help.
        limits: of a number.
        choices: the names there are, for a name.
        changeable: whether a run that is resumed may have another value.

    """
    metadata = {"help": text, "limits": limits, "choices": choices, "changeable": changeable}
    return field(default=default, metadata=metadata)


@dataclass(frozen=True)
class ModelOptions:
    """The network."""

    layers: int = option(4, "number of transformer layers", COUNT)
    d_model: int = option(128, "size of the embedding", COUNT)
    heads: int = option(4, "number of attention heads; divides --d-model", COUNT)
    d_middle: int = option(256, "size of the feed-forward layers in between", COUNT)
    context: int = option(128, "longest sequence, in tokens", COUNT)
    dropout: float = option(0.0, "probability of dropout, everywhere", SHARE)
    attention: str = option("flash", f"kind of attention: {attention.in_words()}")
    dtype: str = option("float32", "type of the weights", choices=("float32", "float64"))
    precision: str = option(
        "",
        "numbers that the network computes with, from float32 weights; none: those of --dtype",
        choices=("fp32", "bf16", "fp16"),
        changeable=True,
    )


@dataclass(frozen=True)
class DataOptions:
    """The text and how it becomes tokens."""

    data: str = option("", "a UTF-8 text file, in place of the text inside Python", changeable=True)
    tokenizer: str = option(
        "char", "a token is a character, or a BPE piece", choices=("char", "bpe")
    )
    vocab: int = option(1024, "size of the BPE vocabulary", Range(256, 2**31))
    held_out: float = option(
        0.1, "share of the text, at its end, for the validation loss", Range(0, 1, above=True)
    )


@dataclass(frozen=True)
class TrainingOptions:
    """The optimisation: AdamW, linear warm-up, then a cosine down to zero."""

    steps: int = option(1000, "number of steps", COUNT, changeable=True)
    batch: int = option(16, "sequences in a step", COUNT)
    lr: float = option(5e-3, "highest learning rate", POSITIVE, changeable=True)
    warmup: int = option(100, "steps until the learning rate is reached", Range(0, 2**31))
    weight_decay: float = option(
        0.1, "AdamW's weight decay; biases and norms have none", NOT_NEGATIVE
    )
    beta2: float = option(0.99, "AdamW's decay of the squared gradients", SHARE)
    clip: float = option(
        1.0, "largest norm of the gradient; 0 switches clipping off", NOT_NEGATIVE, changeable=True
    )
    seed: int = option(1, "of the weights, the batches and dropout", SEED)
    device: str = option("cpu", "where it is computed", choices=("cpu", "cuda"), changeable=True)
    graph: bool = option(
        True, "on the GPU, launch a whole step at once, as a CUDA graph", changeable=True
    )
    eval_every: int = option(
        100, "steps from one validation loss to the next", COUNT, changeable=True
    )
    save_every: int = option(200, "steps from one checkpoint to the next", COUNT, changeable=True)


@dataclass(frozen=True)
class RunOptions:
    """Everything that makes a run what it is."""

    model: ModelOptions = field(default_factory=ModelOptions)
    data: DataOptions = field(default_factory=DataOptions)
    training: TrainingOptions = field(default_factory=TrainingOptions)

    @classmethod
    def from_parts(cls, parts: Any) -> RunOptions:
        """What `dataclasses.asdict` made a dict of; options that are missing have their defaults.

        Raises:
            ValueError: it is of another form, has unknown names, or values of another type.

        """
        if not isinstance(parts, dict):
            raise ValueError(f"options must be named, got {parts!r:.40}")
        unknown = parts.keys() - {part.name for part in dataclasses.fields(cls)}
        if unknown:
            raise ValueError(f"unknown options {', '.join(sorted(unknown))}")
        made = {}
        for part in dataclasses.fields(cls):
            empty: Any = part.default_factory
            values = parts.get(part.name, {})
            if not isinstance(values, dict):
                raise ValueError(f"options must be named, got {values!r:.40}")
            fields = {f.name: f for f in dataclasses.fields(empty)}
            unknown = values.keys() - fields.keys()
            if unknown:
                raise ValueError(f"unknown options {', '.join(sorted(unknown))}")
            made[part.name] = empty(**{n: _of_type(fields[n], v) for n, v in values.items()})
        return cls(**made)

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
        for name, made in FIELDS.items():
            limits = made.metadata["limits"]
            problem = limits.problem(values[name]) if limits else None
            if problem:
                raise UserError(f"{flag(name)} {problem}")
        if values["d_model"] % values["heads"]:
            raise UserError(
                f"--heads must divide --d-model = {values['d_model']}, got {values['heads']}"
            )
        attention.mask_of(values["attention"], values["context"])
        _check_precision(values["precision"], values["dtype"], values["device"])


def _of_type(field: dataclasses.Field[Any], value: Any) -> Any:
    """A value that a checkpoint has for an option; raises ValueError if it is of another type."""
    wanted, choices = type(field.default), field.metadata["choices"]
    if wanted is float and type(value) is int:
        return float(value)
    if type(value) is not wanted:
        raise ValueError(f"{field.name} must be of type {wanted.__name__}, got {value!r:.40}")
    if choices and value not in (*choices, field.default):
        raise ValueError(f"{field.name} must be {' or '.join(choices)}, got {value!r:.40}")
    return value


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


# All fields by name, and the names of those that a resumed run may change.
FIELDS: dict[str, dataclasses.Field[Any]] = {
    f.name: f
    for part in (ModelOptions, DataOptions, TrainingOptions)
    for f in dataclasses.fields(part)
}
CHANGEABLE = tuple(name for name, made in FIELDS.items() if made.metadata["changeable"])

# What `compare` starts from: attention weighs more in a longer context.
COMPARE_DEFAULTS = {"context": 512, "batch": 4, "steps": 10}


def largest_norm(options: TrainingOptions) -> float:
    """What gradients are clipped to: --clip, or a norm that none has if that is 0."""
    return options.clip or sys.float_info.max


def flag(name: str) -> str:
    """How an option is written on the command line."""
    return "--" + name.replace("_", "-")
