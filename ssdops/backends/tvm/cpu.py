"""A term on a CPU: a forward and a backward walk, each of several heads together (`outputs.py`, `gradients.py`)."""

from __future__ import annotations

from math import gcd
from typing import Any

from torch import Tensor

from ..base import Cotangents, Gradients, Output
from . import threads
from .scan import Heads, Scan, Scores, Sides
from .tile import EVERY, MOST, SEGMENT, STARTS, STATES

MANY = 8
"""Programs for each thread from which it hardly matters that the last come alone."""


class Total:
    """A gradient `[tokens, lanes, size]`: each head of its operand has as many lanes as programs write to it at once."""

    def __init__(self, scan: OnCpu, heads: int, size: int, together: int, programs: int) -> None:
        self.scan, self.heads, self.spread = scan, heads, min(programs, max(1, scan.problem.nheads // heads // together))
        self.lanes = scan.covered(scan.tokens, heads * self.spread, size)

    def gradient(self) -> Tensor:
        """As the operand is shaped."""
        p = self.scan.problem
        total = self.lanes.unflatten(1, (self.heads, self.spread)).sum(2) if self.spread > 1 else self.lanes
        return total.unflatten(0, (p.batch, p.seqlen))


class OnCpu(Scan):
    """A linear term on tensors of a CPU."""

    def forward(self, save: bool = False) -> Output:
        """Y, the final states, and those between; with `save`, what the backward pass would work out again."""
        p, every = self.problem, self.problem.state_every
        y = self.covered(self.tokens, p.nheads, p.headdim)
        qk, sides = self.shared_scores(), self.sides(self.term)
        if every is not None:
            kept = self.new(self.slots, p.nheads, p.dstate, p.headdim)
            final = self.walk(qk, sides, y, kept, EVERY)
            return Output(self.shaped(y), final, every=self.every(kept, final))
        starts = self.starts() if save else self.unread(1, p.nheads, p.dstate, p.headdim)
        final = self.walk(qk, sides, y, starts, STARTS if save else "")
        return Output(self.shaped(y), final, (starts, qk.values, sides.lines, sides.total) if save else ())

    def backward(self, cotangents: Cotangents) -> Gradients:
        """Gradients of everything, of some heads at a time."""
        p, x, together = self.problem, self.x, self.together()
        starts, qk, mine = self.saved(cotangents)
        dy, dfinal = self.flat(cotangents.y), self.state(cotangents.state)
        dinitial = self.new(self.rows, p.nheads, p.headdim, p.dstate)
        programs = self.at_once(p.nheads // together)
        sizes = ((p.q_heads, p.dstate), (p.k_heads, p.dstate), (p.v_heads, p.headdim))
        totals = dq, dk, dv = tuple(Total(self, heads, size, together, programs) for heads, size in sizes)
        lanes = [total.lanes for total in totals]
        by_token = {name: self.covered(self.tokens, p.nheads) for name in ("log_a", "rows", "cols")} if x.values else {}
        count = together * programs
        yv = self.new(self.slots, count, self.chunk, self.chunk)
        entered, left = (self.covered(self.tokens, count, 1) for _ in range(2))
        through = self.new(self.slots, count, 1)
        for first in range(0, p.nheads if self.tokens else 0, count):
            self.program("gradients", **self.tiles())(
                self.q, self.k, self.v, dy, qk.values, yv, mine.lines, mine.total, self.begin, starts, dfinal, dinitial,
                *lanes, *lanes, entered, left, through, first, int(cotangents.state is not None), self.seqlen,
                int(self.term.causal), int(self.term.strict), *(total.spread for total in totals), together,
            )  # fmt: skip
            if x.values:
                self.exchange(Heads(first, count, p.nheads), qk, Scores(yv, first, 1), mine, entered, left, through, by_token)
        if not self.tokens:
            dinitial = dfinal if cotangents.state is not None else dinitial.zero_()
        initial = None if x.initial is None else dinitial
        return Gradients(dq.gradient(), dk.gradient(), dv.gradient(), initial, self.by_slot(by_token))

    def exchange(
        self, heads: Heads, qk: Scores, yv: Scores, sides: Sides, entering: Tensor, leaving: Tensor, through: Tensor,
        out: dict[str, Tensor],
    ) -> None:  # fmt: skip
        """Gradients by token and head, of some heads: of log decays, and of what weighs rows and columns."""
        term = self.term
        apart = 2 if term.col_inclusive and not term.row_inclusive else 1
        self.program("exchange")(
            qk.values, yv.values, sides.lines, self.chunks, entering, leaving, through, out["log_a"],
            out["rows"], out["cols"], self.scale, self.seqlen, heads.first, int(term.causal), int(term.row_inclusive),
            int(term.col_inclusive), int(term.strict), apart,
        )  # fmt: skip

    def walk(self, qk: Scores, sides: Sides, y: Tensor, kept: Tensor, mode: str) -> Tensor:
        """Write y, and keep what the mode says; the states that leave."""
        p, initial = self.problem, self.state(self.x.initial)
        if not self.tokens:
            return initial if self.x.initial is not None else self.new(self.rows, p.nheads, p.headdim, p.dstate).zero_()
        leaving = self.new(self.rows, p.nheads, p.headdim, p.dstate)
        self.program("outputs", **self.tiles(), mode=mode)(
            self.q, self.k, self.v, qk.values, sides.lines, sides.total, self.begin, initial, leaving, y, kept,
            int(self.x.initial is not None), self.seqlen, int(self.term.causal), int(self.term.strict),
            self.together(),
        )  # fmt: skip
        return leaving

    def saved(self, cotangents: Cotangents) -> tuple[Tensor, Scores, Sides]:
        """What the forward pass saved, or would have: states that enter segments, scores, and what there is per token."""
        p = self.problem
        if cotangents.saved:
            starts, scores, lines, total = cotangents.saved
            return starts, Scores(scores, 0, p.nheads // scores.shape[1]), Sides(self.term, lines, total)
        starts, qk, sides = self.starts(), self.shared_scores(), self.sides(self.term)
        self.walk(qk, sides, self.new(self.tokens, p.nheads, p.headdim), starts, STATES)
        return starts, qk, sides

    def starts(self) -> Tensor:
        """Room for the states that enter segments of `SEGMENT` chunks."""
        p = self.problem
        if self.seqlen < 0:  # documents: `parts.first_segment` says where theirs are
            count = self.slots // SEGMENT + self.rows + 1
        else:
            count = self.rows * -(-self.seqlen // (self.chunk * SEGMENT))
        return self.new(count, p.nheads, p.dstate, p.headdim)

    def state(self, given: Tensor | None) -> Tensor:
        """States as programs read them."""
        p = self.problem
        return self.unread(1, p.nheads, p.headdim, p.dstate) if given is None else given.to(self.acc).contiguous()

    def tiles(self) -> dict[str, Any]:
        """Sizes of heads, in tiles."""
        p = self.problem
        inner, outer = self.machine.inner(p.dstate), self.machine.inner(p.headdim)
        return {"inner": inner, "outer": outer, "whole": (inner, outer) == (p.dstate, p.headdim)}

    def together(self) -> int:
        """How many heads are walked together: they share q and k, and v with one another or with whole groups.

        The more, the more seldom tiles of q and k are loaded.
        """
        p = self.problem
        shared = gcd(p.nheads // p.q_heads, p.nheads // p.k_heads)
        of_v = p.nheads // p.v_heads
        able = [n for n in range(MOST, 0, -1) if shared % n == 0 and (of_v % n == 0 or n % of_v == 0)]
        return next((n for n in able if balanced(p.nheads // n * self.rows)), able[-1])

    def at_once(self, blocks: int) -> int:
        """So few blocks of heads at a time that what they hand on stays in cache, and enough for all threads."""
        return next((n for n in range(1, blocks + 1) if blocks % n == 0 and balanced(n * self.rows)), blocks)


def balanced(programs: int) -> bool:
    """Whether so many keep all threads busy."""
    return programs % threads.count() == 0 or programs >= MANY * threads.count()
