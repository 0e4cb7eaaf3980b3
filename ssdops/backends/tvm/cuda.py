"""A term on a GPU: walks along rows, and a backward pass by chunks between them.

Y and dV are walks (`walk.py`), each with q, k and v in other roles, and so are the states that a backward pass wants: S before
each chunk, and D, the cotangents of the states after it, which dV's walk carries:

    |    | q, k, v    | G          | direction   | u, w          | enters → leaves    |
    | Y  | q, k, v    | ⟨q, k⟩     | the term's  | rows, cols    | initial → final    |
    | S  | –, k, v    | –          | the term's  | –, cols       | initial            |
    | dV | k, q, dY   | ⟨q, k⟩ᵀ    | the other's | cols, rows    | dfinal → dinitial  |

with log_cols beside cols. States are [dstate, headdim] here. From S and D, `group.py` makes everything else. Where all
heads are done at once, and do not share v, torch has nothing to do between programs, and the pass can be called again
(`replay.py`).
"""

from __future__ import annotations

from dataclasses import replace
from math import gcd
from typing import NamedTuple

import torch
from torch import Tensor

from ...ir.problem import common_heads
from ..base import Cotangents, Output
from .machine import Ahead
from .scan import BY_TOKEN, Heads, Keepsake, Notes, Outputs, Scan, Scores, Sides
from .tile import ADDED, EVERY, EXCHANGE, KEPT, LANES, LINES, SEGMENTS, STARTS, STATES, SUMS, WIDE

ROOM = 3 << 30
"""Bytes of states that a backward pass holds at once."""
TWICE, MORE = 1.45, 30.0
"""Of rows in segments: a pass for the states between them and the walk, in walks, and in chunks what else is launched."""


class Place(NamedTuple):
    """A tensor that is written from one of its heads on."""

    values: Tensor
    first: int = 0


class Parts(NamedTuple):
    """Sizes of a walk's tiles, what it loads ahead, how many programs share v, and how many k, where there is no y."""

    inner: int
    outer: int
    ahead: Ahead
    number: int
    shared: int


class Starts(NamedTuple):
    """The states that enter rows, or segments of them, `[rows · segments, heads, inner, outer]`; None: nothing does."""

    values: Tensor | None
    segments: int = 1


