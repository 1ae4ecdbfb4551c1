"""Arrays of numpy in the place of tensors, and what is said when something else comes.

Nothing here needs PyTorch: see test_torch_autograd.py for its tensors.
"""

from __future__ import annotations

import gc
import math
import sys
import threading
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import minitorch
from minitorch.dtypes import BFLOAT16
from minitorch.interop import dlpack

FAST = minitorch.TensorBackend(minitorch.FastOps)
VALUES = np.random.default_rng(0).normal(size=(2, 3, 4)).astype(np.float32)


def tensor(array: Any = VALUES) -> Any:
    return minitorch.tensor(array, FAST, False)


# ----- arrays in every state -----


def read_only(array: Any) -> Any:
    array = array.copy()
    array.setflags(write=False)
    return array


def field(array: Any) -> Any:
    """Elements of 4 bytes, 5 bytes apart."""
    rows = np.zeros(array.shape, [("label", "i1"), ("x", array.dtype)])
    rows["x"] = array
    return rows["x"]


def unaligned(array: Any) -> Any:
    data = np.frombuffer(b"?" + array.tobytes(), np.uint8)
    return data[1:].view(array.dtype).reshape(array.shape)


STATES: dict[str, Callable[[Any], Any]] = {
    "read-only": read_only,
    "broadcast": lambda a: np.broadcast_to(a[:1], a.shape),
    "of bytes": lambda a: np.frombuffer(a.tobytes(), a.dtype).reshape(a.shape),
    "big-endian": lambda a: a.astype(">f4"),
    "big-endian and read-only": lambda a: read_only(a.astype(">f8")),
    "backwards": lambda a: a[:, ::-1, ::-1],
    "field": field,
    "unaligned": unaligned,
    "column-major": np.asfortranarray,
    "without elements": lambda a: a[:0],
}


@pytest.mark.parametrize("state", STATES)
def test_arrays_in_every_state_are_read(state: str) -> None:
    given = STATES[state](VALUES)
    plain = np.array(given, given.dtype.newbyteorder("="), order="C")
    np.testing.assert_array_equal(minitorch.as_tensor(given).to_numpy(), plain)
    np.testing.assert_array_equal(minitorch.from_dlpack(given).to_numpy(), plain)
    out = minitorch.flash_attention(given, given, given)
    np.testing.assert_array_equal(out, minitorch.flash_attention(plain, plain, plain))
    mask, plain_mask = given[..., :3], plain[..., :3]
    expected = tensor(plain).flash_attention(tensor(plain), tensor(plain), attn_mask=plain_mask)
    for call in (tensor(plain).flash_attention, tensor(plain).attention):
        got = call(tensor(plain), tensor(plain), attn_mask=mask)
        np.testing.assert_allclose(got.to_numpy(), expected.to_numpy(), rtol=1e-5, atol=1e-6)
    got = minitorch.flash_attention(plain, plain, plain, attn_mask=mask)
    np.testing.assert_array_equal(got, expected.to_numpy())


def test_a_mapped_file_is_read_and_never_written(tmp_path: Path) -> None:
    path = tmp_path / "values.npy"
    np.save(path, VALUES)
    mapped = np.load(path, mmap_mode="r")
    expected = minitorch.flash_attention(VALUES, VALUES, VALUES)
    np.testing.assert_array_equal(minitorch.flash_attention(mapped, mapped, mapped), expected)
    x = minitorch.as_tensor(mapped)
    x._tensor.set((0, 0, 0), 7.0)  # as an optimiser would
    np.testing.assert_array_equal(mapped, VALUES)
    shared = VALUES.copy()
    minitorch.as_tensor(shared)._tensor.set((0, 0, 0), 7.0)
    assert shared[0, 0, 0] == 7


# ----- capsules -----


def test_an_error_on_its_way_is_kept() -> None:
    """The capsule dies while the error of `len` looks for someone to catch it."""
    gc.collect()
    x = tensor()
    storage = weakref.ref(x._tensor._storage)
    for _ in range(3):
        with pytest.raises(TypeError, match="has no len"):
            len(x.__dlpack__())
    del x
    gc.collect()
    assert storage() is None


