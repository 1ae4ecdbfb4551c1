"""Measure the tile sizes of the attention kernels on this GPU, and keep the fastest.

    python project/bench/tune_attention.py                       # every module with candidates
    python project/bench/tune_attention.py --modules hopper --head-dims 128 --kernels forward

A module takes part by a dict CANDIDATES: kernel ("forward", "key_value" or "query") -> head size,
or (head size, causal) -> tuples of numbers, the arguments of its class of tile sizes; and by asking
`tuning.choice` when it launches. The candidates are timed as in the benchmark (`timing.py`),
taking turns, with short and with long sequences. The fastest ones are written to the table in
`kernels/flash_attention/tuning.py`, after each measurement.
"""

from __future__ import annotations

import argparse
import gc
import pprint
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # so that `minitorch` is found

from minitorch.kernels.flash_attention import tuning
from minitorch.kernels.flash_attention.tuning import Entry, Numbers
from project.arguments import COUNT, POSITIVE, parser_of, real, whole
from project.bench import attention_contestants as contestants
from project.bench.attention_parts import HIDDEN, TOKENS
from project.bench.timing import Recorder, require_gpu

ROOT = Path(__file__).resolve().parents[2]
TABLE_FILE = ROOT / "kernels" / "flash_attention" / "tuning.py"
BEGIN, END = "# ----- written by project/bench/tune_attention.py -----\n", "# ----- end -----\n"
KERNELS = ["forward", "key_value", "query"]
LENGTHS = {True: 1024, False: 8192}  # short, and long


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = parser_of(__doc__)
    add, default = parser.add_argument, "default: %(default)s"
    add("--modules", nargs="+", help="default: all that have candidates")
    add("--kernels", nargs="+", choices=KERNELS, default=KERNELS)
    add("--head-dims", type=whole(COUNT), nargs="+", help="default: all with candidates")
    add("--rounds", type=whole(COUNT), default=7, help=default)
    add("--seconds", type=real(POSITIVE), default=1e9, help="after which nothing is begun")
    add("--dry-run", action="store_true", help="only print")
    return parser.parse_args()


def written(table: dict[Any, Any], source: str) -> str:
    """The text of tuning.py with another table."""
    before, rest = source.split(BEGIN)
    _, after = rest.split(END)
    entries = "{}"
    if table:
        entries = pprint.pformat(table, width=96, sort_dicts=True).replace("'", '"')
        entries = "{\n " + entries[1:-1] + ",\n}"
    lines = f"TABLE: dict[Entry, Numbers] = {entries}\n".replace("\n ", "\n    ")
    return before + BEGIN + lines + END + after


def forget_choices(module: Any) -> None:
    """Let a module that remembers its choices ask the table again."""
    for function in vars(module).values():
        if hasattr(function, "cache_clear") and function.__module__ == module.__name__:
            function.cache_clear()


def candidates_of(module: Any, kernel: str, head_dim: int, causal: bool) -> tuple[Numbers, ...]:
    """What a module wants to be tried."""
    of_kernel: dict[Any, tuple[Numbers, ...]] = getattr(module, "CANDIDATES", {}).get(kernel, {})
    return of_kernel.get((head_dim, causal)) or of_kernel.get(head_dim, ())


def head_dims_of(module: Any, kernel: str) -> list[int]:
    """The head sizes for which a module has candidates."""
    keys = getattr(module, "CANDIDATES", {}).get(kernel, {})
    return sorted({key[0] if isinstance(key, tuple) else key for key in keys})


def measure(recorder: Recorder, module: Any, entry: Entry, rounds: int) -> dict[Numbers, float]:
    """Milliseconds of each candidate for an entry of the table; those that fail are left out."""
    _, kernel, _, head_dim, causal, short = entry
    length = LENGTHS[short]
    case = contestants.Case(TOKENS // length, HIDDEN // head_dim, length, length, head_dim, causal)
    inputs = case.inputs()
    recorder.torch.cuda.synchronize()
    former, running = tuning.TABLE.get(entry), {}
    for numbers in candidates_of(module, kernel, head_dim, causal):
        tuning.TABLE[entry] = numbers
        forget_choices(module)
        enter = partial(contestants.ours, recorder, module.NAME, case, inputs, kernel != "forward")
        made = contestants.entered(str(numbers), enter)
        if made is not None:
            running[numbers] = made
    tuning.TABLE.pop(entry, None)
    if former is not None:
        tuning.TABLE[entry] = former
    forget_choices(module)
    works = {str(numbers): made.backward or made.forward for numbers, made in running.items()}
    figures = recorder.medians(works, rounds)
    for made in running.values():
        made.close()
    return {numbers: figures[str(numbers)]["ms"] for numbers in running}


def entries(arguments: argparse.Namespace) -> Iterator[tuple[Any, Entry]]:
    """What is to be measured: modules, and entries with more than one candidate."""
    from minitorch.cuda import attention as cuda_attention
    from minitorch.kernels.gpu.runtime import compute_capability

    for module in cuda_attention.FLASH_ATTENTION:
        if arguments.modules and module.NAME not in arguments.modules:
            continue
        for kernel in arguments.kernels:
            for head_dim in head_dims_of(module, kernel):
                if arguments.head_dims and head_dim not in arguments.head_dims:
                    continue
                for causal in (False, True):
                    if len(candidates_of(module, kernel, head_dim, causal)) > 1:
                        for short in (False, True):
                            entry = (module.NAME, kernel, compute_capability(), head_dim, causal)
                            yield module, (*entry, short)


def main() -> None:
    arguments = parse_arguments()
    from minitorch.cuda import attention as cuda_attention

    require_gpu()
    wanted = list(entries(arguments))
    if not wanted:
        modules = [m.NAME for m in cuda_attention.FLASH_ATTENTION if hasattr(m, "CANDIDATES")]
        raise SystemExit(
            f"nothing to measure: modules with candidates are {', '.join(modules)}; their kernels "
            "and head sizes are in CANDIDATES; see --modules, --kernels and --head-dims"
        )
    begun = time.monotonic()
    recorder = Recorder()
    gc.collect()
    gc.freeze()  # each capture looks for garbage
    for module, entry in wanted:
        if time.monotonic() - begun > arguments.seconds:
            print(f"{entry}: no time left", flush=True)
            continue
        times = measure(recorder, module, entry, arguments.rounds)
        print(f"{entry}: { ({n: round(ms, 3) for n, ms in times.items()}) }", flush=True)
        if times and not arguments.dry_run:
            tuning.TABLE[entry] = min(times, key=lambda numbers: times[numbers])
            text = written(tuning.TABLE, TABLE_FILE.read_text(encoding="utf-8"))
            TABLE_FILE.write_text(text, encoding="utf-8")
    print(f"{time.monotonic() - begun:.1f} s", flush=True)


if __name__ == "__main__":
    main()
