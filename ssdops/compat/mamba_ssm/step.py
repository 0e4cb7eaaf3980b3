"""mamba_ssm's decoding step, for Mamba-2 and for Mamba-1."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ... import masks
from ...api import ssd_step
from ...errors import ShapeError
from ...nn import discretize
from ...nn.skip import gated_skip
from ..shapes import check_shared, sizes_of
from .around import channels, step_sizes


def selective_state_update(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    state_batch_indices: Tensor | None = None,
) -> Tensor:
    """One token of Mamba's scan, with the state updated in place: `S ← exp(Δ A) S + Δ x Bᵀ`, `y = (S C + D x) · silu(z)`.

    Mamba-2 has one Δ and one A for a head; passed as mamba_ssm's layer passes them, expanded over headdim and dstate (strides
    of 0), they run as a decay per head. Else each channel has its own, as in Mamba-1. Every argument may lack its axis of
    heads, which is then of size 1. No gradient flows.

    Args:
        state: `(batch, nheads, dim, dstate)` or `(batch, dim, dstate)`, written to; a pool with state_batch_indices.
        x, dt: `(batch, nheads, dim)` or `(batch, dim)`.
        A: `(nheads, dim, dstate)` or `(dim, dstate)`.
        B, C: `(batch, ngroups, dstate)` or `(batch, dstate)`.
        D, dt_bias: `(nheads, dim)` or `(dim,)`.
        z: a gate, like x.
        dt_softplus: whether Δ = softplus(dt + dt_bias), or dt + dt_bias.
        state_batch_indices: the slot of each row `(batch,)`, int32 or int64, each at most once; a row of slot −1 gives zero.

    Returns:
        y, like x in shape and dtype.

    Raises:
        ShapeError, DtypeError, ValueRangeError: an argument that does not fit; the message names it.
        UnsupportedError: a state of channels with their own decays whose strides do not let heads and channels be one axis.

    Source: state-spaces/mamba, `mamba_ssm/ops/triton/selective_state_update.py`; Gu & Dao 2023, "Mamba", section 3.

    >>> import torch
    >>> from ssdops.compat.mamba_ssm import selective_state_update
    >>> state, one = torch.ones(1, 1, 1), torch.ones(1, 1)
    >>> selective_state_update(state, one, one, torch.tensor([[0.5]]).log(), one, one, D=torch.ones(1)).item(), state.item()
    (2.5, 1.5)
    """
    given = x
    state = _lifted(state, 3, 1)
    x, dt, B, C, z = (_lifted(t, 2, 1) for t in (x, dt, B, C, z))
    A, D, dt_bias = _lifted(A, 2, 0), _lifted(D, 1, 0), _lifted(dt_bias, 1, 0)
    sizes = sizes_of(
        x=(x, "batch nheads dim"), state=(state, "slots nheads dim dstate"), dt=(dt, "batch nheads dim"),
        A=(A, "nheads dim dstate"), B=(B, "batch ngroups dstate"), C=(C, "batch ngroups dstate"), D=(D, "nheads dim"),
        z=(z, "batch nheads dim"), dt_bias=(dt_bias, "nheads dim"),
    )  # fmt: skip
    check_shared(sizes["ngroups"], sizes["nheads"], "ngroups", "nheads")
    slots = state_batch_indices
    if slots is None:
        if sizes["slots"] != sizes["batch"]:
            raise ShapeError(
                f"state has {sizes['slots']} rows and x {sizes['batch']}; say which are meant by state_batch_indices"
            )
        slots = torch.arange(sizes["batch"], dtype=torch.int32, device=x.device)
    wide = torch.promote_types(torch.float32, torch.promote_types(x.dtype, dt.dtype))
    tied = not any((A.stride(-1), A.stride(-2), dt.stride(-1), 0 if dt_bias is None else dt_bias.stride(-1)))
    with torch.no_grad():
        if tied:
            bias = None if dt_bias is None else dt_bias[..., 0]
            free = (-math.inf, math.inf)
            steps, logs = discretize(dt[..., 0], A[..., 0, 0], bias, softplus=dt_softplus, limit=free, dtype=wide)
            mask, pool, v = masks.decay(logs), state, x
        else:
            steps = step_sizes(dt, dt_bias, dt_softplus, wide).flatten(1)
            mask, pool, v = masks.channel_decay(dt=steps, A=A.flatten(0, 1).to(wide)), channels(state), x.flatten(1)[..., None]
        y, _ = ssd_step(C, B, v, mask.scale(cols=steps), pool, state_indices=slots)
        out = gated_skip(y.reshape(x.shape), x, D, z)
        if state_batch_indices is not None:
            out = torch.where((slots >= 0)[:, None, None], out, 0.0)
    return out.reshape(given.shape)


def _lifted(x: Any, rank: int, axis: int) -> Any:
    """With an axis of one head, if it is a tensor that lacks that."""
    return x.unsqueeze(axis) if isinstance(x, Tensor) and x.ndim == rank else x
