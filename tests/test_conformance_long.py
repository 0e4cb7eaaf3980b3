"""Long sequences: what slow and strong decays do to numbers over thousands of tokens."""

import pytest
import torch
from torch import Tensor

from ssdops import masks, ssd
from ssdops.testing.tolerance import assert_close, tolerance


def draws(seqlen: int, dims: tuple[int, int], seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q, k, v and a cotangent of y in float32, one row and one head."""
    generator = torch.Generator().manual_seed(seed)
    sizes = (dims[1], dims[1], dims[0], dims[0])
    q, k, v, dy = (torch.randn(1, seqlen, 1, size, generator=generator) for size in sizes)
    return q, k, v, dy


@pytest.mark.parametrize("turn", ["causal", "anticausal"])
def test_mixed_decays_stay_finite(turn: str) -> None:
    """65,536 tokens whose decays mix 1 − 1e-6 and e^-20: finite outputs and gradients."""
    q, k, v, dy = draws(65536, (2, 3))
    choice = torch.rand(1, 65536, 1, generator=torch.Generator().manual_seed(1)) < 0.01
    log_a = torch.where(choice, -20.0, torch.log1p(torch.tensor(-1e-6))).requires_grad_()
    inputs = [x.requires_grad_() for x in (q, k, v)]
    mask = masks.decay(log_a)
    y, state = ssd(q, k, v, mask if turn == "causal" else mask.T, backend="chunked", chunk_size=256, return_state=True)
    grads = torch.autograd.grad([y, state], [*inputs, log_a], [dy, torch.ones_like(state)])
    for name, x in zip(("y", "state", "dq", "dk", "dv", "dlog_a"), (y, state, *grads), strict=True):
        assert torch.isfinite(x).all(), f"{name} is not finite"
        assert x.abs().max() > 0, f"{name} is zero"


def dense_log_gradient(log_a: Tensor, tensors: tuple[Tensor, Tensor, Tensor, Tensor], block: int = 512) -> Tensor:
    """dlog_a[s] = Σ_{i ≥ s > j} L_ij ⟨q_i, k_j⟩ ⟨dy_i, v_j⟩, by blocks of rows i, in float64: nothing is subtracted."""
    q, k, v, dy = (x[0, :, 0].double() for x in tensors)
    c = log_a.flatten().double().cumsum(0)
    tokens, out = torch.arange(len(c)), torch.zeros_like(c)
    for i0 in range(0, len(c), block):
        rows = tokens[i0 : i0 + block, None]
        decays = torch.where(rows >= tokens, c[rows] - c, -torch.inf).exp()
        change = decays * (q[rows[:, 0]] @ k.T) * (dy[rows[:, 0]] @ v.T)
        before = torch.nn.functional.pad(change.cumsum(1)[:, :-1], (1, 0))  # Σ_{j < s}
        out += torch.where(rows >= tokens, before, 0.0).sum(0)
    return out


@pytest.mark.parametrize("backend", ["chunked", "recurrent"])
@pytest.mark.parametrize("slowest", [-1e-4, -1e-6, -1.0, -20.0])
def test_gradient_of_log_a(backend: str, slowest: float) -> None:
    """4,096 tokens of one decay in float32: the gradient of log_a is within the one tolerance."""
    seqlen, dims = 4096, (2, 3)
    tensors = draws(seqlen, dims)
    spread = 0.5 + torch.rand(1, seqlen, 1, generator=torch.Generator().manual_seed(2))
    log_a = (slowest * spread).requires_grad_()
    y = ssd(*tensors[:3], masks.decay(log_a), backend=backend)
    (found,) = torch.autograd.grad(y, log_a, tensors[3])
    expected = dense_log_gradient(log_a.detach(), tensors)
    q, k, v, dy = (x.abs() for x in tensors)
    big = dense_log_gradient(log_a.detach(), (q, k, v, dy)).max()
    length = seqlen * dims[0] * dims[1]
    assert_close(found.flatten(), expected, tolerance(torch.float32, torch.float32, length, float(big)), "dlog_a")


@pytest.mark.parametrize("slowest", [-1e-4, -1e-7, -1.0, -20.0])
def test_gradient_of_log_a_per_channel(slowest: float) -> None:
    """The same where each of three channels decays by itself: its gradient is that of a scan over this channel alone."""
    seqlen, dims = 4096, (2, 3)
    q, k, v, dy = draws(seqlen, dims)
    spread = 0.5 + torch.rand(1, seqlen, 1, dims[1], generator=torch.Generator().manual_seed(2))
    log_a = (slowest * spread).requires_grad_()
    y = ssd(q, k, v, masks.channel_decay(log_a), backend="chunked")
    (found,) = torch.autograd.grad(y, log_a, dy)
    for n in range(dims[1]):
        alone = (q[..., n : n + 1], k[..., n : n + 1], v, dy)
        expected = dense_log_gradient(log_a.detach()[..., n], alone)
        q_size, k_size, v_size, dy_size = (x.abs() for x in alone)
        big = float(dense_log_gradient(log_a.detach()[..., n], (q_size, k_size, v_size, dy_size)).max())
        assert_close(
            found[0, :, 0, n], expected, tolerance(torch.float32, torch.float32, seqlen * dims[0], big), f"channel {n}"
        )
