"""A tile of numbers in a warp's registers: each operation does what numpy does with the matrix."""

from __future__ import annotations

from functools import cache
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest

from minitorch.kernels.gpu import runtime
from minitorch.kernels.gpu.ptx import global_address
from minitorch.kernels.gpu.register_tile import RegisterTile
from minitorch.kernels.gpu.runtime import cuda, device_function, kernel, types
from minitorch.kernels.gpu.traced import traced

Array = npt.NDArray[Any]
TILES = [RegisterTile(8), RegisterTile(24), RegisterTile(16, row_blocks=2)]
DTYPES = {"float16": np.float16, "bfloat16": ml_dtypes.bfloat16, "float32": np.float32}


@device_function
def own_place():  # type: ignore[no-untyped-def]
    """A lane's first row and column."""
    lane = types.int32(cuda.threadIdx.x)
    return types.int32(lane // types.int32(4)), types.int32(lane % types.int32(4) * types.int32(2))


@cache
def access(tile: RegisterTile) -> tuple[Any, Any, Any]:
    """Device functions: a tile from and to a matrix, flat; a number for each row from an array."""
    columns, places = tile.columns, list(tile.places())
    whole, rows = types.int32, range(2 * tile.row_blocks)

    @traced(tile.type, None, whole, whole)
    def load(x, row, column):  # type: ignore[no-untyped-def]
        return [x[(row + p.row) * columns + (column + p.column)] for p in places]

    @traced(types.void, None, whole, whole, whole, tile.type)
    def put(out, first, row, column, numbers):  # type: ignore[no-untyped-def]
        for p in places:
            out[first + (row + p.row) * columns + (column + p.column)] = numbers[p.register]

    @traced(tile.rows_type, None, whole)
    def load_rows(x, row):  # type: ignore[no-untyped-def]
        return [x[row + 8 * r] for r in rows]

    return load, put, load_rows


@cache
def everything(tile: RegisterTile) -> Any:
    load, put, load_rows = access(tile)
    size = 16 * tile.row_blocks * tile.columns
    zero, scale_rows, row_max = tile.zero, tile.scale_rows, tile.row_max
    shift, fill_rows = tile.shift, tile.fill_rows
    double = tile.each_row(lambda x, factor: x + factor * 2.0, tile.rows_type, types.float32)
    own_row_sum, quad_sum = tile.own_row_sum, tile.quad_sum
    repeat = tile.each(lambda x, row: row, tile.type, tile.rows_type)
    mixed = tile.each(
        lambda x, y, row, z: x * y - row * z,
        tile.type, tile.type, tile.rows_type, types.float32,
    )  # fmt: skip

    @kernel(32)
    def run(x, factors, scale, out):  # type: ignore[no-untyped-def]
        row, column = own_place()
        numbers, rows = load(x, row, column), load_rows(factors, row)
        put(out, types.int32(0 * size), row, column, zero())
        put(out, types.int32(1 * size), row, column, scale_rows(numbers, rows))
        put(out, types.int32(2 * size), row, column, repeat(numbers, row_max(numbers, rows)))
        put(out, types.int32(3 * size), row, column, repeat(numbers, quad_sum(rows)))
        shifts = shift(row_max(numbers, rows), scale)
        put(out, types.int32(4 * size), row, column, repeat(numbers, shifts))
        put(out, types.int32(5 * size), row, column, repeat(numbers, double(rows, scale)))
        put(out, types.int32(6 * size), row, column, mixed(numbers, numbers, rows, scale))
        sums = quad_sum(own_row_sum(numbers, own_row_sum(numbers, rows)))
        put(out, types.int32(7 * size), row, column, repeat(numbers, sums))
        put(out, types.int32(8 * size), row, column, repeat(numbers, fill_rows(scale)))

    return run


@pytest.mark.parametrize("tile", TILES, ids=str)
def test_each_register_has_one_place(tile: RegisterTile) -> None:
    places = list(tile.places())
    assert [p.register for p in places] == list(range(tile.registers))
    assert [tile.register_at(p.own_row, p.column) for p in places] == list(range(tile.registers))
    assert {(p.row, p.column) for p in places} == {
        (8 * r, 8 * j + c)
        for r in range(2 * tile.row_blocks)
        for j in range(tile.columns // 8)
        for c in range(2)
    }


@pytest.mark.parametrize("tile", TILES, ids=str)
def test_operations(tile: RegisterTile) -> None:
    random = np.random.default_rng(0)
    x = random.normal(size=(16 * tile.row_blocks, tile.columns)).astype(np.float32)
    factors = random.normal(size=len(x)).astype(np.float32)
    factors[3], x[3] = -np.inf, -np.inf  # a row without a key so far
    scale = np.float32(0.7)
    out = cuda.to_device(np.full(9 * x.size, np.nan, np.float32))
    given = cuda.to_device(x.reshape(-1)), cuda.to_device(factors)
    runtime.launch(everything(tile), 1, 32, *given, scale, out)

    largest = np.maximum(x.max(1), factors)
    shifts = np.where(np.isinf(largest), 0, largest * scale)
    row_sum = np.broadcast_to(x.sum(1)[:, None], x.shape)
    expected = {
        "zero": np.zeros_like(x),
        "scale_rows": x * factors[:, None],
        "row_max": np.broadcast_to(largest[:, None], x.shape),
        "quad_sum": np.broadcast_to(4 * factors[:, None], x.shape),
        "shift": np.broadcast_to(shifts[:, None], x.shape),
        "each_row": np.broadcast_to(factors[:, None] + 2 * scale, x.shape),
        "each": x * x - factors[:, None] * scale,
        # A lane adds what was before to its own; the quad's four lanes then add up all of it.
        "own_row_sum": 2 * row_sum + 4 * factors[:, None],
        "fill_rows": np.full_like(x, scale),
    }
    found = out.copy_to_host().reshape(9, *x.shape)
    for result, (name, right) in zip(found, expected.items(), strict=True):
        np.testing.assert_allclose(result, right, rtol=2e-6, atol=2e-6, err_msg=name)


@cache
def storing(tile: RegisterTile, dtype: str, pairs: bool) -> Any:
    load, _, _ = access(tile)
    store, count = tile.store(dtype, pairs, turing=True), 2 * tile.row_blocks
    size = 4 if dtype == "float32" else 2

    @traced(types.UniTuple(types.uint64, count), types.uint64, types.uint64)
    def addresses(first, step):  # type: ignore[no-untyped-def]
        return [first + step * (8 * r) for r in range(count)]

    @traced(types.UniTuple(types.boolean, count), types.int32, types.int32)
    def valid(row, rows):  # type: ignore[no-untyped-def]
        return [row + 8 * r < rows for r in range(count)]

    @kernel(32)
    def run(x, out, rows, columns):  # type: ignore[no-untyped-def]
        row, column = own_place()
        step = types.uint64(columns * size)
        first = global_address(out) + types.uint64(row) * step + types.uint64(column * size)
        store(
            load(x, row, column), addresses(first, step), valid(row, types.int32(rows)),
            types.int32(types.int32(columns) - column),
        )  # fmt: skip

    return run


@pytest.mark.parametrize("tile", TILES, ids=str)
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("columns", [6, 5])
def test_store(tile: RegisterTile, dtype: str, columns: int) -> None:
    """Rows and columns beyond the matrix are not written, whatever lies there."""
    if dtype == "bfloat16" and not runtime.SIMULATED and runtime.compute_capability() < (8, 0):
        pytest.skip("bfloat16 is converted from compute capability 8.0 on")
    random = np.random.default_rng(1)
    x = random.normal(size=(16 * tile.row_blocks, tile.columns)).astype(np.float32)
    rows, kind = len(x) - 3, np.dtype(DTYPES[dtype])
    storage = np.uint16 if dtype == "bfloat16" else kind
    before = random.normal(size=x.size).astype(kind)
    out = cuda.to_device(before.view(storage))
    run = storing(tile, dtype, columns % 2 == 0)
    runtime.launch(run, 1, 32, cuda.to_device(x.reshape(-1)), out, rows, columns)
    found = out.copy_to_host().view(kind)
    expected = before.copy()
    expected[: rows * columns] = x[:rows, :columns].astype(kind).reshape(-1)
    np.testing.assert_array_equal(found.view(np.uint8), expected.view(np.uint8))


def test_sizes_are_checked() -> None:
    for columns, row_blocks in ((12, 1), (0, 1), (8, 0), (-8, 1)):
        with pytest.raises(ValueError, match=r"(columns|row_blocks) is"):
            RegisterTile(columns, row_blocks)
