"""Mamba-3's trapezoidal rule against its recurrence, and its state, which holds the last k and v beside S."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ssdops import masks as m
from ssdops import ssd, ssd_step
from ssdops.errors import ShapeError, UnsupportedError
from ssdops.masks import Mask

BATCH, SEQLEN, NHEADS, HEADDIM, DSTATE = 2, 11, 4, 3, 5
BACKENDS = ("naive", "recurrent", "chunked")
FORMS = ("beta", "beta_over_a")
Made = dict[str, Tensor]


def made() -> Made:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    return {
        "q": normal(BATCH, SEQLEN, 1, DSTATE), "k": normal(BATCH, SEQLEN, 2, DSTATE),
        "v": normal(BATCH, SEQLEN, NHEADS, HEADDIM),
        "log_a": -normal(BATCH, SEQLEN, NHEADS).abs(), "beta": normal(BATCH, SEQLEN, 1), "gamma": normal(1, SEQLEN, NHEADS),
        "d": normal(NHEADS),
    }  # fmt: skip


def mask_of(x: Made, form: str, at: slice | int = slice(None)) -> Mask:
    log_a, beta, gamma = (x[name][:, at] for name in ("log_a", "beta", "gamma"))
    if form == "beta":
        trapezoid = m.trapezoidal(log_a, beta * log_a.exp(), gamma)
    else:
        trapezoid = m.trapezoidal(log_a, gamma=gamma, beta_over_a=beta)
    return trapezoid + m.diagonal(x["d"])


def recurrence(x: Made) -> tuple[Tensor, Tensor]:
    """h_t = a_t h_{t−1} + β_t v_{t−1} k_{t−1}ᵀ + γ_t v_t k_tᵀ, y_t = h_t q_t + d ⟨q_t, k_t⟩ v_t, token by token."""
    q, k = (x[name].repeat_interleave(NHEADS // x[name].shape[2], 2) for name in ("q", "k"))
    a = x["log_a"].exp()
    h, out = torch.zeros(BATCH, NHEADS, HEADDIM, DSTATE, dtype=torch.float64), []
    for t in range(SEQLEN):
        h = a[:, t, :, None, None] * h
        if t:
            before = x["v"][:, t - 1, :, :, None] * k[:, t - 1, :, None]
            h = h + (x["beta"][:, t] * a[:, t])[..., None, None] * before
        h = h + x["gamma"][:, t, :, None, None] * x["v"][:, t, :, :, None] * k[:, t, :, None]
        own = x["d"][:, None] * (q[:, t] * k[:, t]).sum(-1, keepdim=True) * x["v"][:, t]
        out.append((h @ q[:, t, :, :, None])[..., 0] + own)
    return torch.stack(out, 1), h


def close(*pairs: tuple[Tensor, Tensor]) -> None:
    for a, b in pairs:
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("form", FORMS)
def test_is_the_recurrence(form, backend):
    x = made()
    y, (state, last_k, last_v) = ssd(x["q"], x["k"], x["v"], mask_of(x, form), backend=backend, return_state=True)
    close((y, recurrence(x)[0]), (state, recurrence(x)[1]), (last_k, x["k"][:, -1]), (last_v, x["v"][:, -1]))


@pytest.mark.parametrize("cut", [0, 1, 4, SEQLEN])
@pytest.mark.parametrize("form", FORMS)
def test_split_and_carry_is_the_whole(form, cut):
    x = made()
    whole, states = ssd(x["q"], x["k"], x["v"], mask_of(x, form), return_state=True)
    outputs, carried = [], None
    for at in (slice(0, cut), slice(cut, SEQLEN)):
        q, k, v = (x[name][:, at] for name in "qkv")
        y, carried = ssd(q, k, v, mask_of(x, form, at), initial_state=carried, return_state=True)
        outputs.append(y)
    close((torch.cat(outputs, 1), whole), *zip(carried, states, strict=True))


@pytest.mark.parametrize("form", FORMS)
def test_steps_are_the_scan(form):
    x, state, outputs = made(), None, []
    for t in range(SEQLEN):
        q, k, v = (x[name][:, t] for name in "qkv")
        y, state = ssd_step(q, k, v, mask_of(x, form, t), state)
        outputs.append(y)
    close((torch.stack(outputs, 1), recurrence(x)[0]), (state[0], recurrence(x)[1]))


@pytest.mark.parametrize("form", FORMS)
def test_several_tokens_in_a_step_are_that_many_steps(form):
    x = made()
    rest, state, seen = slice(4, 7), (recurrence(x)[1], x["k"][:, 3], x["v"][:, 3]), []
    q, k, v = (x[name][:, rest] for name in "qkv")
    y, final, every = ssd_step(q, k, v, mask_of(x, form, rest), state, return_intermediate_states=True)
    close((ssd_step(q, k, v, mask_of(x, form, rest), state)[0], y))
    for t in range(4, 7):
        y_t, state = ssd_step(*(x[name][:, t] for name in "qkv"), mask_of(x, form, t), state)
        close((y_t, y[:, t - 4]))
        seen.append(state)
    for i, parts in enumerate(zip(*seen, strict=True)):
        close((final[i], parts[-1]), (every[i], torch.stack(parts, 1)))


@pytest.mark.parametrize("form", FORMS)
def test_gradients_reach_the_state_and_through_it(form):
    x = made()
    log_a, *states = (x["log_a"][:, :3], recurrence(x)[1], x["k"][:, 3], x["v"][:, 3])
    leaves = [t.detach().clone().requires_grad_() for t in (log_a, *states)]

    def run(log_a: Tensor, *initial: Tensor) -> tuple[Tensor, ...]:
        q, k, v = (x[name][:, :3] for name in "qkv")
        y, final = ssd(q, k, v, mask_of(x | {"log_a": log_a}, form, slice(0, 3)), initial_state=initial, return_state=True)
        return y, final[0]

    torch.autograd.gradcheck(run, leaves, fast_mode=True)
    torch.autograd.gradgradcheck(run, leaves, fast_mode=True)


def test_compiles_whole():
    x = {name: t.float() for name, t in made().items()}

    def run(x: Made) -> tuple[Tensor, ...]:
        y, state = ssd(x["q"], x["k"], x["v"], mask_of(x, "beta"), return_state=True)
        return y, *state

    for a, b in zip(torch.compile(run, fullgraph=True, backend="aot_eager")(x), run(x), strict=True):
        torch.testing.assert_close(a, b)


def test_what_is_not_such_a_state_is_named():
    x = made()
    mask = mask_of(x, "beta")
    with pytest.raises(ShapeError, match=r"\(S, previous k, previous v\), got 1 tensors"):
        ssd(x["q"], x["k"], x["v"], mask, initial_state=recurrence(x)[1])
    with pytest.raises(ShapeError, match=r"previous k has shape .* expected \(2, 2, 5\)"):
        ssd(x["q"], x["k"], x["v"], mask, initial_state=(recurrence(x)[1], x["v"][:, 0], x["v"][:, 0]))
    with pytest.raises(UnsupportedError, match="a trapezoid alone"):
        ssd(x["q"], x["k"], x["v"], mask * m.causal().strict(), return_state=True)
    with pytest.raises(UnsupportedError, match="one matrix per slot"):
        step = [x[name][:, 0] for name in "qkv"]
        ssd_step(*step, mask_of(x, "beta", 0), recurrence(x)[1], state_indices=torch.tensor([0, 1]))
