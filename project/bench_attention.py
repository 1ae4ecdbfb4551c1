"""Time, memory and start-up of FlashAttention against PyTorch's scaled_dot_product_attention.

    python project/bench_attention.py                  # everything, about 10 minutes
    python project/bench_attention.py --modes installed --lengths 1024

Both run in one process, call by call in turn, on the same data and the same number of threads; a
figure is the median over the rounds. Each environment and head size is measured in a process of its
own, since what sets the instruction set and the waiting of threads is read when libraries load:

    installed   both as they come; threads that wait sleep (OMP_WAIT_POLICY=passive)
    spin        the same with OMP_WAIT_POLICY unset: PyTorch's waiting threads spin for a while
    avx2        both held to AVX2, as on most laptops

Writes a JSON file and a Markdown table beside it. With `--device cuda` it is another program,
`bench_attention_cuda.py`, with other options: `--device cuda --help`.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that `project` is found

import numpy as np

from project.arguments import COUNT, POSITIVE, THREADS, read_results, real, refuse_too_large, whole

RESULTS = Path(__file__).resolve().parent / "results" / "attention_cpu.json"
LENGTHS = [255, 256, 512, 1000, 1024, 2048, 3001, 4096]
SINGLE_HEAD_LENGTHS = [256, 1000, 4096]
AVX2 = {
    "ATEN_CPU_CAPABILITY": "avx2",
    "MKL_ENABLE_INSTRUCTIONS": "AVX2",
    "NUMBA_CPU_NAME": "haswell",
    "NUMBA_CPU_FEATURES": "",
}
MODES: dict[str, dict[str, str | None]] = {
    "installed": {"OMP_WAIT_POLICY": "passive"},
    "avx2": {"OMP_WAIT_POLICY": "passive", **AVX2},
    "spin": {"OMP_WAIT_POLICY": None},
}
TITLES = {"installed": "as installed", "spin": "as installed, spinning", "avx2": "both AVX2"}


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    what = parser.add_argument_group("what is measured")
    what.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="default: cpu")
    count = whole(COUNT)
    what.add_argument("--batch", type=count, default=2, help="default: %(default)s")
    what.add_argument("--heads", type=count, default=8, help="default: %(default)s")
    what.add_argument("--head-dims", type=count, nargs="+", default=[64, 128], metavar="D")
    what.add_argument("--lengths", type=count, nargs="+", default=LENGTHS, metavar="N")
    what.add_argument("--modes", nargs="+", choices=list(MODES), default=list(MODES))
    what.add_argument("--skip-memory", action="store_true", help="no memory and start-up figures")
    how = parser.add_argument_group("how")
    how.add_argument(
        "--threads", type=whole(THREADS), default=2, help="of each; default: %(default)s"
    )
    how.add_argument(
        "--seconds", type=real(POSITIVE), default=2.0, help="a cell; default: %(default)s"
    )
    how.add_argument(
        "--prefix", default="", help="command before each measuring process (taskset -c 0,1, say)"
    )
    how.add_argument(
        "--add", action="store_true", help="keep what the file at --out has of other modes"
    )
    how.add_argument("--out", type=Path, default=RESULTS, help="default: %(default)s")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    length, head_dim = max(arguments.lengths), max(arguments.head_dims)
    # Four inputs, four outputs, and as much again for PyTorch; float32.
    needed = 4 * 12 * arguments.batch * arguments.heads * length * head_dim
    sizes = {"batch": arguments.batch, "heads": arguments.heads, "lengths": length}
    sizes["head-dims"] = head_dim
    largest = max(sizes, key=lambda name: sizes[name])
    refuse_too_large(parser, f"--{largest} {sizes[largest]}", needed)
    return arguments


# --------------------------------------------------------------------------- in the child process


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


def interleaved(functions: list[Callable[[], Any]], seconds: float) -> list[list[float]]:
    """Seconds of each call, in rounds that call every function in turn; at least 3 rounds."""
    for function in functions:
        function()
    times: list[list[float]] = [[] for _ in functions]
    end = time.perf_counter() + seconds
    while len(times[0]) < 3 or (time.perf_counter() < end and len(times[0]) < 200):
        for function, record in zip(functions, times, strict=True):
            start = time.perf_counter()
            function()
            record.append(time.perf_counter() - start)
    return times


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
        functions = [
            lambda q=q, k=k, v=v, causal=causal: ours(q, k, v, causal),
            theirs,
            lambda q=q, k=k, v=v, do=do, causal=causal: ours_both(q, k, v, do, causal),
            theirs_both,
        ]
        times = interleaved(functions, seconds)
        medians = [float(np.median(record)) for record in times]
        cells.append(
            {
                **{name: job[name] for name in ("batch", "heads", "length", "head_dim")},
                "causal": causal,
                "rounds": len(times[0]),
                "forward_ms": 1e3 * medians[0],
                "torch_forward_ms": 1e3 * medians[1],
                "forward_ratio": medians[1] / medians[0],
                "both_ms": 1e3 * medians[2],
                "torch_both_ms": 1e3 * medians[3],
                "both_ratio": medians[3] / medians[2],
                "largest_difference_of_outputs": difference,
            }
        )
    return cells


def memory_status(field: str) -> float:
    """A field of /proc/self/status, in MiB: VmRSS now, VmHWM at its peak."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) / 1024
    raise OSError(f"/proc/self/status has no {field}.")


