"""One line of PTX, as a function that kernels call.

`ptx` reads the instruction's text and the function's annotations, which say what kind of register
each operand is in:

    @ptx("mbarrier.init.shared::cta.b64 [{barrier}], {count};")
    def mbarrier_init(barrier: u32, count: u32) -> None:
        ...

In the text `{barrier}` stands for the register of the argument, `{out}` for that of the result. A
tuple of registers, `f32[4]`, is written `{%r1, %r2, %r3, %r4}`, as PTX writes its vectors, and
`{a[4:8]}` is a part of one. An argument named by `tied` is read and written in place, as an
accumulator is: the function returns the new value, and the compiler keeps both in one register.

Such a function is called by a kernel, or by a `traced` function (traced.py) while it is unrolled.
The simulator runs what is given as `simulated` instead.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from inspect import Parameter, Signature, signature
from typing import Any

from .runtime import SIMULATED, types


@dataclass(frozen=True)
class Register:
    """A kind of register, or of a tuple of them.

    Args:
        letter: inline assembly's name of it.
        kind: numba type of the number in it.
        count: `f32[4].count` is 4; None for a single register.

    """

    letter: str
    kind: Any
    count: int | None = None

    def __getitem__(self, count: int) -> Register:
        return replace(self, count=count)

    @property
    def numba(self) -> Any:
        """The argument's type in a kernel."""
        return self.kind if self.count is None else types.UniTuple(self.kind, self.count)

    @property
    def number(self) -> int:
        """How many registers."""
        return 1 if self.count is None else self.count


b16 = Register("h", types.uint16)
i32 = Register("r", types.int32)
u32 = Register("r", types.uint32)
u64 = Register("l", types.uint64)
f32 = Register("f", types.float32)


@dataclass(frozen=True)
class Assembly:
    """An instruction, or several, with the places for its operands.

    Args:
        template: PTX with names in braces.
        arguments: name and register of each.
        returns: registers of the results; those of the tied arguments, where there are any.
        tied: names of the arguments that are results as well.
        pure: it changes nothing but its result, so the compiler may move it or leave it out.

    Raises:
        TypeError: operands, annotations and text do not fit together.

    """

    template: str
    arguments: tuple[tuple[str, Register], ...]
    returns: tuple[Register, ...]
    tied: tuple[str, ...] = ()
    pure: bool = False

    def __post_init__(self) -> None:
        by_name = dict(self.arguments)
        for name, kind in (*self.arguments, *(("out", kind) for kind in self.returns)):
            self._expect(isinstance(kind, Register), f"{name} is {kind!r}; wanted a register: u32")
        for name in self.tied:
            self._expect(name in by_name, f"tied argument {name!r} is no argument")
        same = tuple(by_name[name] for name in self.tied) == self.returns
        self._expect(not self.tied or same, f"tied arguments {self.tied} are the results")
        several = len(self.returns) > 1 and not self.tied
        self._expect(not several, "several results are tied arguments")
        self.text()  # a name that is no operand is an error here
        for name in self.places():
            used = name in self.tied or re.search(rf"\{{{name}[\[}}]", self.template)
            self._expect(bool(used), f"operand {name!r} is not in the text")

    def _expect(self, fits: bool, wrong: str) -> None:
        if not fits:
            raise TypeError(f"{wrong}: {self.template}")

    def places(self) -> dict[str, list[str]]:
        """The names of each operand's registers in LLVM's inline assembly: results come first."""
        names = self.tied or ("out",) if len(self.returns) == 1 else self.tied
        untied = [(name, kind) for name, kind in self.arguments if name not in self.tied]
        found, first = {}, 0
        for name, kind in [*zip(names, self.returns, strict=True), *untied]:
            found[name] = [f"${n}" for n in range(first, first + kind.number)]
            first += kind.number
        return found

    def text(self) -> str:
        """The template with the registers' names in it."""
        places, counts = self.places(), dict(self.arguments)
        counts |= dict(zip(self.tied or ("out",), self.returns, strict=False))

        def put(match: re.Match[str]) -> str:
            name, begin, end = match.groups()
            self._expect(name in places, f"no operand is named {name!r}")
            first = int(begin or 0)
            last = first if end is None else int(end) - 1
            self._expect(
                first <= last < len(places[name]), f"{match[0]} of {len(places[name])} registers"
            )
            if begin is None:
                part = places[name]
                return part[0] if counts[name].count is None else f"{{{', '.join(part)}}}"
            if end is None:
                return places[name][int(begin)]
            return f"{{{', '.join(places[name][int(begin) : int(end)])}}}"

        return re.sub(r"\{(\w+)(?:\[(\d+)(?::(\d+))?\])?\}", put, self.template)

    def constraints(self) -> str:
        """What LLVM is told about the operands: results, arguments, tied arguments."""
        found = [f"={kind.letter}" for kind in self.returns for _ in range(kind.number)]
        tied = [str(n) for n in range(len(found))] if self.tied else []
        for name, kind in self.arguments:
            if name not in self.tied:
                found += [kind.letter] * kind.number
        return ",".join([*found, *tied, *([] if self.pure else ["~{memory}"])])


