"""What a structured term reads: the values of its operands, and their gradients back to the operands."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ..ir import nodes as n
from ..ir import operands as ops
from ..ir.passes.structure import Structure
from ..ir.problem import Problem
from ..ir.resolve import resolve
from .base import Inputs, bind


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
        self.tensors: dict[str, Tensor] = {"q": x.q, "k": x.k, "v": x.v, **values}

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
