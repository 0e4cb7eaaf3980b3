"""A term on a GPU: walks along rows, and a backward pass by chunks between them.

Y and dV are walks (`walk.py`), each with q, k and v in other roles, and so are the states that a backward pass wants: S before
each chunk, and D, the cotangents of the states after it, which dV's walk carries:

    |    | q, k, v    | G          | direction   | u, w          | enters → leaves    |
    | Y  | q, k, v    | ⟨q, k⟩     | the term's  | rows, cols    | initial → final    |
    | S  | –, k, v    | –          | the term's  | –, cols       | initial            |
    | dV | k, q, dY   | ⟨q, k⟩ᵀ    | the other's | cols, rows    | dfinal → dinitial  |

with log_cols beside cols. States are [dstate, headdim] here. From S and D, `group.py` makes everything else.
"""

from __future__ import annotations

from math import gcd
from typing import NamedTuple

import torch
from torch import Tensor

from ..base import Cotangents, Gradients, Output
from .scan import Heads, Scan, Scores, Sides
from .tile import EVERY, EXCHANGE, KEPT, LANES, STARTS, STATES, SUMS

ROOM = 3 << 29
"""Bytes of states that a backward pass holds at once."""
TWICE, MORE = 1.45, 30.0
"""Of rows in segments: a pass for the states between them and the walk, in walks, and in chunks what else is launched."""


class Place(NamedTuple):
    """A tensor that is written from one of its heads on."""

    values: Tensor
    first: int = 0


class Parts(NamedTuple):
    """Sizes of a walk's tiles, whether it loads ahead, and how many programs share v."""

    inner: int
    outer: int
    ahead: bool
    number: int


