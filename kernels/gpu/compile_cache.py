"""Machine code of GPU kernels on disk, so that a process compiles none that another has compiled.

A kernel is known by what it was made of: the source text of its function and of all functions that
it calls, the values that they take from around them, its options, the types of its arguments, the
architecture and the compiler's version. Nothing has to be thrown away when a kernel is edited, and
what cannot be described for certain is not kept.

The folder is `$MINITORCH_CUDA_CACHE`, or `minitorch/cuda` in the user's cache folder; it may be
deleted at any time, and an empty value turns the cache off.
"""

from __future__ import annotations

import dataclasses
import enum
import hashlib
import importlib.metadata
import inspect
import os
import re
import sys
import sysconfig
import time
import uuid
from contextlib import suppress
from functools import cache, partial
from pathlib import Path
from types import BuiltinFunctionType, CodeType, FunctionType, ModuleType
from typing import Any

import numpy as np

from .bindings import bindings

FOLDER_VARIABLE = "MINITORCH_CUDA_CACHE"
PACKAGE = __name__.split(".", maxsplit=1)[0]
SIMULATION = ".ptx_simulated"  # on which no machine code depends
PYTHON = sysconfig.get_path("stdlib")
REQUIRED = {
    "llvmlite",
    "ml_dtypes",
    "numba",
    "numba_cuda",
    "numpy",
}  # wherever they have been installed to
CACHED = type(cache(len))  # what functools.cache returns
DIGEST_SIZE = 32  # bytes of a file, before the machine code
DAYS_KEPT = 60  # after a file's last use
UNFINISHED = "unfinished-"  # what a file's name begins with while it is being written
OURS = re.compile(rf"{UNFINISHED}.*|.+-sm_\w+-[0-9a-f]{{32}}")  # the folder may hold other files


class Unknown(Exception):
    """Something that a kernel depends on has no description that is the same in every process."""


# ----- what a kernel is made of -----


def key(kernel: Any, signature: tuple[Any, ...], architecture: str) -> str | None:
    """The name under which a kernel's machine code is kept; None if it has none.

    Args:
        kernel: compiled by `runtime.kernel`.
        signature: numba types of its arguments.
        architecture: "sm_80", "sm_90a".

    """
    description = _Description()
    try:
        description.add(kernel)
        # What the fields of named tuples are called is not in the types' names.
        description.add(tuple(getattr(x, "instance_class", None) for x in signature))
    except Unknown:
        return None
    description.text([_compiler(), architecture, *map(str, signature)])
    name = kernel.py_func.__name__
    return f"{name}-{architecture}-{description.hash.hexdigest()[:32]}"


@cache
def _compiler() -> str:
    return f"numba-cuda {importlib.metadata.version('numba-cuda')}"


class _Description:
    """A hash of everything that is reached from a function; each thing once."""

    def __init__(self) -> None:
        self.hash = hashlib.sha256()
        self.seen: dict[int, Any] = {}  # what it refers to is kept, so that no id comes twice

    def text(self, words: list[str]) -> None:
        self.hash.update("\0".join(words).encode() + b"\1")

    def add(self, value: Any) -> None:
        if value is None or isinstance(value, (bool, int, float, complex, str, bytes, np.generic)):
            self.text([type(value).__name__, repr(value)])
        elif isinstance(value, tuple) or _is_record(value):
            self._add_object(value)  # by value: whether equal ones are one object is chance
        elif id(value) in self.seen:
            self.text([f"again {list(self.seen).index(id(value))}"])
        else:
            self.seen[id(value)] = value
            self._add_object(value)

    def _add_object(self, value: Any) -> None:
        wrapped = getattr(value, "py_func", None) or getattr(value, "_defn", None)
        if wrapped is not None:  # a kernel, a device function; an intrinsic
            options = getattr(value, "targetoptions", {})
            self.text(["numba", *(f"{k}={options[k]}" for k in sorted(options))])
            self.add(wrapped)
        elif isinstance(value, FunctionType):
            self._add_function(value)
        elif isinstance(value, type):
            self._add_class(value)
        elif isinstance(value, ModuleType):
            if not _is_installed(value) and not value.__name__.endswith(SIMULATION):
                raise Unknown(value)
            self.text(["module", value.__name__])
        elif isinstance(value, BuiltinFunctionType):
            self.text(["builtin", str(value.__module__), value.__qualname__])
        elif _is_record(value):
            self.add(type(value))
            fields = (f for f in dataclasses.fields(value) if f.compare)  # no hash, of each process
            self._add_all([getattr(value, f.name) for f in fields])
        elif isinstance(value, (tuple, list)):
            self.text(list(getattr(value, "_fields", ())))
            self._add_all(value)
        elif isinstance(value, dict):
            self._add_all([x for item in value.items() for x in item])
        elif isinstance(value, partial):
            self._add_all([value.func, value.args, value.keywords])
        elif isinstance(value, enum.Enum):
            self.text([type(value).__qualname__, str(value), repr(value.value)])
        elif isinstance(value, np.dtype) or _is_compilers(value):
            self.text([type(value).__qualname__, str(value)])
        elif isinstance(value, CACHED):
            self.add(value.__wrapped__)
        else:
            raise Unknown(value)

    def _add_all(self, values: Any) -> None:
        self.text([type(values).__name__, str(len(values))])
        for value in values:
            self.add(value)

    def _add_function(self, function: FunctionType) -> None:
        if _is_installed(function):
            self.text(["function", function.__module__, function.__qualname__])
            return
        self.text(["function", _source(function.__code__)])
        self._add_all(list(function.__defaults__ or ()))
        self.add(function.__kwdefaults__)
        for cell in function.__closure__ or ():
            try:
                self.add(cell.cell_contents)
            except ValueError as error:  # not assigned yet
                raise Unknown(function) from error
        for name in sorted(_names(function.__code__)):
            if name in function.__globals__:
                self.text([name])
                self.add(function.__globals__[name])

    def _add_class(self, value: type) -> None:
        self.text(["class", value.__module__, value.__qualname__])
        if _is_installed(sys.modules.get(value.__module__)):
            return
        self.text([_source(value)])
        for name, member in sorted(vars(value).items()):  # methods, for what they lead to
            function = _function_of(member)
            if function is not None and not _is_generated(function):
                self.text([name])
                self.add(function)
        self._add_all(value.__bases__)


