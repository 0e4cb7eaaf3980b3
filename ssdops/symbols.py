"""Operands without values, for `lower`: tensors that stand for expressions, so that masks can be made of them.

Adding, multiplying, negating and exponentiating them gives expressions of `ir/operands.py`; anything else is refused by name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import isfinite
from typing import Any

import torch
from torch import Tensor

from .errors import MaskError
from .ir import nodes as n
from .ir import operands as ops
from .ir.operands import Operand


class Symbol(Tensor):
    """A tensor on the meta device that stands for an operand expression.

    Attributes:
        operand: the expression.
        axes: those of the operand.
    """

    operand: Operand
    axes: str

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        name = getattr(func, "__name__", "")
        if name == "__get__":  # shape, ndim, device, …
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **(kwargs or {}))
        rule = _RULES.get(name)
        found = rule(*args) if rule is not None and not kwargs else None
        if found is None:
            known = "+, -, * and exp of operands, and * by numbers"
            raise MaskError(f"lower() may use {known}, and not {name or func}: declare an operand that holds the result")
        return found


def symbols(operands: Mapping[str, tuple[Operand, str]], rank: int) -> dict[str, Symbol]:
    """A symbol for each operand, given by name as (expression, axes)."""
    return {name: _symbol(x, axes, rank) for name, (x, axes) in operands.items()}


def _symbol(operand: Operand, axes: str, rank: int = 1) -> Symbol:
    shape = [rank if axis == "rank" else 1 for axis in axes.split()]
    symbol: Symbol = torch.empty(shape, device="meta").as_subclass(Symbol)
    symbol.operand, symbol.axes = operand, axes
    return symbol


def _rank(x: Symbol) -> int:
    with torch._C.DisableTorchFunctionSubclass():
        return x.shape[-1] if x.axes == n.RANK else 1


def _join(kind: type[ops.Add] | type[ops.Mul], a: Any, b: Any) -> Symbol | None:
    """a and b in one expression, if one of the axes holds both: an operand per head may meet one per token."""
    if not isinstance(a, Symbol) or not isinstance(b, Symbol) or n.IDS in (a.axes, b.axes):
        return None
    if a.axes == b.axes or {a.axes, b.axes} == {n.HEAD, n.TOKEN}:
        return _symbol(kind(a.operand, b.operand), a.axes if a.axes == b.axes else n.TOKEN, _rank(a))
    return None


def _times(a: Any, b: Any) -> Symbol | None:
    if isinstance(a, int | float):
        a, b = b, a
    if isinstance(a, Symbol) and isinstance(b, int | float) and isfinite(b):
        return _symbol(ops.Scaled(a.operand, float(b)), a.axes, _rank(a))
    return _join(ops.Mul, a, b)


def _add(a: Any, b: Any) -> Symbol | None:
    return _join(ops.Add, a, b)


def _sub(a: Any, b: Any) -> Symbol | None:
    return _join(ops.Add, a, _neg(b)) if isinstance(b, Symbol) else None


def _neg(a: Any) -> Symbol | None:
    return _times(a, -1.0)


def _exp(a: Any) -> Symbol | None:
    return _symbol(ops.Exp(a.operand), a.axes, _rank(a)) if isinstance(a, Symbol) else None


_RULES: dict[str, Callable[..., Symbol | None]] = {
    "add": _add, "__add__": _add, "sub": _sub, "__sub__": _sub, "mul": _times, "__mul__": _times, "__rmul__": _times,
    "neg": _neg, "__neg__": _neg, "exp": _exp,
}  # fmt: skip
