"""Hydra's scans as its released code has them: a sum of two contractions, from either side with B, C and Δ of its own.

    y_i = Σ_{j<i} ⟨C_{i−1}, B_j⟩ a_{i−1:j} Δ_j x_j  +  δ_i x_i  +  Σ_{j>i} ⟨C'_{i+1}, B'_j⟩ a'_{j:i+1} Δ'_j x_j

with a_{i:j} = exp(A Σ_{j<s≤i} Δ_s) and a'_{j:i} = exp(A Σ_{i≤s<j} Δ'_s). Each contraction is shifted by a token away from its
side, its C with it, so that neither has the token itself, which δ weighs. `masks.quasiseparable` is the form with one q and one
k for both ways, and one contraction; `ssdops.nn.Hydra` is the block around this one.

Source: Hwang et al. 2024, "Hydra: Bidirectional State Space Models Through Generalized Matrix Mixers", and its released code.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from ssdops import masks, ssd

Side = tuple[Tensor, Tensor, Tensor]
"""What a direction has to itself: dt `(batch, seqlen, nheads)`, B and C `(batch, seqlen, ngroups, dstate)`."""


def hydra(x: Tensor, left: Side, right: Side, A: Tensor, delta: Tensor) -> Tensor:
    """Both scans and the diagonal.

    Args:
        x: `(batch, seqlen, nheads, headdim)`.
        left, right: what each direction has to itself.
        A: negative, shared by both `(nheads,)`.
        delta: a token's own weight `(batch, seqlen, nheads)`; the block's is W_D x + D.
    """
    dt, B, C = left
    before = ssd(C, B, x * dt[..., None], masks.decay(dt * A))
    dt, B, C = right
    # the decay of the reversed sequence sums over i ≤ s < j; a transposed decay would over i < s ≤ j
    after = ssd(C, B, x * dt[..., None], masks.decay((dt * A).flip(1)).reverse())
    return F.pad(before, (0, 0, 0, 0, 1, 0))[:, :-1] + delta[..., None] * x + F.pad(after, (0, 0, 0, 0, 0, 1))[:, 1:]


def by_token(x: Tensor, left: Side, right: Side, A: Tensor, delta: Tensor) -> Tensor:
    """The same by two recurrences, each read one token further on with the C that it was left with."""
    out = list((delta[..., None] * x).unbind(1))
    for (dt, B, C), order in ((left, range(x.shape[1])), (right, reversed(range(x.shape[1])))):
        B, C = (t.repeat_interleave(x.shape[2] // t.shape[2], 2) for t in (B, C))
        state, last = x.new_zeros(*x[:, 0].shape, B.shape[-1]), None  # [batch, nheads, headdim, dstate]
        for t in order:
            if last is not None:
                out[t] = out[t] + (state @ C[:, last, :, :, None])[..., 0]
            new = (dt[:, t, :, None] * x[:, t])[..., None] * B[:, t, :, None]
            state, last = (dt[:, t] * A).exp()[..., None, None] * state + new, t
    return torch.stack(out, 1)


def main() -> None:
    """The contractions are the recurrences, values and gradients."""
    torch.manual_seed(0)
    batch, seqlen, nheads, headdim, ngroups, dstate = 2, 50, 4, 3, 2, 5
    dts = torch.rand(2, batch, seqlen, nheads, dtype=torch.float64)
    projections = torch.randn(4, batch, seqlen, ngroups, dstate, dtype=torch.float64)
    x, delta = torch.randn(batch, seqlen, nheads, headdim).double(), torch.randn(batch, seqlen, nheads).double()
    inputs = [t.detach().requires_grad_() for t in (x, *dts, *projections, -torch.rand(nheads).double(), delta)]
    x, dt, dt_right, B, C, B_right, C_right, A, delta = inputs
    found, expected = (run(x, (dt, B, C), (dt_right, B_right, C_right), A, delta) for run in (hydra, by_token))
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    dy = torch.randn_like(found)
    for ours, theirs in zip(*(torch.autograd.grad(y, inputs, dy) for y in (found, expected)), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)
    print(f"Hydra over {seqlen} tokens: largest difference {(found - expected).abs().max().item():.1g}")


if __name__ == "__main__":
    main()
