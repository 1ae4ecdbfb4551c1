"""The fused operations of `CudaKernelOps` on tensors, against `FusedOps` in float64 on the host."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import minitorch
from minitorch.cuda import allocator
from minitorch.cuda.device_array import DeviceArray
from minitorch.cuda_kernel_ops import CudaKernelOps
from minitorch.cuda_ops import CudaOps
from minitorch.fused_ops import FusedOps
from minitorch.kernels.gpu import runtime
from tests.test_fused_checks import layer_results
from tests.wrong_calls import answers

Array = NDArray[Any]

pytestmark = pytest.mark.skipif(not runtime.is_available(), reason="no GPU and no simulator")

GPU = minitorch.TensorBackend(CudaKernelOps)
HOST = minitorch.TensorBackend(minitorch.SimpleOps)
TOLERANCE = {"float32": 1e-5, "float64": 1e-12, "float16": 4e-3, "bfloat16": 3e-2}
DTYPES = pytest.mark.parametrize("dtype", sorted(TOLERANCE))


def pair(seed: int, dtype: str, *shape: int) -> tuple[Any, Any]:
    """A tensor on the GPU and the same numbers in float64 on the host."""
    numbers = np.random.default_rng(seed).standard_normal(shape).astype(np.float32)
    device = minitorch.tensor(numbers, backend=GPU).to(dtype)
    return device, on_host(device)


def on_host(t: Any) -> Any:
    return minitorch.tensor(t.to_numpy().astype(np.float64), backend=HOST)


def permuted(pairs: tuple[Any, Any]) -> tuple[Any, Any]:
    """The same with the first two dimensions exchanged: not row-major."""
    order = [1, 0, *range(2, pairs[0].dims)]
    device, host = pairs
    return device._new(device._tensor.permute(*order)), host._new(host._tensor.permute(*order))


def assert_same(actual: Any, expected: Any, dtype: str) -> None:
    assert actual.shape == expected.shape
    assert actual._tensor.on_device and actual.backend is GPU
    truth = expected.to_numpy()
    size = max(1.0, float(np.abs(truth).max(initial=0.0)))
    np.testing.assert_allclose(
        actual.to_numpy().astype(np.float64), truth, atol=TOLERANCE[dtype] * size
    )


@DTYPES
@pytest.mark.parametrize("dim", [0, 1, 2])
def test_softmax_and_logsumexp(dtype: str, dim: int) -> None:
    x, expected_x = permuted(pair(1, dtype, 4, 3, 5))
    grad, expected_grad = permuted(pair(2, dtype, 4, 3, 5))
    y = CudaKernelOps.softmax_forward(x, dim)
    assert_same(y, FusedOps.softmax_forward(expected_x, dim), dtype)
    dx = CudaKernelOps.softmax_backward(grad, y, dim)
    assert_same(dx, FusedOps.softmax_backward(expected_grad, on_host(y), dim), dtype)

    total = CudaKernelOps.logsumexp_forward(x, dim)
    assert_same(total, FusedOps.logsumexp_forward(expected_x, dim), dtype)
    dtotal, expected_dtotal = pair(3, dtype, *total.shape)
    dx = CudaKernelOps.logsumexp_backward(dtotal, x, total)
    expected = FusedOps.logsumexp_backward(expected_dtotal, expected_x, on_host(total))
    assert_same(dx, expected, dtype)


MASK_SHAPES = [(2, 1, 1, 8), (1, 1, 1, 8), (1, 1, 4, 8), (2, 3, 4, 8), (2, 1, 4, 1), (4, 8), (8,)]


@pytest.mark.parametrize(
    ("dtype", "mask_shape"),
    [("float32", shape) for shape in MASK_SHAPES]
    + [(dtype, MASK_SHAPES[0]) for dtype in ("float64", "float16", "bfloat16")],
)
def test_attn_softmax(dtype: str, mask_shape: tuple[int, ...]) -> None:
    inp, expected_inp = pair(4, dtype, 2, 3, 4, 8)
    mask, expected_mask = pair(5, dtype, *mask_shape)
    y = CudaKernelOps.attn_softmax_fw(inp, mask)
    assert_same(y, FusedOps.attn_softmax_fw(expected_inp, expected_mask), dtype)
    grad, expected_grad = pair(6, dtype, 2, 3, 4, 8)
    dx = CudaKernelOps.attn_softmax_bw(grad, y)
    assert_same(dx, FusedOps.attn_softmax_bw(expected_grad, on_host(y)), dtype)


def test_attn_softmax_broadcasts_in_any_dimension() -> None:
    inp, expected_inp = pair(4, "float32", 2, 3, 2, 3, 2, 4)
    mask, expected_mask = pair(5, "float32", 2, 1, 2, 1, 2, 4)
    y = CudaKernelOps.attn_softmax_fw(inp, mask)
    assert_same(y, FusedOps.attn_softmax_fw(expected_inp, expected_mask), "float32")
    with pytest.raises(ValueError, match="mask must broadcast to inp"):
        CudaKernelOps.attn_softmax_fw(inp, pair(5, "float32", 3, 4)[0])


@DTYPES
@pytest.mark.parametrize("weight_dtype", ["same", "float32"])
def test_layernorm(dtype: str, weight_dtype: str) -> None:
    of_weight = dtype if weight_dtype == "same" else weight_dtype
    x, expected_x = permuted(pair(7, dtype, 3, 2, 12))
    gamma, expected_gamma = pair(8, of_weight, 12)
    beta, expected_beta = pair(9, of_weight, 12)
    out, var, mean = CudaKernelOps.layernorm_fw(x, gamma, beta, 1e-5)
    expected = FusedOps.layernorm_fw(expected_x, expected_gamma, expected_beta, 1e-5)
    assert var.dtype == mean.dtype == np.dtype("float64" if dtype == "float64" else "float32")
    weaker = max(dtype, of_weight, key=lambda name: TOLERANCE[name])
    for actual, wanted in zip((out, var, mean), expected, strict=True):
        assert_same(actual, wanted, weaker)

    grad, expected_grad = pair(10, dtype, 2, 3, 12)
    gradients = CudaKernelOps.layernorm_bw(grad, x, gamma, beta, var, mean, 1e-5)
    wanted_gradients = FusedOps.layernorm_bw(
        expected_grad, expected_x, expected_gamma, expected_beta, *expected[1:], 1e-5
    )
    assert [g.dtype for g in gradients] == [x.dtype, gamma.dtype, beta.dtype]
    for actual, wanted in zip(gradients, wanted_gradients, strict=True):
        assert_same(actual, wanted, weaker)


@DTYPES
def test_gelu(dtype: str) -> None:
    x, expected_x = permuted(pair(11, dtype, 5, 7))
    grad, expected_grad = permuted(pair(12, dtype, 5, 7))
    assert_same(CudaKernelOps.gelu_forward(x), FusedOps.gelu_forward(expected_x), dtype)
    expected = FusedOps.gelu_backward(expected_grad, expected_x)
    assert_same(CudaKernelOps.gelu_backward(grad, x), expected, dtype)


@DTYPES
def test_dropout_has_the_mask_of_the_cpu(dtype: str) -> None:
    x, expected_x = pair(13, dtype, 3, 11)
    for seed in (0, 5, 2**63 + 17):
        out = CudaKernelOps.dropout_forward(x, 0.4, seed)
        expected = minitorch.SimpleOps.dropout_forward(expected_x, 0.4, seed)
        assert_same(out, expected, dtype)
        np.testing.assert_array_equal(out.to_numpy() == 0, expected.to_numpy() == 0)


@DTYPES
def test_embedding(dtype: str) -> None:
    numbers = np.array([[0, 3, 3], [6, 0, 3]], np.float32)
    ids = minitorch.tensor(numbers, backend=GPU)
    weight, expected_weight = pair(14, dtype, 7, 10)
    out = CudaKernelOps.embedding_forward(ids, weight)
    assert_same(out, FusedOps.embedding_forward(on_host(ids), expected_weight), dtype)
    grad, expected_grad = pair(15, dtype, 2, 3, 10)
    dweight = CudaKernelOps.embedding_backward(grad, ids, 7)
    assert_same(dweight, FusedOps.embedding_backward(expected_grad, on_host(ids), 7), dtype)


@DTYPES
def test_cross_entropy(dtype: str) -> None:
    real = "float64" if dtype == "float64" else "float32"
    logits, expected_logits = pair(16, dtype, 6, 5)
    target = minitorch.tensor([0, 4, 2, 2, 1, 3], backend=GPU)
    loss, logsumexp = CudaKernelOps.cross_entropy_forward(logits, target)
    expected = FusedOps.cross_entropy_forward(expected_logits, on_host(target))
    assert loss.dtype == logsumexp.dtype == np.dtype(real)
    assert_same(loss, expected[0], real)
    assert_same(logsumexp, expected[1], real)
    grad, expected_grad = pair(17, real, 6)
    dx = CudaKernelOps.cross_entropy_backward(grad, logits, target, logsumexp)
    wanted = FusedOps.cross_entropy_backward(
        expected_grad, expected_logits, on_host(target), expected[1]
    )
    assert_same(dx, wanted, dtype)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_adamw_step(dtype: str) -> None:
    pairs = [pair(seed, dtype, 3, 7) for seed in range(4)]
    (p, p_host), (g, g_host), (m, m_host), (root, _) = pairs
    squares = root * root
    options: dict[str, Any] = {
        "lr": 0.1, "beta1": 0.9, "beta2": 0.99, "eps": 1e-8, "weight_decay": 0.1, "step": 3
    }  # fmt: skip
    expected_squares = on_host(squares)
    CudaKernelOps.adamw_step(p, g, m, squares, **options)
    FusedOps.adamw_step(p_host, g_host, m_host, expected_squares, **options)
    for actual, wanted in ((p, p_host), (m, m_host), (squares, expected_squares)):
        assert_same(actual, wanted, dtype)


def test_views_that_begin_within_a_vector() -> None:
    """A slice's first element need not lie where a kernel can read 16 bytes."""
    x, expected = pair(18, "float32", 5, 8)
    part = x._new(x._tensor.slice((slice(1, 5), slice(1, 8))))
    rows = x._new(x._tensor.slice((slice(1, 3),)))
    for device, host in ((part, expected.to_numpy()[1:5, 1:]), (rows, expected.to_numpy()[1:3])):
        wanted = FusedOps.softmax_forward(minitorch.tensor(host.copy(), backend=HOST), 1)
        assert_same(CudaKernelOps.softmax_forward(device, 1), wanted, "float32")
        wanted = FusedOps.gelu_forward(minitorch.tensor(host.copy(), backend=HOST))
        assert_same(CudaKernelOps.gelu_forward(device), wanted, "float32")


