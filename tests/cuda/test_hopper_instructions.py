"""The copy engine and wgmma compute what numpy does, from the project's maps and descriptors.

Every product brings its factors by the copy engine, some with fewer rows and columns than a tile,
so that swizzle, panels, descriptors, steps and the zeros beyond the end all have to be right.
"""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest

from minitorch.kernels.gpu import runtime, shared_layout, tensor_map
from minitorch.kernels.gpu.bindings import bindings
from minitorch.kernels.gpu.ptx import global_address, shared_address
from minitorch.kernels.gpu.ptx_hopper import (
    cp_async_bulk_tensor_4d,
    fence_mbarrier_init_release_cluster,
    mbarrier_arrive_expect_tx,
    mbarrier_init,
    mbarrier_wait_parity,
    wgmma_commit_group,
    wgmma_fence,
    wgmma_rs,
    wgmma_ss,
    wgmma_wait_group,
)
from minitorch.kernels.gpu.register_tile import RegisterTile
from minitorch.kernels.gpu.runtime import cuda, kernel, types
from minitorch.kernels.gpu.traced import traced

Array = npt.NDArray[Any]
DTYPES = {"float16": np.dtype(np.float16), "bfloat16": np.dtype(ml_dtypes.bfloat16)}
ROWS = 64


@pytest.fixture(autouse=True)
def needs_hopper() -> None:
    if not runtime.SIMULATED and runtime.compute_capability()[0] != 9:
        pytest.skip("these are instructions of Hopper GPUs")


class Product(NamedTuple):
    """A B of tiles A (64, depth) and B (depth, n), n a multiple of 8.

    Args:
        dtype: of A and B.
        n: columns of the tile B.
        depth: a multiple of 16.
        trans: B is stored (depth, n), as V is, and not (n, depth), as K is.
        registers: A comes from registers.
        a_rows, b_rows, columns: how many there are of A's rows, of what is stored as B's rows, and
            of what is stored as A's columns.

    """

    dtype: str
    n: int
    depth: int
    trans: bool = False
    registers: bool = False
    a_rows: int = ROWS
    b_rows: int = 0
    columns: int = 0


