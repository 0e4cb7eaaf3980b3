"""A mask in the one form that the tile kernels read: bounds on lags and tokens, and factors per token, lag and entry.

    L[i, j] = sign · rows[i] · exp(u[i] + w[j]) · lags[i − j] · entries[i, j] · cols[j]

for low ≤ i − j ≤ high other than one hole, rows and columns in a range, and both tokens in one document; else 0. A leaf
under transposes, reversals and shifts is read at other coordinates, each of them ± a token's index plus an offset: `View`.
`read` decides all that from the tree; `values` evaluates the factors in plain differentiable torch, so that a backend has
to know the gradients of the factors only.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache

import torch
from torch import Tensor

from ...ir import nodes as n
from ...ir.operands import Operand, names
from ...ir.problem import Problem
from ...ir.resolve import repeat_heads, resolve, segment_ids

LIMIT = 1e6
"""Exponents of columns are cut here, so that an infinite one takes part in sums; exp is 0 or inf there anyway."""


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
    """

    sign: int
    low: int
    high: int
    hole: int | None
    rows: tuple[int, int]
    cols: tuple[int, int]
    decays: tuple[tuple[Operand, View], ...]
    logs: tuple[tuple[Operand, Axis, bool], ...]
    scales: tuple[tuple[Operand, Axis, bool], ...]
    lags: tuple[tuple[Operand, View], ...]
    entries: tuple[tuple[Operand, View], ...]
    documents: tuple[tuple[n.Documents, View], ...]

    @property
    def zero(self) -> int | None:
        """The lag at which no decay has anything between its tokens; None without decays, or where they differ in it."""
        zeros = {view.zero() for _, view in self.decays}
        return zeros.pop() if len(zeros) == 1 else None


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


class _Reader:
    """What has been gathered of a tree so far."""

    def __init__(self, seqlen: int) -> None:
        self.seqlen, self.sign = seqlen, 1
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
        factors = {name: tuple(found) for name, found in self.found.items()}
        return Form(self.sign, low, high, hole, self.ranges[True], self.ranges[False], **factors)  # type: ignore[arg-type]

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
            case _:
                raise Refused(f"{m.op} is no product of factors per token, lag and entry")

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


# --- values ---------------------------------------------------------------------------------------------------------


@dataclass
class Values:
    """The factors, each `(batch | 1, nheads, seqlen)` but for lags `(nheads, 2·seqlen − 1)` and entries (batch | 1, heads,
    seqlen, seqlen); None where there is none.

    Attributes:
        decay_rows, decay_cols: sums of logs, float64: a decay is exp(decay_rows[i] + decay_cols[j]).
        odd_rows, odd_cols: their sum is how many logs between i and j are not finite.
        log_rows, log_cols: further exponents, float64.
        rows, cols, lags: float32. entries: as given.
    """

    decay_rows: Tensor | None = None
    decay_cols: Tensor | None = None
    odd_rows: Tensor | None = None
    odd_cols: Tensor | None = None
    log_rows: Tensor | None = None
    log_cols: Tensor | None = None
    rows: Tensor | None = None
    cols: Tensor | None = None
    lags: Tensor | None = None
    entries: Tensor | None = None


def values(form: Form, operands: Mapping[str, Tensor], problem: Problem) -> Values:
    """The factors of a form, differentiably in the operands."""
    out, seqlen, nheads = Values(), problem.seqlen, problem.nheads

    def per_token(x: Operand, dtype: torch.dtype) -> Tensor:
        wide = {name: operands[name].to(dtype) for name in names(x)}  # before any arithmetic on them
        value = repeat_heads(resolve(x, wide, n.TOKEN, seqlen), nheads, 2)
        return value.expand(-1, seqlen, -1).transpose(1, 2)  # [B | 1, H, T]

    for log_a, view in form.decays:
        log = per_token(log_a, torch.float64)
        finite = log.isfinite()
        sums, odd = torch.where(finite, log, 0.0).cumsum(2), (~finite).cumsum(2).double()
        for name, x in (("decay", sums), ("odd", odd)):
            row, col = view.row.of(x, seqlen), -view.col.of(x, seqlen)
            on_rows, on_cols = (col, row) if view.transposed else (row, col)
            _add(out, f"{name}_rows", on_rows)
            _add(out, f"{name}_cols", on_cols)
    for log, axis, on_rows in form.logs:
        exponent = axis.of(per_token(log, torch.float64), seqlen).clamp(-LIMIT, LIMIT)
        _add(out, "log_rows" if on_rows else "log_cols", exponent)
    for scale, axis, on_rows in form.scales:
        _multiply(out, "rows" if on_rows else "cols", axis.of(per_token(scale, torch.float32), seqlen))
    for coeffs, view in form.lags:
        c = repeat_heads(resolve(coeffs, operands, n.LAG, seqlen).float(), nheads, 0)
        lag = Axis(view.slope, view.shift + (seqlen - 1) * (1 - view.slope))
        _multiply(out, "lags", lag.of(c, 2 * seqlen - 1))
    for matrix, view in form.entries:
        entries = resolve(matrix, operands, n.MATRIX, seqlen).expand(-1, -1, seqlen, seqlen)
        entries = view.row.of(entries.transpose(2, 3), seqlen).transpose(2, 3)
        entries = view.col.of(entries, seqlen)
        _multiply(out, "entries", entries.transpose(2, 3) if view.transposed else entries, nheads)
    return out


