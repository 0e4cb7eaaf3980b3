"""Passes of a linear term: launched by `Scan` and `Backward` the first time, from then on at the addresses of other tensors.

Working out grids, strides and switches takes a host longer than the GPU takes to run them. All of it follows from the term, the
problem, the config, and how the tensors are laid out; with the same of these only addresses differ.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor

from ...ir.terms import Linear
from ..base import Begun, Config, Cotangents, Gradients, Inputs, Output
from .backward import Backward, Results, in_turns, in_whole
from .calls import Grid, Kernel, Launch, Launching, stream_of
from .launch import Scan, ceil_div
from .segments import Parts

ALIGNMENT = 256
"""Bytes that every part of the room begins at a multiple of: no less than kernels were compiled for."""


@dataclass(frozen=True, slots=True)
class Replay:
    """A pass that has been launched, less the addresses: of inputs, of outputs, then of what kernels hand on.

    Attributes:
        keeps: objects whose ids are in this replay's key: while it is kept, no others can have those ids.
        outputs: shapes and dtypes of those that are wanted, None for the others.
        offsets: where in one room the tensors are that kernels hand on, in bytes.
        size: of the room.
        launches: each with the addresses that it takes, out of all.
        waits: before which of them what was not there yet must have come.
    """

    keeps: tuple[Any, ...]
    outputs: tuple[tuple[torch.Size, torch.dtype] | None, ...]
    offsets: tuple[int, ...]
    size: int
    launches: tuple[tuple[Launch, Callable[[Sequence[int]], tuple[int, ...]]], ...]
    waits: int

    def __call__(
        self, inputs: list[int], device: torch.device, arrive: Callable[[], None] | None = None
    ) -> list[Tensor | None]:
        """Launch on the device's current stream. The room is free for others when this returns, and they come after."""
        outputs = [None if like is None else torch.empty(like[0], dtype=like[1], device=device) for like in self.outputs]
        room = torch.empty(self.size, dtype=torch.uint8, device=device)
        start, stream = room.data_ptr(), stream_of(device)
        addresses = [*inputs, *[x.data_ptr() for x in outputs if x is not None], *[start + offset for offset in self.offsets]]
        for i, (launch, picked) in enumerate(self.launches):
            if arrive is not None and i == self.waits:
                arrive()
            launch(picked(addresses), stream)
        return outputs


