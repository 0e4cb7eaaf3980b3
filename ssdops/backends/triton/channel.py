"""From tensors to the kernels of decay per channel: grids, strides and allocation for one linear term.

Row and column scales are torch's to multiply: with them, V and dY are made anew.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from ...config import triton_interpreted
from ...ir.problem import Problem
from ...ir.resolve import repeat_heads
from ...ir.terms import Linear
from ..base import Config, Inputs, Output
from .backward import WHOLE, filled
from .calls import Grid, Kernel, Launching
from .kernels.channel import channel_output, channel_states, channel_sums
from .launch import DOTS, alike, ceil_div, contiguous, dense_last, or_else, strides
from .sizes import channel_chunks, padded
from .tile_mask import LEAST

SUMS, STATES, OUTPUT = Kernel(channel_sums), Kernel(channel_states), Kernel(channel_output)


@dataclass(frozen=True)
class Tiling:
    """How the work is cut; `tiling` chooses, and a benchmark may try others.

    Attributes:
        chunk: tokens of a chunk.
        sums, states, output, gradients: warps of a program of each kernel.
        tile: rows and columns of the state, of headdim and dstate, that a walk of states owns.
        stages: chunks that a walk of states has in flight.
        rows, rows_back: rows of headdim that a program of output and of gradients takes at once.
    """

    chunk: int
    sums: int
    states: int
    output: int
    gradients: int
    tile: tuple[int, int]
    stages: int
    rows: int
    rows_back: int


def tiling(problem: Problem, chunk: int | None) -> Tiling:
    """The tiles of a problem. Wider states take smaller chunks, as factors of a chunk are in registers."""
    p, n, wide = padded(problem.headdim), padded(problem.dstate), dot_dtype(problem) == torch.float32
    return Tiling(
        chunk or channel_chunks(problem)[0], sums=4, states=4, output=8 if n > 64 or wide else 4, gradients=8,
        tile=(min(p, 64), min(n, 32 if wide else 64)), stages=2 if wide else 3, rows=min(p, 32 if wide else 64),
        rows_back=min(p, 32),
    )  # fmt: skip


def dot_dtype(problem: Problem) -> torch.dtype:
    """Of operands of products: what float16 holds no states and no weighted operands of is float32.

    Triton's interpreter multiplies the bits of bfloat16 as if they were integers.
    """
    return torch.bfloat16 if problem.dtype == torch.bfloat16 and not triton_interpreted() else torch.float32


class ChannelScan:
    """A linear term with a decay per channel, on its tensors."""

    def __init__(self, term: Linear, x: Inputs, config: Config, tiles: Tiling | None = None) -> None:
        p = x.problem
        self.term, self.x, self.problem = term, x, p
        self.tiles = tiles or tiling(p, config.chunk_size)
        self.scale = float(term.sign * x.scale)
        self.dot = dot_dtype(p)
        self.kept = torch.bfloat16 if self.dot == torch.bfloat16 else torch.float32  # of states between chunks
        self.q, self.k = dense_last(x.q), dense_last(x.k)
        self.cu = x.boundaries
        self.rows = p.batch if self.cu is None else self.cu.numel() - 1
        self.tokens, length = p.batch * p.seqlen, self.tiles.chunk
        self.slots = p.batch * ceil_div(p.seqlen, length) if self.cu is None else self.tokens // length + self.rows
        self.packing = (self.rows, max(p.seqlen, 1), self.tokens, p.nheads)
        self.shares = p.nheads // p.q_heads, p.nheads // p.k_heads

    @cached_property
    def columns(self) -> Tensor | None:
        """cols · exp(log_cols), `(batch, seqlen, nheads, 1)`."""
        w, logs = self.x.per_head("cols"), self.x.per_head("log_cols")
        w = w if logs is None else logs.float().exp() if w is None else w * logs.float().exp()
        return None if w is None else w[..., None]

    @cached_property
    def v(self) -> Tensor:
        """V with the column scales in it."""
        p, v = self.problem, self.x.v
        if self.columns is None:
            return dense_last(v)
        return self.operand(repeat_heads(v, p.nheads, 2) * self.columns)

    def operand(self, x: Tensor) -> Tensor:
        """What is to be an operand of products, as wide as they take it."""
        return x.float() if self.dot == torch.float32 else x.to(self.problem.dtype)

    @cached_property
    def common(self) -> dict[str, Any]:
        """The compile-time switches that kernels of tokens and states share."""
        t = self.term
        return {
            "L": self.tiles.chunk, "P": self.problem.headdim, "N": self.problem.dstate, "CAUSAL": t.causal,
            "ROW_INCLUSIVE": t.row_inclusive, "COL_INCLUSIVE": t.col_inclusive, "PACKED": self.cu is not None,
            "DOT": DOTS[self.dot], "PRECISION": "tf32x3",
        }  # fmt: skip

    @property
    def levels(self) -> int:
        """Of halves of a chunk."""
        return self.tiles.chunk.bit_length() - 1

    def empty(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Memory on the term's device."""
        return torch.empty(shape, dtype=dtype, device=self.q.device)

    def run(
        self, kernel: Kernel, grid: Grid, tensors: Sequence[Tensor], numbers: Sequence[int | float], **constants: Any
    ) -> None:
        """Launch a kernel."""
        kernel(grid, tensors, numbers, **constants)

    # --- launches -------------------------------------------------------------------------------------------------------

    def sums(self) -> Tensor:
        """P of every chunk; float64 where products are finer than rounded sums of many logs would allow."""
        p, z, x = self.problem, self.tiles, self.x
        wide = torch.float32 if p.dtype == torch.bfloat16 else torch.float64
        out = self.empty(self.slots, p.nheads, z.chunk, p.dstate, dtype=wide)
        channel, dt, a, log_a = (x.values.get(name) for name in ("channel", "dt", "A", "log_a"))
        given = [None if t is None else t.expand(p.batch, p.seqlen, *t.shape[2:]) for t in (channel, dt, log_a)]
        channel, dt, log_a = given[0] if given[0] is None else dense_last(given[0]), given[1], given[2]
        columns = min(padded(p.dstate), 64)
        shares = [1 if t is None else p.nheads // t.shape[axis] for t, axis in ((channel, 2), (dt, 2), (a, 0), (log_a, 2))]
        self.run(
            SUMS, (self.slots * p.nheads * ceil_div(p.dstate, columns), 1, 1),
            (*(or_else(t, self.q) for t in (channel, dt, contiguous(a), log_a, self.cu)), out),
            (*self.packing, *shares, *strides(channel), *strides(dt), *strides(log_a)),
            L=z.chunk, N=p.dstate, BN=columns, CAUSAL=self.term.causal, CHANNEL=channel is not None,
            FACTORS=dt is not None, SCALAR=log_a is not None, PACKED=self.cu is not None, num_warps=z.sums,
        )  # fmt: skip
        return out

    def walk(
        self, sums: Tensor, blocks: Tensor, leaving: Tensor | None, dy: Tensor | None = None,
        dstates: tuple[Tensor, Tensor | None, Tensor | None] | None = None,
    ) -> None:  # fmt: skip
        """S as it enters every chunk; with dy, dS as it leaves them, too.

        Args:
            dstates: room for dS by chunks, dS behind the last one, and room for dS before the first.
        """
        p, z, nothing, both = self.problem, self.tiles, self.q, dy is not None
        v, y = alike(self.v, or_else(dy, self.v), p.dtype)
        k, q = alike(self.k, self.q, p.dtype) if both else (self.k, self.q)
        entering = contiguous(self.x.initial)
        dblocks, dleaving, dentering = dstates or (blocks, None, None)
        if entering is not None and dleaving is not None:
            entering, dleaving = alike(entering, dleaving, torch.float32)
        tiles = ceil_div(p.headdim, z.tile[0]) * ceil_div(p.dstate, z.tile[1])
        self.run(
            STATES, (self.rows * p.nheads * tiles, 2 if both else 1, 1),
            (
                v, k, y, q, or_else(self.cu, nothing), sums, or_else(entering, nothing), or_else(dleaving, nothing),
                blocks, dblocks, or_else(leaving, nothing), or_else(dentering, nothing),
            ),
            (
                *self.packing, p.nheads // v.shape[2], *reversed(self.shares), self.scale,
                *strides(v), *strides(k), *strides(y), *strides(q),
            ),
            BP=z.tile[0], BN=z.tile[1], BOTH=both, ENTERING=entering is not None, DLEAVING=dleaving is not None,
            LEAVING=leaving is not None, DENTERING=dentering is not None, STAGES=z.stages, **self.common, num_warps=z.states,
        )  # fmt: skip

    def output(self, sums: Tensor, v: Tensor, blocks: Tensor, y: Tensor, turned: bool = False) -> None:
        """Y of every chunk, less the row scales; or turned, from dY and dS, dV."""
        p, z = self.problem, self.tiles
        self.run(
            OUTPUT, (self.slots * p.nheads, 1, 1),
            (self.q, self.k, v, y, or_else(self.cu, self.q), sums, blocks),
            (
                *self.packing, *self.shares, p.nheads // v.shape[2], self.levels, self.scale,
                *strides(self.q), *strides(self.k), *strides(v), *strides(y),
            ),
            BP=z.rows, BN=padded(p.dstate), STRICT=self.term.strict, TURNED=turned, **self.common, num_warps=z.output,
        )  # fmt: skip

    # --- passes ---------------------------------------------------------------------------------------------------------

    def unscaled(self, state: Tensor | None, kept: torch.dtype, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Y less the row scales, and S as it enters each chunk; S as it leaves goes where it is told to."""
        p = self.problem
        y = self.empty(p.batch, p.seqlen, p.nheads, p.headdim, dtype=dtype)
        blocks = self.empty(self.slots, p.nheads, p.headdim, p.dstate, dtype=kept)
        if not self.tokens:
            pass_on(self.x.initial, state)
        elif self.rows:
            sums = self.sums()
            self.walk(sums, blocks, state)
            self.output(sums, self.v, blocks, y)
        return y, blocks

    def forward(self) -> Output:
        """Y, the final states, and those between."""
        p, x, rows = self.problem, self.x, self.x.per_head("rows")
        wanted = x.wants_state or p.state_every is not None
        state = self.empty(self.rows, p.nheads, p.headdim, p.dstate, dtype=p.state_dtype) if wanted else None
        kept = self.kept if p.state_every is None else p.state_dtype
        y, blocks = self.unscaled(state, kept, x.out if rows is None else torch.float32)
        y = y if rows is None else (y * rows[..., None]).to(x.out)
        every = None if p.state_every is None else self._every(blocks, state, p.state_every)
        return Output(y, state if x.wants_state else None, every=every)

    def _every(self, blocks: Tensor, final: Tensor | None, size: int) -> Tensor:
        """The states after every `size` tokens: each enters a chunk, but for one that nothing comes after."""
        p, step = self.problem, size // self.tiles.chunk
        count = p.seqlen // size
        starts = blocks.view(p.batch, ceil_div(p.seqlen, self.tiles.chunk), *blocks.shape[1:])[:, step::step][:, :count]
        return starts if count == starts.shape[1] or final is None else torch.cat([starts, final[:, None]], 1)


def pass_on(given: Tensor | None, room: Tensor | None) -> None:
    """What a state becomes where there are no tokens; None is zero."""
    if room is not None:
        room.copy_(torch.zeros_like(room) if given is None else given)


def whole_sizes(problem: Problem) -> tuple[int, int]:
    """headdim and dstate filled up to what loads sixteen bytes at a time (`backward.in_whole`), and is multiplied right."""
    least = max(LEAST[dot_dtype(problem)], WHOLE)
    return max(ceil_div(problem.headdim, WHOLE) * WHOLE, least), max(ceil_div(problem.dstate, WHOLE) * WHOLE, least)


def filled_up(x: Inputs) -> Inputs:
    """With sizes of heads filled up to `whole_sizes`."""
    p = x.problem
    headdim, dstate = whole_sizes(p)
    more, values, initial = dstate - p.dstate, dict(x.values), x.initial
    if more:
        values |= {name: pad(values[name], (0, more)) for name in ("channel", "A") if name in values}
    if initial is not None and (headdim, dstate) != (p.headdim, p.dstate):
        initial = pad(initial, (0, more, 0, headdim - p.headdim))
    q, k, v = filled(x.q, dstate), filled(x.k, dstate), filled(x.v, headdim)
    return replace(x, problem=replace(p, headdim=headdim, dstate=dstate), q=q, k=k, v=v, values=values, initial=initial)


def forward(term: Linear, x: Inputs, config: Config) -> Output:
    """Y, the final states, and those between."""
    p = x.problem
    with Launching(p, x.q.device):
        if (p.headdim, p.dstate) == whole_sizes(p):
            return ChannelScan(term, x, config).forward()
        out = ChannelScan(term, filled_up(x), config).forward()
    state, every = (None if s is None else s[..., : p.headdim, : p.dstate] for s in (out.state, out.every))
    return Output(out.y[..., : p.headdim], state, every=every)
