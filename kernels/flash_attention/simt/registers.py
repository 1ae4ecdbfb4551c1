"""Products of small matrices in the registers of one thread, and powers of two.

A thread adds A B^T to its own tile of sums, `a.count` x `b.count`, for `lanes` values of the index
k that is summed over. The numbers of A and B lie in shared memory and are read 16 bytes at a time.
In one of two directions:

    along k        element (i, k) at i * apart + k: a factor whose rows are summed over
    across k       element (i, k) at k * step + (i // lanes) * apart + i % lanes: one whose columns
                   are; the thread's rows come in groups of `lanes` neighbours

On a GPU the product is generated as straight code, without a loop: registers have no index. The
simulator runs the same formulas as loops.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

from ...gpu.runtime import SIMULATED, device_function

BYTES = 16  # of one read of shared memory
AT_ONCE = 2  # reads of each row in one piece of straight code


@dataclass(frozen=True)
class Factor:
    """Where a thread finds its part of a factor in shared memory, in elements.

    Args:
        count: rows of the part; a multiple of `lanes` if it lies across k.
        apart: distance of its rows; across k, of its groups of `lanes` rows.
        step: across k, the distance of k and k + 1; None if it lies along k.

    """

    count: int
    apart: int
    step: int | None = None

    def place(self, i: int, k: int, lanes: int) -> int:
        """Of element (i, k), relative to (0, 0)."""
        if self.step is None:
            return i * self.apart + k
        return k * self.step + (i // lanes) * self.apart + i % lanes

    def advance(self, lanes: int) -> int:
        """From k to k + lanes."""
        return lanes if self.step is None else lanes * self.step


@cache
def multiply(a: Factor, b: Factor, depth: int, lanes: int) -> Any:
    """Device function `(memory, a_first, b_first, sums)` that adds A B^T: to sums[i, j] the sum of
    A[i, k] B[j, k] over k.

    Args:
        a: rows of the sums.
        b: columns of the sums.
        depth: number of k's, rounded up to `lanes`.
        lanes: elements in 16 bytes, of the type of `memory`, to whose multiples all places add up.

    """
    steps = -(-depth // lanes)
    repeats = next((n for n in range(min(AT_ONCE, steps), 0, -1) if steps % n == 0), 1)
    make = _simulated_step if SIMULATED else _generated_step
    add_product, count = make(a, b, lanes, repeats), steps // repeats
    a_advance, b_advance = repeats * a.advance(lanes), repeats * b.advance(lanes)

    @device_function
    def run(memory, a_first, b_first, sums):
        for step in range(count):
            add_product(
                memory, a_first + step * a_advance, memory, b_first + step * b_advance, sums
            )

    return run


def _simulated_step(a: Factor, b: Factor, lanes: int, repeats: int) -> Any:
    def add_product(x, a_first, y, b_first, sums):
        assert a_first % lanes == 0 and b_first % lanes == 0, "a vector must be aligned"
        for i in range(a.count):
            for j in range(b.count):
                for k in range(repeats * lanes):
                    left = x[a_first + a.place(i, k, lanes)]
                    sums[i, j] += left * y[b_first + b.place(j, k, lanes)]

    return device_function(add_product)


if not SIMULATED:
    from llvmlite import ir

    from ...gpu.runtime import intrinsic, types

    _INT64 = ir.IntType(64)

    def _read(
        builder: Any, first: Any, factor: Factor, lanes: int, repeats: int
    ) -> dict[tuple[int, int], Any]:
        """The elements (i, k) of a factor, `lanes` by one instruction."""
        kind = ir.VectorType(first.type.pointee, lanes)
        elements = {}
        along = factor.step is None
        starts = (
            [(i, k) for k in range(0, repeats * lanes, lanes) for i in range(factor.count)]
            if along
            else [(i, k) for k in range(repeats * lanes) for i in range(0, factor.count, lanes)]
        )
        for i, k in starts:
            place = builder.gep(first, [ir.Constant(_INT64, factor.place(i, k, lanes))])
            vector = builder.load(builder.bitcast(place, kind.as_pointer(first.type.addrspace)))
            vector.align = BYTES
            for n in range(lanes):
                element = builder.extract_element(vector, ir.Constant(ir.IntType(32), n))
                elements[(i, k + n) if along else (i + n, k)] = element
        return elements

    def _pointer(context: Any, builder: Any, kind: Any, array: Any, index: Any = None) -> Any:
        data = context.make_array(kind)(context, builder, array).data
        return data if index is None else builder.gep(data, [index])

    def _generated_step(a: Factor, b: Factor, lanes: int, repeats: int) -> Any:
        @intrinsic
        def add_product(typingctx, x, a_first, y, b_first, sums):
            def codegen(context, builder, signature, args):
                kinds = signature.args
                left = _pointer(context, builder, kinds[0], args[0], args[1])
                right = _pointer(context, builder, kinds[2], args[2], args[3])
                target = _pointer(context, builder, kinds[4], args[4])
                a_values = _read(builder, left, a, lanes, repeats)
                b_values = _read(builder, right, b, lanes, repeats)
                for i in range(a.count):
                    for j in range(b.count):
                        place = builder.gep(target, [ir.Constant(_INT64, i * b.count + j)])
                        total = builder.load(place)
                        for k in range(repeats * lanes):
                            total = builder.fma(a_values[i, k], b_values[j, k], total)
                        builder.store(total, place)
                return context.get_dummy_value()

            return types.void(x, types.int64, y, types.int64, sums), codegen

        return add_product
