"""Arithmetic that every scan shares: the exponents of a term, and diagonal terms, which each backend runs alike."""

from __future__ import annotations

from math import lcm

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..ir.problem import Problem
from ..ir.resolve import repeat_heads
from ..ir.terms import Diagonal, Linear
from .base import BOTH, Gradients, Inputs, Work, reduce_value, share_heads


class Every:
    """The states after every `state_every` tokens of a term, as a walk along its rows comes by them; none if not wanted.

    Attributes:
        states: `(batch, seqlen // state_every, nheads, headdim, dstate)`, or None.
    """

    def __init__(self, x: Inputs) -> None:
        p = x.problem
        self.tokens = p.state_every
        self.states: Tensor | None = None
        if self.tokens is not None:
            shape = (p.batch, p.seqlen // self.tokens, p.nheads, p.headdim, p.dstate)
            self.states = torch.empty(shape, dtype=p.state_dtype, device=x.q.device)

    def wants(self, t: int) -> bool:
        """Whether the state after t tokens is one of them."""
        return self.tokens is not None and t > 0 and t % self.tokens == 0

    def put(self, t: int, state: Tensor) -> None:
        """Keep the state after t tokens, `(batch, nheads, headdim, dstate)`."""
        assert self.states is not None and self.tokens is not None  # wants() says so
        self.states[:, t // self.tokens - 1] = state


def exponents(term: Linear, d: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """ρ, κ and E of `ir/terms.py` for log decays d [rows, t, …] in local time: E is [rows, …]."""
    inclusive = d.cumsum(1)
    exclusive = inclusive - d if not (term.row_inclusive and term.col_inclusive) else inclusive
    total = inclusive[:, -1] if d.shape[1] else d.sum(1)
    return (
        inclusive if term.row_inclusive else exclusive,
        inclusive if term.col_inclusive else exclusive,
        total,
    )


def exponent_gradient(term: Linear, drho: Tensor, dkappa: Tensor, dtotal: Tensor) -> Tensor:
    """The gradient of d from those of ρ, κ [rows, t, …] and E [rows, …]: reversed cumulative sums."""
    # a sum and its mirror image cancel where decay is slow: subtract before summing
    if term.row_inclusive and term.col_inclusive:
        return _reverse_cumsum(drho + dkappa) + dtotal[:, None]
    both = _reverse_cumsum(drho + dkappa)
    late = torch.zeros_like(drho)
    late = late if term.row_inclusive else late + drho
    late = late if term.col_inclusive else late + dkappa
    return both - late + dtotal[:, None]


def state_log_gradient(term: Linear, entering: Tensor, leaving: Tensor, through: Tensor) -> Tensor:
    """The gradient of d in a chunk from what crosses its ends: sums only, as differences would lose what strong decays leave.

    Args:
        entering: how Y changes with what row i reads of the state before the chunk, [rows, t, …].
        leaving: how the rest changes with what token j adds to the state after it, [rows, t, …].
        through: how the rest changes with what passes from the one state to the other, [rows, …].
    """
    late, early = _reverse_cumsum(entering), leaving.cumsum(1)
    if not term.row_inclusive:  # d_t is read from row t + 1 on
        late = pad(late[:, 1:], (0, 0, 0, 1))
    if term.col_inclusive:  # d_t weighs on what tokens before t have added
        early = pad(early[:, :-1], (0, 0, 1, 0))
    return late + early + through[:, None]


def _reverse_cumsum(x: Tensor) -> Tensor:
    return x.flip(1).cumsum(1).flip(1)


def diagonal_work(p: Problem, direction: str) -> Work:
    """What a diagonal costs in torch."""
    touched = float(p.batch * p.nheads * (p.headdim + p.dstate)) * p.seqlen
    forward = Work(0.0, 3 * touched, 8 * touched, 6.0)
    return forward.times(BOTH) if direction == "backward" else forward


def diagonal_forward(term: Diagonal, x: Inputs) -> Tensor:
    """y_i = sign · scale · value_i · ⟨q_i, k_i⟩ · v_i."""
    p, acc = x.problem, x.problem.accumulate
    weight = _inner(x.q.to(acc), x.k.to(acc)) * (term.sign * x.scale)  # [B, T, G]
    weight = repeat_heads(weight, p.nheads, 2)
    value = x.per_head("value")
    weight = weight if value is None else weight * value.to(acc)
    return weight[..., None] * repeat_heads(x.v.to(acc), p.nheads, 2)


def _inner(a: Tensor, b: Tensor) -> Tensor:
    """⟨a, b⟩ over the last axis, heads (axis 2) shared in groups."""
    heads = lcm(a.shape[2], b.shape[2])
    return (repeat_heads(a, heads, 2) * repeat_heads(b, heads, 2)).sum(-1)


def diagonal_backward(term: Diagonal, x: Inputs, dy: Tensor) -> Gradients:
    """Gradients of a diagonal term."""
    p, acc = x.problem, x.problem.accumulate
    q, k, v = (t.to(acc) for t in (x.q, x.k, x.v))
    g = dy.to(acc) * (term.sign * x.scale)  # [B, T, H, P]
    product = repeat_heads(_inner(q, k), p.nheads, 2)  # [B, T, H]
    along = (g * repeat_heads(v, p.nheads, 2)).sum(-1)  # ⟨dy, v⟩
    value = x.per_head("value")
    weight = product if value is None else product * value.to(acc)
    dproduct = along if value is None else along * value.to(acc)
    out = Gradients(
        q=share_heads(dproduct[..., None] * repeat_heads(k, p.nheads, 2), p.q_heads),
        k=share_heads(dproduct[..., None] * repeat_heads(q, p.nheads, 2), p.k_heads),
        v=share_heads(weight[..., None] * g, p.v_heads),
    )
    if value is not None:
        out.values["value"] = reduce_value(along * product, x.values["value"])
    return out
