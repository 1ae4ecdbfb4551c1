"""Time, memory and start-up of FlashAttention against PyTorch's scaled_dot_product_attention.

    python project/bench/attention_cpu.py                  # everything, about 10 minutes
    python project/bench/attention_cpu.py --modes installed --lengths 1024

Both run in one process, call by call in turn, on the same data and the same number of threads; a
figure is the median over the rounds. Each environment and head size is measured in a process of its
own, since what sets the instruction set and the waiting of threads is read when libraries load:

    installed   both as they come; threads that wait sleep (OMP_WAIT_POLICY=passive)
    spin        the same with OMP_WAIT_POLICY unset: PyTorch's waiting threads spin for a while
    avx2        both held to AVX2, as on most laptops

Writes attention_cpu.json and a page beside it. On a GPU: `attention_cuda.py`.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # so that `project` is found

import numpy as np

from project.arguments import COUNT, parser_of, refuse_too_large, whole
from project.bench import pages, processes
from project.bench.machine import machine, told_settings
from project.bench.timing import in_turn
from project.transformer.memory import peak, restart_peak

LENGTHS = [255, 256, 512, 1000, 1024, 2048, 3001, 4096]
SINGLE_HEAD_LENGTHS = [256, 1000, 4096]
MODES: dict[str, dict[str, str | None]] = {
    "installed": {"OMP_WAIT_POLICY": "passive"},
    "avx2": {"OMP_WAIT_POLICY": "passive", **processes.AVX2},
    "spin": {"OMP_WAIT_POLICY": None},
}
TITLES = {"installed": "as installed", "spin": "as installed, spinning", "avx2": "both AVX2"}
MEMORY_LENGTHS = (1024, 4096)


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = parser_of(__doc__)
    what = parser.add_argument_group("what is measured")
    count = whole(COUNT)
    what.add_argument("--batch", type=count, default=2, help="default: %(default)s")
    what.add_argument("--heads", type=count, default=8, help="default: %(default)s")
    what.add_argument("--head-dims", type=count, nargs="+", default=[64, 128], metavar="D")
    what.add_argument("--lengths", type=count, nargs="+", default=LENGTHS, metavar="N")
    what.add_argument("--modes", nargs="+", choices=list(MODES), default=list(MODES))
    what.add_argument("--skip-memory", action="store_true", help="no memory and start-up figures")
    processes.add_options(parser, 2.0, "a cell")
    pages.add_out(parser, kept="what the file has of other modes")
    arguments = parser.parse_args()
    length, head_dim = max(arguments.lengths), max(arguments.head_dims)
    # Four inputs, four outputs, and as much again for PyTorch; float32.
    needed = 4 * 12 * arguments.batch * arguments.heads * length * head_dim
    sizes = {"batch": arguments.batch, "heads": arguments.heads, "lengths": length}
    sizes["head-dims"] = head_dim
    largest = max(sizes, key=lambda name: sizes[name])
    refuse_too_large(parser, f"--{largest} {sizes[largest]}", needed)
    return arguments


# ----- in the child process -----


def make_inputs(batch: int, heads: int, length: int, head_dim: int) -> list[np.ndarray]:
    """Queries, keys, values and the gradient of the output, (B, H, N, D) float32."""
    rng = np.random.default_rng(0)
    return [rng.standard_normal((batch, heads, length, head_dim), np.float32) for _ in range(4)]


def ours(q: Any, k: Any, v: Any, causal: bool) -> Any:
    """A forward pass, description of the problem included: (problem, out, logsumexp, rows)."""
    from minitorch.kernels.flash_attention.cpu import launch as cpu
    from minitorch.kernels.flash_attention.problem import AttentionProblem

    problem = AttentionProblem.of(q.shape, k.shape, v.shape, q.dtype, is_causal=causal)
    return problem, *cpu.forward(problem, q, k, v)


def ours_both(q: Any, k: Any, v: Any, do: Any, causal: bool) -> Any:
    """Forward and backward: (dq, dk, dv)."""
    from minitorch.kernels.flash_attention.cpu import launch as cpu

    problem, out, _, rows = ours(q, k, v, causal)
    return cpu.backward(problem, q, k, v, None, out, rows, do)[:3]


def standard_both(q: Any, k: Any, v: Any, do: Any, causal: bool) -> Any:
    """The same by standard attention in numpy."""
    from minitorch.kernels.flash_attention.problem import AttentionProblem
    from minitorch.kernels.flash_attention.standard import (
        standard_attention,
        standard_attention_backward,
    )

    problem = AttentionProblem.of(q.shape, k.shape, v.shape, q.dtype, is_causal=causal)
    out, _, rows = standard_attention(problem, q, k, v)
    return standard_attention_backward(problem, q, k, v, None, out, rows, do)[:3]


def torch_functions(arrays: list[np.ndarray], causal: bool) -> tuple[Any, Any]:
    """PyTorch's forward, without a graph, and forward + backward on the same data."""
    import torch

    attend = torch.nn.functional.scaled_dot_product_attention
    inputs = [torch.from_numpy(x).requires_grad_() for x in arrays[:3]]
    grad_out = torch.from_numpy(arrays[3])

    def forward() -> Any:
        with torch.no_grad():
            return attend(*inputs, is_causal=causal)

    def both() -> Any:
        return torch.autograd.grad(attend(*inputs, is_causal=causal), inputs, grad_out)

    return forward, both


