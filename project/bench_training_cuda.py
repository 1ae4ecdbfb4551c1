"""Time of one training step on the GPU against the same network in PyTorch eager.

    python project/bench_training_cuda.py                      # all rows, then the loss curves
    python project/bench_training_cuda.py --rows toy --rounds 10 --out /tmp/results

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
import json
import platform
import shlex
import statistics
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import minitorch  # isort: skip  # before numpy: it settles how threads wait (minitorch/threads.py)

import numpy as np

from minitorch.cuda.driver import stream_handle
from minitorch.kernels.gpu import runtime
from project.arguments import COUNT, COUNT_OR_NONE, SEED, read_results, whole
from project.gpu_timing import require_gpu
from project.transformer import data
from project.transformer.options import RunOptions
from project.transformer.training import Trainer
from project.weight_decay import decay_groups

RESULTS = Path(__file__).resolve().parent / "results"
VOCABULARY = 96
ADAMW: dict[str, Any] = {"lr": 1e-3, "betas": (0.9, 0.99), "eps": 1e-8}
WEIGHT_DECAY = 0.1  # of matrices
WARM_UP, CHECKED = 2, 5  # steps before the graph is captured; losses that are compared
TOLERANCE = {"fp32": 1e-4, "bf16": 2e-2}


@dataclass(frozen=True)
class Row:
    """A network and its batch; the feed-forward layers are 4 d_model wide, as in GPT-2."""

    name: str
    layers: int
    d_model: int
    heads: int
    context: int
    batch: int
    precision: str
    bar: float | None  # our time over PyTorch's, at most


TOY = Row("toy", 4, 128, 4, 128, 16, "fp32", 0.5)
ROWS = {
    row.name: row
    for row in (
        TOY,
        Row("small fp32", 6, 384, 6, 256, 64, "fp32", 1.0),
        Row("small bf16", 6, 384, 6, 256, 64, "bf16", 1.0),
        Row("long bf16", 6, 384, 6, 2048, 8, "bf16", None),
        replace(TOY, name="toy bf16", precision="bf16", bar=None),
    )
}


@dataclass(frozen=True)
class Contestant:
    """A network in training: `step` launches a step, `loss` is that before the last one."""

    step: Callable[[], None]
    loss: Callable[[], float]
    stream: Any  # of PyTorch, on which it works; None on the CPU


def token_batch(row: Row, seed: int) -> tuple[Any, Any]:
    """Inputs and targets, (B, T) int64."""
    ids = np.random.default_rng(seed).integers(0, VOCABULARY, (row.batch, row.context + 1))
    return ids[:, :-1], ids[:, 1:]


# ----- ours -----


def our_model(row: Row, device: str, seed: int) -> Any:
    """The transformer of `run_transformer.py`."""
    from project.transformer import model as models

    minitorch.set_default_dtype(np.float32)
    minitorch.manual_seed(seed)
    return minitorch.DecoderLM(
        VOCABULARY, row.d_model, row.heads, row.context, p_dropout=0.0, n_layer=row.layers,
        middle_dim=4 * row.d_model, backend=models.backend(device), use_flash_attention=True,
        compute_dtype=models.COMPUTE_DTYPES[row.precision],
    )  # fmt: skip


def ours(row: Row, model: Any, seed: int) -> Contestant:
    """minitorch: on the GPU a few steps kernel by kernel, then a graph."""
    from project.transformer import model as models

    ids = token_batch(row, seed)
    inputs, targets = (models.as_tensor(np.ascontiguousarray(a), model.backend) for a in ids)
    on_gpu = model.backend.cuda
    groups = decay_groups(model.parameters(), WEIGHT_DECAY)
    optimizer = minitorch.AdamW(groups, capturable=on_gpu, **ADAMW)
    kept: dict[str, Any] = {}

    def compute() -> None:
        optimizer.zero_grad()
        loss = models.loss(model, inputs, targets)
        kept["loss"] = loss.detach()
        loss.backward()
        optimizer.step()

    def loss() -> float:
        return float(kept["loss"].item())

    if not on_gpu or runtime.SIMULATED:
        return Contestant(compute, loss, None)
    import torch

    graph = minitorch.cuda.Graph()
    taken = 0

    def step() -> None:
        nonlocal taken
        taken += 1
        if taken <= WARM_UP:
            with runtime.on_stream(graph.stream):
                compute()
            return
        if taken == WARM_UP + 1:
            with graph.capture():
                compute()
        graph.replay()

    handle = stream_handle(graph.stream)
    return Contestant(step, loss, torch.cuda.ExternalStream(handle))


# ----- PyTorch -----


def torch_model(row: Row, weights: dict[str, Any]) -> Any:
    """The same network in PyTorch, with the weights that ours begins with."""
    import torch
    from torch import nn
    from torch.nn import functional as F

    d, heads, middle = row.d_model, row.heads, 4 * row.d_model

    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.ln_1, self.ln_2 = nn.LayerNorm(d), nn.LayerNorm(d)
            self.qkv = nn.Linear(d, 3 * d)  # one product, as in nanoGPT
            self.out = nn.Linear(d, d)
            self.linear_in, self.linear_out = nn.Linear(d, middle), nn.Linear(middle, d)

        def forward(self, x: Any) -> Any:
            batch, length, _ = x.shape
            q, k, v = self.qkv(self.ln_1(x)).view(batch, length, 3, heads, -1).unbind(2)
            attended = F.scaled_dot_product_attention(
                q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), is_causal=True
            )
            x = x + self.out(attended.transpose(1, 2).reshape(batch, length, d))
            return x + self.linear_out(F.gelu(self.linear_in(self.ln_2(x)), approximate="tanh"))

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.tokens = nn.Embedding(VOCABULARY, d)
            self.positions = nn.Embedding(row.context, d)
            self.layers = nn.ModuleList(Layer() for _ in range(row.layers))
            self.ln, self.head = nn.LayerNorm(d), nn.Linear(d, VOCABULARY)

        def forward(self, ids: Any) -> Any:
            x = self.tokens(ids) + self.positions(torch.arange(ids.shape[1], device=ids.device))
            for layer in self.layers:
                x = layer(x)
            return self.head(self.ln(x))

    from project.bench_transformer import copy_weights

    model = Model()
    copy_weights(model, weights)
    return model


def torchs(row: Row, model: Any, seed: int) -> Contestant:
    """PyTorch, eager."""
    import torch

    device = next(model.parameters()).device
    inputs, targets = (
        torch.from_numpy(np.ascontiguousarray(a)).to(device) for a in token_batch(row, seed)
    )
    on_gpu = device.type == "cuda"
    groups = decay_groups(model.parameters(), WEIGHT_DECAY)
    optimizer = torch.optim.AdamW(groups, fused=on_gpu, **ADAMW)
    kept: dict[str, Any] = {}

    def autocast() -> AbstractContextManager[Any]:
        if row.precision == "bf16":
            return torch.autocast(device.type, torch.bfloat16)  # type: ignore[no-any-return]
        return nullcontext()

    def step() -> None:
        optimizer.zero_grad()
        with autocast():
            logits = model(inputs).view(-1, VOCABULARY)
            loss = torch.nn.functional.cross_entropy(logits, targets.reshape(-1))
        kept["loss"] = loss.detach()
        loss.backward()
        optimizer.step()

    def loss() -> float:
        return float(kept["loss"])

    return Contestant(step, loss, torch.cuda.current_stream() if on_gpu else None)


# ----- measuring -----


def first_losses(contestant: Contestant, count: int) -> list[float]:
    """The losses of the first steps."""
    losses = []
    for _ in range(count):
        contestant.step()
        losses.append(contestant.loss())
    return losses


def timed(contestant: Contestant, steps: int) -> float:
    """Milliseconds of a step, on the GPU's clock, with the GPU idle before the first."""
    import torch

    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record(contestant.stream)
    for _ in range(steps):
        contestant.step()
    end.record(contestant.stream)
    torch.cuda.synchronize()
    return float(start.elapsed_time(end)) / steps


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
    model = our_model(row, "cuda", seed)
    weights = model.state_dict()
    contestants = {"minitorch": ours(row, model, seed)}
    losses = {"minitorch": first_losses(contestants["minitorch"], CHECKED)}
    memory = {"minitorch": minitorch.cuda.max_memory_allocated() - before}
    torch.cuda.reset_peak_memory_stats()
    contestants["torch"] = torchs(row, torch_model(row, weights).cuda(), seed)
    losses["torch"] = first_losses(contestants["torch"], CHECKED)
    memory["torch"] = torch.cuda.max_memory_allocated()
    np.testing.assert_allclose(
        losses["minitorch"], losses["torch"], rtol=TOLERANCE[row.precision], err_msg=row.name
    )
    times: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(rounds):
        for name, contestant in contestants.items():
            times[name].append(timed(contestant, steps))
    medians = {name: statistics.median(t) for name, t in times.items()}
    return {
        **asdict(row),
        "milliseconds": {n: round(m, 3) for n, m in medians.items()},
        "fastest": {n: round(min(t), 3) for n, t in times.items()},
        "slowest": {n: round(max(t), 3) for n, t in times.items()},
        "ratio": round(medians["minitorch"] / medians["torch"], 3),
        "peak MiB": {n: round(m / 2**20) for n, m in memory.items()},
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


# ----- the report -----


def machine(seed: int) -> dict[str, Any]:
    """What the figures hold for."""
    import torch

    def installed(name: str) -> str:
        try:
            return version(name)
        except PackageNotFoundError:
            return "none"

    return {
        "gpu": torch.cuda.get_device_name(),
        "python": platform.python_version(),
        **{name: installed(name) for name in ("numpy", "numba", "numba-cuda", "nvmath-python")},
        "torch": f"{torch.__version__} (CUDA {torch.version.cuda})",
        "matrix products": str(minitorch.cuda.config()),
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "seed": seed,
        "command": shlex.join(["python", "project/bench_training_cuda.py", *own_arguments()]),
    }


def own_arguments() -> list[str]:
    """The command line without --out, which says nothing of what was measured."""
    words = sys.argv[1:]
    if "--out" in words:
        place = words.index("--out")
        del words[place : place + 2]
    return words


def page(report: dict[str, Any]) -> str:
    """The results as Markdown."""
    m = report["machine"]
    lines = [
        "# One training step on the GPU",
        "",
        "Milliseconds of forward, backward and AdamW, median (fastest to slowest), same process, "
        f"in turn: {report['rounds']} rounds of {report['steps']} steps each. Ours is a replayed "
        "CUDA graph; PyTorch is eager with fused AdamW, TF32 off, bf16 by autocast. Feed-forward "
        f"layers are 4 d wide, heads of 32 (d 128) or 64, {VOCABULARY} tokens, no dropout.",
        "",
        "| layers, d, context, batch, precision | minitorch | torch eager | ratio | bar |"
        " peak MiB, ours / torch | measured |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in report["rows"]:
        cells = [
            f"{row['milliseconds'][n]:.2f} ({row['fastest'][n]:.2f} to {row['slowest'][n]:.2f})"
            for n in ("minitorch", "torch")
        ]
        shape = f"{row['layers']}, {row['d_model']}, {row['context']}, {row['batch']}"
        bar = "reported" if row["bar"] is None else f"{row['bar']:.1f}"
        peak = " / ".join(str(row["peak MiB"][n]) for n in ("minitorch", "torch"))
        lines.append(
            f"| {shape}, {row['precision']} | {cells[0]} | {cells[1]} | {row['ratio']:.2f} | {bar} "
            f"| {peak} | {row['date']} |"
        )
    lines += curve_lines(report.get("curves"))
    lines += [
        "",
        f"{m['gpu']}; Python {m['python']}, numpy {m['numpy']}, numba {m['numba']}, numba-cuda "
        f"{m['numba-cuda']}, nvmath-python {m['nvmath-python']}, torch {m['torch']}; seed "
        f"{m['seed']}; {m['date']}. `{m['command'].strip()}`",
        "",
    ]
    return "\n".join(lines)


def curve_lines(curves: dict[str, list[float]] | None) -> list[str]:
    """The loss curves as Markdown, against the CPU's."""
    if not curves:
        return []
    cpu = np.array(curves["cpu"])
    lines = [
        "",
        f"Loss of `run_transformer.py` over its first {len(cpu)} steps, nats per token:",
        "",
        "| | first | last | largest difference from the CPU |",
        "|---|---|---|---|",
    ]
    for name, losses in curves.items():
        difference = np.abs(np.array(losses) - cpu).max()
        lines.append(f"| {name} | {losses[0]:.5f} | {losses[-1]:.5f} | {difference:.1e} |")
    return lines


def write(report: dict[str, Any], folder: Path) -> str:
    """Write what there is so far; returns the page."""
    folder.mkdir(parents=True, exist_ok=True)
    text, name = page(report), folder / "training_cuda"
    name.with_suffix(".json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    name.with_suffix(".md").write_text(text, encoding="utf-8")
    return text


def kept_rows(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """The rows of the file that are not measured now."""
    path = arguments.out / "training_cuda.json"
    if not path.is_file():
        return []
    rows = read_results(path).get("rows")
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise SystemExit(f"{path} has another format: measure anew, without --add")
    return [row for row in rows if row.get("name") not in arguments.rows]


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", nargs="*", choices=list(ROWS), default=list(ROWS))
    parser.add_argument("--add", action="store_true", help="keep other rows measured before")
    count = whole(COUNT)
    parser.add_argument("--rounds", type=count, default=10, help="default: %(default)s")
    parser.add_argument("--steps", type=count, default=10, help="of a round; default: %(default)s")
    parser.add_argument(
        "--curve-steps",
        type=whole(COUNT_OR_NONE),
        default=30,
        help="0 leaves the curves out; default: %(default)s",
    )
    parser.add_argument("--seed", type=whole(SEED), default=0, help="default: %(default)s")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder; default: %(default)s")
    return parser.parse_args()


def main() -> None:
    """Measure, print, write."""
    arguments = parse_arguments()
    require_gpu()
    rows: list[dict[str, Any]] = kept_rows(arguments) if arguments.add else []
    report: dict[str, Any] = {
        "machine": machine(arguments.seed),
        "rounds": arguments.rounds,
        "steps": arguments.steps,
        "rows": rows,
    }
    for name in arguments.rows:
        row = measure(ROWS[name], arguments.rounds, arguments.steps, arguments.seed)
        rows.append({**row, "date": report["machine"]["date"]})
        print(name, rows[-1]["milliseconds"], rows[-1]["ratio"], flush=True)
        write(report, arguments.out)
    if arguments.curve_steps:
        report["curves"] = loss_curves(arguments.curve_steps, arguments.seed)
    print(write(report, arguments.out))


if __name__ == "__main__":
    main()
