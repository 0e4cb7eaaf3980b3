"""A term that is no scan, by tiles of pairs: Y, and each gradient, is one contraction in other roles.

`pairs.py` has the program for a CPU, `pairs_gpu.py` that for a GPU, which is called with the same.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import torch.nn.functional as F
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
    """A quadratic term on its tensors."""

    def __init__(self, term: Quadratic, x: Inputs, config: Config) -> None:
        super().__init__(x, config)
        self.term, self.on_gpu = term, self.machine.shared is not None

    def forward(self, save: bool = False) -> Output:
        """Y."""
        p = self.problem
        if not self.tokens:
            return Output(self.x.empty_output())
        factors = values(read(self.term.mask, p.seqlen), self.x.operands, p)
        mask = Mask.of(self.term, self.x, factors, packed)
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
            factors = values(read(self.term.mask, p.seqlen), {**own, **floats}, p)
        mask, dy = Mask.of(self.term, x, factors, packed), self.flat(cotangents.y)
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
        p, table = self.problem, self.table(mask)
        groups = p.nheads // self.walked(p.nheads // heads, p.nheads * table.shape[1])
        out = mask.room(self.tokens, groups, z.shape[2])
        self.pairs("", mask, table, (x, y, z), out, (p.batch, groups))
        out = out if groups == heads else out.unflatten(1, (heads, groups // heads)).sum(2)
        return out.unflatten(0, (p.batch, p.seqlen))

    def rows(self, mask: Mask, *tensors: Tensor) -> Tensor:
        """Σ_j G_ij per row, without and at the lag where nothing decays: [B, H, 2, T]."""
        p = self.problem
        out = mask.room(p.batch, p.nheads, 2, p.seqlen)
        return self.pairs(ROWS, mask, self.table(mask), tensors, out, (p.batch, p.nheads))

    def lags(self, mask: Mask, *tensors: Tensor) -> Tensor:
        """Σ G along each diagonal: [H, 2 T − 1]."""
        p, table = self.problem, self.table(mask)
        sums = min(self.parts(p.batch * p.nheads), table.shape[1])
        table = F.pad(table, (0, 0, 0, -table.shape[1] % sums))  # by tiles of nothing
        out = self.new(p.batch, p.nheads, sums, 2 * p.seqlen - 1).zero_()
        return self.pairs(LAGS, mask, table, tensors, out, (p.batch, p.nheads, sums)).sum((0, 2)).flip(1)  # which is by j − i

    def entries(self, mask: Mask, entries: Tensor, *tensors: Tensor) -> Tensor:
        """G summed over what shares an entry, shaped like entries."""
        p, (batch, heads) = self.problem, entries.shape[:2]
        out = self.new(batch, heads, p.seqlen, p.seqlen).zero_()
        table = self.table(mask)
        table = cut(table, self.parts(batch * heads * table.shape[1]), p.seqlen, self.chunk)
        return self.pairs(ENTRIES, mask, table, tensors, out, (batch, heads))

    def walked(self, sharing: int, programs: int) -> int:
        """How many of the heads that share a sum one program sums up: all, or on a GPU the most that leave enough programs.

        They are a batch row's: a row's bits are not to depend on how many rows there are.
        """
        if not self.on_gpu:
            return sharing
        able = [n for n in range(sharing, 1, -1) if sharing % n == 0 and programs // n >= self.enough]
        return able[0] if able else 1

    def parts(self, programs: int) -> int:
        """Into how many a program is cut, so that a GPU has enough of them."""
        return -(-self.enough // max(programs, 1)) if self.on_gpu else 1

    @property
    def enough(self) -> int:
        """Programs that keep a GPU busy."""
        return 2 * self.problem.target.multiprocessors

    def pairs(
        self, mode: str, mask: Mask, table: Tensor, tensors: tuple[Tensor, ...], out: Tensor, of: tuple[int, ...]
    ) -> Tensor:
        """Fill `out` by programs for so many batch rows, heads and tiles (or all); each sums over as many as there are."""
        p = self.problem
        of = of if len(of) == 3 else (*of, table.shape[1])
        x, y, z, *w = (t if t.ndim == 3 else self.flat(t) for t in tensors)
        sizes = x.shape[2], z.shape[2]
        inner, outer = self.machine.inner(sizes[0]), self.machine.beside(sizes[1])
        present = {LOGS: mask.u, SCALES: mask.rows if mask.cols is None else mask.cols, LAGS: mask.lags, ENTRIES: mask.entries}
        factors = tuple(name for name, value in present.items() if value is not None)
        program = self.program(
            "pairs_gpu" if self.on_gpu else "pairs", inner=inner, outer=outer, whole=(inner, outer) == sizes, mode=mode,
            factors=factors, formula=mask.formula, ahead=self.machine.pairs_ahead(inner, outer, self.chunk, not mode),
        )  # fmt: skip
        exact, token = torch.float64, (1, 1, 1)
        one = None if SCALES not in factors else torch.ones(1, p.nheads, p.seqlen, dtype=self.acc, device=self.device)
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
            x, y, z, w[0] if w else unread((1, 1, z.shape[2]), self.data, self.device), u, w_, rows, cols,
            self.whole(lags, (1, 1)), self.whole(mask.entries, (1, 1, 1, 1)), *leaves, table, out,
            there, bounds(mask, self.device), float(mask.scale), p.seqlen, p.nheads, *of, p.batch // of[0],
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
                mask.tables[size] = whole_rows(seqlen, size, self.device)
        return mask.tables[size]


def bounds(mask: Mask, device: torch.device) -> Tensor:
    """Low, high, hole and zero, and the ranges of rows and columns."""
    low, high, hole, *ranges = mask.support
    return on_device((low, high, FAR if hole is None else hole, mask.zero, *ranges), device)


@lru_cache(maxsize=256)
def on_device(numbers: tuple[int | None, ...], device: torch.device) -> Tensor:
    """Numbers, copied to a device once: a GPU would be waited for."""
    return torch.tensor(numbers, device=device)


@lru_cache(maxsize=64)
def whole_rows(seqlen: int, size: int, device: torch.device) -> Tensor:
    """The table of rows that are one document."""
    first = torch.arange(0, seqlen, size, device=device)
    ends = torch.zeros_like(first), torch.full_like(first, seqlen)
    return torch.stack([first, (first + size).clamp_max(seqlen), *ends], 1)[None]


def cut(table: Tensor, parts: int, seqlen: int, size: int) -> Tensor:
    """Every tile of a table as so many, with some of its columns each."""
    if parts == 1:
        return table
    width = -(-seqlen // (parts * size)) * size
    first = torch.arange(0, seqlen, width, device=table.device)[:, None]
    begin, stop = table[:, None, :, 2].maximum(first), table[:, None, :, 3].minimum(first + width)
    rows = table[:, None, :, :2].expand(-1, len(first), -1, -1)
    return torch.cat([rows, begin[..., None], stop[..., None]], 3).flatten(1, 2).contiguous()


def packed(decay: Tensor | None, log: Tensor | None, odd: Tensor | None, x: Inputs) -> Tensor:
    """Exponents, and how many logs are not finite (of those that are NaN, NaN): [B | 1, H, 2, T] in float64."""
    p, parts = x.problem, [t for t in (decay, log) if t is not None]
    none = torch.zeros(1, p.nheads, p.seqlen, dtype=torch.float64, device=x.q.device)
    total = sum(parts, none)
    none = none if odd is None else none + odd
    return torch.stack(torch.broadcast_tensors(total.nan_to_num(0.0), none + torch.where(total.isnan(), total, 0.0)), 2)