def test_memory_is_given_back_in_another_thread() -> None:
    x = tensor()
    storage = weakref.ref(x._tensor._storage)
    taken = [dlpack.take(x.__dlpack__())]
    del x
    assert storage() is not None
    thread = threading.Thread(target=taken.clear)
    thread.start()
    thread.join()
    assert storage() is None


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16, BFLOAT16, np.bool_, np.int8])
@pytest.mark.parametrize("shape", [(), (3,), (2, 3), (0, 2)])
@pytest.mark.parametrize("device", [(dlpack.CPU, 0), (dlpack.CUDA, 3)])
def test_what_is_exported_is_what_is_taken(
    dtype: Any, shape: tuple[int, ...], device: tuple[int, int]
) -> None:
    """The elements are not touched: the address may be that of another device."""
    strides = tuple(range(len(shape), 0, -1))
    memory = dlpack.Memory(1 << 40, shape, strides, np.dtype(dtype), device, object())
    taken = dlpack.take(dlpack.export(memory))
    assert taken[:3] == memory[:3] and taken.dtype == memory.dtype and taken.device == device


# ----- what is said -----

ONE_SENTENCE: list[tuple[str, Callable[[], Any], type[Exception], str]] = [
    ("list", lambda: minitorch.flash_attention([1.0], VALUES, VALUES), TypeError, "query .* list"),
    ("none", lambda: minitorch.flash_attention(VALUES, None, VALUES), TypeError, "key .* NoneType"),
    (
        "scalar",
        lambda: minitorch.flash_attention(VALUES, VALUES, np.float32(1)),
        TypeError,
        r"value .* numpy\.float32",
    ),
    (
        "mixture",
        lambda: minitorch.flash_attention(VALUES, tensor(), VALUES),
        TypeError,
        "a query of numpy and a key of minitorch",
    ),
    (
        "array as key",
        lambda: tensor().flash_attention(VALUES, tensor()),
        TypeError,
        r"key must be a .*Tensor, got .*ndarray",
    ),
    (
        "str",
        lambda: tensor().attention(tensor(), "v"),
        TypeError,
        "value must be a Tensor, got 'v'",
    ),
    ("int64", lambda: minitorch.as_tensor(VALUES.astype(int)), TypeError, "x on the CPU .* int64"),
    (
        "int64 key",
        lambda: minitorch.flash_attention(VALUES, VALUES.astype(int), VALUES),
        TypeError,
        "key on the CPU .* int64",
    ),
    (
        "complex",
        lambda: minitorch.flash_attention(VALUES, VALUES, VALUES.astype(complex)),
        TypeError,
        "value on the CPU .* complex128",
    ),
    (
        "masked",
        lambda: minitorch.as_tensor(np.ma.masked_array(VALUES, VALUES > 0)),
        TypeError,
        "x is a masked array",
    ),
    (
        "two dtypes",
        lambda: minitorch.flash_attention(VALUES, VALUES.astype(float), VALUES),
        TypeError,
        "one dtype, got float32, float64, float32",
    ),
    (
        "option",
        lambda: minitorch.flash_attention(VALUES, VALUES, VALUES, causal=True),
        TypeError,
        "no option causal; it has attn_mask, is_causal",
    ),
]


@pytest.mark.parametrize(
    ("call", "error", "text"), [row[1:] for row in ONE_SENTENCE], ids=[r[0] for r in ONE_SENTENCE]
)
def test_errors_name_the_argument(
    call: Callable[[], Any], error: type[Exception], text: str
) -> None:
    with pytest.raises(error, match=text):
        call()


def calls(**options: Any) -> list[Callable[[], Any]]:
    """Attention of the same values by every door."""
    x = tensor()
    return [
        lambda: x.flash_attention(x, x, **options),
        lambda: x.attention(x, x, **options),
        lambda: minitorch.flash_attention(VALUES, VALUES, VALUES, **options),
    ]


