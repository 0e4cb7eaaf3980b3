"""The backward pass: back over the spans of a scan, the cotangent of the state in hand."""

from __future__ import annotations

import torch
from torch import Tensor

from ...ir.resolve import reduce_to, repeat_heads
from ..base import Cotangents, Gradients, reduce_value
from ..scan import exponent_gradient, state_log_gradient
from .forward import Kept, Scan, Tile


class Backward:
    """The spans of a term from the last to the first, the cotangent of the state in hand."""

    def __init__(self, scan: Scan, cotangents: Cotangents) -> None:
        p = scan.x.problem
        self.scan, self.dy, dstate = scan, cotangents.y, cotangents.state
        saved = cotangents.saved or self._forward()
        starts, across = saved[0::2], saved[1::2]
        self.kept = [Kept(*pair) for pair in zip(starts, across, strict=True)]
        self.dstate = scan.zero_state() if dstate is None else scan.inward(dstate)

        def empty(*shape: int) -> Tensor:
            make = torch.empty if scan.rows.covers else torch.zeros
            return make((p.batch, p.seqlen, *shape), dtype=scan.acc, device=self.dy.device)

        self.inputs = {"q": empty(p.q_heads, p.dstate), "k": empty(p.k_heads, p.dstate), "v": empty(p.v_heads, p.headdim)}
        self.values = {slot: empty(p.nheads, *x.shape[3:]) for slot, x in scan.slots.items() if x is not None}
        # whether the gradient of v can be written where it belongs, unscaled and unshared
        self.in_place = p.v_heads == p.nheads and not scan.scaled_columns

    def _forward(self) -> list[Tensor]:
        """What `Chunked.forward` saves, computed again."""
        scan, state, saved = self.scan, self.scan.initial(), []
        for span in scan.spans:
            tile = scan.tile(*span)
            kept = scan.room_to_keep(tile, state)
            scan.across(tile, state, kept)
            saved += [kept.starts, kept.across]
        return saved

    def run(self) -> Gradients:
        """All spans."""
        scan = self.scan
        for span, kept in zip(reversed(scan.spans), reversed(self.kept), strict=True):
            tile = self.tile(*span)
            grads = self.span(tile, kept)
            for name, total in {**self.inputs, **self.values}.items():
                if name == "v" and self.in_place and scan.view(total, tile) is not None:
                    continue  # written by span()
                grad = grads[name]  # [M, R, C, heads, D] or [M, R, C, H]
                scan.write(total, reduce_to(grad, (*grad.shape[:3], *total.shape[2:]), 3), tile)
        initial = None if scan.x.initial is None else scan.leave(self.dstate)
        q, k, v = self.inputs.values()
        return Gradients(q, k, v, initial=initial, values=self.of_slots())

    def of_slots(self) -> dict[str, Tensor]:
        """What was written, shaped as operands are."""
        return {slot: reduce_value(total, self.scan.x.values[slot]) for slot, total in self.values.items()}

    def tile(self, t0: int, chunks: int) -> Tile:
        """A span of chunks, with what its gradients need."""
        return self.scan.tile(t0, chunks)

    def read(self, x: Tensor, tile: Tile) -> Tensor:
        """[M, R, C, …] of a tensor laid out like dy."""
        part = self.scan.rows.read(x, tile.t0, tile.t1).to(self.scan.acc)
        return part.reshape(tile.rows, tile.v.shape[0], -1, *part.shape[2:]).transpose(0, 1)

    def cotangents(self, tile: Tile) -> tuple[Tensor, Tensor]:
        """The cotangent of Y before its row scales, and of what they multiply, [M, R, C, H, P]."""
        g = self.read(self.dy, tile)
        g = g if self.scan.scale == 1.0 else g * self.scan.scale
        return g, g if tile.u is None else g * tile.u[..., None]

    def span(self, tile: Tile, kept: Kept) -> dict[str, Tensor]:
        """Gradients of one span, [M, R, C, heads, …].

        `self.dstate`, the cotangent of the state at its end, becomes that of the state at its start.
        """
        scan = self.scan
        m, rows, c = tile.v.shape[:3]
        n = tile.q.shape[4]
        g, gu = self.cotangents(tile)
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
        g_in = scan.wide("entering", gu, tile.entering)
        v_out = scan.wide("leaving", tile.v, tile.leaving)
        late, through = self.through_states(tile, kept.starts, g_in, v_out, dq, dk)
        dq, dk = (d.view(m, rows, -1, c, n).transpose(2, 3) for d in (dq, dk))
        out = {"v": self.of_values(tile, dv, late), "q": dq, "k": dk}
        self.scales(tile, out, g, scores, kept)
        if through is not None:
            entering, leaving = self._dot(g_in, kept.across, tile), self._dot(v_out, late, tile)
            self._exponents(out, change, entering, leaving, through.view(m, rows, -1))
        return out

    def of_values(self, tile: Tile, inside: Tensor, late: Tensor) -> Tensor:
        """The gradient of tile.v, [M, R, C, H, P], written where it belongs if it can be.

        Args:
            inside: what reaches it from its chunk, [M·R·H, C, P]; late: from the state behind it, [M, R·G, C, r·P].
        """
        scan, (m, rows, c, heads, dim) = self.scan, tile.v.shape
        place = scan.view(self.inputs["v"], tile) if self.in_place else None
        place = scan.room("dv_tile", *tile.v.shape) if place is None else place
        inside, reaching = inside.view(m, rows, heads, c, dim).transpose(2, 3), scan.narrow(late, rows)
        if tile.leaving is None:
            return torch.add(inside, reaching, out=place)
        return torch.addcmul(inside, reaching, tile.leaving[..., None], out=place)

    def through_states(
        self, tile: Tile, starts: Tensor, g_in: Tensor, v_out: Tensor, dq: Tensor, dk: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """Walk dS back through the span, in place, and add to dq and dk.

        Returns:
            What reaches v, exp(E − κ) apart [M, R·G, C, r·P]; and ⟨dS, exp(E) S⟩ of each chunk's two ends [M, R, H], or
            with an axis more what `Scan.passed` leaves of it; None where nothing decays.
        """
        scan = self.scan
        m, rows, groups, c, n = tile.q.shape
        running = self.dstate[:rows].view(rows * groups, n, -1)
        late = scan.room("late", *v_out.shape)
        q, k = (x.view(m, rows * groups, c, n) for x in (tile.q, tile.k))
        start = starts.view(m, rows * groups, n, -1)
        factors, by_head = scan.factors(tile), scan.heads_of(running)
        through: list[Tensor] = []
        for index in reversed(range(m)):
            torch.bmm(k[index], running, out=late[index])
            dk[index].baddbmm_(v_out[index], running.transpose(1, 2))
            dq[index].baddbmm_(g_in[index], start[index].transpose(1, 2))
            if factors is not None:
                by_head.mul_(factors[index])
                passing = torch.mul(running, start[index], out=scan.room("passing", *running.shape))
                through.append(scan.passed(passing))
            running.baddbmm_(q[index].transpose(1, 2), g_in[index])
        return late, torch.stack(through[::-1]) if through else None

    def scales(self, tile: Tile, out: dict[str, Tensor], g: Tensor, scores: Tensor, kept: Kept) -> None:
        """Gradients of row and column scales, and v's own where columns are scaled."""
        self.columns(tile, out)
        scan = self.scan
        if "rows" in scan.slots:
            across = scan.narrow(kept.across, tile.rows)
            out["rows"] = (g * scan.combine(tile, scan.inside(tile, scores), across)).sum(4)

    def columns(self, tile: Tile, out: dict[str, Tensor]) -> None:
        """The gradient of column scales, and v's own where they scale it."""
        if (w := self.scan.slots.get("cols")) is not None:
            out["cols"] = (out["v"] * repeat_heads(self.read(self.scan.x.v, tile), tile.v.shape[3], 3)).sum(4)
            out["v"] = out["v"] * self.read(w, tile)[..., None]

    def _exponents(self, out: dict[str, Tensor], change: Tensor, entering: Tensor, leaving: Tensor, through: Tensor) -> None:
        """Gradients of log_cols and log_a, from how Y changes with ρ_i and κ_j.

        Args:
            change: by pair of tokens of a chunk, [M·R·H, C, C].
            entering, leaving: through the states on either side of the chunk, by token [M, R, C, H].
            through: from one side of the chunk to the other, [M, R, H].
        """
        m, rows, c, heads = leaving.shape

        def by_token(x: Tensor) -> Tensor:  # [M·R·H, C] → [M, R, C, H]
            return x.view(m, rows, heads, c).transpose(2, 3)

        if "log_cols" in self.scan.slots:
            out["log_cols"] = by_token(change.sum(1)) + leaving
        if "log_a" in self.scan.slots:
            # a pair with no decay between its tokens does not move: left in, it would drown what strong decays leave of
            # the others; it is (i, i), and with an exclusive ρ and an inclusive κ also (i, i − 1)
            term = self.scan.term
            change.tril_(-2 if term.col_inclusive and not term.row_inclusive else -1)
            rho, kappa = by_token(change.sum(2)), -by_token(change.sum(1))
            rho, kappa, entering, leaving, through = (x.flatten(0, 1) for x in (rho, kappa, entering, leaving, through))
            inside = exponent_gradient(term, rho, kappa, torch.zeros_like(through))
            d = inside + state_log_gradient(term, entering, leaving, through)
            out["log_a"] = d.view(m, rows, c, heads)

    def _dot(self, a: Tensor, b: Tensor, tile: Tile) -> Tensor:
        """⟨a, b⟩ per token and head: [M, R·G, C, r·P] twice → [M, R, C, H]."""
        scan = self.scan
        m, _, c, _ = a.shape
        product = torch.mul(a, b, out=scan.room("dot", *a.shape))
        dots = product.view(m, tile.rows, scan.groups, c, scan.shared, -1).sum(5)  # [M, R, G, C, r]
        return dots.transpose(2, 3).reshape(m, tile.rows, c, -1)
