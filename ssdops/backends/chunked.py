"""The block decomposition of Mamba-2 (Dao & Gu 2024, section 6) in plain torch: quadratic inside chunks, recurrent between.

Chunk by chunk, with the state in hand, so that nothing grows with seqlen but the output. Heads of a group share q and k:
their scores are computed once, and their states lie side by side as columns [N, heads · P] of one matrix, so that what
enters and what leaves a chunk are single large matmuls, and gradients of shared q and k are summed over heads inside them.

Shapes: R rows still running, C tokens of the chunk, G distinct score heads, r = H/G heads sharing them, N dstate, P headdim.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil

import torch
from torch import Tensor

from ..ir.problem import Problem, common_heads
from ..ir.resolve import reduce_to, repeat_heads
from ..ir.terms import Diagonal, Linear, Term
from .base import Config, Gradients, Inputs, Support, Work, exponent_dtype, reduce_value, reject_scan
from .rows import Rows
from .scan import diagonal_backward, diagonal_forward, exponent_gradient, exponents

SIZES = (64, 32, 128, 256)
"""Chunk sizes to consider, the default first."""


class Chunked:
    """The block form of the contraction."""

    name = "chunked"

    def supports(self, term: Term, problem: Problem) -> Support:
        """Any scan with scalar decay, and diagonals."""
        if isinstance(term, Linear) and term.channel is not None:
            return Support.no("'chunked' has scalar decays only, and this one is per channel; 'recurrent' and 'naive' run it")
        return reject_scan(term, self.name) or Support.yes()

    def configs(self, term: Term, problem: Problem) -> tuple[Config, ...]:
        """Chunk sizes; on a GPU longer chunks, as every chunk is a round of launches."""
        if isinstance(term, Diagonal):
            return (Config(),)
        sizes = SIZES if problem.target.device == "cpu" else tuple(sorted(SIZES, reverse=True))
        return tuple(Config(size) for size in sizes)

    def work(self, term: Term, problem: Problem, config: Config) -> Work:
        """Linear in seqlen; the scores of a chunk once per group, everything else once per head."""
        p, size = problem, config.chunk_size or SIZES[0]
        tokens = float(p.batch * p.seqlen)
        if isinstance(term, Diagonal):
            touched = tokens * p.nheads * (p.headdim + p.dstate)
            return Work(0.0, 3 * touched, 8 * touched, 6.0)
        scores = 2 * size * p.dstate * common_heads(p)
        per_head = 2 * size * p.headdim + 4 * p.dstate * p.headdim
        chunks = ceil(p.seqlen / size) if p.seqlen else 0
        return Work(
            tokens * (scores + p.nheads * per_head),
            tokens * p.nheads * (4 * size + 4 * p.headdim),
            4 * tokens * (p.q_heads * p.dstate + p.k_heads * p.dstate + 2 * p.nheads * p.headdim),
            25.0 * chunks,
        )

    def forward(self, term: Term, x: Inputs, config: Config) -> tuple[Tensor, Tensor | None]:
        """One chunk after another."""
        if isinstance(term, Diagonal):
            return diagonal_forward(term, x), None
        assert isinstance(term, Linear)  # supports() refuses the rest
        scan, p = _Scan(term, x, config), x.problem
        y = torch.zeros(p.batch, p.seqlen, p.nheads, p.headdim, dtype=p.accumulate, device=x.q.device)
        state = scan.initial()
        for t0, t1 in scan.tiles():
            tile = scan.tile(t0, t1)
            scan.rows.write(y, scan.output(tile, state[: tile.rows]), t0, t1)
            scan.update_(tile, state[: tile.rows])
        return y, scan.leave(state)

    def backward(self, term: Term, x: Inputs, config: Config, dy: Tensor, dstate: Tensor | None) -> Gradients:
        """Forward again for the states at chunk starts, then back over the chunks with the state's cotangent in hand."""
        if isinstance(term, Diagonal):
            return diagonal_backward(term, x, dy)
        assert isinstance(term, Linear)  # supports() refuses the rest
        scan = _Scan(term, x, config)
        return _backward(scan, dy, dstate)


