"""Score functions and block masks on a GPU: against no function, flex_attention, and tiles skipped.

    python project/bench/attention_variants_cuda.py
    python project/bench/attention_variants_cuda.py --parts variants --head-dims 128 --no-flex
    python project/bench/attention_variants_cuda.py --parts block_sparse --add

Parts:

    variants      one of each kind, 16,384 tokens, hidden size 2048, bfloat16
    block_sparse  random blocks at several densities, and bigbird with 65,536 tokens

How: as in attention_cuda.py: graphs of each pass, contestants in turn, the L2 cache overwritten
before each repeat, medians. PyTorch's is `torch.compile(flex_attention, dynamic=False)`. "Of a
tile" is time / dense time / the part of all blocks that is not empty. Beside each figure stands the
largest error of the last head against float64, for up to 16,384 tokens.

Writes attention_variants_cuda.json and a page beside it.
"""

from __future__ import annotations

import argparse
import gc
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # so that `project` is found

import numpy as np

from project.arguments import COUNT, parser_of, whole
from project.bench import pages
from project.bench.attention_contestants import Contestant, entered
from project.bench.machine import gpu_machine
from project.bench.timing import Recorder, require_gpu

HIDDEN, TOKENS, BLOCK, CAP, WINDOW = 2048, 16384, 128, 30.0, 1024
DENSITIES = (1.0, 0.5, 0.25, 0.1, 0.05)
LONG, LONG_HEADS, LONG_HEAD_DIM = 65536, 8, 64
CASES = (
    "none", "causal", "causal function", "identity", "window", "alibi", "softcap",
    "relative table", "table with gradient", "documents", "bigbird",
)  # fmt: skip
OF_SCORES = ("identity", "alibi", "softcap", "relative table", "table with gradient")
Cell = dict[str, Any]


@dataclass(frozen=True)
class Shape:
    """Of query, key, value: (1, heads, length, head_dim)."""

    heads: int
    length: int
    head_dim: int

    def inputs(self) -> list[Any]:
        """Query, key, value, gradient of the output."""
        import torch

        generator = torch.Generator("cuda").manual_seed(0)
        size = 1, self.heads, self.length, self.head_dim
        return [
            torch.randn(size, generator=generator, device="cuda").to(torch.bfloat16)
            for _ in range(4)
        ]


# ----- what is asked for -----


def tables_of(shape: Shape) -> dict[str, Any]:
    """Arrays that functions read, as PyTorch's on the GPU."""
    import torch

    rng = np.random.default_rng(1)
    slopes = 2.0 ** (-8 / shape.heads * np.arange(1, shape.heads + 1))
    relative = rng.normal(size=(shape.heads, 2 * shape.length - 1))
    ids = np.arange(shape.length) // (shape.length // 16)
    return {
        "slopes": torch.tensor(slopes, dtype=torch.float32, device="cuda"),
        "relative": torch.tensor(relative, dtype=torch.float32, device="cuda"),
        "ids": torch.tensor(ids, dtype=torch.int32, device="cuda"),
    }


def functions_of(name: str, shape: Shape, tables: dict[str, Any], np: Any) -> dict[str, Any]:
    """Score function and mask function of a case, in numpy's words or PyTorch's."""
    slopes, relative, ids = tables["slopes"], tables["relative"], tables["ids"]
    last = shape.length - 1
    causal = {"mask": lambda b, h, q, k: q >= k}
    found: dict[str, dict[str, Any]] = {
        "causal function": causal,
        "identity": {"score": lambda s, b, h, q, k: s},
        "window": {"mask": lambda b, h, q, k: (q >= k) & (q - k <= WINDOW)},
        "documents": {"mask": lambda b, h, q, k: (ids[q] == ids[k]) & (q >= k)},
        "softcap": {"score": lambda s, b, h, q, k: CAP * np.tanh(s / CAP)},
        "alibi": {"score": lambda s, b, h, q, k: s - slopes[h] * abs(q - k)},
        "relative table": {"score": lambda s, b, h, q, k: s + relative[h, q - k + last]},
    }
    found["table with gradient"] = found["relative table"]
    return {**(causal if name in OF_SCORES else {}), **found.get(name, {})}


def bigbird(length: int) -> Any:
    """Three blocks beside each query's, two global ones, three random ones."""
    from minitorch import attention_masks

    return attention_masks.bigbird(
        length, block_size=BLOCK, window=3, global_blocks=2, random_blocks=3, seed=0
    )


