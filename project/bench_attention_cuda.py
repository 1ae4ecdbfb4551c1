"""FlashAttention on the GPU against standard attention on the GPU and PyTorch's; memory to 64k.

    python project/bench_attention_cuda.py                  # everything, about two minutes
    python project/bench_attention_cuda.py --lengths 1024 --rounds 10 --skip-memory
    python project/bench_attention_cuda.py --draw           # page and picture from the JSON file

All compute in float32 (TF32 off), in one process, call by call in turn:

    flash     Tensor.flash_attention
    standard  Tensor.attention: the score matrix in memory, products by cuBLAS, our fused softmax
    torch     scaled_dot_product_attention held to its memory-efficient kernels

Times are between CUDA events around a call, with the cache (L2) overwritten before it, which also
gives the host a head start: it is the GPU that is timed. What a call takes from Python, the GPU's
work waited for, stands beside it as wall time, from every third round. A figure is a median. Before
that, results are compared with attention in float64.

Writes attention_cuda.json and, drawn from it, attention_cuda.md and attention_cuda.png.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import shlex
import statistics
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that `minitorch` is found

import numpy as np

RESULTS = Path(__file__).parent / "results"
LENGTHS = [1024, 2048, 4096, 8192, 16384]
MEMORY_LENGTHS = [4096, 8192, 16384, 32768, 65536]
HEADS, HEAD_DIM, TOKENS = 16, 64, 16384  # the batch is TOKENS / N
MEMORY_HEADS = 8
FLUSH_BYTES = 256 << 20
WARM_UP = 3
NAMES = ("flash", "standard", "torch")
Functions = dict[str, Callable[[], Any]]


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS, metavar="N")
    parser.add_argument("--memory-lengths", type=int, nargs="+", default=MEMORY_LENGTHS)
    parser.add_argument("--skip-memory", action="store_true", help="measure times alone")
    parser.add_argument("--rounds", type=int, default=30, help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="of the inputs; default: %(default)s")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder; default: %(default)s")
    parser.add_argument("--draw", action="store_true", help="measure nothing")
    return parser.parse_args()


# ----- what is measured -----


def make_inputs(batch: int, heads: int, length: int, seed: int) -> list[Any]:
    """Queries, keys, values and the gradient of the output, (B, H, N, D) float32."""
    rng = np.random.default_rng(seed)
    shape = (batch, heads, length, HEAD_DIM)
    return [rng.standard_normal(shape, np.float32) for _ in range(4)]


def our_functions(arrays: list[Any], causal: bool) -> tuple[Functions, Functions]:
    """Forward passes, and forward + backward, of flash and standard attention."""
    import minitorch

    backend = minitorch.TensorBackend(minitorch.CudaKernelOps)
    q, k, v = (minitorch.tensor_from_numpy(x, backend, True) for x in arrays[:3])
    grad_out = minitorch.tensor_from_numpy(arrays[3], backend)
    attend = {
        "flash": lambda: q.flash_attention(k, v, is_causal=causal),
        "standard": lambda: q.attention(k, v, is_causal=causal),
    }

    def forward(name: str) -> Any:
        with minitorch.no_grad():
            return attend[name]()

    def both(name: str) -> Any:
        for x in (q, k, v):
            x.zero_grad_()
        out = attend[name]()
        out.backward(grad_out)
        return out.detach(), q.grad, k.grad, v.grad

    return (
        {name: partial(forward, name) for name in attend},
        {name: partial(both, name) for name in attend},
    )


def torch_functions(arrays: list[Any], causal: bool) -> tuple[Functions, Functions]:
    """The same of PyTorch's memory-efficient attention."""
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel

    torch.backends.cuda.matmul.allow_tf32 = False
    inputs = [torch.from_numpy(x).cuda().requires_grad_() for x in arrays[:3]]
    grad_out = torch.from_numpy(arrays[3]).cuda()

    def attend() -> Any:
        with sdpa_kernel(SDPBackend.EFFICIENT_ATTENTION):
            return torch.nn.functional.scaled_dot_product_attention(*inputs, is_causal=causal)

    def forward() -> Any:
        with torch.no_grad():
            return attend()

    def both() -> Any:
        out = attend()
        return out.detach(), *torch.autograd.grad(out, inputs, grad_out)

    return {"torch": forward}, {"torch": both}


# ----- correctness -----


