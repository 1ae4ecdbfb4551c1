"""Standard output that ends no training, and a word about compiling."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import IO, Any

from numba.core import event

PATIENCE = 1.0  # seconds of compiling before a word is said about it


class Output:
    """Standard output that ends no training: what cannot be written is left out.

    A pipe may have lost its reader, a terminal may have been closed, a disk may be full. Characters
    that the encoding of the output lacks are written as escapes.

    Args:
        file: the output.

    """

    def __init__(self, file: IO[str]) -> None:
        self.file = file
        self.gone = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)

    def write(self, text: str) -> int:
        """Write, if that can be done."""
        self._try(lambda: self._write(text))
        return len(text)

    def flush(self) -> None:
        """Flush, if that can be done."""
        self._try(self.file.flush)

    def _write(self, text: str) -> None:
        try:
            self.file.write(text)
        except UnicodeEncodeError:
            encoding: str = getattr(self.file, "encoding", None) or "ascii"
            self.file.write(text.encode(encoding, "backslashreplace").decode(encoding))

    def _try(self, action: Callable[[], None]) -> None:
        if self.gone:
            return
        try:
            action()
        except (OSError, ValueError):  # ValueError: it has been closed
            self.gone = True
            # Python flushes what is left when it ends, and would complain again.
            with suppress(AttributeError, OSError, ValueError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), self.file.fileno())


class CompileNote:
    """Has a word said when numba compiles for longer than `PATIENCE`, once.

    Args:
        say: says it.

    """

    def __init__(self, say: Callable[[], None]) -> None:
        self._say = say
        self._timer: threading.Timer | None = None

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Listen to numba while the block runs, and to numba-cuda, which has events of its own."""
        sources = [(event, "numba:compile")]
        if "numba.cuda.core.event" in sys.modules:
            sources.append((sys.modules["numba.cuda.core.event"], "numba-cuda:run_pass"))
        listeners = [(source, kind, self._listener(source)) for source, kind in sources]
        for source, kind, listener in listeners:
            source.register(kind, listener)
        try:
            yield
        finally:
            for source, kind, listener in listeners:
                source.unregister(kind, listener)
            if self._timer is not None:
                self._timer.cancel()

    def _listener(self, source: Any) -> Any:
        note = self

        class Listener(source.Listener):  # type: ignore[misc]  # numba has no types
            def on_start(self, event: Any) -> None:
                note._begin()

            def on_end(self, event: Any) -> None:
                pass  # others may follow

        return Listener()

    def _begin(self) -> None:
        """A function begins to be compiled."""
        if self._timer is None:
            self._timer = threading.Timer(PATIENCE, self._say)
            self._timer.daemon = True
            self._timer.start()
