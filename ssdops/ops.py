"""The torch.library operators, `ssdops::forward`, `backward`, `step` and `step_`: the only autograd glue.

An operator takes q, k, v, the mask's operands in the order of their names in the tree, the initial states, and the program, a
contraction as text (`run.Call`). What it does with them is in `run.py` and `decode.py`; here is what torch needs to know of it:
shapes while tracing, derivatives, and vmap. Steps have no derivative: where one is wanted, a step is a short `ssdops::forward`.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import decode, run
from .adjoint import differentiable_backward
from .autotune import policy
from .decode import Stepped
from .errors import UnsupportedError
from .ir import nodes as n
from .ir.contraction import parse_contraction
from .ir.problem import Problem, check_states
from .plan import check, state_terms, stepper
from .run import Call
from .vmap import Fold, unmapped_shape

LIBRARY = torch.library.Library("ssdops", "DEF")
_CALL = "Tensor q, Tensor k, Tensor v, Tensor[] operands, Tensor[] states, str program, float scale"
LIBRARY.define(f"forward({_CALL}, bool save=False) -> Tensor[]")
LIBRARY.define(f"backward(Tensor[] cotangents, Tensor[] saved, {_CALL}) -> Tensor[]")
LIBRARY.define(f"step({_CALL}, bool every) -> Tensor[]")
LIBRARY.define(f"step_({_CALL.replace('[] states', '(a!)[] pools')}, Tensor slots, Tensor(b!)[] every) -> Tensor")
LIBRARY.define("write_slots_(Tensor(a!) pool, Tensor values, Tensor slots) -> ()")
_forward_op = torch.ops.ssdops.forward.default
_backward_op = torch.ops.ssdops.backward.default


def call(c: Call) -> list[Tensor]:
    """`ssdops::forward`, entered at the autograd level: what eager callers use, as it is the shortest way in."""
    return _differentiably(c, eager=True)


def traced(c: Call) -> list[Tensor]:
    """`ssdops::forward`, entered as torch.compile can see."""
    out: list[Tensor] = torch.ops.ssdops.forward(c.q, c.k, c.v, c.operands, c.states, c.program, c.scale)
    return out


def step(mask: n.Node, c: Call, slots: Tensor | None, every: bool) -> Stepped:
    """A step (`decode.step`), differentiable where anything is learnt, in the shortest way in."""
    tensors, tracing = (c.q, c.k, c.v, *c.operands, *c.states), torch.compiler.is_compiling()
    if _is_learnt(tensors) or torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0:
        if not tracing:
            decode.prepare(c, slots is not None)  # which checks it
        return decode.as_sequence(mask, c, slots, every, traced if tracing else call)
    if not tracing and _is_plain(tensors):
        return decode.step(c, slots, every)
    args = (c.q, c.k, c.v, c.operands, c.states, c.program, c.scale)
    if slots is None:
        y, *rest = torch.ops.ssdops.step(*args, every)
        count = len(rest) // 2 if every else len(rest)
        return Stepped(y, rest[:count], rest[count:])
    rooms = [pool.new_empty((*c.q.shape[:2], *pool.shape[1:])) for pool in c.states] if every else []
    return Stepped(torch.ops.ssdops.step_(*args, slots, rooms), c.states, rooms)


# --- shapes while tracing -------------------------------------------------------------------------------------------


def _forward_fake(*args: Any) -> list[Tensor]:
    c = Call(*args[:7])
    contraction, p = c.contraction, c.problem()
    check(contraction, p)
    if args[7:] == (True,):
        raise UnsupportedError("ssdops::forward(save=True) is for eager calls; what it saves has no shape while tracing")
    out = [c.q.new_empty((p.batch, p.seqlen, p.nheads, p.headdim), dtype=p.dtype)]
    if contraction.return_state or c.states:
        count = len(state_terms(contraction.mask))
        check_states(c.states, count, p, given=bool(c.states))
        if contraction.return_state:
            assert p.n_states is not None  # check_states() has refused a mask that does not say
            shape = (p.n_states, p.nheads, p.headdim, p.dstate)
            out += [c.q.new_empty(shape, dtype=p.state_dtype) for _ in range(count)]
    if p.state_every is not None:
        every = (p.batch, p.seqlen // p.state_every, p.nheads, p.headdim, p.dstate)
        out += [c.q.new_empty(every, dtype=p.state_dtype) for _ in state_terms(contraction.mask)]
    return out


def _backward_fake(cotangents: list[Tensor], saved: list[Tensor], *args: Any) -> list[Tensor]:
    c = Call(*args)

    def like(x: Tensor) -> Tensor:
        return torch.empty_like(x, memory_format=torch.contiguous_format) if x.is_floating_point() else c.q.new_empty(0)

    return [like(x) for x in (c.q, c.k, c.v, *c.operands, *c.states)]


def _step_fake(*args: Any) -> list[Tensor]:
    c, every = Call(*args[:7]), args[7]
    y, p, count = _fake_y(c, None)
    shape = (p.nheads, p.headdim, p.dstate)
    dtypes = [x.dtype for x in c.states] or [p.state_dtype] * count
    finals = [c.q.new_empty((p.batch, *shape), dtype=dtype) for dtype in dtypes]
    return [y, *finals, *(c.q.new_empty((p.batch, p.seqlen, *shape), dtype=dtype) for dtype in dtypes if every)]


def _step_in_place_fake(*args: Any) -> Tensor:
    c = Call(*args[:7])
    return _fake_y(c, c.states[0].shape[0])[0]


def _fake_y(c: Call, slots: int | None) -> tuple[Tensor, Problem, int]:
    """Y of a step, its facts, and how many states it has."""
    contraction, p = c.contraction, c.problem()
    count = len(state_terms(contraction.mask))
    if stepper(contraction, p) is None:
        check(contraction, p)
    check_states(c.states, count, p, given=bool(c.states), slots=slots)
    return c.q.new_empty((p.batch, p.seqlen, p.nheads, p.headdim), dtype=p.dtype), p, count


# --- derivatives ----------------------------------------------------------------------------------------------------


def _forward(*args: Any) -> list[Tensor]:  # torch leaves `save` out where it is the default
    with no_autocast(args[0]):
        return run.forward(Call(*args[:7]), *args[7:])


def _backward(cotangents: list[Tensor], saved: list[Tensor], *args: Any) -> list[Tensor]:
    # a dispatch mode (a FLOP counter, checkpointing) calls this with autograd switched off, and it is needed here
    with (
        torch._C._ForceDispatchKeyGuard(torch._C._dispatch_tls_local_include_set(), _excluded_but_autograd()),
        no_autocast(args[0]),
    ):
        return run.backward(Call(*args), cotangents, saved)


def _step(*args: Any) -> list[Tensor]:
    with no_autocast(args[0]):
        y, states, every = decode.step(Call(*args[:7]), None, args[7])
    return [y, *states, *every]


def _step_in_place(*args: Any) -> Tensor:
    *call, slots, rooms = args
    with no_autocast(args[0]):
        return decode.step(Call(*call), slots, bool(rooms), rooms).y


def no_autocast(q: Tensor) -> AbstractContextManager[Any]:
    """Autocast casts what users pass (`api.ssd`); inside, it would take the float32 out of accumulation."""
    return torch.autocast(q.device.type, enabled=False) if autocasts(q) else nullcontext()


def autocasts(x: Tensor) -> bool:
    """Whether autocast is on for a tensor's device type (torch raises for those that have none)."""
    if not torch.compiler.is_compiling() and not torch._C._is_any_autocast_enabled():
        return False
    kind = x.device.type
    return (kind in ("cpu", "cuda") or torch.amp.is_autocast_available(kind)) and torch.is_autocast_enabled(kind)


