"""Mamba-3: complex states by turning q and k, and the trapezoidal rule, as one call of `ssd` with real states.

The state is complex, one number per pair of channels of q and k, which are read as complex too. With α_t = exp(Δ_t (A + iθ_t)),

    h_t = α_t h_{t−1} + (1 − λ_t) Δ_t α_t k_{t−1} v_{t−1} + λ_t Δ_t k_t v_t,        y_t = Re Σ_n conj(q_t) h_t.

What the state holds and the token before both pass through α_t, its turn by Δ_t θ_t included. So with Φ_t = Σ_{s≤t} Δ_s θ_s and
h_t = exp(iΦ_t) S_t no turn is left but those of k and q, each by the Φ of its own token: for k'_t = exp(−iΦ_t) k_t and q' alike

    S_t = a_t S_{t−1} + β_t k'_{t−1} v_{t−1} + γ_t k'_t v_t,        y_t = Re Σ_n conj(q'_t) S_t,

with a_t = exp(Δ_t A), β_t = (1 − λ_t) Δ_t a_t and γ_t = λ_t Δ_t. That is `masks.trapezoidal`, as Re Σ conj(q) k is the dot
product of real channels. In the paper's Re((C + iĈ)ᵀ h), a pair of q is (C, −Ĉ), and a pair of k is (B, B̂).

Source: Lahoti et al. 2026, "Mamba-3: Improved Sequence Modeling using State Space Principles": the complex system, α, β and γ,
and rotary embeddings in its place. The substitution is worked out here, and checked against the first recurrence token by
token. The released code turns by +Φ, which is this with −θ; how θ, λ, q and k come of projections is the block's.
"""

import torch
from torch import Tensor

from ssdops import masks, ssd


def rotated(x: Tensor, angles: Tensor) -> Tensor:
    """Pairs of channels of x turned back by the angles of all tokens up to their own: x_t · exp(−i Σ_{s≤t} angles_s).

    Args:
        x: q or k `(batch, seqlen, nheads, dstate)`, its heads 1 if all share it; channels 2n and 2n + 1 are a pair.
        angles: radians that token t's transition turns by, `(batch, seqlen, nheads, dstate // 2)`.
    """
    total = angles.cumsum(1)
    (real, imaginary), cos, sin = x.unflatten(-1, (-1, 2)).unbind(-1), total.cos(), total.sin()
    return torch.stack([real * cos + imaginary * sin, imaginary * cos - real * sin], -1).flatten(-2)


def mamba3(q: Tensor, k: Tensor, v: Tensor, dt: Tensor, A: Tensor, theta: Tensor, lam: Tensor) -> Tensor:
    """Mamba-3's scan, its form with one input and one output per state (SISO).

    Args:
        q, k: `(batch, seqlen, ngroups, dstate)`, with as many groups as heads, or one.
        v: `(batch, seqlen, nheads, headdim)`.
        dt, lam: Δ > 0 and λ in [0, 1] `(batch, seqlen, nheads)`; λ = 1 is Mamba-2's rule.
        A: negative `(nheads,)`.
        theta: `(batch, seqlen, nheads or 1, dstate // 2)`, radians per unit of time.
    """
    angles = dt[..., None] * theta
    # with β/a given, nothing is divided: the mask is one scan and a diagonal
    mask = masks.trapezoidal(dt * A, gamma=lam * dt, beta_over_a=(1 - lam) * dt)
    return ssd(rotated(q, angles), rotated(k, angles), v, mask)


def by_token(q: Tensor, k: Tensor, v: Tensor, dt: Tensor, A: Tensor, theta: Tensor, lam: Tensor) -> Tensor:
    """The same by the complex recurrence; nothing is turned but the state."""
    q, k = (torch.view_as_complex(x.unflatten(-1, (-1, 2))) for x in (q, k))
    a = torch.exp(dt[..., None] * (A[:, None] + 1j * theta))
    h, before, out = 0, 0, []
    for t in range(v.shape[1]):
        now = v[:, t, :, :, None] * k[:, t, :, None]  # [batch, nheads, headdim, dstate // 2]
        alpha, step, new = a[:, t, :, None], dt[:, t, :, None, None], lam[:, t, :, None, None]
        h = alpha * h + (1 - new) * step * alpha * before + new * step * now
        before = now
        out.append((q[:, t, :, None].conj() * h).sum(-1).real)
    return torch.stack(out, 1)


def main() -> None:
    """The scan is the complex recurrence, values and gradients."""
    torch.manual_seed(0)
    batch, seqlen, nheads, headdim, dstate = 2, 70, 3, 4, 6
    like = {"dtype": torch.float64}
    q, k = torch.randn(2, batch, seqlen, 1, dstate, **like)
    v, theta = torch.randn(batch, seqlen, nheads, headdim, **like), 3 * torch.randn(batch, seqlen, 1, dstate // 2, **like)
    dt, lam = torch.rand(2, batch, seqlen, nheads, **like)
    inputs = [x.detach().requires_grad_() for x in (q, k, v, dt, -torch.rand(nheads, **like), theta, lam)]
    found, expected = mamba3(*inputs), by_token(*inputs)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    dy = torch.randn_like(found)
    for ours, theirs in zip(*(torch.autograd.grad(y, inputs, dy) for y in (found, expected)), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)
    print(f"Mamba-3 over {seqlen} tokens: largest difference {(found - expected).abs().max().item():.1g}")


if __name__ == "__main__":
    main()