class OnGpu(Scan):
    """A linear term on tensors of a GPU."""

    def forward(self, save: bool = False) -> Output:
        """Y, the final states, and those between; with `save`, what there is per token and chunk, and where segments start."""
        p, every = self.problem, self.problem.state_every
        initial = None if self.x.initial is None else swapped(self.x.initial.to(self.acc))
        kept = None if every is None else self.new(self.slots, p.nheads, p.dstate, p.headdim)
        y = self.covered(self.tokens, p.nheads, p.headdim, dtype=self.data)
        roles, mode = (self.q, self.k, self.v), "" if every is None else EVERY
        qk, sides = self.shared_scores(), self.sides(self.term)
        starts = self.starts(roles, qk, initial, sides, self.all_heads)
        final = self.walk(roles, qk, starts, sides, self.all_heads, Place(y), mode, kept).transpose(-1, -2)
        between = None if kept is None else self.every(kept, final)
        saved = (qk.values, sides.lines, sides.total, starts) if save else ()
        return Output(self.shaped(y), final, saved, between)

    @property
    def all_heads(self) -> Heads:
        """All of them."""
        return Heads(0, self.problem.nheads, self.problem.nheads)

    def saved(self, cotangents: Cotangents) -> tuple[Scores, Sides, Tensor]:
        """What the forward pass saved, or would have."""
        p = self.problem
        if cotangents.saved:
            scores, lines, total, starts = cotangents.saved
            return Scores(scores, 0, p.nheads // scores.shape[1]), Sides(self.term, lines, total), starts
        initial = None if self.x.initial is None else swapped(self.x.initial.to(self.acc))
        qk, sides = self.shared_scores(), self.sides(self.term)
        return qk, sides, self.starts((self.q, self.k, self.v), qk, initial, sides, self.all_heads)

    def backward(self, cotangents: Cotangents) -> Gradients:
        """Gradients of everything, of some heads at a time, in memory that is used again."""
        p, x = self.problem, self.x
        qk, mine, starts = self.saved(cotangents)
        other = self.sides(self.term.transpose())
        dy, dfinal = self.flat(cotangents.y), None if cotangents.state is None else cotangents.state.to(self.acc)
        dv = Total(self, p.v_heads, p.headdim)
        dq, dk = (self.zeros(heads, p.dstate) for heads in (p.q_heads, p.k_heads))
        dinitial = self.new(self.rows, p.nheads, p.headdim, p.dstate)
        by_token = {name: self.covered(self.tokens, p.nheads) for name in ("log_a", "rows", "cols")} if x.values else {}
        count = self.heads_at_once()
        before, after = (self.new(self.slots, count, p.dstate, p.headdim, dtype=self.data) for _ in range(2))
        for first in range(0, p.nheads, count):
            heads = Heads(first, count, p.nheads)
            leaving = None if dfinal is None else swapped(dfinal[:, first : first + count])
            entering, back = starts[:, first : first + count].contiguous(), (self.k, self.q, dy)
            self.walk((self.q, self.k, self.v), qk, entering, mine, heads, Place(self.v), STARTS, before)
            entering = self.starts(back, qk, leaving, other, heads)
            left = self.walk(back, qk, entering, other, heads, dv.place(heads), KEPT, after)
            dinitial[:, first : first + count] = left.transpose(-1, -2)
            dv.add(heads)
            if self.tokens:
                self.group(heads, dy, qk, mine, (before, after), (dq, dk), by_token)
        initial = None if x.initial is None else dinitial
        return Gradients(self.shaped(dq), self.shaped(dk), self.shaped(dv.total), initial, self.by_slot(by_token))

    def group(
        self, heads: Heads, dy: Tensor, qk: Scores, sides: Sides, states: tuple[Tensor, Tensor],
        totals: tuple[Tensor, Tensor], by_token: dict[str, Tensor],
    ) -> None:  # fmt: skip
        """Add to the gradients of q and k, and write those of what weighs tokens, of some heads."""
        p, machine, term = self.problem, self.machine, self.term
        inner = machine.inner(p.headdim)
        outer, ahead = machine.part(inner, p.dstate, self.chunk)
        parts = -(-p.dstate // outer)
        walked = self.walked(heads.number, parts)
        runs = heads.number // walked
        rooms = [self.new(self.slots, runs, self.chunk, parts * outer) for _ in totals]
        exchanged = self.slots if by_token else 1
        sums = self.new(exchanged, heads.number, SUMS, self.chunk)
        met = self.new(exchanged, heads.number, parts, 2, self.chunk)
        through = self.new(exchanged, heads.number, parts, LANES)
        apart = 2 if term.col_inclusive and not term.row_inclusive else 1
        self.program(
            "group", inner=inner, outer=outer, whole=inner == p.headdim and not p.dstate % outer,
            mode=EXCHANGE if by_token else "", ahead=ahead,
        )(
            self.q, self.k, self.v, dy, qk.values, sides.lines, sides.total, self.chunks, *states, *rooms, sums, met, through,
            self.seqlen, heads.first, walked, int(term.causal), int(term.strict), apart,
        )  # fmt: skip
        for total, room in zip(totals, rooms, strict=True):
            share = p.nheads // total.shape[1]
            first, number = heads.first // share, max(1, heads.number // share)
            by_head = room.view(self.slots, number, runs // number, self.chunk, -1).sum(2) if runs > number else room
            total[:, first : first + number] += self.by_tokens(by_head)[..., : p.dstate]
        if by_token:
            self.program("settle")(
                sums, met, through, sides.lines, self.chunks, by_token["log_a"], by_token["rows"], by_token["cols"], self.scale,
                self.seqlen, heads.first, int(term.causal), int(term.row_inclusive), int(term.col_inclusive),
            )  # fmt: skip

    def walked(self, count: int, parts: int) -> int:
        """How many heads that share q and k a program walks over: the most of which there are programs enough."""
        p = self.problem
        together = gcd(count, p.nheads // p.q_heads, p.nheads // p.k_heads)
        enough = 2 * p.target.multiprocessors  # so that the last round is not much of them
        able = [n for n in range(together, 0, -1) if together % n == 0]
        return next((n for n in able if self.slots * parts * (count // n) >= enough), 1)

    def by_tokens(self, x: Tensor) -> Tensor:
        """`[slots, heads, chunk, size]` as `[tokens, heads, size]`: 0 where no row has a token."""
        x = x.transpose(1, 2)
        if self.seqlen >= 0:
            return x.reshape(self.rows, -1, *x.shape[2:])[:, : self.seqlen].flatten(0, 1)
        token = self.chunks[:, :1] + torch.arange(self.chunk, device=self.device)
        place = torch.where(token < self.chunks[:, 1:], token, self.tokens)  # what no row has goes behind the last
        out = x.new_zeros(self.tokens + 1, *x.shape[2:])
        out[place.flatten()] = x.flatten(0, 1)
        return out[:-1]

    def zeros(self, heads: int, size: int) -> Tensor:
        """Where sums begin, `[tokens, heads, size]`."""
        return torch.zeros(self.tokens, heads, size, dtype=self.acc, device=self.device)

    def heads_at_once(self) -> int:
        """As many heads as there is `ROOM` for, which are whole groups that share an operand, or of one."""
        p = self.problem
        shares = [p.nheads // heads for heads in (p.q_heads, p.k_heads, p.v_heads)]
        each = 2 * self.slots * p.headdim * p.dstate * self.data.itemsize
        able = (n for n in range(p.nheads, 0, -1) if p.nheads % n == 0 and all(suits(n, share) for share in shares))
        return next((n for n in able if n * each <= ROOM), 1)

    def starts(
        self, roles: tuple[Tensor, Tensor, Tensor], g: Scores, entering: Tensor | None, sides: Sides, heads: Heads
    ) -> Tensor:
        """The states that enter rows, or segments of rows that are walked side by side, `[rows, heads, inner, outer]`."""
        segments = self.segments(heads.number * self.parts(roles).number) if self.tokens else 1
        shape = (self.rows, heads.number, roles[0].shape[2], roles[2].shape[2])
        if segments == 1:
            return torch.zeros(shape, dtype=self.acc, device=self.device) if entering is None else entering
        none = torch.zeros(self.rows * segments, *shape[1:], dtype=self.acc, device=self.device)
        left = self.walk(roles, g, none, sides, heads, Place(roles[2]), STATES)
        return self.between(left, entering, sides, heads)

    def walk(
        self, roles: tuple[Tensor, Tensor, Tensor], g: Scores, starts: Tensor, sides: Sides, heads: Heads, y: Place,
        mode: str = "", kept: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """Write y to its place, and keep what the mode says; the states that leave rows, or with `STATES` segments of them."""
        if not self.tokens:
            return starts
        (q, k, v), segments = roles, len(starts) // self.rows
        inner, outer, ahead, parts = self.parts(roles)
        leaving = self.new(*starts.shape)
        kept = self.new(1, *starts.shape[1:], dtype=self.data) if kept is None else kept  # which nobody writes then
        flipped = mode not in (STATES, STARTS) and sides.term is not self.term
        whole = inner == q.shape[2] and not v.shape[2] % outer
        self.program("walk", inner=inner, outer=outer, whole=whole, flipped=flipped, mode=mode, ahead=ahead)(
            q, k, v, g.values, sides.lines, sides.total, self.begin, starts, y.values, leaving, kept, parts, heads.first,
            y.first, g.first, g.share, 1, self.seqlen // segments, int(sides.term.causal), int(sides.term.strict),
        )  # fmt: skip
        if mode == STATES or segments == 1:
            return leaving
        return leaving.unflatten(0, (self.rows, segments))[:, -1 if sides.term.causal else 0].contiguous()

    def parts(self, roles: tuple[Tensor, Tensor, Tensor]) -> Parts:
        """Tiles of a walk, and how many programs share v."""
        inner = self.machine.inner(roles[0].shape[2])
        outer, ahead = self.machine.outer(inner, roles[2].shape[2], self.chunk)
        return Parts(inner, outer, ahead, -(-roles[2].shape[2] // outer))

    def segments(self, programs: int) -> int:
        """Into how many segments to cut rows, which are walked side by side after a pass for the states between them.

        So many that chunks which wait for one another are fewest, counting that pass as `TWICE` and what it launches as `MORE`.
        """
        if self.seqlen < 0 or self.seqlen % self.chunk:
            return 1
        chunks, at_once = self.seqlen // self.chunk, self.problem.target.multiprocessors

        def waiting(count: int) -> float:
            turns = -(-programs * self.rows * count // at_once)
            return turns * chunks / count * (1 if count == 1 else TWICE) + (0 if count == 1 else MORE)

        return min((count for count in (1, 2, 4, 8, 16) if chunks % count == 0), key=waiting)

    def between(self, left: Tensor, entering: Tensor | None, sides: Sides, heads: Heads) -> Tensor:
        """The states that enter segments, from those that each would leave behind if none entered it."""
        segments, out = len(left) // self.rows, self.new(*left.shape)
        first = self.unread(1, 1, 1) if entering is None else entering.flatten(2)
        self.program("between")(
            left.flatten(2), sides.total, first, out.flatten(2), segments, self.slots // len(left), heads.first,
            int(entering is not None), int(sides.term.causal),
        )  # fmt: skip
        return out


class Total:
    """A gradient `[tokens, heads, size]`, summed over the heads that share it as they come."""

    def __init__(self, scan: OnGpu, heads: int, size: int) -> None:
        self.scan, self.heads, self.size = scan, heads, size
        self.share = scan.problem.nheads // heads
        if self.share > 1:
            self.total = torch.zeros(scan.tokens, heads, size, dtype=scan.acc, device=scan.device)
        else:
            self.total = scan.covered(scan.tokens, heads, size, dtype=scan.data)
        self.room: Tensor | None = None

    def place(self, heads: Heads) -> Place:
        """Where a walk writes: to the total itself, or beside it."""
        if self.share == 1:
            return Place(self.total, heads.first)
        if self.room is None:
            self.room = self.scan.covered(self.scan.tokens, heads.number, self.size, dtype=self.scan.data)
        return Place(self.room)

    def add(self, heads: Heads) -> None:
        """What a walk has written."""
        if self.room is None:
            return
        share = min(self.share, heads.number)
        first, number = heads.first // self.share, heads.number // share
        self.total[:, first : first + number] += self.room.view(-1, number, share, self.size).sum(2, dtype=self.scan.acc)


def swapped(state: Tensor) -> Tensor:
    """A state with its last axes the other way, in order."""
    return state.transpose(-1, -2).contiguous()


def suits(number: int, shared: int) -> bool:
    """Whether so many heads share with one another, or are whole groups that do."""
    return shared % number == 0 or number % shared == 0
