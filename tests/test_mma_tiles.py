"""The sizes of the mma kernels' tiles: there are some that fit, for every problem and GPU."""

import pytest

from minitorch.kernels import runtime
from minitorch.kernels.flash_attention import mma
from minitorch.kernels.flash_attention.mma_backward import backward_memory
from minitorch.kernels.flash_attention.mma_forward import forward_memory
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
