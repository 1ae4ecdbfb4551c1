"""The attention benchmark's page and pictures: bars met and missed, rates by length."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from project.bench import pages

PASSES = {"forward": 1.0, "backward": 2.5}  # operations, in those of a forward pass
COLORS = {"hopper": "C3", "mma": "C1", "simt": "C2", "flash": "C0", "cudnn": "C4"}
LABELS = {
    "hopper": "hopper (ours)",
    "mma": "mma (ours)",
    "simt": "SIMT (ours)",
    "flash": "PyTorch, flash",
    "cudnn": "PyTorch, cuDNN",
    "efficient": "PyTorch, memory-efficient",
    "standard": "standard (PyTorch)",
    "own standard": "standard (ours)",
    "triton": "Triton (flex_attention)",
    "ours": "ours",
}
OTHERS = ("flash", "cudnn", "efficient", "standard", "own standard", "triton")
Cell = dict[str, Any]


def tflops(cell: Cell, what: str, name: str) -> float | None:
    """Useful 10**12 operations a second, as papers count them; None where it did not run."""
    figure = cell[what].get(name)
    if figure is None:
        return None
    pairs = cell["seqlen_q"] * cell["seqlen_k"] / (2 if cell["causal"] else 1)
    work = 4.0 * cell["batch"] * cell["heads"] * pairs * cell["head_dim"] * PASSES[what]
    rate: float = work / figure["ms"] / 1e9
    return rate


def speedup(cell: Cell, what: str, ours: str, other: str) -> float | None:
    """Time of another over ours, of a pass or of "both"; None where one of them did not run."""
    passes = [cell[name] for name in (PASSES if what == "both" else (what,))]
    if not all(ours in times and other in times for times in passes):
        return None
    theirs, mine = (sum(times[name]["ms"] for times in passes) for name in (other, ours))
    ratio: float = theirs / mine
    return ratio


# ----- bars -----


@dataclass(frozen=True)
class Bar:
    """Something that was to be reached.

    Args:
        what: in words.
        bar: that every figure is to reach, or their geometric mean; None for an aim alone.
        aim: that would be better still.
        figures: measured, by the cell they belong to.
        by_mean: the geometric mean counts.
        at_most: figures are to stay below.

    """

    what: str
    bar: float | None
    aim: float | None
    figures: dict[str, float]
    by_mean: bool = False
    at_most: bool = False

    @property
    def worst(self) -> tuple[str, float]:
        """The cell farthest from the bar, and its figure."""
        choose = max if self.at_most else min
        return choose(self.figures.items(), key=lambda item: item[1])

    @property
    def mean(self) -> float:
        """Geometric, of all figures."""
        return pages.geometric_mean(list(self.figures.values()))

    def verdict(self) -> str:
        """ "met" or "missed", "-" where there is no bar."""
        if self.bar is None:
            return "-"
        reached = self.mean if self.by_mean else self.worst[1]
        met = reached <= self.bar if self.at_most else reached >= self.bar
        return "met" if met else "**missed**"


def place(cell: Cell) -> str:
    """A cell's name in the table of bars."""
    causal = ", causal" if cell["causal"] else ""
    dtype = f", {cell['dtype']}" if cell["dtype"] == "bfloat16" else ""
    return f"D {cell['head_dim']}, N {cell['seqlen_k']}{causal}{dtype}"


def ratios(
    cells: list[Cell], what: str, ours: str, other: str, head_dims: tuple[int, ...] = (64, 128)
) -> dict[str, float]:
    """Speedups of the cells with these head sizes in which both ran."""
    return {
        place(cell): ratio
        for cell in cells
        if cell["head_dim"] in head_dims and (ratio := speedup(cell, what, ours, other)) is not None
    }


def bars(result: dict[str, Any]) -> list[Bar]:
    """All bars of which there are figures."""
    found = [*grid_bars(result), *other_bars(result)]
    return [bar for bar in found if bar.figures]


def grid_bars(result: dict[str, Any]) -> Iterator[Bar]:
    """Of the grid of lengths, head sizes and causal masks."""
    cells, every = result.get("grid", []), (64, 128, 256)
    flash, cudnn = "over PyTorch's flash backend", "over cuDNN"
    forward = ratios(cells, "forward", "hopper", "cudnn")
    yield Bar(f"hopper forward {flash}", 1.2, 2.0, ratios(cells, "forward", "hopper", "flash"))
    yield Bar(f"hopper forward {cudnn}", 0.9, None, forward)
    yield Bar(f"hopper forward {cudnn}, geometric mean", 1.0, 1.05, forward, by_mean=True)
    products = result.get("ceilings", {}).get("matmul_tflops", {})
    shares = {
        place(cell): rate / products.get(cell["dtype"], math.nan)
        for cell in cells
        if cell["head_dim"] == 128
        and cell["seqlen_k"] >= 8192
        and (rate := tflops(cell, "forward", "hopper")) is not None
    }
    yield Bar("hopper forward, share of the matrix product's rate", None, 0.85, shares)
    yield Bar(f"hopper backward {flash}", 1.0, 1.5, ratios(cells, "backward", "hopper", "flash"))
    yield Bar(f"hopper backward {cudnn}", 0.7, 1.0, ratios(cells, "backward", "hopper", "cudnn"))
    for what, bar in (("forward", 1.2), ("backward", None)):
        large = ratios(cells, what, "hopper", "flash", (256,))
        yield Bar(f"hopper {what} {flash}, D = 256", bar, None, large)
    for what, bar in (("forward", 0.9), ("backward", 0.8)):
        yield Bar(f"mma {what} {flash}", bar, 1.0, ratios(cells, what, "mma", "flash", every))


