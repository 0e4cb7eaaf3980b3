"""Structured terms part by part: Y in differentiable torch, and gradients from autograd, added where they belong.

A part reads slices of q, k, v and of what the term's operands amount to, and gives Y of them. Gradients go back the same way:
a part is computed again with its slices as leaves, so that nothing is kept of the forward pass, and memory is that of one part.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

import torch
from torch import Tensor

from ..base import Gradients, exponent_dtype
from ..structured import Values

Slices = dict[str, Tensor]


class Part(Protocol):
    """Something that Y is a sum of."""

    def read(self, name: str, x: Tensor) -> Tensor:
        """The slice that it needs of q, k, v or a value, or all of it."""
        ...

    def add(self, name: str, total: Tensor, piece: Tensor) -> None:
        """Add to where `read` takes that slice from, or (`y`) where its rows are."""
        ...

    def output(self, x: Slices) -> Tensor:
        """Its part of Y from the slices, differentiably."""
        ...


def forward(parts: Iterable[Part], values: Values) -> Tensor:
    """Y: the sum of all parts."""
    p = values.scan.problem
    y = torch.zeros(p.batch, p.seqlen, p.nheads, p.headdim, dtype=p.accumulate, device=values.scan.q.device)
    for part in parts:
        part.add("y", y, part.output({name: part.read(name, x) for name, x in values.tensors.items()}))
    return y


def backward(parts: Iterable[Part], values: Values, dy: Tensor) -> Gradients:
    """Gradients of q, k, v and the operands; those of logs are summed in the dtype of exponents."""
    p = values.scan.problem
    exact, logs = exponent_dtype(p), ("log_a", "log_cols")
    totals = {
        name: torch.zeros(x.shape, dtype=exact if name in logs else p.accumulate, device=x.device)
        for name, x in values.tensors.items()
    }
    for part in parts:
        leaves = {  # as wide as what is summed of their gradients, so that none of it is rounded on the way
            name: part.read(name, x.detach()).to(totals[name].dtype).detach().requires_grad_()
            for name, x in values.tensors.items()
        }
        with torch.enable_grad():
            y = part.output(leaves)
        if not y.requires_grad or not y.numel():
            continue
        found = torch.autograd.grad(y, list(leaves.values()), part.read("y", dy).to(y.dtype), allow_unused=True)
        for (name, total), grad in zip(totals.items(), found, strict=True):
            if grad is not None:
                part.add(name, total, grad.to(total.dtype))
    q, k, v = (totals[name] for name in ("q", "k", "v"))
    return Gradients(q, k, v, operands=values.operand_gradients(totals))