def test_wrong_numbers_are_reported_when_something_is_copied_to_the_host() -> None:
    ids = minitorch.tensor([1.0, 7.0], backend=GPU)
    out = CudaKernelOps.embedding_forward(ids, pair(0, "float32", 7, 2)[0])
    with pytest.raises(ValueError, match="Embedding: "):
        out.to_numpy()
    loss, _ = CudaKernelOps.cross_entropy_forward(pair(0, "float32", 2, 7)[0], ids)
    with pytest.raises(ValueError, match="target must hold whole numbers"):
        loss.to_numpy()
    assert loss.to_numpy().shape == (2,)  # reported once


@pytest.mark.parametrize("ops", [CudaKernelOps, CudaOps])
def test_wrong_shapes_are_refused_as_on_the_cpu(ops: Any) -> None:
    assert answers(ops) == answers(minitorch.SimpleOps)


@pytest.mark.parametrize("shape", [(5,), (1, 5)])
@pytest.mark.parametrize("dtypes", [("float32", "float64"), ("float64", "float32")])
def test_weights_of_a_row_and_of_another_dtype(shape: Any, dtypes: Any) -> None:
    expected = layer_results(HOST, dtypes, shape)
    for name, array in layer_results(GPU, dtypes, shape).items():
        assert array.dtype == expected[name].dtype, name
        np.testing.assert_allclose(array, expected[name], rtol=1e-5, atol=1e-5, err_msg=name)


