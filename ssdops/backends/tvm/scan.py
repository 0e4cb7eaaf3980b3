"""A term on its tensors, and the programs that passes on any device call for a linear one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from itertools import accumulate
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...ir.problem import Problem, common_heads
from ...ir.terms import Linear
from ..base import Config, Cotangents, Gradients, Inputs, Output, reduce_value
from . import build
from .machine import machine
from .tile import LINES, Tile

VECTOR, ALIGNED = 16, 128
"""Bytes of which a tensor's address is a multiple, and that of every part of a room."""
Outputs = Sequence[Tensor | None]
"""What a pass gives; None for what nobody reads."""
BY_TOKEN = ("log_a", "rows", "cols")
"""What there are gradients of by token and head."""
Part = tuple[tuple[int, ...], torch.dtype]
"""The shape and dtype of a part of a tensor of bytes."""


_known: dict[tuple[Any, ...], Callable[..., None]] = {}
"""Programs by what a pass says of them."""


class Heads(NamedTuple):
    """Some of them."""

    first: int
    number: int
    of: int


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


@dataclass
class Notes:
    """What a pass made and called, so that it can be called again (`replay.py`).

    Attributes:
        made: tensors that programs fill.
        unread: tensors that programs do not write, and that are the same for every such pass.
        calls: programs and their arguments.
    """

    made: list[Tensor] = field(default_factory=list)
    unread: list[Tensor] = field(default_factory=list)
    calls: list[tuple[Callable[..., None], tuple[Any, ...]]] = field(default_factory=list)


class Keepsake(NamedTuple):
    """What a forward pass leaves for the backward pass, in one tensor; and the parts of it."""

    whole: Tensor
    starts: Tensor
    scores: Tensor
    lines: Tensor
    total: Tensor


