"""The backward pass of decay per channel: S and dS of every chunk, all gradients by chunks, and what torch sums of them."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.functional import pad

from ...ir.resolve import reduce_to, repeat_heads
from ...ir.terms import Linear
from ..base import Config, Cotangents, Gradients, Inputs, reduce_value, share_heads
from .backward import filled
from .calls import Kernel, Launching
from .channel import ChannelScan, filled_up, pass_on
from .kernels.channel_gradients import channel_gradients
from .launch import contiguous, dense_last, or_else, strides
from .sizes import padded

GRADIENTS = Kernel(channel_gradients)


def in_whole(x: Inputs, cotangents: Cotangents) -> tuple[Inputs, Cotangents]:
    """Both with sizes filled up to what loads sixteen bytes at a time (`backward.in_whole` says why)."""
    whole, p = filled_up(x), x.problem
    state, more = cotangents.state, (whole.problem.dstate - p.dstate, whole.problem.headdim - p.headdim)
    state = None if state is None else pad(state, (0, more[0], 0, more[1]))
    return whole, Cotangents(filled(cotangents.y, whole.problem.headdim), state)


class ChannelBackward(ChannelScan):
    """A linear term with a decay per channel on its tensors, in reverse; they load in whole."""

    def backward(self, cotangents: Cotangents) -> Gradients:
        """Gradients of everything."""
        p, x, rows = self.problem, self.x, self.x.per_head("rows")
        dy = dense_last(cotangents.y if rows is None else self.operand(cotangents.y * rows[..., None]))
        states, dstates = (self.empty(self.slots, p.nheads, p.headdim, p.dstate, dtype=self.kept) for _ in range(2))
        dinitial = None if x.initial is None else self.empty(*x.initial.shape)
        tokens = (p.batch, p.seqlen, p.nheads)
        dq, dk = (
            self.empty(*tokens, p.dstate, dtype=x.out if heads == p.nheads else torch.float32)
            for heads in (p.q_heads, p.k_heads)
        )  # fmt: skip
        plain = self.columns is None and p.v_heads == p.nheads
        dv = self.empty(*tokens, p.headdim, dtype=x.out if plain else torch.float32)
        dlogs = self.empty(*tokens, p.dstate)
        if not self.tokens:
            pass_on(cotangents.state, dinitial)
        elif self.rows:
            sums = self.sums()
            self.walk(sums, states, None, dy, (dstates, contiguous(cotangents.state), dinitial))
            self.output(sums, dy, dstates, dv, turned=True)
            self.gradients(sums, dy, (states, dstates), (dq, dk, dlogs))
        values = self._of_logs(dlogs)
        if rows is not None:
            y, _ = self.unscaled(None, self.kept, torch.float32)
            values["rows"] = (cotangents.y * y).sum(3)
        if self.columns is not None:
            values |= self._of_columns(dv)
            dv = dv * self.columns
        shaped = {name: reduce_value(grad, x.values[name]) for name, grad in values.items() if name != "A"}
        if "A" in values:
            shaped["A"] = reduce_to(values["A"], x.values["A"].shape, 0)
        return Gradients(
            share_heads(dq, p.q_heads), share_heads(dk, p.k_heads), share_heads(dv, p.v_heads), dinitial, shaped
        )  # fmt: skip

    def gradients(
        self, sums: Tensor, dy: Tensor, states: tuple[Tensor, Tensor], results: tuple[Tensor, Tensor, Tensor]
    ) -> None:
        """dQ, dK and the gradient of log decays into `results`, from S as it enters and dS as it leaves chunks."""
        p, z = self.problem, self.tiles
        self.run(
            GRADIENTS, (self.slots * p.nheads, 1, 1),
            (self.q, self.k, self.v, dy, or_else(self.cu, self.q), sums, *states, *results),
            (
                *self.packing, *self.shares, p.nheads // self.v.shape[2], self.levels, self.scale,
                *strides(self.q), *strides(self.k), *strides(self.v), *strides(dy),
            ),
            BP=z.rows_back, BN=padded(p.dstate), STRICT=self.term.strict, **self.common, num_warps=z.gradients,
        )  # fmt: skip

    def _of_logs(self, dlogs: Tensor) -> dict[str, Tensor]:
        """From the gradient of log decays, `(batch, seqlen, nheads, dstate)`, those of what they are made of."""
        p, values = self.problem, self.x.values
        out = {"channel": dlogs} if "channel" in values else {}
        if "log_a" in values:
            out["log_a"] = dlogs.sum(3)
        if "dt" in values:
            out["dt"] = torch.einsum("bthn,hn->bth", dlogs, repeat_heads(values["A"].float(), p.nheads, 0))
            dt = self.x.per_head("dt")
            assert dt is not None  # it is there
            out["A"] = torch.einsum("bthn,bth->hn", dlogs, dt.float())
        return out

    def _of_columns(self, dv: Tensor) -> dict[str, Tensor]:
        """Gradients of cols and log_cols, from that of V with both of them in it."""
        assert self.columns is not None
        along = (dv * repeat_heads(self.x.v, self.problem.nheads, 2)).sum(3)
        out, w, logs = {}, self.x.per_head("cols"), self.x.per_head("log_cols")
        if logs is not None:
            out["log_cols"] = along * self.columns[..., 0]
            along = along * logs.float().exp()
        if w is not None:
            out["cols"] = along
        return out


def backward(term: Linear, x: Inputs, config: Config, cotangents: Cotangents) -> Gradients:
    """Gradients of everything, from any tensors."""
    (whole, given), p = in_whole(x, cotangents), x.problem
    with Launching(p, x.q.device):
        grads = ChannelBackward(term, whole, config).backward(given)
    for name in ("channel", "A"):
        if name in grads.values:
            grads.values[name] = grads.values[name][..., : p.dstate]
    return replace(
        grads, q=grads.q[..., : p.dstate], k=grads.k[..., : p.dstate], v=grads.v[..., : p.headdim],
        initial=None if grads.initial is None else grads.initial[..., : p.headdim, : p.dstate],
    )  # fmt: skip
