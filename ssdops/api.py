"""`ssd`, `ssd_step`, `explain`: validate → build → plan → run."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import TypeAlias

import torch
from torch import Tensor

from . import masks, ops
from .errors import DtypeError, MaskError
from .ir import nodes as n
from .ir.contraction import Contraction
from .masks import Mask

State: TypeAlias = "Tensor | tuple[Tensor, ...]"
"""The state of a mask: one matrix `(batch, nheads, headdim, dstate)` per linear term, bare if there is one."""


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
    contiguous groups of heads. In Mamba-2's words q = C, k = B, v = x·dt, log_a = A·dt, and D is a diagonal term.

    Args:
        q, k: `(batch, seqlen, heads, dstate)`, float32, float64, bfloat16 or float16, any strides. Under autocast q, k and v
            are cast to its dtype; mask operands and states never are.
        v: `(batch, seqlen, heads, headdim)`.
        mask: the structure of L (`ssdops.masks`); None is `causal()`.
        scale: a factor on Y; it never changes a state.
        initial_state: a state per linear term: one matrix `(batch, nheads, headdim, dstate)`, or
            `(n_segments, nheads, headdim, dstate)` for packed documents (`batch · n_segments` rows where segment ids come in
            a batch); bare for one term, else a tuple in the order of the terms. An anticausal term's state enters at the
            right end and leaves at the left.
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
    if not isinstance(mask, Mask):
        raise MaskError(f"mask must be a Mask made by ssdops.masks, got {type(mask).__name__}")
    for name, x in (("q", q), ("k", k), ("v", v)):
        if not isinstance(x, Tensor):
            raise DtypeError(f"{name} must be a torch.Tensor, got {type(x).__name__}")
    if torch.is_autocast_enabled(q.device.type):
        dtype = torch.get_autocast_dtype(q.device.type)
        q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    states = _states(initial_state)
    name = None if state_dtype is None else str(state_dtype).removeprefix("torch.")
    if torch.compiler.is_compiling():
        program = str(Contraction(mask.tree, return_state, name, backend, chunk_size))
        names = n.operand_names(mask.tree)
        out = torch.ops.ssdops.forward(q, k, v, [mask.operands[x] for x in names], states, program, scale)
    else:
        program, names = _program(mask.tree, return_state, name, backend, chunk_size)
        out = ops.call(q, k, v, [mask.operands[x] for x in names], states, program, scale)
    if not return_state:
        return out[0]
    return out[0], out[1] if len(out) == 2 else tuple(out[1:])


@lru_cache(maxsize=4096)
def _program(
    tree: n.Node, return_state: bool, state_dtype: str | None, backend: str, chunk_size: int | None
) -> tuple[str, tuple[str, ...]]:
    """The contraction as text, and the names of its operands, in order."""
    return str(Contraction(tree, return_state, state_dtype, backend, chunk_size)), n.operand_names(tree)


def _states(state: State | None) -> list[Tensor]:
    if state is None:
        return []
    return [state] if isinstance(state, Tensor) else list(state)
