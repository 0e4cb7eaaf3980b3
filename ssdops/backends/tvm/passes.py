"""Forward and backward passes of a term on its tensors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TypeVar

import torch

from ...ir.terms import Linear, Quadratic
from ..base import Config, Cotangents, Gradients, Inputs, Output
from . import build
from .cpu import OnCpu
from .cuda import OnGpu
from .kept import by_learning
from .quadratic import OnPairs
from .replay import Call, Watch, able, as_read, reading
from .scan import Pass, Scan
from .threads import Alone
from .tile import Tile

S = TypeVar("S", bound=Pass)
R = TypeVar("R")
Programs = Sequence[tuple[str, Tile]]
"""Names and tiles."""


def forward(term: Linear | Quadratic, x: Inputs, config: Config, save: bool) -> Output:
    """Y, the final states, and those between; with `save`, what spares the backward pass work."""
    if isinstance(term, Quadratic):
        return complete(x, lambda: OnPairs(term, x, config), lambda scan: scan.forward(save))
    kind = scan_on(x)
    call = Call(("forward", save), kind, term, x, config) if able(x) else None
    if call is not None and (found := call.again()) is not None:
        return kind.output(found)
    given = (x.q, x.k, x.v, *x.values.values(), *(() if x.initial is None else (x.initial,)))
    learnt = save or any(t.requires_grad for t in given)
    later = partial(by_learning, term, x, config) if learnt else tuple
    if call is None:
        return complete(x, lambda: kind(term, x, config), lambda scan: scan.forward(save), later)
    read = reading(x, call.read)
    with Watch() as watch:
        made = complete(
            x, lambda: kind(term, read, config), lambda scan: call.keep(scan.outputs(save), scan.notes, watch), later
        )
    return kind.output(made)


def backward(term: Linear | Quadratic, x: Inputs, config: Config, cotangents: Cotangents) -> Gradients:
    """Gradients of everything."""
    if isinstance(term, Quadratic):
        return complete(x, lambda: OnPairs(term, x, config), lambda scan: scan.backward(cotangents))
    kind = scan_on(x)
    if not able(x):
        return complete(x, lambda: kind(term, x, config), lambda scan: scan.backward(cotangents))
    saved, state = cotangents.saved, cotangents.state
    others = [*saved, as_read(cotangents.y, kind.dtype_of_data(x.problem))]
    if state is not None:
        others.append(kind.as_read(state.to(x.problem.accumulate)))
    call = Call(("backward", state is None, len(saved)), kind, term, x, config, others)
    if (found := call.again()) is None:
        read, given = reading(x, call.read), call.given(cotangents)
        with Watch() as watch:
            found = complete(
                x, lambda: kind(term, read, config), lambda scan: call.keep(scan.gradients(given), scan.notes, watch)
            )
    return kind.gathered(x, found)


def scan_on(x: Inputs) -> type[Scan]:
    """What a linear term's passes are on these tensors."""
    return OnCpu if x.q.is_cpu else OnGpu


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
        if not (wanted := first.wanted):
            return out
        del first, out  # and the memory of all that no program has filled
        with torch._C.DisableTorchFunction():  # what this asks of torch is not the pass's
            build.make([*wanted, *[program for program in later() if build.known(*program) is None]])
        again = make()
        out = run(again)
        assert not again.wanted  # else what it gave is not filled
        return out
