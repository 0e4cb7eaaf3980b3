"""From tensors to kernels: grids, strides and allocation for one linear term. No arithmetic happens here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from ...config import triton_interpreted
from ...ir.problem import common_heads
from ...ir.terms import Linear
from ..base import Config, Inputs, Output
from .calls import Grid, Kernel
from .kernels.prepare import prepare
from .kernels.scan import scan
from .sizes import padded, sizes

PREPARE, SCAN = Kernel(prepare), Kernel(scan)
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
        block: tokens of a block; None is a block of the backward pass.
    """

    transposed: bool = False
    entering: Tensor | None = None
    leaving: Tensor | None = None
    blocks: Tensor | None = None
    block: int | None = None


class Scan:
    """A linear term on its tensors.

    Attributes:
        keep: whether sums of logs are wanted by blocks too, as the backward pass needs them.
    """

    keep = False

    def __init__(self, term: Linear, x: Inputs, config: Config) -> None:
        p = x.problem
        self.term, self.x, self.config, self.problem = term, x, config, p
        self.sizes = sizes(p, config.chunk_size)
        self.groups = common_heads(p)
        self.scale = float(term.sign * x.scale)
        self.q, self.k, self.v = (dense_last(t) for t in (x.q, x.k, x.v))
        self.cu = x.boundaries
        self.rows = p.batch if self.cu is None else self.cu.numel() - 1
        self.tokens = p.batch * p.seqlen
        self.slots = self.slots_of(self.sizes.chunk)
        self.packing = (self.rows, max(p.seqlen, 1), self.tokens, p.nheads)
        self.decays = term.log_a is not None or term.log_cols is not None
        self.apart = term.row_inclusive != term.col_inclusive or term.log_cols is not None
        # Triton's interpreter multiplies the bits of bfloat16 as if they were integers
        self.dot = torch.float32 if p.dtype == torch.bfloat16 and triton_interpreted() else p.dtype

    def slots_of(self, size: int) -> int:
        """How many chunks or blocks of that size there is room for (`kernels/rows.py`)."""
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

    def run(
        self, kernel: Kernel, grid: Grid, tensors: Sequence[Tensor], numbers: Sequence[int | float], **constants: Any
    ) -> None:
        """Launch a kernel; `replay.py` takes notes here."""
        kernel(grid, tensors, numbers, **constants)

    # --- launches -------------------------------------------------------------------------------------------------------

    @cached_property
    def chunks(self) -> Chunks:
        """Scores and sums of log decays of every chunk, and of every block if the backward pass is to come."""
        p, t, z, slots, blocks = self.problem, self.term, self.sizes, self.slots, self.slots_of(self.sizes.block)
        scores = self.empty(slots, self.groups, z.chunk, z.chunk, dtype=self.dot)
        if self.decays:
            by_chunk = self._sums(slots, z.chunk)
            by_block = self._sums(blocks, z.block) if self.keep else by_chunk
            out = Chunks(scores, *by_chunk, self.empty(slots, p.nheads), *by_block)
        else:
            out = Chunks(scores, *(self.q,) * 7)
        log_a, log_cols = self.slot("log_a"), self.slot("log_cols")
        heads = min(16, padded(p.nheads))
        if slots:
            self.run(
                PREPARE,
                (slots, self.groups + (ceil_div(p.nheads, heads) if self.decays else 0), 1),
                (
                    self.q, self.k, or_else(log_a, self.q), or_else(log_cols, self.q), or_else(self.cu, self.q), out.scores,
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

    def _sums(self, slots: int, size: int) -> tuple[Tensor, Tensor, Tensor]:
        """Room for ρ, κ and E of so many chunks or blocks; ρ is κ where no flag of the term tells them apart."""
        wide = torch.float64 if self.problem.dtype == torch.float32 else torch.float32
        rho = self.empty(slots, self.problem.nheads, size, dtype=wide)
        kappa = self.empty(*rho.shape, dtype=wide) if self.apart else rho
        return rho, kappa, self.empty(slots, self.problem.nheads, dtype=wide)

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
        self.run(
            SCAN,
            (p.nheads * ceil_div(p.headdim, z.rows) * self.rows, 1, segments),
            (
                q, k, v, or_else(y, nothing), or_else(u, nothing), or_else(w, nothing), or_else(self.cu, nothing),
                c.scores, c.rho, c.kappa, c.total, c.center, or_else(walk.entering, nothing), or_else(walk.leaving, nothing),
                or_else(walk.blocks, nothing), *(parts or (nothing, nothing)),
            ),
            (
                *self.packing, self.groups, q_share, k_share, p.nheads // v.shape[2], *scales,
                ceil_div(ceil_div(p.seqlen, z.chunk), segments),
                *strides(q), *strides(k), *strides(v), *strides(y), *strides(u), *strides(w),
            ),
            L=z.chunk, BLOCK=walk.block or z.block, P=p.headdim, BP=z.rows, BN=z.state, BN2=padded(p.dstate) - z.state,
            FORWARD=t.causal != walk.transposed, TRANSPOSED=walk.transposed, ROWS=u is not None, COLS=w is not None,
            OUTPUT=y is not None, ENTERING=walk.entering is not None, LEAVING=walk.leaving is not None,
            BLOCKS=walk.blocks is not None, PARTS=first, SEGMENTS=parts is not None and not first,
            FACTORED=y is not None and self.decays and p.dtype == torch.bfloat16, NORMALIZE=self.dot == torch.float16,
            STAGES=z.stages,
            **self.common, num_warps=z.warps_back if walk.blocks is not None else 4,
            maxnreg=z.registers if y is not None and walk.blocks is None else None,
        )  # fmt: skip

    # --- passes ---------------------------------------------------------------------------------------------------------

    def forward(self) -> Output:
        """Y, the final states, and those between."""
        p, x = self.problem, self.x
        y = self.empty(p.batch, p.seqlen, p.nheads, p.headdim, dtype=x.out)
        state = self.empty(self.rows, p.nheads, p.headdim, p.dstate, dtype=p.state_dtype) if x.wants_state else None
        blocks = None if p.state_every is None else self._blocks(p.state_every)
        if self.rows and (self.tokens or state is not None):
            self.walk(self.v, y, Walk(entering=contiguous(x.initial), leaving=state, blocks=blocks, block=p.state_every))
        return Output(y, state, every=None if blocks is None else self._every(blocks, state))

    def _blocks(self, size: int) -> Tensor:
        """Room for the state that enters each block of that many tokens, and for one more: [blocks + 1, nheads, P, N]."""
        p, count = self.problem, self.slots_of(size) + 1
        numel = p.nheads * p.headdim * p.dstate
        spare = -numel % 16  # so that the second, from where on they leave here, is aligned as memory of its own is
        room = self.empty(spare + count * numel, dtype=p.state_dtype)
        return room[spare:].view(count, p.nheads, p.headdim, p.dstate)

    def _every(self, blocks: Tensor, final: Tensor | None) -> Tensor:
        """The states that leave whole blocks: of a row's, each enters the next one, but for the last."""
        p, size = self.problem, self.problem.state_every
        assert size is not None and final is not None  # blocks were made for them
        shape = (p.batch, ceil_div(p.seqlen, size), *blocks.shape[1:])
        every = blocks[1:].view(shape)[:, : p.seqlen // size]
        if p.seqlen and p.seqlen % size == 0:
            every[:, -1] = final  # nothing comes after it
        return every


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


def or_else(x: Tensor | None, other: Tensor) -> Tensor:
    """A kernel takes a pointer for what it does not read, too."""
    return other if x is None else x
