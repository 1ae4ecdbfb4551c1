"""Several neighbouring elements in one memory instruction, of up to 16 bytes.

A thread that moves 16 bytes at a time keeps four times as much on its way as one that moves a
float32, and a kernel that only moves data is as fast as what it keeps on its way. The elements go
through a `cuda.local.array`, which stays in registers where loops over it have constant bounds:

    load, store = vector_access(4)
    values = cuda.local.array(4, types.float32)
    load(x, first, values)  # values[k] = x[first + k]
"""

from __future__ import annotations

from functools import cache
from typing import Any

from .runtime import SIMULATED, device_function, precision, types

BYTES = 16  # the most that one instruction moves


def longest_vector(precision_name: str, columns: int = 0) -> int:
    """Elements of the longest vector; of the longest that divides rows of so many columns."""
    vector = BYTES // precision(precision_name).storage.itemsize
    while columns % vector:
        vector //= 2
    return vector


@cache
def vector_access(count: int) -> tuple[Any, Any]:
    """Device functions `load(x, first, values)` and `store(out, first, values)`.

    Args:
        count: elements moved at once: 1, 2, 4 or 8, of 16 bytes in all at most. The address of
            x[first] must be a multiple of the bytes moved.

    """
    if SIMULATED or count == 1:
        return _plain_access(count)
    return _vector_load(count), _vector_store(count)


@cache
def vector_load_or(count: int, itemsize: int) -> Any:
    """Device function `load(x, first, inside, fill, values)`: as of `vector_access`, if `inside`.

    If not, values[...] = fill, and nothing is read. Elements of 16 bits are filled in pairs, as
    they are read: a choice for each of them would cost two instructions more.

    Args:
        count: as in `vector_access`.
        itemsize: bytes of an element.

    """
    if itemsize == 2 and count > 1 and not SIMULATED:
        return _short_load_or(count)
    load_vector, _ = vector_access(count)

    @device_function
    def load(x, first, inside, fill, values):
        if inside:
            load_vector(x, first, values)
        else:
            for k in range(count):
                values[k] = fill

    return load


def _plain_access(count: int) -> tuple[Any, Any]:
    """Element by element; the simulator checks what the hardware would trap on."""

    @device_function
    def load(x, first, values):
        if SIMULATED:
            assert first % count == 0, "a vector must be aligned"
        for k in range(count):
            values[k] = x[first + k]

    @device_function
    def store(out, first, values):
        if SIMULATED:
            assert first % count == 0, "a vector must be aligned"
        for k in range(count):
            out[first + k] = values[k]

    return load, store


