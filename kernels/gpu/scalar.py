"""Scalar functions, such as those of `minitorch.operators`, made ready to be called in kernels.

In Python a number is a number. In a kernel `1.0` is a float64 and turns the float32 arithmetic
around it into float64 arithmetic, which most GPUs have little of (a GeForce 1/64 of its float32
rate). So the numbers in the function's text are converted to the working type first. Where the
result is rounded to 16 bits, exponentials and divisions become approximate ones: exact ones would
take longer than the memory does.
"""

from __future__ import annotations

import ast
import inspect
import linecache
import textwrap
import zlib
from collections.abc import Callable
from functools import cache
from types import FunctionType
from typing import Any

from ..cpu.compiler import njit
from .approximate import exponential
from .ptx import div_full_f32
from .runtime import SIMULATED, cuda, device_function, types

CONVERT, DIVIDE, EXP = "_working_type", "_quotient", "_exponential"


@cache
def scalar_function(fn: Callable[..., Any], real: Any, approximate: bool = False) -> Any:
    """A device function that computes `fn` in `real`; the caller converts the result to `real`.

    Args:
        fn: numbers -> number: plain, or compiled by numba for the CPU or the GPU. Where its source
            cannot be had it is compiled as it is, with Python's float64 constants.
        real: numba type of its arguments.
        approximate: whether exponentials and divisions need be right to 16 bits only.

    """
    plain = plain_function(fn)
    approximate = approximate and real is types.float32 and not SIMULATED
    plain = with_constants_of_type(plain, real, approximate) or plain
    if not SIMULATED:
        return device_function(plain)
    # Python's own arithmetic raises where a GPU returns inf or NaN: compiled for the CPU, it does
    # as the GPU does.
    compiled = njit(error_model="numpy")(plain)

    @cuda.jit(device=True)
    def simulated(*numbers):
        return compiled(*numbers)

    return simulated


def plain_function(fn: Any) -> Any:
    """The Python function under a compiled one."""
    for name in ("py_func", "fn"):  # a dispatcher of numba, a function of its simulator
        fn = getattr(fn, name, fn)
    return fn


def with_constants_of_type(fn: Any, real: Any, approximate: bool = False) -> Any:
    """`fn` with `real(...)` around each number in its text; None if its text cannot be had.

    If `approximate`, exponentials and divisions are approximate ones.
    """
    if not isinstance(fn, FunctionType) or fn.__closure__:
        return None
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(fn)))
    except (OSError, TypeError, SyntaxError):
        return None
    definition = tree.body[0]
    if not isinstance(definition, ast.FunctionDef):  # a lambda within some other statement
        return None
    definition.decorator_list = []
    definition.returns = None
    for argument in definition.args.args:
        argument.annotation = None
    floats = {name for name, value in fn.__globals__.items() if isinstance(value, float)}
    tree = ast.fix_missing_locations(_Convert(floats, approximate).visit(tree))
    scope = {**fn.__globals__, CONVERT: real, DIVIDE: div_full_f32, EXP: exponential("float16")}
    text = ast.unparse(tree)
    file = f"<{fn.__module__}.{fn.__qualname__} in {real}, {zlib.crc32(text.encode()):08x}>"
    # Where `inspect.getsource` looks, for error messages and for `compile_cache`.
    linecache.cache[file] = (len(text), None, text.splitlines(keepends=True), file)
    exec(compile(text, file, "exec"), scope)
    return scope[definition.name]


class _Convert(ast.NodeTransformer):
    """Wraps float numbers, global names of floats, and whole numbers that meet floats; calls
    exponentials and divisions by name if they are to be approximate.
    """

    def __init__(self, floats: set[str], approximate: bool) -> None:
        self.floats = floats
        self.approximate = approximate

    def visit_Constant(self, node: ast.Constant) -> ast.AST:
        return _call(CONVERT, node) if isinstance(node.value, float) else node

    def visit_Name(self, node: ast.Name) -> ast.AST:
        return (
            _call(CONVERT, node)
            if node.id in self.floats and isinstance(node.ctx, ast.Load)
            else node
        )

    def visit_Compare(self, node: ast.Compare) -> ast.AST:
        self.generic_visit(node)
        node.left = _number(node.left)
        node.comparators = [_number(value) for value in node.comparators]
        return node

    def visit_BinOp(self, node: ast.BinOp) -> ast.AST:
        self.generic_visit(node)
        node.left = _number(node.left)
        if not isinstance(node.op, ast.Pow):  # x ** 2 is a product, x ** 2.0 a call
            node.right = _number(node.right)
        if self.approximate and isinstance(node.op, ast.Div):
            return _call(DIVIDE, _call(CONVERT, node.left), _call(CONVERT, node.right))
        return node

    def visit_Call(self, node: ast.Call) -> ast.AST:
        self.generic_visit(node)
        if self.approximate and ast.unparse(node.func) == "math.exp":
            return _call(EXP, *[_call(CONVERT, x) for x in node.args])
        return node

    def visit_Subscript(self, node: ast.Subscript) -> ast.AST:
        return node  # positions stay whole numbers


def _number(node: ast.expr) -> ast.expr:
    whole = isinstance(node, ast.Constant) and type(node.value) is int
    return _call(CONVERT, node) if whole else node


def _call(name: str, *arguments: ast.expr) -> ast.Call:
    return ast.Call(ast.Name(name, ast.Load()), list(arguments), [])
