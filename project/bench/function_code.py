"""Print what becomes of a score function, from Python to machine code: soft-capping, step by step.

    python project/bench/function_code.py             # all that follows
    python project/bench/function_code.py graph       # the graph and its derivative
    python project/bench/function_code.py cpu         # the loop over a row of scores, as LLVM IR
    python project/bench/function_code.py hopper      # the same in a Hopper kernel, as PTX

No GPU is needed. kernels/flash_attention/FUNCTIONS.md tells what is seen.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from minitorch import score_mods
from minitorch.kernels.flash_attention.variant import derivative_of
from minitorch.kernels.score_graph import Graph
from minitorch.score_trace import trace
from project.arguments import parser_of

CAP = 30.0
SHAPE = (1, 8, 4096, 128)
SCORES = 2  # of a Hopper thread's, whose code is printed


def graph() -> Graph:
    """Of soft-capping."""
    return trace(score_mods.softcap(CAP), "score_mod").graph


def lines_of(graph: Graph) -> Iterator[str]:
    """A graph's nodes for people, one a line."""
    for n, node in enumerate(graph.nodes):
        given = ", ".join(f"%{x}" for x in node.operands)
        what = node.value or (f"{node.number}" if node.name in ("parameter", "load") else given)
        marks = [str(place) for place, output in enumerate(graph.outputs) if output == n]
        result = f"    -> output {' and '.join(marks)}" if marks else ""
        yield f"%{n} = {node.name}({what}){result}"


def graph_lines() -> Iterator[str]:
    """The graph, and the graph with its derivative."""
    yield from lines_of(graph())
    yield ""
    yield from lines_of(derivative_of(graph()).graph)


def cpu_lines() -> Iterator[str]:
    """The loop of the row function, without the numbers of the polynomials."""
    from minitorch.kernels.flash_attention.cpu.score_rows import score_row

    code = score_row(graph(), np.dtype(np.float32)).owner.get_llvm_str()
    loop = re.search(r"^for\.body:.*?^\s+br i1.*?$", code, re.DOTALL | re.MULTILINE)
    assert loop is not None
    for line in loop[0].splitlines():
        yield re.sub(r"; preds.*|, align \d+", "", line.replace("tail call ", "")).rstrip()


def hopper_code() -> str:
    """PTX of the forward kernel in float16."""
    from minitorch.kernels.flash_attention.hopper import launch as hopper
    from minitorch.kernels.flash_attention.hopper.forward import forward_kernel
    from minitorch.kernels.flash_attention.hopper.tiles import own_kind
    from minitorch.kernels.flash_attention.problem import AttentionProblem
    from minitorch.kernels.gpu.runtime import cuda, types

    problem = AttentionProblem.of(SHAPE, SHAPE, SHAPE, "float16")
    kind = own_kind(replace(problem, score_mod=graph()))
    kernel: Any = forward_kernel(kind, hopper.forward_blocks(kind, SHAPE[-2]))
    options = kernel.targetoptions
    code, _ = cuda.compile(
        kernel.py_func,
        types.void(*hopper.forward_signature(kind)),
        cc=(9, 0, "a"),
        device=False,
        abi="numba",
        fastmath=options["fastmath"],
        opt=options["opt"],
        launch_bounds=options.get("launch_bounds"),
        output="ptx",
    )
    return code if isinstance(code, str) else bytes(code).decode()


def hopper_lines(code: str) -> Iterator[str]:
    """The instructions of a thread's first scores, from the label before them on, and how many
    scores there are in the kernel's text.
    """
    lines = [line.strip() for line in code.splitlines()]
    lines = [line for line in lines if line and not line.startswith("//")]
    places = [n for n, line in enumerate(lines) if line.startswith("tanh")]
    first = max(n for n in range(places[0]) if lines[n].startswith("$"))
    yield from lines[first + 1 : places[SCORES - 1] + 1]
    yield f"... {len(places)} times tanh.approx.f32 in {len(lines)} lines"


def main(arguments: list[str] | None = None) -> None:
    """Print the parts that are asked for."""
    parser = parser_of(__doc__)
    parser.add_argument("part", nargs="?", choices=("graph", "cpu", "hopper"), help="default: all")
    wanted = parser.parse_args(arguments).part
    parts: dict[str, Any] = {
        "graph": graph_lines, "cpu": cpu_lines, "hopper": lambda: hopper_lines(hopper_code())
    }  # fmt: skip
    for name, made in parts.items():
        if wanted in (None, name):
            _print(name, made())


def _print(title: str, lines: Iterable[str]) -> None:
    print(f"--- {title}", *lines, "", sep="\n")


if __name__ == "__main__":
    main()
