"""What a run keeps in its folder: checkpoint, metrics, picture."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import sys
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minitorch.checkpoint import (
    Array,
    CheckpointError,
    load_checkpoint,
    save_checkpoint,
    some,
    write_atomically,
)

from . import tokenizer as tokenizers
from .errors import UserError, shown
from .options import RunOptions
from .tokenizer import Tokenizer

CHECKPOINT = "checkpoint.safetensors"
NUMBERS = ("step", "loss", "lr", "seconds")  # that each row of the metrics has


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
    """The files of one run. A file beside the checkpoint that cannot be written is told once.

    Args:
        path: the folder; made when something is written.

    """

    def __init__(self, path: str) -> None:
        self.path = Path(path)
        self.checkpoint = self.path / CHECKPOINT
        self.metrics = self.path / "metrics.jsonl"
        self.picture = self.path / "loss.png"
        self.saved_step: int | None = None  # of the checkpoint, if this object wrote or read it
        self._unwritten: list[str] = []  # lines of the metrics
        self._told: set[str] = set()

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
        self.saved_step = snapshot.step

    def keep_copy(self) -> Path | None:
        """Copy the checkpoint, if there is one, to a name with its step, which no `save` replaces.

        Returns:
            The copy.

        Raises:
            UserError: the folder cannot be written.

        """
        if self.saved_step is None or not self.checkpoint.is_file():
            return None
        copy = self.path / f"step_{self.saved_step}.safetensors"
        try:
            shutil.copyfile(self.checkpoint, copy)
        except OSError as error:
            raise UserError(f"cannot write {copy}: {error.strerror}") from error
        return copy

    def load(self) -> Snapshot:
        """Read the checkpoint.

        Raises:
            UserError: there is none, it is damaged, or something else wrote it.

        """
        snapshot = load_snapshot(self.checkpoint)
        self.saved_step = snapshot.step
        return snapshot

    def check_new(self, overwrite: bool) -> None:
        """Check that a new run loses nothing here, before it removes or replaces anything.

        Args:
            overwrite: whether files that are here may be lost.

        Raises:
            UserError: there is a run here, or other files of its names; or, whatever `overwrite`
                says, a folder where a file is to be.

        """
        there = self._files()
        for path in there:
            if path.is_dir() and not path.is_symlink():
                raise UserError(
                    f"{path} is a folder, and a run has a file there: move it, or choose another "
                    "--out"
                )
        if overwrite or not there:
            return
        if self.checkpoint not in there:
            names = some([path.name for path in there])
            raise UserError(
                f"{self.path} has files that a run would remove or replace, {names}: choose "
                "another --out, or lose them with --overwrite"
            )
        try:
            snapshot = load_snapshot(self.checkpoint)
            state = f"at step {snapshot.step} of {snapshot.options.training.steps}"
        except UserError:
            state = "whose checkpoint cannot be read"
        raise UserError(
            f"there is a run in {self.path} already, {state}: go on with --resume (and more "
            "--steps), start anew with --overwrite, or choose another --out"
        )

    def _files(self) -> list[Path]:
        """What is here, links that lead nowhere too, under the names of a run's files."""
        copies = sorted(self.path.glob("step_*.safetensors"))
        named = (self.checkpoint, self.metrics, self.picture, *copies)
        return [path for path in named if os.path.lexists(path)]

    def clear(self) -> None:
        """Remove the files of a run that is overwritten, and what a kill has left half-written.

        Raises:
            UserError: one cannot be removed.

        """
        try:
            for path in self._files():
                path.unlink(missing_ok=True)
        except OSError as error:
            raise UserError(f"cannot overwrite the run in {self.path}: {error}") from error
        self.remove_halves()

    def remove_halves(self) -> None:
        """Remove checkpoints that a kill has left half-written under temporary names."""
        for path in self.path.glob(f".{CHECKPOINT}.{'[a-z0-9_]' * 8}"):  # as `tempfile` names them
            with suppress(OSError):
                path.unlink()

    # ----- files that a run can do without -----

    def tell(self, what: str, error: Exception) -> None:
        """Say on standard error that something cannot be written, the first time."""
        if what not in self._told:
            self._told.add(what)
            print(shown(f"warning: cannot write {what}: {error}"), file=sys.stderr, flush=True)

    def start_metrics(self, resumed_at: int) -> None:
        """Begin the metrics file, or drop what a resumed run wrote after its checkpoint."""
        kept = [row for row in self.read_metrics() if row["step"] <= resumed_at]
        lines = "".join(json.dumps(row) + "\n" for row in kept if resumed_at)
        try:
            write_atomically(self.metrics, lines.encode())
        except OSError as error:
            self.tell("the metrics", error)

    def add_metrics(self, row: Mapping[str, float]) -> None:
        """Add one line of JSON, after those that could not be written before."""
        self._unwritten.append(json.dumps(row) + "\n")
        try:
            with self.metrics.open("ab", buffering=0) as file:
                start = file.tell()
                lines = "".join(self._unwritten).encode()
                if file.write(lines) != len(lines):  # the disk is full: not half a line
                    file.truncate(start)
                    raise OSError("no space left on device")
        except OSError as error:
            self.tell("the metrics", error)
        else:
            self._unwritten.clear()

    def read_metrics(self) -> list[dict[str, float]]:
        """All rows; lines that are none, such as one that a kill has cut off, are passed over."""
        try:
            lines = self.metrics.read_text(encoding="utf-8", errors="replace").splitlines()
        except OSError:  # there are none, or they cannot be read
            return []
        rows = []
        for line in lines:
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):
                continue
            if _is_row(row):
                rows.append(row)
        return rows


