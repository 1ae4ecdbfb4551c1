"""The training program as a user meets it: resuming, folders, failing disks, damaged files."""

from __future__ import annotations

import errno
import multiprocessing
import os
import signal
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from minitorch import checkpoint as checkpoints
from project.transformer import cli, data, report, run_files, training
from project.transformer import model as models
from project.transformer.errors import UserError
from project.transformer.options import RunOptions
from project.transformer.run_files import RunFolder, load_snapshot
from project.transformer.run_lock import locked
from tests.training_program import (  # noqa: F401 (fixtures)
    SENTENCE,
    TINY,
    message,
    no_samples_and_pictures,
    restore_default_dtype,
    resume,
    start,
    steps_of,
    text_file,
    words,
)

# ----- resuming -----


def test_more_steps_go_on_as_in_a_longer_run(text: Path, tmp_path: Path) -> None:
    """The rate is that of the new cosine from there on, the metrics are those of both parts."""
    out = tmp_path / "run"
    assert start(text, out) == 0
    assert resume(out, "--steps", "8", "--save-every", "3", "--eval-every", "5") == 0
    assert steps_of(out) == list(range(1, 9))
    longer = RunOptions().replaced({**TINY, "steps": 8})
    _, schedule = models.optimizer(models.build(longer.model, 5), longer.training)
    rates = [row["lr"] for row in RunFolder(str(out)).read_metrics()]
    assert rates[4:] == [schedule.lr_at(step) for step in range(4, 8)]
    kept = load_snapshot(out).options.training
    assert (kept.steps, kept.save_every, kept.eval_every) == (8, 3, 5)


