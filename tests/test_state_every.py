"""The states that `ssd` returns after every few tokens, beyond what `Conformance` says of them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ssdops import explain, masks, ssd, ssd_step
from ssdops.ir.problem import Target
from ssdops.masks import Mask

BATCH, SEQLEN, NHEADS, HEADDIM, DSTATE = 2, 50, 4, 3, 5
TORCH = ("naive", "recurrent", "chunked")
Inputs = tuple[Tensor, Tensor, Tensor, Tensor]


@pytest.fixture
def x() -> Inputs:
    """q, k, v and log_a."""
    generator = torch.Generator().manual_seed(0)

    def r(*shape: int) -> Tensor:
        return torch.randn(BATCH, SEQLEN, *shape, generator=generator, dtype=torch.float64)

    return r(1, DSTATE), r(2, DSTATE), r(NHEADS, HEADDIM), -r(NHEADS).abs()


def two_scans(log_a: Tensor) -> Mask:
    return masks.decay(log_a).shift(1) - masks.causal().scale(cols=log_a) + masks.diagonal(log_a)


@pytest.mark.parametrize("backend", TORCH)
def test_after_every_token_they_are_the_intermediate_states_of_a_step(x: Inputs, backend: str) -> None:
    q, k, v, log_a = x
    y, final, every = ssd(q, k, v, two_scans(log_a), state_every=1, backend=backend)
    stepped = ssd_step(q, k, v, two_scans(log_a), None, return_intermediate_states=True, backend="recurrent")
    torch.testing.assert_close((y, final, every), stepped)


@pytest.mark.parametrize("backend", TORCH)
@pytest.mark.parametrize("twice", [False, True])
def test_gradients_are_those_of_the_same_call_without(x: Inputs, backend: str, twice: bool) -> None:
    """Of Y and the final states, from what the forward pass saved and as a graph; the states between take none."""
    leaves = [t[:, :20].clone().requires_grad_() for t in x]

    def grads(y: Tensor, final: tuple[Tensor, ...]) -> list[Tensor]:
        total = sum((t * torch.linspace(0, 1, t.numel()).view(t.shape)).sum() for t in (y, *final))
        first = torch.autograd.grad(total, leaves, create_graph=twice)
        return [*first, *(torch.autograd.grad(sum(g.square().sum() for g in first), leaves) if twice else ())]

    q, k, v, log_a = leaves
    y, final, every = ssd(q, k, v, two_scans(log_a), state_every=7, backend=backend)
    assert not any(states.requires_grad for states in every)
    plain = ssd(q, k, v, two_scans(log_a), return_state=True, backend=backend)
    torch.testing.assert_close(grads(y, final), grads(*plain))


def test_a_prompt_that_is_too_short_has_none(x: Inputs) -> None:
    _, final, every = ssd(*x[:3], masks.decay(x[3]), state_every=SEQLEN + 1)
    assert final.shape == (BATCH, NHEADS, HEADDIM, DSTATE) and every.shape == (BATCH, 0, NHEADS, HEADDIM, DSTATE)


def test_of_a_mask_without_scans_there_are_none(x: Inputs) -> None:
    _, final, every = ssd(*x[:3], masks.diagonal(x[3]), state_every=8)
    assert final == every == ()


def test_they_come_in_the_dtype_of_states(x: Inputs) -> None:
    _, _, exact = ssd(*x[:3], masks.decay(x[3]), state_every=8)
    _, final, every = ssd(*x[:3], masks.decay(x[3]), state_every=8, state_dtype=torch.bfloat16)
    assert exact.dtype == torch.float64 and final.dtype == every.dtype == torch.bfloat16
    assert torch.equal(every, exact.bfloat16())


def test_padding_behind_a_prompt_leaves_its_states_alone(x: Inputs) -> None:
    """Prompts of several lengths share a batch; that without decay or v even leaves the final state alone."""
    q, k, v, log_a = x
    short = 21
    v[1, short:], log_a[1, short:] = 0.0, 0.0
    _, final, every = ssd(q, k, v, masks.decay(log_a), state_every=10)
    row = slice(1, 2), slice(0, short)
    _, alone, prefixes = ssd(q[row], k[row], v[row], masks.decay(log_a[row]), state_every=10)
    torch.testing.assert_close(every[1:, : short // 10], prefixes)
    torch.testing.assert_close(final[1:], alone)


def test_the_plan_is_shown_with_them() -> None:
    """`explain` plans what `ssd` runs: a backend that cannot stop there is out, with the reason."""
    x, log_a = torch.empty(1, 4096, 2, 64, device="meta"), torch.empty(1, 4096, 2, device="meta")
    taken = {n: explain(x, x, x, masks.decay(log_a), state_every=n, target=Target("cuda")).plan.steps[0] for n in (256, 100)}
    assert taken[256].backend == "triton"
    assert any(r.backend == "triton" and "state_every=100 is between them" in r.reason for r in taken[100].rejected)
