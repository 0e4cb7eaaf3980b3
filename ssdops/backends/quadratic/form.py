"""A mask in the one form that backends with tiles read: bounds on lags and tokens, and factors per token, lag and entry.

    L[i, j] = sign · rows[i] · exp(u[i] + w[j]) · lags[i − j] · entries[i, j] · cols[j]

for low ≤ i − j ≤ high other than one hole, rows and columns in a range, and both tokens in one document; else 0. A leaf
under transposes, reversals and shifts is read at other coordinates, each of them ± a token's index plus an offset: `View`.
`read` decides all that from the tree; `values.py` evaluates the factors.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import lru_cache, reduce
from typing import Any

import torch
from torch import Tensor

from ...ir import nodes as n
from ...ir.operands import Operand, Scaled
from ...ir.trace import Call, Untraceable
from .factors import Factors, factors
from .formula import Expr, Leaves, leaves_of, turned
from .traced import Traced


@dataclass(frozen=True, slots=True)
class Axis:
    """The coordinate `sign · t + offset` of token t."""

    sign: int = 1
    offset: int = 0

    def of(self, x: Tensor, seqlen: int) -> Tensor:
        """x, whose last axis is coordinates, at each token; those outside are moved in (a mask's bounds leave them out)."""
        if self == Axis():
            return x
        at = (self.sign * torch.arange(seqlen, device=x.device) + self.offset).clamp(0, max(seqlen - 1, 0))
        return x.index_select(-1, at)


@dataclass(frozen=True, slots=True)
class View:
    """A leaf read at [row(i), col(j)], or if transposed at [row(j), col(i)]."""

    row: Axis = field(default_factory=Axis)
    col: Axis = field(default_factory=Axis)
    transposed: bool = False

    @property
    def slope(self) -> int:
        """The leaf's own lag is `slope · (i − j) + shift`."""
        return -self.row.sign if self.transposed else self.row.sign

    @property
    def shift(self) -> int:
        """See `slope`."""
        return self.row.offset - self.col.offset

    def zero(self) -> int:
        """The lag i − j at which the leaf's own is 0."""
        return -self.slope * self.shift


@dataclass(frozen=True, slots=True)
class Form:
    """A mask as bounds and factors; operands are named, with where they are read.

    Attributes:
        low, high, hole: the lags it has.
        rows, cols: the ranges [first, stop) of rows and columns that it has.
        decays: log decays.
        logs, scales: exponents and factors per token; True where the token is the row.
        lags, entries: Toeplitz and dense factors.
        documents: what both tokens must share.
        formula: a further factor, of what is at rows, columns and lags (`formula.py`), each with where it is read.
    """

    sign: int
    low: int
    high: int
    hole: int | None
    rows: tuple[int, int]
    cols: tuple[int, int]
    decays: tuple[tuple[Operand, View], ...]
    logs: tuple[tuple[Operand | Traced, Axis, bool], ...]
    scales: tuple[tuple[Operand | Traced, Axis, bool], ...]
    lags: tuple[tuple[Operand | Traced, View], ...]
    entries: tuple[tuple[Operand, View], ...]
    documents: tuple[tuple[n.Documents, View], ...]
    formula: Expr = None
    at_rows: tuple[tuple[Traced, Axis], ...] = ()
    at_cols: tuple[tuple[Traced, Axis], ...] = ()
    at_lags: tuple[tuple[Traced, View], ...] = ()

    @property
    def zero(self) -> int | None:
        """The lag at which no decay has anything between its tokens; None without decays, or where they differ in it."""
        zeros = {view.zero() for _, view in self.decays}
        return zeros.pop() if len(zeros) == 1 else None

    def pairs(self, seqlen: int) -> int:
        """How many pairs of tokens are in the band: Σ over its lags of seqlen − |lag|."""

        def up_to(lag: int) -> int:  # lags 0 to that
            return (lag + 1) * seqlen - lag * (lag + 1) // 2 if lag >= 0 else 0

        if self.low > self.high:
            return 0
        both = up_to(self.high) + up_to(-self.low)
        return both - up_to(self.low - 1) - up_to(-self.high - 1) - (seqlen if self.low <= 0 <= self.high else 0)


class Refused(Exception):
    """A mask that has no such form; the message says why."""


@lru_cache(maxsize=1024)
def read(mask: n.Node, seqlen: int) -> Form:
    """The form of a mask without sums.

    Raises:
        Refused: it has none.
    """
    reader = _Reader(seqlen)
    reader.visit(mask, View())
    return reader.form()


def _signed(x: Operand, by: float) -> Operand:
    return x if by > 0 else Scaled(x, by)


class _Reader:
    """What has been gathered of a tree so far."""

    def __init__(self, seqlen: int) -> None:
        self.seqlen, self.sign = seqlen, 1
        self.formula: dict[str, Any] = {}
        self.low, self.high = 1 - seqlen, seqlen - 1
        self.holes: set[int] = set()
        self.ranges = {True: (0, seqlen), False: (0, seqlen)}  # of rows, of columns
        self.found: dict[str, list[tuple[object, ...]]] = {
            name: [] for name in ("decays", "logs", "scales", "lags", "entries", "documents")
        }

    def form(self) -> Form:
        low, high = self.low, self.high
        while low in self.holes:
            low += 1
        while high in self.holes:
            high -= 1
        holes = sorted(lag for lag in self.holes if low < lag < high)
        if len(holes) > 1:
            raise Refused(f"it leaves out {len(holes)} diagonals inside its band, and a tile kernel at most one")
        hole = holes[0] if holes else None
        factors = {name: tuple(found) for name, found in self.found.items()} | self.formula
        return Form(self.sign, low, high, hole, self.ranges[True], self.ranges[False], **factors)

    def visit(self, m: n.Node, at: View) -> None:
        """Gather a mask that is read at a view."""
        last = self.seqlen - 1
        match m:
            case n.Product(factors):
                for factor in factors:
                    self.visit(factor, at)
            case n.Neg(x):
                self.sign = -self.sign
                self.visit(x, at)
            case n.Transpose(x):
                self.visit(x, View(at.col, at.row, not at.transposed))
            case n.Reverse(x):
                row, col = (Axis(-a.sign, last - a.offset) for a in (at.row, at.col))
                self.visit(x, View(row, col, at.transposed))
            case n.Shift(x, count):
                self._keep_from(at, count)
                self.visit(x, replace(at, row=Axis(at.row.sign, at.row.offset - count)))
            case n.Strict(x):
                self.holes.add(at.zero())
                self.visit(x, at)
            case n.Scale(x, rows, cols, log_cols):
                on_rows = not at.transposed
                self._token("scales", rows, at.row, on_rows)
                self._token("scales", cols, at.col, not on_rows)
                self._token("logs", log_cols, at.col, not on_rows)
                self.visit(x, at)
            case _:
                self._leaf(m, at)

    def _leaf(self, m: n.Node, at: View) -> None:
        match m:
            case n.Full():
                pass
            case n.Causal():
                self._band(at, 0, None)
            case n.Window(left, right):
                self._band(at, -right, left)
            case n.Decay(log_a):
                self._band(at, 0, None)
                self.found["decays"].append((log_a, at))
            case n.Diagonal(d):
                self._band(at, 0, 0)
                self._token("scales", d, at.row, not at.transposed)
            case n.Toeplitz(coeffs):
                self.found["lags"].append((coeffs, at))
            case n.Dense(matrix):
                self.found["entries"].append((matrix, at))
            case n.Documents():
                self.found["documents"].append((m, at))
            case n.Registered():
                self._registered(m, at)
            case _:
                raise Refused(f"{m.op} is no product of factors per token, lag and entry")

    def _registered(self, m: n.Registered, at: View) -> None:
        """The factors that the traced formula of a user's mask is made of."""
        try:
            f = factors(m, self.seqlen)
            if f.pairs:
                self._pairs(m, f, at)
        except Untraceable as reason:
            raise Refused(f"{m.op} cannot be traced: {reason}") from None
        self.sign *= f.sign
        if f.low > f.high:
            self.low, self.high = 1, 0
        else:
            self._band(at, f.low, f.high)
        self.holes |= {at.slope * (lag - at.shift) for lag in f.holes}
        self.found["decays"] += [(_signed(getattr(m, name), by), at) for name, by in f.decays]
        for kind, found in (("logs", f.exponents), ("scales", f.scales)):
            for expr, place in found:
                if place == "lag":
                    factor = Call("exp", (expr,)) if kind == "logs" else expr
                    self.found["lags"].append((Traced(m, factor, place, f.low, f.high, f.holes), at))
                else:
                    axis = at.row if place == "i" else at.col
                    self.found[kind].append((Traced(m, expr, place), axis, (place == "i") != at.transposed))
        turned = View(at.col, at.row, not at.transposed)
        self.found["entries"] += [(getattr(m, name), turned if flipped else at) for name, flipped in f.entries]

    def _pairs(self, m: n.Registered, f: Factors, at: View) -> None:
        """A formula of pairs, of which there is at most one."""
        if self.formula:
            raise Refused(f"{m.op} is a second formula that is no product of factors")
        found: Leaves = {}
        formula = leaves_of(reduce(lambda x, y: Call("mul", (x, y)), f.pairs), found)
        rows, cols = (
            tuple((Traced(m, e, place), axis) for e in found.get(kind, ()))
            for kind, place, axis in (("row", "i", at.row), ("col", "j", at.col))
        )
        lags = tuple((Traced(m, e, "lag", f.low, f.high, f.holes), at) for e in found.get("lag", ()))
        if at.transposed:
            formula, rows, cols = turned(formula), cols, rows
        self.formula = {"formula": formula, "at_rows": rows, "at_cols": cols, "at_lags": lags}

    def _token(self, kind: str, x: Operand | None, axis: Axis, on_rows: bool) -> None:
        if x is not None:
            self.found[kind].append((x, axis, on_rows))

    def _band(self, at: View, low: int, high: int | None) -> None:
        """low ≤ the leaf's lag ≤ high."""
        edges = [at.slope * (edge - at.shift) for edge in (low, high) if edge is not None]
        if high is not None:
            self.low, self.high = max(self.low, min(edges)), min(self.high, max(edges))
        elif at.slope > 0:
            self.low = max(self.low, edges[0])
        else:
            self.high = min(self.high, edges[0])

    def _keep_from(self, at: View, count: int) -> None:
        """row coordinate ≥ count."""
        axis, on_rows = at.row, not at.transposed
        first, stop = self.ranges[on_rows]
        if axis.sign > 0:
            self.ranges[on_rows] = (max(first, count - axis.offset), stop)
        else:
            self.ranges[on_rows] = (first, min(stop, axis.offset - count + 1))
