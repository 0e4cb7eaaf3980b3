"""What the tests of `ssdops.compat.mamba_ssm` share: inputs, and the scan as loops over tokens in float64."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

BATCH, T, H, P, G, N = 2, 37, 4, 3, 2, 5


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def inputs(batch: int = BATCH, seqlen: int = T) -> dict[str, Tensor]:
    """Everything that the scan takes as a float tensor, in float64."""
    return {
        "x": draw(batch, seqlen, H, P, seed=1), "dt": draw(batch, seqlen, H, seed=2), "A": -draw(H, seed=3).exp(),
        "B": draw(batch, seqlen, G, N, seed=4), "C": draw(batch, seqlen, G, N, seed=5), "D": draw(H, seed=6),
        "z": draw(batch, seqlen, H, P, seed=7), "dt_bias": draw(H, seed=8), "initial_states": draw(batch, H, P, N, seed=9),
    }  # fmt: skip


REQUIRED = ("x", "dt", "A", "B", "C")
IDS = torch.tensor([[0] * 5 + [1] * 20 + [4] * 12, [0] * 36 + [1]])


def loops(
    x, dt, A, B, C, D=None, z=None, dt_bias=None, initial_states=None, seq_idx=None, dt_softplus=False, dt_limit=(0.0, 1e300)
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """y, and the state after every token [batch, T, H, P, N], by the recurrence."""
    dt = dt if dt_bias is None else dt + dt_bias
    dt = (F.softplus(dt) if dt_softplus else dt).clamp(*dt_limit)
    B, C = (t.repeat_interleave(H // G, 2) for t in (B, C))
    state = torch.zeros(len(x), H, P, N, dtype=x.dtype) if initial_states is None else initial_states
    ys, states = [], []
    for t in range(x.shape[1]):
        if seq_idx is not None:
            begins = seq_idx[:, t] != (0 if t == 0 else seq_idx[:, t - 1])
            state = torch.where(begins[:, None, None, None], 0.0, state)
        state = (dt[:, t] * A).exp()[..., None, None] * state
        state = state + (dt[:, t, :, None] * x[:, t])[..., None] * B[:, t, :, None, :]
        y = (state * C[:, t, :, None, :]).sum(-1)
        if D is not None:
            y = y + x[:, t] * (D if D.ndim == 2 else D[:, None])
        ys.append(y if z is None else y * z[:, t] * z[:, t].sigmoid())
        states.append(state)
    return torch.stack(ys, 1), torch.stack(states, 1)


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
