"""The backward pass of a linear term: states and their cotangents by blocks, then dQ, dK and the gradients of operands."""

from __future__ import annotations

import torch
from torch import Tensor

from ..base import Cotangents, Gradients, reduce_value, share_heads
from .calls import Kernel
from .kernels.exchange import exchange
from .kernels.gradients import gradients
from .kernels.tokens import passing, token_gradients
from .launch import Scan, Side, Sums, alike, ceil_div, contiguous, dense_last, or_else, strides
from .sizes import padded

EXCHANGE, GRADIENTS, PASSING, TOKENS = Kernel(exchange), Kernel(gradients), Kernel(passing), Kernel(token_gradients)


class Backward(Scan):
    """A linear term on its tensors, in reverse."""

    def backward(self, cotangents: Cotangents) -> Gradients:
        """Gradients of everything: states and their cotangents by blocks, then dV, dQ and dK, then the operands'."""
        p, x = self.problem, self.x
        dy, slots = dense_last(cotangents.y), self.slots_of(self.sizes.block)
        kept = torch.bfloat16 if self.dot == torch.bfloat16 else torch.float32
        states, dstates = (self.empty(slots, p.nheads, p.headdim, p.dstate, dtype=kept) for _ in range(2))
        dinitial = None if x.initial is None else self.empty(*x.initial.shape)
        wanted = "log_a" in x.values and cotangents.state is not None
        final = self.empty(self.rows, p.nheads, p.headdim, p.dstate) if wanted else None
        sums = self.prepare(chunks=False, blocks=True).blocks
        if self.rows and (self.tokens or dinitial is not None):
            v, dout = alike(self.v, dy, p.dtype)
            entering, leaving = contiguous(x.initial), contiguous(cotangents.state)
            if entering is not None and leaving is not None:
                entering, leaving = alike(entering, leaving, torch.float32)
            self.walk(sums, Side(v, entering, final, states), Side(dout, leaving, dinitial, dstates))
        dv, exchanged = self._exchange(sums, dy, states, dstates)
        dq, dk = self._gradients(sums, dy, states, dstates)
        values = self._by_token(exchanged, self._passing(states, dstates, final)) if x.values else {}
        dq, dk, dv = share_heads(dq, p.q_heads), share_heads(dk, p.k_heads), share_heads(dv, p.v_heads)
        return Gradients(dq, dk, dv, initial=dinitial, values=values)

    def _exchange(self, sums: Sums, dy: Tensor, states: Tensor, dstates: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """dV, and what tokens read and give: first without, then with pairs that do not decay."""
        p, t, x, z, nothing, slots = self.problem, self.term, self.x, self.sizes, self.q, len(states)
        dv = self.empty(p.batch, p.seqlen, p.nheads, p.headdim, dtype=torch.float32 if p.v_heads < p.nheads else x.out)
        u, w, wanted = self.slot("rows"), self.slot("cols"), bool(x.values)
        every = not {"rows", "cols", "log_cols"}.isdisjoint(x.values)
        shape = (slots, p.nheads, z.block)
        exchanged = tuple(self.empty(*shape) if flag else nothing for flag in (wanted, wanted, every, every))
        sides = 2 if wanted else 1
        splits = self._splits(sides * slots)
        if self.tokens and slots:
            self.run(
                EXCHANGE, (sides * slots, self.groups, splits),
                (
                    self.q, self.k, self.v, dy, or_else(u, nothing), or_else(w, nothing), or_else(self.cu, nothing), *sums,
                    states, dstates, dv, *exchanged,
                ),
                (*self._numbers, ceil_div(p.nheads, self.groups * splits), *self._strides(dy)),
                BLOCK=z.block, P=p.headdim, BP=z.rows_back, BN=z.state_back, CAUSAL=t.causal, STRICT=t.strict,
                ROWS=u is not None, COLS=w is not None, SUMS=wanted, ALL_SUMS=every,
                SKIP=(int(t.col_inclusive) - int(t.row_inclusive)) * self.decays, LOG_COLS=t.log_cols is not None,
                FACTORED=self.factored, NORMALIZE=self.dot == torch.float16, STAGES=z.stages_exchange, **self.common,
                num_warps=8,
            )  # fmt: skip
        return dv, exchanged

    @property
    def _numbers(self) -> tuple[int | float, ...]:
        p = self.problem
        return *self.packing, self.groups, p.nheads // p.q_heads, p.nheads // p.k_heads, p.nheads // p.v_heads, self.scale

    def _strides(self, dy: Tensor) -> tuple[int, ...]:
        return tuple(n for x in (self.q, self.k, self.v, dy, self.slot("rows"), self.slot("cols")) for n in strides(x))

    def _gradients(self, sums: Sums, dy: Tensor, states: Tensor, dstates: Tensor) -> tuple[Tensor, Tensor]:
        """dQ and dK, by groups of heads that share both."""
        p, t, z, nothing, slots = self.problem, self.term, self.sizes, self.q, len(states)
        tiles, u, w = ceil_div(p.dstate, z.state_back), self.slot("rows"), self.slot("cols")
        splits = self._splits(2 * slots * tiles)
        dq, dk = (
            self.empty(
                splits, p.batch, p.seqlen, self.groups, p.dstate,
                dtype=self.x.out if splits == 1 and heads == self.groups else torch.float32,
            )
            for heads in (p.q_heads, p.k_heads)
        )  # fmt: skip
        if self.tokens and slots:
            self.run(
                GRADIENTS, (2 * slots, self.groups * tiles, splits),
                (
                    self.q, self.k, self.v, dy, or_else(u, nothing), or_else(w, nothing), or_else(self.cu, nothing), *sums,
                    states, dstates, dq, dk,
                ),
                (*self._numbers, ceil_div(p.nheads, self.groups * splits), *self._strides(dy)),
                BLOCK=z.block, P=p.headdim, BP=z.rows_back, BN=z.state_back, CAUSAL=t.causal, STRICT=t.strict,
                ROWS=u is not None, COLS=w is not None, FACTORED=self.factored, NORMALIZE=self.dot == torch.float16,
                STAGES=z.stages_gradients, **self.common, num_warps=8,
            )  # fmt: skip
        return (dq[0], dk[0]) if splits == 1 else (dq.sum(0), dk.sum(0))

    def _passing(self, states: Tensor, dstates: Tensor, final: Tensor | None) -> Tensor:
        """⟨dS, S⟩ between blocks."""
        p, z, slots = self.problem, self.sizes, len(states)
        through = self.empty(slots, p.nheads)
        if self.tokens and slots and "log_a" in self.x.values:
            self.run(
                PASSING, (slots, p.nheads, 1), (states, dstates, or_else(final, states), or_else(self.cu, self.q), through),
                self.packing, BLOCK=z.block, P=p.headdim, BP=z.rows_back, N=p.dstate, BN=z.state_back, CAUSAL=self.term.causal,
                FINAL=final is not None, PACKED=self.cu is not None, num_warps=4,
            )  # fmt: skip
        return through

    def _by_token(self, exchanged: tuple[Tensor, ...], through: Tensor) -> dict[str, Tensor]:
        """Gradients of the operands."""
        p, x, t, z, nothing, slots = self.problem, self.x, self.term, self.sizes, self.q, len(through)
        shape, w = (p.batch, p.seqlen, p.nheads), self.slot("cols")
        log_a = self.empty(*shape) if "log_a" in x.values else None
        rows = self.empty(*shape) if "rows" in x.values else None
        cols = self.empty(*shape) if w is not None or "log_cols" in x.values else None
        heads = min(32, padded(p.nheads))
        if self.tokens and slots:
            self.run(
                TOKENS, (slots, ceil_div(p.nheads, heads), 1),
                (
                    *exchanged, through, or_else(self.cu, nothing),
                    or_else(log_a, nothing), or_else(rows, nothing), or_else(cols, nothing),
                ),
                self.packing, BLOCK=z.block, HEADS=heads, CAUSAL=t.causal, ROW_INCLUSIVE=t.row_inclusive,
                COL_INCLUSIVE=t.col_inclusive, DLOG_A=log_a is not None, DU=rows is not None, DW=cols is not None,
                PACKED=self.cu is not None, num_warps=4,
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
