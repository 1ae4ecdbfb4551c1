"""What the launcher does for kernels: rows that are copied because they do not lie as needed, and
workspaces.
"""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import minitorch
from minitorch.cuda import attention as cuda_attention
from minitorch.cuda import driver as cuda_driver
from minitorch.cuda.device_array import DeviceArray
from minitorch.kernels.flash_attention.problem import AttentionProblem
from minitorch.kernels.flash_attention.simt import launch as simt
from minitorch.kernels.gpu.runtime import SIMULATED
from minitorch.tensor import Tensor
from minitorch.tensor_data import TensorData
from tests import references
from tests.attention_calls import NAMES, Family, call_of, check, random
from tests.attention_families import HOPPER, MMA, SIMT
from tests.cuda.attention import BACKEND, on_gpu

ALIGNMENT = 16


class Spy:
    """A module that computes with the SIMT kernels, and keeps what it was given."""

    def __init__(self, **more: Any) -> None:
        self.given: list[Any] = []
        self.workspaces: list[Any] = []
        self.module = SimpleNamespace(
            NAME="spy", why_not=simt.why_not, forward=self._forward, backward=self._backward, **more
        )

    def _forward(self, *arguments: Any, workspace: Any = None) -> None:
        self.given += arguments[2][:3]
        self.workspaces.append(workspace)
        simt.forward(*arguments)

    def _backward(self, *arguments: Any, workspace: Any = None) -> None:
        self.given += [*arguments[2][:3], arguments[5]]
        self.workspaces.append(workspace)
        simt.backward(*arguments)


def use(monkeypatch: pytest.MonkeyPatch, **more: Any) -> Spy:
    spy = Spy(**more)
    monkeypatch.setattr(cuda_attention, "FLASH_ATTENTION", (spy.module,))
    return spy


@pytest.mark.parametrize("layout", ["plain", "transposed", "part"])
@pytest.mark.parametrize(("dtype", "columns"), [("float16", 5), ("float32", 8)])
def test_rows_lie_as_the_kernel_needs(
    monkeypatch: pytest.MonkeyPatch, layout: str, dtype: str, columns: int
) -> None:
    """Contiguous, at multiples of 16 bytes; results and gradients as they would be without."""
    spy = use(monkeypatch, ROW_ALIGNMENT=ALIGNMENT)
    shapes = [(2, 2, 5, columns), (2, 1, 7, columns), (2, 1, 7, columns)]
    check(SIMT, shapes, dtype, layouts=(layout,) * 4)
    itemsize = np.dtype(dtype).itemsize
    assert len(spy.given) == 7
    for matrices in spy.given:
        assert matrices.strides[3] == 1
        assert matrices.address % ALIGNMENT == 0
        assert not any(step * itemsize % ALIGNMENT for step in matrices.strides[:3])


def test_what_lies_well_is_not_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    """Heads cut out of rows of a (B, N, H, D) tensor; the stride of a single head says nothing."""
    spy = use(monkeypatch, ROW_ALIGNMENT=ALIGNMENT)
    for heads in (1, 3):
        spy.given.clear()
        q, k, v = (on_gpu(random(2, heads, 9, 8, seed=n), layout="heads") for n in range(3))
        q.flash_attention(k, v)
        addresses = [x._tensor._storage.pointer for x in (q, k, v)]
        assert [matrices.address for matrices in spy.given] == addresses


def test_padding_is_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    """Between a row's end and the next multiple of the alignment."""
    spy = use(monkeypatch, ROW_ALIGNMENT=ALIGNMENT)
    q, k, v = (on_gpu(random(1, 1, 4, 5, seed=n), "float16") for n in range(3))
    q.flash_attention(k, v)
    for matrices in spy.given:
        rows = matrices.owner.copy_to_host().reshape(4, 8)
        assert np.isfinite(rows.astype(np.float64)).all()
        assert not rows[:, 5:].any()


