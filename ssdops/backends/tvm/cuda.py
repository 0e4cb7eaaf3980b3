"""A term on a GPU: Y and every gradient as walks and scores (`walk.py`), each with q, k and v in other roles.

    |    | q, k, v    | G          | direction   | u, w          | enters → leaves    |
    | Y  | q, k, v    | ⟨q, k⟩     | the term's  | rows, cols    | initial → final    |
    | dQ | dY, v, k   | ⟨dY, v⟩    | the term's  | rows, cols    | initialᵀ           |
    | dV | k, q, dY   | ⟨q, k⟩ᵀ    | the other's | cols, rows    | dfinal → dinitial  |
    | dK | v, dY, q   | ⟨dY, v⟩ᵀ   | the other's | cols, rows    | dfinalᵀ            |

with log_cols beside cols. States are [dstate, headdim] here, or [headdim, dstate] in dQ and dK.
"""

from __future__ import annotations

from math import gcd
from typing import NamedTuple

import torch
from torch import Tensor

from ..base import Cotangents, Gradients, Output
from .scan import Heads, Scan, Scores, Sides
from .tile import EVERY, KEPT, MET, STATES

ROOM = 1 << 29
"""Bytes of scores and states that a backward pass holds at once."""
TWICE, MORE = 1.45, 30.0
"""Of rows in segments: a pass for the states between them and the walk, in walks, and in chunks what else is launched."""


class Place(NamedTuple):
    """A tensor that is written from one of its heads on."""

    values: Tensor
    first: int = 0


class Parts(NamedTuple):
    """Sizes of a walk's tiles, and how many programs share v."""

    inner: int
    outer: int
    number: int


