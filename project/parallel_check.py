"""Show what numba made of the loops of FastOps: which run in parallel, which were fused.

python project/parallel_check.py --level 3
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that `minitorch` is found

import minitorch
from minitorch import fast_ops, operators
from project.arguments import parser_of


def main(argv: Sequence[str] | None = None) -> None:
    """Run from the command line: compile each loop for small tensors and print its diagnostics."""
    parser = parser_of(__doc__)
    parser.add_argument(
        "--level", type=int, choices=range(1, 5), default=1, help="detail, default %(default)s"
    )
    args = parser.parse_args(argv)
    a, out, row = (minitorch.zeros(shape).tuple() for shape in ((3, 4), (3, 4), (3, 1)))
    loops = {
        "map": (fast_ops.tensor_map(operators.id), (*out, *a)),
        "zip": (fast_ops.tensor_zip(operators.add), (*out, *a, *a)),
        "reduce": (fast_ops.tensor_reduce(operators.add), (*row, *a, 1)),
    }
    for name, (loop, arguments) in loops.items():
        loop(*arguments)
        print(f"\n===== {name} =====")
        loop.parallel_diagnostics(level=args.level)


if __name__ == "__main__":
    main()
