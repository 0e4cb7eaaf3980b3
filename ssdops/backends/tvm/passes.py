"""Forward and backward passes of a term on its tensors."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from ...ir.terms import Linear, Quadratic
from ..base import Config, Cotangents, Gradients, Inputs, Output
from . import build
from .cpu import OnCpu
from .cuda import OnGpu
from .quadratic import OnPairs
from .threads import Alone

R = TypeVar("R")


def forward(term: Linear | Quadratic, x: Inputs, config: Config, save: bool) -> Output:
    """Y, the final states, and those between; with `save`, what spares the backward pass work."""
    return complete(term, x, config, lambda scan: scan.forward(save))


def backward(term: Linear | Quadratic, x: Inputs, config: Config, cotangents: Cotangents) -> Gradients:
    """Gradients of everything."""
    return complete(term, x, config, lambda scan: scan.backward(cotangents))


def complete(term: Linear | Quadratic, x: Inputs, config: Config, run: Callable[[OnCpu | OnGpu | OnPairs], R]) -> R:
    """What a pass gives; its first time, when it has only told which programs it wants, they are made and it runs again."""

    def scan() -> OnCpu | OnGpu | OnPairs:
        if isinstance(term, Quadratic):
            return OnPairs(term, x, config)
        return OnCpu(term, x, config) if x.q.device.type == "cpu" else OnGpu(term, x, config)

    with Alone(x.q.device):
        first = scan()
        out = run(first)
        if (collected := build.collected()) is not None:
            collected.update(dict.fromkeys(first.wanted))
            return out
        if not first.wanted:
            return out
        build.make(first.wanted)
        again = scan()
        out = run(again)
        assert not again.wanted  # else what it gave is not filled
        return out
