"""The middle of mamba_ssm's Mamba-2 block in one function: convolution, scan, norm, output projection."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ...errors import ShapeError, UnsupportedError
from ...nn import gated_rms_norm
from ..shapes import sizes_of
from .around import short_convolution
from .scan import mamba_chunk_scan_combined


def mamba_split_conv1d_scan_combined(
    zxbcdt: Tensor,
    conv1d_weight: Tensor,
    conv1d_bias: Tensor | None,
    dt_bias: Tensor,
    A: Tensor,
    D: Tensor,
    chunk_size: int,
    initial_states: Tensor | None = None,
    seq_idx: Tensor | None = None,
    dt_limit: tuple[float, float] = (0.0, float("inf")),
    return_final_states: bool = False,
    activation: str | None = "silu",
    rmsnorm_weight: Tensor | None = None,
    rmsnorm_eps: float = 1e-6,
    outproj_weight: Tensor | None = None,
    outproj_bias: Tensor | None = None,
    headdim: int | None = None,
    ngroups: int = 1,
    norm_before_gate: bool = True,
) -> Tensor | tuple[Tensor, Tensor]:
    """Mamba-2's block after its input projection.

        [mlp₁, mlp₂, z, xBC, dt] = zxbcdt,  [x, B, C] = silu(conv(xBC)),  y = scan(x, dt, B, C)
        out = [silu(mlp₁) · mlp₂, norm(y, z)] Wᵀ + b

    norm is RMSNorm(y) · silu(z), or RMSNorm(y · silu(z)) without norm_before_gate, over each of ngroups groups of channels;
    without rmsnorm_weight, y · silu(z). mlp is what zxbcdt has more of than the others take, if anything.

    Args:
        zxbcdt: `(batch, seqlen, 2·d_mlp + 2·dim + 2·ngroups·dstate + nheads)` with dim = nheads · headdim.
        conv1d_weight, conv1d_bias: `(dim + 2·ngroups·dstate, width)` and its bias: causal, per channel, from the left end or,
            with seq_idx, from where the id changes.
        dt_bias, A: `(nheads,)`; softplus is always taken.
        D: `(nheads, headdim)`, or `(nheads,)` with headdim given.
        chunk_size: accepted, and changes nothing.
        initial_states, seq_idx, dt_limit, return_final_states: as in `mamba_chunk_scan_combined`.
        activation: after the convolution: "silu", "swish", which is the same, or None.
        rmsnorm_weight, rmsnorm_eps: `(dim,)`, and what is added to the mean square.
        outproj_weight, outproj_bias: `(out_dim, d_mlp + dim)` and its bias; without a weight nothing is projected.
        ngroups: of B and C, and of the norm.

    Returns:
        out `(batch, seqlen, out_dim or d_mlp + dim)`; with return_final_states, then the states
        `(batch, nheads, headdim, dstate)`.

    Raises:
        ShapeError, DtypeError: an argument that does not fit; the message names it.
        UnsupportedError: another activation.

    Source: state-spaces/mamba, `mamba_ssm/ops/triton/ssd_combined.py`; Dao & Gu 2024, "Transformers are SSMs", section 7.1.

    >>> import torch
    >>> from ssdops.compat.mamba_ssm import mamba_split_conv1d_scan_combined
    >>> nheads, headdim, dstate = 4, 8, 16
    >>> channels = nheads * headdim + 2 * dstate
    >>> zxbcdt, weight = torch.randn(2, 10, nheads * headdim + channels + nheads), torch.randn(channels, 4)
    >>> per_head = torch.ones(nheads)
    >>> mamba_split_conv1d_scan_combined(zxbcdt, weight, None, per_head, -per_head, per_head, 256, headdim=headdim).shape
    torch.Size([2, 10, 32])
    """
    if activation not in (None, "silu", "swish"):
        raise UnsupportedError(f"activation={activation!r}: 'silu', 'swish' or None is applied after the convolution, as there")
    if outproj_weight is None and outproj_bias is not None:
        raise ShapeError("outproj_bias is given without outproj_weight; give both, or neither")
    sizes = sizes_of(
        zxbcdt=(zxbcdt, "batch seqlen columns"), conv1d_weight=(conv1d_weight, "channels width"),
        conv1d_bias=(conv1d_bias, "channels"), A=(A, "nheads"), dt_bias=(dt_bias, "nheads"),
        D=(D, "nheads headdim" if isinstance(D, Tensor) and D.ndim == 2 else "nheads"), seq_idx=(seq_idx, "batch seqlen"),
    )  # fmt: skip
    nheads, channels, headdim = sizes["nheads"], sizes["channels"], sizes.get("headdim", headdim)
    if headdim is None:
        raise ShapeError("headdim is None, and D is (nheads,), so that nothing says how wide a head is; give headdim")
    dim = nheads * headdim
    dstate, odd = divmod(channels - dim, 2 * ngroups)
    mlp = sizes["columns"] - dim - channels - nheads
    if odd or dstate < 1 or mlp < 0 or mlp % 2:
        raise ShapeError(
            f"zxbcdt has {sizes['columns']} columns and conv1d_weight {channels} channels; for {nheads} heads of {headdim} and "
            f"ngroups={ngroups}, expected 2·d_mlp + {2 * dim + nheads} + {2 * ngroups}·dstate and {dim} + {2 * ngroups}·dstate"
        )
    sizes_of(rmsnorm_weight=(rmsnorm_weight, f"{dim}"), outproj_weight=(outproj_weight, f"out_dim {mlp // 2 + dim}"))
    extra, z, mixed, dt = zxbcdt.split([mlp, dim, channels, nheads], -1)
    mixed = short_convolution(mixed, conv1d_weight, conv1d_bias, seq_idx, activation)
    x, B, C = mixed.split([dim, ngroups * dstate, ngroups * dstate], -1)
    x, B, C = x.unflatten(-1, (nheads, headdim)), B.unflatten(-1, (ngroups, dstate)), C.unflatten(-1, (ngroups, dstate))
    y = mamba_chunk_scan_combined(
        x, dt, A, B, C, chunk_size, D=D, z=z.unflatten(-1, (nheads, headdim)) if rmsnorm_weight is None else None,
        dt_bias=dt_bias, initial_states=initial_states, seq_idx=seq_idx, dt_softplus=True, dt_limit=dt_limit,
        return_final_states=return_final_states,
    )  # fmt: skip
    y, *states = y if isinstance(y, tuple) else (y,)
    out = y.flatten(2)
    if rmsnorm_weight is not None:
        out = gated_rms_norm(
            out, z, rmsnorm_weight, eps=rmsnorm_eps, groups=ngroups, norm_before_gate=norm_before_gate
        )  # fmt: skip
    if mlp:
        left, right = extra.chunk(2, -1)
        out = torch.cat([F.silu(left) * right, out], -1)
    if outproj_weight is not None:
        out = F.linear(out, outproj_weight, outproj_bias)
    return (out, states[0]) if states else out
