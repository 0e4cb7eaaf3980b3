"""`ssd`, `ssd_step`, `explain`: validate → build → plan → run."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TypeAlias

import torch
from torch import Tensor

from . import carry, config, masks, ops
from .errors import (
    DeviceError,
    DtypeError,
    MaskError,
    ShapeError,
    SsdopsError,
    UnknownBackendError,
    UnsupportedError,
    ValueRangeError,
)
from .ir import nodes as n
from .ir.contraction import Contraction
from .ir.passes.normalize import normalize
from .ir.problem import Problem, Target, problem_of
from .masks import Mask
from .plan import Plan, plan, state_terms
from .run import Call

State: TypeAlias = "Tensor | tuple[Tensor, ...]"
"""The state of a mask: one matrix `(batch, nheads, headdim, dstate)` per linear term, bare if there is one; of a trapezoid
(S, previous k, previous v)."""


def ssd(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Mask | None = None,
    *,
    scale: float = 1.0,
    initial_state: State | None = None,
    return_state: bool = False,
    state_dtype: torch.dtype | None = None,
    backend: str = "auto",
    chunk_size: int | None = None,
) -> Tensor | tuple[Tensor, State]:
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
        state_dtype: of final states; None is float32 (float64 if any input is).
        backend: "auto", or a name from `ssdops.backends`.
        chunk_size: the chunk length of a chunked backend; None lets the planner choose.

    Returns:
        Y `(batch, seqlen, nheads, headdim)` in the promoted dtype of q, k and v; with `return_state`, (Y, state).

    Raises:
        ShapeError, DtypeError, DeviceError, ValueRangeError: an argument that does not fit; the message names it.
        UnknownBackendError, UnsupportedError: a backend that is not there, or cannot; the message says which can.

    Source: Dao & Gu 2024, "Transformers are SSMs", section 3 (equation 16) and section 6.

    >>> import torch
    >>> from ssdops import ssd, masks
    >>> q, k, v = torch.ones(1, 3, 1, 2), torch.ones(1, 3, 1, 2), torch.ones(1, 3, 1, 1)
    >>> ssd(q, k, v, masks.decay(torch.full((1, 3, 1), 0.5).log())).flatten()
    tensor([2.0000, 3.0000, 3.5000])
    """
    mask = masks.causal() if mask is None else mask
    _check_types(q, k, v, mask)
    _check_options(scale, return_state, state_dtype, backend, chunk_size)
    if ops.autocasts(q.device.type):
        dtype = torch.get_autocast_dtype(q.device.type)
        q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    given = states = _states(initial_state, "initial_state")
    trapezoid = carry.trapezoid_of(mask.tree) if return_state or initial_state is not None else None
    if trapezoid is not None:
        states = carry.enter(trapezoid, mask.operands, given, k, v)
    name = None if state_dtype is None else str(state_dtype).removeprefix("torch.")
    scale = float(scale)
    if torch.compiler.is_compiling():
        program = str(Contraction(mask.tree, return_state, name, backend, chunk_size))
        names = n.names_of(mask.tree)
        out = torch.ops.ssdops.forward(q, k, v, [mask.operands[x] for x in names], states, program, scale)
    else:
        if initial_state is not None and not states and (count := len(state_terms(mask.tree))):
            raise ShapeError(f"initial_state has 0 states; this mask carries {count}, one per linear term (None: zero)")
        program, names = _program(mask.tree, return_state, name, backend, chunk_size)
        out = ops.call(Call(q, k, v, [mask.operands[x] for x in names], states, program, scale))
    if not return_state:
        return out[0]
    if trapezoid is not None:
        return out[0], carry.leave(out[1:], given, k, v)
    return out[0], out[1] if len(out) == 2 else tuple(out[1:])