if not SIMULATED:
    from llvmlite import ir

    from .runtime import intrinsic

    def _element_pointer(
        context: Any, builder: Any, array_type: Any, array: Any, index: Any
    ) -> Any:
        data = context.make_array(array_type)(context, builder, array).data
        return builder.gep(data, [index])

    # LLVM makes two instructions of a vector of eight 16-bit elements, so they travel in pairs, as
    # 32-bit words; PTX's own instructions part and join them, which LLVM leaves as they are.
    _half, _word = ir.IntType(16), ir.IntType(32)
    _sixteen = ir.Constant(_word, 16)
    _part = ir.FunctionType(ir.LiteralStructType([_half, _half]), [_word])
    _join = ir.FunctionType(_word, [_half, _half])

    def _parts(builder: Any, word: Any) -> list[Any]:
        pair = builder.call(ir.InlineAsm(_part, "mov.b32 {$0, $1}, $2;", "=h,=h,r"), [word])
        return [builder.extract_value(pair, 0), builder.extract_value(pair, 1)]

    def _joined(builder: Any, low: Any, high: Any) -> Any:
        return builder.call(ir.InlineAsm(_join, "mov.b32 $0, {$1, $2};", "=r,h,h"), [low, high])

    def _read(builder: Any, pointer: Any, count: int, itemsize: int) -> list[Any]:
        """The `count` elements at an address, by one instruction."""
        paired = itemsize == 2
        kind = (
            ir.VectorType(_word, count // 2)
            if paired
            else ir.VectorType(pointer.type.pointee, count)
        )
        vector = builder.load(builder.bitcast(pointer, kind.as_pointer(pointer.type.addrspace)))
        vector.align = count * itemsize
        items = [builder.extract_element(vector, _index(k)) for k in range(kind.count)]
        return [part for word in items for part in _parts(builder, word)] if paired else items

    def _write(builder: Any, pointer: Any, items: list[Any], itemsize: int) -> None:
        """The elements to an address, by one instruction."""
        size = len(items) * itemsize
        if itemsize == 2:
            pairs = zip(items[::2], items[1::2], strict=True)
            items = [_joined(builder, low, high) for low, high in pairs]
        kind = ir.VectorType(items[0].type, len(items))
        vector = ir.Constant(kind, ir.Undefined)
        for k, item in enumerate(items):
            vector = builder.insert_element(vector, item, _index(k))
        target = builder.bitcast(pointer, kind.as_pointer(pointer.type.addrspace))
        builder.store(vector, target).align = size

    def _short_load_or(count: int) -> Any:
        @intrinsic
        def load(typingctx, x, first, inside, fill, values):
            def codegen(context, builder, signature, args):
                source = _element_pointer(context, builder, signature.args[0], *args[:2])
                for n, word in enumerate(_words_or(builder, source, count, *args[2:4])):
                    # By shifts, which join with what follows: a bfloat16 becomes a float32 at once.
                    for k, item in (2 * n, word), (2 * n + 1, builder.lshr(word, _sixteen)):
                        to = _element_pointer(
                            context, builder, signature.args[4], args[4], _index(k)
                        )
                        builder.store(builder.trunc(item, _half), to)
                return context.get_dummy_value()

            return types.void(x, types.int64, types.boolean, x.dtype, values), codegen

        return load

    def _words_or(builder: Any, pointer: Any, count: int, inside: Any, fill: Any) -> list[Any]:
        """16-bit elements, two to a word, by one instruction if `inside`, else `fill` twice."""
        word = builder.zext(fill, _word)
        filled = builder.or_(word, builder.shl(word, _sixteen))
        kind, before = ir.VectorType(_word, count // 2), builder.basic_block
        with builder.if_then(inside):
            space = pointer.type.addrspace
            vector = builder.load(builder.bitcast(pointer, kind.as_pointer(space)))
            vector.align = 2 * count
            words = [builder.extract_element(vector, _index(k)) for k in range(count // 2)]
            reading = builder.basic_block
        chosen = [builder.phi(_word) for _ in words]
        for either, word in zip(chosen, words, strict=True):
            either.add_incoming(filled, before)
            either.add_incoming(word, reading)
        return chosen

    def _index(k: int) -> Any:
        return ir.Constant(ir.IntType(32), k)

    def _vector_load(count: int) -> Any:
        @intrinsic
        def load(typingctx, x, first, values):
            def codegen(context, builder, signature, args):
                source = _element_pointer(context, builder, signature.args[0], *args[:2])
                itemsize = context.get_abi_sizeof(source.type.pointee)
                for k, item in enumerate(_read(builder, source, count, itemsize)):
                    to = _element_pointer(context, builder, signature.args[2], args[2], _index(k))
                    builder.store(item, to)
                return context.get_dummy_value()

            return types.void(x, types.int64, values), codegen

        return load

    def _vector_store(count: int) -> Any:
        @intrinsic
        def store(typingctx, out, first, values):
            def codegen(context, builder, signature, args):
                target = _element_pointer(context, builder, signature.args[0], *args[:2])
                itemsize = context.get_abi_sizeof(target.type.pointee)
                items = [
                    builder.load(
                        _element_pointer(context, builder, signature.args[2], args[2], _index(k))
                    )
                    for k in range(count)
                ]
                _write(builder, target, items, itemsize)
                return context.get_dummy_value()

            return types.void(out, types.int64, values), codegen

        return store
