"""From tensors to kernels: grids, strides and allocation for one linear term. No arithmetic happens here."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from ...config import triton_interpreted
from ...ir.problem import common_heads
from ...ir.terms import Linear
from ..base import Config, Inputs, Output
from .calls import Grid, Kernel
from .kernels.leaving import leaving
from .kernels.prepare import prepare
from .kernels.scan import scan
from .kernels.states import states
from .segments import Parts, Segments, segments
from .sizes import padded, relay_of, sizes

PREPARE, SCAN, STATES, LEAVING = Kernel(prepare), Kernel(scan), Kernel(states), Kernel(leaving)
SPAN = 60.0
"""How far, in units of log 2, decays inside a chunk may lie from their middle to be taken apart into factors."""
BLOCK_SPAN = 75.0
"""The same inside a block, which has more tokens. Of float32's 127 it leaves 52 for what is summed of scores and V."""
LEAVING_AT_ONCE = 128
"""Numbers of a state that a program of `leaving` sums."""
DOTS = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}


class Sums(NamedTuple):
    """Sums of log decays, by chunks or by blocks: ρ, κ `[slots, nheads, size]`, E `[slots, nheads]`."""

    rho: Tensor
    kappa: Tensor
    total: Tensor


class Lines(NamedTuple):
    """Numbers of tokens by blocks, `[slots, nheads, size]`: scales of rows and of columns, and a diagonal's values."""

    rows: Tensor
    cols: Tensor
    diagonal: Tensor


class Prepared(NamedTuple):
    """What `prepare` gives; its docstring has the shapes."""

    scores: Tensor
    beside: Tensor
    chunks: Sums
    center: Tensor
    reads: Tensor
    adds: Tensor
    blocks: Sums
    lines: Lines


@dataclass(frozen=True)
class Side:
    """What a walk of states reads and leaves: of S over V, or of dS over dY.

    Attributes:
        x: V or dY.
        entering, leaving: the states before the first and after the last block; of S only the former is.
        blocks: the state that enters each block, [blocks, nheads, P, N].
    """

    x: Tensor
    entering: Tensor | None = None
    leaving: Tensor | None = None
    blocks: Tensor | None = None


