"""A literal table of mask structures, one small mask each: every row of the README's mask table and every combinator.

What must hold for every structure (gradcheck, the support matrix) runs over it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .. import masks as m
from ..ir.problem import fenwick_levels
from ..masks import Mask
from .case import Case


@dataclass(frozen=True)
class Make:
    """Makes operands of one size: a batch of one row, seqlen tokens, nheads heads."""

    seqlen: int = 6
    nheads: int = 2
    dstate: int = 3
    headdim: int = 2
    dtype: torch.dtype = torch.float64
    device: str = "cpu"
    seed: int = 0

    def normal(self, *shape: int) -> Tensor:
        """Normal values, other ones for another shape."""
        generator = torch.Generator().manual_seed(self.seed + hash(shape) % 2**31)
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(self.device, self.dtype)

    def factor(self, heads: int | None = None) -> Tensor:
        """A factor per token."""
        return self.normal(1, self.seqlen, heads or self.nheads)

    def log(self, heads: int | None = None) -> Tensor:
        """A log decay per token."""
        return -self.factor(heads).abs()

    def ranked(self, size: int) -> Tensor:
        """A factor per token with one axis more."""
        return self.normal(1, self.seqlen, self.nheads, size)

    @property
    def cu(self) -> Mask:
        """Three documents, one of them empty."""
        cut = self.seqlen // 3
        return m.documents(torch.tensor([0, cut, cut, self.seqlen], device=self.device))

    @property
    def ids(self) -> Mask:
        """Two documents of three possible ones."""
        ids = 2 * (torch.arange(self.seqlen, device=self.device) > self.seqlen // 3)[None].long()
        return m.documents(segment_ids=ids, n_segments=3)

    def case(self, mask: Mask, scale: float = 0.7) -> Case:
        """A call on the mask; q and k share a head."""
        q, k = self.normal(1, self.seqlen, 1, self.dstate), self.normal(1, self.seqlen, 1, self.dstate).flip(1)
        return Case(q, k, self.normal(1, self.seqlen, self.nheads, self.headdim), mask, scale)


STRUCTURES: dict[str, Callable[[Make], Mask]] = {
    "causal": lambda s: m.causal(),
    "full": lambda s: m.full(),
    "decay": lambda s: m.decay(s.log()),
    "retention": lambda s: m.retention(-s.normal(s.nheads).abs()),
    "documents(cu_seqlens)": lambda s: s.cu,
    "documents(segment_ids)": lambda s: s.ids,
    "window": lambda s: m.window(2, 1),
    "toeplitz": lambda s: m.toeplitz(s.normal(s.nheads, 2 * s.seqlen - 1)),
    "dense": lambda s: m.dense(s.normal(1, s.nheads, s.seqlen, s.seqlen)),
    "diagonal": lambda s: m.diagonal(s.factor()),
    "semiseparable": lambda s: m.semiseparable(s.log(), s.ranked(2), s.ranked(2).flip(1)),
    "fenwick": lambda s: m.fenwick(s.log(), s.ranked(fenwick_levels(s.seqlen))),
    "trapezoidal(beta)": lambda s: m.trapezoidal(s.log(), s.factor(), s.factor().flip(1)),
    "trapezoidal(beta_over_a)": lambda s: m.trapezoidal(s.log(), gamma=s.factor(), beta_over_a=s.factor().flip(1)),
    "channel_decay(log_a)": lambda s: m.channel_decay(-s.ranked(s.dstate).abs()),
    "channel_decay(dt, A)": lambda s: m.channel_decay(dt=s.factor().abs(), A=-s.normal(s.nheads, s.dstate).abs()),
    "strict": lambda s: m.decay(s.log()).strict(),
    "shift": lambda s: m.decay(s.log()).shift(1),
    "shift(2)": lambda s: m.decay(s.log()).shift(2),
    "T": lambda s: m.decay(s.log()).T,
    "reverse": lambda s: m.decay(s.log()).reverse(),
    "shift T": lambda s: m.decay(s.log()).shift(1).T,
    "reverse T": lambda s: m.decay(s.log()).reverse().T,
    "neg": lambda s: -m.decay(s.log()),
    "scale": lambda s: m.decay(s.log()).scale(rows=s.factor(), cols=s.factor(1), log_cols=s.log()),
    "scale T": lambda s: m.decay(s.log()).scale(rows=s.factor(), log_cols=s.log()).T,
    "product of decays": lambda s: m.decay(s.log()) * m.decay(s.log(1)) * m.retention(-s.normal(s.nheads).abs()),
    "quasiseparable": lambda s: m.decay(s.log()).strict() + m.decay(s.log(1)).strict().T + m.diagonal(s.factor()),
    "decay * window": lambda s: m.decay(s.log()) * m.window(2),
    "decay * documents(cu_seqlens)": lambda s: m.decay(s.log()) * s.cu,
    "decay * documents(segment_ids)": lambda s: m.decay(s.log()) * s.ids,
    "decay.T * documents": lambda s: m.decay(s.log()).strict().T * s.cu,
    "trapezoidal * documents": lambda s: m.trapezoidal(s.log(), s.factor(), s.factor().flip(1)) * s.cu,
    "channel_decay * documents": lambda s: m.channel_decay(-s.ranked(s.dstate).abs()) * s.cu,
    "channel_decay * window": lambda s: m.channel_decay(-s.ranked(s.dstate).abs()) * m.window(3),
    "channel_decay T": lambda s: m.channel_decay(-s.ranked(s.dstate).abs()).T,
}
"""Name → a mask of that structure."""
