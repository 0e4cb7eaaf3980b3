"""What a slice does to the states that pass it: its total decay, and what its tokens leave of the cotangent."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..backends.base import bind, exponent_dtype
from ..ir import nodes as n
from ..ir.contraction import Contraction
from ..ir.problem import Problem
from ..ir.resolve import document_boundaries, repeat_heads
from ..ir.terms import Linear
from ..run import Call, final_states


@dataclass(frozen=True)
class Slice:
    """One rank's part of a call.

    Attributes:
        q, k, v: its tokens; operands: of the mask, by name, in the order of its tree.
        problem: the facts of the whole call, here.
        options: backend, chunk_size and tune, as a contraction has them.
        scale: of Y.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    operands: Mapping[str, Tensor]
    problem: Problem
    options: Contraction
    scale: float

    @property
    def state_shape(self) -> tuple[int, ...]:
        """Of every state, `(n_states, nheads, headdim, dstate)`."""
        p = self.problem
        assert p.n_states is not None  # a mask whose documents are not counted has been refused
        return p.n_states, p.nheads, p.headdim, p.dstate

    def without_tensors(self) -> Slice:
        """The same, without any tensors."""
        nothing = self.q.new_empty(0)
        return replace(self, q=nothing, k=nothing, v=nothing, operands=dict.fromkeys(self.operands, nothing))

    def total_decay(self, term: Linear) -> Tensor:
        """exp(E) for every state, `(n_states, nheads, 1, 1)`, or with dstate for the last axis; ones where nothing decays."""
        p, wide = self.problem, exponent_dtype(self.problem)
        x = bind(term, p, self.q, self.k, self.v, self.operands, None, 1.0, factored=True)
        total = torch.zeros(self.state_shape[0], p.nheads, 1, dtype=wide, device=self.q.device)
        if (log_a := x.per_head("log_a")) is not None:
            total = total + self._summed(term, log_a)[..., None]
        if (channel := x.per_head("channel")) is not None:
            total = total + self._summed(term, channel)
        if (dt := x.per_head("dt")) is not None:
            A = repeat_heads(x.values["A"], p.nheads, 0).to(wide)  # [H, N]
            total = total + self._summed(term, dt)[..., None] * A
        return total.exp().to(p.accumulate)[:, :, None]

    def _summed(self, term: Linear, x: Tensor) -> Tensor:
        """Sums over the tokens of each state, `(batch, seqlen, …)` → `(n_states, …)`."""
        p, wide = self.problem, exponent_dtype(self.problem)
        if term.documents is None:
            return x.sum(1, dtype=wide)
        ends = document_boundaries(term.documents, self.operands, p.batch, p.seqlen)
        sums = torch.cat([x.new_zeros(1, *x.shape[2:], dtype=wide), x.flatten(0, 1).cumsum(0, dtype=wide)])
        return sums[ends[1:]] - sums[ends[:-1]]

    def arriving(self, term: Linear, dy: Tensor) -> Tensor:
        """The cotangent of the state that enters, from that of Y alone: `dS = Σ_i scale · u_i · exp(ρ_i) dy_i q_iᵀ`.

        It is what the transposed term leaves of q and dy.
        """
        bare = replace(term, cols=None, log_cols=None, sign=1).transpose()
        tree, acc = bare.node(), self.problem.accumulate
        dy = dy.to(acc) if acc == torch.float64 else dy  # what makes it so may not be among this term's operands
        program = str(replace(self.options, mask=tree, return_state=True))
        call = Call(self.k, self.q, dy, [self.operands[name] for name in n.operand_names(tree)], [], program, 1.0)
        (state,) = final_states(call)
        # one term may have fewer heads than the mask
        return repeat_heads(state, self.problem.nheads, 1) * (term.sign * self.scale)
