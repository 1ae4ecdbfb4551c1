"""Which kernel computes which attention problem: data, which no GPU is needed for."""

from __future__ import annotations

import itertools
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import minitorch
from minitorch import attention
from minitorch.cuda import attention as cuda_attention
from minitorch.dtypes import BFLOAT16
from minitorch.kernels.flash_attention.problem import AttentionProblem
from minitorch.kernels.gpu.runtime import is_available

ARCHITECTURES = ((7, 0), (7, 5), (8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0))
DTYPES = ("float32", "float64", "float16", "bfloat16")
NAMES = [module.NAME for module in cuda_attention.FLASH_ATTENTION]
MASK = np.zeros((64, 64), np.float32)


def problem(
    dtype: str = "float16", columns: int = 64, rows: int = 64, **arguments: Any
) -> AttentionProblem:
    shape = (2, 4, rows, columns)
    kind = BFLOAT16 if dtype == "bfloat16" else np.dtype(dtype)
    return AttentionProblem.of(shape, (2, 4, 64, columns), (2, 4, 64, columns), kind, **arguments)


ARGUMENTS: tuple[dict[str, Any], ...] = (
    {},
    {"is_causal": True},
    {"window": (8, 8)},
    {"dropout_p": 0.2},
    {"attn_mask": MASK},
    {"attn_mask": MASK > 0},
    {"columns": 59},
    {"columns": 256},
    {"rows": 1},
    {"fp32_precision": "tf32"},
    {"fp32_precision": "tf32x3"},
)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_problem_has_a_kernel_on_every_gpu(dtype: str, architecture: Any) -> None:
    """Both passes; each one before the chosen one says why not, in words."""
    for arguments, backward in itertools.product(ARGUMENTS, (False, True)):
        described = problem(dtype, **{"rows": 64, **arguments}) if arguments else problem(dtype)
        if arguments.get("rows") == 1 and "attn_mask" in arguments:
            continue
        choice = cuda_attention.choose(described, architecture, backward)
        assert hasattr(choice.module, "backward") or not backward
        assert [name for name, _ in choice.passed_over] == NAMES[: len(choice.passed_over)]
        assert all(reason for _, reason in choice.passed_over)


def chosen(architecture: Any, backward: bool = False, **arguments: Any) -> str:
    found: str = cuda_attention.choose(problem(**arguments), architecture, backward).module.NAME
    return found


def test_choices() -> None:
    """The kernels that are meant for a problem get it."""
    assert chosen((9, 0), rows=1) == "decode"
    assert chosen((9, 0), backward=True, rows=1) != "decode"
    assert chosen((9, 0), rows=1, dropout_p=0.1) != "decode"
    for architecture in ARCHITECTURES:
        assert chosen(architecture, dtype="float64") == "simt"
        assert chosen(architecture, dtype="float32") == "simt"
    assert chosen((7, 0)) == "simt"
    assert chosen((7, 5)) == "mma"
    assert chosen((7, 5), dtype="bfloat16") == "simt"
    assert chosen((8, 0), dtype="float32", fp32_precision="tf32") == "mma"
    for dtype in ("float16", "bfloat16"):
        assert chosen((8, 0), dtype=dtype) == "mma"
        assert chosen((9, 0), dtype=dtype) == "hopper"
        assert chosen((10, 0), dtype=dtype) == "mma"


def test_the_first_that_can_is_taken_for_each_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    """A module may compute forward passes alone."""

    def module(name: str, reason: str | None, **more: Any) -> Any:
        return SimpleNamespace(NAME=name, why_not=lambda *_: reason, **more)

    passes: dict[str, Any] = {"forward": print, "backward": print}
    modules = (
        module("a", "a is too old", **passes),
        module("b", None, forward=print),
        module("c", None, **passes),
    )
    monkeypatch.setattr(cuda_attention, "FLASH_ATTENTION", modules)
    assert chosen((9, 0)) == "b"
    choice = cuda_attention.choose(problem(), (9, 0), backward=True)
    assert choice.module.NAME == "c"
    assert choice.passed_over == (
        ("a", "a is too old"),
        ("b", "it has a forward pass alone"),
    )


def test_no_kernel_for_larger_heads() -> None:
    with pytest.raises(ValueError, match=r"head sizes up to 256 \(simt\), got query.*257"):
        chosen((9, 0), columns=257)


# ----- explain -----


