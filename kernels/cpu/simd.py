"""SIMD for numba kernels: a vector type and its operations, as LLVM vector IR.

numba's own loops are turned into vector code by LLVM only where it can prove that this is allowed,
which for reductions, exponentials and matrix products means `fastmath` and luck. Here the vectors
are written out, so the same code is vectorised on every machine (AVX-512, AVX2, SSE2, NEON), needs
no `fastmath` (NaN and infinity keep their meaning) and calls no library.

Inside an `njit` function::

    for j in range(start, stop, lanes(x)):          # lanes(x): elements in a vector of x's dtype
        p = exp2(load(x, j) - m)                     # m, a scalar, is broadcast
        store(x, j, p)
        total = total + p

Arrays are one-dimensional and C-contiguous; `load` and `store` do not check bounds. Vectors hold
float32, float64 or uint64 elements and know +, -, * and, of words, &, ^ and >>. Each operation
stands beside its name in `plain.py`, which does the same to numpy's arrays where nothing is
compiled.
`simd_matrix.py` has the register-blocked matrix product.
"""

from __future__ import annotations

import hashlib
import operator
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from llvmlite import ir
from numba.core import cgutils, types
from numba.core.imputils import lower_builtin
from numba.core.typing.templates import AbstractTemplate, infer_global, signature
from numba.extending import models, register_model

from . import plain, vector_target
from .compiler import intrinsic
from .vector_target import TARGET, VectorTarget

INT32, INT64 = ir.IntType(32), ir.IntType(64)


def cache_key(*files: str) -> int:
    """A number that changes when this file or one of `files` does.

    numba's on-disk cache notices a change in the file of the cached function alone. A kernel that
    is built from functions of other files takes this number as the default of an argument, which
    makes it part of the signature, and so of the cache's key.
    """
    digest = hashlib.sha256()
    for file in (__file__, vector_target.__file__, *files):
        digest.update(Path(file).read_bytes())
    return int.from_bytes(digest.digest()[:6], "little")


# --------------------------------------------------------------------------- the vector type


class VectorType(types.Type):
    """numba type of a register of `lanes` elements of `dtype`: float32, float64 or uint64."""

    def __init__(self, dtype: Any) -> None:
        self.dtype = dtype
        self.lanes = TARGET.lanes(dtype.bitwidth)
        super().__init__(f"Vector({dtype} x {self.lanes})")


@register_model(VectorType)
class _VectorModel(models.PrimitiveModel):  # type: ignore[misc]
    def __init__(self, manager: Any, vector: VectorType) -> None:
        element = manager.lookup(vector.dtype).get_value_type()
        super().__init__(manager, vector, ir.VectorType(element, vector.lanes))


def element_of(value_type: ir.Type) -> ir.Type:
    return value_type.element if isinstance(value_type, ir.VectorType) else value_type


def _suffix(value_type: ir.Type) -> str:
    """LLVM's name of a type within an intrinsic's name: `f32`, `v16f32`."""
    bits = "f64" if isinstance(element_of(value_type), ir.DoubleType) else "f32"
    return f"v{value_type.count}{bits}" if isinstance(value_type, ir.VectorType) else bits


def constant_of(value_type: ir.Type, value: float) -> ir.Constant:
    """`value` in the given type, in every lane if that is a vector."""
    if isinstance(value_type, ir.VectorType):
        return ir.Constant(value_type, [value] * value_type.count)
    return ir.Constant(value_type, value)


def shuffle(b: ir.IRBuilder, x: Any, y: Any, lanes: Sequence[int]) -> Any:
    mask = ir.Constant(ir.VectorType(INT32, len(lanes)), list(lanes))
    return b.shuffle_vector(x, y, mask)


def splat_value(b: ir.IRBuilder, scalar: Any, vector: ir.VectorType) -> Any:
    undefined = ir.Constant(vector, ir.Undefined)
    first = b.insert_element(undefined, scalar, ir.Constant(INT32, 0))
    return shuffle(b, first, undefined, [0] * vector.count)


def fma(b: ir.IRBuilder, x: Any, y: Any, z: Any, target: VectorTarget) -> Any:
    """x * y + z; without the instruction two roundings, never a call of libm's slow `fma`."""
    if not target.has_fma:
        return b.fadd(b.fmul(x, y), z)
    function = ir.FunctionType(x.type, [x.type] * 3)
    name = f"llvm.fma.{_suffix(x.type)}"
    return b.call(cgutils.get_or_insert_function(b.module, function, name), [x, y, z])


