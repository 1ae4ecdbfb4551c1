"""Time of one training step of the toy transformer against the same model in PyTorch eager.

    python project/bench_transformer.py                 # about a minute
    python project/bench_transformer.py --seconds 3 --middle 512

A step is forward, backward and AdamW (PyTorch's fused and default one; the faster counts), float32.
Both models start from the same weights and their losses are compared first. They run in one
process, step by step in turn, with the same number of threads; a figure is the median. What sets
the waiting of threads is read when libraries load, so each of these is a process of its own:

    together        one process, in turn
    torch alone     PyTorch by itself, without minitorch in the process
    minitorch alone minitorch by itself
    avx2            together, both held to AVX2, as on most laptops

Writes a JSON file and a Markdown table beside it.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # so that `project` is found

import numpy as np

from project.arguments import COUNT, POSITIVE, THREADS, real, refuse_too_large, whole
from project.weight_decay import decay_groups

RESULTS = Path(__file__).resolve().parent / "results" / "transformer_cpu.json"
LAYERS, D_MODEL, HEADS, CONTEXT, BATCH, VOCABULARY = 4, 128, 4, 128, 16, 96
ADAMW = {"lr": 1e-3, "betas": (0.9, 0.99), "eps": 1e-8}
WEIGHT_DECAY = 0.1  # of matrices
AVX2 = {
    "ATEN_CPU_CAPABILITY": "avx2",
    "MKL_ENABLE_INSTRUCTIONS": "AVX2",
    "OPENBLAS_CORETYPE": "Haswell",
    "NUMBA_CPU_NAME": "haswell",
    "NUMBA_CPU_FEATURES": "",
}
MODES: dict[str, tuple[list[str], dict[str, str]]] = {
    "together": (["minitorch", "torch", "torch fused"], {}),
    "torch alone": (["torch", "torch fused"], {}),
    "minitorch alone": (["minitorch"], {}),
    "avx2": (["minitorch", "torch", "torch fused"], AVX2),
}
THREAD_SETTINGS = ("OMP_", "GOMP_", "OPENBLAS_", "MKL_", "NUMBA_", "KMP_", "ATEN_")
Step = Callable[[], float]


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--middle", type=whole(COUNT), nargs="+", default=[256, 512], metavar="D",
                        help="size of the feed-forward layers; default: %(default)s")  # fmt: skip
    parser.add_argument("--modes", nargs="+", choices=list(MODES), default=list(MODES))
    parser.add_argument(
        "--threads", type=whole(THREADS), default=2, help="of each; default: %(default)s"
    )
    parser.add_argument(
        "--seconds", type=real(POSITIVE), default=8.0, help="of each; default: %(default)s"
    )
    parser.add_argument(
        "--prefix", default="", help="command before each measuring process (taskset -c 0,1, say)"
    )
    parser.add_argument("--out", type=Path, default=RESULTS, help="default: %(default)s")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    middle = max(arguments.middle)
    needed = LAYERS * 4 * middle * (2 * D_MODEL * 4 + 3 * BATCH * CONTEXT)
    refuse_too_large(parser, f"--middle {middle}", needed)
    return arguments


# ----- in the child process -----


def token_batch() -> tuple[Any, Any]:
    """Inputs and targets, (B, T) int64."""
    ids = np.random.default_rng(0).integers(0, VOCABULARY, (BATCH, CONTEXT + 1))
    return ids[:, :-1], ids[:, 1:]


def our_model(middle: int) -> Any:
    """The transformer of `run_transformer.py` in float32."""
    import minitorch

    minitorch.set_default_dtype(np.float32)
    minitorch.manual_seed(0)
    model = minitorch.DecoderLM(
        VOCABULARY, D_MODEL, HEADS, CONTEXT, p_dropout=0.0, n_layer=LAYERS, middle_dim=middle,
        backend=minitorch.TensorBackend(minitorch.FastOps), use_flash_attention=True,
    )  # fmt: skip
    return model


def our_step(model: Any) -> Step:
    """One training step of minitorch; returns the loss before it."""
    import minitorch

    backend = model.token_embeddings.weights.value.backend
    inputs, targets = (
        minitorch.tensor_from_numpy(a.astype(np.float32), backend) for a in token_batch()
    )
    flat_targets = targets.view(targets.size)
    groups = decay_groups(model.parameters(), WEIGHT_DECAY)
    optimizer = minitorch.AdamW(groups, **ADAMW)  # type: ignore[arg-type]

    def step() -> float:
        optimizer.zero_grad()
        logits = model(inputs).view(flat_targets.size, VOCABULARY)
        loss = minitorch.softmax_loss(logits, flat_targets).mean()
        loss.backward()
        optimizer.step()
        return loss.item()

    return step


def torch_model(weights: dict[str, Any], middle: int) -> Any:
    """The same model in PyTorch, with the weights that minitorch's model begins with."""
    import torch
    from torch import nn
    from torch.nn import functional as F

    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.ln_1, self.ln_2 = nn.LayerNorm(D_MODEL), nn.LayerNorm(D_MODEL)
            self.qkv = nn.Linear(D_MODEL, 3 * D_MODEL)  # one product, as in nanoGPT
            self.out = nn.Linear(D_MODEL, D_MODEL)
            self.linear_in, self.linear_out = nn.Linear(D_MODEL, middle), nn.Linear(middle, D_MODEL)

        def forward(self, x: Any) -> Any:
            heads = self.qkv(self.ln_1(x)).view(BATCH, CONTEXT, 3, HEADS, D_MODEL // HEADS)
            q, k, v = heads.permute(2, 0, 3, 1, 4)
            attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            x = x + self.out(attended.transpose(1, 2).reshape(BATCH, CONTEXT, D_MODEL))
            return x + self.linear_out(F.gelu(self.linear_in(self.ln_2(x)), approximate="tanh"))

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.tokens = nn.Embedding(VOCABULARY, D_MODEL)
            self.positions = nn.Embedding(CONTEXT, D_MODEL)
            self.layers = nn.ModuleList(Layer() for _ in range(LAYERS))
            self.ln, self.head = nn.LayerNorm(D_MODEL), nn.Linear(D_MODEL, VOCABULARY)

        def forward(self, ids: Any) -> Any:
            x = self.tokens(ids) + self.positions(torch.arange(CONTEXT))
            for layer in self.layers:
                x = layer(x)
            return self.head(self.ln(x))

    model = Model()
    copy_weights(model, weights)
    return model


def copy_weights(model: Any, weights: dict[str, Any]) -> None:
    """Set the weights of the PyTorch model to those of minitorch's `state_dict`."""
    import torch

    def put(module: Any, *names: str) -> None:
        parts = [torch.from_numpy(weights[f"{name}.weights"]) for name in names]
        joined = torch.cat(parts, dim=-1)  # minitorch keeps (in, out), PyTorch (out, in)
        linear = isinstance(module, torch.nn.Linear)
        module.weight.copy_(joined.T if linear else joined)
        if getattr(module, "bias", None) is not None:
            biases = [torch.from_numpy(weights[f"{name}.bias"]) for name in names]
            module.bias.copy_(torch.cat(biases))

    with torch.no_grad():
        put(model.tokens, "token_embeddings")
        put(model.positions, "position_embeddings")
        for number, layer in enumerate(model.layers, 1):
            prefix = f"t_layer_{number}."
            put(layer.ln_1, prefix + "ln_1")
            put(layer.ln_2, prefix + "ln_2")
            put(layer.qkv, *(f"{prefix}attention.{x}_projection" for x in "qkv"))
            put(layer.out, prefix + "attention.out_projection")
            put(layer.linear_in, prefix + "ff.linear_in")
            put(layer.linear_out, prefix + "ff.linear_out")
        put(model.ln, "ln")
        put(model.head, "lm_head")


def torch_step(model: Any, fused: bool) -> Step:
    """One training step of PyTorch; returns the loss before it."""
    import torch

    inputs, targets = (torch.from_numpy(np.ascontiguousarray(a)) for a in token_batch())
    groups = decay_groups(model.parameters(), WEIGHT_DECAY)
    optimizer = torch.optim.AdamW(groups, fused=fused, **ADAMW)

    def step() -> float:
        optimizer.zero_grad()
        logits = model(inputs).view(-1, VOCABULARY)
        loss = torch.nn.functional.cross_entropy(logits, targets.reshape(-1))
        loss.backward()
        optimizer.step()
        return float(loss.detach())

    return step


def random_weights(middle: int) -> dict[str, Any]:
    """Weights for PyTorch alone, named as minitorch names them."""
    rng = np.random.default_rng(0)
    shapes = {"token_embeddings": (VOCABULARY, D_MODEL), "position_embeddings": (CONTEXT, D_MODEL)}
    linears = {"lm_head": (D_MODEL, VOCABULARY)}
    norms = ["ln"]
    for number in range(1, LAYERS + 1):
        prefix = f"t_layer_{number}."
        norms += [prefix + "ln_1", prefix + "ln_2"]
        for x in ("q", "k", "v", "out"):
            linears[f"{prefix}attention.{x}_projection"] = (D_MODEL, D_MODEL)
        linears[prefix + "ff.linear_in"] = (D_MODEL, middle)
        linears[prefix + "ff.linear_out"] = (middle, D_MODEL)
    weights = {f"{n}.weights": rng.standard_normal(s, np.float32) for n, s in shapes.items()}
    for name, shape in linears.items():
        weights[f"{name}.weights"] = rng.standard_normal(shape, np.float32) / D_MODEL**0.5
        weights[f"{name}.bias"] = np.zeros(shape[1], np.float32)
    for name in norms:
        weights[f"{name}.weights"] = np.ones(D_MODEL, np.float32)
        weights[f"{name}.bias"] = np.zeros(D_MODEL, np.float32)
    return weights


def build_steps(names: list[str], middle: int, threads: int) -> dict[str, Step]:
    """The steps to be measured, all models with the same weights."""
    steps: dict[str, Step] = {}
    if "minitorch" in names:
        model = our_model(middle)
        weights = model.state_dict()
        steps["minitorch"] = our_step(model)
    else:
        weights = random_weights(middle)
    if "torch" in names:
        import torch

        torch.set_num_threads(threads)
        steps["torch"] = torch_step(torch_model(weights, middle), fused=False)
        steps["torch fused"] = torch_step(torch_model(weights, middle), fused=True)
    return steps


def measure(job: dict[str, Any]) -> dict[str, Any]:
    """Median seconds of a step of each, taken in turn.

    Raises:
        AssertionError: the losses of the first five steps differ.

    """
    steps = build_steps(job["names"], job["middle"], job["threads"])
    losses = {name: [step() for _ in range(5)] for name, step in steps.items()}
    for name, values in losses.items():
        reference = losses["torch" if "torch" in losses else name]
        np.testing.assert_allclose(values, reference, rtol=1e-4, err_msg=f"losses of {name}")
    times: dict[str, list[float]] = {name: [] for name in steps}
    end = time.perf_counter() + job["seconds"] * len(steps)
    while time.perf_counter() < end:
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            times[name].append(time.perf_counter() - start)
    return {
        "milliseconds": {n: round(1e3 * statistics.median(t), 2) for n, t in times.items()},
        "fastest": {n: round(1e3 * min(t), 2) for n, t in times.items()},
        "steps": {n: len(t) for n, t in times.items()},
        "first losses": losses,
        "environment": {
            k: v for k, v in sorted(os.environ.items()) if k.startswith(THREAD_SETTINGS)
        },
    }


# ----- in the parent process -----


def run_child(mode: str, middle: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure in a process of its own, whose environment is the user's and the mode's settings."""
    names, settings = MODES[mode]
    job = {
        "names": names,
        "middle": middle,
        "threads": arguments.threads,
        "seconds": arguments.seconds,
    }
    run = subprocess.run(
        [*shlex.split(arguments.prefix), sys.executable, __file__, "--child", json.dumps(job)],
        env={**os.environ, "NUMBA_NUM_THREADS": str(arguments.threads), **settings},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    result: dict[str, Any] = json.loads(run.stdout.splitlines()[-1])
    return {"mode": mode, "middle": middle, **result}


def machine() -> dict[str, Any]:
    """What the figures hold for."""
    model = platform.processor()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = cpuinfo.read_text(encoding="utf-8").splitlines()
        model = next((x.split(":")[1].strip() for x in lines if x.startswith("model name")), model)
    names = ("numpy", "numba", "torch")
    return {
        "cpu": model,
        "cores": os.cpu_count(),
        "system": platform.platform(),
        "python": platform.python_version(),
        **{name: version(name) for name in names},
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "command": "python project/bench_transformer.py " + " ".join(sys.argv[1:]),
    }


def ratio(row: dict[str, Any]) -> str:
    """Our time over PyTorch's faster one."""
    ms = row["milliseconds"]
    if "minitorch" not in ms or "torch" not in ms:
        return ""
    return f"{ms['minitorch'] / min(ms['torch'], ms['torch fused']):.2f}"


def page(report: dict[str, Any]) -> str:
    """The results as Markdown."""
    m = report["machine"]
    head = ("minitorch", "torch", "torch fused")
    lines = [
        "# One training step",
        "",
        f"Milliseconds of forward, backward and AdamW, median: {LAYERS} layers, d_model {D_MODEL}, "
        f"{HEADS} heads, context {CONTEXT}, batch {BATCH}, {VOCABULARY} tokens, float32, "
        f"{report['threads']} threads. `torch fused` is PyTorch with its fused AdamW.",
        "",
        "| process | feed-forward size | " + " | ".join(head) + " | minitorch / faster torch |",
        "|---|---|---|---|---|---|",
    ]
    for row in report["rows"]:
        cells = [f"{row['milliseconds'][n]:.1f}" if n in row["milliseconds"] else "" for n in head]
        lines.append(
            f"| {row['mode']} | {row['middle']} | " + " | ".join([*cells, ratio(row)]) + " |"
        )
    lines += [
        "",
        f"{m['cpu']}, {m['cores']} cores; Python {m['python']}, numpy {m['numpy']}, "
        f"numba {m['numba']}, torch {m['torch']}; {m['date']}. `{m['command'].strip()}`",
        "",
    ]
    settings = report["rows"][0]["environment"] if report["rows"] else {}
    shown = ", ".join(f"`{k}={v}`" for k, v in settings.items()) or "none"
    lines += [f"Settings of thread pools and BLAS in the first process: {shown}.", ""]
    return "\n".join(lines)


def main() -> None:
    """Measure, print, write."""
    arguments = parse_arguments()
    if arguments.child:
        print(json.dumps(measure(json.loads(arguments.child))))
        return
    rows: list[dict[str, Any]] = []
    report = {"machine": machine(), "threads": arguments.threads, "rows": rows}
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    for mode in arguments.modes:
        for middle in arguments.middle:
            row = run_child(mode, middle, arguments)
            rows.append(row)
            print(mode, middle, row["milliseconds"], ratio(row), flush=True)
            text = page(report)
            arguments.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
            arguments.out.with_suffix(".md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
