"""Tensors in device memory: storage, allocator, views, dtypes, and nothing that crosses the bus."""

from __future__ import annotations

import copy
import gc
import pickle
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import minitorch
from minitorch import Tensor, rng, tensor_functions
from minitorch.cuda import OutOfMemoryError, allocator
from minitorch.cuda import driver as cuda_driver
from minitorch.cuda.device_array import DeviceArray, error_word
from minitorch.dtypes import BFLOAT16
from minitorch.kernels.gpu import runtime
from tests.ops import OPS, Op

CPU = minitorch.TensorBackend(minitorch.FastOps)
DTYPES: list[np.dtype[Any]] = [
    np.dtype(np.float32),
    np.dtype(np.float64),
    np.dtype(np.float16),
    BFLOAT16,
]


@pytest.fixture(scope="module", params=["CudaOps", "CudaKernelOps"])
def backend(request: pytest.FixtureRequest) -> minitorch.TensorBackend:
    return minitorch.TensorBackend(getattr(minitorch, request.param))


@pytest.fixture(scope="module")
def gpu() -> minitorch.TensorBackend:
    return minitorch.TensorBackend(minitorch.CudaKernelOps)


# ----- DeviceArray -----


@pytest.mark.parametrize("dtype", [*DTYPES, np.dtype(np.int64), np.dtype(np.uint8)], ids=str)
def test_device_array(dtype: np.dtype[Any]) -> None:
    host = np.arange(7).astype(dtype)
    x = DeviceArray.from_host(host)
    assert (x.size, len(x), x.dtype, x.itemsize) == (7, 7, dtype, dtype.itemsize)
    assert x.nbytes == 7 * dtype.itemsize
    np.testing.assert_array_equal(x.copy_to_host(), host)
    assert float(x[-2]) == 5

    part = x[2:5]
    assert part.size == 3 and part.pointer == x.pointer + 2 * dtype.itemsize
    part.fill(1)
    x[0] = 3
    np.testing.assert_array_equal(x.copy_to_host(), np.array([3, 1, 1, 1, 1, 5, 6]).astype(dtype))

    y = DeviceArray.empty(7, dtype)
    y.copy_from_device(x)
    np.testing.assert_array_equal(y.copy_to_host(), x.copy_to_host())
    assert x.view(np.uint8).size == x.nbytes


def test_copies_own_their_memory() -> None:
    x = minitorch.tensor([1.0, 2.0], minitorch.TensorBackend(minitorch.CudaOps))._tensor
    for y in (copy.deepcopy(x), pickle.loads(pickle.dumps(x))):
        assert y.on_device and y._storage.pointer != x._storage.pointer
        assert np.asarray(y._storage).tolist() == [1, 2]


def test_device_array_refuses_what_does_not_fit() -> None:
    x = DeviceArray.from_host(np.zeros(3))
    with pytest.raises(IndexError, match="position 3 is outside an array of 3"):
        x[3]
    with pytest.raises(ValueError, match="step 1"):
        x[::2]
    with pytest.raises(ValueError, match="3 elements, got 4"):
        x.copy_from_host(np.zeros(4))
    with pytest.raises(ValueError, match="3 elements of float64, got 3 of float32"):
        x.copy_from_device(DeviceArray.empty(3, np.float32))


def test_fill_has_the_bits_of_the_number() -> None:
    for dtype in DTYPES:
        x = DeviceArray.empty(5, dtype)
        for value in (0.1, -np.inf, -0.0):
            x.fill(value)
            expected = np.full(5, value).astype(dtype)
            assert x.copy_to_host().tobytes() == expected.tobytes(), (dtype, value)


# ----- the allocator -----


def test_a_freed_block_is_the_next_ones() -> None:
    gc.collect()
    x = DeviceArray.empty(1000, np.float32)
    pointer, array = x.pointer, x.array
    before = minitorch.cuda.memory_allocated()
    del x
    assert minitorch.cuda.memory_allocated() == before - 4096
    y = DeviceArray.empty(990, np.float32)  # of the same bucket
    assert y.pointer == pointer
    assert DeviceArray.empty(1000, np.float32).pointer != pointer
    del y
    assert DeviceArray.empty(1000, np.float32).array is array  # numba's array was kept with it


def test_views_keep_memory() -> None:
    gc.collect()
    before = minitorch.cuda.memory_allocated()
    x = DeviceArray.from_host(np.arange(1000))
    part = x[10:20]
    del x
    assert minitorch.cuda.memory_allocated() > before
    np.testing.assert_array_equal(part.copy_to_host(), np.arange(10, 20))
    del part
    assert minitorch.cuda.memory_allocated() == before


