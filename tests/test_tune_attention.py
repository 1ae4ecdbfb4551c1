"""The table of tile sizes, and the command that writes it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from minitorch.kernels.flash_attention import tuning
from project.bench import tune_attention as tune


def test_a_choice_is_for_one_gpu_head_size_and_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    table = {
        ("x", "forward", (9, 0), 64, True, False): (128, 64),
        ("x", "forward", (9, 0), 64, True, True): (64, 64),
    }
    monkeypatch.setattr(tuning, "TABLE", table)
    assert tuning.choice("x", "forward", (9, 0), 64, True, tuning.SHORT) == (64, 64)
    assert tuning.choice("x", "forward", (9, 0), 64, True, tuning.SHORT + 1) == (128, 64)
    assert tuning.choice("x", "forward", (9, 0), 64, True) == (128, 64)
    assert tuning.choice("x", "forward", (9, 0), 64, False) is None
    assert tuning.choice("x", "forward", (8, 0), 64, True) is None
    assert tuning.choice("y", "forward", (9, 0), 64, True) is None


def test_the_table_is_rewritten_and_the_rest_stays() -> None:
    source = tune.TABLE_FILE.read_text()
    table: dict[Any, Any] = {
        ("mma", "query", (8, 0), 128, False, True): (64, 64, 4, 2),
        ("hopper", "forward", (9, 0), 64, True, False): (3, 128, 2, 1),
    }
    text = tune.written(table, source)
    found: dict[str, Any] = {}
    exec(compile(text, "tuning.py", "exec"), found)
    assert found["TABLE"] == table
    assert tune.written(found["TABLE"], text) == text
    assert tune.written(tuning.TABLE, text) == source
    assert all(len(line) <= 100 for line in text.splitlines())


def test_entries_are_of_the_right_shape() -> None:
    for (module, kernel, architecture, head_dim, causal, short), numbers in tuning.TABLE.items():
        assert kernel in ("forward", "key_value", "query"), module
        assert len(architecture) == 2
        assert head_dim > 0
        assert isinstance(causal, bool)
        assert isinstance(short, bool)
        assert all(isinstance(n, int) for n in numbers)


def test_nothing_to_measure_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("minitorch.cuda.is_available", lambda: True)
    monkeypatch.setattr("sys.argv", ["tune_attention.py", "--modules", "hoper"])
    with pytest.raises(SystemExit, match="modules with candidates are hopper"):
        tune.main()


def test_candidates() -> None:
    """By head size, or by head size and mask."""
    module = SimpleNamespace(CANDIDATES={"forward": {64: ((1,), (2,)), (64, True): ((3,),)}})
    assert tune.candidates_of(module, "forward", 64, False) == ((1,), (2,))
    assert tune.candidates_of(module, "forward", 64, True) == ((3,),)
    assert tune.candidates_of(module, "query", 64, True) == ()
    assert tune.head_dims_of(module, "forward") == [64]
    assert tune.head_dims_of(module, "query") == []
