"""Running a call: checked and planned once per signature, then every step of its plan, forward or backward."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, TypeAlias

import torch
from torch import Tensor

from . import config
from .autotune import policy, store
from .backends import registry
from .backends.base import Adder, Begun, Config, Cotangents, Gradients, Inputs, Output, Starter, Summarizer, bind
from .ir import nodes as n
from .ir.contraction import Contraction, parse_contraction
from .ir.problem import Problem, check_states, check_values, mask_needs_values_checked, problem_of
from .ir.terms import Linear, factored_operands, term_operands
from .ir.transposed import through
from .plan import plan, state_terms
from .steps import Plan, Step

Order: TypeAlias = "tuple[tuple[int, bool], ...]"
"""Steps by index, in the order in which they run, and whether each adds to what those before it have made."""


@dataclass(slots=True)  # not frozen, as one is made at every call and freezing costs a microsecond
class Call:
    """The arguments of `ssdops::forward`.

    Attributes:
        q, k: `(batch, seqlen, heads, dstate)`; v: `(batch, seqlen, heads, headdim)`.
        operands: of the mask, in the order of their names in its tree.
        states: the initial states, one per linear term, or none.
        program: a contraction as text (`ir/contraction.py`).
        scale: the factor on Y.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    operands: list[Tensor]
    states: list[Tensor]
    program: str
    scale: float

    @property
    def contraction(self) -> Contraction:
        """The program, parsed."""
        return parse_contraction(self.program)

    @property
    def named(self) -> dict[str, Tensor]:
        """Operands by name."""
        return dict(zip(n.operand_names(self.contraction.mask), self.operands, strict=True))

    def problem(self) -> Problem:
        """Checked sizes, dtypes and target.

        Raises:
            ShapeError, DtypeError, DeviceError.
        """
        c = self.contraction
        return problem_of(c.mask, self.q, self.k, self.v, self.named, self.states, c.state_dtype, c.state_every)

    def signature(self) -> tuple[Any, ...]:
        """Everything that a plan depends on."""
        q, k, v = self.q, self.k, self.v
        return (
            self.program, len(self.states), q.shape, k.shape, v.shape, q.dtype, k.dtype, v.dtype, q.device, k.device, v.device,
            q.stride(), k.stride(), v.stride(),
            *[(x.shape, x.dtype, x.device) for x in self.operands], *[(x.shape, x.dtype, x.device) for x in self.states],
        )  # fmt: skip


@dataclass(frozen=True)
class Prepared:
    """What a signature amounts to."""

    contraction: Contraction
    problem: Problem
    plan: Plan
    names: tuple[str, ...]
    check_values: bool

    @cached_property
    def steps(self) -> tuple[Step, ...]:
        """What runs: the steps of the plan, scans with the diagonals that they take along."""
        return self.plan.joined()

    @cached_property
    def forward_order(self) -> Order:
        """Of the forward pass."""
        return self._order("forward")

    @cached_property
    def backward_order(self) -> Order:
        """Of the backward pass."""
        return self._order("backward")

    def _order(self, direction: str) -> Order:
        """Those that add come last: the last of them rounds the sum as it writes it."""
        adds = [isinstance(b := registry.get(s.backend), Adder) and b.adds(s.term, self.problem, direction) for s in self.steps]
        return tuple(sorted(enumerate(adds), key=lambda step: step[1]))


_prepared: dict[tuple[Any, ...], Prepared] = {}
MAX_PREPARED = 65536


