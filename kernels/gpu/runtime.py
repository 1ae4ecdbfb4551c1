"""The one import of numba's CUDA target, and the few things that every GPU kernel needs from it.

Kernels see numba through the names of this module alone, so that another compiler of the same
language (numba-cuda-mlir) is one line away, and so that what the simulator lacks
(`NUMBA_ENABLE_CUDASIM=1`: plain Python, no GPU) is made up for in one place.
"""

from __future__ import annotations

import ctypes
import importlib
import importlib.util
import math
import os
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import numba
import numpy as np

from . import compile_cache, ptx_simulated
from .arguments import pack
from .bindings import bindings

SIMULATED = os.environ.get("NUMBA_ENABLE_CUDASIM", "0") != "0"


def _cuda_target() -> tuple[Any, bool]:
    """numba's CUDA target, imported so that numba-cuda 0.30.4 loads with numpy 2.5, too; and
    whether that took something.

    A module of numba-cuda that it loads with the first kernel refers to `numpy.row_stack`, an old
    name of `vstack` that numpy 2.5 took away. It is lent the name: loaded here, at once, and numpy
    is as it was afterwards. Another module makes numpy 2.5 warn of what later versions will refuse.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The 'generic' unit for NumPy", DeprecationWarning)
        import numba.cuda

        if SIMULATED or hasattr(np, "row_stack") or not importlib.util.find_spec("numba.cuda.np"):
            return numba.cuda, False
        vars(np)["row_stack"] = np.vstack
        try:
            importlib.import_module("numba.cuda.np.arrayobj")
        finally:
            del vars(np)["row_stack"]
        return numba.cuda, True


class _SimulatedTarget:
    """The simulator's CUDA target: within a kernel what its threads see, else what programs do.

    numba exchanges the two in the globals of a function while it runs. Its own simulator, where
    numba-cuda is not installed, changes them back when a first thread leaves a device function in
    which others still wait for a barrier. This is neither, so that numba leaves it where it is.
    """

    def __init__(self, target: Any) -> None:
        self._target = target
        self._within = importlib.import_module("numba.cuda.simulator.kernel")._get_kernel_context

    def __getattr__(self, name: str) -> Any:
        kernel = self._within()
        return getattr(self._target if kernel is None else kernel, name)


# numba publishes no types for its CUDA target: it is named Any once, here, and the checkers stay
# strict elsewhere.
cuda, ROW_STACK_LENT = _cuda_target()
if SIMULATED:
    cuda = _SimulatedTarget(cuda)
types: Any = numba.types

numba.config.CUDA_LOW_OCCUPANCY_WARNINGS = 0  # small tensors make small grids
WARP = 32


@cache
def is_available() -> bool:
    """Whether kernels can run here: there is a GPU with a driver, or the simulator is on."""
    return bool(cuda.is_available())


@cache
def compute_capability() -> tuple[int, int]:
    """Of the current device, (9, 0) for a Hopper GPU; the simulator says (5, 2)."""
    if SIMULATED:
        return 5, 2
    major, minor = cuda.get_current_device().compute_capability
    return int(major), int(minor)


@cache
def multiprocessors() -> int:
    """How many the GPU has; one in the simulator."""
    return 1 if SIMULATED else int(cuda.get_current_device().MULTIPROCESSOR_COUNT)


@cache
def architecture() -> str:
    """That the compiler makes code for on the current device: "sm_80", "sm_90a"."""
    major, minor = compute_capability()
    return f"sm_{major}{minor}" + ("a" if major >= 9 else "")


# ----- compiling -----


def kernel(
    threads: int, *, fastmath: bool = False, blocks: int | None = None
) -> Callable[[Any], Any]:
    """Decorator: a kernel that is launched with `threads` threads to a block.

    Knowing the number, the compiler can give each thread as many registers as fit.

    Args:
        threads: number of threads of a block, the product of its dimensions.
        fastmath: let the compiler assume that no value is NaN or infinite, and approximate.
        blocks: that a multiprocessor's registers are to be enough for at once; `setmaxnreg` works
            only where it is given, be it 1.

    """
    options: dict[str, Any] = {"fastmath": fastmath}
    if not SIMULATED:
        options["launch_bounds"] = threads if blocks is None else (threads, blocks)
    return cuda.jit(**options)  # type: ignore[no-any-return]


def device_function(function: Any) -> Any:
    """Decorator: a function that kernels call, compiled into them."""
    return function if SIMULATED else cuda.jit(device=True, inline="always")(function)


@dataclass(frozen=True)
class Instance:
    """A kernel with all its compile-time arguments chosen: what the compile tests go through.

    Args:
        name: says which, with its arguments: "softmax_forward[float32]".
        kernel: what a kernel factory returned.
        signature: numba types of its arguments.
        most_registers: a thread's limit, checked for every architecture.
        architectures: those that launch it, "sm_90a" and the like; all if empty.

    """

    name: str
    kernel: Any
    signature: tuple[Any, ...]
    most_registers: int = 255
    architectures: tuple[str, ...] = ()


# ----- launching -----


class _Streams(threading.local):
    """Each thread has its own current stream."""

    def __init__(self) -> None:
        self.stack: list[Any] = [0]


_streams = _Streams()


def current_stream() -> Any:
    """The stream that kernels are launched on; 0 is the device's default stream."""
    return _streams.stack[-1]