def _excluded_but_autograd() -> Any:
    """The dispatch keys that this thread skips now, those of autograd apart."""
    keys = torch._C._dispatch_tls_local_exclude_set()
    for key in _AUTOGRAD_KEYS:
        keys = keys.remove(key)
    return keys


_AUTOGRAD_KEYS = [key for name, key in torch._C.DispatchKey.__members__.items() if name.startswith(("Autograd", "ADI"))]


class _Differentiable(torch.autograd.Function):
    """`ssdops::forward` and its backward: the operator, or where the gradient is itself differentiated, the adjoints."""

    @staticmethod
    def forward(program: str, scale: float, n_operands: int, save: bool, *tensors: Tensor) -> tuple[Tensor, ...]:
        q, k, v, *rest = tensors
        args = (q, k, v, rest[:n_operands], rest[n_operands:], program, scale)
        with torch._C._AutoDispatchBelowAutograd():
            return tuple(run.forward(Call(*args), save, learnt=True) if _is_plain(tensors) else _forward_op(*args, save))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        program, scale, n_operands, _, *tensors = inputs
        ctx.program, ctx.scale, ctx.n_operands, ctx.n_inputs = program, scale, n_operands, len(tensors)
        ctx.mode = policy.current()
        learnt, public = _count_outputs(program)
        ctx.outputs = [(x.shape, x.dtype) for x in output[:learnt]]
        ctx.save_for_backward(*tensors, *output[public:])
        ctx.mark_non_differentiable(*output[learnt:])
        ctx.set_materialize_grads(False)  # zeros for every keepsake would cost as much as a pass

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Tensor | None, ...]:
        kept = ctx.saved_tensors  # once: activation checkpointing computes them when they are asked for, and gives them up
        (q, k, v, *rest), saved = kept[: ctx.n_inputs], kept[ctx.n_inputs :]
        given = [
            q.new_zeros(shape, dtype=dtype) if dy is None else dy
            for dy, (shape, dtype) in zip(cotangents, ctx.outputs, strict=False)
        ]
        args = (q, k, v, rest[: ctx.n_operands], rest[ctx.n_operands :], ctx.program, ctx.scale)
        grads: Sequence[Tensor | None]
        if torch.is_grad_enabled():
            with no_autocast(q):
                grads = differentiable_backward(call, Call(*args), given)
        elif _is_plain((*given, *kept)):
            with policy.resume(ctx.mode):  # on a GPU this is a thread of autograd's
                grads = run.backward(Call(*args), given, list(saved))
        else:
            grads = _backward_op(given, list(saved), *args)
        wanted = zip(grads, ctx.needs_input_grad[4:], strict=True)
        return (None, None, None, None, *(grad if needed else None for grad, needed in wanted))

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        raise UnsupportedError("ssd has no forward-mode derivative (jvp, dual tensors); use reverse mode: vjp, grad, jacrev")

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[Any, ...], program: str, scale: float, n_operands: int, save: bool, *tensors: Tensor
    ) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
        q, k, v, *rest = tensors
        dims = in_dims[4:]
        dims = (*dims[:3], dims[3 : 3 + n_operands], dims[3 + n_operands :])
        args = (q, k, v, list(rest[:n_operands]), list(rest[n_operands:]), program, scale)
        out, out_dims = _forward_vmap(info, dims, *args)
        return tuple(out), tuple(out_dims)


