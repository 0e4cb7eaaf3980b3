"""Decay per channel: models as their papers write them, decays of every strength, and what is never held in memory."""

from __future__ import annotations

import runpy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from ssdops import explain, masks, ssd
from ssdops.ir.problem import Target
from ssdops.masks import Mask
from ssdops.testing import laws
from ssdops.testing.case import Case
from ssdops.testing.laws import Runner
from ssdops.testing.tolerance import assert_close, tolerance

EXAMPLE = runpy.run_path(str(Path(__file__).parent.parent / "examples" / "channel_decay.py"))
BATCH, SEQLEN, NHEADS, HEADDIM, DSTATE = 2, 70, 2, 3, 5  # a whole chunk and a part of one


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


# --- models as their papers write them ------------------------------------------------------------------------------


def gla_as_written(q: Tensor, k: Tensor, v: Tensor, log_a: Tensor) -> Tensor:
    """Yang et al. 2024, equation 3: S_t = (α_tᵀ 1) ∘ S_{t−1} + k_tᵀ v_t, o_t = q_t S_t, of rows q_t, k_t, v_t, α_t."""

    def one_head(q: Tensor, k: Tensor, v: Tensor, alpha: Tensor) -> Tensor:
        state, rows = torch.zeros(q.shape[1], v.shape[1], dtype=v.dtype), []
        for t in range(len(v)):
            state = torch.outer(alpha[t], torch.ones_like(v[t])) * state + torch.outer(k[t], v[t])
            rows.append(q[t] @ state)
        return torch.stack(rows)

    x = (q, k, v, log_a.exp())
    batch, heads = range(v.shape[0]), range(v.shape[2])
    return torch.stack([torch.stack([one_head(*(t[b, :, h] for t in x)) for h in heads], 1) for b in batch])


def rwkv6_as_written(r: Tensor, k: Tensor, v: Tensor, log_w: Tensor, u: Tensor) -> Tensor:
    """Peng et al. 2024, section 4.2: wkv_t = diag(u) k_tᵀ v_t + Σ_{i<t} diag(w_{i+1} ∘ … ∘ w_{t−1}) k_iᵀ v_i, and r_t wkv_t."""
    w = log_w.exp()
    rows = []
    for t in range(v.shape[1]):
        wkv = torch.einsum("hn,bhn,bhp->bhnp", u, k[:, t], v[:, t])
        for i in range(t):
            between = w[:, i + 1 : t].prod(1)  # [b, h, n], 1 where nothing is between
            wkv = wkv + torch.einsum("bhn,bhn,bhp->bhnp", between, k[:, i], v[:, i])
        rows.append(torch.einsum("bhn,bhnp->bhp", r[:, t], wkv))
    return torch.stack(rows, 1)


def mamba1_as_written(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor) -> Tensor:
    """Gu & Dao 2023, equation 2a with section 3.6's discretisation, A by zero-order hold and B by Euler's rule."""
    h = torch.zeros(x.shape[0], x.shape[2], A.shape[1], dtype=x.dtype)
    rows = []
    for t in range(x.shape[1]):
        a_bar, b_bar = torch.exp(dt[:, t, :, None] * A), dt[:, t, :, None] * B[:, t, None]
        h = a_bar * h + b_bar * x[:, t, :, None]
        rows.append((h * C[:, t, None]).sum(-1) + D * x[:, t])
    return torch.stack(rows, 1)


def per_token(*rest: int, seed: int, seqlen: int = SEQLEN) -> Tensor:
    return normal(BATCH, seqlen, *rest, seed=seed)


def scan_inputs(seqlen: int) -> list[Tensor]:
    """q, k, v and log decays."""
    n, p = (NHEADS, DSTATE), (NHEADS, HEADDIM)
    x = [per_token(*dims, seed=seed, seqlen=seqlen) for seed, dims in enumerate((n, n, p, n))]
    return [*x[:3], -x[3].abs()]


def mamba1_inputs() -> list[Tensor]:
    """x, dt, A, B, C and D."""
    channels = 6
    x, dt = (per_token(channels, seed=seed) for seed in range(2))
    b, c = (per_token(DSTATE, seed=seed) for seed in (2, 3))
    return [x, dt.abs() * 0.3, -normal(channels, DSTATE, seed=4).exp(), b, c, normal(channels, seed=5)]


Model = Callable[..., Tensor]
MODELS: dict[str, tuple[Model, Callable[[], list[Tensor]]]] = {
    "gla": (gla_as_written, lambda: scan_inputs(SEQLEN)),
    "rwkv6": (rwkv6_as_written, lambda: [*scan_inputs(SEQLEN), normal(NHEADS, DSTATE, seed=9)]),
    "mamba1": (mamba1_as_written, mamba1_inputs),
}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("backend", ["chunked", "recurrent"])
def test_models_are_what_papers_write(name: str, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Y and every gradient of the example's function, in float64."""
    as_written, inputs = MODELS[name]
    ours = EXAMPLE[name]
    monkeypatch.setitem(ours.__globals__, "ssd", lambda *args: ssd(*args, backend=backend))
    leaves = [x.requires_grad_() for x in inputs()]
    y, expected = ours(*leaves), as_written(*leaves)
    torch.testing.assert_close(y, expected, rtol=1e-11, atol=1e-11)
    dy = normal(*y.shape, seed=10)
    found, wanted = (torch.autograd.grad(out, leaves, dy) for out in (y, expected))
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-10)


