"""Fragments, swizzles, descriptors and tensor maps: whole numbers, checked without a GPU."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minitorch.kernels.gpu import inline_ptx, shared_layout, tensor_map
from minitorch.kernels.gpu.inline_ptx import Assembly, f32, u32, u64
from minitorch.kernels.gpu.register_tile import RegisterTile
from minitorch.kernels.gpu.tensor_map import TensorMap, matrices_map

LANES = range(32)

# ----- fragments -----


@pytest.mark.parametrize("kind", shared_layout.FRAGMENTS)
def test_a_fragment_has_every_element_once(kind: str) -> None:
    place, count, (rows, columns) = shared_layout.FRAGMENTS[kind]
    found = {place(lane, n) for lane in LANES for n in range(count)}
    assert found == {(row, column) for row in range(rows) for column in range(columns)}
    assert len(found) == 32 * count


def test_sums_are_the_next_products_operand() -> None:
    """Packed in pairs in their order, sums of columns k are A's elements of these k."""
    for lane in LANES:
        for n in range(32):  # 64 columns, four steps of 16
            row, column = shared_layout.sums_place(lane, n)
            step, element = divmod(n, 8)
            a_row, k = shared_layout.a_place(lane, element)
            assert (row, column) == (a_row, 16 * step + k)


def test_sums_as_tf32_operand() -> None:
    """`RegisterTile.to_operand` says: A's k = q and q + 4 are the sums' columns 2q and 2q + 1."""
    for lane in LANES:
        q = lane % 4
        for n, own in enumerate((0, 2, 1, 3)):
            row, column = shared_layout.sums_place(lane, own)
            a_row, k = shared_layout.a_place_tf32(lane, n)
            assert row == a_row
            assert (k, column) in ((q, 2 * q), (q + 4, 2 * q + 1))


def test_register_tile_is_made_of_sums() -> None:
    tile = RegisterTile(40, row_blocks=3)
    for place in tile.places():
        for lane in LANES:
            first = shared_layout.sums_place(lane, 0)
            block, n = divmod(place.register, tile.columns // 2)
            row, column = shared_layout.sums_place(lane, n)
            expected = (row + 16 * block, column)
            assert (first[0] + place.row, first[1] + place.column) == expected
        assert place.own_row == place.row // 8


def test_fragment_table() -> None:
    lines = shared_layout.fragment_table("b").splitlines()
    assert len(lines) == 16
    assert lines[0].split()[:3] == ["T0:0", "T4:0", "T8:0"]
    with pytest.raises(ValueError, match="fragments are sums, a, b"):
        shared_layout.fragment_table("c")


@pytest.mark.parametrize(
    ("points", "kind", "trans"),
    [
        (shared_layout.ldmatrix_a, "a", False),
        (shared_layout.ldmatrix_a_trans, "a", True),
        (shared_layout.ldmatrix_b, "b", False),
        (shared_layout.ldmatrix_b_trans, "b", True),
    ],
)
def test_where_lanes_point(points, kind: str, trans: bool) -> None:  # type: ignore[no-untyped-def]
    """ldmatrix.x4 from these addresses gives the fragments of A, or of two of B's tiles."""
    for lane in LANES:
        for n in range(8):
            matrix, c = divmod(n, 2)
            other, inside = (
                (2 * (lane % 4) + c, lane // 4) if trans else (lane // 4, lane % 4 * 2 + c)
            )
            row, column = points(8 * matrix + other)
            stored = row, column + inside
            if kind == "a":
                expected = shared_layout.a_place(lane, n)
                assert stored == (expected[::-1] if trans else expected)
            else:
                k, b_column = shared_layout.b_place(lane, n % 4)
                expected = k, b_column + n // 4 * 8
                assert stored == (expected if trans else expected[::-1])


# ----- swizzles -----


@given(st.sampled_from([32, 64, 128]), st.integers(0, 1 << 16))
def test_swizzle_is_its_own_inverse(width: int, offset: int) -> None:
    moved = shared_layout.swizzle(offset, width)
    assert shared_layout.swizzle(moved, width) == offset
    assert moved % 16 == offset % 16 and moved // width == offset // width


def test_swizzled_columns_cover_all_banks() -> None:
    """Eight pieces of 16 bytes below each other, what the tensor cores read at once."""
    for piece in range(8):
        for first in range(0, 64, 8):
            places = [shared_layout.swizzle(128 * (first + n) + 16 * piece) for n in range(8)]
            assert {place % 128 // 16 for place in places} == set(range(8))


@given(st.integers(1, 32), st.integers(1, 4))
def test_tile_offsets(eights: int, panels: int) -> None:
    rows, columns = 8 * eights, 64 * panels
    found = {shared_layout.tile_offset(r, c, rows) for r in range(rows) for c in range(columns)}
    assert found == set(range(0, 2 * rows * columns, 2))


# ----- wgmma's descriptors -----


@given(st.integers(0, (1 << 14) - 1), st.integers(0, (1 << 14) - 1), st.sampled_from([128, 64, 32]))
def test_descriptor_fields(leading: int, stride: int, width: int) -> None:
    found = shared_layout.descriptor(16 * leading, 16 * stride, width)
    assert found < 1 << 64 and found & 0x3FFF == 0  # room for the address
    assert found >> 16 & 0x3FFF == leading
    assert found >> 32 & 0x3FFF == stride
    assert {1: 128, 2: 64, 3: 32}[found >> 62] == width
    assert found >> 46 & 0xFFFF == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"leading": 24}, "leading is a multiple of 16"),
        ({"stride": 1 << 18}, "stride is a multiple of 16 below"),
        ({"width": 256}, "128, 64 or 32 bytes"),
    ],
)
def test_descriptor_errors(arguments: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        shared_layout.descriptor(**arguments)


@given(st.integers(1, 16), st.integers(1, 32))
def test_steps(sixteens: int, eights: int) -> None:
    """A step begins where the copy engine has put its first element, were there no swizzle: the
    hardware swizzles the address that it makes of both.
    """
    depth, rows = 16 * sixteens, 8 * eights
    along = shared_layout.steps_along(depth, rows)
    assert len(along) == sixteens and along[0] == 0
    for n, offset in enumerate(along):
        assert offset == shared_layout.tile_offset(0, 16 * n, rows)  # row 0 is not moved
    down = shared_layout.steps_down(depth)
    assert [16 * n for n in range(sixteens)] == [offset // 128 for offset in down]
    assert all(offset % 1024 == 0 for offset in down)  # the swizzle's period


def test_steps_are_of_16() -> None:
    with pytest.raises(ValueError, match="depth is 40; wanted a multiple of 16 from 16"):
        shared_layout.steps_along(40, 64)


# ----- tensor maps -----


def test_map_of_matrices() -> None:
    shape, strides = (2, 3, 100, 59), (3 * 6400, 64, 192, 1)  # heads beside each other in a row
    found = matrices_map("float16", 4096, shape, strides, rows=128)
    assert found.shape == (59, 100, 3, 2)
    assert found.strides == (2 * 192, 2 * 64, 2 * 3 * 6400)
    assert found.box == (64, 128, 1, 1)
    assert found.box_bytes == 128 * 128


def test_strides_of_single_elements_do_not_matter() -> None:
    assert matrices_map("bfloat16", 0, (1, 1, 64, 64), (7, 5, 64, 1), rows=64).check()


GOOD = TensorMap("float16", 64, (64, 10, 3), (128, 1280), (64, 8, 1))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"address": 8}, "address is a multiple of 16"),
        ({"shape": (64, 10)}, "1 to 5 dimensions"),
        ({"strides": (128,)}, "a stride for each dimension"),
        ({"strides": (120, 1280)}, "strides are multiples of 16"),
        ({"strides": (128, -1280)}, "strides are multiples of 16"),
        ({"shape": (64, 0, 3)}, "1 to 2\\*\\*32 elements"),
        ({"box": (64, 257, 1)}, "1 to 256 elements"),
        ({"box": (72, 8, 1)}, "rows of a box"),
        ({"box": (12, 8, 1)}, "rows of a box"),
        ({"swizzle": 64}, "rows of a box"),
        ({"swizzle": 16}, "rows of a box"),
    ],
)
def test_maps_that_cannot_be(change: dict[str, object], message: str) -> None:
    assert GOOD.check() is GOOD
    with pytest.raises(ValueError, match=message):
        GOOD._replace(**change).check()  # type: ignore[arg-type]


