"""Tile sizes: what fits the registers and the shared memory of a program, from the sizes of the problem."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ...ir.problem import Problem

CHUNKS = (32, 16, 64)
"""Chunk sizes, the default first: 32 tokens leave the registers of a multiprocessor room for three programs of 64 rows."""
MAX_DIM = 256
"""The greatest headdim and dstate: a state [64, 256] in float32 takes half of a program's registers."""


@dataclass(frozen=True, slots=True)
class Sizes:
    """Of one call.

    Attributes:
        chunk: tokens of a chunk of the scan.
        block: tokens between the states that the backward pass keeps.
        rows: rows of the state, of headdim, that a program of the scan owns.
        rows_back: rows of headdim that the backward pass takes at once.
        state: columns of the state, of dstate, in its first part; the rest, if any, is a second part.
        state_back: columns of dstate that the backward pass takes at once.
        stages, stages_back: how many chunks, or heads, are in flight.
        warps_back: of a program of the backward pass's scans.
        registers: the most that a thread of the forward scan may take; None is no limit.
    """

    chunk: int
    block: int
    rows: int
    rows_back: int
    state: int
    state_back: int
    stages: int
    stages_back: int
    warps_back: int
    registers: int | None


def sizes(problem: Problem, chunk: int | None) -> Sizes:
    """The tiles of a problem; float32 products are three of tf32 and take thrice the registers."""
    p, n = padded(problem.headdim), padded(problem.dstate)
    if problem.dtype == torch.float32:
        chunk = chunk or (32 if n <= 128 else 16)
        return Sizes(
            chunk=chunk, block=max(64, chunk), rows=16, rows_back=min(p, 32), state=min(n, 128),
            state_back=min(n, 32), stages=2, stages_back=1, warps_back=4, registers=None,
        )  # fmt: skip
    small = n <= 128
    return Sizes(
        chunk=chunk or CHUNKS[0], block=128, rows=min(p, 64), rows_back=min(p, 64), state=min(n, 128),
        state_back=min(n, 128), stages=3, stages_back=2, warps_back=4 if small else 8, registers=168 if small else None,
    )  # fmt: skip


def padded(dim: int) -> int:
    """The power of two that holds a dimension; tensor cores take 16 at least."""
    return max(16, 1 << (dim - 1).bit_length())
