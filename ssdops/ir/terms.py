"""The normal form's terms: what backends are given.

A mask in normal form is a sum of terms, each of them one of

    Linear      sign · rows · [decay along a direction] · segments · cols · exp(log_cols): one semiseparable scan
    Diagonal    sign · value[i] · 1[i = j]
    Quadratic   anything else, kept as a mask tree

A linear term runs over *local time* t: the tokens in order for a causal term, from the last to the first for an
anticausal one. With d the log decays in local time, its entries are

    L[i, j] = exp(ρ_i − κ_j),  i ≥ j  (i > j if strict),

where ρ and κ are cumulative sums of d, each of them inclusive (Σ_{s≤t} d_s) or exclusive (Σ_{s<t} d_s). The state enters
row i as exp(ρ_i), and token j leaves in the final state as exp(E − κ_j), E being the whole sum. The flags say it all:

    decay(a)                 inclusive ρ, inclusive κ
    decay(a).T               anticausal, exclusive ρ, exclusive κ
    decay(a).shift(1)        exclusive ρ, inclusive κ, strict
    decay(a).reverse()       anticausal over flip(a), inclusive ρ, inclusive κ
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TypeAlias

from . import nodes as n
from . import operands as ops
from .operands import Operand


@dataclass(frozen=True, slots=True)
class Diagonal:
    """sign · value[i] · 1[i = j]; value None is 1."""

    value: Operand | None = None
    sign: int = 1

    def node(self) -> n.Node:
        """The same term as a mask tree."""
        identity = n.Product((n.Causal(), n.Transpose(n.Causal())))
        out: n.Node = identity if self.value is None else n.Diagonal(self.value)
        return n.Neg(out) if self.sign < 0 else out


@dataclass(frozen=True, slots=True)
class Linear:
    """One semiseparable scan; log_a is per token and head, or with `channel` per token, head and state channel.

    The normal form has none with a `diagonal`: a plan puts one there that a backend takes along with the scan (`steps.Step`).
    """

    causal: bool = True
    strict: bool = False
    row_inclusive: bool = True
    col_inclusive: bool = True
    log_a: Operand | None = None
    channel: Operand | None = None
    documents: n.Documents | None = None
    rows: Operand | None = None
    cols: Operand | None = None
    log_cols: Operand | None = None
    sign: int = 1
    diagonal: Diagonal | None = None

    @property
    def decays(self) -> bool:
        """Whether any decay is present; without one ρ = κ = 0 and the flags mean nothing."""
        return self.log_a is not None or self.channel is not None

    def transpose(self) -> Linear:
        """The term of L[j, i]."""
        return replace(
            self,
            causal=not self.causal,
            row_inclusive=not self.col_inclusive,
            col_inclusive=not self.row_inclusive,
            rows=self.cols if self.log_cols is None else ops.mul(self.cols, ops.Exp(self.log_cols)),
            cols=self.rows,
            log_cols=None,
        )

    def node(self) -> n.Node:
        """The same term as a mask tree."""
        out = self._core()
        if self.strict and not (self.decays and not self.row_inclusive and self.col_inclusive):
            out = n.Strict(out)
        if self.documents is not None:
            out = n.product_of(out, self.documents)
        if self.rows is not None or self.cols is not None or self.log_cols is not None:
            out = n.Scale(out, self.rows, self.cols, self.log_cols)
        out = n.Neg(out) if self.sign < 0 else out
        return out if self.diagonal is None else n.sum_of(out, self.diagonal.node())

    def _core(self) -> n.Node:
        if not self.decays:
            return n.Causal() if self.causal else n.Transpose(n.Causal())
        match self.causal, self.row_inclusive, self.col_inclusive:
            case True, True, True:
                return self._decay()
            case True, False, True:
                return n.Shift(self._decay(), 1)
            case False, False, False:
                return n.Transpose(self._decay())
            case False, False, True:
                return n.Transpose(n.Shift(self._decay(), 1))
            case False, True, True:
                return n.Reverse(self._decay(flip=True))
            case _:  # (causal, exclusive, exclusive): the others cannot arise, as (inclusive, exclusive) never does
                return n.Transpose(n.Reverse(self._decay(flip=True)))

    def _decay(self, flip: bool = False) -> n.Node:
        log_a, channel = (ops.flip(self.log_a), ops.flip(self.channel)) if flip else (self.log_a, self.channel)
        scalar = None if log_a is None else n.Decay(log_a)
        if channel is None:
            assert scalar is not None  # _decay() is asked only of terms that decay
            return scalar
        per_channel = (
            n.ChannelDecay(dt=channel.dt, A=channel.A) if isinstance(channel, ops.ChannelLog) else n.ChannelDecay(log_a=channel)
        )
        return per_channel if scalar is None else n.Product((scalar, per_channel))


@dataclass(frozen=True, slots=True)
class Quadratic:
    """A mask that has no linear form here; it runs by entries."""

    mask: n.Node

    def node(self) -> n.Node:
        """The same term as a mask tree."""
        return self.mask


Term: TypeAlias = "Linear | Diagonal | Quadratic"


@lru_cache(maxsize=4096)
def term_operands(term: Term) -> Mapping[str, tuple[Operand, str]]:
    """Slot name → (operand expression, axes) for everything a term reads, documents apart."""
    match term:
        case Linear():
            slots = {
                "log_a": (term.log_a, n.TOKEN),
                "channel": (term.channel, n.CHANNEL),
                "rows": (term.rows, n.TOKEN),
                "cols": (term.cols, n.TOKEN),
                "log_cols": (term.log_cols, n.TOKEN),
                "diagonal": (None if term.diagonal is None else term.diagonal.value, n.TOKEN),
            }
            return {name: (x, axes) for name, (x, axes) in slots.items() if x is not None}
        case Diagonal(value):
            return {} if value is None else {"value": (value, n.TOKEN)}
        case Quadratic():
            return {}


@lru_cache(maxsize=4096)
def factored_operands(term: Term) -> Mapping[str, tuple[Operand, str]]:
    """`term_operands`, except that a per-channel decay that is a product comes as its factors, in slots `dt` and `A`."""
    slots = dict(term_operands(term))
    match slots.pop("channel", (None, n.CHANNEL))[0]:
        case ops.ChannelLog(dt, big_a):
            return slots | {"dt": (dt, n.TOKEN), "A": (big_a, n.HEAD_CHANNEL)}
        case ops.Flip(ops.ChannelLog(dt, big_a)):
            return slots | {"dt": (ops.Flip(dt), n.TOKEN), "A": (big_a, n.HEAD_CHANNEL)}
    return term_operands(term)
