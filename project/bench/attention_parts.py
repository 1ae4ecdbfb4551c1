"""The parts of the attention benchmark on a GPU: what each of them measures."""

from __future__ import annotations

import argparse
import gc
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from project.bench import attention_contestants as contestants
from project.bench.attention_contestants import Case, Contestant
from project.bench.attention_report import PASSES, decode_rate, tflops
from project.bench.pages import number
from project.bench.processes import in_child
from project.bench.timing import Recorder

Cells = Iterator[dict[str, Any]]
COMMAND = str(Path(__file__).resolve().with_name("attention_cuda.py"))
HIDDEN, TOKENS = 2048, 16384
DECODE_KEYS, DECODE_HEADS = 65536, 32
FLOAT32_LENGTHS = [1024, 4096, 16384]
MEMORY_LENGTHS = [4096, 16384, 65536]
MEMORY_HEADS, MEMORY_HEAD_DIM = 8, 64
MATMUL = 8192
COPY_BYTES = 2 << 30


# ----- one cell -----


def measure(
    recorder: Recorder, case: Case, entrants: dict[str, Callable[..., Contestant | None]],
    rounds: int, backward: bool,
) -> dict[str, Any]:  # fmt: skip
    """Times and errors of a case: {"forward": {name: figure}, "backward": ...} and the case."""
    import torch

    inputs = case.inputs()
    torch.cuda.synchronize()
    running: dict[str, Contestant] = {}
    for name, enter in entrants.items():
        made = contestants.entered(name, partial(enter, recorder, case, inputs, backward))
        if made is not None:
            running[name] = made
    cell: dict[str, Any] = asdict(case)
    forward = {name: made.forward for name, made in running.items()}
    cell["forward"] = recorder.medians(forward, rounds)
    backwards = {name: work for name, made in running.items() if (work := made.backward)}
    cell["backward"] = recorder.medians(backwards, rounds)
    if not case.dropout_p:
        wanted = contestants.reference(case, inputs)
        for name, made in running.items():
            errors = contestants.errors(made, wanted)
            for what, largest in zip(("forward", "backward"), errors, strict=True):
                if largest is not None:
                    cell[what][name]["error"] = largest
        del wanted
    for made in running.values():
        made.close()
    del running, inputs, forward, backwards
    gc.collect()
    return cell


def entrants_of(ours: list[str], pytorchs: list[str]) -> dict[str, Callable[..., Any]]:
    """Functions that let each contestant enter, by name."""

    def enter(maker: Any, name: str) -> Callable[..., Any]:
        return lambda recorder, case, inputs, backward: maker(
            recorder, name, case, inputs, backward
        )

    return {
        **{name: enter(contestants.ours, name) for name in ours},
        **{name: enter(contestants.pytorchs, name) for name in pytorchs},
    }


