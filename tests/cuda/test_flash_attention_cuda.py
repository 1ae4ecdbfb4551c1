"""FlashAttention on the GPU against attention in float64, in every combination of arguments."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import minitorch
from minitorch import TensorBackend
from minitorch.cuda import attention as cuda_attention
from minitorch.cuda import driver as cuda_driver
from minitorch.cuda.device_array import DeviceArray
from minitorch.cuda_kernel_ops import CudaKernelOps
from minitorch.kernels.flash_attention.problem import AttentionProblem
from minitorch.kernels.flash_attention.simt.dropout import keep_factor, keep_maker, keep_size
from minitorch.kernels.flash_attention.simt.tiles import Blocks, Kind
from minitorch.kernels.gpu import runtime
from minitorch.kernels.gpu.runtime import SIMULATED, compute_capability, cuda, kernel, types
from minitorch.kernels.philox import attention_dropout_mask, dropout_threshold
from minitorch.tensor import Tensor
from minitorch.tensor_data import TensorData
from tests import references

BACKEND = TensorBackend(CudaKernelOps)
TOLERANCE = {"float32": 2e-5, "float64": 1e-11, "float16": 3e-3, "bfloat16": 2e-2}
LONGEST = 20 if SIMULATED else 200
MOST_COLUMNS = 12 if SIMULATED else 100
HALF_DTYPES = ("float16", "bfloat16")
# Modules with both passes.
IMPLEMENTATIONS = {m.NAME: m for m in cuda_attention.FLASH_ATTENTION if hasattr(m, "backward")}
NAMES = ("out", "logsumexp", "dq", "dk", "dv", "dmask")


def random(*shape: int, seed: int = 0) -> Any:
    return np.random.default_rng((seed, *shape)).standard_normal(shape)


def on_gpu(array: Any, dtype: str = "float32", layout: str = "plain") -> Tensor:
    """A tensor of the array's elements that lies in memory in one of several ways."""
    array = np.asarray(array).astype(minitorch.dtypes.BFLOAT16 if dtype == "bfloat16" else dtype)
    dims = array.ndim
    if layout == "heads" and dims >= 3:  # (..., H, N, D) cut out of (..., N, H, D)
        order = (*range(dims - 3), dims - 2, dims - 3, dims - 1)
        return _constant(array.transpose(order)).permute(*order).detach()
    if layout == "transposed":
        order = (*range(dims - 2), dims - 1, dims - 2)
        return _constant(array.transpose(order)).permute(*order).detach()
    if layout == "part":  # of a larger tensor; rows do not begin at multiples of 16 bytes
        wide = np.zeros((*array.shape[:-1], array.shape[-1] + 3), array.dtype)
        wide[..., 1:-2] = array
        return _constant(wide)[..., 1:-2].detach()  # type: ignore[no-any-return]
    return _constant(array)


def _constant(array: Any) -> Tensor:
    return Tensor(BACKEND.ops.from_numpy(np.ascontiguousarray(array)), backend=BACKEND)


attention: Any = references.attention


def problem_of(tensors: Any, **arguments: Any) -> AttentionProblem:
    q, k, v = (t.shape for t in tensors[:3])
    return AttentionProblem.of(q, k, v, tensors[0].dtype, **arguments)


def use(monkeypatch: pytest.MonkeyPatch, implementation: str, problem: AttentionProblem) -> None:
    """Let one implementation compute everything; skips the test where it cannot."""
    module = IMPLEMENTATIONS[implementation]
    reason = module.why_not(problem, compute_capability())
    if reason is not None:
        pytest.skip(f"{implementation}: {reason}")
    monkeypatch.setattr(cuda_attention, "FLASH_ATTENTION", (module,))


def run(
    tensors: Any, mask: Any, grads: Any, wants_mask: bool, problem: AttentionProblem
) -> tuple[Any, ...]:
    """What the kernels give, as numpy arrays in float64."""
    ops: Any = BACKEND.ops
    out, lse, rows = ops.flash_attention_forward(*tensors, mask, problem)
    gradients = ops.flash_attention_backward(
        grads[0], grads[1], *tensors, mask, out, rows, problem, wants_mask
    )
    return tuple(
        None if x is None else x.to_numpy().astype(np.float64) for x in (out, lse, *gradients)
    )


