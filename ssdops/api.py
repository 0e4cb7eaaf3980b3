"""`ssd`, `ssd_step`, `explain`: validate → build → plan → run."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Literal, overload

import torch
from torch import Tensor

from . import arguments, carry, decode, masks, ops
from .arguments import State
from .autotune import policy
from .errors import (
    ShapeError,
    SsdopsError,
    UnsupportedError,
)
from .ir import nodes as n
from .ir.contraction import Contraction
from .ir.passes.normalize import normalize
from .ir.problem import Problem, Target, problem_of
from .masks import Mask
from .plan import plan, state_terms
from .run import Call
from .steps import Plan


@overload
def ssd(
    q: Tensor, k: Tensor, v: Tensor, mask: Mask | None = ..., *, scale: float = ..., initial_state: State | None = ...,
    return_state: Literal[False] = ..., state_every: None = ..., state_dtype: torch.dtype | None = ..., backend: str = ...,
    chunk_size: int | None = ..., tune: str | None = ...,
) -> Tensor: ...  # fmt: skip
@overload
def ssd(
    q: Tensor, k: Tensor, v: Tensor, mask: Mask | None = ..., *, scale: float = ..., initial_state: State | None = ...,
    return_state: Literal[True], state_every: None = ..., state_dtype: torch.dtype | None = ..., backend: str = ...,
    chunk_size: int | None = ..., tune: str | None = ...,
) -> tuple[Tensor, State]: ...  # fmt: skip
@overload
def ssd(
    q: Tensor, k: Tensor, v: Tensor, mask: Mask | None = ..., *, scale: float = ..., initial_state: State | None = ...,
    return_state: bool = ..., state_every: int, state_dtype: torch.dtype | None = ..., backend: str = ...,
    chunk_size: int | None = ..., tune: str | None = ...,
) -> tuple[Tensor, State, State]: ...  # fmt: skip
@overload
def ssd(
    q: Tensor, k: Tensor, v: Tensor, mask: Mask | None = ..., *, scale: float = ..., initial_state: State | None = ...,
    return_state: bool = ..., state_every: int | None = ..., state_dtype: torch.dtype | None = ..., backend: str = ...,
    chunk_size: int | None = ..., tune: str | None = ...,
) -> Tensor | tuple[Tensor, State] | tuple[Tensor, State, State]: ...  # fmt: skip
def ssd(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Mask | None = None,
    *,
    scale: float = 1.0,
    initial_state: State | None = None,
    return_state: bool = False,
    state_every: int | None = None,
    state_dtype: torch.dtype | None = None,
    backend: str = "auto",
    chunk_size: int | None = None,
    tune: str | None = None,
) -> Tensor | tuple[Tensor, State] | tuple[Tensor, State, State]:
    """Structured masked attention, `Y = scale · (L ∘ Q Kᵀ) V`.

        y[b,i,h,:] = scale · Σ_j  L[b,h,i,j] · ⟨q[b,i,hq,:], k[b,j,hk,:]⟩ · v[b,j,hv,:]

    nheads is the greatest head count among q, k, v and the mask's operands; every other divides it and is shared by
    contiguous groups of heads. In Mamba-2's words q = C, k = B, v = x·dt, log_a = A·dt; its skip connection D·x is no
    part of L, and is added to what comes back.

    Args:
        q, k: `(batch, seqlen, heads, dstate)`, float32, float64, bfloat16 or float16, any strides. Under autocast q, k and v
            are cast to its dtype; mask operands and states never are.
        v: `(batch, seqlen, heads, headdim)`.
        mask: the structure of L (`ssdops.masks`); None is `causal()`.
        scale: a factor on Y; it never changes a state.
        initial_state: a state per linear term: one matrix `(batch, nheads, headdim, dstate)`, or
            `(n_segments, nheads, headdim, dstate)` for packed documents (`batch · n_segments` rows where segment ids come in
            a batch); bare for one term, else a tuple in the order of the terms. An anticausal term's state enters at the
            right end and leaves at the left. Of `trapezoidal`, alone or with diagonals: (S, k, v) with the k
            `(batch, heads, dstate)` and v `(batch, heads, headdim)` of the token before.
        return_state: also return the final states, shaped likewise.
        state_every: also return the final states, and those after every n = state_every tokens, S_{n−1}, S_{2n−1}, …: what
            prefixes leave, for a cache of them. Of causal scans and diagonals, without documents; they take no gradient.
            'triton' takes multiples of 16, and of `chunk_size`.
        state_dtype: of the states returned; None is float32 (float64 if any input is).
        backend: "auto", or a name from `ssdops.backends`.
        chunk_size: the chunk length of a chunked backend; None lets the planner choose.
        tune: how it chooses, "off", "cached", "on" or "force" (`ssdops.autotune.mode`); None is the mode of the context, else
            that of SSDOPS_TUNE, else "cached".

    Returns:
        Y `(batch, seqlen, nheads, headdim)` in the promoted dtype of q, k and v; with `return_state`, (Y, state). With
        `state_every`, (Y, state, states): the states after every n tokens, their tensors with an axis of these after batch,
        `(batch, seqlen // n, nheads, headdim, dstate)`. What follows the last whole n tokens is in `state` alone; where
        nothing does, the last of the states is `state`.

    Raises:
        ShapeError, DtypeError, DeviceError, ValueRangeError: an argument that does not fit; the message names it.
        UnknownBackendError, UnsupportedError: a backend that is not there, or cannot; the message says which can.
        TuningError: there is no such tuning mode.

    Source: Dao & Gu 2024, "Transformers are SSMs", section 3 (equation 16) and section 6.

    >>> import torch
    >>> from ssdops import ssd, masks
    >>> q, k, v = torch.ones(1, 3, 1, 2), torch.ones(1, 3, 1, 2), torch.ones(1, 3, 1, 1)
    >>> ssd(q, k, v, masks.decay(torch.full((1, 3, 1), 0.5).log())).flatten()
    tensor([2.0000, 3.0000, 3.5000])

    A prompt that begins with the same two tokens as an earlier one goes on from the state after them:

    >>> half = masks.retention(torch.tensor([0.5]).log())
    >>> _, state, states = ssd(q, k, v, half, state_every=2)
    >>> states.shape
    torch.Size([1, 1, 1, 1, 2])
    >>> ssd(q[:, 2:], k[:, 2:], v[:, 2:], half, initial_state=states[:, 0]).item()
    3.5
    """
    mask = masks.causal() if mask is None else mask
    arguments.check_types(q, k, v, mask)
    arguments.check_options(scale, return_state, state_dtype, backend)
    if chunk_size is not None or state_every is not None:
        arguments.check_counts(chunk_size, state_every)
        return_state = return_state or state_every is not None
    if tune is not None:
        policy.checked(tune, "tune")
    q, k, v = arguments.autocast(q, k, v)
    given = states = arguments.states(initial_state, "initial_state")
    trapezoid = carry.trapezoid_of(mask.tree) if return_state or initial_state is not None else None
    if trapezoid is not None:
        states = carry.enter(trapezoid, mask.operands, given, k, v)
    name = None if state_dtype is None else str(state_dtype).removeprefix("torch.")
    program, names = arguments.text(mask.tree, return_state, name, backend, chunk_size, state_every, tune)
    call = Call(q, k, v, [mask.operands[x] for x in names], states, program, float(scale))
    if torch.compiler.is_compiling():
        out = ops.traced(call)
    else:
        if initial_state is not None and not states and (count := len(state_terms(mask.tree))):
            raise ShapeError(f"initial_state has 0 states; this mask carries {count}, one per linear term (None: zero)")
        out = ops.call(call)
    if not return_state:
        return out[0]
    if trapezoid is not None:
        return out[0], carry.leave(out[1:], given, k, v)
    if state_every is None:
        return out[0], _bare(out[1:])
    count = (len(out) - 1) // 2
    return out[0], _bare(out[1 : 1 + count]), _bare(out[1 + count :])


@overload
def ssd_step(
    q: Tensor, k: Tensor, v: Tensor, mask: Mask, state: State | None, *, scale: float = ..., state_indices: Tensor | None = ...,
    return_intermediate_states: Literal[False] = ..., backend: str = ...,
) -> tuple[Tensor, State]: ...  # fmt: skip
@overload
def ssd_step(
    q: Tensor, k: Tensor, v: Tensor, mask: Mask, state: State | None, *, scale: float = ..., state_indices: Tensor | None = ...,
    return_intermediate_states: Literal[True], backend: str = ...,
) -> tuple[Tensor, State, State]: ...  # fmt: skip
def ssd_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Mask,
    state: State | None,
    *,
    scale: float = 1.0,
    state_indices: Tensor | None = None,
    return_intermediate_states: bool = False,
    backend: str = "auto",
) -> tuple[Tensor, State] | tuple[Tensor, State, State]:
    """One token of `ssd`, for decoding, or a few of them: `S ← a S + w v kᵀ`, `y = scale · u S q`.

    The operands are those of `ssd` without their seqlen axis, or with one of a few tokens; stepping through a sequence gives
    what `ssd` gives at once. Speculative decoding steps through its draft with `return_intermediate_states`, and goes on from
    the state after the last token that it accepts; in a pool it writes that one back.

    Args:
        q, k: `(batch, heads, dstate)`; of several tokens, `(batch, tokens, heads, dstate)`.
        v: `(batch, heads, headdim)`, or `(batch, tokens, heads, headdim)`.
        mask: a mask of causal scans and diagonals whose per-token operands are `(batch, nheads)`, or
            `(batch, tokens, nheads)`, or broadcastable.
        state: as `ssd` takes and returns it; None is zero. With state_indices, a pool `(slots, nheads, headdim, dstate)` per
            linear term, which is updated in place: the one input that ssdops ever writes to.
        scale: a factor on y.
        state_indices: the slot of each batch row, `(batch,)`, int32 or int64, each slot at most once; rows whose slot is
            −1 give zero and touch nothing. A pool takes no gradient, and none flows through it.
        return_intermediate_states: also return the state after every token.
        backend: "auto" or a backend's name. Where a backend has a decode kernel that takes the whole mask, and no gradient
            is wanted, that runs: one launch per scan, states read and written once.

    Returns:
        y `(batch, nheads, headdim)`, or `(batch, tokens, nheads, headdim)`, and the state after the last token in the dtype of
        `state` (the pool itself with state_indices). With return_intermediate_states, then the state after every token, its
        tensors with an axis of tokens after batch, `(batch, tokens, nheads, headdim, dstate)`, zero for rows without a slot.

    Raises:
        UnsupportedError: the mask has no recurrence over time (an anticausal part, documents, a band, …).
        ShapeError, DtypeError, DeviceError: an argument that does not fit.

    Source: Dao & Gu 2024, "Transformers are SSMs", section 3 (the linear form).

    >>> import torch
    >>> from ssdops import masks, ssd_step
    >>> q = k = v = torch.ones(1, 1, 1)
    >>> half = masks.decay(torch.full((1, 1), 0.5).log())
    >>> y, state = ssd_step(q, k, v, half, None)
    >>> y, state = ssd_step(q, k, v, half, state)
    >>> y.item()
    1.5

    Three tokens at once; the second and third are rejected, so decoding goes on from the state after the first:

    >>> q = k = v = torch.ones(1, 3, 1, 1)
    >>> y, _, states = ssd_step(q, k, v, half, None, return_intermediate_states=True)
    >>> y.flatten(), states.shape
    (tensor([1.0000, 1.5000, 1.7500]), torch.Size([1, 3, 1, 1, 1]))
    >>> y, state = ssd_step(q[:, 1], k[:, 1], v[:, 1], half, states[:, 0])
    >>> y.item()
    1.5
    """
    arguments.check_types(q, k, v, mask)
    arguments.check_options(scale, return_intermediate_states, None, backend, "return_intermediate_states")
    single = not q.ndim == k.ndim == v.ndim == 4
    if single:
        decode.check_token(q, k, v)
        q, k, v, mask = q[:, None], k[:, None], v[:, None], decode.with_time(mask)
    arguments.check_recurrence(mask.tree)
    q, k, v = arguments.autocast(q, k, v)
    states = arguments.states(state, "state")
    trapezoid = carry.trapezoid_of(mask.tree)
    if state_indices is not None:
        if trapezoid is not None:
            raise UnsupportedError(
                "a pool holds one matrix per slot, and trapezoidal() carries the last k and v too; pass states"
            )
        decode.check_pools(states, state_indices, q)
    if state is not None and not states and (count := len(state_terms(mask.tree))):
        raise ShapeError(f"state has 0 states; this mask carries {count}, one per linear term (None: zero)")
    program, names = arguments.text(mask.tree, True, None, backend, None, None, None)
    call = Call(q, k, v, [mask.operands[x] for x in names], states, program, float(scale))
    try:
        if trapezoid is None:
            y, new, every = ops.step(mask.tree, call, state_indices, return_intermediate_states)
        else:
            run = partial(_through_trapezoid, trapezoid, names)
            y, new, every = decode.as_sequence(mask.tree, call, None, return_intermediate_states, run)
    except SsdopsError as error:  # as the arguments are called here
        raise type(error)(str(error).replace("initial_state", "state")) from None
    y = y[:, 0] if single else y
    after = state if state_indices is not None and state is not None else _bare(new)
    return (y, after, _bare(every)) if return_intermediate_states else (y, after)


def _through_trapezoid(trapezoid: n.Trapezoidal, names: tuple[str, ...], call: Call) -> list[Tensor]:
    """`ssd` of a call whose states are (S, previous k, previous v)."""
    operands = dict(zip(names, call.operands, strict=True))
    inner = carry.enter(trapezoid, operands, call.states, call.k, call.v)
    forward = ops.traced if torch.compiler.is_compiling() else ops.call
    y, *finals = forward(Call(call.q, call.k, call.v, call.operands, inner, call.program, call.scale))
    return [y, *carry.leave(finals, call.states, call.k, call.v)]


def _bare(states: list[Tensor]) -> State:
    return states[0] if len(states) == 1 else tuple(states)


@dataclass(frozen=True)
class Explanation:
    """What `ssd` would do with a call, and why. `print` it.

    Attributes:
        mask: the mask as written.
        passes: (pass name, mask after it).
        terms: the normal form, a text per term.
        plan: the backend and configuration of each term, with predicted cost and every rejection.
        problem: sizes, dtypes and target.
    """

    mask: str
    passes: tuple[tuple[str, str], ...]
    terms: tuple[str, ...]
    plan: Plan
    problem: Problem

    def __str__(self) -> str:
        p = self.problem
        sizes = (
            f"batch {p.batch}, seqlen {p.seqlen}, nheads {p.nheads} (q {p.q_heads}, k {p.k_heads}, v {p.v_heads}), "
            f"headdim {p.headdim}, dstate {p.dstate}, {str(p.dtype).removeprefix('torch.')} on {p.target.device}"
        )
        lines = [f"problem   {sizes}", f"mask      {self.mask}"]
        before = self.mask
        for name, text in self.passes:
            lines.append(f"{name:<9} {text if text != before else '(unchanged)'}")
            before = text
        lines += ["plan", *(f"  {line}" for line in str(self.plan).splitlines())]
        return "\n".join(lines)


def explain(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Mask | None = None,
    *,
    backend: str = "auto",
    chunk_size: int | None = None,
    state_every: int | None = None,
    tune: str | None = None,
    target: Target | None = None,
) -> Explanation:
    """What `ssd` would do with the same arguments: the mask after each pass, the plan, and why not the other backends.

    Nothing is run and no value is read, so tensors on the meta device will do.

    Args:
        q, k, v, mask, backend, chunk_size, state_every, tune: as for `ssd`; what is not measured yet is not measured now.
        target: plan for this target instead of q's device.

    Raises:
        What `ssd` raises for the same arguments, values apart.

    >>> import torch
    >>> from ssdops import explain, masks
    >>> x = torch.empty(1, 4096, 8, 64, device="meta")
    >>> m = masks.channel_decay(torch.empty(1, 4096, 8, 64, device="meta"))
    >>> [step.backend for step in explain(x, x, x, m, target=Target("cpu")).plan.steps]
    ['chunked']
    """
    mask = masks.causal() if mask is None else mask
    arguments.check_types(q, k, v, mask)
    arguments.check_counts(chunk_size, state_every)
    contraction = Contraction(mask.tree, backend=backend, chunk_size=chunk_size, state_every=state_every, tune=tune)
    problem = problem_of(mask.tree, q, k, v, mask.operands, state_every=state_every)
    problem = problem if target is None else replace(problem, target=target)
    passes: list[tuple[str, str]] = []
    terms = normalize(mask.tree, lambda name, tree: passes.append((name, str(tree))))
    return Explanation(
        mask=str(mask),
        passes=tuple(passes),
        terms=tuple(str(term.node()) for term in terms),
        plan=plan(contraction, problem, dry=True),
        problem=problem,
    )
