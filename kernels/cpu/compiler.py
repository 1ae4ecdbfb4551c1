"""numba's `njit` as all CPU code of the library is compiled: kept on disk, where that can be done.

numba keeps the code of a function with `cache=True` in the first of these folders that can be
written: `$NUMBA_CACHE_DIR`, `__pycache__` beside the source, the user's cache folder. Where there
is none its own `njit` raises an error, and so an import would fail on a read-only installation
without a home; where a disk is full, or a file of the cache is damaged, the first call of a kernel
would. Here each process compiles such a function anew: it starts slower and computes the same.
`python -m minitorch doctor` says where compiled code is kept.

With NUMBA_DISABLE_JIT=1 nothing is compiled: kernels are the Python functions that they were
written as, and their intrinsics those of `plain.py`.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numba
import numba.extending
import numpy as np
from numba.core.caching import CompileResultCacheImpl, FunctionCache, UserWideCacheLocator

COMPILES = not numba.config.DISABLE_JIT


def njit(function: Callable[..., Any] | None = None, *, cache: bool = False, **options: Any) -> Any:
    """`numba.njit`, with or without parentheses; it does not fail for want of a cache.

    Args:
        function: the one to compile; if None the result is a decorator.
        cache: whether its machine code is kept on disk.
        options: `numba.njit`'s. A function that Python calls, not another kernel, has nogil=True;
            it computes NaN and infinity without a warning, compiled or not.

    """
    if function is None:
        return lambda function: njit(function, cache=cache, **options)
    if not COMPILES:
        return np.errstate(all="ignore")(function) if options.get("nogil") else function
    dispatcher = numba.njit(**options)(function)
    if cache:
        kept = _cache(function)
        if kept is not None:
            dispatcher._cache = kept
    return dispatcher


def intrinsic(plain: Callable[..., Any]) -> Callable[[Callable[..., Any]], Any]:
    """A decorator: `numba.extending.intrinsic`, or `plain`, which does the same in numpy, where
    nothing is compiled.
    """
    return numba.extending.intrinsic if COMPILES else lambda define: plain


def cache_folder() -> Path | None:
    """Where the code of this folder's functions is kept; None if it is kept nowhere."""
    kept = _cache(cache_folder)
    return None if kept is None else Path(kept.cache_path)


class _UserWideCacheLocator(UserWideCacheLocator):  # type: ignore[misc]
    """numba's, but for users without a home: it would make a folder named `~` where they are."""

    def ensure_cache_path(self) -> None:
        path = self.get_cache_path()
        if not os.path.isabs(path):
            raise OSError(f"{path} is no absolute path")
        super().ensure_cache_path()


class _CacheImpl(CompileResultCacheImpl):  # type: ignore[misc]
    _locator_classes = [  # noqa: RUF012
        _UserWideCacheLocator if locator is UserWideCacheLocator else locator
        for locator in CompileResultCacheImpl._locator_classes
    ]


class _Cache(FunctionCache):  # type: ignore[misc]
    """numba's cache of one function; what cannot be read is not there, and not writing is no
    error.
    """

    _impl_class = _CacheImpl

    def load_overload(self, sig: Any, target_context: Any) -> Any:
        try:
            return super().load_overload(sig, target_context)
        except Exception:  # of a damaged file: pickle promises no type
            with suppress(OSError):
                self.flush()
            return None

    def save_overload(self, sig: Any, data: Any) -> None:
        with suppress(OSError):
            super().save_overload(sig, data)


def _cache(function: Callable[..., Any]) -> _Cache | None:
    try:
        return _Cache(function)
    except (RuntimeError, OSError):  # no folder can be written, or the source cannot be read
        return None
