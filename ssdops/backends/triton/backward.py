"""The backward pass of a linear term: states and their cotangents by blocks, then dQ, dK and the gradients of operands."""

from __future__ import annotations

import torch
from torch import Tensor

from ..base import Cotangents, Gradients, reduce_value, share_heads
from .calls import Kernel
from .kernels.gradients import contract
from .kernels.tokens import passing, token_gradients
from .launch import Scan, Walk, ceil_div, contiguous, dense_last, or_else, strides
from .sizes import padded

CONTRACT, PASSING, TOKENS = Kernel(contract), Kernel(passing), Kernel(token_gradients)


class Backward(Scan):
    """A linear term on its tensors, in reverse."""

    keep = True

    def backward(self, cotangents: Cotangents) -> Gradients:
        """Gradients of everything: states forward, dV and cotangents of states backward, then dQ, dK and sums by block."""
        p, x = self.problem, self.x
        dy, slots = dense_last(cotangents.y), self.slots_of(self.sizes.block)
        kept = torch.bfloat16 if self.dot == torch.bfloat16 else torch.float32
        states, dstates = (self.empty(slots, p.nheads, p.headdim, p.dstate, dtype=kept) for _ in range(2))
        dv = self.empty(p.batch, p.seqlen, p.nheads, p.headdim, dtype=torch.float32 if p.v_heads < p.nheads else x.out)
        dinitial = None if x.initial is None else self.empty(*x.initial.shape)
        if self.rows and (self.tokens or dinitial is not None):
            self.walk(self.v, None, Walk(entering=contiguous(x.initial), blocks=states))
            self.walk(dy, dv, Walk(True, contiguous(cotangents.state), dinitial, dstates))
        dq, reads = self._contract(dy, states, reads=True)
        dk, adds = self._contract(dy, dstates, reads=False)
        values = self._by_token(reads, adds, states, dstates) if x.values else {}
        dq, dk, dv = share_heads(dq, p.q_heads), share_heads(dk, p.k_heads), share_heads(dv, p.v_heads)
        return Gradients(dq, dk, dv, initial=dinitial, values=values)

    def _contract(self, dy: Tensor, states: Tensor, reads: bool) -> tuple[Tensor, Tensor]:
        """dQ (reads) or dK by groups of heads that share both, and what tokens exchange, for the gradients of operands."""
        p, t, c, z, nothing, slots = self.problem, self.term, self.chunks, self.sizes, self.q, len(states)
        tiles, wanted, u, w = ceil_div(p.dstate, z.state_back), bool(self.x.values), self.slot("rows"), self.slot("cols")
        splits = self._splits(slots * tiles)
        direct = splits == 1 and (p.q_heads if reads else p.k_heads) == self.groups
        out = self.empty(splits, p.batch, p.seqlen, self.groups, p.dstate, dtype=self.x.out if direct else torch.float32)
        sums = self.empty(tiles if wanted else 0, 3, slots, p.nheads, z.block)
        a, b, x, y = (self.q, self.k, dy, self.v) if reads else (self.k, self.q, self.v, dy)
        if self.tokens and slots:
            CONTRACT(
                (slots, self.groups * tiles, splits),
                (
                    a, b, x, y, or_else(u, nothing), or_else(w, nothing), or_else(self.cu, nothing),
                    c.block_rho, c.block_kappa, c.block_total, states, out, sums,
                ),
                (
                    *self.packing, self.groups, *(p.nheads // tensor.shape[2] for tensor in (a, b, x, y)),
                    self.scale, self.scale if reads else 1.0, ceil_div(p.nheads, self.groups * splits),
                    *strides(a), *strides(b), *strides(x), *strides(y), *strides(u), *strides(w),
                ),
                BLOCK=z.block, P=p.headdim, BP=z.rows_back, BN=z.state_back, READS=reads, CAUSAL=t.causal, STRICT=t.strict,
                ROWS=u is not None, COLS=w is not None, SUMS=wanted,
                SCALES=not {"rows", "cols", "log_cols"}.isdisjoint(self.x.values),
                SKIP=int(t.col_inclusive and not t.row_inclusive), NORMALIZE=self.dot == torch.float16,
                STAGES=z.stages_back, **self.common, num_warps=8,
            )  # fmt: skip
        return (out[0] if splits == 1 else out.sum(0)), sums

    def _by_token(self, reads: Tensor, adds: Tensor, states: Tensor, dstates: Tensor) -> dict[str, Tensor]:
        """Gradients of the operands."""
        p, x, t, z, nothing, slots = self.problem, self.x, self.term, self.sizes, self.q, len(states)
        shape, w = (p.batch, p.seqlen, p.nheads), self.slot("cols")
        log_a = self.empty(*shape) if "log_a" in x.values else None
        rows = self.empty(*shape) if "rows" in x.values else None
        cols = self.empty(*shape) if w is not None or "log_cols" in x.values else None
        through = self.empty(slots, p.nheads)
        if self.tokens and slots:
            if log_a is not None:
                PASSING(
                    (slots, p.nheads, 1),
                    (states, dstates, or_else(self.cu, nothing), self.chunks.block_total, through), self.packing,
                    BLOCK=z.block, P=p.headdim, BP=z.rows_back, N=p.dstate, BN=z.state_back, PACKED=self.cu is not None,
                    num_warps=4,
                )  # fmt: skip
            heads = min(32, padded(p.nheads))
            TOKENS(
                (slots, ceil_div(p.nheads, heads), 1),
                (
                    reads, adds, through, or_else(self.cu, nothing),
                    or_else(log_a, nothing), or_else(rows, nothing), or_else(cols, nothing),
                ),
                (*self.packing, len(reads)),
                BLOCK=z.block, HEADS=heads, CAUSAL=t.causal, ROW_INCLUSIVE=t.row_inclusive, COL_INCLUSIVE=t.col_inclusive,
                DLOG_A=log_a is not None, DU=rows is not None, DW=cols is not None, PACKED=self.cu is not None, num_warps=4,
            )  # fmt: skip
        out = {"log_a": log_a, "rows": rows, "cols": cols if w is not None else None}
        if "log_cols" in x.values:
            assert cols is not None  # made above
            out["log_cols"] = cols if w is None else cols * w
        return {name: reduce_value(grad, x.values[name]) for name, grad in out.items() if grad is not None}

    def _splits(self, programs: int) -> int:
        """Into how many parts the heads of a group are taken, so that blocks fill the device."""
        programs, share = programs * self.groups, self.problem.nheads // self.groups
        return min(max(self.problem.target.multiprocessors // max(programs, 1), 1), share)
