"""Time of one training step on the GPU against the same network in PyTorch eager.

    python project/bench/training_cuda.py                      # all rows, then the loss curves
    python project/bench/training_cuda.py --rows toy --rounds 10 --out /tmp/results

A step is forward, backward and AdamW. Ours is replayed as a CUDA graph; PyTorch runs eagerly with
its fused AdamW, its products in full float32 (TF32 off) or, for bf16, under
`torch.autocast(bfloat16)`, its attention by `scaled_dot_product_attention`. Both networks start
from the same weights and see the same batch, and their first losses are compared. They run in one
process, in turn, a few steps at a time between two CUDA events; a figure is the median.

The loss curves are those of `run_transformer.py`: the CPU's beside the GPU's in each precision.

Writes training_cuda.json and a Markdown page beside it.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # so that `minitorch` is found

import minitorch  # isort: skip  # before numpy: it settles how threads wait (minitorch/threads.py)

import numpy as np

from project.arguments import COUNT, COUNT_OR_NONE, SEED, parser_of, whole
from project.bench import networks, pages
from project.bench.machine import gpu_machine
from project.bench.timing import medians, milliseconds_on, require_gpu
from project.transformer import data
from project.transformer.options import RunOptions
from project.transformer.training import Trainer

TOLERANCE = {"fp32": 1e-4, "bf16": 2e-2}


@dataclass(frozen=True, kw_only=True)
class Row(networks.Network):
    """A network that is measured; feed-forward layers are 4 d_model wide, as in GPT-2.

    Args:
        name: of the row.
        bar: our time over PyTorch's, at most; None if there is no bar.

    """

    name: str
    bar: float | None


TOY = Row(4, 128, 4, 128, 16, 512, name="toy", bar=0.5)
ROWS = {
    row.name: row
    for row in (
        TOY,
        Row(6, 384, 6, 256, 64, 1536, name="small fp32", bar=1.0),
        Row(6, 384, 6, 256, 64, 1536, "bf16", name="small bf16", bar=1.0),
        Row(6, 384, 6, 2048, 8, 1536, "bf16", name="long bf16", bar=None),
        replace(TOY, name="toy bf16", precision="bf16", bar=None),
    )
}


# ----- measuring -----


def milliseconds(training: networks.Training, steps: int) -> float:
    """Of a step, on the GPU's clock, with the GPU idle before the first."""
    import torch

    def work() -> None:
        for _ in range(steps):
            training.step()

    torch.cuda.synchronize()
    return milliseconds_on(training.stream, work) / steps


def measure(row: Row, rounds: int, steps: int, seed: int) -> dict[str, Any]:
    """Milliseconds of a step of both, taken in turn.

    Raises:
        AssertionError: the first losses differ.

    """
    import torch

    torch.set_float32_matmul_precision("highest")  # TF32 off
    minitorch.cuda.empty_cache()
    minitorch.cuda.reset_peak_memory_stats()
    before = minitorch.cuda.memory_allocated()
    model = networks.our_model(row, "cuda", seed)
    weights = model.state_dict()
    running = {"minitorch": networks.our_training(row, model, seed)}
    losses = {"minitorch": running["minitorch"].first_losses()}
    memory = {"minitorch": minitorch.cuda.max_memory_allocated() - before}
    torch.cuda.reset_peak_memory_stats()
    theirs = networks.torch_model(row, weights).cuda()
    running["torch"] = networks.torch_training(row, theirs, fused=True, seed=seed)
    losses["torch"] = running["torch"].first_losses()
    memory["torch"] = torch.cuda.max_memory_allocated()
    networks.check_losses(losses, TOLERANCE[row.precision])
    times: dict[str, list[float]] = {name: [] for name in running}
    for _ in range(rounds):
        for name, training in running.items():
            times[name].append(milliseconds(training, steps))
    ratio = statistics.median(times["minitorch"]) / statistics.median(times["torch"])
    return {
        **asdict(row),
        **medians(times, 3),
        "ratio": round(ratio, 3),
        "peak MiB": {name: round(nbytes / 2**20) for name, nbytes in memory.items()},
        "first losses": losses,
    }