class OnGpu(Scan):
    """A linear term on tensors of a GPU."""

    def forward(self, save: bool = False) -> Output:
        """Y, the final states, and those between; nothing is saved."""
        p, every, heads = self.problem, self.problem.state_every, Heads(0, self.problem.nheads, self.problem.nheads)
        initial = None if self.x.initial is None else swapped(self.x.initial.to(self.acc))
        kept = None if every is None else self.new(self.slots, p.nheads, p.dstate, p.headdim)
        y = self.covered(self.tokens, p.nheads, p.headdim, dtype=self.data)
        roles, mode = (self.q, self.k, self.v), "" if every is None else EVERY
        final, _, _ = self.walk(roles, self.shared_scores(), initial, self.sides(self.term), heads, Place(y), None, mode, kept)
        final = final.transpose(-1, -2)
        between = None if kept is None else self.every(kept, final)
        return Output(y.view(p.batch, p.seqlen, p.nheads, p.headdim), final, every=between)

    def backward(self, cotangents: Cotangents) -> Gradients:
        """Gradients of everything: dV of all heads, the rest of some heads at a time, in memory that is used again."""
        p, x = self.problem, self.x
        mine, other = self.sides(self.term), self.sides(self.term.transpose())
        dy, dfinal = self.flat(cotangents.y), None if cotangents.state is None else cotangents.state.to(self.acc)
        initial = None if x.initial is None else x.initial.to(self.acc)
        qk, whole = self.shared_scores(), Heads(0, p.nheads, p.nheads)
        sizes = ((p.q_heads, p.dstate), (p.k_heads, p.dstate), (p.v_heads, p.headdim))
        dq, dk, dv = (Total(self, heads, size) for heads, size in sizes)
        leaving = None if dfinal is None else swapped(dfinal)
        dinitial, _, _ = self.walk((self.k, self.q, dy), qk, leaving, other, whole, dv.place(whole))
        dv.add(whole)
        by_token = {name: self.covered(self.tokens, p.nheads) for name in ("log_a", "rows", "cols")} if x.values else {}
        count = self.heads_at_once()
        kept = self.new(self.slots, count, p.headdim, p.dstate, dtype=self.data) if x.values else None
        for first in range(0, p.nheads, count):
            heads = Heads(first, count, p.nheads)
            before, after = (None if s is None else s[:, first : first + count].contiguous() for s in (initial, dfinal))
            yv = Scores(self.scores(dy, self.v, heads), first, 1)
            _, entering, _ = self.walk(
                (dy, self.v, self.k), yv, before, mine, heads, dq.place(heads), self.q, KEPT if x.values else "", kept
            )
            dq.add(heads)
            _, leaving, through = self.walk(
                (self.v, dy, self.q), yv, after, other, heads, dk.place(heads), self.k, MET if x.values else "", kept
            )
            dk.add(heads)
            if x.values and self.tokens:
                self.exchange(heads, qk, yv, mine, entering, leaving, through, by_token)
        initial = None if initial is None else dinitial.transpose(-1, -2)
        return Gradients(dq.gradient, dk.gradient, dv.gradient, initial, self.by_slot(by_token))

    def heads_at_once(self) -> int:
        """As many heads as there is `ROOM` for; they share operands with one another or none."""
        p = self.problem
        shared = gcd(*(p.nheads // heads for heads in (p.q_heads, p.k_heads) if heads < p.nheads)) or p.nheads
        each = self.slots * (self.chunk**2 + p.headdim * p.dstate) * self.data.itemsize
        return max(
            (n for n in range(1, p.nheads + 1) if p.nheads % n == 0 and suits(n, shared) and n * each <= ROOM), default=1
        )

    def walk(
        self, roles: tuple[Tensor, Tensor, Tensor], g: Scores, entering: Tensor | None, sides: Sides, heads: Heads, y: Place,
        own: Tensor | None = None, mode: str = "", kept: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        """Write y to its place.

        Returns:
            The state that leaves, and with a mode what is exchanged through states: by tokens, and by chunks, in parts.
        """
        parts = self.parts(roles, mode)
        segments = self.segments(heads.number * parts.number) if self.tokens else 1
        if segments == 1:
            return self.go(roles, g, entering, sides, heads, y, own, mode, kept, 1)
        left, _, _ = self.go(roles, g, None, sides, heads, y, own, STATES, None, segments)
        entering = self.between(left, entering, sides, heads, segments)
        left, dots, through = self.go(roles, g, entering, sides, heads, y, own, mode, kept, segments)
        last = -1 if sides.term.causal else 0
        return left.unflatten(0, (self.rows, segments))[:, last].contiguous(), dots, through

    def go(
        self, roles: tuple[Tensor, Tensor, Tensor], g: Scores, entering: Tensor | None, sides: Sides, heads: Heads, y: Place,
        own: Tensor | None, mode: str, kept: Tensor | None, segments: int,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        """A walk of rows, or of so many segments of each as if they were rows."""
        (q, k, v), rows = roles, self.rows * segments
        inner, outer, parts = self.parts(roles, mode)
        shape = (rows, heads.number, q.shape[2], v.shape[2])
        leaving = self.new(*shape)
        if entering is None:
            entering = torch.zeros(shape, dtype=self.acc, device=self.device)
        dots = self.covered(self.tokens if mode in (KEPT, MET) else 1, heads.number, parts)  # else nobody writes it
        kept = self.new(1, *shape[1:], dtype=self.data) if kept is None else kept  # which nobody reads then
        through = self.new(len(kept), heads.number, parts * outer)
        if not self.tokens:
            return entering, dots, through
        flipped = mode != STATES and sides.term is not self.term
        resident = self.machine.resident(inner, outer, self.chunk, mode)
        whole = inner == shape[2] and not shape[3] % outer
        self.program("walk", inner=inner, outer=outer, whole=whole, flipped=flipped, mode=mode, resident=resident)(
            q, k, v, g.values, sides.lines, sides.total, self.begin, entering, y.values,
            leaving, v if own is None else own, dots, kept, kept, through, heads.first, y.first, g.first, g.share,
            1, self.seqlen // segments, int(sides.term.causal), int(sides.term.strict),
        )  # fmt: skip
        return leaving, dots, through

    def parts(self, roles: tuple[Tensor, Tensor, Tensor], mode: str) -> Parts:
        """Tiles of a walk, and how many programs share v."""
        inner = self.machine.inner(roles[0].shape[2])
        outer = self.machine.outer(inner, roles[2].shape[2], self.chunk, mode)
        return Parts(inner, outer, -(-roles[2].shape[2] // outer))

    def segments(self, programs: int) -> int:
        """Into how many segments to cut rows, which are walked side by side after a pass for the states between them.

        So many that chunks which wait for one another are fewest, counting that pass as `TWICE` and what it launches as `MORE`.
        """
        if self.seqlen < 0 or self.seqlen % self.chunk:
            return 1
        chunks, at_once = self.seqlen // self.chunk, 2 * self.problem.target.multiprocessors

        def waiting(count: int) -> float:
            turns = -(-programs * self.rows * count // at_once)
            return turns * chunks / count * (1 if count == 1 else TWICE) + (0 if count == 1 else MORE)

        return min((count for count in (1, 2, 4, 8, 16) if chunks % count == 0), key=waiting)

    def between(self, left: Tensor, initial: Tensor | None, sides: Sides, heads: Heads, segments: int) -> Tensor:
        """The states that enter segments, from those that each would leave behind if none entered it."""
        left = left.unflatten(0, (self.rows, segments))
        logs = sides.total[:, heads.first : heads.first + heads.number].unflatten(0, (self.rows, segments, -1)).sum(2)
        if not sides.term.causal:
            left, logs = left.flip(1), logs.flip(1)
        logs = logs.transpose(1, 2)
        behind = logs.cumsum(2)  # of segments up to each and with it, `[rows, heads, segments]`
        before = behind - logs
        weights = (before[..., None] - behind[..., None, :]).exp().tril(-1).to(self.acc)  # from behind segment t to before s
        states = torch.einsum("rhst,rthab->rshab", weights, left)
        if initial is not None:
            states += before.transpose(1, 2).exp().to(self.acc)[..., None, None] * initial[:, None]
        return (states if sides.term.causal else states.flip(1)).flatten(0, 1).contiguous()


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

    @property
    def gradient(self) -> Tensor:
        """As the operand is shaped."""
        p = self.scan.problem
        return self.total.view(p.batch, p.seqlen, self.heads, self.size)


def swapped(state: Tensor) -> Tensor:
    """A state with its last axes the other way, in order."""
    return state.transpose(-1, -2).contiguous()


def suits(number: int, shared: int) -> bool:
    """Whether so many heads share with one another, or are whole groups that do."""
    return shared % number == 0 or number % shared == 0
