"""The CPU's attention kernels compiled by other processes: for older processors, and not again."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from typing import Any

import numba
import pytest

SCRIPT = """
import numpy as np, time
from minitorch.kernels.cpu import simd
from minitorch.kernels.flash_attention.cpu import backward as cpu_backward, forward as cpu_forward
from minitorch.kernels.flash_attention.cpu import launch as cpu
from minitorch.kernels.flash_attention.problem import AttentionProblem
from minitorch.kernels.philox import attention_dropout_mask
from tests import references
rng = np.random.default_rng(0)
q, k, v, do = (rng.standard_normal((2, 70, 20)).astype(np.float32) for _ in range(4))
arguments = {"is_causal": True, "dropout_p": 0.3}
p = AttentionProblem.of(q.shape, k.shape, v.shape, q.dtype, seed=5, **arguments)
out, lse, rows = cpu.forward(p, q, k, v)
got = (out, *cpu.backward(p, q, k, v, None, out, rows, do)[:3])
kept = attention_dropout_mask(2, 70, 70, 0.3, seed=5)
r = references.attention(q, k, v, do, kept=kept, **arguments)
for x, y in zip(got, (r.out, r.grad_query, r.grad_key, r.grad_value)):
    assert np.abs(x - y).max() < 2e-5
workers = cpu_forward.forward_worker, cpu_backward.backward_worker
hits = sum(sum(worker.stats.cache_hits.values()) for worker in workers)
print(simd.TARGET.float32_lanes, simd.TARGET.has_fma, hits)
"""


def run_script(**environment: str) -> list[str]:
    result = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        env={**os.environ, **environment},
        cwd=os.path.dirname(os.path.dirname(os.path.abspath(__file__))),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.split()


@pytest.mark.skipif(numba.core.config.CPU_NAME is not None, reason="a processor was named already")
@pytest.mark.skipif(
    platform.machine().lower() not in ("x86_64", "amd64"), reason="names of x86 processors"
)
@pytest.mark.thorough
@pytest.mark.parametrize("name, lanes, fma", [("haswell", "8", "True"), ("x86-64", "4", "False")])
def test_older_processors(name: Any, lanes: Any, fma: Any) -> None:
    """It takes 10 s, since both passes are compiled for that processor."""
    assert run_script(NUMBA_CPU_NAME=name, NUMBA_CPU_FEATURES="")[:2] == [lanes, fma]


def test_a_second_process_compiles_nothing() -> None:
    run_script()
    assert run_script()[2] == "2"
