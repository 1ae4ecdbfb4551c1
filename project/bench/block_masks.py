"""What it takes to make block masks: milliseconds and memory, on the host.

    python project/bench/block_masks.py
    python project/bench/block_masks.py --length 65536

The processor's time of the fastest of several calls; and the most memory that Python's allocator
knows of in one. No mask is kept from one call to the next. Writes block_masks.json and a page.
"""

from __future__ import annotations

import argparse
import sys
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # so that `project` is found

import numpy as np

from project.arguments import COUNT, parser_of, whole
from project.bench import pages
from project.bench.machine import machine

WINDOW, DOCUMENT, BLOCK, BIGBIRD_BLOCK = 1024, 1024, 128, 64


def masks(length: int) -> dict[str, Callable[[], Any]]:
    """Functions that make a mask, by name."""
    from minitorch import attention_masks, create_block_mask

    def made(mask_mod: Any) -> Callable[[], Any]:
        return lambda: create_block_mask(mask_mod, None, None, length, length, BLOCK)

    ids = np.arange(length) // DOCUMENT
    return {
        "causal": made(attention_masks.causal()),
        "window": made(attention_masks.sliding_window(WINDOW)),
        "documents": made(attention_masks.document(ids)),
        "bigbird": lambda: attention_masks.bigbird(length, BIGBIRD_BLOCK, seed=0),
    }


def measure(make: Callable[[], Any], rounds: int) -> dict[str, float]:
    """Milliseconds, MiB, and the part of all blocks that is skipped."""
    times = []
    for _ in range(rounds):
        start = time.process_time()
        mask = make()
        times.append(time.process_time() - start)
    tracemalloc.start()
    make()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return {"ms": 1e3 * min(times), "mib": peak / 2**20, "sparsity": mask.sparsity()}


def page(result: pages.Result) -> str:
    """The results as Markdown."""
    rows = [
        [name, f"{c['ms']:.1f}", f"{c['mib']:.1f}", f"{c['sparsity']:.1f}%"]
        for name, c in result["cells"].items()
    ]
    return pages.page(
        "Making block masks",
        pages.source(result, f"{result['length']} tokens, blocks of {BLOCK}, bigbird's of 64"),
        "The processor's time of the fastest call, and the most memory in one.",
        pages.table(["", "ms", "MiB", "blocks skipped"], rows),
    )


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = parser_of(__doc__)
    parser.add_argument("--length", type=whole(COUNT), default=131072, help="default: %(default)s")
    parser.add_argument("--rounds", type=whole(COUNT), default=5, help="default: %(default)s")
    pages.add_out(parser)
    return parser.parse_args()


def main() -> None:
    """Measure, print, write."""
    arguments = parse_arguments()
    cells = {
        name: measure(make, arguments.rounds) for name, make in masks(arguments.length).items()
    }
    for name, cell in cells.items():
        print(name, cell)
    result: pages.Result = {
        "machine": machine("numpy"),
        "command": pages.command(__file__),
        "length": arguments.length,
        "cells": cells,
    }
    pages.write(result, arguments.out / "block_masks.json", page)


if __name__ == "__main__":
    main()
