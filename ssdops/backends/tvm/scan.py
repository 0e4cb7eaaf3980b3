"""A linear term on its tensors: Y and every gradient as walks and scores (`lower.py`), each with q, k and v in other roles.

    |    | q, k, v    | G          | direction   | u, w          | enters → leaves    |
    | Y  | q, k, v    | ⟨q, k⟩     | the term's  | rows, cols    | initial → final    |
    | dQ | dY, v, k   | ⟨dY, v⟩    | the term's  | rows, cols    | initialᵀ           |
    | dV | k, q, dY   | ⟨q, k⟩ᵀ    | the other's | cols, rows    | dfinal → dinitial  |
    | dK | v, dY, q   | ⟨dY, v⟩ᵀ   | the other's | cols, rows    | dfinalᵀ            |

with the whole factor in `rows`, and log_cols beside cols. States are [dstate, headdim] here, or [headdim, dstate] in dQ and dK.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import gcd
from typing import NamedTuple

import torch
from torch import Tensor

from ...ir.problem import common_heads
from ...ir.terms import Linear
from ..base import Config, Cotangents, Gradients, Inputs, Output, reduce_value
from . import build
from .tile import KEPT, LANES, MET, Tile

CHUNK = 32
"""Tokens of a chunk by default."""
MOST = 4
"""Heads of a backward pass at once, if they fill the threads."""


@dataclass(frozen=True)
class Sides:
    """What weighs rows and columns: u and w, and logs that are added to ρ and taken from κ; `[tokens, nheads]` all."""

    u: Tensor
    w: Tensor
    r: Tensor
    c: Tensor

    def swapped(self) -> Sides:
        """Of the transposed mask."""
        return Sides(self.w, self.u, self.c, self.r)

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """In the order that programs take them."""
        return self.u, self.w, self.r, self.c


class Heads(NamedTuple):
    """Some of them."""

    first: int
    number: int
    of: int


class Place(NamedTuple):
    """A tensor that is written from one of its heads on."""

    values: Tensor
    first: int = 0


class Scores(NamedTuple):
    """Scores, and which of its heads is head h's: (h − first) / share."""

    values: Tensor
    first: int
    share: int