# --- decays of every strength ---------------------------------------------------------------------------------------

STRENGTHS = {
    "mixed": (-1e4, -20.0, -1e-7, 0.0, 0.02),
    "strong": (-1e4, -300.0),
    "weak": (-1e-7, -1e-9),
    "growing": (0.1, 0.01),
    "back and forth": (0.5, -0.5),
}


def decays(name: str, *shape: int) -> Tensor:
    """One of the named strengths by chance for every element."""
    values = torch.tensor(STRENGTHS[name])
    return values[torch.randint(len(values), shape, generator=torch.Generator().manual_seed(3))]


@pytest.mark.parametrize("name", STRENGTHS)
@pytest.mark.parametrize("turn", ["causal", "T", "shift"])
def test_every_strength_equals_oracle(name: str, turn: str) -> None:
    """float32 over three chunks: Y, states and gradients within the one tolerance, all finite."""
    turns: dict[str, Callable[[Mask], Mask]] = {"causal": lambda m: m, "T": lambda m: m.T, "shift": lambda m: m.shift(1)}
    q, k, v = (normal(1, 150, heads, dim, seed=heads, dtype=torch.float32) for heads, dim in ((1, 3), (1, 3), (2, 2)))
    mask = turns[turn](masks.channel_decay(decays(name, 1, 150, 2, 3)))
    initial = (normal(1, 2, 2, 3, seed=7, dtype=torch.float32),)
    case = Case(q, k, v, mask, 0.5, initial)
    for size in (64, 16):
        laws.equals_oracle(Runner("chunked", size), case)
        laws.gradients_equal_oracle(Runner("chunked", size), case)


@pytest.mark.parametrize("log_a", [-1e-7, -1e-3])
def test_one_slow_decay_over_a_long_sequence(log_a: float) -> None:
    """65,536 tokens in float32 against float64: where every token rounds alike and no signs cancel, a bias would add up."""
    shapes = ((1, 2), (1, 2), (1, 1))
    q, k, v = (normal(1, 65536, *dims, seed=seed, dtype=torch.float32).abs() for seed, dims in enumerate(shapes))
    every = torch.full((1, 65536, 1, 2), log_a)

    def run(*x: Tensor) -> tuple[Tensor, Tensor]:
        y, state = ssd(*x[:3], masks.channel_decay(x[3]), backend="chunked", return_state=True)
        return y, state

    found, expected = run(q, k, v, every), run(*(x.double() for x in (q, k, v, every)))
    for name, x, exact in zip(("y", "state"), found, expected, strict=True):
        assert_close(x, exact, tolerance(torch.float32, torch.float32, 65536 * 2, float(exact.max())), name)


# --- memory and the plan --------------------------------------------------------------------------------------------


def test_factors_are_never_multiplied_out() -> None:
    """dt · A of (batch, seqlen, nheads, dstate) is made chunk by chunk, forward and backward."""
    seqlen, nheads, dstate = 2048, 2, 64
    q, k = (normal(1, seqlen, 1, dstate, seed=seed, dtype=torch.float32).requires_grad_() for seed in range(2))
    v = normal(1, seqlen, nheads, 2, dtype=torch.float32).requires_grad_()
    dt = normal(1, seqlen, nheads, seed=3, dtype=torch.float32).abs().requires_grad_()
    big_a = (-normal(nheads, dstate, seed=4, dtype=torch.float32).abs()).requires_grad_()
    leaves = [q, k, v, dt, big_a]
    for mask in (masks.channel_decay(dt=dt, A=big_a), masks.channel_decay(dt=dt, A=big_a).reverse()):
        with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as seen:
            y = ssd(q, k, v, mask, backend="chunked")
            torch.autograd.grad(y.sum(), leaves)
        shapes = [shape for event in seen.events() for shape in event.input_shapes if shape]
        largest = max(torch.Size(shape).numel() for shape in shapes if isinstance(shape[0], int))
        assert len(shapes) > 1000 and largest < seqlen * nheads * dstate // 1.5, f"{largest} elements at once"


@pytest.mark.parametrize(
    ("sizes", "backend"),
    [((1, 2048, 8, 64, 8, 64), "chunked"), ((2, 512, 4, 64, 1, 16), "chunked"), ((2, 1, 4, 64, 1, 16), "recurrent")],
)
def test_auto_takes_chunks_where_there_are_many_tokens(sizes: tuple[int, ...], backend: str) -> None:
    batch, seqlen, nheads, headdim, ngroups, dstate = sizes
    q = torch.empty(batch, seqlen, ngroups, dstate, device="meta")
    v = torch.empty(batch, seqlen, nheads, headdim, device="meta")
    mask = masks.channel_decay(torch.empty(batch, seqlen, nheads, dstate, device="meta"))
    assert explain(q, q, v, mask, target=Target("cpu")).plan.steps[0].backend == backend