def prepare(call: Call, direction: str = "forward") -> Prepared:
    """Check and plan a call, or recall it: everything but the values of the tensors is decided here.

    A plan holds as long as the tuner's mode does, and until a result of the tuner is new.

    Args:
        direction: what to plan for (`autotune.workload.DIRECTIONS`).

    Raises:
        ShapeError, DtypeError, DeviceError, ValueRangeError, UnsupportedError, UnknownBackendError, MaskError, TuningError.
    """
    signature = call.signature()
    key = (direction, policy.current(), store.version(), signature)
    found = _prepared.get(key)
    if found is None:
        found = _prepare(call, direction)
        key = (direction, policy.current(), store.version(), signature)  # this call itself may have been tuned
        if len(_prepared) >= MAX_PREPARED:
            _prepared.clear()
        _prepared[key] = found
        if config.debug_level() >= 1:
            print(f"ssdops: {found.contraction}\n{found.plan}")
    if found.check_values:
        check_values(found.contraction.mask, call.named, call.q.shape[1])
    return found


def _prepare(call: Call, direction: str) -> Prepared:
    contraction, problem = call.contraction, call.problem()
    if call.states or contraction.return_state:
        check_states(call.states, len(state_terms(contraction.mask)), problem, given=bool(call.states))
    checked = mask_needs_values_checked(contraction.mask) and (call.q.device.type == "cpu" or config.check_values())
    found = plan(contraction, problem, direction)
    return Prepared(contraction, problem, found, n.operand_names(contraction.mask), checked)


def forward(call: Call, save: bool = False, learnt: bool = False) -> list[Tensor]:
    """Y and, if wanted, the final states, then those between; with `save`, then what the backward pass may use.

    Args:
        learnt: whether a backward pass will follow; `save` says so as well.
    """
    return forward_as(prepare(call, "backward" if save or learnt else "forward"), call, save)


def step(call: Call) -> list[Tensor]:
    """`forward` of the few tokens of a step, which are planned apart."""
    return forward_as(prepare(call, "step"), call, False)


def forward_as(prepared: Prepared, call: Call, save: bool) -> list[Tensor]:
    """`forward` by a plan that is made."""

    def run(index: int, step: Step, x: Inputs) -> Output:
        return registry.get(step.backend).forward(step.term, x, step.config, save)

    return _summed(prepared, _bound(prepared, call, prepared.forward_order), run, save, call.q.device)


def _summed(
    prepared: Prepared,
    steps: list[tuple[int, Step, Inputs]],
    run: Callable[[int, Step, Inputs], Output],
    save: bool,
    device: torch.device,
) -> list[Tensor]:
    """What `forward` gives: every step run, and summed."""
    p, total = prepared.problem, None
    left: dict[int, tuple[Tensor | None, Tensor | None, tuple[Tensor, ...]]] = {}
    for i, adds in prepared.forward_order:
        index, step, x = steps[i]
        x.onto = total if adds else None
        out = run(index, step, x)
        x.onto, left[i] = None, (out.state, out.every, out.saved)  # and nothing holds on to the sum before
        total = out.y if total is None or adds else total.add_(out.y)
    finals: list[Tensor] = []
    every: list[Tensor] = []
    for i, step in enumerate(prepared.steps):
        state, between, _ = left[i]
        if isinstance(step.term, Linear) and prepared.contraction.return_state:
            assert state is not None  # every backend returns the state of a linear term
            finals.append(state.to(p.state_dtype).contiguous())
        if isinstance(step.term, Linear) and p.state_every is not None:
            assert between is not None  # likewise
            every.append(between.to(p.state_dtype).contiguous())
    if total is None:
        total = torch.zeros(p.batch, p.seqlen, p.nheads, p.headdim, dtype=p.dtype, device=device)
    total = total if total.dtype == p.dtype else total.to(p.dtype)  # a call that does nothing takes a microsecond, too
    public = [total.contiguous(), *finals, *every]  # as tracing has been told
    return [*public, *_packed(prepared, [left[i][2] for i in range(len(left))])] if save else public


def final_states(call: Call) -> list[Tensor]:
    """What `forward` gives of a program that returns states, but Y: in the accumulation dtype, by a pass of its own where a
    backend has one."""
    prepared = prepare(call)
    return [_final_state(step, x) for index, step, x in _bound(prepared, call, prepared.forward_order) if index >= 0]


