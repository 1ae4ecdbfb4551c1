"""FlashAttention on the GPU: our kernels against PyTorch's, every bar of the project in one run.

    python project/bench/attention_cuda.py                        # everything
    python project/bench/attention_cuda.py --parts grid --lengths 4096 --head-dims 128
    python project/bench/attention_cuda.py --parts decode --add   # the rest as it was
    python project/bench/attention_cuda.py --draw                 # page and pictures alone

Parts:

    grid       forward and backward passes alone, hidden size 2048, 16,384 tokens, by length
    dropout    the same with dropout 0.2, D = 64 and 128
    published  32 x 8 heads, N 2048, D 64, fp16, dropout 0.2: standard attention over ours
    decode     one query against 65,536 keys, as a share of the rate at which memory is copied
    float32    in float32, in TF32, and in three TF32 products; standard attention
    memory     peak memory of forward + backward, to 65,536 tokens
    compile    seconds of a process's first call, with an empty and with a filled compile cache
    triton     flex_attention, compiled by Triton, where torch.compile works

How: all in one process on the same random data; each pass is recorded in a CUDA graph and repeated,
the contestants taking turns, with the L2 cache overwritten before each repeat; a figure is the
median of 30 (of 3 for one that takes five times as long as the fastest). PyTorch's backends are
pinned by `sdpa_kernel`, ours by taking the others away. Beside each figure stands its largest error
against float64.

Writes attention_cuda.json and, drawn from it, attention_cuda.md and attention_cuda_*.png.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # so that `minitorch` is found

from project.arguments import COUNT, SEED, Range, parser_of, whole
from project.bench import pages
from project.bench.attention_contestants import OURS
from project.bench.attention_parts import HIDDEN, PARTS, first_call, measure_ceilings
from project.bench.attention_report import draw, page
from project.bench.machine import gpu_machine
from project.bench.timing import Recorder, require_gpu

LENGTHS = [512, 1024, 2048, 4096, 8192, 16384]
HEAD_DIMS = [64, 128, 256]
# What tells a part's cells apart.
CELL = ("head_dim", "seqlen_k", "causal", "dtype", "dropout_p", "length", "kernel")


def parse_arguments(words: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = parser_of(__doc__)
    count = whole(COUNT)
    add = parser.add_argument
    add("--parts", nargs="+", choices=list(PARTS), default=list(PARTS))
    add("--lengths", type=count, nargs="+", default=LENGTHS, metavar="N")
    head_dim = whole(Range(1, HIDDEN + 1))
    add("--head-dims", type=head_dim, nargs="+", default=HEAD_DIMS, metavar="D")
    add("--dtype", choices=["float16", "bfloat16"], default="float16")
    add("--ours", nargs="+", choices=list(OURS), default=list(OURS), help="our kernels")
    add("--rounds", type=count, default=30, help="default: %(default)s")
    add("--seed", type=whole(SEED), default=0, help="of the inputs; default: %(default)s")
    pages.add_out(parser, kept="other parts and cells of the file")
    add("--draw", action="store_true", help="measure nothing")
    add("--child", type=json.loads, help=argparse.SUPPRESS)
    return parser.parse_args(words)


def merged(old: list[dict[str, Any]], new: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """New cells in the place of old ones of the same shape, the other old ones kept."""
    cells = {tuple(cell.get(key) for key in CELL): cell for cell in (*old, *new)}
    return list(cells.values())


def write(result: pages.Result, path: Path) -> None:
    """JSON and page; the pictures where matplotlib is installed."""
    pages.write(result, path, page)
    try:
        draw(result, path.parent)
    except ImportError:
        print("matplotlib is not installed: --draw makes the pictures where it is", flush=True)


def main(words: list[str] | None = None) -> None:
    """Measure and write."""
    arguments = parse_arguments(words)
    if arguments.child:
        print(json.dumps(first_call(arguments.child)))
        return
    path = arguments.out / "attention_cuda.json"
    if arguments.draw:
        write(pages.read(path, page), path)
        return
    require_gpu()
    result = pages.former(arguments, path, page)
    before = [result["command"]] if result else []
    result |= {
        "machine": gpu_machine("numpy", "numba-cuda", "torch"),
        "command": "; ".join([*before, pages.command(__file__, words)]),
        "seed": arguments.seed,
        "rounds": arguments.rounds,
    }
    recorder = Recorder()
    gc.collect()
    gc.freeze()  # each capture looks for garbage
    former_products = result.get("ceilings", {}).get("matmul_tflops", {})
    ceilings = measure_ceilings(recorder, arguments)
    products = former_products | ceilings["matmul_tflops"]
    result["ceilings"] = ceilings | {"matmul_tflops": products}
    for part in arguments.parts:
        former = result.get(part, []) if arguments.add else []
        found: list[dict[str, Any]] = []
        for cell in PARTS[part](recorder, arguments):
            found.append(cell)
            result[part] = merged(former, found)
            pages.write(result, path, None)
    write(result, path)


if __name__ == "__main__":
    main()
