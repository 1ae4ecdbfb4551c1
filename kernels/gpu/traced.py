"""Straight code over many registers, written as an ordinary Python function.

A local array of numba's lives in memory unless every index of it is a constant, and a loop over a
tuple is no constant either. `traced` turns this round: the function runs once, while the kernel is
being compiled, on `Value`s, and each operation on these emits the instruction. Its loops and lists
leave no trace; what remains is the straight code they went through. In the simulator the same
function runs on numbers:

    @cache
    def tile_sum(count):
        @traced(types.float32, types.UniTuple(types.float32, count))
        def run(numbers):
            total = numbers[0]
            for x in numbers[1:]:
                total = total + x
            return total

        return run
"""

from __future__ import annotations

from collections.abc import Callable
from inspect import Parameter, Signature
from typing import Any

import numpy as np

from .runtime import SIMULATED, device_function, types

# ----- under the simulator: numbers -----


def _as(kind: Any) -> Any:
    dtype = np.dtype(str(kind) if str(kind) != "bool" else "bool").type

    def convert(x: Any) -> Any:
        if isinstance(x, np.generic | int) and dtype in (np.uint32, np.int32, np.uint64):
            bits = 64 if dtype is np.uint64 else 32
            wrapped = int(x) & ((1 << bits) - 1)
            return np.array(wrapped, f"uint{bits}").view(dtype)[()]
        return dtype(x)

    return convert


if SIMULATED:
    from .ptx_simulated import ex2

    def traced(returns: Any, *arguments: Any) -> Callable[[Any], Any]:
        """Decorator: see the text above; the function itself."""
        return device_function

    def select(condition: Any, yes: Any, no: Any) -> Any:
        """`yes` where the condition holds, else `no`: no branch."""
        return yes if condition else no

    def maximum(a: Any, b: Any) -> Any:
        """The larger; the other one if one is NaN. Of two Python floats, too, a float32."""
        return np.fmax(np.float32(a), np.float32(b))

    def fma(a: Any, b: Any, c: Any) -> Any:
        """A * b + c, rounded once."""
        return np.float32(np.float64(a) * np.float64(b) + np.float64(c))

    def exp2(x: Any) -> Any:
        """2**x, one instruction, right to 2 ulp; 0 where the result is no normal number."""
        return ex2(x)

    def float_of(word: Any) -> Any:
        """The float32 of these bits."""
        return np.uint32(word).view(np.float32)

    def word_of(x: Any) -> Any:
        """The bits of a float32."""
        return np.float32(x).view(np.uint32)

    f32, i32, u32, i64, u64 = (
        _as(kind) for kind in (types.float32, types.int32, types.uint32, types.int64, types.uint64)
    )

# ----- on a GPU: symbols -----

