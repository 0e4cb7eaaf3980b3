"""The block decomposition of Mamba-2 (Dao & Gu 2024, section 6) in plain torch: quadratic inside chunks, recurrent between.

Chunk by chunk, with the state in hand, so that nothing grows with seqlen but the output. Heads of a group share q and k:
their scores are computed once, and their states lie side by side as columns [N, heads · P] of one matrix, so that what
enters and what leaves a chunk are single large matmuls, and gradients of shared q and k are summed over heads inside them.

What needs no state (scores, decays, what is inside a chunk) is done for a *span* of M chunks at once, as on a CPU every torch
call costs microseconds, and in buffers that are used again, as fresh memory costs a page fault.

Shapes: M chunks of a span, R rows still running, C tokens of a chunk, G distinct score heads, r = H/G heads sharing them,
N dstate, P headdim.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from math import ceil, prod

import torch
from torch import Tensor

from ..ir.problem import Problem, common_heads
from ..ir.resolve import reduce_to, repeat_heads
from ..ir.terms import Diagonal, Linear, Term
from .base import Config, Cotangents, Gradients, Inputs, Output, Support, Work, exponent_dtype, reduce_value, reject_scan
from .rows import Rows
from .scan import diagonal_backward, diagonal_forward, exponent_gradient, exponents

SIZES = (64, 32, 128, 256)
"""Chunk sizes to consider, the default first."""
SPAN = 512
"""Tokens, over all rows, that a span aims at: enough to hide the cost of calls, few enough to stay in cache."""


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
            tokens * p.nheads * (4 * size + 4 * p.headdim + 3 * p.dstate * p.headdim / size),
            4 * tokens * (p.q_heads * p.dstate + p.k_heads * p.dstate + 2 * p.nheads * p.headdim),
            10.0 + 25.0 * chunks,
        )

    def forward(self, term: Term, x: Inputs, config: Config, save: bool = False) -> Output:
        """One span of chunks after another; saves the states at chunk starts, and what was read of them."""
        if isinstance(term, Diagonal):
            return Output(diagonal_forward(term, x))
        assert isinstance(term, Linear)  # supports() refuses the rest
        scan, y = _Scan(term, x, config), x.empty_output()
        state = scan.initial()
        kept: list[_Kept] = []
        for span in scan.spans:
            tile = scan.tile(*span)
            if save:
                kept.append(scan.room_to_keep(tile, state))
            scan.write_output(tile, scan.across(tile, state, kept[-1] if save else None), y)
        saved = (state, *(x for k in kept for x in (k.starts, k.across))) if save else ()
        return Output(y, scan.leave(state), saved)

    def backward(self, term: Term, x: Inputs, config: Config, cotangents: Cotangents) -> Gradients:
        """Forward again for the states at chunk starts, then back over the chunks with the state's cotangent in hand."""
        if isinstance(term, Diagonal):
            return diagonal_backward(term, x, cotangents.y)
        assert isinstance(term, Linear)  # supports() refuses the rest
        scan = _Scan(term, x, config)
        return _Backward(scan, cotangents).run()


def exp_(x: Tensor) -> Tensor:
    """exp in place, with results below 1e-34 (float64: 1e-303) put to 0.

    On CPUs exp takes ten times as long where its result is denormal, zero or infinite, as strong decays make it.
    """
    floor = -78.0 if x.dtype == torch.float32 else -696.0
    return torch.threshold_(x.clamp_min_(floor).exp_(), math.exp(floor) * 1.001, 0.0)


@dataclass(frozen=True)
class _Tile:
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
class _Kept:
    """What the backward pass of a span needs of the forward pass."""

    starts: Tensor  # states at chunk starts, [M, R, G, N, r·P]
    across: Tensor  # what chunks read of them, exp(ρ) apart, [M, R·G, C, r·P]


