"""Forward and backward passes of a term on its tensors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TypeVar

from ...ir.terms import Linear, Quadratic
from ..base import Config, Cotangents, Gradients, Inputs, Output
from . import build
from .cpu import OnCpu, gathered, output
from .cuda import OnGpu
from .kept import needed
from .quadratic import OnPairs
from .replay import Call, able, as_read, reading
from .scan import Pass
from .threads import Alone
from .tile import Tile

S = TypeVar("S", bound=Pass)
R = TypeVar("R")
Programs = Sequence[tuple[str, Tile]]
"""Names and tiles."""


def forward(term: Linear | Quadratic, x: Inputs, config: Config, save: bool) -> Output:
    """Y, the final states, and those between; with `save`, what spares the backward pass work."""
    if not isinstance(term, Linear) or not x.q.is_cpu:
        return complete(x, lambda: other(term, x, config), lambda scan: scan.forward(save))
    call = Call(("forward", save), term, x, config) if able(x) else None
    if call is not None and (found := call.again()) is not None:
        return output(found)
    later = partial(needed, term, x.problem, config, "backward") if save else tuple
    if call is None:
        return complete(x, lambda: OnCpu(term, x, config), lambda scan: scan.forward(save), later)
    read = reading(x, call.read)
    return output(complete(x, lambda: OnCpu(term, read, config), lambda scan: call.keep(scan.notes, scan.outputs(save)), later))


def backward(term: Linear | Quadratic, x: Inputs, config: Config, cotangents: Cotangents) -> Gradients:
    """Gradients of everything."""
    if not isinstance(term, Linear) or not x.q.is_cpu:
        return complete(x, lambda: other(term, x, config), lambda scan: scan.backward(cotangents))
    if not able(x):
        return complete(x, lambda: OnCpu(term, x, config), lambda scan: scan.backward(cotangents))
    acc, saved = x.problem.accumulate, cotangents.saved
    others = [*saved, as_read(cotangents.y, acc)]
    if cotangents.state is not None:
        others.append(as_read(cotangents.state, acc))
    call = Call(("backward", cotangents.state is None, len(saved)), term, x, config, others)
    if (found := call.again()) is None:
        read, given = reading(x, call.read), call.given(cotangents)
        found = complete(x, lambda: OnCpu(term, read, config), lambda scan: call.keep(scan.notes, scan.gradients(given)))
    return gathered(x, found)


def other(term: Linear | Quadratic, x: Inputs, config: Config) -> OnGpu | OnPairs:
    """What is no scan on a CPU."""
    return OnPairs(term, x, config) if isinstance(term, Quadratic) else OnGpu(term, x, config)


def complete(x: Inputs, make: Callable[[], S], run: Callable[[S], R], later: Callable[[], Programs] = tuple) -> R:
    """What a pass gives; its first time, when it has only told which programs it wants, they are made and it runs again.

    Args:
        later: programs that another pass will want; if some must be made now, these are made beside them.
    """
    with Alone(x.q.device):
        first = make()
        out = run(first)
        if (collected := build.collected()) is not None:
            collected.update(dict.fromkeys(first.wanted))
            return out
        if not first.wanted:
            return out
        build.make([*first.wanted, *[program for program in later() if build.known(*program) is None]])
        again = make()
        out = run(again)
        assert not again.wanted  # else what it gave is not filled
        return out
