"""A linear term on its tensors: Y and every gradient as walks and scores (`lower.py`), each with q, k and v in other roles.

    |    | q, k, v    | G          | direction   | u, w          | enters → leaves    |
    | Y  | q, k, v    | ⟨q, k⟩     | the term's  | rows, cols    | initial → final    |
    | dQ | dY, v, k   | ⟨dY, v⟩    | the term's  | rows, cols    | initialᵀ           |
    | dV | k, q, dY   | ⟨q, k⟩ᵀ    | the other's | cols, rows    | dfinal → dinitial  |
    | dK | v, dY, q   | ⟨dY, v⟩ᵀ   | the other's | cols, rows    | dfinalᵀ            |

with log_cols beside cols. States are [dstate, headdim] here, or [headdim, dstate] in dQ and dK.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import gcd
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...ir.problem import common_heads
from ...ir.terms import Linear
from ..base import Config, Cotangents, Gradients, Inputs, Output, reduce_value
from . import build
from .machine import machine
from .tile import EVERY, KEPT, LINES, MET, STATES, Tile

MOST = 4
"""Heads of a backward pass at once on a CPU, if they fill the threads."""
ROOM = 1 << 29
"""Bytes of scores and states that a backward pass on a GPU holds at once."""
TWICE, MORE = 1.45, 30.0
"""Of rows in segments: a pass for the states between them and the walk, in walks, and in chunks what else is launched."""
ALIGNED = 16
"""Bytes that a vector's address is a multiple of."""


class Heads(NamedTuple):
    """Some of them."""

    first: int
    number: int
    of: int


class Place(NamedTuple):
    """A tensor that is written from one of its heads on."""

    values: Tensor
    first: int = 0


class Parts(NamedTuple):
    """Sizes of a walk's tiles, and how many programs share v."""

    inner: int
    outer: int
    number: int


class Scores(NamedTuple):
    """Scores, and which of its heads is head h's: (h − first) / share."""

    values: Tensor
    first: int
    share: int


@dataclass(frozen=True)
class Sides:
    """A term's view of its tokens: lines `[slots, nheads, 8, chunk]`, and E `[slots, nheads]`."""

    term: Linear
    lines: Tensor
    total: Tensor


