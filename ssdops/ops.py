"""The torch.library operators, `ssdops::forward` and `ssdops::backward`: the only autograd glue.

An operator takes q, k, v, the mask's operands in the order of their names in the tree, the initial states, and the program, a
contraction as text (`ir/contraction.py`). It checks and plans once per signature, runs the plan's steps, and sums them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import config
from .adjoint import differentiable_backward
from .backends import registry
from .backends.base import Cotangents, Gradients, Inputs, bind
from .errors import UnsupportedError
from .ir import nodes as n
from .ir.contraction import Contraction, parse_contraction
from .ir.problem import Problem, check_states, check_values, mask_needs_values_checked, problem_of
from .ir.resolve import resolve
from .ir.terms import Linear, term_operands
from .plan import Plan, Step, check, plan, state_terms
from .vmap import Fold, unmapped_shape

LIBRARY = torch.library.Library("ssdops", "DEF")
LIBRARY.define(
    "forward(Tensor q, Tensor k, Tensor v, Tensor[] operands, Tensor[] states, str program, float scale, "
    "bool save=False) -> Tensor[]"
)
LIBRARY.define(
    "backward(Tensor[] cotangents, Tensor[] saved, Tensor q, Tensor k, Tensor v, Tensor[] operands, Tensor[] states, "
    "str program, float scale) -> Tensor[]"
)
LIBRARY.define("write_slots_(Tensor(a!) pool, Tensor values, Tensor indices) -> ()")
_forward_op = torch.ops.ssdops.forward.default
_backward_op = torch.ops.ssdops.backward.default


# --- one signature, checked and planned once ------------------------------------------------------------------------


@dataclass(frozen=True)
class Prepared:
    """What a signature amounts to."""

    contraction: Contraction
    problem: Problem
    plan: Plan
    names: tuple[str, ...]
    check_values: bool


_prepared: dict[tuple[Any, ...], Prepared] = {}
_MAX_PREPARED = 65536


def _signature(q: Tensor, k: Tensor, v: Tensor, rest: Sequence[Tensor], n_states: int, program: str) -> tuple[Any, ...]:
    return (
        program, n_states, q.device, q.shape, k.shape, v.shape, q.dtype, k.dtype, v.dtype,
        *[(x.shape, x.dtype, x.device) for x in rest],
    )  # fmt: skip


def prepare(q: Tensor, k: Tensor, v: Tensor, operands: Sequence[Tensor], states: Sequence[Tensor], program: str) -> Prepared:
    """Check and plan a call, or recall it: everything but the values of the tensors is decided here.

    Raises:
        ShapeError, DtypeError, DeviceError, UnsupportedError, UnknownBackendError, MaskError.
    """
    key = _signature(q, k, v, (*operands, *states), len(states), program)
    found = _prepared.get(key)
    if found is None:
        contraction = parse_contraction(program)
        found = _prepare(contraction, q, k, v, operands, states)
        if len(_prepared) >= _MAX_PREPARED:
            _prepared.clear()
        _prepared[key] = found
        if config.debug_level() >= 1:
            print(f"ssdops: {contraction}\n{found.plan}")
    if found.check_values:
        check_values(found.contraction.mask, dict(zip(found.names, operands, strict=True)), q.shape[1])
    return found


def _prepare(
    contraction: Contraction, q: Tensor, k: Tensor, v: Tensor, operands: Sequence[Tensor], states: Sequence[Tensor]
) -> Prepared:
    names = n.operand_names(contraction.mask)
    named = dict(zip(names, operands, strict=True))
    problem = problem_of(contraction.mask, q, k, v, named, states, contraction.state_dtype)
    if states or contraction.return_state:
        check_states(states, len(state_terms(contraction.mask)), problem, given=bool(states))
    checked = mask_needs_values_checked(contraction.mask) and (q.device.type == "cpu" or config.check_values())
    return Prepared(contraction, problem, plan(contraction, problem), names, checked)


# --- forward --------------------------------------------------------------------------------------------------------


def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    operands: list[Tensor],
    states: list[Tensor],
    program: str,
    scale: float,
    save: bool = False,
) -> list[Tensor]:
    call = prepare(q, k, v, operands, states, program)
    p, total = call.problem, None
    finals: list[Tensor] = []
    saved: list[tuple[Tensor, ...]] = []
    for _, step, x in _bound(call, q, k, v, operands, states, scale):
        out = registry.get(step.backend).forward(step.term, x, step.config, save)
        total = out.y if total is None else total.add_(out.y)
        saved.append(out.saved)
        if isinstance(step.term, Linear) and call.contraction.return_state:
            assert out.state is not None  # every backend returns the state of a linear term
            finals.append(out.state.to(p.state_dtype))
    if total is None:
        total = torch.zeros(p.batch, p.seqlen, p.nheads, p.headdim, dtype=p.dtype, device=q.device)
    public = [total.to(p.dtype), *finals]
    return public if not save else [*public, *_packed(saved)]


def _packed(saved: list[tuple[Tensor, ...]]) -> list[Tensor]:
    """What each step saved, as one list: first how many tensors each has."""
    return [torch.tensor([len(part) for part in saved]), *(x for part in saved for x in part)]


def _unpacked(saved: list[Tensor], steps: int) -> list[list[Tensor]]:
    """The inverse of `_packed`; nothing for every step if nothing was saved."""
    if not saved:
        return [[] for _ in range(steps)]
    remaining = iter(saved[1:])
    return [[next(remaining) for _ in range(count)] for count in saved[0].tolist()]


def _bound(
    call: Prepared, q: Tensor, k: Tensor, v: Tensor, operands: list[Tensor], states: list[Tensor], scale: float
) -> list[tuple[int, Step, Inputs]]:
    """Each step with its tensors, and the index of its state among the linear terms (−1 if it has none)."""
    named, out, seen = dict(zip(call.names, operands, strict=True)), [], 0
    for step in call.plan.steps:
        linear = isinstance(step.term, Linear)
        initial = states[seen] if linear and states else None
        out.append((seen if linear else -1, step, bind(step.term, call.problem, q, k, v, named, initial, scale)))
        seen += linear
    return out


def _forward_fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    operands: list[Tensor],
    states: list[Tensor],
    program: str,
    scale: float,
    save: bool = False,
) -> list[Tensor]:
    if save:
        raise UnsupportedError("ssdops::forward(save=True) is for eager calls; what it saves has no shape while tracing")
    contraction = parse_contraction(program)
    named = dict(zip(n.operand_names(contraction.mask), operands, strict=True))
    p = problem_of(contraction.mask, q, k, v, named, states, contraction.state_dtype)
    check(contraction, p)
    out = [q.new_empty((p.batch, p.seqlen, p.nheads, p.headdim), dtype=p.dtype)]
    if contraction.return_state or states:
        count = len(state_terms(contraction.mask))
        check_states(states, count, p, given=bool(states))
        if contraction.return_state:
            assert p.n_states is not None  # check_states() has refused a mask that does not say
            shape = (p.n_states, p.nheads, p.headdim, p.dstate)
            out += [q.new_empty(shape, dtype=p.state_dtype) for _ in range(count)]
    return out


# --- backward -------------------------------------------------------------------------------------------------------


def _backward(
    cotangents: list[Tensor],
    saved: list[Tensor],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    operands: list[Tensor],
    states: list[Tensor],
    program: str,
    scale: float,
) -> list[Tensor]:
    # a dispatch mode (a FLOP counter, checkpointing) calls this with autograd switched off, and it is needed here
    with torch._C._ForceDispatchKeyGuard(torch._C._dispatch_tls_local_include_set(), _excluded_but_autograd()):
        return _gradients(cotangents, saved, q, k, v, operands, states, program, scale)


def _excluded_but_autograd() -> Any:
    """The dispatch keys that this thread skips now, those of autograd apart."""
    keys = torch._C._dispatch_tls_local_exclude_set()
    for key in _AUTOGRAD_KEYS:
        keys = keys.remove(key)
    return keys


_AUTOGRAD_KEYS = [key for name, key in torch._C.DispatchKey.__members__.items() if name.startswith(("Autograd", "ADI"))]


def _gradients(
    cotangents: list[Tensor],
    saved: list[Tensor],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    operands: list[Tensor],
    states: list[Tensor],
    program: str,
    scale: float,
) -> list[Tensor]:
    call = prepare(q, k, v, operands, states, program)
    dy, dstates = cotangents[0], cotangents[1:]
    total: Gradients | None = None
    named = dict(zip(call.names, operands, strict=True))
    doperands = {name: torch.zeros_like(x) for name, x in named.items() if x.is_floating_point()}
    dinitial: list[Tensor] = []
    parts = _unpacked(saved, len(call.plan.steps))
    for (index, step, x), kept in zip(_bound(call, q, k, v, operands, states, scale), parts, strict=True):
        dstate = dstates[index] if index >= 0 and dstates else None
        grads = registry.get(step.backend).backward(step.term, x, step.config, Cotangents(dy, dstate, kept))
        if total is None:
            total = grads
        else:
            for whole, part in ((total.q, grads.q), (total.k, grads.k), (total.v, grads.v)):
                whole += part
        for name, grad in {**grads.operands, **_through_expressions(step, grads, named)}.items():
            doperands[name] = doperands[name] + grad.to(doperands[name].dtype)
        if index >= 0 and states:
            assert grads.initial is not None  # every backend returns it where an initial state was given
            dinitial.append(grads.initial.to(states[index].dtype))
    empty = q.new_empty(0)
    if total is None:
        total = Gradients(torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v))
    return [
        total.q.to(q.dtype), total.k.to(k.dtype), total.v.to(v.dtype),
        *[doperands.get(name, empty) for name in call.names], *dinitial,
    ]  # fmt: skip


def _through_expressions(step: Step, grads: Gradients, named: dict[str, Tensor]) -> dict[str, Tensor]:
    """Gradients of a term's slots → gradients of the operands whose expressions fill them."""
    slots = {slot: (x, axes) for slot, (x, axes) in term_operands(step.term).items() if slot in grads.values}
    if not slots:
        return {}
    with torch.enable_grad():
        fresh = {name: t.detach().requires_grad_() for name, t in named.items() if t.is_floating_point()}
        seqlen = grads.v.shape[1]
        values = {slot: resolve(x, {**named, **fresh}, axes, seqlen) for slot, (x, axes) in slots.items()}
    used = list(fresh)
    found = torch.autograd.grad(
        list(values.values()),
        [fresh[name] for name in used],
        [grads.values[slot].to(value.dtype) for slot, value in values.items()],
        allow_unused=True,
    )
    return {name: grad for name, grad in zip(used, found, strict=True) if grad is not None}


