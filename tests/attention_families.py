"""Attention's families, each a row: how it is called, and with which sizes it is tested."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import strategies as st

import minitorch
from minitorch.captured_arrays import numbers_of
from minitorch.cuda import attention as cuda_attention
from minitorch.kernels.flash_attention.cpu import launch as cpu
from minitorch.kernels.flash_attention.decode import launch as decode
from minitorch.kernels.flash_attention.hopper import backward_launch as hopper_backward
from minitorch.kernels.flash_attention.hopper import launch as hopper
from minitorch.kernels.flash_attention.hopper.tiles import Blocks
from minitorch.kernels.flash_attention.mma import launch as mma
from minitorch.kernels.flash_attention.scores import mask_numbers
from minitorch.kernels.flash_attention.simt import launch as simt
from minitorch.kernels.flash_attention.standard import (
    standard_attention,
    standard_attention_backward,
)
from minitorch.kernels.gpu.runtime import SIMULATED, compute_capability
from tests.attention import FEATURES
from tests.attention_calls import Call, Family, Results, place_on_cpu, real_dtype
from tests.attention_functions import COMBINATIONS, FUNCTION_FEATURES
from tests.cuda.attention import by_cuda, on_gpu

# ----- families of the CPU -----

SMALL_TILES = cpu.TileSizes(32, 32, 32, 32)


def by_cpu(call: Call, tiles: cpu.TileSizes | None = None) -> Results:
    """FlashAttention's kernels on the CPU; short sequences in small tiles, so in several."""
    problem, mask, (q, k, v, do) = call.problem, call.mask, call.tensors
    if tiles is None and max(problem.seqlen_q, problem.seqlen_k) <= 80:
        tiles = SMALL_TILES
    variant = call.variant.each(numbers_of)
    out, lse, rows, _ = cpu.forward_with_count(problem, q, k, v, mask, tiles, variant)
    gradients = cpu.backward(
        problem, q, k, v, mask, out, rows, do, call.grad_logsumexp, call.wants_mask, variant,
        tiles,
    )  # fmt: skip
    return out, lse, *gradients


def by_standard(call: Call) -> Results:
    """Standard attention in numpy, which backends without fused operations compute."""
    problem, mask, (q, k, v, do) = call.problem, call.mask, call.tensors
    variant = call.variant.each(numbers_of)
    out, lse, rows = standard_attention(problem, q, k, v, mask, variant)
    gradients = standard_attention_backward(
        problem, q, k, v, mask, out, rows, do, call.grad_logsumexp, call.wants_mask, variant
    )
    return out, lse, *gradients


def by_operations(call: Call) -> Results:
    """`Tensor.attention`: one operation after the other, each with its own gradient."""
    backend = minitorch.TensorBackend(minitorch.FastOps)
    q, k, v = (minitorch.tensor(x, backend, requires_grad=True) for x in call.tensors[:3])
    leaves: list[Any] = [q, k, v]
    mask: Any = call.mask
    if call.wants_mask:
        numbers = mask_numbers(mask, real_dtype(call.dtype))
        mask = minitorch.tensor(numbers, backend, requires_grad=True)
        leaves.append(mask)
    options: dict[str, Any] = call.options | (call.functions or {})
    out, lse = q.attention(k, v, attn_mask=mask, return_lse=True, **options)
    loss = (out * minitorch.tensor(call.tensors[3], backend)).sum()
    if call.grad_logsumexp is not None:
        loss = loss + (lse * minitorch.tensor(call.grad_logsumexp, backend)).sum()
    captured = [x for x in call.variant.score.arrays if hasattr(x, "requires_grad")]
    for x in captured:
        x.grad = None
    loss.backward()
    results = [x.to_numpy() for x in (out, lse, *(x.grad for x in leaves))]
    results += [None] * (6 - len(results))
    return *results, *(x.grad.to_numpy() for x in captured)


CPU = Family(
    name="cpu", compute=by_cpu, place=place_on_cpu, device="cpu",
    dtypes=("float32", "float64"), shape=(37, 70, 20, 7), longest=(70, 70),
    columns=st.integers(1, 40), value_columns=st.integers(0, 40),
    layouts=(
        "plain", "heads", "axes reversed", "sliced", "reversed", "expanded", "read-only", "part",
    ),
    examples=25, derandomize=False, thorough=("test_windows",),
    lengths=((97, 97), (1023, 1025), (3, 799), (127, 513), (512, 108), (1, 239)),
    head_sizes=((1, 1), (8, 24), (59, 111), (111, 59), (256, 256), (300, 7)),
    extreme=(12, 77),
    extreme_dtypes=(
        ("float32", "float32"), ("float64", "float64"), ("float32", "float16"),
        ("float64", "float32"), ("float32", "float64"), ("float32", "bfloat16"),
    ),
    large_scores=({}, {"is_causal": True}, {"scale": -40.0}, {"scale": 3e4}),
    repeated=(((1, 300, 24), (1, 300, 24)),), runs=30,
)  # fmt: skip
LARGER = (
    "test_lengths", "test_head_sizes", "test_windows", "test_error_within_twice_pytorchs",
    "test_many_runs_give_the_same_bits",
)  # fmt: skip
STANDARD = replace(CPU, name="standard", compute=by_standard, examples=16, thorough=LARGER)
OPERATIONS = replace(STANDARD, name="operations", compute=by_operations, examples=8)


