"""The forward pass of a linear term: launched by `Scan` the first time, and from then on at the addresses of other tensors.

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
from ..base import Config, Inputs, Output
from .calls import Grid, Kernel, Launch, Launching, stream_of
from .launch import Scan, ceil_div

ALIGNMENT = 256
"""Bytes that every part of the room begins at a multiple of: no less than kernels were compiled for."""


@dataclass(frozen=True, slots=True)
class Replay:
    """A forward pass that has been launched, less the addresses: of inputs, of outputs, then of what kernels hand on.

    Attributes:
        keeps: objects whose ids are in this replay's key: while it is kept, no others can have those ids.
        outputs: shapes and dtypes of Y and, if wanted, the final states.
        offsets: where in one room the tensors are that kernels hand on, in bytes.
        size: of the room.
        launches: each with the addresses that it takes, out of all.
    """

    keeps: tuple[Any, ...]
    outputs: tuple[tuple[torch.Size, torch.dtype], ...]
    offsets: tuple[int, ...]
    size: int
    launches: tuple[tuple[Launch, Callable[[Sequence[int]], tuple[int, ...]]], ...]

    def __call__(self, inputs: list[int], device: torch.device) -> Output:
        """Launch on the device's current stream. The room is free for others when this returns, and they come after."""
        outputs = [torch.empty(shape, dtype=dtype, device=device) for shape, dtype in self.outputs]
        room = torch.empty(self.size, dtype=torch.uint8, device=device)
        start, stream = room.data_ptr(), stream_of(device)
        addresses = [*inputs, *[x.data_ptr() for x in outputs], *[start + offset for offset in self.offsets]]
        for launch, picked in self.launches:
            launch(picked(addresses), stream)
        return Output(outputs[0], outputs[1] if len(outputs) > 1 else None)


class Recorded(Scan):
    """A linear term on its tensors, with notes of the memory it takes and of what it launches."""

    def __init__(self, term: Linear, x: Inputs, config: Config) -> None:
        super().__init__(term, x, config)
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

    def replay(self, inputs: list[int], output: Output) -> Replay | None:
        """Of what has been launched. None if that was nothing, or interpreted, or read a copy of an input."""
        outputs = [x for x in (output.y, output.state) if x is not None]
        handed_on = [x for x in self._made if not any(x is y for y in outputs)]
        places = [*inputs, *(x.data_ptr() for x in (*outputs, *handed_on))]
        index = {address: i for i, address in enumerate(places)}
        launches = []
        for launch, tensors in self._launched:
            wanted = [index.get(x.data_ptr()) for x in tensors]
            if launch is None or None in wanted:
                return None
            launches.append((launch, itemgetter(*wanted)))
        *offsets, size = accumulate((ceil_div(x.nbytes, ALIGNMENT) * ALIGNMENT for x in handed_on), initial=0)
        shapes = tuple((x.shape, x.dtype) for x in outputs)
        keeps = (self.term, self.problem, self.config)
        return Replay(keeps, shapes, tuple(offsets), size, tuple(launches)) if launches else None


_replays: dict[tuple[Any, ...], Replay] = {}
_MAX_REPLAYS = 4096


def forward(term: Linear, x: Inputs, config: Config) -> Output:
    """Y, the final states, and those between."""
    device = x.q.device
    with Launching(x.problem, device):
        if x.problem.state_every is not None:  # states between are put in order after the launches
            return Scan(term, x, config).forward()
        boundaries = None if x.documents is None else x.boundaries
        operands = [t for t in (*x.values.values(), boundaries, x.initial) if t is not None]
        addresses = [t.data_ptr() for t in (x.q, x.k, x.v, *operands)]
        key = (
            id(term), id(x.problem), id(config), x.scale, x.out, x.wants_state, device,
            x.q.dtype, x.k.dtype, x.v.dtype, *[(t.shape, t.stride(), t.dtype) for t in operands],  # what it does not say
            *[address % 16 == 0 for address in addresses], *map(addresses.index, addresses),  # the last: which are one tensor
        )  # fmt: skip
        replay = _replays.get(key)
        if replay is not None:
            return replay(addresses, device)
        scan = Recorded(term, x, config)
        out = scan.forward()
        replay = scan.replay(addresses, out)
    if replay is not None:
        if len(_replays) >= _MAX_REPLAYS:
            _replays.clear()
        _replays[key] = replay
    return out
