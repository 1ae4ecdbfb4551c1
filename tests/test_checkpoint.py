"""Checkpoints: what is read is what was written, of any strides; a crash leaves the old one."""

import json
import os
import stat
import sys
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minitorch import checkpoint
from minitorch.checkpoint import CheckpointError, load_checkpoint, save_checkpoint


def test_what_is_read_is_what_was_written(tmp_path: Path) -> None:
    arrays = {
        "a": np.arange(6.0).reshape(2, 3),
        "float32": np.array([1.5, np.nan, np.inf], dtype=np.float32),
        "zero-dimensional": np.array(3.0),
        "empty": np.zeros((0, 4)),
        "int64": np.array([2**62]),
        "big-endian": np.array([1.0, 2.0], dtype=">f8"),
    }
    save_checkpoint(tmp_path / "new" / "c.safetensors", arrays, {"step": "7"})
    read, metadata = load_checkpoint(tmp_path / "new" / "c.safetensors")
    assert metadata == {"step": "7"}
    assert set(read) == set(arrays)
    for name, array in arrays.items():
        assert read[name].shape == array.shape
        assert read[name].dtype == array.dtype.newbyteorder("=")
        np.testing.assert_array_equal(read[name], array)


@given(st.permutations([0, 1, 2]), st.integers(1, 3), st.booleans())
def test_strided_arrays_keep_their_values(
    tmp_path_factory: pytest.TempPathFactory, order: list[int], step: int, backwards: bool
) -> None:
    """safetensors 0.8.0 alone would write the buffer in memory order here."""
    array = np.arange(2 * 3 * 8.0, dtype=np.float32).reshape(2, 3, 8).transpose(order)
    array = array[:, :: -step if backwards else step]
    path = tmp_path_factory.mktemp("strided") / "c.safetensors"
    save_checkpoint(path, {"x": array})
    np.testing.assert_array_equal(load_checkpoint(path)[0]["x"], array)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no checkpoint at .*nowhere"):
        load_checkpoint(tmp_path / "nowhere.safetensors")


@pytest.mark.parametrize("keep", [0, 4, 40, -1])
def test_a_cut_off_file_is_refused(tmp_path: Path, keep: int) -> None:
    path = tmp_path / "c.safetensors"
    save_checkpoint(path, {"x": np.arange(100.0)})
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match="not a whole safetensors file"):
        load_checkpoint(path)


def test_another_shape_or_name_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "c.safetensors"
    save_checkpoint(path, {"w": np.zeros((2, 3))})
    with pytest.raises(CheckpointError, match=r"w has shape \(2, 3\), wanted \(3, 2\)"):
        load_checkpoint(path, like={"w": np.zeros((3, 2))})
    with pytest.raises(CheckpointError, match="missing b, not wanted w"):
        load_checkpoint(path, like={"b": np.zeros((2, 3))})


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "c.safetensors"
    save_checkpoint(path, {"x": np.ones(3)})

    def full_disk(*_: Any) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(OSError, match="no space"):
        save_checkpoint(path, {"x": np.zeros(3)})
    monkeypatch.undo()
    np.testing.assert_array_equal(load_checkpoint(path)[0]["x"], np.ones(3))
    assert [p.name for p in tmp_path.iterdir()] == ["c.safetensors"]


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no file modes")
def test_the_file_has_the_usual_mode(tmp_path: Path) -> None:
    (tmp_path / "usual").touch()
    save_checkpoint(tmp_path / "c.safetensors", {"x": np.ones(3)})
    modes = {stat.S_IMODE(p.stat().st_mode) for p in tmp_path.iterdir()}
    assert len(modes) == 1


def test_without_safetensors_the_message_names_the_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "safetensors", None)
    with pytest.raises(CheckpointError, match=r"'\.\[train\]'"):
        checkpoint.save_checkpoint(tmp_path / "c.safetensors", {"x": np.ones(1)})


def test_a_dtype_without_a_place_in_the_format_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="cannot store"):
        save_checkpoint(tmp_path / "c.safetensors", {"x": np.array(["text"])})


@pytest.mark.parametrize(
    ("arrays", "metadata", "named"),
    [
        ({"__metadata__": np.ones(2)}, None, "__metadata__"),
        ({5: np.ones(2)}, None, "5 of type int"),
        ({"\ud800": np.ones(2)}, None, "ud800"),
        ({"x": np.ones(2)}, {"step": 7}, "'step' must be a string, got 7"),
        ({"x": np.ones(2)}, {7: "step"}, "got 7 of type int"),
        ({"x": np.ones(2)}, {"\udcff": "y"}, "udcff"),
        ({"x": np.ones(2)}, {"minitorch.sha256": "y"}, "minitorch.sha256"),
        ({"x": np.ones(2, np.complex128)}, None, "'x'"),
        ({"x": None}, None, "'x'"),
        ({"x": [[1.0], [1.0, 2.0]]}, None, "'x'"),
        ({"x": np.zeros(2, ml_dtypes.float8_e5m2)}, None, "'x'"),
    ],
)
def test_what_the_format_cannot_hold_is_named_and_nothing_written(
    tmp_path: Path, arrays: Any, metadata: Any, named: str
) -> None:
    path = tmp_path / "folder" / "c.safetensors"
    with pytest.raises(ValueError, match=named):
        save_checkpoint(path, arrays, metadata)
    assert not path.parent.exists()


def test_a_header_longer_than_can_be_read_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint, "LONGEST_HEADER", 1000)
    with pytest.raises(CheckpointError, match="too long"):
        save_checkpoint(tmp_path / "c.safetensors", {"x": np.ones(1)}, {"long": "x" * 1000})


def test_any_flipped_bit_of_an_array_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "c.safetensors"
    save_checkpoint(path, {"x": np.arange(6.0), "half": np.ones(3, ml_dtypes.bfloat16)})
    whole = path.read_bytes()
    start = 8 + int.from_bytes(whole[:8], "little")
    for place in range(start, len(whole)):
        damaged = bytearray(whole)
        damaged[place] ^= 1 << place % 8
        path.write_bytes(damaged)
        with pytest.raises(CheckpointError, match="is damaged"):
            load_checkpoint(path)


def test_files_of_other_programs_have_no_checksum(tmp_path: Path) -> None:
    from safetensors.numpy import save_file

    path = tmp_path / "c.safetensors"
    save_file({"x": np.arange(3.0)}, path, {"a": "b"})
    arrays, metadata = load_checkpoint(path)
    np.testing.assert_array_equal(arrays["x"], np.arange(3.0))
    assert metadata == {"a": "b"}


@pytest.mark.parametrize("dtype", ["F8_E4M3", "F8_E5M2", "F4", "I4", "F64"])
def test_dtypes_that_numpy_lacks_are_named(tmp_path: Path, dtype: str) -> None:
    size = 2 if dtype == "F4" else 4
    header = {"w": {"dtype": dtype, "shape": [4], "data_offsets": [0, size]}}
    words = json.dumps(header).encode()
    path = tmp_path / "c.safetensors"
    path.write_bytes(len(words).to_bytes(8, "little") + words + bytes(size))
    with pytest.raises(CheckpointError, match=f"'w' is of dtype {dtype}|not a whole"):
        load_checkpoint(path)