class _Scan:
    """A linear term over its rows, in spans of chunks."""

    def __init__(self, term: Linear, x: Inputs, config: Config) -> None:
        p = x.problem
        self.term, self.x = term, x
        self.rows = Rows(x.spans, p.batch, p.seqlen, term.causal, x.q.device)
        self.size = config.chunk_size or SIZES[0]
        self.groups = common_heads(p)
        self.shared = p.nheads // self.groups
        self.acc, self.exact = p.accumulate, exponent_dtype(p)
        self.scale = term.sign * x.scale
        self.slots = {name: x.per_head(name) for name in x.values}
        self.spans = self._spans()
        self._room: dict[str, Tensor] = {}

    def _spans(self) -> list[tuple[int, int]]:
        """(start, chunks) of each span in local time; a last chunk that is short is a span of its own."""
        length, out, t0 = self.rows.length, [], 0
        while t0 < length:
            chunks = max(SPAN // (self.size * max(self.rows.alive(t0), 1)), 1)
            chunks = max(min(chunks, (length - t0) // self.size), 1)
            out.append((t0, chunks))
            t0 += chunks * self.size
        return out

    def room(self, name: str, *shape: int) -> Tensor:
        """A buffer to write into, the same memory at every call of that name."""
        size = prod(shape)
        have = self._room.get(name)
        if have is None or have.numel() < size:
            have = self._room[name] = torch.empty(size, dtype=self.acc, device=self.x.q.device)
        return have[:size].view(shape)

    # --- states: [R, G, N, r·P] here, [R, H, P, N] outside ------------------------------------------------------------

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

    # --- reading ----------------------------------------------------------------------------------------------------

    def tile(self, t0: int, chunks: int) -> _Tile:
        """A span of chunks."""
        t1 = min(t0 + chunks * self.size, self.rows.length)
        p = self.x.problem

        def read(x: Tensor, dtype: torch.dtype = self.acc) -> Tensor:  # [R, T, …] → [M, R, C, …]
            tile = self.rows.read(x, t0, t1).to(dtype)
            return tile.reshape(len(tile), chunks, -1, *tile.shape[2:]).transpose(0, 1)

        slots = {name: read(slot, self.exact) for name, slot in self.slots.items() if slot is not None}
        q, k = (repeat_heads(read(t).transpose(2, 3), self.groups, 2).contiguous() for t in (self.x.q, self.x.k))
        v = repeat_heads(read(self.x.v), p.nheads, 3)
        u, w = (slots[name].to(self.acc) if name in slots else None for name in ("rows", "cols"))
        v = v if w is None else v * w[..., None]
        return _Tile(t0, v.shape[1], q, k, v, u, *self._exponentials(slots.get("log_a"), slots.get("log_cols")))

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

    def decays(self, tile: _Tile) -> Tensor | None:
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

    def masked_scores(self, tile: _Tile, decays: Tensor | None, out: Tensor | None) -> Tensor:
        """L ∘ QKᵀ of each chunk, [M·R·H, C, C], written to `out` (which may be `decays` itself)."""
        c, dim = tile.q.shape[3:]
        scores = tile.q.view(-1, c, dim) @ tile.k.view(-1, c, dim).transpose(1, 2)  # [M·R·G, C, C]
        if decays is None or out is None:
            return repeat_heads(self.lower(scores).view(-1, self.groups, c, c), self.x.problem.nheads, 1).reshape(-1, c, c)
        grouped = (-1, self.shared, c, c)
        torch.mul(decays.view(grouped), scores[:, None], out=out.view(grouped))
        return out

    def inside(self, tile: _Tile, scores: Tensor) -> Tensor:
        """What tokens of a chunk give to one another, [M, R, C, H, P]."""
        m, rows, c, heads, dim = tile.v.shape
        v = self.by_head("v", tile.v)
        out = torch.bmm(scores, v, out=self.room("inside", *v.shape))
        return out.view(m, rows, heads, c, dim).transpose(2, 3)

    # --- between chunks ---------------------------------------------------------------------------------------------

    def room_to_keep(self, tile: _Tile, state: Tensor) -> _Kept:
        """Fresh memory for a span's keepsakes."""
        m, rows, groups, c, _ = tile.q.shape
        return _Kept(state.new_empty(m, rows, *state.shape[1:]), state.new_empty(m, rows * groups, c, state.shape[3]))

    def across(self, tile: _Tile, state: Tensor, kept: _Kept | None = None) -> Tensor:
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

    def factors(self, tile: _Tile) -> tuple[Tensor, ...] | None:
        """exp(E) of each chunk, shaped for `heads_of`; None where nothing decays."""
        return None if tile.total is None else tile.total.reshape(len(tile.q), -1, 1, self.shared, 1).unbind(0)

    def heads_of(self, running: Tensor) -> Tensor:
        """A state [R·G, N, r·P] seen as [R·G, N, r, P]."""
        return running.view(*running.shape[:2], self.shared, -1)

    def combine(self, tile: _Tile, inside: Tensor, across: Tensor, out: Tensor | None = None) -> Tensor:
        """Y from both, row scales apart, [M, R, C, H, P]."""
        if tile.entering is None:
            return torch.add(inside, across, out=out)
        return torch.addcmul(inside, across, tile.entering[..., None], out=out)

    def write_output(self, tile: _Tile, across: Tensor, y: Tensor) -> None:
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

    def view(self, x: Tensor, tile: _Tile) -> Tensor | None:
        """The span's part of x itself, [M, R, C, …], where it can be written in place."""
        view = self.rows.view(x, tile.t0, tile.t1)
        return None if view is None else view.unflatten(1, (tile.v.shape[0], -1)).transpose(0, 1)

    def write(self, x: Tensor, tile_of_x: Tensor, tile: _Tile) -> None:
        """Put [M, R, C, …] back in its place."""
        self.rows.write(x, tile_of_x.transpose(0, 1).flatten(1, 2), tile.t0, tile.t1)


class _Backward:
    """The spans of a term from the last to the first, the cotangent of the state in hand."""

    def __init__(self, scan: _Scan, cotangents: Cotangents) -> None:
        p = scan.x.problem
        self.scan, self.dy, dstate = scan, cotangents.y, cotangents.state
        saved = cotangents.saved or self._forward()
        self.end, starts, across = saved[0], saved[1::2], saved[2::2]
        self.kept = [_Kept(*pair) for pair in zip(starts, across, strict=True)]
        self.dstate = torch.zeros_like(self.end) if dstate is None else scan.inward(dstate)

        def empty(*shape: int) -> Tensor:
            make = torch.empty if scan.rows.covers else torch.zeros
            return make((p.batch, p.seqlen, *shape), dtype=scan.acc, device=self.dy.device)

        self.inputs = {"q": empty(p.q_heads, p.dstate), "k": empty(p.k_heads, p.dstate), "v": empty(p.v_heads, p.headdim)}
        self.values = {slot: empty(p.nheads) for slot in scan.slots}
        # whether the gradient of v can be written where it belongs, unscaled and unshared
        self.in_place = p.v_heads == p.nheads and "cols" not in scan.slots

    def _forward(self) -> list[Tensor]:
        """What `Chunked.forward` saves, computed again."""
        scan, state, saved = self.scan, self.scan.initial(), []
        for span in scan.spans:
            tile = scan.tile(*span)
            kept = scan.room_to_keep(tile, state)
            scan.across(tile, state, kept)
            saved += [kept.starts, kept.across]
        return [state, *saved]

    def run(self) -> Gradients:
        """All spans."""
        scan = self.scan
        for span, kept in zip(reversed(scan.spans), reversed(self.kept), strict=True):
            tile = scan.tile(*span)
            grads = self.span(tile, kept)
            for name, total in {**self.inputs, **self.values}.items():
                if name == "v" and self.in_place and scan.view(total, tile) is not None:
                    continue  # written by span()
                grad = grads[name]  # [M, R, C, heads, D] or [M, R, C, H]
                scan.write(total, reduce_to(grad, (*grad.shape[:3], *total.shape[2:]), 3), tile)
            self.end = kept.starts[0]
        x = scan.x
        values = {slot: reduce_value(total, x.values[slot]) for slot, total in self.values.items()}
        initial = None if x.initial is None else scan.leave(self.dstate)
        q, k, v = self.inputs.values()
        return Gradients(q, k, v, initial=initial, values=values)

    def read(self, x: Tensor, tile: _Tile) -> Tensor:
        """[M, R, C, …] of a tensor laid out like dy."""
        part = self.scan.rows.read(x, tile.t0, tile.t1).to(self.scan.acc)
        return part.reshape(tile.rows, tile.v.shape[0], -1, *part.shape[2:]).transpose(0, 1)

    def span(self, tile: _Tile, kept: _Kept) -> dict[str, Tensor]:
        """Gradients of one span, [M, R, C, heads, …].

        `self.dstate`, the cotangent of the state at its end, becomes that of the state at its start.
        """
        scan = self.scan
        m, rows, c, heads, dim = tile.v.shape
        n = tile.q.shape[4]
        g = self.read(self.dy, tile)
        g = g if scan.scale == 1.0 else g * scan.scale
        gu = g if tile.u is None else g * tile.u[..., None]
        # inside chunks
        decays = scan.decays(tile)
        scores = scan.masked_scores(tile, decays, None if decays is None else scan.room("scores", *decays.shape))
        v_head, gu_head = scan.by_head("v", tile.v), scan.by_head("gu", gu)
        dmasked = torch.bmm(gu_head, v_head.transpose(1, 2), out=scan.room("dmasked", *scores.shape))
        change = torch.mul(scores, dmasked, out=scan.room("change", *scores.shape)) if scan.slots else scores
        dmasked = scan.lower(dmasked) if decays is None else dmasked.mul_(decays)
        dscores = dmasked.view(-1, scan.shared, c, c).sum(1)  # [M·R·G, C, C]
        dv = torch.bmm(scores.transpose(1, 2), gu_head, out=scan.room("dv", *v_head.shape))
        dq = (dscores @ tile.k.view(-1, c, n)).view(m, -1, c, n)
        dk = (dscores.transpose(1, 2) @ tile.q.view(-1, c, n)).view(m, -1, c, n)
        # between chunks
        boundary = self._boundary(rows) if "log_a" in scan.slots else None
        g_in = scan.wide("entering", gu, tile.entering)
        v_out = scan.wide("leaving", tile.v, tile.leaving)
        late = self._through_states(tile, kept.starts, g_in, v_out, dq, dk)  # [M, R·G, C, r·P]
        place = scan.view(self.inputs["v"], tile) if self.in_place else None
        place = scan.room("dv_tile", *tile.v.shape) if place is None else place
        dv, reaching = dv.view(m, rows, heads, c, dim).transpose(2, 3), scan.narrow(late, rows)
        if tile.leaving is None:
            torch.add(dv, reaching, out=place)
        else:
            torch.addcmul(dv, reaching, tile.leaving[..., None], out=place)
        out = {"v": place, **{name: d.view(m, rows, -1, c, n).transpose(2, 3) for name, d in (("q", dq), ("k", dk))}}
        self._scales(tile, out, g, scores, kept)
        if boundary is not None or "log_cols" in scan.slots:
            entering, leaving = self._dot(g_in, kept.across, tile), self._dot(v_out, late, tile)
            self._exponents(out, change, entering, leaving, boundary)
        return out

    def _boundary(self, rows: int) -> Tensor:
        """⟨dS, S⟩ per head where the span ends, [R, H]: what every pair of tokens across that boundary gives."""
        scan = self.scan
        product = torch.mul(self.dstate[:rows], self.end[:rows], out=scan.room("boundary", *self.dstate[:rows].shape))
        return product.view(*product.shape[:3], scan.shared, -1).sum((2, 4)).flatten(1)

    def _through_states(self, tile: _Tile, starts: Tensor, g_in: Tensor, v_out: Tensor, dq: Tensor, dk: Tensor) -> Tensor:
        """Walk dS back through the span, in place; add to dq and dk; return what reaches v, exp(E − κ) apart."""
        scan = self.scan
        m, rows, groups, c, n = tile.q.shape
        running = self.dstate[:rows].view(rows * groups, n, -1)
        late = scan.room("late", *v_out.shape)
        q, k = (x.view(m, rows * groups, c, n) for x in (tile.q, tile.k))
        start = starts.view(m, rows * groups, n, -1).transpose(2, 3)
        factors, by_head = scan.factors(tile), scan.heads_of(running)
        for index in reversed(range(m)):
            torch.bmm(k[index], running, out=late[index])
            dk[index].baddbmm_(v_out[index], running.transpose(1, 2))
            dq[index].baddbmm_(g_in[index], start[index])
            if factors is not None:
                by_head.mul_(factors[index])
            running.baddbmm_(q[index].transpose(1, 2), g_in[index])
        return late

    def _scales(self, tile: _Tile, out: dict[str, Tensor], g: Tensor, scores: Tensor, kept: _Kept) -> None:
        """Gradients of row and column scales, and v's own where columns are scaled."""
        scan, slots = self.scan, self.scan.slots
        if "cols" in slots:
            w = self.read(slots["cols"], tile)  # type: ignore[arg-type]  # a slot that is there has a value
            out["cols"] = (out["v"] * repeat_heads(self.read(scan.x.v, tile), tile.v.shape[3], 3)).sum(4)
            out["v"] = out["v"] * w[..., None]
        if "rows" in slots:
            across = scan.narrow(kept.across, tile.rows)
            out["rows"] = (g * scan.combine(tile, scan.inside(tile, scores), across)).sum(4)

    def _exponents(
        self, out: dict[str, Tensor], change: Tensor, entering: Tensor, leaving: Tensor, boundary: Tensor | None
    ) -> None:
        """Gradients of log_cols and log_a, from how Y changes with ρ_i and κ_j.

        Args:
            change: by pair of tokens of a chunk, [M·R·H, C, C].
            entering, leaving: through the states on either side, by token [M, R, C, H].
            boundary: [R, H], as `_boundary`.
        """
        m, rows, c, heads = leaving.shape

        def by_token(x: Tensor) -> Tensor:  # [M·R·H, C] → [M, R, C, H]
            return x.view(m, rows, heads, c).transpose(2, 3)

        if "log_cols" in self.scan.slots:
            out["log_cols"] = by_token(change.sum(1)) + leaving
        if boundary is None:
            return
        # a pair (i, i) moves with no decay: left in, it would drown what strong decays leave of the others
        change.tril_(-1)
        drho, dkappa = by_token(change.sum(2)) + entering, by_token(change.sum(1)) + leaving
        drho, dkappa = (x.transpose(0, 1).reshape(rows, m * c, heads) for x in (drho, -dkappa))
        d = exponent_gradient(self.scan.term, drho, dkappa, boundary)
        out["log_a"] = d.view(rows, m, c, heads).transpose(0, 1)

    def _dot(self, a: Tensor, b: Tensor, tile: _Tile) -> Tensor:
        """⟨a, b⟩ per token and head: [M, R·G, C, r·P] twice → [M, R, C, H]."""
        scan = self.scan
        m, _, c, _ = a.shape
        product = torch.mul(a, b, out=scan.room("dot", *a.shape))
        dots = product.view(m, tile.rows, scan.groups, c, scan.shared, -1).sum(5)  # [M, R, G, C, r]
        return dots.transpose(2, 3).reshape(m, tile.rows, c, -1)
