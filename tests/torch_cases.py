"""Calls that the tests of torch's machinery share: one of every kind of mask, at sizes that take no time."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ssdops import masks, ssd
from ssdops.masks import Mask

B, T, H, N, P = 1, 9, 4, 3, 2


def inputs(seqlen: int = T, batch: int = B, dtype: torch.dtype = torch.float64, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def r(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    return {
        "q": r(batch, seqlen, 2, N), "k": r(batch, seqlen, 1, N), "v": r(batch, seqlen, H, P),
        "a": -r(batch, seqlen, H).abs(), "b": -r(batch, seqlen, 1).abs(), "d": r(H), "u": r(batch, seqlen, 2),
        "c": -r(batch, seqlen, H, N).abs(), "levels": r(batch, seqlen, H, 1 + max(seqlen - 1, 0).bit_length()),
        "cu": torch.tensor([0, seqlen // 3, seqlen]), "ids": (torch.arange(seqlen) // 4).expand(batch, -1),
    }  # fmt: skip


MASKS: dict[str, Callable[[dict[str, Tensor]], Mask]] = {
    "causal": lambda x: masks.causal(),
    "decay": lambda x: masks.decay(x["a"]),
    "quasiseparable": lambda x: (
        masks.decay(x["a"]).strict() + masks.decay(x["b"]).strict().T + masks.diagonal(x["d"])
    ),
    "packed": lambda x: masks.decay(x["a"]) * masks.documents(x["cu"]),
    "ids": lambda x: masks.decay(x["a"]) * masks.documents(segment_ids=x["ids"], n_segments=40),
    "scaled": lambda x: masks.decay(x["a"]).scale(rows=x["u"], cols=x["d"], log_cols=x["b"]) - masks.causal(),
    "retention": lambda x: masks.retention(-x["d"].abs()),
    "trapezoidal": lambda x: masks.trapezoidal(x["a"], x["u"], x["d"]),
    "reversed": lambda x: masks.decay(x["a"]).reverse().strict() + masks.decay(x["b"]).shift(1),
    "band": lambda x: masks.window(3) * masks.decay(x["a"]),
    "channel": lambda x: masks.channel_decay(x["c"]) * masks.decay(x["b"]),
    "fenwick": lambda x: masks.fenwick(x["a"], x["levels"]),
}  # fmt: skip
LEARNT = ("q", "k", "v", "a", "b", "d", "u", "c", "levels")


def attend(name: str) -> Callable[[dict[str, Tensor]], Tensor]:
    """Y of a mask built inside the function."""
    return lambda x: ssd(x["q"], x["k"], x["v"], MASKS[name](x), scale=0.5)


def with_gradients(f: Callable[[dict[str, Tensor]], Tensor], x: dict[str, Tensor]) -> list[Tensor | None]:
    """Y and the gradients of everything that may have one."""
    x = {name: t.detach().clone().requires_grad_(name in LEARNT) for name, t in x.items()}
    y = f(x)
    (y * torch.arange(1.0, y.numel() + 1).view(y.shape)).sum().backward()
    return [y.detach(), *(x[name].grad for name in LEARNT)]


def assert_alike(got: list[Tensor | None], want: list[Tensor | None]) -> None:
    for g, w in zip(got, want, strict=True):
        assert (g is None) == (w is None)
        if g is not None:
            torch.testing.assert_close(g, w, rtol=1e-9, atol=1e-9)
