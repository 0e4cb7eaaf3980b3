"""Launching the decode kernel: one launch per scan of the mask, with a diagonal on board if there is one."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from itertools import zip_longest
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...ir.problem import Problem
from ...ir.terms import Diagonal, Linear, Term
from ..base import StepInputs
from .kernels.step import step_kernel
from .launch import ceil_div
from .tile_mask import power

TILE_BYTES = 8192
"""Of state that a program holds: small enough that several share an SM, whose loads and stores then overlap."""


class Strided(NamedTuple):
    """A tensor as the kernel takes it: an address, and strides by what they step over (0 where one value serves all)."""

    data: Tensor
    row: int
    token: int = 0
    head: int = 0
    middle: int = 0
    last: int = 0
    share: int = 1


class Tile(NamedTuple):
    """How a state is cut: `block_p` of its headdim rows by all of dstate, for so many warps."""

    block_p: int
    block_n: int
    warps: int


def run(terms: tuple[Term, ...], problem: Problem, x: StepInputs) -> None:
    """Fill the rooms of x; of several scans each adds to the y of those before it, in float32."""
    if not x.y.shape[0] or not problem.headdim:
        return
    scans = [(term, values) for term, values in zip(terms, x.values, strict=True) if isinstance(term, Linear)]
    beside = [(term, values) for term, values in zip(terms, x.values, strict=True) if isinstance(term, Diagonal)]
    partial = None
    with _on(x.q.device):
        for index, (scan, diagonal) in enumerate(zip_longest(scans, beside)):
            y = x.y if index == len(scans) - 1 else torch.empty_like(x.y, dtype=torch.float32)
            _launch(problem, x, index, (*scan, *(diagonal or (None, {}))), (partial, y))
            partial = y


def _launch(
    p: Problem,
    x: StepInputs,
    index: int,
    terms: tuple[Linear, dict[str, Tensor], Diagonal | None, dict[str, Tensor]],
    ys: tuple[Tensor | None, Tensor],
) -> None:
    term, values, diagonal, own = terms
    before, after = x.before[index] if x.before else None, x.after[index]
    tile = tile_of(p.batch * p.nheads, p.headdim, p.dstate, after.element_size(), p.target.multiprocessors)
    decay_at, read_first = _order(term)
    slots = None if x.slots is None else Strided(x.slots, x.slots.stride(0))
    diagonal_scale = None if diagonal is None else x.scale * diagonal.sign

    def per_token(tensor: Tensor | None) -> Strided | None:
        return None if tensor is None else _per_token(tensor, p.nheads)

    channel = values.get("A")
    channel = values.get("channel") if channel is None else channel[None, None]
    step_kernel[(p.batch * p.nheads * ceil_div(p.headdim, tile.block_p),)](
        *(_per_token(tensor, p.nheads) for tensor in (x.q, x.k, x.v)),
        per_token(values.get("log_a")), per_token(channel), per_token(values.get("dt")),
        per_token(values.get("rows")), per_token(values.get("cols")), per_token(values.get("log_cols")),
        per_token(own.get("value")),
        None if before is None else _state(before), _state(after), x.every[index] if x.every else None,
        slots, after.shape[0], *ys, p.seqlen, x.scale * term.sign, diagonal_scale,
        NHEADS=p.nheads, HEADDIM=p.headdim, DSTATE=p.dstate, BLOCK_P=tile.block_p, BLOCK_N=tile.block_n,
        DECAY_AT=decay_at, READ_FIRST=read_first, num_warps=tile.warps,
    )  # fmt: skip


@lru_cache(maxsize=4096)
def tile_of(states: int, headdim: int, dstate: int, itemsize: int, processors: int) -> Tile:
    """Tiles of TILE_BYTES, and smaller ones where few states leave processors idle."""
    block_n = max(power(dstate), 16)
    block_p = min(power(headdim), max(TILE_BYTES // (block_n * itemsize), 1))
    while block_p > 4 and states * ceil_div(headdim, block_p) < 2 * processors:
        block_p //= 2
    return Tile(block_p, block_n, min(max(block_p * block_n // 512, 1), 4))  # a warp's loads never overlap another's


@lru_cache(maxsize=1024)
def _order(term: Linear) -> tuple[str, bool]:
    """When the state decays within a step, and whether it is read before the token is added (`ir/terms.py` on the flags)."""
    if not term.decays:
        return "never", term.strict
    if term.row_inclusive:
        return "first", term.strict
    return ("between", True) if term.col_inclusive else ("last", term.strict)


def _per_token(x: Tensor, nheads: int) -> Strided:
    """`(batch | 1, tokens | 1, heads)`, or one axis more, whose heads are shared in contiguous groups."""
    rows, tokens, heads, *_ = x.shape
    row, token, head, *last = x.stride()
    return Strided(
        x, row if rows > 1 else 0, token if tokens > 1 else 0, head if heads > 1 else 0, 0, last[0] if last else 0,
        nheads // heads if heads > 1 else 1,
    )  # fmt: skip


def _state(x: Tensor) -> Strided:
    """`(batch, nheads, headdim, dstate)`, or a pool of them."""
    row, head, middle, last = x.stride()
    return Strided(x, row, 0, head, middle, last)


def _on(device: torch.device) -> AbstractContextManager[Any]:
    """Triton launches on the current device."""
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(device)
