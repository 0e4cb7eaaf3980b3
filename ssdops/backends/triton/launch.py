"""From tensors to kernels: grids, strides and allocation for one linear term. No arithmetic happens here."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from ...config import triton_interpreted
from ...ir.problem import common_heads
from ...ir.terms import Linear
from ..base import Config, Cotangents, Gradients, Inputs, Output, reduce_value, share_heads
from .calls import Kernel
from .kernels.gradients import contract
from .kernels.prepare import prepare
from .kernels.scan import scan
from .kernels.tokens import passing, token_gradients
from .sizes import padded, sizes

PREPARE, SCAN, CONTRACT, PASSING, TOKENS = (Kernel(fn) for fn in (prepare, scan, contract, passing, token_gradients))
SPAN = 60.0
"""How far, in units of log 2, decays inside a chunk may lie from their middle to be taken apart into factors."""
DOTS = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}


@dataclass(frozen=True)
class Chunks:
    """What `prepare` gives; its docstring has the shapes."""

    scores: Tensor
    rho: Tensor
    kappa: Tensor
    total: Tensor
    center: Tensor
    block_rho: Tensor
    block_kappa: Tensor
    block_total: Tensor


@dataclass(frozen=True)
class Walk:
    """One walk of the scan, and what it reads and leaves besides Y.

    Attributes:
        transposed: the scan of Lᵀ over dY instead of that of L over V.
        entering, leaving: states before the first and after the last chunk.
        blocks: the state that enters each block of tokens, [blocks, nheads, P, N].
    """

    transposed: bool = False
    entering: Tensor | None = None
    leaving: Tensor | None = None
    blocks: Tensor | None = None


class Scan:
    """A linear term on its tensors; `keep` if the backward pass is to come."""

    def __init__(self, term: Linear, x: Inputs, config: Config, keep: bool = False) -> None:
        p = x.problem
        self.term, self.x, self.config, self.problem = term, x, config, p
        self.sizes, self.keep = sizes(p, config.chunk_size), keep
        self.groups = common_heads(p)
        self.scale = float(term.sign * x.scale)
        self.q, self.k, self.v = (dense_last(t) for t in (x.q, x.k, x.v))
        self.cu = x.boundaries()
        self.rows = p.batch if self.cu is None else self.cu.numel() - 1
        self.tokens = p.batch * p.seqlen
        self.slots = self._slots(self.sizes.chunk)
        self.packing = (self.rows, max(p.seqlen, 1), self.tokens, p.nheads)
        self.decays = term.log_a is not None or term.log_cols is not None
        self.apart = term.row_inclusive != term.col_inclusive or term.log_cols is not None
        # Triton's interpreter multiplies the bits of bfloat16 as if they were integers
        self.dot = torch.float32 if p.dtype == torch.bfloat16 and triton_interpreted() else p.dtype

    def _slots(self, size: int) -> int:
        p = self.problem
        return p.batch * ceil_div(p.seqlen, size) if self.cu is None else self.tokens // size + self.rows

    @cached_property
    def common(self) -> dict[str, Any]:
        """The compile-time switches that every kernel shares."""
        return {
            "N": self.problem.dstate,
            "DECAY": self.decays, "APART": self.apart,
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
        """Scores and sums of log decays of every chunk, and of every block if the backward pass is to come."""
        p, t, z, slots, blocks = self.problem, self.term, self.sizes, self.slots, self._slots(self.sizes.block)
        scores = self.empty(slots, self.groups, z.chunk, z.chunk, dtype=self.dot)
        if self.decays:
            wide, kept = torch.float64 if p.dtype == torch.float32 else torch.float32, self.keep * blocks
            rho, block_rho = (self.empty(n, p.nheads, size, dtype=wide) for n, size in ((slots, z.chunk), (kept, z.block)))
            kappa, block_kappa = (torch.empty_like(x) if self.apart else x for x in (rho, block_rho))
            total, block_total = (self.empty(n, p.nheads, dtype=wide) for n in (slots, kept))
            out = Chunks(scores, rho, kappa, total, self.empty(slots, p.nheads), block_rho, block_kappa, block_total)
        else:
            out = Chunks(scores, *(self.q,) * 7)
        log_a, log_cols = self.slot("log_a"), self.slot("log_cols")
        heads = min(16, padded(p.nheads))
        if slots:
            PREPARE(
                (slots, self.groups + (ceil_div(p.nheads, heads) if self.decays else 0), 1),
                (
                    self.q, self.k, _or(log_a, self.q), _or(log_cols, self.q), _or(self.cu, self.q), out.scores,
                    out.rho, out.kappa, out.total, out.center, out.block_rho, out.block_kappa, out.block_total,
                ),
                (
                    *self.packing, self.groups, blocks, self.groups // p.q_heads, self.groups // p.k_heads,
                    *strides(self.q), *strides(self.k), *strides(log_a), *strides(log_cols),
                ),
                L=z.chunk, BLOCK=z.block, BN=z.state, HEADS=heads, CAUSAL=t.causal, STRICT=t.strict,
                ROW_INCLUSIVE=t.row_inclusive, COL_INCLUSIVE=t.col_inclusive, LOG_COLS=log_cols is not None,
                BLOCKS=self.keep, SPAN=SPAN, **{**self.common, "DECAY": log_a is not None}, num_warps=4,
            )  # fmt: skip
        return out

    def walk(self, v: Tensor, y: Tensor | None, walk: Walk) -> None:
        """The scan over V (transposed: over dY), in segments if the config says so; what is None is not written."""
        p, segments = self.problem, self.config.segments
        if segments == 1:
            self._launch(v, y, walk, None, first=False)
            return
        shape = (segments, self.rows, p.nheads)
        parts = (self.empty(*shape, p.headdim, p.dstate), self.empty(*shape))
        self._launch(v, None, Walk(walk.transposed), parts, first=True)
        self._launch(v, y, walk, parts, first=False)

    def _launch(self, v: Tensor, y: Tensor | None, walk: Walk, parts: tuple[Tensor, Tensor] | None, first: bool) -> None:
        p, t, c, z, nothing, segments = self.problem, self.term, self.chunks, self.sizes, self.q, self.config.segments
        q, k, u, w, scales = self.q, self.k, self.slot("rows"), self.slot("cols"), (self.scale, 1.0)
        q_share, k_share = p.nheads // p.q_heads, p.nheads // p.k_heads
        if walk.transposed:
            q, k, u, w, scales, q_share, k_share = k, q, w, u, (1.0, self.scale), k_share, q_share
        SCAN(
            (p.nheads * ceil_div(p.headdim, z.rows) * self.rows, 1, segments),
            (
                q, k, v, _or(y, nothing), _or(u, nothing), _or(w, nothing), _or(self.cu, nothing),
                c.scores, c.rho, c.kappa, c.total, c.center, _or(walk.entering, nothing), _or(walk.leaving, nothing),
                _or(walk.blocks, nothing), *(parts or (nothing, nothing)),
            ),
            (
                *self.packing, self.groups, q_share, k_share, p.nheads // v.shape[2], *scales,
                ceil_div(ceil_div(p.seqlen, z.chunk), segments),
                *strides(q), *strides(k), *strides(v), *strides(y), *strides(u), *strides(w),
            ),
            L=z.chunk, BLOCK=z.block, P=p.headdim, BP=z.rows, BN=z.state, BN2=padded(p.dstate) - z.state,
            FORWARD=t.causal != walk.transposed, TRANSPOSED=walk.transposed, ROWS=u is not None, COLS=w is not None,
            OUTPUT=y is not None, ENTERING=walk.entering is not None, LEAVING=walk.leaving is not None,
            BLOCKS=walk.blocks is not None, PARTS=first, SEGMENTS=parts is not None and not first,
            FACTORED=y is not None and self.decays and p.dtype == torch.bfloat16, NORMALIZE=self.dot == torch.float16,
            STAGES=z.stages,
            **self.common, num_warps=z.warps_back if walk.blocks is not None else 4,
            maxnreg=z.registers if y is not None and not walk.transposed else None,
        )  # fmt: skip

    # --- passes ---------------------------------------------------------------------------------------------------------

    def forward(self) -> Output:
        """Y and the final states."""
        p, x = self.problem, self.x
        y = self.empty(p.batch, p.seqlen, p.nheads, p.headdim, dtype=x.out)
        state = self.empty(self.rows, p.nheads, p.headdim, p.dstate, dtype=p.state_dtype) if x.wants_state else None
        if self.rows and (self.tokens or state is not None):
            self.walk(self.v, y, Walk(entering=contiguous(x.initial), leaving=state))
        return Output(y, state)

    def backward(self, cotangents: Cotangents) -> Gradients:
        """Gradients of everything: states forward, dV and cotangents of states backward, then dQ, dK and sums by block."""
        p, x = self.problem, self.x
        dy, slots = dense_last(cotangents.y), self._slots(self.sizes.block)
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
                    a, b, x, y, _or(u, nothing), _or(w, nothing), _or(self.cu, nothing),
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
                    (states, dstates, _or(self.cu, nothing), self.chunks.block_total, through), self.packing,
                    BLOCK=z.block, P=p.headdim, BP=z.rows_back, N=p.dstate, BN=z.state_back, PACKED=self.cu is not None,
                    num_warps=4,
                )  # fmt: skip
            heads = min(32, padded(p.nheads))
            TOKENS(
                (slots, ceil_div(p.nheads, heads), 1),
                (
                    reads, adds, through, _or(self.cu, nothing), _or(log_a, nothing), _or(rows, nothing), _or(cols, nothing),
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


def ceil_div(a: int, b: int) -> int:
    """How many b it takes to cover a."""
    return -(-a // b)


def contiguous(x: Tensor | None) -> Tensor | None:
    """x laid out in order."""
    return None if x is None else x.contiguous()


def dense_last(x: Tensor) -> Tensor:
    """x with unit stride along its last axis: itself wherever it can be."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def strides(x: Tensor | None) -> tuple[int, int, int]:
    """Of batch, seqlen and heads; zeros for what is absent."""
    return (0, 0, 0) if x is None else (x.stride(0), x.stride(1), x.stride(2))


def _or(x: Tensor | None, other: Tensor) -> Tensor:
    """A kernel takes a pointer for what it does not read, too."""
    return other if x is None else x
