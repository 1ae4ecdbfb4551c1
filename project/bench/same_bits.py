"""Whether two versions of the library compute the same bits: hashes of random calls of attention.

    PYTHONPATH=../old python project/bench/same_bits.py --out before.json
    python project/bench/same_bits.py --against before.json
    NUMBA_ENABLE_CUDASIM=1 python project/bench/same_bits.py --families simt mma --count 10 ...

The library is that of the checkout that PYTHONPATH names, or else of this one; its folder is
printed first. A seed draws the same calls in both. Each call is computed by one family of kernels,
outputs and gradients, and hashed; what differs is printed, with the sum of the absolute values of
each array. The families of a GPU need one, or the simulator, in which sizes are small.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import importlib
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

sys.path.append(str(Path(__file__).resolve().parents[2]))  # PYTHONPATH may name another checkout

import minitorch  # isort: skip

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # but `project` is that of this file

import numpy as np

from minitorch.kernels.gpu import runtime
from project.arguments import COUNT, SEED, parser_of, whole
from project.bench.versions import Comparison, add_options

Array = np.ndarray[Any, Any]
LAYOUTS = {"plain": (0, 1, 2, 3), "heads last": (0, 2, 1, 3), "transposed": (0, 1, 3, 2)}
HALF = ("float16", "bfloat16")


@dataclass(frozen=True)
class Family:
    """Kernels, and the calls that are drawn for them: dtypes, lengths below `longest`, head sizes.

    `few` kernels take up to 8 queries, and no dropout; they have no backward pass.
    """

    dtypes: tuple[str, ...]
    head_dims: tuple[int, ...] = (16, 40, 64, 96, 128, 192, 256)
    longest: int = 700
    most_heads: int = 2
    few: bool = False


FAMILIES = {
    "cpu": Family(("float32", "float64"), (8, 32, 64, 80), 260),
    "simt": Family(("float32", "float64", *HALF)),
    "mma": Family((*HALF, "tf32", "tf32x3")),
    "hopper": Family(HALF),
    "decode": Family(("float32", *HALF), few=True),
}
SIMULATED: dict[str, dict[str, Any]] = {
    "simt": {"longest": 24, "head_dims": (4, 7, 8)},
    "mma": {"longest": 24, "head_dims": (8, 16, 20)},
    "hopper": {"longest": 90, "head_dims": (64,), "most_heads": 1},
    "decode": {"longest": 40, "head_dims": (1, 4, 8)},
}


@dataclass(frozen=True)
class Call:
    """One call of attention.

    Args:
        query: shape, (B, H, N, D).
        key: shape.
        value: shape.
        dtype: of all three, or the precision of products in float32.
        layout: of `LAYOUTS`, how they lie in memory.
        mask: shape and kind, "bool" or "float"; None for no mask.
        options: what else is asked for.

    """

    query: tuple[int, ...]
    key: tuple[int, ...]
    value: tuple[int, ...]
    dtype: str
    layout: str
    mask: tuple[tuple[int, ...], str] | None
    options: dict[str, Any]


def draw(rng: np.random.Generator, family: Family) -> Call:
    """A random call that a family computes."""
    batch, group, heads = (int(n) for n in rng.integers(1, family.most_heads + 1, 3))
    nq = int(rng.integers(1, 9 if family.few else family.longest))
    nk = int(rng.integers(1, family.longest * (4 if family.few else 1)))
    head_dim = int(rng.choice(family.head_dims))
    value_dim = int(rng.choice(family.head_dims)) if rng.random() < 0.3 else head_dim
    mask = None
    if rng.random() < 0.5:
        shape = (batch, heads * group, nq, nk)
        mask = (
            tuple(n if rng.random() < 0.6 else 1 for n in shape),
            str(rng.choice(["bool", "float"])),
        )
    options: dict[str, Any] = {"is_causal": [False, True, "bottom-right"][rng.integers(3)]}
    if rng.random() < 0.3:
        left, right = rng.integers(-1, family.longest // 2, 2)
        options["window"] = (int(left), int(right))
    if rng.random() < 0.2:
        options["scale"] = float(rng.choice([0.0, -0.3, 1.0]))
    if rng.random() < 0.3 and not family.few:
        options["dropout_p"] = float(rng.choice([0.2, 0.5, 1.0]))
        options["seed"] = int(rng.integers(2**62))
    options["return_lse"] = bool(rng.random() < 0.5)
    return Call(
        (batch, heads * group, nq, head_dim),
        (batch, heads, nk, head_dim),
        (batch, heads, nk, value_dim),
        str(rng.choice(family.dtypes)),
        str(rng.choice(list(LAYOUTS))),
        mask,
        options,
    )


# ----- a call -----


def leaf(array: Array, dtype: str, layout: str, backend: Any) -> Any:
    """A tensor that wants a gradient, its dimensions in this order in memory."""
    order = LAYOUTS[layout]
    wide = np.float64 if dtype == "float64" else np.float32
    stored = np.ascontiguousarray(array.transpose(order)).astype(wide)
    tensor = minitorch.tensor(stored, backend=backend).to(dtype if dtype in HALF else wide)
    turned = tensor.permute(*order).detach()
    turned.requires_grad_(True)
    return turned


def computed(call: Call, backend: Any, backward: bool) -> list[Array]:
    """Outputs of a call, and gradients of a weighted sum of them, on inputs from one seed."""
    rng = np.random.default_rng(7)
    shapes = (call.query, call.key, call.value)
    leaves = [leaf(rng.standard_normal(s), call.dtype, call.layout, backend) for s in shapes]
    mask: Any = None
    if call.mask is not None:
        shape, kind = call.mask
        added = rng.standard_normal(shape)
        mask = added > -0.5
        if kind == "float":
            dtype = "float64" if call.dtype == "float64" else "float32"
            mask = leaf(np.where(added < -1.2, -np.inf, added), dtype, "plain", backend)
            leaves.append(mask)
    with precision(call.dtype), contextlib.nullcontext() if backward else minitorch.no_grad():
        result = leaves[0].flash_attention(
            leaves[1], leaves[2], attn_mask=mask, enable_gqa=True, **call.options
        )
        outputs = list(result) if isinstance(result, tuple) else [result]
        arrays = [output.to_numpy() for output in outputs]
        if backward:
            weighted_sum(outputs, rng).backward()
            arrays += [x.grad.to_numpy() for x in leaves if x.grad is not None]
    return arrays


def precision(dtype: str) -> Any:
    """Where float32 is asked for by the way its products are made: that one."""
    if dtype.startswith("tf32"):
        chosen: Any = dtype
        return minitorch.cuda.fp32_precision(chosen)
    return contextlib.nullcontext()


def weighted_sum(outputs: list[Any], rng: np.random.Generator) -> Any:
    """A scalar to differentiate; a logsumexp with rows that see no key is left out."""
    total: Any = 0.0
    for output in outputs:
        wide = output.to("float32") if output.dtype.name in HALF else output
        weights = rng.standard_normal(output.shape).astype(wide.dtype)
        if np.isfinite(wide.to_numpy()).all():
            total = total + (wide * minitorch.tensor(weights, backend=output.backend)).sum()
    return total


def digest(arrays: list[Array]) -> dict[str, Any]:
    """A hash of shapes, dtypes and bits; the sum of each array's absolute finite values."""
    hashed = hashlib.sha256()
    sums = []
    for array in arrays:
        hashed.update(f"{array.shape} {array.dtype.name}".encode())
        hashed.update(np.ascontiguousarray(array).tobytes())
        wide = array.astype(np.float64)
        sums.append(float(np.abs(wide[np.isfinite(wide)]).sum()))
    return {"hash": hashed.hexdigest()[:16], "sums": sums}


