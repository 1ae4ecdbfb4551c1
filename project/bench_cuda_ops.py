"""Bandwidth of elementwise operations, softmax and layer norm on the GPU, against a copy's.

    python project/bench_cuda_ops.py                      # everything, under a minute
    python project/bench_cuda_ops.py --sizes 64 --dtypes float32

These operations do little arithmetic: their limit is memory. So each is compared with a copy from
device to device of the same size in the same process, both counted by the bytes that must be read
and written at least: an operation that reads one tensor and writes one of the same size has the
copy's time as its limit. Times are between CUDA events around several calls, after work that keeps
the GPU busy until all of them have been launched, so it is the GPU that is timed; a figure is the
median of the rounds.

Writes ops_cuda.json and, beside it, the page ops_cuda.md.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import statistics
import sys
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that `minitorch` is found

import numpy as np

import minitorch
from minitorch import Tensor
from minitorch.kernels.gpu.runtime import cuda, current_stream
from project.arguments import COUNT, SEED, too_large, whole
from project.gpu_timing import gpu_memory, require_gpu

RESULTS = Path(__file__).resolve().parent / "results"
COLUMNS = 1024
DTYPES = ["float32", "float64", "float16", "bfloat16"]
CALLS = 5  # between two events
HEAD_START = 1 << 30  # bytes copied while the calls are launched
MIB = 1 << 20


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    count = whole(COUNT)
    parser.add_argument("--sizes", type=count, nargs="+", default=[64, 256, 1024], metavar="MiB")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=["float32", "bfloat16"])
    parser.add_argument("--rounds", type=count, default=20, help="default: %(default)s")
    parser.add_argument(
        "--seed", type=whole(SEED), default=0, help="of the inputs; default: %(default)s"
    )
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder; default: %(default)s")
    return parser.parse_args()


# ----- what is measured -----


def operations(
    rows: int, dtype: str, seed: int
) -> Iterator[tuple[str, Callable[[], Any], float, str]]:
    """Name, a call, and how many tensors of (rows, COLUMNS) it must read and write at least."""
    backend = minitorch.TensorBackend(minitorch.CudaKernelOps)
    ops = backend.ops
    rng = np.random.default_rng(seed)

    def tensor(*shape: int) -> Tensor:
        """Normal numbers, the same in every thousand rows: the values do not matter to the time."""
        part = rng.standard_normal((min(shape[0], 1024), *shape[1:]), np.float32)
        whole = np.resize(part, shape)
        return minitorch.tensor_from_numpy(whole, backend).to(dtype)

    x, y, bias, one = tensor(rows, COLUMNS), tensor(rows, COLUMNS), tensor(COLUMNS), tensor(1)
    yield "relu(x)", lambda: backend.relu_map(x), 2, "map"
    yield "exp(x)", lambda: backend.exp_map(x), 2, "map"
    yield "sigmoid(x)", lambda: backend.sigmoid_map(x), 2, "map"
    yield "x + y", lambda: backend.add_zip(x, y), 3, "zip"
    yield "x * y", lambda: backend.mul_zip(x, y), 3, "zip"
    yield "x + bias", lambda: backend.add_zip(x, bias), 2, "zip"
    yield "x * number", lambda: backend.mul_zip(x, one), 2, "zip"
    turned = x.permute(1, 0)
    yield "transposed copy", lambda: backend.id_map(turned), 2, "movement"
    yield "sum of rows", lambda: backend.add_reduce(x, 1), 1, "reduce"
    yield "sum of columns", lambda: backend.add_reduce(x, 0), 1, "reduce"
    yield "GELU", lambda: ops.gelu_forward(x), 2, "fused"
    yield "GELU backward", lambda: ops.gelu_backward(y, x), 3, "fused"
    weights = ops.softmax_forward(x, 1)
    yield "softmax", lambda: ops.softmax_forward(x, 1), 2, "fused"
    yield "softmax backward", lambda: ops.softmax_backward(y, weights, 1), 3, "fused"
    _, var, mean = ops.layernorm_fw(x, bias, bias, 1e-5)
    yield "layer norm", lambda: ops.layernorm_fw(x, bias, bias, 1e-5), 2, "fused"
    given = (y, x, bias, bias, var, mean, 1e-5)
    yield "layer norm backward", lambda: ops.layernorm_bw(*given), 3, "fused"


def copies(nbytes: int) -> Callable[[], Any]:
    """A copy of that many bytes on the device."""
    backend = minitorch.TensorBackend(minitorch.CudaOps)
    shape, dtype = (nbytes // 4,), np.dtype(np.float32)
    source, target = (backend.ops.full(shape, 1.0, dtype)._storage for _ in range(2))
    return lambda: target.copy_from_device(source)


def seconds(call: Callable[[], Any], head_start: Callable[[], Any], rounds: int) -> float:
    """Of one call on the GPU: the median of the rounds."""
    times = []
    stream = current_stream()
    for number in range(-2, rounds):
        for _ in range(4):
            head_start()
        start, end = cuda.event(), cuda.event()
        start.record(stream)
        for _ in range(CALLS):
            call()
        end.record(stream)
        end.synchronize()
        if number >= 0:
            times.append(float(cuda.event_elapsed_time(start, end)) * 1e-3 / CALLS)
    return statistics.median(times)


def measure(size: int, dtype: str, rounds: int, seed: int) -> list[dict[str, Any]]:
    """All operations on tensors of `size` MiB."""
    head_start = copies(HEAD_START)
    copied = seconds(copies(size * MIB), head_start, rounds)
    copy_speed = 2 * size * MIB / copied
    itemsize = 2 if dtype in ("float16", "bfloat16") else np.dtype(dtype).itemsize
    rows = size * MIB // itemsize // COLUMNS
    found = [row("copy", "copy", size, dtype, copied, copy_speed, copy_speed)]
    for name, call, tensors, kind in operations(rows, dtype, seed):
        took = seconds(call, head_start, rounds)
        speed = tensors * size * MIB / took
        found.append(row(name, kind, size, dtype, took, speed, copy_speed))
        print(f"{size} MiB {dtype} {name}: {speed / copy_speed:.0%} of a copy", flush=True)
    minitorch.cuda.empty_cache()
    return found


def row(
    name: str, kind: str, size: int, dtype: str, took: float, speed: float, copy: float
) -> dict[str, Any]:
    """One line of the results."""
    return {
        "operation": name,
        "kind": kind,
        "size_mib": size,
        "dtype": dtype,
        "microseconds": took * 1e6,
        "terabytes_per_second": speed / 1e12,
        "of_a_copy": speed / copy,
    }


def machine() -> dict[str, Any]:
    """What the figures depend on."""
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "gpu": minitorch.cuda.device_name(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        **{name: version(name) for name in ("numpy", "numba", "numba-cuda")},
        "config": minitorch.cuda.config(),
    }


# ----- the page -----


def markdown(result: dict[str, Any]) -> str:
    """The results as a page."""
    about, rows = result["machine"], result["rows"]
    versions = ", ".join(f"{n} {about[n]}" for n in ("python", "numpy", "numba", "numba-cuda"))
    lines = [
        "# Elementwise operations, softmax and layer norm on the GPU",
        "",
        f"{about['date']}; {about['gpu']}; {versions}. Rows of {COLUMNS}, seed {result['seed']}, "
        f"median of {result['rounds']} rounds. Command: `{result['command']}`.",
        "",
        "Bandwidth (bytes that must be read and written at least, over time), as a share of that "
        "of a device-to-device copy of a tensor of the same size:",
        "",
    ]
    cells = {(r["dtype"], r["size_mib"], r["operation"]): r for r in rows}
    columns = list(dict.fromkeys((r["dtype"], r["size_mib"]) for r in rows))
    names = dict.fromkeys(r["operation"] for r in rows)
    titles = [f"{dtype}, {size} MiB" for dtype, size in columns]
    lines += [f"| | {' | '.join(titles)} |", "|---" * (len(columns) + 1) + "|"]
    for name in names:
        found = [cells[(*column, name)] for column in columns]
        if name == "copy":
            shown = [f"{r['terabytes_per_second']:.2f} TB/s" for r in found]
        else:
            shown = [f"{r['of_a_copy']:.0%}" for r in found]
        lines.append(f"| {name} | {' | '.join(shown)} |")
    return "\n".join(lines) + "\n"


def main() -> int:
    """Measure and write; returns the exit code."""
    arguments = parse_arguments()
    require_gpu()
    # Three tensors at a time at least, and what the GPU is kept busy with.
    largest = max(arguments.sizes)
    problem = too_large(3 * largest * MIB + 2 * HEAD_START, gpu_memory(), "the GPU")
    if problem:
        raise SystemExit(f"--sizes {largest}: {problem}")
    rows = []
    for dtype in arguments.dtypes:
        for size in arguments.sizes:
            rows += measure(size, dtype, arguments.rounds, arguments.seed)
    words = [word for word in sys.argv[1:] if word != "--out" and word != str(arguments.out)]
    result = {
        "machine": machine(),
        "command": shlex.join(["python", "project/bench_cuda_ops.py", *words]),
        "seed": arguments.seed,
        "rounds": arguments.rounds,
        "rows": rows,
    }
    arguments.out.mkdir(parents=True, exist_ok=True)
    path = arguments.out / "ops_cuda.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    path.with_suffix(".md").write_text(markdown(result))
    print(f"Written: {path} and .md", flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
