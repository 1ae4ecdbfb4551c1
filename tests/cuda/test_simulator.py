"""The tests' own additions to the simulator find the faults that they are there to find."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from minitorch.kernels.gpu import runtime
from minitorch.kernels.gpu.runtime import cuda, types

if not runtime.SIMULATED:
    pytest.skip("about numba's simulator: make simulator", allow_module_level=True)

from minitorch.kernels.gpu.ptx import bar_arrive, bar_sync, shared_address
from minitorch.kernels.gpu.ptx_hopper import mbarrier_arrive, mbarrier_init
from minitorch.kernels.gpu.ptx_hopper import mbarrier_wait_parity as wait_for
from tests.cuda.simulator import Deadlock, DivergentBarrier, Race

THREADS = 8


@cuda.jit
def neighbours(x, out, barriers):  # type: ignore[no-untyped-def]
    """out[i] = x[i - 1] + x[i + 1] through shared memory, two blocks' worth."""
    tile = cuda.shared.array(THREADS, types.float32)
    i = cuda.threadIdx.x
    tile[i] = x[cuda.grid(1)]
    if barriers:
        cuda.syncthreads()
    out[cuda.grid(1)] = tile[(i - 1) % THREADS] + tile[(i + 1) % THREADS]


@cuda.jit
def overwriting(x, out, barriers):  # type: ignore[no-untyped-def]
    """A loop that writes the tile again while others may still read it."""
    tile = cuda.shared.array(THREADS, types.float32)
    i = cuda.threadIdx.x
    total = types.float32(0)
    for start in range(0, x.size, THREADS):
        tile[i] = x[start + i]
        cuda.syncthreads()
        total += tile[(i + 1) % THREADS]
        if barriers:
            cuda.syncthreads()
    out[i] = total


@cuda.jit
def one_cell(out, how):  # type: ignore[no-untyped-def]
    """All threads of all blocks add to one number."""
    if how == "atomic":
        cuda.atomic.add(out, 0, 1)
    else:
        out[cuda.threadIdx.x if how == "block" else 0] += 1


@cuda.jit
def unwritten(out):  # type: ignore[no-untyped-def]
    """Only the first block writes what both read."""
    tile = cuda.shared.array((2, THREADS), types.float32)
    if cuda.blockIdx.x == 0:
        tile[1, cuda.threadIdx.x] = 1
    out[cuda.grid(1)] = tile[1, cuda.threadIdx.x]


@cuda.jit
def divergent(out):  # type: ignore[no-untyped-def]
    if cuda.threadIdx.x < 3:
        cuda.syncthreads()
    else:
        out[0] = 1
        cuda.syncthreads()


@cuda.jit
def early_exit(out):  # type: ignore[no-untyped-def]
    """Threads that have ended need not come to a barrier."""
    if cuda.threadIdx.x >= 5:
        return
    out[cuda.threadIdx.x] = cuda.syncthreads_count(cuda.threadIdx.x % 2)


@pytest.mark.parametrize("kernel", [neighbours, overwriting])
def test_a_missing_barrier_is_found(kernel: Any) -> None:
    x, out = np.arange(2 * THREADS, dtype=np.float32), np.zeros(2 * THREADS, np.float32)
    blocks = 2 if kernel is neighbours else 1
    kernel[blocks, THREADS](x, out, True)
    with pytest.raises(Race, match="that thread"):
        kernel[blocks, THREADS](x, out, False)
    if kernel is overwriting:
        np.testing.assert_array_equal(out[:THREADS], [10, 12, 14, 16, 18, 20, 22, 8])


@pytest.mark.parametrize("how", ["atomic", "block", "plain"])
@pytest.mark.parametrize("blocks", [1, 2])
def test_global_memory_is_checked_too(how: str, blocks: int) -> None:
    out = np.zeros(THREADS, np.int64)
    if how == "atomic" or (how == "block" and blocks == 1):
        one_cell[blocks, THREADS](out, how)
        assert out.sum() == blocks * THREADS
    else:
        with pytest.raises(Race):
            one_cell[blocks, THREADS](out, how)


