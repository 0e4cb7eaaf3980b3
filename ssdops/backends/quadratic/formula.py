"""What of a traced formula depends on both tokens other than by a product of factors: an expression of leaves.

    tanh(u[i] · w[j])   is   tanh(row0 · col0)

A leaf is all that depends on a row, on a column or on their lag alone; it is evaluated per token or per lag (`traced.py`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from ...ir import trace as t
from ...ir.trace import Call, Untraceable

Expr = Any
"""Numbers, leaves, and calls of them."""


@dataclass(frozen=True, slots=True)
class Leaf:
    """The value at a "row", a "col" or a "lag": the so many-th of its kind."""

    kind: str
    index: int


Leaves = dict[str, list[t.Expr]]


def leaves_of(e: t.Expr, found: Leaves) -> Expr:
    """The expression over leaves, each of which is added to those of its kind.

    Raises:
        Untraceable: it reads at what depends on both tokens.
    """
    if isinstance(e, bool | int | float):
        return float(e)
    depends = t.depends(e)
    if len(depends) <= 1 and "pair" not in depends:
        kind = {"i": "row", "j": "col", "lag": "lag"}[next(iter(depends), "i")]
        known = found.setdefault(kind, [])
        if e not in known:
            known.append(e)
        return Leaf(kind, known.index(e))
    match e:
        case Call("double", (x,)):
            return leaves_of(x, found)
        case Call(name, args):
            return Call(name, tuple(leaves_of(x, found) for x in args))
        case t.Read(operand, _):
            raise Untraceable(f"reading {operand.name} of what depends on both tokens")
    raise Untraceable("arithmetic of what depends on both tokens")


def turned(e: Expr) -> Expr:
    """The expression of the transpose: rows are columns."""
    match e:
        case Leaf("lag", _):
            return e
        case Leaf(kind, index):
            return Leaf("col" if kind == "row" else "row", index)
        case Call(name, args):
            return Call(name, tuple(turned(x) for x in args))
    return e


def calls(e: Expr) -> Iterator[str]:
    """The names of its operations."""
    if isinstance(e, Call):
        yield e.name
        for x in e.args:
            yield from calls(x)


def counts(e: Expr) -> dict[str, int]:
    """How many leaves of each kind a program has to hold; at least one."""
    out = {"row": 1, "col": 1, "lag": 1}

    def visit(e: Expr) -> None:
        if isinstance(e, Leaf):
            out[e.kind] = max(out[e.kind], e.index + 1)
        for x in e.args if isinstance(e, Call) else ():
            visit(x)

    visit(e)
    return out


# --- derivatives ------------------------------------------------------------------------------------------------------


def _call(name: str, *args: Expr) -> Expr:
    return Call(name, args)


def _if(condition: Expr, x: float = 1.0, other: float = 0.0) -> Expr:
    return Call("where", (condition, x, other))


def _picked(by: str) -> Callable[..., tuple[Expr, Expr]]:
    """Of the lesser or greater of two, halves where they are equal, as torch has it."""

    def rule(x: Expr, y: Expr) -> tuple[Expr, Expr]:
        tie = _if(_call("eq", x, y), 0.5)
        return tuple(Call("where", (_call(by, *pair), 1.0, tie)) for pair in ((x, y), (y, x)))  # type: ignore[return-value]

    return rule


DERIVATIVES: dict[str, Callable[..., tuple[Expr, ...]]] = {
    "add": lambda x, y: (1.0, 1.0),
    "sub": lambda x, y: (1.0, -1.0),
    "mul": lambda x, y: (y, x),
    "div": lambda x, y: (_call("reciprocal", y), _call("neg", _call("div", x, _call("square", y)))),
    "neg": lambda x: (-1.0,),
    "abs": lambda x: (_call("sign", x),),
    "exp": lambda x: (_call("exp", x),),
    "expm1": lambda x: (_call("exp", x),),
    "exp2": lambda x: (_call("mul", math.log(2), _call("exp2", x)),),
    "log": lambda x: (_call("reciprocal", x),),
    "log2": lambda x: (_call("reciprocal", _call("mul", math.log(2), x)),),
    "log1p": lambda x: (_call("reciprocal", _call("add", 1.0, x)),),
    "sqrt": lambda x: (_call("mul", 0.5, _call("rsqrt", x)),),
    "rsqrt": lambda x: (_call("div", _call("mul", -0.5, _call("rsqrt", x)), x),),
    "square": lambda x: (_call("mul", 2.0, x),),
    "reciprocal": lambda x: (_call("neg", _call("reciprocal", _call("square", x))),),
    "sin": lambda x: (_call("cos", x),),
    "cos": lambda x: (_call("neg", _call("sin", x)),),
    "tanh": lambda x: (_call("sub", 1.0, _call("square", _call("tanh", x))),),
    "sigmoid": lambda x: (_call("mul", _call("sigmoid", x), _call("sub", 1.0, _call("sigmoid", x))),),
    "pow": lambda x, y: (
        _call("mul", y, _call("pow", x, _call("sub", y, 1.0))), _call("mul", _call("log", x), _call("pow", x, y)),
    ),
    "minimum": _picked("lt"),
    "maximum": _picked("gt"),
    "clamp_min": lambda x, y: (_if(_call("ge", x, y)), _if(_call("lt", x, y))),
    "clamp_max": lambda x, y: (_if(_call("le", x, y)), _if(_call("gt", x, y))),
    "remainder": lambda x, y: (1.0, _call("neg", _call("floor", _call("div", x, y)))),
}  # fmt: skip
"""For the arguments of an operation, what their derivatives are multiplied by; of others the derivative is 0."""


def derivative(e: Expr, leaf: Leaf) -> Expr:
    """∂e / ∂leaf, 0.0 if there is none."""
    match e:
        case Leaf():
            return 1.0 if e == leaf else 0.0
        case Call("where", (condition, x, y)):
            dx, dy = derivative(x, leaf), derivative(y, leaf)
            return 0.0 if dx == dy == 0.0 else Call("where", (condition, dx, dy))
        case Call(name, args) if name in DERIVATIVES:
            total: Expr = 0.0
            for by, x in zip(DERIVATIVES[name](*args), args, strict=True):
                total = _sum(total, _times(by, derivative(x, leaf)))
            return total
    return 0.0


def _times(x: Expr, y: Expr) -> Expr:
    if y == 0.0 or x == 0.0:
        return 0.0
    return y if x == 1.0 else x if y == 1.0 else _call("mul", x, y)


def _sum(x: Expr, y: Expr) -> Expr:
    return y if x == 0.0 else x if y == 0.0 else _call("add", x, y)