def measure_memory(job: dict[str, Any]) -> float:
    """Peak growth, in MiB, of one forward + backward over a process that did a small one before."""

    def call(arrays: list[np.ndarray]) -> Any:
        q, k, v, do = arrays
        if job["what"] == "torch":
            return torch_functions(arrays, False)[1]()
        return (ours_both if job["what"] == "ours" else standard_both)(q, k, v, do, False)

    call(make_inputs(1, 2, 64, job["head_dim"]))
    arrays = make_inputs(job["batch"], job["heads"], job["length"], job["head_dim"])
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = memory_status("VmRSS")
    call(arrays)
    return memory_status("VmHWM") - before


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

# --------------------------------------------------------------------------- in the parent process


def run_child(arguments: argparse.Namespace, mode: str, job: dict[str, Any], **extra: str) -> Any:
    """Run a job in a process of its own, in the environment of a mode."""
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": str(arguments.threads),
        "NUMBA_NUM_THREADS": str(arguments.threads),
        **extra,
    }
    for name, value in MODES[mode].items():
        environment.pop(name, None)
        if value is not None:
            environment[name] = value
    command = [*shlex.split(arguments.prefix), sys.executable, __file__, "--child", json.dumps(job)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    if result.returncode:
        raise SystemExit(f"A measurement failed: {job}\n{result.stderr}")
    return json.loads(result.stdout.splitlines()[-1])


def machine() -> dict[str, Any]:
    """Where and with what this was measured."""
    model = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                model = line.split(":", 1)[1].strip()
    names = ("OPENBLAS_CORETYPE", "OMP_WAIT_POLICY", "OMP_NUM_THREADS", "NUMBA_CPU_NAME")
    packages = ("numpy", "numba", "llvmlite", "torch")
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "processor": model,
        "cores": os.cpu_count(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        **{name: version(name) for name in packages},
        "environment": {name: os.environ.get(name, "not set") for name in names},
    }


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
        result[name] = math.exp(sum(map(math.log, ratios)) / len(ratios))
        result[f"smallest_{name}"] = min(cell[name] for cell in cells)
    return result


def measure_memory_and_start(arguments: argparse.Namespace) -> tuple[Any, Any]:
    """Peak growth by length and implementation; seconds of the first call, cold and warm."""
    memory = []
    for length in (1024, 4096):
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


def markdown(result: dict[str, Any]) -> str:
    """The results as a page: machine, summary, memory, start-up and a table of all cells."""
    about, modes = result["machine"], result["modes"]
    packages = ", ".join(f"{name} {about[name]}" for name in ("python", "numpy", "numba", "torch"))
    environment = ", ".join(f"{name}: {value}" for name, value in about["environment"].items())
    lines = [
        "# FlashAttention on the CPU against PyTorch's scaled_dot_product_attention",
        "",
        f"{about['date']}; {about['processor']}, {about['cores']} cores, "
        f"{result['threads']} threads each; {packages}; float32. Environment: {environment}. "
        f"Command: `{result['command']}`.",
        "",
        "Ratios are PyTorch's time over ours, forward / forward + backward. The geometric mean "
        "is over the batches of heads, the worst cell over single heads too. The environments are "
        "`MODES` in the script.",
        "",
        "| | geometric mean | worst cell |",
        "|---|---|---|",
    ]
    for mode, measured in modes.items():
        s = measured["summary"]
        lines.append(
            f"| {TITLES[mode]} | {s['forward_ratio']:.2f} / {s['both_ratio']:.2f} "
            f"| {s['smallest_forward_ratio']:.2f} / {s['smallest_both_ratio']:.2f} |"
        )
    if result.get("memory"):
        lines += [
            "",
            "Peak memory of forward + backward beyond the inputs, MiB "
            "(standard: numpy, with the whole score matrix):",
            "",
            "| N | ours | PyTorch | standard | ours / PyTorch | standard / ours |",
            "|---|---|---|---|---|---|",
        ]
        for row in result["memory"]:
            one, two, three = row["ours"], row["torch"], row["standard"]
            lines.append(
                f"| {row['length']} | {one:.0f} | {two:.0f} | {three:.0f} | {one / two:.2f} "
                f"| {three / one:.1f} |"
            )
        cold, warm = result["start"]["cold"], result["start"]["warm"]
        lines += [
            "",
            f"First forward + backward of a process: {warm['first_call']:.2f} s with a warm "
            f"compile cache, {cold['first_call']:.1f} s with a cold one "
            f"(import: {warm['import']:.2f} s).",
        ]
    titles = " | ".join(TITLES[mode] for mode in modes)
    first = next(iter(modes))
    lines += [
        "",
        f"| B, H | D | N | causal | ours, ms ({TITLES[first]}) | {titles} |",
        "|---|---|---|---|---|" + "---|" * len(modes),
    ]
    for cells in zip(*(measured["cells"] for measured in modes.values()), strict=True):
        c = cells[0]
        ratios = " | ".join(f"{x['forward_ratio']:.2f} / {x['both_ratio']:.2f}" for x in cells)
        lines.append(
            f"| {c['batch']}, {c['heads']} | {c['head_dim']} | {c['length']} "
            f"| {'yes' if c['causal'] else 'no'} | {c['forward_ms']:.2f} / {c['both_ms']:.2f} "
            f"| {ratios} |"
        )
    return "\n".join(lines) + "\n"


def write(result: dict[str, Any], out: Path) -> None:
    """The results so far, as JSON and as a page."""
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(result, indent=1) + "\n")
    table = out.with_suffix(".md")
    table.write_text(markdown(result))
    print(f"Written: {out} and {table}", flush=True)