def _maximum(b: ir.IRBuilder, x: Any, y: Any) -> Any:
    """The larger, and `y` where `x` is NaN: x86's `maxps`, in one instruction."""
    return b.select(b.fcmp_ordered(">", x, y), x, y)


def _reduce(b: ir.IRBuilder, x: Any, combine: Callable[[Any, Any], Any]) -> Any:
    """Combine a vector's lanes pairwise, in a fixed order, into a scalar."""
    n = x.type.count
    while n > 1:
        n //= 2
        low, high = shuffle(b, x, x, range(n)), shuffle(b, x, x, range(n, 2 * n))
        x = combine(low, high)
    return b.extract_element(x, ir.Constant(INT32, 0))


# Python's operator: LLVM's instruction for floats and for words, None where there is none.
_BINARY: dict[Callable[..., Any], tuple[str | None, str]] = {
    operator.add: ("fadd", "add"),
    operator.sub: ("fsub", "sub"),
    operator.mul: ("fmul", "mul"),
    operator.and_: (None, "and_"),
    operator.xor: (None, "xor"),
    operator.rshift: (None, "lshr"),
}


def _register_operator(op: Callable[..., Any], on_floats: str | None, on_words: str) -> None:
    """Let `op` take two vectors, or a vector and a scalar, which goes into every lane."""

    @infer_global(op)
    class VectorOperator(AbstractTemplate):  # type: ignore[misc]
        def generic(self, args: tuple[types.Type, ...], kws: Any) -> Any:
            vector = next((x for x in args if isinstance(x, VectorType)), None)
            if vector is None or not all(x in (vector, vector.dtype) for x in args):
                return None
            if on_floats is None and isinstance(vector.dtype, types.Float):
                return None
            return signature(vector, *args)

    def generate(context: Any, b: ir.IRBuilder, sig: Any, args: Any) -> Any:
        vector = context.get_value_type(sig.return_type)
        x, y = (
            value if isinstance(kind, VectorType) else splat_value(b, value, vector)
            for kind, value in zip(sig.args, args, strict=True)
        )
        is_word = isinstance(vector.element, ir.IntType)
        return getattr(b, on_words if is_word else on_floats or "")(x, y)

    for kinds in ((VectorType, VectorType), (VectorType, types.Number), (types.Number, VectorType)):
        lower_builtin(op, *kinds)(generate)


for _op, _instructions in _BINARY.items():
    _register_operator(_op, *_instructions)


def element_pointer(context: Any, b: ir.IRBuilder, array_type: Any, array: Any, index: Any) -> Any:
    data = context.make_array(array_type)(context, b, array).data
    return b.gep(data, [index])


def load_vector(b: ir.IRBuilder, pointer: Any, vector: ir.VectorType) -> Any:
    size = 8 if isinstance(vector.element, ir.DoubleType) else 4
    return b.load(b.bitcast(pointer, vector.as_pointer()), align=size)


def store_vector(b: ir.IRBuilder, value: Any, pointer: Any) -> None:
    size = 8 if isinstance(value.type.element, ir.DoubleType) else 4
    b.store(value, b.bitcast(pointer, value.type.as_pointer()), align=size)


# --------------------------------------------------------------------------- vector operations


@intrinsic(plain.lanes)
def lanes(typing_context: Any, array: Any) -> Any:
    """`lanes(array) -> int`: elements of the array's dtype in a vector, a compile-time constant."""
    count = TARGET.lanes(array.dtype.bitwidth)
    return types.intp(array), lambda context, b, sig, args: ir.Constant(INT64, count)


@intrinsic(plain.word_lanes)
def word_lanes(typing_context: Any) -> Any:
    """`word_lanes() -> int`: uint64 elements in a vector, a compile-time constant."""
    return types.intp(), lambda context, b, sig, args: ir.Constant(INT64, TARGET.lanes(64))


@intrinsic(plain.block_rows)
def block_rows(typing_context: Any) -> Any:
    """`block_rows() -> int`: rows of `matrix_product_block`, a compile-time constant."""
    return types.intp(), lambda context, b, sig, args: ir.Constant(INT64, TARGET.block_rows)


@intrinsic(plain.block_columns)
def block_columns(typing_context: Any, array: Any) -> Any:
    """`block_columns(array) -> int`: columns of `matrix_product_block`, a compile-time constant."""
    count = TARGET.block_vectors * TARGET.lanes(array.dtype.bitwidth)
    return types.intp(array), lambda context, b, sig, args: ir.Constant(INT64, count)


