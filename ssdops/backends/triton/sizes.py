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
    p, n, major = padded(problem.headdim), padded(problem.dstate), _major(problem)
    if problem.dtype == torch.float32:
        chunk = chunk or (32 if n <= 128 else 16)
        block = max(32 if _crowded(problem) else 64, chunk)
        return Sizes(
            chunk=chunk, block=block, rows=16, rows_back=min(p, 32), state=min(n, 128),
            state_back=min(n, 32), stages=2, stages_back=1, warps_back=4, registers=None,
        )  # fmt: skip
    small = n <= 128
    # 8.x has its operands in registers, and 10.x its sums in tensor memory, where each turn of an unrolled loop over headdim
    # has its own; 9.x has room for blocks of 128 tokens up to where shared memory ends (tests/triton_resources.txt).
    block = 128 if major == 9 and p <= 128 else 64
    columns = (128 if major in (9, 10) else 64) // (1 if p <= 128 else 2)
    return Sizes(
        chunk=chunk or CHUNKS[0], block=block, rows=min(p, 64), rows_back=min(p, 128 if major == 10 else 64),
        state=min(n, 128), state_back=min(n, columns), stages=3, stages_back=2, warps_back=4 if small else 8,
        registers=168 if small else None,
    )  # fmt: skip


def chunks(problem: Problem) -> tuple[int, ...]:
    """The chunk sizes that a problem can have, the default first."""
    return tuple(size for size in CHUNKS if size <= 32 or not _crowded(problem))


def _crowded(problem: Problem) -> bool:
    """Whether blocks of 64 tokens would need more tensor memory than there is: then they have 32, which do without it."""
    return problem.dtype == torch.float32 and _major(problem) == 10 and problem.headdim > 64


def _major(problem: Problem) -> int:
    """Of the compute capability; a device that has none runs what 9.0 does."""
    return (problem.target.capability or (9, 0))[0]


def padded(dim: int) -> int:
    """The power of two that holds a dimension; tensor cores take 16 at least."""
    return max(16, 1 << (dim - 1).bit_length())