class Scan:
    """A linear term on its tensors."""

    def __init__(self, term: Linear, x: Inputs, config: Config) -> None:
        p = x.problem
        self.term, self.x, self.problem, self.device = term, x, p, x.q.device
        self.machine = machine(p)
        self.chunk = config.chunk_size or self.machine.chunk
        self.acc, self.data = p.accumulate, self.machine.data
        self.tokens, self.scale = p.batch * p.seqlen, float(term.sign * x.scale)
        self.q, self.k, self.v = (self.flat(t) for t in (x.q, x.k, x.v))
        self.scaled = any(slot in x.values for slot in ("rows", "cols", "log_cols"))
        self.lay_rows()
        log_a = self.slot("log_a", torch.float64)
        self.d = torch.zeros(self.tokens, p.nheads, dtype=torch.float64, device=self.device) if log_a is None else log_a
        self.log_cols = self.slot("log_cols", torch.float64)
        if self.scaled:
            rows, cols = (self.ones() if (value := self.slot(name, self.acc)) is None else value for name in ("rows", "cols"))
        else:
            rows = cols = self.new(1, 1)  # which nobody reads
        self.scales = rows, cols

    def lay_rows(self) -> None:
        """Where rows begin and which chunk is in which slot: a table for documents, nothing for rows of one length."""
        p, bounds = self.problem, self.x.boundaries
        if bounds is None:
            self.rows, self.seqlen, self.slots = p.batch, p.seqlen, p.batch * -(-p.seqlen // self.chunk)
            self.begin = torch.empty(1, dtype=torch.int64, device=self.device)
            self.chunks = self.begin.view(1, 1).expand(1, 2).contiguous()
            return
        self.begin = bounds.to(torch.int64).contiguous()
        self.rows, self.seqlen = len(self.begin) - 1, -1
        self.slots = self.tokens // self.chunk + self.rows
        first = self.begin[:-1] // self.chunk + torch.arange(self.rows, device=self.device)  # the slot of a row's first chunk
        slots = torch.arange(self.slots, device=self.device)
        row = torch.searchsorted(first, slots, right=True) - 1
        inside = row.clamp(min=0)
        end = self.begin[1:][inside]
        begin = torch.where(row < 0, end, self.begin[inside] + (slots - first[inside]) * self.chunk)
        self.chunks = torch.stack((begin.minimum(end), end), 1).contiguous()

    def flat(self, x: Tensor) -> Tensor:
        """`(batch, seqlen, heads, size)` as `[tokens, heads, size]`, in the dtype of products, where vectors can be read."""
        x = x.to(self.data).contiguous().view(self.tokens, *x.shape[2:])
        return x if x.data_ptr() % ALIGNED == 0 else x.clone()

    def slot(self, name: str, dtype: torch.dtype) -> Tensor | None:
        """An operand per token and head, `[tokens, nheads]`."""
        x = self.x.per_head(name)
        return None if x is None else x.to(dtype).reshape(self.tokens, self.problem.nheads).contiguous()

    def ones(self) -> Tensor:
        """A scale of 1."""
        return torch.ones(self.tokens, self.problem.nheads, dtype=self.acc, device=self.device)

    def new(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """Memory that a program fills."""
        return torch.empty(shape, dtype=dtype or self.acc, device=self.device)

    def covered(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """Memory of which a program fills what rows have: zeros where documents may leave tokens out."""
        make = torch.empty if self.x.documents is None else torch.zeros
        return make(shape, dtype=dtype or self.acc, device=self.device)

    # --- programs -------------------------------------------------------------------------------------------------------

    def program(self, name: str, **fields: Any) -> Callable[..., None]:
        """A compiled one."""
        data, acc = (str(dtype).removeprefix("torch.") for dtype in (self.data, self.acc))
        return build.program(name, Tile(self.machine.target, data, acc, self.chunk, **fields))

    def sides(self, term: Linear) -> Sides:
        """Of the term, or of its transpose: then what weighs rows, and what is added to their logs, is columns'."""
        p, mine = self.problem, term is self.term
        line = torch.float64 if self.data == self.acc else self.acc
        lines = self.new(self.slots, p.nheads, LINES, self.chunk, dtype=line)
        total = self.new(self.slots, p.nheads, dtype=torch.float64)
        if self.tokens:
            r = torch.zeros_like(self.d) if self.scaled else self.d  # what is not scaled does not read it
            c = r if self.log_cols is None else self.log_cols
            (u, w), scales = self.scales, (self.scale, 1.0)
            if not mine:
                r, c, u, w, scales = c, r, w, u, scales[::-1]
            self.program("lines", scaled=self.scaled)(
                self.d, r, c, u, w, self.chunks, lines, total, *scales, self.seqlen, int(term.causal),
                int(term.row_inclusive), int(term.col_inclusive),
            )  # fmt: skip
        return Sides(term, lines, total)

    def scores(self, q: Tensor, k: Tensor, heads: Heads) -> Tensor:
        """⟨q, k⟩ of the tokens of each chunk, `[slots, heads, chunk, chunk]`."""
        out = self.new(self.slots, heads.number, self.chunk, self.chunk, dtype=self.data)
        if self.tokens:
            inner = self.machine.inner(q.shape[2])
            self.program("scores", inner=inner, whole=inner == q.shape[2])(
                q, k, self.chunks, out, self.seqlen, heads.first, heads.of
            )
        return out

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
        if entering is None and self.device.type != "cpu":
            entering = torch.zeros(shape, dtype=self.acc, device=self.device)
        dots = self.covered(self.tokens if mode in (KEPT, MET) else 1, heads.number, parts)  # else nobody writes it
        kept = self.new(1, *shape[1:], dtype=self.data) if kept is None else kept  # which nobody reads then
        through = self.new(len(kept), heads.number, parts * outer)
        if not self.tokens:
            return leaving.zero_() if entering is None else entering, dots, through
        flipped = mode != STATES and sides.term is not self.term
        resident = self.machine.resident(inner, outer, self.chunk, mode)
        whole = inner == shape[2] and not shape[3] % outer
        self.program("walk", inner=inner, outer=outer, whole=whole, flipped=flipped, mode=mode, resident=resident)(
            q, k, v, g.values, sides.lines, sides.total, self.begin, leaving if entering is None else entering, y.values,
            leaving, v if own is None else own, dots, kept, kept, through, heads.first, y.first, g.first, g.share,
            int(entering is not None), self.seqlen // segments, int(sides.term.causal), int(sides.term.strict),
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
        if self.device.type == "cpu" or self.seqlen < 0 or self.seqlen % self.chunk:
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

    # --- passes ---------------------------------------------------------------------------------------------------------

    def forward(self) -> Output:
        """Y, the final states, and those between."""
        p, every, heads = self.problem, self.problem.state_every, Heads(0, self.problem.nheads, self.problem.nheads)
        initial = None if self.x.initial is None else swapped(self.x.initial.to(self.acc))
        kept = None if every is None else self.new(self.slots, p.nheads, p.dstate, p.headdim)
        y = self.covered(self.tokens, p.nheads, p.headdim, dtype=self.data)
        roles, mode = (self.q, self.k, self.v), "" if every is None else EVERY
        final, _, _ = self.walk(roles, self.shared_scores(), initial, self.sides(self.term), heads, Place(y), None, mode, kept)
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
        out = self.new(p.batch, p.seqlen // every, p.nheads, p.headdim, p.dstate, dtype=p.state_dtype)
        if not self.tokens:
            return out
        by_row = kept.unflatten(0, (p.batch, self.slots // p.batch))
        for index in range(p.seqlen // every):
            end = (index + 1) * every
            out[:, index] = (final if end == p.seqlen else by_row[:, end // self.chunk]).transpose(-1, -2)
        return out

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
        grads = Gradients(dq.gradient, dk.gradient, dv.gradient, None if initial is None else dinitial.transpose(-1, -2))
        if "log_cols" in x.values:
            by_token["log_cols"] = by_token["cols"] * self.scales[1]
        grads.values = {
            slot: reduce_value(by_token[slot].view(p.batch, p.seqlen, p.nheads), value) for slot, value in x.values.items()
        }
        return grads

    def heads_at_once(self) -> int:
        """So few heads that what they hand on stays in cache, or in `ROOM`; they share operands with one another or none."""
        p = self.problem
        shared = gcd(*(p.nheads // heads for heads in (p.q_heads, p.k_heads) if heads < p.nheads)) or p.nheads
        if self.device.type == "cpu":
            return max((n for n in range(1, MOST + 1) if shared % n == 0 and n * self.rows >= build.THREADS), default=shared)
        each = self.slots * (self.chunk**2 + p.headdim * p.dstate) * self.data.itemsize
        return max(
            (n for n in range(1, p.nheads + 1) if p.nheads % n == 0 and suits(n, shared) and n * each <= ROOM), default=1
        )

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


class Total:
    """A gradient `[tokens, heads, size]`, summed over the heads that share it as they come."""

    def __init__(self, scan: Scan, heads: int, size: int) -> None:
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
        if self.scan.device.type == "cpu":
            for index in range(heads.number):  # a sum over an axis between others takes torch more than twice as long there
                self.total[:, (heads.first + index) // self.share] += self.room[:, index]
            return
        share = min(self.share, heads.number)
        first, number = heads.first // self.share, heads.number // share
        self.total[:, first : first + number] += self.room.view(-1, number, share, self.size).sum(2, dtype=self.scan.acc)

    @property
    def gradient(self) -> Tensor:
        """As the operand is shaped."""
        p = self.scan.problem
        return self.total.view(p.batch, p.seqlen, self.heads, self.size)


def forward(term: Linear, x: Inputs, config: Config) -> Output:
    """Y, the final states, and those between."""
    with build.Alone(x.q.device):
        return Scan(term, x, config).forward()


def backward(term: Linear, x: Inputs, config: Config, cotangents: Cotangents) -> Gradients:
    """Gradients of everything."""
    with build.Alone(x.q.device):
        return Scan(term, x, config).backward(cotangents)


def swapped(state: Tensor) -> Tensor:
    """A state with its last axes the other way, in order."""
    return state.transpose(-1, -2).contiguous()


def suits(number: int, shared: int) -> bool:
    """Whether so many heads share with one another, or are whole groups that do."""
    return shared % number == 0 or number % shared == 0
