"""How rows are cut into segments, which are walked side by side, and what becomes of what each of them makes from no state."""

from __future__ import annotations

from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from ...ir.problem import Problem
from ..base import Config, Inputs
from .sizes import sizes

Parts: TypeAlias = tuple[Tensor, Tensor]
"""What each segment makes from zero, `[sides, slots, nheads, P, N]`, and its E (`kernels/states.py`)."""


class Segments(NamedTuple):
    """Into how many rows are cut, of how many blocks, or tokens; rows that are packed are of any length up to all of that."""

    number: int
    blocks: int
    tokens: int
    packed: bool

    def slots(self, rows: int, tokens: int) -> int:
        """Places for the segments of so many rows, with so many tokens together (`kernels/rows.py`)."""
        return tokens // self.tokens + rows if self.packed else rows * self.number

    def cells(self, tokens: int) -> int:
        """Of so many tokens together, into how many cells of a segment's length they fall."""
        return tokens // self.tokens + 1


def segments(problem: Problem, config: Config, packed: bool) -> Segments:
    """Of a config; packed rows are cut as one row of all their tokens would be."""
    size = sizes(problem, config.chunk_size).block
    blocks = -(-problem.seqlen // size)
    each = -(-blocks // config.segments)  # none of no tokens
    return Segments(-(-blocks // max(each, 1)) or 1, each, max(each, 1) * size, packed)


def passed(parts: Parts, x: Inputs, config: Config) -> Parts:
    """What all segments make from no state, `[rows, nheads, P, N]`, and the factor on one that enters, of that many axes."""
    made, logs = (_by_row(part[0], x, segments(x.problem, config, x.boundaries is not None)) for part in parts)
    since = logs.flip(1).cumsum(1).flip(1).exp2()[..., None, None]  # [rows, segments, nheads, 1, 1], with the segment's own
    after = torch.cat([since[:, 1:], torch.ones_like(since[:, :1])], 1)
    return (made * after).sum(1), since[:, 0]


def _by_row(part: Tensor, x: Inputs, cut: Segments) -> Tensor:
    """What there is of slots, `[rows, segments, …]`; of packed rows with fewer segments, 0 after them."""
    if x.boundaries is None:
        return part.unflatten(0, (x.problem.batch, cut.number))
    ends = x.boundaries.long().clamp(0, x.problem.batch * x.problem.seqlen)
    start, stop, segment = ends[:-1], ends[1:], torch.arange(cut.number, device=part.device)
    slot = (start // cut.tokens + torch.arange(len(start), device=part.device))[:, None] + segment
    there = (segment == 0) | (segment * cut.tokens < (stop - start)[:, None])
    found = part[slot.clamp(max=len(part) - 1)]
    return torch.where(there.view(*there.shape, *(1,) * (part.ndim - 1)), found, 0.0)
