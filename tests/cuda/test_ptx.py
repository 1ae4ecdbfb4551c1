"""A warp's instructions against numpy: the GPU's, and in the simulator their emulation."""

from __future__ import annotations

from functools import cache
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest

from minitorch.kernels.gpu import ptx, ptx_simulated, runtime, shared_layout
from minitorch.kernels.gpu.ptx import (
    cp_async_cg_16,
    cp_async_commit_group,
    cvt_rna_tf32_f32,
    ex2_approx_ftz_f32,
    global_address,
    ld_shared_b32,
    ld_shared_v2_f32,
    lg2_approx_ftz_f32,
    mov_b32_halves,
    shared_address,
    shfl_sync_bfly_b32,
    shfl_sync_bfly_f32,
    shfl_sync_idx_b32,
    st_shared_b32,
    st_shared_v4_b32,
)
from minitorch.kernels.gpu.runtime import cuda, device_function, kernel, types

Array = npt.NDArray[Any]
DTYPES = {"float16": np.dtype(np.float16), "bfloat16": np.dtype(ml_dtypes.bfloat16)}
wait_for_copies = ptx.cp_async_wait_group(0)


def needs(*capability: int) -> None:
    if not runtime.SIMULATED and runtime.compute_capability() < capability:
        pytest.skip(f"these instructions need compute capability {capability}")


def bits(x: Array) -> Array:
    """As kernels get 16-bit numbers here."""
    return np.ascontiguousarray(x).view(np.uint16).reshape(-1)


# ----- products -----

POINTS = {
    "a": device_function(shared_layout.ldmatrix_a),
    "b": device_function(shared_layout.ldmatrix_b),
    "b trans": device_function(shared_layout.ldmatrix_b_trans),
    "a trans": device_function(shared_layout.ldmatrix_a_trans),
}
STEP = 24  # of the tiles' rows: 48 bytes, a multiple of 16
TILE = 16 * STEP


