"""One run at a time in a folder: a lock that the system gives back when its process ends."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .errors import UserError

LOCK = ".lock"


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the lock of a run's folder while the block runs; the folder is made if it is missing.

    The lock is the system's, on an open file: a process that dies, however it does, holds none, and
    of several that start together one gets it. The file stays, with the number of its last holder.

    Raises:
        UserError: another process has the lock, the folder cannot be written, or the file of the
            lock's name is another program's.

    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o666)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"cannot write to the folder {folder}: {reason}") from error
    try:
        if not _lock(handle):
            holder = os.read(handle, 20).decode("ascii", "replace").strip()
            raise UserError(
                f"a run is going on in {folder} (process {holder or 'unknown'}): wait for it, or "
                "choose another --out"
            )
        if os.read(handle, 100).strip(b"0123456789\r\n\0"):  # more than a holder's number
            raise UserError(
                f"{folder / LOCK} is no lock of this program: move it, or choose another --out"
            )
        _name_holder(handle, folder)
        yield
    finally:
        os.close(handle)


def _name_holder(handle: int, folder: Path) -> None:
    try:
        os.lseek(handle, 0, os.SEEK_SET)
        os.ftruncate(handle, 0)
        os.write(handle, f"{os.getpid()}\n".encode())
    except OSError as error:
        raise UserError(f"cannot write to the folder {folder}: {error.strerror}") from error


if sys.platform == "win32":
    import msvcrt

    def _lock(handle: int) -> bool:
        os.lseek(handle, 1024, os.SEEK_SET)  # beyond the text, which others may read
        try:
            msvcrt.locking(handle, msvcrt.LK_NBLCK, 1)
        except OSError:
            return False
        finally:
            os.lseek(handle, 0, os.SEEK_SET)
        return True

else:
    import fcntl

    def _lock(handle: int) -> bool:
        """Whether the lock is ours now; also where the file system has no locks."""
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except OSError:
            return True
        return True