def other_bars(result: dict[str, Any]) -> Iterator[Bar]:
    """Of the other parts."""
    dropout = result.get("dropout", [])
    for what in PASSES:
        figures = ratios(dropout, what, "hopper", "flash")
        yield Bar(f"hopper {what} over PyTorch's flash backend, dropout 0.2", 1.2, 1.5, figures)
    published = ratios(result.get("published", []), "forward", "ours", "standard")
    yield Bar("the published experiment, over standard attention", 3.0, 4.5, published)
    for what, title in (("forward", "forward"), ("both", "forward + backward")):
        for other, bar in (("own standard", 1.2), ("efficient", 0.8)):
            figures = ratios(result.get("float32", []), what, "ieee", other)
            by_mean = other == "own standard"
            name = f"SIMT {title} in float32, over {LABELS[other]}"
            yield Bar(name + ", geometric mean" * by_mean, bar, None, figures, by_mean=by_mean)
    copy = result.get("ceilings", {}).get("copy_tb_per_s", math.nan)
    shares = {
        f"D {cell['head_dim']}, {cell['dtype']}": decode_rate(cell, "ours") / copy
        for cell in result.get("decode", [])
        if "ours" in cell["forward"]
    }
    yield Bar("decode, share of the rate of a copy", 0.7, 0.9, shares)
    for state, most in (("cold", 10.0), ("warm", 1.0)):
        seconds = {
            f"{row['kernel']} forward": row[state]["forward"]
            for row in result.get("compile", [])
            if state in row
        }
        title = f"first use of a kernel, {state} cache, seconds"
        yield Bar(title, most, None, seconds, at_most=True)


def decode_rate(cell: Cell, name: str) -> float:
    """10**12 bytes a second: keys and values read once."""
    itemsize = 4 if cell["dtype"] == "float32" else 2
    elements = 2 * cell["batch"] * cell["heads"] * cell["seqlen_k"] * cell["head_dim"]
    rate: float = elements * itemsize / cell["forward"][name]["ms"] / 1e9
    return rate


# ----- the page -----


def bar_table(result: dict[str, Any]) -> str:
    """The table of bars."""
    rows = []
    for bar in bars(result):
        cell, worst = bar.worst
        sign = "≤" if bar.at_most else "≥"
        rows.append(
            [
                bar.what,
                "-" if bar.bar is None else f"{sign} {bar.bar:g}",
                pages.number(bar.mean),
                f"{worst:.2f} ({cell})",
                pages.number(bar.aim, "{:g}"),
                bar.verdict(),
            ]
        )
    return pages.table(["", "bar", "geometric mean", "worst cell", "aim", ""], rows)


def cell_table(cells: list[Cell], what: str) -> str:
    """A row for each cell: rates of all contestants, ours over PyTorch's, errors. "" of none."""
    ran: set[str] = {name for cell in cells for name in cell[what]}
    names = [name for name in LABELS if name in ran] + sorted(ran - set(LABELS))
    own = next((name for name in ("hopper", "ours", "mma", "ieee") if name in ran), "simt")
    others = [name for name in OTHERS if name in ran]
    titles: list[str] = ["D", "N", "causal", *[LABELS.get(name, name) for name in names]]
    titles += [f"{LABELS.get(own, own)} over {LABELS[n]}" for n in others]
    rows: list[list[Any]] = []
    for cell in cells:
        row = [cell["head_dim"], cell["seqlen_k"], cell["causal"]]
        for name in names:
            error = cell[what].get(name, {}).get("error")
            shown = pages.number(tflops(cell, what, name), "{:.0f}")
            row.append(shown if error is None else f"{shown} ({error:.0e})")
        row += [pages.number(speedup(cell, what, own, n)) for n in others]
        rows.append(row)
    return pages.table(titles, rows) if ran else ""


def decode_table(cells: list[Cell], copy: float) -> str:
    """A row for each cell of decoding."""
    names = [name for name in LABELS if any(name in cell["forward"] for cell in cells)]
    titles = ["D", "dtype", *(f"{LABELS[n]}, TB/s" for n in names), "ours over a copy"]
    rows = []
    for cell in cells:
        rates = {n: decode_rate(cell, n) if n in cell["forward"] else None for n in names}
        row = [cell["head_dim"], cell["dtype"], *(pages.number(r) for r in rates.values())]
        rows.append([*row, pages.number((rates.get("ours") or math.nan) / copy)])
    return pages.table(titles, rows)