class Pass:
    """A term's tensors as programs read them, and the programs that it wants."""

    def __init__(self, x: Inputs, config: Config) -> None:
        p = x.problem
        self.x, self.problem, self.device = x, p, x.q.device
        self.wanted: list[tuple[str, Tile]] = []
        self.machine = machine(p)
        self.chunk = config.chunk_size or self.machine.chunk
        self.acc, self.data = p.accumulate, self.machine.data
        self.tokens = p.batch * p.seqlen
        self.q, self.k, self.v = (self.flat(t) for t in (x.q, x.k, x.v))

    def flat(self, x: Tensor) -> Tensor:
        """`(batch, seqlen, heads, size)` as `[tokens, heads, size]`, in the dtype of products, where vectors can be read."""
        if x.dtype != self.data or not x.is_contiguous():  # asked first, as to ask torch for nothing takes a microsecond, too
            x = x.to(self.data).contiguous()
        x = x.view(self.tokens, *x.shape[2:])
        return x if x.data_ptr() % VECTOR == 0 else x.clone()

    def new(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """Memory that a program fills."""
        return torch.empty(shape, dtype=dtype or self.acc, device=self.device)

    def unread(self, *shape: int) -> Tensor:
        """What a program takes and does not read, of a dtype of sums."""
        return unread(shape, self.acc, self.device)

    def program(self, name: str, **fields: Any) -> Callable[..., None]:
        """A compiled one; or nothing, if it is yet to be made, and the pass will be gone through again (`passes.py`)."""
        key = (name, self.machine.target, self.data, self.acc, self.chunk, *fields.items())  # hashed faster than a `Tile`
        if (run := _known.get(key)) is not None and build.collected() is None:
            return run
        data, acc = (str(dtype).removeprefix("torch.") for dtype in (self.data, self.acc))
        tile = Tile(self.machine.target, data, acc, self.chunk, **fields)
        if build.collected() is not None or (run := build.known(name, tile)) is None:
            self.wanted.append((name, tile))
            return lambda *_: None
        _known[key] = run
        return run


class Scan(Pass):
    """A linear term on its tensors. What it makes and calls is noted."""

    def __init__(self, term: Linear, x: Inputs, config: Config) -> None:
        super().__init__(x, config)
        self.notes = Notes()
        self.term, self.scale = term, float(term.sign * x.scale)
        self.scaled = any(slot in x.values for slot in ("rows", "cols", "log_cols"))
        self.lay_rows()
        self.logs = self.dtype_of_logs()
        log_a = self.slot("log_a", self.logs)
        self.d = self.filled(0, self.logs) if log_a is None else log_a
        self.nothing = self.filled(0, self.logs) if self.scaled else self.d  # what is not scaled does not read it
        self.log_cols = self.slot("log_cols", self.logs)
        if self.scaled:
            rows, cols = (
                self.filled(1, self.acc) if (value := self.slot(name, self.acc)) is None else value for name in ("rows", "cols")
            )
        else:
            rows = cols = self.unread(1, 1)
        self.scales = rows, cols
        self.notes.unread += (self.begin, self.chunks, self.d, self.nothing, *self.scales)

    @property
    def line(self) -> torch.dtype:
        """Dtype of what there is per token and head, as `Tile.line` has it."""
        return torch.float64 if self.data == self.acc else self.acc

    @staticmethod
    def dtype_of_data(problem: Problem) -> torch.dtype:
        """In which programs read q, k and v."""
        return machine(problem).data

    @staticmethod
    def as_read(state: Tensor) -> Tensor:
        """States, with their memory as programs read it."""
        return state.contiguous()

    @staticmethod
    def as_given(state: Tensor) -> Tensor:
        """A look at what programs wrote, as states are."""
        return state

    @classmethod
    def output(cls, found: Outputs) -> Output:
        """Of what `outputs` gives."""
        state = None if (final := found[1]) is None else cls.as_given(final)
        return Output(found[0], state, tuple(found[2:]))  # type: ignore[arg-type]  # only a state may not be there

    @classmethod
    def gathered(cls, x: Inputs, found: Outputs) -> Gradients:
        """Gradients of a term's inputs, of what `gradients` gives."""
        given, q, k, v, log_a, rows, cols = found
        assert q is not None and k is not None and v is not None  # they always are there
        q, k, v = q if q.ndim == 4 else q.sum(3), k if k.ndim == 4 else k.sum(3), v if v.ndim == 4 else v.sum(3)
        by_token: Any = {"log_a": log_a, "rows": rows, "cols": cols}  # None is of what the term does not read
        return Gradients(q, k, v, None if given is None else cls.as_given(given), by_slot(x, by_token))

    def of_tokens(self, by_token: dict[str, Tensor]) -> list[Tensor | None]:
        """Gradients `(batch, seqlen, nheads)` of `BY_TOKEN`; None of what the term does not read."""
        p = self.problem
        read = {*self.x.values, *(("cols",) if "log_cols" in self.x.values else ())}
        return [by_token[name].view(p.batch, p.seqlen, p.nheads) if name in read else None for name in BY_TOKEN]

    def outputs(self, save: bool) -> Outputs:
        """What programs make in a forward pass."""
        raise NotImplementedError

    def gradients(self, cotangents: Cotangents) -> Outputs:
        """What programs make in a backward pass."""
        raise NotImplementedError

    def forward(self, save: bool = False) -> Output:
        """Y, the final states, and those between; with `save`, what the backward pass would work out again."""
        raise NotImplementedError

    def backward(self, cotangents: Cotangents) -> Gradients:
        """Gradients of everything."""
        return self.gathered(self.x, self.gradients(cotangents))

    def dtype_of_logs(self) -> torch.dtype:
        """In which programs read log decays."""
        return torch.float64

    def lay_rows(self) -> None:
        """Where rows begin and which chunk is in which slot: a table for documents, nothing for rows of one length."""
        p, bounds = self.problem, self.x.boundaries
        if bounds is None:
            self.rows, self.seqlen, self.slots = p.batch, p.seqlen, p.batch * -(-p.seqlen // self.chunk)
            self.begin, self.chunks = (unread(shape, torch.int64, self.device) for shape in ((1,), (1, 2)))
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

    def slot(self, name: str, dtype: torch.dtype) -> Tensor | None:
        """An operand per token and head, `[tokens, nheads]`."""
        if (x := self.x.values.get(name)) is None:
            return None
        p = self.problem
        if x.shape != (p.batch, p.seqlen, p.nheads):
            x = self.x.per_head(name)
            assert x is not None  # the slot is there
        return x.to(dtype).reshape(self.tokens, p.nheads).contiguous()

    def filled(self, value: int, dtype: torch.dtype) -> Tensor:
        """A number for each token and head, `[tokens, nheads]`, which nobody writes: of one tensor for all calls."""
        count = self.tokens * self.problem.nheads
        whole = constant(value, 1 << count.bit_length(), dtype, self.device)
        return whole[:count].view(self.tokens, self.problem.nheads)

    def shaped(self, y: Tensor) -> Tensor:
        """`[tokens, heads, size]` by batch rows."""
        return y.unflatten(0, (self.problem.batch, self.problem.seqlen))

    def covered(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """Memory of which a program fills what rows have: zeros where documents may leave tokens out."""
        make = torch.empty if self.x.documents is None else torch.zeros
        self.notes.made.append(made := make(shape, dtype=dtype or self.acc, device=self.device))
        return made

    def new(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """Memory that a program fills."""
        self.notes.made.append(made := super().new(*shape, dtype=dtype))
        return made

    def unread(self, *shape: int) -> Tensor:
        """What a program takes and does not read, of a dtype of sums."""
        self.notes.unread.append(found := super().unread(*shape))
        return found

    def parts_of(self, parts: Sequence[Part], whole: Tensor | None = None) -> tuple[Tensor, list[Tensor]]:
        """One tensor of all parts, or what there is already, and views of it: each tensor takes torch some microseconds."""
        bytes_of = [prod(shape) * dtype.itemsize for shape, dtype in parts]
        *begin, size = accumulate((-(-count // ALIGNED) * ALIGNED for count in bytes_of), initial=0)
        if whole is None:
            whole = self.new(size, dtype=torch.uint8)
        found = zip(begin, bytes_of, parts, strict=True)
        return whole, [whole[at : at + count].view(dtype).view(shape) for at, count, (shape, dtype) in found]

    # --- programs -------------------------------------------------------------------------------------------------------

    def program(self, name: str, **fields: Any) -> Callable[..., None]:
        """As any pass does; its calls are noted."""
        return self.noted(super().program(name, **fields))

    def noted(self, run: Callable[..., None]) -> Callable[..., None]:
        """A program whose calls are noted."""

        def call(*arguments: Any) -> None:
            self.notes.calls.append((run, arguments))
            run(*arguments)

        return call

    def sides(self, term: Linear, room: tuple[Tensor, Tensor] | None = None) -> Sides:
        """Of the term, or of its transpose: then what weighs rows, and what is added to their logs, is columns'.

        Args:
            room: for lines and E.
        """
        p, mine = self.problem, term is self.term
        if room is None:
            lines = self.new(self.slots, p.nheads, LINES, self.chunk, dtype=self.line)
            total = self.new(self.slots, p.nheads, dtype=torch.float64)
        else:
            lines, total = room
        if self.tokens:
            r = self.nothing
            c = r if self.log_cols is None else self.log_cols
            (u, w), scales = self.scales, (self.scale, 1.0)
            if not mine:
                r, c, u, w, scales = c, r, w, u, scales[::-1]
            self.program("lines", scaled=self.scaled, logs=str(self.logs).removeprefix("torch."))(
                self.d, r, c, u, w, self.chunks, lines, total, *scales, self.seqlen, int(term.causal),
                int(term.row_inclusive), int(term.col_inclusive),
            )  # fmt: skip
        return Sides(term, lines, total)

    def scores(self, q: Tensor, k: Tensor, heads: Heads, room: Tensor | None = None) -> Tensor:
        """⟨q, k⟩ of the tokens of each chunk, `[slots, heads, chunk, chunk]`, in the room for them if there is one."""
        out = self.new(self.slots, heads.number, self.chunk, self.chunk, dtype=self.data) if room is None else room
        if self.tokens:
            inner = self.machine.inner(q.shape[2])
            self.program("scores", inner=inner, whole=inner == q.shape[2])(
                q, k, self.chunks, out, self.seqlen, heads.first, heads.of
            )
        return out

    def shared_scores(self, room: Tensor | None = None) -> Scores:
        """⟨q, k⟩, once for heads that share both."""
        p, groups = self.problem, common_heads(self.problem)
        return Scores(self.scores(self.q, self.k, Heads(0, groups, groups), room), 0, p.nheads // groups)

    def every(self, kept: Tensor, final: Tensor) -> Tensor:
        """The states after every `state_every` tokens: each enters the chunk after them, or is the last."""
        p, every = self.problem, self.problem.state_every
        assert every is not None  # states were kept for it
        out = self.new(p.batch, p.seqlen // every, p.nheads, p.headdim, p.dstate, dtype=p.state_dtype)
        if not self.tokens:
            return out
        by_row = kept.transpose(-1, -2).unflatten(0, (p.batch, self.slots // p.batch))
        for index in range(p.seqlen // every):
            end = (index + 1) * every
            out[:, index] = final if end == p.seqlen else by_row[:, end // self.chunk]
        return out


def by_slot(x: Inputs, by_token: dict[str, Tensor]) -> dict[str, Tensor]:
    """What tokens exchanged, by token and head, as gradients of the values that a term reads."""
    p, values = x.problem, x.values
    if "log_cols" in values:
        cols = x.per_head("cols")
        by_token["log_cols"] = by_token["cols"] if cols is None else by_token["cols"] * cols.reshape(by_token["cols"].shape)
    found = {}
    for slot, value in values.items():
        grad = by_token[slot]
        if grad.shape != value.shape:
            grad = reduce_value(grad.view(p.batch, p.seqlen, p.nheads), value)
        found[slot] = grad
    return found


@cache
def unread(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A tensor for all calls that need one that is not read or written: making it takes longer than passing it."""
    return torch.empty(shape, dtype=dtype, device=device)


_constants: dict[tuple[int, int, torch.dtype, torch.device], Tensor] = {}


def constant(value: int, count: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """So many equal numbers, kept for as long as the process runs: passes that are called again, and graphs, have addresses.

    In a capture they are the graph's own, since they are only there once it has been replayed.
    """
    key = (value, count, dtype, device)
    if (found := _constants.get(key)) is not None:
        return found
    made = torch.full((count,), value, dtype=dtype, device=device)
    if device.type == "cuda":
        if torch.cuda.is_current_stream_capturing():
            return made
        torch.cuda.current_stream(device).synchronize()  # other streams read it too
    _constants[key] = made
    return made
