"""The gated RMSNorm in plain torch: the path of CPUs, and right on any device."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def norm(
    y: Tensor, z: Tensor, weight: Tensor, x: Tensor | None, D: Tensor | None, eps: float, groups: int, before: bool
) -> Tensor:
    """out of `gated_rms_norm`, of arguments that fit; D is `(heads,)` of neighbouring channels, or None as x is."""
    dtype = torch.float32
    for tensor in (y, z, weight, x, D):
        dtype = dtype if tensor is None else torch.promote_types(dtype, tensor.dtype)
    wide = y.to(dtype)
    if x is not None and D is not None:
        by_heads = (len(D), x.shape[-1] // len(D))
        wide = (wide.unflatten(-1, by_heads) + D.to(dtype)[:, None] * x.to(dtype).unflatten(-1, by_heads)).flatten(-2)
    gate = F.silu(z.to(dtype))
    normed = wide if before else wide * gate
    grouped = normed.unflatten(-1, (groups, y.shape[-1] // groups))
    grouped = grouped * torch.rsqrt(grouped.square().mean(-1, keepdim=True) + eps)
    out = grouped.flatten(-2) * weight.to(dtype)
    return (out * gate if before else out).to(y.dtype)