# ----- families of the GPU -----


def use(*modules: Any) -> Any:
    """A function that lets these alone compute."""
    return lambda monkeypatch: monkeypatch.setattr(cuda_attention, "FLASH_ATTENTION", modules)


def use_mma(monkeypatch: pytest.MonkeyPatch) -> None:
    """The mma kernels, where the GPU has them for every dtype."""
    if not SIMULATED and compute_capability() < mma.FIRST_WITH_ALL:
        pytest.skip("bfloat16 and TF32 need compute capability 8.0")
    use(mma)(monkeypatch)


def use_hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    """The Hopper kernels, which the simulator runs in tiles of 64 x 64."""
    if SIMULATED:
        find = hopper_backward.backward_blocks
        monkeypatch.setattr(cuda_attention, "compute_capability", lambda: (9, 0))
        monkeypatch.setattr(hopper, "forward_blocks", lambda *_: Blocks(2, 64))
        monkeypatch.setattr(
            hopper_backward,
            "backward_blocks",
            lambda *kind: tuple(replace(b, own=64, passing=16) for b in find(*kind)),
        )
        hopper._planned.cache_clear()
    elif compute_capability() != (9, 0):
        pytest.skip("needs compute capability 9.0")
    use(hopper)(monkeypatch)


# Most of them from the tests of Dao's FlashAttention.
LENGTHS = (
    (1, 239), (3, 799), (127, 512), (127, 513), (113, 203), (128, 217), (113, 211), (108, 256),
    (256, 512), (1023, 1024), (97, 97), (1025, 1025), (239, 1), (799, 3), (512, 127), (513, 127),
    (203, 113), (217, 128), (211, 113), (256, 108), (512, 256), (1024, 1023),
)  # fmt: skip


def by_decode(call: Call) -> Results:
    """Flash-Decoding; the gradients, from its output and logsumexp, are those of SIMT kernels."""
    assert cuda_attention.choose(call.problem, compute_capability()).module is decode
    return by_cuda(call)


