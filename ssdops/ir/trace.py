"""The formula of a registered mask as an expression: what was done to i, j and the operands, to be looked at and done again.

A formula is run once on stand-ins that write down what happens to them. Arithmetic, comparisons, `where` and the usual
elementwise functions can be traced, and reads of operands; anything else is named, and the mask runs by its formula.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NoReturn, TypeAlias

import torch
from torch import Tensor

from . import nodes as n

Expr: TypeAlias = "Token | Operand | Read | Call | float | int | bool"


@dataclass(frozen=True, slots=True)
class Token:
    """An index of tokens: "i" or "j"."""

    name: str


@dataclass(frozen=True, slots=True)
class Operand:
    """An operand as `views.py` gives it, or its prefix sums."""

    name: str
    axes: str
    sums: bool = False


@dataclass(frozen=True, slots=True)
class Read:
    """An operand read at an index, or at several."""

    operand: Operand
    at: tuple[Expr, ...]


@dataclass(frozen=True, slots=True)
class Call:
    """An elementwise function of torch, by its name."""

    name: str
    args: tuple[Expr, ...]


class Untraceable(Exception):
    """A formula that does what cannot be written down; the message says what."""


NAMES = {
    "add", "sub", "mul", "div", "neg", "abs", "exp", "exp2", "log", "log2", "log1p", "expm1", "sqrt", "rsqrt", "square", "pow",
    "reciprocal", "sin", "cos", "tanh", "sigmoid", "where", "minimum", "maximum", "clamp_min", "clamp_max", "eq", "ne", "lt",
    "le", "gt", "ge", "logical_and", "logical_or", "logical_not", "bitwise_and", "bitwise_or", "bitwise_xor", "bitwise_not",
    "floor", "ceil", "floor_divide", "remainder", "sign", "double",
}  # fmt: skip
"""Functions of torch that can be traced: elementwise, each a name in `torch` or a method."""
_SAME = {
    "absolute": "abs", "negative": "neg", "subtract": "sub", "multiply": "mul", "divide": "div", "true_divide": "div",
    "greater": "gt", "greater_equal": "ge", "less": "lt", "less_equal": "le", "not_equal": "ne", "power": "pow",
    "truediv": "div", "floordiv": "floor_divide", "mod": "remainder", "and": "bitwise_and", "or": "bitwise_or",
    "xor": "bitwise_xor", "invert": "bitwise_not",
}  # fmt: skip


class Tracer:
    """Stands for a value while a formula runs."""

    def __init__(self, expr: Expr) -> None:
        self.expr = expr

    def __getitem__(self, index: Any) -> Tracer:
        if not isinstance(self.expr, Operand):
            raise Untraceable("indexing of what is no operand")
        at = index if isinstance(index, tuple) else (index,)
        return Tracer(Read(self.expr, tuple(_expr(x) for x in at)))

    def cumsum(self) -> Tracer:
        """Of an operand per token."""
        if not isinstance(self.expr, Operand):
            raise Untraceable("operation cumsum")
        return Tracer(Operand(self.expr.name, self.expr.axes, sums=True))

    def __getattr__(self, name: str) -> Callable[..., Tracer]:
        if name.startswith("__") or _SAME.get(name, name) not in NAMES:
            raise Untraceable(f"operation {name}")
        return lambda *args, **kwargs: _call(name, (self, *args), kwargs)

    def __bool__(self) -> NoReturn:
        raise Untraceable("operation bool: Python decides by the value of tokens; use torch.where")

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Tracer:
        return _call(func.__name__, args, kwargs or {})


def _call(name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tracer:
    name = _SAME.get(name.strip("_"), name.strip("_"))
    if name not in NAMES or kwargs:
        raise Untraceable(f"operation {name}{f' with {next(iter(kwargs))}' if kwargs else ''}")
    return Tracer(Call(name, tuple(_expr(x) for x in args)))


def _expr(x: Any) -> Expr:
    if isinstance(x, Tracer):
        if isinstance(x.expr, Operand) and x.expr.axes != n.HEAD:
            raise Untraceable(f"{x.expr.name} as a whole")
        return x.expr
    if isinstance(x, bool | int | float):
        return x
    if isinstance(x, Tensor) and x.ndim == 0:
        return float(x) if x.is_floating_point() else int(x)
    raise Untraceable(f"a {type(x).__name__} that is neither an operand nor a number")


def _forward(name: str) -> Callable[..., Tracer]:
    return lambda self, *args: _call(name, (self, *args), {})


def _backward(name: str) -> Callable[..., Tracer]:
    return lambda self, other: _call(name, (other, self), {})


for _name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "and", "or", "xor"):
    setattr(Tracer, f"__{_name}__", _forward(_name))
    setattr(Tracer, f"__r{_name}__", _backward(_name))
for _name in ("neg", "abs", "invert", "eq", "ne", "lt", "le", "gt", "ge"):
    setattr(Tracer, f"__{_name}__", _forward(_name))
Tracer.__hash__ = None  # type: ignore[assignment]  # as == is a part of a formula


def trace(method: Callable[..., Any]) -> Expr:
    """The expression that a formula of i and j gives.

    Raises:
        Untraceable: it does something that cannot be traced; the message says what.
    """
    return _expr(method(Tracer(Token("i")), Tracer(Token("j"))))


def stand_ins(operands: Mapping[str, str]) -> dict[str, Tracer]:
    """A stand-in for each operand, given by name with its axes."""
    return {name: Tracer(Operand(name, axes)) for name, axes in operands.items()}


def replay(expr: Expr, i: Tensor, j: Tensor, operands: Mapping[str, Any]) -> Any:
    """The value of an expression at tokens i and j, over operands as `views.py` has them."""
    match expr:
        case Token(name):
            return i if name == "i" else j
        case Operand(name, _, sums):
            return operands[name].cumsum() if sums else operands[name]
        case Read(operand, at):
            index = tuple(replay(x, i, j, operands) for x in at)
            return replay(operand, i, j, operands)[index if len(index) > 1 else index[0]]
        case Call("double", (x,)):
            return torch.as_tensor(replay(x, i, j, operands)).double()
        case Call(name, args):
            values = [replay(x, i, j, operands) for x in args]
            if not isinstance(values[0], Tensor):
                exact = torch.float64 if isinstance(values[0], float) else None
                values[0] = torch.tensor(values[0], device=i.device, dtype=exact)
            return getattr(torch, name)(*values)
        case _:
            return expr


# --- what an expression depends on ----------------------------------------------------------------------------------


def depends(expr: Expr) -> frozenset[str]:
    """What a value is a function of, besides its head: "i", "j", "lag" (of i − j alone), "pair" (entries of a matrix)."""
    if (line := _affine(expr)) is not None:
        a, b, _ = line
        return _of_line(a, b)
    match expr:
        case Read(Operand(_, n.MATRIX), _):
            return frozenset({"pair"})
        case Read(Operand(_, n.LAG), (at,)):
            return depends(at)
        case Read(_, (at, *rest)):
            found = depends(at)
            # a token that lies at a lag is no function of the lag alone, as rows of the batch differ in it
            found = frozenset({"i", "j"}) if found - {"i", "j"} or not found else found
            return found.union(*(depends(x) for x in rest))
        case Call("eq" | "ne" | "lt" | "le" | "gt" | "ge", (x, y)):
            left, right = _affine(x), _affine(y)
            if left is not None and right is not None:
                return _of_line(left[0] - right[0], left[1] - right[1])
            return depends(x) | depends(y)
        case Call(_, args):
            return frozenset().union(*(depends(x) for x in args))
        case _:
            return frozenset()


def _of_line(a: int, b: int) -> frozenset[str]:
    if a == -b:
        return frozenset({"lag"}) if a else frozenset()
    return frozenset(name for name, by in (("i", a), ("j", b)) if by)


def _affine(expr: Expr) -> tuple[int, int, int] | None:
    """(a, b, c) if the expression is a·i + b·j + c in integers."""
    match expr:
        case bool():
            return None
        case int(c):
            return 0, 0, c
        case Token(name):
            return int(name == "i"), int(name == "j"), 0
        case Call("neg", (x,)) if (line := _affine(x)) is not None:
            return -line[0], -line[1], -line[2]
        case Call("add" | "sub" as op, (x, y)):
            left, right, sign = _affine(x), _affine(y), 1 if op == "add" else -1
            if left is not None and right is not None:
                return left[0] + sign * right[0], left[1] + sign * right[1], left[2] + sign * right[2]
    return None
