"""Checkpoints: named arrays and a few words about them in one safetensors file, written atomically.

The file goes to a temporary name beside the target, is flushed to the disk and then renamed, so a
program killed at any moment leaves the last whole checkpoint. A checksum of all arrays is kept in
the metadata: a file that a disk or a copy has damaged is not taken for a whole one. safetensors is
an optional dependency (extra `train`) and is imported when a checkpoint is first read or written.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
RESERVED = "__metadata__"  # where the format keeps the metadata, among the names of arrays
CHECKSUM = "minitorch.sha256"
LONGEST_HEADER = 100_000_000  # bytes of names, shapes and metadata that safetensors reads
# float8 can be written by safetensors, but numpy has no such type to read it into.
DTYPES = frozenset(
    "bool int8 int16 int32 int64 uint8 uint16 uint32 uint64 "
    "float16 bfloat16 float32 float64 complex64".split()
)


class CheckpointError(ValueError):
    """What cannot be kept in a checkpoint; or a checkpoint that cannot be read, or does not fit."""


def save_checkpoint(
    path: str | os.PathLike[str],
    arrays: Mapping[str, Any],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write named arrays to a safetensors file, all of it or nothing.

    Args:
        path: the file; its folder is made if it is missing.
        arrays: name to array, or to anything `numpy.asarray` takes (a Tensor, say), of any strides.
        metadata: text to keep beside them; keys and values are strings.

    Raises:
        CheckpointError: no safetensors here, or a name, a dtype or metadata that have no place in
            the format. Nothing has been written.
        OSError: the file cannot be written. What was there before still is.

    """
    safetensors = _safetensors()
    from safetensors.numpy import save

    for name in arrays:
        _check_text(name, "name of an array")
        if name == RESERVED:
            raise CheckpointError(f"no array can have the name {RESERVED}: safetensors reserves it")
    words = dict(metadata or {})
    for key, value in words.items():
        _check_text(key, "key of the metadata")
        _check_text(value, f"value of the metadata's {key!r}")
        if key == CHECKSUM:
            raise CheckpointError(f"the metadata cannot have the key {CHECKSUM}: it is set here")
    plain = {}
    for name, array in arrays.items():
        try:
            plain[name] = _contiguous(array)
        except ValueError as error:
            raise CheckpointError(f"cannot store {name!r}: {error}") from error
        if plain[name].dtype.name not in DTYPES:
            dtype = plain[name].dtype
            raise CheckpointError(f"cannot store {name!r}: dtype {dtype} has no place in the file")
    words[CHECKSUM] = _checksum(plain)
    try:
        content = save(plain, words)
    except (safetensors.SafetensorError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"cannot store these arrays in {path}: {error}") from error
    if int.from_bytes(content[:8], "little") > LONGEST_HEADER:
        raise CheckpointError(
            f"names and metadata are too long: safetensors reads {LONGEST_HEADER:,} bytes of them"
        )
    write_atomically(path, content)


def _check_text(text: Any, what: str) -> None:
    """Raise `CheckpointError` unless it is a string that UTF-8 can hold."""
    if not isinstance(text, str):
        raise CheckpointError(
            f"a {what} must be a string, got {text!r:.80} of type {type(text).__name__}"
        )
    try:
        text.encode()
    except UnicodeEncodeError:
        raise CheckpointError(f"a {what} must be text, got {text!a:.80}, which is none") from None


def _checksum(arrays: Mapping[str, Array]) -> str:
    """SHA-256 of the names, dtypes, shapes and elements, in the order of the names."""
    digest = hashlib.sha256()
    for name in sorted(arrays):
        array = arrays[name]
        digest.update(json.dumps([name, array.dtype.name, array.shape]).encode())
        digest.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


def load_checkpoint(
    path: str | os.PathLike[str], like: Mapping[str, Any] | None = None
) -> tuple[dict[str, Array], dict[str, str]]:
    """Read what `save_checkpoint` wrote.

    Args:
        path: the file.
        like: if given, the names and shapes that the file must have (a model's `state_dict()`).

    Returns:
        The arrays by name, and the metadata.

    Raises:
        CheckpointError: no such file, not a whole safetensors file, arrays that are not those that
            were written (their checksum differs; files of others have none and are not checked),
            a dtype that numpy lacks, or other names or shapes than `like`.

    """
    safetensors = _safetensors()
    if not Path(path).is_file():
        raise CheckpointError(f"there is no checkpoint at {path}")
    try:
        with safetensors.safe_open(os.fspath(path), framework="numpy") as file:
            for name in file.keys():
                dtype = file.get_slice(name).get_dtype()
                if dtype == "F4" or dtype.startswith(("F6_", "F8_")):
                    raise CheckpointError(
                        f"{path} cannot be read: {name!r} is of dtype {dtype}, which numpy lacks"
                    )
            arrays = {name: np.array(file.get_tensor(name)) for name in file.keys()}
            metadata = dict(file.metadata() or {})
    except CheckpointError:
        raise
    except (safetensors.SafetensorError, OSError, AttributeError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path} is not a whole safetensors file ({error})") from error
    expected = metadata.pop(CHECKSUM, None)
    if expected is not None and expected != _checksum(arrays):
        raise CheckpointError(
            f"{path} is damaged: the checksum of its arrays is not the one they were written with"
        )
    if like is not None:
        check_shapes(arrays, like, str(path))
    return arrays, metadata


def check_shapes(arrays: Mapping[str, Array], like: Mapping[str, Any], source: str) -> None:
    """Raise `CheckpointError` unless `arrays` has the names and shapes of `like`.

    Args:
        arrays: what was read.
        like: what is wanted.
        source: where `arrays` comes from, for the message.

    """
    missing = [name for name in like if name not in arrays]
    unknown = [name for name in arrays if name not in like]
    if missing or unknown:
        raise CheckpointError(
            f"{source} holds another model: missing {some(missing)}, not wanted {some(unknown)}"
        )
    for name, wanted in like.items():
        if tuple(arrays[name].shape) != tuple(wanted.shape):
            raise CheckpointError(
                f"{source} holds another model: {name} has shape {tuple(arrays[name].shape)}, "
                f"wanted {tuple(wanted.shape)}"
            )


def write_atomically(path: str | os.PathLike[str], content: bytes) -> None:
    """Replace a file by `content` so that a reader, or a crash, sees the old or the new one whole.

    Args:
        path: the file; its folder is made if it is missing.
        content: all of its bytes.

    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    # In the target's own folder: a rename is atomic within one file system only.
    handle, temporary = tempfile.mkstemp(prefix=f".{target.name}.", dir=target.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~_umask())  # mkstemp makes files that only the owner can read
        os.replace(temporary, target)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    _flush_folder(target.parent)


def _flush_folder(folder: Path) -> None:
    """Make the rename itself last through a loss of power, where the system can do that."""
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError:  # Windows does not open folders
        return
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _contiguous(array: Any) -> Array:
    """A C-contiguous array of native byte order.

    safetensors 0.8.0 writes the raw buffer: for a permuted or sliced array that is other data than
    the array shows, and nothing says so.
    """
    plain = np.asarray(array)
    return np.asarray(plain, dtype=plain.dtype.newbyteorder("="), order="C")


def some(names: Sequence[str], separator: str = ", ") -> str:
    """The first three of what a message lists, and how many more there are."""
    if not names:
        return "nothing"
    return separator.join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _safetensors() -> ModuleType:
    try:
        import safetensors
    except ImportError as error:
        raise CheckpointError(
            "checkpoints need the package safetensors: pip install -e '.[train]' in the checkout"
        ) from error
    return safetensors