def own_arguments() -> list[str]:
    """The command line without --prefix and --out, which say nothing of what was measured."""
    words, kept = iter(sys.argv[1:]), []
    for word in words:
        if word in ("--prefix", "--out"):
            next(words, None)
        elif not word.startswith(("--prefix=", "--out=")):
            kept.append(word)
    return kept


def main() -> None:
    device = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    device.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    chosen, others = device.parse_known_args()
    if chosen.device == "cuda":
        from project import bench_attention_cuda

        bench_attention_cuda.main(others)
        return
    arguments = parse_arguments()
    if arguments.child:
        job = json.loads(arguments.child)
        print(json.dumps(CHILDREN[job["kind"]](job)))
        return
    result: dict[str, Any] = {
        "machine": machine(),
        "command": shlex.join(["python", "project/bench_attention.py", *own_arguments()]),
        "threads": arguments.threads,
        "modes": {},
    }
    if arguments.add and arguments.out.exists():
        kept = read_results(arguments.out)
        result |= {name: kept[name] for name in ("modes", "memory", "start") if name in kept}
    if not arguments.skip_memory:
        result["memory"], result["start"] = measure_memory_and_start(arguments)
    for mode in arguments.modes:
        cells: list[dict[str, Any]] = []
        for job in cell_jobs(arguments):
            for cell in run_child(arguments, mode, job):
                cells.append(cell)
                print(
                    f"{mode}: B {cell['batch']} H {cell['heads']} D {cell['head_dim']} "
                    f"N {cell['length']} {'causal' if cell['causal'] else 'full'}: "
                    f"{cell['forward_ratio']:.2f} / {cell['both_ratio']:.2f}",
                    flush=True,
                )
        result["modes"][mode] = {"summary": summary(cells, arguments), "cells": cells}
        print(mode, result["modes"][mode]["summary"], flush=True)
        write(result, arguments.out)


if __name__ == "__main__":
    main()
