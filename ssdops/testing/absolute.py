"""A call on absolute values, where nothing cancels: how big the terms of its sums are, and those of its gradients.

Factors lose their signs and exponents keep them, as what they scale is positive anyway. A registered mask is what its `lower`
gives. One that has none is known by its entries: their absolute values stand for it, and its operands' gradients are
those of the entries, entry by entry in absolute values too.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..ir import nodes as n
from ..ir import operands as ops
from ..ir.evaluate import Block, Scope, dense_block
from ..ir.operands import Operand
from ..ir.resolve import resolve
from ..masks import Mask
from .case import Case

EXPONENTS = ("log_a", "log_gamma", "log_cols")
"""Slots whose values are exponents."""


class _Entries:
    """The meaning of `Given`: its operand, where what it stands for has entries."""

    causal = False

    def entries(self, node: n.Registered, at: Scope) -> Block:
        assert isinstance(node, Given)
        _, support = node.of.definition.entries(node.of, at)
        return at.operands[node.entries][:, :, at.i][:, :, :, at.j], support

    def lowered(self, node: n.Registered) -> None:
        return None


@dataclass(frozen=True, slots=True)
class Given(n.Registered):
    """Entries `(batch, nheads, seqlen, seqlen, dstate | 1)` in the place of a registered mask."""

    op: ClassVar[str] = "given"
    definition: ClassVar[n.Meaning] = _Entries()
    entries: str
    of: n.Registered


n.FIELDS[Given] = ("entries", "of")
n.SLOTS[Given] = (("entries", "batch nheads seqlen seqlen channels"),)


@dataclass
class Absolute:
    """The call, and the leaves that its gradients are taken of.

    Attributes:
        given: name of entries → the mask that they are of, and its operands with their signs.
    """

    case: Case
    leaves: dict[str, Tensor]
    given: dict[str, tuple[n.Registered, Mapping[str, Tensor]]] = field(default_factory=dict)

    def through_entries(self, found: Mapping[str, Tensor]) -> dict[str, list[Tensor]]:
        """Gradients of absolute entries → of the operands they come from: name → Σ |dL_ij| |∂L_ij/∂x|, one per mask."""
        out: dict[str, list[Tensor]] = {}
        for key, (node, operands) in self.given.items():
            for name in dict.fromkeys(n.operand_names(node)):
                if operands[name].is_floating_point():
                    out.setdefault(name, []).append(_through(node, name, operands, found[key]))
        return out


def absolute(case: Case) -> Absolute:
    """The call on absolute values."""
    inputs = [name for name in case.floats() if name not in case.mask.operands]
    floats = {name: x.detach().double() for name, x in case.floats().items()}
    leaves = {name: floats[name].abs().requires_grad_() for name in inputs}
    for name in case.mask.operands:
        if name in floats:
            leaves[name] = floats[name].clone().requires_grad_()
            leaves[factor(name)] = floats[name].abs().requires_grad_()
    operands = {**case.mask.operands, **{k: x for k, x in leaves.items() if k not in inputs}}
    maker = _Maker(case, operands, {**case.mask.operands, **floats})
    mask = Mask(maker.positive(n.lowered(case.mask.tree)), operands)
    leaves |= {key: operands[key] for key in maker.given}
    initial = tuple(leaves[f"initial_state[{i}]"] for i in range(len(case.initial)))
    big = Case(leaves["q"], leaves["k"], leaves["v"], mask, abs(case.scale), initial)
    return Absolute(big, leaves, maker.given)


def factor(name: str) -> str:
    """The name of an operand's absolute value."""
    return f"{name}__factor"


def _through(node: n.Registered, name: str, operands: Mapping[str, Tensor], entries: Tensor) -> Tensor:
    """Σ_ij entries_ij · |∂L_ij/∂x|, shaped like the operand x of that name: one derivative for each of its elements."""
    x, (batch, nheads, seqlen) = operands[name], entries.shape[:3]

    def of(x: Tensor) -> Tensor:
        value, support = dense_block(node, {**operands, name: x}, batch, seqlen, nheads)
        return torch.where(support, value, 0.0)

    def along(tangent: Tensor) -> Tensor:
        return (entries * torch.func.jvp(of, (x,), (tangent,))[1].abs()).sum()

    if not x.numel():
        return torch.zeros_like(x)
    each = torch.eye(x.numel(), dtype=x.dtype, device=x.device).reshape(-1, *x.shape)
    return torch.func.vmap(along, chunk_size=64)(each).reshape(x.shape)


class _Maker:
    """Makes the expression; puts what it needs among the operands."""

    def __init__(self, case: Case, operands: dict[str, Tensor], signed: Mapping[str, Tensor]) -> None:
        self.problem, self.operands, self.signed = case.problem, operands, signed
        self.given: dict[str, tuple[n.Registered, Mapping[str, Tensor]]] = {}

    def positive(self, node: n.Node) -> n.Node:
        """The same expression with + for every −, over the signless factors."""
        match node:
            case n.Neg(m):
                return self.positive(m)
            case n.Registered():
                return self._entries(node)
            case n.ChannelDecay(None, dt, big_a) if dt is not None and big_a is not None:
                return n.ChannelDecay(log_a=self._exponent(ops.ChannelLog(dt, big_a), n.CHANNEL))
        node = n.rebuild(node, tuple(self.positive(child) for child in n.children(node)))
        changed: dict[str, Any] = {}
        for slot, axes in n.SLOTS[type(node)]:
            x = getattr(node, slot)
            if x is None or axes in n.INTEGER_AXES:
                continue
            if slot not in EXPONENTS:
                changed[slot] = _signless(x)
            elif not isinstance(x, str):
                changed[slot] = self._exponent(x, axes)
        return replace(node, **changed) if changed else node

    def _entries(self, node: n.Registered) -> n.Node:
        p, key = self.problem, f"{node.op}__entries_{len(self.given)}"
        value, support = dense_block(node, self.signed, p.batch, p.seqlen, p.nheads)
        self.operands[key] = torch.where(support, value, 0.0).abs().requires_grad_()
        self.given[key] = node, self.signed
        return Given(key, node)

    def _exponent(self, x: Operand, axes: str) -> str:
        """The value of an expression, with the gradients that it has over signless factors; the name that it gets."""
        name = f"exponent__{len(self.operands)}"
        value = resolve(x, self.signed, axes, self.problem.seqlen)
        big = resolve(_signless(x), self.operands, axes, self.problem.seqlen)
        self.operands[name] = value + big - big.detach()
        return name


def _signless(x: Operand) -> Operand:
    """The expression over absolute values of operands and numbers; what exp is taken of keeps its signs."""
    match x:
        case str():
            return factor(x)
        case ops.Exp():
            return x
        case ops.Scaled(inner, number):
            return ops.Scaled(_signless(inner), abs(number))
        case ops.Select(inner, _) | ops.Mirror(inner, _):
            return replace(x, x=_signless(inner))
        case _:
            return type(x)(*[_signless(part) for part in ops.parts(x)])