@dataclass(frozen=True)
class _Tile:
    """One chunk of every row still running."""

    rows: int  # R
    q: Tensor  # [R, G, C, N]
    k: Tensor  # [R, G, C, N]
    v: Tensor  # [R, H, C, P]
    rho: Tensor | None  # [R, C, H]: None where nothing decays
    kappa: Tensor | None
    total: Tensor | None  # [R, H]
    u: Tensor | None  # [R, C, H]
    w: Tensor | None


class _Scan:
    """A linear term over its rows, in chunks."""

    def __init__(self, term: Linear, x: Inputs, config: Config) -> None:
        p = x.problem
        self.term, self.x = term, x
        self.rows = Rows(x.spans, p.batch, p.seqlen, term.causal, x.q.device)
        self.size = config.chunk_size or SIZES[0]
        self.groups = common_heads(p)
        self.shared = p.nheads // self.groups
        self.acc, self.exact = p.accumulate, exponent_dtype(p)
        self.scale = term.sign * x.scale
        self._slots = {name: x.per_head(name) for name in x.values}

    def tiles(self) -> list[tuple[int, int]]:
        """[t0, t1) of each chunk, in local time."""
        return self.rows.tiles(self.size)

    # --- states: [R, G, N, r·P] here, [R, H, P, N] outside -----------------------------------------------------------

    def initial(self) -> Tensor:
        """A fresh state for every row."""
        p = self.x.problem
        if self.x.initial is None:
            shape = (self.rows.count, self.groups, p.dstate, self.shared * p.headdim)
            return torch.zeros(shape, dtype=self.acc, device=self.x.q.device)
        return self.inward(self.x.initial)

    def inward(self, states: Tensor) -> Tensor:
        """States as users have them → states by row, heads side by side."""
        states = self.rows.enter(states).to(self.acc).unflatten(1, (self.groups, self.shared))
        return states.permute(0, 1, 4, 2, 3).flatten(3).clone(memory_format=torch.contiguous_format)

    def leave(self, states: Tensor) -> Tensor:
        """The inverse of `inward`."""
        wide = states.unflatten(3, (self.shared, self.x.problem.headdim))  # [R, G, N, r, P]
        return self.rows.leave(wide.permute(0, 1, 3, 4, 2).flatten(1, 2).contiguous(), self.rows.count)

    # --- reading --------------------------------------------------------------------------------------------------

    def tile(self, t0: int, t1: int) -> _Tile:
        """Chunk [t0, t1), in the accumulation dtype, heads before time."""
        slots = {name: self.rows.read(s, t0, t1) for name, s in self._slots.items() if s is not None}
        q, k = (self.by_head(self.rows.read(t, t0, t1), self.groups) for t in (self.x.q, self.x.k))
        v = self.by_head(self.rows.read(self.x.v, t0, t1), self.x.problem.nheads)
        rho = kappa = total = None
        if "log_a" in slots:
            rho, kappa, total = exponents(self.term, slots["log_a"].to(self.exact))
        if "log_cols" in slots:
            z = slots["log_cols"].to(self.exact)
            rho, total = (torch.zeros_like(z), torch.zeros_like(z[:, 0])) if rho is None else (rho, total)
            kappa = -z if kappa is None else kappa - z
        u, w = (slots[s].to(self.acc) if s in slots else None for s in ("rows", "cols"))
        return _Tile(len(q), q, k, v, rho, kappa, total, u, w)

    def by_head(self, x: Tensor, heads: int) -> Tensor:
        """[R, C, h, D] → [R, heads, C, D]."""
        return repeat_heads(x.to(self.acc).transpose(1, 2), heads, 1)

    def wide(self, x: Tensor, weight: Tensor | None) -> Tensor:
        """weight · x with heads side by side: [R, H, C, P] and [R, C, H] → [R, G, C, r·P]."""
        grouped = x.unflatten(1, (self.groups, self.shared)).transpose(2, 3)  # [R, G, C, r, P]
        if weight is None:
            return grouped.flatten(3)
        weight = weight.to(self.acc).unflatten(2, (self.groups, self.shared)).transpose(1, 2)  # [R, G, C, r]
        out = torch.empty(grouped.shape, dtype=x.dtype, device=x.device)
        return torch.mul(grouped, weight[..., None], out=out).flatten(3)

    def narrow(self, x: Tensor) -> Tensor:
        """[R, G, C, r·P] → [R, C, H, P], a view."""
        return x.unflatten(3, (self.shared, self.x.problem.headdim)).transpose(1, 2).flatten(2, 3)

    # --- one chunk ------------------------------------------------------------------------------------------------

    def decays(self, tile: _Tile) -> Tensor | None:
        """exp(ρ_i − κ_j), [R, H, C, C]; meaningless above the diagonal."""
        if tile.rho is None or tile.kappa is None:
            return None
        rho, kappa = tile.rho.transpose(1, 2), tile.kappa.transpose(1, 2)
        shape = (*rho.shape, kappa.shape[2])
        out = torch.empty(shape, dtype=self.acc, device=rho.device)
        # above the diagonal the exponent may be positive and overflow: the caller selects what lies below
        return torch.sub(rho[..., None], kappa[:, :, None], out=out).exp_()

    def masked_scores(self, tile: _Tile, decays: Tensor | None) -> Tensor:
        """(L ∘ QKᵀ) of the chunk, column scales left to v, [R, H, C, C]."""
        scores = tile.q @ tile.k.transpose(2, 3)  # [R, G, C, C]
        if decays is None:
            return self.lower(repeat_heads(scores, self.x.problem.nheads, 1).contiguous())
        grouped = decays.unflatten(1, (self.groups, self.shared))
        return self.lower((grouped * scores[:, :, None]).flatten(1, 2))

    def lower(self, x: Tensor) -> Tensor:
        """x with what lies above the diagonal (and on it, if strict) put to zero, in place."""
        return x.tril_(-1 if self.term.strict else 0)

    def columns(self, tile: _Tile) -> Tensor:
        """w · v, [R, H, C, P]."""
        return tile.v if tile.w is None else tile.v * tile.w.transpose(1, 2)[..., None]

    def output(self, tile: _Tile, state: Tensor) -> Tensor:
        """Y of the chunk from its own tokens and from the state before it, [R, C, H, P]."""
        inside = (self.masked_scores(tile, self.decays(tile)) @ self.columns(tile)).transpose(1, 2)
        across = self.narrow(tile.q @ state)
        if tile.rho is None:
            y = inside + across
        else:
            y = torch.addcmul(inside, across, tile.rho.exp().to(self.acc)[..., None])
        if tile.u is not None:
            y *= tile.u[..., None]
        return y if self.scale == 1.0 else y.mul_(self.scale)

    def leaving(self, tile: _Tile) -> Tensor | None:
        """exp(E − κ_j) · w_j: what remains of token j after the chunk, [R, C, H]."""
        if tile.total is None or tile.kappa is None:
            return tile.w
        left = (tile.total[:, None] - tile.kappa).exp().to(self.acc)
        return left if tile.w is None else left * tile.w

    def decay_state_(self, tile: _Tile, state: Tensor) -> None:
        """state ← exp(E) · state."""
        if tile.total is not None:
            factor = tile.total.exp().to(self.acc).unflatten(1, (self.groups, self.shared))
            state.unflatten(3, (self.shared, -1)).mul_(factor[:, :, None, :, None])

    def update_(self, tile: _Tile, state: Tensor) -> None:
        """state ← exp(E) · state + Kᵀ (leaving ∘ V)."""
        self.decay_state_(tile, state)
        state += tile.k.transpose(2, 3) @ self.wide(tile.v, self.leaving(tile))


