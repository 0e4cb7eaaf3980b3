"""The forward pass: tiles of a scan, what is inside chunks, and the state that walks between them."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ...ir.problem import Problem, common_heads
from ...ir.resolve import repeat_heads
from ...ir.terms import Linear
from ..base import Config, Inputs, exponent_dtype
from ..rows import Rows
from ..scan import exponents

SIZES = (64, 32, 128, 256)
"""Chunk sizes to consider, the default first."""
SPAN = 512
"""Tokens, over all rows, that a span aims at: enough to hide the cost of calls, few enough to stay in cache."""


def exp_(x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """exp in place, or (where it is a narrower one) in another dtype, with results below 1e-34 (float64: 1e-303) put to 0.

    On CPUs exp takes ten times as long where its result is denormal, zero or infinite, as strong decays make it.
    """
    floor = -78.0 if (dtype or x.dtype) == torch.float32 else -696.0
    return torch.threshold_(x.clamp_min_(floor).exp_().to(dtype or x.dtype), math.exp(floor) * 1.001, 0.0)


@dataclass(frozen=True)
class Tile:
    """A span of chunks, of every row still running, in the accumulation dtype."""

    t0: int  # local time
    rows: int  # R
    q: Tensor  # [M, R, G, C, N]
    k: Tensor  # [M, R, G, C, N]
    v: Tensor  # [M, R, C, H, P], column scales in it
    u: Tensor | None  # row scales [M, R, C, H]
    rho: Tensor | None  # [M, R, H, C], in the dtype of exponents; None where nothing decays, as the four below
    kappa: Tensor | None  # [M, R, H, C]
    entering: Tensor | None  # exp(ρ_i), [M, R, C, H]
    leaving: Tensor | None  # exp(E − κ_j), [M, R, C, H]
    total: Tensor | None  # exp(E), [M, R, H]

    @property
    def t1(self) -> int:
        """Where the span ends in local time."""
        return self.t0 + self.v.shape[0] * self.v.shape[2]


@dataclass(frozen=True)
class Kept:
    """What the backward pass of a span needs of the forward pass."""

    starts: Tensor  # states at chunk starts, [M, R, G, N, r·P]
    across: Tensor  # what chunks read of them, exp(ρ) apart, [M, R·G, C, r·P]


class Scan:
    """A linear term over its rows, in spans of chunks."""

    def __init__(self, term: Linear, x: Inputs, config: Config) -> None:
        p = x.problem
        self.term, self.x = term, x
        self.rows = Rows(x.spans, p.batch, p.seqlen, term.causal, x.q.device)
        self.size = config.chunk_size or SIZES[0]
        self.groups = self.score_heads(p)
        self.shared = p.nheads // self.groups
        self.acc, self.exact = p.accumulate, exponent_dtype(p)
        self.scale = term.sign * x.scale
        self.slots = self.read_slots()
        self.spans = self._spans()
        self._room: dict[str, Tensor] = {}

    @staticmethod
    def score_heads(problem: Problem) -> int:
        """Heads that have scores of their own."""
        return common_heads(problem)

    def read_slots(self) -> dict[str, Tensor | None]:
        """What there is per token, `(batch, seqlen, heads, …)`."""
        return {name: self.x.per_head(name) for name in self.x.values}

    @property
    def scaled_columns(self) -> bool:
        """Whether a tile's v is not the one given, but scaled."""
        return "cols" in self.slots

    def span_tokens(self) -> int:
        """Tokens, over all rows, that a span aims at."""
        return SPAN

    def _spans(self) -> list[tuple[int, int]]:
        """(start, chunks) of each span in local time; a last chunk that is short is a span of its own.

        Spans end where a state is wanted, and chunks start anew there.
        """
        out, t0 = [], 0
        while t0 < self.rows.length:
            chunks = max(self.span_tokens() // (self.size * max(self.rows.alive(t0), 1)), 1)
            stop = self._stop(t0)
            chunks = max(min(chunks, (stop - t0) // self.size), 1)
            out.append((t0, chunks))
            t0 = min(t0 + chunks * self.size, stop)
        return out

    def _stop(self, t0: int) -> int:
        """Where the tokens from t0 on stop: at the next state that is wanted, or with the rows."""
        every, length = self.x.problem.state_every, self.rows.length
        return length if every is None else min((t0 // every + 1) * every, length)

    def room(self, name: str, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """A buffer to write into, the same memory (of the same dtype) at every call of that name."""
        size = math.prod(shape)
        have = self._room.get(name)
        if have is None or have.numel() < size:
            have = self._room[name] = torch.empty(size, dtype=dtype or self.acc, device=self.x.q.device)
        return have[:size].view(shape)

    # --- states: [R, G, N, r·P] here, [R, H, P, N] outside ------------------------------------------------------------

    def initial(self) -> Tensor:
        """A fresh state for every row."""
        return self.zero_state() if self.x.initial is None else self.inward(self.x.initial)

    def zero_state(self) -> Tensor:
        """Zero for every row."""
        p = self.x.problem
        shape = (self.rows.count, self.groups, p.dstate, self.shared * p.headdim)
        return torch.zeros(shape, dtype=self.acc, device=self.x.q.device)

    def inward(self, states: Tensor) -> Tensor:
        """States as users have them → states by row, heads side by side."""
        states = self.rows.enter(states).to(self.acc).unflatten(1, (self.groups, self.shared))
        return states.permute(0, 1, 4, 2, 3).flatten(3).clone(memory_format=torch.contiguous_format)

    def leave(self, states: Tensor) -> Tensor:
        """The inverse of `inward`."""
        wide = states.unflatten(3, (self.shared, self.x.problem.headdim))  # [R, G, N, r, P]
        return self.rows.leave(wide.permute(0, 1, 3, 4, 2).flatten(1, 2).contiguous(), self.rows.count)

    # --- reading ----------------------------------------------------------------------------------------------------

    def tile(self, t0: int, chunks: int) -> Tile:
        """A span of chunks."""
        x, nheads = self.x, self.x.problem.nheads
        slots = {name: self.read(slot, t0, chunks, self.exact) for name, slot in self.slots.items() if slot is not None}
        q, k = (repeat_heads(self.read(t, t0, chunks).transpose(2, 3), self.groups, 2).contiguous() for t in (x.q, x.k))
        v = repeat_heads(self.read(x.v, t0, chunks), nheads, 3)
        u, w = (slots[name].to(self.acc) if name in slots else None for name in ("rows", "cols"))
        v = v if w is None else v * w[..., None]
        return Tile(t0, v.shape[1], q, k, v, u, *self._exponentials(slots.get("log_a"), slots.get("log_cols")))

    def read(self, x: Tensor, t0: int, chunks: int, dtype: torch.dtype | None = None) -> Tensor:
        """A span of [R, T, …] as [M, R, C, …], in the accumulation dtype or another."""
        tile = self.rows.read(x, t0, min(t0 + chunks * self.size, self._stop(t0))).to(dtype or self.acc)
        return tile.reshape(len(tile), chunks, -1, *tile.shape[2:]).transpose(0, 1)

    def _exponentials(self, log_a: Tensor | None, log_cols: Tensor | None) -> tuple[Tensor | None, ...]:
        """ρ, κ, exp(ρ), exp(E − κ) and exp(E), from log decays and column exponents [M, R, C, H]."""
        given = log_a if log_a is not None else log_cols
        if given is None:
            return (None,) * 5
        shape = given.shape
        d = torch.zeros_like(given) if log_a is None else log_a
        rho, kappa, total = exponents(self.term, d.reshape(-1, *shape[2:]))
        kappa = kappa if log_cols is None else kappa - log_cols.reshape(kappa.shape)
        return (
            rho.view(shape).transpose(2, 3).contiguous(),
            kappa.view(shape).transpose(2, 3).contiguous(),
            exp_(rho.to(self.acc, copy=True)).view(shape),
            exp_((total[:, None] - kappa).to(self.acc)).view(shape),
            exp_(total.to(self.acc, copy=True)).view(*shape[:2], shape[3]),
        )

    # --- layouts ----------------------------------------------------------------------------------------------------

    def wide(self, name: str, x: Tensor, weight: Tensor | None) -> Tensor:
        """weight · x with heads side by side: [M, R, C, H, P] and [M, R, C, H] → [M, R·G, C, r·P]."""
        m, rows, c, _, dim = x.shape
        out = self.room(name, m, rows, self.groups, c, self.shared, dim)
        grouped = x.reshape(m, rows, c, self.groups, self.shared, dim).transpose(2, 3)
        if weight is None:
            out.copy_(grouped)
        else:
            torch.mul(grouped, weight.reshape(m, rows, c, self.groups, self.shared, 1).transpose(2, 3), out=out)
        return out.view(m, rows * self.groups, c, self.shared * dim)

    def narrow(self, x: Tensor, rows: int) -> Tensor:
        """[M, R·G, C, r·P] → [M, R, C, H, P]: a view where heads are all of one group, or groups of one head."""
        m, _, c, _ = x.shape
        grouped = x.view(m, rows, self.groups, c, self.shared, -1).transpose(2, 3)  # [M, R, C, G, r, P]
        return grouped.reshape(m, rows, c, self.groups * self.shared, grouped.shape[-1])

    def by_head(self, name: str, x: Tensor) -> Tensor:
        """[M, R, C, H, P] → [M·R·H, C, P], in a buffer."""
        m, rows, c, heads, dim = x.shape
        out = self.room(name, m, rows, heads, c, dim)
        out.copy_(x.transpose(2, 3))
        return out.view(-1, c, dim)

    def lower(self, x: Tensor) -> Tensor:
        """x with what lies above the diagonal (and on it, if strict) put to zero, in place."""
        return x.tril_(-1 if self.term.strict else 0)

    # --- inside chunks ----------------------------------------------------------------------------------------------

    def decays(self, tile: Tile) -> Tensor | None:
        """exp(ρ_i − κ_j) on and below the diagonal (below it, if strict), [M·R·H, C, C]."""
        if tile.rho is None or tile.kappa is None:
            return None
        c = tile.rho.shape[3]
        (rho, rho_rest), (kappa, kappa_rest) = (self.split(x) for x in (tile.rho, tile.kappa))
        out = torch.sub(rho[..., None], kappa[..., None, :], out=self.room("decays", *rho.shape, c))
        if rho_rest is not None and kappa_rest is not None:
            out.add_(rho_rest[..., None]).sub_(kappa_rest[..., None, :])
        # above the diagonal the exponent may be positive and overflow: that half is put to zero, not multiplied by it
        return self.lower(exp_(self.lower(out))).view(-1, c, c)

    def split(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """x as a sum of two in the accumulation dtype, so that differences keep digits without float64 matrices."""
        high = x.to(self.acc)
        return high, None if high.dtype == x.dtype else (x - high).to(self.acc)

    def masked_scores(self, tile: Tile, decays: Tensor | None, out: Tensor | None) -> Tensor:
        """L ∘ QKᵀ of each chunk, [M·R·H, C, C], written to `out` (which may be `decays` itself)."""
        c, dim = tile.q.shape[3:]
        scores = tile.q.view(-1, c, dim) @ tile.k.view(-1, c, dim).transpose(1, 2)  # [M·R·G, C, C]
        if decays is None or out is None:
            return repeat_heads(self.lower(scores).view(-1, self.groups, c, c), self.x.problem.nheads, 1).reshape(-1, c, c)
        grouped = (-1, self.shared, c, c)
        torch.mul(decays.view(grouped), scores[:, None], out=out.view(grouped))
        return out

    def inside(self, tile: Tile, scores: Tensor) -> Tensor:
        """What tokens of a chunk give to one another, [M, R, C, H, P]."""
        m, rows, c, heads, dim = tile.v.shape
        v = self.by_head("v", tile.v)
        out = torch.bmm(scores, v, out=self.room("inside", *v.shape))
        return out.view(m, rows, heads, c, dim).transpose(2, 3)

    # --- between chunks ---------------------------------------------------------------------------------------------

    def room_to_keep(self, tile: Tile, state: Tensor) -> Kept:
        """Fresh memory for a span's keepsakes."""
        m, rows, groups, c, _ = tile.q.shape
        return Kept(state.new_empty(m, rows, *state.shape[1:]), state.new_empty(m, rows * groups, c, state.shape[3]))

    def across(self, tile: Tile, state: Tensor, kept: Kept | None = None) -> Tensor:
        """Walk the state through the span, in place: what each chunk reads of it, exp(ρ) apart, [M, R, C, H, P]."""
        m, rows, groups, c, n = tile.q.shape
        running = state[:rows].view(rows * groups, n, -1)
        v = self.wide("leaving", tile.v, tile.leaving).unbind(0)
        out = self.room("across", m, rows * groups, c, state.shape[3]) if kept is None else kept.across
        q, k = (x.view(m, rows * groups, c, n) for x in (tile.q, tile.k))
        factors, by_head = self.factors(tile), self.heads_of(running)
        for index in range(m):
            if kept is not None:
                kept.starts[index] = state[:rows]
            torch.bmm(q[index], running, out=out[index])
            if factors is not None:
                by_head.mul_(factors[index])
            running.baddbmm_(k[index].transpose(1, 2), v[index])
        return self.narrow(out, rows)

    def passed(self, product: Tensor) -> Tensor:
        """The parts of ⟨dS, exp(E) S⟩ [R·G, N, r·P], summed to what exp(E) has: [R·G, r]."""
        return self.heads_of(product).sum((1, 3))

    def factors(self, tile: Tile) -> tuple[Tensor, ...] | None:
        """exp(E) of each chunk, shaped for `heads_of`; None where nothing decays."""
        return None if tile.total is None else tile.total.reshape(len(tile.q), -1, 1, self.shared, 1).unbind(0)

    def heads_of(self, running: Tensor) -> Tensor:
        """A state [R·G, N, r·P] seen as [R·G, N, r, P]."""
        return running.view(*running.shape[:2], self.shared, -1)

    def combine(self, tile: Tile, inside: Tensor, across: Tensor, out: Tensor | None = None) -> Tensor:
        """Y from both, row scales apart, [M, R, C, H, P]."""
        if tile.entering is None:
            return torch.add(inside, across, out=out)
        return torch.addcmul(inside, across, tile.entering[..., None], out=out)

    def write_output(self, tile: Tile, across: Tensor, y: Tensor) -> None:
        """Write Y of the span."""
        decays = self.decays(tile)
        inside = self.inside(tile, self.masked_scores(tile, decays, decays))
        view = self.view(y, tile)
        out = self.combine(tile, inside, across, view)
        if tile.u is not None:
            out *= tile.u[..., None]
        if self.scale != 1.0:
            out *= self.scale
        if view is None:
            self.write(y, out, tile)

    def view(self, x: Tensor, tile: Tile) -> Tensor | None:
        """The span's part of x itself, [M, R, C, …], where it can be written in place."""
        view = self.rows.view(x, tile.t0, tile.t1)
        return None if view is None else view.unflatten(1, (tile.v.shape[0], -1)).transpose(0, 1)

    def write(self, x: Tensor, tile_of_x: Tensor, tile: Tile) -> None:
        """Put [M, R, C, …] back in its place."""
        self.rows.write(x, tile_of_x.transpose(0, 1).flatten(1, 2), tile.t0, tile.t1)
