"""Structured terms part by part: Y in differentiable torch, and gradients from autograd, added where they belong.

A part reads slices of q, k, v and of what the term's operands amount to, and gives Y of them. Gradients go back the same way:
a part is computed again with its slices as leaves, so that nothing is kept of the forward pass, and memory is that of one part.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Protocol

import torch
from torch import Tensor

from ...ir import nodes as n
from ...ir import operands as ops
from ...ir.passes.structure import Structure
from ...ir.problem import Problem
from ...ir.resolve import resolve
from ..base import Gradients, Inputs, bind, exponent_dtype

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


class Values:
    """What a structured term reads: q, k, v, and its operands' values, `(batch | 1, seqlen | 1, heads, …)`.

    Attributes:
        tensors: by name: q, k, v, the slots of the scan, `levels` or `coeffs`.
        scan: the scan's own inputs, for its documents.
        leaves: operands by name, which the values are differentiable in, if that was asked for.
    """

    def __init__(self, structure: Structure, x: Inputs, learnt: bool = False) -> None:
        p = x.problem
        floats = {name: t for name, t in x.operands.items() if t.is_floating_point()} if learnt else {}
        self.leaves = {name: t.detach().requires_grad_() for name, t in floats.items()}
        operands = {**x.operands, **self.leaves}
        with torch.set_grad_enabled(learnt):
            self.scan = bind(structure.scan, p, x.q, x.k, x.v, operands, None, x.scale, x.out)
            values = dict(self.scan.values)
            for name, operand, axes in (("levels", structure.levels, n.LEVEL), ("coeffs", structure.coeffs, n.LAG)):
                if operand is not None:
                    values[name] = _value(operand, operands, axes, p)
        self.tensors: Slices = {"q": x.q, "k": x.k, "v": x.v, **values}

    def operand_gradients(self, totals: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Gradients of values → gradients of the operands that they are made of."""
        pairs = [(x, totals[name]) for name, x in self.tensors.items() if x.requires_grad and name in totals]
        if not pairs or not self.leaves:
            return {}
        outs, grads = [x for x, _ in pairs], [grad.to(x.dtype) for x, grad in pairs]
        found = torch.autograd.grad(outs, list(self.leaves.values()), grads, allow_unused=True, materialize_grads=True)
        return dict(zip(self.leaves, found, strict=True))


def _value(x: ops.Operand, operands: Mapping[str, Tensor], axes: str, p: Problem) -> Tensor:
    wide = {name: operands[name] if isinstance(x, str) else operands[name].to(p.accumulate) for name in ops.names(x)}
    return resolve(x, wide, axes, p.seqlen)


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
