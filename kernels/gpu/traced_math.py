"""What `traced` functions do beyond plain arithmetic: constants, kinds of numbers, reads of global
memory, whole numbers that do not overflow, and mathematical functions.

In the simulator each does the same with numpy's numbers.
"""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np

from .runtime import SIMULATED, types

# Real functions: their names in CUDA's libdevice, to which "f" is added for float32.
FUNCTIONS = ("exp", "exp2", "log", "log2", "tanh", "sqrt", "floor")
# One instruction of float32, right to 22 bits, tanh to 11; results that are no normal number are 0.
INSTRUCTIONS = {
    "exp2": "ex2.approx.ftz.f32", "log2": "lg2.approx.ftz.f32", "tanh": "tanh.approx.f32",
    "sqrt": "sqrt.approx.ftz.f32",
}  # fmt: skip

# ----- under the simulator: numbers -----

if SIMULATED:

    def constant(kind: Any, number: Any, beside: Any) -> Any:
        """A number of a numba type; `beside` is any value of the kernel."""
        return np.dtype(str(kind)).type(number)

    def as_kind(kind: Any, x: Any) -> Any:
        """The same number in another type; a real number becomes a whole one towards 0."""
        return np.dtype(str(kind)).type(x)

    def load(kind: Any, address: Any, offset: int = 0) -> Any:
        """The number `offset` bytes from an address of global memory, which no kernel writes
        meanwhile.
        """
        dtype = np.dtype(str(kind))
        return np.frombuffer(ctypes.string_at(int(address) + offset, dtype.itemsize), dtype)[0]

    def real_of(kind: Any, word: Any) -> Any:
        """The real number whose bits are the low ones of an int64."""
        return np.array([word], np.int64).view(np.dtype(str(kind)))[0]

    def whole(name: str, x: Any, y: Any) -> Any:
        """x + y, x - y or x * y ("add", "sub", "mul") of whole numbers, which is known to fit."""
        with np.errstate(over="ignore"):
            return {"add": np.add, "sub": np.subtract, "mul": np.multiply}[name](x, y)

    def remainder(x: Any, y: Any) -> Any:
        """Of whole numbers, with the sign of y."""
        return np.remainder(x, y)

    def floor_divide(x: Any, y: Any) -> Any:
        """Of whole numbers, rounded down."""
        return np.floor_divide(x, y)

    def absolute(x: Any) -> Any:
        """|x|."""
        return abs(x)

    def fused(a: Any, b: Any, c: Any) -> Any:
        """A * b + c of float32 or float64, rounded once."""
        if isinstance(a, np.float32):
            return np.float32(np.float64(a) * np.float64(b) + np.float64(c))
        return a * b + c

    def function(name: str, x: Any, approximate: bool = False) -> Any:
        """One of FUNCTIONS, if `approximate` by one of INSTRUCTIONS where there is one."""
        with np.errstate(all="ignore"):
            return getattr(np, name)(x)

# ----- on a GPU: symbols -----

