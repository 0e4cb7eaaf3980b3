"""What there is to use in a quadratic term: a band, the levels of a Fenwick mask, or lags, around one scan.

    band      L[i, j] = scan[i, j] · 1[low ≤ i − j ≤ high]        windows, alone or times a scan
    fenwick   L[i, j] = scan[i, j] · levels[i, level(i, j)]       log-linear attention, times other scans or not
    lags      L[i, j] = scales · c[i − j] · 1[low ≤ i − j ≤ high]  Toeplitz, with windows or a direction

A mask whose transpose is a Fenwick one is that, transposed: levels weigh its columns.

A term that none of these describes is run by its entries.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

from .. import nodes as n
from .. import operands as ops
from ..operands import Operand
from ..terms import Linear
from .normalize import read_term


@dataclass(frozen=True, slots=True)
class Structure:
    """A quadratic mask as one scan and what it is multiplied with.

    Attributes:
        scan: its direction, decays, documents, scales and sign.
        directed: whether the mask has a direction; if not, the scan's says nothing.
        low, high: bounds on the lag i − j in the scan's local time; None is none.
        levels: of a Fenwick mask, or None; its token 0 is the first of local time.
        coeffs: per lag, `(nheads, 2·seqlen − 1)`, or None.
        transposed: whether all of this is of the mask's transpose.
    """

    scan: Linear
    directed: bool
    low: int | None
    high: int | None
    levels: Operand | None = None
    coeffs: Operand | None = None
    transposed: bool = False

    @property
    def banded(self) -> bool:
        """Whether only a band of the matrix is not zero."""
        return self.low is not None and self.high is not None


@lru_cache(maxsize=4096)
def structure_of(mask: n.Node) -> Structure | None:
    """The structure of a mask that is a quadratic term's, or None where entries are all that is known."""
    found = _read(mask)
    if found is None and (turned := _turned(mask)) is not None:
        found = _read(turned)
        return None if found is None or found.levels is None else replace(found, transposed=True)
    return found


def _read(mask: n.Node) -> Structure | None:
    taker = _Taker()
    try:
        rest = taker.take(mask)
    except _Unstructured:
        return None
    scan = read_term(_completed(rest))
    if not isinstance(scan, Linear):
        return None
    return taker.around(scan, directed=rest is not None and _has_direction(rest))


def _turned(mask: n.Node) -> n.Node | None:
    """The transpose of a mask in which transposes stand next to their leaves; None if it is not to be had that simply."""
    match mask:
        case n.Transpose(x):
            return x
        case n.Neg(x) | n.Strict(x) | n.Reverse(x):
            inner = _turned(x)
            return None if inner is None else n.rebuild(mask, (inner,))
        case n.Scale(x, rows, cols, None):
            inner = _turned(x)
            return None if inner is None else n.Scale(inner, cols, rows, None)
        case n.Product(factors):
            turned = [x if isinstance(x, n.Documents | n.Full) else _turned(x) for x in factors]
            return None if None in turned else n.product_of(*(x for x in turned if x is not None))
        case _:
            return None


class _Unstructured(Exception):
    """There is more than one structure, or one where it is not understood."""


def _completed(rest: n.Node | None) -> n.Node:
    """A scan to read in the place of nothing, or of scales and documents alone."""
    match rest:
        case None | n.Full():
            return n.Causal()
        case n.Neg(x) | n.Scale(x):
            return n.rebuild(rest, (_completed(x),))
        case n.Documents():
            return n.Product((n.Causal(), rest))
        case _:
            return rest


def _has_direction(rest: n.Node) -> bool:
    match rest:
        case n.Neg(x) | n.Scale(x):
            return _has_direction(x)
        case n.Documents() | n.Full():
            return False
        case _:
            return True


class _Taker:
    """What was taken out of a tree so far."""

    def __init__(self) -> None:
        self.low: int | None = None
        self.high: int | None = None
        self.first = 0  # rows before it are zero
        self.strict = False
        self.levels: Operand | None = None
        self.coeffs: Operand | None = None

    def take(self, m: n.Node) -> n.Node | None:
        """The tree without windows and lags, and with a decay for a Fenwick mask; None if nothing is left."""
        match m:
            case n.Neg(x) | n.Scale(x):
                inner = self.take(x)
                return n.rebuild(m, (n.Full() if inner is None else inner,))
            case n.Product(factors):
                kept = [left for f in factors if (left := self.take(f)) is not None]
                return n.product_of(*kept) if kept else None
            case n.Strict(n.Documents() | n.Window() | n.Toeplitz() | n.Transpose(n.Toeplitz())):
                self.strict = True
                return self.take(m.mask)
            case n.Window(left, right):
                self._band(-right, left)
            case n.Shift(n.Window(left, right), count):
                self.first = max(self.first, count)
                self._band(count - right, count + left)
            case n.Toeplitz(c):
                self._lags(c)
            case n.Transpose(n.Toeplitz(c)):
                self._lags(ops.Flip(c))
            case n.Strict(x) if isinstance(x, n.Fenwick | n.Reverse):
                inner = self.take(x)
                return None if inner is None else n.Strict(inner)
            case n.Reverse(n.Fenwick(log_a, levels)):
                return n.Reverse(self._fenwick(log_a, ops.Flip(levels)))
            case n.Fenwick(log_a, levels):
                return self._fenwick(log_a, levels)
            case _:
                return m
        return None

    def _band(self, low: int, high: int) -> None:
        self.low = low if self.low is None else max(self.low, low)
        self.high = high if self.high is None else min(self.high, high)

    def _lags(self, coeffs: Operand) -> None:
        if self.coeffs is not None:
            raise _Unstructured
        self.coeffs = coeffs

    def _fenwick(self, log_a: Operand, levels: Operand) -> n.Node:
        if self.levels is not None:
            raise _Unstructured
        self.levels = levels
        return n.Decay(log_a)

    def around(self, scan: Linear, directed: bool) -> Structure | None:
        """The structure, if it is one of those that are known."""
        low, high = self.low, self.high
        if not directed:
            scan = replace(scan, causal=True)
        elif not scan.causal:
            low, high = (None if high is None else -high), (None if low is None else -low)
        if directed and (high is not None or self.coeffs is not None):
            low = 0 if low is None else max(low, 0)
        if self.first and (self.low is None or self.low < self.first):  # else i − j ≥ first, and no row before it has entries
            return None
        if scan.channel is not None and (self.levels is not None or self.coeffs is not None):
            return None
        if self.levels is not None and (high is not None or self.coeffs is not None or not scan.col_inclusive):
            return None
        if self.levels is not None and not (directed and scan.row_inclusive):
            return None
        if self.coeffs is not None and (scan.decays or scan.documents is not None or scan.log_cols is not None):
            return None
        if self.levels is None and self.coeffs is None and (low is None or high is None):
            return None
        scan = replace(scan, strict=scan.strict or self.strict)
        return Structure(scan, directed, low, high, self.levels, self.coeffs)