class Scan:
    """A linear term on its tensors."""

    def __init__(self, term: Linear, x: Inputs, config: Config) -> None:
        p = x.problem
        self.term, self.x, self.problem, self.acc, self.chunk = term, x, p, p.accumulate, config.chunk_size or CHUNK
        self.tokens, self.scale = p.batch * p.seqlen, float(term.sign * x.scale)
        self.q, self.k, self.v = (self.flat(t) for t in (x.q, x.k, x.v))
        rows = torch.arange(p.batch + 1) * p.seqlen if x.boundaries is None else x.boundaries
        self.begin = rows.to(torch.int64).contiguous()
        self.rows = len(rows) - 1
        self.slots = self.tokens // self.chunk + self.rows
        zeros = torch.zeros(self.tokens, p.nheads, dtype=torch.float64)
        logs = {name: zeros if (log := self.slot(name, torch.float64)) is None else log for name in ("log_a", "log_cols")}
        scales = {name: self.ones() if (value := self.slot(name, self.acc)) is None else value for name in ("rows", "cols")}
        self.d = logs["log_a"]
        self.sides = Sides(scales["rows"] * self.scale, scales["cols"], zeros, logs["log_cols"])

    def flat(self, x: Tensor) -> Tensor:
        """`(batch, seqlen, heads, size)` as `[tokens, heads, size]`, in the dtype of arithmetic."""
        return x.to(self.acc).contiguous().view(self.tokens, *x.shape[2:])

    def slot(self, name: str, dtype: torch.dtype) -> Tensor | None:
        """An operand per token and head, `[tokens, nheads]`."""
        x = self.x.per_head(name)
        return None if x is None else x.to(dtype).reshape(self.tokens, self.problem.nheads).contiguous()

    def ones(self) -> Tensor:
        """A scale of 1."""
        return torch.ones(self.tokens, self.problem.nheads, dtype=self.acc)

    def empty(self, *shape: int) -> Tensor:
        """Memory; zeros where documents may leave tokens out."""
        make = torch.empty if self.x.documents is None else torch.zeros
        return make(shape, dtype=self.acc)

    # --- programs -------------------------------------------------------------------------------------------------------

    def tile(self, inner: int, outer: int = 0, flipped: bool = False, mode: str = "") -> Tile:
        """What to compile for."""
        whole = padded(inner) == inner and padded(outer) == outer
        return Tile(str(self.acc).removeprefix("torch."), self.chunk, padded(inner), padded(outer), whole, flipped, mode)

    def scores(self, q: Tensor, k: Tensor, heads: Heads) -> Tensor:
        """⟨q, k⟩ of the tokens of each chunk, `[slots, heads, chunk, chunk]`."""
        out = torch.empty(self.slots, heads.number, self.chunk, self.chunk, dtype=self.acc)
        if self.tokens:
            build.program("scores", self.tile(q.shape[2]))(q, k, self.begin, out, heads.first, heads.of)
        return out

    def walk(
        self, roles: tuple[Tensor, Tensor, Tensor], g: Scores, entering: Tensor | None, term: Linear, sides: Sides,
        heads: Heads, y: Place, own: Tensor | None = None, mode: str = "", kept: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        """Write y to its place.

        Returns:
            The state that leaves, and with a mode what is exchanged through states: by tokens, and by chunks.
        """
        (q, k, v), shape = roles, (self.rows, heads.number, roles[0].shape[2], roles[2].shape[2])
        entering = torch.zeros(shape, dtype=self.acc) if entering is None else entering
        if not self.tokens:
            return entering, self.empty(0, heads.number), torch.empty(0, heads.number, dtype=self.acc)
        leaving, dots = torch.empty(shape, dtype=self.acc), self.empty(self.tokens, heads.number)
        kept = entering if kept is None else kept  # what a mode does not touch is any tensor of such a shape
        through = torch.empty(len(kept), heads.number, dtype=self.acc)
        build.program("walk", self.tile(shape[2], shape[3], term is not self.term, mode))(
            q, k, v, g.values, self.d, *sides.tensors, self.begin, entering, y.values, leaving, v if own is None else own, dots,
            kept, kept, through, heads.first, y.first, g.first, g.share, *numbers(term),
        )  # fmt: skip
        return leaving, dots, through

    # --- passes ---------------------------------------------------------------------------------------------------------

    def forward(self) -> Output:
        """Y, the final states, and those between."""
        p, every, heads = self.problem, self.problem.state_every, Heads(0, self.problem.nheads, self.problem.nheads)
        initial = None if self.x.initial is None else swapped(self.x.initial.to(self.acc))
        kept = None if every is None else torch.empty(self.slots, p.nheads, p.dstate, p.headdim, dtype=self.acc)
        y = self.empty(self.tokens, p.nheads, p.headdim)
        roles, mode = (self.q, self.k, self.v), "" if every is None else KEPT
        final, _, _ = self.walk(roles, self.shared_scores(), initial, self.term, self.sides, heads, Place(y), None, mode, kept)
        between = None if kept is None else self.every(kept, final)
        return Output(y.view(p.batch, p.seqlen, p.nheads, p.headdim), final.transpose(-1, -2), every=between)

    def shared_scores(self) -> Scores:
        """⟨q, k⟩, once for heads that share both."""
        p, groups = self.problem, common_heads(self.problem)
        return Scores(self.scores(self.q, self.k, Heads(0, groups, groups)), 0, p.nheads // groups)

    def every(self, kept: Tensor, final: Tensor) -> Tensor:
        """The states after every `state_every` tokens: each enters the chunk after them, or is the last."""
        p, every = self.problem, self.problem.state_every
        assert every is not None  # states were kept for it
        out = torch.empty(p.batch, p.seqlen // every, p.nheads, p.headdim, p.dstate, dtype=p.state_dtype)
        for row in range(p.batch):
            first = row * p.seqlen // self.chunk + row
            for index in range(p.seqlen // every):
                end = (index + 1) * every
                out[row, index] = (final[row] if end == p.seqlen else kept[first + end // self.chunk]).transpose(-1, -2)
        return out

    def backward(self, cotangents: Cotangents) -> Gradients:
        """Gradients of everything: dV of all heads, the rest of some heads at a time, in memory that is used again."""
        p, x, other, back = self.problem, self.x, self.term.transpose(), self.sides.swapped()
        dy, dfinal = self.flat(cotangents.y), None if cotangents.state is None else cotangents.state.to(self.acc)
        initial = None if x.initial is None else x.initial.to(self.acc)
        qk, whole = self.shared_scores(), Heads(0, p.nheads, p.nheads)
        sizes = ((p.q_heads, p.dstate), (p.k_heads, p.dstate), (p.v_heads, p.headdim))
        dq, dk, dv = (Total(self, heads, size) for heads, size in sizes)
        dinitial, _, _ = self.walk(
            (self.k, self.q, dy), qk, None if dfinal is None else swapped(dfinal), other, back, whole, dv.place(whole)
        )
        dv.add(whole)
        by_token = {name: self.empty(self.tokens, p.nheads) for name in ("log_a", "rows", "cols")} if x.values else {}
        count = self.heads_at_once()
        kept = torch.empty(self.slots, count, p.headdim, p.dstate, dtype=self.acc) if x.values else None
        for first in range(0, p.nheads, count):
            heads = Heads(first, count, p.nheads)
            before, after = (None if s is None else s[:, first : first + count].contiguous() for s in (initial, dfinal))
            yv = Scores(self.scores(dy, self.v, heads), first, 1)
            _, entering, _ = self.walk(
                (dy, self.v, self.k), yv, before, self.term, self.sides, heads, dq.place(heads), self.q,
                KEPT if x.values else "", kept,
            )  # fmt: skip
            dq.add(heads)
            _, leaving, through = self.walk(
                (self.v, dy, self.q), yv, after, other, back, heads, dk.place(heads), self.k, MET if x.values else "", kept
            )
            dk.add(heads)
            if x.values and self.tokens:
                self.exchange(heads, qk, yv, entering, leaving, through, by_token)
        grads = Gradients(dq.gradient, dk.gradient, dv.gradient, None if initial is None else dinitial.transpose(-1, -2))
        if "rows" in x.values:
            by_token["rows"] *= self.scale
        if "log_cols" in x.values:
            by_token["log_cols"] = by_token["cols"] * self.sides.w
        grads.values = {
            slot: reduce_value(by_token[slot].view(p.batch, p.seqlen, p.nheads), value) for slot, value in x.values.items()
        }
        return grads

    def heads_at_once(self) -> int:
        """So few heads that what they hand on stays in cache, which share operands with one another or with none beside."""
        p = self.problem
        shared = gcd(*(p.nheads // heads for heads in (p.q_heads, p.k_heads) if heads < p.nheads)) or p.nheads
        return max((n for n in range(1, MOST + 1) if shared % n == 0 and n * self.rows >= build.THREADS), default=shared)

    def exchange(
        self, heads: Heads, qk: Scores, yv: Scores, entering: Tensor, leaving: Tensor, through: Tensor, out: dict[str, Tensor]
    ) -> None:
        """Gradients by token and head, of some heads: of log decays, and of what weighs rows and columns."""
        apart = 2 if self.term.col_inclusive and not self.term.row_inclusive else 1
        build.program("exchange", self.tile(0))(
            qk.values, yv.values, self.d, *self.sides.tensors, self.begin, entering, leaving, through,
            out["log_a"], out["rows"], out["cols"], heads.first, *numbers(self.term), apart,
        )  # fmt: skip


class Total:
    """A gradient `[tokens, heads, size]`, summed over the heads that share it as they come."""

    def __init__(self, scan: Scan, heads: int, size: int) -> None:
        self.scan, self.heads, self.size = scan, heads, size
        self.share = scan.problem.nheads // heads
        self.total = (
            torch.zeros(scan.tokens, heads, size, dtype=scan.acc) if self.share > 1 else scan.empty(scan.tokens, heads, size)
        )
        self.room: Tensor | None = None

    def place(self, heads: Heads) -> Place:
        """Where a walk writes: to the total itself, or beside it."""
        if self.share == 1:
            return Place(self.total, heads.first)
        if self.room is None:
            self.room = self.scan.empty(self.scan.tokens, heads.number, self.size)
        return Place(self.room)

    def add(self, heads: Heads) -> None:
        """What a walk has written."""
        if self.room is None:
            return
        for index in range(heads.number):  # a sum over an axis between others takes torch more than twice as long
            self.total[:, (heads.first + index) // self.share] += self.room[:, index]

    @property
    def gradient(self) -> Tensor:
        """As the operand is shaped."""
        p = self.scan.problem
        return self.total.view(p.batch, p.seqlen, self.heads, self.size)


def forward(term: Linear, x: Inputs, config: Config) -> Output:
    """Y, the final states, and those between."""
    with build.Alone():
        return Scan(term, x, config).forward()


def backward(term: Linear, x: Inputs, config: Config, cotangents: Cotangents) -> Gradients:
    """Gradients of everything."""
    with build.Alone():
        return Scan(term, x, config).backward(cotangents)


def numbers(term: Linear) -> tuple[int, int, int, int]:
    """The flags of a term as programs take them."""
    return int(term.causal), int(term.row_inclusive), int(term.col_inclusive), int(term.strict)


def swapped(state: Tensor) -> Tensor:
    """A state with its last axes the other way, in order."""
    return state.transpose(-1, -2).contiguous()


def padded(size: int) -> int:
    """The tile that holds a size."""
    return -(-size // LANES) * LANES