def random_mask(shape: Shape, density: float) -> Any:
    """Full blocks at random, of each row as many, the same for all heads."""
    from minitorch import BlockMask

    rows = shape.length // BLOCK
    count = max(1, round(density * rows))
    rng = np.random.default_rng(2)
    columns = np.stack([np.sort(rng.permutation(rows)[:count]) for _ in range(rows)])
    nothing = np.zeros((1, 1, rows), np.int32)
    padded = np.zeros((1, 1, rows, rows), np.int32)
    padded[0, 0, :, :count] = columns
    return BlockMask.from_kv_blocks(
        nothing, np.zeros_like(padded), nothing + count, padded, BLOCK_SIZE=BLOCK
    )


# ----- contestants -----


def ours(
    recorder: Recorder, shape: Shape, inputs: list[Any], functions: dict[str, Any], mask: Any,
    is_causal: bool,
) -> Contestant:  # fmt: skip
    """Our kernels, those that the launcher chooses."""
    import minitorch
    from minitorch import attention
    from minitorch.attention_variants import Variant

    q, k, v, do = (minitorch.as_tensor(x) for x in inputs)
    problem = attention.describe(q, k, v, is_causal=is_causal)
    asked = Variant.of(functions.get("score"), mask, problem)
    problem, given = asked.fused(problem)
    ops: Any = q.f.ops
    forward = recorder.our_graph(
        lambda: ops.flash_attention_forward(q, k, v, None, problem, given)
    )  # fmt: skip
    out, _, rows = forward.results
    return Contestant(
        forward,
        recorder.our_graph(
            lambda: tuple(
                x
                for x in ops.flash_attention_backward(
                    do, None, q, k, v, None, out, rows, problem, False, given
                )
                if x is not None
            )
        ),
    )


def flex(
    recorder: Recorder, shape: Shape, inputs: list[Any], functions: dict[str, Any], mask: Any
) -> Contestant:
    """PyTorch's flex_attention, compiled; the function of its mask, or our lists of blocks."""
    import torch
    from torch.nn.attention import flex_attention as flex

    q, k, v = (x.detach().requires_grad_(True) for x in inputs[:3])
    if mask is not None:
        lists = (
            torch.from_numpy(np.ascontiguousarray(x)).cuda()
            for x in (
                mask.kv_num_blocks, mask.kv_indices, mask.full_kv_num_blocks, mask.full_kv_indices,
            )
        )  # fmt: skip
        block_mask = flex.BlockMask.from_kv_blocks(*lists, BLOCK_SIZE=BLOCK)
    elif "mask" in functions:
        length = shape.length
        block_mask = flex.create_block_mask(functions["mask"], None, None, length, length)
    else:
        block_mask = None
    torch._dynamo.reset()  # after eight functions it would compile no more
    compiled = torch.compile(flex.flex_attention, dynamic=False)
    score = functions.get("score")
    forward = recorder.torch_graph(
        lambda: compiled(q, k, v, score_mod=score, block_mask=block_mask)
    )  # fmt: skip
    out = forward.results
    leaves = q, k, v
    return Contestant(
        forward,
        recorder.torch_graph(
            lambda: torch.autograd.grad(out, leaves, inputs[3], retain_graph=True)
        ),
    )  # fmt: skip


def our_functions(case: str, shape: Shape, tables: dict[str, Any]) -> dict[str, Any]:
    """The functions with our tensors in the place of PyTorch's."""
    import minitorch

    mine = {name: minitorch.as_tensor(tables[name]).detach() for name in ("slopes", "relative")}
    mine["ids"] = tables["ids"].cpu().numpy()  # of a block mask, which keeps a copy on the GPU
    if case == "table with gradient":
        mine["relative"].requires_grad_(True)
    return functions_of(case, shape, mine, np)