def test_explain_without_a_gpu() -> None:
    q, k = np.zeros((2, 4, 1, 64), np.float16), np.zeros((2, 4, 4096, 64), np.float16)
    found = minitorch.cuda.explain(q, k, k, is_causal="bottom-right", architecture="sm_90a")
    assert found.architecture == (9, 0)
    assert found.forward.kernel == "decode"
    assert ("decode", "it has a forward pass alone") in found.backward.passed_over
    text = str(found)
    assert "query i sees keys" in text
    assert "query (2, 4, 1, 64)" in text
    assert "compute capability 9.0" in text
    assert "not decode: it has a forward pass alone" in text
    assert found.forward.tiles == "1 query x 256 of 4096 keys in a block"
    assert found.forward.schedules == {}, "splits of the keys, not tiles of scores"


@pytest.mark.parametrize(("dtype", "name"), [("float16", "hopper"), ("float32", "simt")])
def test_explain_says_which_tiles_are_visited(dtype: str, name: str) -> None:
    q = np.zeros((1, 1000, 64), dtype)
    found = minitorch.cuda.explain(q, q, q, is_causal=True, architecture="sm_90")
    assert found.forward.kernel == name
    (output,), (keys, queries) = (x.schedules.values() for x in (found.forward, found.backward))
    for schedule in (output, keys, queries):
        assert schedule.counts().skipped > 0
        assert list(schedule.key_tiles(0)) == list(range(-(-schedule.block_m // schedule.block_n)))
    assert f"each head's output: {output.counts()}\n" in str(found)
    assert f"each head's dK and dV: {keys.counts()}; dQ: {queries.counts()}\n" in str(found)


def test_explain_takes_tensors_and_arrays_of_other_libraries() -> None:
    a = minitorch.rand((2, 4, 16, 8), minitorch.TensorBackend(minitorch.FastOps))
    with minitorch.cuda.fp32_precision("tf32"):
        found = minitorch.cuda.explain(a, a, a, architecture=(8, 0), dropout_p=0.5)
    assert found.problem.dropout_p == 0.5
    torch = pytest.importorskip("torch")
    b = torch.zeros(2, 4, 16, 8, dtype=torch.bfloat16)
    mask = torch.zeros(16, 16, dtype=torch.bfloat16)
    found = minitorch.cuda.explain(b, b, b, mask, architecture="sm_89")
    assert found.problem.mask_kind == "bfloat16" and found.problem.additive_mask
    assert found.problem.dtype == BFLOAT16
    assert "additive mask" in str(found)


def test_explain_names_inputs_that_are_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    module = SimpleNamespace(NAME="x", why_not=lambda *_: None, ROW_ALIGNMENT=16, backward=print)
    monkeypatch.setattr(cuda_attention, "FLASH_ATTENTION", (module,))
    q = np.zeros((2, 8, 4, 64), np.float16)
    k, v = np.zeros((2, 4, 8, 68), np.float16)[..., :64], np.zeros((2, 4, 64, 8), np.float16)
    found = minitorch.cuda.explain(q.transpose(0, 2, 1, 3), k, v.mT, architecture="sm_80")
    assert found.forward.copied == ("key", "value")
    assert "key and value will be copied" in str(found)


def test_explain_refuses_what_attention_refuses() -> None:
    q, k = np.zeros((4, 64), np.float16), np.zeros((4, 32), np.float16)
    with pytest.raises(ValueError, match="head size"):
        minitorch.cuda.explain(q, k, k, architecture="sm_80")
    with pytest.raises(TypeError, match="one dtype"):
        minitorch.cuda.explain(q, q.astype(np.float32), q, architecture="sm_80")
    with pytest.raises(TypeError, match="key must be"):
        minitorch.cuda.explain(q, [1.0], q, architecture="sm_80")
    with pytest.raises(ValueError, match="sm_80"):
        minitorch.cuda.explain(q, q, q, architecture="ampere")
    if not is_available():
        with pytest.raises(RuntimeError, match="architecture="):
            minitorch.cuda.explain(q, q, q)


@pytest.mark.parametrize(
    "wrong", ["sm_9", "sm_90b", "8.0", "sm_00", 80, (8,), (8, 0, 0), (9.5, 0), (-8, 0)]
)
def test_explain_refuses_what_is_no_architecture(wrong: Any) -> None:
    q = np.zeros((4, 64), np.float16)
    with pytest.raises(ValueError, match=r"architecture is .*; wanted one such as 'sm_80' or"):
        minitorch.cuda.explain(q, q, q, architecture=wrong)


def test_explain_says_which_keys_a_query_sees() -> None:
    q = np.zeros((4, 64), np.float16)
    for arguments, words in (
        ({"is_causal": True}, ", query i sees keys to i+0;"),
        ({"window": (2, None)}, ", query i sees keys from i-2;"),
        ({"window": (2, 1)}, ", query i sees keys from i-2 to i+1;"),
        ({}, "float16;"),
    ):
        assert words in str(minitorch.cuda.explain(q, q, q, **arguments, architecture=(8, 0)))


# ----- precision of float32 -----


def test_explain_names_functions_and_counts_the_tiles_of_lists() -> None:
    q = np.zeros((2, 4, 1024, 64), np.float16)
    mask = minitorch.attention_masks.bigbird(1024, 64, heads=4, seed=1)
    cap: Any = minitorch.score_mods.softcap(30.0)
    found = minitorch.cuda.explain(
        q, q, q, score_mod=cap, block_mask=mask, is_causal=True, architecture="sm_90"
    )
    text = str(found)
    assert "score_mod `softcap.softcap_mod`" in text and "as a mask_mod" not in text
    assert f"block_mask `blocks`: blocks of 64 x 64, {mask.sparsity():.1f}% skipped" in text
    allowed = mask.to_mask()[0] & np.tri(1024, dtype=bool)
    for each in (found.forward, found.backward):
        for name, lists in each.lists.items():
            m, n = (1024 // size for size in (lists.rows, lists.columns))
            tiles = allowed.reshape(4, lists.rows, m, lists.columns, n)
            visited, whole = (x.sum() for x in (tiles.any((2, 4)), tiles.all((2, 4))))
            wanted = f"4 heads' {name}: {visited} tiles visited ({whole} whole, "
            wanted += f"{visited - whole} partial), {lists.rows * lists.columns * 4 - visited} skip"
            assert wanted in text
    assert found.forward.lists and found.backward.lists


def test_explain_says_what_could_be_better() -> None:
    q = np.zeros((2, 4, 256, 64), np.float16)

    def hides(score: Any, b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        return np.where(q_idx >= kv_idx, score, -np.inf) + 1.0

    def cuts(score: Any, b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        return np.where(score > 3, score, -np.inf)

    def text(**options: Any) -> str:
        return str(minitorch.cuda.explain(q, q, q, architecture="sm_80", **options))

    assert "it returns -inf by position: as a mask_mod" in text(score_mod=hides)
    assert "by position" not in text(score_mod=cuts)
    window = text(block_mask=minitorch.attention_masks.sliding_window(17))
    assert "block_mask `sliding_window.window_mask`: a band" in window
    assert "query i sees keys from i-17 to i+0" in window
    assert "each head's" in window


def test_fp32_precision() -> None:
    """It is asked for, set, and put back; a problem remembers it."""
    a = minitorch.rand((2, 4), minitorch.TensorBackend(minitorch.FastOps))
    assert minitorch.cuda.fp32_precision() == "ieee"
    with minitorch.cuda.fp32_precision("tf32"):
        assert minitorch.cuda.fp32_precision() == "tf32"
        with minitorch.cuda.fp32_precision("tf32x3"):
            assert attention.describe(a, a, a).fp32_precision == "tf32x3"
        assert attention.describe(a, a, a).fp32_precision == "tf32"
    assert attention.describe(a, a, a).fp32_precision == "ieee"
    minitorch.cuda.fp32_precision("tf32x3")
    assert minitorch.cuda.fp32_precision() == "tf32x3"
    minitorch.cuda.fp32_precision("ieee")


def test_fp32_precision_holds_in_every_block_of_one_context() -> None:
    context = minitorch.cuda.fp32_precision("tf32")
    for _ in range(2):
        with context:
            assert minitorch.cuda.fp32_precision() == "tf32"
        assert minitorch.cuda.fp32_precision() == "ieee"


@pytest.mark.parametrize("name", ["tf16", "", "TF32", 32])
def test_fp32_precision_refuses(name: Any) -> None:
    with pytest.raises(ValueError, match="wanted one of 'ieee', 'tf32', 'tf32x3'"):
        minitorch.cuda.fp32_precision(name)
    with pytest.raises(ValueError, match="fp32_precision"):
        problem(fp32_precision=name)
    assert minitorch.cuda.fp32_precision() == "ieee"
