"""Decay per channel on the Triton backend, in Triton's interpreter: what the laws of `test_conformance_triton.py` leave out."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from ssdops import explain, masks, ssd
from ssdops.errors import UnsupportedError
from ssdops.masks import Mask
from ssdops.testing import laws
from ssdops.testing.case import Case
from ssdops.testing.laws import Runner

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="compiled here; test_cuda_channel.py has these")

STRENGTHS = {
    "mixed": (-1e4, -20.0, -1e-7, 0.0, 0.02),
    "strong": (-1e4, -300.0),
    "weak": (-1e-7, -1e-9),
    "growing": (0.1, 0.01),
}
TURNS: dict[str, Callable[[Mask], Mask]] = {"causal": lambda m: m, "T": lambda m: m.T, "shift": lambda m: m.shift(1)}


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def case_of(strength: str, turn: str, seqlen: int) -> Case:
    """Two heads that share q and k, from an initial state; each log decay is one of the strength's by chance."""
    values = torch.tensor(STRENGTHS[strength])
    picks = torch.randint(len(values), (1, seqlen, 2, 3), generator=torch.Generator().manual_seed(3))
    q, k, v = (normal(1, seqlen, heads, dim, seed=heads) for heads, dim in ((1, 3), (1, 3), (2, 2)))
    mask = TURNS[turn](masks.channel_decay(values[picks]))
    return Case(q, k, v, mask, 0.5, (normal(1, 2, 2, 3, seed=7),))


@pytest.mark.parametrize(
    ("strength", "turn"),
    [("mixed", "causal"), ("mixed", "T"), ("mixed", "shift"), *((s, "causal") for s in STRENGTHS if s != "mixed")],
)
def test_every_strength_equals_oracle(strength: str, turn: str) -> None:
    """float32 over whole chunks of 16 tokens and a part of one: Y, states and every gradient."""
    case = case_of(strength, turn, 37)
    laws.equals_oracle(Runner("triton", 16), case)
    laws.gradients_equal_oracle(Runner("triton", 16), case)


@pytest.mark.parametrize("strength", ["mixed", "strong"])
def test_sums_in_float32_forget_what_is_strong(strength: str) -> None:
    """In bfloat16 sums of logs are float32, where one of −1e4 would round those after it: a chunk of 64 tokens."""
    case = replace(case_of(strength, "causal", 64).map(lambda _, x: x.bfloat16()), operands=torch.bfloat16)
    laws.equals_oracle(Runner("triton", 64), case)
    laws.gradients_equal_oracle(Runner("triton", 64), case)


def test_no_difference_of_sums_in_gradients_of_logs() -> None:
    """Pairs of tokens on either side of a strong decay are large, those across it tiny: its gradient is of these alone."""
    seqlen, at = 16, 8
    q, k, v = (normal(1, seqlen, 1, 2, seed=seed).abs() for seed in range(3))
    log_a = torch.full((1, seqlen, 1, 2), -1e-3)
    log_a[:, at] = -16.0
    leaves = [x.clone().requires_grad_() for x in (q, k, v, log_a)]
    exact = [x.double().requires_grad_() for x in (q, k, v, log_a)]
    found, wanted = (
        torch.autograd.grad(ssd(*x[:3], masks.channel_decay(x[3]), backend=backend).sum(), x)[3]
        for x, backend in ((leaves, "triton"), (exact, "naive"))
    )
    assert 1e5 * wanted[:, at].max() < wanted.max()  # so that an error of float32, of the greatest, would show
    assert ((found - wanted)[:, at].abs() <= 2e-6 * wanted[:, at].abs()).all()


def test_chunks_end_where_states_are_wanted() -> None:
    """Of the sizes that a problem has: wider states, and wider numbers, have shorter chunks."""

    def size(dstate: int, dtype: torch.dtype = torch.bfloat16, every: int | None = None) -> int | None:
        x = torch.zeros(1, 192, 1, dstate, dtype=dtype)
        plan = explain(x, x, x, masks.channel_decay(torch.zeros(1, 192, 1, dstate)), backend="triton", state_every=every).plan
        return plan.steps[0].config.chunk_size

    assert [size(n) for n in (3, 64, 65, 128, 129, 256)] == [64, 64, 32, 32, 16, 16]
    assert [size(n, torch.float32) for n in (32, 64, 128)] == [64, 32, 16]
    assert [size(64, every=every) for every in (64, 96, 48)] == [64, 32, 16]
    x = torch.zeros(1, 20, 1, 128)
    with pytest.raises(UnsupportedError, match="chunks of 16 tokens"):
        ssd(x, x, x, masks.channel_decay(x), backend="triton", chunk_size=32)
