"""The gated RMSNorm between the scan and the output projection: a Triton kernel on GPUs, plain torch elsewhere."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..backends.base import Support
from ..errors import ShapeError
from . import norm_ops
from .launching import on_triton
from .norm_torch import norm

WIDEST = 8192
"""The most channels of a group that the kernel has registers for."""


def gated_rms_norm(
    y: Tensor,
    z: Tensor,
    weight: Tensor,
    *,
    eps: float = 1e-5,
    groups: int = 1,
    norm_before_gate: bool = False,
    skip: tuple[Tensor, Tensor] | None = None,
    backend: str = "auto",
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
        skip: (D, x), a skip connection: D · x is added to y first, unrounded. x is of the shape of y; D is `(heads,)`, one
            number for all channels of a head, which are neighbours.
        backend: "triton", a kernel for GPUs (in Triton's interpreter also on CPUs) that takes groups of up to 8192 channels;
            "torch", which takes everything; or "auto", the former wherever it can be.

    Returns:
        out like y, reckoned in float32 (float64 if an input is).

    Raises:
        ShapeError: z, weight or skip does not fit y, or groups does not divide its channels.
        UnsupportedError: a backend that does not take it.

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
    D, x = (None, None) if skip is None else skip
    if D is not None and x is not None:
        if x.shape != y.shape:
            raise ShapeError(f"x of skip=(D, x) must have the shape of y, {tuple(y.shape)}, got {tuple(x.shape)}")
        if D.ndim != 1 or not len(D) or channels % len(D):
            raise ShapeError(f"D of skip=(D, x) must be (heads,) that divide channels={channels}, got {tuple(D.shape)}")
    size = channels // groups
    limits = Support.yes() if size <= WIDEST else Support.no(f"a group has {size} channels, more than {WIDEST}")
    if on_triton(y, backend, limits):
        return norm_ops.gated_norm(y, z, weight, x, D, eps, groups, norm_before_gate)
    return norm(y, z, weight, x, D, eps, groups, norm_before_gate)


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

    def forward(self, y: Tensor, z: Tensor, skip: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """y and z `(…, channels)` → the same shape, in the dtype of y; skip is (D, x), as `gated_rms_norm` takes it."""
        before = self.norm_before_gate
        return gated_rms_norm(y, z, self.weight, eps=self.eps, groups=self.groups, norm_before_gate=before, skip=skip)

    def extra_repr(self) -> str:
        """What `print` shows."""
        return f"{len(self.weight)}, eps={self.eps}, groups={self.groups}, norm_before_gate={self.norm_before_gate}"


def _check_groups(channels: int, groups: int) -> None:
    if groups < 1 or channels % groups:
        raise ShapeError(f"groups must divide channels={channels}, got {groups}")
