"""Loops specialised to a scalar function, compiled by numba and kept on disk.

numba compiles `def loop(...): ... fn(x) ...` for a particular `fn` if `fn` is a global name of the
loop. A closure would do too, but numba's cache on disk never finds such a loop again: a compiled
function in a closure has a new identity in each process. Here `fn` is put into a copy of the loop's
globals, and the loop's name, by which the cache files it, contains a digest of the scalar
function's source: an edited function is a new entry, and a stale one is never used.
"""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import CodeType, FunctionType, ModuleType
from typing import Any

from .compiler import njit


def compiled(fn: Callable[..., float]) -> Any:
    """`fn` compiled by numba; as it is if it is compiled already."""
    return fn if hasattr(fn, "py_func") else njit(error_model="numpy")(fn)


def specialise(
    template: Callable[..., Any],
    *,
    parallel: bool = False,
    source: Callable[..., float] | None = None,
    files: Sequence[str] = (),
    **names: Any,
) -> Any:
    """Compile `template` with some of its global names replaced.

    Args:
        template: a function of a module, which uses the names.
        parallel: whether its `prange` loops run on all cores.
        source: the scalar function that the names depend on; the result is kept on disk if a
            digest can tell whether this function has changed. None: it is not kept.
        files: source files that the template uses functions of.
        names: the replacements.

    Returns:
        A numba dispatcher.

    """
    assert isinstance(template, FunctionType)
    digest = None if source is None else source_digest(source, files)
    scope = {**template.__globals__, **names}
    loop = FunctionType(template.__code__, scope, template.__name__, template.__defaults__)
    loop.__module__ = template.__module__
    loop.__doc__ = template.__doc__
    if digest is not None:
        loop.__qualname__ = f"{template.__name__}_{digest}"
    return njit(parallel=parallel, nogil=True, cache=digest is not None, error_model="numpy")(loop)


def source_digest(fn: Callable[..., float], files: Sequence[str] = ()) -> str | None:
    """A digest of all that the value of `fn` depends on; None if that cannot be told.

    It can be told for a function in a file that reads nothing from outside but modules, numbers and
    functions of the same file.
    """
    plain = getattr(fn, "py_func", fn)
    if not isinstance(plain, FunctionType) or plain.__closure__ or plain.__defaults__:
        return None
    file = inspect.getsourcefile(plain)
    if file is None or not Path(file).is_file():
        return None
    digest = hashlib.sha256()
    for part in (__file__, file, *files):
        digest.update(Path(part).read_bytes())
    code = plain.__code__
    numbers = [value for value in code.co_consts if not isinstance(value, CodeType)]
    identity = (plain.__module__, plain.__qualname__, code.co_firstlineno, code.co_names, numbers)
    digest.update(code.co_code + repr(identity).encode())
    for name in _global_names(plain.__code__):
        value = plain.__globals__.get(name)
        if isinstance(value, int | float):
            digest.update(f"{name}={value!r}".encode())
        elif not (value is None or isinstance(value, ModuleType) or _file_of(value) == file):
            return None
    return digest.hexdigest()[:16]


def _global_names(code: CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _global_names(constant)


def _file_of(value: Any) -> str | None:
    """The file of a function, compiled or not."""
    code = getattr(getattr(value, "py_func", value), "__code__", None)
    return None if code is None else code.co_filename
