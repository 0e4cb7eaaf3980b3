"""A term that is no scan on a CPU, by tiles of pairs (`pairs.py`): Y, and each gradient, is one contraction in other roles."""

from __future__ import annotations

import torch
from torch import Tensor

from ...ir import nodes as n
from ...ir.terms import Quadratic
from ..base import Config, Cotangents, Gradients, Inputs, Output
from ..quadratic.form import read
from ..quadratic.mask import Mask, factor_gradients
from ..quadratic.values import pull_back, tile_table, values
from .scan import Pass, unread
from .tile import ENTRIES, LAGS, LOGS, ROWS, SCALES

FAR = 1 << 40
"""A lag that no pair has."""


class OnPairs(Pass):
    """A quadratic term on tensors of a CPU."""

    def __init__(self, term: Quadratic, x: Inputs, config: Config) -> None:
        super().__init__(x, config)
        self.term = term

    def forward(self, save: bool = False) -> Output:
        """Y."""
        p = self.problem
        if not self.tokens:
            return Output(self.x.empty_output())
        factors = values(read(self.term.mask, p.seqlen, True), self.x.operands, p)
        mask = Mask.of(self.term, self.x, factors, packed, True)
        return Output(self.contract(mask, self.q, self.k, self.v, p.nheads))

    def backward(self, cotangents: Cotangents) -> Gradients:
        """Gradients of q, k, v, and of the operands through the mask's factors."""
        p, x = self.problem, self.x
        own = {name: x.operands[name] for name in n.operand_names(self.term.mask)}
        floats = {name: t.detach().requires_grad_() for name, t in own.items() if t.is_floating_point()}
        if not self.tokens:
            q, k, v = (torch.zeros_like(t, dtype=self.acc) for t in (x.q, x.k, x.v))
            return Gradients(q, k, v, operands={name: torch.zeros_like(t) for name, t in floats.items()})
        with torch.enable_grad():
            factors = values(read(self.term.mask, p.seqlen, True), {**own, **floats}, p)
        mask, dy = Mask.of(self.term, x, factors, packed, True), self.flat(cotangents.y)
        turned = mask.transposed()
        grads = Gradients(
            self.contract(mask, dy, self.v, self.k, p.q_heads),
            self.contract(turned, self.v, dy, self.q, p.k_heads),
            self.contract(turned, self.k, self.q, dy, p.v_heads),
        )
        if floats:
            found = factor_gradients(mask, factors, x, cotangents.y, self)
            grads.operands = dict(zip(floats, pull_back(factors, found, list(floats.values())), strict=True))
        return grads

    # --- what programs sum up ---------------------------------------------------------------------------------------------

    def contract(self, mask: Mask, x: Tensor, y: Tensor, z: Tensor, heads: int) -> Tensor:
        """scale · Σ_j L_ij ⟨x_i, y_j⟩ z_j, summed over the heads that share one of `heads`."""
        p = self.problem
        out = mask.room(self.tokens, heads, z.shape[2])
        self.pairs("", mask, (x, y, z), out, (p.batch, heads, self.table(mask).shape[1]))
        return out.unflatten(0, (p.batch, p.seqlen))

    def rows(self, mask: Mask, *tensors: Tensor) -> Tensor:
        """Σ_j G_ij per row, without and at the lag where nothing decays: [B, H, 2, T]."""
        p = self.problem
        out = mask.room(p.batch, p.nheads, 2, p.seqlen)
        return self.pairs(ROWS, mask, tensors, out, (p.batch, p.nheads, self.table(mask).shape[1]))

    def lags(self, mask: Mask, *tensors: Tensor) -> Tensor:
        """Σ G along each diagonal: [H, 2 T − 1]."""
        p = self.problem
        out = self.new(p.batch, p.nheads, 1, 2 * p.seqlen - 1).zero_()
        return self.pairs(LAGS, mask, tensors, out, (p.batch, p.nheads, 1))[:, :, 0].sum(0).flip(1)  # which is by j − i

    def entries(self, mask: Mask, entries: Tensor, *tensors: Tensor) -> Tensor:
        """G summed over what shares an entry, shaped like entries."""
        p, (batch, heads) = self.problem, entries.shape[:2]
        out = self.new(batch, heads, p.seqlen, p.seqlen).zero_()
        return self.pairs(ENTRIES, mask, tensors, out, (batch, heads, self.table(mask).shape[1]))

    def pairs(self, mode: str, mask: Mask, tensors: tuple[Tensor, ...], out: Tensor, of: tuple[int, int, int]) -> Tensor:
        """Fill `out` by programs for so many batch rows, heads and tiles, each of which sums over as many as there are."""
        p, table = self.problem, self.table(mask)
        x, y, z, *w = (t if t.ndim == 3 else self.flat(t) for t in tensors)
        sizes = x.shape[2], z.shape[2]
        inner, outer = (self.machine.inner(size) for size in sizes)
        present = {LOGS: mask.u, SCALES: mask.rows if mask.cols is None else mask.cols, LAGS: mask.lags, ENTRIES: mask.entries}
        factors = tuple(name for name, value in present.items() if value is not None)
        program = self.program(
            "pairs", inner=inner, outer=outer, whole=(inner, outer) == sizes, mode=mode, factors=factors,
            formula=mask.formula,
        )  # fmt: skip
        exact, token = torch.float64, (1, 1, 1)
        one = None if SCALES not in factors else torch.ones(1, p.nheads, p.seqlen, dtype=self.acc)
        u, w_ = (unread((1, 1, 2, 1), exact, self.device) if t is None else t for t in (mask.u, mask.w))
        rows, cols = (self.whole(one if t is None else t, token) for t in (mask.rows, mask.cols))
        lags = None if mask.lags is None else mask.lags.flip(1)
        by_lag = None if mask.leaf_lags is None else mask.leaf_lags.flip(2)
        leaves = [
            unread((1,) * rank, exact, self.device) if t is None else t.contiguous()
            for t, rank in ((mask.leaf_rows, 4), (mask.leaf_cols, 4), (by_lag, 3))
        ]
        there = self.unread(1) if mode in ("", ROWS) else out
        program(
            x, y, z, w[0] if w else self.unread(1, 1, z.shape[2]), u, w_, rows, cols, self.whole(lags, (1, 1)),
            self.whole(mask.entries, (1, 1, 1, 1)), *leaves, table, out,
            there, self.bounds(mask), float(mask.scale), p.seqlen, p.nheads, *of, p.batch // of[0],
            p.nheads // of[1], table.shape[1] // of[2],
        )  # fmt: skip
        return out

    def whole(self, x: Tensor | None, shape: tuple[int, ...]) -> Tensor:
        """A factor as programs read it; what stands for one that there is not."""
        return self.unread(*shape) if x is None else x.to(self.acc).contiguous()

    def table(self, mask: Mask) -> Tensor:
        """The rows and columns of each tile, `[batch | 1, tiles, 4]`."""
        size, seqlen = self.chunk, self.problem.seqlen
        if size not in mask.tables:
            if mask.documents is not None:
                mask.tables[size] = tile_table(mask.documents[0], size, mask.count(size)).long().contiguous()
            else:
                first = torch.arange(0, seqlen, size)
                whole = torch.tensor([0, seqlen]).expand(len(first), 2)
                stop = (first + size).clamp_max(seqlen)
                mask.tables[size] = torch.cat([torch.stack([first, stop], 1), whole], 1)[None]
        return mask.tables[size]

    @staticmethod
    def bounds(mask: Mask) -> Tensor:
        """Low, high, hole and zero, and the ranges of rows and columns."""
        low, high, hole, *ranges = mask.support
        return torch.tensor([low, high, FAR if hole is None else hole, mask.zero, *ranges])


def packed(decay: Tensor | None, log: Tensor | None, odd: Tensor | None, x: Inputs) -> Tensor:
    """Exponents, and how many logs are not finite (of those that are NaN, NaN): [B | 1, H, 2, T] in float64."""
    p, parts = x.problem, [t for t in (decay, log) if t is not None]
    none = torch.zeros(1, p.nheads, p.seqlen, dtype=torch.float64)
    total = sum(parts, none)
    none = none if odd is None else none + odd
    return torch.stack(torch.broadcast_tensors(total.nan_to_num(0.0), none + torch.where(total.isnan(), total, 0.0)), 2)