def ssd_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Mask,
    state: State | None,
    *,
    scale: float = 1.0,
    state_indices: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, State]:
    """One token of `ssd`, for decoding: `S ← a S + w v kᵀ`, `y = scale · u S q`.

    The operands are those of `ssd` without their seqlen axis; stepping through a sequence gives what `ssd` gives at once.

    Args:
        q, k: `(batch, heads, dstate)`.
        v: `(batch, heads, headdim)`.
        mask: a mask of causal scans and diagonals whose per-token operands are `(batch, nheads)` or broadcastable.
        state: as `ssd` takes and returns it; None is zero. With state_indices, a pool `(slots, nheads, headdim, dstate)` per
            linear term, which is updated in place: the one input that ssdops ever writes to.
        scale: a factor on y.
        state_indices: the slot of each batch row, `(batch,)`, int32 or int64, each slot at most once; rows whose slot is
            −1 give zero and touch nothing. A pool takes no gradient, and none flows through it.
        backend: "auto" or a backend's name.

    Returns:
        y `(batch, nheads, headdim)`, and the state after the token in the dtype of `state` (the pool itself with
        state_indices).

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
    """
    _check_types(q, k, v, mask)
    for name, x in (("q", q), ("k", k), ("v", v)):
        dim = "headdim" if name == "v" else "dstate"
        if x.ndim != 3:
            raise ShapeError(f"{name} must be (batch, heads, {dim}) in a step, got {x.ndim} dimensions: {tuple(x.shape)}")
        if x.shape[0] != q.shape[0]:
            raise ShapeError(f"{name} has batch {x.shape[0]}, expected {q.shape[0]} as in q")
    _check_recurrence(mask.tree)
    states = _states(state, "state")
    pools: list[Tensor] = []
    if state_indices is not None:
        if carry.trapezoid_of(mask.tree) is not None:
            raise UnsupportedError(
                "a pool holds one matrix per slot, and trapezoidal() carries the last k and v too; pass states"
            )
        pools, states = states, _read_slots(mask, states, state_indices, q)
    try:
        y, new = ssd(
            q[:, None], k[:, None], v[:, None], _with_time(mask),
            scale=scale, initial_state=tuple(states) if state is not None else None, return_state=True,
            state_dtype=states[0].dtype if states else None, backend=backend,
        )  # fmt: skip
    except SsdopsError as error:  # as the arguments are called here
        raise type(error)(str(error).replace("initial_state", "state")) from None
    if state_indices is None:
        return y[:, 0], new
    for pool, updated in zip(pools, _states(new, "state"), strict=True):
        torch.ops.ssdops.write_slots_(pool, updated.detach(), state_indices)
    assert state is not None  # _read_slots() has read it
    return torch.where((state_indices >= 0)[:, None, None], y[:, 0], 0.0), state


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
    target: Target | None = None,
) -> Explanation:
    """What `ssd` would do with the same arguments: the mask after each pass, the plan, and why not the other backends.

    Nothing is run and no value is read, so tensors on the meta device will do.

    Args:
        q, k, v, mask, backend, chunk_size: as for `ssd`.
        target: plan for this target instead of q's device.

    Raises:
        What `ssd` raises for the same arguments, values apart.

    >>> import torch
    >>> from ssdops import explain, masks
    >>> x = torch.empty(1, 4096, 8, 64, device="meta")
    >>> m = masks.decay(torch.empty(1, 4096, 8, device="meta"))
    >>> [step.backend for step in explain(x, x, x, m, target=Target("cpu")).plan.steps]
    ['chunked']
    """
    mask = masks.causal() if mask is None else mask
    _check_types(q, k, v, mask)
    problem = problem_of(mask.tree, q, k, v, mask.operands)
    problem = problem if target is None else replace(problem, target=target)
    passes: list[tuple[str, str]] = []
    terms = normalize(mask.tree, lambda name, tree: passes.append((name, str(tree))))
    return Explanation(
        mask=str(mask),
        passes=tuple(passes),
        terms=tuple(str(term.node()) for term in terms),
        plan=plan(Contraction(mask.tree, backend=backend, chunk_size=chunk_size), problem),
        problem=problem,
    )


