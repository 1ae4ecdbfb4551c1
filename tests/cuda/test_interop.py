"""Memory shared with other libraries: DLPack and the CUDA array interface, both ways.

In the simulator device memory is the host's, and PyTorch's CPU tensors stand in for those of a GPU.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import warnings
import weakref
from typing import Any

import numpy as np
import pytest

import minitorch
from minitorch.cuda import driver as cuda_driver
from minitorch.dtypes import BFLOAT16
from minitorch.interop import arrays as interop
from minitorch.interop import dlpack
from minitorch.kernels.gpu import runtime

torch: Any = None
with contextlib.suppress(ImportError):  # not needed by all tests
    torch = importlib.import_module("torch")

GPU = minitorch.TensorBackend(minitorch.CudaKernelOps)
CPU = minitorch.TensorBackend(minitorch.FastOps)
DTYPES: list[Any] = [np.float32, np.float64, np.float16, BFLOAT16]
on_hardware = runtime.is_available() and not runtime.SIMULATED
DEVICE = "cuda" if on_hardware and torch and torch.cuda.is_available() else "cpu"
needs_torch = pytest.mark.skipif(torch is None, reason="needs PyTorch")
needs_torch_on_the_gpu = pytest.mark.skipif(DEVICE == "cpu", reason="PyTorch sees no GPU here")


def pointer(tensor: minitorch.Tensor) -> int:
    storage = tensor._tensor._storage
    return int(storage.pointer if tensor._tensor.on_device else storage.ctypes.data)


# ----- out -----


@needs_torch
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: np.dtype(dtype).name)
@pytest.mark.parametrize("strided", [False, True])
def test_tensors_become_torchs(dtype: Any, strided: bool) -> None:
    x = minitorch.tensor(np.arange(12).reshape(3, 4).astype(dtype), backend=GPU)
    x = x[1:, ::2].permute(1, 0) if strided else x
    y = torch.from_dlpack(x)
    assert y.data_ptr() == pointer(x) and y.device.type == DEVICE
    assert (tuple(y.shape), y.stride()) == (x.shape, x._tensor.strides)
    assert str(y.dtype) == f"torch.{np.dtype(dtype).name}"
    np.testing.assert_array_equal(y.float().cpu().numpy(), x.to_numpy().astype(np.float32))
    y.add_(1)
    np.testing.assert_array_equal(y.float().cpu().numpy(), x.to_numpy().astype(np.float32))


@needs_torch
def test_the_taker_keeps_the_memory() -> None:
    gc.collect()
    before = minitorch.cuda.memory_allocated()
    x = minitorch.tensor(np.arange(1000.0), backend=GPU)
    y = torch.from_dlpack(x)
    del x
    gc.collect()
    assert minitorch.cuda.memory_allocated() > before
    assert float(y[999]) == 999
    del y
    gc.collect()
    assert minitorch.cuda.memory_allocated() == before


def test_a_capsule_that_nobody_takes() -> None:
    gc.collect()
    before = minitorch.cuda.memory_allocated()
    capsule = minitorch.tensor(np.arange(1000.0), backend=GPU).__dlpack__()
    assert minitorch.cuda.memory_allocated() > before
    del capsule
    assert minitorch.cuda.memory_allocated() == before


def test_dlpack_of_the_cpu() -> None:
    x = minitorch.tensor(np.arange(6.0).reshape(2, 3), backend=CPU).permute(1, 0)
    assert x.__dlpack_device__() == (1, 0)
    y = np.from_dlpack(x)
    assert y.ctypes.data == pointer(x)
    np.testing.assert_array_equal(y, x.to_numpy())
    assert not hasattr(x, "__cuda_array_interface__")
    with pytest.raises(BufferError, match="without a copy"):
        x.__dlpack__(copy=True)
    with pytest.raises(BufferError, match="without a copy"):
        x.__dlpack__(dl_device=(2, 7))


def test_cuda_array_interface() -> None:
    x = minitorch.tensor(np.arange(12.0).reshape(3, 4), backend=GPU)
    found = x.__cuda_array_interface__
    assert found["data"] == (pointer(x), False) and found["strides"] is None
    assert (found["shape"], found["typestr"], found["version"]) == ((3, 4), "<f8", 3)
    assert found["stream"] == 1
    part = x[1:, 1].__cuda_array_interface__
    assert (part["data"][0], part["strides"]) == (pointer(x) + 5 * 8, (32,))
    if on_hardware:
        y = runtime.cuda.as_cuda_array(x)
        np.testing.assert_array_equal(y.copy_to_host(), x.to_numpy())


# ----- in -----


@needs_torch
@pytest.mark.parametrize("dtype", ["float32", "float64", "float16", "bfloat16"])
def test_torchs_become_tensors(dtype: str) -> None:
    array = torch.arange(24, device=DEVICE).reshape(2, 3, 4).to(getattr(torch, dtype))
    x = array.transpose(0, 2)[1:]
    if DEVICE == "cpu" and "16" in dtype:
        with pytest.raises(TypeError, match=f"float32, float64, got {dtype}"):
            minitorch.from_dlpack(x)
        return
    y = minitorch.as_tensor(x)
    assert pointer(y) == x.data_ptr() and y.is_constant()
    assert (y.shape, y._tensor.strides, y.dtype.name) == (tuple(x.shape), x.stride(), dtype)
    np.testing.assert_array_equal(y.to_numpy().astype(np.float64), x.double().cpu().numpy())
    x.zero_()
    assert not y.to_numpy().any()


@needs_torch
def test_memory_is_kept_and_given_back() -> None:
    x = torch.ones(5, dtype=torch.float64, device=DEVICE)
    storage = weakref.ref(x.untyped_storage())
    y = minitorch.from_dlpack(x)
    part = y[1:3]
    del x, y
    gc.collect()
    assert part.to_numpy().tolist() == [1, 1]
    del part
    gc.collect()
    assert storage() is None


class Foreign:
    """An array of a library that has nothing but the interface."""

    def __init__(self, interface: dict[str, Any]) -> None:
        self.__cuda_array_interface__ = interface


def test_a_cuda_array_interface_becomes_a_tensor() -> None:
    x = minitorch.tensor(np.arange(12.0).reshape(3, 4), backend=GPU)

    given = x[:, 1:3].__cuda_array_interface__
    y = minitorch.as_tensor(Foreign(given))
    assert pointer(y) == pointer(x) + 8 and y._tensor.on_device
    np.testing.assert_array_equal(y.to_numpy(), x.to_numpy()[:, 1:3])
    assert (y * 2.0).sum().item() == 66.0
    with pytest.raises(ValueError, match="strides must not be negative"):
        minitorch.as_tensor(Foreign({**given, "strides": (-32, 8)}))
    with pytest.raises(ValueError, match="whole elements of float64"):
        minitorch.as_tensor(Foreign({**given, "strides": (33, 8)}))
    with pytest.raises(TypeError, match="got int64"):
        minitorch.as_tensor(Foreign({**given, "typestr": "<i8"}))


def test_numbas_arrays() -> None:
    x = runtime.cuda.to_device(np.arange(5.0))
    y = minitorch.as_tensor(x, backend=GPU)
    np.testing.assert_array_equal(y.to_numpy(), np.arange(5.0))
    assert y._tensor.on_device


def test_what_is_no_array() -> None:
    with pytest.raises(TypeError, match="__dlpack__ or __cuda_array_interface__, got int"):
        minitorch.as_tensor(3)
    with pytest.raises(TypeError, match="must have __dlpack__, got list"):
        minitorch.from_dlpack([1.0])
    with pytest.raises(ValueError, match="fresh DLPack capsule"):
        capsule = minitorch.tensor([1.0]).__dlpack__()
        dlpack.take(capsule)
        dlpack.take(capsule)
    if on_hardware:
        with pytest.raises(ValueError, match="the array is on the CPU, where TensorBackend"):
            minitorch.as_tensor(np.zeros(3), backend=GPU)


@needs_torch
def test_tensors_pass_through() -> None:
    x = minitorch.tensor([1.0], backend=CPU)
    assert minitorch.as_tensor(x) is x
    assert minitorch.as_tensor(x, GPU).backend is GPU


# ----- attention on arrays of other libraries -----


def draw(*shape: int, dtype: Any = None) -> Any:
    dtype = torch.float64 if dtype is None else dtype
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(DEVICE, dtype)


@needs_torch
@pytest.mark.parametrize("mask", ["none", "bool", "float"])
def test_attention_of_torch_tensors(mask: str) -> None:
    q, k, v = draw(1, 5, 2, 4).transpose(1, 2), draw(1, 2, 6, 4), draw(1, 2, 6, 3)
    attn_mask = None
    if mask != "none":
        attn_mask = draw(5, 6) > -0.5 if mask == "bool" else draw(5, 6)
    out = minitorch.flash_attention(q, k, v, attn_mask=attn_mask)
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=attn_mask)
    assert type(out) is torch.Tensor and out.device == q.device and out.dtype == q.dtype
    torch.testing.assert_close(out, expected)


@needs_torch
@pytest.mark.filterwarnings("ignore:Attempting to run cuBLAS")  # the reference's, not ours
@pytest.mark.parametrize("return_lse", [False, True])
def test_torchs_autograd(return_lse: bool) -> None:
    q, k, v = (draw(1, 2, n, 4).requires_grad_() for n in (3, 5, 5))
    mask = draw(2, 3, 5).requires_grad_()
    scores = q @ k.transpose(-2, -1) / 2 + mask
    expected = [torch.softmax(scores, -1) @ v, torch.logsumexp(scores, -1)]
    got = minitorch.flash_attention(q, k, v, attn_mask=mask, return_lse=return_lse)
    outs = list(got) if return_lse else [got]
    grads = [draw(*x.shape) for x in outs]
    theirs = torch.autograd.grad(expected[: len(outs)], (q, k, v, mask), grads)
    ours = torch.autograd.grad(outs, (q, k, v, mask), grads)
    for a, b in zip((*outs, *ours), (*expected[: len(outs)], *theirs), strict=True):
        torch.testing.assert_close(a, b)


@needs_torch
def test_torch_tensors_that_a_score_function_reads() -> None:
    """Of floating point with a gradient, whole numbers and truth values, where the query is."""
    q, k, v = (draw(2, 3, 40, 8).requires_grad_() for _ in range(3))
    table, power = draw(3, 79).requires_grad_(), draw(1)[0].requires_grad_()
    ids, flags = torch.arange(40, device=DEVICE) // 15, torch.arange(40, device=DEVICE) % 3 > 0

    def mod(score: Any, b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        near = table[h, q_idx - kv_idx + 39] * (1 + b)
        return score * power + np.where(flags[kv_idx], near, ids[q_idx])

    def mask(b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        return (ids[q_idx] == ids[kv_idx]) | ~flags[kv_idx]

    i = torch.arange(40, device=DEVICE)
    near = table[:, i[:, None] - i + 39] * torch.arange(1, 3, device=DEVICE)[:, None, None, None]
    scores = q @ k.transpose(-2, -1) / 8**0.5 * power
    scores = scores + torch.where(flags, near, ids[:, None].to(near.dtype))
    allowed = (ids[:, None] == ids) | ~flags
    expected = scores.masked_fill(~allowed, -torch.inf).softmax(-1) @ v
    got = minitorch.flash_attention(q, k, v, score_mod=mod, block_mask=mask)
    leaves, grad = (q, k, v, table, power), draw(*got.shape)
    theirs, ours = (torch.autograd.grad(x, leaves, grad) for x in (expected, got))
    for a, b in zip((got, *ours), (expected, *theirs), strict=True):
        torch.testing.assert_close(a, b)


@needs_torch
def test_gradients_only_where_wanted() -> None:
    q, k, v = draw(1, 1, 3, 4), draw(1, 1, 3, 4).requires_grad_(), draw(1, 1, 3, 4)
    out = minitorch.flash_attention(q, k, v, is_causal=True)
    out.sum().backward()
    assert q.grad is None and v.grad is None and k.grad is not None
    with torch.no_grad():
        assert not minitorch.flash_attention(q, k, v).requires_grad
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out = minitorch.flash_attention(q, k, v)
        v.zero_()
        out.sum().backward()


@needs_torch
def test_attention_of_other_arrays() -> None:
    arrays = [np.random.default_rng(n).normal(size=(2, 3, 4)) for n in range(3)]
    out = minitorch.flash_attention(*arrays)
    assert isinstance(out, np.ndarray)
    tensors = [minitorch.tensor(array) for array in arrays]
    np.testing.assert_allclose(out, minitorch.flash_attention(*tensors).to_numpy(), rtol=1e-12)
    with pytest.raises(TypeError, match="a query of numpy and a key of torch"):
        minitorch.flash_attention(arrays[0], draw(2, 3, 4), draw(2, 3, 4))


# ----- on the hardware: no copy, on PyTorch's stream -----


@pytest.mark.gpu
@needs_torch_on_the_gpu
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("masked", [False, True])
def test_half_precision_attention_of_torch(dtype: str, masked: bool) -> None:
    kind = getattr(torch, dtype)
    q, k, v = (draw(2, 4, 100, 64, dtype=kind).requires_grad_() for _ in range(3))
    mask = draw(100, 100, dtype=kind) if masked else None
    out = minitorch.flash_attention(q, k, v, attn_mask=mask, is_causal=not masked)
    expected = torch.nn.functional.scaled_dot_product_attention(
        *(x.double() for x in (q, k, v)),
        attn_mask=None if mask is None else mask.double(),
        is_causal=not masked,
    )
    tolerance = {"float32": 1e-5, "float16": 2e-3, "bfloat16": 2e-2}[dtype]
    torch.testing.assert_close(out.double(), expected, rtol=tolerance, atol=tolerance)
    grad = draw(2, 4, 100, 64, dtype=kind)
    ours = torch.autograd.grad(out, (q, k, v), grad)
    theirs = torch.autograd.grad(expected, (q, k, v), grad.double())
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a.double(), b.double(), rtol=4 * tolerance, atol=4 * tolerance)


@pytest.mark.gpu
@needs_torch_on_the_gpu
def test_nothing_is_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = (draw(1, 2, 64, 32, dtype=torch.float32).requires_grad_() for _ in range(3))
    seen: list[str] = []
    for name in ("copy_to_device", "copy_to_host", "copy_on_device"):
        monkeypatch.setattr(cuda_driver, name, lambda *_, name=name: seen.append(name))
    minitorch.flash_attention(q, k, v).sum().backward()
    assert seen == []


@pytest.mark.gpu
@needs_torch_on_the_gpu
def test_on_torchs_stream() -> None:
    """Work before and after on a side stream, with no synchronisation by hand. There, too, the
    result is read: another stream would have to wait for it.
    """
    stream = torch.cuda.Stream()
    for _ in range(20):
        with torch.cuda.stream(stream):
            q = torch.zeros(4, 8, 512, 64, device="cuda")
            for _ in range(20):
                q = q + 1
            out = minitorch.flash_attention(q, q, q)
            assert abs(out.mean().item() - 20) < 1e-3
    assert interop.default_backend(True).cuda


@pytest.mark.gpu
@needs_torch_on_the_gpu
def test_dlpack_orders_streams() -> None:
    stream = torch.cuda.Stream()
    for _ in range(20):
        x = minitorch.zeros((1 << 22,), backend=GPU, dtype=np.float32)
        for _ in range(20):
            x = x + 1.0
        with torch.cuda.stream(stream):
            y = torch.from_dlpack(x)
            assert y.mean().item() == 20
        with torch.cuda.stream(stream):
            z = torch.zeros(1 << 22, device="cuda")
            for _ in range(20):
                z = z + 1
            ours = minitorch.from_dlpack(z)
        assert ours.sum().item() == 20 << 22


@pytest.mark.gpu
@needs_torch_on_the_gpu
def test_seeds_come_from_the_gpus_generator() -> None:
    """Without waiting for the GPU: torch says so if the host would."""
    q, k, v = (draw(1, 2, 64, 32, dtype=torch.float32).requires_grad_() for _ in range(3))

    def call(*x: Any) -> Any:
        return minitorch.flash_attention(*x, dropout_p=0.5)

    torch.cuda.manual_seed(1)
    first, second = call(q, k, v), call(q, k, v)
    assert not torch.equal(first, second)
    torch.cuda.manual_seed(1)
    assert torch.equal(call(q, k, v), first)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that this mode is a prototype
        torch.cuda.set_sync_debug_mode("error")
        try:
            call(q, k, v)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the graph is empty
        with pytest.raises(RuntimeError, match="would drop the same weights"):
            with torch.cuda.graph(graph):
                call(q, k, v)


@pytest.mark.gpu
@needs_torch_on_the_gpu
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpoints_on_the_gpu(use_reentrant: bool) -> None:
    checkpoint = importlib.import_module("torch.utils.checkpoint").checkpoint
    leaves = [draw(1, 2, 64, 32, dtype=torch.float16).requires_grad_() for _ in range(3)]

    def call(*x: Any) -> Any:
        return minitorch.flash_attention(*x, dropout_p=0.5)

    torch.cuda.manual_seed(5)
    expected = torch.autograd.grad(call(*leaves).sum(), leaves)
    torch.cuda.manual_seed(5)
    checkpoint(call, *leaves, use_reentrant=use_reentrant).sum().backward()
    for x, grad in zip(leaves, expected, strict=True):
        assert torch.equal(x.grad, grad)


@pytest.mark.gpu
@needs_torch_on_the_gpu
def test_torchs_operations_on_the_gpu() -> None:
    """Writes are noticed, logsumexp and a per-sample gradient are right, errors of torch are kept
    and name the argument that is elsewhere.
    """
    q, k, v = (draw(2, 2, 64, 32, dtype=torch.float32).requires_grad_() for _ in range(3))
    out, lse = minitorch.flash_attention(q, k, v, return_lse=True)
    lse.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        (out.sum() + lse.sum()).backward()
    with pytest.raises(RuntimeError, match="is invalid for input"):
        minitorch.flash_attention(q, k, v).view(7, 7)
    for name in ("key", "attn_mask"):
        there = {"query": q, "key": k, "value": v}
        there[name] = torch.zeros(64, 32 if name == "key" else 64)
        with pytest.raises(ValueError, match=f"{name} must be on the query's device"):
            minitorch.flash_attention(**there)
    mask = np.random.default_rng(0).normal(size=(64, 64)).astype(">f4")
    native = torch.tensor(mask.astype(np.float32), device="cuda")

    def loss(f: Any, mask: Any) -> Any:
        return lambda q, k, v: (f(q, k, v, attn_mask=mask) ** 2).sum()

    reference = torch.nn.functional.scaled_dot_product_attention
    ours, theirs = (
        torch.vmap(torch.func.grad(loss(f, m), argnums=(0, 1, 2)))(q, k, v)
        for f, m in ((minitorch.flash_attention, mask), (reference, native))
    )
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)
    tensors = [minitorch.as_tensor(x.detach()) for x in (q, k, v)]
    got = tensors[0].flash_attention(*tensors[1:], attn_mask=mask)
    torch.testing.assert_close(
        torch.from_dlpack(got), reference(q, k, v, attn_mask=native).detach(), rtol=1e-3, atol=1e-4
    )