def _backward_fake(
    cotangents: list[Tensor],
    saved: list[Tensor],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    operands: list[Tensor],
    states: list[Tensor],
    program: str,
    scale: float,
) -> list[Tensor]:
    def like(x: Tensor) -> Tensor:
        return torch.empty_like(x, memory_format=torch.contiguous_format) if x.is_floating_point() else q.new_empty(0)

    return [like(x) for x in (q, k, v, *operands, *states)]


# --- autograd -------------------------------------------------------------------------------------------------------


class _Differentiable(torch.autograd.Function):
    """`ssdops::forward` with its backward: the operator, or where the gradient is itself differentiated, the adjoints."""

    @staticmethod
    def forward(program: str, scale: float, n_operands: int, save: bool, *tensors: Tensor) -> tuple[Tensor, ...]:
        q, k, v, *rest = tensors
        with torch._C._AutoDispatchBelowAutograd():
            return tuple(_forward_op(q, k, v, rest[:n_operands], rest[n_operands:], program, scale, save))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        program, scale, n_operands, _, *tensors = inputs
        ctx.program, ctx.scale, ctx.n_operands = program, scale, n_operands
        saved = output[_public_outputs(program) :]
        ctx.n_inputs = len(tensors)
        ctx.save_for_backward(*tensors, *saved)
        ctx.mark_non_differentiable(*saved)
        ctx.set_materialize_grads(False)  # zeros for every keepsake would cost as much as a pass
        ctx.outputs = [(x.shape, x.dtype) for x in output[: len(output) - len(saved)]]

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor | None, ...]:
        (q, k, v, *rest), saved = ctx.saved_tensors[: ctx.n_inputs], ctx.saved_tensors[ctx.n_inputs :]
        operands, states = rest[: ctx.n_operands], rest[ctx.n_operands :]
        cotangents = tuple(
            q.new_zeros(shape, dtype=dtype) if grad is None else grad
            for grad, (shape, dtype) in zip(cotangents, ctx.outputs, strict=False)
        )
        if torch.is_grad_enabled():
            grads = differentiable_backward(call, list(cotangents), q, k, v, operands, states, ctx.program, ctx.scale)
        else:
            grads = _backward_op(list(cotangents), list(saved), q, k, v, operands, states, ctx.program, ctx.scale)
        wanted = zip(grads, ctx.needs_input_grad[4:], strict=True)
        return (None, None, None, None, *(grad if needed else None for grad, needed in wanted))

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        raise UnsupportedError("ssd has no forward-mode derivative (jvp, dual tensors); use vjp, grad or jacrev")

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[Any, ...], program: str, scale: float, n_operands: int, save: bool, *tensors: Tensor
    ) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
        q, k, v, *rest = tensors
        operands, states = list(rest[:n_operands]), list(rest[n_operands:])
        dims = in_dims[4:]
        dims = (*dims[:3], dims[3 : 3 + n_operands], dims[3 + n_operands :], None, None)
        out, out_dims = _forward_vmap(info, dims, q, k, v, operands, states, program, scale)
        return tuple(out), tuple(out_dims)


