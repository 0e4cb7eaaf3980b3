"""The exchange between ranks: (total decay, state) pairs, combined by a scan over the ranks.

Rank r maps the state that enters its slice to the one that leaves it, S → A_r S + s_r, with A_r the slice's total decay and s_r
what its tokens make from zero. Composing such maps is associative, and of a prefix of ranks all that matters is its own pair:

    (A₂, s₂) ∘ (A₁, s₁) = (A₂ A₁, A₂ s₁ + s₂)

Every rank gathers the pairs of all and composes those before it: one collective, where a tree would have log₂(ranks) of them,
each as late as this one. The cotangents of states obey the same rule from the other end, with the same decays, so that one
exchange serves both passes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import torch
import torch.distributed as dist
from torch import Tensor

from .agree import Team

_all_gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)
"""Into one tensor, by the name that torch has for it since 2.13, or by that of before."""


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


class Gathering:
    """x of every rank, on its way: all of one shape. On a GPU it moves beside what is launched until it is waited for."""

    def __init__(self, x: Tensor, team: Team) -> None:
        team.settle()  # no collective before all are known to make this call
        self._team, self._given = team, x.contiguous()
        self._room = x.new_empty((team.size, *x.shape))
        try:
            self._work = _all_gather(self._room.view(-1), self._given.view(-1), group=team.group, async_op=True)
        except RuntimeError as error:
            raise team.lost(error) from error

    def wait(self) -> Tensor:
        """`(ranks, …)`: there for what is launched from now on; the host waits where tensors are its own.

        Raises:
            RankError: a rank is gone.
        """
        try:
            if self._work is not None:
                self._work.wait()
        except RuntimeError as error:
            raise self._team.lost(error) from error
        return self._room


def gather(x: Tensor, team: Team) -> list[Tensor]:
    """x of every rank, in their order: all of one shape.

    Raises:
        RankError: a rank is gone.
    """
    return list(Gathering(x, team).wait().unbind(0))


class Exchange:
    """For every pair the state that enters this rank's slice, and the one that leaves the last slice: one collective.

    Moves to each rank, from each other, as many numbers as the pairs have, whatever the number of tokens. It begins when it
    is made.

    Args:
        entering: where the states that enter go, which are there once `arrive` has been called.
        whole: whether the states that leave the last slice are wanted, too.

    Attributes:
        last: the states that leave the last slice, from then on.
    """

    def __init__(self, pairs: Sequence[Pair], team: Team, entering: Sequence[Tensor], whole: bool) -> None:
        self.last: list[Tensor] = []
        self._entering = entering
        self._pairs, self._rank, self._whole, self._arrived = pairs, team.rank, whole, False
        self._parts = [x for pair in pairs for x in (pair.decay, pair.state, pair.end) if x is not None]
        self._gathering = Gathering(torch.cat([x.reshape(-1) for x in self._parts]), team)

    def arrive(self) -> None:
        """Wait for the other ranks' pairs and compose them; the second time, nothing."""
        if self._arrived:
            return
        self._arrived = True
        columns = self._gathering.wait().split([part.numel() for part in self._parts], dim=1)
        found = iter([x.unflatten(1, part.shape) for x, part in zip(columns, self._parts, strict=True)])
        for pair, entering in zip(self._pairs, self._entering, strict=True):
            decays, states = next(found), next(found)
            end = None if pair.end is None else next(found).sum(0)
            order = range(len(states)) if pair.forward else range(len(states) - 1, -1, -1)
            at = order.index(self._rank)
            before = _composed(decays, states, end, order[:at])
            entering.zero_() if before is None else entering.copy_(before)
            if self._whole:
                last = _composed(decays, states, before, order[at:])
                assert last is not None  # this rank's own is among them
                self.last.append(last)


def _composed(decays: Tensor, states: Tensor, running: Tensor | None, ranks: Sequence[int]) -> Tensor | None:
    """The state that a state becomes on its way through the slices of some ranks; None is no state."""
    for at in ranks:
        # from no state on nothing is multiplied: 0 · inf, where a slice grows without bound, would be NaN
        running = states[at] if running is None else torch.addcmul(states[at], decays[at], running)
    return running


def predicted_bytes(state: Sequence[int], decay: int, itemsize: int, ranks: int) -> int:
    """Bytes that a rank receives in one exchange of one state of that shape, with so many decays, and no state at the ends."""
    return (ranks - 1) * itemsize * (prod(state) + decay)
