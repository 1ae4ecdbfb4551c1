"""The training program as a user meets it: resuming, folders, failing disks, damaged files."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

import minitorch
from minitorch import checkpoint as checkpoints
from project.transformer import cli, data, output, report, run_files, run_lock, training
from project.transformer import model as models
from project.transformer.errors import UserError, shown
from project.transformer.options import RunOptions, largest_norm
from project.transformer.run_files import RunFolder, load_snapshot
from project.transformer.run_lock import locked

TINY = {
    "layers": 1,
    "d_model": 8,
    "heads": 1,
    "d_middle": 8,
    "context": 8,
    "batch": 2,
    "steps": 4,
    "warmup": 1,
    "eval_every": 2,
    "save_every": 2,
}
SENTENCE = "sphinx of black quartz, judge my vow.\n"


@pytest.fixture(autouse=True)
def restore_default_dtype() -> Iterator[None]:
    before = minitorch.get_default_dtype()
    yield
    minitorch.set_default_dtype(before)


@pytest.fixture(autouse=True)
def no_samples_and_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """They take most of the time, and `test_run_transformer.py` has them."""
    monkeypatch.setattr("project.transformer.commands._show_sample", lambda *_: None)
    monkeypatch.setattr("project.transformer.commands.draw_losses", lambda *_: None)


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(SENTENCE * 20, encoding="utf-8")
    return path


def words(**values: Any) -> list[str]:
    return [f"--{name.replace('_', '-')}={value}" for name, value in values.items()]


def start(text: Path, out: Path, *more: str, **changes: Any) -> int:
    return cli.main(["train", f"--out={out}", *words(**{**TINY, "data": text, **changes}), *more])


def resume(out: Path, *more: str) -> int:
    return cli.main(["train", "--resume", f"--out={out}", *more])


def steps_of(out: Path) -> list[float]:
    return [row["step"] for row in RunFolder(str(out)).read_metrics()]


def message(capsys: pytest.CaptureFixture[str], command: list[str]) -> str:
    capsys.readouterr()
    assert cli.main(command) == 1
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1, lines
    return lines[0]


def edited(path: Path, **changes: str | None) -> None:
    """Change a checkpoint's metadata as another program would; None takes an entry away."""
    with safe_open(path, "numpy") as file:
        metadata = {**file.metadata(), **changes}
    save_file(load_file(path), path, {k: v for k, v in metadata.items() if v is not None})


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


# ----- options -----


@pytest.mark.parametrize(
    ("option", "values"),
    [
        ("lr", ["nan", "inf", "0", "-1"]),
        ("weight-decay", ["nan", "inf", "-0.1"]),
        ("clip", ["nan", "inf", "-1"]),
        ("beta2", ["nan", "1"]),
        ("dropout", ["nan", "-inf"]),
        ("held-out", ["nan", "0"]),
        ("seed", [str(2**32), "-1"]),
        ("steps", [str(2**31), "0"]),
        ("layers", [str(2**62), str(10**9)]),
        ("d-model", [str(4 * 10**8)]),
        ("d-middle", [str(10**9)]),
        ("batch", [str(10**9)]),
        ("vocab", ["255", str(10**30)]),
    ],
)
def test_options_that_make_no_sense(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], option: str, values: list[str]
) -> None:
    for value in values:
        given = words(**{**TINY, "data": text, "tokenizer": "char"})
        told = message(capsys, ["train", f"--out={tmp_path / 'r'}", *given, f"--{option}={value}"])
        assert f"--{option}" in told


@pytest.mark.parametrize(
    "word",
    [
        "--temperature=nan",
        "--temperature=inf",
        "--temperature=-1",
        "--top-k=-1",
        "--tokens=-1",
        "--seed=-1",
        f"--seed={2**32}",
    ],
)
def test_options_of_sample(capsys: pytest.CaptureFixture[str], word: str) -> None:
    assert word.split("=")[0] in message(capsys, ["sample", "--out", "nowhere", word])


