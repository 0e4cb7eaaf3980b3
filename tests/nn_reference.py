"""The Mamba-2 block written down token by token in float64, and what the roundings of a computation may do to it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ssdops.nn import Mamba2, Mamba2Cache
from ssdops.testing import assert_close, tolerance


@dataclass
class Roundings:
    """The places where a computation rounds: value + δ · magnitude, with δ = 0.

    What an output's derivative by a δ is, a relative error of eps there does to it, times eps.

    Attributes:
        stored: where a value is kept in the dtype of activations.
        summed: where products meet in the accumulation dtype.
    """

    stored: list[Tensor] = field(default_factory=list)
    summed: list[Tensor] = field(default_factory=list)

    def _at(self, places: list[Tensor], value: Tensor, magnitude: Tensor) -> Tensor:
        places.append(torch.zeros_like(value, requires_grad=True))
        return value + places[-1] * magnitude.detach()

    def store(self, value: Tensor) -> Tensor:
        return self._at(self.stored, value, value)

    def sum(self, value: Tensor, magnitude: Tensor | None = None) -> Tensor:
        return self._at(self.summed, value, value if magnitude is None else magnitude)

    def effects(self, out: Tensor) -> tuple[float, float]:
        """What errors of 1 in every place do to out `(batch, …)`, at its greatest: of what is stored, and of what is summed.

        No row of out reads another. Roundings are independent of one another, so that their effects add up by their squares.
        """
        outputs = out.sum(0).flatten()
        each = torch.eye(len(outputs), dtype=out.dtype)
        places, count = [*self.stored, *self.summed], len(self.stored)
        slopes = torch.autograd.grad(outputs, places, each, retain_graph=True, is_grads_batched=True, allow_unused=True)
        squares = [None if x is None else x.square().flatten(2).sum(2) for x in slopes]  # [outputs, batch]
        found = [torch.stack([x for x in part if x is not None]) for part in (squares[:count], squares[count:])]
        stored, summed = (x.sum(0).max().sqrt().item() for x in found)
        return stored, summed


def allowed(effects: tuple[float, float], dtype: torch.dtype, length: int) -> float:
    """What the tolerance formula allows of a result with these effects, for activations of that dtype."""
    accumulate = torch.promote_types(dtype, torch.float32)
    return tolerance(dtype, dtype, 1, effects[0]) + tolerance(accumulate, accumulate, length, effects[1])


def reference(
    block: Mamba2,
    u: Tensor,
    cache: Mamba2Cache | None = None,
    roundings: Roundings | None = None,
    parameters: Sequence[dict[str, Tensor]] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """y `(batch, seqlen, d_model)`, the window and the state that leave; differentiable.

    `parameters` are those that each token meets, by their names; the block's own, if None.
    """
    at = roundings or Roundings()
    u, batch = u.double(), u.shape[0]
    parameters = [dict(block.named_parameters())] * u.shape[1] if parameters is None else parameters
    channels, width = block.conv1d.weight.shape[0], block.d_conv
    groups, per_group = block.ngroups, block.nheads // block.ngroups
    past = list((torch.zeros(batch, channels, width - 1).double() if cache is None else cache.window.double()).unbind(2))
    size = (batch, block.nheads, block.headdim, block.d_state)
    S = torch.zeros(size).double() if cache is None else cache.state.double()
    outputs = []
    for u_t, given in zip(u.unbind(1), parameters, strict=True):
        p = {name: x.double() for name, x in given.items()}
        inner = at.store(_linear(at, u_t, p["in_proj.weight"], p.get("in_proj.bias")))
        z, xBC, dt = inner[:, : block.d_inner], inner[:, block.d_inner : -block.nheads], inner[:, -block.nheads :]
        past.append(xBC)
        taps = [p["conv1d.weight"][:, 0, k] * past[k - width] for k in range(width)]
        taps += [p["conv1d.bias"]] if "conv1d.bias" in p else []
        conv = at.store(_silu(at, at.sum(sum(taps), sum(x.abs() for x in taps))))
        x = conv[:, : block.d_inner].view(batch, block.nheads, block.headdim)
        B, C = conv[:, block.d_inner :].view(batch, 2, groups, block.d_state).repeat_interleave(per_group, 2).unbind(1)
        dt = at.sum(torch.log1p(torch.exp(at.sum(dt + p["dt_bias"], dt.abs() + p["dt_bias"].abs()))))
        dt = dt.clamp(*block.dt_limit)
        log_a = dt * -at.sum(p["A_log"].expand(batch, -1)).exp()
        a = at.sum(torch.exp(at.sum(log_a)))
        added = torch.einsum("bh,bhp,bhn->bhpn", dt, x, B)
        S = at.sum(a[..., None, None] * S + added, a[..., None, None] * S.abs() + added.abs())
        y = torch.einsum("bhpn,bhn->bhp", S, C)
        y = at.store(at.sum(y, torch.einsum("bhpn,bhn->bhp", S.abs(), C.abs())))
        skip = x * p["D"].view(block.nheads, -1)
        y = at.sum(y + skip, y.abs() + skip.abs()).flatten(1)
        outputs.append(at.store(_linear(at, at.store(_norm(at, block, y, z, p)), p["out_proj.weight"], p.get("out_proj.bias"))))
    window = torch.stack(past[len(past) - (width - 1) :], 2) if width > 1 else torch.zeros(batch, channels, 0).double()
    return torch.stack(outputs, 1), window, S


def _linear(at: Roundings, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    none = torch.zeros(len(weight)).double() if bias is None else bias
    return at.sum(x @ weight.T + none, x.abs() @ weight.abs().T + none.abs())


def _silu(at: Roundings, x: Tensor) -> Tensor:
    return at.sum(x / (1 + torch.exp(-x)))


def _norm(at: Roundings, block: Mamba2, y: Tensor, z: Tensor, p: dict[str, Tensor]) -> Tensor:
    gate = _silu(at, z)
    if block.norm is None:
        return at.sum(y * gate)
    before = block.norm.norm_before_gate
    parts = (y if before else at.sum(y * gate)).chunk(block.norm.groups, 1)
    normed = torch.cat([x / torch.sqrt(at.sum((x * x).mean(1, keepdim=True)) + block.norm.eps) for x in parts], 1)
    normed = at.sum(normed * p["norm.weight"])
    return at.sum(normed * gate) if before else normed


PARTS = ("y", "window", "state")


def longest_sum(block: Mamba2, seqlen: int) -> int:
    """The greatest number of products that meet in one element of a block's computation."""
    return max(block.d_model, block.d_inner, block.d_conv + 1, block.d_state, seqlen)


