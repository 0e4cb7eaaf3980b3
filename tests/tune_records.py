"""A call that tests of the tuner choose a backend for, and what may have been measured of it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ssdops import explain, masks
from ssdops.autotune.place import place_of
from ssdops.autotune.record import Key, Record, Trial
from ssdops.autotune.workload import Workload
from ssdops.backends.base import Config
from ssdops.ir.problem import Target
from ssdops.steps import Step


def tensors(seqlen: int = 70, learnt: bool = False) -> tuple[Tensor, Tensor, Tensor, masks.Mask]:
    """q, k, v and the mask."""
    draw = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 1, seqlen, 1, 4, generator=draw)
    v = torch.randn(1, seqlen, 2, 4, generator=draw)
    log_a = -torch.rand(1, seqlen, 2, generator=draw)
    return q, k, v.requires_grad_(learnt), masks.decay(log_a)


def step(**options: Any) -> Step:
    """How the call is planned."""
    (found,) = explain(*tensors(), **options).plan.steps
    return found


def known(*trials: Trial, direction: str = "forward") -> Record:
    """A record of the workload of `tensors()` on this device."""
    place = place_of(Target("cpu"))
    work = Workload("decay(log_a)", direction, "float32", "float32", 1, 70, 2, 4, 4, 1, 1, 2)
    return Record(Key(place, work.bucket()), trials, 1.0)


def considered(**seconds: float) -> tuple[Trial, ...]:
    """Trials of every backend that runs `tensors()`: of the given ones measured, of the rest skipped."""
    names = ("chunked", "recurrent", "naive", "tvm")
    sizes: dict[str, int | None] = {"chunked": 128, "tvm": 32}
    return tuple(
        Trial(name, Config(sizes.get(name)), "measured", seconds[name])
        if name in seconds
        else Trial(name, Config(sizes.get(name)), "skipped", note="not now")
        for name in names
    )
