"""Score functions and block masks on the CPU: against no function, and against flex_attention.

    python project/bench/attention_variants_cpu.py
    python project/bench/attention_variants_cpu.py --length 8192 --cases none bigbird --seconds 5

Ours is the fused kernel, forward and backward. PyTorch's is `flex_attention` as `torch.compile`
makes it, which on the CPU has a forward pass alone. Both get lists of blocks that were made before.
Contestants take turns, and of each the fastest call counts.

"A tile" is the work for a score that is computed, over that for one without any function: time of
the processor / that of "none" / the part of all tiles that is visited. Writes
attention_variants_cpu.json and a page beside it.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # so that `project` is found

import numpy as np

from project.arguments import COUNT, parser_of, whole
from project.bench import pages, processes
from project.bench.machine import machine
from project.bench.timing import in_turn

CASES = (
    "none", "causal", "window", "documents", "bigbird", "softcap", "alibi", "relative table",
    "clipped table",
)  # fmt: skip
BLOCK, CAP, CLIP = 128, 20.0, 32
PASSIVE = {"OMP_WAIT_POLICY": "passive"}


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = parser_of(__doc__)
    what = parser.add_argument_group("what is measured")
    count = whole(COUNT)
    what.add_argument("--heads", type=count, default=8, help="default: %(default)s")
    what.add_argument("--length", type=count, default=4096, help="default: %(default)s")
    what.add_argument("--head-dim", type=count, default=64, help="default: %(default)s")
    what.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    processes.add_options(parser, 8.0, "a case")
    pages.add_out(parser, kept="what the file has of other cases")
    return parser.parse_args()


# ----- in the child process -----


def tables_of(job: dict[str, Any]) -> dict[str, Any]:
    """Arrays that the functions read."""
    heads, length = job["heads"], job["length"]
    rng = np.random.default_rng(1)
    lengths = rng.multinomial(length, np.ones(8) / 8)
    return {
        "slopes": (2.0 ** (-8 / heads * np.arange(1, heads + 1))).astype(np.float32),
        "relative": rng.normal(size=(heads, 2 * length - 1)).astype(np.float32),
        "clipped": rng.normal(size=(heads, 2 * CLIP + 1)).astype(np.float32),
        "ids": np.repeat(np.arange(8), lengths).astype(np.int32),
        "ones": np.ones(length, bool),
    }


def functions_of(name: str, job: dict[str, Any], tables: dict[str, Any], np: Any) -> dict[str, Any]:
    """Score function and mask function of a case, in numpy's words or PyTorch's."""
    length, window = job["length"], job["length"] // 8
    slopes, relative, clipped = (tables[n] for n in ("slopes", "relative", "clipped"))
    ids, ones = tables["ids"], tables["ones"]
    found: dict[str, dict[str, Any]] = {
        "none": {},
        "causal": {"mask": lambda b, h, q, k: q >= k},
        # Read from an array, so that it is no band, for which there would be no lists.
        "window": {"mask": lambda b, h, q, k: (q >= k) & (q - k < window) & ones[k]},
        "documents": {"mask": lambda b, h, q, k: ids[q] == ids[k]},
        "softcap": {"score": lambda s, b, h, q, k: CAP * np.tanh(s / CAP)},
        "alibi": {"score": lambda s, b, h, q, k: s - slopes[h] * abs(q - k)},
        "relative table": {"score": lambda s, b, h, q, k: s + relative[h, q - k + (length - 1)]},
        "clipped table": {
            "score": lambda s, b, h, q, k: s + clipped[h, np.clip(q - k, -CLIP, CLIP) + CLIP]
        },
    }
    return found.get(name, {})


def our_mask(name: str, job: dict[str, Any], functions: dict[str, Any]) -> Any:
    """A BlockMask, or None."""
    from minitorch import attention_masks, create_block_mask

    length = job["length"]
    if name == "bigbird":
        return attention_masks.bigbird(
            length, block_size=BLOCK, window=3, global_blocks=2, random_blocks=3, seed=0
        )
    if "mask" not in functions:
        return None
    return create_block_mask(functions["mask"], None, None, length, length, BLOCK)


def ours(name: str, job: dict[str, Any], arrays: list[Any]) -> tuple[Any, Any, float]:
    """Forward pass, backward pass, and the part of all scores that is computed."""
    from minitorch.attention_variants import Variant
    from minitorch.kernels.flash_attention.cpu import launch as cpu
    from minitorch.kernels.flash_attention.problem import AttentionProblem

    q, k, v, do = arrays
    functions = functions_of(name, job, tables_of(job), np)
    mask = our_mask(name, job, functions)
    problem = AttentionProblem.of(q.shape, k.shape, v.shape, q.dtype)
    problem, given = Variant.of(functions.get("score"), mask, problem).fused(problem)

    def forward() -> Any:
        return cpu.forward(problem, q, k, v, variant=given)

    out, _, rows = forward()
    tiles = cpu.default_tiles(problem, given)
    count = cpu.forward_with_count(problem, q, k, v, variant=given).tiles
    scores = count * tiles.forward_q * tiles.forward_k

    def backward() -> Any:
        return cpu.backward(problem, q, k, v, None, out, rows, do, variant=given)

    return forward, backward, scores / (q.shape[0] * q.shape[1] * q.shape[2] * k.shape[2])


def theirs(name: str, job: dict[str, Any], arrays: list[Any]) -> Callable[[], Any]:
    """PyTorch's forward pass, compiled."""
    import torch
    from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

    q, k, v = (torch.from_numpy(x) for x in arrays[:3])
    tables = {name: torch.from_numpy(x) for name, x in tables_of(job).items()}
    functions = functions_of(name, job, tables, torch)
    length, mask = job["length"], None
    if name == "bigbird":
        found = our_mask(name, job, {})
        counts, indices = found.kv_num_blocks, found.kv_indices
        full_counts, full_indices = found.full_kv_num_blocks, found.full_kv_indices
        lists = (torch.from_numpy(x) for x in (counts, indices, full_counts, full_indices))
        mask = BlockMask.from_kv_blocks(*lists, BLOCK_SIZE=BLOCK)
    elif "mask" in functions:
        sizes = None, None, length, length
        mask = create_block_mask(functions["mask"], *sizes, device="cpu", BLOCK_SIZE=BLOCK)
    compiled = torch.compile(flex_attention, dynamic=False)

    def forward() -> Any:
        with torch.no_grad():
            return compiled(q, k, v, score_mod=functions.get("score"), block_mask=mask)

    return forward


