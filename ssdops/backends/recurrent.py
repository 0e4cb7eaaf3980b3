"""Step by step over time: `S_t = a_t S_{t−1} + w_t v_t k_tᵀ`, `y_t = u_t S_t q_t`, for any semiseparable term.

The plainest form of a scan, exact for any decay, as nothing is ever summed in logs or divided, and the form that decoding runs.
Its backward keeps a state every √T steps and walks back from there; the gradient of a log decay is ⟨dS_t, a_t S_{t−1}⟩, which
never cancels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from math import ceil, isqrt

import torch
from torch import Tensor

from ..ir.problem import Problem
from ..ir.resolve import reduce_to, repeat_heads
from ..ir.terms import Diagonal, Linear, Term
from .base import Config, Cotangents, Gradients, Inputs, Output, Support, Work, reduce_value, reject_scan, without_chunks
from .rows import Rows
from .scan import Every, diagonal_backward, diagonal_forward, diagonal_work


class Recurrent:
    """The recurrent form of the contraction."""

    name = "recurrent"
    factored = False

    def supports(self, term: Term, problem: Problem) -> Support:
        """Any scan, and diagonals."""
        return reject_scan(term, self.name) or Support.yes()

    def configs(self, term: Term, problem: Problem, chunk_size: int | None = None) -> Iterable[Config] | Support:
        """Nothing to choose."""
        return without_chunks(self.name, chunk_size) or (Config(),)

    def work(self, term: Term, problem: Problem, config: Config, direction: str = "forward") -> Work:
        """Every step touches the whole state; both passes walk three times, and a step back is several steps' work."""
        p = problem
        if isinstance(term, Diagonal):
            return diagonal_work(p, direction)
        touched = float(p.batch * p.nheads * p.headdim * p.dstate) * p.seqlen
        steps = ceil(p.batch * p.seqlen / max(p.n_states or p.batch, 1))
        if direction == "forward":
            return Work(2 * touched, 1.2 * touched, 4 * touched, 20.0 + 17 * steps)
        return Work(14 * touched, 18 * touched, 60 * touched, 45.0 + 100 * steps)

    def forward(self, term: Term, x: Inputs, config: Config, save: bool = False) -> Output:
        """One step per token."""
        if isinstance(term, Diagonal):
            return Output(diagonal_forward(term, x))
        assert isinstance(term, Linear)  # supports() refuses the rest
        scan = Scan(term, x)
        y, every = x.empty_output(), Every(x)
        state = scan.initial()
        for t in range(scan.rows.length):
            step = scan.step(t)
            scan.rows.write(y, step.advance(state, scan.order)[:, None], t, t + 1)
            if every.wants(t + 1):
                every.put(t + 1, state)
        return Output(y, scan.rows.leave(state, scan.n_states), every=every.states)

    def backward(self, term: Term, x: Inputs, config: Config, cotangents: Cotangents) -> Gradients:
        """Forward again with a state kept every √T steps, then back, each stretch from its kept state."""
        if isinstance(term, Diagonal):
            return diagonal_backward(term, x, cotangents.y)
        assert isinstance(term, Linear)  # supports() refuses the rest
        scan = Scan(term, x)
        out = _Accumulators(scan)
        stretch = max(isqrt(scan.rows.length), 1)
        kept, state = [], scan.initial()
        for t in range(scan.rows.length):
            if t % stretch == 0:
                kept.append(state.clone())
            scan.step(t).advance(state, scan.order)
        dy, dstate = cotangents.y, cotangents.state
        dstates = torch.zeros_like(state) if dstate is None else scan.rows.enter(dstate.to(state.dtype)).clone()
        for index in reversed(range(len(kept))):
            times = range(index * stretch, min((index + 1) * stretch, scan.rows.length))
            steps = [scan.step(t) for t in times]
            before = [kept[index]]
            for step in steps[:-1]:
                before.append(before[-1].clone())
                step.advance(before[-1], scan.order)
            for t, step, start in zip(reversed(times), reversed(steps), reversed(before), strict=True):
                g = scan.rows.read(dy, t, t + 1)[:, 0].to(state.dtype)
                out.put(t, step.retreat(start, dstates, g, scan.order))
        return out.gradients(dstates)


def order_of_events(term: Linear) -> tuple[str, ...]:
    """When, within a step, the state decays, takes in the token, and is read."""
    if term.row_inclusive and term.col_inclusive:
        return ("decay", "read", "add") if term.strict else ("decay", "add", "read")
    if term.col_inclusive:
        return ("read", "decay", "add")
    return ("read", "add", "decay") if term.strict else ("add", "read", "decay")


class Scan:
    """A linear term over its rows: reads the operands of each step."""

    def __init__(self, term: Linear, x: Inputs) -> None:
        self.term, self.x, self.order = term, x, order_of_events(term)
        self.rows = Rows(x.spans, x.problem.batch, x.problem.seqlen, term.causal, x.q.device)
        self.n_states = self.rows.count
        self._slots = {name: x.per_head(name) for name in x.values}

    def initial(self) -> Tensor:
        """A fresh state for every row, [R, H, P, N]."""
        p = self.x.problem
        if self.x.initial is None:
            shape = (self.rows.count, p.nheads, p.headdim, p.dstate)
            return torch.zeros(shape, dtype=p.accumulate, device=self.x.q.device)
        return self.rows.enter(self.x.initial.to(p.accumulate)).clone()

    def step(self, t: int) -> Step:
        """The operands of local time t."""
        x, acc = self.x, self.x.problem.accumulate

        def at(tensor: Tensor) -> Tensor:
            return self.rows.read(tensor, t, t + 1)[:, 0].to(acc)

        slots = {name: at(tensor) for name, tensor in self._slots.items() if tensor is not None}
        heads = x.problem.nheads
        q, k, v = (repeat_heads(at(tensor), heads, 1) for tensor in (x.q, x.k, x.v))
        return Step(q, k, v, slots, self.term.sign * x.scale)