MASKS: list[Any] = [
    [[True]],
    ((0.0,),),
    "mask",
    1,
    True,
    np.float32(0),
    np.zeros((3, 3), int),
    np.zeros((3, 3), complex),
    np.zeros((3, 3), object),
    np.zeros((4, 3)),
    np.zeros((1, 1, 2, 3, 3)),
    np.ma.masked_array(np.zeros((3, 3)), True),
]


@pytest.mark.parametrize("mask", MASKS, ids=lambda m: f"{type(m).__name__}-{np.shape(m)}")
def test_errors_of_masks_name_them(mask: Any) -> None:
    for call in calls(attn_mask=mask):
        with pytest.raises((TypeError, ValueError), match="attn_mask"):
            call()


NONSENSE = [math.nan, math.inf, -math.inf, "x", None, True, 1j, [1], np.array([1, 2]), 10**400, {}]
WRONG: dict[str, list[Any]] = {
    "window": [(1.0, 2), (-2, 0), (True, 1), (1,), 3, "ab", (None, -3), (math.nan, 1), ([1], 2)],
    "scale": [x for x in NONSENSE if x is not None] + [1e300],
    "dropout_p": [*NONSENSE, 2, -1, 1.5],
    "seed": [x for x in NONSENSE if x is not None] + [-1, 2**64, 1.0, np.int64(-1)],
    "is_causal": [x for x in NONSENSE if x is not True] + [1, "bottom"],
    "enable_gqa": [x for x in NONSENSE if x is not True] + [1],
    "return_lse": [x for x in NONSENSE if x is not True] + [1],
    "causal": [True],
}


@pytest.mark.parametrize("option", WRONG)
def test_options_that_make_no_sense(option: str) -> None:
    """Nothing is computed, and no seed is drawn."""
    state = minitorch.get_rng_state()
    for given in WRONG[option]:
        for call in calls(**{"dropout_p": 0.5, option: given}):
            with pytest.raises((TypeError, ValueError), match=option):
                call()
    assert str(minitorch.get_rng_state()) == str(state)


@pytest.mark.parametrize("shape", [(3,), (-1, 3), (2.5, 3), "ab", 4, None, (True, 2)])
def test_shapes_of_dropout_masks(shape: Any) -> None:
    with pytest.raises(ValueError, match="shape"):
        minitorch.attention_dropout_mask(shape, 0.5, 1)


SIDES = [0, 1, 5, 2**31, sys.maxsize, 10**30, None, -1]


@pytest.mark.parametrize("causal", [False, True, "bottom-right"])
@pytest.mark.parametrize("lengths", [(3, 3), (2, 5), (5, 2)])
def test_windows_of_any_size(causal: Any, lengths: tuple[int, int]) -> None:
    """Against a mask that spells the window out."""
    rng = np.random.default_rng(1)
    q, k = (rng.normal(size=(n, 4)) for n in lengths)
    row = np.arange(lengths[0])[:, None] + (lengths[1] - lengths[0]) * (causal == "bottom-right")
    column = np.arange(lengths[1])
    for left in SIDES:
        for right in SIDES:
            near, far = (99 if n in (None, -1) else min(n, 99) for n in (left, right))
            seen = (column >= row - near) & (column <= row + (min(far, 0) if causal else far))
            got = minitorch.flash_attention(q, k, k, window=(left, right), is_causal=causal)
            expected = minitorch.flash_attention(q, k, k, attn_mask=seen)
            np.testing.assert_allclose(got, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("scale", [-1.0, 0, -3.7, 1e30, np.float32(0.5)])
def test_scales_that_are_unusual(scale: float) -> None:
    x = VALUES.astype(np.float64)
    scores = x @ x.swapaxes(-2, -1) * float(scale)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    expected = weights / weights.sum(-1, keepdims=True) @ x
    for call in calls(scale=scale):
        out = call()
        out = out if isinstance(out, np.ndarray) else out.to_numpy()
        np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-5)