def test_statistics() -> None:
    gc.collect()
    minitorch.cuda.empty_cache()
    minitorch.cuda.reset_peak_memory_stats()
    start, reserved = minitorch.cuda.memory_allocated(), minitorch.cuda.memory_reserved()
    x = DeviceArray.empty(1 << 20, np.uint8)
    y = DeviceArray.empty(1 << 20, np.uint8)
    assert minitorch.cuda.memory_allocated() == start + (2 << 20)
    del y
    assert minitorch.cuda.memory_allocated() == start + (1 << 20)
    assert minitorch.cuda.max_memory_allocated() == start + (2 << 20)
    assert minitorch.cuda.memory_reserved() == reserved + (2 << 20)
    minitorch.cuda.empty_cache()
    assert minitorch.cuda.memory_reserved() == reserved + (1 << 20)
    minitorch.cuda.reset_peak_memory_stats()
    assert minitorch.cuda.max_memory_allocated() == start + (1 << 20)
    np.testing.assert_array_equal(x[:3].copy_to_host().shape, (3,))


@given(st.integers(0, 1 << 40))
def test_buckets_lose_at_most_an_eighth(nbytes: int) -> None:
    size = allocator.bucket_size(nbytes)
    assert size >= max(nbytes, 1) and size % 512 == 0
    assert size <= max(nbytes * 9 // 8, nbytes + 512)
    assert allocator.bucket_size(size) == size


def test_private_pools() -> None:
    pool = allocator.Pool()
    with allocator.use_pool(pool):
        inside = DeviceArray.empty(300, np.uint8)
        pointer = inside.pointer
        assert allocator.is_capturing()
        del inside
        again = DeviceArray.empty(300, np.uint8)
        assert again.pointer == pointer
    outside = [DeviceArray.empty(300, np.uint8) for _ in range(4)]
    del again
    assert pointer not in [x.pointer for x in (*outside, DeviceArray.empty(300, np.uint8))]
    reserved = minitorch.cuda.memory_reserved()
    pool.close()
    assert minitorch.cuda.memory_reserved() == reserved - 512


@pytest.mark.parametrize("size", [1, 2, 3, 1000, 4097])
def test_fill_of_many(size: int) -> None:
    x = DeviceArray.empty(size + 1, np.float64)
    x.fill(0.5)
    x[:size].fill(0.1)
    assert x.copy_to_host().tolist() == [0.1] * size + [0.5]


def test_out_of_memory_is_one_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    kept = DeviceArray.from_host(np.arange(5.0))
    with monkeypatch.context() as patch:
        patch.setattr(cuda_driver, "allocate", lambda nbytes: None)
        patch.setattr(cuda_driver, "memory_info", lambda: (3 << 30, 80 << 30))
        with pytest.raises(OutOfMemoryError) as caught:
            DeviceArray.empty(7 << 30, np.uint8)
    assert isinstance(caught.value, MemoryError)
    message = str(caught.value)
    assert "wanted 7.00 GiB, free 3.00 GiB of 80.00 GiB" in message
    assert "minitorch's tensors hold" in message
    np.testing.assert_array_equal(kept.copy_to_host(), np.arange(5.0))


def test_an_allocation_that_fails_empties_the_cache_first(monkeypatch: pytest.MonkeyPatch) -> None:
    minitorch.cuda.empty_cache()
    del_me = DeviceArray.empty(1 << 20, np.uint8)
    del del_me
    allocate, reserved = cuda_driver.allocate, minitorch.cuda.memory_reserved()

    def only_when_empty(nbytes: int) -> int | None:
        return allocate(nbytes) if minitorch.cuda.memory_reserved() < reserved else None

    monkeypatch.setattr(cuda_driver, "allocate", only_when_empty)
    DeviceArray.empty(5 << 20, np.uint8)
    assert minitorch.cuda.memory_reserved() == reserved + (4 << 20)


@pytest.mark.gpu
def test_out_of_memory_on_the_gpu(gpu: minitorch.TensorBackend) -> None:
    _, total = cuda_driver.memory_info()
    before = minitorch.cuda.memory_allocated()
    with pytest.raises(OutOfMemoryError, match=r"wanted .* GiB, free .* GiB of"):
        minitorch.zeros((total // 4 + 1000,), backend=gpu, dtype=np.float32)
    assert minitorch.cuda.memory_allocated() <= before  # it looked for garbage too
    assert minitorch.ones((1000, 1000), backend=gpu).sum().item() == 1e6


@pytest.mark.gpu
def test_memory_of_another_stream_waits(gpu: minitorch.TensorBackend) -> None:
    stream = runtime.cuda.stream()
    x = DeviceArray.empty(1 << 20, np.uint8)
    pointer = x.pointer
    x.record_stream(stream)
    with runtime.on_stream(stream):
        for _ in range(50):
            x.fill(1)
    del x
    first = DeviceArray.empty(1 << 20, np.uint8)
    minitorch.cuda.synchronize()
    second = DeviceArray.empty(1 << 20, np.uint8)
    assert pointer in (first.pointer, second.pointer)  # it comes back once the stream is done
    with runtime.on_stream(stream):
        assert DeviceArray.empty(1 << 20, np.uint8).pointer not in (first.pointer, second.pointer)


# ----- tensors: every operation, value and gradient, against the CPU -----


def on_cpu_and_gpu(op: Op, backend: Any, dtype: Any, shapes: Any) -> list[list[Any]]:
    """Output and gradients of an operation on the CPU and on the GPU."""
    draw = np.random.default_rng(3)
    arrays = [draw.uniform(op.low, op.high, shape).astype(dtype) for shape in shapes]
    found = []
    for where in (CPU, backend):
        inputs = [minitorch.tensor(array, backend=where) for array in arrays]
        out = op.function(*inputs)
        grad = np.linspace(0.5, 1.5, out.size).reshape(out.shape).astype(out.dtype)
        out.backward(out._from_numpy(grad))
        found.append([out.to_numpy(), *(x.grad.to_numpy() for x in inputs if x.grad is not None)])
    return found


@pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
@settings(max_examples=2 if runtime.SIMULATED else 10)
@given(data=st.data())
def test_operations_agree_with_the_cpu(op: Op, data: st.DataObject) -> None:
    backend = minitorch.TensorBackend(minitorch.CudaKernelOps)
    # On a GPU each dtype is another set of kernels to compile: float64 is for the simulator.
    dtype = data.draw(st.sampled_from([np.float32, np.float64][: 1 + runtime.SIMULATED]))
    shapes = data.draw(op.shapes)
    cpu, gpu = on_cpu_and_gpu(op, backend, dtype, shapes)
    tolerance = 2e-4 if dtype == np.float32 else 1e-9
    for expected, got in zip(cpu, gpu, strict=True):
        assert (expected.shape, expected.dtype) == (got.shape, got.dtype)
        np.testing.assert_allclose(got, expected, rtol=tolerance, atol=tolerance)


KEYS = [
    1,
    (slice(1, 3),),
    (slice(None), 1),
    (..., 1),
    (slice(None, None, 2), slice(3, 0, -1)),
    (None, 1, ..., slice(0, 0)),
    (slice(5, 9), slice(None)),
]


@pytest.mark.parametrize("key", KEYS, ids=str)
def test_slices(backend: minitorch.TensorBackend, key: Any) -> None:
    array = np.arange(24.0).reshape(2, 3, 4).transpose(2, 0, 1)
    x = minitorch.tensor(array, backend=backend).permute(1, 2, 0).permute(2, 0, 1)
    part = x[key]
    np.testing.assert_array_equal(part.to_numpy(), array[key])
    grad = np.arange(float(part.size)).reshape(part.shape)
    x = minitorch.tensor(array, backend=backend)
    x[key].backward(x._from_numpy(grad))
    expected = np.zeros(array.shape)
    expected[key] = grad
    assert x.grad is not None
    np.testing.assert_array_equal(x.grad.to_numpy(), expected)


@pytest.mark.parametrize("name", ["CudaOps", "CudaKernelOps"])
def test_class_numbers(name: str) -> None:
    backend = minitorch.TensorBackend(getattr(minitorch, name))
    with pytest.raises(ValueError, match="whole numbers from 0 to"):
        minitorch.Embedding(4, 3, backend=backend)(
            minitorch.tensor([4.0], backend=backend)
        ).sum().item()


def test_slices_are_views(gpu: minitorch.TensorBackend) -> None:
    x = minitorch.zeros((4, 5), backend=gpu)
    part = x[1:3, 2:]
    part[0, 0] = 7.0
    assert x[1, 2] == 7.0 and part[0, 0] == 7.0
    assert part._tensor._storage.pointer == x._tensor._storage.pointer + 7 * 8
    with pytest.raises(minitorch.IndexingError, match="does not fit shape"):
        x[1, 2, 3, 4:]


def test_scalars_and_text(gpu: minitorch.TensorBackend) -> None:
    x = minitorch.tensor([[1.5, -2.0]], backend=gpu)
    cpu = minitorch.tensor([[1.5, -2.0]])
    assert repr(x) == repr(cpu) and x.to_numpy().tolist() == [[1.5, -2.0]]
    assert (x[0, 1], x.sum().item(), float(x[0, :1])) == (-2.0, -0.5, 1.5)
    assert bool(x == x) and not bool(x == cpu.to(gpu) * 2.0)
    assert np.asarray(x).tolist() == [[1.5, -2.0]]
    with pytest.raises(TypeError, match=r"on the GPU.*to_numpy"):
        x.numpy()


# ----- dtypes -----


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dtypes(backend: minitorch.TensorBackend, dtype: np.dtype[Any]) -> None:
    array = np.random.default_rng(0).normal(size=(3, 5)).astype(np.float32)
    x = minitorch.tensor(array, backend=backend)
    y = x.to(dtype.name)
    assert y.dtype == dtype
    np.testing.assert_array_equal(y.to_numpy(), array.astype(dtype))
    z = (y * 2.0 + 1.0).sum(1)
    assert z.dtype == dtype
    z.sum().backward()
    assert x.grad is not None and x.grad.dtype == np.float32
    np.testing.assert_array_equal(x.grad.to_numpy(), np.full((3, 5), 2.0))
    assert minitorch.tensor(array.astype(dtype), backend=backend).dtype == dtype
    assert minitorch.ones((2,), backend=backend, dtype=dtype).to_numpy().tolist() == [1, 1]


def test_half_precision_is_for_the_gpu() -> None:
    with pytest.raises(TypeError, match=r"float32 or float64, got bfloat16.*GPU"):
        minitorch.tensor([1.0], backend=CPU).to("bfloat16")
    with pytest.raises(TypeError, match="float16 or bfloat16 on the GPU, got int64"):
        gpu = minitorch.TensorBackend(minitorch.CudaOps)
        minitorch.tensor([1.0], backend=gpu).to(np.int64)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_mean_of_half_precision_does_not_overflow(gpu: minitorch.TensorBackend, dtype: str) -> None:
    x = minitorch.tensor(np.full((4, 32), 30000.0, np.float32), backend=gpu).to(dtype)
    mean = x.mean()
    assert mean.dtype.name == dtype and mean.item() == x[0, 0]
    assert x.mean(1).shape == (4, 1) and x.mean(1)[3, 0] == x[0, 0]


# ----- from one backend to the other -----


def test_gradients_come_back(backend: minitorch.TensorBackend) -> None:
    x = minitorch.tensor([[1.0, 2.0], [3.0, 4.0]], backend=CPU)
    there = x.permute(1, 0).to(backend)
    assert there.backend is backend and there._tensor.on_device
    back = (there * there).to(CPU)
    assert back.backend is CPU and not back._tensor.on_device
    back.sum().backward()
    assert x.grad is not None and x.grad.backend is CPU
    np.testing.assert_array_equal(x.grad.to_numpy(), 2 * x.to_numpy())
    assert x.to(CPU) is x
    assert there.to("bfloat16").to(CPU).dtype == np.float32


def test_tensors_in_two_places(gpu: minitorch.TensorBackend) -> None:
    here, there = minitorch.tensor([1.0], backend=CPU), minitorch.tensor([1.0], backend=gpu)
    for a, b in ((here, there), (there, here)):
        with pytest.raises(ValueError, match="Add: some of its tensors are on the GPU and some on"):
            a + b


def test_modules_and_optimisers(gpu: minitorch.TensorBackend) -> None:
    minitorch.manual_seed(1)
    model = minitorch.DecoderLM(5, 4, 2, 6, p_dropout=0.0, n_layer=1, middle_dim=8, backend=CPU)
    ids = minitorch.tensor([[1.0, 4.0, 2.0]], backend=CPU, requires_grad=False)
    expected = model(ids).to_numpy()
    before = model.state_dict()
    assert model.to(gpu) is model and model.backend is gpu
    assert all(p.value._tensor.on_device and p.value.is_leaf() for p in model.parameters())
    np.testing.assert_allclose(model(ids.to(gpu)).to_numpy(), expected, rtol=1e-9, atol=1e-12)
    model.load_state_dict(before)

    optimizer = minitorch.AdamW(model.parameters())
    loss = minitorch.softmax_loss(model(ids.to(gpu)).view(3, 5), ids.to(gpu).view(3)).mean()
    loss.backward()
    optimizer.step()
    state = optimizer.state_dict()
    other = minitorch.AdamW(model.parameters())
    other.load_state_dict(state)
    for name, array in other.state_dict().items():
        np.testing.assert_array_equal(array, state[name])
    assert model.to(CPU)(ids).shape == (1, 3, 5)


@pytest.mark.parametrize("flash", [False, True])
def test_a_cache_of_keys(gpu: minitorch.TensorBackend, flash: bool) -> None:
    model = minitorch.DecoderLM(
        5, 4, 2, 6, 0.0, n_layer=1, middle_dim=8, backend=gpu, use_flash_attention=flash
    )
    ids = minitorch.tensor([[1.0, 4.0, 2.0, 0.0]], backend=gpu, requires_grad=False)
    whole = model(ids).to_numpy()
    cache = model.init_cache()
    parts = [model(ids[:, a:b], cache).to_numpy() for a, b in ((0, 2), (2, 3), (3, 4))]
    np.testing.assert_allclose(np.concatenate(parts, 1), whole, rtol=1e-6, atol=1e-9)


# ----- errors that kernels find -----


def test_deferred_errors(gpu: minitorch.TensorBackend) -> None:
    table = minitorch.Embedding(4, 3, backend=gpu)
    good = minitorch.tensor([1.0, 3.0], backend=gpu, requires_grad=False)
    bad = minitorch.tensor([1.0, 4.0], backend=gpu, requires_grad=False)
    out = table(bad)
    with pytest.raises(ValueError, match="Embedding: x must hold whole numbers"):
        out.to_numpy()
    assert table(good).to_numpy().shape == (2, 3)  # said once
    logits = minitorch.zeros((2, 4), backend=gpu)
    loss = minitorch.softmax_loss(logits, minitorch.tensor([-1.0, 2.0], backend=gpu))
    with pytest.raises(ValueError, match="softmax_loss: target must hold whole numbers"):
        loss.sum().item()
    minitorch.cuda.synchronize()
    assert error_word().copy_to_host().tolist() == [0]


# ----- the bus -----


@pytest.fixture
def bus(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The names of all copies between the host and the device."""
    seen: list[str] = []
    for name in ("copy_to_device", "copy_to_host"):
        original = getattr(cuda_driver, name)

        def spy(*args: Any, name: str = name, original: Any = original) -> None:
            seen.append(name)
            original(*args)

        monkeypatch.setattr(cuda_driver, name, spy)
    yield seen


@pytest.mark.parametrize(
    ("dropout", "flash"),
    [(0.1, True), pytest.param(0.0, False, marks=pytest.mark.thorough)],
)
def test_nothing_crosses_the_bus_in_a_step(
    gpu: minitorch.TensorBackend, bus: list[str], flash: bool, dropout: float
) -> None:
    """Forward, backward and optimiser, after a first step has made constants."""
    model = minitorch.DecoderLM(
        5, 4, 2, 3, dropout, n_layer=1, middle_dim=8, backend=gpu, use_flash_attention=flash
    )
    ids = minitorch.tensor([[1.0, 4.0, 2.0]], backend=gpu, requires_grad=False)
    targets = ids.view(3)
    optimizer = minitorch.AdamW(model.parameters())

    def step() -> Tensor:
        optimizer.zero_grad()
        with rng.repeatable_step(0):  # outside of it the host draws the masks of dropout
            logits = model(ids).view(3, 5)
        loss = minitorch.softmax_loss(logits, targets).mean()
        loss.backward()
        optimizer.step()
        return loss

    step()
    bus.clear()
    loss = step()
    assert bus == []
    assert np.isfinite(loss.item()) and bus


def test_standard_attention_stays_on_the_device(
    gpu: minitorch.TensorBackend, bus: list[str]
) -> None:
    q, k, v = (minitorch.rand((1, 2, 3, 4), backend=gpu) for _ in range(3))
    (q.attention(k, v, is_causal=True) ** 2.0).sum()  # makes its constants
    bus.clear()
    (q.attention(k, v, is_causal=True) ** 2.0).sum().backward()
    assert bus == []


def test_functions_are_those_of_the_table() -> None:
    assert {"Move", "BandFill"} <= set(vars(tensor_functions))
