"""From tensors to kernels: grids, strides and allocation for one linear term. No arithmetic happens here."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...config import triton_interpreted
from ...ir.problem import common_heads
from ...ir.terms import Linear
from ..base import Config, Cotangents, Gradients, Inputs, Output, reduce_value, share_heads
from .kernels.gradients import gradients, token_gradients
from .kernels.prepare import prepare
from .kernels.scan import scan

BLOCK = 64
"""Tokens between the states that the backward pass keeps."""
DOTS = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}


@dataclass(frozen=True)
class Chunks:
    """What `prepare` gives: scores [slots, groups, L, L], ρ and κ [slots, nheads, L], their end [slots, nheads]."""

    scores: Tensor
    rho: Tensor
    kappa: Tensor
    total: Tensor


class Scan:
    """A linear term on its tensors."""

    def __init__(self, term: Linear, x: Inputs, config: Config) -> None:
        p = x.problem
        self.term, self.x, self.config, self.problem = term, x, config, p
        self.chunk = config.chunk_size or 32
        self.groups = common_heads(p)
        self.scale = float(term.sign * x.scale)
        self.q, self.k, self.v = (dense_last(t) for t in (x.q, x.k, x.v))
        self.cu = x.boundaries()
        self.rows = p.batch if self.cu is None else self.cu.numel() - 1
        self.tokens = p.batch * p.seqlen
        self.slots = self._slots(self.chunk)
        self.decays = term.log_a is not None or term.log_cols is not None
        self.apart = term.row_inclusive != term.col_inclusive or term.log_cols is not None
        # Triton's interpreter multiplies the bits of bfloat16 as if they were integers
        self.dot = torch.float32 if p.dtype == torch.bfloat16 and triton_interpreted() else p.dtype
        self.block_n = min(max(triton.next_power_of_2(p.dstate), 16), 128)
        self.block_p = min(max(triton.next_power_of_2(p.headdim), 16), 64)

    def _slots(self, size: int) -> int:
        p = self.problem
        return p.batch * triton.cdiv(p.seqlen, size) if self.cu is None else self.tokens // size + self.rows

    @cached_property
    def common(self) -> dict[str, Any]:
        """The compile-time switches that every kernel shares."""
        return {
            "L": self.chunk, "N": self.problem.dstate, "BN": self.block_n,
            "DECAY": self.decays, "APART": self.apart, "EXACT": self.dot == torch.float32,
            "PACKED": self.cu is not None, "DOT": DOTS[self.dot], "PRECISION": "tf32x3",
        }  # fmt: skip

    def slot(self, name: str) -> Tensor | None:
        """An operand `(batch, seqlen, nheads)`, a view wherever it can be."""
        return self.x.per_head(name)

    def empty(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Memory on the term's device."""
        return torch.empty(shape, dtype=dtype, device=self.q.device)

    # --- launches -------------------------------------------------------------------------------------------------------

    @cached_property
    def chunks(self) -> Chunks:
        """Scores and sums of log decays of every chunk."""
        p, t = self.problem, self.term
        width = self.chunk * (2 if self.dot == torch.float32 else 1)
        slots = self.slots
        rho = self.empty(slots, p.nheads, width) if self.decays else self.q
        out = Chunks(
            self.empty(slots, self.groups, self.chunk, self.chunk, dtype=self.dot), rho,
            torch.empty_like(rho) if self.decays and self.apart else rho,
            self.empty(slots, p.nheads) if self.decays else self.q,
        )  # fmt: skip
        log_a, log_cols = self.slot("log_a"), self.slot("log_cols")
        heads = min(16, triton.next_power_of_2(p.nheads))
        if slots:
            prepare[slots, self.groups + (triton.cdiv(p.nheads, heads) if self.decays else 0)](
                self.q, self.k, _or(log_a, self.q), _or(log_cols, self.q), _or(self.cu, self.q),
                out.scores, out.rho, out.kappa, out.total,
                self.rows, max(p.seqlen, 1), self.tokens, p.nheads, self.groups,
                self.groups // p.q_heads, self.groups // p.k_heads,
                *strides(self.q), *strides(self.k), *strides(log_a), *strides(log_cols),
                HEADS=heads, CAUSAL=t.causal, STRICT=t.strict, ROW_INCLUSIVE=t.row_inclusive, COL_INCLUSIVE=t.col_inclusive,
                LOG_COLS=log_cols is not None, **{**self.common, "DECAY": log_a is not None}, num_warps=4,
            )  # fmt: skip
        return out

    def walk(
        self,
        v: Tensor,
        y: Tensor | None = None,
        *,
        transposed: bool = False,
        entering: Tensor | None = None,
        leaving: Tensor | None = None,
        blocks: Tensor | None = None,
    ) -> None:
        """The scan over V (transposed: over dY), in segments if the config says so; what is None is not written."""
        p, segments = self.problem, self.config.segments
        per_segment = triton.cdiv(triton.cdiv(p.seqlen, self.chunk), segments)
        if segments == 1:
            self._walk(v, y, transposed, entering, leaving, blocks, (1, per_segment), None, False)
            return
        shape = (segments, self.rows, p.nheads)
        parts = (self.empty(*shape, p.headdim, p.dstate), self.empty(*shape))
        self._walk(v, None, transposed, None, None, None, (segments, per_segment), parts, True)
        self._walk(v, y, transposed, entering, leaving, blocks, (segments, per_segment), parts, False)

    def _walk(
        self, v: Tensor, y: Tensor | None, transposed: bool, entering: Tensor | None, leaving: Tensor | None,
        blocks: Tensor | None, segments: tuple[int, int], parts: tuple[Tensor, Tensor] | None, first: bool,
    ) -> None:  # fmt: skip
        p, t, c, nothing = self.problem, self.term, self.chunks, self.q
        q, k, u, w, scales = self.q, self.k, self.slot("rows"), self.slot("cols"), (self.scale, 1.0)
        q_share, k_share = p.nheads // p.q_heads, p.nheads // p.k_heads
        if transposed:
            q, k, u, w, scales, q_share, k_share = k, q, w, u, (1.0, self.scale), k_share, q_share
        tiles = triton.cdiv(p.headdim, self.block_p)
        scan[p.nheads * tiles, self.rows, segments[0]](
            q, k, v, _or(y, nothing), _or(u, nothing), _or(w, nothing), _or(self.cu, nothing),
            c.scores, c.rho, c.kappa, c.total, _or(entering, nothing), _or(leaving, nothing), _or(blocks, nothing),
            *(parts or (nothing, nothing)),
            max(p.seqlen, 1), self.tokens, p.nheads, self.groups, q_share, k_share, p.nheads // v.shape[2], *scales, segments[1],
            *strides(q), *strides(k), *strides(v), *strides(y), *strides(u), *strides(w),
            BLOCK=BLOCK, P=p.headdim, BP=self.block_p, BN2=max(triton.next_power_of_2(p.dstate) - 128, 0),
            FORWARD=t.causal != transposed, TRANSPOSED=transposed, ROWS=u is not None, COLS=w is not None,
            OUTPUT=y is not None, ENTERING=entering is not None, LEAVING=leaving is not None, BLOCKS=blocks is not None,
            PARTS=first, SEGMENTS=parts is not None and not first, NORMALIZE=self.dot == torch.float16, STAGES=3,
            **self.common, num_warps=4,
        )  # fmt: skip

    # --- passes ---------------------------------------------------------------------------------------------------------

    def forward(self) -> Output:
        """Y and the final states."""
        p, x = self.problem, self.x
        y = self.empty(p.batch, p.seqlen, p.nheads, p.headdim, dtype=x.out)
        state = self.empty(self.rows, p.nheads, p.headdim, p.dstate, dtype=p.state_dtype) if x.wants_state else None
        initial = None if x.initial is None else x.initial.contiguous()
        if self.rows and (self.tokens or state is not None):
            self.walk(self.v, y, entering=initial, leaving=state)
        return Output(y, state)

    def backward(self, cotangents: Cotangents) -> Gradients:
        """Gradients of everything: states forward, dV and cotangents of states backward, then dQ, dK and sums by block."""
        p, x, t = self.problem, self.x, self.term
        dy = dense_last(cotangents.y)
        slots = self._slots(BLOCK)
        kept = torch.bfloat16 if self.dot == torch.bfloat16 else torch.float32
        states, dstates = (self.empty(slots, p.nheads, p.headdim, p.dstate, dtype=kept) for _ in range(2))
        shared = p.v_heads < p.nheads
        dv = self.empty(p.batch, p.seqlen, p.nheads, p.headdim, dtype=torch.float32 if shared else x.out)
        initial, dfinal = x.initial, cotangents.state
        dinitial = None if initial is None else self.empty(*initial.shape)
        if self.rows and (self.tokens or dinitial is not None):
            self.walk(self.v, blocks=states, entering=None if initial is None else initial.contiguous())
            self.walk(
                dy, dv, transposed=True, blocks=dstates, leaving=dinitial,
                entering=None if dfinal is None else dfinal.contiguous(),
            )  # fmt: skip
        dq, dk, values = self._contract(dy, states, dstates)
        return Gradients(dq, dk, share_heads(dv, p.v_heads), initial=dinitial, values=values)

    def _contract(self, dy: Tensor, states: Tensor, dstates: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """dQ, dK and the gradients of operands, from the states at block ends."""
        p, x, t, c, nothing = self.problem, self.x, self.term, self.chunks, self.q
        slots, tiles, splits = len(states), triton.cdiv(p.dstate, self.block_n), self._splits(len(states))
        u, w = self.slot("rows"), self.slot("cols")
        direct = splits == 1 and p.q_heads == p.k_heads == self.groups
        dq, dk = (
            self.empty(splits, p.batch, p.seqlen, self.groups, p.dstate, dtype=x.out if direct else torch.float32)
            for _ in range(2)
        )
        wanted = bool(x.values)
        sums = self.empty(5 if wanted else 0, tiles, slots, p.nheads, BLOCK)
        through = self.empty(tiles, slots, p.nheads) if wanted else nothing
        if self.tokens and slots:
            gradients[slots, self.groups * tiles, splits](
                self.q, self.k, self.v, dy, _or(u, nothing), _or(w, nothing), _or(self.cu, nothing),
                c.rho, c.kappa, c.total, states, dstates, dq, dk, sums if wanted else nothing, through,
                self.rows, max(p.seqlen, 1), self.tokens, p.nheads, self.groups,
                p.nheads // p.q_heads, p.nheads // p.k_heads, p.nheads // p.v_heads, self.scale,
                triton.cdiv(p.nheads // self.groups, splits),
                *strides(self.q), *strides(self.k), *strides(self.v), *strides(dy), *strides(u), *strides(w),
                BLOCK=BLOCK, P=p.headdim, BP=self.block_p, CAUSAL=t.causal, STRICT=t.strict,
                SKIP=int(t.col_inclusive and not t.row_inclusive), ROWS=u is not None, COLS=w is not None, SUMS=wanted,
                NORMALIZE=self.dot == torch.float16, STAGES=2, **self.common, num_warps=8,
            )  # fmt: skip
        values = self._by_token(sums, through, slots, tiles) if wanted else {}
        return share_heads(_summed(dq), p.q_heads), share_heads(_summed(dk), p.k_heads), values

    def _by_token(self, sums: Tensor, through: Tensor, slots: int, tiles: int) -> dict[str, Tensor]:
        p, x, t, nothing = self.problem, self.x, self.term, self.q
        shape = (p.batch, p.seqlen, p.nheads)
        log_a = self.empty(*shape) if "log_a" in x.values else None
        rows = self.empty(*shape) if "rows" in x.values else None
        cols = self.empty(*shape) if "cols" in x.values or "log_cols" in x.values else None
        heads = min(32, triton.next_power_of_2(p.nheads))
        if self.tokens and slots:
            token_gradients[slots, triton.cdiv(p.nheads, heads)](
                sums, through, _or(self.cu, nothing), _or(log_a, nothing), _or(rows, nothing), _or(cols, nothing),
                self.rows, max(p.seqlen, 1), self.tokens, p.nheads, tiles,
                BLOCK=BLOCK, HEADS=heads, CAUSAL=t.causal, ROW_INCLUSIVE=t.row_inclusive, COL_INCLUSIVE=t.col_inclusive,
                DECAY=log_a is not None, ROWS=rows is not None, COLS=cols is not None, PACKED=self.cu is not None, num_warps=4,
            )  # fmt: skip
        out = {"log_a": log_a, "rows": rows, "cols": cols if "cols" in x.values else None}
        if "log_cols" in x.values:
            assert cols is not None  # made above
            w = self.slot("cols")
            out["log_cols"] = cols if w is None else cols * w
        return {name: reduce_value(grad, x.values[name]) for name, grad in out.items() if grad is not None}

    def _splits(self, slots: int) -> int:
        """Into how many parts the heads of a group are taken, so that blocks fill the device."""
        programs, share = slots * self.groups, self.problem.nheads // self.groups
        return min(max(132 // max(programs, 1), 1), share)


def dense_last(x: Tensor) -> Tensor:
    """x with unit stride along its last axis: itself wherever it can be."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def strides(x: Tensor | None) -> tuple[int, int, int]:
    """Of batch, seqlen and heads; zeros for what is absent."""
    return (0, 0, 0) if x is None else (x.stride(0), x.stride(1), x.stride(2))


def _or(x: Tensor | None, other: Tensor) -> Tensor:
    """A kernel takes a pointer for what it does not read, too."""
    return other if x is None else x


def _summed(x: Tensor) -> Tensor:
    return x[0] if len(x) == 1 else x.sum(0)
