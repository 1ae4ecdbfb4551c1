"""DLPack: how array libraries hand each other memory without a copy.

A capsule holds a C structure that says where the elements are, and a function to call when they are
needed no more. Here the structure is read with ctypes, and written by numpy. numpy's own DLPack
knows neither the GPU nor bfloat16, so a few fields are written over; the function stays numpy's,
for it must be C: a taker may call it from a thread without the GIL, while an exception is on its
way (which Python code would lose), or when the interpreter is gone.

Source: dlpack.h of https://github.com/dmlc/dlpack, the structures without a version, which all
libraries take.
"""

from __future__ import annotations

import ctypes
from typing import Any, NamedTuple

import numpy as np

from ..dtypes import BFLOAT16

CPU, CUDA, CUDA_MANAGED = 1, 2, 13  # DLDeviceType
_BOOL_CODE, _BFLOAT_CODE = 6, 4  # DLDataTypeCode
_KINDS = {0: "i", 1: "u", 2: "f", 5: "c"}  # numpy's letter for a DLDataTypeCode
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
_is_valid = _python.PyCapsule_IsValid
_is_valid.argtypes = (ctypes.py_object, ctypes.c_char_p)
_pointer_of = _python.PyCapsule_GetPointer
_pointer_of.restype = ctypes.c_void_p
_pointer_of.argtypes = (ctypes.py_object, ctypes.c_char_p)
_rename = _python.PyCapsule_SetName
_rename.argtypes = (ctypes.py_object, ctypes.c_char_p)

# ----- giving -----


class _Lender:
    """numpy makes an array of this, whose elements it never touches, and which keeps the owner."""

    def __init__(self, memory: Memory) -> None:
        size = memory.dtype.itemsize
        self.owner = memory.owner
        self.__array_interface__ = {
            "version": 3,
            "shape": memory.shape,
            "strides": tuple(step * size for step in memory.strides),
            "typestr": "<u2" if memory.dtype == BFLOAT16 else memory.dtype.str,
            "data": (memory.pointer, False),
        }


def export(memory: Memory) -> Any:
    """A capsule with `memory`, whose owner is kept until the taker has no use for it."""
    capsule = np.asarray(_Lender(memory)).__dlpack__()
    tensor = _ManagedTensor.from_address(_pointer_of(capsule, _FRESH)).dl_tensor
    tensor.data = memory.pointer  # numpy has its own for an array without elements
    tensor.device = _Device(*memory.device)
    if memory.dtype == BFLOAT16:
        tensor.dtype.code = _BFLOAT_CODE
    return capsule


# ----- taking -----


class _Taken:
    """Calls the giver's deleter when nobody holds this any more."""

    def __init__(self, address: int, deleter: int | None) -> None:
        self.address = address
        self.delete = _Deleter(deleter) if deleter else None

    def __del__(self) -> None:
        if self.delete is not None:
            self.delete(self.address)


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
    return Memory(pointer, shape, strides, dtype, device, _Taken(address, managed.deleter))


def _dtype(given: _DataType) -> np.dtype[Any]:
    code, bits = given.code, given.bits
    if given.lanes == 1 and (code, bits) == (_BFLOAT_CODE, 16):
        return BFLOAT16
    if given.lanes == 1 and code == _BOOL_CODE:
        return np.dtype(np.bool_)
    if given.lanes != 1 or code not in _KINDS or bits not in (8, 16, 32, 64, 128):
        raise TypeError(f"numpy has no dtype for DLPack's type {code} of {bits} bits")
    return np.dtype(f"{_KINDS[code]}{bits // 8}")