def dense_error(
    made: Contestant, inputs: list[Any], functions: dict[str, Any], mask: Any, causal: bool
) -> tuple[float, float]:
    """Largest errors of the output and of dQ, dK, dV, in the last head, against float64."""
    import torch

    q, k, v, do = (x[-1, -1].double() for x in inputs)
    heads, length = inputs[0].shape[1:3]
    i, j = torch.arange(length, device="cuda")[:, None], torch.arange(length, device="cuda")
    before = (q @ k.T * q.shape[-1] ** -0.5).requires_grad_(True)
    scores = before
    if "score" in functions:
        scores = functions["score"](scores, 0, heads - 1, i, j)
    seen = torch.ones_like(scores, dtype=torch.bool)
    if mask is not None:
        blocks = torch.from_numpy(mask.to_dense()[-1, -1]).cuda().bool()
        seen &= blocks.repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1)
    elif "mask" in functions:
        seen &= functions["mask"](0, heads - 1, i, j)
    if causal:
        seen &= i >= j
    weights = torch.softmax(scores.masked_fill(~seen, -torch.inf), -1)
    out = weights @ v
    (ds,) = torch.autograd.grad((out * do).sum(), before)
    scale = q.shape[-1] ** -0.5
    wanted = [out, ds @ k * scale, ds.T @ q * scale, weights.detach().T @ do]
    found = [made.forward.results[0], *(made.backward.results[:3] if made.backward else ())]
    errors = [
        float((torch.from_dlpack(x.detach())[-1, -1].double() - y).abs().max())
        for x, y in zip(found, wanted, strict=True)
    ]
    return errors[0], max(errors[1:])


# ----- cells -----


def measure(
    recorder: Recorder, name: str, shape: Shape, mask: Any, rounds: int, with_flex: bool
) -> Cell:
    """Times of a case: {"forward": {contestant: figure}, "backward": ...}."""
    inputs, tables = shape.inputs(), tables_of(shape)
    theirs, mine = functions_of(name, shape, tables, _torch()), our_functions(name, shape, tables)
    is_causal = name == "causal"
    our_mask = mine.get("mask") if mask is None else mask
    makers: dict[str, Callable[[], Contestant]] = {
        "ours": lambda: ours(
            recorder, shape, inputs, mine, our_mask, is_causal
        ),
    }  # fmt: skip
    if with_flex and name not in ("causal function", "table with gradient"):
        asked = {"mask": lambda b, h, q, k: q >= k} if is_causal else theirs
        makers["flex"] = lambda: flex(recorder, shape, inputs, asked, mask)
    running = {key: made for key, make in makers.items() if (made := entered(key, make))}
    cell: Cell = {"case": name, **vars(shape)}
    for what in ("forward", "backward"):
        works = {key: getattr(made, what) for key, made in running.items()}
        cell[what] = recorder.medians(works, rounds)
    if shape.length <= TOKENS and "ours" in running:
        errors = dense_error(running["ours"], inputs, theirs, mask, is_causal)
        cell["error"] = dict(zip(("forward", "backward"), errors, strict=True))
    for made in running.values():
        made.close()
    del running
    gc.collect()
    return cell


def _torch() -> Any:
    import torch

    return torch


def shown(cell: Cell) -> Cell:
    """The cell, after a line of output."""
    passes = (
        f"{what} " + ", ".join(f"{n} {x['ms']:.3f}" for n, x in cell[what].items())
        for what in ("forward", "backward")
    )
    error = cell.get("error", {})
    errors = ", ".join(f"{x:.1e}" for x in error.values())
    print(
        f"D {cell['head_dim']} N {cell['length']} {cell['case']}: {'; '.join(passes)} ms {errors}",
        flush=True,
    )
    return cell


