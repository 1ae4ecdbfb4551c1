"""What a run keeps in its folder: checkpoint, metrics, picture."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minitorch.checkpoint import (
    Array,
    CheckpointError,
    load_checkpoint,
    save_checkpoint,
    write_atomically,
)

from . import tokenizer as tokenizers
from .errors import UserError
from .options import DataOptions, ModelOptions, RunOptions, TrainingOptions
from .tokenizer import Tokenizer

CHECKPOINT = "checkpoint.safetensors"


@dataclass(frozen=True)
class Snapshot:
    """Everything needed to go on with a run bit for bit, or to write text with its model."""

    options: RunOptions
    step: int
    tokenizer: Tokenizer
    fingerprint: str
    rng: dict[str, Any]
    model: dict[str, Array]
    optimizer: dict[str, Array]
    scaler: dict[str, Array]  # of the loss, for fp16; else empty


class RunFolder:
    """The files of one run.

    Args:
        path: the folder; made when something is written.

    """

    def __init__(self, path: str) -> None:
        self.path = Path(path)
        self.checkpoint = self.path / CHECKPOINT
        self.metrics = self.path / "metrics.jsonl"
        self.picture = self.path / "loss.png"

    def save(self, snapshot: Snapshot) -> None:
        """Replace the checkpoint; a kill at any moment leaves the old one or the new one.

        Raises:
            UserError: the folder cannot be written.

        """
        arrays = {f"model.{name}": array for name, array in snapshot.model.items()}
        arrays |= {f"optimizer.{name}": array for name, array in snapshot.optimizer.items()}
        arrays |= {f"scaler.{name}": array for name, array in snapshot.scaler.items()}
        metadata = {
            "options": json.dumps(dataclasses.asdict(snapshot.options)),
            "step": str(snapshot.step),
            "tokenizer": snapshot.tokenizer.to_json(),
            "fingerprint": snapshot.fingerprint,
            "rng": json.dumps(snapshot.rng),
        }
        try:
            save_checkpoint(self.checkpoint, arrays, metadata)
        except (CheckpointError, OSError) as error:
            raise UserError(f"cannot write the checkpoint {self.checkpoint}: {error}") from error

    def load(self) -> Snapshot:
        """Read the checkpoint.

        Raises:
            UserError: there is none, it is damaged, or something else wrote it.

        """
        return load_snapshot(self.checkpoint)

    def start_metrics(self, resumed_at: int) -> None:
        """Begin the metrics file, or drop what a resumed run wrote after its checkpoint."""
        kept = [row for row in self.read_metrics() if row["step"] <= resumed_at]
        lines = "".join(json.dumps(row) + "\n" for row in kept if resumed_at)
        try:
            write_atomically(self.metrics, lines.encode())
        except OSError as error:
            raise UserError(f"cannot write to the folder {self.path}: {error.strerror}") from error

    def add_metrics(self, row: Mapping[str, float]) -> None:
        """Add one line of JSON."""
        with self.metrics.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")

    def read_metrics(self) -> list[dict[str, float]]:
        """All rows; a last line that a kill has cut off is passed over."""
        if not self.metrics.is_file():
            return []
        rows = []
        for line in self.metrics.read_text(encoding="utf-8").splitlines():
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError:
                continue
        return rows


def load_snapshot(path: Path) -> Snapshot:
    """Read a checkpoint of `run_transformer.py`.

    Args:
        path: the file, or the folder of a run.

    Raises:
        UserError: there is none, it is damaged, or something else wrote it.

    """
    if path.is_dir():
        path = path / CHECKPOINT
    try:
        arrays, metadata = load_checkpoint(path)
    except CheckpointError as error:
        raise UserError(str(error)) from error
    try:
        parts = json.loads(metadata["options"])
        options = RunOptions(
            ModelOptions(**parts["model"]),
            DataOptions(**parts["data"]),
            TrainingOptions(**parts["training"]),
        )
        return Snapshot(
            options,
            int(metadata["step"]),
            tokenizers.from_json(metadata["tokenizer"]),
            metadata["fingerprint"],
            json.loads(metadata["rng"]),
            _part(arrays, "model."),
            _part(arrays, "optimizer."),
            _part(arrays, "scaler."),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path} is not a checkpoint of this program ({error!r})") from error


def _part(arrays: dict[str, Array], prefix: str) -> dict[str, Array]:
    return {
        name.removeprefix(prefix): array
        for name, array in arrays.items()
        if name.startswith(prefix)
    }
