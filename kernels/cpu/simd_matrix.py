"""The two building blocks of matrix products that need many registers at once.

`matrix_product_block` is the micro-kernel that all of attention's products are made of: it holds a
block of the result in registers. `transpose_block` transposes a square of vectors in registers.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba.core import types

from . import plain
from .compiler import intrinsic
from .simd import (
    INT64,
    VectorType,
    constant_of,
    element_pointer,
    fma,
    load_vector,
    shuffle,
    splat_value,
    store_vector,
)
from .vector_target import TARGET, VectorTarget


@intrinsic(plain.transpose_block)
def transpose_block(
    typing_context: Any,
    source: Any,
    i: Any,
    i_row: Any,
    target: Any,
    j: Any,
    j_row: Any,
    scale: Any,
) -> Any:
    """`transpose_block(source, i, i_row, target, j, j_row, scale)`: a square of `lanes` rows.

    Reads rows source[i + r*i_row : ... + lanes], writes their transpose, times `scale`, to rows
    target[j + c*j_row : ...]. log2(lanes) rounds of exchanges between pairs of registers.
    """

    def generate(context: Any, b: ir.IRBuilder, sig: Any, args: Any) -> Any:
        vector = context.get_value_type(VectorType(source.dtype))
        n = vector.count
        first = element_pointer(context, b, sig.args[0], args[0], args[1])
        rows = [
            load_vector(b, b.gep(first, [b.mul(args[2], ir.Constant(INT64, r))]), vector)
            for r in range(n)
        ]
        step = 1
        while step < n:
            upper = [c if not c & step else n + c - step for c in range(n)]
            lower = [c + step if not c & step else n + c for c in range(n)]
            for r in range(n):
                if not r & step:
                    x, y = rows[r], rows[r | step]
                    rows[r] = shuffle(b, x, y, upper)
                    rows[r | step] = shuffle(b, x, y, lower)
            step *= 2
        factor = splat_value(b, args[6], vector)
        first = element_pointer(context, b, sig.args[3], args[3], args[4])
        for c in range(n):
            pointer = b.gep(first, [b.mul(args[5], ir.Constant(INT64, c))])
            store_vector(b, b.fmul(rows[c], factor), pointer)
        return context.get_dummy_value()

    index = types.intp
    return types.void(source, index, index, target, index, index, source.dtype), generate


# --------------------------------------------------------------------------- the matrix product


def _opaque(b: ir.IRBuilder, value: Any) -> Any:
    """The same value, of which LLVM can no longer tell how it was computed.

    Else it computes the addresses of a block's rows one from the other, a chain of additions as
    long as all of the step's multiplications.
    """
    return b.asm(ir.FunctionType(value.type, [value.type]), "", "=r,0", [value], False)


def build_matrix_product_block(
    b: ir.IRBuilder,
    target: VectorTarget,
    vector: ir.VectorType,
    a: Any, a_row: Any, a_column: Any, b_matrix: Any, b_row: Any, c: Any, c_row: Any,
    depth: Any, accumulate: Any,
) -> None:  # fmt: skip
    """Emit the micro-kernel: C = A B, or C += A B, for one block of C held in registers.

    A (rows, depth) with any strides, B (depth, columns), C (rows, columns); a, b_matrix and c point
    to their first elements; depth >= 1. Each step loads `block_vectors` vectors of B's row and, for
    each row of A, one element that is broadcast; nothing of C is touched before the end.
    """
    rows, vectors, lane_count = target.block_rows, target.block_vectors, vector.count
    zero, one = ir.Constant(INT64, 0), ir.Constant(INT64, 1)
    row_offsets = [_opaque(b, b.mul(ir.Constant(INT64, r), a_row)) for r in range(rows)]
    entry = b.block
    loop, done = b.append_basic_block("product.loop"), b.append_basic_block("product.done")
    b.branch(loop)
    b.position_at_end(loop)
    k, a_pointer, b_pointer = b.phi(INT64), b.phi(a.type), b.phi(b_matrix.type)
    for phi, first in ((k, zero), (a_pointer, a), (b_pointer, b_matrix)):
        phi.add_incoming(first, entry)
    sums = [[b.phi(vector) for _ in range(vectors)] for _ in range(rows)]
    b_vectors = [
        load_vector(b, b.gep(b_pointer, [ir.Constant(INT64, v * lane_count)]), vector)
        for v in range(vectors)
    ]
    results = []
    for r in range(rows):
        element = splat_value(b, b.load(b.gep(a_pointer, [row_offsets[r]])), vector)
        results.append([fma(b, element, b_vectors[v], sums[r][v], target) for v in range(vectors)])
    for r in range(rows):
        for v in range(vectors):
            sums[r][v].add_incoming(constant_of(vector, 0.0), entry)
            sums[r][v].add_incoming(results[r][v], loop)
    next_k = _opaque(b, b.add(k, one))  # nor unroll the loop: it needs every register
    k.add_incoming(next_k, loop)
    a_pointer.add_incoming(b.gep(a_pointer, [a_column]), loop)
    b_pointer.add_incoming(b.gep(b_pointer, [b_row]), loop)
    b.cbranch(b.icmp_signed("<", next_k, depth), loop, done)

    b.position_at_end(done)
    c_pointers = [
        [
            b.gep(
                c, [b.add(b.mul(ir.Constant(INT64, r), c_row), ir.Constant(INT64, v * lane_count))]
            )
            for v in range(vectors)
        ]
        for r in range(rows)
    ]
    with b.if_else(accumulate) as (then, otherwise):
        with then:
            for r in range(rows):
                for v in range(vectors):
                    old = load_vector(b, c_pointers[r][v], vector)
                    store_vector(b, b.fadd(results[r][v], old), c_pointers[r][v])
        with otherwise:
            for r in range(rows):
                for v in range(vectors):
                    store_vector(b, results[r][v], c_pointers[r][v])


@intrinsic(plain.matrix_product_block)
def matrix_product_block(
    typing_context: Any,
    array: Any, a: Any, a_row: Any, a_column: Any, b: Any, b_row: Any, c: Any, c_row: Any,
    depth: Any, accumulate: Any,
) -> Any:  # fmt: skip
    """`matrix_product_block(array, a, a_row, a_column, b, b_row, c, c_row, depth, accumulate)`

    C = A B, or C += A B where `accumulate`, for matrices at offsets a, b, c of one array:
    A (block_rows, depth), B (depth, block_columns) and C (block_rows, block_columns).
    """

    def generate(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> Any:
        vector = context.get_value_type(VectorType(array.dtype))
        pointers = [
            element_pointer(context, builder, sig.args[0], args[0], args[n]) for n in (1, 4, 6)
        ]
        build_matrix_product_block(
            builder, TARGET, vector, pointers[0], args[2], args[3], pointers[1], args[5],
            pointers[2], args[7], args[8], args[9],
        )  # fmt: skip
        return context.get_dummy_value()

    return types.void(array, *[types.intp] * 8, types.boolean), generate
