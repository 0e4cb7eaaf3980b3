"""Registered masks as they are drawn: with operands that fit their axes, alone or under combinators."""

from __future__ import annotations

from collections.abc import Callable

import torch
from hypothesis import strategies as st

from ..ir import nodes as n
from ..ir.problem import fenwick_levels
from ..masks import Mask
from ..register import RegisteredMask
from . import strategies
from .source import Source


def drawn(kind: RegisteredMask, s: Source) -> Mask:
    """The mask with operands that fit their axes."""
    integers = {name: s.draw(st.integers(1, 3)) for name in kind.definition.integers}
    rank = integers.get("rank", 2)
    operands = {name: _operand(s, name, axes, rank) for name, axes in kind.definition.operands.items()}
    return kind(**operands, **integers)


def _operand(s: Source, name: str, axes: str, rank: int) -> torch.Tensor:
    z, log = s.sizes, name.startswith("log")
    match axes:
        case n.TOKEN:
            return s.token_log() if log else s.token()
        case n.HEAD:
            return s.log(s.heads()) if log else s.normal(s.heads())
        case n.CHANNEL:
            return s.channel_log() if log else s.lay(s.normal(*s.token_shape(z.dstate)))
        case n.HEAD_CHANNEL:
            return s.log(s.heads(), z.dstate) if log else s.normal(s.heads(), z.dstate)
        case n.RANK | n.LEVEL:
            return s.ranked(rank if axes == n.RANK else fenwick_levels(z.seqlen))
        case n.LAG:
            return s.lay(s.normal(s.heads(), max(2 * z.seqlen - 1, 0)))
        case n.MATRIX:
            return s.lay(s.normal(s.pick([z.batch, 1]), s.heads(), z.seqlen, z.seqlen))
        case n.IDS:
            return s.ids()[0]
        case _:
            return s.boundaries()


def combined(draw: Callable[[Source], Mask]) -> Callable[[Source], Mask]:
    """What is drawn under combinators, and beside other masks."""

    def make(s: Source) -> Mask:
        mask = draw(s)
        for _ in range(s.pick([1, 2])):
            match s.pick(["T", "reverse", "strict", "shift", "scale", "-", "*", "+"]):
                case "T":
                    mask = mask.T
                case "reverse":
                    mask = mask.reverse()
                case "strict":
                    mask = mask.strict()
                case "shift":
                    mask = mask.shift(s.pick([1, 2]))
                case "scale":
                    mask = strategies.scaled(s, mask)
                case "-":
                    mask = strategies.scan_mask(s) - mask
                case "*":
                    mask = mask * strategies.scan_mask(s)
                case _:
                    mask = mask + draw(s)
        return mask * s.documents() if s.chance(4) else mask

    return make
