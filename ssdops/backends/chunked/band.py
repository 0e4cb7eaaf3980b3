"""Bands: windows, alone or times a scan, by blocks of rows against the columns that their band reaches.

A block of C rows meets C + left + right columns, so time and memory are linear in seqlen, whatever the decay. Exponents are
sums of logs between two tokens of a block, and never positive where decays are not.

Shapes: R rows (batch rows or documents), M blocks of a span, C tokens of a block, S = C + left + right columns that it meets,
h heads of an operand, G distinct score heads, H heads, N dstate, P headdim.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import pad

from ...ir.passes.structure import Structure
from ...ir.problem import Problem, common_heads
from ...ir.resolve import reduce_to, repeat_heads
from ..base import Work, exponent_dtype
from ..rows import Rows
from ..scan import exponents
from ..structured import Values
from .parts import Slices

ELEMENTS = 2**19
"""Entries of L, over all rows and heads, that a span aims at: they stay in cache, and the cost of calls is hidden."""


def reach(structure: Structure, length: int) -> tuple[int, int]:
    """How many tokens before and after a block its rows see."""
    assert structure.low is not None and structure.high is not None  # it is a band
    most = max(length - 1, 0)
    return min(max(structure.high, 0), most), min(max(-structure.low, 0), most)


def band_work(structure: Structure, p: Problem, size: int) -> Work:
    """What a forward pass costs: all of C × S of each block, though the band is less."""
    left, right = reach(structure, p.seqlen)
    tokens, span = float(p.batch * p.seqlen), min(size, max(p.seqlen, 1)) + left + right
    flops = 2 * tokens * span * (p.dstate * common_heads(p) + p.headdim * p.nheads)
    elements = tokens * span * p.nheads * (14 if structure.scan.decays or structure.scan.log_cols else 4)
    spans = max(tokens * p.nheads * span / ELEMENTS, 1.0)
    return Work(flops, elements, 8 * tokens * p.nheads * (p.headdim + p.dstate), 15.0 + 80 * spans)


class Band:
    """A banded term over its rows."""

    def __init__(self, structure: Structure, values: Values, size: int) -> None:
        x = values.scan
        p = x.problem
        self.term, self.problem, self.values = structure.scan, p, values
        assert structure.low is not None and structure.high is not None  # it is a band
        self.low, self.high = structure.low, structure.high
        self.rows = Rows(x.spans, p.batch, p.seqlen, structure.scan.causal, x.q.device)
        self.left, self.right = reach(structure, self.rows.length)
        self.size = max(min(size, self.rows.length), 1)
        self.scale = structure.scan.sign * x.scale
        self.lags = self._lags()

    @property
    def width(self) -> int:
        """S."""
        return self.size + self.left + self.right

    def _lags(self) -> Tensor:
        """i − j in local time, [C, S]."""
        at = partial(torch.arange, device=self.values.scan.q.device)
        return at(self.size)[:, None] + self.left - at(self.width)

    def parts(self) -> Iterator[Span]:
        """Spans of blocks, in local time; none where the band is empty."""
        t0, length = 0, self.rows.length if self.low <= self.high else 0
        while t0 < length:
            block = self.rows.alive(max(t0 - self.left, 0)) * self.problem.nheads * self.size * self.width
            blocks = max(ELEMENTS // max(block, 1), 1)
            blocks = min(blocks, -(-(length - t0) // self.size))
            yield Span(self, t0, blocks)
            t0 += blocks * self.size


class Span:
    """M blocks of a band: rows [t0, t1) against the columns [a, b) around them."""

    def __init__(self, band: Band, t0: int, blocks: int) -> None:
        self.band, self.t0, self.blocks, length = band, t0, blocks, band.rows.length
        self.t1 = min(t0 + blocks * band.size, length)
        self.a, self.b = max(t0 - band.left, 0), min(self.t1 + band.right, length)

    def read(self, name: str, x: Tensor) -> Tensor:
        """[R, b − a, h, …]; of Y's cotangent, its own rows."""
        if name == "y":
            return self.band.rows.read(x, self.t0, self.t1)
        p = self.band.problem
        return self.band.rows.read(x.expand(p.batch, p.seqlen, *x.shape[2:]), self.a, self.b)

    def add(self, name: str, total: Tensor, piece: Tensor) -> None:
        """Neighbouring spans read some of the same columns: what they give is added."""
        rows = self.band.rows
        if name == "y":
            rows.write(total, piece, self.t0, self.t1)
            return
        p = self.band.problem
        if total.shape[:2] == (p.batch, p.seqlen):
            rows.write(total, rows.read(total, self.a, self.b) + piece, self.a, self.b)
            return
        whole = torch.zeros(p.batch, p.seqlen, *total.shape[2:], dtype=total.dtype, device=total.device)
        rows.write(whole, piece, self.a, self.b)
        total += reduce_to(whole, total.shape, 2)

    def output(self, x: Slices) -> Tensor:
        """Y of the rows, [R, t1 − t0, H, P]."""
        band, p = self.band, self.band.problem
        acc, heads = p.accumulate, common_heads(p)
        q = repeat_heads(self._blocks(x["q"].to(acc)), heads, 3).transpose(2, 3)  # [R, M, G, C, N]
        k = repeat_heads(self._columns(x["k"].to(acc)), heads, 2)  # [R, M, G, N, S]
        v = repeat_heads(self._columns(self._scaled(x)), p.nheads, 2)  # [R, M, H, P, S]
        scores = (q @ k)[:, :, :, None]  # [R, M, G, 1, C, S]
        weights = self._weights(x)
        if weights is not None:
            scores = scores * weights.unflatten(2, (heads, -1))
        scores = torch.where(self._inside()[:, None, None], scores, 0.0)
        scores = scores.expand(-1, -1, -1, p.nheads // heads, -1, -1).flatten(2, 3)  # [R, M, H, C, S]
        y = (scores @ v.transpose(3, 4)).transpose(2, 3).flatten(1, 2)  # [R, M·C, H, P]
        y = y[: band.rows.alive(self.t0), : self.t1 - self.t0]
        if (u := x.get("rows")) is not None:
            at = slice(self.t0 - self.a, self.t1 - self.a)
            y = y * repeat_heads(u.to(acc)[: len(y), at], p.nheads, 2)[..., None]
        return y if band.scale == 1.0 else y * band.scale

    def _scaled(self, x: Slices) -> Tensor:
        """v with its column scales."""
        p, v = self.band.problem, x["v"].to(self.band.problem.accumulate)
        if (w := x.get("cols")) is None:
            return v
        return repeat_heads(v, p.nheads, 2) * repeat_heads(w.to(v.dtype), p.nheads, 2)[..., None]

    def _padded(self, x: Tensor) -> Tensor:
        """[R, b − a, …] with zeros where blocks reach past either end: [R, left + M·C + right, …]."""
        band = self.band
        before = band.left - (self.t0 - self.a)
        after = band.left + self.blocks * band.size + band.right - before - x.shape[1]
        return pad(x, (0, 0) * (x.ndim - 2) + (before, after)) if before or after else x

    def _columns(self, x: Tensor) -> Tensor:
        """What each block meets, [R, M, h, …, S], a view of the padded columns."""
        return self._padded(x).unfold(1, self.band.width, self.band.size)

    def _blocks(self, x: Tensor) -> Tensor:
        """What each block has, [R, M, C, h, …]."""
        band = self.band
        return self._padded(x).narrow(1, band.left, self.blocks * band.size).unflatten(1, (self.blocks, band.size))

    def _weights(self, x: Slices) -> Tensor | None:
        """exp(ρ_i − κ_j + log_cols_j) in the band, [R, M, H, C, S]; None where nothing decays."""
        band, p = self.band, self.band.problem
        exact, inside = exponent_dtype(p), self._inside()[:, None]
        exponent: Tensor | None = None
        if (log_a := x.get("log_a")) is not None:
            rho, kappa, _ = exponents(band.term, repeat_heads(log_a.to(exact), p.nheads, 2))
            # pairs with no decay between their tokens do not move with it: their share of its gradient would be rounding
            moves = inside & (band.lags > int(band.term.col_inclusive and not band.term.row_inclusive))
            (row, row_rest), (col, col_rest) = (self._split(t) for t in (rho, kappa))
            exponent = self._blocks(row).transpose(2, 3)[..., None] - self._columns(col)[..., None, :]
            if row_rest is not None and col_rest is not None:
                exponent = exponent + (
                    self._blocks(row_rest).transpose(2, 3)[..., None] - self._columns(col_rest)[..., None, :]
                )
            exponent = torch.where(moves, exponent, 0.0)
        if (log_cols := x.get("log_cols")) is not None:
            late = self._columns(repeat_heads(log_cols.to(p.accumulate), p.nheads, 2))[..., None, :]
            exponent = torch.where(inside, late if exponent is None else exponent + late, 0.0)
        return None if exponent is None else exponent.exp()

    def _split(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """x as a sum of two in the accumulation dtype, so that differences keep digits without float64 matrices."""
        acc = self.band.problem.accumulate
        if x.dtype == acc:
            return x, None
        high = x.to(acc)  # the gradient goes through this one alone
        return high, (x.detach() - high.detach()).to(acc)

    def _inside(self) -> Tensor:
        """Where rows and columns of a block meet in the band, and both exist, [M, C, S]."""
        band = self.band
        lags = band.lags
        inside = (lags >= band.low) & (lags <= band.high)
        inside = inside & (lags != 0) if band.term.strict else inside
        first = self.t0 + band.size * torch.arange(self.blocks, device=lags.device)[:, None] - band.left
        columns = first + torch.arange(band.width, device=lags.device)
        return inside & ((columns >= 0) & (columns < band.rows.length))[:, None]