def loss_curves(steps: int, seed: int) -> dict[str, list[float]]:
    """Losses of `run_transformer.py` with its default network, on the CPU and on the GPU."""
    base = RunOptions().replaced({"steps": steps, "warmup": 5, "seed": seed})
    corpus = data.load(base.data, base.model.context)
    curves = {}
    runs: dict[str, dict[str, Any]] = {
        "cpu": {"device": "cpu"},
        "cuda fp32": {"device": "cuda"},
        "cuda fp32, no graph": {"device": "cuda", "graph": False},
        "cuda bf16": {"device": "cuda", "precision": "bf16"},
        "cuda fp16": {"device": "cuda", "precision": "fp16"},
    }
    for name, given in runs.items():
        trainer = Trainer(base.replaced(given), corpus)
        curves[name] = [trainer.train_step() for _ in range(steps)]
    return curves


# ----- the page -----


def row_cells(row: dict[str, Any]) -> list[str]:
    """A row of the table."""
    sizes = ", ".join(str(row[name]) for name in ("layers", "d_model", "context", "batch"))
    times = [
        f"{row['milliseconds'][n]:.2f} ({row['fastest'][n]:.2f} to {row['slowest'][n]:.2f})"
        for n in ("minitorch", "torch")
    ]
    bar = "reported" if row["bar"] is None else f"{row['bar']:.1f}"
    peak = " / ".join(str(row["peak MiB"][n]) for n in ("minitorch", "torch"))
    shape = f"{sizes}, {row['precision']}"
    return [shape, *times, f"{row['ratio']:.2f}", bar, peak, row["date"]]


def curve_table(curves: dict[str, list[float]]) -> str:
    """The loss curves, against the CPU's."""
    cpu = np.array(curves["cpu"])
    rows = [
        [name, f"{losses[0]:.5f}", f"{losses[-1]:.5f}", f"{np.abs(losses - cpu).max():.1e}"]
        for name, losses in curves.items()
    ]
    return pages.table(["", "first", "last", "largest difference from the CPU"], rows)


def page(result: pages.Result) -> str:
    """The results as Markdown."""
    titles = ["layers, d, context, batch, precision", "minitorch", "torch eager", "ratio", "bar"]
    titles += ["peak MiB, ours / torch", "measured"]
    curves = result.get("curves", {})
    steps = len(curves.get("cpu", ()))
    return pages.page(
        "One training step on the GPU",
        "Milliseconds of forward, backward and AdamW, median (fastest to slowest), same process, "
        f"in turn: {result['rounds']} rounds of {result['steps']} steps each. Ours is a replayed "
        "CUDA graph; PyTorch is eager with fused AdamW, TF32 off, bf16 by autocast. Feed-forward "
        f"layers are 4 d wide, heads of 32 (d 128) or 64, {networks.VOCABULARY} tokens, "
        "no dropout.",
        pages.table(titles, map(row_cells, result["rows"])),
        curves and f"Loss of `run_transformer.py` over its first {steps} steps, nats per token:",
        curves and curve_table(curves),
        pages.source(result, f"Seed {result['seed']}"),
    )


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = parser_of(__doc__)
    add, count, default = parser.add_argument, whole(COUNT), "default: %(default)s"
    add("--rows", nargs="*", choices=list(ROWS), default=list(ROWS))
    add("--rounds", type=count, default=10, help=default)
    add("--steps", type=count, default=10, help=f"of a round; {default}")
    curve_steps = whole(COUNT_OR_NONE)
    add("--curve-steps", type=curve_steps, default=30, help=f"0 leaves the curves out; {default}")
    add("--seed", type=whole(SEED), default=0, help=default)
    pages.add_out(parser, kept="other rows measured before")
    return parser.parse_args()


def main() -> None:
    """Measure, print, write."""
    arguments = parse_arguments()
    require_gpu()
    path = arguments.out / "training_cuda.json"
    kept = pages.former(arguments, path, page).get("rows", [])
    rows: list[dict[str, Any]] = [row for row in kept if row["name"] not in arguments.rows]
    result = {
        "machine": gpu_machine("numpy", "numba", "numba-cuda", "nvmath-python", "torch"),
        "command": pages.command(__file__),
        "seed": arguments.seed,
        "rounds": arguments.rounds,
        "steps": arguments.steps,
        "rows": rows,
    }
    for name in arguments.rows:
        found = measure(ROWS[name], arguments.rounds, arguments.steps, arguments.seed)
        rows.append({**found, "date": result["machine"]["date"]})
        print(name, found["milliseconds"], found["ratio"], flush=True)
        pages.write(result, path, page)
    if arguments.curve_steps:
        result["curves"] = loss_curves(arguments.curve_steps, arguments.seed)
        pages.write(result, path, page)
    print(page(result))


if __name__ == "__main__":
    main()
