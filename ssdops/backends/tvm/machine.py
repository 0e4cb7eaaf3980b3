"""What tiles suit a machine."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch

from ...ir.problem import Problem
from .tile import KEPT, LANES, MET

KIB = 1024
SHARED = {(8, 0): 163, (8, 7): 163, (9, 0): 227, (10, 0): 227, (10, 3): 227}
"""KiB of shared memory that a program may have, by compute capability; 99 with any other from 8.0 on."""
OWN = 4
"""KiB of it for what is not a tile, and for CUDA itself."""
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

    def outer(self, inner: int, size: int, chunk: int, mode: str) -> int:
        """How much of v one program of a walk has."""
        if self.shared is None:
            return round_up(size)
        wide = self.inner(size)
        return next(part for part in OUTER if part <= wide and self.needed(inner, part, chunk, mode) <= self.shared)

    def has_room(self, size: int, chunk: int) -> bool:
        """Whether walks of heads so large fit, with whatever they do beside y."""
        return self.shared is None or self.needed(self.inner(size), OUTER[-1], chunk, MET) <= self.shared

    def resident(self, inner: int, outer: int, chunk: int, mode: str) -> int:
        """How many programs of a walk a multiprocessor has room for, of 16 warps at most."""
        if self.shared is None:
            return 1
        warps = min(8, chunk * outer // 256, inner * outer // 256)
        return max(1, min(self.shared // self.needed(inner, outer, chunk, mode), 16 // warps))

    def needed(self, inner: int, outer: int, chunk: int, mode: str) -> int:
        """KiB of shared memory that a walk takes: tiles of q, k, v twice, scores, weights and y, the state where products
        multiply it, and with a mode what is read from it or passes it, in float32. What comes before and after lies over them.
        """
        numbers = chunk * (2 * inner + 3 * outer + 2 * chunk + 6 * 8) + inner * (outer + 8)
        in_float32 = chunk * (outer + 8 + LANES) if mode in (KEPT, MET) else 0
        in_float32 += LANES * outer if mode == MET else 0
        return -(-(self.data.itemsize * numbers + 4 * in_float32) // KIB) + OWN


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
