"""What the benchmarks share, and the programs that compare two versions of the library."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import minitorch
from project.bench import machine, networks, pages, processes, same_bits, timing, versions

NETWORK = networks.Network(layers=2, d_model=16, heads=2, context=8, batch=3, middle=24)


# ----- networks -----


def test_the_network_in_pytorch_is_ours() -> None:
    """The same weights, tokens and optimiser: the same losses, step by step."""
    pytest.importorskip("torch")
    before = minitorch.get_default_dtype()
    model = networks.our_model(NETWORK, "cpu", seed=3)
    weights = model.state_dict()
    ours = networks.our_training(NETWORK, model, seed=5).first_losses()
    minitorch.set_default_dtype(before)
    assert ours[-1] < ours[0]
    for fused in (False, True):
        theirs = networks.torch_model(NETWORK, weights)
        losses = networks.torch_training(NETWORK, theirs, fused, seed=5).first_losses()
        np.testing.assert_allclose(ours, losses, rtol=1e-5)


def test_pytorchs_own_weights_are_the_same_every_time() -> None:
    pytest.importorskip("torch")
    models = (networks.torch_model(NETWORK) for _ in range(2))
    first, second = (networks.torch_training(NETWORK, m, False, 0).first_losses() for m in models)
    assert first == second


# ----- pages, machine, processes, time -----


def test_commands_are_told_without_places() -> None:
    words = ["--parts", "grid", "--out", "/somewhere/else", "--prefix=taskset -c 0", "--add"]
    told = "python project/bench/x.py --parts grid --add"
    assert pages.command("/a/b/x.py", words) == told


def page(result: pages.Result) -> str:
    return pages.page("T", pages.table(["a", "b"], [[pages.number(None), result["x"]]]), None, "")


def test_results_are_written_and_read(tmp_path: Path) -> None:
    path = tmp_path / "new" / "name.json"
    pages.write({"x": "1"}, path, None)
    assert not path.with_suffix(".md").exists()
    pages.write({"x": "1"}, path, page)
    assert path.with_suffix(".md").read_text() == "# T\n\n| a | b |\n|---|---|\n| - | 1 |\n"
    assert pages.read(path, page) == {"x": "1"}
    for text in ("{}", "[]", "no JSON", "3"):
        path.write_text(text)
        with pytest.raises(SystemExit, match=r"name\.json has another format: measure anew"):
            pages.read(path, page)
    with pytest.raises(SystemExit, match="cannot read"):
        pages.read(tmp_path, page)


def test_a_machine_is_told_in_a_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    told = tmp_path / "cpuinfo"
    told.write_text("cpu family\t: 25\nmodel\t\t: 17\nmodel name\t: A B: C\n\n")
    monkeypatch.setattr(machine, "CPU_INFO", told)
    monkeypatch.setenv("OMP_WAIT_POLICY", "passive")
    found = machine.machine("numpy", "no-such-package")
    assert found["processor"] == "A B: C (family 25, model 17)"
    assert found["numpy"] == np.__version__ and found["no-such-package"] == "none"
    assert "`OMP_WAIT_POLICY=passive`" in machine.told_settings(found["environment"])
    found |= {"date": "today", "cores": 2, "python": "3"}
    line = f"today; A B: C (family 25, model 17), 2 cores; python 3, numpy {np.__version__}"
    assert machine.about(found) == line
    found |= {"gpu": "G", "memory_gib": 8, "driver": "13.0", "cuDNN": "9"}
    gpu = f"today; G, 8 GiB, driver for CUDA 13.0; python 3, numpy {np.__version__}, cuDNN 9"
    assert machine.about(found) == gpu


CHILD = """
import json, os, sys
job = json.loads(sys.argv[sys.argv.index("--child") + 1])
print("a line before")
print(json.dumps([job["x"] / job["y"], os.environ.get("KEPT"), os.environ.get("TAKEN")]))
"""


def test_a_job_in_a_process_of_its_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    program = tmp_path / "child.py"
    program.write_text(CHILD)
    monkeypatch.setenv("TAKEN", "1")
    environment = {"KEPT": "2", "TAKEN": None}
    prefix = "env KEPT=3" if sys.platform == "linux" else ""
    found = processes.in_child(str(program), {"x": 1, "y": 2}, environment, prefix)
    assert found == [0.5, "3" if prefix else "2", None]
    with pytest.raises(SystemExit, match=r"A measurement failed: .*\n[\s\S]*ZeroDivisionError"):
        processes.in_child(str(program), {"x": 1, "y": 0}, {})


def test_contestants_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    """By a clock that moves only when one of them works."""
    now, calls = [0.0], []

    def work(name: str, seconds: float) -> None:
        calls.append(name)
        now[0] += seconds

    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    functions = {"a": lambda: work("a", 1.0), "b": lambda: work("b", 2.0)}
    times = timing.in_turn(functions, seconds=10.0)
    assert times == {"a": [1.0] * 4, "b": [2.0] * 4}
    assert calls == ["a", "b"] * 5  # once before, for what happens only then
    assert len(timing.in_turn(functions, seconds=0.0)["a"]) == timing.FEWEST_ROUNDS


# ----- two versions -----


def test_what_differs_is_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "before.json"
    before = versions.Comparison(path, [])
    before.add("same", {"hash": "1"})
    before.add("other", {"hash": "2"})
    assert before.finish() == 0
    capsys.readouterr()
    now = versions.Comparison(None, [path])
    now.add("same", {"hash": "1"})
    assert now.finish() == 0
    now.add("other", {"hash": "3"})
    now.add("new", {"hash": "4"})
    assert now.finish() == 1
    out = capsys.readouterr().out
    assert "same" not in out and "other\n  before {'hash': '2'}\n  now    {'hash': '3'}" in out
    assert out.endswith("3 in all, 2 differ\n")
    path.write_text("[]")
    with pytest.raises(SystemExit, match="another format"):
        versions.Comparison(None, [path])


def test_a_bit_makes_a_difference() -> None:
    x = np.array([1.0, 0.0, np.inf], np.float32)
    found = same_bits.digest([x])
    assert found["sums"] == [1.0]
    others: list[Any] = [x.astype(np.float64), x[None], -x, np.nextafter(x, 2), x[::-1]]
    assert found not in [same_bits.digest([other]) for other in others]
    assert found == same_bits.digest([np.ascontiguousarray(x[::-1])[::-1]])


def test_the_same_calls_give_the_same_bits(tmp_path: Path) -> None:
    path = tmp_path / "bits.json"
    assert same_bits.main(["--count", "3", "--out", str(path)]) == 0
    assert same_bits.main(["--count", "3", "--against", str(path)]) == 0
    found = json.loads(path.read_text())
    assert len(found) == 3 and all("hash" in call for call in found.values())
    assert same_bits.main(["--count", "3", "--seed", "1", "--against", str(path)]) == 1


@pytest.mark.parametrize("name", same_bits.FAMILIES)
def test_calls_are_of_every_kind(name: str) -> None:
    rng = np.random.default_rng(0)
    family = same_bits.FAMILIES[name]
    calls = [same_bits.draw(rng, family) for _ in range(200)]
    again = np.random.default_rng(0)
    assert calls == [same_bits.draw(again, family) for _ in calls]
    assert {call.dtype for call in calls} == set(family.dtypes)
    assert {call.layout for call in calls} == set(same_bits.LAYOUTS)
    assert {call.mask and call.mask[1] for call in calls} == {None, "bool", "float"}
    options: set[str] = set().union(*(call.options for call in calls))
    dropout = set() if family.few else {"dropout_p", "seed"}
    assert options == {"is_causal", "window", "scale", "return_lse"} | dropout
    assert all(call.query[2] <= 8 for call in calls) or not family.few


def test_the_reference_of_a_call() -> None:
    """What is hashed is attention: compared with another backend."""
    rng = np.random.default_rng(1)
    family = same_bits.Family(("float64",), (4,), longest=9)
    slow: Any = minitorch.TensorBackend(minitorch.SimpleOps)
    with same_bits.only("cpu") as fast:
        for _ in range(4):
            call = same_bits.draw(rng, family)
            call.options.pop("dropout_p", None)
            pairs = zip(
                same_bits.computed(call, fast, backward=True),
                same_bits.computed(call, slow, backward=True),
                strict=True,
            )
            for found, wanted in pairs:
                np.testing.assert_allclose(found, wanted, rtol=1e-9, atol=1e-9)
