"""What the training program is given: options, damaged files, texts in every encoding."""

from __future__ import annotations

import errno
import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from project.transformer import cli, data, output, run_lock, sampling, training
from project.transformer.errors import UserError, shown
from project.transformer.options import RunOptions, largest_norm
from project.transformer.run_files import RunFolder
from tests.training_program import (  # noqa: F401 (fixtures)
    TINY,
    edited,
    message,
    no_samples_and_pictures,
    restore_default_dtype,
    resume,
    start,
    steps_of,
    text_file,
    words,
)

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


# ----- sampling -----


def test_choosing() -> None:
    scores, draw = np.array([0.0, 3.0, 1.0, 2.0]), np.random.default_rng(0)
    assert sampling.choose(scores, 0.0, 0, draw) == 1
    assert {sampling.choose(scores, 5.0, 2, draw) for _ in range(100)} == {1, 3}
    assert {sampling.choose(scores, 5.0, 0, draw) for _ in range(200)} == {0, 1, 2, 3}
    chosen = [sampling.choose(scores, 1.0, 0, draw) for _ in range(2000)]
    weights = np.exp(scores) / np.exp(scores).sum()
    np.testing.assert_allclose(np.bincount(chosen) / 2000, weights, atol=0.04)


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


@pytest.mark.parametrize(
    "rng", ["12", "null", "{}", "[]", '"x"', '{"python": 1}', '{"python": [3, [1], null]}']
)
def test_damaged_states_of_the_generators(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], rng: str
) -> None:
    options = RunOptions().replaced({**TINY, "data": str(text)})
    trainer = training.Trainer(options, data.load(options.data, 8))
    folder = RunFolder(str(tmp_path / "run"))
    folder.save(trainer.snapshot())
    edited(folder.checkpoint, rng=rng)
    told = message(capsys, ["train", "--resume", f"--out={folder.path}"])
    assert told.endswith(
        "does not fit: the state of the random numbers is damaged: it is none that get_rng_state "
        "returned"
    )


def test_a_checkpoint_of_more_layers_is_told_briefly(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = RunOptions().replaced({**TINY, "data": str(text), "layers": 9})
    trainer = training.Trainer(options, data.load(options.data, 8))
    folder = RunFolder(str(tmp_path / "run"))
    folder.save(trainer.snapshot())
    edited(folder.checkpoint, options=json.dumps({"model": {**asdict(options.model), "layers": 1}}))
    told = message(capsys, ["sample", f"--out={folder.path}"])
    assert "unexpected: " in told and " more" in told and len(told) < 400


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
