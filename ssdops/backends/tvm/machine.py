"""What tiles suit a machine."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from enum import Enum
from functools import cache, partial
from itertools import product

import torch

from ...ir.problem import Problem
from .tile import LANES, LINES, PAIR_LANES

KIB = 1024
SHARED = {(8, 0): 163, (8, 7): 163, (9, 0): 227, (10, 0): 227, (10, 3): 227}
"""KiB of shared memory that a program may have, by compute capability; 99 with any other from 8.0 on."""
OWN = 4
"""KiB of it for what is not a tile, and for CUDA itself."""
INNER, OUTER, PART = (16, 32, 64, 128, 192, 256), (64, 32, 16), (128, 64, 32, 16)
"""Sizes of tiles on GPUs: of q and k, whichever holds them, and of parts of v in a walk, and of q and k in a group's program,
the first that there is room for."""


class Ahead(Enum):
    """What a program of a GPU loads while it multiplies: all, or q and k only once those before have been multiplied."""

    ALL, LATE, NOTHING = range(3)

    def fields(self) -> dict[str, bool]:
        """Of a `Tile`."""
        return {"ahead": self is not Ahead.NOTHING, "late": self is Ahead.LATE}


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

    def walked(self, size: int) -> int:
        """How much of k one program of a walk without y has: no sum is over it, so that two programs may share it."""
        inner = self.inner(size)
        return inner // 2 if inner == INNER[-1] else inner

    def outer(self, inner: int, size: int, chunk: int, late: bool, every: bool = False) -> tuple[int, Ahead]:
        """How much of v one program of a walk has, and what it loads ahead; q and k late only where that can be.

        Args:
            every: whether it keeps states in full precision.
        """
        able = tuple(Ahead) if late else (Ahead.ALL, Ahead.NOTHING)
        return self._fitting(OUTER, inner, size, chunk, partial(self.walk_needs, every=every), able)

    def part(self, inner: int, size: int, chunk: int) -> tuple[int, Ahead]:
        """How much of q and k one program of a group has, of heads whose v takes `inner`; and what it loads ahead."""
        return self._fitting(PART, inner, size, chunk, self.group_needs, (Ahead.ALL, Ahead.NOTHING))

    def _fitting(
        self, parts: tuple[int, ...], inner: int, size: int, chunk: int, needed: Callable[[int, int, Ahead, int], int],
        able: Iterable[Ahead],
    ) -> tuple[int, Ahead]:  # fmt: skip
        """The greatest part for which there is room, and the most that there is room to load ahead."""
        assert self.shared is not None  # parts are GPUs'
        wide, shared = self.inner(size), self.shared
        found = product((part for part in parts if part <= wide), able)
        return next((part, ahead) for part, ahead in found if needed(inner, part, ahead, chunk) <= shared)

    def has_room(self, size: int, chunk: int) -> bool:
        """Whether programs for heads so large fit."""
        if self.shared is None:
            return True
        inner = self.inner(size)
        nothing = Ahead.NOTHING
        walk, group = self.walk_needs(inner, OUTER[-1], nothing, chunk), self.group_needs(inner, PART[-1], nothing, chunk)
        return max(walk, group) <= self.shared

    def walk_needs(self, inner: int, outer: int, ahead: Ahead, chunk: int, every: bool = False) -> int:
        """KiB of shared memory that a walk takes: tiles of q and k, and of v, scores and lines, once or twice; v again,
        weights, y, and the state where products multiply it. What comes before and after lies over them, and so does a state in
        full precision, unless tiles are loaded ahead, which keep their places.
        """
        shared = chunk * 2 * (inner + 8) * self.data.itemsize
        held = chunk * (outer + 8 + chunk) * self.data.itemsize + self._lines(chunk)
        numbers = chunk * (2 * (outer + 8) + chunk + 8) + inner * (outer + 8)
        tiles = (1 + (ahead is Ahead.ALL)) * shared + (1 + (ahead is not Ahead.NOTHING)) * held
        state = 4 * inner * (outer + 8) if every and ahead is not Ahead.NOTHING else 0
        return -(-(tiles + self.data.itemsize * numbers + state) // KIB) + OWN

    def group_needs(self, inner: int, outer: int, ahead: Ahead, chunk: int) -> int:
        """KiB of shared memory that a group's program takes: tiles of v, dY, both states and lines, once or twice; tiles of q
        and k, scores twice and weights; in the dtype of sums pairs, and what is summed up of them and of dot products.
        """
        exact = self.data == torch.float32
        held = 2 * (chunk + outer) * (inner + 8) * self.data.itemsize + self._lines(chunk)
        numbers = 2 * chunk * (outer + 8) + chunk * (3 * chunk + 16)
        sums = chunk * (chunk + 1 + 2 * PAIR_LANES + 2 + 2 * outer // (4 if exact else LANES)) + LANES**2
        return -(-((1 + (ahead is Ahead.ALL)) * held + self.data.itemsize * numbers + 4 * sums) // KIB) + OWN

    def beside(self, size: int) -> int:
        """The tile of pairs that holds a size of z and w: threads share out rows of powers of two."""
        return round_up(size) if self.shared is None else next(fitting for fitting in INNER if size <= fitting != 192)

    def pairs_ahead(self, inner: int, outer: int, chunk: int, weighs: bool) -> bool:
        """Whether there is room for tiles of pairs to load ahead."""
        return self.shared is not None and self.pairs_needs(inner, outer, True, chunk, weighs) <= self.shared

    def pairs_fit(self, size: int, chunk: int) -> bool:
        """Whether programs of tiles of pairs fit, of heads so large."""
        wide = self.beside(size)
        return self.shared is None or self.pairs_needs(wide, wide, False, chunk, False) <= self.shared

    def pairs_needs(self, inner: int, outer: int, ahead: bool, chunk: int, weighs: bool) -> int:
        """KiB of shared memory that tiles of pairs take: of y and w, once or twice, and of x; scores and weights; and, where
        scores do not weigh z but meet those of it, of z, and the others. What comes after lies over them.
        """
        sums = chunk * (chunk + 8) * 4
        held = chunk * (inner + outer + 16) * self.data.itemsize
        mine = chunk * (inner + 8) * self.data.itemsize + 2 * sums
        mine += 0 if weighs else chunk * (outer + 8) * self.data.itemsize + sums
        return -(-max((1 + ahead) * held + mine, chunk * (outer + 8) * 4) // KIB) + 3 * OWN

    def _lines(self, chunk: int) -> int:
        """Bytes of what there is per token."""
        return chunk * LINES * (8 if self.data == torch.float32 else 4)


def round_up(size: int) -> int:
    """To whole lanes."""
    return -(-size // LANES) * LANES


def machine(problem: Problem) -> Machine:
    """The one that a problem runs on."""
    if problem.target.device == "cpu":
        return cpu(problem.accumulate)
    assert problem.target.capability is not None  # CUDA's have one
    return gpu(problem.target.capability, problem.dtype)


@cache
def cpu(dtype: torch.dtype) -> Machine:
    """Any processor, for products of a dtype."""
    return Machine("cpu", dtype, 32)


@cache
def gpu(capability: tuple[int, int], dtype: torch.dtype) -> Machine:
    """GPUs of a compute capability."""
    target = "sm_" + "".join(map(str, capability))
    return Machine(target, dtype, 32 if dtype == torch.float32 else 64, SHARED.get(capability, 99))
