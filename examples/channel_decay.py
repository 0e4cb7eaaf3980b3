"""GLA, RWKV-6 and Mamba-1: three models whose state decays per channel, each as one `ssd` call."""

import torch
from torch import Tensor

from ssdops import masks, ssd


def gla(q: Tensor, k: Tensor, v: Tensor, log_a: Tensor) -> Tensor:
    """Gated linear attention (Yang et al. 2024): S_t = S_{t−1} Diag(a_t) + v_t k_tᵀ, y_t = S_t q_t."""
    return ssd(q, k, v, masks.channel_decay(log_a))


def rwkv6(r: Tensor, k: Tensor, v: Tensor, log_w: Tensor, u: Tensor) -> Tensor:
    """RWKV-6 (Peng et al. 2024): y_t = (S_{t−1} + v_t (u ∘ k_t)ᵀ) r_t, then S_t = S_{t−1} Diag(w_t) + v_t k_tᵀ.

    A token reads the state before its own decay and before itself, which is `shift(1)`: `strict()` would decay it first.
    The bonus u `(nheads, dstate)` weighs a token's own score per channel. A diagonal mask weighs it per token and head, so
    u goes into r, and the mask of that second contraction is the identity.
    """
    own = masks.diagonal(torch.ones((), dtype=r.dtype, device=r.device))
    return ssd(r, k, v, masks.channel_decay(log_w).shift(1)) + ssd(r * u, k, v, own)


def mamba1(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor) -> Tensor:
    """Mamba's selective scan (Gu & Dao 2023): h_t = exp(dt_t A) h_{t−1} + dt_t x_t B_tᵀ, y_t = h_t C_t + D x_t.

    Every channel of x `(batch, seqlen, channels)` has its own dt and its own row of A `(channels, dstate)`: channels are
    heads of headdim 1, which share B and C `(batch, seqlen, dstate)`. dt · A is never held for more than a few chunks.
    """
    y = ssd(C[:, :, None], B[:, :, None], (x * dt)[..., None], masks.channel_decay(dt=dt, A=A))
    return y[..., 0] + D * x


if __name__ == "__main__":
    torch.manual_seed(0)
    batch, seqlen, nheads, headdim, dstate = 2, 300, 4, 16, 8
    r, k = torch.randn(2, batch, seqlen, nheads, dstate)
    v, log_w = torch.randn(batch, seqlen, nheads, headdim), -torch.rand(batch, seqlen, nheads, dstate)
    u = torch.randn(nheads, dstate)
    state, by_token = torch.zeros(batch, nheads, headdim, dstate), []
    for t in range(seqlen):
        now = v[:, t, :, :, None] * k[:, t, :, None]
        by_token.append(torch.einsum("bhpn,bhn->bhp", state + u[:, None] * now, r[:, t]))
        state = state * log_w[:, t, :, None].exp() + now
    error = (torch.stack(by_token, 1) - rwkv6(r, k, v, log_w, u)).abs().max().item()
    print(f"RWKV-6 in chunks and token by token differ by at most {error:.1e}")
    assert error < 1e-3