def test_dimensions_may_count_from_the_end() -> None:
    x, host = pair(4, "float64", 2, 3, 4)
    grad, host_grad = pair(5, "float64", 2, 3, 4)
    for dim in (-1, -2, -3):
        y = CudaKernelOps.softmax_forward(x, dim)
        assert_same(y, FusedOps.softmax_forward(host, dim), "float64")
        expected = FusedOps.softmax_backward(host_grad, on_host(y), dim)
        assert_same(CudaKernelOps.softmax_backward(grad, y, dim), expected, "float64")
        total = CudaKernelOps.logsumexp_forward(x, dim)
        assert_same(total, FusedOps.logsumexp_forward(host, dim), "float64")
        assert_same(GPU.add_reduce(x, dim), HOST.add_reduce(host, dim), "float64")


def test_every_fused_operation_has_a_kernel() -> None:
    """What is inherited from `FusedOps` goes through the host, but for what calls others."""
    names = {n for n in vars(FusedOps) if not n.startswith("_")} | {"dropout_forward"}
    for name in names - {"attn_softmax_bw"}:
        inherited = next(base for base in CudaKernelOps.__mro__ if name in vars(base))
        assert inherited in (CudaKernelOps, CudaOps), name


def test_empty_tensors() -> None:
    empty, weight = pair(0, "float32", 0, 4)[0], pair(1, "float32", 4)[0]
    assert CudaKernelOps.softmax_forward(empty, 1).shape == (0, 4)
    assert CudaKernelOps.gelu_forward(empty).shape == (0, 4)
    out, var, mean = CudaKernelOps.layernorm_fw(empty, weight, weight)
    assert (out.shape, var.shape, mean.shape) == ((0, 4), (0,), (0,))
    _, dgamma, dbeta = CudaKernelOps.layernorm_bw(empty, empty, weight, weight, var, mean)
    np.testing.assert_array_equal(dgamma.to_numpy(), np.zeros(4))
    np.testing.assert_array_equal(dbeta.to_numpy(), np.zeros(4))
    dweight = CudaKernelOps.embedding_backward(empty, pair(0, "float32", 0)[0], 3)
    np.testing.assert_array_equal(dweight.to_numpy(), np.zeros((3, 4)))


