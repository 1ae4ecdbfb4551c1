"""DLPack: how array libraries hand each other memory without a copy.

A capsule holds a C structure that says where the elements are, and a function to call when they are
needed no more. Here both are written and read with ctypes, for memory of the GPU and of the CPU,
and for bfloat16, which numpy's own DLPack does not know.

Source: dlpack.h of https://github.com/dmlc/dlpack, the structures without a version, which all
libraries take.
"""

from __future__ import annotations

import ctypes
from typing import Any, NamedTuple

import numpy as np

from .dtypes import BFLOAT16

CPU, CUDA, CUDA_MANAGED = 1, 2, 13  # DLDeviceType
_BOOL_CODE, _BFLOAT_CODE = 6, 4  # DLDataTypeCode
_CODES = {"i": 0, "u": 1, "f": 2, "b": _BOOL_CODE}
_KINDS = {code: kind for kind, code in _CODES.items()}
_FRESH, _USED = b"dltensor", b"used_dltensor"  # names of a capsule


class Memory(NamedTuple):
    """Elements somewhere, as DLPack describes them.

    Args:
        pointer: address of the first element.
        shape: sizes.
        strides: in elements.
        dtype: numpy dtype.
        device: (DLDeviceType, number of the device).
        owner: keeps the memory for as long as it is held.

    """

    pointer: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: np.dtype[Any]
    device: tuple[int, int]
    owner: Any


class _Device(ctypes.Structure):
    _fields_ = (("device_type", ctypes.c_int32), ("device_id", ctypes.c_int32))


class _DataType(ctypes.Structure):
    _fields_ = (("code", ctypes.c_uint8), ("bits", ctypes.c_uint8), ("lanes", ctypes.c_uint16))


class _Tensor(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device", _Device),
        ("ndim", ctypes.c_int32),
        ("dtype", _DataType),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    )


class _ManagedTensor(ctypes.Structure):
    _fields_ = (
        ("dl_tensor", _Tensor),
        ("manager_ctx", ctypes.c_void_p),
        ("deleter", ctypes.c_void_p),
    )


_Deleter = ctypes.CFUNCTYPE(None, ctypes.c_void_p)
_python = ctypes.PyDLL(None)
_new_capsule = _python.PyCapsule_New
_new_capsule.restype = ctypes.py_object
_new_capsule.argtypes = (ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p)
_is_valid = _python.PyCapsule_IsValid
_is_valid.argtypes = (ctypes.py_object, ctypes.c_char_p)
_pointer_of = _python.PyCapsule_GetPointer
_pointer_of.restype = ctypes.c_void_p
_pointer_of.argtypes = (ctypes.py_object, ctypes.c_char_p)
_rename = _python.PyCapsule_SetName
_rename.argtypes = (ctypes.py_object, ctypes.c_char_p)
# While a capsule is destroyed nothing may take a reference to it: its address is all there is.
_is_valid_at = ctypes.PYFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_char_p)(
    ("PyCapsule_IsValid", _python)
)
_pointer_at = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p, ctypes.c_char_p)(
    ("PyCapsule_GetPointer", _python)
)

# ----- giving -----

_exported: dict[int, tuple[Any, ...]] = {}  # by address: the structure and what it points to


@_Deleter
def _forget(address: int) -> None:
    """The deleter of our structures: whoever took the elements needs them no more."""
    _exported.pop(address, None)


@ctypes.PYFUNCTYPE(None, ctypes.c_void_p)
def _destroy(capsule: int) -> None:
    """A capsule dies; if nobody took its elements, they are forgotten."""
    if _is_valid_at(capsule, _FRESH):
        _exported.pop(_pointer_at(capsule, _FRESH), None)


# Other libraries may call these two while Python is taken apart: they are never freed.
for _callback in (_forget, _destroy):
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(_callback))


def export(memory: Memory) -> Any:
    """A capsule with `memory`, whose owner is kept until the taker has no use for it."""
    dims = len(memory.shape)
    shape, strides = ((ctypes.c_int64 * dims)(*n) for n in (memory.shape, memory.strides))
    if memory.dtype == BFLOAT16:
        dtype = _DataType(_BFLOAT_CODE, 16, 1)
    else:
        dtype = _DataType(_CODES[memory.dtype.kind], 8 * memory.dtype.itemsize, 1)
    tensor = _Tensor(memory.pointer, _Device(*memory.device), dims, dtype, shape, strides, 0)
    managed = _ManagedTensor(tensor, None, ctypes.cast(_forget, ctypes.c_void_p))
    address = ctypes.addressof(managed)
    _exported[address] = (managed, shape, strides, memory.owner)
    return _new_capsule(address, _FRESH, ctypes.cast(_destroy, ctypes.c_void_p))


# ----- taking -----


class _Taken:
    """Calls the giver's deleter when nobody holds this any more."""

    def __init__(self, managed: _ManagedTensor) -> None:
        self.managed = managed
        self.delete = _Deleter(managed.deleter) if managed.deleter else None

    def __del__(self) -> None:
        if self.delete is not None:
            self.delete(ctypes.addressof(self.managed))


def take(capsule: Any) -> Memory:
    """What a capsule holds; from now on it is ours.

    Raises:
        ValueError: the capsule is not a fresh one of DLPack.
        TypeError: elements that numpy has no dtype for.

    """
    if not _is_valid(capsule, _FRESH):
        raise ValueError("expected a fresh DLPack capsule (named 'dltensor'): each is used once")
    address = _pointer_of(capsule, _FRESH)
    managed = _ManagedTensor.from_address(address)
    tensor = managed.dl_tensor
    dtype = _dtype(tensor.dtype)
    _rename(capsule, _USED)
    shape = tuple(tensor.shape[: tensor.ndim])
    if tensor.strides:
        strides = tuple(tensor.strides[: tensor.ndim])
    else:
        strides = tuple(int(np.prod(shape[d + 1 :])) for d in range(tensor.ndim))
    pointer = (tensor.data or 0) + tensor.byte_offset
    device = (tensor.device.device_type, tensor.device.device_id)
    return Memory(pointer, shape, strides, dtype, device, _Taken(managed))


def _dtype(given: _DataType) -> np.dtype[Any]:
    code, bits = given.code, given.bits
    if given.lanes == 1 and (code, bits) == (_BFLOAT_CODE, 16):
        return BFLOAT16
    if given.lanes == 1 and code == _BOOL_CODE:
        return np.dtype(np.bool_)
    if given.lanes != 1 or code not in _KINDS or bits not in (8, 16, 32, 64):
        raise TypeError(f"no numpy dtype for DLPack's type {code} of {bits} bits")
    return np.dtype(f"{_KINDS[code]}{bits // 8}")


__all__ = ["CPU", "CUDA", "CUDA_MANAGED", "Memory", "export", "take"]
