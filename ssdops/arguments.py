"""What users pass to `ssd`, `ssd_step` and `explain`: checked, and written as the text of a contraction."""

from __future__ import annotations

from functools import lru_cache
from typing import Any, TypeAlias

import torch
from torch import Tensor

from . import carry, ops
from .errors import DtypeError, MaskError, UnknownBackendError, UnsupportedError
from .ir import nodes as n
from .ir.contraction import Contraction
from .masks import Mask
from .plan import state_terms

State: TypeAlias = "Tensor | tuple[Tensor, ...]"
"""The state of a mask: one matrix `(batch, nheads, headdim, dstate)` per linear term, bare if there is one; of a trapezoid
(S, previous k, previous v)."""


def check_types(q: Tensor, k: Tensor, v: Tensor, mask: Mask) -> None:
    """q, k and v are dense tensors, and the mask is one."""
    if not isinstance(mask, Mask):
        raise MaskError(f"mask must be a Mask made by ssdops.masks, got {type(mask).__name__}")
    for name, x in (("q", q), ("k", k), ("v", v)):
        if not isinstance(x, Tensor):
            raise DtypeError(f"{name} must be a torch.Tensor, got {type(x).__name__}")
        if x.layout is not torch.strided:
            raise UnsupportedError(f"{name} is {x.layout}; ssd takes dense tensors: convert it, or pack it as documents")


def check_options(
    scale: float,
    flag: bool,
    state_dtype: torch.dtype | None,
    backend: str,
    flag_name: str = "return_state",
) -> None:
    """What is no tensor has the type it should."""
    if not isinstance(scale, int | float):
        raise DtypeError(
            f"scale must be a Python number, got {type(scale).__name__}; it takes no gradient: multiply v by a tensor instead"
        )
    if not isinstance(flag, bool):
        raise DtypeError(f"{flag_name} must be True or False, got {type(flag).__name__}: {flag!r}")
    if state_dtype is not None and not isinstance(state_dtype, torch.dtype):
        raise DtypeError(f"state_dtype must be a torch.dtype or None, got {type(state_dtype).__name__}: {state_dtype!r}")
    if not isinstance(backend, str):
        raise UnknownBackendError(f"backend must be a name or 'auto', got {type(backend).__name__}: {backend!r}")


def check_counts(chunk_size: int | None, state_every: int | None) -> None:
    """Counts of tokens are integers."""
    for name, count in (("chunk_size", chunk_size), ("state_every", state_every)):
        if count is not None and (not isinstance(count, int) or isinstance(count, bool)):
            raise DtypeError(f"{name} must be an int or None, got {type(count).__name__}: {count!r}")


@lru_cache(maxsize=4096)
def check_recurrence(tree: n.Node) -> None:
    """Raise UnsupportedError unless every term of the mask runs forward in time, token by token."""
    for node in n.walk(tree):
        if isinstance(node, n.Documents):
            raise UnsupportedError("a step has no documents: give every sequence its own batch row, and drop documents()")
    carry.trapezoid_of(tree)
    for term in state_terms(tree):
        if term.documents is not None:  # which a registered mask may be made of
            raise UnsupportedError(f"a step has no documents, and {tree} is made of them: give every sequence its own row")
        if not term.causal:
            raise UnsupportedError(f"{term.node()} reads later tokens, so {tree} has no step; run ssd on the whole sequence")


def autocast(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v in autocast's dtype, if it is on."""
    if not ops.autocasts(q):
        return q, k, v
    dtype = torch.get_autocast_dtype(q.device.type)
    return q.to(dtype), k.to(dtype), v.to(dtype)


def text(
    tree: n.Node,
    return_state: bool,
    state_dtype: str | None,
    backend: str,
    chunk_size: int | None,
    state_every: int | None,
    tune: str | None,
) -> tuple[str, tuple[str, ...]]:
    """The contraction as text, and the names of its operands, in order."""
    if torch.compiler.is_compiling():  # it cannot trace the cache
        return str(Contraction(tree, return_state, state_dtype, backend, chunk_size, state_every, tune)), n.names_of(tree)
    return _program(tree, return_state, state_dtype, backend, chunk_size, state_every, tune)


@lru_cache(maxsize=4096)
def _program(tree: n.Node, *options: Any) -> tuple[str, tuple[str, ...]]:
    return str(Contraction(tree, *options)), n.operand_names(tree)


def states(state: State | None, name: str) -> list[Tensor]:
    """The states given under that name, as a list."""
    if state is None:
        return []
    if isinstance(state, Tensor):
        return [state]
    if not isinstance(state, tuple | list) or not all(isinstance(x, Tensor) for x in state):
        kinds = [type(x).__name__ for x in state] if isinstance(state, tuple | list) else type(state).__name__
        raise DtypeError(f"{name} must be a tensor or a tuple of tensors, got {kinds}")
    return list(state)
