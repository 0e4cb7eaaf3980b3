"""A formula of a user's as an expression of TIR, in float64. The table of what TIR has is read where TVM is not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ...ir.trace import Call
from ..quadratic.formula import Leaf, calls

LOGICAL = ("logical_and", "logical_or", "logical_not")
BITWISE = ("bitwise_and", "bitwise_or", "bitwise_xor", "bitwise_not")
"""Of conditions, or of whole numbers by their bits."""
COMPARED = ("eq", "ne", "lt", "le", "gt", "ge")
SAME = ("exp", "exp2", "log", "log2", "log1p", "sqrt", "rsqrt", "sin", "cos", "tanh", "sigmoid", "floor", "ceil", "abs")
"""What TIR has by the same name."""
WRITTEN = (
    "add", "sub", "mul", "div", "neg", "square", "reciprocal", "minimum", "maximum", "clamp_min", "clamp_max", "pow", "sign",
    "floor_divide", "remainder", "where",
)  # fmt: skip
"""What is written out of it."""
KNOWN = {*LOGICAL, *BITWISE, *COMPARED, *SAME, *WRITTEN}


def lacking(formula: Any) -> str | None:
    """An operation of the formula that TIR has not; None if it has all."""
    return next((name for name in calls(formula) if name not in KNOWN), None)


def expression(e: Any, leaf: Callable[[str, int], Any]) -> Any:
    """The formula in TIR, of leaves by their kind and index."""
    from tvm.script import tirx as T

    def yes(x: Any) -> Any:
        """As a condition."""
        found = visit(x)
        return found if _is_condition(x) else found != T.float64(0)

    def number(x: Any) -> Any:
        found = visit(x)
        return T.Cast("float64", found) if _is_condition(x) else found

    def visit(e: Any) -> Any:
        match e:
            case Leaf(kind, index):
                return leaf(kind, index)
            case Call("where", (condition, x, y)):
                return T.Select(yes(condition), number(x), number(y))
            case Call("logical_not", (x,)):
                return T.Not(yes(x))
            case Call("logical_and", (x, y)):
                return T.And(yes(x), yes(y))
            case Call("logical_or", (x, y)):
                return T.Or(yes(x), yes(y))
            case Call(name, args) if name in BITWISE:
                if _is_condition(e):
                    return _bitwise(T, name, *[T.Cast("int32", yes(x)) for x in args]) % 2 != 0
                return T.Cast("float64", _bitwise(T, name, *[T.Cast("int64", number(x)) for x in args]))
            case Call(name, args):
                return getattr(T, name)(*map(number, args)) if name in SAME else _written(T, name, *map(number, args))
        return T.float64(e)

    return number(e)


def _is_condition(e: Any) -> bool:
    bits = isinstance(e, Call) and e.name in BITWISE and all(_is_condition(x) for x in e.args)
    return bits or (isinstance(e, Call) and e.name in (*LOGICAL, *COMPARED))


def _bitwise(T: Any, name: str, x: Any, y: Any = None) -> Any:
    """An operation on the bits of integers."""
    if name == "bitwise_not":
        return -x - 1
    return {"bitwise_and": T.bitwise_and, "bitwise_or": T.bitwise_or, "bitwise_xor": T.bitwise_xor}[name](x, y)


def _written(T: Any, name: str, *args: Any) -> Any:
    """An operation on numbers by operators of TIR."""
    one, zero = T.float64(1), T.float64(0)
    return {
        "add": lambda x, y: x + y, "sub": lambda x, y: x - y, "mul": lambda x, y: x * y, "div": lambda x, y: x / y,
        "neg": lambda x: -x, "square": lambda x: x * x, "reciprocal": lambda x: one / x,
        "minimum": T.min, "maximum": T.max, "clamp_min": T.max, "clamp_max": T.min, "pow": T.pow,
        "sign": lambda x: T.Cast("float64", x > zero) - T.Cast("float64", x < zero),
        "floor_divide": lambda x, y: T.floor(x / y), "remainder": lambda x, y: x - T.floor(x / y) * y,
        "eq": lambda x, y: x == y, "ne": lambda x, y: x != y, "lt": lambda x, y: x < y, "le": lambda x, y: x <= y,
        "gt": lambda x, y: x > y, "ge": lambda x, y: x >= y,
    }[name](*args)  # fmt: skip