if SIMULATED:
    import numpy as np

    def _in_register(kind: Register) -> Callable[[Any], Any]:
        """A number as it is in such a register; tuples are taken as they are."""
        if kind.count is not None:
            return lambda x: x
        dtype = np.dtype(str(kind.kind)).type
        if isinstance(kind.kind, types.Float):
            return dtype
        bits, signed = kind.kind.bitwidth, kind.kind.signed

        def convert(x: Any) -> Any:
            word = int(x) & ((1 << bits) - 1)  # it wraps around, as on a GPU
            return dtype(word - (1 << bits) if signed and word >> (bits - 1) else word)

        return convert

    def _function(name: str, assembly: Assembly, doc: str, simulated: Any) -> Any:
        converters = [_in_register(kind) for _, kind in assembly.arguments]

        def run(*arguments: Any) -> Any:
            if simulated is None:
                raise NotImplementedError(f"the simulator has no {name}: run this on a GPU")
            pairs = zip(converters, arguments, strict=True)
            return simulated(*[convert(x) for convert, x in pairs])

        return run

else:
    from llvmlite import ir

    from .runtime import intrinsic
    from .traced import Value

    def _llvm(kind: Any) -> Any:
        if isinstance(kind, types.Float):
            return ir.FloatType()
        return ir.IntType(kind.bitwidth)

    def emit(assembly: Assembly, builder: Any, arguments: list[list[Any]]) -> list[list[Any]]:
        """LLVM's call of the assembly: from the arguments' registers to those of the results."""
        names = [name for name, _ in assembly.arguments]
        given = dict(zip(names, arguments, strict=True))
        order = [name for name in names if name not in assembly.tied] + list(assembly.tied)
        operands = [code for name in order for code in given[name]]
        results = [_llvm(kind.kind) for kind in assembly.returns for _ in range(kind.number)]
        returned = (
            (results[0] if len(results) == 1 else ir.LiteralStructType(results))
            if results
            else ir.VoidType()
        )
        kind = ir.FunctionType(returned, [code.type for code in operands])
        code = ir.InlineAsm(kind, assembly.text(), assembly.constraints(), not assembly.pure)
        # All threads of a warp together: such a call must not be moved into a branch.
        together = ("convergent",) if ".sync" in assembly.template else ()
        value = builder.call(code, operands, attrs=together)
        if len(results) > 1:
            values = iter([builder.extract_value(value, n) for n in range(len(results))])
        else:
            values = iter([value])
        return [[next(values) for _ in range(kind.number)] for kind in assembly.returns]

    def _generator(assembly: Assembly) -> Callable[..., Any]:
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            registers = [
                [code] if kind.count is None else _parts(builder, code, kind.number)
                for code, (_, kind) in zip(args, assembly.arguments, strict=True)
            ]
            results = [
                found[0] if kind.count is None else context.make_tuple(builder, kind.numba, found)
                for found, kind in zip(
                    emit(assembly, builder, registers), assembly.returns, strict=True
                )
            ]
            if not results:
                return context.get_dummy_value()
            if len(results) == 1:
                return results[0]
            return context.make_tuple(builder, signature.return_type, results)

        return codegen

    def _parts(builder: Any, code: Any, count: int) -> list[Any]:
        return [builder.extract_value(code, n) for n in range(count)]

    def _called(assembly: Assembly, arguments: tuple[Any, ...]) -> Any:
        """By a traced function: from `Value`s, or lists of them, to the same."""
        flat = [x for a in arguments for x in (a if isinstance(a, (list, tuple)) else [a])]
        known = next(x for x in flat if isinstance(x, Value))
        registers = []
        for value, (name, kind) in zip(arguments, assembly.arguments, strict=True):
            items = list(value) if isinstance(value, (list, tuple)) else [value]
            if len(items) != kind.number:
                raise TypeError(f"{name} has {kind.number} registers, got {len(items)}")
            registers.append([_code(known, x, kind.kind) for x in items])
        results = [
            [Value(known.builder, kind.kind, code) for code in found]
            for found, kind in zip(
                emit(assembly, known.builder, registers), assembly.returns, strict=True
            )
        ]
        single = [
            found[0] if kind.count is None else found
            for found, kind in zip(results, assembly.returns, strict=True)
        ]
        return single[0] if len(single) == 1 else single

    def _code(known: Any, x: Any, kind: Any) -> Any:
        if not isinstance(x, Value):
            return ir.Constant(_llvm(kind), x)
        return x.builder.zext(x.code, _llvm(kind)) if x.kind == types.boolean else x.code

    def _function(name: str, assembly: Assembly, doc: str, simulated: Any) -> Any:
        returns = [kind.numba for kind in assembly.returns]
        result = (
            types.void if not returns else returns[0] if len(returns) == 1 else types.Tuple(returns)
        )
        kinds = [kind.numba for _, kind in assembly.arguments]
        codegen = _generator(assembly)

        def typed(typingctx: Any, *given: Any) -> Any:
            for kind, other in zip(kinds, given, strict=True):
                if isinstance(kind, types.BaseTuple) and len(kind) != len(other):
                    return None  # "no implementation": another number of registers
            return result(*kinds), codegen

        typed.__name__ = typed.__qualname__ = name
        typed.__doc__ = doc
        typed.__signature__ = Signature(  # type: ignore[attr-defined]
            [
                Parameter(x, Parameter.POSITIONAL_OR_KEYWORD)
                for x in ("typingctx", *(name for name, _ in assembly.arguments))
            ]
        )
        made = intrinsic(typed)
        made.__class__ = _callable(type(made))
        made.assembly = assembly
        return made

    def _callable(kind: type) -> type:
        """numba's class of intrinsics, with `traced` functions as callers beside kernels."""

        def call(self: Any, *arguments: Any) -> Any:
            return _called(self.assembly, arguments)

        return type("Instruction", (kind,), {"__call__": call})