class Scan:
    """A linear term on its tensors."""

    def __init__(self, term: Linear, x: Inputs, config: Config, arrive: Callable[[], None] | None = None) -> None:
        p = x.problem
        self.term, self.x, self.config, self.problem, self.arrive = term, x, config, p, arrive
        self.sizes = sizes(p, config.chunk_size)
        self.groups = common_heads(p)
        self.scale = float(term.sign * x.scale)
        self.diagonal = term.diagonal is not None
        self.diagonal_scale = float(x.scale * (term.diagonal.sign if term.diagonal is not None else 0))
        self.q, self.k, self.v = (dense_last(t) for t in (x.q, x.k, x.v))
        self.cu = x.boundaries
        self.places: Tensor | None = None  # of packed rows, once they are prepared, as is the next
        self.ends: Tensor | None = None
        self.rows = p.batch if self.cu is None else self.cu.numel() - 1
        self.tokens = p.batch * p.seqlen
        self.slots = self.slots_of(self.sizes.chunk)
        self.packing = (self.rows, max(p.seqlen, 1), self.tokens, p.nheads)
        self.decays = term.log_a is not None or term.log_cols is not None
        self.apart = term.row_inclusive != term.col_inclusive or term.log_cols is not None
        self.factored = p.dtype == torch.bfloat16
        self.factors = self.factored and (self.decays or not {"rows", "cols"}.isdisjoint(x.values))
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

    def wait(self) -> None:
        """What is to be there only from now on comes; `replay.py` takes notes here, too."""
        if self.arrive is not None:
            self.arrive()

    # --- launches -------------------------------------------------------------------------------------------------------

    def prepare(
        self, chunks: bool, blocks: bool, turns: Tensor | None = None, lines: bool = False, centers: bool = False
    ) -> Prepared:  # fmt: skip
        """Scores and sums of log decays of every chunk, sums and lines of every block, as far as wanted, and without those of
        chunks centers of blocks; turns at 0."""
        p, t, z, slots, coarse = self.problem, self.term, self.sizes, self.slots, self.slots_of(self.sizes.block)
        scores = self.empty(slots, self.groups, z.chunk, z.chunk, dtype=self.dot) if chunks else self.q
        diagonal, d = chunks and self.diagonal, self.slot("diagonal") if chunks or lines else None
        beside = self.empty(slots, p.nheads, z.chunk) if diagonal else self.q
        by_chunk, center, by_block = Sums(*(self.q,) * 3), self.q, Sums(*(self.q,) * 3)
        if self.decays and chunks:
            by_chunk, center = self._sums(slots, z.chunk), self.empty(slots, p.nheads)
        if self.decays and blocks:
            by_block = self._sums(coarse, z.block)
            center = self.empty(coarse, p.nheads) if centers else center
        factors = chunks and self.factors
        reads, adds = (self.empty(slots, p.nheads, z.chunk) if factors else self.q for _ in range(2))
        log_a, log_cols = self.slot("log_a"), self.slot("log_cols")
        u, w = (self.slot(name) if factors or lines else None for name in ("rows", "cols"))
        by_token = Lines(*(self.empty(coarse, p.nheads, z.block) if lines and x is not None else self.q for x in (u, w, d)))
        lines = lines and not (u is None and w is None and d is None)
        heads, groups = min(16, padded(p.nheads)), self.groups if chunks else 0
        parts = groups + (ceil_div(p.nheads, heads) if self.decays or factors or lines else 0)
        if self.cu is not None:
            self.places = self.empty(self.segments.slots(self.rows, self.tokens), dtype=torch.int32)
            self.ends = self.empty(self.segments.cells(self.tokens), dtype=torch.int32)
            parts = max(parts, 1)
        if slots and parts:
            self.run(
                PREPARE, (slots if chunks else coarse, parts, 1),
                (
                    self.q, self.k, *(or_else(x, self.q) for x in (log_a, log_cols, d, u, w, self.cu)), scores, beside,
                    *by_chunk, center, reads, adds, *by_block, *by_token,
                    *(or_else(x, self.q) for x in (turns, self.places, self.ends)),
                ),
                (
                    *self.packing, groups, coarse, *self._places(), self.groups // p.q_heads, self.groups // p.k_heads,
                    self.scale, self.diagonal_scale,
                    *(n for x in (self.q, self.k, log_a, log_cols, d, u, w) for n in strides(x)),
                ),
                L=z.chunk, BLOCK=z.block, BN=z.state, HEADS=heads, CAUSAL=t.causal, STRICT=t.strict,
                ROW_INCLUSIVE=t.row_inclusive, COL_INCLUSIVE=t.col_inclusive, LOG_COLS=log_cols is not None, CHUNKS=chunks,
                BLOCKS=blocks and self.decays, CENTERS=centers and self.decays,
                SPAN=BLOCK_SPAN if centers else SPAN,
                RUNNERS=0 if turns is None else turns.shape[1] // self.groups, DIAGONAL=diagonal, VALUES=d is not None,
                ROWS=u is not None, COLS=w is not None, FACTORS=factors, LINES=lines,
                **{**self.common, "DECAY": log_a is not None}, num_warps=4,
            )  # fmt: skip
        return Prepared(scores, beside, by_chunk, center, reads, adds, by_block, by_token)

    def _places(self) -> tuple[int, int, int]:
        """How many slots of segments there are of packed rows, and cells that they end in, and the tokens of one."""
        if self.places is None or self.ends is None:
            return 0, 0, 1
        return len(self.places), len(self.ends), self.segments.tokens

    def _sums(self, slots: int, size: int) -> Sums:
        """Room for sums of so many chunks or blocks; ρ is κ where no flag of the term tells them apart."""
        wide = torch.float64 if self.problem.dtype == torch.float32 else torch.float32
        rho = self.empty(slots, self.problem.nheads, size, dtype=wide)
        kappa = self.empty(*rho.shape, dtype=wide) if self.apart else rho
        return Sums(rho, kappa, self.empty(slots, self.problem.nheads, dtype=wide))

    def walk(self, blocks: Sums, s: Side, ds: Side | None = None) -> Parts | None:
        """The states that enter each block, and what ds says of their cotangents, in segments if the config says so.

        Returns:
            What each segment makes from zero, if there are several.
        """
        parts = None
        if self.config.segments > 1:
            parts = self._parts(1 if ds is None else 2)
            self._walk(blocks, s, ds, parts, first=True)
        if s.blocks is not None:
            self.wait()
            self._walk(blocks, s, ds, parts, first=False)
        return parts

    def _parts(self, sides: int) -> Parts:
        """Room for what segments make."""
        p = self.problem
        shape = sides, self.segments.slots(self.rows, self.tokens), p.nheads
        return self.empty(*shape, p.headdim, p.dstate), self.empty(*shape)

    def _walk(
        self, blocks: Sums, s: Side, ds: Side | None, parts: Parts | None, first: bool, last: bool = False
    ) -> None:  # fmt: skip
        p, t, z, nothing, u, w = self.problem, self.term, self.sizes, self.q, self.slot("rows"), self.slot("cols")
        (k, q), tiles = alike(self.k, self.q, p.dtype), ceil_div(p.headdim, z.rows) * ceil_div(p.dstate, z.state)
        other, runners, sides = ds or s, p.nheads * tiles, 1 if ds is None else 2
        ends = self.ends if first and not last else None
        grid = self._grid(runners, sides, parts) if ends is None else (runners * len(ends), sides, 1)
        self.run(
            STATES, grid,
            (
                s.x, k, other.x, q, or_else(u, nothing), or_else(w, nothing), or_else(self.cu, nothing), *blocks,
                or_else(s.entering, nothing), or_else(other.entering, nothing), or_else(s.blocks, nothing),
                or_else(other.blocks, nothing), or_else(other.leaving, nothing),
                *(parts or (nothing, nothing)), or_else(self.places if ends is None else ends, nothing),
            ),
            (
                *self.packing, p.nheads // p.v_heads, p.nheads // p.k_heads, p.nheads // p.q_heads, self.scale,
                self.segments.blocks,
                *strides(s.x), *strides(k), *strides(other.x), *strides(q), *strides(u), *strides(w),
            ),
            BLOCK=z.block, PORTION=z.portion, P=p.headdim, BP=z.rows, BN=z.state, CAUSAL=t.causal, ROWS=u is not None,
            COLS=w is not None, BOTH=ds is not None, ENTERING=s.entering is not None and not first,
            DLEAVING=ds is not None and ds.entering is not None and not first,
            DENTERING=ds is not None and ds.leaving is not None and not first,
            PARTS=first, LAST=last, ENDS=ends is not None, SEGMENTS=parts is not None and not first,
            STAGES=z.stages + 1, **self.common, num_warps=4,
        )  # fmt: skip

    @cached_property
    def segments(self) -> Segments:
        """How rows are cut by the config."""
        return segments(self.problem, self.config, self.cu is not None)

    def _grid(self, runners: int, sides: int, parts: Parts | None) -> Grid:
        """Programs of a walk, `runners` for each row and segment (`kernels/rows.py`)."""
        if parts is not None and self.segments.packed:
            return (runners * parts[1].shape[1], sides, 1)
        return (runners * self.rows, sides, 1 if parts is None else self.segments.number)

    # --- passes ---------------------------------------------------------------------------------------------------------

    def forward(self, parts: Parts | None = None) -> Output:
        """Y, of the sum so far where it can be, the final states, and those between; with parts, from what `begin` has made."""
        p, x = self.problem, self.x
        y = x.onto
        if y is None or y.dtype != x.out or not y.is_contiguous():
            y = self.empty(p.batch, p.seqlen, p.nheads, p.headdim, dtype=x.out)
        state = self.empty(self.rows, p.nheads, p.headdim, p.dstate, dtype=p.state_dtype) if x.wants_state else None
        blocks = None if p.state_every is None else self._blocks(p.state_every)
        if self.rows and (self.tokens or state is not None):
            self._scan(y, state, blocks, parts)
        return Output(y, state, every=None if blocks is None else self._every(blocks, state))

    def _scan(self, y: Tensor, state: Tensor | None, blocks: Tensor | None, parts: Parts | None) -> None:
        p, t, z, nothing, each = self.problem, self.term, self.sizes, self.q, self.segments.blocks
        runners, turns, handed = p.nheads * ceil_div(p.headdim, z.rows), None, None
        relay = relay_of(p, self.rows * runners) if self.config.segments == 1 and self.cu is None else 1
        if relay > 1:
            turns, each = self.empty(self.rows, runners, dtype=torch.int32), ceil_div(each, relay)
            handed = self.empty(self.rows, p.nheads, p.headdim, p.dstate)
        prepared = self.prepare(chunks=True, blocks=self.config.segments > 1 and parts is None, turns=turns)
        parts = self.walk(prepared.blocks, Side(self.v)) if parts is None else parts
        self.wait()
        initial, onto = contiguous(self.x.initial), contiguous(self.x.onto)
        narrow = onto is not None and onto.dtype == torch.bfloat16  # it takes room that leaves two programs a multiprocessor
        hopper = (p.target.capability or (0, 0))[0] == 9  # where adding in place is faster; on 10.x it would spill
        in_place = onto is not None and narrow and hopper and onto.data_ptr() == y.data_ptr()
        u, w = self.slot("rows"), self.slot("cols")
        self.run(
            SCAN, (runners * self.rows, 1, relay) if relay > 1 else self._grid(runners, 1, parts),
            (
                self.q, self.k, self.v, y, *(or_else(x, nothing) for x in (u, w, self.cu)),
                prepared.scores, prepared.beside, *prepared.chunks, prepared.center, prepared.reads, prepared.adds,
                *(or_else(x, nothing) for x in (initial, state, blocks)), *(parts or (nothing, nothing)),
                *(or_else(x, nothing) for x in (self.places, handed, turns, onto)),
            ),
            (
                *self.packing, self.groups, p.nheads // p.q_heads, p.nheads // p.k_heads, p.nheads // p.v_heads, self.scale,
                each * (z.block // z.chunk), *(n for x in (self.q, self.k, self.v, y, u, w) for n in strides(x)),
            ),
            L=z.chunk, BLOCK=p.state_every or z.block, P=p.headdim, BP=z.rows, BN=z.state, BN2=padded(p.dstate) - z.state,
            CAUSAL=t.causal, ROWS=u is not None, COLS=w is not None, DIAGONAL=self.diagonal,
            ONTO=0 if onto is None else 3 if in_place else 2 if narrow else 1,
            ENTERING=initial is not None, LEAVING=state is not None, BLOCKS=blocks is not None, SEGMENTS=parts is not None,
            RELAY=relay > 1, ALIGN=z.block // z.chunk, FACTORED=self.factored, FACTORS=self.factors,
            NORMALIZE=self.dot == torch.float16, STAGES=z.stages, **self.common, num_warps=4,
            maxnreg=z.registers if blocks is None and (in_place or not narrow) else None,
        )  # fmt: skip

    def begin(self) -> tuple[Parts, Tensor, Tensor]:
        """What each segment makes from no state, the last one too, in a config with as many segments as fill the device; what
        rows leave from no state, and the factor on one that enters, `[rows, nheads, 1, 1]`."""
        p, parts, cut = self.problem, self._parts(1), self.segments
        self._walk(self.prepare(chunks=False, blocks=True).blocks, Side(self.v), None, parts, first=True, last=True)
        state, decay = self.empty(self.rows, p.nheads, p.headdim, p.dstate), self.empty(self.rows, p.nheads, 1, 1)
        self.run(
            LEAVING, (self.rows * p.nheads, ceil_div(p.headdim * p.dstate, LEAVING_AT_ONCE), 1),
            (*parts, or_else(self.cu, self.q), state, decay), (max(p.seqlen, 1), self.tokens, p.nheads, cut.number, cut.tokens),
            SIZE=p.headdim * p.dstate, AT_ONCE=LEAVING_AT_ONCE, PACKED=cut.packed, num_warps=4,
        )  # fmt: skip
        return parts, state, decay

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
    """How many b it takes to cover a; Triton's own goes by what its kernels call, which takes as long as a small launch."""
    return -(-a // b)


def alike(x: Tensor, y: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Two tensors that a kernel chooses between, in one dtype: that given if they have two."""
    return (x, y) if x.dtype == y.dtype else (x.to(dtype), y.to(dtype))


def contiguous(x: Tensor | None) -> Tensor | None:
    """x laid out in order."""
    return None if x is None else x.contiguous()


def dense_last(x: Tensor) -> Tensor:
    """x with unit stride along its last axis, and heads within 2^31 elements: itself wherever it can be."""
    near = (x.shape[2] - 1) * x.stride(2) < 2**31  # kernels count heads times strides in 32 bits, all else in 64
    return x if near and (x.stride(-1) == 1 or x.shape[-1] == 1) else x.contiguous()


def strides(x: Tensor | None) -> tuple[int, int, int]:
    """Of batch, seqlen and heads; zeros for what is absent."""
    return (0, 0, 0) if x is None else (x.stride(0), x.stride(1), x.stride(2))


def or_else(x: Tensor | None, other: Tensor) -> Tensor:
    """A kernel takes a pointer for what it does not read, too."""
    return other if x is None else x