# ----- what functions of attention read -----


def test_arrays_of_a_block_mask_are_copied_to_the_gpu_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """So a CUDA graph that is captured afterwards may read them; others it refuses."""
    copied = []
    original = DeviceArray.from_host

    def noted(array: Any) -> Any:
        copied.append(array.dtype)
        return original(array)

    x, host = pair(3, "float32", 1, 2, 8, 4)
    ids, slopes = np.arange(8) // 3, np.ones(2, np.float32)
    mask = minitorch.create_block_mask(
        minitorch.attention_masks.document(ids), None, None, 8, 8, BLOCK_SIZE=4
    )
    alibi = minitorch.score_mods.alibi(slopes)
    wanted = host.attention(host, host, block_mask=mask)
    monkeypatch.setattr(DeviceArray, "from_host", staticmethod(noted))
    for number in range(2):
        copied.clear()
        assert_same(x.flash_attention(x, x, block_mask=mask), wanted, "float32")
        assert bool(copied) == (number == 0)
    monkeypatch.setattr(allocator, "is_capturing", lambda: True)
    assert_same(x.flash_attention(x, x, block_mask=mask), wanted, "float32")
    with pytest.raises(
        RuntimeError, match=r"reads an array of numpy, and a CUDA graph is captured"
    ):
        x.flash_attention(x, x, score_mod=alibi)


def test_a_tensor_that_a_score_function_reads_gets_its_gradient() -> None:
    found, mask = [], minitorch.attention_masks.bigbird(8, 2, 1, 1, 1)
    for given, x in zip(pair(4, "float32", 2, 4), pair(5, "float32", 1, 2, 8, 4), strict=True):
        table = given.detach()
        table.requires_grad_(True)
        relative = minitorch.score_mods.t5_bias(table.permute(1, 0), 4)
        out = x.flash_attention(x, x, score_mod=relative, block_mask=mask)
        (out * x).sum().backward()
        found.append(table.grad)
    assert np.abs(found[1].to_numpy()).max() > 1e-2
    assert_same(found[0], found[1], "float32")
