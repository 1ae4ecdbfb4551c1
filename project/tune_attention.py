"""Measure the tile sizes of the attention kernels on this GPU, and keep the fastest.

    python project/tune_attention.py                       # every module with candidates
    python project/tune_attention.py --modules hopper --head-dims 128 --kernels forward

A module takes part by a dict CANDIDATES: kernel ("forward", "key_value" or "query") -> head size ->
tuples of numbers, the arguments of its class of tile sizes; and by asking `tuning.choice` when it
launches. Each candidate is timed at a short and at a long length, as the benchmark does it
(`gpu_timing.py`), all taking turns; the smallest geometric mean of the times wins. The table in
`kernels/flash_attention/tuning.py` is rewritten with the winners.
"""

from __future__ import annotations

import argparse
import math
import pprint
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # so that `minitorch` is found

TABLE_FILE = ROOT / "kernels" / "flash_attention" / "tuning.py"
BEGIN, END = "# ----- written by project/tune_attention.py -----\n", "# ----- end -----\n"
HIDDEN, TOKENS = 2048, 16384
LENGTHS = (1024, 8192)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--modules", nargs="+", help="default: all that have candidates")
    parser.add_argument("--kernels", nargs="+", default=["forward", "key_value", "query"])
    parser.add_argument("--head-dims", type=int, nargs="+", help="default: all with candidates")
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS)
    parser.add_argument("--rounds", type=int, default=15, help="default: %(default)s")
    parser.add_argument("--dry-run", action="store_true", help="only print")
    return parser.parse_args()


def written(table: dict[Any, Any], source: str) -> str:
    """The text of tuning.py with another table."""
    before, rest = source.split(BEGIN)
    _, after = rest.split(END)
    entries = pprint.pformat(table, width=96, sort_dicts=True) if table else "{}"
    if table:
        entries = "{\n " + entries[1:-1] + ",\n}"
    lines = f"TABLE: dict[Entry, Numbers] = {entries}\n".replace("\n ", "\n    ")
    return before + BEGIN + lines + END + after


def fastest(times: dict[Any, list[float]]) -> Any:
    """The candidate with the smallest geometric mean of its times."""
    return min(times, key=lambda name: sum(map(math.log, times[name])))


def forget_choices(module: Any) -> None:
    """Let a module that remembers its choices ask the table again."""
    for function in vars(module).values():
        if hasattr(function, "cache_clear") and function.__module__ == module.__name__:
            function.cache_clear()


def measure(
    module: Any, kernel: str, head_dim: int, causal: bool, arguments: argparse.Namespace
) -> tuple[int, ...]:
    """Time each candidate; the fastest."""
    from minitorch.kernels.flash_attention import tuning
    from minitorch.kernels.runtime import compute_capability
    from project import attention_contestants as contestants
    from project.gpu_timing import Recorder

    recorder = Recorder()
    entry = (module.NAME, kernel, compute_capability(), head_dim, causal)
    former = tuning.TABLE.get(entry)
    times: dict[tuple[int, ...], list[float]] = {}
    for length in arguments.lengths:
        case = contestants.Case(
            TOKENS // length, HIDDEN // head_dim, length, length, head_dim, causal
        )
        inputs = case.inputs()
        recorder.torch.cuda.synchronize()
        running = {}
        for numbers in module.CANDIDATES[kernel][head_dim]:
            tuning.TABLE[entry] = numbers
            forget_choices(module)
            try:
                made = contestants.ours(
                    recorder, module.NAME, case, inputs, backward=kernel != "forward"
                )
            except Exception as error:  # a candidate that does not fit is out of the race
                print(f"  {numbers}: {str(error).splitlines()[0][:90]}", flush=True)
                continue
            if made is not None:
                running[str(numbers)] = made
                times.setdefault(numbers, [])
        works = {name: made.backward or made.forward for name, made in running.items()}
        for name, figure in recorder.medians(works, arguments.rounds).items():
            numbers = next(n for n in times if str(n) == name)
            times[numbers].append(figure["ms"])
        for made in running.values():
            made.close()
    tuning.TABLE.pop(entry)
    forget_choices(module)
    if former is not None:
        tuning.TABLE[entry] = former
    complete = {n: t for n, t in times.items() if len(t) == len(arguments.lengths)}
    best: tuple[int, ...] = fastest(complete)
    shown = {n: [round(ms, 3) for ms in t] for n, t in complete.items()}
    print(f"{entry}: {best} of {shown}", flush=True)
    return best


def main() -> None:
    arguments = parse_arguments()
    import minitorch
    from minitorch import cuda_attention
    from minitorch.kernels.flash_attention import tuning
    from minitorch.kernels.runtime import compute_capability

    if not minitorch.cuda.is_available():
        raise SystemExit("no CUDA GPU was found (python -m minitorch doctor)")
    for module in cuda_attention.FLASH_ATTENTION:
        candidates = getattr(module, "CANDIDATES", {})
        if arguments.modules and module.NAME not in arguments.modules:
            continue
        for kernel in [name for name in arguments.kernels if name in candidates]:
            for head_dim in sorted(candidates[kernel]):
                if arguments.head_dims and head_dim not in arguments.head_dims:
                    continue
                for causal in (False, True):
                    best = measure(module, kernel, head_dim, causal, arguments)
                    entry = (module.NAME, kernel, compute_capability(), head_dim, causal)
                    tuning.TABLE[entry] = best
    if not arguments.dry_run:
        TABLE_FILE.write_text(written(tuning.TABLE, TABLE_FILE.read_text()))
        print(f"Written: {TABLE_FILE}", flush=True)


if __name__ == "__main__":
    main()
