"""The sizes of the mma kernels' tiles: there are some that fit, for every problem and GPU."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest

from minitorch.dtypes import BFLOAT16
from minitorch.kernels.flash_attention import tuning
from minitorch.kernels.flash_attention.mma import launch as mma
from minitorch.kernels.flash_attention.mma.backward import backward_memory
from minitorch.kernels.flash_attention.mma.forward import forward_memory
from minitorch.kernels.flash_attention.mma.tiles import Kind, Tiles
from minitorch.kernels.flash_attention.problem import AttentionProblem
from minitorch.kernels.gpu import runtime
from project.bench.tune_attention import forget_choices

if runtime.SIMULATED:
    pytest.skip("the simulator has tiles of its own", allow_module_level=True)


@pytest.mark.parametrize("architecture", mma.MEMORY)
@pytest.mark.parametrize("columns", [1, 16, 64, 80, 96, 128, 176, 192, 256])
@pytest.mark.parametrize("numbers", ["float16", "tf32x3"])
def test_tiles_fit_every_architecture(
    architecture: tuple[int, int], columns: int, numbers: str
) -> None:
    turing = architecture < mma.FIRST_WITH_ALL
    if turing and numbers != "float16":
        pytest.skip("Turing's tensor cores take float16 alone")
    for value_columns in (1, columns, 256):
        for mask, dropout in (("none", False), ("float32", True)):
            kind = Kind(numbers, columns, value_columns, mask, dropout, True, turing)
            for_keys, for_queries = mma.backward_tiles(kind, architecture)
            sizes = (
                forward_memory(kind, mma.forward_tiles(kind, architecture)).size,
                backward_memory(kind, for_keys, True).size,
                backward_memory(kind, for_queries, False).size,
            )
            assert max(sizes) <= mma.MEMORY[architecture]


# ----- measured tiles -----

HOPPER = (9, 0)
CANDIDATES = [
    (kernel, columns, numbers)
    for kernel, by_columns in mma.CANDIDATES.items()
    for columns, candidates in by_columns.items()
    for numbers in candidates
]


@pytest.fixture
def table(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[tuning.Entry, tuning.Numbers]]:
    """An empty table of measured tiles."""
    table: dict[tuning.Entry, tuning.Numbers] = {}
    monkeypatch.setattr(tuning, "TABLE", table)
    forget_choices(mma)
    yield table
    forget_choices(mma)


def plain(columns: int) -> Kind:
    return Kind("float16", columns, columns, "none", False, False, False)


def chosen(kernel: str, kind: Kind, causal: bool = False, seqlen_q: int = 4096) -> Tiles:
    """The tiles on an H100."""
    forward = mma.forward_tiles(kind, HOPPER, causal, seqlen_q)
    for_keys, for_queries = mma.backward_tiles(kind, HOPPER, causal, seqlen_q)
    return {"forward": forward, "key_value": for_keys, "query": for_queries}[kernel]


@pytest.mark.parametrize(("kernel", "columns", "numbers"), CANDIDATES)
def test_a_measured_choice_is_for_plain_attention(
    table: dict[tuning.Entry, tuning.Numbers],
    kernel: str,
    columns: int,
    numbers: tuning.Numbers,
) -> None:
    kind = plain(columns)
    others = [
        replace(kind, **change)
        for change in ({"mask": "bool"}, {"dropout": True}, {"numbers": "tf32x3"})
    ]
    own = [chosen(kernel, other) for other in (kind, *others)]
    table["mma", kernel, HOPPER, columns, True, False] = numbers
    forget_choices(mma)
    assert chosen(kernel, kind, causal=True) == mma.tiles_of(numbers)
    assert chosen(kernel, replace(kind, numbers="bfloat16"), causal=True) == mma.tiles_of(numbers)
    assert chosen(kernel, kind) == own[0]
    assert chosen(kernel, kind, causal=True, seqlen_q=tuning.SHORT) == own[0]
    assert [chosen(kernel, other, causal=True) for other in others] == own[1:]


def test_the_own_choice_is_a_candidate(table: dict[tuning.Entry, tuning.Numbers]) -> None:
    for kernel, by_columns in mma.CANDIDATES.items():
        for columns, candidates in by_columns.items():
            assert chosen(kernel, plain(columns)) in map(mma.tiles_of, candidates)


def test_measured_tiles_that_do_not_fit_are_left_out(
    table: dict[tuning.Entry, tuning.Numbers],
) -> None:
    table["mma", "forward", (8, 0), 256, False, False] = (128, 64, 8, 2, False, 1, 1, True)
    assert mma.forward_tiles(plain(256), (8, 0)) == Tiles(128, 32, 8, 2)


def test_the_text_says_what_is_launched(table: dict[tuning.Entry, tuning.Numbers]) -> None:
    shape = (1, 2, 4096, 256)
    problem = AttentionProblem.of(shape, shape, shape, BFLOAT16, is_causal=True)
    table["mma", "forward", HOPPER, 256, True, False] = (128, 64, 8, 1, False, 1, 1, True)
    table["mma", "key_value", HOPPER, 256, True, False] = (64, 32, 4, 1, False, 1, 2)
    assert mma.tiles(problem, HOPPER) == "128 queries x 64 keys, 8 warps, one stage"
    assert mma.tiles(problem, HOPPER, backward=True) == (
        "dK and dV in 2 parts 64 keys x 32 queries, 4 warps, one stage; "
        "dQ 128 queries x 32 keys, 8 warps, two stages"
    )