def check(
    shapes: Any,
    dtype: str = "float32",
    layouts: Any = ("plain",) * 4,
    mask: Any = None,
    dl: bool = True,
    **arguments: Any,
) -> None:
    """Outputs and gradients are those of attention in float64, of the same rounded inputs."""
    tensors = [
        on_gpu(random(*shape, seed=n), dtype, layout)
        for n, (shape, layout) in enumerate(zip(shapes, layouts[:3], strict=True))
    ]
    q, k, v = (t.to_numpy().astype(np.float64) for t in tensors)
    problem = problem_of(tensors, attn_mask=mask, **arguments)
    grad_out = on_gpu(random(*problem.out_shape, seed=5), dtype, layouts[3])
    real = "float64" if dtype == "float64" else "float32"
    grad_lse = on_gpu(random(*problem.logsumexp_shape, seed=6), real) if dl else None
    wants_mask = mask is not None and mask.dtype != bool
    ours = run(tensors, BACKEND.ops.attention_mask(mask), (grad_out, grad_lse), wants_mask, problem)
    p, kept = arguments.get("dropout_p", 0.0), None
    seed = arguments.pop("seed", 0)
    arguments.pop("fp32_precision", None)
    if p:
        lengths = problem.seqlen_q, problem.seqlen_k
        kept = attention_dropout_mask(problem.batch_heads, *lengths, p, seed)
    wanted: Any = attention(
        q, k, v, grad_out.to_numpy().astype(np.float64),
        None if grad_lse is None else grad_lse.to_numpy().astype(np.float64),
        attn_mask=mask if mask is None or mask.dtype == bool else mask.astype(np.float64),
        kept=kept, **arguments,
    )  # fmt: skip
    references_ = (
        wanted.out, wanted.logsumexp, wanted.grad_query, wanted.grad_key, wanted.grad_value,
        wanted.grad_mask,
    )  # fmt: skip
    for name, got, want in zip(NAMES, ours, references_, strict=True):
        if got is None:
            continue
        assert got.shape == want.shape, name
        scale = max(1.0, np.abs(want[np.isfinite(want)]).max(initial=0))
        if name == "dmask" and want.size:  # a sum of so many rounded numbers
            scores = problem.batch_heads * problem.seqlen_q * problem.seqlen_k
            scale *= max(1.0, scores / want.size) ** 0.5
        np.testing.assert_allclose(got, want, rtol=0, atol=TOLERANCE[dtype] * scale, err_msg=name)


# ----- every argument -----


@st.composite
def calls(draw: Any, dtype: str, mask_kind: str) -> dict[str, Any]:
    """Shapes with broadcasting, layouts, every flag."""
    call: dict[str, Any] = {"dtype": dtype}
    nq, nk = draw(st.integers(0, LONGEST)), draw(st.integers(0, LONGEST))
    d, dv = draw(st.integers(1, MOST_COLUMNS)), draw(st.integers(0, MOST_COLUMNS))
    if draw(st.booleans()):
        kv_heads, group, batch = (draw(st.integers(1, 2)) for _ in range(3))
        heads = kv_heads * group
        leading: list[Any] = [(batch, heads), (batch, kv_heads), (batch, kv_heads)]
        call["enable_gqa"], scores = True, (batch, heads, nq, nk)
    else:
        full = tuple(draw(st.lists(st.integers(1, 2), max_size=3)))
        leading = []
        for _ in range(3):
            own = tuple(n if draw(st.booleans()) else 1 for n in full)
            leading.append(own[draw(st.integers(0, len(own))) :])
        scores = (*np.broadcast_shapes(*leading), nq, nk)
    call["shapes"] = [
        (*lead, n, columns)
        for lead, n, columns in zip(leading, (nq, nk, nk), (d, d, dv), strict=True)
    ]
    layouts = st.sampled_from(["plain", "heads", "transposed", "part"])
    call["layouts"] = [draw(layouts) for _ in range(4)]
    if mask_kind != "none":
        shape = tuple(n if draw(st.booleans()) else 1 for n in scores)
        shape = shape[draw(st.integers(0, len(shape))) :]
        bias = random(*shape, seed=draw(st.integers(0, 99)))
        real = np.float64 if dtype == "float64" else np.float32
        additive = np.where(bias < -1, -np.inf, bias).astype(real)
        call["mask"] = bias > -0.5 if mask_kind == "bool" else additive
    call["is_causal"] = draw(st.sampled_from([False, True, "top-left", "bottom-right"]))
    side = st.none() | st.integers(-1, 12)
    call["window"] = draw(st.none() | st.tuples(side, side))
    call["scale"] = draw(st.none() | st.sampled_from([0.0, -0.3, 1.0]))
    call["dl"] = draw(st.booleans())
    if draw(st.booleans()):
        call["dropout_p"] = draw(st.sampled_from([0.2, 0.5, 1.0]))
        call["seed"] = draw(st.integers(0, 2**64 - 1))
    return call