def _worth_saving(q: Tensor) -> bool:
    """Whether to keep what spares the backward pass work: on CPUs in full precision, and only for plain tensors.

    What is kept is a few times the output; on a GPU, or where the output is half as wide, memory is dearer than the work.
    """
    plain = type(q) is Tensor or type(q) is torch.nn.Parameter
    return plain and q.device.type == "cpu" and q.dtype in (torch.float32, torch.float64)


@lru_cache(maxsize=4096)
def _public_outputs(program: str) -> int:
    """How many outputs of a program are not keepsakes: Y, and the final states."""
    contraction = parse_contraction(program)
    return 1 + (len(state_terms(contraction.mask)) if contraction.return_state else 0)


def _autograd(
    keyset: Any,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    operands: list[Tensor],
    states: list[Tensor],
    program: str,
    scale: float,
    save: bool = False,
) -> list[Tensor]:
    return _call(q, k, v, operands, states, program, scale, save=False)


def call(
    q: Tensor, k: Tensor, v: Tensor, operands: list[Tensor], states: list[Tensor], program: str, scale: float
) -> list[Tensor]:
    """`ssdops::forward`, entered at the autograd level: what eager callers use, as it is the shortest way in."""
    return _call(q, k, v, operands, states, program, scale, _worth_saving(q))


