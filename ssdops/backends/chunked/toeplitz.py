"""Toeplitz masks by FFT: for each pair of channels a convolution, O(T log T · dstate · headdim) in all.

    y[i, p] = Σ_n q[i, n] · (c ∗ k_n v_p)[i]

Sequences are padded to where nothing wraps around. One transform of a whole sequence rounds every token with every other, and
causality is to the bit; so where lags are not negative, rows of a right half take the convolution of the left half beside them,
halves of halves the rest, O(T log² T), and chunks of C tokens are multiplied out.

dstate · headdim convolutions are little where both are small, and soon more than T² / 2 pairs take otherwise: `toeplitz_work`
says what they cost, and the planner decides.

Shapes: Z rows, H heads of a slice, T tokens, K pairs of halves of h tokens, F frequencies, N dstate, P headdim.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import log2

import torch
from torch import Tensor
from torch.nn.functional import pad

from ...ir.passes.structure import Structure
from ...ir.problem import Problem
from ...ir.resolve import repeat_heads
from ..base import Work
from ..structured import Values
from .parts import Slices
from .slices import Slice, slices

ELEMENTS = 2**20
"""Elements of k_n v_p that a slice aims at."""
TRANSFORM = 2.2
"""Elementwise operations that a transform there and back takes, by element and by the logarithm of the length."""


def padded_length(seqlen: int) -> int:
    """The least length 2^a · 3^b · 5^c that no lag of `seqlen` tokens wraps around: transforms of other lengths are slow."""
    length = max(2 * seqlen - 1, 1)
    while True:
        rest = length
        for prime in (2, 3, 5):
            while rest % prime == 0:
                rest //= prime
        if rest == 1:
            return length
        length += 1


def is_causal(structure: Structure) -> bool:
    """Whether no lag is negative, in local time."""
    return structure.low is not None and structure.low >= 0


def toeplitz_work(structure: Structure, p: Problem, size: int) -> Work:
    """What a forward pass costs: a transform there and one back for each pair of channels, and the products around them."""
    channels = float(p.batch * p.nheads * p.dstate * p.headdim)
    length, count = 2.0 * p.seqlen, max(channels * p.seqlen / ELEMENTS, 1.0)
    flops = 0.0
    if is_causal(structure):
        halves = [size << level for level in range(max(p.seqlen - 1, 0).bit_length()) if size << level < p.seqlen]
        per_token = sum(TRANSFORM * log2(2 * half) + 8 for half in halves) + 6
        flops = 2.0 * p.batch * p.nheads * p.seqlen * size * (p.dstate + p.headdim)
        return Work(
            flops, channels * p.seqlen * per_token, 24 * channels * p.seqlen * len(halves), 30 + 30 * count * len(halves)
        )
    elements = channels * length * (TRANSFORM * log2(max(length, 2.0)) + 8)
    return Work(flops, elements, 24 * channels * length, 20.0 + 25 * count)


def parts(structure: Structure, values: Values, size: int) -> Iterator[Slice]:
    """Slices of a Toeplitz term."""
    p = values.scan.problem
    fits = ELEMENTS // max(p.seqlen * p.dstate * p.headdim, 1)
    if p.seqlen:
        yield from slices(values, structure.scan.causal, fits, Convolution(structure, values, size).output)


class Convolution:
    """A Toeplitz term; `output` is Y of a slice."""

    def __init__(self, structure: Structure, values: Values, size: int) -> None:
        self.structure, self.acc, self.size = structure, values.scan.problem.accumulate, size
        self.seqlen = values.scan.problem.seqlen
        self.scale = structure.scan.sign * values.scan.scale

    def output(self, part: Slice, x: Slices) -> Tensor:
        """Y of a slice, [Z, T, H, P]."""
        heads, acc = part.count, self.acc
        q, k, v = (repeat_heads(x[name].to(acc), heads, 2).transpose(1, 2) for name in ("q", "k", "v"))  # [Z, H, T, D]
        v = v if "cols" not in x else v * repeat_heads(x["cols"].to(acc), heads, 2).transpose(1, 2)[..., None]
        coeffs = self._kept(x["coeffs"].to(acc))
        causal = is_causal(self.structure)
        y = self._chunks(q, k, v, coeffs) if causal else v.new_zeros(1)
        for first in range(0, q.shape[3], step := max(ELEMENTS // (v.numel() or 1), 1)):
            some = slice(first, first + step)
            pairs = torch.einsum("zhtn,zhtp->zhnpt", k[..., some], v)
            mixed = self._by_halves(pairs, coeffs) if causal else self._at_once(pairs, coeffs)
            y = y + torch.einsum("zhtn,zhnpt->zhtp", q[..., some], mixed)
        y = y.transpose(1, 2)
        y = y if "rows" not in x else y * repeat_heads(x["rows"].to(acc), heads, 2)[..., None]
        return y if self.scale == 1.0 else y * self.scale

    def _kept(self, coeffs: Tensor) -> Tensor:
        """The coefficients by lag of local time, with those outside the bounds put to zero, [H | 1, 2T − 1]."""
        s = self.structure
        coeffs = coeffs if s.scan.causal else coeffs.flip(1)
        lags = torch.arange(1 - self.seqlen, self.seqlen, device=coeffs.device)
        kept = torch.ones_like(lags, dtype=torch.bool)
        kept = kept if s.low is None else kept & (lags >= s.low)
        kept = kept if s.high is None else kept & (lags <= s.high)
        kept = kept & (lags != 0) if s.scan.strict else kept
        return torch.where(kept, coeffs, 0.0)

    def _at_once(self, pairs: Tensor, coeffs: Tensor) -> Tensor:
        """c ∗ x along the last axis, [Z, H, N, P, T]."""
        length, seqlen = padded_length(self.seqlen), self.seqlen
        ahead, behind = coeffs[:, : seqlen - 1], coeffs[:, seqlen - 1 :]  # lags … −2, −1, which go to the end, and 0, 1, …
        kernel = torch.fft.rfft(torch.cat([pad(behind, (0, length - (2 * seqlen - 1))), ahead], 1))  # [H | 1, F]
        spectrum = torch.fft.rfft(pairs, n=length) * _like_heads(kernel, pairs)
        return torch.fft.irfft(spectrum, n=length)[..., :seqlen]

    def _by_halves(self, pairs: Tensor, coeffs: Tensor) -> Tensor:
        """What is above chunks of c ∗ x, for a c without negative lags, [Z, H, N, P, T]."""
        out, half = torch.zeros_like(pairs), self.size
        while half < self.seqlen:
            kernel = coeffs[:, self.seqlen - 1 : self.seqlen - 1 + 2 * half]
            kernel = torch.fft.rfft(pad(kernel, (0, 2 * half - kernel.shape[1])))
            left = pad(pairs, (0, -self.seqlen % (2 * half))).unflatten(-1, (-1, 2, half))[..., 0, :]  # [Z, H, N, P, K, h]
            # what wraps around falls on the left half, which is thrown away
            right = torch.fft.irfft(torch.fft.rfft(left, n=2 * half) * _like_heads(kernel, left), n=2 * half)[..., half:]
            out = out + torch.stack([torch.zeros_like(right), right], -2).flatten(-3)[..., : self.seqlen]
            half *= 2
        return out

    def _chunks(self, q: Tensor, k: Tensor, v: Tensor, coeffs: Tensor) -> Tensor:
        """What tokens of a chunk give one another, [Z, H, T, P]."""
        size, seqlen = self.size, self.seqlen
        at = torch.arange(size, device=coeffs.device)
        lags = at[:, None] - at
        matrix = coeffs[:, (lags.clamp(0, seqlen - 1) + seqlen - 1)]  # [H | 1, C, C]
        matrix = torch.where((lags >= 0) & (lags < seqlen), matrix, 0.0)
        q, k, v = (pad(x, (0, 0, 0, -seqlen % size)).unflatten(2, (-1, size)) for x in (q, k, v))  # [Z, H, n, C, D]
        scores = (q @ k.transpose(3, 4)) * repeat_heads(matrix, q.shape[1], 0)[:, None]
        return (scores @ v).flatten(2, 3)[:, :, :seqlen]


def _like_heads(kernel: Tensor, x: Tensor) -> Tensor:
    """[H' | 1, F] → [H, 1, …, F], against x [Z, H, …]."""
    return repeat_heads(kernel, x.shape[1], 0).view(x.shape[1], *(1,) * (x.ndim - 3), -1)