# What the host prepares is the same for every family: SIMT's tests show it in `make test`.
OF_THE_HOST = tuple(
    f"test_feature[{name}]"
    for name in (
        "mask for every batch", "mask whose batch has no single stride",
        "heads share keys, a mask that broadcasts, layouts", "layouts",
        "queries of one batch for two",
    )
)  # fmt: skip
# There SIMT's tests show these rules in `make test`, which are the same code or take long.
IN_THE_SIMULATOR = ("causal", "window", "heads share keys", "causal, mask, dropout")
COMBINED_FUNCTIONS = tuple(f"test_functions[{name}]" for name in COMBINATIONS)
MORE_FUNCTIONS = tuple(  # that Hopper's kernels have from where mma's have them
    f"test_functions[{name}]" for name in FUNCTION_FEATURES if "dropout" not in name
)
SLOW_IN_THE_SIMULATOR = (
    *COMBINED_FUNCTIONS, "test_functions[pairs]",
    *(f"test_feature[{name}]" for name in FEATURES if name not in IN_THE_SIMULATOR),
    "test_every_dtype", "test_rows_that_see_no_key", "test_dropout_keeps_what_the_mask_says",
    "test_nothing_outside_of_the_inputs_is_used",
)  # fmt: skip
SIZES = (1, 16, 40, 64, 96, 128, 160, 256)
LAYOUTS = ("plain", "heads", "transposed", "part")
BATCHES = (60, 4)  # leading dimensions of the calls that are repeated
SIMT = Family(
    name="simt", compute=by_cuda, place=on_gpu, force=use(simt),
    dtypes=("float32", "float64", "float16", "bfloat16"),
    shape=(17, 19, 6, 5) if SIMULATED else (150, 201, 40, 30),
    longest=(20, 20) if SIMULATED else (200, 200),
    columns=st.integers(1, 12 if SIMULATED else 100),
    value_columns=st.integers(0, 12 if SIMULATED else 100),
    layouts=LAYOUTS, examples=3 if SIMULATED else 6, lengths=LENGTHS,
    thorough=COMBINED_FUNCTIONS if SIMULATED else (),
    head_sizes=tuple((n, n) for n in SIZES) + tuple((64, n) for n in SIZES),
    extreme=(10, 22) if SIMULATED else (150, 700),
    extreme_dtypes=(("float32", "float32"), ("float32", "float64")) if SIMULATED else (
        ("float32", "float32"), ("float32", "float64"), ("float32", "float16"),
        ("float64", "float64"), ("bfloat16", "bfloat16"), ("bfloat16", "float64"),
    ),
    large_scores=({},) if SIMULATED else (
        {}, {"scale": -40.0, "is_causal": True}, {"scale": 20.0},
    ),
    repeated=(((*BATCHES, 239, 64), (*BATCHES, 128, 64)),), runs=250,
)  # fmt: skip
MMA = replace(
    SIMT, name="mma", force=use_mma, dtypes=("float16", "bfloat16", "tf32x3"),
    thorough=SLOW_IN_THE_SIMULATOR if SIMULATED else (*OF_THE_HOST, "test_every_dtype"),
    shape=(17, 20, 20, 7) if SIMULATED else (150, 339, 20, 7),
    columns=st.integers(1, 24 if SIMULATED else 256),
    value_columns=st.integers(1, 24 if SIMULATED else 256),
    head_sizes=tuple((n, n) for n in (1, 16, 40, 59, 64, 96, 111, 128, 160, 192, 256)),
    extreme_dtypes=(("float16", "float16"), ("tf32x3", "float32")) if SIMULATED else (
        ("float16", "float16"), ("tf32x3", "float32"), ("tf32x3", "float64"),
        ("tf32x3", "float16"), ("bfloat16", "bfloat16"), ("bfloat16", "float64"),
    ),
    repeated=(((*BATCHES, 256, 64), (*BATCHES, 256, 64)),),
)  # fmt: skip
HOPPER = replace(
    SIMT, name="hopper", force=use_hopper, gradient_factor=2.0, dtypes=("bfloat16", "float16"),
    shape=(20, 70, 64, 40) if SIMULATED else (150, 339, 64, 40),
    longest=(400, 400), columns=st.sampled_from([16, 64]), value_columns=st.sampled_from([16, 64]),
    examples=0 if SIMULATED else 14,
    thorough=(*SLOW_IN_THE_SIMULATOR, *MORE_FUNCTIONS) if SIMULATED else (),
    head_sizes=(
        *((n, n) for n in (8, 32, 40, 59, 64, 72, 96, 111, 128, 160, 192, 224, 256)),
        (192, 128), (128, 100), (59, 96),
    ),
    extreme_dtypes=(("bfloat16", "bfloat16"),) if SIMULATED else (
        ("bfloat16", "bfloat16"), ("bfloat16", "float64"), ("float16", "float16"),
    ),
    large_scores=({}, {"scale": -40.0, "is_causal": True}, {"scale": 20.0})[: 3 - SIMULATED],
    repeated=(
        ((*BATCHES, 256, 64), (*BATCHES, 256, 64)), ((12, 4, 700, 64), (12, 4, 700, 64)),
        ((12, 4, 700, 128), (12, 4, 700, 128)), ((2, 4, 600, 256), (2, 4, 600, 256)),
    ),
)  # fmt: skip
DECODE = replace(
    SIMT, name="decode", compute=by_decode, force=use(decode, simt), dropout=False,
    thorough=SLOW_IN_THE_SIMULATOR if SIMULATED else (*OF_THE_HOST, "test_every_dtype"),
    shape=(3, 40, 7, 4) if SIMULATED else (3, 1500, 59, 64),
    longest=(decode.MOST_QUERIES, 40 if SIMULATED else 1500),
    columns=st.sampled_from((1, 4, 7) if SIMULATED else (1, 59, 64, 96, 128, 256)),
    value_columns=st.sampled_from((1, 4, 7) if SIMULATED else (1, 59, 64, 96, 128, 256)),
    examples=2 if SIMULATED else 4, lengths=tuple((n, 300 * n + 5) for n in range(1, 9)),
    extreme=(decode.MOST_QUERIES, 3 * decode.KEYS_OF_A_SPLIT + 5),
    extreme_dtypes=(("float16", "float32"),) if SIMULATED else (
        ("float32", "float32"), ("float16", "float32"),
    ),
    repeated=(((2, 4, 1, 128), (2, 4, 4097, 128)),),
)  # fmt: skip