def measure_cells(job: dict[str, Any]) -> list[dict[str, Any]]:
    """Times of several shapes."""
    import numba
    import torch

    torch.set_num_threads(job["threads"])
    numba.set_num_threads(job["threads"])
    return [cell for shape in job["shapes"] for cell in measure_shape(shape, job["seconds"])]


def measure_shape(job: dict[str, Any], seconds: float) -> list[dict[str, Any]]:
    """Times of one shape, causal and not."""
    cells = []
    for causal in (False, True):
        arrays = make_inputs(job["batch"], job["heads"], job["length"], job["head_dim"])
        q, k, v, do = arrays
        theirs, theirs_both = torch_functions(arrays, causal)
        difference = float(np.abs(ours(q, k, v, causal)[1] - theirs().numpy()).max())
        functions = {
            "forward": lambda q=q, k=k, v=v, causal=causal: ours(q, k, v, causal),
            "torch_forward": theirs,
            "both": lambda q=q, k=k, v=v, do=do, causal=causal: ours_both(q, k, v, do, causal),
            "torch_both": theirs_both,
        }
        times = in_turn(functions, seconds)
        ms = {name: 1e3 * float(np.median(record)) for name, record in times.items()}
        cells.append(
            {
                **{name: job[name] for name in ("batch", "heads", "length", "head_dim")},
                "causal": causal,
                "rounds": len(times["forward"]),
                **{f"{name}_ms": median for name, median in ms.items()},
                **{f"{name}_ratio": ms[f"torch_{name}"] / ms[name] for name in ("forward", "both")},
                "largest_difference_of_outputs": difference,
            }
        )
    return cells


def measure_memory(job: dict[str, Any]) -> float:
    """Peak growth, in MiB, of one forward + backward over a process that did a small one before."""

    def call(arrays: list[np.ndarray]) -> Any:
        q, k, v, do = arrays
        if job["what"] == "torch":
            return torch_functions(arrays, False)[1]()
        return (ours_both if job["what"] == "ours" else standard_both)(q, k, v, do, False)

    call(make_inputs(1, 2, 64, job["head_dim"]))
    arrays = make_inputs(job["batch"], job["heads"], job["length"], job["head_dim"])
    before = restart_peak()
    call(arrays)
    return (peak() - before) / 2**20