@pytest.mark.parametrize("mask_kind", ["none", "bool", "additive"])
@pytest.mark.parametrize("dtype", TOLERANCE)
@settings(
    max_examples=3 if SIMULATED else 6,
    deadline=None,
    derandomize=True,
    suppress_health_check=list(HealthCheck),
)
@given(data=st.data())
def test_any_call(dtype: str, mask_kind: str, data: st.DataObject) -> None:
    check(**data.draw(calls(dtype, mask_kind)))


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("is_causal", [False, True])
def test_every_precision(dtype: str, is_causal: bool) -> None:
    check([(1, 2, 17, 8), (1, 2, 19, 8), (1, 2, 19, 8)], dtype, is_causal=is_causal)


def test_masks_and_dropout_together() -> None:
    """With a gradient of the mask, over dimensions that it broadcasts."""
    mask = np.where(random(2, 1, 1, 18) < -1, -np.inf, random(2, 1, 1, 18)).astype(np.float32)
    check(
        [(2, 2, 17, 6), (2, 1, 18, 6), (2, 1, 18, 5)], layouts=("heads", "heads", "part", "plain"),
        mask=mask, dropout_p=0.3, seed=2**63 + 5, enable_gqa=True, is_causal="bottom-right",
    )  # fmt: skip


def test_a_mask_whose_batch_has_no_single_stride() -> None:
    check([(2, 2, 1, 9, 3)] * 3, mask=random(2, 1, 1, 9, 9) > -0.5)


def test_rows_that_see_no_key() -> None:
    """Output 0, logsumexp -inf, gradients 0: also in the other rows of their tile."""
    allowed = random(11, 13) > 0
    allowed[[0, 5, 10]] = False
    check([(11, 8), (13, 8), (13, 8)], mask=allowed)
    check([(21, 8), (13, 8), (13, 8)], is_causal="bottom-right")


@pytest.mark.parametrize("lengths", [(0, 5), (5, 0), (0, 0), (1, 1)])
def test_short_sequences(lengths: Any) -> None:
    nq, nk = lengths
    check([(2, nq, 4), (2, nk, 4), (2, nk, 4)])


def test_the_output_lies_as_the_query() -> None:
    """Heads cut out of rows of a (B, N, H, D) tensor give such an output, and such gradients."""
    q, k, v, do = (on_gpu(random(2, 3, 9, 4, seed=n), layout="heads") for n in range(4))
    problem = AttentionProblem.of(q.shape, k.shape, v.shape, q.dtype)
    ops: Any = BACKEND.ops
    out, _, rows = ops.flash_attention_forward(q, k, v, None, problem)
    gradients = ops.flash_attention_backward(do, None, q, k, v, None, out, rows, problem)
    for x in (out, *gradients[:3]):
        assert x.permute(0, 2, 1, 3)._tensor.is_contiguous()


def test_dropout_keeps_what_the_mask_says() -> None:
    """Queries of 0 and values that are the unit vectors make the output the mask itself."""
    lengths, p, seed = (17, 9), 0.4, 12345678901234567890
    q, k = np.zeros((1, 3, 17, 4)), random(1, 3, 9, 4)
    v = np.broadcast_to(np.eye(9), (1, 3, 9, 9))
    tensors = [on_gpu(x) for x in (q, k, v)]
    problem = problem_of(tensors, dropout_p=p, seed=seed)
    ops: Any = BACKEND.ops
    out, *_ = ops.flash_attention_forward(*tensors, None, problem)
    kept = attention_dropout_mask(3, *lengths, p, seed)
    np.testing.assert_array_equal(out.to_numpy()[0] != 0, kept)


BIT_TILES = [(4, 8), (8, 4), (8, 8), (8, 16), (32, 8), (16, 16), (48, 32)]