def test_temperatures_near_nothing_take_the_likeliest() -> None:
    from project.transformer.sampling import choose

    scores, draw = np.array([0.0, 3.0, -1.0], np.float32), np.random.default_rng(0)
    for temperature in (0.0, 5e-324, 1e-320, 1e-30):
        assert choose(scores, temperature, 0, draw) == 1
        assert choose(scores, temperature, 2, draw) == 1
    with pytest.raises(UserError, match="no finite numbers"):
        choose(np.array([np.nan, 1.0]), 1.0, 0, draw)


def test_no_clipping_and_no_decay_of_biases(text: Path) -> None:
    """With a decay of 1 / lr a step leaves of a matrix only AdamW's part; biases keep theirs."""
    options = RunOptions().replaced(
        {**TINY, "data": str(text), "clip": 0.0, "lr": 1e-3, "weight_decay": 1e3, "warmup": 0}
    )
    trainer = training.Trainer(options, data.load(options.data, 8))
    norm = trainer.model.state_dict()["ln.weights"]
    trainer.train_step()
    after = trainer.model.state_dict()
    assert np.abs(after["ln.weights"] - norm).max() < 2e-3
    assert np.abs(after["lm_head.weights"]).max() < 2e-3
    assert largest_norm(options.training) > 1e300


# ----- damaged files -----


def test_damaged_metrics_are_passed_over(text: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    start(text, out)
    row = {"step": 1, "loss": 1.0, "lr": 0.1, "seconds": 1.0}
    lines = ["12", "null", "[]", '{"loss": 1}', json.dumps({**row, "loss": float("nan")})]
    lines += [json.dumps({**row, "step": step}) for step in (True, "1", 0, -1, 1.5, None, 1e400)]
    lines += ["[" * 100_000, '{"step": 1', "\x00", json.dumps({**row, "valid": None})]
    (out / "metrics.jsonl").write_bytes("\n".join([*lines, json.dumps(row)]).encode() + b"\n\xff")
    assert resume(out, "--record", str(tmp_path / "page.md")) == 0
    assert steps_of(out) == [1]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("options", "12"),
        ("options", "null"),
        ("options", "{"),
        ("options", '{"model": []}'),
        ("options", '{"modle": {}}'),
        ("options", '{"model": {"layers": 1.5}}'),
        ("options", '{"model": {"layers": true}}'),
        ("options", '{"model": {"layers": 0}}'),
        ("options", '{"model": {"layer": 1}}'),
        ("options", '{"model": {"dtype": "float8"}}'),
        ("options", '{"model": {"dtype": "float64"}}'),
        ("options", '{"model": {"d_model": 1000000000, "heads": 1}}'),
        ("options", '{"training": {"lr": NaN}}'),
        ("options", None),
        ("step", "x"),
        ("step", "-1"),
        ("step", None),
        ("tokenizer", "12"),
        ("tokenizer", '{"kind": "char", "characters": ""}'),
        ("tokenizer", '{"kind": "char", "characters": 3}'),
        ("tokenizer", '{"kind": "bpe", "model": "{}"}'),
        ("tokenizer", '{"kind": "words"}'),
        ("rng", "["),
    ],
)
def test_damaged_metadata(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, value: str | None
) -> None:
    options = RunOptions().replaced({**TINY, "data": str(text)})
    trainer = training.Trainer(options, data.load(options.data, 8))
    folder = RunFolder(str(tmp_path / "run"))
    folder.save(trainer.snapshot())
    edited(folder.checkpoint, **{name: value})
    for command in (["sample"], ["train", "--resume"]):
        assert message(capsys, [*command, f"--out={folder.path}"]).startswith("error: ")


@pytest.mark.parametrize("rng", ["12", "null", "{}", '{"python": 1}', '{"python": [3, [1], null]}'])
def test_damaged_states_of_the_generators(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], rng: str
) -> None:
    options = RunOptions().replaced({**TINY, "data": str(text)})
    trainer = training.Trainer(options, data.load(options.data, 8))
    folder = RunFolder(str(tmp_path / "run"))
    folder.save(trainer.snapshot())
    edited(folder.checkpoint, rng=rng)
    assert "does not fit" in message(capsys, ["train", "--resume", f"--out={folder.path}"])