def test_maps_of_other_types() -> None:
    with pytest.raises(TypeError, match="float64"):
        GOOD._replace(dtype="float64").check()
    with pytest.raises(ValueError, match="four dimensions"):
        matrices_map("float16", 0, (1, 8, 8), (64, 8, 1), rows=8)
    with pytest.raises(ValueError, match="neighbours"):
        matrices_map("float16", 0, (1, 1, 8, 8), (64, 64, 8, 2), rows=8)


def test_maps_are_put_down_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same maps, asked for together, have one address; nothing is encoded or copied again."""
    put: list[bytes] = []

    class Slab:
        def put(self, data: bytes) -> int:
            put.append(data)
            return 4096 * len(put)

    class Device:
        id = 0

    monkeypatch.setattr(tensor_map, "_known", {})
    monkeypatch.setattr(tensor_map, "_Slab", Slab)
    monkeypatch.setattr(tensor_map, "_slabs", {})
    monkeypatch.setattr(tensor_map, "encoded", lambda m: bytes([m.address % 251]) * 128)
    monkeypatch.setattr(tensor_map, "cuda", type("Cuda", (), {"get_current_device": Device}))
    other = GOOD._replace(address=128)
    first = tensor_map.on_device(GOOD, other)
    assert tensor_map.on_device(GOOD, other) == first
    assert tensor_map.on_device(other, GOOD) != first
    assert isinstance(first, np.uint64)
    assert [len(data) for data in put] == [256, 256]


# ----- inline PTX -----


def test_operands_of_an_instruction() -> None:
    """Results come first, then arguments, then the tied ones, as LLVM wants them."""
    text = "mma {acc}, {a[0:2]}, {a[3]}, {scale};"
    arguments = (("acc", f32[3]), ("a", u32[4]), ("scale", u64))
    assembly = Assembly(text, arguments, (f32[3],), ("acc",))
    assert assembly.text() == "mma {$0, $1, $2}, {$3, $4}, $6, $7;"
    assert assembly.constraints() == "=f,=f,=f,r,r,r,r,l,0,1,2,~{memory}"
    pure = Assembly("ex2 {out}, {x};", (("x", f32),), (f32,), pure=True)
    assert (pure.text(), pure.constraints()) == ("ex2 $0, $1;", "=f,f")


def test_braces_of_ptx_stay() -> None:
    text = inline_ptx.lines([".reg .pred p;", "mov.b32 {out}, {l, h};"])
    assembly = Assembly(text, (), (u32,))
    assert assembly.text() == "{ .reg .pred p; mov.b32 $0, {l, h}; }"


def test_operands_that_do_not_fit() -> None:
    with pytest.raises(TypeError, match="no operand is named 'y'"):
        Assembly("add {out}, {x}, {y};", (("x", f32),), (f32,))
    with pytest.raises(TypeError, match="are the results"):
        Assembly("add {acc}, {acc};", (("acc", f32[2]),), (f32[4],), ("acc",))