def _backward(scan: _Scan, dy: Tensor, dstate: Tensor | None) -> Gradients:
    x, p, acc = scan.x, scan.x.problem, scan.acc
    starts, state = [], scan.initial()
    for t0, t1 in scan.tiles():
        starts.append(state.clone())
        tile = scan.tile(t0, t1)
        scan.update_(tile, state[: tile.rows])
    dstates = torch.zeros_like(state) if dstate is None else scan.inward(dstate)

    def empty(*shape: int) -> Tensor:
        return torch.zeros(p.batch, p.seqlen, *shape, dtype=acc, device=dy.device)

    out = Gradients(empty(p.q_heads, p.dstate), empty(p.k_heads, p.dstate), empty(p.v_heads, p.headdim))
    values = {slot: empty(p.nheads) for slot in x.values}
    for (t0, t1), start in zip(reversed(scan.tiles()), reversed(starts), strict=True):
        tile = scan.tile(t0, t1)
        g = scan.by_head(scan.rows.read(dy, t0, t1), p.nheads)
        end, rows = state, tile.rows  # the state after this chunk
        grads = _chunk_gradients(scan, tile, g, start[:rows], end[:rows], dstates[:rows])
        for name, total in (("q", out.q), ("k", out.k), ("v", out.v)):
            grad = grads[name].transpose(1, 2)  # [R, C, heads, D]
            shared = reduce_to(grad, (*grad.shape[:2], total.shape[2], grad.shape[3]), 2)
            scan.rows.write(total, shared, t0, t1)
        for slot, total in values.items():
            scan.rows.write(total, grads[slot], t0, t1)
        state = start
    out.values = {slot: reduce_value(total, x.values[slot]) for slot, total in values.items()}
    out.initial = None if x.initial is None else scan.leave(dstates)
    return out


