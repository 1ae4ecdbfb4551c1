"""`python -m minitorch doctor` on this machine, and on made-up ones that have something wrong."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from minitorch import doctor
from minitorch.cuda import cublas
from minitorch.kernels.gpu import runtime
from minitorch.threads import SETTINGS


def test_the_command_reports_and_exits_with_zero() -> None:
    command = [sys.executable, "-m", "minitorch", "doctor"]
    run = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    for label in ("python", "numpy", "numba threading layer", "blas threads", "vectors", "gpu"):
        assert any(line.startswith(label) for line in run.stdout.splitlines()), label
    assert run.stdout.splitlines()[-1].startswith("ready")


def test_an_unknown_command_is_an_error() -> None:
    run = subprocess.run(
        [sys.executable, "-m", "minitorch", "nurse"], capture_output=True, text=True
    )
    assert run.returncode == 2
    assert "doctor" in run.stderr


@pytest.mark.parametrize(
    ("features", "machine", "bits"),
    [
        ({"avx512f": True, "avx2": True, "avx": True}, "x86_64", 512),
        ({"avx2": True, "avx": True, "sse2": True}, "x86_64", 256),
        ({"sse2": True}, "AMD64", 128),
        ({}, "aarch64", 128),
        ({}, "riscv64", 0),
    ],
)
def test_vector_width(features: dict[str, bool], machine: str, bits: int) -> None:
    assert doctor.vector_bits(features, machine) == bits


@pytest.mark.parametrize(
    ("held_to", "bits", "problems"),
    [("Haswell", 512, 1), ("SkylakeX", 512, 0), ("Haswell", 256, 0), (None, 512, 0)],
)
def test_a_blas_held_to_slower_kernels_is_found(
    held_to: str | None, bits: int, problems: int
) -> None:
    environment = {"OPENBLAS_CORETYPE": held_to} if held_to else {}
    found = doctor.examine_blas(10**6, environment, bits).problems
    assert len(found) == problems
    assert all("unset OPENBLAS_CORETYPE" in str(problem) for problem in found)


def test_more_threads_than_cores_are_found() -> None:
    for finding in (doctor.examine_blas(0, {}, 256), doctor.examine_numba(0, {})):
        for problem in finding.problems:
            assert "on 0 usable cores: set " in str(problem)
            assert not problem.fatal
    assert doctor.examine_numba(0, {}).problems


def test_idle_cores_are_found() -> None:
    (problem,) = doctor.examine_numba(10**6, {}).problems
    assert "of 1000000 usable cores" in str(problem)


def test_threads_that_spin_are_found() -> None:
    assert not doctor.examine_waiting({}).problems
    settings = {"OMP_WAIT_POLICY": "ACTIVE", "OPENBLAS_THREAD_TIMEOUT": "28"}
    assert len(doctor.examine_waiting(settings).problems) == 2
    assert not doctor.examine_waiting(SETTINGS).problems


def test_a_switched_off_compiler_is_found() -> None:
    (problem,) = doctor.examine_numba(2, {"NUMBA_DISABLE_JIT": "1"}).problems
    assert "unset NUMBA_DISABLE_JIT" in str(problem)


def test_a_loop_that_does_not_run_is_fatal(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise ValueError("no threading\nlayer could be loaded")

    monkeypatch.setattr(doctor, "_run_parallel_loop", fail)
    (problem,) = doctor.examine_numba(2, {}).problems
    assert problem.fatal
    assert "\n" not in str(problem)
    assert doctor.main() == 1


def test_a_cache_that_cannot_be_written_is_found(tmp_path: Path) -> None:
    assert not doctor.examine_cache({}, tmp_path).problems
    assert not doctor.examine_cache(
        {"NUMBA_CACHE_DIR": str(tmp_path)}, tmp_path / "kernels"
    ).problems
    blocked = tmp_path / "a file"
    blocked.touch()
    for environment, folder in (
        ({}, None),
        ({}, blocked),
        ({"NUMBA_CACHE_DIR": str(blocked)}, tmp_path),  # numba took the next place
    ):
        (problem,) = doctor.examine_cache(environment, folder).problems
        assert "set NUMBA_CACHE_DIR" in str(problem) and not problem.fatal


def test_a_cache_of_gpu_kernels_that_cannot_be_written_is_found(tmp_path: Path) -> None:
    assert not doctor.examine_gpu_cache({}, tmp_path).problems
    assert not doctor.examine_gpu_cache({"MINITORCH_CUDA_CACHE": ""}, None).problems
    (tmp_path / "a file").touch()
    for folder in (None, tmp_path / "a file"):
        (problem,) = doctor.examine_gpu_cache({}, folder).problems
        assert "set MINITORCH_CUDA_CACHE" in str(problem)


@pytest.mark.skipif(not os.access("/dev/full", os.W_OK), reason="only Linux has a full device")
def test_a_full_disk_is_found(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(tempfile, "TemporaryFile", lambda dir: open("/dev/full", "wb"))
    (problem,) = doctor.examine_cache({}, tmp_path).problems
    assert "its disk is full" in str(problem)


def test_a_lost_link_is_found(tmp_path: Path) -> None:
    (tmp_path / "kernels").write_text("../kernels")
    (problem,) = doctor.examine_kernels(tmp_path / "kernels").problems
    assert "core.symlinks" in str(problem)
    assert not doctor.examine_kernels(tmp_path).problems


@pytest.mark.parametrize(("driver", "extra"), [("580.65.06", "cuda"), ("550.54.15", "cuda12")])
def test_a_gpu_that_numba_cannot_use_is_found(
    monkeypatch: pytest.MonkeyPatch, driver: str, extra: str
) -> None:
    monkeypatch.setattr(doctor, "_nvidia_smi", lambda: f"NVIDIA X, 1 MiB, {driver}")
    monkeypatch.setattr(doctor, "_cuda_usable", lambda: (False, "no driver"))
    (problem,) = doctor.examine_gpu({}).problems
    command = f"pip install -e '.[{extra}]' in the checkout"
    assert command in str(problem)
    monkeypatch.setattr(doctor, "_cuda_usable", lambda: (True, ""))
    monkeypatch.setattr(cublas, "is_available", lambda: False)
    (problem,) = doctor.examine_gpu({}).problems
    assert "tiled kernel" in str(problem) and command in str(problem)
    monkeypatch.setattr(cublas, "is_available", lambda: True)
    assert not doctor.examine_gpu({}).problems


def test_a_machine_without_a_gpu_has_no_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_nvidia_smi", lambda: None)
    finding = doctor.examine_gpu({})
    assert finding.facts["gpu"].startswith("none")
    assert not finding.problems


def test_the_simulator_is_found() -> None:
    (problem,) = doctor.examine_gpu({"NUMBA_ENABLE_CUDASIM": "1"}).problems
    assert "unset NUMBA_ENABLE_CUDASIM" in str(problem)


def test_a_name_lent_to_numba_cuda_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_nvidia_smi", lambda: None)
    for lent in (True, False):
        monkeypatch.setattr(runtime, "ROW_STACK_LENT", lent)
        finding = doctor.examine_gpu({})
        assert ("numpy.row_stack" in finding.facts["numba-cuda"]) == lent
        assert not finding.problems


def test_the_cores_of_this_process_are_counted() -> None:
    assert 1 <= doctor.usable_cores() <= (os.cpu_count() or 1)