def measure_variants(recorder: Recorder, arguments: argparse.Namespace) -> Iterator[Cell]:
    """One of each kind; scores' functions with a causal mask."""
    for head_dim in arguments.head_dims:
        shape = Shape(HIDDEN // head_dim, TOKENS, head_dim)
        for name in arguments.cases:
            mask = bigbird(TOKENS) if name == "bigbird" else None
            yield shown(measure(recorder, name, shape, mask, arguments.rounds, arguments.flex))


def measure_block_sparse(recorder: Recorder, arguments: argparse.Namespace) -> Iterator[Cell]:
    """Random blocks by density, and bigbird beside causal attention at 65,536 tokens."""
    for head_dim in () if arguments.long_only else arguments.head_dims:
        shape = Shape(HIDDEN // head_dim, TOKENS, head_dim)
        for density in DENSITIES:
            mask = None if density == 1.0 else random_mask(shape, density)
            cell = measure(recorder, "none", shape, mask, arguments.rounds, arguments.flex)
            found = 1.0 if mask is None else 1 - mask.sparsity() / 100
            yield shown({**cell, "case": f"density {density:.0%}", "density": found})
    shape = Shape(LONG_HEADS, LONG, LONG_HEAD_DIM)
    for name, mask in (("causal", None), ("bigbird", bigbird(LONG))):
        rounds = max(5, arguments.rounds // 3)
        yield shown(
            measure(recorder, name, shape, mask, rounds, arguments.flex and name == "bigbird")
        )


PARTS = {"variants": measure_variants, "block_sparse": measure_block_sparse}


# ----- the page -----


def ratio(cell: Cell, what: str, other: str = "flex") -> float | None:
    """Time of another over ours."""
    figures = cell[what]
    return figures[other]["ms"] / figures["ours"]["ms"] if {other, "ours"} <= set(figures) else None


def page(result: pages.Result) -> str:
    """The results as Markdown."""
    tables = []
    for part, title in (("variants", "A kind of each"), ("block_sparse", "Blocks skipped")):
        cells = result.get(part, [])
        if not cells:
            continue
        base = {
            (c["head_dim"], c["length"], c["case"]): c for c in cells
        }  # fmt: skip
        rows = [[*_row(c, base)] for c in cells]
        titles = ["D", "N", "", "forward, ms", "backward, ms", "over none", "flex / ours"]
        tables += [f"## {title}", pages.table(titles, rows)]
        ratios = [
            [x for c in cells if (x := ratio(c, what)) is not None]
            for what in ("forward", "backward")
        ]
        if all(ratios):
            means = " / ".join(f"{pages.geometric_mean(x):.2f}" for x in ratios)
            worst = " / ".join(f"{min(x):.2f}" for x in ratios)
            tables.append(
                f"flex_attention's time over ours, forward / backward (cells: {len(ratios[0])}): "
                f"geometric mean {means}, worst {worst}."
            )
    return pages.page(
        "Score functions and block masks on a GPU", pages.source(result, "bfloat16, batch 1"),
        "Over none: time over that of the same without the function, causal for functions of "
        "scores; of blocks skipped over the dense time times the density. Forward / backward.",
        *tables,
    )  # fmt: skip


def _row(cell: Cell, base: dict[Any, Cell]) -> Iterator[str]:
    name = cell["case"]
    yield from (str(cell["head_dim"]), str(cell["length"]), name)
    for what in ("forward", "backward"):
        yield pages.number(cell[what].get("ours", {}).get("ms"), "{:.3f}")
    other = {"causal function": "causal", "table with gradient": "relative table"}.get(
        name, "causal" if name in OF_SCORES else "none"
    )
    if "density" in cell:
        other = "density 100%"
    if cell["length"] == LONG:
        other = "causal"
    plain = base.get((cell["head_dim"], cell["length"], other))
    over = ["—", "—"]
    if plain is not None and plain is not cell:
        over = [
            f"{cell[w]['ours']['ms'] / plain[w]['ours']['ms'] / cell.get('density', 1):.2f}"
            for w in ("forward", "backward")
        ]
    yield " / ".join(over)
    yield " / ".join(pages.number(ratio(cell, w)) for w in ("forward", "backward"))


def parse_arguments(words: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = parser_of(__doc__)
    add, count = parser.add_argument, whole(COUNT)
    add("--parts", nargs="+", choices=list(PARTS), default=list(PARTS))
    add("--cases", nargs="+", choices=CASES, default=list(CASES), help="of the part variants")
    add("--head-dims", type=count, nargs="+", default=[64, 128], metavar="D")
    add("--rounds", type=count, default=12, help="default: %(default)s")
    add("--long-only", action="store_true", help="of the part block_sparse, 65,536 tokens alone")
    add("--no-flex", dest="flex", action="store_false", help="without PyTorch's")
    pages.add_out(parser, kept="other parts of the file")
    return parser.parse_args(words)


def main(words: list[str] | None = None) -> None:
    """Measure and write."""
    arguments = parse_arguments(words)
    require_gpu()
    path = arguments.out / "attention_variants_cuda.json"
    result = pages.former(arguments, path, page)
    before = [result["command"]] if result else []
    result |= {
        "machine": gpu_machine("numpy", "numba-cuda", "torch"),
        "command": "; ".join([*before, pages.command(__file__, words)]),
        "rounds": arguments.rounds,
    }
    recorder = Recorder()
    gc.collect()
    gc.freeze()  # each capture looks for garbage
    for part in arguments.parts:
        result[part] = []
        for cell in PARTS[part](recorder, arguments):
            result[part].append(cell)
            pages.write(result, path, None)
    pages.write(result, path, page)


if __name__ == "__main__":
    main()
