"""A traced formula as factors of a `form.Form`: what depends on a row, on a column, on their lag, or is a matrix's entry.

    exp(a[i] − b[j]) · f(i − j) · c[j]   where 0 ≤ i − j

is exponents of rows and of columns, a factor per lag, one per column, and a band. Products are taken apart, and exponents
of sums. What then depends on both tokens and on more than their lag has no such form, and is left as it is, for pairs.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from ...ir import nodes as n
from ...ir import trace as t
from ...ir.trace import Call, Expr, Operand, Read, Token, Untraceable
from ...ir.views import Index
from .traced import pair_at

ROW, COL, LAG = frozenset({"i"}), frozenset({"j"}), frozenset({"lag"})
NONE: frozenset[str] = frozenset()
SIMPLE = (NONE, ROW, COL, LAG)
ZERO = (0, 0.0, False)


@dataclass
class Factors:
    """What a formula is a product of; places are where a factor is read, "i", "j" or "lag".

    Attributes:
        low, high: the lags that there are,
        holes: less these; more than one are a factor of 0 or 1 among the scales instead.
        decays: operands whose sum between the tokens is an exponent, with its sign.
        exponents, scales: (expression, place).
        entries: matrices, and whether they are read at [j, i].
        pairs: what depends on both tokens otherwise.
    """

    sign: int = 1
    low: int = 0
    high: int = -1
    holes: tuple[int, ...] = ()
    decays: list[tuple[str, float]] = field(default_factory=list)
    exponents: list[tuple[Expr, str]] = field(default_factory=list)
    scales: list[tuple[Expr, str]] = field(default_factory=list)
    entries: list[tuple[str, bool]] = field(default_factory=list)
    pairs: list[Expr] = field(default_factory=list)


@lru_cache(maxsize=256)
def expressions(node: n.Registered) -> tuple[Expr, tuple[Expr, ...]]:
    """The formula, and the conditions that its class claims.

    Raises:
        Untraceable: an operation of the formula cannot be traced.
    """
    definition: Any = node.definition
    if definition.per_channel:
        raise Untraceable("an operand per state channel")
    me = definition.instance(node, t.stand_ins(definition.operands))
    conditions: list[Expr] = [Call("ge", (Token("i"), Token("j")))] if definition.causal else []
    conditions += [t.trace(me.support)] if hasattr(me, "support") else []
    return t.trace(me.entries), tuple(conditions)


def factors(node: n.Registered, seqlen: int) -> Factors:
    """The factors of a mask.

    Raises:
        Untraceable: an operation of its formula cannot be traced.
    """
    formula, claimed = expressions(node)
    if not seqlen:
        return Factors()
    with _disable_current_modes():  # conditions on lags have values while torch traces a call, too
        return _Splitter(seqlen).split(formula, claimed)


class _Splitter:
    def __init__(self, seqlen: int) -> None:
        self.seqlen, self.out = seqlen, Factors()
        self.inside = torch.ones(max(2 * seqlen - 1, 0), dtype=torch.bool)  # from lag 1 − seqlen on
        self.claims: list[Expr] = []

    def split(self, formula: Expr, claimed: tuple[Expr, ...]) -> Factors:
        for condition in claimed:
            if _of_lags(condition):
                self._claim(condition)
            else:  # what the formula gives elsewhere may be infinite, so it is selected away and not multiplied by 0
                formula = Call("where", (condition, formula, 0.0))
        self._conditions(formula)
        self._factor(formula, 1)
        self._pair_sums()
        self._band()
        return self.out

    def _band(self) -> None:
        out, found = self.out, self.inside.nonzero().flatten()
        if not len(found):
            return
        first, last = int(found[0]), int(found[-1])
        out.low, out.high = first - (self.seqlen - 1), last - (self.seqlen - 1)
        missing = (~self.inside[first : last + 1]).nonzero().flatten() + out.low
        if len(missing) == 1:
            out.holes = (int(missing),)
        elif len(missing):
            out.scales += [(claim, "lag") for claim in self.claims]

    def _claim(self, condition: Expr, wanted: bool = True) -> None:
        """Keep only lags at which a condition is as wanted."""
        self.inside &= self._at_lags(condition) == wanted
        self.claims.append(Call("where", (condition, 1.0, 0.0) if wanted else (condition, 0.0, 1.0)))

    def _at_lags(self, condition: Expr) -> Tensor:
        """A condition on i − j at every lag."""
        lags = torch.arange(1 - self.seqlen, self.seqlen)
        i, j = (x.as_subclass(Index) for x in pair_at(lags))
        found = t.replay(condition, i, j, {})
        return torch.as_tensor(found).as_subclass(Tensor).bool().expand_as(self.inside)

    def _conditions(self, e: Expr) -> None:
        """Those that choose between a factor and 0, wherever it stands in the product."""
        match e:
            case Call("mul", args):
                for x in args:
                    self._conditions(x)
            case Call("div", (x, _)) | Call("neg" | "double", (x,)):
                self._conditions(x)
            case Call("where", (condition, x, other)) if _is_zero(other) and _of_lags(condition):
                self._claim(condition)
                self._conditions(x)
            case Call("where", (condition, other, x)) if _is_zero(other) and _of_lags(condition):
                self._claim(condition, wanted=False)
                self._conditions(x)

    def _chosen(self, condition: Expr, x: Expr, y: Expr) -> Expr | None:
        """The branch that `where` takes at every lag that the mask has; None if it takes both."""
        if not _of_lags(condition):
            return None
        taken = self._at_lags(condition)[self.inside]
        return x if bool(taken.all()) else None if bool(taken.any()) else y

    def _factor(self, e: Expr, power: int) -> None:
        where = isinstance(e, Call) and e.name == "where"
        if t.depends(e) in SIMPLE and not (where and t.depends(e) == LAG):
            self._put(self.out.scales, _powered(e, power))
            return
        match e:
            case Call("mul", (x, y)):
                self._factor(x, power)
                self._factor(y, power)
            case Call("div", (x, y)):
                self._factor(x, power)
                self._factor(y, -power)
            case Call("neg", (x,)):
                self.out.sign = -self.out.sign
                self._factor(x, power)
            case Call("double", (x,)):
                self._factor(x, power)
            case Call("exp", (x,)):
                self._exponent(x, 1.0 * power)
            case Call("where", (condition, x, y)):
                if t.depends(e) == LAG and not (_of_lags(condition) and (_is_zero(x) or _is_zero(y))):
                    self._put(self.out.scales, _powered(e, power))
                elif (taken := self._chosen(condition, x, y)) is not None:
                    self._factor(taken, power)
                else:
                    self.out.pairs.append(_powered(e, power))
            case Read(Operand(name, n.MATRIX), (Token(i), Token(j))) if i != j and power > 0:
                self.out.entries.append((name, i == "j"))
            case _:
                self.out.pairs.append(_powered(e, power))

    def _exponent(self, e: Expr, by: Expr) -> None:
        """exp(by · e), by being a number or one per head."""
        if t.depends(e) in SIMPLE:
            self._put(self.out.exponents, _times(by, e))
            return
        match e:
            case Call("add", (x, y)):
                self._exponent(x, by)
                self._exponent(y, by)
            case Call("sub", (x, y)):
                self._exponent(x, by)
                self._exponent(y, _times(-1.0, by))
            case Call("neg", (x,)):
                self._exponent(x, _times(-1.0, by))
            case Call("mul", (x, y)) if not t.depends(x) or not t.depends(y):
                x, y = (x, y) if not t.depends(x) else (y, x)
                self._exponent(y, _times(by, x))
            case Call("div", (x, y)) if not t.depends(y):
                self._exponent(x, Call("div", (by, y)))
            case Call("where", (condition, x, y)) if (taken := self._chosen(condition, x, y)) is not None:
                self._exponent(taken, by)
            case Call("double", (x,)):
                self._exponent(x, by)
            case _:
                self.out.pairs.append(Call("exp", (_times(by, e),)))

    def _put(self, where: list[tuple[Expr, str]], e: Expr) -> None:
        (place,) = t.depends(e) or {"lag"}
        where.append((e, place))

    def _pair_sums(self) -> None:
        """Prefix sums at i less those at j are a decay: its gradient is better had between the tokens than at each."""
        rows = {_sums_of(e): (e, place) for e, place in self.out.exponents if place == "i" and _sums_of(e) is not None}
        for e, place in list(self.out.exponents):
            found = _sums_of(e)
            if found is None or place != "j":
                continue
            name, by = found
            if (other := rows.pop((name, -by), None)) is not None:
                self.out.exponents.remove((e, place))
                self.out.exponents.remove(other)
                self.out.decays.append((name, -by))


def _powered(e: Expr, power: int) -> Expr:
    """e, or one over it."""
    return e if power > 0 else Call("reciprocal", (e,))


def _times(x: Expr, y: Expr) -> Expr:
    if isinstance(x, int | float) and isinstance(y, int | float):
        return float(x * y)
    return y if x == 1.0 else Call("mul", (x, y))


def _sums_of(e: Expr) -> tuple[str, float] | None:
    """(operand, ± 1) of ± its prefix sums at the token itself."""
    match e:
        case Read(Operand(name, n.TOKEN, True), (Token(),)):
            return name, 1.0
        case Call("mul", (-1.0, Read(Operand(name, n.TOKEN, True), (Token(),)))):
            return name, -1.0
    return None


def _of_lags(condition: Expr) -> bool:
    """Whether i − j alone decides."""
    return t.depends(condition) in (NONE, LAG) and not _operands(condition)


def _is_zero(e: Expr) -> bool:
    return isinstance(e, int | float) and e in ZERO


def _operands(e: Expr) -> bool:
    match e:
        case Operand() | Read():
            return True
        case Call(_, args):
            return any(_operands(x) for x in args)
    return False