def _chunk_gradients(
    scan: _Scan, tile: _Tile, g: Tensor, start: Tensor, end: Tensor, dstate: Tensor
) -> dict[str, Tensor]:
    """Gradients of one chunk; `dstate`, the cotangent of its end state, becomes that of its start state, in place.

    Args:
        g: the cotangent of Y [R, H, C, P].
        start, end: the states before and after the chunk [R, G, N, r·P].
    """
    out: dict[str, Tensor] = {}
    g = g if scan.scale == 1.0 else g * scan.scale
    gu = g if tile.u is None else g * tile.u.transpose(1, 2)[..., None]
    wv = scan.columns(tile)
    entering = None if tile.rho is None else tile.rho.exp().to(scan.acc)  # [R, C, H]
    leaving = scan.leaving(tile)
    # inside the chunk
    decays = scan.decays(tile)
    scores = scan.masked_scores(tile, decays)  # [R, H, C, C]
    dmasked = scan.lower(gu @ wv.transpose(2, 3))  # d(L ∘ QKᵀ)
    change = scores * dmasked  # [R, H, C, C]: what ρ_i and κ_j feel
    dscores = dmasked if decays is None else scan.lower(dmasked * decays)
    dscores = dscores.unflatten(1, (scan.groups, scan.shared)).sum(2)  # [R, G, C, C]
    dwv = scores.transpose(2, 3) @ gu
    # through the states on both sides
    g_in = scan.wide(gu, entering)  # [R, G, C, r·P]
    read = scan.narrow(tile.q @ start)  # [R, C, H, P]
    v_out = scan.wide(tile.v, leaving)
    kept = scan.narrow(tile.k @ dstate)  # [R, C, H, P]
    out["q"] = dscores @ tile.k + g_in @ start.transpose(2, 3)
    out["k"] = dscores.transpose(2, 3) @ tile.q + v_out @ dstate.transpose(2, 3)
    drho = change.sum(3).transpose(1, 2) + (scan.narrow(g_in) * read).sum(3)  # [R, C, H]
    dkappa = -(change.sum(2).transpose(1, 2) + (scan.narrow(v_out) * kept).sum(3))
    dv = dwv.transpose(1, 2) * tile.w[..., None] if tile.w is not None else dwv.transpose(1, 2)
    out["v"] = (dv + (kept if leaving is None else kept * leaving[..., None])).transpose(1, 2)
    if tile.total is not None:
        wide = (dstate * end).unflatten(3, (scan.shared, -1)).sum((2, 4)).flatten(1)  # [R, H]: ⟨dS, S⟩
        out["log_a"] = exponent_gradient(scan.term, drho, dkappa, wide)
    out["log_cols"] = -dkappa
    if tile.u is not None:
        across = read if entering is None else read * entering[..., None]
        y = (scores @ wv).transpose(1, 2) + across
        out["rows"] = (g.transpose(1, 2) * y).sum(3)
    if tile.w is not None:
        # the weight without w, so that nothing is divided
        left = tile.total[:, None] - tile.kappa if tile.total is not None and tile.kappa is not None else None
        late = kept if left is None else kept * left.exp().to(scan.acc)[..., None]
        out["cols"] = ((dwv.transpose(1, 2) + late) * tile.v.transpose(1, 2)).sum(3)
    scan.decay_state_(tile, dstate)
    dstate += tile.q.transpose(2, 3) @ g_in
    return out
