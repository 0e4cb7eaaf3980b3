"""Which programs a call wants, and on a CPU whether all are compiled: told without TVM, and without loading any of them.

On a CPU that follows from a call's term, dtype and sizes of heads; its passes are gone through once on a few tokens of nothing,
while programs are only collected (`build.collecting`). On a GPU it follows from seqlen, too, and tensors have no memory.
"""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache

import torch

from ...ir.problem import Problem
from ...ir.terms import Linear
from ..base import Config, Cotangents, Inputs
from . import build, exported
from .cpu import OnCpu
from .cuda import OnGpu
from .tile import Tile


def are_kept(term: Linear, problem: Problem, config: Config, direction: str) -> bool:
    """Whether every program of a pass, or of both passes of a call that is learnt from, was compiled before."""
    return all(_is_kept(*program) for program in needed(term, problem, config, direction))


def needed(term: Linear, problem: Problem, config: Config, direction: str) -> tuple[tuple[str, Tile], ...]:
    """These programs."""
    p = problem
    slots = tuple(slot for slot in ("log_a", "rows", "cols", "log_cols") if getattr(term, slot) is not None)
    tokens = 2 * (config.chunk_size or 1)
    small = Problem(
        1, tokens, 1, p.headdim, p.dstate, 1, 1, 1, p.dtype, p.accumulate, p.accumulate, 1, False, (), p.target,
        None if p.state_every is None else config.chunk_size,
    )  # fmt: skip
    return programs(replace(term, documents=None), slots, small, config, direction)


@lru_cache(maxsize=1024)
def programs(
    term: Linear, slots: tuple[str, ...], problem: Problem, config: Config, direction: str
) -> tuple[tuple[str, Tile], ...]:
    """What the passes of a small problem call."""
    p = problem

    def nothing(*shape: int, dtype: torch.dtype = p.dtype) -> torch.Tensor:
        return torch.zeros(1, p.seqlen, 1, *shape, dtype=dtype)

    values = {slot: nothing(dtype=torch.float64 if "log" in slot else p.accumulate) for slot in slots}
    q, v = nothing(p.dstate), nothing(p.headdim)
    x = Inputs(p, q, q, v, values, {}, None, None, 1.0, p.accumulate, False)
    learnt, wide = direction == "backward", p.dtype in (torch.float32, torch.float64)  # as `ops.worth_saving` has it
    with build.collecting():
        scan = OnCpu(term, x, config)
        saved = scan.forward(learnt and wide).saved
        if learnt:
            scan.backward(Cotangents(v, None, saved))
    return tuple(dict.fromkeys(scan.wanted))


def by_learning(term: Linear, x: Inputs, config: Config) -> tuple[tuple[str, Tile], ...]:
    """The programs of both passes of a call that is learnt from; none if nobody can say before it is run."""
    if x.q.is_cpu:
        return needed(term, x.problem, config, "backward")
    if x.documents is not None:
        return ()

    def nothing(given: torch.Tensor) -> torch.Tensor:
        return torch.empty_like(given, device="meta")

    initial = None if x.initial is None else nothing(x.initial)
    values = {name: nothing(value) for name, value in x.values.items()}
    x = replace(x, q=nothing(x.q), k=nothing(x.k), v=nothing(x.v), values=values, initial=initial)
    with build.collecting():
        scan = OnGpu(term, x, config)
        out = scan.forward(True)
        scan.backward(Cotangents(out.y, None, out.saved))
    return tuple(dict.fromkeys(scan.wanted))


def _is_kept(name: str, tile: Tile) -> bool:
    if (name, tile) in build.MADE:
        return True
    path = exported.place(name, tile) or build.place(name, tile)
    return path.exists() and build.ours(path.parent)