@pytest.mark.parametrize("block_m, block_n", BIT_TILES)
def test_every_tile_of_scores_finds_its_bits(block_m: int, block_n: int) -> None:
    """Also one with a part of 16 rows or columns, wherever among the 16 it begins."""
    p, seed, blocks = 0.4, 2**40 + 3, Blocks(block_m, block_n, 4, 4)
    kind = Kind("float32", 8, 8, "none", True, False)
    make, factor_of = keep_maker(kind, blocks, 0), keep_factor(kind, blocks, 0)
    threads = blocks.threads

    @kernel(threads)
    def write_factors(out, row0, key0, threshold, seed):  # type: ignore[no-untyped-def]
        memory = cuda.shared.array(0, types.float32)
        keep_scale = types.float32(2.0)
        make(memory, row0, key0, 1, (seed, types.uint64(threshold), keep_scale))
        cuda.syncthreads()
        for place in range(cuda.threadIdx.x, block_m * block_n, threads):
            out[place] = factor_of(memory, place // block_n, place % block_n, keep_scale)

    mask = attention_dropout_mask(2, 64 + block_m, 64 + block_n, p, seed)[1]
    for number in range(4):
        row0, key0 = (4 + number) * block_m % 64, (5 + 3 * number) * block_n % 64
        out = cuda.to_device(np.full(block_m * block_n, np.nan, np.float32))
        runtime.launch(
            write_factors, 1, threads, out, row0, key0, dropout_threshold(p),
            np.uint64(seed), shared_bytes=4 * keep_size(kind, blocks),
        )  # fmt: skip
        kept = mask[row0 : row0 + block_m, key0 : key0 + block_n]
        np.testing.assert_array_equal(out.copy_to_host().reshape(kept.shape), 2.0 * kept)


def test_through_autograd() -> None:
    """`Tensor.flash_attention` and its gradients, with the logsumexp."""
    arrays = [random(1, 2, 9, 4, seed=n) for n in range(3)]
    tensors = [on_gpu(a) for a in arrays]
    for t in tensors:
        t.requires_grad_(True)
    out, lse = tensors[0].flash_attention(tensors[1], tensors[2], is_causal=True, return_lse=True)
    (out.sum() + lse.sum()).backward()
    want: Any = attention(*arrays, np.ones((1, 2, 9, 4)), np.ones((1, 2, 9)), is_causal=True)
    for t, gradient in zip(tensors, (want.grad_query, want.grad_key, want.grad_value), strict=True):
        assert t.grad is not None
        np.testing.assert_allclose(t.grad.to_numpy(), gradient, atol=1e-5)


def test_head_sizes_above_the_limit_are_refused() -> None:
    q, k, v = (on_gpu(random(1, 1, 3, 257)) for _ in range(3))
    with pytest.raises(ValueError, match="257"):
        q.flash_attention(k, v)


def test_more_heads_than_a_grid_has_rows() -> None:
    """A block's number is one-dimensional: 65,535 is no limit. Head sizes of 1."""
    heads = 40 if SIMULATED else 70_000
    check([(heads, 1, 1), (heads, 2, 1), (heads, 2, 1)])


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_heads_more_than_two_to_the_31_elements_apart(
    monkeypatch: pytest.MonkeyPatch, implementation: str
) -> None:
    """Of three heads in one array of NaNs the last begins beyond element 2**31: it gives the bits
    that it gives in an array of its own. In the simulator the array is small.
    """
    apart, rows, columns = (256, 8, 8) if SIMULATED else (2**30 + 8, 160, 64)
    count = rows * columns
    if not SIMULATED and cuda_driver.memory_info()[0] < 5 * apart:
        pytest.skip(f"needs {5 * apart >> 30} GiB of free GPU memory")
    shape = (3, rows, columns)
    near = [on_gpu(random(*shape, seed=n), "bfloat16") for n in range(4)]
    array = DeviceArray.empty(2 * apart + 4 * count, near[0].dtype)
    array.fill(math.nan)
    far = []
    for n, tensor in enumerate(near):
        for head, matrix in enumerate(tensor.to_numpy()):
            start = head * apart + n * count
            array[start : start + count].copy_from_host(matrix)
        data = TensorData._of(array[n * count :], shape, (apart, columns, 1))
        far.append(Tensor(data, backend=BACKEND))
    problem = problem_of(near, is_causal=True)
    use(monkeypatch, implementation, problem)
    there, here = (run(x[:3], None, (x[3], None), False, problem) for x in (far, near))
    for name, got, want in zip(NAMES[:5], there[:5], here[:5], strict=True):
        np.testing.assert_array_equal(got, want, err_msg=name)


# ----- on hardware -----


@pytest.mark.gpu
@pytest.mark.parametrize("columns", [1, 16, 40, 64, 96, 128, 160, 256])
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_head_sizes(columns: int, dtype: str) -> None:
    check([(1, 2, 150, columns), (1, 2, 201, columns), (1, 2, 201, columns)], dtype)
    check([(1, 2, 150, 64), (1, 2, 201, 64), (1, 2, 201, columns)], dtype, is_causal=True)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("dtype", "implementation", "dropout_p"),
    [("float32", "simt", 0.0), ("float32", "simt", 0.17)]
    + [(dtype, name, p) for dtype in HALF_DTYPES for name in IMPLEMENTATIONS for p in (0.0, 0.17)],
)
def test_250_runs_give_the_same_bits(
    monkeypatch: pytest.MonkeyPatch, dtype: str, implementation: str, dropout_p: float
) -> None:
    """After `test_flash_attn_race_condition` of Dao's FlashAttention."""
    nq, nk = (239, 128) if dtype == "float32" else (256, 256)
    tensors = [on_gpu(random(60, 4, n, 64, seed=n), dtype) for n in (nq, nk, nk)]
    grad_out = on_gpu(random(60, 4, nq, 64, seed=9), dtype)
    problem = problem_of(tensors, dropout_p=dropout_p, seed=3)
    use(monkeypatch, implementation, problem)
    ops: Any = BACKEND.ops
    first = None
    for _ in range(250):
        out, lse, rows = ops.flash_attention_forward(*tensors, None, problem)
        gradients = ops.flash_attention_backward(grad_out, None, *tensors, None, out, rows, problem)
        results = [x.to_numpy() for x in (out, lse, *gradients[:3])]
        first = first or results
        for name, a, b in zip(NAMES[:5], first, results, strict=True):
            assert a.tobytes() == b.tobytes(), name


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:Attempting to run cuBLAS")  # PyTorch's, in its first thread
@pytest.mark.parametrize(
    ("dtype", "implementation", "length"),
    [("float32", "simt", 257)]
    + [(dtype, name, 257) for dtype in HALF_DTYPES for name in IMPLEMENTATIONS],
)
@pytest.mark.parametrize("columns", [32, 64, 128])
@pytest.mark.parametrize("is_causal", [False, True])
def test_error_within_twice_pytorchs(
    monkeypatch: pytest.MonkeyPatch,
    dtype: str,
    implementation: str,
    length: int,
    columns: int,
    is_causal: bool,
) -> None:
    check_error(monkeypatch, (2, 3, length, columns), dtype, implementation, is_causal)


