"""Windows times a decay, on Hopper: scores of row tiles once, and all heads of a group on them (`kernels/hopper_band.py`)."""

from __future__ import annotations

from dataclasses import replace

import torch
import triton
from torch import Tensor

from ...ir.problem import Problem, common_heads
from ...ir.terms import Linear
from ..base import Config, Inputs, Work
from .backward import WHOLE, filled, split_heads
from .calls import Kernel, Launching
from .launch import Scan, ceil_div, strides
from .sizes import padded
from .tile_mask import shared_memory

if (3, 6) <= tuple(int(part) for part in triton.__version__.split(".")[:2]) < (3, 8):  # as far as it has been tried
    from .kernels.hopper_band import MANY, hopper_band
else:
    hopper_band = None

BAND = Kernel(hopper_band)
BLOCK = 128
"""Tokens of a row tile; `sizes` gives as many to blocks of these sizes on Hopper."""
SHARED = 2
"""Heads of a group from which on one pass is quicker than two scans: they share the scores (docs/performance.md)."""
MOST_HEADDIM = 64
"""What registers suffice for."""


def takes(term: Linear, problem: Problem, width: int) -> bool:
    """Whether a window of that many tokens times a scan is one pass over its pairs: a decay alone, tiles that fit, and rows
    longer than the window, which are two scans else."""
    p = problem
    if hopper_band is None or p.dtype != torch.bfloat16 or (p.target.capability or (0, 0))[0] != 9:
        return False
    if any(x is not None for x in (term.channel, term.documents, term.rows, term.cols, term.log_cols)):
        return False
    if p.seqlen <= width or padded(p.headdim) > MOST_HEADDIM or p.nheads // common_heads(p) < SHARED:
        return False
    scores, of_v, y = BLOCK * BLOCK * (_farther(width) + 1), BLOCK * MANY.value, BLOCK * MANY.value
    lines = BLOCK * MANY.value // padded(p.headdim)
    return 2 * (scores + of_v + y) + 8 * lines <= shared_memory(p.target.capability)


def _farther(width: int) -> int:
    """How many tiles beside its own a row tile sees."""
    return ceil_div(width - 1, BLOCK)


def work(problem: Problem, width: int) -> Work:
    """V is scaled and multiplied once for every row tile that sees it."""
    p, seen = problem, BLOCK * (_farther(width) + 1)
    tokens = float(p.batch * p.seqlen)
    pairs, scaled = tokens * seen, tokens * p.nheads * p.headdim * (seen / BLOCK)
    touched = 2 * tokens * (2 * p.nheads * p.headdim + (p.q_heads + p.k_heads) * p.dstate)
    flops = 2 * pairs * (p.nheads * p.headdim + common_heads(p) * p.dstate)
    return Work(flops, 3 * scaled, touched, 1.0)  # two launches, each half of what one of torch takes


def forward(term: Linear, x: Inputs, width: int) -> Tensor:
    """Y, in the inputs' dtype."""
    p = x.problem
    headdim, dstate = (ceil_div(size, WHOLE) * WHOLE for size in (p.headdim, p.dstate))
    q, k, v = (_near(filled(t, size), width) for t, size in ((x.q, dstate), (x.k, dstate), (x.v, headdim)))
    whole = replace(x, problem=replace(p, headdim=headdim, dstate=dstate), q=q, k=k, v=v)
    with Launching(p, x.q.device):
        return Band(term, whole, Config()).band(width)[..., : p.headdim]


def _near(x: Tensor, width: int) -> Tensor:
    """x with all that a row tile sees within 2^31 elements: the kernel counts tokens from the tile's first in 32 bits."""
    return x if (_farther(width) + 1) * BLOCK * abs(x.stride(1)) < 2**31 else x.contiguous()


class Band(Scan):
    """A scan in a window, on its tensors."""

    def band(self, width: int) -> Tensor:
        """Y."""
        p, t = self.problem, self.term
        y = self.empty(p.batch, p.seqlen, p.nheads, p.headdim, dtype=p.dtype)
        if not y.numel():
            return y
        row_tiles, share = ceil_div(p.seqlen, BLOCK), p.nheads // self.groups
        splits = split_heads(share, p.batch * row_tiles * self.groups, p.target.multiprocessors)
        prepared = self.prepare(chunks=False, blocks=True, centers=True)
        self.run(
            BAND, (p.batch * row_tiles, self.groups, splits),
            (self.q, self.k, self.v, y, *prepared.blocks, prepared.center),
            (
                p.seqlen, row_tiles, p.nheads, self.groups, p.nheads // p.q_heads, p.nheads // p.k_heads, p.nheads // p.v_heads,
                width, self.scale, ceil_div(share, splits), *(n for x in (self.q, self.k, self.v) for n in strides(x)),
            ),
            BLOCK=BLOCK, P=p.headdim, BP=padded(p.headdim), N=p.dstate, BN=min(padded(p.dstate), 128), OFF=_farther(width),
            CAUSAL=t.causal, STRICT=int(t.strict), DECAY=self.decays, num_warps=8,
        )  # fmt: skip
        return y