def make_block(dtype: torch.dtype = torch.float64, seed: int = 0, **options: object) -> Mamba2:
    """A small block whose parameters are all off their initial values; dt is large enough for a state that matters."""
    torch.manual_seed(seed)
    sizes = {"d_model": 8, "d_state": 3, "headdim": 4, "ngroups": 1, "dt_min": 0.1, "dt_max": 1.0} | options
    block = Mamba2(**sizes).double()  # type: ignore[arg-type]
    with torch.no_grad():
        for name, x in block.named_parameters():
            if name in ("D", "norm.weight") or name.endswith("proj.bias"):
                x.add_(torch.randn_like(x) / 2)
            elif name == "in_proj.weight":
                x.normal_(std=1 / math.sqrt(block.d_model))
    return block.to(dtype)


def tokens(batch: int, seqlen: int, block: Mamba2, seed: int = 1) -> Tensor:
    """Inputs of a block, in its dtype."""
    torch.manual_seed(seed)
    return torch.randn(batch, seqlen, block.d_model, dtype=torch.float64).to(block.D.dtype)


def both(cache: Mamba2Cache) -> tuple[Tensor, Tensor]:
    return cache.window, cache.state


def expected(block: Mamba2, u: Tensor, cache: Mamba2Cache | None = None) -> tuple[list[Tensor], list[float]]:
    """What the transcription gives, and what is allowed of each part of it."""
    roundings = Roundings()
    parts = reference(block, u, cache, roundings)
    length = longest_sum(block, u.shape[1])
    return [x.detach() for x in parts], [allowed(roundings.effects(x), u.dtype, length) if x.numel() else 0.0 for x in parts]


def some_cache(block: Mamba2, rows: int) -> Mamba2Cache:
    torch.manual_seed(2)
    zeros = block.initial_cache(rows)
    return Mamba2Cache(*(torch.randn(x.shape, dtype=torch.float64).to(x.dtype) for x in both(zeros)))


def close(actual: tuple[Tensor, Mamba2Cache], parts: list[Tensor], allowed: list[float], what: str = "") -> None:
    for name, x, y, limit in zip(PARTS, (actual[0], *both(actual[1])), parts, allowed, strict=True):
        assert_close(x, y, limit, f"{what} {name}")