class _Eager(_Differentiable):
    """The same where functorch transforms nothing: without `setup_context` torch does not bind arguments by name, in 20 µs."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, ...]:
        output = _Differentiable.forward(*inputs)
        _Differentiable.setup_context(ctx, inputs, output)
        return output

    setup_context = staticmethod(torch.autograd.Function.setup_context)


def _differentiably(c: Call, eager: bool) -> list[Tensor]:
    tensors = (c.q, c.k, c.v, *c.operands, *c.states)
    transformed = torch._C._are_functorch_transforms_active()
    if _is_learnt(tensors) or transformed or forward_ad._current_level >= 0:
        outputs = (_Differentiable if transformed else _Eager).apply(  # type: ignore[no-untyped-call]  # as torch has it
            c.program, c.scale, len(c.operands), eager and worth_saving(c.q), *tensors
        )
        return list(outputs[: _count_outputs(c.program)[1]])
    if _is_plain(tensors):
        return run.forward(c)
    with torch._C._AutoDispatchBelowAutograd():
        out: list[Tensor] = _forward_op(c.q, c.k, c.v, c.operands, c.states, c.program, c.scale)
        return out


def _is_learnt(tensors: tuple[Tensor, ...]) -> bool:
    return torch.is_grad_enabled() and any([x.requires_grad for x in tensors])  # noqa: C419  # quicker than a generator


_PLAIN = {Tensor, torch.nn.Parameter}


def _is_plain(tensors: tuple[Tensor, ...]) -> bool:
    """Whether the dispatcher would only lead to `run.py`, so that its 40 µs can be saved: nothing traces or wraps."""
    first = tensors[0]
    wrapped = torch._C._are_functorch_transforms_active() or torch._C._len_torch_dispatch_stack()
    if wrapped or not (first.is_cuda or first.is_cpu) or autocasts(first):
        return False
    return all([type(x) in _PLAIN for x in tensors])  # noqa: C419  # quicker than a generator


def worth_saving(q: Tensor) -> bool:
    """Whether to keep what spares the backward pass work: on CPUs in full precision, and only for plain tensors.

    What is kept is a few times the output; on a GPU, or where the output is half as wide, memory is dearer than the work.
    """
    plain = type(q) is Tensor or type(q) is torch.nn.Parameter
    return plain and q.device.type == "cpu" and q.dtype in (torch.float32, torch.float64)


@lru_cache(maxsize=4096)
def _count_outputs(program: str) -> tuple[int, int]:
    """How many outputs of a program have gradients (Y, and the final states), and how many are not keepsakes."""
    contraction = parse_contraction(program)
    final, between = contraction.return_state, contraction.state_every is not None
    count = len(state_terms(contraction.mask)) if final or between else 0
    return 1 + count * final, 1 + count * (final + between)


# --- vmap -----------------------------------------------------------------------------------------------------------


def _folded(fold: Fold, dims: tuple[Any, ...], c: Call, apart: bool) -> tuple[Any, ...]:
    """The arguments of a call, the mapped axis folded into batch."""
    return (
        *(fold.rows(x, dim) for x, dim in zip((c.q, c.k, c.v), dims[:3], strict=True)),
        fold.operands(c.operands, dims[3], apart=apart),
        [fold.rows(x, dim) for x, dim in zip(c.states, dims[4], strict=True)],
        c.program,
        c.scale,
    )


def _forward_vmap(info: Any, dims: tuple[Any, ...], *args: Any) -> tuple[list[Tensor], list[int]]:
    c = Call(*args[:7])
    fold = Fold.of(c.program, info.batch_size, c.q, dims[0])
    out = call(Call(*_folded(fold, dims, c, apart=False)))
    return [fold.unfold(x) for x in out], [0] * len(out)


def _backward_vmap(
    info: Any, dims: tuple[Any, ...], cotangents: list[Tensor], saved: list[Tensor], *args: Any
) -> tuple[list[Tensor], list[int]]:
    c, of_call = Call(*args), dims[2:]
    fold = Fold.of(c.program, info.batch_size, c.q, of_call[0])
    mapped = [fold.rows(x, dim) for x, dim in zip(cotangents, dims[0], strict=True)]
    grads = _backward_op(mapped, [], *_folded(fold, of_call, c, apart=True))  # what was saved is computed again
    count = len(c.operands)
    shapes = [unmapped_shape(x, dim) for x, dim in zip(c.operands, of_call[3], strict=True)]
    out = [
        *(fold.unfold(x) for x in grads[:3]),
        *(fold.operand_gradient(*x) for x in zip(fold.axes, grads[3 : 3 + count], shapes, strict=True)),
        *(fold.unfold(x) for x in grads[3 + count :]),
    ]
    return out, [0] * len(out)


# --- registration ---------------------------------------------------------------------------------------------------


LIBRARY.impl("forward", _forward, "CompositeExplicitAutograd")
LIBRARY.impl("backward", _backward, "CompositeExplicitAutograd")
LIBRARY.impl("step", _step, "CompositeExplicitAutograd")
LIBRARY.impl("step_", _step_in_place, "CompositeExplicitAutograd")
LIBRARY.impl("write_slots_", decode.write_slots, "CompositeExplicitAutograd")
LIBRARY.impl("forward", lambda keyset, *args: _differentiably(Call(*args[:7]), eager=False), "Autograd", with_keyset=True)
torch.library.register_fake("ssdops::forward", _forward_fake, lib=LIBRARY)
torch.library.register_fake("ssdops::backward", _backward_fake, lib=LIBRARY)
torch.library.register_fake("ssdops::step", _step_fake, lib=LIBRARY)
torch.library.register_fake("ssdops::step_", _step_in_place_fake, lib=LIBRARY)
torch.library.register_fake("ssdops::write_slots_", lambda pool, values, slots: None, lib=LIBRARY)
torch.library.register_vmap("ssdops::forward", _forward_vmap, lib=LIBRARY)
torch.library.register_vmap("ssdops::backward", _backward_vmap, lib=LIBRARY)
