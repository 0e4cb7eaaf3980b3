"""Masks that a user might register: one for every kind of operand, most of them with what they are made of."""

from __future__ import annotations

import torch

from ssdops import masks, operand, register_mask


@register_mask("their_decay")
class TheirDecay:
    """A decay, written anew."""

    log_a = operand("batch seqlen nheads")
    causal = True

    def entries(self, i, j):
        sums = self.log_a.cumsum()
        return torch.where(i >= j, sums[i] - sums[j], 0.0).exp()

    def lower(self):
        return masks.decay(self.log_a)


@register_mask("their_alibi")
class TheirAlibi:
    """γ_h^|i−j|."""

    log_gamma = operand("nheads")

    def entries(self, i, j):
        return (self.log_gamma * (i - j).abs()).exp()

    def lower(self):
        return masks.retention(self.log_gamma) + masks.retention(self.log_gamma).strict().T


@register_mask("their_powers")
class TheirPowers:
    """w_j / (1 + i − j)^power: no scan computes it, so it has no lower()."""

    w = operand("batch seqlen nheads")
    power = operand(int)
    causal = True

    def entries(self, i, j):
        return self.w[j] * (1.0 + (i - j).abs()) ** (-1.0 * self.power)


@register_mask("their_band")
class TheirBand:
    """(u_i + w_j) · 1[|i − j| ≤ width]: an expression of operands in lower(), and a support."""

    u = operand("batch seqlen nheads")
    w = operand("nheads")
    width = operand(int)

    def entries(self, i, j):
        return self.u[i] * 2.0 + self.w

    def support(self, i, j):
        return (i - j).abs() <= self.width

    def lower(self):
        return masks.window(self.width, self.width).scale(rows=self.u * 2.0 + self.w)


@register_mask("their_channels")
class TheirChannels:
    """A decay per state channel times a factor per head and channel, which no built-in structure has."""

    log_a = operand("batch seqlen nheads dstate")
    A = operand("nheads dstate")
    causal = True

    def entries(self, i, j):
        sums = self.log_a.cumsum()
        return torch.where(i >= j, sums[i] - sums[j], 0.0).exp() * self.A.exp()


@register_mask("their_ranks")
class TheirRanks:
    """Σ_r c[i, r] · b[j, r] for i ≥ j."""

    log_a = operand("nheads")
    b = operand("batch seqlen nheads rank")
    c = operand("batch seqlen nheads rank")
    rank = operand(int)
    causal = True

    def entries(self, i, j):
        low_rank = sum(self.c[i, r] * self.b[j, r] for r in range(self.c.count))
        return low_rank * torch.where(i >= j, self.log_a * (i - j), 0.0).exp()

    def lower(self):
        return masks.semiseparable(self.log_a, self.b, self.c)


@register_mask("their_levels")
class TheirLevels:
    """A Fenwick mask without decay: levels[i, level(i, j)]."""

    levels = operand("batch seqlen nheads n_levels")
    causal = True

    def entries(self, i, j):
        bits = torch.where(i == j, 0.5, (i ^ j).double().clamp_min(0.5)).log2().floor().long() + 1
        return self.levels[i, bits]


@register_mask("their_lags")
class TheirLags:
    """c[i − j]."""

    coeffs = operand("nheads 2*seqlen-1")

    def entries(self, i, j):
        return self.coeffs[i - j]

    def lower(self):
        return masks.toeplitz(self.coeffs)


@register_mask("their_matrix")
class TheirMatrix:
    """L[i, j], transposed twice."""

    L = operand("batch nheads seqlen seqlen")

    def entries(self, i, j):
        return self.L[i, j]

    def lower(self):
        return masks.dense(self.L).T.T


@register_mask("their_documents")
class TheirDocuments:
    """1[same id]."""

    ids = operand("batch seqlen")

    def entries(self, i, j):
        return 1.0

    def support(self, i, j):
        return self.ids[i] == self.ids[j]

    def lower(self):
        return masks.documents(segment_ids=self.ids)


@register_mask("their_boundaries")
class TheirBoundaries:
    """1[same document], from boundaries."""

    cu = operand("n_segments+1")

    def entries(self, i, j):
        starts = self.cu[1:].contiguous()
        return torch.searchsorted(starts, i, right=True) == torch.searchsorted(starts, j, right=True)

    def lower(self):
        return masks.documents(self.cu)


KINDS = (
    TheirDecay, TheirAlibi, TheirPowers, TheirBand, TheirChannels, TheirRanks, TheirLevels, TheirLags, TheirMatrix,
    TheirDocuments, TheirBoundaries,
)  # fmt: skip