@dataclass(frozen=True)
class Step:
    """One token of every row still running: q, k [R, H, N], v [R, H, P], slots [R, H] (channel [R, H, N])."""

    q: Tensor
    k: Tensor
    v: Tensor
    slots: dict[str, Tensor]
    scale: float

    @property
    def decay(self) -> Tensor | None:
        """a_t, [R, H, 1, 1 | N]."""
        logs = [self.slots[s][..., None, None] for s in ("log_a",) if s in self.slots]
        logs += [self.slots[s][:, :, None] for s in ("channel",) if s in self.slots]
        return (logs[0] if len(logs) == 1 else logs[0] + logs[1]).exp() if logs else None

    @property
    def column(self) -> Tensor:
        """w_t, [R, H, 1]."""
        w = self.slots.get("cols", torch.ones_like(self.q[..., 0]))
        return (w * self.slots["log_cols"].exp() if "log_cols" in self.slots else w)[..., None]

    @property
    def row(self) -> Tensor:
        """scale · u_t, [R, H, 1]."""
        return (self.slots.get("rows", torch.ones_like(self.q[..., 0])) * self.scale)[..., None]

    def advance(self, state: Tensor, order: tuple[str, ...]) -> Tensor:
        """Take the state of these rows one token on, in place; return y_t [R, H, P]."""
        running, read = state[: len(self.k)], None
        for event in order:
            if event == "read":
                read = (running @ self.q[..., None])[..., 0]
            elif event == "add":
                running.addcmul_((self.v * self.column)[..., None], self.k[..., None, :])
            elif (a := self.decay) is not None:
                running.mul_(a)
        assert read is not None  # every order reads
        return read * self.row

    def retreat(self, before: Tensor, dstates: Tensor, dy: Tensor, order: tuple[str, ...]) -> dict[str, Tensor]:
        """Undo one token: from the state before it and the cotangent of the state after it (updated in place)."""
        out: dict[str, Tensor] = {}
        s, seen = before[: len(self.k)], []
        for event in order:  # the state as each event leaves it
            if event == "add":
                s = s + (self.v * self.column)[..., None] * self.k[..., None, :]
            elif event == "decay" and (a := self.decay) is not None:
                s = s * a
            seen.append(s)
        ds = dstates[: len(self.k)]
        for event, s in zip(reversed(order), reversed(seen), strict=True):
            if event == "read":
                g = dy * self.row
                out["q"] = (s.transpose(-1, -2) @ g[..., None])[..., 0]
                out["rows"] = (dy * self.scale * (s @ self.q[..., None])[..., 0]).sum(-1)
                ds.addcmul_(g[..., None], self.q[..., None, :])
            elif event == "add":
                weighted = (ds @ self.k[..., None])[..., 0]  # d(w v), [R, H, P]
                out["v"] = weighted * self.column
                out["k"] = (ds.transpose(-1, -2) @ (self.v * self.column)[..., None])[..., 0]
                along = (weighted * self.v).sum(-1)
                out["cols"] = along * self.slots["log_cols"].exp() if "log_cols" in self.slots else along
                out["log_cols"] = along * self.column[..., 0]
            elif (a := self.decay) is not None:
                change = ds * s
                out["channel"] = change.sum(-2)
                out["log_a"] = change.sum((-1, -2))
                ds.mul_(a)
        return out


class _Accumulators:
    """Gradients written token by token, reduced over shared heads as they come."""

    def __init__(self, scan: Scan) -> None:
        x, p = scan.x, scan.x.problem
        self.scan = scan

        def empty(*shape: int) -> Tensor:
            return torch.zeros(p.batch, p.seqlen, *shape, dtype=p.accumulate, device=x.q.device)

        self.inputs = {"q": empty(p.q_heads, p.dstate), "k": empty(p.k_heads, p.dstate), "v": empty(p.v_heads, p.headdim)}
        channels = {"channel": (p.nheads, p.dstate)}
        self.values = {slot: empty(*channels.get(slot, (p.nheads,))) for slot in x.values}

    def put(self, t: int, grads: dict[str, Tensor]) -> None:
        """Write the gradients of local time t."""
        write: Callable[[Tensor, Tensor, int, int], None] = self.scan.rows.write
        for name, total in self.inputs.items():
            grad = grads[name]
            write(total, reduce_to(grad, (len(grad), total.shape[2], grad.shape[2]), 1)[:, None], t, t + 1)
        for slot, total in self.values.items():
            write(total, grads[slot][:, None], t, t + 1)

    def gradients(self, dstates: Tensor) -> Gradients:
        """What was written, with the cotangent that reached the initial states."""
        x = self.scan.x
        initial = None if x.initial is None else self.scan.rows.leave(dstates, self.scan.n_states)
        values = {slot: reduce_value(total, x.values[slot]) for slot, total in self.values.items()}
        q, k, v = self.inputs.values()
        return Gradients(q, k, v, initial=initial, values=values)