# ----- families -----


@contextlib.contextmanager
def only(name: str) -> Iterator[Any]:
    """The backend, with a family of kernels that computes all calls; others are taken away."""
    if name == "cpu":
        yield minitorch.TensorBackend(minitorch.FastOps)
        return
    attention: Any = importlib.import_module("minitorch.cuda.attention")
    chosen = tuple(module for module in attention.FLASH_ATTENTION if name == module.NAME)
    with contextlib.ExitStack() as changes:
        changes.enter_context(patch.object(attention, "FLASH_ATTENTION", chosen))
        if runtime.SIMULATED and name == "hopper":
            changes.enter_context(patch.object(attention, "compute_capability", lambda: (9, 0)))
            for module, function, small in small_hopper_blocks():
                changes.enter_context(patch.object(module, function, small))
        yield minitorch.TensorBackend(minitorch.CudaKernelOps)


def small_hopper_blocks() -> Iterator[tuple[Any, str, Any]]:
    """Modules and functions that choose sizes of Hopper's tiles, and functions in their places that
    choose small ones, for the simulator's sake.
    """
    from minitorch.kernels.flash_attention.hopper.tiles import Blocks

    for name, module in list(sys.modules.items()):
        if name.startswith("minitorch.kernels.flash_attention.hopper."):
            if hasattr(module, "forward_blocks"):
                yield module, "forward_blocks", lambda *_: Blocks(2, 64)
            if find := getattr(module, "backward_blocks", None):
                yield (
                    module,
                    "backward_blocks",
                    lambda *kind, find=find: tuple(
                        replace(blocks, own=64, passing=16) for blocks in find(*kind)
                    ),
                )


def parse_arguments(words: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = parser_of(__doc__)
    add, default = parser.add_argument, "default: %(default)s"
    add("--families", nargs="+", choices=list(FAMILIES), default=["cpu"], help=default)
    add("--count", type=whole(COUNT), default=60, help=f"calls of each; {default}")
    add("--seed", type=whole(SEED), default=0, help=f"of the calls; {default}")
    add_options(parser)
    return parser.parse_args(words)


def main(words: list[str] | None = None) -> int:
    """Compute, compare; returns the exit code."""
    arguments = parse_arguments(words)
    if set(arguments.families) - {"cpu"} and not minitorch.cuda.is_available():
        raise SystemExit("no GPU was found; NUMBA_ENABLE_CUDASIM=1 simulates one")
    comparison = Comparison(arguments.out, arguments.against)
    for name in arguments.families:
        family = FAMILIES[name]
        if runtime.SIMULATED and name in SIMULATED:
            family = replace(family, **SIMULATED[name])
        rng = np.random.default_rng((arguments.seed, *name.encode()))
        with only(name) as backend, np.errstate(all="ignore"):
            for number in range(arguments.count):
                call = draw(rng, family)
                try:
                    found = digest(computed(call, backend, backward=not family.few))
                except (
                    Exception
                ) as error:  # a version that refuses a call differs from one that does not
                    found = {"error": f"{type(error).__name__}: {error}"[:200]}
                comparison.add(f"{name} {number}: {call}", found)
    return comparison.finish()


if __name__ == "__main__":
    sys.exit(main())