class Notes(Scan):
    """A linear term on its tensors, with notes of the memory it takes and of what it launches."""

    def __init__(self, term: Linear, x: Inputs, config: Config, arrive: Callable[[], None] | None = None) -> None:
        super().__init__(term, x, config, arrive)
        self._waits = -1
        self._made: list[Tensor] = []
        self._launched: list[tuple[Launch | None, Sequence[Tensor]]] = []

    def empty(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """As `Scan` does, and noted."""
        self._made.append(super().empty(*shape, dtype=dtype))
        return self._made[-1]

    def run(
        self, kernel: Kernel, grid: Grid, tensors: Sequence[Tensor], numbers: Sequence[int | float], **constants: Any
    ) -> None:
        """As `Scan` does, and noted."""
        self._launched.append((kernel(grid, tensors, numbers, **constants), tensors))

    def wait(self) -> None:
        """As `Scan` does, and noted."""
        super().wait()
        self._waits = len(self._launched)

    def replay(self, inputs: list[int], outputs: Sequence[Tensor | None]) -> Replay | None:
        """Of what has been launched. None if that was nothing, or interpreted, or read a copy of an input."""
        wanted = [x for x in outputs if x is not None]
        handed_on = [x for x in self._made if not any(x is y for y in wanted)]
        places = [*inputs, *(x.data_ptr() for x in (*wanted, *handed_on))]
        index = {address: i for i, address in enumerate(places)}
        launches = []
        for launch, tensors in self._launched:
            taken = [index.get(x.data_ptr()) for x in tensors]
            if launch is None or None in taken:
                return None
            launches.append((launch, itemgetter(*taken)))
        *offsets, size = accumulate((ceil_div(x.nbytes, ALIGNMENT) * ALIGNMENT for x in handed_on), initial=0)
        shapes = tuple(None if x is None else (x.shape, x.dtype) for x in outputs)
        keeps = (self.term, self.problem, self.config)
        return Replay(keeps, shapes, tuple(offsets), size, tuple(launches), self._waits) if launches else None


class BackwardNotes(Notes, Backward):
    """The same of a backward pass."""


_replays: dict[tuple[Any, ...], Replay] = {}
_MAX_REPLAYS = 4096


def begin(term: Linear, x: Inputs, config: Config, reads: Config) -> Begun:
    """A forward pass up to where it needs `x.initial`: what segments make from no state.

    Args:
        config: of these segments; reads: of the scan, which goes on from them if it has segments, as these are its own then.
    """
    parts, state, decay = _begun(term, x, config)
    kept = parts if reads.segments > 1 else None
    return Begun(state, decay, lambda save, arrive: forward(term, x, reads, kept, arrive))


def final_state(term: Linear, x: Inputs, config: Config) -> Tensor:
    """The final states alone, of a config with as many segments as fill the device: what each makes, summed."""
    _, state, decay = _begun(term, x, config)
    return state if x.initial is None else state + x.initial * decay


def _begun(term: Linear, x: Inputs, config: Config) -> tuple[Parts, Tensor, Tensor]:
    """What `Scan.begin` gives."""
    with Launching(x.problem, x.q.device):
        key, addresses = _key(term, x, config, ())
        replay = _replays.get(("begin", *key))
        if replay is not None:
            made, logs, state, decay = replay(addresses, x.q.device)
            assert made is not None and logs is not None and state is not None and decay is not None  # they always are
            return (made, logs), state, decay
        scan = Notes(term, x, config)
        parts, state, decay = scan.begin()
        _keep(("begin", *key), scan.replay(addresses, (*parts, state, decay)))
        return parts, state, decay


def forward(
    term: Linear, x: Inputs, config: Config, parts: Parts | None = None, arrive: Callable[[], None] | None = None
) -> Output:
    """Y, the final states, and those between; from what `begin` has made, and with initial states that are yet to arrive."""
    with Launching(x.problem, x.q.device):
        if x.problem.state_every is not None:  # states between are put in order after the launches
            return Scan(term, x, config, arrive).forward(parts)
        key, addresses = _key(term, x, config, (x.onto, *(parts or ())))
        replay = _replays.get(key)
        if replay is not None:
            y, state = replay(addresses, x.q.device, arrive)
            y = x.onto if y is None else y
            assert y is not None  # it is new, or what it was added to
            return Output(y, state)
        scan = Notes(term, x, config, arrive)
        out = scan.forward(parts)
        _keep(key, scan.replay(addresses, (None if out.y is x.onto else out.y, out.state)))
        return out


def backward(term: Linear, x: Inputs, config: Config, cotangents: Cotangents) -> Gradients:
    """Gradients of everything."""
    with Launching(x.problem, x.q.device):
        onto = cotangents.onto
        key, addresses = _key(term, x, config, (cotangents.y, cotangents.state, None if onto is None else onto.v))
        replay = _replays.get(key)
        if replay is not None:
            results = Results(*replay(addresses, x.q.device, cotangents.arrive))
            return (results if onto is None or results.v is not None else results._replace(v=onto.v)).gradients(x, onto)
        whole, given = in_whole(x, cotangents)
        scan = BackwardNotes(term, whole, config, given.arrive)
        if whole is not x or scan.rows_at_once < x.problem.batch:  # tensors are copied before the launches, or between them
            return in_turns(term, x, config, cotangents)
        out = scan.backward(given)
        in_place = onto is not None and out.v is onto.v
        _keep(key, scan.replay(addresses, out._replace(v=None) if in_place else out))
        return out.gradients(x, onto)


def _key(term: Linear, x: Inputs, config: Config, cotangents: tuple[Tensor | None, ...]) -> tuple[tuple[Any, ...], list[int]]:
    """What a pass follows from, and the addresses of its tensors."""
    boundaries = None if x.documents is None else x.boundaries
    others = [t for t in (*x.values.values(), boundaries, x.initial, *cotangents) if t is not None]
    addresses = [t.data_ptr() for t in (x.q, x.k, x.v, *others)]
    return (
        id(term), id(x.problem), id(config), x.scale, x.out, x.wants_state, x.q.device, *[t is None for t in cotangents],
        x.q.dtype, x.k.dtype, x.v.dtype, *[(t.shape, t.stride(), t.dtype) for t in others],  # what the problem does not say
        *[address % 16 == 0 for address in addresses], *map(addresses.index, addresses),  # the last: which are one tensor
    ), addresses  # fmt: skip


def _keep(key: tuple[Any, ...], replay: Replay | None) -> None:
    if replay is not None:
        if len(_replays) >= _MAX_REPLAYS:
            _replays.clear()
        _replays[key] = replay