def test_a_damaged_weight_is_noticed(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    start(text, out)
    path = out / "checkpoint.safetensors"
    with path.open("r+b") as file:
        file.seek(-5, os.SEEK_END)
        file.write(b"\x55")
    for command in (["sample"], ["train", "--resume"]):
        assert "is damaged" in message(capsys, [*command, f"--out={out}"])


# ----- texts and terminals -----


@pytest.mark.parametrize(
    ("content", "wanted"),
    [
        ("text".encode("utf-16"), "not UTF-8 text but UTF-16"),
        ("text".encode("utf-32"), "not UTF-8 text but UTF-32"),
        ("text".encode("utf-16-le"), "it has NUL characters"),
        (b"a text\x00", "it has NUL characters"),
    ],
)
def test_texts_in_other_encodings(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: bytes, wanted: str
) -> None:
    path = tmp_path / "text.txt"
    path.write_bytes(content)
    assert wanted in message(capsys, ["train", f"--data={path}", f"--out={tmp_path / 'run'}"])


def test_marks_and_line_breaks_of_texts(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_bytes(b"\xef\xbb\xbfone\r\ntwo\rthree\n")
    assert data.read_text(str(path)) == "one\ntwo\nthree\n"


def test_prompts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text, out = tmp_path / "text.txt", tmp_path / "run"
    text.write_bytes(b"---\r\nsphinx of black quartz\x1b[2J\r\n" * 30)
    assert start(text, out) == 0
    printed = capsys.readouterr().out
    assert "\x1b" not in printed and "\r" not in printed
    assert "--prompt ---" in printed  # what is suggested works
    sample = ["sample", f"--out={out}", "--tokens=8", "--temperature=0"]
    texts = []
    for prompt in (["--prompt", "---"], ["--prompt", "---\r\n"], ["--prompt", "---\n"], []):
        assert cli.main([*sample, *prompt]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[1] == texts[2]
    assert texts[0].splitlines()[1].startswith("---")
    assert cli.main([*sample, "--prompt", "\n"]) == 0  # as the empty prompt, which is not shown
    assert capsys.readouterr().out.replace("\n\n", "\n", 1) == texts[3]
    with pytest.raises(SystemExit):
        cli.main([*sample, "--prompt", "--tokens", "5"])


def test_control_characters_are_shown() -> None:
    assert shown("a\x1b[2J\x07\x7f\x9b\r\nb\rc\td") == "a␛[2J␇␡\\x9b\nb␍c\td"
    assert shown("\u202eabc \ud800 é 🙂 \u200d") == "\\u202eabc \\ud800 é 🙂 \u200d"


def test_an_encoding_without_a_character_gets_an_escape(tmp_path: Path) -> None:
    path = tmp_path / "out.txt"
    with path.open("w", encoding="ascii") as file:
        output.Output(file).write("naïve")
    assert path.read_text() == "na\\xefve"


def test_compiling_is_told_when_it_takes_long(monkeypatch: pytest.MonkeyPatch) -> None:
    import threading

    from numba.core import event

    monkeypatch.setattr(output, "PATIENCE", 0.0)
    told = threading.Event()
    with output.CompileNote(told.set).listening():
        assert not told.wait(0.05)
        with event.trigger_event("numba:compile"):
            assert told.wait(10)


def test_pieces_of_a_text_without_spaces_are_bounded() -> None:
    pytest.importorskip("tokenizers")
    from project.transformer.tokenizer import LONGEST_PIECE, BpeTokenizer

    text = "ab" * 4000 + "一二三" * 300 + " " * 999 + "\n" * 300
    tokenizer = BpeTokenizer.trained_on(text, 10**12)
    assert tokenizer.decode(tokenizer.encode(text)) == text
    longest = max(len(piece) for piece in tokenizer._model.get_vocab())
    assert longest <= LONGEST_PIECE


def test_a_lock_without_support_of_the_file_system(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fcntl = pytest.importorskip("fcntl")

    def none(*_: Any) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", none)
    with run_lock.locked(tmp_path):
        pass
