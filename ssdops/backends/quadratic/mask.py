"""A mask by tiles as programs are called with it, and the gradients of its factors by what programs sum up."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields, replace
from typing import Protocol, TypeAlias

import torch
from torch import Tensor

from ...ir.problem import Problem
from ...ir.terms import Quadratic
from ..base import Inputs
from .form import read
from .formula import Expr, Leaf, derivative, turned
from .values import Values, spans, tile_count, tile_table

Packed: TypeAlias = "Callable[[Tensor | None, Tensor | None, Tensor | None, Inputs], Tensor]"
"""How a backend takes exponents: of decays, further ones, how many logs are not finite, `(batch | 1, nheads, …, seqlen)`."""


@dataclass(frozen=True)
class Mask:
    """The factors as programs read them, for L or for its transpose.

    Attributes:
        support: (low, high, hole, first row, row to stop at, first column, column to stop at).
        u, w: exponents of rows and of columns, as a backend packs them.
        documents: for rows and for columns, what they share a document with; the tiles follow them.
        count: of tiles, given their size.
        formula: a further factor of leaves at rows, columns and lags.
        tables: of tiles, by their size, once they have been asked for.
    """

    problem: Problem
    device: torch.device
    scale: float
    support: tuple[int | None, ...]
    zero: int
    u: Tensor | None
    w: Tensor | None
    rows: Tensor | None
    cols: Tensor | None
    lags: Tensor | None
    entries: Tensor | None
    documents: tuple[Tensor, Tensor] | None
    count: Callable[[int], int]
    formula: Expr = None
    leaf_rows: Tensor | None = None
    leaf_cols: Tensor | None = None
    leaf_lags: Tensor | None = None
    tables: dict[int, Tensor] = field(default_factory=dict)

    @staticmethod
    def of(term: Quadratic, x: Inputs, factors: Values, packed: Packed) -> Mask:
        """The mask of a term, from its factors."""
        p, form = x.problem, read(term.mask, x.problem.seqlen)
        f = Values(**{s.name: None if (t := getattr(factors, s.name)) is None else t.detach() for s in fields(Values)})
        exponents = [f.decay_rows, f.decay_cols, f.log_rows, f.log_cols]
        some = any(t is not None for t in exponents)
        rows, cols, lags = (None if t is None else t.contiguous() for t in (f.rows, f.cols, f.lags))
        return Mask(
            p, x.q.device, x.scale * form.sign, (form.low, form.high, form.hole, *form.rows, *form.cols),
            p.seqlen if form.zero is None else form.zero,  # a lag that no pair has
            packed(f.decay_rows, f.log_rows, f.odd_rows, x) if some else None,
            packed(f.decay_cols, f.log_cols, f.odd_cols, x) if some else None,
            rows, cols, lags, f.entries,
            spans(form, x.operands, p.seqlen), lambda size: tile_count(form, x.operands, p.seqlen, size),
            form.formula, f.leaf_rows, f.leaf_cols, f.leaf_lags,
        )  # fmt: skip

    def room(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """Memory for what is written by tiles of rows; zeros where ids that are not sorted may leave rows out."""
        make = torch.empty if self.documents is None else torch.zeros
        return make(shape, dtype=dtype or self.problem.accumulate, device=self.device)

    def transposed(self) -> Mask:
        """The transpose."""
        low, high, hole, *ranges = self.support
        assert low is not None and high is not None
        return replace(
            self,
            support=(-high, -low, None if hole is None else -hole, *ranges[2:], *ranges[:2]),
            zero=self.problem.seqlen if self.zero == self.problem.seqlen else -self.zero,
            u=self.w, w=self.u, rows=self.cols, cols=self.rows,
            lags=None if self.lags is None else self.lags.flip(1),
            entries=None if self.entries is None else self.entries.transpose(2, 3),
            documents=None if self.documents is None else (self.documents[1], self.documents[0]),
            formula=turned(self.formula), leaf_rows=self.leaf_cols, leaf_cols=self.leaf_rows,
            leaf_lags=None if self.leaf_lags is None else self.leaf_lags.flip(2), tables={},
        )  # fmt: skip

    def table(self, size: int) -> tuple[Tensor | None, int, int]:
        """(table, its stride over batch, tiles) of rows in tiles of a size."""
        if self.documents is None:
            return None, 0, -(-self.problem.seqlen // size)
        if size not in self.tables:
            self.tables[size] = tile_table(self.documents[0], size, self.count(size))
        table = self.tables[size]
        return table, strides(table)[0], table.shape[1]


def strides(x: Tensor) -> tuple[int, ...]:
    """Strides, 0 along the batch if there is one for all rows."""
    return (x.stride(0) if x.shape[0] > 1 else 0, *x.stride()[1:])


class Sums(Protocol):
    """What G = L ∘ (QKᵀ) ∘ (dY Vᵀ) sums up to, for tensors (q, k, dy, v)."""

    def rows(self, mask: Mask, *tensors: Tensor) -> Tensor:
        """Per row, without and at the lag where nothing decays: [B, H, 2, T]."""
        ...

    def lags(self, mask: Mask, *tensors: Tensor) -> Tensor:
        """Along each diagonal: [1 | H, 2 T − 1]."""
        ...

    def entries(self, mask: Mask, entries: Tensor, *tensors: Tensor) -> Tensor:
        """Over what shares an entry, shaped like entries."""
        ...


def factor_gradients(mask: Mask, factors: Values, x: Inputs, dy: Tensor, sums: Sums) -> Values:
    """Gradients of the factors that need one, each from dL = dY Vᵀ ∘ QKᵀ without forming it (entries apart)."""
    wanted = {f.name for f in fields(Values) if getattr(getattr(factors, f.name), "requires_grad", False)}
    out = Values()
    sides = (("rows", mask, (x.q, x.k, dy, x.v)), ("cols", mask.transposed(), (x.k, x.q, x.v, dy)))
    for side, m, tensors in sides:
        if not wanted & {f"decay_{side}", f"log_{side}", side}:
            continue
        apart, at_zero = sums.rows(replace(m, rows=None), *tensors).unbind(2)  # [B, H, T]
        own = 1.0 if m.rows is None else m.rows
        setattr(out, side, apart + at_zero)
        setattr(out, f"decay_{side}", apart * own)
        setattr(out, f"log_{side}", (apart + at_zero) * own)
    for side, m, tensors in sides:
        if f"leaf_{side}" in wanted:
            found = [sums.rows(of, *tensors).sum(2) for of in _derivatives(m, "row", getattr(factors, f"leaf_{side}"))]
            setattr(out, f"leaf_{side}", torch.stack(found, 2))
    if "leaf_lags" in wanted:
        tensors = (x.q, x.k, dy, x.v)
        out.leaf_lags = torch.stack([sums.lags(of, *tensors) for of in _derivatives(mask, "lag", factors.leaf_lags)], 1)
    if "lags" in wanted:
        out.lags = sums.lags(replace(mask, lags=None), x.q, x.k, dy, x.v)
    if "entries" in wanted and factors.entries is not None:
        out.entries = sums.entries(replace(mask, entries=None), factors.entries, x.q, x.k, dy, x.v)
    return Values(**{name: getattr(out, name) for name in wanted})


def _derivatives(mask: Mask, kind: str, leaves: Tensor | None) -> Iterator[Mask]:
    """The mask with the derivative of its formula in the place of it, for each leaf of a kind."""
    assert leaves is not None  # else it would not want a gradient
    for index in range(leaves.shape[-2]):
        yield replace(mask, formula=derivative(mask.formula, Leaf(kind, index)))