def _check_types(q: Tensor, k: Tensor, v: Tensor, mask: Mask) -> None:
    if not isinstance(mask, Mask):
        raise MaskError(f"mask must be a Mask made by ssdops.masks, got {type(mask).__name__}")
    for name, x in (("q", q), ("k", k), ("v", v)):
        if not isinstance(x, Tensor):
            raise DtypeError(f"{name} must be a torch.Tensor, got {type(x).__name__}")
        if x.layout is not torch.strided:
            raise UnsupportedError(f"{name} is {x.layout}; ssd takes dense tensors: convert it, or pack it as documents")


def _check_options(
    scale: float, return_state: bool, state_dtype: torch.dtype | None, backend: str, chunk_size: int | None
) -> None:
    if not isinstance(scale, int | float):
        raise DtypeError(
            f"scale must be a Python number, got {type(scale).__name__}; it takes no gradient: multiply v by a tensor instead"
        )
    if not isinstance(return_state, bool):
        raise DtypeError(f"return_state must be True or False, got {type(return_state).__name__}: {return_state!r}")
    if state_dtype is not None and not isinstance(state_dtype, torch.dtype):
        raise DtypeError(f"state_dtype must be a torch.dtype or None, got {type(state_dtype).__name__}: {state_dtype!r}")
    if not isinstance(backend, str):
        raise UnknownBackendError(f"backend must be a name or 'auto', got {type(backend).__name__}: {backend!r}")
    if chunk_size is not None and (not isinstance(chunk_size, int) or isinstance(chunk_size, bool)):
        raise DtypeError(f"chunk_size must be an int or None, got {type(chunk_size).__name__}: {chunk_size!r}")


@lru_cache(maxsize=4096)
def _check_recurrence(tree: n.Node) -> None:
    """Raise UnsupportedError unless every term of the mask runs forward in time, token by token."""
    for node in n.walk(tree):
        if isinstance(node, n.Documents):
            raise UnsupportedError("a step has no documents: give every sequence its own batch row, and drop documents()")
    carry.trapezoid_of(tree)
    for term in state_terms(tree):
        if not term.causal:
            raise UnsupportedError(f"{term.node()} reads later tokens, so {tree} has no step; run ssd on the whole sequence")


def _with_time(mask: Mask) -> Mask:
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


def _read_slots(mask: Mask, pools: list[Tensor], indices: Tensor, q: Tensor) -> list[Tensor]:
    """The states of the rows, read from their pools; rows without a slot read slot 0 and are dropped later."""
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
    return [pool[indices.clamp_min(0)] for pool in pools]


def _check_slots(indices: list[int], slots: int) -> None:
    taken = [index for index in indices if index != -1]
    for row, index in enumerate(indices):
        if not -1 <= index < slots:
            raise ValueRangeError(f"state_indices must lie in [0, {slots}), or be -1, got {index} at row {row}")
    if len(set(taken)) < len(taken):
        twice = next(index for index in taken if taken.count(index) > 1)
        raise ValueRangeError(f"state_indices must name each slot once, got slot {twice} for {taken.count(twice)} rows")


@lru_cache(maxsize=4096)
def _program(
    tree: n.Node, return_state: bool, state_dtype: str | None, backend: str, chunk_size: int | None
) -> tuple[str, tuple[str, ...]]:
    """The contraction as text, and the names of its operands, in order."""
    return str(Contraction(tree, return_state, state_dtype, backend, chunk_size)), n.operand_names(tree)


def _states(state: State | None, name: str) -> list[Tensor]:
    if state is None:
        return []
    if isinstance(state, Tensor):
        return [state]
    if not isinstance(state, tuple | list) or not all(isinstance(x, Tensor) for x in state):
        kinds = [type(x).__name__ for x in state] if isinstance(state, tuple | list) else type(state).__name__
        raise DtypeError(f"{name} must be a tensor or a tuple of tensors, got {kinds}")
    return list(state)