def measure(job: dict[str, Any]) -> dict[str, Any]:
    """Milliseconds of one case."""
    import numba
    import torch

    torch.set_num_threads(job["threads"])
    numba.set_num_threads(job["threads"])
    rng = np.random.default_rng(0)
    shape = 1, job["heads"], job["length"], job["head_dim"]
    arrays = [rng.standard_normal(shape, np.float32) for _ in range(4)]
    forward, backward, density = ours(job["case"], job, arrays)
    none, none_backward, _ = ours("none", job, arrays)
    flex = theirs(job["case"], job, arrays)
    difference = float(np.abs(forward()[0] - flex().numpy()).max())
    fused = {"forward": forward, "backward": backward}
    both = {**fused, "none_forward": none, "none_backward": none_backward}
    times = in_turn({**fused, "flex_forward": flex}, job["seconds"] / 2)
    work = in_turn(both, job["seconds"] / 2, time.process_time)
    ms = {name: 1e3 * min(record) for name, record in times.items()}
    least = {name: min(record) for name, record in work.items()}
    return {
        "case": job["case"], "density": density, "rounds": len(times["forward"]),
        **{f"{name}_ms": fastest for name, fastest in ms.items()},
        "forward_of_a_tile": least["forward"] / least["none_forward"] / density,
        "backward_of_a_tile": least["backward"] / least["none_backward"] / density,
        "flex_ratio": ms["flex_forward"] / ms["forward"],
        "largest_difference_of_outputs": difference,
    }  # fmt: skip


# ----- in the parent process -----


def page(result: pages.Result) -> str:
    """The results as Markdown."""
    cells = result["cells"].values()
    shape = "B 1, H {heads}, N {length}, D {head_dim}".format(**result["shape"])
    titles = ["", "visited", "forward, ms", "backward, ms", "a tile", "flex, ms", "flex / ours"]
    rows = [
        [c["case"], f"{c['density']:.1%}", f"{c['forward_ms']:.1f}", f"{c['backward_ms']:.1f}",
         f"{c['forward_of_a_tile']:.2f} / {c['backward_of_a_tile']:.2f}",
         f"{c['flex_forward_ms']:.1f}", f"{c['flex_ratio']:.2f}"]
        for c in cells
    ]  # fmt: skip
    mean = pages.geometric_mean([c["flex_ratio"] for c in cells])
    return pages.page(
        "Score functions and block masks on the CPU against PyTorch's flex_attention",
        pages.source(result, f"{result['threads']} threads each, float32, {shape}"),
        "The fastest call of each. Visited: the part of all scores that is computed. A tile: work "
        '(time of the processor) over that of "none", by this part, forward / backward. Flex: '
        "compiled, forward; a ratio above 1 is ours being faster, their geometric mean "
        f"{mean:.2f}.",
        pages.table(titles, rows),
    )


def main() -> None:
    """Measure, print, write."""
    arguments = parse_arguments()
    if arguments.child:
        print(json.dumps(measure(arguments.child)))
        return
    path = arguments.out / "attention_variants_cpu.json"
    shape = {name: getattr(arguments, name) for name in ("heads", "length", "head_dim")}
    result: pages.Result = {
        "machine": machine("numpy", "numba", "llvmlite", "torch"),
        "command": pages.command(__file__),
        "threads": arguments.threads,
        "shape": shape,
        "cells": pages.former(arguments, path, page).get("cells", {}),
    }
    threads = str(arguments.threads)
    environment = {**PASSIVE, "OMP_NUM_THREADS": threads, "NUMBA_NUM_THREADS": threads}
    for case in arguments.cases:
        job = {"case": case, "threads": arguments.threads, "seconds": arguments.seconds, **shape}
        cell = processes.in_child(__file__, job, environment, arguments.prefix)
        result["cells"][case] = cell
        print(cell, flush=True)
        pages.write(result, path, page)


if __name__ == "__main__":
    main()
