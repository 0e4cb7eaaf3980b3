"""The gated RMSNorm between the scan and the output projection."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import ShapeError


def gated_rms_norm(
    y: Tensor, z: Tensor, weight: Tensor, *, eps: float = 1e-5, groups: int = 1, norm_before_gate: bool = False
) -> Tensor:
    """Root mean square normalisation, in groups of channels, with a gate.

        g = y · silu(z),   out = weight · g / √(mean(g²) + eps)             (mean over the channels of a group)
        out = weight · y / √(mean(y²) + eps) · silu(z)                      with norm_before_gate

    Args:
        y: `(…, channels)`, any floating dtype.
        z: the gate, of the same shape.
        weight: `(channels,)`.
        eps: added to the mean of squares.
        groups: how many groups of neighbouring channels are normalised apart; it divides channels.
        norm_before_gate: gate what is normalised, rather than normalise what is gated.

    Returns:
        out like y, reckoned in float32 (float64 if an input is).

    Raises:
        ShapeError: z or weight does not fit y, or groups does not divide its channels.

    Source: Dao & Gu 2024, "Transformers are SSMs", section 7.1 (the extra normalisation) and 8.1 (groups).

    >>> import torch
    >>> from ssdops.nn import gated_rms_norm
    >>> y = torch.tensor([3.0, 4.0, 0.0, 2.0])
    >>> gated_rms_norm(y, torch.full((4,), 1.0), torch.ones(4), groups=2, norm_before_gate=True)
    tensor([0.6203, 0.8271, 0.0000, 1.0339])
    """
    channels = y.shape[-1]
    if z.shape != y.shape:
        raise ShapeError(f"z must have the shape of y, {tuple(y.shape)}, got {tuple(z.shape)}")
    if tuple(weight.shape) != (channels,):
        raise ShapeError(f"weight must be (channels,) = ({channels},), got {tuple(weight.shape)}")
    _check_groups(channels, groups)
    dtype = torch.promote_types(torch.promote_types(y.dtype, z.dtype), torch.promote_types(weight.dtype, torch.float32))
    gate = F.silu(z.to(dtype))
    normed = y.to(dtype) if norm_before_gate else y.to(dtype) * gate
    grouped = normed.unflatten(-1, (groups, channels // groups))
    grouped = grouped * torch.rsqrt(grouped.square().mean(-1, keepdim=True) + eps)
    out = grouped.flatten(-2) * weight.to(dtype)
    return (out * gate if norm_before_gate else out).to(y.dtype)


class GatedRMSNorm(nn.Module):
    """`gated_rms_norm` with a learnt weight, ones at first.

    Args:
        channels: the size of the last axis.
        eps, groups, norm_before_gate: of `gated_rms_norm`.
        device, dtype: of the weight.

    Raises:
        ShapeError: groups does not divide channels.

    >>> import torch
    >>> from ssdops.nn import GatedRMSNorm
    >>> GatedRMSNorm(8, groups=2)(torch.randn(2, 5, 8), torch.randn(2, 5, 8)).shape
    torch.Size([2, 5, 8])
    """

    def __init__(
        self,
        channels: int,
        eps: float = 1e-5,
        *,
        groups: int = 1,
        norm_before_gate: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        _check_groups(channels, groups)
        self.eps, self.groups, self.norm_before_gate = eps, groups, norm_before_gate
        self.weight = nn.Parameter(torch.ones(channels, device=device, dtype=dtype))

    def reset_parameters(self) -> None:
        """Set the weight to ones."""
        nn.init.ones_(self.weight)

    def forward(self, y: Tensor, z: Tensor) -> Tensor:
        """y and z `(…, channels)` → the same shape, in the dtype of y."""
        before = self.norm_before_gate
        return gated_rms_norm(y, z, self.weight, eps=self.eps, groups=self.groups, norm_before_gate=before)

    def extra_repr(self) -> str:
        """What `print` shows."""
        return f"{len(self.weight)}, eps={self.eps}, groups={self.groups}, norm_before_gate={self.norm_before_gate}"


def _check_groups(channels: int, groups: int) -> None:
    if groups < 1 or channels % groups:
        raise ShapeError(f"groups must divide channels={channels}, got {groups}")