def reference(arrays: list[Any], causal: bool) -> list[Any]:
    """Output and gradients of the last head in float64, (N, D) each."""
    import torch

    q, k, v, do = (torch.from_numpy(x[-1, -1]).cuda().double() for x in arrays)
    scores = q @ k.T * HEAD_DIM**-0.5
    if causal:
        scores.masked_fill_(torch.ones_like(scores, dtype=torch.bool).triu_(1), -math.inf)
    weights = torch.softmax(scores, -1)
    del scores
    out = weights @ v
    dv = weights.T @ do
    dweights = (do @ v.T).sub_((do * out).sum(-1, keepdim=True)).mul_(weights)
    del weights
    gradients = [dweights @ k * HEAD_DIM**-0.5, dweights.T @ q * HEAD_DIM**-0.5, dv]
    return [x.cpu().numpy() for x in (out, *gradients)]


def errors(functions: Functions, arrays: list[Any], causal: bool) -> dict[str, Any]:
    """Largest error of output and gradients (the largest of three) in the last head."""
    import torch

    wanted = reference(arrays, causal)
    torch.cuda.empty_cache()
    found = {}
    for name, function in functions.items():
        heads = [x[-1, -1] for x in function()]
        heads = [x.cpu().numpy() if name == "torch" else x.to_numpy() for x in heads]
        largest = [float(np.abs(a - b).max()) for a, b in zip(heads, wanted, strict=True)]
        found[name] = {"forward": largest[0], "backward": max(largest[1:])}
    return found


# ----- times -----


def fits(function: Callable[[], Any]) -> bool:
    """Whether a call finds memory enough. Standard attention may not, which is a result too."""
    import minitorch

    try:
        function()
    except minitorch.cuda.OutOfMemoryError as error:
        print(str(error).splitlines()[0], flush=True)
        minitorch.cuda.empty_cache()
        return False
    return True


def measure(functions: Functions, rounds: int) -> dict[str, dict[str, float]]:
    """Milliseconds on the GPU and of wall time, by name: medians, the calls taking turns."""
    import torch

    scratch = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device="cuda")
    gpu: dict[str, list[float]] = {name: [] for name in functions}
    wall: dict[str, list[float]] = {name: [] for name in functions}
    for number in range(-WARM_UP, rounds):
        for name, function in functions.items():
            for _ in range(4):
                scratch.zero_()
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            function()
            end.record()
            torch.cuda.synchronize()
            if number >= 0:
                gpu[name].append(start.elapsed_time(end))
            if number >= 0 and number % 3 == 0:
                begun = time.perf_counter()
                function()
                torch.cuda.synchronize()
                wall[name].append(1e3 * (time.perf_counter() - begun))
    return {
        name: {"gpu_ms": statistics.median(gpu[name]), "wall_ms": statistics.median(wall[name])}
        for name in functions
    }


def measure_length(length: int, causal: bool, arguments: argparse.Namespace) -> dict[str, Any]:
    """One cell: errors, then times of forward and of forward + backward."""
    import minitorch

    batch = max(1, TOKENS // length)
    arrays = make_inputs(batch, HEADS, length, arguments.seed)
    ours, theirs = our_functions(arrays, causal), torch_functions(arrays, causal)
    forward, both = (
        {name: function for name, function in {**a, **b}.items() if fits(function)}
        for a, b in zip(ours, theirs, strict=True)
    )
    cell = {
        "batch": batch,
        "heads": HEADS,
        "length": length,
        "head_dim": HEAD_DIM,
        "causal": causal,
        "errors": errors(both, arrays, causal),
        "forward": measure(forward, arguments.rounds),
        "both": measure(both, arguments.rounds),
    }
    minitorch.cuda.empty_cache()
    return cell


def measure_memory(length: int, seed: int) -> dict[str, Any]:
    """Peak of forward + backward beyond the inputs, MiB, and its seconds; B * H = 8."""
    import minitorch

    arrays = make_inputs(1, MEMORY_HEADS, length, seed)
    both = our_functions(arrays, causal=False)[1]
    row: dict[str, Any] = {"length": length, "heads": MEMORY_HEADS}
    for name in ("flash", "standard"):
        before = minitorch.cuda.memory_allocated()
        minitorch.cuda.reset_peak_memory_stats()
        begun = time.perf_counter()
        row[name] = None
        if fits(both[name]):
            minitorch.cuda.synchronize()
            row[f"{name}_seconds"] = time.perf_counter() - begun
            row[name] = (minitorch.cuda.max_memory_allocated() - before) / 2**20
    minitorch.cuda.empty_cache()
    return row


def machine() -> dict[str, Any]:
    """What the figures depend on."""
    import torch

    import minitorch

    properties = torch.cuda.get_device_properties(0)
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "gpu": properties.name,
        "memory_gib": round(properties.total_memory / 2**30),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        **{name: version(name) for name in ("numpy", "numba-cuda", "torch")},
        "cuda_of_torch": torch.version.cuda,
        "config": minitorch.cuda.config(),
    }


