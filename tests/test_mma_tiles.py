"""The sizes of the mma kernels' tiles: there are some that fit, for every problem and GPU."""

import pytest

from minitorch.kernels import runtime
from minitorch.kernels.flash_attention import mma
from minitorch.kernels.flash_attention.mma_backward import backward_memory
from minitorch.kernels.flash_attention.mma_forward import forward_memory
from minitorch.kernels.flash_attention.mma_memory import COLUMNS, PLAIN, key_of_row
from minitorch.kernels.flash_attention.mma_tiles import Kind

if runtime.SIMULATED:
    pytest.skip("the simulator has tiles of its own", allow_module_level=True)


@pytest.mark.parametrize("architecture", mma.MEMORY)
@pytest.mark.parametrize("columns", [1, 16, 64, 80, 96, 128, 176, 192, 256])
@pytest.mark.parametrize("numbers", ["float16", "tf32x3"])
def test_tiles_fit_every_architecture(
    architecture: tuple[int, int], columns: int, numbers: str
) -> None:
    turing = architecture < mma.FIRST_WITH_ALL
    if turing and numbers != "float16":
        pytest.skip("Turing's tensor cores take float16 alone")
    for value_columns in (1, columns, 256):
        for mask, dropout in (("none", False), ("float32", True)):
            kind = Kind(numbers, columns, value_columns, mask, dropout, True, turing)
            for_keys, for_queries = mma.backward_tiles(kind, architecture)
            sizes = (
                forward_memory(kind, mma.forward_tiles(kind, architecture)).size,
                backward_memory(kind, for_keys, True).size,
                backward_memory(kind, for_queries, False).size,
            )
            assert max(sizes) <= mma.MEMORY[architecture]


@pytest.mark.parametrize("order", [PLAIN, COLUMNS, 1, 2])
def test_orders_of_rows(order: int) -> None:
    """Each row of the matrix stands in one row of the tile."""
    assert sorted(key_of_row(row, order) for row in range(64)) == list(range(64))


def test_a_lane_has_neighbouring_keys() -> None:
    for q in range(4):
        columns = (2 * q, 2 * q + 1, 2 * q + 8, 2 * q + 9)
        assert [key_of_row(c, COLUMNS) for c in columns] == [4 * q + n for n in range(4)]
    for g in range(8):
        assert [key_of_row(g + 8 * n, 2) for n in range(4)] == [4 * g + n for n in range(4)]
        assert [key_of_row(g + 8 * n, 1) for n in range(2)] == [2 * g + n for n in range(2)]
