"""Decay per channel, backward: down the tree of every chunk, where the gradient of a log decay is a sum and no difference."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from ...ir.resolve import reduce_to, repeat_heads
from ..base import Cotangents
from .backward import Backward
from .channel import ChannelScan, ChannelTile
from .forward import Kept, Tile
from .tree import descend


class ChannelBackward(Backward):
    """The spans of a term with a decay per channel from the last to the first."""

    scan: ChannelScan

    def __init__(self, scan: ChannelScan, cotangents: Cotangents) -> None:
        super().__init__(scan, cotangents)
        self.big_a = scan.big_a.to(scan.acc) if "A" in scan.x.values else None  # [H, 1, N]
        self.of_a = None if self.big_a is None else torch.zeros_like(self.big_a[:, 0])  # [H, N]

    def of_slots(self) -> dict[str, Tensor]:
        """What was written, shaped as operands are."""
        values = super().of_slots()
        if self.of_a is not None:
            values["A"] = reduce_to(self.of_a, self.scan.x.values["A"].shape, 0)
        return values

    def tile(self, t0: int, chunks: int) -> ChannelTile:
        """A span of chunks with the levels of its tree."""
        return self.scan.tile(t0, chunks, keep=True)

    def span(self, tile: Tile, kept: Kept) -> dict[str, Tensor]:
        """Gradients of one span, [M, R, C, heads, …]; `self.dstate` goes from its end to its start."""
        assert isinstance(tile, ChannelTile)  # self.tile() made it
        scan, width = self.scan, tile.scores.shape[1]
        m, rows, c, heads, _ = tile.v.shape
        g, gu = self.cotangents(tile)
        v_head, gu_head = scan.by_head("v", tile.v), scan.by_head("gu", gu)
        scores = scan.masked_scores(tile, None, None)
        dv = torch.bmm(scores.transpose(1, 2), gu_head, out=scan.room("dv", *v_head.shape))
        # only what is on and below the diagonal is ever read
        dscores = torch.bmm(gu_head, v_head.transpose(1, 2), out=scan.room("dscores", len(v_head), c, c))
        dscores = dscores if c == width else pad(dscores, (0, width - c, 0, width - c))
        # through the states on either side, as far as q̃ and k̃ of whole chunks
        dq, dk = (scan.room(name, m, rows * heads, width, tile.q.shape[4]).zero_() for name in ("drows", "dcols"))
        g_in, v_out = scan.wide("entering", gu, None), scan.wide("leaving", tile.v, None)
        late, through = self.through_states(tile, kept.starts, g_in, v_out, dq[:, :, :c], dk[:, :, :c])
        assert through is not None  # there is a decay
        # down to q, k and logs of tokens
        dlogs = descend(tile.levels, dscores, (dq.flatten(0, 1), dk.flatten(0, 1)), through.flatten(0, 1), scan.room)
        dq, dk, dlogs = (x.view(m, rows, heads, width, -1)[..., :c, :] for x in (dq, dk, dlogs))
        self._to_tokens(tile, dq, dk, dlogs, dscores.diagonal(0, 1, 2)[:, :c].reshape(m, rows, heads, c, 1))
        out = {"v": self.of_values(tile, dv, late), "q": dq.transpose(2, 3), "k": dk.transpose(2, 3)}
        self.scales(tile, out, g, scores, kept)
        self._decays(tile, out, dlogs)
        return out

    def _to_tokens(self, tile: ChannelTile, dq: Tensor, dk: Tensor, dlogs: Tensor, own: Tensor) -> None:
        """Gradients of q̃ and k̃ of single tokens → of q and k, in place, and what logs have of it.

        Args:
            dq, dk, dlogs: [M, R, H, C, N].
            own: the gradient of a token's own score, [M, R, H, C, 1].
        """
        term, decays = self.scan.term, tile.decays[..., : dq.shape[3], :]
        q, k = (repeat_heads(t, dq.shape[2], 2) for t in tile.given)
        if term.row_inclusive:
            dq *= decays
            dlogs.addcmul_(q, dq)
        if not term.col_inclusive:
            dk *= decays
            dlogs.addcmul_(k, dk)
        if not term.strict:
            dq.addcmul_(own, k)
            dk.addcmul_(own, q)

    def columns(self, tile: Tile, out: dict[str, Tensor]) -> None:
        """Gradients of cols and log_cols, and v's own where they scale it."""
        assert isinstance(tile, ChannelTile)  # self.tile() made it
        if tile.columns is None:
            return
        slots = self.scan.slots
        along = (out["v"] * repeat_heads(self.read(self.scan.x.v, tile), tile.v.shape[3], 3)).sum(4)
        if (log_cols := slots.get("log_cols")) is not None:
            out["log_cols"] = along * tile.columns
            along = along * self.read(log_cols, tile).exp()
        if "cols" in slots:
            out["cols"] = along
        out["v"] = out["v"] * tile.columns[..., None]

    def _decays(self, tile: ChannelTile, out: dict[str, Tensor], dlogs: Tensor) -> None:
        """From the gradient of log decays [M, R, H, C, N], those of what they are made of."""
        slots = self.scan.slots
        if "channel" in slots:
            out["channel"] = dlogs.transpose(2, 3)
        if "log_a" in slots:
            out["log_a"] = dlogs.sum(4).transpose(2, 3)
        if (dt := slots.get("dt")) is not None and self.big_a is not None and self.of_a is not None:
            out["dt"] = torch.linalg.vecdot(dlogs, self.big_a).transpose(2, 3)
            self.of_a += torch.einsum("mrhcn,mrch->hn", dlogs, self.read(dt, tile))