@cache
def product(dtype: str, a_trans: bool, b_trans: bool, short: bool) -> Any:
    """Of A (16, 16) and B (16, 16), or with their first 8 along k; stored transposed or not."""
    load_a, load_b = ptx.ldmatrix(trans=a_trans), ptx.ldmatrix(trans=b_trans)
    point_a = POINTS["a trans" if a_trans else "a"]
    point_b = POINTS["b trans" if b_trans else "b"]
    mma = ptx.mma("m16n8k8" if short else "m16n8k16", dtype)

    @kernel(32)
    def run(x, y, out):  # type: ignore[no-untyped-def]
        a_tile = cuda.shared.array(TILE, types.uint16)
        b_tile = cuda.shared.array(TILE, types.uint16)
        lane = cuda.threadIdx.x
        for n in range(lane, 256, 32):
            a_tile[n // 16 * STEP + n % 16] = x[n]
            b_tile[n // 16 * STEP + n % 16] = y[n]
        cuda.syncthreads()
        a_row, a_column = point_a(lane)
        b_row, b_column = point_b(lane)
        a = load_a(shared_address(a_tile) + types.uint32(2 * (a_row * STEP + a_column)))
        b = load_b(shared_address(b_tile) + types.uint32(2 * (b_row * STEP + b_column)))
        zero = types.float32(0.0)
        if short:
            left = mma((zero, zero, zero, zero), a[:2], b[:1])
            right = mma((zero, zero, zero, zero), a[:2], b[2:3])
        else:
            left = mma((zero, zero, zero, zero), a, b[:2])
            right = mma((zero, zero, zero, zero), a, b[2:])
        for n in range(4):
            out[lane * 8 + n] = left[n]
            out[lane * 8 + 4 + n] = right[n]

    return run


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("a_trans", [False, True])
@pytest.mark.parametrize("b_trans", [False, True])
@pytest.mark.parametrize("short", [False, True])
def test_ldmatrix_and_mma(dtype: str, a_trans: bool, b_trans: bool, short: bool) -> None:
    """B is kept like K, (columns, k), or with .trans like V, (k, columns)."""
    needs(7, 5) if short and dtype == "float16" else needs(8, 0)
    random = np.random.default_rng(0)
    a, b = (random.normal(size=(16, 16)).astype(DTYPES[dtype]) for _ in range(2))
    x = cuda.to_device(bits(a.T if a_trans else a))
    y = cuda.to_device(bits(b if b_trans else b.T))
    out = cuda.to_device(np.zeros(256, np.float32))
    runtime.launch(product(dtype, a_trans, b_trans, short), 1, 32, x, y, out)
    depth = 8 if short else 16
    expected = a[:, :depth].astype(np.float64) @ b[:depth].astype(np.float64)
    found = np.zeros((16, 16), np.float32)
    for lane, numbers in enumerate(out.copy_to_host().reshape(32, 8)):
        for n, number in enumerate(numbers):
            row, column = shared_layout.sums_place(lane, n)
            found[row, column] = number
    np.testing.assert_allclose(found, expected, atol=2e-6, rtol=2e-6)


@kernel(32)
def product_tf32(x, y, out):  # type: ignore[no-untyped-def]
    """Each lane has its elements of A, B and the sums at hand; see shared_layout."""
    lane = cuda.threadIdx.x
    words = (
        cvt_rna_tf32_f32(x[4 * lane]), cvt_rna_tf32_f32(x[4 * lane + 1]),
        cvt_rna_tf32_f32(x[4 * lane + 2]), cvt_rna_tf32_f32(x[4 * lane + 3]),
    )  # fmt: skip
    others = cvt_rna_tf32_f32(y[2 * lane]), cvt_rna_tf32_f32(y[2 * lane + 1])
    sums = (out[4 * lane], out[4 * lane + 1], out[4 * lane + 2], out[4 * lane + 3])
    sums = mma_tf32(sums, words, others)
    for n in range(4):
        out[4 * lane + n] = sums[n]


mma_tf32 = ptx.mma_m16n8k8_tf32


def gathered(matrix: Array, kind: str) -> Array:
    place, count, _ = shared_layout.FRAGMENTS[kind]
    return np.array([[matrix[place(lane, n)] for n in range(count)] for lane in range(32)])


def test_mma_tf32() -> None:
    needs(8, 0)
    random = np.random.default_rng(0)
    a, b, c = (random.normal(size=shape).astype(np.float32) for shape in ((16, 8), (8, 8), (16, 8)))
    out = cuda.to_device(gathered(c, "sums").reshape(-1))
    given = [cuda.to_device(gathered(m, k).reshape(-1)) for m, k in ((a, "a tf32"), (b, "b tf32"))]
    runtime.launch(product_tf32, 1, 32, *given, out)

    def rounded(x: Array) -> Array:
        words = (x.view(np.uint32) + np.uint32(0x1000)) & np.uint32(0xFFFFE000)
        return words.view(np.float32).astype(np.float64)

    expected = gathered(c + rounded(a) @ rounded(b), "sums")
    np.testing.assert_allclose(out.copy_to_host().reshape(32, 4), expected, atol=2e-6, rtol=2e-6)


# ----- single matrices -----


@kernel(32)
def matrices(x, out):  # type: ignore[no-untyped-def]
    """ldmatrix.x1 at two offsets, x2 and x2.trans, of matrices (8, 8) in a row."""
    tile = cuda.shared.array(256, types.uint16)
    lane = cuda.threadIdx.x
    for n in range(lane, 256, 32):
        tile[n] = x[n]
    cuda.syncthreads()
    address = shared_address(tile) + types.uint32(16 * (lane % 16))
    one = load_1(address)
    two, turned = load_2(address), load_2_trans(address)
    out[lane], out[32 + lane] = one[0], one[1]
    out[64 + lane], out[96 + lane] = two[0], two[1]
    out[128 + lane], out[160 + lane] = turned[0], turned[1]


load_1 = ptx.ldmatrix((0, 128), count=1)
load_2, load_2_trans = ptx.ldmatrix_x2, ptx.ldmatrix_x2_trans


def test_matrices() -> None:
    needs(7, 5)
    x = np.random.default_rng(0).integers(0, 1 << 16, (4, 8, 8)).astype(np.uint16)
    out = cuda.to_device(np.zeros(6 * 32, np.uint32))
    runtime.launch(matrices, 1, 32, cuda.to_device(x.reshape(-1)), out)
    first, second = x[0], x[1]
    expected = [first, second, first, second, first.T, second.T]
    found = out.copy_to_host().reshape(6, 32)
    for words, matrix in zip(found, expected, strict=True):
        np.testing.assert_array_equal(words, np.ascontiguousarray(matrix).view(np.uint32).ravel())


# ----- numbers and lanes -----


@cache
def conversions(dtype: str, turing: bool) -> Any:
    pack = ptx.pack_pair(dtype, turing)

    @kernel(32)
    def run(x, words, numbers):  # type: ignore[no-untyped-def]
        lane = cuda.threadIdx.x
        low, high = x[lane], x[32 + lane]
        word = pack(low, high)
        words[lane] = word
        first, second = mov_b32_halves(word)
        words[32 + lane], words[64 + lane] = first, second
        words[96 + lane] = shfl_sync_bfly_b32(word, types.uint32(3))
        words[128 + lane] = shfl_sync_idx_b32(word, types.uint32((lane * 7) % 32))
        numbers[lane], numbers[32 + lane] = ex2_approx_ftz_f32(low), lg2_approx_ftz_f32(high)
        numbers[64 + lane] = shfl_sync_bfly_f32(low, types.uint32(16))

    return run


@pytest.mark.parametrize(
    ("dtype", "turing"), [("float16", False), ("float16", True), ("bfloat16", False)]
)
def test_conversions_and_shuffles(dtype: str, turing: bool) -> None:
    needs(7, 5) if turing else needs(8, 0)
    x = (np.random.default_rng(0).normal(size=(2, 32)) * 30).astype(np.float32)
    x[1] = abs(x[1])
    x[0, :4], x[1, 0] = [np.nan, -np.inf, np.inf, -200], 0.0
    words = cuda.to_device(np.zeros(160, np.uint32))
    numbers = cuda.to_device(np.zeros(96, np.float32))
    given = cuda.to_device(x.reshape(-1))
    runtime.launch(conversions(dtype, turing), 1, 32, given, words, numbers)
    with np.errstate(all="ignore"):
        low, high = (row.astype(DTYPES[dtype]) for row in x)
        powers, logarithms = np.exp2(x[0]), np.log2(x[1])
    word, first, second, other, chosen = words.copy_to_host().reshape(5, 32)
    found = first.astype(np.uint16).view(DTYPES[dtype]), second.astype(np.uint16)
    np.testing.assert_array_equal(found[0].astype(np.float32), low.astype(np.float32))
    np.testing.assert_array_equal(found[1], high.view(np.uint16))
    lanes = np.arange(32)
    np.testing.assert_array_equal(word, first | second << np.uint32(16))
    np.testing.assert_array_equal(other, word[lanes ^ 3])
    np.testing.assert_array_equal(chosen, word[lanes * 7 % 32])
    power, logarithm, shuffled = numbers.copy_to_host().reshape(3, 32)
    powers[powers < np.finfo(np.float32).tiny] = 0
    np.testing.assert_allclose(power, powers, rtol=1e-6)
    np.testing.assert_allclose(logarithm, logarithms, rtol=1e-6, atol=1e-6)
    np.testing.assert_array_equal(shuffled, x[0, lanes ^ 16])


# ----- memory -----


@kernel(32)
def copies(x, sizes, out):  # type: ignore[no-untyped-def]
    """16 bytes a lane: in by cp.async, from there by words, and in again by st.shared."""
    tile = cuda.shared.array(256, types.uint32)
    lane = cuda.threadIdx.x
    here = shared_address(tile) + types.uint32(16 * lane)
    source = global_address(x) + types.uint64(16 * lane)
    cp_async_cg_16(here, source, types.uint32(sizes[lane]))
    cp_async_commit_group()
    wait_for_copies()
    cuda.syncthreads()
    other = shared_address(tile) + types.uint32(16 * (31 - lane))
    pair = ld_shared_v2_f32(other + types.uint32(8))
    word = ld_shared_b32(other)
    second = shared_address(tile) + types.uint32(512)
    st_shared_v4_b32(second + types.uint32(16 * lane), (word, word, word, word))
    st_shared_b32(second + types.uint32(16 * lane + 4), types.uint32(lane))
    cuda.syncthreads()
    out[lane], out[32 + lane] = types.float32(tile[128 + 4 * lane]), pair[0]
    out[64 + lane], out[96 + lane] = pair[1], types.float32(tile[128 + 4 * lane + 1])


def test_copies() -> None:
    needs(8, 0)
    random = np.random.default_rng(0)
    x = random.integers(0, 1000, (32, 4)).astype(np.uint32)
    x[:, 2:] = random.normal(size=(32, 2)).astype(np.float32).view(np.uint32)
    sizes = np.array([0, 4, 8, 16] * 8, np.int32)
    out = cuda.to_device(np.zeros(128, np.float32))
    runtime.launch(copies, 1, 32, cuda.to_device(x.reshape(-1)), cuda.to_device(sizes), out)
    copied = np.where(4 * np.arange(4) < sizes[:, None], x, 0).astype(np.uint32)[::-1]
    found = out.copy_to_host().reshape(4, 32)
    np.testing.assert_array_equal(found[0], copied[:, 0])
    np.testing.assert_array_equal(found[1:3], copied[:, 2:].T.copy().view(np.float32))
    np.testing.assert_array_equal(found[3], np.arange(32))


@kernel(32)
def misplaced(out, offset):  # type: ignore[no-untyped-def]
    tile = cuda.shared.array(128, types.uint16)
    tile[cuda.threadIdx.x] = 0
    cuda.syncthreads()
    out[cuda.threadIdx.x] = load_1(shared_address(tile) + types.uint32(offset))[0]


@pytest.mark.skipif(not runtime.SIMULATED, reason="a GPU stops at such an address")
@pytest.mark.parametrize(("offset", "error"), [(8, ValueError), (4096, IndexError)])
def test_the_simulator_finds_bad_addresses(offset: int, error: type[Exception]) -> None:
    with pytest.raises(error):
        runtime.launch(misplaced, 1, 32, np.zeros(32, np.uint32), offset)


@pytest.mark.skipif(not runtime.SIMULATED, reason="about the simulator")
def test_addresses_of_the_simulator() -> None:
    """Arrays do not overlap, and a part of one has its place in it."""
    arrays = [np.zeros(100, np.float16) for _ in range(5)]
    firsts = [int(ptx_simulated.shared_address(x)) for x in arrays]
    assert all(first % 1024 == 0 for first in firsts)
    assert len(set(firsts)) == len(firsts)
    assert ptx_simulated.shared_address(arrays[3][7:]) == firsts[3] + 14
    assert ptx_simulated.read_shared(firsts[1], 4) == bytes(4)
    with pytest.raises(IndexError):
        ptx_simulated.read_shared(firsts[1] + 198, 4)
