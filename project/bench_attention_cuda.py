"""FlashAttention on the GPU: our kernels against PyTorch's, every bar of the project in one run.

    python project/bench_attention.py --device cuda                        # everything
    python project/bench_attention.py --device cuda --parts grid --lengths 4096 --head-dims 128
    python project/bench_attention.py --device cuda --parts decode --add   # the rest as it was
    python project/bench_attention.py --device cuda --draw                 # page and pictures alone

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
import os
import platform
import shlex
import sys
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that `minitorch` is found

from project import attention_report
from project.arguments import COUNT, SEED, Range, whole
from project.attention_contestants import OURS
from project.attention_parts import HIDDEN, PARTS, first_call, measure_ceilings

RESULTS = Path(__file__).resolve().parent / "results"
LENGTHS = [512, 1024, 2048, 4096, 8192, 16384]
HEAD_DIMS = [64, 128, 256]
CELL = ("head_dim", "seqlen_k", "causal", "dtype")  # what tells a part's cells apart


def parse_arguments(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="bench_attention.py --device cuda",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--lengths", type=whole(COUNT), nargs="+", default=LENGTHS, metavar="N")
    parser.add_argument(
        "--head-dims", type=whole(Range(1, HIDDEN + 1)), nargs="+", default=HEAD_DIMS, metavar="D"
    )
    parser.add_argument("--dtype", choices=["float16", "bfloat16"], default="float16")
    parser.add_argument(
        "--ours", nargs="+", choices=list(OURS), default=list(OURS), help="our kernels"
    )
    parser.add_argument("--rounds", type=whole(COUNT), default=30, help="default: %(default)s")
    parser.add_argument(
        "--seed", type=whole(SEED), default=0, help="of the inputs; default: %(default)s"
    )
    parser.add_argument("--add", action="store_true", help="keep other parts and cells of the file")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder; default: %(default)s")
    parser.add_argument("--draw", action="store_true", help="measure nothing")
    parser.add_argument("--first-call", help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def machine() -> dict[str, Any]:
    """What the figures depend on."""
    import torch

    import minitorch

    properties = torch.cuda.get_device_properties(0)
    packages = {"python": platform.python_version()}
    packages |= {name: version(name) for name in ("numpy", "numba-cuda", "torch")}
    packages["cuDNN"] = str(torch.backends.cudnn.version())
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "gpu": properties.name,
        "memory_gib": round(properties.total_memory / 2**30),
        "cores": os.cpu_count(),
        "driver": minitorch.cuda.config()["driver"],
        "packages": list(packages),
        **packages,
    }


def merged(old: list[dict[str, Any]], new: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """New cells in the place of old ones of the same shape, the other old ones kept."""

    def name(cell: dict[str, Any]) -> tuple[Any, ...]:
        keys = (*CELL, "dropout_p", "length", "kernel")
        return tuple(cell.get(key) for key in keys)

    cells = {name(cell): cell for cell in (*old, *new)}
    return list(cells.values())


def measured(path: Path) -> dict[str, Any]:
    """What an earlier run has written.

    Raises:
        SystemExit: there is no such file, or another program wrote it.

    """
    if not path.is_file():
        raise SystemExit(f"{path} is not there: measure first, without --draw")
    try:
        result: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        attention_report.markdown(result)
    except (ValueError, KeyError, TypeError, AttributeError):
        raise SystemExit(f"{path} has another format: measure anew, without --draw") from None
    return result


def keep(result: dict[str, Any], folder: Path) -> Path:
    """Write the results so far, so that nothing is lost if a later part fails."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "attention_cuda.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    return path


def write(result: dict[str, Any], folder: Path) -> None:
    """JSON and page; the pictures where matplotlib is installed."""
    path = keep(result, folder)
    path.with_suffix(".md").write_text(attention_report.markdown(result))
    try:
        attention_report.draw(result, folder)
    except ImportError:
        print("matplotlib is not installed: --draw makes the pictures where it is", flush=True)
    print(f"Written: {path}, .md and pictures", flush=True)


def own_arguments(words: list[str]) -> list[str]:
    """The command line without --out, which says nothing of what was measured."""
    kept, remaining = [], iter(words)
    for word in remaining:
        if word == "--out":
            next(remaining, None)
        elif not word.startswith("--out="):
            kept.append(word)
    return kept


def main(words: list[str] | None = None) -> None:
    words = sys.argv[1:] if words is None else words
    arguments = parse_arguments(words)
    if arguments.first_call:
        first_call(arguments.first_call)
        return
    path = arguments.out / "attention_cuda.json"
    if arguments.draw:
        write(measured(path), arguments.out)
        return
    from project.gpu_timing import Recorder, require_gpu

    require_gpu()
    result = measured(path) if arguments.add and path.exists() else {}
    command = ["python", "project/bench_attention.py", "--device", "cuda", *own_arguments(words)]
    before = [result["command"]] if result else []
    result |= {
        "machine": machine(),
        "command": "; ".join([*before, shlex.join(command)]),
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
            keep(result, arguments.out)
    write(result, arguments.out)


if __name__ == "__main__":
    main()
