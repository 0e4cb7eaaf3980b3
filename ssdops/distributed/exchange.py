"""The exchange between ranks: (total decay, state) pairs, combined by a scan over the ranks.

Rank r maps the state that enters its slice to the one that leaves it, S → A_r S + s_r, with A_r the slice's total decay and s_r
what its tokens make from zero. Composing such maps is associative, and of a prefix of ranks all that matters is its own pair:

    (A₂, s₂) ∘ (A₁, s₁) = (A₂ A₁, A₂ s₁ + s₂)

The cotangents of states obey the same rule from the other end, with the same decays, so that one exchange serves both passes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import torch
import torch.distributed as dist
from torch import Tensor

from .agree import Team


@dataclass(frozen=True)
class Pair:
    """What a slice does to one state.

    Attributes:
        decay: A, `(rows, nheads, 1, 1)`, or with dstate for 1 where each channel has its own.
        state: s, `(rows, nheads, headdim, dstate)`.
        forward: whether states go from the first rank to the last, or from the last to the first.
        end: added to the state at the end where it starts, by whichever rank has it; the ranks' are summed. None on all is 0.
    """

    decay: Tensor
    state: Tensor
    forward: bool
    end: Tensor | None = None


def gather(x: Tensor, team: Team) -> list[Tensor]:
    """x of every rank, in their order: all of one shape.

    Raises:
        RankError: a rank is gone.
    """
    room = x.new_empty((team.size, *x.shape))
    found = list(room.unbind(0))
    try:
        dist.all_gather(found, x.contiguous(), group=team.group)
    except RuntimeError as error:
        raise team.lost(error) from error
    return found


def exchange(pairs: Sequence[Pair], team: Team) -> list[tuple[Tensor, Tensor]]:
    """For every pair the state that enters this rank's slice, and the one that leaves the last slice: one collective.

    Moves to each rank, from each other, as many numbers as the pairs have, whatever the number of tokens.
    """
    parts = [x for pair in pairs for x in (pair.decay, pair.state, pair.end) if x is not None]
    flat = torch.cat([x.reshape(-1) for x in parts])
    found = [x.split([part.numel() for part in parts]) for x in gather(flat, team)]
    by_part = iter([[x.view(part.shape) for x in column] for part, column in zip(parts, zip(*found, strict=True), strict=True)])
    out = []
    for pair in pairs:
        decays, states = next(by_part), next(by_part)
        ends = None if pair.end is None else next(by_part)
        out.append(_walk(decays, states, ends, team.rank, pair.forward))
    return out


def _walk(
    decays: list[Tensor], states: list[Tensor], ends: list[Tensor] | None, rank: int, forward: bool
) -> tuple[Tensor, Tensor]:
    """The state before `rank`, and after the last one, in the order in which states go."""
    running = None if ends is None else torch.stack(ends).sum(0)
    entering = torch.zeros_like(states[0])
    order = range(len(states))
    for at in order if forward else reversed(order):
        if at == rank and running is not None:
            entering = running
        # from no state on nothing is multiplied: 0 · inf, where a slice grows without bound, would be NaN
        running = states[at] if running is None else torch.addcmul(states[at], decays[at], running)
    assert running is not None  # a group has ranks
    return entering, running


def predicted_bytes(state: Sequence[int], decay: int, itemsize: int, ranks: int) -> int:
    """Bytes that a rank receives in one exchange of one state of that shape, with so many decays, and no state at the ends."""
    return (ranks - 1) * itemsize * (prod(state) + decay)
