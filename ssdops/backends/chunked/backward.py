"""The backward pass: back over the spans of a scan, the cotangent of the state in hand."""

from __future__ import annotations

import torch
from torch import Tensor

from ...ir.resolve import reduce_to, repeat_heads
from ..base import Cotangents, Gradients, reduce_value
from ..scan import exponent_gradient
from .forward import Kept, Scan, Tile


class Backward:
    """The spans of a term from the last to the first, the cotangent of the state in hand."""

    def __init__(self, scan: Scan, cotangents: Cotangents) -> None:
        p = scan.x.problem
        self.scan, self.dy, dstate = scan, cotangents.y, cotangents.state
        saved = cotangents.saved or self._forward()
        self.end, starts, across = saved[0], saved[1::2], saved[2::2]
        self.kept = [Kept(*pair) for pair in zip(starts, across, strict=True)]
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
            start = kept.starts[0]  # of the rows that still run there; shorter documents ended with what they have
            self.end = start if len(start) == len(self.end) else torch.cat([start, self.end[len(start) :]])
        x = scan.x
        values = {slot: reduce_value(total, x.values[slot]) for slot, total in self.values.items()}
        initial = None if x.initial is None else scan.leave(self.dstate)
        q, k, v = self.inputs.values()
        return Gradients(q, k, v, initial=initial, values=values)

    def read(self, x: Tensor, tile: Tile) -> Tensor:
        """[M, R, C, …] of a tensor laid out like dy."""
        part = self.scan.rows.read(x, tile.t0, tile.t1).to(self.scan.acc)
        return part.reshape(tile.rows, tile.v.shape[0], -1, *part.shape[2:]).transpose(0, 1)

    def span(self, tile: Tile, kept: Kept) -> dict[str, Tensor]:
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

    def _through_states(self, tile: Tile, starts: Tensor, g_in: Tensor, v_out: Tensor, dq: Tensor, dk: Tensor) -> Tensor:
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

    def _scales(self, tile: Tile, out: dict[str, Tensor], g: Tensor, scores: Tensor, kept: Kept) -> None:
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

    def _dot(self, a: Tensor, b: Tensor, tile: Tile) -> Tensor:
        """⟨a, b⟩ per token and head: [M, R·G, C, r·P] twice → [M, R, C, H]."""
        scan = self.scan
        m, _, c, _ = a.shape
        product = torch.mul(a, b, out=scan.room("dot", *a.shape))
        dots = product.view(m, tile.rows, scan.groups, c, scan.shared, -1).sum(5)  # [M, R, G, C, r]
        return dots.transpose(2, 3).reshape(m, tile.rows, c, -1)