def memory_table(rows: list[dict[str, Any]]) -> str:
    """Peak memory by length."""
    shown = [
        [
            str(r["length"]),
            *(pages.number(r[n], "{:.0f}") for n in ("flash_attention", "attention")),
        ]
        for r in rows
    ]
    return pages.table(["N", "flash, MiB", "standard, MiB"], shown)


def compile_table(rows: list[dict[str, Any]]) -> str:
    """Seconds of first calls."""
    shown = [
        [row["kernel"]]
        + [
            pages.number(row.get(state, {}).get(what))
            for state in ("cold", "warm")
            for what in PASSES
        ]
        for row in rows
    ]
    titles = [f"{what}, {state}" for state in ("cold", "warm") for what in PASSES]
    return pages.table(["kernels", *titles], shown)


def sections(result: dict[str, Any]) -> Iterator[str]:
    """Of each part that was measured: what it is, and its table."""
    copy = result.get("ceilings", {}).get("copy_tb_per_s", math.nan)
    count = "TFLOP/s, in parentheses the largest error of one head against float64"
    for part, title in (
        ("grid", f"hidden size 2048, 16,384 tokens: {count}"),
        ("dropout", "the same with dropout 0.2: TFLOP/s"),
        ("published", "32 x 8 heads, N 2048, D 64, dropout 0.2: TFLOP/s"),
        ("float32", f"16 heads, 16,384 tokens: {count}"),
        ("triton", f"beside `flex_attention`, compiled by Triton: {count}"),
    ):
        cells = result.get(part, [])
        for dtype, what in product(dict.fromkeys(cell["dtype"] for cell in cells), PASSES):
            if found := cell_table([cell for cell in cells if cell["dtype"] == dtype], what):
                yield from (f"{what.capitalize()}, {dtype}, {title}.", found)
    others: tuple[tuple[str, str, Callable[[Any], str]], ...] = (
        ("decode", "Decoding, one query against 65,536 keys, 32 heads:",
         lambda cells: decode_table(cells, copy)),
        ("memory", "Peak memory of forward + backward beyond the inputs, 8 heads, D 64, float32:",
         memory_table),
        ("compile", "Seconds of a process's first call, all kernels of the pass:", compile_table),
    )  # fmt: skip
    for part, title, table_of in others:
        if result.get(part):
            yield from (title, table_of(result[part]))


def page(result: pages.Result) -> str:
    """The results as Markdown."""
    ceilings = result.get("ceilings", {})
    products = " and ".join(
        f"{tflops:.0f} TFLOP/s in {dtype}"
        for dtype, tflops in ceilings.get("matmul_tflops", {}).items()
    )
    return pages.page(
        "FlashAttention on the GPU",
        pages.source(
            result,
            f"Seed {result['seed']}, median of {result['rounds']}, each pass a CUDA graph, "
            "L2 flushed",
            f"A large matrix product runs at {products or '-'}, a copy at "
            f"{pages.number(ceilings.get('copy_tb_per_s'))} TB/s",
        ),
        "Figures are times of others over ours unless it says otherwise; a bar holds for the worst "
        "cell:",
        bar_table(result),
        *sections(result),
    )


# ----- pictures -----


def draw(result: dict[str, Any], folder: Path) -> list[Path]:
    """TFLOP/s by length in float16, one picture for each head size and pass; the files' paths."""
    cells = [cell for cell in result.get("grid", []) if cell["dtype"] == "float16"]
    made = []
    for head_dim in sorted({cell["head_dim"] for cell in cells}):
        chosen = [cell for cell in cells if cell["head_dim"] == head_dim]
        for what in PASSES:
            path = folder / f"attention_cuda_d{head_dim}_{what}.png"
            draw_one(result, chosen, what, path)
            made.append(path)
    return made


def draw_one(result: dict[str, Any], cells: list[Cell], what: str, path: Path) -> None:
    """Left without, right with a causal mask."""
    from matplotlib.figure import Figure  # without pyplot: no window system is looked for

    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    ceiling = result.get("ceilings", {}).get("matmul_tflops", {}).get(cells[0]["dtype"])
    for axes, causal in ((left, False), (right, True)):
        half = [cell for cell in cells if cell["causal"] is causal]
        for name, color in COLORS.items():
            points = [(c["seqlen_k"], rate) for c in half if (rate := tflops(c, what, name))]
            if points:
                axes.plot(*zip(*sorted(points), strict=True), "o-", color=color, label=LABELS[name])
        if ceiling:
            axes.axhline(ceiling, color="gray", linestyle=":", label="matrix product 8192³")
        lengths = sorted({cell["seqlen_k"] for cell in half})
        axes.set_xscale("log", base=2)
        axes.set_xticks(lengths, [f"{n // 1024}k" if n >= 1024 else str(n) for n in lengths])
        axes.set(xlabel="N", title="causal" if causal else "not causal")
        axes.grid(alpha=0.3)
    left.set(ylabel="TFLOP/s", ylim=(0, None))
    left.legend(fontsize=7)
    first = cells[0]
    figure.suptitle(
        f"{what} pass, D = {first['head_dim']}, {first['dtype']}, {result['machine']['gpu']}"
    )
    figure.savefig(path, dpi=110)