def test_launches_are_in_order() -> None:
    out = np.zeros(THREADS, np.int64)
    for _ in range(2):
        one_cell[1, THREADS](out, "block")
    assert (out == 2).all()


def test_shared_memory_is_new_in_every_block() -> None:
    out = np.zeros(2 * THREADS, np.float32)
    unwritten[2, THREADS](out)
    assert (out[:THREADS] == 1).all()
    assert np.isnan(out[THREADS:]).all()


def test_threads_at_different_barriers_are_found() -> None:
    with pytest.raises(DivergentBarrier, match="divergent"):
        divergent[1, THREADS](np.zeros(1, np.float32))


def test_threads_may_end_before_a_barrier() -> None:
    out = np.full(THREADS, -1, np.int64)
    early_exit[1, THREADS](out)
    np.testing.assert_array_equal(out, [2, 2, 2, 2, 2, -1, -1, -1])


def test_an_error_in_a_kernel_names_the_thread() -> None:
    with pytest.raises(IndexError) as caught:
        neighbours[3, THREADS](np.zeros(THREADS, np.float32), np.zeros(THREADS, np.float32), True)
    assert "in thread (0, 0, 0) of block (1, 0, 0)" in caught.value.__notes__


def test_warp_reductions() -> None:
    @cuda.jit
    def reduce(x, sums, largest):  # type: ignore[no-untyped-def]
        i = cuda.threadIdx.x
        sums[i] = runtime.warp_sum(x[i])
        largest[i] = runtime.warp_max(x[i])

    x = np.random.default_rng(0).standard_normal(64).astype(np.float32)
    sums, largest = np.empty_like(x), np.empty_like(x)
    reduce[1, 64](x, sums, largest)
    np.testing.assert_allclose(sums, x.reshape(2, 32).sum(axis=1).repeat(32), rtol=1e-5)
    np.testing.assert_array_equal(largest, x.reshape(2, 32).max(axis=1).repeat(32))


# ----- barriers in shared memory -----


@cuda.jit
def handed_over(out, parity, waits):  # type: ignore[no-untyped-def]
    """Thread 0 writes a cell, and says so at a barrier that the others wait at."""
    cell, barrier = cuda.shared.array(1, types.float32), cuda.shared.array(1, types.uint64)
    address = shared_address(barrier)
    if cuda.threadIdx.x == 0:
        mbarrier_init(address, 1)
    cuda.syncthreads()
    if cuda.threadIdx.x == 0:
        cell[0] = 7
        mbarrier_arrive(address)
    elif waits:
        wait_for(address, parity)
    out[cuda.threadIdx.x] = cell[0]


@cuda.jit
def taking_turns(out, threads):  # type: ignore[no-untyped-def]
    """The second half of the threads waits for the first, which does not wait."""
    cells = cuda.shared.array(THREADS // 2, types.float32)
    half, i = THREADS // 2, cuda.threadIdx.x
    if i < half:
        cells[i] = i
        bar_arrive(1, threads)
    else:
        bar_sync(1, threads)
        out[i - half] = cells[i - half]


def test_one_thread_waits_for_another() -> None:
    out = np.zeros(THREADS, np.float32)
    handed_over[1, THREADS](out, 0, True)
    assert (out == 7).all()
    with pytest.raises(Race):
        handed_over[1, THREADS](out, 0, False)


def test_the_wrong_phase_is_found() -> None:
    """The first phase is over when it is waited for, the next one, of parity 1, never is."""
    with pytest.raises(Deadlock):
        handed_over[1, THREADS](np.zeros(THREADS, np.float32), 1, True)


def test_named_barriers() -> None:
    out = np.zeros(THREADS // 2, np.float32)
    taking_turns[1, THREADS](out, THREADS)
    np.testing.assert_array_equal(out, np.arange(THREADS // 2))


def test_threads_that_wait_for_ever_are_found() -> None:
    with pytest.raises(Deadlock, match="every thread waits"):
        taking_turns[1, THREADS](np.zeros(THREADS, np.float32), THREADS + 1)
