"""The transpose of a mask, by the passes of the mask itself.

Y = (Lᵀ ∘ Q Kᵀ) V is the gradient of V' in Y' = (L ∘ K Qᵀ) V', with q and k in each other's place and V as the cotangent; what
V' is does not matter. And ⟨dY, Y⟩ = ⟨V, (L ∘ K Qᵀ) dY⟩: gradients of q, k and operands are those of this contraction of dY with
V as the cotangent, and that of V is what it gives. So a forward pass takes as long as a backward pass of the mask, and a
backward pass as both of its passes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache

from torch import Tensor

from ..ir.problem import Problem
from ..ir.resolve import repeat_heads
from .base import BOTH, Gradients, Inputs, Work, share_heads


@lru_cache(maxsize=4096)  # one object for each problem, as passes are known by it
def _turned(p: Problem) -> Problem:
    return replace(p, q_heads=p.k_heads, k_heads=p.q_heads, v_heads=p.nheads)


def _inputs(x: Inputs, v: Tensor) -> Inputs:
    return replace(x, problem=_turned(x.problem), q=x.k, k=x.q, v=v)


def work(of_mask: Work, direction: str) -> Work:
    """What a pass costs, from what a forward pass of the mask does."""
    return of_mask.times(BOTH + 1.0 + BOTH if direction == "backward" else BOTH)


def forward(x: Inputs, backward_of: Callable[[Inputs, Tensor], Gradients]) -> Tensor:
    """Y, from what gives gradients of the mask's contraction, of which those of operands are not wanted."""
    v = repeat_heads(x.v, x.problem.nheads, 2)
    return backward_of(_inputs(x, v), v).v


def backward(
    x: Inputs, dy: Tensor, forward_of: Callable[[Inputs], Tensor], backward_of: Callable[[Inputs, Tensor], Gradients]
) -> Gradients:
    """Gradients of q, k, v and the operands, from what gives the contraction of the mask and its gradients."""
    turned = _inputs(x, dy)
    found = backward_of(turned, repeat_heads(x.v, x.problem.nheads, 2))
    dv = share_heads(forward_of(turned), x.problem.v_heads)
    return Gradients(found.k, found.q, dv, operands=found.operands)