def _add(out: Values, name: str, x: Tensor) -> None:
    have = getattr(out, name)
    setattr(out, name, x if have is None else have + x)


def _multiply(out: Values, name: str, x: Tensor, heads: int | None = None) -> None:
    """Multiply a factor in; heads are repeated if they differ (only entries come with fewer than all)."""
    have = getattr(out, name)
    if have is not None and heads is not None and have.shape[1] != x.shape[1]:
        have, x = repeat_heads(have, heads, 1), repeat_heads(x, heads, 1)
    setattr(out, name, x if have is None else have * x)


# --- documents ------------------------------------------------------------------------------------------------------


def spans(form: Form, operands: Mapping[str, Tensor], seqlen: int) -> tuple[Tensor, Tensor] | None:
    """The columns [start, stop) that share every document with each row, int32 `(batch | 1, 2, seqlen)`; and so for columns.

    Ids do not decrease, so that documents are intervals.
    """
    of_rows: Tensor | None = None
    of_cols: Tensor | None = None
    for documents, view in form.documents:
        ids = segment_ids(documents, operands, seqlen)
        row, col = (a.sign * a.of(ids, seqlen) for a in (view.row, view.col))
        rows, cols = (col, row) if view.transposed else (row, col)
        of_rows, of_cols = _meet(of_rows, _interval(cols, rows)), _meet(of_cols, _interval(rows, cols))
    return None if of_rows is None or of_cols is None else (of_rows, of_cols)


def _interval(among: Tensor, ids: Tensor) -> Tensor:
    """Where each id stands among sorted ones."""
    among, ids = among.contiguous(), ids.contiguous()
    first = torch.searchsorted(among, ids, out_int32=True)
    return torch.stack([first, torch.searchsorted(among, ids, right=True, out_int32=True)], 1)


def _meet(a: Tensor | None, b: Tensor) -> Tensor:
    return b if a is None else torch.stack([torch.maximum(a[:, 0], b[:, 0]), torch.minimum(a[:, 1], b[:, 1])], 1)


def tile_count(form: Form, operands: Mapping[str, Tensor], seqlen: int, size: int) -> int:
    """At most how many tiles of rows there are, none of which has rows of two documents; known without their values."""
    documents = 0
    for node, _ in form.documents:
        if node.cu_seqlens is not None:
            documents += operands[next(names(node.cu_seqlens))].shape[0] + 1
        else:
            documents += seqlen if node.n_segments is None else node.n_segments + 1
    return min(seqlen, -(-seqlen // size) + documents)


def tile_table(spans: Tensor, size: int, count: int) -> Tensor:
    """Tiles of rows with the columns they see: (first row, row to stop at, first column, column to stop at), int32.

    Args:
        spans: `(batch | 1, 2, seqlen)` of the rows.
        size: rows in a tile.
        count: tiles in the table, those left over being empty.
    """
    seqlen = spans.shape[2]
    t = torch.arange(seqlen, device=spans.device).expand(spans.shape[0], -1)
    first = torch.ones_like(t, dtype=torch.bool)
    first[:, 1:] = (spans[:, :, 1:] != spans[:, :, :-1]).any(1)
    begin = torch.where(first, t, 0).cummax(1).values
    following = torch.where(first, t, seqlen).flip(1).cummin(1).values.flip(1)
    end = torch.cat([following[:, 1:], torch.full_like(t[:, :1], seqlen)], 1)
    tiles = ((t - begin) % size == 0).cumsum(1)  # how many tiles have begun
    wanted = torch.arange(1, count + 1, device=spans.device).expand(spans.shape[0], -1).contiguous()
    at = torch.searchsorted(tiles, wanted)
    row, some = at.clamp_max(seqlen - 1), at < seqlen
    stop = torch.minimum(row + size, end.gather(1, row))
    table = torch.stack([row, torch.where(some, stop, row), *(x.gather(1, row) for x in spans.unbind(1))], 2)
    return table.to(torch.int32)