else:
    from llvmlite import ir

    from .traced import Value

    LLVM_TYPES = {
        types.float32: ir.FloatType(), types.float64: ir.DoubleType(), types.int32: ir.IntType(32),
        types.int64: ir.IntType(64), types.uint8: ir.IntType(8), types.boolean: ir.IntType(1),
    }  # fmt: skip

    def constant(kind: Any, number: Any, beside: Any) -> Any:
        """A number of a numba type; `beside` is any value of the kernel."""
        return beside.make(kind, ir.Constant(LLVM_TYPES[kind], number))

    def as_kind(kind: Any, x: Any) -> Any:
        """The same number in another type; a real number becomes a whole one towards 0."""
        if x.kind == kind:
            return x
        builder, target = x.builder, LLVM_TYPES[kind]
        to_real, from_real = isinstance(kind, types.Float), isinstance(x.kind, types.Float)
        if kind == types.boolean:
            return x != (0.0 if from_real else 0)
        if from_real and to_real:
            name = "fpext" if kind == types.float64 else "fptrunc"
        elif from_real:
            name = "fptosi"
        elif to_real:
            name = "uitofp" if x.kind == types.boolean else "sitofp"
        else:
            wider = target.width > x.code.type.width
            unsigned = x.kind in (types.boolean, types.uint8)
            name = ("zext" if unsigned else "sext") if wider else "trunc"
        return x.make(kind, getattr(builder, name)(x.code, target))

    def load(kind: Any, address: Any, offset: int = 0) -> Any:
        """The number `offset` bytes from an address of global memory, which no kernel writes
        meanwhile. The offset is part of the instruction.
        """
        builder, target, size = address.builder, LLVM_TYPES[kind], np.dtype(str(kind)).itemsize
        place = builder.inttoptr(address.code, ir.PointerType(ir.IntType(8), addrspace=1))
        place = builder.gep(place, [ir.Constant(ir.IntType(32), offset)], inbounds=True)
        place = builder.bitcast(place, ir.PointerType(target, addrspace=1))
        code = builder.load(place, align=int(size))
        code.set_metadata("invariant.load", builder.module.add_metadata([]))
        return address.make(kind, code)

    def real_of(kind: Any, word: Any) -> Any:
        """The real number whose bits are the low ones of an int64."""
        builder, code = word.builder, word.code
        if kind == types.float32:
            code = builder.trunc(code, ir.IntType(32))
        return word.make(kind, builder.bitcast(code, LLVM_TYPES[kind]))

    def whole(name: str, x: Any, y: Any) -> Any:
        """x + y, x - y or x * y ("add", "sub", "mul") of whole numbers, which is known to fit."""
        return x.make(x.kind, getattr(x.builder, name)(x.code, y.code, flags=("nsw",)))

    def remainder(x: Any, y: Any) -> Any:
        """Of whole numbers, with the sign of y."""
        rest = x % y
        builder = x.builder
        wrong = ((rest ^ y) < 0) & (rest != 0)
        return x.make(x.kind, builder.select(wrong.code, whole("add", rest, y).code, rest.code))

    def floor_divide(x: Any, y: Any) -> Any:
        """Of whole numbers, rounded down."""
        return whole("sub", x, remainder(x, y)) // y

    def absolute(x: Any) -> Any:
        """|x|; of real numbers it costs nothing where it is used."""
        if not isinstance(x.kind, types.Float):
            return x.make(x.kind, x.builder.select((x < 0).code, (-x).code, x.code))
        return _from_libdevice("fabs", x)

    def fused(a: Any, b: Any, c: Any) -> Any:
        """A * b + c of float32 or float64, rounded once."""
        return a.make(a.kind, a.builder.fma(a.code, b.code, c.code))

    def function(name: str, x: Any, approximate: bool = False) -> Any:
        """One of FUNCTIONS, if `approximate` by one of INSTRUCTIONS where there is one."""
        if approximate and name in INSTRUCTIONS and x.kind == types.float32:
            return _instruction(INSTRUCTIONS[name], x)
        if approximate and name == "exp":
            return _instruction(INSTRUCTIONS["exp2"], x * float(np.log2(np.e)))
        if approximate and name == "log":
            return _instruction(INSTRUCTIONS["log2"], x) * float(np.log(2))
        return _from_libdevice(name, x)

    def _from_libdevice(name: str, x: Value) -> Value:
        full = f"__nv_{name}" + "f" * (x.kind == types.float32)
        module, target = x.builder.module, LLVM_TYPES[x.kind]
        known = module.globals.get(full)
        if known is None:
            known = ir.Function(module, ir.FunctionType(target, [target]), full)
        return x.make(x.kind, x.builder.call(known, [x.code]))

    def _instruction(name: str, x: Value) -> Value:
        kind = ir.FunctionType(ir.FloatType(), [ir.FloatType()])
        code = ir.InlineAsm(kind, f"{name} $0, $1;", "=f,f")
        return x.make(x.kind, x.builder.call(code, [x.code]))


__all__ = [
    "FUNCTIONS", "absolute", "as_kind", "constant", "floor_divide", "function", "fused", "load",
    "real_of", "remainder", "whole",
]  # fmt: skip