def _function_of(member: Any) -> FunctionType | None:
    """Of a method, a property, and so on."""
    for name in ("__func__", "fget", "func"):
        member = getattr(member, name, member)
    return member if isinstance(member, FunctionType) else None


def _is_generated(function: FunctionType) -> bool:
    """Whether `dataclass` or `NamedTuple` has made it, from what the class's source says."""
    return function.__code__.co_filename.startswith(("<", PYTHON))


def _is_record(value: Any) -> bool:
    return dataclasses.is_dataclass(value) and not isinstance(value, type)


def _is_installed(value: Any) -> bool:
    """Whether a function or module comes with Python or with a package other than this one, and
    changes with their versions alone.
    """
    is_function = isinstance(value, FunctionType)
    module = value.__module__ if is_function else getattr(value, "__name__", None)
    name = "__main__" if module is None else module.split(".", maxsplit=1)[0]
    if name in (PACKAGE, "__main__"):
        return False
    if name in REQUIRED:
        return True
    if is_function:
        path = value.__code__.co_filename
    else:
        path = getattr(value, "__file__", None) or PYTHON  # without a file: built in
    return path.startswith(PYTHON) or any(x in path for x in ("site-packages", "dist-packages"))


def _is_compilers(value: Any) -> bool:
    """A type of numba's or llvmlite's, whose name says all; numba's own things in its modules."""
    return type(value).__module__.split(".", maxsplit=1)[0] in ("numba", "llvmlite")


@cache
def _source(code: CodeType | type) -> str:
    try:
        text = inspect.getsource(code)
    except (OSError, TypeError) as error:  # typed at a prompt
        raise Unknown(code) from error
    if text.count("lambda") > 1 and isinstance(code, CodeType):  # which one of the line is it?
        numbers = [x for x in code.co_consts if not isinstance(x, CodeType)]
        text += f"{code.co_code.hex()} {numbers}"
    return text


@cache
def _names(code: CodeType) -> set[str]:
    inner = [_names(c) for c in code.co_consts if isinstance(c, CodeType)]
    return set(code.co_names).union(*inner)


# ----- the folder -----


@cache
def folder() -> Path | None:
    """Where machine code is kept; None if it is not."""
    chosen = os.environ.get(FOLDER_VARIABLE)
    if chosen == "":
        return None
    if chosen is not None:
        return Path(chosen)
    home = os.environ.get("XDG_CACHE_HOME") or os.environ.get("LOCALAPPDATA")
    try:
        return (Path(home) if home else Path.home() / ".cache") / "minitorch" / "cuda"
    except RuntimeError:  # a user without a home, as in some containers
        return None


def read(name: str | None) -> bytes | None:
    """A kernel's machine code; None if there is none, or the file is damaged: a driver does not
    refuse a part of a kernel, it crashes.
    """
    if name is None or folder() is None:
        return None
    path = folder() / name  # type: ignore[operator]
    try:
        content = path.read_bytes()
    except OSError:
        return None
    code = content[DIGEST_SIZE:]
    if content[:DIGEST_SIZE] != _digest(code):
        return None
    with suppress(OSError):  # a folder that others fill
        os.utime(path)  # it was used: see `_forget_old`
    return code


def write(name: str | None, code: bytes) -> None:
    """Keep a kernel's machine code. A folder that cannot be written to is no error."""
    where = folder()
    if name is None or where is None:
        return
    try:
        where.mkdir(parents=True, exist_ok=True)
        unfinished = where / f"{UNFINISHED}{uuid.uuid4().hex}"  # readable for whom the umask says
        try:
            unfinished.write_bytes(_digest(code) + code)
            os.replace(unfinished, where / name)  # whole or not at all, for processes beside this
        finally:
            unfinished.unlink(missing_ok=True)  # of a full disk
        _forget_old(where)
    except OSError:
        return


def _digest(code: bytes) -> bytes:
    return hashlib.sha256(code).digest()


@cache
def _forget_old(where: Path) -> None:
    """Delete what nobody used for long, but nothing of anyone else's: once in a process that
    writes.
    """
    oldest = time.time() - DAYS_KEPT * 24 * 3600
    for path in where.iterdir():
        with suppress(OSError):  # another process has deleted it
            if OURS.fullmatch(path.name) and path.stat().st_mtime < oldest:
                path.unlink()


# ----- loading -----


def loaded(code: bytes) -> int | None:
    """The handle (CUkernel) of the one kernel in machine code; None if the driver refuses it."""
    driver = bindings()
    status, library = driver.cuLibraryLoadData(code, None, None, 0, None, None, 0)
    if int(status) != 0:
        return None
    status, kernels = driver.cuLibraryEnumerateKernels(1, library)
    return int(kernels[0]) if int(status) == 0 else None
