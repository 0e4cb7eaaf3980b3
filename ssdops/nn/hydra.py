"""The Hydra block: bidirectional, its scans in both directions around a token's own weight."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .. import masks
from ..api import ssd
from ..errors import ShapeError
from .checks import check_input, check_ranges, check_sizes
from .norm import GatedRMSNorm
from .projections import Projections


class Hydra(Projections):
    """The Hydra block, `(batch, seqlen, d_model)` → the same shape; every token sees all others.

        z, xBC, dt = split(W_in u)                         x, B, C, B', C' = split(silu(conv(xBC)))
        y_i = Σ_{j<i} ⟨C_{i−1}, B_j⟩ a_{i−1:j} dt_j x_j  +  δ_i x_i  +  Σ_{j>i} ⟨C'_{i+1}, B'_j⟩ a'_{j:i+1} dt'_j x_j
        δ = W_D x + D                                      out = W_out (norm(y) · silu(z))

    with `a_{i:j} = exp(A Σ_{j<s≤i} dt_s)`, `a'_{j:i} = exp(A Σ_{i≤s<j} dt'_s)`, dt and dt' softplus(· + dt_bias), and
    A = −exp(A_log): y is a quasiseparable matrix times x, the sum of a shifted scan from the left, one from the right and a
    diagonal. Its convolution looks both ways.

    Parameters are named and shaped as those of the authors' `Hydra`: `in_proj.weight`, `conv1d.weight` (channels, 1, d_conv),
    `conv1d.bias`, `dt_bias`, `A_log`, `D`, `fc_D.weight`, `norm.weight`, `out_proj.weight`; channels = d_inner + 4 · ngroups ·
    d_state, in the order x, B, C, B', C'.

    Args:
        d_model: the size of a token.
        d_state: the state's size per channel of x.
        d_conv: the width of the convolution, odd.
        expand: d_inner = expand · d_model channels in x and z.
        headdim: channels per head; nheads = d_inner / headdim.
        ngroups: groups of heads that share B and C.
        dt_min, dt_max, dt_init_floor: softplus(dt_bias) is log-uniform in [dt_min, dt_max], and at least the floor.
        dt_limit: dt is clamped to it.
        bias: have biases in the projections.
        conv_bias: have one in the convolution.
        backend: of `ssdops.ssd`.
        device, dtype: of the parameters.

    Raises:
        ShapeError: sizes that do not divide, or an even d_conv.
        ValueRangeError: ranges that are none.

    Source: Hwang et al. 2024, "Hydra: Bidirectional State Space Models Through Generalized Matrix Mixers", section 4.

    >>> import torch
    >>> from ssdops.nn import Hydra
    >>> Hydra(32, d_state=16, headdim=8)(torch.randn(2, 20, 32)).shape
    torch.Size([2, 20, 32])
    """

    directions = 2

    def __init__(
        self,
        d_model: int,
        d_state: int = 64,
        d_conv: int = 7,
        expand: int = 2,
        headdim: int = 64,
        ngroups: int = 1,
        *,
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        dt_init_floor: float = 1e-4,
        dt_limit: tuple[float, float] = (0.0, math.inf),
        bias: bool = False,
        conv_bias: bool = True,
        backend: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.d_model, self.d_state, self.d_conv, self.d_inner = d_model, d_state, d_conv, int(expand * d_model)
        self.headdim, self.ngroups, self.nheads = headdim, ngroups, self.d_inner // max(headdim, 1)
        self.dt_init, self.dt_limit, self.backend = (dt_min, dt_max, dt_init_floor), dt_limit, backend
        check_sizes(self)
        check_ranges((1.0, 1.0), (dt_min, dt_max), dt_limit)
        if d_conv % 2 == 0:
            raise ShapeError(f"d_conv must be odd, for a convolution that looks as far to either side, got {d_conv}")
        self._make_projections(d_conv // 2, bias, conv_bias, {"device": device, "dtype": dtype})
        self.D = nn.Parameter(torch.empty(self.nheads, device=device, dtype=dtype))
        self.fc_D = nn.Linear(self.d_inner, self.nheads, bias=False, device=device, dtype=dtype)
        self.norm = GatedRMSNorm(self.d_inner, 1e-5, norm_before_gate=True, device=device, dtype=dtype)
        self.out_proj = nn.Linear(self.d_inner, d_model, bias, device, dtype)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw dt_bias anew, and set A to −1 and D to ones: the parameters that stand in no module inside."""
        self._draw_dt_bias()
        self.A_log.zero_()
        self.D.fill_(1.0)

    def forward(self, u: Tensor) -> Tensor:
        """The block over whole sequences.

        Args:
            u: `(batch, seqlen, d_model)`.

        Returns:
            `(batch, seqlen, d_model)` in the dtype of u, or autocast's.

        Raises:
            ShapeError, DtypeError, DeviceError: u does not fit the block.
        """
        check_input(u, ("batch", "seqlen", self.d_model), self.in_proj.weight)
        z, xBC, dt = self._project(u)
        v, (B, C, B_right, C_right) = self._parts(F.silu(self.conv1d(xBC.mT).mT))
        (steps, steps_right), (logs, logs_right) = (x.chunk(2, -1) for x in self._rates(dt))
        from_left = masks.decay(logs).scale(cols=steps)
        # The decay of a reversed sequence, whose operand is the reversed one: a token's own decay takes it further to the left.
        from_right = masks.decay(logs_right.flip(1)).reverse().scale(cols=steps_right)
        before = ssd(C, B, v, from_left, backend=self.backend)
        after = ssd(C_right, B_right, v, from_right, backend=self.backend)
        # Each is shifted by a token away from its side, so that neither has the token itself.
        y = F.pad(before, (0, 0, 0, 0, 1, 0))[:, :-1] + F.pad(after, (0, 0, 0, 0, 0, 1))[:, 1:]
        own = F.linear(v.flatten(-2), self.fc_D.weight, self.D.to(self.fc_D.weight.dtype))
        y = (y.to(logs.dtype) + own[..., None] * v).flatten(-2)
        return self.out_proj(self.norm(y, z).to(z.dtype))
