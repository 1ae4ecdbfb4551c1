"""Each classic script, run in this process with small arguments."""

from __future__ import annotations

import builtins
import csv
import random
import runpy
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

import minitorch
from project import (
    parallel_check,
    points,
    run_digits,
    run_fast_tensor,
    run_manual,
    run_scalar,
    run_sentiment,
    run_sentiment_linear,
    run_tensor,
    text_data,
)


@pytest.fixture(autouse=True)
def default_dtype() -> Iterator[None]:
    """Scripts may change the default dtype; a test must not."""
    before = minitorch.get_default_dtype()
    yield
    minitorch.set_default_dtype(before)


def test_manual(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_manual.main(["--points", "30", "--plot"]) == 1.0
    assert "30 of 30 points right" in capsys.readouterr().out
    line = ["--weights", "-10", "-10", "--bias", "5", "--dataset", "diag"]
    assert run_manual.main(line) == 1.0
    assert run_manual.main([*line, "--dataset", "xor"]) < 0.9


def test_scalar_and_tensor_scripts_learn_the_same() -> None:
    """The same numbers, drawn in the same order: one loss, to rounding, on three engines."""
    arguments = ["--points", "20", "--hidden", "3", "--rate", "0.3", "--epochs", "20"]
    scalar = run_scalar.main(arguments)
    assert scalar[-1] < 0.9 * scalar[0]
    assert run_tensor.main(arguments) == pytest.approx(scalar, rel=1e-9)
    assert run_fast_tensor.main([*arguments, "--plot"]) == pytest.approx(scalar, rel=1e-9)


def test_upstream_spelling_of_options(capsys: pytest.CaptureFixture[str]) -> None:
    run_fast_tensor.main(
        "--PTS 5 --HIDDEN 2 --RATE .1 --BACKEND cpu --DATASET XOR --epochs 1".split()
    )
    assert "epoch    1" in capsys.readouterr().out


@pytest.mark.parametrize("arguments", [["--dataset", "cube"], ["--points", "0"]])
def test_bad_arguments(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        run_manual.main(arguments)
    assert "error" in capsys.readouterr().err


@pytest.mark.thorough
def test_parallel_check(capsys: pytest.CaptureFixture[str]) -> None:
    parallel_check.main(["--level", "1"])
    out = capsys.readouterr().out
    assert all(f"===== {loop} =====" in out for loop in ("map", "zip", "reduce"))
    assert out.count("Parallel loop listing") == 3


def test_picture() -> None:
    graph = minitorch.datasets["Simple"](3)
    rows = points.picture(graph, lambda cells: [float(x1 < 0.5) for x1, _ in cells]).split("\n")
    assert len(rows) == 24 and {len(row) for row in rows} == {60}
    assert set(rows[0][30:]) <= {" ", "0"} and set(rows[0][:30]) <= {":", "1"}


def test_digits(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("sklearn")
    accuracy = run_digits.main(["--epochs", "2", "--channels", "4", "--rate", "0.01"])
    assert accuracy > 0.8
    assert "360 held-out images" in capsys.readouterr().out


def test_sentiment(capsys: pytest.CaptureFixture[str]) -> None:
    accuracy = run_sentiment.main(["--examples", "600", "--epochs", "4", "--rate", "0.02"])
    assert accuracy > 0.7
    assert "480 texts to learn, 120 held out" in capsys.readouterr().out


def test_sentiment_from_a_file(tmp_path: Path) -> None:
    file = tmp_path / "reviews.tsv"
    rows = ["sentence\tlabel"]
    for i in range(20):
        rows += [f"a wonderful, warm film number {i}\t1", f"dull and far too long {i}\t0"]
    file.write_text("\n".join(rows))
    learnt = ["--epochs", "20", "--rate", "0.05", "--embedding", "8", "--hidden", "4"]
    assert run_sentiment.main(["--data", str(file), *learnt]) == 1.0


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("1,fine\n2,bad\n", "line 2: want a label"),
        ("1,fine\n1,good\n", "texts of both labels"),
        ("", "texts of both labels"),
    ],
)
def test_bad_files(
    content: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "reviews.csv"
    file.write_text(content)
    with pytest.raises(SystemExit):
        run_sentiment.main(["--data", str(file)])
    assert message in capsys.readouterr().err
    with pytest.raises(SystemExit):
        run_sentiment.main(["--data", str(tmp_path / "absent.csv")])
    assert "absent.csv" in capsys.readouterr().err


def test_columns_in_either_order(tmp_path: Path) -> None:
    file = tmp_path / "reviews.csv"
    file.write_text('1,"Good, really."\n"bad, bad",0\n')
    assert text_data.read_examples(file) == [(["good", "really"], 1), (["bad", "bad"], 0)]


@pytest.mark.parametrize(
    ("name", "content", "wanted"),
    [
        ("mark.tsv", "\ufeff1\tgood\n0\tbad\n", [(["good"], 1), (["bad"], 0)]),
        ("mark.csv", "\ufefftext,label\r\ngood,1\r\nbad,0\r\n", [(["good"], 1), (["bad"], 0)]),
        ("lone.tsv", '1\t"good x\n0\tbad\n', [(["good", "x"], 1), (["bad"], 0)]),
        ("lone.csv", '1,"good, x\n0,"bad\n', [(["good", "x"], 1), (["bad"], 0)]),
        ("last.csv", '"good x,1\n"bad y,0\n', [(["good", "x"], 1), (["bad", "y"], 0)]),
        ("middle.csv", '1,go "od\n0,bad"\n', [(["go", "od"], 1), (["bad"], 0)]),
        ("lines.csv", '1,"good\nfilm"\n"b\n""c""",0\n', [(["good", "film"], 1), (["b", "c"], 0)]),
        ("quoted.csv", '"1","good"\n"0","bad"\n', [(["good"], 1), (["bad"], 0)]),
        ("blank.csv", "\n\n1,good\n \n0,bad\n\n\n", [(["good"], 1), (["bad"], 0)]),
        ("long.csv", "1," + "a " * 70_000 + "\n0,b", [(["a"] * 70_000, 1), (["b"], 0)]),
    ],
)
def test_marks_quotes_and_blank_lines(
    name: str, content: str, wanted: list[text_data.Example], tmp_path: Path
) -> None:
    (tmp_path / name).write_bytes(content.encode())
    assert text_data.read_examples(tmp_path / name) == wanted


@given(
    st.lists(
        st.tuples(st.text(st.characters(exclude_characters="\0\r", codec="utf-8")), st.booleans()),
        min_size=2,
        max_size=6,
    ),
    st.booleans(),
)
def test_what_csv_writes_is_read(
    tmp_path_factory: pytest.TempPathFactory, texts: list[tuple[str, bool]], label_first: bool
) -> None:
    """Any text, as Python's own writer quotes it, unless a line of it looks like a row."""
    rows = [(f"x {text} y", label) for text, label in [*texts, ("", True), ("", False)]]
    assume(not any("," in line for text, _ in rows for line in text.split("\n")[1:]))
    path = tmp_path_factory.mktemp("csv") / "t.csv"
    with path.open("w", newline="", encoding="utf-8") as file:
        for text, label in rows:
            csv.writer(file).writerow([int(label), text] if label_first else [text, int(label)])
    wanted = [(text_data.words_of(text), int(label)) for text, label in rows]
    assert text_data.read_examples(path) == wanted


@pytest.mark.parametrize("content", ["1,a\n0,b\n".encode("utf-16"), b"1,\xff\n", b"1,a\0\n0,b\n"])
def test_files_that_are_no_utf8_text_are_named(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "reviews.csv").write_bytes(content)
    with pytest.raises(ValueError, match=r"reviews\.csv is not UTF-8 text"):
        text_data.read_examples(tmp_path / "reviews.csv")


SCRIPTS: list[tuple[Callable[[list[str]], Any], str]] = [
    (run_manual.main, "--points=nan --points=2147483648 --seed=-1 --seed=4294967296 --bias=inf"),
    (run_scalar.main, "--rate=nan --rate=inf --rate=0 --epochs=0 --hidden=1e9 --hidden=1000000000"),
    (run_tensor.main, "--rate=-1 --hidden=0 --hidden=1000000000 --points=2000000000"),
    (run_fast_tensor.main, "--rate=nan --epochs=-1 --hidden=1000000000 --seed=x"),
    (run_digits.main, "--epochs=0 --channels=0 --channels=1000000 --rate=nan --seed=4294967296"),
    (run_sentiment.main, "--epochs=0 --rate=inf --length=0 --words=0 --examples=1 --seed=-1"),
]


@pytest.mark.parametrize(("main", "options"), SCRIPTS)
def test_options_that_make_no_sense(
    main: Callable[[list[str]], Any], options: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for option in options.split():
        with pytest.raises(SystemExit):
            main([option])
        last = capsys.readouterr().err.splitlines()[-1]
        assert f"error: argument {option.split('=')[0]}" in last


def test_padding_counts_for_nothing() -> None:
    random.seed(0)
    model = run_sentiment.TextClassifier(9, 4, 3)
    model.eval()
    short = np.array([[2.0, 3.0]])
    padded = np.array([[2.0, 3.0, 0.0, 0.0, 0.0]])
    assert model(short).item() == pytest.approx(model(padded).item(), rel=1e-12)


def test_the_network_of_the_course() -> None:
    """Weights are drawn from `random`, first layer first, weights before bias."""
    random.seed(5)
    drawn = [0.1 * (random.random() - 0.5) for _ in range(2 * 3 + 3 + 3 + 1)]
    random.seed(5)
    network = run_sentiment_linear.Network(embedding_dim=2, hidden_dim=3)
    given = [p.value.to_numpy().reshape(-1) for p in network.parameters()]
    np.testing.assert_allclose(np.concatenate(given), drawn, rtol=1e-12)
    network.eval()
    out = network.forward(minitorch.tensor([[[1.0, 2.0], [3.0, 4.0]]]))
    w1, b1 = np.reshape(drawn[:6], (2, 3)), np.array(drawn[6:9])
    hidden = np.maximum(np.array([2.0, 3.0]) @ w1 + b1, 0)
    expected = 1 / (1 + np.exp(-(hidden @ drawn[9:12] + drawn[12])))
    assert out.shape == (1,) and out.item() == pytest.approx(expected)


# ----- every program of the folder -----

ROOT = Path(__file__).resolve().parents[1]
PROGRAMS = [
    path.relative_to(ROOT / "project").as_posix()
    for path in sorted((ROOT / "project").rglob("*.py"))
    if '__name__ == "__main__"' in path.read_text(encoding="utf-8")
]


def test_the_courses_scripts_are_programs() -> None:
    wanted = "run_manual run_scalar run_tensor run_fast_tensor run_sentiment run_sentiment_linear"
    assert {f"{name}.py" for name in wanted.split()} <= set(PROGRAMS)


@pytest.mark.parametrize("name", PROGRAMS)
def test_programs_start_from_anywhere(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Started in another folder, through a link, where the package is not installed: the script
    puts the folder where `minitorch` is on the path before it imports anything of it.
    """
    link = tmp_path / Path(name).name
    try:
        link.symlink_to(ROOT / "project" / name)
    except OSError:
        pytest.skip("no links can be made here")
    elsewhere = [folder for folder in sys.path if folder and Path(folder).resolve() != ROOT]
    monkeypatch.setattr(sys, "path", elsewhere)
    monkeypatch.setattr(sys, "argv", [name, "--help"])
    monkeypatch.chdir(tmp_path)
    real_import = builtins.__import__

    def checked_import(module: str, *rest: Any, **options: Any) -> Any:
        if module.split(".")[0] in ("minitorch", "project"):
            assert str(ROOT) in sys.path, f"{module} would not be found"
        return real_import(module, *rest, **options)

    monkeypatch.setattr(builtins, "__import__", checked_import)
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(link), run_name="__main__")
    monkeypatch.undo()
    assert end.value.code in (0, None)
    text = capsys.readouterr().out
    assert "usage" in text.lower() and str(tmp_path) not in text