def test_workspaces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of as many bytes as a module asks for, in the dtype of the logsumexp."""
    for dtype, size in (("float16", 4), ("float64", 8)):
        spy = use(
            monkeypatch,
            forward_workspace=lambda problem, heads, inputs, architecture: 40,
            backward_workspace=lambda problem, heads, inputs, architecture: 8 * heads.heads,
        )
        check(SIMT, [(1, 2, 9, 8)] * 3, dtype)
        sizes = [(array.size, array.dtype.itemsize) for array in spy.workspaces]
        assert sizes == [(40 // size, size), (16 // size, size)]
    spy = use(monkeypatch)
    check(SIMT, [(1, 2, 9, 8)] * 3, "float32")
    assert spy.workspaces == [None, None]


@pytest.mark.skipif(SIMULATED, reason="the simulator's memory is the host's: numpy is tested below")
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize(("rows", "columns"), [(200, 64), (200, 59), (1, 128)])
def test_arrays_of_pytorch(rows: int, columns: int, dtype: str) -> None:
    """Every kernel that this GPU has, through `minitorch.flash_attention`, with gradients."""
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("PyTorch finds no GPU")
    kind = getattr(torch, dtype)
    leaves = [
        torch.randn(2, 3, n, columns, device="cuda", dtype=kind, requires_grad=True)
        for n in (rows, 300, 300)
    ]
    ours = minitorch.flash_attention(*leaves)
    theirs = torch.nn.functional.scaled_dot_product_attention(*leaves)
    assert ours.dtype == kind
    bound = 2e-5 if dtype == "float32" else 2e-2
    assert (ours - theirs).abs().max() < bound
    grads = (torch.autograd.grad(out.float().sum(), leaves) for out in (ours, theirs))
    for got, want in zip(*grads, strict=True):
        scale = max(1.0, float(want.abs().max()))
        assert (got - want).abs().max() < bound * scale


def test_arrays_of_numpy_on_the_cpu() -> None:
    """`minitorch.flash_attention` with an array that is not on the GPU."""
    q, k, v = (random(2, 5, 4, seed=n).astype(np.float32) for n in range(3))
    out = minitorch.flash_attention(q, k, v, is_causal=True)
    assert isinstance(out, np.ndarray)
    assert out.shape == (2, 5, 4)


def test_the_output_lies_as_the_query() -> None:
    """Heads cut out of rows of a (B, N, H, D) tensor give such an output, and such gradients."""
    q, k, v, do = (on_gpu(random(2, 3, 9, 4, seed=n), layout="heads") for n in range(4))
    problem = AttentionProblem.of(q.shape, k.shape, v.shape, q.dtype)
    ops: Any = BACKEND.ops
    out, _, rows = ops.flash_attention_forward(q, k, v, None, problem)
    gradients = ops.flash_attention_backward(do, None, q, k, v, None, out, rows, problem)
    for x in (out, *gradients[:3]):
        assert x.permute(0, 2, 1, 3)._tensor.is_contiguous()


def test_through_autograd() -> None:
    """`Tensor.flash_attention` and its gradients, with the logsumexp."""
    arrays = [random(1, 2, 9, 4, seed=n) for n in range(3)]
    tensors = [on_gpu(a) for a in arrays]
    for t in tensors:
        t.requires_grad_(True)
    out, lse = tensors[0].flash_attention(tensors[1], tensors[2], is_causal=True, return_lse=True)
    (out.sum() + lse.sum()).backward()
    q, k, v = arrays
    grads = np.ones((1, 2, 9, 4)), np.ones((1, 2, 9))
    want = references.attention(q, k, v, *grads, is_causal=True)
    for t, gradient in zip(tensors, (want.grad_query, want.grad_key, want.grad_value), strict=True):
        assert t.grad is not None
        np.testing.assert_allclose(t.grad.to_numpy(), gradient, atol=1e-5)


@pytest.mark.parametrize("family", [SIMT, MMA, HOPPER], ids=lambda family: family.name)
def test_heads_more_than_two_to_the_31_elements_apart(
    monkeypatch: pytest.MonkeyPatch, family: Family
) -> None:
    """Of three heads in one array of NaNs the last begins beyond element 2**31: it gives the bits
    that it gives in an array of its own. In the simulator the array is small.
    """
    if SIMULATED and family is HOPPER:
        pytest.skip("the simulator has no descriptors of such arrays")
    family.force(monkeypatch)
    apart, rows, columns = (256, 8, 8) if SIMULATED else (2**30 + 8, 160, 64)
    count = rows * columns
    if not SIMULATED and cuda_driver.memory_info()[0] < 5 * apart:
        pytest.skip(f"needs {5 * apart >> 30} GiB of free GPU memory")
    arrays = [random(3, rows, columns, seed=n) for n in range(3)]
    near = call_of(family, arrays, "bfloat16", dl=0.0, is_causal=True)
    array = DeviceArray.empty(2 * apart + 4 * count, near.problem.dtype)
    array.fill(math.nan)
    far = []
    for n, tensor in enumerate(near.tensors):
        for head, matrix in enumerate(tensor.to_numpy()):
            start = head * apart + n * count
            array[start : start + count].copy_from_host(matrix)
        data = TensorData._of(array[n * count :], tensor.shape, (apart, columns, 1))
        far.append(Tensor(data, backend=BACKEND))
    there, here = family.compute(near._replace(tensors=far)), family.compute(near)
    for name, got, want in zip(NAMES[:5], there[:5], here[:5], strict=True):
        np.testing.assert_array_equal(got, want, err_msg=name)
