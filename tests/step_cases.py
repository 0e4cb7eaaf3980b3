"""What the decode kernel is tested on, in the interpreter and on a GPU: masks, and how far off a step may be."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ssdops import masks as m
from ssdops import ssd_step
from ssdops.masks import Mask
from ssdops.testing import oracle
from ssdops.testing.case import Case
from ssdops.testing.laws import part
from ssdops.testing.tolerance import assert_close, tolerance


@dataclass(frozen=True)
class Made:
    """Operands of a step of a few tokens."""

    batch: int = 2
    tokens: int = 3
    nheads: int = 4
    headdim: int = 5
    dstate: int = 6
    heads: tuple[int, int, int] = (1, 2, 4)  # of q, k and v
    dtype: torch.dtype = torch.float32
    device: str = "cpu"

    def normal(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """Normal values, others for another shape."""
        generator = torch.Generator().manual_seed(hash(shape) % 2**31)
        return torch.randn(shape, generator=generator).to(self.device, dtype or self.dtype)

    def per_token(self, *last: int) -> Tensor:
        """A value per token and head."""
        return self.normal(self.batch, self.tokens, self.nheads, *last, dtype=torch.float32)

    def log(self, *last: int) -> Tensor:
        """A log decay."""
        return -self.per_token(*last).abs()

    def case(self, mask: Mask, state_dtype: torch.dtype | None = torch.float32, scale: float = 0.5) -> Case:
        """A call, with states of that dtype or none."""
        z, (q, k, v) = self, self.heads
        sizes = ((q, z.dstate), (k, z.dstate), (v, z.headdim))
        x = [z.normal(z.batch, z.tokens, heads, dim) + i / 4 for i, (heads, dim) in enumerate(sizes)]
        case = Case(*x, mask, scale)
        if state_dtype is None:
            return case
        initial = (z.normal(z.batch, z.nheads, z.headdim, z.dstate, dtype=state_dtype) for _ in case.carried or ())
        return replace(case, initial=tuple(initial))


MASKS: dict[str, Callable[[Made], Mask]] = {
    "causal": lambda x: m.causal(),
    "decay": lambda x: m.decay(x.log()),
    "strict": lambda x: m.decay(x.log()).strict(),
    "shifted": lambda x: m.decay(x.log()).shift(1),
    "decaying last": lambda x: m.decay(x.log()).reverse().T,
    "decaying last, strict": lambda x: m.decay(x.log()).reverse().T.strict(),
    "retention": lambda x: m.retention(x.log()[0, 0]),
    "scaled": lambda x: m.decay(x.log()).scale(rows=x.per_token(), cols=x.per_token() + 1, log_cols=x.log()),
    "a number for all": lambda x: m.decay(x.log()[0, 0, 0]).scale(cols=x.per_token()[:, :1]),
    "two decays": lambda x: m.decay(x.log()) * m.decay(x.log()[:, :, :1]),
    "channel": lambda x: m.channel_decay(x.log(x.dstate)),
    "channel in factors": lambda x: m.channel_decay(dt=x.per_token().abs(), A=x.log(x.dstate)[0, 0]),
    "both decays": lambda x: m.channel_decay(x.log(x.dstate)) * m.decay(x.log()),
    "a diagonal beside": lambda x: m.decay(x.log()) - m.diagonal(x.per_token()),
    "minus": lambda x: -m.decay(x.log()) + m.diagonal(x.normal(x.nheads)),
    "two scans": lambda x: m.decay(x.log()) + m.causal().scale(rows=x.per_token()) + m.diagonal(x.per_token()),
    "three scans": lambda x: m.decay(x.log()) - m.decay(x.log() / 2).strict() + m.causal(),
    "rank 2": lambda x: m.semiseparable(x.log(), x.per_token(2), x.per_token(2)),
}


def stepped(case: Case, **options: Any) -> dict[str, Tensor]:
    """All tokens of a call in one step: y, the states, and the state after every token."""
    given = {"backend": "triton", **options}
    y, after, every = ssd_step(
        case.q, case.k, case.v, case.mask, given.pop("state", case.initial or None), scale=case.scale,
        return_intermediate_states=True, **given,
    )  # fmt: skip
    named = {"y": y}
    for name, states in (("state", after), ("every", every)):
        named |= {f"{name}[{i}]": x for i, x in enumerate(states if isinstance(states, tuple) else (states,))}
    return named


def assert_right(case: Case, out: dict[str, Tensor]) -> None:
    """Every part of a step's result is what the oracle says, within what its dtype allows."""
    tokens = case.q.shape[1]
    whole = [part(case, 0, t + 1) for t in range(tokens)]
    expected, sizes = oracle.outputs(case, True), oracle.magnitudes(case, True)
    for i in range(len(case.carried or ())):
        prefixes = [oracle.outputs(prefix, True)[f"state[{i}]"] for prefix in whole]
        if prefixes:
            expected[f"every[{i}]"] = torch.stack(prefixes, 1)
            sizes[f"every[{i}]"] = max(oracle.magnitudes(prefix, True)[f"state[{i}]"] for prefix in whole)
    for name, want in expected.items():
        length = (tokens + 1) * (case.problem.dstate if name == "y" else 1)
        assert_close(out[name], want, tolerance(out[name].dtype, torch.float32, length, sizes[name]), name)
