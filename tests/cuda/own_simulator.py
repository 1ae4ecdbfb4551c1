"""`pytest -p tests.cuda.own_simulator`: as if numba-cuda were not installed, as on macOS.

numba has a CUDA target of its own, with a simulator of its own. numba-cuda puts itself in its place
by a finder of modules, made when Python starts; it is taken away here, before numba is imported.
"""

import importlib
import sys

import pytest

assert "numba" not in sys.modules, "numba was imported before this plugin"
sys.meta_path[:] = [
    finder for finder in sys.meta_path if type(finder).__module__ != "_numba_cuda_redirector"
]


@pytest.hookimpl
def pytest_collection_finish() -> None:
    file = importlib.import_module("numba.cuda").__file__
    assert "numba_cuda" not in str(file), f"numba's own simulator was asked for, this is {file}"
