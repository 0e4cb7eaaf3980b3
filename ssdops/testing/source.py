"""What is drawn from: sizes with every head pattern, and a source of tensors with structure from hypothesis.

Values come from one drawn seed, which is cheap and reproduces; shapes, layouts and scales are drawn, and shrink.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from hypothesis import strategies as st
from torch import Tensor

from .. import masks
from ..masks import Mask

Draw: TypeAlias = Callable[[st.SearchStrategy[Any]], Any]

LAYOUTS = ("contiguous", "strided", "turned", "expanded")
HEADS = {
    "MHA": (2, 2, 2), "single": (1, 1, 1), "MQA": (4, 1, 1), "MVA": (1, 1, 4), "MKA": (1, 4, 1), "grouped": (2, 2, 4),
    "coprime": (2, 3, 6), "MIS": (1, 2, 1),
}  # fmt: skip
"""Head counts of q, k and v."""


@dataclass(frozen=True)
class Sizes:
    """The sizes of a call."""

    batch: int
    seqlen: int
    nheads: int
    headdim: int
    dstate: int
    q_heads: int
    k_heads: int
    v_heads: int


@st.composite
def problems(draw: Draw, max_seqlen: int = 40, max_dim: int = 9, min_batch: int = 0, max_batch: int = 3) -> Sizes:
    """Sizes: now and then empty ones, every head pattern, no number a multiple of anything."""
    batch = draw(st.sampled_from([b for b in (1, 2, 3, 0) if min_batch <= b <= max_batch]))
    seqlen = draw(st.integers(1, max_seqlen) | st.just(0)) if draw(st.integers(0, 7)) else draw(st.sampled_from([0, 1]))
    heads = HEADS[draw(st.sampled_from(list(HEADS)))]
    nheads = max(heads) * draw(st.sampled_from([1, 1, 2]))
    headdim, dstate = draw(st.integers(1, max_dim)), draw(st.integers(1, max_dim))
    return Sizes(batch, seqlen, nheads, headdim, dstate, *heads)


def laid_out(x: Tensor, layout: str) -> Tensor:
    """x under other strides: every second element of the last axis, the middle axes turned, or one head expanded."""
    if x.ndim == 0 or layout == "contiguous":
        return x
    if layout == "turned" and x.ndim == 4:
        return x.transpose(1, 2).contiguous().transpose(1, 2)
    if layout == "expanded" and x.ndim == 4:
        return x[:, :, :1].expand(x.shape)
    return torch.stack([x, torch.full_like(x, torch.nan)], -1)[..., 0]


class Source:
    """Draws structure from hypothesis and values from a seeded generator.

    Args:
        draw: hypothesis's.
        sizes: of the call.
        dtype: of mask operands.
    """

    def __init__(self, draw: Draw, sizes: Sizes, dtype: torch.dtype, strided: bool = True) -> None:
        self.draw, self.sizes, self.dtype, self.strided = draw, sizes, dtype, strided
        self.generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))

    def pick(self, options: Sequence[Any]) -> Any:
        """One of the options; failures shrink towards the first."""
        return self.draw(st.sampled_from(options))

    def chance(self, one_in: int) -> bool:
        """True now and then."""
        return bool(self.draw(st.integers(0, one_in - 1)) == one_in - 1)

    def lay(self, x: Tensor) -> Tensor:
        """x, now and then under other strides."""
        return laid_out(x, self.pick(LAYOUTS)) if self.strided and self.chance(3) else x

    def normal(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """Standard normal values, rounded to the dtype."""
        return torch.randn(shape, generator=self.generator, dtype=torch.float64).to(dtype or self.dtype)

    def uniform(self, low: float, high: float, *shape: int) -> Tensor:
        """Uniform values, rounded to the operands' dtype."""
        return (low + (high - low) * torch.rand(shape, generator=self.generator, dtype=torch.float64)).to(self.dtype)

    def heads(self) -> int:
        """A head count that divides nheads."""
        h = self.sizes.nheads
        return int(self.pick([h, *[d for d in range(1, h) if h % d == 0]]))

    def token_shape(self, *rest: int) -> tuple[int, ...]:
        """A shape per token, in full or broadcastable; operands with further axes keep all of theirs."""
        s, heads = self.sizes, self.heads()
        batch, seqlen = (1 if self.chance(4) else s.batch), (1 if self.chance(6) else s.seqlen)
        full = (batch, seqlen, heads, *rest)
        return full if rest or not self.chance(5) else self.pick([full[1:], full[2:], ()])

    def log(self, *shape: int) -> Tensor:
        """Log decays: slow, ordinary, strong, mixed, and now and then growing."""
        low, high = self.pick([(-1.0, 0.0), (-1e-3, -1e-6), (-20.0, -1.0), (-0.3, 0.3)])
        x = self.uniform(low, high, *shape)
        if self.chance(4):
            x = torch.where(torch.rand(shape, generator=self.generator) < 0.1, -20.0, x).to(x.dtype)
        return x

    def token(self) -> Tensor:
        """A factor per token."""
        return self.lay(self.normal(*self.token_shape()))

    def token_log(self) -> Tensor:
        """A log decay per token."""
        return self.lay(self.log(*self.token_shape()))

    def channel_log(self) -> Tensor:
        """A log decay per token and state channel."""
        return self.lay(self.log(*self.token_shape(self.sizes.dstate)))

    def ranked(self, rank: int) -> Tensor:
        """A factor per token and rank."""
        return self.lay(self.normal(*self.token_shape(rank)))

    def boundaries(self, count: int | None = None) -> Tensor:
        """cu_seqlens, empty documents included."""
        inner = (self.draw(st.integers(0, 5)) if count is None else count) if self.sizes.seqlen else 0
        cuts = torch.randint(0, self.sizes.seqlen + 1, (inner,), generator=self.generator).sort().values
        cu = torch.cat([torch.zeros(1, dtype=torch.int64), cuts, torch.tensor([self.sizes.seqlen])])
        return cu.to(self.pick([torch.int32, torch.int64]))

    def ids(self) -> tuple[Tensor, int]:
        """Nondecreasing segment ids, some of them absent, and how many there may be."""
        count = self.draw(st.integers(1, 5))
        shape = (self.pick([self.sizes.batch, 1]), self.sizes.seqlen)
        ids = torch.randint(0, count, shape, generator=self.generator).sort(1).values
        return ids.to(self.pick([torch.int64, torch.int32])), count

    def documents(self, counted: bool = True) -> Mask:
        """Documents: cu_seqlens where batch is 1, or segment ids."""
        if self.sizes.batch == 1 and self.pick([True, False]):
            return masks.documents(self.boundaries())
        ids, count = self.ids()
        return masks.documents(segment_ids=ids, n_segments=count if counted else None)
