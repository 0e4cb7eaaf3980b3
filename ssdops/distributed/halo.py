"""Tokens of neighbouring slices: what a convolution reads before its own first token, and a shifted operand past its last."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from .agree import Team
from .exchange import gather


def halo(x: Tensor, width: int, team: Team, lengths: Sequence[int], after: bool = False) -> Tensor:
    """The `width` tokens before this rank's slice, or after it, in order; zeros where the sequence has none.

    Differentiable: the backward pass takes cotangents back to the ranks that the tokens came from, in one collective too.

    Args:
        x: `(batch, seqlen of the slice, …)`, of one shape but for seqlen on all ranks.
        lengths: seqlen of every rank's slice; a halo may reach over several that are short.
    """
    found: Tensor = _Halo.apply(x, width, team, tuple(lengths), after)  # type: ignore[no-untyped-call]  # as torch has it
    return found if after else found.flip(1)


def sources(lengths: Sequence[int], rank: int, width: int, after: bool) -> list[tuple[int, int]]:
    """Where a rank's halo comes from, nearest token first: (rank, tokens between that one and the edge of its slice).

    >>> sources([4, 1, 3], 2, 3, after=False)
    [(1, 0), (0, 0), (0, 1)]
    """
    step, out = 1 if after else -1, []
    at = rank + step
    while 0 <= at < len(lengths):
        out += [(at, far) for far in range(lengths[at])]
        at += step
    return out[:width]


class _Halo(torch.autograd.Function):
    """Tokens by their distance from the slice: those of every rank's edge are gathered, and each takes what is next to it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, width: int, team: Team, lengths: tuple[int, ...], after: bool) -> Tensor:
        ctx.args, ctx.shape = (width, team, lengths, after), x.shape
        near = x[:, :width] if after else x[:, max(x.shape[1] - width, 0) :].flip(1)
        found = gather(_filled(near, width), team)
        out = x.new_zeros(x.shape[0], width, *x.shape[2:])
        for at, (rank, far) in enumerate(sources(lengths, team.rank, width, after)):
            out[:, at] = found[rank][:, far]
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        width, team, lengths, after = ctx.args
        dnear = torch.zeros_like(dout)
        for reader, given in enumerate(gather(dout, team)):
            for at, (rank, far) in enumerate(sources(lengths, reader, width, after)):
                if rank == team.rank:
                    dnear[:, far] += given[:, at]
        dnear = dnear[:, : ctx.shape[1]]
        rest = ctx.shape[1] - dnear.shape[1]
        tail = (0, 0) * (dout.ndim - 2)
        dx = pad(dnear, (*tail, 0, rest)) if after else pad(dnear.flip(1), (*tail, rest, 0))
        return dx, None, None, None, None


def _filled(x: Tensor, width: int) -> Tensor:
    return pad(x, (*(0, 0) * (x.ndim - 2), 0, width - x.shape[1]))
