"""Operations of a score function's graph (score_graph.py) as vector code of the CPU.

A value is a scalar where it is the same for a whole row of scores, and a vector of neighbouring
keys where it is not. Nothing is called: tanh, exp and log are polynomials or come from those of
`simd.py` and `vector_math.py`, so that a row of scores costs a few instructions for each vector.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from llvmlite import ir
from numba.core import cgutils

from ...cpu import simd, vector_math
from ...cpu.vector_target import TARGET
from ...score_graph import Graph, Kind

I1, I8, I32, I64 = (ir.IntType(bits) for bits in (1, 8, 32, 64))
LOG2_E, LN_2 = 1.4426950408889634, 0.6931471805599453
# Of float32: x times one polynomial of x**2 over another, up to where it is 1 (Eigen, `ptanh`).
# Both are divided by what the first one is at 0: a small x times that would be no normal number.
TANH_END = 7.90531110763549805
TANH_ABOVE_FLOAT32 = tuple(
    number / 4.89352455891786e-3
    for number in (
        -2.76076847742355e-16, 2.00018790482477e-13, -8.60467152213735e-11, 5.12229709037114e-8,
        1.48572235717979e-5, 6.37261928875436e-4, 4.89352455891786e-3,
    )
)  # fmt: skip
TANH_BELOW_FLOAT32 = tuple(
    number / 4.89352455891786e-3
    for number in (
        1.19825839466702e-6, 1.18534705686654e-4, 2.26843463243900e-3, 4.89352518554385e-3,
    )
)  # fmt: skip
TANH_ABOVE = (-9.64399179425052238628e-1, -9.92877231001918586564e1, -1.61468768441708447952e3)
TANH_BELOW = (
    1.0, 1.12811678491632931402e2, 2.23548839060100448583e3, 4.84406305325125486048e3,
)  # fmt: skip


def steps_of(graph: Graph) -> list[int | None]:
    """By how much each node grows from a key to the next: a whole number that is known, or None."""
    found: list[int | None] = []
    for node, varies in zip(graph.nodes, graph.depends_on("score", "k"), strict=True):
        steps = [found[n] for n in node.operands]
        step: int | None = None
        if not varies:
            step = 0
        elif node.name == "k":
            step = 1
        elif None not in steps and node.name in ("add", "subtract") and node.kind == "whole":
            step = (steps[0] or 0) + (steps[1] or 0) * (1 if node.name == "add" else -1)
        elif None not in steps and node.name == "negative" and node.kind == "whole":
            step = -(steps[0] or 0)
        found.append(step)
    return found


ADDRESS, TABLE, UNIT, SIZES = range(4)  # words of a captured array, see `score_rows.words_of`


@dataclass
class VectorOperations:
    """Operations for `score_graph.evaluate` that write LLVM code.

    Args:
        b: where it is written.
        graph: of the function.
        words: pointer to what the graph is given: of each captured array the address and its sizes,
            then the parameters, those that are real as the bits of a float64.
        real: type of the scores. Captured arrays have this type, int32, or bytes for truths, and
            are contiguous.

    """

    b: ir.IRBuilder
    graph: Graph
    words: Any
    real: ir.Type

    def __post_init__(self) -> None:
        self.lanes = TARGET.lanes(64 if self.real == ir.DoubleType() else 32)
        self.types: dict[str, ir.Type] = {"real": self.real, "whole": I32, "truth": I1}
        self.first_word, at = [], 0
        for array in self.graph.captured:
            self.first_word.append(at)
            at += SIZES + array.dims
        self.first_parameter = at

    # ----- scalars and vectors -----

    def word(self, n: int) -> Any:
        """What the graph is given."""
        return self.b.load(self.b.gep(self.words, [ir.Constant(I64, n)]))

    def vector(self, x: Any) -> Any:
        """A value in each lane."""
        if isinstance(x.type, ir.VectorType):
            return x
        return simd.splat_value(self.b, x, ir.VectorType(x.type, self.lanes))

    def alike(self, *values: Any) -> list[Any]:
        """All as vectors, if one is."""
        if any(isinstance(x.type, ir.VectorType) for x in values):
            return [self.vector(x) for x in values]
        return list(values)

    def number(self, like: Any, value: float) -> ir.Constant:
        """A constant of a value's type."""
        return simd.constant_of(like.type, value)

    def _is_real(self, x: Any) -> bool:
        return isinstance(simd.element_of(x.type), ir.FloatType | ir.DoubleType)

    # ----- what is given -----

    def constant(self, value: Any, kind: Kind) -> Any:
        """A number that is known."""
        return ir.Constant(self.types[kind], value if kind == "real" else int(value))

    def parameter(self, number: int, kind: Kind) -> Any:
        """A number that is given."""
        word = self.word(self.first_parameter + number)
        if kind == "whole":
            return self.b.trunc(word, I32)
        double = self.b.bitcast(word, ir.DoubleType())
        return double if self.real == ir.DoubleType() else self.b.fptrunc(double, self.real)

    def load(self, captured: int, indices: Sequence[Any], step: int = 0) -> Any:
        """A number of a captured array, or as many as there are lanes; indices are clamped. With a
        step, 1 or -1, the numbers of neighbouring keys are neighbours (see `steps_of`).
        """
        b, kind = self.b, self.graph.captured[captured].kind
        element = {"real": self.real, "whole": I32, "truth": I8}[kind]
        base = b.inttoptr(self.word(self.first_word[captured] + ADDRESS), element.as_pointer())
        if step:
            found = self._beside(base, captured, indices, step, element)
        else:
            row, place = self._row_and_place(captured, indices)
            pointer = b.gep(base, [row])
            if isinstance(place.type, ir.VectorType):
                found = self._anywhere(pointer, place, element)
            else:
                found = b.load(b.gep(pointer, [place]))
        return b.icmp_unsigned("!=", found, self.number(found, 0)) if kind == "truth" else found

    def place(self, captured: int, indices: Sequence[Any]) -> Any:
        """Where in a captured array an element lies, int64."""
        row, place = self._row_and_place(captured, indices)
        return self.b.add(*self.alike(row, self._wide(place)))

    def _row_and_place(self, captured: int, indices: Sequence[Any]) -> tuple[Any, Any]:
        """Two parts of an element's place: of its row, int64, and in it, int32; if the row is not
        the same for all lanes, 0 and all of it, int64.
        """
        b = self.b
        row: Any = ir.Constant(I64, 0)
        *outer, inner = indices
        for n, index in enumerate(outer):
            row, inside, size = self.alike(
                row, self._wide(self._clamped(captured, n, index)), self.word_of_size(captured, n)
            )
            row = b.add(b.mul(row, size), inside)
        row, size = self.alike(row, self.word_of_size(captured, len(outer)))
        row, place = b.mul(row, size), self._clamped(captured, len(outer), inner)
        if isinstance(row.type, ir.VectorType):
            return ir.Constant(I64, 0), b.add(*self.alike(row, self._wide(place)))
        return row, place

    def word_of_size(self, captured: int, axis: int) -> Any:
        """Of a captured array, int64."""
        return self.word(self.first_word[captured] + SIZES + axis)

    def _wide(self, x: Any) -> Any:
        """A whole number, or a vector of them, as int64."""
        vector = isinstance(x.type, ir.VectorType)
        return self.b.sext(x, ir.VectorType(I64, self.lanes) if vector else I64)

    def _clamped(self, captured: int, axis: int, index: Any) -> Any:
        """An index within 0 ... size - 1."""
        b = self.b
        size = b.trunc(self.word_of_size(captured, axis), I32)
        x, last = self.alike(index, b.sub(size, ir.Constant(I32, 1)))
        x = b.select(b.icmp_signed(">", x, last), last, x)
        return b.select(b.icmp_signed("<", x, self.number(x, 0)), self.number(x, 0), x)

    def _lane(self, x: Any, lane: int) -> Any:
        return self.b.extract_element(x, ir.Constant(I32, lane))

    def _neighbours(self, pointer: Any, element: ir.Type, turned: bool) -> Any:
        """A vector from memory, its lanes in reverse if it is turned."""
        b, n = self.b, self.lanes
        size = {I8: 1, I32: 4, ir.FloatType(): 4, ir.DoubleType(): 8}[element]
        values = ir.VectorType(element, n).as_pointer()
        found = b.load(b.bitcast(pointer, values), align=size)
        return simd.shuffle(b, found, found, range(n - 1, -1, -1)) if turned else found

    def _scattered(self, pointer: Any, place: Any, element: ir.Type) -> Any:
        """Elements one by one."""
        b = self.b
        found: Any = ir.Constant(ir.VectorType(element, self.lanes), ir.Undefined)
        for lane in range(self.lanes):
            at = b.gep(pointer, [self._wide(self._lane(place, lane))])
            found = b.insert_element(found, b.load(at), ir.Constant(I32, lane))
        return found

    def first_of_neighbours(self, captured: int, indices: Sequence[Any], step: int) -> Any:
        """Where the first element of a vector of neighbours lies, int64, and whether all are within
        their row.
        """
        b, axis = self.b, len(indices) - 1
        ends = self._lane(indices[-1], 0), self._lane(indices[-1], self.lanes - 1)
        low, high = ends if step > 0 else ends[::-1]
        row, _ = self._row_and_place(captured, [*indices[:-1], ir.Constant(I32, 0)])
        inside = b.and_(
            b.icmp_signed(">=", low, ir.Constant(I32, 0)),
            b.icmp_signed("<", self._wide(high), self.word_of_size(captured, axis)),
        )
        return b.add(row, self._wide(low)), inside

    def _beside(
        self, base: Any, captured: int, indices: Sequence[Any], step: int, element: ir.Type
    ) -> Any:
        """Neighbours in one load; at the ends of a row one by one, clamped."""
        b = self.b
        first, inside = self.first_of_neighbours(captured, indices, step)
        result = cgutils.alloca_once(b, ir.VectorType(element, self.lanes))
        with b.if_else(inside) as (yes, no):
            with yes:
                b.store(self._neighbours(b.gep(base, [first]), element, step < 0), result)
            with no:
                row, place = self._row_and_place(captured, indices)
                b.store(self._scattered(b.gep(base, [row]), place, element), result)
        return b.load(result)

    def _anywhere(self, pointer: Any, place: Any, element: ir.Type) -> Any:
        """Elements at the places of a vector; one that all share, or neighbours, in one load."""
        b, n = self.b, self.lanes
        first = self._lane(place, 0)
        steps = ir.Constant(place.type, list(range(n)))
        same = self._all(b.icmp_signed("==", place, self.vector(first)))
        up = self._all(b.icmp_signed("==", place, b.add(self.vector(first), steps)))
        at = b.gep(pointer, [self._wide(first)])
        result = cgutils.alloca_once(b, ir.VectorType(element, n))
        with b.if_else(same) as (yes, no):
            with yes:
                b.store(self.vector(b.load(at)), result)
            with no, b.if_else(up) as (neighbours, scattered):
                with neighbours:
                    b.store(self._neighbours(at, element, False), result)
                with scattered:
                    b.store(self._scattered(pointer, place, element), result)
        return b.load(result)

    def _all(self, truths: Any) -> Any:
        """Whether all lanes are true."""
        bits = self.b.bitcast(truths, ir.IntType(self.lanes))
        return self.b.icmp_unsigned("==", bits, ir.Constant(bits.type, -1))

    def cast(self, x: Any, have: Kind, kind: Kind) -> Any:
        """As another kind. What is real is cut off towards 0, and to what int32 holds."""
        to: ir.Type = self.types[kind]
        if isinstance(x.type, ir.VectorType):
            to = ir.VectorType(to, self.lanes)
        if have == "real":
            suffix = simd._suffix(x.type)
            whole = suffix.replace("f32", "i32").replace("f64", "i32")
            name = f"llvm.fptosi.sat.{whole}.{suffix}"
            function = ir.FunctionType(to, [x.type])
            return self.b.call(cgutils.get_or_insert_function(self.b.module, function, name), [x])
        if kind == "real":
            return (self.b.sitofp if have == "whole" else self.b.uitofp)(x, to)
        return self.b.zext(x, to)

    # ----- arithmetic -----

    def _two(self, on_reals: str, on_whole: str, x: Any, y: Any) -> Any:
        x, y = self.alike(x, y)
        return getattr(self.b, on_reals if self._is_real(x) else on_whole)(x, y)

    def add(self, x: Any, y: Any) -> Any:
        return self._two("fadd", "add", x, y)

    def subtract(self, x: Any, y: Any) -> Any:
        return self._two("fsub", "sub", x, y)

    def multiply(self, x: Any, y: Any) -> Any:
        return self._two("fmul", "mul", x, y)

    def divide(self, x: Any, y: Any) -> Any:
        return self._two("fdiv", "", x, y)

    def negative(self, x: Any) -> Any:
        return self.b.fneg(x) if self._is_real(x) else self.b.neg(x)

    def absolute(self, x: Any) -> Any:
        return self.where(self.less(x, self.number(x, 0)), self.negative(x), x)

    def minimum(self, x: Any, y: Any) -> Any:
        return self._chosen("<", x, y)

    def maximum(self, x: Any, y: Any) -> Any:
        return self._chosen(">", x, y)

    def _chosen(self, sign: str, x: Any, y: Any) -> Any:
        """x if it is smaller (or larger), or NaN."""
        x, y = self.alike(x, y)
        if not self._is_real(x):
            return self.b.select(self.b.icmp_signed(sign, x, y), x, y)
        chosen = self.b.or_(
            self.b.fcmp_ordered(sign, x, y), self.b.fcmp_unordered("uno", x, x)
        )  # fmt: skip
        return self.b.select(chosen, x, y)

    def floor_divide(self, x: Any, y: Any) -> Any:
        """Towards -inf; by 0 it is 0."""
        quotient, rest, divisor, by_zero = self._divided(x, y)
        less = self.b.sub(quotient, self.number(quotient, 1))
        found = self.b.select(self._other_sign(rest, divisor), less, quotient)
        return self.b.select(by_zero, self.number(found, 0), found)

    def remainder(self, x: Any, y: Any) -> Any:
        """With the sign of y; by 0 it is 0."""
        _, rest, divisor, by_zero = self._divided(x, y)
        found = self.b.select(self._other_sign(rest, divisor), self.b.add(rest, divisor), rest)
        return self.b.select(by_zero, self.number(found, 0), found)

    def _divided(self, x: Any, y: Any) -> tuple[Any, Any, Any, Any]:
        """Quotient and rest towards 0, by a divisor that is safe, and whether y is 0."""
        b = self.b
        x, y = self.alike(x, y)
        by_zero = b.icmp_signed("==", y, self.number(y, 0))
        # The least number by -1 would be one too many: its quotient is itself, its rest 0.
        overflow = b.and_(
            b.icmp_signed("==", x, self.number(x, -(2**31))),
            b.icmp_signed("==", y, self.number(y, -1)),
        )
        divisor = b.select(b.or_(by_zero, overflow), self.number(y, 1), y)
        return b.sdiv(x, divisor), b.srem(x, divisor), divisor, by_zero

    def _other_sign(self, rest: Any, divisor: Any) -> Any:
        b, zero = self.b, self.number(rest, 0)
        differ = b.icmp_signed("<", b.xor(rest, divisor), zero)
        return b.and_(b.icmp_signed("!=", rest, zero), differ)

    def bitwise_and(self, x: Any, y: Any) -> Any:
        return self._two("", "and_", x, y)

    def bitwise_or(self, x: Any, y: Any) -> Any:
        return self._two("", "or_", x, y)

    def bitwise_xor(self, x: Any, y: Any) -> Any:
        return self._two("", "xor", x, y)

    logical_and, logical_or, logical_xor = bitwise_and, bitwise_or, bitwise_xor

    def logical_not(self, x: Any) -> Any:
        return self.b.xor(x, self.number(x, 1))

    # ----- comparisons -----

    def _compared(self, sign: str, x: Any, y: Any) -> Any:
        x, y = self.alike(x, y)
        if self._is_real(x):
            compare = self.b.fcmp_unordered if sign == "!=" else self.b.fcmp_ordered
            return compare(sign, x, y)
        return self.b.icmp_signed(sign, x, y)

    def less(self, x: Any, y: Any) -> Any:
        return self._compared("<", x, y)

    def less_equal(self, x: Any, y: Any) -> Any:
        return self._compared("<=", x, y)

    def equal(self, x: Any, y: Any) -> Any:
        return self._compared("==", x, y)

    def not_equal(self, x: Any, y: Any) -> Any:
        return self._compared("!=", x, y)

    def where(self, condition: Any, x: Any, y: Any) -> Any:
        condition, x, y = self.alike(condition, x, y)
        return self.b.select(condition, x, y)

    # ----- functions -----

    def _intrinsic(self, name: str, x: Any) -> Any:
        function = ir.FunctionType(x.type, [x.type])
        full = f"llvm.{name}.{simd._suffix(x.type)}"
        return self.b.call(cgutils.get_or_insert_function(self.b.module, function, full), [x])

    def sqrt(self, x: Any) -> Any:
        return self._intrinsic("sqrt", x)

    def floor(self, x: Any) -> Any:
        return self._intrinsic("floor", x)

    def exp2(self, x: Any) -> Any:
        """2**x over the whole range: `simd.exp2` is for powers below 2**127."""
        far, most = (1000.0, 1080.0) if self._double(x) else (100.0, 190.0)
        b, is_far = self.b, self.less(self.number(x, far), x)
        near = b.fsub(self.minimum(x, self.number(x, most)), self._if(is_far, x, 64.0, 0.0))
        return b.fmul(simd._exp2(b, near, TARGET), self._if(is_far, x, 2.0**64, 1.0))

    def exp(self, x: Any) -> Any:
        """e**x, where it is large as the square of a root."""
        far, most = (600.0, 800.0) if self._double(x) else (60.0, 100.0)
        b, is_far = self.b, self.less(self.number(x, far), x)
        least = self.minimum(x, self.number(x, most))
        near = b.fmul(least, self._if(is_far, x, 0.5, 1.0))
        root = vector_math._exp(b, near, TARGET)
        return b.fmul(root, self.where(is_far, root, self.number(root, 1.0)))

    def log2(self, x: Any) -> Any:
        """The logarithm to base 2."""
        exponent, log = self._log(x)
        rest = self.b.fmul(log, self.number(x, LOG2_E))
        return self._of_any(x, self.b.fadd(exponent, rest))

    def log(self, x: Any) -> Any:
        """The natural logarithm."""
        exponent, log = self._log(x)
        return self._of_any(x, self.b.fadd(self.b.fmul(exponent, self.number(x, LN_2)), log))

    def _log(self, x: Any) -> tuple[Any, Any]:
        """n and log(m) of x = 2**n m, where m is near 1: log(m) = 2 artanh((m - 1) / (m + 1))."""
        b, double = self.b, self._double(x)
        mantissa_bits, bits = (52, I64) if double else (23, I32)
        bits_type = ir.VectorType(bits, x.type.count) if isinstance(x.type, ir.VectorType) else bits
        small = self.less(x, self.number(x, 2.0**-1022 if double else 2.0**-126))
        x = b.fmul(x, self._if(small, x, 2.0**64, 1.0))
        # Counted from sqrt(1/2), so that m is sqrt(1/2) ... sqrt(2).
        half = 0x3FE6A09E667F3BCD if double else 0x3F3504F3
        offset = b.sub(b.bitcast(x, bits_type), simd.constant_of(bits_type, half))
        n = b.ashr(offset, simd.constant_of(bits_type, mantissa_bits))
        kept = b.sub(
            b.bitcast(x, bits_type), b.shl(n, simd.constant_of(bits_type, mantissa_bits))
        )  # fmt: skip
        m = b.bitcast(kept, x.type)
        one = self.number(x, 1.0)
        f = b.fdiv(b.fsub(m, one), b.fadd(m, one))
        square = b.fmul(f, f)
        terms = 12 if double else 5
        series = self.number(x, 2.0 / (2 * terms - 1))
        for k in range(terms - 2, -1, -1):
            series = simd.fma(b, series, square, self.number(x, 2.0 / (2 * k + 1)), TARGET)
        exponent = b.fsub(b.sitofp(n, x.type), self._if(small, x, 64.0, 0.0))
        return exponent, b.fmul(f, series)

    def _of_any(self, x: Any, log: Any) -> Any:
        """A logarithm, also where there is none: of 0, of inf and NaN, and below 0."""
        infinity, zero = self.number(x, float("inf")), self.number(x, 0.0)
        log = self.where(self.less(x, infinity), log, x)  # inf and NaN are their own
        log = self.where(self.equal(x, zero), self.negative(infinity), log)
        return self.where(self.less(x, zero), self.number(x, float("nan")), log)

    def tanh(self, x: Any) -> Any:
        """Of float64 a quotient of polynomials near 0 (Cephes, Moshier 1992, tanh.c), and else
        1 - 2 / (e**2x + 1); of float32 one quotient.
        """
        b, end = self.b, self.number(x, TANH_END)
        if not self._double(x):
            x = self.where(self.less(end, x), end, x)
            x = self.where(self.less(x, self.negative(end)), self.negative(end), x)
            square = b.fmul(x, x)
            above = b.fmul(x, self._polynomial(square, TANH_ABOVE_FLOAT32))
            return b.fdiv(above, self._polynomial(square, TANH_BELOW_FLOAT32))
        square, size = b.fmul(x, x), self.absolute(x)
        above = self._polynomial(square, TANH_ABOVE)
        near = b.fdiv(above, self._polynomial(square, TANH_BELOW))
        near = b.fadd(x, b.fmul(b.fmul(x, square), near))
        power = vector_math._exp(b, b.fmul(size, self.number(x, -2.0)), TARGET)
        one = self.number(x, 1.0)
        far = b.fdiv(b.fsub(one, power), b.fadd(one, power))
        far = self.where(self.less(x, self.number(x, 0.0)), self.negative(far), far)
        return self.where(self.less(size, self.number(x, 0.625)), near, far)

    def _polynomial(self, x: Any, coefficients: Sequence[float]) -> Any:
        total = self.number(x, coefficients[0])
        for coefficient in coefficients[1:]:
            total = simd.fma(self.b, total, x, self.number(x, coefficient), TARGET)
        return total

    def _double(self, x: Any) -> bool:
        return isinstance(simd.element_of(x.type), ir.DoubleType)

    def _if(self, condition: Any, like: Any, yes: float, no: float) -> Any:
        return self.where(condition, self.number(like, yes), self.number(like, no))