def _final_state(step: Step, x: Inputs) -> Tensor:
    backend = registry.get(step.backend)
    assert isinstance(step.term, Linear)
    if isinstance(backend, Summarizer):
        state = backend.final_state(step.term, x, step.config)
    else:
        given = backend.forward(step.term, x, step.config).state
        assert given is not None  # every backend returns the state of a linear term
        state = given
    return state.to(x.problem.accumulate)


@dataclass(frozen=True, slots=True)
class Started:
    """A forward pass that waits for the states that enter, for which `Call.states` has the room.

    Attributes:
        steps: those of the plan, bound.
        begun: of each linear step, in order, what it leaves and how it goes on.
    """

    prepared: Prepared
    steps: list[tuple[int, Step, Inputs]]
    begun: list[Begun]

    def finish(self, save: bool, arrive: Callable[[], None]) -> list[Tensor]:
        """What `forward` gives; `arrive` fills the states of the call, and is called once work that needs none is under way."""

        def run(index: int, step: Step, x: Inputs) -> Output:
            if index < 0:
                return registry.get(step.backend).forward(step.term, x, step.config, save)
            return self.begun[index].finish(save, arrive)  # which has this x

        return _summed(self.prepared, self.steps, run, save, self.steps[0][2].q.device)


def begin(call: Call, learnt: bool) -> Started:
    """`forward` of a call whose states are not there yet; `learnt` as for it."""
    prepared = prepare(call, "backward" if learnt else "forward")
    steps = _bound(prepared, call, prepared.forward_order)
    return Started(prepared, steps, [_begun(step, x) for index, step, x in steps if index >= 0])


def _begun(step: Step, x: Inputs) -> Begun:
    backend = registry.get(step.backend)
    assert isinstance(step.term, Linear)
    begun = backend.begin(step.term, x, step.config) if isinstance(backend, Starter) else None
    if begun is not None:
        return begun

    def finish(save: bool, arrive: Callable[[], None]) -> Output:
        arrive()
        return backend.forward(step.term, x, step.config, save)

    return Begun(_final_state(step, replace(x, initial=None)), None, finish)


def _packed(prepared: Prepared, saved: list[tuple[Tensor, ...]]) -> list[Tensor]:
    """What each step saved, as one list: first how many tensors each has, and by which backend, configuration and scan."""
    names, parts = registry.names(), iter(saved)
    table = [
        (
            len(next(parts)) if step.along is None else 0, names.index(step.backend), step.config.chunk_size or 0,
            step.config.segments, -1 if step.along is None else step.along,
        )
        for step in prepared.plan.steps
    ]  # fmt: skip
    return [torch.tensor(table), *(x for part in saved for x in part)]


def _unpacked(prepared: Prepared, saved: list[Tensor]) -> tuple[Prepared, list[list[Tensor]]]:
    """The inverse of `_packed`, with the plan that saved it, which need not be what would be planned now.

    Nothing for every step if nothing was saved: then any plan will do.
    """
    steps = prepared.plan.steps
    if not saved:
        return prepared, [[] for _ in prepared.steps]
    names, remaining, parts, ran = registry.names(), iter(saved[1:]), [], []
    for step, (count, backend, chunk_size, segments, scan) in zip(steps, saved[0].tolist(), strict=True):
        along = None if scan < 0 else scan
        if along is None:
            parts.append([next(remaining) for _ in range(count)])
        config = Config(chunk_size or None, segments)
        same = (step.backend, step.config, step.along) == (names[backend], config, along)
        ran.append(step if same else Step(step.term, names[backend], config, step.seconds, along=along))
    found = Plan(tuple(ran))
    return prepared if found == prepared.plan else replace(prepared, plan=found), parts


