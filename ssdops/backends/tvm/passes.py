"""Forward and backward passes of a linear term on its tensors."""

from __future__ import annotations

from ...ir.terms import Linear
from ..base import Config, Cotangents, Gradients, Inputs, Output
from .cpu import OnCpu
from .cuda import OnGpu
from .threads import Alone


def forward(term: Linear, x: Inputs, config: Config, save: bool) -> Output:
    """Y, the final states, and those between; with `save`, what spares the backward pass work."""
    with Alone(x.q.device):
        return scan(term, x, config).forward(save)


def backward(term: Linear, x: Inputs, config: Config, cotangents: Cotangents) -> Gradients:
    """Gradients of everything."""
    with Alone(x.q.device):
        return scan(term, x, config).backward(cotangents)


def scan(term: Linear, x: Inputs, config: Config) -> OnCpu | OnGpu:
    """The term where its tensors are."""
    return (OnCpu if x.q.device.type == "cpu" else OnGpu)(term, x, config)