@intrinsic(plain.load)
def load(typing_context: Any, array: Any, index: Any) -> Any:
    """`load(array, index) -> vector`: consecutive elements from `index` on, aligned or not."""
    vector = VectorType(array.dtype)

    def generate(context: Any, b: ir.IRBuilder, sig: Any, args: Any) -> Any:
        pointer = element_pointer(context, b, sig.args[0], args[0], args[1])
        return load_vector(b, pointer, context.get_value_type(vector))

    return vector(array, types.intp), generate


@intrinsic(plain.store)
def store(typing_context: Any, array: Any, index: Any, vector: Any) -> Any:
    """`store(array, index, vector)`: write the lanes to consecutive elements from `index` on."""

    def generate(context: Any, b: ir.IRBuilder, sig: Any, args: Any) -> Any:
        store_vector(b, args[2], element_pointer(context, b, sig.args[0], args[0], args[1]))
        return context.get_dummy_value()

    return types.void(array, types.intp, vector), generate


@intrinsic(plain.splat)
def splat(typing_context: Any, array: Any, scalar: Any) -> Any:
    """`splat(array, scalar) -> vector`: the scalar, cast to the array's dtype, in every lane."""
    vector = VectorType(array.dtype)

    def generate(context: Any, b: ir.IRBuilder, sig: Any, args: Any) -> Any:
        return splat_value(b, args[1], context.get_value_type(vector))

    return vector(array, array.dtype), generate


@intrinsic(plain.maximum)
def maximum(typing_context: Any, x: Any, y: Any) -> Any:
    """`maximum(x, y)`: the larger, lane by lane; `y` where `x` is NaN."""
    return x(x, x), lambda context, b, sig, args: _maximum(b, args[0], args[1])


@intrinsic(plain.max_of)
def max_of(typing_context: Any, x: Any) -> Any:
    """`max_of(vector) -> scalar`: the largest lane."""

    def generate(context: Any, b: ir.IRBuilder, sig: Any, args: Any) -> Any:
        return _reduce(b, args[0], lambda low, high: _maximum(b, low, high))

    return x.dtype(x), generate


@intrinsic(plain.sum_of)
def sum_of(typing_context: Any, x: Any) -> Any:
    """`sum_of(vector) -> scalar`: the sum of the lanes, pairwise."""
    return x.dtype(x), lambda context, b, sig, args: _reduce(b, args[0], b.fadd)


@intrinsic(plain.select_bytes)
def select_bytes(typing_context: Any, array: Any, index: Any, x: Any, y: Any) -> Any:
    """`select_bytes(bytes, index, x, y)`: x where the byte from `index` on is not 0, else y."""

    def generate(context: Any, b: ir.IRBuilder, sig: Any, args: Any) -> Any:
        bytes_type = ir.VectorType(ir.IntType(8), args[2].type.count)
        pointer = element_pointer(context, b, sig.args[0], args[0], args[1])
        loaded = b.load(b.bitcast(pointer, bytes_type.as_pointer()), align=1)
        is_set = b.icmp_unsigned("!=", loaded, ir.Constant(bytes_type, [0] * bytes_type.count))
        return b.select(is_set, args[2], args[3])

    return x(array, types.intp, x, x), generate


@intrinsic(plain.count_from)
def count_from(typing_context: Any, first: Any) -> Any:
    """`count_from(first) -> vector` of uint64: first, first + 1, ..."""
    vector = VectorType(types.uint64)

    def generate(context: Any, b: ir.IRBuilder, sig: Any, args: Any) -> Any:
        value_type = context.get_value_type(vector)
        steps = ir.Constant(value_type, list(range(vector.lanes)))
        return b.add(splat_value(b, args[0], value_type), steps)

    return vector(types.uint64), generate