def _is_row(row: Any) -> bool:
    """Whether it is a row of metrics: names, and finite numbers, a step among them."""
    return (
        isinstance(row, dict)
        and all(name in row for name in NUMBERS)
        and all(type(x) in (int, float) and abs(x) < 2**63 for x in row.values())
        and row["step"] == int(row["step"]) > 0
    )


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
        snapshot = Snapshot(
            RunOptions.from_parts(json.loads(metadata["options"])),
            int(metadata["step"]),
            tokenizers.from_json(metadata["tokenizer"]),
            metadata["fingerprint"],
            json.loads(metadata["rng"]),
            _part(arrays, "model."),
            _part(arrays, "optimizer."),
            _part(arrays, "scaler."),
        )
        if not 0 <= snapshot.step < 2**31:
            raise ValueError(f"step {snapshot.step}")
        if not snapshot.tokenizer.size:
            raise ValueError("its tokenizer has no tokens")
        _check_dtypes(snapshot)
    except KeyError as error:
        raise UserError(f"{path} is not a checkpoint of this program: no {error}") from error
    except (TypeError, ValueError, RecursionError) as error:
        raise UserError(f"{path} is not a checkpoint of this program: {error}") from error
    try:
        snapshot.options.check()
    except UserError as error:
        raise UserError(f"{path} is damaged, by its options: {error}") from error
    return snapshot


def _check_dtypes(snapshot: Snapshot) -> None:
    """Raise ValueError unless weights and what the optimiser keeps are of the run's dtype."""
    wanted = snapshot.options.model.dtype
    kept = {n: a for n, a in snapshot.optimizer.items() if n not in ("lr", "steps")}
    for name, array in {**snapshot.model, **kept}.items():
        if array.dtype.name != wanted:
            raise ValueError(f"{name} is of dtype {array.dtype.name}, wanted {wanted}")
    for name in ("lr", "steps"):
        if name in snapshot.optimizer and snapshot.optimizer[name].dtype.kind not in "if":
            raise ValueError(f"{name} is of dtype {snapshot.optimizer[name].dtype.name}")


def _part(arrays: dict[str, Array], prefix: str) -> dict[str, Array]:
    return {
        name.removeprefix(prefix): array
        for name, array in arrays.items()
        if name.startswith(prefix)
    }