def _call(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    operands: list[Tensor],
    states: list[Tensor],
    program: str,
    scale: float,
    save: bool,
) -> list[Tensor]:
    learnt = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v, *operands, *states))
    if learnt or torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0:
        outputs = _Differentiable.apply(  # type: ignore[no-untyped-call]  # as torch has it
            program, scale, len(operands), save, q, k, v, *operands, *states
        )
        return list(outputs[: _public_outputs(program)])
    with torch._C._AutoDispatchBelowAutograd():
        out: list[Tensor] = _forward_op(q, k, v, operands, states, program, scale)
        return out


# --- vmap ------------------------------------------------------------------------------------------------------------


def _forward_vmap(
    info: Any,
    dims: tuple[Any, ...],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    operands: list[Tensor],
    states: list[Tensor],
    program: str,
    scale: float,
    save: bool = False,
) -> tuple[list[Tensor], list[int]]:
    fold = Fold.of(program, info.batch_size, q, dims[0])
    out = call(
        fold.rows(q, dims[0]),
        fold.rows(k, dims[1]),
        fold.rows(v, dims[2]),
        fold.operands(operands, dims[3], apart=False),
        [fold.rows(x, dim) for x, dim in zip(states, dims[4], strict=True)],
        program,
        scale,
    )
    return [fold.unfold(x) for x in out], [0] * len(out)


def _backward_vmap(
    info: Any,
    dims: tuple[Any, ...],
    cotangents: list[Tensor],
    saved: list[Tensor],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    operands: list[Tensor],
    states: list[Tensor],
    program: str,
    scale: float,
) -> tuple[list[Tensor], list[int]]:
    fold = Fold.of(program, info.batch_size, q, dims[2])
    grads = _backward_op(
        [fold.rows(x, dim) for x, dim in zip(cotangents, dims[0], strict=True)],
        [],  # what was saved is computed again
        *(fold.rows(x, dim) for x, dim in zip((q, k, v), dims[2:5], strict=True)),
        fold.operands(operands, dims[5], apart=True),
        [fold.rows(x, dim) for x, dim in zip(states, dims[6], strict=True)],
        program,
        scale,
    )
    of_operands = grads[3 : 3 + len(operands)]
    shapes = [unmapped_shape(x, dim) for x, dim in zip(operands, dims[5], strict=True)]
    out = [
        *(fold.unfold(x) for x in grads[:3]),
        *(fold.operand_gradient(*x) for x in zip(fold.axes, of_operands, shapes, strict=True)),
        *(fold.unfold(x) for x in grads[3 + len(operands) :]),
    ]
    return out, [0] * len(out)


def _write_slots(pool: Tensor, values: Tensor, indices: Tensor) -> None:
    """pool[indices[b]] ← values[b] for every row whose index is not negative."""
    kept = indices >= 0
    pool[indices[kept].long()] = values[kept].to(pool.dtype)


LIBRARY.impl("forward", _forward, "CompositeExplicitAutograd")
LIBRARY.impl("write_slots_", _write_slots, "CompositeExplicitAutograd")
torch.library.register_fake("ssdops::write_slots_", lambda pool, values, indices: None, lib=LIBRARY)
LIBRARY.impl("backward", _backward, "CompositeExplicitAutograd")
LIBRARY.impl("forward", _autograd, "Autograd", with_keyset=True)
torch.library.register_fake("ssdops::forward", _forward_fake, lib=LIBRARY)
torch.library.register_fake("ssdops::backward", _backward_fake, lib=LIBRARY)
torch.library.register_vmap("ssdops::forward", _forward_vmap, lib=LIBRARY)
torch.library.register_vmap("ssdops::backward", _backward_vmap, lib=LIBRARY)