@intrinsic(plain.store_thresholds)
def store_thresholds(
    typing_context: Any, array: Any, index: Any, x: Any, y: Any,
    threshold: Any, above: Any, below: Any,
) -> Any:  # fmt: skip
    """`store_thresholds(array, index, x, y, threshold, above, below)`: a row of a dropout mask.

    Each 32-bit word stands for two numbers: first the word with its 16-bit halves exchanged, then
    the word itself. `above` is written where a number is at least the threshold, from 1 to 2**32,
    else `below`: 8 elements for four words of x, 8 for four of y, 8 for the next four of x, and so
    on. From vectors of two words only elements 0 to 3 and 8 to 11 are written.
    """

    def generate(context: Any, b: ir.IRBuilder, sig: Any, args: Any) -> Any:
        n = args[2].type.count
        halves, numbers = ir.VectorType(ir.IntType(16), 4 * n), ir.VectorType(INT32, 2 * n)
        values = ir.VectorType(context.get_value_type(array.dtype), 2 * n)
        # number > threshold - 1: a threshold of 2**32 has more than 32 bits.
        limit = b.trunc(b.sub(args[4], ir.Constant(INT64, 1)), INT32)
        limits, high, low = (
            splat_value(b, scalar, vector)
            for scalar, vector in ((limit, numbers), (args[5], values), (args[6], values))
        )
        of_x, of_y = (b.bitcast(words, halves) for words in args[2:4])
        # The words, those of y from n on, as they lie in the row: four of x, four of y, ...
        fours = [range(lane, min(lane + 4, n)) for lane in range(0, n, 4)]
        words = [of + lane for four in fours for of in (0, n) for lane in four]
        for first, start in ((0, 0), (n, max(2 * n, 8))):
            # The lower half of a 64-bit lane is its first one, on all that numba compiles for.
            order = [4 * word + half for word in words[first : first + n] for half in (1, 0, 0, 1)]
            found = b.bitcast(shuffle(b, of_x, of_y, order), numbers)
            row = b.select(b.icmp_unsigned(">", found, limits), high, low)
            place = b.add(args[1], ir.Constant(INT64, start))
            store_vector(b, row, element_pointer(context, b, sig.args[0], args[0], place))
        return context.get_dummy_value()

    value = array.dtype
    return types.void(array, types.intp, x, x, types.uint64, value, value), generate


# 2**f on [-1/2, 1/2]: 1 + f * g(f), g interpolating (2**f - 1)/f at Chebyshev points.
# Relative errors 5e-9 (float32) and 1e-19 (float64), both below the rounding error.
EXP2_FLOAT32 = (
    1.0, 0.693147188026228781, 0.240226507605681269, 0.0555035711421907782,
    0.00961808255727785149, 0.00133908633646712344, 0.000154531629451206902,
)  # fmt: skip
EXP2_FLOAT64 = (
    1.0, 0.693147180559945309, 0.240226506959100712, 0.055504108664821627,
    0.00961812910762847949, 0.00133335581464064707, 0.000154035303933707334,
    1.52527338415567726e-5, 1.32154868087055628e-6, 1.01780570877339411e-7,
    7.05489730415549928e-9, 4.45581790833606449e-10, 2.57293241773623042e-11,
)  # fmt: skip


def _exp2(b: ir.IRBuilder, x: Any, target: VectorTarget) -> Any:
    """2**x = 2**n * 2**f, n the integer nearest to x; see `exp2` for the range."""
    value_type = x.type
    double = isinstance(element_of(value_type), ir.DoubleType)
    mantissa_bits, bias = (52, 1023) if double else (23, 127)
    bits_type: ir.Type = INT64 if double else INT32
    if isinstance(value_type, ir.VectorType):
        bits_type = ir.VectorType(bits_type, value_type.count)
    # At the smallest exponent 2**n is encoded as 0. (A NaN is not below: it stays.)
    smallest = constant_of(value_type, float(-bias))
    x = b.select(b.fcmp_ordered("<", x, smallest), smallest, x)
    # Adding 1.5 * 2**mantissa_bits rounds to an integer, which is then in the lowest bits; with the
    # bias added they are 2**n's exponent. (`rint` is a call of the C library where there is only
    # SSE2.)
    magic = constant_of(value_type, 1.5 * 2.0**mantissa_bits + bias)
    shifted = b.fadd(x, magic)
    f = b.fsub(x, b.fsub(shifted, magic))
    exponent = b.shl(b.bitcast(shifted, bits_type), constant_of(bits_type, mantissa_bits))
    coefficients = EXP2_FLOAT64 if double else EXP2_FLOAT32
    power = constant_of(value_type, coefficients[-1])
    for coefficient in reversed(coefficients[:-1]):
        power = fma(b, power, f, constant_of(value_type, coefficient), target)
    return b.fmul(power, b.bitcast(exponent, value_type))


@intrinsic(plain.exp2)
def exp2(typing_context: Any, x: Any) -> Any:
    """`exp2(x)`: 2**x for x <= 0 (a little above is accurate too), of a vector or a scalar.

    Exact at 0; 0 where the result is below the normal numbers, so at -inf; NaN stays NaN. Takes no
    part in `fastmath`, which would reassociate the rounding away.
    """
    return x(x), lambda context, b, sig, args: _exp2(b, args[0], TARGET)