def cases(lengths: list[int], head_dims: list[int], **more: Any) -> list[Case]:
    """The grid: hidden size and number of tokens are the same everywhere."""
    return [
        Case(TOKENS // n, HIDDEN // d, n, n, d, causal, **more)
        for d in head_dims
        for causal in (False, True)
        for n in lengths
        if n <= TOKENS
    ]


def shown(cell: dict[str, Any]) -> dict[str, Any]:
    """The cell, after a line of output for each pass."""
    for what in PASSES:
        if cell[what]:
            rates = ", ".join(f"{n} {number(tflops(cell, what, n), '{:.0f}')}" for n in cell[what])
            print(
                f"D {cell['head_dim']} N {cell['seqlen_k']} {cell['dtype']} "
                f"{'causal' if cell['causal'] else 'full'} {what}: {rates} TFLOP/s",
                flush=True,
            )
    return cell


# ----- parts -----


def measure_ceilings(recorder: Recorder, arguments: argparse.Namespace) -> dict[str, Any]:
    """What the GPU does at best: a large matrix product of this dtype, and a large copy."""
    import torch

    dtype = getattr(torch, arguments.dtype)
    a, b = (torch.randn(MATMUL, MATMUL, device="cuda", dtype=dtype) for _ in range(2))
    source = torch.randn(COPY_BYTES // 4, device="cuda")
    target = torch.empty_like(source)
    works = {
        "matmul": recorder.torch_graph(lambda: a @ b),
        "copy by the driver": recorder.torch_graph(lambda: target.copy_(source)),
        "copy by a kernel": recorder.torch_graph(lambda: torch.neg(source, out=target)),
    }
    times = {name: t["ms"] for name, t in recorder.medians(works, arguments.rounds).items()}
    copy = min(times["copy by the driver"], times["copy by a kernel"])
    found = {
        "matmul_tflops": {arguments.dtype: 2 * MATMUL**3 / times["matmul"] / 1e9},
        "copy_tb_per_s": 2 * COPY_BYTES / copy / 1e9,
    }
    print(found, flush=True)
    return found


def measure_grid(recorder: Recorder, arguments: argparse.Namespace) -> Cells:
    """Forward and backward passes alone."""
    entrants = entrants_of(arguments.ours, ["flash", "cudnn"])
    for case in cases(
        arguments.lengths, arguments.head_dims, dtype=arguments.dtype, seed=arguments.seed
    ):
        yield shown(measure(recorder, case, entrants, arguments.rounds, backward=True))


def measure_dropout(recorder: Recorder, arguments: argparse.Namespace) -> Cells:
    """The grid's cells with dropout, which cuDNN does not take in PyTorch."""
    entrants = entrants_of([n for n in arguments.ours if n != "simt"], ["flash"])
    head_dims = [d for d in arguments.head_dims if d <= 128]
    for case in cases(
        arguments.lengths, head_dims, dtype=arguments.dtype, seed=arguments.seed, dropout_p=0.2
    ):
        yield shown(measure(recorder, case, entrants, arguments.rounds, backward=True))


def measure_published(recorder: Recorder, arguments: argparse.Namespace) -> Cells:
    """The experiment published for a T4: 1.0446 s by standard attention, 0.3437 s by flash."""
    case = Case(32, 8, 2048, 2048, 64, dtype="float16", dropout_p=0.2, seed=arguments.seed)
    entrants = entrants_of(["ours"], ["flash"])
    entrants["standard"] = contestants.standard
    yield shown(measure(recorder, case, entrants, arguments.rounds, backward=False))


def measure_decode(recorder: Recorder, arguments: argparse.Namespace) -> Cells:
    """One query of each head against a long cache of keys and values."""
    entrants = entrants_of(["ours"], ["flash", "cudnn"])
    for head_dim in (64, 128):
        for dtype in ("float16", "bfloat16"):
            case = Case(1, DECODE_HEADS, 1, DECODE_KEYS, head_dim, dtype=dtype, seed=arguments.seed)
            cell = measure(recorder, case, entrants, arguments.rounds, backward=False)
            rates = (f"{name} {decode_rate(cell, name):.2f}" for name in cell["forward"])
            print(f"decode, D {head_dim}, {dtype}: {', '.join(rates)} TB/s", flush=True)
            yield cell


def measure_float32(recorder: Recorder, arguments: argparse.Namespace) -> Cells:
    """In float32: exactly, and by tensor cores; standard attention of ours; PyTorch's."""
    import minitorch

    def enter(precision: Any) -> Callable[..., Any]:
        def made(recorder: Recorder, case: Case, inputs: list[Any], backward: bool) -> Any:
            with minitorch.cuda.fp32_precision(precision):
                return contestants.ours(recorder, "ours", case, inputs, backward)

        return made

    entrants = {name: enter(name) for name in ("ieee", "tf32", "tf32x3")}
    entrants |= {"own standard": contestants.our_standard, **entrants_of([], ["efficient"])}
    for causal in (False, True):
        for n in FLOAT32_LENGTHS:
            case = Case(TOKENS // n, 16, n, n, 64, causal, "float32", seed=arguments.seed)
            rounds = max(5, arguments.rounds // 5)
            yield shown(measure(recorder, case, entrants, rounds, backward=True))


def measure_memory(recorder: Recorder, arguments: argparse.Namespace) -> Cells:
    """Peak of forward + backward beyond the inputs, MiB, flash and standard, in float32."""
    import torch

    import minitorch

    for length in MEMORY_LENGTHS:
        row: dict[str, Any] = {"length": length, "heads": MEMORY_HEADS}
        shape = (1, MEMORY_HEADS, length, MEMORY_HEAD_DIM)
        for name in ("flash_attention", "attention"):
            arrays = [torch.randn(shape, device="cuda") for _ in range(3)]
            q, k, v = (minitorch.as_tensor(x) for x in arrays)
            for x in (q, k, v):
                x.requires_grad_(True)
            before = minitorch.cuda.memory_allocated()
            minitorch.cuda.reset_peak_memory_stats()
            row[name] = None
            try:
                getattr(q, name)(k, v).sum().backward()
                row[name] = (minitorch.cuda.max_memory_allocated() - before) / 2**20
            except minitorch.cuda.OutOfMemoryError as error:
                print(str(error).splitlines()[0], flush=True)
            del arrays, q, k, v, x
            minitorch.cuda.empty_cache()
        print(row, flush=True)
        yield row


def measure_compile(recorder: Recorder, arguments: argparse.Namespace) -> Cells:
    """First calls of a new process, with an empty cache and then with the one it has filled."""
    for name in [n for n in arguments.ours if n != "simt"]:
        with tempfile.TemporaryDirectory() as folder:
            row: dict[str, Any] = {"kernel": name}
            for state in ("cold", "warm"):
                try:
                    row[state] = in_child(COMMAND, name, {"MINITORCH_CUDA_CACHE": folder})
                except SystemExit as error:  # the others are measured all the same
                    print(str(error)[-300:], flush=True)
                    break
            print(row, flush=True)
            yield row


def first_call(name: str) -> dict[str, float]:
    """In a process of its own: seconds of the first forward and backward call of a module."""
    import minitorch
    from minitorch import attention
    from minitorch.cuda import attention as cuda_attention

    backend = minitorch.TensorBackend(minitorch.CudaKernelOps)
    length = 1 if name == "decode" else 256
    q, k = (
        minitorch.tensor_from_numpy(np.ones((1, 2, n, 128), np.float16), backend)
        for n in (length, 4096)
    )
    problem = attention.describe(q, k, k, is_causal="bottom-right")
    ops: Any = q.f.ops
    minitorch.cuda.synchronize()
    seconds: dict[str, float] = {}
    with contestants.only(name):
        begun = time.perf_counter()
        out, _, rows = ops.flash_attention_forward(q, k, k, None, problem)
        minitorch.cuda.synchronize()
        seconds["forward"] = time.perf_counter() - begun
        (module,) = cuda_attention.FLASH_ATTENTION
        if hasattr(module, "backward"):
            begun = time.perf_counter()
            ops.flash_attention_backward(out, None, q, k, k, None, out, rows, problem)
            minitorch.cuda.synchronize()
            seconds["backward"] = time.perf_counter() - begun
    return seconds


def measure_triton(recorder: Recorder, arguments: argparse.Namespace) -> Cells:
    """PyTorch's flex_attention: a FlashAttention that Triton compiles, after Triton's tutorial."""
    import torch
    from torch.nn.attention import flex_attention as flex

    compiled = torch.compile(flex.flex_attention)

    def enter(recorder: Recorder, case: Case, inputs: list[Any], backward: bool) -> Any:
        q, k, v = inputs[:3]
        mask = None
        if case.causal:
            shape = (None, None, case.seqlen_q, case.seqlen_k)
            mask = flex.create_block_mask(lambda b, h, i, j: i >= j, *shape)
        # Raises where Triton, or the compiler that it needs, is not there.
        return Contestant(recorder.torch_graph(lambda: compiled(q, k, v, block_mask=mask)), None)

    entrants = {"triton": enter, **entrants_of(["ours"], [])}
    for case in cases([4096], [64, 128], dtype=arguments.dtype, seed=arguments.seed):
        yield shown(measure(recorder, case, entrants, arguments.rounds, backward=False))


PARTS: dict[str, Callable[[Recorder, argparse.Namespace], Cells]] = {
    "grid": measure_grid,
    "dropout": measure_dropout,
    "published": measure_published,
    "decode": measure_decode,
    "float32": measure_float32,
    "memory": measure_memory,
    "compile": measure_compile,
    "triton": measure_triton,
}
