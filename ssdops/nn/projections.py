"""What the Mamba-2 block and Hydra have in common: one projection in, in which all that their scans take lies side by side."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from .rates import discretize


class Projections(nn.Module):
    """The projections of a block whose scans, one per direction, each have a B, a C and a dt of their own.

        z, xBC, dt = split(W_in u)        x, B, C, … = split(what the convolution makes of xBC)
        dt = clamp(softplus(dt + dt_bias))        A = −exp(A_log)

    A subclass sets its sizes and ranges, which have the names of its options, before it makes the parameters.
    """

    directions = 1
    d_model: int
    d_state: int
    d_conv: int
    d_inner: int
    headdim: int
    ngroups: int
    nheads: int
    dt_init: tuple[float, float, float]
    dt_limit: tuple[float, float]

    def _make_projections(self, padding: int, bias: bool, conv_bias: bool, place: dict[str, Any]) -> None:
        """`in_proj`, `conv1d`, `dt_bias` and `A_log`, the latter two of unknown values, at a place: device and dtype."""
        channels = self.d_inner + 2 * self.directions * self.ngroups * self.d_state
        self.in_proj = nn.Linear(self.d_model, self.d_inner + channels + self.directions * self.nheads, bias, **place)
        self.conv1d = nn.Conv1d(channels, channels, self.d_conv, padding=padding, groups=channels, bias=conv_bias, **place)
        self.dt_bias, self.A_log = (nn.Parameter(torch.empty(self.nheads, **place)) for _ in range(2))

    def _draw_dt_bias(self) -> None:
        """softplus(dt_bias) log-uniform in [dt_min, dt_max], and at least the floor."""
        low, high, floor = self.dt_init
        wide = torch.promote_types(self.dt_bias.dtype, torch.float32)
        drawn = torch.empty(self.nheads, device=self.dt_bias.device, dtype=wide).uniform_(math.log(low), math.log(high))
        dt = drawn.exp().clamp(min=floor)
        self.dt_bias.copy_(dt + torch.log(-torch.expm1(-dt)))  # the inverse of softplus

    def _project(self, u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """z, xBC and dt, views of one tensor."""
        widths = [self.d_inner, self.conv1d.weight.shape[0], self.directions * self.nheads]
        z, xBC, dt = self.in_proj(u).split(widths, -1)
        return z, xBC, dt

    def _parts(self, xBC: Tensor) -> tuple[Tensor, list[Tensor]]:
        """x `(…, nheads, headdim)`; and B and C of each direction, `(…, ngroups, d_state)`."""
        x, *BC = xBC.split([self.d_inner, *2 * self.directions * [self.ngroups * self.d_state]], -1)
        by_groups = [part.unflatten(-1, (self.ngroups, self.d_state)) for part in BC]
        return x.unflatten(-1, (self.nheads, self.headdim)), by_groups

    def _rates(self, dt: Tensor) -> tuple[Tensor, Tensor]:
        """Δ and Δ · A, each `(…, directions · nheads)` as dt is, in float32 at least."""
        return discretize(dt, self.A_log, self.dt_bias, log=True, limit=self.dt_limit)