class OnGpu(Scan):
    """A linear term on tensors of a GPU."""

    def forward(self, save: bool = False) -> Output:
        """Y, the final states, and those between; with `save`, what the backward pass would work out again."""
        p = self.problem
        if p.state_every is None:
            return self.output(self.outputs(save))
        kept = self.new(self.slots, p.nheads, p.dstate, p.headdim)
        y, final, *saved = self.outputs(save, kept)
        assert final is not None  # states between come with those that leave
        return replace(self.output((y, final, *saved)), every=self.every(kept, swapped(final)))

    def outputs(self, save: bool, kept: Tensor | None = None) -> Outputs:
        """Y, the final states `[rows, heads, dstate, headdim]` if they are wanted, and what is to be saved.

        Args:
            kept: room for the states that enter chunks, if they are wanted.
        """
        p, roles = self.problem, (self.q, self.k, self.v)
        y = self.covered(self.tokens, p.nheads, p.headdim, dtype=self.data)
        room = self.keepsake()
        qk, sides = self.shared_scores(room.scores), self.sides(self.term, (room.lines, room.total))
        starts = self.starts(roles, qk, Starts(self.entering(self.x.initial)), sides, self.all_heads, room.starts)
        wanted = self.x.wants_state or kept is not None
        mode = "" if kept is None else EVERY
        final = self.walk(roles, qk, starts, sides, self.all_heads, Place(y), mode, kept, wanted)
        return (self.shaped(y), final if wanted else None, *((room.whole,) if save else ()))

    def dtype_of_logs(self) -> torch.dtype:
        """As they are given, if that is float32."""
        given = {x.dtype for name, x in self.x.values.items() if "log" in name}
        return torch.float32 if given == {torch.float32} else torch.float64

    @property
    def all_heads(self) -> Heads:
        """All of them."""
        return Heads(0, self.problem.nheads, self.problem.nheads)

    @staticmethod
    def as_read(state: Tensor) -> Tensor:
        """States, with their memory as programs read it."""
        return swapped(swapped(state).contiguous())

    @staticmethod
    def as_given(state: Tensor) -> Tensor:
        """A look at what programs wrote, as states are."""
        return swapped(state)

    def entering(self, state: Tensor | None) -> Tensor | None:
        """States as programs read them."""
        return None if state is None else swapped(state.to(self.acc)).contiguous()

    def keepsake(self, whole: Tensor | None = None) -> Keepsake:
        """What was saved, or room for it: states that enter segments, if there are some; scores, lines and E."""
        p = self.problem
        segments = self.segments((self.q, self.k, self.v), self.all_heads)
        count = self.rows * segments if segments > 1 else 0
        whole, views = self.parts_of(
            (
                ((count, p.nheads, p.dstate, p.headdim), self.acc),
                ((self.slots, common_heads(p), self.chunk, self.chunk), self.data),
                ((self.slots, p.nheads, LINES, self.chunk), self.line),
                ((self.slots, p.nheads), torch.float64),
            ),
            whole,
        )
        return Keepsake(whole, *views)

    def saved(self, cotangents: Cotangents) -> tuple[Scores, Sides, Starts]:
        """What the forward pass saved, or would have."""
        p, roles, room = self.problem, (self.q, self.k, self.v), self.keepsake(*cotangents.saved)
        entering = Starts(self.entering(self.x.initial))
        if not cotangents.saved:
            qk, sides = self.shared_scores(room.scores), self.sides(self.term, (room.lines, room.total))
            return qk, sides, self.starts(roles, qk, entering, sides, self.all_heads, room.starts)
        scores, sides = Scores(room.scores, 0, p.nheads // room.scores.shape[1]), Sides(self.term, room.lines, room.total)
        segments = self.segments(roles, self.all_heads)
        return scores, sides, entering if segments == 1 else Starts(room.starts, segments)

    def gradients(self, cotangents: Cotangents) -> Outputs:
        """Of the states that entered `[rows, heads, dstate, headdim]`; of q, k and v `(batch, seqlen, heads, size)`; and by
        token and head of log decays, rows and columns. None is of what is not there. Of some heads at a time, in memory that is
        used again.
        """
        p = self.problem
        qk, mine, starts = self.saved(cotangents)
        other = self.sides(self.term.transpose())
        dy, dfinal = self.flat(cotangents.y), self.entering(cotangents.state)
        count = self.heads_at_once()
        dv = Total(self, p.v_heads, p.headdim)
        dq, dk = (self.total_of(heads, count) for heads in (p.q_heads, p.k_heads))
        dinitial = None
        if self.x.initial is not None and count < p.nheads:
            dinitial = self.new(self.rows, p.nheads, p.dstate, p.headdim)
        by_token = {name: self.covered(self.tokens, p.nheads) for name in BY_TOKEN} if self.x.values else {}
        before, after = (self.new(self.slots, count, p.dstate, p.headdim, dtype=self.data) for _ in range(2))
        for first in range(0, p.nheads, count):
            heads = Heads(first, count, p.nheads)
            some = slice(first, first + count)
            entering = Starts(None if starts.values is None else starts.values[:, some].contiguous(), starts.segments)
            self.walk((self.q, self.k, self.v), qk, entering, mine, heads, Place(self.v), STARTS, before, wanted=False)
            back = (self.k, self.q, dy)
            entering = self.starts(back, qk, Starts(None if dfinal is None else dfinal[:, some].contiguous()), other, heads)
            left = self.walk(back, qk, entering, other, heads, dv.place(heads), KEPT, after, self.x.initial is not None)
            if dinitial is not None:
                dinitial[:, some] = left
            dv.add(heads)
            if self.tokens:
                self.group(heads, dy, qk, mine, (before, after), (dq, dk), by_token)
            if count < p.nheads:  # no pass that is called again, and nothing of these heads' is to stay for one
                self.notes = Notes()
        of_initial = left if dinitial is None else dinitial
        of_inputs = (self.shaped(x) for x in (dq, dk, dv.total))
        return (None if self.x.initial is None else of_initial, *of_inputs, *self.of_tokens(by_token))

    def total_of(self, heads: int, count: int) -> Tensor:
        """Room for a gradient of q or k, or where its sums begin, `[tokens, heads, dstate]`."""
        p = self.problem
        if count == p.nheads:
            return self.covered(self.tokens, heads, p.dstate, dtype=self.data if self.x.out == self.data else self.acc)
        return torch.zeros(self.tokens, heads, p.dstate, dtype=self.acc, device=self.device)

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
            mode=EXCHANGE if by_token else "", ahead=ahead is Ahead.ALL,
        )(
            self.q, self.k, self.v, dy, qk.values, sides.lines, sides.total, self.chunks, *states, *rooms, sums, met, through,
            self.seqlen, heads.first, walked, int(term.causal), int(term.strict), apart,
        )  # fmt: skip
        for total, room in zip(totals, rooms, strict=True):
            share = p.nheads // total.shape[1]
            wide = "" if total.dtype == self.data else WIDE
            self.program("collect", mode=wide if heads.number == p.nheads else ADDED)(
                room, self.chunks, total, total, runs // max(1, heads.number // share), self.seqlen, heads.first // share
            )
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

    def heads_at_once(self) -> int:
        """As many heads as there is `ROOM` for, which are whole groups that share an operand, or of one."""
        p = self.problem
        shares = [p.nheads // heads for heads in (p.q_heads, p.k_heads, p.v_heads)]
        each = 2 * self.slots * p.headdim * p.dstate * self.data.itemsize
        able = (n for n in range(p.nheads, 0, -1) if p.nheads % n == 0 and all(suits(n, share) for share in shares))
        return next((n for n in able if n * each <= ROOM), 1)

    def starts(
        self, roles: tuple[Tensor, Tensor, Tensor], g: Scores, entering: Starts, sides: Sides, heads: Heads,
        room: Tensor | None = None,
    ) -> Starts:  # fmt: skip
        """The states that enter rows, or segments of rows that are walked side by side; those in the room, if there is one."""
        segments = self.segments(roles, heads)
        if segments == 1:
            return entering
        left = self.walk(roles, g, Starts(None, segments), sides, heads, Place(roles[2]), STATES)
        out, none = self.new(*left.shape) if room is None else room, entering.values is None
        first = self.unread(1, 1, 1) if entering.values is None else entering.values.flatten(2)
        self.program("between")(
            left.flatten(2), sides.total, first, out.flatten(2), segments, self.slots // len(left), heads.first,
            int(not none), int(sides.term.causal),
        )  # fmt: skip
        return Starts(out, segments)

    def walk(
        self, roles: tuple[Tensor, Tensor, Tensor], g: Scores, starts: Starts, sides: Sides, heads: Heads, y: Place,
        mode: str = "", kept: Tensor | None = None, wanted: bool = True,
    ) -> Tensor:  # fmt: skip
        """Write y to its place, and keep what the mode says; the states that leave rows, or with `STATES` segments of them.

        Args:
            wanted: whether anyone will read those.
        """
        (q, k, v), (entering, segments) = roles, starts
        inner, outer, ahead, parts, shared = self.parts(roles, mode)
        state = (heads.number, k.shape[2], v.shape[2])
        if not self.tokens:
            return torch.zeros(self.rows, *state, dtype=self.acc, device=self.device) if entering is None else entering
        rows = self.rows * segments
        together = segments if mode != STATES else 1
        last = together - 1 if sides.term.causal else 0  # of those, the one whose state leaves
        leaving = self.new(rows // together if wanted else 1, *state)
        kept = self.new(1, *state, dtype=self.data) if kept is None else kept  # which nobody writes then
        flipped = mode not in (STATES, STARTS) and sides.term is not self.term
        whole = inner * shared == k.shape[2] and not v.shape[2] % outer
        fields = {"inner": inner, "outer": outer, "whole": whole, "flipped": flipped, "shared": shared, **ahead.fields()}
        self.program("walk", mode=mode, **fields)(
            q, k, v, g.values, sides.lines, sides.total, self.begin,
            self.unread(1, 1, *state[1:]) if entering is None else entering, y.values, leaving, kept, rows, parts,
            heads.first, y.first, g.first, g.share, int(entering is not None), together, last if wanted else -1,
            self.seqlen // segments, int(sides.term.causal), int(sides.term.strict),
        )  # fmt: skip
        return leaving

    def parts(self, roles: tuple[Tensor, Tensor, Tensor], mode: str = "") -> Parts:
        """Tiles of a walk."""
        _, k, v = (x.shape[2] for x in roles)
        gives = mode not in (STATES, STARTS)
        inner = self.machine.inner(k) if gives else self.machine.walked(k)
        outer, ahead = self.machine.outer(inner, v, self.chunk, gives and inner == k, mode == EVERY)
        return Parts(inner, outer, ahead, -(-v // outer), -(-k // inner))

    def segments(self, roles: tuple[Tensor, Tensor, Tensor], heads: Heads) -> int:
        """Into how many segments to cut rows, which are walked side by side after a pass for the states between them.

        So many that chunks which wait for one another are fewest, counting that pass as `TWICE` and what it launches as `MORE`.
        """
        if self.seqlen <= 0 or self.seqlen % self.chunk:
            return 1
        programs = heads.number * self.parts(roles).number
        chunks, at_once = self.seqlen // self.chunk, self.problem.target.multiprocessors

        def waiting(count: int) -> float:
            turns = -(-programs * self.rows * count // at_once)
            return turns * chunks / count * (1 if count == 1 else TWICE) + (0 if count == 1 else MORE)

        return min((count for count in (1, 2, 4, 8, SEGMENTS) if chunks % count == 0), key=waiting)


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
    """A view of states with their last axes the other way."""
    return state.transpose(-1, -2)


def suits(number: int, shared: int) -> bool:
    """Whether so many heads share with one another, or are whole groups that do."""
    return shared % number == 0 or number % shared == 0