@pytest.mark.gpu
@pytest.mark.parametrize("is_causal", [False, True])
def test_error_of_long_sums(monkeypatch: pytest.MonkeyPatch, is_causal: bool) -> None:
    """dK and dV of the first keys are sums over 4096 queries, the early ones far the largest with a
    causal mask. Begun with these, the sums' errors would be 4 times PyTorch's.
    """
    check_error(monkeypatch, (1, 1, 4096, 64), "float32", "simt", is_causal)


def check_error(
    monkeypatch: pytest.MonkeyPatch,
    shape: tuple[int, ...],
    dtype: str,
    implementation: str,
    is_causal: bool,
) -> None:
    """Dao's criterion: the error against float64 is at most twice (three times for gradients) that
    of PyTorch's attention in the same dtype.
    """
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("PyTorch finds no GPU")
    inputs = [on_gpu(random(*shape, seed=n), dtype) for n in range(4)]
    problem = problem_of(inputs, is_causal=is_causal)
    use(monkeypatch, implementation, problem)
    ours = run(inputs[:3], None, (inputs[3], None), False, problem)
    exact = [x.to_numpy().astype(np.float64) for x in inputs]
    want: Any = attention(*exact, is_causal=is_causal)
    theirs = _pytorch(torch, exact, dtype, is_causal)
    wanted = (want.out, want.grad_query, want.grad_key, want.grad_value)
    mine = (ours[0], *ours[2:5])
    for name, got, other, truth in zip(
        ("out", "dq", "dk", "dv"), mine, theirs, wanted, strict=True
    ):
        error, bound = np.abs(got - truth).max(), np.abs(other - truth).max()
        assert error <= (2 if name == "out" else 3) * bound + 1e-6, (name, error, bound)


def _pytorch(torch: Any, exact: Any, dtype: str, is_causal: bool) -> Any:
    """Output and gradients of standard attention in PyTorch, all of it in `dtype`."""
    torch.backends.cuda.matmul.allow_tf32 = False
    q, k, v, do = (
        torch.tensor(x, dtype=getattr(torch, dtype), device="cuda", requires_grad=True)
        for x in exact
    )
    scores = (q / math.sqrt(q.shape[-1])) @ k.mT
    if is_causal:
        scores = scores.masked_fill(torch.ones_like(scores).triu(1).bool(), -math.inf)
    out = torch.softmax(scores, -1) @ v
    out.backward(do)
    return [x.detach().double().cpu().numpy() for x in (out, q.grad, k.grad, v.grad)]
