"""What holds an attention kernel back, by NVIDIA's profiler: ours beside cuDNN's.

    python project/bench/attention_profile.py                 # writes results/attention_profile.md
    python project/bench/attention_profile.py --head-dim 64 --causal --seqlen 512 --add
    python project/bench/attention_profile.py --head-dim 64 --dropout-p 0.2 --theirs flash --add

Runs itself under `ncu` (Nsight Compute, of the CUDA toolkit), which repeats each kernel while it
reads the GPU's counters; clocks are left as they are. The times are those under the profiler, each
kernel alone and with a cold cache: compare them with one another, not with the benchmark's.
"""

from __future__ import annotations

import argparse
import csv
import io
import re
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # so that `minitorch` is found

from project.arguments import SHARE, Range, parser_of, real, whole
from project.bench import pages
from project.bench.attention_contestants import OURS, PYTORCH, Case, entered, ours, pytorchs
from project.bench.attention_parts import HIDDEN, TOKENS
from project.bench.machine import gpu_machine
from project.bench.timing import require_gpu

SECTIONS = ("SpeedOfLight", "ComputeWorkloadAnalysis", "WarpStateStats", "LaunchStats")
# What ends in these words is shown, in this order, under the name beside it.
SHOWN = {
    "gpu__time_duration.sum": "time, ns",
    "launch__registers_per_thread": "registers a thread at entry",
    "launch__grid_size": "blocks",
    "sm__inst_executed_pipe_tensor_op_gmma.avg.pct_of_peak_sustained_active": "wgmma issued, %",
    "sm__pipe_tensor_op_gmma_cycles_active.avg.pct_of_peak_sustained_active": "wgmma busy, %",
    "sm__inst_executed_pipe_tensor.avg.pct_of_peak_sustained_active": "tensor issued, %",
    "sm__pipe_tensor_cycles_active.avg.pct_of_peak_sustained_active": "tensor busy, %",
    "sm__inst_executed_pipe_xu.avg.pct_of_peak_sustained_active": "exp2 and conversions, %",
    "sm__pipe_fma_cycles_active.avg.pct_of_peak_sustained_active": "float32 products, %",
    "sm__pipe_alu_cycles_active.avg.pct_of_peak_sustained_active": "whole numbers and max, %",
    "sm__throughput.avg.pct_of_peak_sustained_elapsed": "compute, %",
    "gpu__compute_memory_throughput.avg.pct_of_peak_sustained_elapsed": "memory, %",
    "sm__inst_executed.avg.per_cycle_active": "instructions a cycle",
}
STALLS = "smsp__average_warps_issue_stalled_"
MOST_STALLS = 5


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = parser_of(__doc__)
    add, default = parser.add_argument, "default: %(default)s"
    add("--head-dim", type=whole(Range(1, HIDDEN + 1)), default=128, help=default)
    add("--seqlen", type=whole(Range(1, TOKENS + 1)), default=8192, help=default)
    add("--causal", action="store_true")
    add("--dropout-p", type=real(SHARE), default=0.0)
    add("--ours", choices=["ours", *OURS], default="hopper", help=f"our kernels; {default}")
    add("--theirs", choices=list(PYTORCH), default="cudnn", help=f"PyTorch's; {default}")
    add("--backward", action="store_true", help="the backward pass as well")
    pages.add_out(parser, kept="what the page has, and write below it")
    add("--under-ncu", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


class OneCall:
    """Stands in for the benchmark's recorder: a call is warmed up, then profiled once."""

    def run(self, function: Any) -> Any:
        """What the function returns."""
        import torch

        function()
        torch.cuda.synchronize()
        with torch.cuda.profiler.profile():
            results = function()
            torch.cuda.synchronize()
        return type("Done", (), {"results": results})

    our_graph = torch_graph = run


def run(arguments: argparse.Namespace) -> None:
    """The work that is profiled: ours, then theirs."""
    heads = HIDDEN // arguments.head_dim
    case = Case(
        TOKENS // arguments.seqlen, heads, arguments.seqlen, arguments.seqlen,
        arguments.head_dim, arguments.causal, dropout_p=arguments.dropout_p,
    )  # fmt: skip
    inputs = case.inputs()
    once: Any = OneCall()
    for name, enter in ((arguments.ours, ours), (arguments.theirs, pytorchs)):
        if entered(name, partial(enter, once, name, case, inputs, arguments.backward)) is None:
            raise SystemExit("a contestant does not compute this case here")


def counters(arguments: argparse.Namespace) -> list[dict[str, str]]:
    """One row of ncu's table for each kernel that was launched."""
    ncu = shutil.which("ncu")
    require_gpu()
    if ncu is None:
        raise SystemExit("ncu is not on the path: it comes with the CUDA toolkit (Nsight Compute)")
    command = [ncu, *"--profile-from-start off --clock-control none --csv --page raw".split()]
    for section in SECTIONS:
        command += ["--section", section]
    command += [sys.executable, *sys.argv, "--under-ncu"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    begin = done.stdout.find('"ID"')
    if done.returncode or begin < 0:
        raise SystemExit(f"ncu failed:\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}")
    rows = list(csv.DictReader(io.StringIO(done.stdout[begin:])))
    return [row for row in rows if row["ID"]]  # the first row has the units


def number(text: str | None) -> float | None:
    try:
        return float((text or "").replace(",", ""))
    except ValueError:
        return None


def short(name: str) -> str:
    """A kernel's own name, out of what compilers make of it."""
    found = re.search(r"[a-z0-9]*_*(flash|hopper|mma|cudnn|fmha|delta)[a-z0-9_]*", name)
    return (found[0] if found else name)[:40]


def stalls(row: dict[str, str]) -> str:
    """What the warps of a kernel wait for most."""
    found = {
        key.removeprefix(STALLS).split("_per_")[0].split(".")[0]: value
        for key in row
        if key.startswith(STALLS) and "not_issued" not in key
        if (value := number(row[key]))
    }
    largest = sorted(found, key=lambda name: -found[name])[:MOST_STALLS]
    return ", ".join(f"{name} {found[name]:.1f}" for name in largest)


def table(rows: list[dict[str, str]]) -> str:
    """The counters, a column for each kernel."""
    lines = []
    for metric, label in SHOWN.items():
        values = [number(row.get(metric)) for row in rows]
        if any(value is not None for value in values):
            lines.append([label, *("" if value is None else f"{value:,.1f}" for value in values)])
    lines.append(["warps wait for (warps in each issued cycle)", *map(stalls, rows)])
    return pages.table(["", *(f"`{short(row['Kernel Name'])}`" for row in rows)], lines)


def main() -> None:
    """Profile and write."""
    arguments = parse_arguments()
    if arguments.under_ncu:
        run(arguments)
        return
    rows = counters(arguments)
    mask = "causal" if arguments.causal else "not causal"
    if arguments.dropout_p:
        mask += f", dropout {arguments.dropout_p}"
    title = f"## D = {arguments.head_dim}, N = {arguments.seqlen}, {mask}, float16"
    result = {"machine": gpu_machine("torch"), "command": pages.command(__file__)}
    found = [title, table(rows), pages.source(result, "Seed 0")]
    path = arguments.out / "attention_profile.md"
    if arguments.add and path.is_file():
        text = "\n\n".join([path.read_text(encoding="utf-8").rstrip(), *found]) + "\n"
    else:
        about = "Utilisation is a share of what the unit could do."
        text = pages.page("Attention under the profiler", about, *found)
    path.write_text(text, encoding="utf-8")
    print("\n\n".join(found))


if __name__ == "__main__":
    main()
