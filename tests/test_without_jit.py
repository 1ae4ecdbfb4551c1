"""NUMBA_DISABLE_JIT=1, the first step of debugging: everything runs as plain Python."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np

from . import without_jit

ROOT = Path(__file__).resolve().parent.parent
TOLERANCE = {"float32": 5e-6, "float64": 1e-12}


def test_the_same_values_without_compilation(tmp_path: Path) -> None:
    """Every operation, forward and backward; warnings are errors there too."""
    file = tmp_path / "values.npz"
    subprocess.run(
        [sys.executable, "-W", "error", "-m", "tests.without_jit", str(file)],
        check=True,
        cwd=ROOT,
        env={**os.environ, "NUMBA_DISABLE_JIT": "1", "PYTHONPATH": str(ROOT)},
    )
    expected = without_jit.results()
    with np.load(file) as plain:
        assert set(plain) == set(expected)
        for name, array in expected.items():
            assert plain[name].dtype == array.dtype
            largest = np.abs(array[np.isfinite(array)]).max(initial=1.0)
            np.testing.assert_allclose(
                plain[name], array, rtol=0, atol=TOLERANCE[name[:7]] * largest, err_msg=name
            )
