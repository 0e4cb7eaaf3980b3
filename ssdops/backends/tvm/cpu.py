"""A term on a CPU: a forward and a backward walk, each of several heads together (`outputs.py`, `gradients.py`)."""

from __future__ import annotations

from math import gcd
from typing import Any

import torch
from torch import Tensor

from ...ir.problem import Problem, common_heads
from ..base import Cotangents, Output
from . import threads
from .replay import widen
from .scan import BY_TOKEN, Heads, Keepsake, Outputs, Scan, Scores, Sides
from .tile import EVERY, LINES, MOST, SEGMENT, STATES

MANY = 8
"""Programs for each thread from which it hardly matters that the last come alone."""


class OnCpu(Scan):
    """A linear term on tensors of a CPU."""

    def forward(self, save: bool = False) -> Output:
        """Y, the final states, and those between; with `save`, what the backward pass would work out again."""
        p = self.problem
        if p.state_every is None:
            return self.output(self.outputs(save))
        y, kept = self.covered(self.tokens, p.nheads, p.headdim), self.new(self.slots, p.nheads, p.dstate, p.headdim)
        final = self.walk(self.shared_scores(), self.sides(self.term), y, kept, EVERY)
        return Output(self.shaped(y), final, every=self.every(kept, final))

    @staticmethod
    def dtype_of_data(problem: Problem) -> torch.dtype:
        """In which programs read q, k and v."""
        return problem.accumulate

    def outputs(self, save: bool) -> Outputs:
        """Y, the final states if they are wanted, and what is to be saved."""
        p = self.problem
        y = self.covered(self.tokens, p.nheads, p.headdim)
        if save:
            kept = self.keepsake()
            qk, sides = self.shared_scores(kept.scores), self.sides(self.term, (kept.lines, kept.total))
            final = self.walk(qk, sides, y, kept.starts)
        else:
            qk, sides = self.shared_scores(), self.sides(self.term)
            final = self.walk(qk, sides, y, self.unread(1, p.nheads, p.dstate, p.headdim), save=False)
        state = final if self.x.wants_state else None
        return (self.shaped(y), state, kept.whole) if save else (self.shaped(y), state)

    def gradients(self, cotangents: Cotangents) -> Outputs:
        """Of the states that entered; of q, k and v `(batch, seqlen, heads, size)`, with an axis before the last where several
        programs at once write to a head; and by token and head of log decays, rows and columns. None is of what is not there.
        """
        p, together = self.problem, self.together()
        starts, qk, mine = self.saved(cotangents)
        dy, dfinal = self.flat(cotangents.y), self.state(cotangents.state)
        dinitial = self.new(self.rows, p.nheads, p.headdim, p.dstate)
        programs = self.at_once(p.nheads // together)
        sizes = ((p.q_heads, p.dstate), (p.k_heads, p.dstate), (p.v_heads, p.headdim))
        spreads = [min(programs, max(1, p.nheads // heads // together)) for heads, _ in sizes]
        lanes = [self.covered(self.tokens, heads * n, size) for n, (heads, size) in zip(spreads, sizes, strict=True)]
        by_token = {name: self.covered(self.tokens, p.nheads) for name in BY_TOKEN} if self.x.values else {}
        count = together * programs
        yv = self.new(self.slots, count, self.chunk, self.chunk)
        entered, left = (self.covered(self.tokens, count, 1) for _ in range(2))
        through = self.new(self.slots, count, 1)
        for first in range(0, p.nheads if self.tokens else 0, count):
            self.program("gradients", **self.tiles())(
                self.q, self.k, self.v, dy, qk.values, yv, mine.lines, mine.total, self.begin, starts, dfinal, dinitial,
                *lanes, *lanes, entered, left, through, first, int(cotangents.state is not None), self.seqlen,
                int(self.term.causal), int(self.term.strict), *spreads, together,
            )  # fmt: skip
            if by_token:
                self.exchange(Heads(first, count, p.nheads), qk, Scores(yv, first, 1), mine, entered, left, through, by_token)
        if not self.tokens:
            dinitial = dfinal if cotangents.state is not None else dinitial.zero_()
        shapes = [(heads, size) if n == 1 else (heads, n, size) for n, (heads, size) in zip(spreads, sizes, strict=True)]
        of_inputs = [x.view(p.batch, p.seqlen, *shape) for x, shape in zip(lanes, shapes, strict=True)]
        return (None if self.x.initial is None else dinitial, *of_inputs, *self.of_tokens(by_token))

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

    def walk(self, qk: Scores, sides: Sides, y: Tensor, kept: Tensor, mode: str = "", save: bool = True) -> Tensor:
        """Write y, and keep what the mode says, or with `save` the states that enter segments; the states that leave."""
        p, initial = self.problem, self.state(self.x.initial)
        if not self.tokens:
            return initial if self.x.initial is not None else self.new(self.rows, p.nheads, p.headdim, p.dstate).zero_()
        leaving = self.new(self.rows, p.nheads, p.headdim, p.dstate)
        self.program("outputs", **self.tiles(), mode=mode)(
            self.q, self.k, self.v, qk.values, sides.lines, sides.total, self.begin, initial, leaving, y, kept,
            int(self.x.initial is not None), self.seqlen, int(self.term.causal), int(self.term.strict),
            self.together(), int(save),
        )  # fmt: skip
        return leaving

    def saved(self, cotangents: Cotangents) -> tuple[Tensor, Scores, Sides]:
        """What the forward pass saved, or would have: states that enter segments, scores, and what there is per token."""
        p, kept = self.problem, self.keepsake(*cotangents.saved)
        if cotangents.saved:
            scores = Scores(kept.scores, 0, p.nheads // kept.scores.shape[1])
            return kept.starts, scores, Sides(self.term, kept.lines, kept.total)
        qk, sides = self.shared_scores(kept.scores), self.sides(self.term, (kept.lines, kept.total))
        self.walk(qk, sides, self.new(self.tokens, p.nheads, p.headdim), kept.starts, STATES)
        return kept.starts, qk, sides

    def keepsake(self, whole: Tensor | None = None) -> Keepsake:
        """What was saved, or room for it: states that enter segments of `SEGMENT` chunks, scores, lines and E."""
        p = self.problem
        if self.seqlen < 0:  # documents: `parts.first_segment` says where theirs are
            count = self.slots // SEGMENT + self.rows + 1
        else:
            count = self.rows * -(-self.seqlen // (self.chunk * SEGMENT))
        parts = (
            ((count, p.nheads, p.dstate, p.headdim), self.acc),
            ((self.slots, common_heads(p), self.chunk, self.chunk), self.data),
            ((self.slots, p.nheads, LINES, self.chunk), torch.float64),
            ((self.slots, p.nheads), torch.float64),
        )
        whole, views = self.parts_of(parts, whole)
        return Keepsake(whole, *views)

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

    def slot(self, name: str, dtype: torch.dtype) -> Tensor | None:
        """As `Scan` does; that logs of float32 become float64 is noted, and done by threads.c, as torch takes 4 µs to begin."""
        given, p = self.x.values.get(name), self.problem
        if given is None or given.dtype != torch.float32 or dtype != torch.float64:
            return super().slot(name, dtype)
        found = super().slot(name, given.dtype)
        assert found is not None  # the slot is there
        made = self.new(self.tokens, p.nheads, dtype=dtype)
        self.noted(widen)(found, made, made.numel())
        return made


def balanced(programs: int) -> bool:
    """Whether so many keep all threads busy."""
    return programs % threads.count() == 0 or programs >= MANY * threads.count()
