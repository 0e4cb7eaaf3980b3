"""What Mamba does before and after its scan: step sizes, the skip connection, the gate."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ...errors import UnsupportedError


def step_sizes(dt: Tensor, bias: Tensor | None, softplus: bool, dtype: torch.dtype) -> Tensor:
    """dt + bias, or its softplus."""
    dt = dt.to(dtype) if bias is None else dt.to(dtype) + bias.to(dtype)
    return F.softplus(dt) if softplus else dt


def finish(y: Tensor, x: Tensor, D: Tensor | None, z: Tensor | None, dtype: torch.dtype) -> Tensor:
    """(y + D x) · silu(z) in x's dtype, reckoned in `dtype`."""
    if D is not None:
        y = torch.addcmul(y.to(dtype), x, (D if D.ndim == 2 else D[:, None]).to(dtype))
    return (y if z is None else y.to(dtype) * F.silu(z.to(dtype))).to(x.dtype)


def channels(state: Tensor) -> Tensor:
    """The same memory with every channel a head of headdim 1."""
    slots, nheads, dim, dstate = state.shape
    try:
        return state.view(slots, nheads * dim, 1, dstate)
    except RuntimeError:
        raise UnsupportedError(
            f"state has strides {state.stride()}, under which {nheads} heads and {dim} channels are not one axis, and it is "
            "updated in place; keep it contiguous, or expand A and dt over headdim where they are one number per head"
        ) from None


def short_convolution(x: Tensor, weight: Tensor, bias: Tensor | None, ids: Tensor | None) -> Tensor:
    """`y_t = bias + Σ_s weight[:, width − 1 − s] · x_{t−s}` per channel, over earlier tokens of the same id.

    Args:
        x: `(batch, seqlen, channels)`.
        weight, bias: `(channels, width)`, and `(channels,)` or None.
        ids: `(batch, seqlen)` or None.
    """
    channels, width = weight.shape
    if ids is None:
        padded = F.pad(x.mT, (width - 1, 0))
        return F.conv1d(padded, weight[:, None].to(x.dtype), None if bias is None else bias.to(x.dtype), groups=channels).mT
    changes = F.pad(ids[:, 1:] != ids[:, :-1], (1, 0)).cumsum(1)
    wide = torch.promote_types(x.dtype, torch.float32)
    y = x.to(wide) * weight[:, -1].to(wide)
    for s in range(1, min(width, x.shape[1])):
        same = (changes[:, s:] == changes[:, :-s])[..., None]
        tap = torch.where(same, x[:, :-s].to(wide), 0.0) * weight[:, -1 - s].to(wide)
        y = y + F.pad(tap, (0, 0, s, 0))
    return (y if bias is None else y + bias.to(wide)).to(x.dtype)


def gated_rms_norm(y: Tensor, z: Tensor, weight: Tensor, eps: float, ngroups: int, before_gate: bool) -> Tensor:
    """`y / √(mean(y²) + eps) · weight · silu(z)`, the mean over each group of channels; or with y · silu(z) for y."""
    wide = torch.promote_types(torch.float32, y.dtype)
    gate = F.silu(z.to(wide))
    x = y.to(wide) if before_gate else y.to(wide) * gate
    groups = x.unflatten(-1, (ngroups, -1))
    x = (groups * (groups.square().mean(-1, keepdim=True) + eps).rsqrt()).flatten(-2) * weight.to(wide)
    return (x * gate if before_gate else x).to(y.dtype)