def _bound(prepared: Prepared, call: Call, order: Order) -> list[tuple[int, Step, Inputs]]:
    """Each step with its tensors, and the index of its state among the linear terms (−1 if it has none)."""
    named, out, seen = dict(zip(prepared.names, call.operands, strict=True)), [], 0
    p, wants_state = prepared.problem, prepared.contraction.return_state or prepared.problem.state_every is not None
    # several terms are summed before they are rounded, which only the last can do as it writes, if it adds to the others;
    # but that the first of two is rounded too is less than tensor cores round, and half of what there is to read and to write
    last = order[-1][0] if order and (order[-1][1] or len(order) == 1) else -1
    narrow = len(order) == 2 and order[-1][1] and p.dtype == torch.bfloat16
    for i, step in enumerate(prepared.steps):
        dtype = p.dtype if i == last or narrow else p.accumulate
        linear = isinstance(step.term, Linear)
        initial = call.states[seen] if linear and call.states else None
        factored = registry.is_factored(step.backend)
        x = bind(step.term, p, call.q, call.k, call.v, named, initial, call.scale, dtype, wants_state, factored)
        out.append((seen if linear else -1, step, x))
        seen += linear
    return out


def backward(
    call: Call, cotangents: list[Tensor], saved: list[Tensor], arrive: Callable[[], None] | None = None
) -> list[Tensor]:
    """Gradients of q, k, v, the operands (empty for integers) and the states.

    Args:
        arrive: fills the cotangents of states, if they are not there yet.
    """
    return backward_as(prepare(call, "backward"), call, cotangents, saved, arrive)


def backward_as(
    prepared: Prepared, call: Call, cotangents: list[Tensor], saved: list[Tensor], arrive: Callable[[], None] | None = None
) -> list[Tensor]:
    """`backward` by a plan that is made, or by the one that saved what it is to use."""
    prepared, parts = _unpacked(prepared, saved)
    dy, dstates = cotangents[0], cotangents[1:]
    total: Gradients | None = None
    named = call.named
    doperands: dict[str, Tensor] = {}
    dinitial: dict[int, Tensor] = {}
    steps = _bound(prepared, call, prepared.backward_order)
    for i, adds in prepared.backward_order:
        (index, step, x), kept = steps[i], parts[i]
        dstate = dstates[index] if index >= 0 and dstates else None
        backend, pending = registry.get(step.backend), None
        if arrive is not None and dstate is not None:
            if isinstance(backend, Starter):
                pending = arrive
            else:
                arrive()
        cotangents_of = Cotangents(dy, dstate, kept, pending, total if adds else None)
        grads = backend.backward(step.term, x, step.config, cotangents_of)
        if total is None or adds:
            total = grads
        else:
            for whole, part in ((total.q, grads.q), (total.k, grads.k), (total.v, grads.v)):
                whole += part
        for name, grad in {**grads.operands, **_through_expressions(step, grads, named)}.items():
            doperands[name] = doperands[name] + grad if name in doperands else grad
        if index >= 0 and call.states:
            assert grads.initial is not None  # every backend returns it where an initial state was given
            dinitial[index] = grads.initial.to(call.states[index].dtype)
    q, k, v = call.q, call.k, call.v
    if total is None:
        total = Gradients(torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v))
    of_operands = [_of_operand(x, doperands.get(name), q) for name, x in named.items()]
    of_inputs = [total.q.to(q.dtype), total.k.to(k.dtype), total.v.to(v.dtype)]
    of_states = [dinitial[index] for index in range(len(dinitial))]
    return [x.contiguous() for x in (*of_inputs, *of_operands, *of_states)]  # as tracing has been told


def _of_operand(x: Tensor, grad: Tensor | None, q: Tensor) -> Tensor:
    """The gradient of an operand: empty for integers, zero where no term reads it."""
    if not x.is_floating_point():
        return q.new_empty(0)
    return torch.zeros_like(x) if grad is None else grad.to(x.dtype)


def _through_expressions(step: Step, grads: Gradients, named: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Gradients of a term's slots → gradients of the operands whose expressions fill them."""
    operands = (factored_operands if registry.is_factored(step.backend) else term_operands)(step.term)
    slots = {slot: (x, axes) for slot, (x, axes) in operands.items() if slot in grads.values}
    return through(slots, grads.values, named, grads.v.shape[1])