@contextmanager
def on_stream(stream: Any) -> Iterator[None]:
    """Launch on `stream` (of `cuda.stream()`) inside the block."""
    _streams.stack.append(stream)
    try:
        yield
    finally:
        _streams.stack.pop()


def launch(
    kernel: Any,
    grid: int | tuple[int, ...],
    threads: int | tuple[int, ...],
    *arguments: Any,
    shared_bytes: int = 0,
) -> None:
    """Launch a kernel on the current stream.

    numba takes 20 to 60 us for that. The first time it compiles, if no process has before
    (`compile_cache.py`); calls with arguments of the usual types go to the driver directly, in
    about 8 us.

    Args:
        kernel: compiled by `kernel`.
        grid: number of blocks, x up to 2**31 - 1, y and z up to 65535; with 0 nothing is launched.
        threads: number of threads of a block.
        arguments: numba device arrays, numbers and (named) tuples of whole numbers.
        shared_bytes: of dynamic shared memory.

    """
    if grid == 0:
        return
    packed = None if SIMULATED else pack(arguments)
    if packed is None:
        kernel[grid, threads, current_stream(), shared_bytes](*arguments)
        return
    values, kinds = packed
    function = _functions.get((kernel, kinds))
    if function is None:
        function = _functions[kernel, kinds] = _Function(_machine_code(kernel, arguments))
    if shared_bytes > function.shared_bytes:
        function.allow(shared_bytes)
    _launch_directly(function.handle, grid, threads, shared_bytes, values)


# ----- launching without numba -----

MOST_VALUES = 256  # words of a kernel's arguments


class _Function:
    """A compiled kernel in the driver's hands.

    Args:
        handle: the driver's (CUkernel).

    """

    def __init__(self, handle: int) -> None:
        self.handle = handle
        self.shared_bytes = 0  # of dynamic shared memory that was asked for

    def allow(self, shared_bytes: int) -> None:
        """Let a block have so many: more than 48 KiB, static ones included, must be asked for."""
        driver = bindings()
        attribute = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        device = int(cuda.get_current_device().id)
        handle = driver.CUkernel(self.handle)
        (status,) = driver.cuKernelSetAttribute(attribute, shared_bytes, handle, device)
        if int(status) != 0:
            raise RuntimeError(f"the GPU gives no block {shared_bytes} bytes of shared memory")
        self.shared_bytes = shared_bytes


_functions: dict[tuple[Any, tuple[Any, ...]], _Function] = {}
_parameters = threading.local()


def _machine_code(kernel: Any, arguments: tuple[Any, ...]) -> int:
    """The handle of the kernel for arguments of these types: from the disk, or compiled now."""
    signature = tuple(kernel.typeof_pyval(x) for x in arguments)
    name = compile_cache.key(kernel, signature, architecture())
    code = compile_cache.read(name)
    handle = None if code is None else compile_cache.loaded(code)
    if handle is None:
        compiled = kernel.compile(signature)._codelibrary
        compile_cache.write(name, bytes(compiled.get_cubin().code))
        handle = int(compiled.get_cufunc().handle)
    return handle


def _launch_directly(
    function: int,
    grid: int | tuple[int, ...],
    threads: int | tuple[int, ...],
    shared_bytes: int,
    values: list[int],
) -> None:
    if not hasattr(_parameters, "words"):  # of this thread: a launch lets other threads run
        words = (ctypes.c_int64 * MOST_VALUES)()
        first = ctypes.addressof(words)
        _parameters.words = words
        _parameters.addresses = (ctypes.c_void_p * MOST_VALUES)(
            *(first + 8 * i for i in range(MOST_VALUES))
        )
    _parameters.words[: len(values)] = values
    driver, stream = bindings(), current_stream()
    handle = stream if isinstance(stream, int) else getattr(stream.handle, "value", stream.handle)
    (status,) = driver.cuLaunchKernel(
        driver.CUfunction(function),
        *_three(grid),
        *_three(threads),
        shared_bytes,
        driver.CUstream(int(handle or 0)),
        ctypes.addressof(_parameters.addresses),
        0,
    )
    if int(status) != 0:
        raise RuntimeError(f"the kernel could not be launched: {status.name} ({int(status)})")


def _three(sizes: int | tuple[int, ...]) -> tuple[int, ...]:
    return (sizes, 1, 1) if isinstance(sizes, int) else (*sizes, 1, 1)[:3]


# ----- number types -----


def _same(x):
    return x


def _bfloat16_to_float32(bits):
    return _float32_of_bits(types.uint32(bits) << types.uint32(16))