# ----- the page and the picture -----


def ratio(cell: dict[str, Any], what: str, other: str) -> float | None:
    """Time of another over ours, on the GPU; None if it did not run."""
    times = cell[what]
    return times[other]["gpu_ms"] / times["flash"]["gpu_ms"] if other in times else None


def geometric_mean(cells: list[dict[str, Any]], what: str, other: str) -> float:
    """Over all cells in which both ran."""
    ratios = [r for cell in cells if (r := ratio(cell, what, other)) is not None]
    return math.exp(sum(map(math.log, ratios)) / len(ratios)) if ratios else math.nan


def pair(numbers: list[float | None], form: str = "{:.2f}") -> str:
    return " / ".join("no memory" if x is None else form.format(x) for x in numbers)


def tflops(cell: dict[str, Any], what: str) -> float:
    """Useful 10**12 operations a second of ours: two products forward, five backward."""
    c, passes = cell, {"forward": 1.0, "both": 3.5}[what]
    work: float = 4.0 * c["batch"] * c["heads"] * c["length"] ** 2 * c["head_dim"] * passes
    milliseconds: float = c[what]["flash"]["gpu_ms"]
    speed = work / (2 if c["causal"] else 1) / milliseconds / 1e9
    return speed


def markdown(result: dict[str, Any]) -> str:
    """The results as a page."""
    about, cells = result["machine"], result["cells"]
    versions = ", ".join(f"{n} {about[n]}" for n in ("python", "numpy", "numba-cuda", "torch"))
    lines = [
        "# FlashAttention on the GPU (SIMT kernels, float32)",
        "",
        f"{about['date']}; {about['gpu']}, {about['memory_gib']} GiB, CUDA "
        f"{about['config']['driver']}; {versions}; matrix products by {about['config']['matmul']}. "
        f"Seed {result['seed']}, median of {result['rounds']} rounds. Command: "
        f"`{result['command']}`.",
        "",
        "Times of others over ours, forward / forward + backward; above 1 we are faster:",
        "",
        "| | geometric mean | smallest |",
        "|---|---|---|",
    ]
    titles = {"standard": "our standard attention (cuBLAS)", "torch": "PyTorch, memory-efficient"}
    for other, title in titles.items():
        means = [geometric_mean(cells, what, other) for what in ("forward", "both")]
        least = [
            min((r for c in cells if (r := ratio(c, what, other)) is not None), default=None)
            for what in ("forward", "both")
        ]
        lines.append(f"| {title} | {pair(list(means))} | {pair(least)} |")
    lines += [
        "",
        f"B * N = {TOKENS}, H = {HEADS}, D = {HEAD_DIM}. Errors are the largest against float64, "
        "of the output / of the gradients, in one head.",
        "",
        "| N | causal | ours, ms | ours, TFLOP/s | wall time, ms | standard / ours "
        "| PyTorch / ours | error | error of PyTorch |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for c in cells:
        ours = [c[what]["flash"] for what in ("forward", "both")]
        error = [
            pair([c["errors"][n][w] for w in ("forward", "backward")], "{:.0e}")
            for n in ("flash", "torch")
        ]
        columns = [
            str(c["length"]),
            "yes" if c["causal"] else "no",
            pair([o["gpu_ms"] for o in ours]),
            pair([tflops(c, what) for what in ("forward", "both")], "{:.1f}"),
            pair([o["wall_ms"] for o in ours]),
            *(pair([ratio(c, w, other) for w in ("forward", "both")]) for other in titles),
            *error,
        ]
        lines.append(f"| {' | '.join(columns)} |")
    return "\n".join(lines + memory_table(result.get("memory", []))) + "\n"


def memory_table(rows: list[dict[str, Any]]) -> list[str]:
    """Lines of the page about memory."""
    if not rows:
        return []
    lines = [
        "",
        f"Peak memory of forward + backward beyond the inputs, B * H = {MEMORY_HEADS}, not causal "
        "(the seconds are those of a single first call):",
        "",
        "| N | flash, MiB | a token, KiB | flash, seconds | standard, MiB |",
        "|---|---|---|---|---|",
    ]
    for row in rows:
        standard = "no memory" if row["standard"] is None else f"{row['standard']:.0f}"
        each = 1024 * row["flash"] / row["length"]
        lines.append(
            f"| {row['length']} | {row['flash']:.0f} | {each:.2f} | {row['flash_seconds']:.2f} "
            f"| {standard} |"
        )
    return lines


def draw(result: dict[str, Any], path: Path) -> None:
    """Milliseconds and memory over N, to a PNG file."""
    from matplotlib.figure import Figure  # without pyplot: no window system is looked for

    figure = Figure(figsize=(12, 4), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    for axes, what in ((left, "forward"), (middle, "both")):
        for name in NAMES:
            for causal, style in ((False, "o-"), (True, "s--")):
                cells = [c for c in result["cells"] if c["causal"] is causal and name in c[what]]
                label = f"{name}{', causal' if causal else ''}"
                times = [c[what][name]["gpu_ms"] for c in cells]
                color = f"C{NAMES.index(name)}"
                axes.loglog([c["length"] for c in cells], times, style, color=color, label=label)
        title = "forward" if what == "forward" else "forward + backward"
        axes.set(xlabel="N", ylabel="ms on the GPU", title=f"{title}, {TOKENS} tokens")
    left.legend(fontsize=7)
    for name in ("flash", "standard"):
        rows = [row for row in result.get("memory", []) if row[name] is not None]
        right.loglog([r["length"] for r in rows], [r[name] for r in rows], "o-", label=name)
    right.set(xlabel="N", ylabel="MiB", title=f"peak memory, B * H = {MEMORY_HEADS}")
    right.legend(fontsize=7)
    figure.suptitle(f"{result['machine']['gpu']}, float32, D = {HEAD_DIM}")
    figure.savefig(path, dpi=110)


def write(result: dict[str, Any], folder: Path) -> None:
    """The results so far: JSON, page and picture."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "attention_cuda.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    path.with_suffix(".md").write_text(markdown(result))
    try:
        draw(result, path.with_suffix(".png"))
    except ImportError:
        print("matplotlib is not installed: --draw makes the picture where it is", flush=True)
    print(f"Written: {path}, .md and .png", flush=True)


def own_arguments() -> list[str]:
    """The command line without --out, which says nothing of what was measured."""
    words, kept = iter(sys.argv[1:]), []
    for word in words:
        if word == "--out":
            next(words, None)
        elif not word.startswith("--out="):
            kept.append(word)
    return kept


def main() -> None:
    arguments = parse_arguments()
    if arguments.draw:
        path = arguments.out / "attention_cuda.json"
        write(json.loads(path.read_text()), arguments.out)
        return
    import minitorch

    if not minitorch.cuda.is_available():
        raise SystemExit("no CUDA GPU was found (python -m minitorch doctor)")
    result: dict[str, Any] = {
        "machine": machine(),
        "command": shlex.join(["python", "project/bench_attention_cuda.py", *own_arguments()]),
        "seed": arguments.seed,
        "rounds": arguments.rounds,
        "cells": [],
        "memory": [],
    }
    for length in arguments.lengths:
        for causal in (False, True):
            cell = measure_length(length, causal, arguments)
            result["cells"].append(cell)
            shown = {
                other: pair([ratio(cell, what, other) for what in ("forward", "both")])
                for other in NAMES[1:]
            }
            ours = pair([cell[what]["flash"]["gpu_ms"] for what in ("forward", "both")])
            print(f"N {length} causal {causal}: {ours} ms, {shown}, {cell['errors']}", flush=True)
        write(result, arguments.out)
    for length in [] if arguments.skip_memory else arguments.memory_lengths:
        result["memory"].append(measure_memory(length, arguments.seed))
        print(result["memory"][-1], flush=True)
    write(result, arguments.out)


if __name__ == "__main__":
    main()
