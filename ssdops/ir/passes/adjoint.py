"""Gradients as contractions (DESIGN.md, decision 1).

With Y = (L ∘ QKᵀ)V and a cotangent dY, for a mask whose decay is not per channel:

    dV = (Lᵀ ∘ KQᵀ) dY        dQ = (L ∘ dY Vᵀ) K        dK = (Lᵀ ∘ V dYᵀ) Q

each summed over the heads that share the operand, each a contraction with L or Lᵀ, so whatever runs the mask runs its
gradients. The state's cotangent enters Lᵀ as its initial state: dV's where the state is `v kᵀ`, dK's transposed.
"""

from __future__ import annotations

from dataclasses import dataclass

from .. import nodes as n


@dataclass(frozen=True, slots=True)
class Adjoint:
    """One gradient as a contraction.

    Attributes:
        of: which input it is the gradient of.
        q, k, v: which of q, k, v and dy plays each part.
        transposed: whether the mask is Lᵀ.
    """

    of: str
    q: str
    k: str
    v: str
    transposed: bool

    def mask(self, mask: n.Node) -> n.Node:
        """The mask of this gradient's contraction."""
        return n.Transpose(mask) if self.transposed else mask


ADJOINTS = (
    Adjoint(of="q", q="dy", k="v", v="k", transposed=False),
    Adjoint(of="k", q="v", k="dy", v="q", transposed=True),
    Adjoint(of="v", q="k", k="q", v="dy", transposed=True),
)