def instruction(
    name: str,
    template: str,
    arguments: dict[str, Register],
    returns: Register | tuple[Register, ...] | None = None,
    *,
    tied: str | tuple[str, ...] = (),
    pure: bool = False,
    simulated: Any = None,
    doc: str = "",
) -> Any:
    """What `ptx` makes, where the operands are not known before the program runs."""
    results = returns if isinstance(returns, tuple) else () if returns is None else (returns,)
    names = (tied,) if isinstance(tied, str) else tied
    assembly = Assembly(template, tuple(arguments.items()), results, names, pure)
    return _function(name, assembly, doc, simulated)


def ptx(
    template: str,
    *,
    tied: str | tuple[str, ...] = (),
    pure: bool = False,
    simulated: Any = None,
) -> Callable[[Any], Any]:
    """Decorator: the function that the text above describes.

    Args:
        template: PTX.
        tied: the arguments that are returned, changed in place.
        pure: it neither reads nor writes memory, nor waits: the compiler may move it.
        simulated: what the simulator calls in its place.

    Raises:
        TypeError: an annotation is missing, or text (`from __future__ import annotations` makes
            them so), or does not fit.

    """

    def decorate(function: Any) -> Any:
        notes = dict(function.__annotations__)
        for name in (*signature(function).parameters, "return"):
            if isinstance(notes.get(name, ""), str):
                given = repr(notes[name]) + ", text" if name in notes else "nothing"
                what = f"annotation {name!r} of {function.__name__}"
                raise TypeError(f"{what} is {given}; wanted a register, such as u32")
        returns = notes.pop("return")
        return instruction(
            function.__name__, template, notes, returns,
            tied=tied, pure=pure, simulated=simulated, doc=function.__doc__,
        )  # fmt: skip

    return decorate


def lines(parts: Iterator[str] | list[str]) -> str:
    """Several instructions as one, with names of their own: PTX's braces."""
    return "{ " + " ".join(parts) + " }"
