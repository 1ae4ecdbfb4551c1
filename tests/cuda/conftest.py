"""Every test in this folder runs in numba's simulator, and on a GPU where there is one.

    make simulator      NUMBA_ENABLE_CUDASIM=1 pytest tests/cuda: anywhere, small shapes; some
                        once more in numba's own simulator, `-p tests.cuda.own_simulator`
    make test-gpu       pytest tests/cuda: on the GPU

The simulator runs kernels as plain Python, a thread of the operating system for each GPU thread, so
take small blocks and shapes there: `runtime.SIMULATED` says where a test is. It must be chosen
before numba is imported, which is why it has a process of its own.

There every test runs under `race_checker` (tests/cuda/simulator.py): an access to a cell that
another thread writes, with no barrier in between, is an error. On a GPU compute-sanitizer looks
for races (make sanitize). A test with the mark `gpu` needs the hardware (large shapes, graphs,
streams) and is skipped in the simulator; so is one with the mark `large` (tests/attention.py).
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from minitorch.kernels.gpu import runtime

FOLDER = Path(__file__).parent
NO_GPU = "no GPU here: make simulator runs this test in numba's simulator"
ONLY_SIMULATED = (
    "needs a GPU, the simulator is none: make test-gpu runs this test where there is one"
)


@pytest.hookimpl(tryfirst=True)  # before `-m` chooses
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if not item.path.is_relative_to(FOLDER):
            continue
        if item.get_closest_marker("large"):
            item.add_marker(pytest.mark.gpu)
        if not runtime.is_available():
            item.add_marker(pytest.mark.skip(reason=NO_GPU))
        elif runtime.SIMULATED and item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason=ONLY_SIMULATED))


@pytest.fixture(autouse=True)
def simulated_blocks() -> Iterator[None]:
    """In the simulator: blocks run as tests/cuda/simulator.py says, and races are errors."""
    if not runtime.SIMULATED:
        yield
        return
    from tests.cuda import simulator

    with simulator.strict_blocks(), simulator.race_checker():
        yield
