"""What the building blocks of kernels say about arguments that cannot be: no GPU is needed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from minitorch.kernels.gpu import ptx, ptx_hopper, runtime, shared_layout, traced
from minitorch.kernels.gpu.inline_ptx import Assembly, f32, u32
from minitorch.kernels.gpu.inline_ptx import ptx as declared
from minitorch.kernels.gpu.register_tile import RegisterTile
from minitorch.kernels.gpu.runtime import types
from minitorch.kernels.gpu.tensor_map import TensorMap, matrices_map

MANY = (8, 256)


def _with(factory: Callable[..., Any], *arguments: Any, **named: Any) -> Callable[[], Any]:
    return lambda: factory(*arguments, **named)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (_with(ptx.ldmatrix, count=3), "count is 3; wanted 1, 2 or 4"),
        (_with(ptx.ldmatrix, (3,)), "offsets is 3; wanted a multiple of 16 from 0"),
        (_with(ptx.ldmatrix, ()), r"offsets is \(\); wanted a tuple of at least one"),
        (_with(ptx.ldmatrix, (1.5,)), "offsets is 1.5; wanted a whole number"),
        (_with(ptx.mma, "m16n8k16", "tf32"), r"is \('m16n8k16', 'tf32'\); wanted one of"),
        (_with(ptx.mma, "m8n8k4", "float16"), r"is \('m8n8k4', 'float16'\); wanted one of"),
        (_with(ptx.mma, "m16n8k16", "float32"), r"is \('m16n8k16', 'float32'\); wanted one of"),
        (_with(ptx.pack_pair, "float32"), "dtype is 'float32'; wanted 'float16' or 'bfloat16'"),
        (_with(ptx.cp_async_wait_group, -1), "pending is -1; wanted a whole number from 0 on"),
        (_with(ptx.cp_async_wait_group, 1.5), "pending is 1.5; wanted a whole number"),
        (_with(ptx_hopper.wgmma_wait_group, -1), "pending is -1; wanted a whole number from 0 to"),
        (_with(ptx_hopper.wgmma_wait_group, 0, 0), "a count of registers is 0; wanted"),
        (_with(ptx_hopper.wgmma_wait_group_after, 8, 64), "pending is 8"),
        (_with(ptx_hopper.wgmma_fence, 1.5), "a count of registers is 1.5"),
        (_with(ptx_hopper.wgmma_ss, 0, "float16"), "n is 0; wanted a multiple of 8 from 8 to 256"),
        (_with(ptx_hopper.wgmma_ss, 12, "float16"), "n is 12; wanted"),
        (_with(ptx_hopper.wgmma_ss, 264, "float16"), "n is 264; wanted"),
        (_with(ptx_hopper.wgmma_ss, 64, "tf32"), "dtype is 'tf32'; wanted"),
        (_with(ptx_hopper.wgmma_ss, 64, "float16", (8,)), "a_offsets is 8; wanted a multiple of"),
        (_with(ptx_hopper.wgmma_ss, 64, "float16", (0, 32)), "as many as b_offsets, 1"),
        (_with(ptx_hopper.wgmma_ss, 64, "float16", accumulate=None), "accumulate is None; wanted"),
        (_with(ptx_hopper.wgmma_rs, 64, "float16", ()), r"b_offsets is \(\); wanted"),
        (_with(ptx_hopper.wgmma_rs, 64, "float32"), "dtype is 'float32'; wanted"),
        (_with(ptx_hopper.wgmma_rs, 64, "float16", accumulate=2), "accumulate is 2; wanted"),
        (_with(ptx_hopper.setmaxnreg, "up", 64), "direction is 'up'; wanted 'inc' or 'dec'"),
        (_with(ptx_hopper.setmaxnreg, "inc", 33), "count is 33; wanted a multiple of 8 from 24"),
        (_with(ptx_hopper.setmaxnreg, "dec", 8), "count is 8; wanted"),
        (_with(ptx_hopper.setmaxnreg, "inc", 264), "count is 264; wanted"),
        (_with(RegisterTile, 8.0), "columns is 8.0; wanted a whole number"),
        (_with(RegisterTile, 12), "columns is 12; wanted a multiple of 8 from 8 on"),
        (_with(RegisterTile, 8, 1.5), "row_blocks is 1.5; wanted a whole number"),
        (_with(RegisterTile(8).to_operand, "x"), "dtype is 'x'; wanted 'float16' or"),
        (_with(RegisterTile(8).store, "float64"), "dtype is 'float64'; wanted 'float16' or"),
        (_with(shared_layout.swizzle, 0, 48), "width is 48; wanted 128, 64 or 32"),
        (_with(shared_layout.swizzle, 0, 0), "width is 0; wanted"),
        (_with(shared_layout.panels_descriptor, 7), "rows is 7; wanted a multiple of 8"),
        (_with(shared_layout.tile_offset, 8, 0, 8), r"\(row, column\) is \(8, 0\); wanted row < 8"),
        (_with(shared_layout.tile_offset, 0, 0, 7), "rows is 7; wanted a multiple of 8"),
        (_with(shared_layout.steps_along, -16, 64), "depth is -16; wanted a multiple of 16"),
        (_with(shared_layout.steps_down, 8), "depth is 8; wanted a multiple of 16"),
        (_with(matrices_map, "float64", 0, (1, 1, *MANY), (0, 0, 256, 1), 8), "got float64"),
        (_with(TensorMap("float16", -16, (64,), (), (64,)).check), "multiple of 16, got -16"),
    ],
)  # fmt: skip
def test_arguments_that_cannot_be(make: Callable[[], Any], message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        make()


@pytest.mark.parametrize(
    ("text", "arguments", "returns", "tied", "message"),
    [
        ("mov {out}, 0;", {"x": f32}, (f32,), (), "operand 'x' is not in the text"),
        ("mov _, {x};", {"x": f32}, (f32,), (), "operand 'out' is not in the text"),
        ("mov {out}, {x[2:9]};", {"x": u32[4]}, (f32,), (), r"\{x\[2:9\]\} of 4 registers"),
        ("mov {out}, {x[4]};", {"x": u32[4]}, (f32,), (), r"\{x\[4\]\} of 4 registers"),
        ("add {x}, {x};", {"x": f32}, (f32,), ("y",), "tied argument 'y' is no argument"),
        ("mov {out}, {x};", {"x": f32}, (f32, f32), (), "several results are tied arguments"),
        ("mov {out}, {x};", {"x": "f32"}, (f32,), (), "x is 'f32'; wanted a register"),
    ],
)
def test_texts_that_do_not_fit(
    text: str, arguments: dict[str, Any], returns: Any, tied: tuple[str, ...], message: str
) -> None:
    with pytest.raises(TypeError, match=message):
        Assembly(text, tuple(arguments.items()), returns, tied)


def test_annotations_that_are_text() -> None:
    """As in this file, by its first import."""

    def moved(x: f32) -> f32:  # type: ignore[valid-type]
        """x."""

    with pytest.raises(TypeError, match="annotation 'x' of moved is 'f32', text; wanted"):
        declared("mov.f32 {out}, {x};")(moved)
    moved.__annotations__ = {"x": f32}
    with pytest.raises(TypeError, match="annotation 'return' of moved is nothing; wanted"):
        declared("mov.f32 {out}, {x};")(moved)
    moved.__annotations__ = {"x": f32, "return": f32}
    assert declared("mov.f32 {out}, {x};")(moved) is not None


# ----- functions that run while a kernel is compiled -----


@pytest.fixture
def values() -> tuple[Any, Any]:
    """A float32 and an int32, of a function that is being written."""
    if runtime.SIMULATED:
        pytest.skip("numbers are numbers in the simulator")
    ir = pytest.importorskip("llvmlite.ir")
    kind = ir.FunctionType(ir.VoidType(), [ir.FloatType(), ir.IntType(32)])
    function = ir.Function(ir.Module(), kind, "f")
    builder = ir.IRBuilder(function.append_basic_block())
    x, n = function.args
    return traced.Value(builder, types.float32, x), traced.Value(builder, types.int32, n)


def test_code_of_comparisons_and_signs(values: tuple[Any, Any]) -> None:
    x, n = values
    assert "fcmp une float" in str((x != 1.0).code)  # true of NaN, as in Python
    assert "fcmp oeq float" in str((x == 1.0).code)
    assert "icmp ne i32" in str((n != 1).code)
    assert "sub i32 0, " in str((-n).code)
    assert "fsub float 0x8000000000000000, " in str((-x).code)


@pytest.mark.parametrize(
    ("run", "message"),
    [
        (lambda x, n: x & x, "no and_ of float32 and float32"),
        (lambda x, n: x // 2, "no udiv of float32 and int"),
        (lambda x, n: n / n, "no fdiv of int32 and int32"),
        (lambda x, n: x + n, "no fadd of float32 and int32"),
        (lambda x, n: n < 1.5, "no < of int32 and float"),
        (lambda x, n: traced.select(n == 0, 1.0, 2.0), "between float and float"),
        (lambda x, n: traced.i32(x), "no conversion of float32 to int32"),
        (lambda x, n: traced.f32(1), "no conversion of int to float32"),
    ],
)
def test_operators_that_do_not_exist(
    run: Callable[..., Any], message: str, values: tuple[Any, Any]
) -> None:
    with pytest.raises(TypeError, match=message):
        run(*values)
