"""Named masks times `documents` give each document what it gives alone, outputs and gradients."""

from __future__ import annotations

import runpy
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from ssdops import Mask, masks, ssd
from ssdops.ir.problem import fenwick_levels

CUTS = (0, 5, 6, 13, 16)
T, H, N, P = CUTS[-1], 4, 6, 3
Made = dict[str, Tensor]
Contract = Callable[[Tensor, Tensor, Tensor, Mask], Tensor]
"""`ssd` of a mask that is packed or not."""
ROTATED = runpy.run_path(str(Path(__file__).parents[1] / "examples" / "mamba3.py"))["rotated"]


def made() -> tuple[Made, Made]:
    """Operands with tokens, and without."""
    generator = torch.Generator().manual_seed(5)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    tokens = {
        "q": normal(1, T, 2, N), "k": normal(1, T, H, N), "v": normal(1, T, H, P), "angles": normal(1, T, 1, N // 2),
        "log_a": -normal(1, T, H).abs(), "log_b": -normal(1, T, 1).abs(), "log_w": -normal(1, T, H, N).abs(),
        "d": normal(1, T, H), "dt": normal(1, T, H).abs(), "beta": normal(1, T, H), "gamma": normal(1, T, H),
        "log_i": normal(1, T, H),
    }  # fmt: skip
    shared = {"A": -normal(H).abs(), "A_n": -normal(H, N).abs(), "D": normal(H), "u": normal(H, N)}
    return tokens, shared


def of_mask(make: Callable[[Made], Mask]) -> Callable[[Made, Contract], Tensor]:
    return lambda x, contract: contract(x["q"], x["k"], x["v"], make(x))


def linear_attention(x: Made, contract: Contract) -> Tensor:
    q, k, mask = F.elu(x["q"]) + 1, F.elu(x["k"]) + 1, masks.linear_attention()
    return contract(q, k, x["v"], mask) / contract(q, k, torch.ones_like(x["v"][..., :1]), mask)


def mamba2(x: Made, contract: Contract) -> Tensor:
    return contract(x["q"], x["k"], x["v"] * x["dt"][..., None], masks.mamba2(x["dt"], x["A"])) + x["D"][:, None] * x["v"]


def mlstm(x: Made, contract: Contract) -> Tensor:
    mask = masks.mlstm(x["log_a"], x["log_i"])
    normaliser = contract(x["q"], x["k"], torch.ones_like(x["v"][..., :1]), mask).abs().clamp_min(1)
    return contract(x["q"], x["k"], x["v"], mask) / normaliser


def mamba3(x: Made, contract: Contract) -> Tensor:
    """Angles are summed over the row: two tokens of a document see the difference alone."""
    q, k = (ROTATED(x[name], x["angles"]) for name in "qk")
    return contract(q, k, x["v"], masks.trapezoidal(x["log_a"], gamma=x["gamma"], beta_over_a=x["beta"]))


def rwkv6(x: Made, contract: Contract) -> Tensor:
    r = x["q"].repeat_interleave(2, 2)
    own = masks.diagonal(torch.ones((), dtype=r.dtype))
    past = contract(r, x["k"], x["v"], masks.channel_decay(x["log_w"]).shift(1))
    return past + contract(r * x["u"], x["k"], x["v"], own)


NAMED = {
    "linear attention": linear_attention,
    "retnet": of_mask(lambda x: masks.retnet(H)),
    "lightning": of_mask(lambda x: masks.lightning(H, 1, 3)),
    "alibi": of_mask(lambda x: masks.alibi(H)),
    "mamba2 and D": mamba2,
    "quasiseparable": of_mask(lambda x: masks.quasiseparable(x["log_a"], x["log_b"], x["d"])),
    "mlstm and its normaliser": mlstm,
    "sliding window": of_mask(lambda x: masks.sliding_window(3)),
    "sliding window, decay": of_mask(lambda x: masks.sliding_window(3, x["log_a"])),
    "trapezoidal, beta": of_mask(lambda x: masks.trapezoidal(x["log_a"], x["beta"], x["gamma"])),
    "mamba3": mamba3,
    "gla": of_mask(lambda x: masks.channel_decay(x["log_w"])),
    "mamba1": of_mask(lambda x: masks.channel_decay(dt=x["dt"], A=x["A_n"])),
    "rwkv6 and its bonus": rwkv6,
}


@pytest.mark.parametrize("options", [{}, {"backend": "chunked", "chunk_size": 4}], ids=["auto", "chunked"])
@pytest.mark.parametrize("name", NAMED)
def test_packed_is_each_document_alone(name, options):
    tokens, shared = made()
    tokens, shared = ({key: x.requires_grad_() for key, x in of.items()} for of in (tokens, shared))
    documents = masks.documents(torch.tensor(CUTS))
    packed = NAMED[name](tokens | shared, lambda q, k, v, mask: ssd(q, k, v, mask * documents, **options))
    alone = [
        NAMED[name]({key: x[:, start:stop] for key, x in tokens.items()} | shared, lambda *given: ssd(*given, backend="naive"))
        for start, stop in pairwise(CUTS)
    ]
    leaves, pair = [*tokens.values(), *shared.values()], (packed, torch.cat(alone, 1))
    torch.testing.assert_close(*pair, rtol=1e-10, atol=1e-10)
    dy = torch.randn(packed.shape, dtype=packed.dtype, generator=torch.Generator().manual_seed(6))
    gradients = [torch.autograd.grad(y, leaves, dy, allow_unused=True, materialize_grads=True) for y in pair]
    assert sum(bool(g.any()) for g in gradients[0]) >= 3
    torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-10)


def test_levels_of_log_linear_attention_are_those_of_the_row():
    """Documents that begin at a multiple of a power of two, no shorter than they, are as if alone; others have other levels."""
    tokens, _ = made()
    levels = torch.randn(1, T, H, fenwick_levels(T), dtype=torch.float64, generator=torch.Generator().manual_seed(7))

    def run(start: int, stop: int, mask: Mask | None = None) -> Tensor:
        q, k, v, log_a = (tokens[name][:, start:stop] for name in ("q", "k", "v", "log_a"))
        fenwick = masks.fenwick(log_a, levels[:, start:stop])
        return ssd(q, k, v, fenwick if mask is None else fenwick * mask)

    for cuts, same in (((0, 8, 12, 14, 15, 16), True), ((0, 6, 16), False)):
        packed = run(0, T, masks.documents(torch.tensor(cuts)))
        alone = torch.cat([run(start, stop) for start, stop in pairwise(cuts)], 1)
        assert torch.allclose(packed, alone, rtol=1e-10, atol=1e-10) == same
