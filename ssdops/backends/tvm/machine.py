"""What tiles suit a machine."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch

from ...ir.problem import Problem
from .tile import LANES, LINES, PAIR_LANES

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

    def outer(self, inner: int, size: int, chunk: int) -> int:
        """How much of v one program of a walk has."""
        if self.shared is None:
            return round_up(size)
        return self._part(size, lambda part: self.walk_needs(inner, part, chunk))

    def part(self, inner: int, size: int, chunk: int) -> int:
        """How much of q and k one program of a group has, of heads whose v takes `inner`."""
        return self._part(size, lambda part: self.group_needs(inner, part, chunk))

    def _part(self, size: int, needed: Callable[[int], int]) -> int:
        """The greatest for which there is room."""
        assert self.shared is not None  # parts are GPUs'
        wide, shared = self.inner(size), self.shared
        return next(part for part in OUTER if part <= wide and needed(part) <= shared)

    def has_room(self, size: int, chunk: int) -> bool:
        """Whether programs for heads so large fit."""
        if self.shared is None:
            return True
        inner, least = self.inner(size), OUTER[-1]
        return max(self.walk_needs(inner, least, chunk), self.group_needs(inner, least, chunk)) <= self.shared

    def resident(self, needed: int, warps: int) -> int:
        """How many programs that need so many KiB a multiprocessor has room for, of 16 warps at most."""
        return 1 if self.shared is None else max(1, min(self.shared // needed, 16 // warps))

    def walk_needs(self, inner: int, outer: int, chunk: int) -> int:
        """KiB of shared memory that a walk takes: tiles of q, k, v twice, scores, weights and y, and the state where products
        multiply it. What comes before and after lies over them.
        """
        numbers = chunk * (2 * inner + 3 * outer + 2 * chunk + 6 * LINES) + inner * (outer + 8)
        return -(-self.data.itemsize * numbers // KIB) + OWN

    def group_needs(self, inner: int, outer: int, chunk: int) -> int:
        """KiB of shared memory that a group's program takes: tiles of q, k, v and dY, both states, scores twice and weights;
        in the dtype of sums pairs, what is summed up of them and of dot products, and what there is per token.
        """
        numbers = 2 * chunk * (inner + outer + 16) + 2 * outer * (inner + 8) + chunk * (3 * chunk + 16)
        dots = 2 * outer // (4 if self.data == torch.float32 else LANES)
        lines = LINES * (2 if self.data == torch.float32 else 1)
        sums = chunk * (chunk + 1 + 2 * PAIR_LANES + 2 + dots + lines) + LANES**2
        return -(-(self.data.itemsize * numbers + 4 * sums) // KIB) + OWN


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
