"""A slice's `ssd` for autograd: begun before the states that enter it are there, and back before their cotangents are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import ops, run
from ..autotune import policy
from ..ir.terms import Linear
from .agree import Team
from .decays import Slice
from .exchange import Exchange, Pair


@dataclass(frozen=True)
class Context:
    """What a split call is, besides its tensors.

    Attributes:
        part: the slice; its tensors come and go with autograd's, so that checkpointing can drop them.
        program: of the slice's `ssd`, as text.
        n_initial: how many initial states there are.
        return_state: whether the final states are wanted.
        learnt: whether a backward pass will follow, on any rank.
    """

    team: Team
    part: Slice
    terms: tuple[Linear, ...]
    program: str
    n_initial: int
    return_state: bool
    learnt: bool

    def with_tensors(self, q: Tensor, k: Tensor, v: Tensor, operands: Sequence[Tensor]) -> Slice:
        """The slice again."""
        return replace(self.part, q=q, k=k, v=v, operands=dict(zip(self.part.operands, operands, strict=True)))

    def call(self, part: Slice, states: list[Tensor]) -> run.Call:
        """The slice's `ssd`, from the states that enter it."""
        return run.Call(part.q, part.k, part.v, list(part.operands.values()), states, self.program, part.scale)

    def enters(self, term: Linear) -> bool:
        """Whether the whole sequence's initial state enters at this rank."""
        return self.team.rank == (0 if term.causal else self.team.size - 1)

    def end(self, term: Linear, initial: Tensor, dtype: torch.dtype) -> Tensor:
        """This rank's part of the state that enters the whole sequence: all of it where that is, zeros elsewhere."""
        return initial.to(dtype) if self.enters(term) else torch.zeros_like(initial, dtype=dtype)


class Passed(NamedTuple):
    """What a forward pass gives: Y, the final states; the states that entered, the slice's decays, what is kept besides."""

    y: Tensor
    finals: list[Tensor]
    states: list[Tensor]
    decays: list[Tensor]
    saved: list[Tensor]


def forward(c: Context, part: Slice, initial: Sequence[Tensor]) -> Passed:
    """The slice's `ssd`, begun before the states that enter it have come."""
    q, acc = part.q, part.problem.accumulate
    with ops.no_autocast(q):
        states = [q.new_empty(part.state_shape, dtype=acc) for _ in c.terms]
        begun = run.begin(c.call(part, states), c.learnt)
        decays = [part.total_decay(term) if x.decay is None else x.decay for term, x in zip(c.terms, begun.begun, strict=True)]
        ends = [c.end(term, x, acc) for term, x in zip(c.terms, initial, strict=False)]
        pairs = [
            Pair(decays[i], x.state, term.causal, ends[i] if ends else None)
            for i, (term, x) in enumerate(zip(c.terms, begun.begun, strict=True))
        ]
        exchange = Exchange(pairs, c.team, states, whole=c.return_state)
        y, *others = begun.finish(c.learnt and ops.worth_saving(q), exchange.arrive)
        exchange.arrive()  # a slice of no documents has asked for none
    finals = [x.to(part.problem.state_dtype, copy=True) for x in exchange.last]
    return Passed(y, finals, states, decays, others[len(c.terms) :])


class Split(torch.autograd.Function):
    """A slice's `ssd`, begun before the states that enter it have come, and its backward pass before their cotangents have."""

    @staticmethod
    def forward(ctx: Any, c: Context, *tensors: Tensor) -> tuple[Tensor, ...]:
        q, k, v, *rest = tensors
        operands, initial = rest[: len(rest) - c.n_initial], rest[len(rest) - c.n_initial :]
        passed = forward(c, c.with_tensors(q, k, v, operands), initial)
        ctx.context, ctx.mode, ctx.initial = c, policy.current(), [x.dtype for x in initial]
        ctx.counts = len(operands), len(c.terms)
        ctx.save_for_backward(q, k, v, *operands, *passed.states, *passed.decays, *passed.saved)
        return passed.y, *passed.finals

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor, *dfinals: Tensor) -> tuple[Tensor | None, ...]:
        c: Context = ctx.context
        n_operands, n_terms = ctx.counts
        q, k, v, *kept = ctx.saved_tensors
        operands, states, decays, saved = (
            kept[:n_operands], kept[n_operands:][:n_terms], kept[n_operands + n_terms :][:n_terms],
            kept[n_operands + 2 * n_terms :],
        )  # fmt: skip
        part, acc = c.with_tensors(q, k, v, operands), c.part.problem.accumulate
        with policy.resume(ctx.mode), ops.no_autocast(q):  # on a GPU this is a thread of autograd's
            pairs = [
                Pair(a, part.arriving(term, dy), not term.causal, dfinals[i].to(acc) if dfinals else None)
                for i, (term, a) in enumerate(zip(c.terms, decays, strict=True))
            ]
            dstates = [torch.empty_like(x) for x in states]
            exchange = Exchange(pairs, c.team, dstates, whole=c.n_initial > 0)
            grads = run.backward(c.call(part, states), [dy, *dstates], saved, exchange.arrive)
            exchange.arrive()
        of_initial = [
            (x if c.enters(term) else torch.zeros_like(x)).to(dtype)
            for x, term, dtype in zip(exchange.last, c.terms, ctx.initial, strict=False)
        ]
        of_inputs = [x if needed else None for x, needed in zip(grads, ctx.needs_input_grad[1 : 4 + n_operands], strict=False)]
        return None, *of_inputs, *of_initial