@cache
def product(p: Product) -> Any:
    tile, operand = RegisterTile(p.n), RegisterTile(p.depth)
    a_panels, b_rows = -(-p.depth // 64), p.depth if p.trans else p.n
    b_panels = -(-p.n // 64) if p.trans else a_panels
    a_bytes, b_bytes = 128 * ROWS, 128 * b_rows
    b_first = a_panels * a_bytes
    barrier_at = b_first + b_panels * b_bytes
    a_base = shared_layout.panels_descriptor(ROWS)
    b_base = shared_layout.panels_descriptor(b_rows)
    a_steps = shared_layout.steps_along(p.depth, ROWS)
    b_steps = (
        shared_layout.steps_down(p.depth) if p.trans else shared_layout.steps_along(p.depth, b_rows)
    )
    in_registers, depth = p.registers, p.depth
    multiply = (
        wgmma_rs(p.n, p.dtype, b_steps, trans_b=p.trans)
        if in_registers
        else wgmma_ss(p.n, p.dtype, a_steps, b_steps, trans_b=p.trans)
    )
    zero, store, to_operand = tile.zero, tile.store("float32"), operand.to_operand(p.dtype)
    fence, wait = wgmma_fence(tile.registers), wgmma_wait_group(0, tile.registers)
    places = list(operand.places())

    @traced(operand.type, None, types.int32)
    def load(x, first):  # type: ignore[no-untyped-def]
        return [x[first + (q.row * depth + q.column)] for q in places]

    @kernel(128)
    def run(maps, x, out, rows, columns):  # type: ignore[no-untyped-def]
        memory = cuda.shared.array(0, types.uint8)
        a = shared_address(memory)
        b, barrier = a + types.uint32(b_first), a + types.uint32(barrier_at)
        thread = types.int32(cuda.threadIdx.x)
        if thread == 0:
            mbarrier_init(barrier, types.uint32(1))
            fence_mbarrier_init_release_cluster()
        cuda.syncthreads()
        if thread == 0:
            mbarrier_arrive_expect_tx(barrier, types.uint32(barrier_at))
            for panel in range(a_panels):
                cp_async_bulk_tensor_4d(
                    a + types.uint32(panel * a_bytes), maps, barrier, panel * 64, 0, 0, 0
                )
            for panel in range(b_panels):
                cp_async_bulk_tensor_4d(
                    b + types.uint32(panel * b_bytes), maps + types.uint64(128), barrier,
                    panel * 64, 0, 0, 0,
                )  # fmt: skip
        mbarrier_wait_parity(barrier, types.uint32(0))
        row = thread // types.int32(32) * types.int32(16) + thread % types.int32(32) // types.int32(
            4
        )
        column = thread % types.int32(4) * types.int32(2)
        b_descriptor = types.uint64(b_base) | types.uint64(b >> types.uint32(4))
        sums = fence(zero())
        if in_registers:
            words = to_operand(load(x, types.int32(row * depth + column)))
            sums = multiply(sums, words, b_descriptor)
        else:
            sums = multiply(
                sums, types.uint64(a_base) | types.uint64(a >> types.uint32(4)), b_descriptor
            )
        wgmma_commit_group()
        sums = wait(sums)
        step = types.uint64(4 * columns)
        first = global_address(out) + types.uint64(row) * step + types.uint64(4 * column)
        store(
            sums, (first, first + types.uint64(8) * step), (row < rows, row + 8 < rows),
            types.int32(columns - column),
        )  # fmt: skip

    return run, barrier_at + 8


PRODUCTS = [
    Product("float16", 64, 64),
    Product("bfloat16", 128, 128),
    Product("float16", 176, 96),
    Product("bfloat16", 80, 256),
    Product("float16", 256, 64),
    Product("float16", 64, 64, trans=True),
    Product("bfloat16", 128, 176, trans=True),
    Product("float16", 256, 80, trans=True),
    Product("float16", 96, 64, trans=True, registers=True),
    Product("bfloat16", 128, 128, trans=True, registers=True),
    Product("float16", 64, 128, registers=True),
    Product("float16", 80, 96, a_rows=61, b_rows=77, columns=88),
    Product("bfloat16", 72, 64, trans=True, a_rows=3, b_rows=59, columns=59),
]


def storage_of(x: Array) -> Array:
    """As kernels get it: bfloat16 as its bits."""
    return x.view(np.uint16) if x.dtype.itemsize == 2 and x.dtype.kind != "f" else x


def on_gpu(x: Array) -> tuple[Any, Array]:
    """A matrix on the GPU, rows at multiples of 16 bytes with NaN between them, and the matrix."""
    wide = np.full((len(x), -(-x.shape[1] // 8) * 8), np.nan).astype(x.dtype)
    wide[:, : x.shape[1]] = x
    bits = wide.view(np.uint16)
    return cuda.to_device(bits.reshape(-1)), wide


def map_of(array: Any, shape: tuple[int, int], width: int, dtype: str, rows: int) -> Any:
    interface = "__array_interface__" if runtime.SIMULATED else "__cuda_array_interface__"
    address = getattr(array, interface)["data"][0]
    sizes = (1, 1, *shape)
    return tensor_map.matrices_map(dtype, address, sizes, (0, 0, width, 1), rows)


@pytest.mark.parametrize("p", PRODUCTS, ids=str)
def test_product(p: Product) -> None:
    random, kind = np.random.default_rng(0), DTYPES[p.dtype]
    stored_rows = p.depth if p.trans else p.n
    b_rows, columns = p.b_rows or stored_rows, p.columns or p.depth
    b_columns = p.n if p.trans else columns
    x = random.normal(size=(p.a_rows, columns)).astype(kind)
    y = random.normal(size=(b_rows, b_columns)).astype(kind)
    (a, a_wide), (b, b_wide) = on_gpu(x), on_gpu(y)
    maps = tensor_map.on_device(
        map_of(a, x.shape, a_wide.shape[1], p.dtype, ROWS),
        map_of(b, y.shape, b_wide.shape[1], p.dtype, stored_rows),
    )
    run, shared_bytes = product(p)
    result_columns = p.n if p.trans else b_rows + b_rows % 2
    out = cuda.to_device(np.full(p.a_rows * result_columns, np.nan, np.float32))
    given = cuda.to_device(x.astype(np.float32).reshape(-1))
    runtime.launch(
        run, 1, 128, maps, given, out, p.a_rows, result_columns, shared_bytes=shared_bytes
    )

    common = min(columns, b_rows) if p.trans else columns
    right = y[:common].astype(np.float64) if p.trans else y.T.astype(np.float64)
    expected = x[:, :common].astype(np.float64) @ right
    found = out.copy_to_host().reshape(p.a_rows, result_columns)
    np.testing.assert_allclose(found[:, : expected.shape[1]], expected, atol=1e-3, rtol=1e-4)
    assert not found[:, expected.shape[1] :].any()  # rows of B beyond the end are zeros


@pytest.mark.gpu
def test_maps_are_kept_and_made_during_a_capture() -> None:
    array = cuda.to_device(np.zeros(64 * 64, np.float16))
    first = map_of(array, (64, 64), 64, "float16", 64)
    assert tensor_map.on_device(first) == tensor_map.on_device(first)
    assert tensor_map.on_device(first) % tensor_map.BYTES == 0
    driver = bindings()
    stream = cuda.stream()
    handle = driver.CUstream(int(getattr(stream.handle, "value", stream.handle)))
    mode = driver.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_GLOBAL
    assert int(driver.cuStreamBeginCapture(handle, mode)[0]) == 0
    address = tensor_map.on_device(map_of(array, (32, 64), 64, "float16", 32))
    status, graph = driver.cuStreamEndCapture(handle)
    assert int(status) == 0, "the copy of a tensor map broke the capture"
    driver.cuGraphDestroy(graph)
    host = np.zeros(16, np.uint64)
    assert int(driver.cuMemcpyDtoH(host.ctypes.data, int(address), 128)[0]) == 0
    assert host.any()