def _rounded_to_bfloat16(x):
    """To the nearest, ties to even; NaN stays NaN."""
    bits = _bits_of_float32(x)
    if x != x:
        return types.uint16((bits >> types.uint32(16)) | types.uint32(64))
    odd = (bits >> types.uint32(16)) & types.uint32(1)
    # uint32() each time: numba would go on in 64 bits, at twice the cost.
    rounded = types.uint32(types.uint32(bits + types.uint32(0x7FFF)) + odd)
    return types.uint16(rounded >> types.uint32(16))


if SIMULATED:

    def _float32_of_bits(bits):
        return np.uint32(bits).view(np.float32)

    def _bits_of_float32(x):
        return np.float32(x).view(np.uint32)

    _float32_to_bfloat16 = _rounded_to_bfloat16

else:
    from llvmlite import ir
    from numba.cuda.extending import intrinsic as intrinsic

    try:
        from numba.cuda.core.targetconfig import ConfigStack
    except ImportError:  # numba's own CUDA target, where numba-cuda is not installed
        from numba.core.targetconfig import ConfigStack

    def _bitcast(source: Any, target: Any, llvm_type: Any) -> Any:
        @intrinsic
        def convert(typingctx, x):
            def codegen(context, builder, signature, args):
                return builder.bitcast(args[0], llvm_type)

            return target(source), codegen

        return convert

    _float32_of_bits = _bitcast(types.uint32, types.float32, ir.FloatType())
    _bits_of_float32 = _bitcast(types.float32, types.uint32, ir.IntType(32))

    @intrinsic
    def _float32_to_bfloat16(typingctx, x):
        """One instruction where the hardware knows bfloat16, from compute capability 8.0 on."""

        def codegen(context, builder, signature, args):
            if ConfigStack().top().compute_capability < (8, 0):
                return context.compile_internal(builder, _rounded_to_bfloat16, signature, args)
            kind = ir.FunctionType(ir.IntType(16), [ir.FloatType()])
            return builder.call(ir.InlineAsm(kind, "cvt.rn.bf16.f32 $0, $1;", "=h,f"), args)

        return types.uint16(types.float32), codegen


@dataclass(frozen=True)
class Precision:
    """How numbers of one dtype are stored and computed with.

    Args:
        name: "float32", "float64", "float16" or "bfloat16".
        storage: numpy dtype of the arrays that kernels get: bfloat16 travels as its 16 bits.
        real: numba type of the arithmetic, float32 for the 16-bit types; call it to make a constant
            inside a kernel, `real(0.5)`: a bare 0.5 would be a float64.
        load: device function, from storage to `real`.
        store: device function, from `real` to storage, rounded to the nearest.

    """

    name: str
    storage: np.dtype[Any]
    real: Any
    load: Any
    store: Any

    @property
    def array(self) -> Any:
        """numba type of a contiguous one-dimensional array of it, for signatures."""
        return types.Array(numba.from_dtype(self.storage), 1, "C")

    @property
    def real_array(self) -> Any:
        """numba type of such an array of the arithmetic type."""
        return types.Array(self.real, 1, "C")


@cache
def precision(name: str) -> Precision:
    """The `Precision` of a dtype, by its name (`dtype.name`)."""
    same = device_function(_same)
    if name in ("float32", "float64"):
        return Precision(name, np.dtype(name), getattr(types, name), same, same)
    if name == "float16":
        return Precision(
            name, np.dtype(name), types.float32, _cast(types.float32), _cast(types.float16)
        )
    if name == "bfloat16":
        return Precision(
            name,
            np.dtype(np.uint16),
            types.float32,
            device_function(_bfloat16_to_float32),
            device_function(_float32_to_bfloat16) if SIMULATED else _float32_to_bfloat16,
        )
    raise TypeError(f"kernels compute with float16, bfloat16, float32 and float64, got {name}")


def _cast(target: Any) -> Any:
    @device_function
    def convert(x):
        return target(x)

    return convert


# ----- a warp's and a block's sums -----


@device_function
def warp_barrier():
    """What the threads of a warp have written, all of them see."""
    if SIMULATED:
        cuda.syncthreads()
    else:
        cuda.syncwarp()


def _shuffle_xor(x, mask):
    return cuda.shfl_xor_sync(0xFFFFFFFF, x, mask)


shuffle_xor = ptx_simulated.shuffle_xor if SIMULATED else device_function(_shuffle_xor)


@device_function
def warp_sum(x):
    """The sum of x over the 32 threads of a warp, in every one of them, always in one order."""
    x += shuffle_xor(x, 16)
    x += shuffle_xor(x, 8)
    x += shuffle_xor(x, 4)
    x += shuffle_xor(x, 2)
    x += shuffle_xor(x, 1)
    return x


@device_function
def warp_max(x):
    """The largest x of the 32 threads of a warp, in every one of them."""
    x = max(x, shuffle_xor(x, 16))
    x = max(x, shuffle_xor(x, 8))
    x = max(x, shuffle_xor(x, 4))
    x = max(x, shuffle_xor(x, 2))
    x = max(x, shuffle_xor(x, 1))
    return x


def ceil_div(a: int, b: int) -> int:
    """How many pieces of b it takes to cover a."""
    return -(-a // b)


NEGATIVE_INFINITY = -math.inf
