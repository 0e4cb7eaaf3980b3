"""What is tuned: one term on one problem, in one direction, as a value that is plain data.

Operand names, signs and the expressions that operands come from are no part of it, as every backend is handed their values; so
all masks whose normal form has a term of one structure share what was measured of it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields, replace
from functools import lru_cache
from typing import Any

import torch

from ..errors import MaskError, TuningError
from ..ir import nodes as n
from ..ir.passes.normalize import normalize
from ..ir.problem import FLOATS, Problem, Target
from ..ir.terms import Diagonal, Linear, Quadratic, Term
from ..ir.text import parse
from ..ir.verify import verify

DIRECTIONS = ("forward", "backward", "step")
"""A pass without gradients; both passes of a call that is learnt from, measured together; and a few tokens from a state to the
next, where they run as a sequence and not by a decode kernel, of which there is one and nothing to choose."""
DTYPES = tuple(str(dtype).removeprefix("torch.") for dtype in FLOATS)


@dataclass(frozen=True, slots=True)
class Workload:
    """One term, sized.

    Attributes:
        term: the term's mask as text, over canonical operand names.
        direction: one of DIRECTIONS.
        dtype: of q, k and v, promoted.
        accumulate: float64 if any floating input is, else float32.
        documents: into how many documents rows are packed, in all; 0 where they are not, or do not say.
        state_every: tokens after which states between are wanted; 0 is none of them.
    """

    term: str
    direction: str
    dtype: str
    accumulate: str
    batch: int
    seqlen: int
    nheads: int
    headdim: int
    dstate: int
    q_heads: int
    k_heads: int
    v_heads: int
    documents: int = 0
    state_every: int = 0

    @staticmethod
    def of(term: Term, problem: Problem, direction: str) -> Workload | None:
        """The workload of a term; None where its text does not read back as that one term."""
        p, text = problem, canonical_text(term)
        if text is None:
            return None
        packed = isinstance(term, Linear) and term.documents is not None
        return Workload(
            text, direction, _name(p.dtype), _name(p.accumulate), p.batch, p.seqlen, p.nheads, p.headdim, p.dstate,
            p.q_heads, p.k_heads, p.v_heads, (p.n_states or 0) if packed else 0, p.state_every or 0,
        )  # fmt: skip

    @property
    def term_of(self) -> Term:
        """The term.

        Raises:
            TuningError: the text is not that of one term in its canonical form.
        """
        try:
            terms = normalize(verify(parse(self.term)))
        except MaskError as error:
            raise TuningError(f"the term of a workload is no mask: {error}") from None
        if len(terms) != 1 or canonical_text(terms[0]) != self.term:
            raise TuningError(f"{_abridged(self.term)} is not one term in the form that workloads have")
        return terms[0]

    def problem(self, target: Target) -> Problem:
        """The problem on a target, of tensors that are contiguous, without initial states."""
        heads = ((self.q_heads, self.dstate), (self.k_heads, self.dstate), (self.v_heads, self.headdim))
        strides = tuple((self.seqlen * count * dim, count * dim, dim, 1) for count, dim in heads)
        dtype, accumulate = getattr(torch, self.dtype), getattr(torch, self.accumulate)
        return Problem(
            self.batch, self.seqlen, self.nheads, self.headdim, self.dstate, self.q_heads, self.k_heads, self.v_heads,
            dtype, accumulate, accumulate, self.documents or self.batch, False, strides, target, self.state_every or None,
        )  # fmt: skip

    def bucket(self) -> Workload:
        """The workload that stands for all of its bucket: batch, seqlen and documents `rounded`, and everything else exact."""
        return replace(self, batch=rounded(self.batch), seqlen=rounded(self.seqlen), documents=rounded(self.documents))

    def to_json(self) -> dict[str, str | int]:
        """As JSON has it."""
        return asdict(self)

    @staticmethod
    def from_json(data: Any) -> Workload:
        """The inverse.

        Raises:
            TuningError: what is wrong with it.
        """
        if not isinstance(data, dict) or set(data) != set(_KINDS):
            raise TuningError(f"a workload has the fields {', '.join(_KINDS)}, got {_abridged(data)}")
        for name, kind in _KINDS.items():
            if type(data[name]) is not kind or (kind is int and not 0 <= data[name] < 2**40):
                raise TuningError(f"{name} of a workload must be {_KIND_NAMES[kind]}, got {_abridged(data[name])}")
        found = Workload(**data)
        for name, known in (("direction", DIRECTIONS), ("dtype", DTYPES), ("accumulate", DTYPES)):
            if data[name] not in known:
                raise TuningError(f"{name} of a workload must be one of {', '.join(known)}, got {_abridged(data[name])}")
        return found

    def __str__(self) -> str:
        sizes = (self.batch, self.seqlen, self.nheads, self.headdim, self.dstate)
        heads = f"q {self.q_heads}, k {self.k_heads}, v {self.v_heads}"
        return f"{self.term} {sizes} ({heads}) {self.dtype} {self.direction}"


_KINDS = {f.name: int if f.type == "int" else str for f in fields(Workload)}
_KIND_NAMES = {int: "an integer from 0 on", str: "text"}


def rounded(count: int) -> int:
    """The least of 0, 1, 2, 3, 4, 6, 8, 12, 16, … (powers of two, and those half as large again) that is no less than count.

    >>> [rounded(count) for count in (0, 1, 5, 100, 2048, 2049)]
    [0, 1, 6, 128, 2048, 3072]
    """
    if count <= 2:
        return count
    power = 1 << (count - 1).bit_length()
    return power * 3 // 4 if count <= power * 3 // 4 else power


@lru_cache(maxsize=4096)
def canonical_text(term: Term) -> str | None:
    """The text of the canonical term, if that reads back as the term."""
    simple = canonical(term)
    return str(simple.node()) if normalize(simple.node()) == (simple,) else None


def canonical(term: Term) -> Term:
    """The same structure over operands that have the names of their slots, with the sign +."""
    match term:
        case Linear():
            slots = ("log_a", "channel", "rows", "cols", "log_cols")
            named: dict[str, Any] = {slot: slot for slot in slots if getattr(term, slot) is not None}
            documents = None if term.documents is None else _simple(term.documents, iter(("documents",)))
            return replace(term, **named, documents=documents, sign=1)
        case Diagonal(value):
            return Diagonal(None if value is None else "value")
        case Quadratic(mask):
            return Quadratic(_simple(mask, (f"x{i}" for i in range(10**6))))


def _simple(node: n.Node, fresh: Iterator[str]) -> Any:
    """The tree with a name of its own in every operand slot."""
    node = n.rebuild(node, tuple(_simple(child, fresh) for child in n.children(node)))
    slots = [name for name, _ in n.SLOTS[type(node)] if getattr(node, name) is not None]
    return replace(node, **{name: next(fresh) for name in slots}) if slots else node


def _name(dtype: object) -> str:
    return str(dtype).removeprefix("torch.")


def _abridged(data: object) -> str:
    text = repr(data)
    return text if len(text) <= 200 else f"{text[:200]}…"
