"""Time of one training step of the toy transformer against the same model in PyTorch eager.

    python project/bench/transformer_cpu.py                 # about a minute
    python project/bench/transformer_cpu.py --seconds 3 --middle 512

A step is forward, backward and AdamW (PyTorch's fused and default one; the faster counts), float32.
Both models start from the same weights and their losses are compared first. They run in one
process, step by step in turn, with the same number of threads; a figure is the median. What sets
the waiting of threads is read when libraries load, so each of these is a process of its own:

    together        one process, in turn
    torch alone     PyTorch by itself, without minitorch in the process
    minitorch alone minitorch by itself
    avx2            together, both held to AVX2, as on most laptops

Writes transformer_cpu.json and a page beside it.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # so that `project` is found

from project.arguments import COUNT, parser_of, refuse_too_large, whole
from project.bench import networks, pages, processes
from project.bench.machine import machine, thread_settings, told_settings
from project.bench.timing import in_turn, medians

LAYERS, D_MODEL, HEADS, CONTEXT, BATCH = 4, 128, 4, 128, 16
CONTESTANTS = ("minitorch", "torch", "torch fused")
MODES: dict[str, tuple[tuple[str, ...], dict[str, str]]] = {
    "together": (CONTESTANTS, {}),
    "torch alone": (CONTESTANTS[1:], {}),
    "minitorch alone": (CONTESTANTS[:1], {}),
    "avx2": (CONTESTANTS, processes.AVX2),
}


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = parser_of(__doc__)
    parser.add_argument("--middle", type=whole(COUNT), nargs="+", default=[256, 512], metavar="D",
                        help="size of the feed-forward layers; default: %(default)s")  # fmt: skip
    parser.add_argument("--modes", nargs="+", choices=list(MODES), default=list(MODES))
    processes.add_options(parser, 8.0, "each")
    pages.add_out(parser)
    arguments = parser.parse_args()
    middle = max(arguments.middle)
    needed = LAYERS * 4 * middle * (2 * D_MODEL * 4 + 3 * BATCH * CONTEXT)
    refuse_too_large(parser, f"--middle {middle}", needed)
    return arguments


# ----- in the child process -----


def trainings(names: list[str], middle: int, threads: int) -> dict[str, networks.Training]:
    """What is to be measured, all models with the same weights."""
    network = networks.Network(LAYERS, D_MODEL, HEADS, CONTEXT, BATCH, middle)
    found: dict[str, networks.Training] = {}
    weights = None
    if "minitorch" in names:
        model = networks.our_model(network, "cpu", 0)
        weights = model.state_dict()
        found["minitorch"] = networks.our_training(network, model, 0)
    if "torch" in names:
        import torch

        torch.set_num_threads(threads)
        for name in CONTESTANTS[1:]:
            model = networks.torch_model(network, weights)
            found[name] = networks.torch_training(network, model, name == "torch fused", 0)
    return found


def measure(job: dict[str, Any]) -> dict[str, Any]:
    """Median seconds of a step of each, taken in turn.

    Raises:
        AssertionError: the losses of the first five steps differ.

    """
    running = trainings(job["names"], job["middle"], job["threads"])
    losses = {name: training.first_losses() for name, training in running.items()}
    networks.check_losses(losses, 1e-4)
    steps = {name: training.step for name, training in running.items()}
    times = in_turn(steps, job["seconds"] * len(steps))
    return {
        **medians({name: [1e3 * s for s in record] for name, record in times.items()}, 2),
        "steps": {name: len(record) for name, record in times.items()},
        "first losses": losses,
        "environment": thread_settings(),
    }


# ----- in the parent process -----


def run_child(mode: str, middle: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure in a process of its own, whose environment is the user's and the mode's settings."""
    names, settings = MODES[mode]
    job = {"names": names, "middle": middle}
    job |= {"threads": arguments.threads, "seconds": arguments.seconds}
    environment = {"NUMBA_NUM_THREADS": str(arguments.threads), **settings}
    result = processes.in_child(__file__, job, environment, arguments.prefix)
    return {"mode": mode, "middle": middle, **result}


def ratio(row: dict[str, Any]) -> str:
    """Our time over PyTorch's faster one."""
    ms = row["milliseconds"]
    if "minitorch" not in ms or "torch" not in ms:
        return ""
    return f"{ms['minitorch'] / min(ms['torch'], ms['torch fused']):.2f}"


def page(result: pages.Result) -> str:
    """The results as Markdown."""
    rows = []
    for row in result["rows"]:
        times = row["milliseconds"]
        cells = [f"{times[name]:.1f}" if name in times else "" for name in CONTESTANTS]
        rows.append([row["mode"], row["middle"], *cells, ratio(row)])
    settings = result["rows"][0]["environment"] if result["rows"] else {}
    return pages.page(
        "One training step",
        f"Milliseconds of forward, backward and AdamW, median: {LAYERS} layers, d_model {D_MODEL}, "
        f"{HEADS} heads, context {CONTEXT}, batch {BATCH}, {networks.VOCABULARY} tokens, float32, "
        f"{result['threads']} threads. `torch fused` is PyTorch with its fused AdamW.",
        pages.table(
            ["process", "feed-forward size", *CONTESTANTS, "minitorch / faster torch"], rows
        ),
        pages.source(result),
        f"Settings of thread pools and BLAS in the first process: {told_settings(settings)}.",
    )


def main() -> None:
    """Measure, print, write."""
    arguments = parse_arguments()
    if arguments.child:
        print(json.dumps(measure(arguments.child)))
        return
    rows: list[dict[str, Any]] = []
    result = {
        "machine": machine("numpy", "numba", "torch"),
        "command": pages.command(__file__),
        "threads": arguments.threads,
        "rows": rows,
    }
    for mode in arguments.modes:
        for middle in arguments.middle:
            row = run_child(mode, middle, arguments)
            rows.append(row)
            print(mode, middle, row["milliseconds"], ratio(row), flush=True)
            pages.write(result, arguments.out / "transformer_cpu.json", page)
    print(page(result))


if __name__ == "__main__":
    main()
