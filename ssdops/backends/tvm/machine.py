"""What tiles suit a machine."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch

from ...ir.problem import Problem
from .tile import LANES

KIB = 1024
SHARED = {(8, 0): 163, (8, 7): 163, (9, 0): 227, (10, 0): 227, (10, 3): 227}
"""KiB of shared memory that a program may have, by compute capability; 99 with any other from 8.0 on."""
OWN = 8
"""KiB of it for what is not a tile."""
INNER, OUTER = (16, 32, 64, 128, 192, 256), (64, 32, 16)
"""Sizes of tiles on GPUs: of q and k, whichever holds them, and of a part of v, the first that there is room for."""


@dataclass(frozen=True)
class Machine:
    """Tiles for a processor, or for GPUs of a compute capability.

    Attributes:
        target: as in `Tile`.
        data: dtype of what products multiply.
        chunk: tokens of a chunk by default.
        shared: KiB of shared memory for a program; None on a CPU.
    """

    target: str
    data: torch.dtype
    chunk: int
    shared: int | None = None

    def inner(self, size: int) -> int:
        """The tile that holds a size of q and k."""
        return round_up(size) if self.shared is None else next(fitting for fitting in INNER if size <= fitting)

    def outer(self, inner: int, size: int, chunk: int) -> int:
        """How much of v one program of a walk has."""
        if self.shared is None:
            return round_up(size)
        wide = self.inner(size)
        return next(part for part in OUTER if part <= wide and self.needed(inner, part, chunk) <= self.shared)

    def resident(self, inner: int, outer: int, chunk: int) -> int:
        """How many programs of a walk a multiprocessor has room for, two at most."""
        return 1 if self.shared is None or 2 * self.needed(inner, outer, chunk) > self.shared else 2

    def needed(self, inner: int, outer: int, chunk: int) -> int:
        """KiB of shared memory that a walk takes: tiles of q, k, v, weights and the state, the last in two dtypes."""
        numbers = chunk * (2 * inner + outer + chunk) + inner * outer
        if self.data == torch.float32:
            return -(-4 * numbers // KIB) + OWN
        padding = 8 * (3 * chunk + chunk + inner)
        return -(-(2 * (numbers + padding) + 4 * inner * (outer + 4)) // KIB) + OWN


def round_up(size: int) -> int:
    """To whole lanes."""
    return -(-size // LANES) * LANES


def machine(problem: Problem) -> Machine:
    """The one that a problem runs on."""
    if problem.target.device == "cpu":
        return Machine("cpu", problem.accumulate, 32)
    assert problem.target.capability is not None  # CUDA's have one
    return gpu(problem.target.capability, problem.dtype)


@cache
def gpu(capability: tuple[int, int], dtype: torch.dtype) -> Machine:
    """GPUs of a compute capability."""
    target = "sm_" + "".join(map(str, capability))
    return Machine(target, dtype, 32 if dtype == torch.float32 else 64, SHARED.get(capability, 99))
