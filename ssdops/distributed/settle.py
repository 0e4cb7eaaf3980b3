"""A mask's normal form over plain operands of one slice: expressions are evaluated, with neighbours' tokens where they move.

`trapezoidal` reads the next token's β, which at a slice's last token is the next rank's; a delayed row scale reads the token
before. Everything else about a slice of a semiseparable mask is a mask of the same kind.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache

import torch
from torch import Tensor

from ..backends.base import exponent_dtype
from ..errors import UnsupportedError
from ..ir import nodes as n
from ..ir import operands as ops
from ..ir.operands import Operand
from ..ir.problem import Problem
from ..ir.resolve import resolve, segment_ids
from ..ir.terms import Diagonal, Linear, Term, factored_operands
from ..masks import Mask
from ..plan import terms_of
from .agree import Team
from .halo import halo


def settled(mask: Mask, problem: Problem, team: Team, lengths: Sequence[int]) -> Mask:
    """The mask of this rank's slice whose terms name their operands: itself, if they do already."""
    if is_plain(mask.tree):
        return mask
    tensors: dict[str, Tensor] = {}
    terms = [_Settling(index, mask, problem, team, lengths, tensors).term(t) for index, t in enumerate(terms_of(mask.tree))]
    return Mask(n.sum_of(*(term.node() for term in terms)), tensors)


@lru_cache(maxsize=4096)
def is_plain(tree: n.Node) -> bool:
    """Whether its terms name their operands, so that nothing has to be evaluated, or asked of a neighbour."""
    operands = [x for term in terms_of(tree) for x, _ in factored_operands(term).values()]
    packings = [x for term in terms_of(tree) if isinstance(term, Linear) for x in _documents(term)]
    return all(isinstance(x, str) for x in (*operands, *packings))


def _documents(term: Linear) -> tuple[Operand, ...]:
    node = term.documents
    return () if node is None else tuple(x for x in (node.cu_seqlens, node.segment_ids) if x is not None)


class _Settling:
    """One term of a mask, whose operands go into `tensors` under names of their own."""

    def __init__(
        self, index: int, mask: Mask, problem: Problem, team: Team, lengths: Sequence[int], tensors: dict[str, Tensor]
    ) -> None:
        self.index, self.given, self.problem, self.team, self.lengths = index, mask.operands, problem, team, lengths
        self.tensors = tensors

    def term(self, term: Term) -> Term:
        """The term over names."""
        names = {slot: self._put(slot, self._value(slot, x, axes)) for slot, (x, axes) in factored_operands(term).items()}
        if isinstance(term, Diagonal):
            return replace(term, value=names.get("value"))
        assert isinstance(term, Linear)  # state_terms() has refused the rest
        channel: Operand | None = ops.ChannelLog(names["dt"], names["A"]) if "dt" in names else names.get("channel")
        return replace(
            term, channel=channel, documents=self._packing(term.documents), log_a=names.get("log_a"), rows=names.get("rows"),
            cols=names.get("cols"), log_cols=names.get("log_cols"),
        )  # fmt: skip

    def _put(self, slot: str, x: Tensor) -> str:
        name = f"{slot}_{self.index}"
        self.tensors[name] = x
        return name

    def _packing(self, node: n.Documents | None) -> n.Documents | None:
        if node is None:
            return None
        if node.cu_seqlens is not None:
            cu = resolve(node.cu_seqlens, self.given, n.BOUNDARIES, self.problem.seqlen)
            return n.Documents(cu_seqlens=self._put("cu_seqlens", cu))
        ids = segment_ids(node, self.given, self.problem.seqlen)
        return n.Documents(segment_ids=self._put("segment_ids", ids), n_segments=node.n_segments)

    def _value(self, slot: str, x: Operand, axes: str) -> Tensor:
        """An expression's value, rounded once to the accumulation dtype; a name's tensor is itself."""
        if isinstance(x, str):
            return self.given[x]
        acc = self.problem.accumulate
        dtype = exponent_dtype(self.problem) if slot in ("log_a", "channel", "log_cols") else acc
        wide = {name: self.given[name].to(dtype) for name in ops.names(x)}
        return resolve(self._unmoved(x, axes, wide), wide, axes, self.problem.seqlen).to(acc)

    def _unmoved(self, x: Operand, axes: str, known: dict[str, Tensor], flipped: bool = False) -> Operand:
        """The expression without Advance and Delay: their values are put among what is known."""
        match x:
            case str():
                return x
            case ops.Advance(inner) | ops.Delay(inner):
                value = resolve(self._unmoved(inner, axes, known, flipped), known, axes, self.problem.seqlen)
                name = f"moved_{len(known)}"
                known[name] = self._moved(value, isinstance(x, ops.Advance), flipped)
                return name
            case ops.Add(a, b) | ops.Mul(a, b):
                return type(x)(self._unmoved(a, axes, known, flipped), self._unmoved(b, axes, known, flipped))
            case ops.Flip(inner):
                return ops.Flip(self._unmoved(inner, axes, known, not flipped))
            case ops.Exp(inner) | ops.Scaled(inner):
                return replace(x, x=self._unmoved(inner, axes, known, flipped))
            case _ if not _moves(x):
                return x
            case _:
                raise UnsupportedError(f"{x} moves along the tokens inside another expression, and is not split over ranks")

    def _moved(self, x: Tensor, advance: bool, flipped: bool) -> Tensor:
        """x one token ahead, or behind: in the order in which the expression reads it, which may be from the end."""
        x = x.expand(x.shape[0], self.problem.seqlen, *x.shape[2:])
        # what is read from the end has its next token on the rank before, and there at the end that is read first
        beside = halo(x.flip(1) if flipped else x, 1, self.team, self.lengths, after=advance != flipped)
        return torch.cat([x, beside], 1)[:, 1:] if advance else torch.cat([beside, x], 1)[:, :-1]


def _moves(x: Operand) -> bool:
    return isinstance(x, ops.Advance | ops.Delay) or any(_moves(part) for part in ops.parts(x))
