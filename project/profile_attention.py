"""What holds an attention kernel back, by NVIDIA's profiler: ours beside cuDNN's.

    python project/profile_attention.py                 # writes results/attention_profile.md
    python project/profile_attention.py --head-dim 64 --causal --seqlen 512 --add
    python project/profile_attention.py --head-dim 64 --dropout-p 0.2 --theirs flash --add

Runs itself under `ncu` (Nsight Compute, of the CUDA toolkit), which repeats each kernel while it
reads the GPU's counters; clocks are left as they are. The times are those under the profiler, each
kernel alone and with a cold cache: compare them with one another, not with the benchmark's.
"""

from __future__ import annotations

import argparse
import csv
import io
import re
import shlex
import shutil
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that `minitorch` is found

from project.arguments import SHARE, Range, real, whole
from project.attention_contestants import OURS, PYTORCH, Case, ours, pytorchs
from project.bench_attention_cuda import own_arguments
from project.gpu_timing import require_gpu

RESULTS = Path(__file__).resolve().parent / "results"
PAGE = "attention_profile.md"
HIDDEN, TOKENS = 2048, 16384
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
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--head-dim", type=whole(Range(1, HIDDEN + 1)), default=128, help="default: %(default)s"
    )
    parser.add_argument(
        "--seqlen", type=whole(Range(1, TOKENS + 1)), default=8192, help="default: %(default)s"
    )
    parser.add_argument("--causal", action="store_true")
    parser.add_argument("--dropout-p", type=real(SHARE), default=0.0)
    parser.add_argument(
        "--ours",
        choices=["ours", *OURS],
        default="hopper",
        help="our kernels; default: %(default)s",
    )
    parser.add_argument(
        "--theirs", choices=list(PYTORCH), default="cudnn", help="PyTorch's; default: %(default)s"
    )
    parser.add_argument("--backward", action="store_true", help="the backward pass as well")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder; default: %(default)s")
    parser.add_argument("--add", action="store_true", help="after what the page has")
    parser.add_argument("--under-ncu", action="store_true", help=argparse.SUPPRESS)
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
    inputs, once = case.inputs(), OneCall()
    for made in (
        ours(once, arguments.ours, case, inputs, arguments.backward),  # type: ignore[arg-type]
        pytorchs(once, arguments.theirs, case, inputs, arguments.backward),  # type: ignore[arg-type]
    ):
        if made is None:
            raise SystemExit("a contestant does not compute this case here")


def counters(arguments: argparse.Namespace) -> list[dict[str, str]]:
    """One row of ncu's table for each kernel that was launched."""
    ncu = shutil.which("ncu")
    require_gpu()
    if ncu is None:
        raise SystemExit("ncu is not on the path: it comes with the CUDA toolkit (Nsight Compute)")
    command = [
        ncu,
        "--profile-from-start",
        "off",
        "--clock-control",
        "none",
        "--csv",
        "--page",
        "raw",
    ]
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


def table(rows: list[dict[str, str]]) -> list[str]:
    """The counters as lines of Markdown, a column for each kernel."""
    names = [short(row["Kernel Name"]) for row in rows]
    lines = [
        "| | " + " | ".join(f"`{name}`" for name in names) + " |",
        "|---" * (len(rows) + 1) + "|",
    ]
    for metric, label in SHOWN.items():
        values = [number(row.get(metric)) for row in rows]
        if any(value is not None for value in values):
            cells = ["" if value is None else f"{value:,.1f}" for value in values]
            lines.append(f"| {label} | " + " | ".join(cells) + " |")
    cells = []
    for row in rows:
        stalls = {
            key.removeprefix(STALLS).split("_per_")[0].split(".")[0]: value
            for key in row
            if key.startswith(STALLS) and "not_issued" not in key
            if (value := number(row[key]))
        }
        largest = sorted(stalls, key=lambda name: -stalls[name])[:MOST_STALLS]
        cells.append(", ".join(f"{name} {stalls[name]:.1f}" for name in largest))
    lines.append("| warps wait for (warps in each issued cycle) | " + " | ".join(cells) + " |")
    return lines


def main() -> None:
    arguments = parse_arguments()
    if arguments.under_ncu:
        run(arguments)
        return
    rows = counters(arguments)
    import torch

    mask = "causal" if arguments.causal else "not causal"
    if arguments.dropout_p:
        mask += f", dropout {arguments.dropout_p}"
    lines = [
        f"## D = {arguments.head_dim}, N = {arguments.seqlen}, {mask}, float16",
        "",
        *table(rows),
        "",
        f"{torch.cuda.get_device_name()}, torch {torch.__version__};"
        f" {datetime.now(UTC):%Y-%m-%d %H:%M} UTC; seed 0. "
        f"`python {shlex.join(['project/profile_attention.py', *own_arguments(sys.argv[1:])])}`",
        "",
    ]
    path = arguments.out / PAGE
    before = path.read_text(encoding="utf-8") if arguments.add and path.is_file() else ""
    title = (
        "# Attention under the profiler\n\nUtilisation is a share of what the unit could do.\n\n"
    )
    path.write_text((before + "\n" if before else title) + "\n".join(lines), encoding="utf-8")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