else:
    from llvmlite import ir

    from .runtime import intrinsic

    class Value:
        """A number that the kernel will have: its numba type, and its name in LLVM's code."""

        def __init__(self, builder: Any, kind: Any, code: Any) -> None:
            self.builder, self.kind, self.code = builder, kind, code

        @property
        def signed(self) -> bool:
            """Whether it is a whole number with a sign."""
            return getattr(self.kind, "signed", False)

        def like(self, other: Any) -> Value:
            """`other` as a value of this one's type; numbers become constants."""
            return (
                other if isinstance(other, Value) else self.make(self.kind, _constant(self, other))
            )

        def make(self, kind: Any, code: Any) -> Value:
            """Another value of the same code."""
            return Value(self.builder, kind, code)

        def _apply(self, other: Any, real: str, whole: str) -> Value:
            name = real if isinstance(self.kind, types.Float) else whole
            if not name:
                raise TypeError(f"there is no {real or whole} of {_kind(self)} and {_kind(other)}")
            a, b = self.code, self._second(other, name).code
            return self.make(self.kind, getattr(self.builder, name)(a, b))

        def _second(self, other: Any, name: str) -> Value:
            """`other` as an operand beside this one."""
            if isinstance(other, Value):
                fits = other.code.type == self.code.type
            else:
                is_whole = not isinstance(other, float | np.floating)
                fits = is_whole or isinstance(self.kind, types.Float)
            if not fits:
                raise TypeError(f"there is no {name} of {_kind(self)} and {_kind(other)}")
            return self.like(other)

        def __add__(self, other: Any) -> Value:
            return self._apply(other, "fadd", "add")

        def __sub__(self, other: Any) -> Value:
            return self._apply(other, "fsub", "sub")

        def __rsub__(self, other: Any) -> Value:
            return self.like(other) - self

        def __mul__(self, other: Any) -> Value:
            return self._apply(other, "fmul", "mul")

        __radd__, __rmul__ = __add__, __mul__

        def __truediv__(self, other: Any) -> Value:
            return self._apply(other, "fdiv", "")

        def __floordiv__(self, other: Any) -> Value:
            return self._apply(other, "", "sdiv" if self.signed else "udiv")

        def __mod__(self, other: Any) -> Value:
            return self._apply(other, "", "srem" if self.signed else "urem")

        def __neg__(self) -> Value:
            if not isinstance(self.kind, types.Float):
                return self.make(self.kind, self.builder.sub(_constant(self, 0), self.code))
            return self.make(self.kind, self.builder.fsub(_constant(self, -0.0), self.code))

        def __and__(self, other: Any) -> Value:
            return self._apply(other, "", "and_")

        __rand__ = __and__

        def __or__(self, other: Any) -> Value:
            return self._apply(other, "", "or_")

        def __xor__(self, other: Any) -> Value:
            return self._apply(other, "", "xor")

        def __lshift__(self, other: Any) -> Value:
            return self._apply(other, "", "shl")

        def __rshift__(self, other: Any) -> Value:
            return self._apply(other, "", "ashr" if self.signed else "lshr")

        def _compare(self, operator: str, other: Any) -> Value:
            a, b = self.code, self._second(other, operator).code
            if isinstance(self.kind, types.Float):  # NaN is not equal to anything
                unordered = operator == "!="
                compare = self.builder.fcmp_unordered if unordered else self.builder.fcmp_ordered
            else:
                is_signed = self.signed
                compare = self.builder.icmp_signed if is_signed else self.builder.icmp_unsigned
            return self.make(types.boolean, compare(operator, a, b))

        def __lt__(self, other: Any) -> Value:
            return self._compare("<", other)

        def __gt__(self, other: Any) -> Value:
            return self._compare(">", other)

        def __le__(self, other: Any) -> Value:
            return self._compare("<=", other)

        def __ge__(self, other: Any) -> Value:
            return self._compare(">=", other)

        def __eq__(self, other: Any) -> Any:
            return self._compare("==", other)

        def __ne__(self, other: Any) -> Any:
            return self._compare("!=", other)

        __hash__ = None  # type: ignore[assignment]

    class ArrayValue:
        """An array of the kernel: its elements are read and written by index."""

        def __init__(self, context: Any, builder: Any, kind: Any, code: Any) -> None:
            data = context.make_array(kind)(context, builder, code).data
            self.builder, self.kind, self.data = builder, kind.dtype, data

        def __getitem__(self, index: Value) -> Value:
            place = self.builder.gep(self.data, [index.code])
            return Value(self.builder, self.kind, self.builder.load(place))

        def __setitem__(self, index: Value, value: Value) -> None:
            self.builder.store(value.code, self.builder.gep(self.data, [index.code]))

    def _kind(x: Any) -> str:
        """The name of a type."""
        return str(x.kind) if isinstance(x, Value) else type(x).__name__

    def _constant(value: Value, number: Any) -> Any:
        return ir.Constant(value.code.type, number)

    def _wrapped(context: Any, builder: Any, kind: Any, code: Any) -> Any:
        if isinstance(kind, types.BaseTuple):
            parts = [builder.extract_value(code, n) for n in range(len(kind))]
            return [_wrapped(context, builder, *pair) for pair in zip(kind, parts, strict=True)]
        if isinstance(kind, types.Array):
            return ArrayValue(context, builder, kind, code)
        if kind == types.boolean and code.type.width != 1:
            code = builder.trunc(code, ir.IntType(1))
        return Value(builder, kind, code)

    def _unwrapped(context: Any, builder: Any, kind: Any, value: Any) -> Any:
        if kind == types.void:
            return context.get_dummy_value()
        if isinstance(kind, types.BaseTuple):
            parts = [_unwrapped(context, builder, *pair) for pair in zip(kind, value, strict=True)]
            return context.make_tuple(builder, kind, parts)
        if not isinstance(value, Value):  # a constant
            return context.get_constant(kind, value)
        assert value.kind == kind, f"{value.kind} where {kind} is declared"
        return value.code

    def traced(returns: Any, *arguments: Any) -> Callable[[Any], Any]:
        """Decorator: see the text above.

        Args:
            returns: numba type of the result, a tuple of as many numbers as the function returns.
            arguments: numba types; None for an array, whose type is the caller's.

        """

        def decorate(body: Any) -> Any:
            def typed(typingctx: Any, *given: Any) -> Any:
                kinds = [a or b for a, b in zip(arguments, given, strict=True)]

                def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
                    pairs = zip(signature.args, args, strict=True)
                    values = [_wrapped(context, builder, *pair) for pair in pairs]
                    return _unwrapped(context, builder, returns, body(*values))

                return returns(*kinds), codegen

            parameters = ["typingctx", *(f"x{n}" for n in range(len(arguments)))]
            typed.__name__ = typed.__qualname__ = body.__name__
            typed.__signature__ = Signature(  # type: ignore[attr-defined]
                [Parameter(name, Parameter.POSITIONAL_OR_KEYWORD) for name in parameters]
            )
            return intrinsic(typed)

        return decorate

    def select(condition: Any, yes: Any, no: Any) -> Any:
        """`yes` where the condition holds, else `no`: no branch."""
        known = yes if isinstance(yes, Value) else no
        if not isinstance(known, Value):
            raise TypeError(f"select between {_kind(yes)} and {_kind(no)}: neither is a Value")
        a, b = known.like(yes), known.like(no)
        return known.make(known.kind, known.builder.select(condition.code, a.code, b.code))

    def maximum(a: Any, b: Any) -> Any:
        """The larger; the other one if one is NaN."""
        kind = ir.FunctionType(ir.FloatType(), [ir.FloatType()] * 2)
        code = ir.InlineAsm(kind, "max.f32 $0, $1, $2;", "=f,f,f")
        return a.make(a.kind, a.builder.call(code, [a.code, a.like(b).code]))

    def fma(a: Any, b: Any, c: Any) -> Any:
        """A * b + c, rounded once."""
        return a.make(a.kind, a.builder.fma(a.code, a.like(b).code, a.like(c).code))

    def exp2(x: Any) -> Any:
        """2**x, one instruction, right to 2 ulp; 0 where the result is no normal number."""
        kind = ir.FunctionType(ir.FloatType(), [ir.FloatType()])
        code = ir.InlineAsm(kind, "ex2.approx.ftz.f32 $0, $1;", "=f,f")
        return x.make(x.kind, x.builder.call(code, [x.code]))

    def float_of(word: Any) -> Any:
        """The float32 of these bits."""
        return word.make(types.float32, word.builder.bitcast(word.code, ir.FloatType()))

    def word_of(x: Any) -> Any:
        """The bits of a float32."""
        return x.make(types.uint32, x.builder.bitcast(x.code, ir.IntType(32)))

    def _conversion(kind: Any) -> Any:
        def convert(x: Any) -> Any:
            known = isinstance(x, Value)
            if not known or (isinstance(x.kind, types.Float) > isinstance(kind, types.Float)):
                raise TypeError(f"there is no conversion of {_kind(x)} to {kind}")
            code, builder = x.code, x.builder
            if isinstance(kind, types.Float):
                target = ir.FloatType()
                name = "sitofp" if x.signed else "uitofp"
                if isinstance(x.kind, types.Float):
                    if x.kind.bitwidth == kind.bitwidth:
                        return x.make(kind, code)
                    name = "fpext" if x.kind.bitwidth < kind.bitwidth else "fptrunc"
                    if x.kind.bitwidth == 16:  # numba keeps float16 as its bits
                        code = builder.bitcast(code, ir.HalfType())
                return x.make(kind, getattr(builder, name)(code, target))
            target, width = ir.IntType(kind.bitwidth), code.type.width
            if width > kind.bitwidth:
                code = builder.trunc(code, target)
            elif width < kind.bitwidth:
                signed = x.signed
                code = (builder.sext if signed else builder.zext)(code, target)
            return x.make(kind, code)

        return convert

    f32, i32, u32, i64, u64 = (
        _conversion(kind)
        for kind in (types.float32, types.int32, types.uint32, types.int64, types.uint64)
    )