def measure_first_call(job: dict[str, Any]) -> dict[str, float]:
    """Seconds to import the kernels, and of the first forward + backward of this process."""
    start = time.perf_counter()
    import minitorch.kernels.flash_attention.cpu.launch  # noqa: F401

    imported = time.perf_counter()
    q, k, v, do = make_inputs(2, 8, 256, 64)
    ours_both(q, k, v, do, False)
    return {"import": imported - start, "first_call": time.perf_counter() - imported}


CHILDREN: dict[str, Callable[[dict[str, Any]], Any]] = {
    "cells": measure_cells,
    "memory": measure_memory,
    "first call": measure_first_call,
}

# ----- in the parent process -----


def run_child(arguments: argparse.Namespace, mode: str, job: dict[str, Any], **extra: str) -> Any:
    """Run a job in a process of its own, in the environment of a mode."""
    threads = str(arguments.threads)
    environment = {"OMP_NUM_THREADS": threads, "NUMBA_NUM_THREADS": threads, **extra, **MODES[mode]}
    return processes.in_child(__file__, job, environment, arguments.prefix)


def cell_jobs(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """The shapes to measure, batches of heads and single heads, in a job for each head size."""
    many = {"batch": arguments.batch, "heads": arguments.heads}
    jobs = []
    for head_dim in arguments.head_dims:
        shapes = [{**many, "length": n, "head_dim": head_dim} for n in arguments.lengths]
        if head_dim == arguments.head_dims[0]:
            single = [n for n in SINGLE_HEAD_LENGTHS if n in arguments.lengths]
            shapes += [{"batch": 1, "heads": 1, "length": n, "head_dim": head_dim} for n in single]
        common = {"threads": arguments.threads, "seconds": arguments.seconds}
        jobs.append({"kind": "cells", **common, "shapes": shapes})
    return jobs


def summary(cells: list[dict[str, Any]], arguments: argparse.Namespace) -> dict[str, float]:
    """Geometric means, and the worst cell, of the ratios of time, PyTorch's to ours."""
    result = {}
    heads = arguments.batch * arguments.heads
    for name in ("forward_ratio", "both_ratio"):
        ratios = [cell[name] for cell in cells if cell["batch"] * cell["heads"] == heads]
        result[name] = pages.geometric_mean(ratios)
        result[f"smallest_{name}"] = min(cell[name] for cell in cells)
    return result


def measure_memory_and_start(arguments: argparse.Namespace) -> tuple[Any, Any]:
    """Peak growth by length and implementation; seconds of the first call, cold and warm."""
    memory = []
    for length in MEMORY_LENGTHS:
        row: dict[str, Any] = {"length": length}
        for what in ("ours", "torch", "standard"):
            job = {"kind": "memory", "what": what, "length": length, "head_dim": 64}
            job |= {"batch": arguments.batch, "heads": arguments.heads}
            row[what] = run_child(arguments, "installed", job)
        print(row, flush=True)
        memory.append(row)
    with tempfile.TemporaryDirectory() as cache:
        job = {"kind": "first call"}
        cold = run_child(arguments, "installed", job, NUMBA_CACHE_DIR=cache)
        warm = [run_child(arguments, "installed", job, NUMBA_CACHE_DIR=cache) for _ in range(3)]
    start = {"cold": cold, "warm": sorted(warm, key=lambda run: run["first_call"])[1]}
    print(start, flush=True)
    return memory, start


def both(row: dict[str, float], name: str) -> str:
    """A figure of the forward pass and of both, such as `forward_ms` and `both_ms`."""
    return " / ".join(f"{row[name.format(what)]:.2f}" for what in ("forward", "both"))


def memory_table(rows: list[dict[str, float]]) -> str:
    """Peak growth by length."""
    titles = ["N", "ours", "PyTorch", "standard", "ours / PyTorch", "standard / ours"]
    shown = []
    for row in rows:
        sizes = [row[name] for name in ("ours", "torch", "standard")]
        one, two, three = sizes
        ratios = [f"{one / two:.2f}", f"{three / one:.1f}"]
        shown.append([row["length"], *(f"{size:.0f}" for size in sizes), *ratios])
    return pages.table(titles, shown)


def start_line(start: dict[str, Any]) -> str:
    """Seconds of a process's first call."""
    cold, warm = start["cold"], start["warm"]
    return (
        f"First forward + backward of a process: {warm['first_call']:.2f} s with a warm compile "
        f"cache, {cold['first_call']:.1f} s with a cold one (import: {warm['import']:.2f} s)."
    )


def cell_table(modes: dict[str, Any]) -> str:
    """All cells: our times in the first mode, and the ratios in each."""
    first = next(iter(modes))
    titles = ["B, H", "D", "N", "causal", f"ours, ms ({TITLES[first]})"]
    rows = []
    for cells in zip(*(measured["cells"] for measured in modes.values()), strict=True):
        c = cells[0]
        shape = [f"{c['batch']}, {c['heads']}", c["head_dim"], c["length"]]
        ratios = [both(cell, "{}_ratio") for cell in cells]
        rows.append([*shape, c["causal"], both(c, "{}_ms"), *ratios])
    return pages.table([*titles, *(TITLES[mode] for mode in modes)], rows)


def page(result: pages.Result) -> str:
    """The results as Markdown: machine, summary, memory, start-up and a table of all cells."""
    about, modes, memory = result["machine"], result["modes"], result.get("memory")
    means = [
        [TITLES[mode], both(measured["summary"], "{}_ratio"),
         both(measured["summary"], "smallest_{}_ratio")]
        for mode, measured in modes.items()
    ]  # fmt: skip
    return pages.page(
        "FlashAttention on the CPU against PyTorch's scaled_dot_product_attention",
        pages.source(
            result,
            f"{result['threads']} threads each, float32",
            f"Settings of thread pools and BLAS: {told_settings(about['environment'])}",
        ),
        "Ratios are PyTorch's time over ours, forward / forward + backward. The geometric mean "
        "is over the batches of heads, the worst cell over single heads too. The environments are "
        "`MODES` in the script.",
        pages.table(["", "geometric mean", "worst cell"], means),
        memory
        and "Peak memory of forward + backward beyond the inputs, MiB "
        "(standard: numpy, with the whole score matrix):",
        memory and memory_table(memory),
        memory and start_line(result["start"]),
        cell_table(modes),
    )


def main() -> None:
    """Measure, print, write."""
    arguments = parse_arguments()
    if arguments.child:
        print(json.dumps(CHILDREN[arguments.child["kind"]](arguments.child)))
        return
    path = arguments.out / "attention_cpu.json"
    result: pages.Result = {
        "machine": machine("numpy", "numba", "llvmlite", "torch"),
        "command": pages.command(__file__),
        "threads": arguments.threads,
        "modes": {},
    }
    kept = pages.former(arguments, path, page)
    result |= {name: kept[name] for name in ("modes", "memory", "start") if name in kept}
    if not arguments.skip_memory:
        result["memory"], result["start"] = measure_memory_and_start(arguments)
    for mode in arguments.modes:
        cells: list[dict[str, Any]] = []
        for job in cell_jobs(arguments):
            for cell in run_child(arguments, mode, job):
                cells.append(cell)
                shape = f"B {cell['batch']} H {cell['heads']} D {cell['head_dim']}"
                causal = "causal" if cell["causal"] else "full"
                ratios = both(cell, "{}_ratio")
                print(f"{mode}: {shape} N {cell['length']} {causal}: {ratios}", flush=True)
        result["modes"][mode] = {"summary": summary(cells, arguments), "cells": cells}
        print(mode, result["modes"][mode]["summary"], flush=True)
        pages.write(result, path, page)


if __name__ == "__main__":
    main()
