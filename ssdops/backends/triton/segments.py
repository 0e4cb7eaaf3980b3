"""How rows are cut into segments, which are walked side by side."""

from __future__ import annotations

from typing import NamedTuple, TypeAlias

from torch import Tensor

from ...ir.problem import Problem
from ..base import Config
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