def test_fewer_steps_than_taken_are_refused(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    start(text, out)
    told = message(capsys, ["train", "--resume", "--out", str(out), "--steps", "3"])
    assert "has taken 4 steps already" in told and "--steps" in told


def test_the_text_may_move_and_the_folder_may_be_another(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "run"
    monkeypatch.chdir(tmp_path)
    assert start(Path(text.name), out) == 0
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert resume(out, "--steps", "5") == 0
    text.rename(tmp_path / "moved.txt")
    assert "say with --data where it is" in message(capsys, ["train", "--resume", f"--out={out}"])
    assert resume(out, "--steps", "6", f"--data={tmp_path / 'moved.txt'}") == 0
    (tmp_path / "moved.txt").write_text(SENTENCE * 20 + "Zwei.", encoding="utf-8")
    assert "the text is not the one" in message(capsys, ["train", "--resume", f"--out={out}"])


def test_the_device_may_change(text: Path, tmp_path: Path) -> None:
    """A run of the GPU in 16 bits goes on on the CPU in those of its weights."""
    options = RunOptions().replaced(
        {**TINY, "data": str(text), "device": "cuda", "precision": "fp16"}
    )
    trainer = training.Trainer(
        options.replaced({"device": "cpu", "precision": ""}), data.load(options.data, 8)
    )
    trainer.options = options
    out = tmp_path / "run"
    RunFolder(str(out)).save(trainer.snapshot())
    assert resume(out, "--device", "cpu") == 0
    assert load_snapshot(out).options.model.precision == ""


def test_a_state_of_before_the_groups_is_put_in_order(text: Path) -> None:
    options = RunOptions().replaced({**TINY, "data": str(text)})
    model = models.build(options.model, 12)
    parameters = model.parameters()
    old = {"lr": np.array(0.25), "steps": np.arange(len(parameters))}
    for number, parameter in enumerate(parameters):
        for slot in ("exp_avg", "exp_avg_sq"):
            old[f"{slot}.{number}"] = np.full(parameter.value.shape, float(number))
    optimizer, _ = models.optimizer(model, options.training)
    optimizer.load_state_dict(models.grouped_state(old, model))
    new = optimizer.state_dict()
    numbers = {id(parameter): number for number, parameter in enumerate(parameters)}
    for place, parameter in enumerate(optimizer.parameters):
        assert new["steps"][place] == numbers[id(parameter)]
        assert (new[f"exp_avg_sq.{place}"] == numbers[id(parameter)]).all()
    again = models.grouped_state(new, model)
    assert all(np.array_equal(again[name], new[name]) for name in new)


# ----- one run a folder -----


def test_a_run_is_only_overwritten_when_that_is_asked_for(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    start(text, out)
    before = (out / "checkpoint.safetensors").read_bytes()
    told = message(capsys, ["train", f"--out={out}", *words(**TINY, data=text)])
    assert "step 4 of 4" in told and "--resume" in told and "--overwrite" in told
    assert (out / "checkpoint.safetensors").read_bytes() == before
    assert start(text, out, "--overwrite", seed=2, steps=3) == 0
    assert load_snapshot(out).step == 3 and steps_of(out) == [1, 2, 3]
    (out / "checkpoint.safetensors").write_bytes(b"damaged")
    assert "cannot be read" in message(capsys, ["train", f"--out={out}", *words(**TINY, data=text)])


@pytest.mark.parametrize("name", ["metrics.jsonl", "loss.png", "step_7.safetensors", ".lock"])
@pytest.mark.parametrize("here", [True, False])
def test_files_of_the_user_are_left_alone(
    text: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    here: bool,
) -> None:
    monkeypatch.setattr(training.Trainer, "__init__", lambda *_: pytest.fail("too late"))
    out = tmp_path / "run"
    out.mkdir()
    (out / name).write_text("of the user")
    (out / ".checkpoint.safetensors.backup-of-mine").write_text("of the user")
    monkeypatch.chdir(out)
    given = "." if here else out
    told = message(capsys, ["train", f"--out={given}", *words(**TINY, data=text)])
    assert name in told and "another --out" in told
    assert ("--overwrite" in told) == (name != ".lock")
    assert (out / name).read_text() == "of the user"
    assert (out / ".checkpoint.safetensors.backup-of-mine").read_text() == "of the user"


def test_what_an_interrupted_start_has_left_blocks_no_new_one(text: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    with locked(out):
        pass
    half = out / ".checkpoint.safetensors.a_b1c2d3"
    half.touch()
    assert start(text, out) == 0 and not half.exists()


@pytest.mark.parametrize("option", ["--overwrite", "--seed=1"])
def test_a_folder_in_the_place_of_a_file_is_found_before_anything_else(
    text: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    option: str,
) -> None:
    monkeypatch.setattr(training.Trainer, "__init__", lambda *_: pytest.fail("too late"))
    (tmp_path / "run" / "metrics.jsonl").mkdir(parents=True)
    (tmp_path / "run" / "loss.png").touch()
    command = ["train", f"--out={tmp_path / 'run'}", *words(**TINY, data=text), option]
    assert "metrics.jsonl is a folder" in message(capsys, command)
    assert (tmp_path / "run" / "loss.png").exists()


def test_a_running_run_is_left_alone(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    start(text, out)
    with locked(out):
        for option in ("--overwrite", "--resume"):
            told = message(capsys, ["train", f"--out={out}", f"--data={text}", option])
            assert f"a run is going on in {out} (process {os.getpid()})" in told
    assert resume(out) == 0


def _hold(folder: str, ready: Any, results: Any) -> None:
    ready.wait()
    try:
        with locked(Path(folder)):
            results.put("held")
            signal.pause() if folder.endswith("forever") else ready.wait()
    except UserError:
        results.put("refused")
        ready.wait()


@pytest.mark.skipif(sys.platform == "win32", reason="processes are forked")
def test_one_of_several_gets_the_lock_and_death_gives_it_back(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    ready, results = context.Barrier(3), context.Queue()
    given = (str(tmp_path / "run"), ready, results)
    processes = [context.Process(target=_hold, args=given, daemon=True) for _ in range(3)]
    for process in processes:
        process.start()
    assert sorted(results.get(timeout=30) for _ in processes) == ["held", "refused", "refused"]
    for process in processes:
        process.kill()
        process.join()
    with locked(tmp_path / "run"):
        pass


# ----- what cannot be written -----


def test_an_unwritable_folder_is_found_before_anything_else(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setattr(training.Trainer, "__init__", lambda *_: pytest.fail("too late"))
    told = message(capsys, ["train", f"--out={tmp_path / 'file' / 'run'}", *words(data=text)])
    assert "cannot write to the folder" in told


def test_a_full_disk_is_told_once_and_ends_nothing(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "run"
    full = [True]
    real_open = Path.open

    def opened(path: Path, *args: Any, **options: Any) -> Any:
        if full[0] and path.name == "metrics.jsonl" and args[:1] == ("ab",):
            raise OSError(errno.ENOSPC, "No space left on device")
        return real_open(path, *args, **options)

    def draw(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "open", opened)
    monkeypatch.setattr("project.transformer.commands.draw_losses", draw)
    assert start(text, out, "--record", str(tmp_path)) == 0  # a folder is no file
    told = capsys.readouterr().err.splitlines()
    assert len(told) == 3
    for what, line in zip(("the metrics", "the picture", "the record"), told, strict=True):
        assert line.startswith(f"warning: cannot write {what}")
    assert load_snapshot(out).step == 4

    folder = RunFolder(str(out))
    folder.add_metrics({"step": 5, "loss": 1.0, "lr": 0.1, "seconds": 1.0})
    full[0] = False
    folder.add_metrics({"step": 6, "loss": 1.0, "lr": 0.1, "seconds": 1.0})
    assert steps_of(out) == [5, 6]  # what could not be written before follows


def test_a_checkpoint_that_cannot_be_written_is_tried_again(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out, tries = tmp_path / "run", []

    def fails_at_first(*given: Any) -> None:
        tries.append(given)
        if len(tries) == 1:
            raise OSError(errno.ENOSPC, "No space left on device")
        checkpoints.save_checkpoint(*given)

    monkeypatch.setattr(run_files, "save_checkpoint", fails_at_first)
    assert start(text, out) == 0
    assert "warning: cannot write a checkpoint" in capsys.readouterr().err
    assert load_snapshot(out).step == 4 and len(tries) == 2


def test_a_removed_folder_is_made_again(text: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    options = RunOptions().replaced({**TINY, "data": str(text)})
    trainer = training.Trainer(options, data.load(options.data, 8))

    class Remover(report.Terminal):
        def stepped(self, step: int, loss: float, tokens_per_second: float) -> None:
            if step == 1:
                (out / "metrics.jsonl").unlink()
                out.rmdir()

    assert training.train(trainer, RunFolder(str(out)), Remover())
    assert load_snapshot(out).step == 4


def test_an_output_that_is_gone_ends_no_training(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Closed:
        encoding = "utf-8"

        def write(self, text: str) -> int:
            raise BrokenPipeError(errno.EPIPE, "Broken pipe")

        def flush(self) -> None:
            raise BrokenPipeError(errno.EPIPE, "Broken pipe")

        def isatty(self) -> bool:
            return False

    monkeypatch.setattr(sys, "stdout", Closed())
    assert start(text, tmp_path / "run") == 0
    assert cli.main(["sample", f"--out={tmp_path / 'run'}", "--tokens=1000000"]) == 0


@pytest.mark.skipif(sys.platform == "win32", reason="no such signal here")
@pytest.mark.parametrize("name", ["SIGHUP", "SIGTERM", "SIGINT"])
def test_signals_save(text: Path, tmp_path: Path, name: str) -> None:
    number = getattr(signal, name)
    options = RunOptions().replaced({**TINY, "data": str(text)})
    trainer = training.Trainer(options, data.load(options.data, 8))

    class Hangup(report.Terminal):
        def stepped(self, step: int, loss: float, tokens_per_second: float) -> None:
            if step == 3:
                signal.raise_signal(number)

    before = signal.getsignal(number)
    assert not training.train(trainer, RunFolder(str(tmp_path / "run")), Hangup())
    assert load_snapshot(tmp_path / "run").step == 3
    assert signal.getsignal(number) == before


@pytest.mark.skipif(sys.platform == "win32", reason="no such signal here")
def test_an_ignored_hangup_stays_ignored(text: Path, tmp_path: Path) -> None:
    """As `nohup` asks for."""
    options = RunOptions().replaced({**TINY, "data": str(text)})
    trainer = training.Trainer(options, data.load(options.data, 8))

    class Hangup(report.Terminal):
        def stepped(self, step: int, loss: float, tokens_per_second: float) -> None:
            signal.raise_signal(signal.SIGHUP)

    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert training.train(trainer, RunFolder(str(tmp_path / "run")), Hangup())
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_loss_that_is_no_number_saves_the_weights_of_before(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = RunOptions().replaced({**TINY, "data": str(text), "steps": 9})
    trainer = training.Trainer(options, data.load(options.data, 8))
    folder = RunFolder(str(tmp_path / "run"))
    value, seen = training.Known.value, []

    def sixth_is_nan(known: training.Known) -> float:
        seen.append(trainer.model.state_dict())
        return float("nan") if len(seen) == 6 else value(known)

    monkeypatch.setattr(training.Known, "value", sixth_is_nan)
    with pytest.raises(UserError, match=r"the loss is nan at step 6: try a smaller --lr; .*saved"):
        training.train(trainer, folder, report.Terminal())
    saved = load_snapshot(tmp_path / "run")
    assert saved.step == 5
    assert load_snapshot(tmp_path / "run" / "step_4.safetensors").step == 4
    monkeypatch.undo()
    assert resume(tmp_path / "run", "--lr", "1e-4") == 0
    assert steps_of(tmp_path / "run") == list(range(1, 10))


def test_a_gradient_that_is_no_number_changes_no_weights(
    text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = RunOptions().replaced({**TINY, "data": str(text)})
    trainer = training.Trainer(options, data.load(options.data, 8))
    before = trainer.model.state_dict()
    monkeypatch.setattr(trainer.optimizer, "clip_grad_norm_", lambda _: float("inf"))
    with pytest.raises(UserError, match="gradient's norm is inf at step 1"):
        trainer.train_step()
    after = trainer.model.state_dict()
    assert all(np.array_equal(before[name], after[name]) for name in before)
