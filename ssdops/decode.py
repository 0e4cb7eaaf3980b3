"""A step of a few tokens: by a backend's decode kernel where there is one, else as a short sequence.

The kernel reads each state once and writes it once, in its pool if it is in one. As a sequence, states are gathered from their
pool and written back, and where the state after every token is wanted, the tokens are run one at a time.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import config, run
from .backends.base import StepInputs, Stepper, step_values
from .errors import DeviceError, DtypeError, ShapeError, UnsupportedError, ValueRangeError
from .ir import nodes as n
from .ir import operands as ops
from .ir.contraction import Contraction
from .ir.problem import Problem, check_states
from .ir.terms import Term
from .masks import Mask
from .plan import state_terms, stepper, terms_of
from .run import Call


class Stepped(NamedTuple):
    """What a step gives.

    Attributes:
        y: `(batch, tokens, nheads, headdim)`.
        states: after the last token; the pools themselves, if there are slots.
        every: after every token, `(batch, tokens, …)` for each state; empty if not wanted.
    """

    y: Tensor
    states: list[Tensor]
    every: list[Tensor]


@dataclass(frozen=True)
class Prepared:
    """What the signature of a step amounts to."""

    contraction: Contraction
    problem: Problem
    terms: tuple[Term, ...]
    n_states: int
    names: tuple[str, ...]
    backend: Stepper | None


_prepared: dict[tuple[Any, ...], Prepared] = {}


def prepare(call: Call, pooled: bool) -> Prepared:
    """Check a step and find its backend, or recall it.

    Raises:
        What `run.prepare` raises.
    """
    key = (pooled, *call.signature())
    found = _prepared.get(key)
    if found is None:
        found = _prepare(call, pooled)
        if len(_prepared) >= run.MAX_PREPARED:
            _prepared.clear()
        _prepared[key] = found
        if config.debug_level() >= 1 and found.backend is not None:
            print(f"ssdops: a step of {found.contraction} on {found.backend.name!r}")
    return found


def _prepare(call: Call, pooled: bool) -> Prepared:
    contraction, problem = call.contraction, call.problem()
    count, slots = len(state_terms(contraction.mask)), call.states[0].shape[0] if pooled else None
    check_states(call.states, count, problem, given=bool(call.states), slots=slots)
    names = n.operand_names(contraction.mask)
    return Prepared(contraction, problem, terms_of(contraction.mask), count, names, stepper(contraction, problem))


def step(call: Call, slots: Tensor | None, every: bool, rooms: list[Tensor] | None = None) -> Stepped:
    """Run a step without gradients.

    Args:
        call: q, k, v and operands with an axis of tokens; its states are those before the step, or the pools that hold them.
        slots: the slot of each row in its pool, or None.
        every: whether the state after every token is wanted.
        rooms: where to put those, if not in new tensors.
    """
    prepared = prepare(call, slots is not None)
    p, backend = prepared.problem, prepared.backend
    if backend is None:
        out = as_sequence(prepared.contraction.mask, call, slots, every, run.step)
        for room, x in zip(rooms or (), out.every, strict=rooms is not None):
            room.copy_(x)
        return out
    dtypes = [x.dtype for x in call.states] or [p.state_dtype] * prepared.n_states
    state, tokens = (p.nheads, p.headdim, p.dstate), (p.batch, p.seqlen)
    make = call.q.new_empty
    after = [make((p.batch, *state), dtype=dtype) for dtype in dtypes] if slots is None else call.states
    if rooms is None:
        rooms = [make((*tokens, *state), dtype=dtype) for dtype in dtypes] if every else []
    y = make((*tokens, p.nheads, p.headdim), dtype=p.dtype)
    named = dict(zip(prepared.names, call.operands, strict=True))
    values = [step_values(term, p, named) for term in prepared.terms]
    inputs = StepInputs(call.q, call.k, call.v, values, call.states, after, rooms, slots, y, call.scale)
    backend.step(prepared.terms, p, inputs)
    return Stepped(y, after, rooms)


def as_sequence(
    mask: n.Node, call: Call, slots: Tensor | None, every: bool, forward: Callable[[Call], list[Tensor]]
) -> Stepped:
    """A step by `forward`, which runs a short sequence and gives Y and final states; differentiable if that is."""
    pools = call.states
    if slots is not None:
        rows = slots.clamp(0, pools[0].shape[0] - 1)
        call = Call(call.q, call.k, call.v, call.operands, [pool[rows] for pool in pools], call.program, call.scale)
    seen: list[list[Tensor]] = []
    for t in range(call.q.shape[1] if every else 0):
        seen.append(forward(_token(mask, call, t, seen[-1][1:] if seen else call.states)))
    y, *states = [torch.cat([out[0] for out in seen], 1), *seen[-1][1:]] if seen else forward(call)
    after = [torch.stack(parts, 1) for parts in zip(*(out[1:] for out in seen), strict=True)]
    if every and not seen:
        after = [x[:, None][:, :0] for x in states]
    if call.states:
        states, after = ([x.to(old.dtype) for x, old in zip(new, call.states, strict=False)] for new in (states, after))
    if slots is None:
        return Stepped(y, states, after)
    for pool, x in zip(pools, states, strict=True):
        torch.ops.ssdops.write_slots_(pool, x.detach(), slots)
    kept = (slots >= 0) & (slots < pools[0].shape[0])
    y, *after = (torch.where(kept.view(-1, *[1] * (x.ndim - 1)), x, 0.0) for x in (y, *after))
    return Stepped(y, pools, after)


TIME_AXIS = {n.TOKEN: -2, n.CHANNEL: -3, n.RANK: -3}
"""Where the operands of a step have tokens, counted from the right."""


def _token(mask: n.Node, call: Call, t: int, states: list[Tensor]) -> Call:
    """One token of a call, from these states."""
    axis = {name: TIME_AXIS[axes] for x, axes in n.operands_of(mask) if axes in TIME_AXIS for name in ops.names(x)}
    tokens = call.q.shape[1]

    def at(name: str, x: Tensor) -> Tensor:
        place = axis.get(name)
        return x if place is None or x.ndim < -place or x.shape[place] != tokens else x.narrow(place, t, 1)

    operands = [at(name, x) for name, x in zip(n.names_of(mask), call.operands, strict=True)]
    q, k, v = (x[:, t : t + 1] for x in (call.q, call.k, call.v))
    return Call(q, k, v, operands, states, call.program, call.scale)


def write_slots(pool: Tensor, values: Tensor, slots: Tensor) -> None:
    """pool[slots[b]] ← values[b] for every row whose slot is in range; no value is read on the host."""
    if not slots.shape[0]:
        return
    kept = (slots >= 0) & (slots < pool.shape[0])
    row = kept.to(torch.uint8).argmax()  # a row that is kept, if any is: rows that are not write what it writes
    source = torch.where(kept, torch.arange(len(kept), device=kept.device), row)
    where = slots[source].clamp(0, pool.shape[0] - 1).long()
    some = kept.any()
    pool[where] = torch.where(some, values[source].to(pool.dtype), pool[where])


# --- what a step is checked for before it is planned ------------------------------------------------------------------


def check_token(q: Tensor, k: Tensor, v: Tensor) -> None:
    """Whether q, k and v are those of one token."""
    for name, x in (("q", q), ("k", k), ("v", v)):
        dim = "headdim" if name == "v" else "dstate"
        if x.ndim != 3:
            raise ShapeError(
                f"{name} must be (batch, heads, {dim}) in a step, or q, k and v all have tokens after batch; "
                f"got {x.ndim} dimensions: {tuple(x.shape)}"
            )
        if x.shape[0] != q.shape[0]:
            raise ShapeError(f"{name} has batch {x.shape[0]}, expected {q.shape[0]} as in q")


def with_time(mask: Mask) -> Mask:
    """The same mask with a seqlen axis of 1 in every operand that has one."""
    ranks = {n.TOKEN: 2, n.CHANNEL: 3, n.RANK: 3}
    wanted = {name: ranks[axes] for x, axes in n.operands_of(mask.tree) if isinstance(x, str) and axes in ranks for name in [x]}
    operands = {}
    for name, x in mask.operands.items():
        rank = wanted.get(name, x.ndim)
        if x.ndim > rank:
            raise ShapeError(f"{name} has shape {tuple(x.shape)}; a step takes it without its seqlen axis, {rank} dimensions")
        operands[name] = x.unsqueeze(-rank) if name in wanted and x.ndim == rank else x
    return Mask(mask.tree, operands)


def check_pools(pools: list[Tensor], indices: Tensor, q: Tensor) -> None:
    """Whether these are pools, and these the slots of q's rows in them."""
    batch = q.shape[0]
    if not isinstance(indices, Tensor):
        raise DtypeError(f"state_indices must be a torch.Tensor, got {type(indices).__name__}")
    if indices.shape != (batch,) or indices.dtype not in (torch.int32, torch.int64):
        raise ShapeError(f"state_indices must be ({batch},) int32 or int64, got {tuple(indices.shape)} {indices.dtype}")
    if indices.device != q.device:
        raise DeviceError(f"state_indices is on {indices.device}, but q is on {q.device}; move it to q's device")
    if not pools:
        raise ShapeError("state_indices says which slots of a pool to use, and state is None; give the pool as state")
    for pool in pools:
        if pool.ndim != 4 or pool.shape[0] < 1:
            raise ShapeError(f"state must be a pool (slots, nheads, headdim, dstate), got {tuple(pool.shape)}")
        if pool.requires_grad:
            raise UnsupportedError("a state pool is updated in place and takes no gradient; detach it")
        if pool.device != q.device:
            raise DeviceError(f"state is on {pool.device}, but q is on {q.device}; move it to q's device")
    if not torch.compiler.is_compiling() and (indices.device.type == "cpu" or config.check_values()):
        _check_slots(indices.tolist(), min(pool.shape[0] for pool in pools))


def _check_slots(indices: list[int], slots: int) -> None:
    taken = [index for index in indices if index != -1]
    for row, index in enumerate(indices):
        if not -1 <= index < slots:
            raise ValueRangeError(f"state_indices must lie in [0, {slots}), or be -1, got {index} at row {row}")
    if len(set(taken)) < len(taken):
        twice = next(index for index in taken if taken.count(index) > 1)
        raise ValueRangeError(f"state_indices must name each slot once, got slot {twice} for {taken.count(twice)} rows")
