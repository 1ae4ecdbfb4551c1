"""Bandwidth of elementwise operations, softmax and layer norm on the GPU, against a copy's.

    python project/bench/ops_cuda.py                      # everything, under a minute
    python project/bench/ops_cuda.py --sizes 64 --dtypes float32

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
import sys
from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # so that `minitorch` is found

import numpy as np

import minitorch
from minitorch import Tensor
from project.arguments import COUNT, SEED, parser_of, too_large, whole
from project.bench import pages
from project.bench.machine import gpu_machine
from project.bench.timing import require_gpu, seconds_of_calls
from project.transformer.memory import gpu_memory

COLUMNS = 1024
DTYPES = ["float32", "float64", "float16", "bfloat16"]
HEAD_START = 1 << 30  # bytes copied while the calls are launched
MIB = 1 << 20


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = parser_of(__doc__)
    add, count = parser.add_argument, whole(COUNT)
    add("--sizes", type=count, nargs="+", default=[64, 256, 1024], metavar="MiB")
    add("--dtypes", nargs="+", choices=DTYPES, default=["float32", "bfloat16"])
    add("--rounds", type=count, default=20, help="default: %(default)s")
    add("--seed", type=whole(SEED), default=0, help="of the inputs; default: %(default)s")
    pages.add_out(parser)
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


def measure(size: int, dtype: str, rounds: int, seed: int) -> list[dict[str, Any]]:
    """A copy, then all operations, on tensors of `size` MiB."""
    head_start = copies(HEAD_START)
    itemsize = 2 if dtype in ("float16", "bfloat16") else np.dtype(dtype).itemsize
    rows = size * MIB // itemsize // COLUMNS
    copy = ("copy", copies(size * MIB), 2.0, "copy")
    found: list[dict[str, Any]] = []
    for name, call, tensors, kind in chain([copy], operations(rows, dtype, seed)):
        took = seconds_of_calls(call, head_start, rounds)
        speed = tensors * size * MIB / took / 1e12
        found.append({"operation": name, "kind": kind, "size_mib": size, "dtype": dtype})
        found[-1] |= {"microseconds": took * 1e6, "terabytes_per_second": speed}
        found[-1]["of_a_copy"] = speed / found[0]["terabytes_per_second"]
        print(f"{size} MiB {dtype} {name}: {found[-1]['of_a_copy']:.0%} of a copy", flush=True)
    minitorch.cuda.empty_cache()
    return found


# ----- the page -----


def page(result: pages.Result) -> str:
    """The results as Markdown."""
    cells = {(r["dtype"], r["size_mib"], r["operation"]): r for r in result["rows"]}
    columns = list(dict.fromkeys((dtype, size) for dtype, size, _ in cells))
    rows = []
    for name in dict.fromkeys(name for _, _, name in cells):
        found = [cells[(*column, name)] for column in columns]
        if name == "copy":
            rows.append([name, *(f"{r['terabytes_per_second']:.2f} TB/s" for r in found)])
        else:
            rows.append([name, *(f"{r['of_a_copy']:.0%}" for r in found)])
    return pages.page(
        "Elementwise operations, softmax and layer norm on the GPU",
        pages.source(
            result,
            f"Rows of {COLUMNS}, seed {result['seed']}, median of {result['rounds']} rounds",
        ),
        "Bandwidth (bytes that must be read and written at least, over time), as a share of that "
        "of a device-to-device copy of a tensor of the same size:",
        pages.table(["", *(f"{dtype}, {size} MiB" for dtype, size in columns)], rows),
    )


def main() -> None:
    """Measure and write."""
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
    result = {
        "machine": gpu_machine("numpy", "numba", "numba-cuda"),
        "command": pages.command(__file__),
        "seed": arguments.seed,
        "rounds": arguments.rounds,
        "rows": rows,
    }
    pages.write(result, arguments.out / "ops_cuda.json", page)


if __name__ == "__main__":
    main()
